"""`plan --compile`: the step compiled for chips that are not here, in words and as JSON."""

import os

from llama_jax.cli.plan_text import Rows
from llama_jax.errors import InputError
from llama_jax.planning.job import Job


def compiled_rows(job: Job) -> tuple[Rows, dict]:
    """Compiles the training step of a job; rows of text, and the same as figures.

    Raises:
      InputError: for what cannot be compiled here, and for a step whose temporaries alone are too much for a chip.
    """
    # Asks no metadata server which machine this is, takes no lock on devices, of which none is opened.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from llama_jax.planning.ahead import compile_training
    from llama_jax.planning.ruler import CALIBRATION

    try:
        step = compile_training(job)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"the compiler says that the step does not fit: {str(error).splitlines()[0]:.200}") from None
    limit, total = job.topology.chip.memory, step.arguments + step.temporaries
    verdict = "fits" if total <= limit else "does not fit"
    sizes = f"{step.arguments / 1e9:.2f} GB of state and batch + {step.temporaries / 1e9:.2f} GB = {total / 1e9:.2f}"
    rows = [("compiled", f"in {step.seconds:.0f} s: {sizes} of {limit / 1e9:.1f} GB a chip: {verdict}")]
    figures = {"seconds": step.seconds, "arguments": step.arguments, "temporaries": step.temporaries, "fits": total <= limit}
    times = step.prediction
    if times is None:
        return rows, figures
    if times.unknown_loops:
        raise InputError(
            f"the compiled program has {times.unknown_loops} loops of unknown length; its time cannot be predicted"
        )
    shares = times.shares(step.flops, job.topology.chip.peak)
    moved = ", ".join(
        f"{count} x {kind} ({times.moved[kind] / 1e9:.1f} GB)" for kind, count in sorted(times.collectives.items())
    )
    rows += [
        ("predicted", f"{times.simulated:.3f} s a step, causal MFU {shares[2]:.1%} ({shares[0]:.1%} by compute alone, "
                      f"{shares[1]:.1%} with synchronous transfers); {job.tokens / times.simulated:,.0f} tokens/s"),
        ("", f"from the compiler's own estimates, not measured: {CALIBRATION}"),
        ("transfers", moved or "none"),
        ("copies", ", ".join(f"{count} x {what}" for what, count in times.copies.items()) or "none of 1 MiB or more in loops"),
    ]  # fmt: skip
    names = ("compute", "synchronous", "simulated")
    predicted = times._asdict() | {"mfu": dict(zip(names, shares)), "calibration": CALIBRATION}
    return rows, figures | {"predicted": predicted}

"""Every config for TPU pods, its training step compiled as `train.py` builds it: whether it fits
the chips that it is for.

    python benchmarks/tpu_presets.py [--layers N] [--quick] [FILE ...]

The topology stands in the first comment of a file, in the command of the plan. Nothing is run:
  memory is the compiler's, times
are predictions from its estimates (`llama_jax/planning/cost_model.py`). Ends with status 1 if a
step does not fit or does not compile. Needs the extra `tpu`; on two cores a config takes minutes,
whatever its depth, as layers are one body of a loop. With --quick kernels are given the memory that
the compiler gives them by default, and attention goes by smaller blocks: compiled in a third of the
time, for nearly the same memory of the chip; the predicted times are longer than those of a run.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server which machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # takes no lock: no device is opened
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
from report import heading

import llama_jax.model.splash
import llama_jax.training.step
from llama_jax.cli.plan import config_job, read_config
from llama_jax.parallel.chips import Topology, parse_topology
from llama_jax.parallel.compiler import training_options
from llama_jax.planning.compile import Compiled, compile_config
from llama_jax.planning.job import Job
from llama_jax.planning.plan import make_plan

PODS = pathlib.Path(__file__).parent.parent / "configs" / "pods"
_COLUMNS = (
    "config",
    "topology",
    "mesh, remat, micro-batches",
    "arguments + temporaries = GB",
    "of GB",
    "closed form",
    "predicted s",
    "MFU compute / exposed / simulated",
    "compiled in s",
    "transfers",
)


def topology_of(path: pathlib.Path) -> Topology:
    """The chips that a file is for."""
    found = re.search(
        r"^#   python -m llama_jax plan --config \S+ --topology (\S+)$",
        path.read_text("utf8"),
        re.MULTILINE,
    )
    if found is None:
        sys.exit(f"error: {path}: its first comment has no command of the plan, with --topology")
    return parse_topology(found[1])


def tpu_configs() -> list[pathlib.Path]:
    """The files that are for TPUs."""
    return [path for path in sorted(PODS.glob("*.yaml")) if topology_of(path).chip.axes]


def compile_quickly() -> None:
    """From now on steps are compiled without what makes their kernels large."""
    llama_jax.model.splash._LARGEST_BLOCK = 512
    llama_jax.training.step.training_options = lambda mesh: {
        name: value for name, value in training_options(mesh).items() if "scoped_vmem" not in name
    }


def compile_preset(path: pathlib.Path, layers: int = 0) -> tuple[Job, Compiled]:
    """The step of a file, with all layers or so many."""
    config = read_config(path)
    if layers:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers))
    job = config_job(config, topology_of(path))
    return job, compile_config(config, job)


def sequence(path: pathlib.Path, job: Job, compiled: Compiled) -> str:
    """A line of the table."""
    times, total = compiled.prediction, compiled.arguments + compiled.temporaries
    assert times is not None
    assert not times.unknown_loops
    shares = " / ".join(
        f"{100 * share:.1f} %" for share in times.shares(compiled.flops, job.topology.chip.peak)
    )
    moved = ", ".join(
        f"{count} {kind} {times.moved[kind] / 1e9:.1f} GB"
        for kind, count in sorted(times.collectives.items())
    )
    cells = (
        path.stem,
        job.topology.name,
        f"{job.mesh}, {job.remat}, {job.microbatches}",
        f"{compiled.arguments / 1e9:.2f} + {compiled.temporaries / 1e9:.2f} = {total / 1e9:.2f}",
        f"{job.topology.chip.memory / 1e9:.1f}",
        f"{make_plan(job).memory.total / total - 1:+.1%}",
        f"{times.simulated:.2f}",
        shares,
        f"{compiled.seconds:.0f}",
        moved,
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Configs for TPU pods, compiled.")
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0 for all")
    parser.add_argument(
        "--quick", action="store_true", help="smaller kernels: about the same memory, longer times"
    )
    options = parser.parse_args()
    print(heading("libtpu"))
    depth = f"{options.layers} layers of each model" if options.layers else "whole models"
    if options.quick:
        compile_quickly()
        depth += ", small kernels (--quick: times are longer than a run's)"
    print(f"settings  {depth}, compiled ahead of time, never run; times are predicted", flush=True)
    print(f"\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    failed = []
    for path in options.files or tpu_configs():
        try:
            job, compiled = compile_preset(path, options.layers)
        except jax.errors.JaxRuntimeError as error:
            print(
                f"| {path.stem} | {topology_of(path).name} | does not compile: "
                f"{str(error).splitlines()[0]:.160} |",
                flush=True,
            )
            failed.append(path.stem)
            continue
        print(sequence(path, job, compiled), flush=True)
        if compiled.arguments + compiled.temporaries > job.topology.chip.memory:
            failed.append(path.stem)
    print(f"\n{'do not fit: ' + ', '.join(failed) if failed else 'all fit'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

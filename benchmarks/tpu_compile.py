"""The project's own training step compiled for TPU slices that are not here: memory, predicted
time, transfers, copies.

    python benchmarks/tpu_compile.py [--cases llama3-8b@v5p:4x4x4,llama3-8b@v6e:8x8/remat=q+k+v]
    [--layers N] [--keep DIR]

A case is MODEL@TOPOLOGY, then settings NAME=VALUE behind slashes: `remat`, `mesh` (such as
fsdp=32;tensor=2), `sequences` a chip, `length`, `moments` and `params` (their types), `chunk`
(tokens of the loss). Nothing is run: times are predictions from the compiler's estimates
(`llama_jax/planning/cost_model.py`). Needs the extra `tpu`; on two cores a case takes minutes. With
--layers only so many are compiled, to look at the program.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server which machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # takes no lock: no device is opened
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from report import heading

from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.compile import Compiled, compile_training
from llama_jax.planning.job import Job, parse_mesh
from llama_jax.presets import preset

_SETTINGS = ("remat", "mesh", "sequences", "length", "moments", "params", "chunk")
_COLUMNS = (
    "case",
    "arguments + temporaries GB",
    "of GB",
    "predicted s",
    "MFU compute / exposed / simulated",
    "compiled in s",
    "attention forward : backward",
    "collectives",
    "copies in loops",
)


def parse_case(text: str, layers: int) -> Job:
    """The training that a case names."""
    where, *settings = text.split("/")
    model, _, topology_name = where.partition("@")
    given = dict(setting.partition("=")[::2] for setting in settings)
    unknown = set(given) - set(_SETTINGS)
    if unknown:
        sys.exit(
            f"error: case {text!r}: {unknown.pop()!r} is unknown; some of "
            f"{', '.join(_SETTINGS)} expected"
        )
    config, topology = preset(model), parse_topology(topology_name)
    config = dataclasses.replace(config, layers=layers) if layers else config
    mesh = parse_mesh(given.get("mesh", "").replace(";", ",") or None, topology)
    sequences, length = (
        int(given.get("sequences", 1)) * mesh.sequences,
        int(given.get("length", 8192)),
    )
    return Job(
        config,
        topology,
        mesh,
        length,
        sequences,
        remat=given.get("remat", "all"),
        moment_dtype=given.get("moments", "float32"),
        param_dtype=given.get("params", "float32"),
        loss_chunk=int(given.get("chunk", Job.loss_chunk)),
    )


def sequence(text: str, job: Job, compiled: Compiled) -> str:
    """A line of the table."""
    times = compiled.prediction
    assert times is not None
    assert not times.unknown_loops
    shares = " / ".join(
        f"{100 * share:.1f} %" for share in times.shares(compiled.flops, job.topology.chip.peak)
    )
    moved = ", ".join(
        f"{count} {kind} {times.moved[kind] / 1e9:.1f} GB"
        for kind, count in sorted(times.collectives.items())
    )
    copies = ", ".join(f"{count} x {what}" for what, count in times.copies.items()) or "none"
    cells = (
        text,
        f"{compiled.arguments / 1e9:.2f} + {compiled.temporaries / 1e9:.2f}",
        f"{job.topology.chip.memory / 1e9:.1f}",
        f"{times.simulated:.3f}",
        shares,
        f"{compiled.seconds:.0f}",
        f"{times.forward_kernels} : {times.backward_kernels}",
        moved,
        copies,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps compiled for TPU slices.")
    parser.add_argument("--cases", default="llama3-8b@v5p:4x4x4")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for the programs' text")
    options = parser.parse_args()
    print(heading("libtpu"))
    print("settings  compiled ahead of time, never run; times are predicted", flush=True)
    print(f"\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    for number, text in enumerate(options.cases.split(",")):
        job = parse_case(text, options.layers)
        compiled = compile_training(job)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}.txt").write_text(compiled.text)
        print(sequence(text, job, compiled), flush=True)


if __name__ == "__main__":
    main()

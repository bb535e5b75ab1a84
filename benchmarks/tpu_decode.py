"""The project's own decoding step compiled for TPU slices that are not here: memory, predicted
time, transfers.

    python benchmarks/tpu_decode.py [--cases
    llama3.1-70b@v5e:4x4/int8,llama3-8b@v6e:2x4/sequences=16] [--layers N] [--keep DIR]

A case is MODEL@TOPOLOGY, then settings behind slashes: `int8` or `int4` weights, `cache8`, and
`sequences`, `length`, `tensor` and `data` as NAME=NUMBER. It is the loop that generation runs, with
full sequences. Nothing is run: times are predictions from the compiler's estimates
(`llama_jax/planning/cost_model.py`), in which beginning a transfer costs nothing. Needs the extra
`tpu`.
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

from llama_jax.config import LlamaConfig
from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.compile import Compiled, compile_decoding
from llama_jax.planning.cost_model import predict_round
from llama_jax.planning.job import parse_mesh
from llama_jax.planning.speed import DecodePlan, make_decode_plan
from llama_jax.presets import preset

_CASES = "llama3.1-70b@v5e:4x4/int8,llama3-8b@v6e:2x4,llama3-8b@v5p:2x2x1"
_NUMBERS = ("sequences", "length", "tensor", "data")
_COLUMNS = (
    "case",
    "layers",
    "mesh",
    "sequences x length",
    "arguments + temporaries GB",
    "of GB",
    "closed form GB",
    "GB/step and chip",
    "MB/token, all chips",
    "limit ms",
    "predicted ms",
    "of the limit",
    "with top-p ms",
    "tokens/s",
    "transfers a step",
    "compiled in s",
)


def parse_case(text: str, layers: int) -> tuple[LlamaConfig, DecodePlan, str, str]:
    """The decoding that a case names: architecture, plan, types of weights and cache."""
    where, *settings = text.split("/")
    model, _, topology_name = where.partition("@")
    words = {setting for setting in settings if "=" not in setting}
    given = dict(setting.partition("=")[::2] for setting in settings if "=" in setting)
    unknown = [*(words - {"int8", "int4", "cache8"}), *(set(given) - set(_NUMBERS))]
    if unknown or not all(number.isdecimal() for number in given.values()):
        sys.exit(
            f"error: case {text!r}: int8, int4, cache8, or {', '.join(_NUMBERS)} as "
            "NAME=NUMBER expected"
        )
    config, topology = preset(model), parse_topology(topology_name)
    config = dataclasses.replace(config, layers=layers) if layers else config
    sizes = ",".join(f"{axis}={given[axis]}" for axis in ("data", "tensor") if axis in given)
    mesh = parse_mesh(f"{sizes},fsdp=1", topology) if sizes else None
    dtype = "int8" if "int8" in words else "int4" if "int4" in words else "bfloat16"
    cache = "int8" if "cache8" in words else "bfloat16"
    plan = make_decode_plan(
        config,
        topology,
        int(given.get("sequences", 16)),
        int(given.get("length", 2048)),
        dtype,
        cache,
        mesh,
    )
    return config, plan, dtype, cache


def sequence(text: str, config: LlamaConfig, plan: DecodePlan, compiled: Compiled) -> str:
    """A line of the table."""
    times = compiled.prediction
    assert times is not None
    assert not times.unknown_loops
    drawn = predict_round(compiled.text, plan.topology, longest=True)
    moved = ", ".join(
        f"{count} {kind} {times.moved[kind] / 1e6:.2f} MB"
        for kind, count in sorted(times.collectives.items())
    )
    cells = (
        text,
        str(config.layers),
        f"{plan.mesh}",
        f"{plan.batch} x {plan.length}",
        f"{compiled.arguments / 1e9:.2f} + {compiled.temporaries / 1e9:.2f}",
        f"{plan.limit / 1e9:.1f}",
        f"{plan.total / 1e9:.2f}",
        f"{plan.moved / 1e9:.2f}",
        f"{plan.bytes_per_token / 1e6:,.0f}",
        f"{1e3 * plan.step:.2f}",
        f"{1e3 * times.simulated:.2f}",
        f"{plan.step / times.simulated:.0%}",
        f"{1e3 * drawn.simulated:.2f}",
        f"{plan.batch / times.simulated:,.0f}",
        moved or "none",
        f"{compiled.seconds:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding steps compiled for TPU slices.")
    parser.add_argument("--cases", default=_CASES)
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0 for all")
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for the programs' text")
    options = parser.parse_args()
    print(heading("libtpu"))
    print(
        "settings  compiled ahead of time, never run; times are predicted, transfers "
        "begin at no cost",
        flush=True,
    )
    print(f"\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    for number, text in enumerate(options.cases.split(",")):
        config, plan, dtype, cache = parse_case(text, options.layers)
        compiled = compile_decoding(config, plan, dtype, cache)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}.txt").write_text(compiled.text)
        print(sequence(text, config, plan, compiled), flush=True)


if __name__ == "__main__":
    main()

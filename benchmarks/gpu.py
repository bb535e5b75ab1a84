"""Training and generation on one GPU beside transformers and PyTorch (compiled), bfloat16, random weights, one run.

    python benchmarks/gpu.py [--cases train-1b,lora-8b,full-8b,generate-8b,generate-8b-int8,generate-1b] [--no-peer] [--profile]

Training is that of the presets in configs/pods for one H100, in 75 GiB. Decoding speed is that of all new tokens after the
first. Each side runs in a process of its own and is asked while nothing else runs; speeds are set against what this card's own
copies and products reach in the same run.
"""

import argparse
import os
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import gpu_sides
from report import heading
from sides import start

_MEMORY = 75 * 2**30  # what one H100 of 80 GB leaves
_MANY = 8192  # tokens at a time from which a prefill is more than a wait for memory
_PEAK = 989.5e12  # bfloat16, of the data sheet of H100 and H200 (SXM), without sparsity
Card = tuple[str, float, float, int]  # name, bytes a second of a copy, FLOP/s of a product, bytes of memory


class Training(NamedTuple):
    """A preset and what its peer does.

    Attributes:
      model: a name.
      preset: the YAML file.
      settings: given behind it.
      method: of the peer.
      micro_rows: of the peer, as many as fit in 80 GB.
      mean: tokens of a document; 0 for whole rows.
    """

    model: str
    preset: str
    settings: list[str]
    method: str
    micro_rows: int
    mean: int


class Generation(NamedTuple):
    """A model, the dtype of its weights, and (rows, prompt, new tokens) to be timed."""

    model: str
    dtype: str
    cases: list[tuple[int, int, int]]


_AT_4K = ["--data.length", "4096"]
CASES = {
    "train-1b": Training(
        "llama3.2-1b",
        "configs/pods/llama3.2-1b-h100-1.yaml",
        [*_AT_4K, "--data.batch_rows", "16", "--data.accumulation", "4"],
        "pretrain",
        2,
        0,
    ),
    "lora-8b": Training(
        "llama3.1-8b",
        "configs/pods/llama3.1-8b-lora-h100-1.yaml",
        [*_AT_4K, "--data.batch_rows", "8", "--data.accumulation", "4"],
        "lora",
        1,
        512,
    ),
    "full-8b": Training("llama3.1-8b", "configs/pods/llama3.1-8b-full-h100-1.yaml", _AT_4K, "full", 1, 0),
    "generate-8b": Generation("llama3.1-8b", "bfloat16", [(1, 1024, 129), (8, 1024, 129), (64, 1024, 129)]),
    "generate-8b-int8": Generation("llama3.1-8b", "int8", [(1, 1024, 129)]),
    "generate-1b": Generation("llama3.2-1b", "bfloat16", [(1, 1024, 129)]),
}


_TRAINING_COLUMNS = [
    *("case", "tokens/s", "transformers", "ratio", "causal MFU of 989.5", "of the product measured", "GB", "GB transformers"),
    *("loss", "prepared in s"),
]
_GENERATION_COLUMNS = ["case", "what", "tokens/s", "transformers", "ratio", "share"]


def ratio(ours: float, peer: float | None) -> str:
    return "-" if peer is None else f"{ours / peer:.2f}"


def train(name: str, case: Training, options: argparse.Namespace, card: Card) -> None:
    """One line of the table of trainings."""
    from llama_jax.cli.arguments import parse_train
    from llama_jax.planning.of_config import devices_of, job_of
    from llama_jax.planning.speed import flops_per_token

    settings = [*case.settings, *options.set]
    config = parse_train(["--config", case.preset, *settings], pathlib.Path(case.preset))
    rows, length = config.data.batch_rows, config.data.length
    fraction = min(0.92, _MEMORY / card[3])
    side = start(gpu_sides.train_llama_jax, case.preset, settings, case.mean, options.updates, fraction, options.profile)
    ours = side.ask()
    side.stop()
    theirs = None
    if options.peer:
        peer = start(gpu_sides.train_transformers, case.model, case.method, rows, case.micro_rows, length, options.updates)
        theirs = peer.ask()
        peer.stop()
    tokens = rows * length
    flops = flops_per_token(job_of(config, devices_of(card[0], 1)))
    speed, other = tokens / ours.seconds, None if theirs is None else tokens / theirs.seconds
    cells = [
        name, f"{speed:,.0f}", "-" if other is None else f"{other:,.0f}", ratio(speed, other),
        f"{100 * speed * flops / _PEAK:.1f} %", f"{100 * speed * flops / card[2]:.1f} %", f"{ours.memory / 1e9:.1f}",
        "-" if theirs is None else f"{theirs.memory / 1e9:.1f}", f"{ours.loss:.2f}",
        f"{ours.prepared:.0f}" + ("" if theirs is None else f" / {theirs.prepared:.0f}"),
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    if ours.kernels:
        print(ours.kernels, flush=True)


def generate(name: str, case: Generation, options: argparse.Namespace, card: Card) -> None:
    """A line of the table of generations for each number of rows."""
    from llama_jax.accounting import training_flops_per_token
    from llama_jax.planning.chips import parse_topology
    from llama_jax.planning.decode import make_decode_plan
    from llama_jax.presets import preset

    config, fraction = preset(case.model), min(0.45, _MEMORY / card[3])
    cases = [one for one in case.cases if str(one[0]) in options.rows.split(",")]
    side = start(gpu_sides.generate_llama_jax, case.model, case.dtype, cases, fraction, options.profile)
    sides = {"llama_jax": side}
    if options.peer:  # both get ready side by side; asking begins when both are
        sides["transformers"] = start(gpu_sides.generate_transformers, case.model, cases)
    for one in sides.values():
        one.ask(*cases[0])
    for rows, length, new in cases:
        answers = [one.ask(rows, length, new) for one in sides.values()]
        plan = make_decode_plan(config, parse_topology("h100:1"), rows, length + new // 2, case.dtype)
        flops = training_flops_per_token(config, length) / 3
        decoded, read = (
            [rows * (new - 1) / answer.decode for answer in answers],
            [rows * length / answer.prefill for answer in answers],
        )
        moved = decoded[0] / rows * plan.moved
        share = f"{moved / 1e12:.2f} TB/s, {100 * moved / card[1]:.0f} % of a copy"
        lines = [(f"decode, {rows} rows behind {length}", decoded, share)]
        if rows * length >= _MANY:
            lines.append((f"prefill, {rows} rows of {length}", read, f"{100 * read[0] * flops / _PEAK:.1f} % MFU"))
        for what, (ours, *others), share in lines:
            other = others[0] if others else None
            cells = [name, what, f"{ours:,.0f}", "-" if other is None else f"{other:,.0f}", ratio(ours, other), share]
            print(f"| {' | '.join(cells)} |", flush=True)
    for one in sides.values():
        one.stop()


def table(columns: list[str]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training and generation on one GPU beside transformers and PyTorch.")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--rows", default="1,8,64", help="of generations, those of the cases that are to be run")
    parser.add_argument("--updates", type=int, default=4, help="of a training, timed together")
    parser.add_argument("--profile", action="store_true", help="the kernels that took longest")
    parser.add_argument("--set", nargs="*", default=[], help="settings for the trainings, as --set=--compute.remat=none")
    options = parser.parse_args()
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        sys.exit(f"error: --cases: {unknown.pop()!r} is unknown; {', '.join(CASES)} expected")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process; the sides have the card
    side = start(gpu_sides.hardware)
    card = side.ask()
    side.stop()
    print(heading("transformers", "torch", device=card[0]))
    print(f"measured  copy {card[1] / 1e12:.2f} TB/s, bfloat16 product of 8192^3 {card[2] / 1e12:.0f} TFLOP/s", flush=True)
    cases = [(name, CASES[name]) for name in options.cases.split(",")]
    for kind, run, columns in (
        (Training, train, _TRAINING_COLUMNS),
        (Generation, generate, _GENERATION_COLUMNS),
    ):
        chosen = [(name, case) for name, case in cases if isinstance(case, kind)]
        if chosen:
            table(columns)
        for name, case in chosen:
            try:
                run(name, case, options, card)
            except (EOFError, OSError):  # a side has died; what it said stands above
                print(f"| {name} | failed |", flush=True)


if __name__ == "__main__":
    main()

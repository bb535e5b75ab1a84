"""Products of one row (or a few) with weights of each kind on CPU: `llama_jax`'s form beside the
plain one.

    python benchmarks/product.py [--rows 1] [--rounds 5]

A chain of 30 SwiGLU blocks (576 -> 1536 -> 576), so that every product waits for the one before,
and a tied head of 49152 rows.
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from report import heading

from llama_jax.model.matmul import product
from llama_jax.model.quantize import Quantized, dequantize, parameter_bytes, quantize

BLOCKS, WIDTH, INNER, VOCABULARY = 30, 576, 1536, 49152
CALLS = 8  # a round, of which the shortest counts


def chain(multiply):
    """The stream through all blocks."""

    def run(x, weights):
        for block in weights.values():
            hidden = jax.nn.silu(multiply(x, block["gate"])) * multiply(x, block["up"])
            x = x + multiply(hidden, block["down"]).astype(x.dtype)
        return x

    return run


def plain(x, weight, axis: int = 0):
    """As one would write it: the weight as a matrix of the type of the activations, then
    multiplied.
    """
    matrix = dequantize(weight).T if isinstance(weight, Quantized) else weight.T if axis else weight
    return x @ matrix.astype(x.dtype)


def kinds(params):
    """Weights of each kind with the dtype of the activations."""
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return {
        "float32": (params, jnp.float32),
        "bfloat16, float32 activations": (narrow, jnp.float32),
        "bfloat16": (narrow, jnp.bfloat16),
        "8 bits": (quantize(params, 8), jnp.float32),
        "4 bits": (quantize(params, 4), jnp.float32),
    }


def measure(cases: dict, rounds: int) -> dict[str, float]:
    """Seconds of the shortest call of each case; cases take turns."""
    best = dict.fromkeys(cases, float("inf"))
    for call, *arguments in cases.values():
        jax.block_until_ready(call(*arguments))
    for name in [*cases] * rounds:
        call, *arguments = cases[name]
        for _ in range(CALLS):
            started = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def table(title: str, cases: dict, rounds: int) -> None:
    print(f"\n| {title} | ms | GB/s of weights as stored | MB of temporaries |\n|---|---|---|---|")
    for name, seconds in measure(cases, rounds).items():
        call, x, weights = cases[name]
        size, spare = (
            parameter_bytes(weights),
            call.lower(x, weights).compile().memory_analysis().temp_size_in_bytes,
        )
        print(
            f"| {name} | {1e3 * seconds:.1f} | {size / seconds / 1e9:.1f} | {spare / 1e6:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Products with narrow weights.")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def drawn(*shape: int):
        return jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)

    blocks = {
        f"layers_{i}": {
            "gate": drawn(WIDTH, INNER),
            "up": drawn(WIDTH, INNER),
            "down": drawn(INNER, WIDTH),
        }
        for i in range(BLOCKS)
    }
    x = drawn(options.rows, WIDTH)
    print(heading())
    forms = {"product": product, "plain": plain}
    cases = {
        f"{kind}, {form}": (jax.jit(chain(multiply)), x.astype(dtype), weights)
        for kind, (weights, dtype) in kinds(blocks).items()
        for form, multiply in forms.items()
    }
    table(f"chain of {BLOCKS} blocks, {options.rows} row(s)", cases, options.rounds)
    cases = {
        f"{kind}, {form}": (
            jax.jit(lambda x, w, multiply=multiply: multiply(x, w["embedding"], axis=1)),
            x.astype(dtype),
            weights,
        )
        for kind, (weights, dtype) in kinds({"embedding": drawn(VOCABULARY, WIDTH)}).items()
        if kind != "4 bits"
        for form, multiply in forms.items()
    }
    table(f"tied head, {options.rows} row(s)", cases, options.rounds)


if __name__ == "__main__":
    main()

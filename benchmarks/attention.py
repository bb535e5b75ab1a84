"""Attention: memory as XLA plans it, and on a GPU its speed beside PyTorch's
`scaled_dot_product_attention`, one run.

    python benchmarks/attention.py [--lengths 4096,8192,16384]

On a GPU: bfloat16, 4 sequences of 4,096, 32 query and 8 key/value heads; sequences of one document,
and packed ones of 512 tokens on average, which PyTorch is not told of. FLOPs are those of whole
causal sequences, so packed sequences show more than the card can do.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from report import heading
from sides import call_seconds, start

_ROWS, _LENGTH, _HEADS, _KV_HEADS, _TIMES = 4, 4096, 32, 8, 20


def temporary_bytes(backend: str, length: int) -> int:
    """XLA's figure for one sequence, 9 query and 3 key/value heads of width 64, float32."""
    import jax
    import jax.numpy as jnp

    from llama_jax.model.attention import attend

    query, key = (jax.ShapeDtypeStruct((1, heads, length, 64), jnp.float32) for heads in (9, 3))
    step = jax.grad(lambda q, k, v: attend(q, k, v, backend=backend).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(query, key, key).compile().memory_analysis().temp_size_in_bytes


def documents(mean: int) -> np.ndarray:
    """Document numbers of packed sequences."""
    return 1 + np.cumsum(
        np.random.default_rng(0).random((_ROWS, _LENGTH)) < 1 / mean, axis=1
    ).astype(np.int32)


def cudnn(width: int, mean: int) -> Callable[[], tuple[float, float]]:
    """Seconds of forward, and of forward and backward."""
    import jax
    import jax.numpy as jnp

    from llama_jax.model.cudnn import cudnn_attention
    from llama_jax.parallel.sharding import TRAINING

    numbers = jnp.asarray(documents(mean)) if mean else jnp.ones((_ROWS, _LENGTH), jnp.int32)
    given = [
        jax.random.normal(jax.random.key(i), (_ROWS, _LENGTH, heads, width), jnp.bfloat16)
        for i, heads in enumerate((_HEADS, _KV_HEADS, _KV_HEADS))
    ]

    def attention(q: Any, k: Any, v: Any) -> Any:
        """Tokens before heads, as the products before it leave them."""
        return cudnn_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), numbers, TRAINING).swapaxes(
            1, 2
        )

    def gradients(q: Any, k: Any, v: Any) -> Any:
        """Of q, with k and v having their part in it, or they would not be computed."""
        dq, dk, dv = jax.vjp(attention, q, k, v)[1](q)
        return dq + (dk.sum() + dv.sum()).astype(dq.dtype)

    return lambda: (
        call_seconds(attention, _TIMES, *given),
        call_seconds(gradients, _TIMES, *given),
    )


def pytorch(width: int, mean: int) -> Callable[[], tuple[float, float]]:
    """The same by PyTorch, whole sequences."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (
        torch.randn(
            _ROWS, heads, _LENGTH, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    )

    def forward() -> Any:
        """Causal, grouped."""
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both() -> None:
        """Forward and backward."""
        torch.autograd.grad(forward(), (q, k, v), q)

    def seconds(function: Callable) -> float:
        """Of one call, the best of three."""
        spent = []
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(_TIMES):
                function()
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - started)
        return min(spent[1:]) / _TIMES

    def all_of_it() -> tuple[float, float]:
        """Without keeping graphs in the forward pass."""
        with torch.no_grad():
            alone = seconds(forward)
        return alone, seconds(both)

    return all_of_it


def speeds() -> None:
    """The table of speeds."""
    print(
        "\n| sequences, head width | side | forward ms | TFLOP/s | with backward ms | "
        "TFLOP/s |\n|---|---|---|---|---|---|"
    )
    for width in (64, 128):
        for mean, sequences in ((0, "whole"), (512, "packed, 512")):
            for name, make in (("llama_jax", cudnn), ("PyTorch", pytorch)):
                if mean and make is pytorch:
                    continue
                side = start(make, width, mean)
                alone, both = side.ask()
                side.stop()
                flops = 2 * _ROWS * _HEADS * width * _LENGTH**2  # two products, half of the square
                cells = [
                    f"{sequences}, {width}",
                    name,
                    f"{1e3 * alone:.2f}",
                    f"{flops / alone / 1e12:.0f}",
                ]
                print(
                    f"| {' | '.join([*cells, f'{1e3 * both:.2f}', f'{3.5 * flops / both / 1e12:.0f}'])} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of attention.")
    parser.add_argument("--lengths", default="4096,8192,16384")
    lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # this process leaves the card to the sides
    import jax

    from llama_jax.model.attention import BACKENDS

    print(heading())
    print(
        f"\n| temporaries, backend | {' | '.join(f'T = {length}' for length in lengths)} "
        f"|\n|---|{'---|' * len(lengths)}"
    )
    for backend in BACKENDS:
        cells = " | ".join(
            f"{temporary_bytes(backend, length) / 2**20:.1f} MiB" for length in lengths
        )
        print(f"| {backend} | {cells} |", flush=True)
    if jax.devices()[0].platform == "gpu":
        jax.clear_caches()
        speeds()


if __name__ == "__main__":
    main()

"""Memory of the attention backends as XLA plans it: temporaries of forward and backward at growing lengths.

python benchmarks/attention.py [--lengths 4096,8192,16384]
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from report import heading

from llama_jax.model.attention import BACKENDS, attend


def temporary_bytes(backend: str, length: int) -> int:
    """XLA's figure for one row, 9 query and 3 key/value heads of width 64, float32."""
    query, key = (jax.ShapeDtypeStruct((1, heads, length, 64), jnp.float32) for heads in (9, 3))
    step = jax.grad(lambda q, k, v: attend(q, k, v, backend=backend).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(query, key, key).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the attention backends.")
    parser.add_argument("--lengths", default="4096,8192,16384")
    lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
    print(heading())
    print(f"\n| backend | {' | '.join(f'T = {length}' for length in lengths)} |\n|---|{'---|' * len(lengths)}")
    for backend in BACKENDS:
        cells = " | ".join(f"{temporary_bytes(backend, length) / 2**20:.1f} MiB" for length in lengths)
        print(f"| {backend} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

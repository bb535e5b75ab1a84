"""Work of the host for a long answer, a row: tokens decoded to text in pieces of 4, without a
model.

    python benchmarks/host.py [--tokens 2000,8000,32000]

The time a token must not grow with the length of the answer.
"""

import argparse
import time
import types

from report import heading

from llama_jax.generation.session import TokenChunk
from llama_jax.generation.text import _Row
from llama_jax.text.byte_level import TokenBytes

_PIECE = 4


def seconds(tokens: int) -> float:
    """Of one row, the fastest of three."""
    tokenizer = types.SimpleNamespace(
        vocab_size=256, token_bytes=TokenBytes(tuple(bytes([i]) for i in range(256)), {})
    )
    times = []
    for _ in range(3):
        row = _Row(tokenizer, "", [0], ["\n\n"], [0])
        started = time.perf_counter()
        for at in range(0, tokens, _PIECE):
            row.take(TokenChunk([97 + at % 26] * _PIECE, [-1.0] * _PIECE), tokens)
        assert len(row.completion().text) == tokens
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="2000,8000,32000")
    options = parser.parse_args()
    print(heading())
    for tokens in map(int, options.tokens.split(",")):
        taken = seconds(tokens)
        print(f"{tokens:8,} tokens  {taken:8.4f} s  {taken / tokens * 1e6:6.2f} us/token")


if __name__ == "__main__":
    main()

"""The baseline that any language model must beat: how often each token occurs."""

import math
from collections.abc import Sequence

import numpy as np

from llama_jax.data.tokens import Tokens, pieces


def unigram_cross_entropy(train: Sequence[Tokens], held_out: Sequence[Tokens]) -> float:
    """Nats per token of `held_out` under the token frequencies of `train`, each count raised by one.

    Counts the targets that evaluation counts: all tokens but the first of each document, and of conversations only what
    the assistant says.
    """
    size = max(tokens.vocab_size for tokens in (*train, *held_out))
    counts, targets = _count_targets(train, size) + 1, _count_targets(held_out, size)
    return math.log(counts.sum()) - float(targets @ np.log(counts)) / max(1.0, float(targets.sum()))


def _count_targets(parts: Sequence[Tokens], size: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for tokens in parts:
        for first, stop in pieces(tokens):
            ids, begins, learned = tokens.read(first, stop)
            counts += np.bincount(ids[learned & ~begins], minlength=size)
    return counts

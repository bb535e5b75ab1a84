"""The baseline that any language model must beat: how often each token occurs."""

import math
from collections.abc import Sequence

import numpy as np

from llama_jax.data.tokens import Tokens


def unigram_cross_entropy(train: Sequence[Tokens], held_out: Sequence[Tokens]) -> float:
    """Nats per token of `held_out` under the token frequencies of `train`, each count raised by one.

    The targets are those of evaluation: all tokens but the first of each document, and of conversations only what the
    assistant says. Reads what was counted when the tokens were written, not the tokens.
    """
    size = max(tokens.vocab_size for tokens in (*train, *held_out))
    counts, targets = _sum_targets(train, size) + 1, _sum_targets(held_out, size)
    return math.log(counts.sum()) - float(targets @ np.log(counts)) / max(1.0, float(targets.sum()))


def _sum_targets(parts: Sequence[Tokens], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for tokens in parts:
        targets = tokens.counts().targets
        total[: len(targets)] += targets
    return total

"""The baseline that any language model must beat: how often each token occurs."""

import math

import numpy as np

from llama_jax.data.token_file import TokenFile, iterate_pieces


def unigram_cross_entropy(train: TokenFile, held_out: TokenFile) -> float:
    """Nats per token of `held_out` under the token frequencies of `train`, each count raised by one.

    Counts the targets that evaluation counts: all tokens but the first of each document.
    """
    counts, targets = _count_targets(train) + 1, _count_targets(held_out)
    return math.log(counts.sum()) - float(targets @ np.log(counts)) / max(1.0, float(targets.sum()))


def _count_targets(token_file: TokenFile) -> np.ndarray:
    size = token_file.header.vocab_size
    counts = np.zeros(size, np.int64)
    for piece in iterate_pieces(token_file.tokens):
        counts += np.bincount(piece, minlength=size)
    return counts - np.bincount(token_file.tokens[token_file.starts], minlength=size)

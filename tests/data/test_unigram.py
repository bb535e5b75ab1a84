"""The unigram baseline against a count in plain Python."""

import collections
import math

import pytest

from llama_jax.data import tokens
from llama_jax.data.batches import sequential_windows
from llama_jax.data.tokens import unigram_cross_entropy


def test_equals_a_count_in_plain_python(make_file, random_documents, monkeypatch):
    monkeypatch.setattr(tokens, "READ_AT_ONCE", 7)
    train, held_out = random_documents(1, 40), random_documents(2, 10)
    counts = collections.Counter(token for ids in train for token in ids[1:])
    targets = [token for ids in held_out for token in ids[1:]]
    expected = -sum(math.log((counts[t] + 1) / (counts.total() + 100)) for t in targets) / len(
        targets
    )
    assert unigram_cross_entropy([make_file(train)], [make_file(held_out)]) == pytest.approx(
        expected, rel=1e-12
    )


def test_counts_the_targets_of_evaluation(make_file, random_documents):
    train, held_out = make_file(random_documents(1, 40)), make_file(random_documents(2, 10))
    counted = [
        token
        for batch in sequential_windows(held_out, 6, 2)
        for token, weight in zip(batch.targets.ravel().tolist(), batch.weights.ravel().tolist())
        if weight
    ]
    as_documents = make_file([[0, *counted]])  # the same targets as one document
    assert unigram_cross_entropy([train], [as_documents]) == pytest.approx(
        unigram_cross_entropy([train], [held_out]), rel=1e-12
    )


def test_uniform_training_text_gives_the_logarithm_of_the_vocabulary(make_file, random_documents):
    assert unigram_cross_entropy(
        [make_file([[0, *range(100)]])], [make_file(random_documents(0, 9))]
    ) == pytest.approx(math.log(100))

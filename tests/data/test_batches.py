"""Batches against an oracle in plain Python; hosts, steps and epochs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.batches import Batches, Source, Steps, sequential_windows
from llama_jax.data.packing import Batch, fingerprint, pack
from llama_jax.errors import InputError


def cut_batches(tokens, sequences, length, seed):
    return Batches((Source(pack(tokens, length, "cut"), 1.0),), Steps(sequences), seed)


def oracle_sequence(documents, window, length):
    """One window, token by token: (tokens, targets, weights, documents)."""
    flat = [(token, number) for number, ids in enumerate(documents) for token in ids]
    cut = flat[window * length : window * length + length + 1]
    numbers = [number for number, _ in itertools.groupby(number for _, number in cut)]
    tokens = [token for token, _ in cut]
    local = [numbers.index(number) + 1 for _, number in cut]
    short = length + 1 - len(cut)
    tokens, local = tokens + [0] * short, local + [0] * short
    weights = [float(a == b != 0) for a, b in itertools.pairwise(local)]
    return tokens[:-1], tokens[1:], weights, local[:-1]


def oracle_batch(documents, windows, length):
    sequences = [oracle_sequence(documents, window, length) for window in windows]
    return Batch(*(np.array(field) for field in zip(*sequences)))


def assert_equal(batch, expected):
    for got, wanted in zip(batch, expected):
        np.testing.assert_array_equal(got, wanted)


def content(batch):
    return [field.tolist() for field in batch]


def joined(batches):
    return Batch(*(np.concatenate(field) for field in zip(*batches)))


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_sequential_windows_equal_the_oracle(make_file, random_documents, seed, length):
    documents = random_documents(seed, 15)
    file = make_file(documents)
    batches = list(sequential_windows(file, length, 4))
    assert_equal(joined(batches), oracle_batch(documents, range(4 * len(batches)), length))


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_epoch_of_training_is_all_full_windows_once(make_file, random_documents, seed, length):
    documents = random_documents(seed, 15)
    data = cut_batches(make_file(documents), 1, length, seed)
    assert data.sources[0].packing.count == (sum(map(len, documents)) - 1) // length
    sequences = [content(data.batch(step)) for step in range(data.sources[0].packing.count)]
    wanted = [
        content(oracle_batch(documents, [window], length))
        for window in range(data.sources[0].packing.count)
    ]
    assert sorted(sequences) == sorted(wanted)


def test_types_and_shapes(make_file, random_documents):
    batch = cut_batches(make_file(random_documents(0, 30)), 3, 7, 0).batch(0)
    assert [str(field.dtype) for field in batch] == ["int32", "int32", "float32", "int32"]
    assert {field.shape for field in batch} == {(3, 7)}


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 1000), hosts=st.sampled_from([1, 2, 4, 8]))
def test_hosts_together_read_the_global_batch(packed, step, seed, hosts):
    data = cut_batches(packed, 8, 5, seed)
    share = 8 // hosts
    parts = [data.sequences(step, host * share, (host + 1) * share) for host in range(hosts)]
    assert fingerprint(joined(parts)) == fingerprint(data.batch(step))


def test_batch_does_not_depend_on_history(packed):
    data = cut_batches(packed, 8, 5, 1)
    forward = [fingerprint(data.batch(step)) for step in range(40)]
    backward = [
        fingerprint(cut_batches(packed, 8, 5, 1).batch(step)) for step in reversed(range(40))
    ]
    assert forward == backward[::-1]
    assert len(set(forward)) == 40


def test_epochs_continue_seamlessly_and_differ(packed):
    data = cut_batches(packed, 8, 5, 1)
    assert data.sources[0].packing.count % 8, "the epoch must end inside a batch for this test"
    sequences = joined(
        [data.batch(step) for step in range(3 * data.sources[0].packing.count // 8 + 1)]
    )
    first, second = (
        [
            fingerprint(Batch(*(field[[sequence]] for field in sequences)))
            for sequence in range(
                epoch * data.sources[0].packing.count, (epoch + 1) * data.sources[0].packing.count
            )
        ]
        for epoch in range(2)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_seeds_give_different_batches(packed):
    assert len({fingerprint(cut_batches(packed, 8, 5, seed).batch(0)) for seed in range(10)}) == 10


def test_order_of_a_run_is_part_of_the_format(packed):
    # A golden value: whoever changes it changes what every resumed training reads.
    assert fingerprint(cut_batches(packed, 8, 5, 3).batch(11)) == GOLDEN


def test_fingerprint_sees_every_field_and_the_shape(packed):
    batch = cut_batches(packed, 4, 6, 0).batch(0)
    changed = [batch._replace(**{name: getattr(batch, name) + 1}) for name in Batch._fields]
    reshaped = Batch(*(field.reshape(6, 4) for field in batch))
    assert len({fingerprint(one) for one in [batch, *changed, reshaped]}) == 6


@pytest.mark.parametrize("length", [1, 3, 8, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_counts_each_target_exactly_once(make_file, length, batch_size):
    documents = [
        [10 * d + i for i in range(size)] for d, size in enumerate([4, 1, 9, 2, 7])
    ]  # every id is unique
    file = make_file(documents)
    targets = [
        target
        for batch in sequential_windows(file, length, batch_size)
        for target, weight in zip(batch.targets.ravel().tolist(), batch.weights.ravel().tolist())
        if weight
    ]
    assert sorted(targets) == sorted(token for ids in documents for token in ids[1:])
    assert len(targets) == file.header.tokens - file.header.documents


def test_single_token_needs_no_evaluation(make_file):
    assert list(sequential_windows(make_file([[1]]), 4, 2)) == []


def test_no_target_comes_from_another_document(packed):
    batch = cut_batches(packed, 8, 5, 2).batch(0)
    starts = set(packed.starts.tolist())
    assert 0 < batch.weights.mean() < 1
    assert (np.diff(batch.documents, axis=1) >= 0).all()
    assert (batch.documents[:, 0] == 1).all()
    whole = joined(sequential_windows(packed, 5, 8))
    places = np.arange(whole.targets.size) + 1
    crossing = [place in starts or place >= packed.header.tokens for place in places.tolist()]
    np.testing.assert_array_equal(whole.weights.ravel() == 0, crossing)


def test_too_little_text_names_the_numbers(make_file):
    file = make_file([[1] * 41])
    assert cut_batches(file, 4, 10, 0).batch(0).tokens.shape == (4, 10)
    with pytest.raises(
        InputError, match="41 tokens are 4 sequences, but its part of a batch needs 5"
    ):
        cut_batches(file, 5, 10, 0)


@pytest.mark.parametrize(
    ("sequences", "length", "name"),
    [(0, 4, "at least 1 sequence"), (1, 0, "length"), (-1, 4, "at least 1 sequence")],
)
def test_senseless_sizes_are_refused(packed, sequences, length, name):
    with pytest.raises(InputError, match=name):
        cut_batches(packed, sequences, length, 0)
    with pytest.raises(InputError, match="at least 1"):
        next(sequential_windows(packed, length, sequences))


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 8), (0, -1, 8), (0, 0, 9), (0, 5, 4)])
def test_rows_outside_the_batch_are_refused(packed, step, start, stop):
    with pytest.raises(InputError, match="sequences 0 to 8"):
        cut_batches(packed, 8, 5, 0).sequences(step, start, stop)


GOLDEN = "99400df27efa371fe3cf0879b0c8a5531bbde57dbd6d8a16644d443a6a019b87"

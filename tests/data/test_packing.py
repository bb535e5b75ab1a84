"""Packings, mixtures and steps against brute force."""

import collections
import itertools
import random

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import packing as module
from llama_jax.data.batches import (
    BLOCK,
    ROUND,
    Batches,
    Source,
    Steps,
    block_shares,
    permute,
    round_shares,
    sequential_sequences,
)
from llama_jax.data.packing import (
    Batch,
    Cut,
    Fit,
    Pairs,
    best_fit,
    fingerprint,
    pack,
    select_sequences,
)
from llama_jax.data.token_file import TokenFile, token_writer
from llama_jax.data.tokens import Piece, Tokens, count_tokens
from llama_jax.errors import InputError

many = settings(deadline=None, max_examples=60)


class Listed:
    """Tokens that are lists of (ids, mask)."""

    def __init__(self, documents, kind="text"):
        self.name, self.kind, self._documents = "listed", kind, documents
        self._flat = [token for ids, _ in documents for token in ids]
        self._mask = [flag for ids, mask in documents for flag in (mask or [True] * len(ids))]
        self._begins = [place == 0 for ids, _ in documents for place in range(len(ids))]
        self.size, self.documents, self.bytes_of_text, self.vocab_size = (
            len(self._flat),
            len(documents),
            1,
            1 << 20,
        )

    def read(self, first, stop):
        part = slice(first, stop)
        return Piece(
            np.array(self._flat[part], np.int32),
            np.array(self._begins[part], bool),
            np.array(self._mask[part], bool),
        )

    def lengths(self):
        return np.array([len(ids) for ids, _ in self._documents], np.int64)

    def counts(self):
        return count_tokens(self)


def unique_documents(lengths, masked=False):
    """Documents in which no two tokens are equal, so that a token says where it comes from."""
    numbers, source = itertools.count(1), random.Random(0)
    made = [[next(numbers) for _ in range(length)] for length in lengths]
    return [(ids, [source.random() < 0.5 for _ in ids] if masked else None) for ids in made]


def best_fit_sequences(lengths, room):
    """How many sequences plain best fit needs, the longest first, one document at a time."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, size in enumerate(left) if size >= length]
        if fitting:
            left[min(fitting, key=lambda place: left[place])] -= length
        else:
            left.append(room - length)
    return len(left)


def first_fit_sequences(lengths, room):
    left = []
    for length in sorted(lengths, reverse=True):
        place = next((place for place, size in enumerate(left) if size >= length), None)
        if place is None:
            left.append(room - length)
        else:
            left[place] -= length
    return len(left)


@many
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 60))
def test_best_fit_needs_as_many_sequences_as_one_document_at_a_time(lengths, room):
    sequences = best_fit(np.array(lengths), room)
    used = np.bincount(sequences, lengths)
    assert used.max() <= room
    assert used.min() > 0
    assert len(used) == best_fit_sequences(lengths, room)
    assert len(used) <= 1.05 * first_fit_sequences(lengths, room) + 1
    assert sequences.tolist() == best_fit(np.array(lengths), room).tolist()


@many
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(4, 24), st.booleans())
def test_fit_holds_every_document_once_and_whole(lengths, room, masked):
    documents = unique_documents(lengths, masked)
    packing = pack(Listed(documents), room, "fit")
    batch = packing.sequences(np.arange(packing.count))
    seen = []
    for tokens, targets, weights, numbers in zip(*batch):
        assert numbers.max(initial=0) == len(set(numbers.tolist()) - {0})
        for number in range(1, int(numbers.max(initial=0)) + 1):
            here = numbers == number
            assert np.ptp(np.flatnonzero(here)) == here.sum() - 1
            seen.append((tokens[here].tolist(), targets[here].tolist(), weights[here].tolist()))
        padding = numbers == 0
        assert not np.concatenate([tokens[padding], targets[padding], weights[padding]]).any()
    wanted = [
        (
            ids[:-1][:room],
            ids[1:][:room],
            [float(flag) for flag in (mask or [True] * len(ids))[1:][:room]],
        )
        for ids, mask in documents
        if len(ids) > 1
    ]
    assert sorted(seen) == sorted(wanted)
    assert packing.counts.too_long == sum(length - 1 > room for length in lengths)
    assert packing.places == sum(len(ids) for ids, _, _ in seen)


def kept_targets(ids, mask, room, too_long):
    """Targets of a document and whether each counts, by hand; `None` where it is left out."""
    pairs = list(zip(ids, mask))
    if len(pairs) - 1 > room:
        if too_long == "drop":
            return None
        pairs = pairs[-room - 1 :] if too_long == "cut_front" else pairs[: room + 1]
        if not any(flag for _, flag in pairs[1:]):
            return None
    return [(token, float(flag)) for token, flag in pairs[1:]] or None


@many
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=12),
    st.integers(2, 8),
    st.sampled_from(["drop", "cut_front", "cut_end"]),
    st.sampled_from(["chat", "pairs"]),
)
def test_documents_that_are_too_long(lengths, room, too_long, kind):
    documents = unique_documents(lengths[: len(lengths) // 2 * 2], masked=True)
    packing = pack(Listed(documents, kind), room, "auto", too_long)
    wanted = [kept_targets(ids, mask, room, too_long) for ids, mask in documents]
    if kind == "pairs":
        both = [pair for pair in zip(wanted[::2], wanted[1::2]) if None not in pair]
        wanted = [answer for pair in both for answer in pair]
    batch = packing.sequences(np.arange(packing.count))
    seen = [
        (int(target), float(weight))
        for target, weight in zip(batch.targets.ravel(), batch.weights.ravel())
        if target
    ]
    kept = [document for document in wanted if document is not None]
    assert sorted(seen) == sorted(pair for document in kept for pair in document)
    over = sum(len(ids) - 1 > room for ids, _ in documents)
    short = sum(len(ids) == 1 for ids, _ in documents)
    assert packing.counts.too_long == over
    assert packing.counts.documents == len(documents)
    if kind == "chat":
        assert packing.counts.dropped + packing.counts.masked == len(documents) - short - len(kept)
        assert packing.counts.dropped == (over if too_long == "drop" else 0)
    else:
        assert [
            batch.targets[sequence][batch.targets[sequence] > 0].tolist()
            for sequence in range(packing.count)
        ] == [[token for token, _ in document] for document in kept]


def test_too_long_can_be_refused_and_depends_on_the_kind():
    documents = [([1, 2, 3, 4, 5], [False, False, False, True, True]), ([6, 7], [False, True])]
    with pytest.raises(
        InputError,
        match=r"listed: 1 of 2 documents have more than 3 tokens \(the longest 5\); raise data\.length",
    ):
        pack(Listed(documents, "chat"), 3, "auto", "refuse")
    assert pack(Listed(documents, "chat"), 3, "auto").counts == (2, 1, 1, 0)
    assert pack(Listed(documents, "chat"), 2, "fit", "cut_end").counts == (2, 1, 0, 1)
    assert pack(Listed(documents, "text"), 3, "fit").counts == (2, 1, 0, 0)
    assert isinstance(pack(Listed(documents, "text"), 3, "auto"), Cut)
    assert isinstance(pack(Listed(documents, "chat"), 3, "auto"), Fit)
    assert isinstance(pack(Listed(documents, "chat"), 3, "cut"), Cut)


@many
@given(st.lists(st.integers(1, 9), min_size=2, max_size=20), st.integers(1, 9), st.integers(1, 40))
def test_windows_without_targets_are_counted(lengths, length, at_once):
    tokens = Listed(unique_documents(lengths, masked=True), "chat")
    packing = pack(tokens, length, "cut")
    weights = packing.sequences(np.arange(packing.count)).weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WINDOWS_AT_ONCE", at_once)
        assert packing.without_targets() == np.count_nonzero(weights.sum(axis=1) == 0)


@many
@given(st.lists(st.integers(1, 9), min_size=2, max_size=20), st.integers(1, 9), st.integers(0, 99))
def test_masked_windows_weigh_the_targets_of_the_mask(lengths, length, seed):
    documents = unique_documents(lengths, masked=True)
    learned = {token for ids, mask in documents for token, flag in list(zip(ids, mask))[1:] if flag}
    tokens = Listed(documents)
    packing = pack(tokens, length, "cut")
    batch = packing.sequences(np.arange(-(-(tokens.size - 1) // length)))
    weighed = batch.targets[batch.weights > 0].tolist()
    assert sorted(weighed) == sorted(learned)


def pair_documents(count):
    """Pairs in which the chosen answer has even tokens and the rejected one odd."""
    return [
        (
            [100 * pair + 2 * i + side for i in range(2 + pair % 4)],
            [i > 0 for i in range(2 + pair % 4)],
        )
        for pair in range(count)
        for side in (0, 1)
    ]


def test_pairs_stay_together_in_every_epoch():
    packing = pack(Listed(pair_documents(7), "pairs"), 4, "cut")
    assert isinstance(packing, Pairs)
    batches = Batches((Source(packing, 1.0),), Steps(4), 0)
    sequences = select_sequences([batches.batch(step) for step in range(7)], np.arange(28))
    chosen, rejected = sequences.tokens[::2, 0], sequences.tokens[1::2, 0]
    np.testing.assert_array_equal(rejected, chosen + 1)
    for epoch in (chosen[:7], chosen[7:]):
        assert sorted(epoch.tolist()) == [100 * pair for pair in range(7)]
    assert (sequences.documents <= 1).all()
    with pytest.raises(InputError, match="an even number"):
        Batches((Source(packing, 1.0),), Steps(3), 0)


# Mixtures


def numbered(count, first):
    """Tokens whose every window of length 1 is one number, so that a sequence says where it comes
    from.
    """
    return Listed([(list(range(first, first + count + 1)), None)])


def mixture(weights, sequences, seed=0, counts=None):
    counts = counts or [400] * len(weights)
    sources = [
        Source(pack(numbered(count, 10_000 * i), 1, "cut"), w)
        for i, (count, w) in enumerate(zip(counts, weights), 1)
    ]
    return Batches(tuple(sources), Steps(sequences), seed)


@many
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_are_proportional_to_a_millionth_after_any_number_of_blocks(weights):
    shares, blocks = round_shares(weights), block_shares(weights)
    wanted = np.array(weights) / sum(weights)
    assert sum(shares) == ROUND
    assert np.abs(np.array(shares) / ROUND - wanted).max() < 1e-6
    assert blocks.sum(axis=0).tolist() == shares
    assert (blocks.sum(axis=1) == BLOCK).all()
    assert blocks.min() >= 0
    after = np.cumsum(blocks, axis=0)
    assert np.abs(after - BLOCK * wanted * np.arange(1, len(blocks) + 1)[:, None]).max() < 4


def test_a_share_of_14_in_ten_thousand_is_that():
    """Rounded to thousandths it was 0.001: 100 sequences of 100,000."""
    batches = mixture([0.9986, 0.0014], 100)
    of, places = batches._mixed(np.arange(100_000))
    assert abs(np.sum(of == 1) - 140) < 4
    for source in (0, 1):  # every sequence of a source once, none left out
        np.testing.assert_array_equal(
            np.sort(places[of == source]), np.arange(np.sum(of == source))
        )
    assert batches.shares == [0.9986, 0.0014]
    assert block_shares([0.9986, 0.0014]).sum(axis=0).tolist() == [998_600, 1400]


def test_places_go_on_over_the_border_of_a_round():
    batches = mixture([1, 1, 1], 100)
    of, places = batches._mixed(np.arange(ROUND - 5000, ROUND + 5000))
    for source in range(3):
        own = np.sort(places[of == source])
        np.testing.assert_array_equal(np.diff(own), 1)
    assert np.abs(np.bincount(of) - 10_000 / 3).max() < 8


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99), st.integers(0, 3))
def test_every_block_has_the_exact_mixture_and_every_source_its_own_epochs(weights, seed, block):
    batches = mixture(weights, 250, seed)
    tokens = np.concatenate([batches.batch(step).tokens[:, 0] for step in range(4 * (block + 1))])
    counts = collections.Counter((tokens[-BLOCK:] // 10_000).tolist())
    expected = block_shares([float(w) for w in weights])[block].tolist()
    assert [counts[i] for i in range(1, len(weights) + 1)] == expected
    assert all(
        abs(count - BLOCK * weight / sum(weights)) <= 2 for count, weight in zip(expected, weights)
    )
    for source in range(1, len(weights) + 1):
        own = tokens[tokens // 10_000 == source]
        seen = np.bincount(
            own - 10_000 * source, minlength=400
        )  # so many epochs of 400 windows, and a part of one
        assert len(seen) == 400
        assert seen.min() == len(own) // 400
        assert seen.max() == -(-len(own) // 400)


def test_llama1_mixture_is_exact_in_a_block():
    weights = [67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0]
    assert block_shares(weights).tolist() == [[670, 150, 45, 45, 45, 25, 20]] * 1000


def test_the_order_of_mixtures_in_thousandths_has_not_changed():
    """By its definition: slot of a unit in its block, sources one after another, so many sequences
    a block.
    """
    batches = mixture([0.7, 0.25, 0.05], 250, seed=5)
    units = np.arange(2500)
    slots = np.concatenate(
        [permute(np.arange(1000), 1000, 5 | 1 << 62, block) for block in range(3)]
    )[:2500]
    of = np.searchsorted([700, 950], slots, side="right")
    places = units // 1000 * np.array([700, 250, 50])[of] + slots - np.array([0, 700, 950])[of]
    found = batches._mixed(units)
    np.testing.assert_array_equal(found[0], of)
    np.testing.assert_array_equal(found[1], places)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 10**6), st.integers(0, 99))
def test_hosts_together_read_the_mixed_batch(hosts, step, seed):
    batches = mixture([3, 1], 16, seed)
    share = 16 // hosts
    parts = [batches.sequences(step, host * share, (host + 1) * share) for host in range(hosts)]
    assert fingerprint(select_sequences(parts, np.arange(16))) == fingerprint(batches.batch(step))


def test_wrong_mixtures_are_refused():
    with pytest.raises(
        InputError,
        match=r"weight 1e-08 is 0.01 of 1,000,000 sequences, 0 would be more than 1 % off",
    ):
        mixture([1, 1e-8], 4)
    with pytest.raises(
        InputError,
        match=r"weight 1.5e-06 is 1.5 of 1,000,000 sequences, . would be more than 1 % off",
    ):
        mixture([1, 1.5e-6], 4)
    assert mixture([1, 1e-5], 4).shares[1] == 1e-5
    with pytest.raises(
        InputError, match="listed: 6 tokens are 5 sequences, but its part of a batch needs 8"
    ):
        mixture([1, 1], 16, counts=[400, 5])
    with pytest.raises(InputError, match="above 0"):
        mixture([1, 0], 4)


# Steps


def sequences_by_hand(steps, count):
    """For each step the first sequence of the data and the number of sequences, counted up one data
    step at a time.
    """
    dealt, position = [], 0
    for data_step in range(10_000):
        sequences = steps.sequences
        for start, size in steps.ramp:
            sequences = size if data_step >= start else sequences
        if not any(first <= data_step <= last for first, last in steps.skip):
            dealt.append((position, sequences))
        position += sequences
        if len(dealt) == count:
            return dealt


@st.composite
def step_rules(draw):
    borders = sorted(draw(st.sets(st.integers(0, 60), max_size=8)))
    skip = tuple(zip(borders[::2], borders[1::2]))
    starts = sorted(draw(st.sets(st.integers(1, 60), max_size=4)))
    return Steps(
        draw(st.integers(1, 9)), tuple((start, draw(st.integers(1, 9))) for start in starts), skip
    )


@many
@given(step_rules())
def test_steps_in_closed_form_equal_counting(steps):
    used = 0
    for step, (position, sequences) in enumerate(sequences_by_hand(steps, 90)):
        assert (steps.position(step), steps.sequences_at(step), steps.used_before(step)) == (
            position,
            sequences,
            used,
        )
        used += sequences


def test_skipping_leaves_out_what_those_steps_would_have_read():
    def batches(steps):
        return Batches((Source(pack(numbered(997, 0), 1, "cut"), 1.0),), steps, 3)

    plain, skipping = batches(Steps(4, ((5, 8),))), batches(Steps(4, ((5, 8),), ((3, 6), (9, 9))))
    wanted = [plain.batch(step) for step in (0, 1, 2, 7, 8, 10, 11)]
    assert [fingerprint(batch) for batch in wanted] == [
        fingerprint(skipping.batch(step)) for step in range(7)
    ]
    assert skipping.tokens_before(7) == sum(batch.tokens.size for batch in wanted)


@pytest.mark.parametrize(
    ("ramp", "skip"),
    [
        (((0, 4),), ()),
        (((5, 4), (3, 8)), ()),
        (((5, 0),), ()),
        ((), ((4, 3),)),
        ((), ((1, 5), (5, 6))),
        ((), ((-2, 3),)),
        ((), ((1, 5), (7, 6))),
        ((), ((8, 9), (1, 2))),
        (((5,),), ()),
        (((5, 4.0),), ()),
        ((), ((1, True),)),
        (((5, 8), (5, 9)), ()),
    ],
)
def test_senseless_steps_are_refused(ramp, skip, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # whose checks would come before ours
    with pytest.raises(InputError, match=r"data\.(batch_ramp|skip_steps)"):
        Steps(4, ramp, skip)


def test_neighbouring_ranges_are_two_ranges():
    assert [Steps(4, (), ((0, 1), (2, 2), (5, 6))).data_step(step) for step in range(4)] == [
        3,
        4,
        7,
        8,
    ]
    with pytest.raises(InputError, match=r"data\.batch_ramp"):
        Steps(0)


# Masks on disk


@many
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12),
    st.integers(0, 60),
)
def test_masks_come_back_from_disk(tmp_path_factory, masks, first):
    path = tmp_path_factory.mktemp("masks") / "x.tokens"
    with token_writer(path, 100, "chat") as writer:
        for mask in masks:
            writer.add(list(range(len(mask))), mask)
        writer.finish(bytes_of_text=1, tokenizer_sha256="", sources_sha256="")
    file = TokenFile.open(path)
    file.verify()
    flat = [flag for mask in masks for flag in mask]
    assert file.read(first, first + 17).learned.tolist() == flat[first : first + 17]
    assert file.read(0, file.size).learned.tolist() == flat
    assert isinstance(file, Tokens)
    assert (
        len(list(sequential_sequences(pack(file, 20, "fit"), 2))) * 2 >= pack(file, 20, "fit").count
    )
    assert isinstance(pack(file, 3, "cut").sequences(np.arange(1)), Batch)

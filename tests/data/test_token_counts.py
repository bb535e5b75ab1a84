"""Counts of tokens: right for every kind of document, kept by `prepare`, and not made again by
reading.
"""

import json
import random

import numpy as np
import pytest

from llama_jax.data import token_file
from llama_jax.data import tokens as token_counts
from llama_jax.data.prepare import read_tokenizer_files
from llama_jax.data.shards import Settings, Text, prepare_set
from llama_jax.data.token_set import TokenSet, damage
from llama_jax.data.tokens import (
    Counter,
    TokenCounts,
    Tokens,
    add_counts,
    read_counts,
    unigram_cross_entropy,
    write_counts,
)
from llama_jax.errors import CorruptError
from llama_jax.text.chat import template_from_directory


def documents(seed, masked):
    source = random.Random(seed)
    made = [[source.randrange(50) for _ in range(source.randint(1, 9))] for _ in range(60)]
    return [(ids, [source.random() < 0.5 for _ in ids] if masked else None) for ids in made]


def plain_counts(parts, size):
    """Targets, counted one by one."""
    targets = [0] * size
    for ids, mask in parts:
        for token, learned in list(zip(ids, mask or [True] * len(ids)))[1:]:
            targets[token] += learned
    return targets, max(token for ids, _ in parts for token in ids)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("masked", [False, True])
def test_counter_equals_a_count_in_plain_python(monkeypatch, masked, at_once):
    monkeypatch.setattr(token_counts, "_COUNTED_AT_ONCE", at_once)
    counter, parts = Counter(50), documents(at_once, masked)
    for ids, mask in parts:
        counter.add(np.array(ids, np.int64), None if mask is None else np.array(mask))
        counter.counts()  # asking changes nothing
    targets, largest = counter.counts()
    assert (targets.tolist(), largest) == plain_counts(parts, 50)


def test_a_file_keeps_them_and_damage_is_noticed(tmp_path):
    counts = TokenCounts(np.array([3, 0, 2**40]), 1)
    path = tmp_path / "x.json"
    write_counts(path, counts, "key")
    kept = read_counts(path, 3, "key")
    assert (kept.targets.tolist(), kept.largest) == ([3, 0, 2**40], 1)
    assert (
        read_counts(path, 3, "another")
        is read_counts(path, 4, "key")
        is read_counts(tmp_path / "none", 3)
        is None
    )
    good = path.read_text()
    for bad in (
        good.replace("[3,", "[4,"),
        good.replace('"largest": 1', '"largest": 2'),
        good[:-5],
        "[]",
        "[" * 100_000,
    ):
        path.write_text(bad)
        assert read_counts(path, 3, "key") is None
    assert add_counts(counts, TokenCounts(np.array([1, 1, 0]), 2)).targets.tolist() == [4, 1, 2**40]


@pytest.fixture(scope="session")
def text(tiny_directory):
    return Text(read_tokenizer_files(tiny_directory), template_from_directory(tiny_directory))


def write_source(path, kind):
    source = random.Random(1)
    texts = ["".join(source.choices("abc def\n", k=source.randint(1, 60))) for _ in range(80)]
    values = [
        {"text": text} if kind == "text" else {"prompt": text, "completion": text[::-1] + "!"}
        for text in texts
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def prepare(source, directory, text, on_progress=lambda *call: None):
    return prepare_set(
        [source], directory, text, Settings(held_out=0.2, shard_tokens=300), on_progress
    )


def sides(directory):
    opened = TokenSet.open(directory)
    return opened.train, opened.held_out


def assert_counts(part: Tokens):
    """What was kept is what a look at every token gives."""
    ids, begins, learned = part.read(0, part.size)
    wanted = np.bincount(ids[learned & ~begins], minlength=part.vocab_size)
    assert part.counts().targets.tolist() == wanted.tolist()
    assert part.counts().largest == ids.max()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_prepare_counts_both_sides_also_when_it_resumes(tmp_path, text, kind, monkeypatch):
    source, out = write_source(tmp_path / "a.jsonl", kind), tmp_path / "out"

    def stop(stage, done, total):
        if stage == "encode" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, text, stop)
    monkeypatch.setattr(
        token_file.TokenFile, "read", None
    )  # finished shards are not read to be counted
    assert prepare(source, out, text).kept > 1
    monkeypatch.undo()
    for part in sides(out):
        assert part.kind == kind
        assert_counts(part)


def test_the_unigram_entropy_reads_no_tokens(tmp_path, text, monkeypatch):
    prepare(write_source(tmp_path / "a.jsonl", "text"), tmp_path / "out", text)
    train, held_out = sides(tmp_path / "out")
    counts, _ = (plain_counts(split(part), part.vocab_size) for part in (train, held_out))
    targets = plain_counts(split(held_out), held_out.vocab_size)[0]
    raised = np.array(counts[0], np.float64) + 1
    wanted = -(np.array(targets) @ np.log(raised / raised.sum())) / sum(targets)
    monkeypatch.setattr(token_file.TokenFile, "open", None)
    assert unigram_cross_entropy([train], [held_out]) == pytest.approx(wanted, rel=1e-12)


def split(part):
    ids = part.read(0, part.size).ids
    return [(piece.tolist(), None) for piece in np.split(ids, np.cumsum(part.lengths())[:-1])]


def test_missing_and_changed_counts_are_damage(tmp_path, text):
    prepare(write_source(tmp_path / "a.jsonl", "text"), tmp_path / "out", text)
    path = tmp_path / "out" / "held_out_counts.json"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert [path.name in line for line in damage(tmp_path / "out")] == [True]
    train, held_out = sides(tmp_path / "out")
    assert train.counts().largest > 0
    with pytest.raises(CorruptError, match=rf"{path.name}: missing, or its SHA-256"):
        held_out.counts()
    path.unlink()
    with pytest.raises(CorruptError, match=rf"{path.name}: missing"):
        sides(tmp_path / "out")


def test_a_token_file_counts_once(make_file, random_documents, monkeypatch):
    file = make_file(random_documents(1, 40))
    assert_counts(file)  # nothing is kept: it is read
    file.keep_counts()
    monkeypatch.setattr(token_file, "count_tokens", None)
    assert_counts(file)
    file.keep_counts()

"""Which text is held out: whole documents by name, or the end of the last one where there are too
few.
"""

import pytest

from llama_jax.data.held_out import split_documents
from llama_jax.data.records import Document, is_held_out
from llama_jax.errors import InputError

LINES = "".join(f"line {number:04d}\n" for number in range(1000))


def texts(part):
    return [document.text for document in part.documents()]


def split(documents, fraction=0.1):
    return split_documents(lambda: iter(documents), fraction)


def name_of_side(held_out, fraction=0.1):
    """A name that alone would put its document on one side."""
    return next(name for name in map(str, range(1000)) if is_held_out(name, fraction) == held_out)


def test_whole_documents_are_held_out_by_name():
    documents = [Document(str(number), f"text {number}\n") for number in range(200)]
    train, held_out = split(documents)
    assert texts(held_out) == [text for name, text in documents if is_held_out(name, 0.1)]
    assert texts(train) == [text for name, text in documents if not is_held_out(name, 0.1)]
    assert train.bytes_of_text + held_out.bytes_of_text == sum(len(text) for _, text in documents)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_of_a_single_file_the_end_is_held_out(held_out, fraction):
    documents = [Document(name_of_side(held_out, fraction), LINES)]
    (train,), (held,) = map(texts, split(documents, fraction))
    assert train + held == LINES
    assert train.endswith("\n")
    assert 0 <= len(held) - fraction * len(LINES) <= len("line 0000\n")
    assert split(documents, fraction)[1].sha256 == split(documents, fraction).held_out.sha256


def test_of_few_documents_the_last_one_that_has_text_is_cut():
    names = [name for name in map(str, range(100)) if not is_held_out(name, 0.1)]
    documents = [
        Document(names[0], "first\n"),
        Document(names[1], ""),
        Document(names[2], LINES),
        Document(names[3], ""),
    ]
    train, held_out = map(texts, split(documents))
    assert train[:-1] == ["first\n"]
    assert [train[-1] + held_out[0]] == [LINES]


@pytest.mark.parametrize("text", ["x" * 1000, "title\n" + "x" * 994, "é" * 1000])
def test_a_text_without_a_line_end_near_the_border_is_cut_at_it(text):
    (train,), (held,) = map(texts, split([Document("a", text)]))
    assert (len(train), train + held) == (900, text)


@pytest.mark.parametrize(("before", "held"), [(850, 149), (810, 189), (780, 100)])
def test_a_line_end_is_taken_only_where_it_takes_less_than_twice_as_much(before, held):
    text = "x" * before + "\n" + "y" * (999 - before)
    assert texts(split([Document("a", text)]).held_out) == ["y" * held]


@pytest.mark.parametrize("documents", [[], [Document("a", "")], [Document("a", "x")]])
def test_too_little_text_is_explained(documents):
    with pytest.raises(InputError, match="too little text"):
        split(documents)


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_senseless_fraction_is_refused(fraction):
    with pytest.raises(InputError, match="held_out_fraction"):
        split([Document("a", LINES)], fraction)


def test_the_hash_follows_the_cut():
    documents = [Document("a", LINES)]
    assert split(documents, 0.1).train.sha256 != split(documents, 0.2).train.sha256


def test_readings_are_reported():
    calls = []
    split_documents(lambda: iter([Document("a", LINES)]), 0.1, lambda *call: calls.append(call))
    assert set(calls) == {("read", done, 2) for done in range(3)}

"""Training a vocabulary: LLaMA's ids, exact round trips, the same result each time."""

import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import prepare as vocabulary
from llama_jax.data.prepare import train_vocabulary
from llama_jax.data.records import Document, standard_library
from llama_jax.errors import InputError


def train(path, documents, vocab_size=512, seed=0):
    train_vocabulary(documents, vocab_size, path, seed)
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@pytest.fixture(scope="module")
def sources():
    """About 400 kB of code."""
    return [document for document in standard_library() if document.name.startswith("asyncio/")]


@pytest.fixture(scope="module")
def processor(sources, tmp_path_factory):
    return train(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model", sources, 1000)


def pieces(processor):
    return [processor.id_to_piece(number) for number in range(processor.vocab_size())]


def test_ids_are_those_of_llama(processor):
    assert processor.vocab_size() == 1000
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (
        0,
        1,
        2,
        -1,
    )
    assert pieces(processor)[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert all(processor.is_byte(number) for number in range(3, 259))


@settings(deadline=None, max_examples=500)
@given(text=st.text())
def test_any_unicode_text_comes_back(processor, text):
    ids = processor.encode(text)
    assert 0 not in ids
    assert processor.decode(ids) == text.replace("\u2581", " ")  # the one exception, documented


LOOK_ALIKES = ["<s></s><unk>", "<0x0A>", "\u2047", "\ufeff", "e\u0301", "\x00"]
WHITE_SPACE = [" ", "  leading", "trailing  \n", "\n\n\n", "a\n    b\n\tc\n", "\r\n"]


@pytest.mark.parametrize("text", WHITE_SPACE + LOOK_ALIKES)
def test_white_space_and_look_alikes_come_back(processor, text):
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_real_code_comes_back_and_shrinks(processor, sources):
    text = "".join(document.text for document in sources)
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert len(ids) < len(text) / 2


def test_digits_stand_alone(processor):
    assert not [
        piece
        for piece in pieces(processor)[259:]
        if len(piece.strip("\u2581")) > 1 and any(c.isdigit() for c in piece)
    ]


def test_indentation_is_one_token(processor):
    ids = processor.encode("        x")
    assert len(ids) == 2


def test_same_documents_and_seed_give_the_same_pieces(sources, tmp_path):
    first, second = (train(tmp_path / name, sources) for name in ("a", "b"))
    assert pieces(first) == pieces(second)


def test_large_corpora_are_sampled_by_seed(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_SAMPLE", 30_000)
    found = [
        pieces(train(tmp_path / f"{run}", sources, seed=seed)) for run, seed in enumerate([0, 0, 1])
    ]
    assert found[0] == found[1] != found[2]


def test_sample_is_bounded_and_keeps_the_order(monkeypatch):
    monkeypatch.setattr(vocabulary, "_SAMPLE", 100)
    chunks = [f"{number:03d}" + "x" * random.Random(number).randint(0, 20) for number in range(200)]
    sample = vocabulary._sample(chunks, 0)
    assert 60 < sum(map(len, sample)) <= 100
    assert sample == sorted(sample)
    assert set(sample) < set(chunks)


@settings(deadline=None)
@given(text=st.text(alphabet="ab\n", max_size=100))
def test_cut_loses_nothing_and_prefers_lines(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_CHUNK", 8)
        parts = list(vocabulary._cut(text))
    assert "".join(parts) == text
    assert all(1 <= len(part) <= 8 for part in parts)
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


@pytest.mark.parametrize(
    ("text", "size", "reason"),
    [("abc def", 4096, "too high .4096.*<= 275"), ("abc def", 200, "200 vs 266")],
)
def test_size_that_does_not_fit_the_text_is_explained_in_one_line(tmp_path, text, size, reason):
    with pytest.raises(InputError, match=rf"vocab_size: {size} given.*{reason}") as caught:
        train(tmp_path / "tokenizer.model", [Document("a", text)], size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [Document("empty", "")]])
def test_no_text_is_an_error(tmp_path, documents):
    with pytest.raises(InputError, match="no text"):
        train(tmp_path / "tokenizer.model", documents)

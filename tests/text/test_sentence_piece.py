"""SentencePiece models against the sentencepiece library itself."""

import contextlib
import pathlib
import random

import pytest
import sentencepiece

from llama_jax.errors import InputError
from llama_jax.text.sentencepiece import SentencePieceTokenizer, load_sentence_piece
from llama_jax.text.tokenizer import encode_prompt


@pytest.fixture(scope="module")
def library(sentence_piece_path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece_path))


def test_ids_and_text_are_the_librarys(
    sentence_piece: SentencePieceTokenizer, library, texts: list[str]
):
    for text in texts:
        ids = sentence_piece.encode(text)
        assert ids == library.encode(text)
        assert sentence_piece.decode(ids) == library.decode(ids) == text.replace("▁", " ")


def test_random_ids_read_as_the_library_reads_them(sentence_piece: SentencePieceTokenizer, library):
    rng = random.Random(1)
    whole = 0
    for _ in range(500):
        ids = [rng.randrange(library.vocab_size()) for _ in range(rng.randrange(1, 6))]
        expected = library.decode(ids)
        if "\ufffd" not in expected:  # how many U+FFFD stand for broken bytes is a matter of taste
            whole += 1
            assert sentence_piece.decode(ids) == expected, ids
    assert whole > 100


def test_begin_and_end_come_from_the_file(sentence_piece: SentencePieceTokenizer):
    assert (sentence_piece.begin_id, sentence_piece.end_id, sentence_piece.adds_begin) == (
        1,
        2,
        True,
    )
    assert sentence_piece.special_tokens == {"<s>": 1, "</s>": 2, "<|im_end|>": 3}
    assert sentence_piece.vocab_size == 500
    assert encode_prompt(sentence_piece, "x") == [1, *sentence_piece.encode("x")]


def test_without_begin_a_prompt_has_none(tmp_path: pathlib.Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_sentence_piece(tmp_path / "m.model")
    assert (tokenizer.begin_id, tokenizer.adds_begin) == (None, False)
    assert encode_prompt(tokenizer, "a b") == tokenizer.encode("a b")


@pytest.mark.parametrize("text", ["<s>", "</s>hi", "a<|im_end|>b"])
def test_control_symbols_in_text_stay_text(sentence_piece: SentencePieceTokenizer, text: str):
    ids = sentence_piece.encode(text)
    assert not set(ids) & set(sentence_piece.special_tokens.values())
    assert sentence_piece.decode(ids) == text


def test_control_ids_have_no_text(sentence_piece: SentencePieceTokenizer):
    assert sentence_piece.decode([1, *sentence_piece.encode("hello"), 3, 2]) == "hello"


def test_half_a_character_is_refused(sentence_piece: SentencePieceTokenizer):
    with pytest.raises(InputError, match=r"U\+D83D at position 1, half of a surrogate pair"):
        sentence_piece.encode("a\ud83d")


@pytest.mark.parametrize("token", [-1, 500])
def test_an_id_outside_the_vocabulary_is_refused(
    sentence_piece: SentencePieceTokenizer, token: int
):
    with pytest.raises(InputError, match="the tokenizer has 500 tokens"):
        sentence_piece.decode([token])


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"garbage" * 100])
def test_a_damaged_model_is_refused(tmp_path: pathlib.Path, content: bytes):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer.model: not a SentencePiece model"):
        load_sentence_piece(path)


def test_mutated_models_load_or_are_refused(
    sentence_piece_path: pathlib.Path, tmp_path: pathlib.Path
):
    rng, good = random.Random(2), sentence_piece_path.read_bytes()
    path = tmp_path / "tokenizer.model"
    for _ in range(100):
        damaged = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.3 else good)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):  # and no other
            tokenizer = load_sentence_piece(path)
            tokenizer.decode(tokenizer.encode("any text"))

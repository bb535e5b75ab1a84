"""Decoding token by token gives what decoding at once gives, and nothing that would have to be
taken back.
"""

import time

import hypothesis
import pytest
from hypothesis import strategies

from llama_jax.text.tokenizer import StreamDecoder, Tokenizer

PROPERTY = hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def pushed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each push gives, and flush at the end."""
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, tokens), decoder.flush()]


@PROPERTY
@hypothesis.given(
    fractions=strategies.lists(strategies.floats(0, 1, exclude_max=True), max_size=30)
)
def test_random_ids(tokenizer: Tokenizer, fractions: list[float]):
    tokens = [int(fraction * tokenizer.vocab_size) for fraction in fractions]
    assert "".join(pushed(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.fixture
def single(tokenizer: Tokenizer) -> set[bytes]:
    """The bytes that are a piece of the vocabulary (SmolLM2's lacks 0xF1, for planes of Unicode not
    in use).
    """
    return {piece for piece in tokenizer.token_bytes.pieces if len(piece) == 1}


@PROPERTY
@hypothesis.given(text=strategies.text())
def test_any_text_comes_back(tokenizer: Tokenizer, single: set[bytes], text: str):
    parts = pushed(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))
    if "▁" not in text and all(
        bytes([byte]) in single for byte in text.encode()
    ):  # ▁ is SentencePiece's space
        assert "".join(parts) == text
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


def test_real_texts(tokenizer: Tokenizer, texts: list[str]):
    for text in texts:
        assert (
            "".join(pushed(tokenizer, tokenizer.encode(text))) == text.replace("▁", " ")
            or "▁" in text
        )


def test_a_character_is_held_back_until_whole(byte_pair: Tokenizer):
    tokens = byte_pair.encode("🎉")
    assert len(tokens) == 4
    assert pushed(byte_pair, tokens) == ["", "", "", "🎉", ""]
    assert pushed(byte_pair, tokens[:3]) == ["", "", "", "\ufffd"]


def test_flush_begins_anew(sentence_piece: Tokenizer):
    decoder = StreamDecoder(sentence_piece)
    tokens = sentence_piece.encode("for it")
    for _ in range(2):
        assert "".join(map(decoder.push, tokens)) + decoder.flush() == "for it"


def test_special_tokens_leave_the_beginning_a_beginning(sentence_piece: Tokenizer):
    assert "".join(pushed(sentence_piece, [1, *sentence_piece.encode("for it"), 2])) == "for it"


@pytest.mark.parametrize("length", [30_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_cost_of_a_token_does_not_grow(byte_pair: Tokenizer, length: int):
    decoder, token = StreamDecoder(byte_pair), byte_pair.encode("a")[0]

    def seconds(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            decoder.push(token)
        return time.process_time() - start

    early = min(seconds(1000) for _ in range(5))
    seconds(length)
    assert min(seconds(1000) for _ in range(5)) < 5 * early

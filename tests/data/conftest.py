"""Small random token files."""

import random

import pytest

from llama_jax.data.token_file import TokenFile, write_tokens


def _documents(seed, count) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(100) for _ in range(source.randint(1, 12))] for _ in range(count)]


def _write(path, documents, vocab_size=100) -> TokenFile:
    return write_tokens(
        path,
        documents,
        vocab_size=vocab_size,
        bytes_of_text=7,
        tokenizer_sha256="t",
        sources_sha256="s",
    )


@pytest.fixture
def make_file(tmp_path):
    """Makes a token file of the given documents."""
    numbers = iter(range(10**6))
    return lambda documents, vocab_size=100: _write(
        tmp_path / f"{next(numbers)}.tokens", documents, vocab_size
    )


@pytest.fixture
def random_documents():
    """Makes documents of 1 to 12 random ids below 100, given a seed and a count."""
    return _documents


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A token file of 60 random documents."""
    return _write(tmp_path_factory.mktemp("packed") / "random.tokens", _documents(5, 60))

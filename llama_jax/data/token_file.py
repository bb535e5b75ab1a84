"""Tokens on disk: a memory-mapped file, checked against its header when it is opened (`token_header` has the layout)."""

import array
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.data.atomic import atomic_write
from llama_jax.data.token_header import START_DTYPE, TOKENS_AT, TokenHeader, choose_dtype, pack_header, read_header
from llama_jax.errors import CorruptError, InputError

Ids = Sequence[int] | np.ndarray

_CHECKED_AT_ONCE = 1 << 22  # elements


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file; nothing is read from disk before it is looked at.

    Attributes:
      path: where it is.
      header: what it says about itself.
      tokens: all documents one after another, memory-mapped.
      starts: position in `tokens` of each document's first token, memory-mapped, increasing from 0.
    """

    path: Path
    header: TokenHeader
    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "TokenFile":
        """Maps a token file after checking its header and its length; see `verify` for the content.

        Raises:
          InputError: the file cannot be read.
          CorruptError: it is not a token file of this version, or its length contradicts its header.
        """
        header = read_header(path)
        size = path.stat().st_size
        if size != header.file_bytes:
            raise CorruptError(f"{path}: {size} bytes, but its header promises {header.file_bytes}; prepare the data again")
        tokens = np.memmap(path, header.token_dtype, "r", TOKENS_AT, (header.tokens,))
        starts = np.memmap(path, START_DTYPE, "r", header.starts_at, (header.documents,))
        return cls(path, header, tokens, starts)

    @property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of the text that was encoded."""
        return self.header.bytes_of_text

    def verify(self) -> None:
        """Reads everything once and compares it with the header.

        Raises:
          CorruptError: naming the file and what is wrong.
        """
        for name, values in (("tokens", self.tokens), ("starts", self.starts)):
            if _checksum(values) != getattr(self.header, f"{name}_crc32"):
                raise CorruptError(f"{self.path}: the checksum of its {name} is wrong; prepare the data again")
        if self.starts[0] != 0 or self.starts[-1] >= self.header.tokens or not _increases(self.starts):
            raise CorruptError(f"{self.path}: its document starts are out of order; prepare the data again")
        largest = max(int(piece.max()) for piece in iterate_pieces(self.tokens))
        if largest >= self.header.vocab_size:
            raise CorruptError(
                f"{self.path}: token {largest}, but a vocabulary of {self.header.vocab_size}; prepare the data again"
            )


def write_tokens(
    path: Path,
    documents: Iterable[Ids],
    *,
    vocab_size: int,
    bytes_of_text: int,
    tokenizer_sha256: str,
    sources_sha256: str,
) -> TokenFile:
    """Writes documents, one at a time, and opens the result; an interruption leaves no file, or the old one.

    Args:
      path: file to write.
      documents: the ids of each, begin and end tokens included; one without ids leaves no trace.
      vocab_size: ids must be below it; decides between `uint16` and `uint32`.
      bytes_of_text: UTF-8 bytes that the documents had as text.
      tokenizer_sha256: of the tokenizer's file.
      sources_sha256: of what was encoded.

    Raises:
      InputError: no documents, or an id outside the vocabulary, naming it and its document's number from 0.
    """
    starts = array.array("Q")
    with atomic_write(path) as file:
        file.write(bytes(TOKENS_AT))
        tokens, crc = _write_documents(file, documents, vocab_size, starts)
        if not tokens:
            raise InputError(f"{path}: no tokens to write; give documents that are not empty")
        ends = np.asarray(starts, START_DTYPE)
        header = TokenHeader(
            choose_dtype(vocab_size),
            tokens,
            len(ends),
            bytes_of_text,
            vocab_size,
            tokenizer_sha256,
            sources_sha256,
            crc,
            _checksum(ends),
        )
        file.write(bytes(header.starts_at - file.tell()))
        file.write(ends.tobytes())
        file.seek(0)
        file.write(pack_header(header))
    return TokenFile.open(path)


def iterate_pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of a long array, so that a pass over a mapped file needs little memory."""
    return (values[first : first + _CHECKED_AT_ONCE] for first in range(0, len(values), _CHECKED_AT_ONCE))


def _write_documents(file: BinaryIO, documents: Iterable[Ids], vocab_size: int, starts: array.array) -> tuple[int, int]:
    """Appends each document's start to `starts`; returns how many tokens were written and their checksum."""
    dtype = np.dtype(choose_dtype(vocab_size)).newbyteorder("<")
    tokens, crc = 0, 0
    for number, ids in enumerate(documents):
        if len(ids):
            encoded = _checked_ids(ids, number, vocab_size).astype(dtype).tobytes()
            starts.append(tokens)
            tokens += len(ids)
            crc = zlib.crc32(encoded, crc)
            file.write(encoded)
    return tokens, crc


def _checked_ids(ids: Ids, document: int, vocab_size: int) -> np.ndarray:
    values = np.asarray(ids, np.int64)
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        raise InputError(f"document {document}: token id {outside[0]}, but ids from 0 to {vocab_size - 1} expected")
    return values


def _checksum(values: np.ndarray) -> int:
    crc = 0
    for piece in iterate_pieces(values):
        crc = zlib.crc32(piece.tobytes(), crc)
    return crc


def _increases(starts: np.ndarray) -> bool:
    pieces = (starts[first : first + _CHECKED_AT_ONCE + 1] for first in range(0, len(starts), _CHECKED_AT_ONCE))
    return all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)

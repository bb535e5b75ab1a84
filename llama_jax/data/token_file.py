"""Tokens on disk: a memory-mapped file, checked against its header when it is opened (`token_header` has the layout)."""

import dataclasses
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.data.token_counts import count_tokens, read_counts, write_counts
from llama_jax.data.token_header import START_DTYPE, TOKENS_AT, TokenHeader, parse_header
from llama_jax.data.token_writer import Ids, token_writer
from llama_jax.data.tokens import Piece, TokenCounts
from llama_jax.errors import CorruptError, InputError

_CHECKED_AT_ONCE = 1 << 22  # elements


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file (`data.tokens.Tokens`): one map, one descriptor, nothing read from disk before it is looked at.

    Attributes:
      path: where it is.
      header: what it says about itself.
      tokens: all documents one after another, memory-mapped.
      starts: position in `tokens` of each document's first token, memory-mapped, increasing from 0.
      mask: which tokens are learned from, one bit each, memory-mapped; `None` where all are.
      mapped: the map of the file that the arrays are views of.
    """

    path: Path
    header: TokenHeader
    tokens: np.ndarray
    starts: np.ndarray
    mask: np.ndarray | None
    mapped: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "TokenFile":
        """Maps a token file after checking its header and its length; see `verify` for the content.

        Raises:
          InputError: the file cannot be read.
          CorruptError: it is not a token file of this version, or its length contradicts its header.
        """
        try:
            with path.open("rb", buffering=0) as file:
                header, size = parse_header(path, file.read(TOKENS_AT)), os.fstat(file.fileno()).st_size
                if size != header.file_bytes:
                    raise CorruptError(
                        f"{path}: {size} bytes, but its header promises {header.file_bytes}; prepare the data again"
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; a token file expected") from None
        mapped.madvise(mmap.MADV_RANDOM)  # else a kernel reads megabytes ahead of the few pages of a sequence
        tokens = np.frombuffer(mapped, header.token_dtype, header.tokens, TOKENS_AT)
        starts = np.frombuffer(mapped, START_DTYPE, header.documents, header.starts_at)
        mask = np.frombuffer(mapped, np.uint8, header.mask_bytes, header.mask_at) if header.mask_bytes else None
        return cls(path, header, tokens, starts, mask, mapped)

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def kind(self) -> str:
        """Of its documents, as in the header."""
        return self.header.kind

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.header.tokens

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.header.documents

    @property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of what is learned from."""
        return self.header.bytes_of_text

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        return self.header.vocab_size

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where the file ends before.

        Raises:
          CorruptError: for a token outside the vocabulary: the file was damaged after it was written.
        """
        chosen = self.tokens[first:stop]
        self._fetch(TOKENS_AT + first * chosen.itemsize, chosen.nbytes)
        ids = chosen.astype(np.int32)
        if ids.size and ids.max() >= self.vocab_size:
            raise CorruptError(f"{self.path}: token {ids.max()}, but a vocabulary of {self.vocab_size}; prepare the data again")
        # Keys of the array's own type: any other would have the whole mapped array converted for each look-up.
        begin, end = np.searchsorted(self.starts, np.array([first, first + len(ids)], np.uint64))
        begins = np.zeros(len(ids), bool)
        begins[(self.starts[begin:end] - np.uint64(first)).astype(np.int64)] = True
        return Piece(ids, begins, self._learned(first, len(ids)))

    def _learned(self, first: int, count: int) -> np.ndarray:
        if self.mask is None:
            return np.ones(count, bool)
        bits = np.unpackbits(self.mask[first // 8 : -(-(first + count) // 8)])
        return bits[first % 8 : first % 8 + count].astype(bool)

    def _fetch(self, first: int, count: int) -> None:
        """Has bytes of the file read at once, rather than a page at a time when they are looked at."""
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        if first + count - page > mmap.PAGESIZE and count:
            self.mapped.madvise(mmap.MADV_WILLNEED, page, first + count - page)

    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        self._fetch(self.header.starts_at, self.starts.nbytes)
        return np.diff(self.starts.astype(np.int64), append=self.size)

    @property
    def counts_path(self) -> Path:
        """Where its counts are kept, if they are."""
        return self.path.with_name(f"{self.path.stem}_counts.json")

    def counts(self) -> TokenCounts:
        """Which tokens occur: from the file beside it, or where there is none by reading everything."""
        kept = read_counts(self.counts_path, self.vocab_size, self.header.sources_sha256)
        return count_tokens(self) if kept is None else kept

    def keep_counts(self) -> None:
        """Counts the tokens, unless that was done before."""
        if read_counts(self.counts_path, self.vocab_size, self.header.sources_sha256) is None:
            write_counts(self.counts_path, count_tokens(self), self.header.sources_sha256)

    def verify(self) -> None:
        """Reads everything once and compares it with the header.

        Raises:
          CorruptError: naming the file and what is wrong.
        """
        self.mapped.madvise(mmap.MADV_SEQUENTIAL)
        parts = {"tokens": self.tokens, "starts": self.starts} | ({} if self.mask is None else {"mask": self.mask})
        for name, values in parts.items():
            if _checksum(values) != getattr(self.header, f"{name}_crc32"):
                raise CorruptError(f"{self.path}: the checksum of its {name} is wrong; prepare the data again")
        if self.starts[0] != 0 or self.starts[-1] >= self.header.tokens or not _increases(self.starts):
            raise CorruptError(f"{self.path}: its document starts are out of order; prepare the data again")
        largest = max(int(piece.max()) for piece in iterate_pieces(self.tokens))
        if largest >= self.header.vocab_size:
            raise CorruptError(
                f"{self.path}: token {largest}, but a vocabulary of {self.header.vocab_size}; prepare the data again"
            )
        self.mapped.madvise(mmap.MADV_RANDOM)


def write_tokens(
    path: Path,
    documents: Iterable[Ids],
    *,
    vocab_size: int,
    bytes_of_text: int,
    tokenizer_sha256: str,
    sources_sha256: str,
) -> TokenFile:
    """Writes text documents, one at a time, and opens the result; an interruption leaves no file, or the old one.

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
    with token_writer(path, vocab_size, "text") as writer:
        for ids in documents:
            writer.add(ids)
        writer.finish(bytes_of_text=bytes_of_text, tokenizer_sha256=tokenizer_sha256, sources_sha256=sources_sha256)
    return TokenFile.open(path)


def iterate_pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of a long array, so that a pass over a mapped file needs little memory."""
    return (values[first : first + _CHECKED_AT_ONCE] for first in range(0, len(values), _CHECKED_AT_ONCE))


def _checksum(values: np.ndarray) -> int:
    crc = 0
    for piece in iterate_pieces(values):
        crc = zlib.crc32(piece.tobytes(), crc)
    return crc


def _increases(starts: np.ndarray) -> bool:
    pieces = (starts[first : first + _CHECKED_AT_ONCE + 1] for first in range(0, len(starts), _CHECKED_AT_ONCE))
    return all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)

"""Tokens on disk: a memory-mapped file, checked against its header when it is opened
(`token_header` has the layout).
"""

import array
import contextlib
import dataclasses
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

import numpy as np

from llama_jax.data.tokens import (
    Counter,
    Piece,
    TokenCounts,
    count_tokens,
    read_counts,
    write_counts,
)
from llama_jax.errors import CorruptError, InputError
from llama_jax.storage import atomic_write

# --- token header ---
#
# The header of a token file, and the layout of the file.
#
# magic, version, length and CRC-32 of the header   20 bytes
# header                                            JSON, up to byte 4096
# tokens                                            uint16 or uint32, little endian
# padding to a multiple of 8 bytes
# starts: position of each document's first token   uint64, little endian
# mask: which tokens are learned from, if not all   one bit a token, the first in the highest bit of
#   a byte


VERSION = 2
TOKENS_AT = 4096  # bytes
START_DTYPE: np.dtype = np.dtype("<u8")

Kind = Literal["text", "chat", "pairs"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MAGIC = b"LJTOKENS"
_PREAMBLE = struct.Struct("<8sIII")
_TOKEN_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class TokenHeader(NamedTuple):
    """What a token file says about itself.

    Attributes:
      kind: `text`, learned from as a whole; `chat`, conversations with a mask of the tokens that
        the assistant says; `pairs`, the same with two neighbouring documents for one prompt, the
        chosen answer before the rejected one.
      dtype: `uint16` where the vocabulary allows, else `uint32`.
      tokens: number of tokens, begin and end tokens included.
      documents: number of documents; each has at least one token.
      bytes_of_text: UTF-8 bytes of the targets, all text or the assistant's messages: the
        denominator of bits per byte.
      vocab_size: every token is below it.
      tokenizer_sha256: of the tokenizer's file.
      sources_sha256: of the documents' names and texts.
      tokens_crc32: checksum of the tokens' bytes.
      starts_crc32: checksum of the starts' bytes.
      mask_crc32: checksum of the mask's bytes; 0 for `text`, which has none.
    """

    kind: str
    dtype: str
    tokens: int
    documents: int
    bytes_of_text: int
    vocab_size: int
    tokenizer_sha256: str
    sources_sha256: str
    tokens_crc32: int
    starts_crc32: int
    mask_crc32: int

    @property
    def token_dtype(self) -> np.dtype:
        """The type of the tokens in the file."""
        return _TOKEN_DTYPES[self.dtype]

    @property
    def starts_at(self) -> int:
        """Byte at which the starts begin."""
        tokens_end = TOKENS_AT + self.tokens * self.token_dtype.itemsize
        return -(-tokens_end // START_DTYPE.itemsize) * START_DTYPE.itemsize

    @property
    def mask_at(self) -> int:
        """Byte at which the mask begins."""
        return self.starts_at + self.documents * START_DTYPE.itemsize

    @property
    def mask_bytes(self) -> int:
        """Length of the mask; 0 where every token is learned from."""
        return 0 if self.kind == "text" else -(-self.tokens // 8)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.mask_at + self.mask_bytes


def choose_dtype(vocab_size: int) -> str:
    """The smallest type of token that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def pack_header(header: TokenHeader) -> bytes:
    """The first bytes of the file."""
    body = json.dumps(header._asdict()).encode()
    return _PREAMBLE.pack(_MAGIC, VERSION, len(body), zlib.crc32(body)) + body


def parse_header(path: Path, block: bytes) -> TokenHeader:
    """Checks the header of a file.

    Args:
      path: of the file, for messages.
      block: its first `TOKENS_AT` bytes.

    Raises:
      CorruptError: it is not a token file of this version, or its header is damaged.
    """
    if len(block) < TOKENS_AT or not block.startswith(_MAGIC):
        raise CorruptError(
            f"{path}: not a token file, or cut off in its header; prepare the data again"
        )
    _, version, length, crc = _PREAMBLE.unpack_from(block)
    if version != VERSION:
        raise CorruptError(
            f"{path}: token file of version {version}, {VERSION} expected; prepare the data again"
        )
    body = block[_PREAMBLE.size : _PREAMBLE.size + length]
    if zlib.crc32(body) != crc:
        raise CorruptError(f"{path}: the checksum of its header is wrong; prepare the data again")
    return _parse(path, body)


def _parse(path: Path, body: bytes) -> TokenHeader:
    """The header as typed values: a checksum proves that it is whole, not that this program wrote
    it.
    """
    try:
        header = TokenHeader(**json.loads(body))
    except (ValueError, TypeError, RecursionError):
        raise CorruptError(
            f"{path}: its header is not one of a token file; prepare the data again"
        ) from None
    types_fit = all(
        type(value) is TokenHeader.__annotations__[name] for name, value in header._asdict().items()
    )
    known = types_fit and header.dtype in _TOKEN_DTYPES and header.kind in KINDS
    if not known or min(header.tokens, header.documents) < 1:
        raise CorruptError(f"{path}: its header has values of a wrong kind; prepare the data again")
    return header


# --- token writer ---
#
# Writing a token file, document by document: it appears when it is whole.


Ids = Sequence[int] | np.ndarray
Mask = Sequence[bool] | np.ndarray


@contextlib.contextmanager
def token_writer(path: Path, vocab_size: int, kind: Kind) -> Iterator["TokenWriter"]:
    """A writer whose file takes the place of `path` when the block ends without an error; call its
    `finish` before.

    Args:
      path: file to write.
      vocab_size: ids must be below it; decides between `uint16` and `uint32`.
      kind: of the documents, as in `TokenHeader`.
    """
    with atomic_write(path) as file:
        yield TokenWriter(file, path, vocab_size, kind)


class TokenWriter:
    """Takes documents and, in the end, the values of the header.

    Attributes:
      tokens: written so far.
      documents: written so far.
    """

    def __init__(self, file: BinaryIO, path: Path, vocab_size: int, kind: Kind) -> None:
        self._file, self._path, self._vocab_size, self._kind = file, path, vocab_size, kind
        self._dtype = np.dtype(choose_dtype(vocab_size)).newbyteorder("<")
        self._starts, self._crc = array.array("Q"), 0
        self._mask, self._counter = bytearray(), Counter(vocab_size)
        self._open_bits = np.zeros(0, bool)  # of the mask's last byte, which is not full yet
        self.tokens = 0
        file.write(bytes(TOKENS_AT))

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._starts)

    def add(self, ids: Ids, mask: Mask | None = None) -> None:
        """Appends a document, begin and end tokens included; one without ids leaves no trace.

        Args:
          ids: the tokens.
          mask: which of them are learned from; for kinds other than `text`.

        Raises:
          InputError: for an id outside the vocabulary, naming it and the number of its document in
            the file, from 0.
        """
        if not len(ids):
            return
        values = self._checked(ids)
        encoded = values.astype(self._dtype).tobytes()
        self._starts.append(self.tokens)
        self.tokens += len(ids)
        self._crc = zlib.crc32(encoded, self._crc)
        self._file.write(encoded)
        learned = None if self._kind == "text" else self._add_mask(mask, len(ids))
        self._counter.add(values, learned)

    def counts(self) -> TokenCounts:
        """Which tokens were written so far."""
        return self._counter.counts()

    def _add_mask(self, mask: Mask | None, count: int) -> np.ndarray:
        if mask is None or len(mask) != count:
            raise ValueError(
                f"{self._kind}: a mask with one value for each of {count} tokens expected"
            )
        learned = np.asarray(mask, bool)
        bits = np.concatenate([self._open_bits, learned])
        whole = len(bits) // 8 * 8
        self._mask += np.packbits(bits[:whole]).tobytes()
        self._open_bits = bits[whole:]
        return learned

    def _checked(self, ids: Ids) -> np.ndarray:
        values = np.asarray(ids, np.int64)
        outside = values[(values < 0) | (values >= self._vocab_size)]
        if outside.size:
            raise InputError(
                f"document {self.documents}: token id {outside[0]}, but ids from 0 to "
                f"{self._vocab_size - 1} expected"
            )
        return values

    def finish(self, *, bytes_of_text: int, tokenizer_sha256: str, sources_sha256: str) -> None:
        """Writes the parts after the tokens, and the header.

        Args:
          bytes_of_text: UTF-8 bytes of the targets.
          tokenizer_sha256: of the tokenizer's file.
          sources_sha256: of the encoded sources.

        Raises:
          InputError: if there were no documents.
        """
        if not self.tokens:
            raise InputError(f"{self._path}: no tokens to write; give documents that are not empty")
        starts = np.asarray(self._starts, START_DTYPE).tobytes()
        mask = bytes(self._mask) + np.packbits(self._open_bits).tobytes()
        header = TokenHeader(
            kind=self._kind,
            dtype=choose_dtype(self._vocab_size),
            tokens=self.tokens,
            documents=self.documents,
            bytes_of_text=bytes_of_text,
            vocab_size=self._vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            sources_sha256=sources_sha256,
            tokens_crc32=self._crc,
            starts_crc32=zlib.crc32(starts),
            mask_crc32=zlib.crc32(mask),
        )
        self._file.write(bytes(header.starts_at - self._file.tell()) + starts + mask)
        self._file.seek(0)
        self._file.write(pack_header(header))


# --- token file ---


_CHECKED_AT_ONCE = 1 << 22  # elements


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file (`data.tokens.Tokens`): one map, one descriptor, nothing read from disk
    before it is looked at.

    Attributes:
      path: where it is.
      header: of the file.
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

    @staticmethod
    def header_of(path: Path) -> TokenHeader:
        """The header alone; no token is read.

        Raises:
          OSError: if the file cannot be read.
          CorruptError: it is not a token file of this version, or its header is damaged.
        """
        with path.open("rb", buffering=0) as file:
            return parse_header(path, file.read(TOKENS_AT))

    @classmethod
    def open(cls, path: Path) -> "TokenFile":
        """Maps a token file after checking its header and its length; see `verify` for the content.

        Raises:
          InputError: the file cannot be read.
          CorruptError: it is not a token file of this version, or its length contradicts its
            header.
        """
        try:
            with path.open("rb", buffering=0) as file:
                header, size = (
                    parse_header(path, file.read(TOKENS_AT)),
                    os.fstat(file.fileno()).st_size,
                )
                if size != header.file_bytes:
                    raise CorruptError(
                        f"{path}: {size} bytes, but its header promises "
                        f"{header.file_bytes}; prepare the data again"
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; a token file expected") from None
        mapped.madvise(
            mmap.MADV_RANDOM
        )  # else a kernel reads megabytes ahead of the few pages of a sequence
        tokens = np.frombuffer(mapped, header.token_dtype, header.tokens, TOKENS_AT)
        starts = np.frombuffer(mapped, START_DTYPE, header.documents, header.starts_at)
        mask = (
            np.frombuffer(mapped, np.uint8, header.mask_bytes, header.mask_at)
            if header.mask_bytes
            else None
        )
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
        """UTF-8 bytes of the targets."""
        return self.header.bytes_of_text

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        return self.header.vocab_size

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where the file ends before.

        Raises:
          CorruptError: for a token outside the vocabulary: the file was damaged after it was
            written.
        """
        chosen = self.tokens[first:stop]
        self._fetch(TOKENS_AT + first * chosen.itemsize, chosen.nbytes)
        ids = chosen.astype(np.int32)
        if ids.size and ids.max() >= self.vocab_size:
            raise CorruptError(
                f"{self.path}: token {ids.max()}, but a vocabulary of {self.vocab_size}; "
                "prepare the data again"
            )
        # Keys of the array's own type: any other would have the whole mapped array converted for
        # each lookup.
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
        """Has bytes of the file read at once, rather than a page at a time when they are looked
        at.
        """
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
        """Which tokens occur: from the file beside it, or where there is none by reading
        everything.
        """
        kept = read_counts(self.counts_path, self.vocab_size, self.header.sources_sha256)
        return count_tokens(self) if kept is None else kept

    def keep_counts(self) -> None:
        """Counts the tokens, unless that was done before."""
        if read_counts(self.counts_path, self.vocab_size, self.header.sources_sha256) is None:
            write_counts(self.counts_path, count_tokens(self), self.header.sources_sha256)

    def verify(self) -> None:
        """Reads everything once and compares it with the header.

        Raises:
          CorruptError: naming the file and the damage.
        """
        self.mapped.madvise(mmap.MADV_SEQUENTIAL)
        parts = {"tokens": self.tokens, "starts": self.starts} | (
            {} if self.mask is None else {"mask": self.mask}
        )
        for name, values in parts.items():
            if _checksum(values) != getattr(self.header, f"{name}_crc32"):
                raise CorruptError(
                    f"{self.path}: the checksum of its {name} is wrong; prepare the data again"
                )
        if (
            self.starts[0] != 0
            or self.starts[-1] >= self.header.tokens
            or not _increases(self.starts)
        ):
            raise CorruptError(
                f"{self.path}: its document starts are out of order; prepare the data again"
            )
        largest = max(int(piece.max()) for piece in iterate_pieces(self.tokens))
        if largest >= self.header.vocab_size:
            raise CorruptError(
                f"{self.path}: token {largest}, but a vocabulary of "
                f"{self.header.vocab_size}; prepare the data again"
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
    """Writes text documents, one at a time, and opens the result; an interruption leaves no file,
    or the old one.

    Args:
      path: file to write.
      documents: the ids of each, begin and end tokens included; one without ids leaves no trace.
      vocab_size: ids must be below it; decides between `uint16` and `uint32`.
      bytes_of_text: UTF-8 bytes that the documents had as text.
      tokenizer_sha256: of the tokenizer's file.
      sources_sha256: of the encoded sources.

    Raises:
      InputError: no documents, or an id outside the vocabulary, naming it and its document's number
        from 0.
    """
    with token_writer(path, vocab_size, "text") as writer:
        for ids in documents:
            writer.add(ids)
        writer.finish(
            bytes_of_text=bytes_of_text,
            tokenizer_sha256=tokenizer_sha256,
            sources_sha256=sources_sha256,
        )
    return TokenFile.open(path)


def iterate_pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of a long array, so that a pass over a mapped file needs little memory."""
    return (
        values[first : first + _CHECKED_AT_ONCE]
        for first in range(0, len(values), _CHECKED_AT_ONCE)
    )


def _checksum(values: np.ndarray) -> int:
    crc = 0
    for piece in iterate_pieces(values):
        crc = zlib.crc32(piece.tobytes(), crc)
    return crc


def _increases(starts: np.ndarray) -> bool:
    pieces = (
        starts[first : first + _CHECKED_AT_ONCE + 1]
        for first in range(0, len(starts), _CHECKED_AT_ONCE)
    )
    return all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)

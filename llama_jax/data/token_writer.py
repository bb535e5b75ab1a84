"""Writing a token file, document by document: it appears when it is whole."""

import array
import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.data.atomic import atomic_write
from llama_jax.data.token_counts import Counter
from llama_jax.data.token_header import START_DTYPE, TOKENS_AT, Kind, TokenHeader, choose_dtype, pack_header
from llama_jax.data.tokens import TokenCounts
from llama_jax.errors import InputError

Ids = Sequence[int] | np.ndarray
Mask = Sequence[bool] | np.ndarray


@contextlib.contextmanager
def token_writer(path: Path, vocab_size: int, kind: Kind) -> Iterator["TokenWriter"]:
    """A writer whose file takes the place of `path` when the block ends without an error; call its `finish` before.

    Args:
      path: file to write.
      vocab_size: ids must be below it; decides between `uint16` and `uint32`.
      kind: of the documents, as in `TokenHeader`.
    """
    with atomic_write(path) as file:
        yield TokenWriter(file, path, vocab_size, kind)


class TokenWriter:
    """Takes documents and, in the end, what is said about them.

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
          InputError: for an id outside the vocabulary, naming it and the number of its document in the file, from 0.
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
            raise ValueError(f"{self._kind}: a mask with one value for each of {count} tokens expected")
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
                f"document {self.documents}: token id {outside[0]}, but ids from 0 to {self._vocab_size - 1} expected"
            )
        return values

    def finish(self, *, bytes_of_text: int, tokenizer_sha256: str, sources_sha256: str) -> None:
        """Writes what stands behind the tokens and before them.

        Args:
          bytes_of_text: UTF-8 bytes of what is learned from.
          tokenizer_sha256: of the tokenizer's file.
          sources_sha256: of what was encoded.

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

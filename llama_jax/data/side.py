"""One side of a prepared folder on its way: shard after shard, those that an earlier call finished left as they are."""

import contextlib
import hashlib
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from llama_jax.data.encoding import Document
from llama_jax.data.token_counts import Counter, add_counts, count_tokens, read_counts, write_counts
from llama_jax.data.token_file import TokenFile
from llama_jax.data.token_header import Kind
from llama_jax.data.token_writer import TokenWriter, token_writer
from llama_jax.data.tokens import TokenCounts
from llama_jax.errors import InputError


class Stamp(NamedTuple):
    """What shards of one result have in common.

    Attributes:
      key: hash of all that the result depends on.
      tokenizer_sha256: of the tokenizer's files.
      vocab_size: of the tokenizer.
      shard_tokens: at which a shard ends.
    """

    key: str
    tokenizer_sha256: str
    vocab_size: int
    shard_tokens: int

    def sources_sha256(self, side: str, number: int) -> str:
        """What the header of a shard says: the hash of all that it depends on."""
        return hashlib.sha256(f"{self.key} {side} {number}".encode()).hexdigest()


class Side:
    """The shards of one side of the split.

    Attributes:
      shards: finished, those of an earlier call included.
    """

    def __init__(self, directory: Path, name: str, stamp: Stamp) -> None:
        self._directory, self._name, self._stamp = directory, name, stamp
        self._stack = contextlib.ExitStack()
        self._writer: TokenWriter | None = None
        self._bytes = self.shards = 0
        self._kept_documents = 0
        while (file := self._finished(self.shards)) is not None:
            self._kept_documents += file.documents
            self.shards += 1
        self._skipped = 0
        self._counts = self._kept_counts()

    def _path(self, number: int) -> Path:
        return self._directory / f"{self._name}-{number:05d}.tokens"

    @property
    def counts_path(self) -> Path:
        """Where the counts of all finished shards are kept."""
        return self._directory / f"{self._name}_counts.json"

    def _kept_counts(self) -> TokenCounts:
        """The counts of the finished shards. A process that was killed may have left the last shard uncounted."""
        size = self._stamp.vocab_size
        for counted in range(self.shards, max(-1, self.shards - 2), -1):
            kept = read_counts(self.counts_path, size, self._counts_key(counted))
            if kept is not None:
                break
        else:
            counted, kept = 0, Counter(size).counts()
        for number in range(counted, self.shards):
            kept = add_counts(kept, count_tokens(TokenFile.open(self._path(number))))
        return kept

    def _counts_key(self, shards: int) -> str:
        return self._stamp.sources_sha256(f"counts of {self._name}", shards)

    def _finished(self, number: int) -> TokenFile | None:
        """A shard that an earlier call left whole; anything else of that name will be replaced."""
        try:
            file = TokenFile.open(self._path(number))
            file.verify()
        except InputError:
            return None
        return file if file.header.sources_sha256 == self._stamp.sources_sha256(self._name, number) else None

    def has(self, documents: int) -> bool:
        """Counts documents that come next; whether finished shards hold them."""
        if self._skipped >= self._kept_documents:
            return False
        self._skipped += documents
        return True

    def add(self, kind: Kind, documents: list[Document]) -> None:
        """Appends the documents of one record; they are not parted."""
        if self._writer is None:
            self._writer = self._stack.enter_context(token_writer(self._path(self.shards), self._stamp.vocab_size, kind))
            self._bytes = 0
        for ids, mask, size in documents:
            self._writer.add(ids, mask)
            self._bytes += size
        if self._writer.tokens >= self._stamp.shard_tokens:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is open."""
        if self._writer is None:
            return
        self._writer.finish(
            bytes_of_text=self._bytes,
            tokenizer_sha256=self._stamp.tokenizer_sha256,
            sources_sha256=self._stamp.sources_sha256(self._name, self.shards),
        )
        self._stack.close()
        self.shards += 1
        self._counts = add_counts(self._counts, self._writer.counts())
        write_counts(self.counts_path, self._counts, self._counts_key(self.shards))
        self._writer = None

    def abandon(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Removes a shard that is not finished."""
        self._stack.__exit__(kind, error, trace)

    def open(self) -> list[TokenFile]:
        """All shards, whole, beside the file with their counts; what is left of an earlier, longer result is removed."""
        if self.shards:
            write_counts(self.counts_path, self._counts, self._counts_key(self.shards))
        else:
            self.counts_path.unlink(missing_ok=True)
        number = self.shards
        while self._path(number).exists():
            self._path(number).unlink()
            number += 1
        return [TokenFile.open(self._path(number)) for number in range(self.shards)]

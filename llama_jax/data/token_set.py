"""A prepared folder, opened: its shards as one array of tokens for training and one for
evaluation.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.token_file import KINDS, TokenFile
from llama_jax.data.tokens import Piece, TokenCounts, joined, read_counts
from llama_jax.errors import CorruptError, InputError
from llama_jax.storage import atomic_write

# --- manifest ---
#
# `manifest.json` of a prepared folder: its sources, settings and contents.


MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # folder with the files of the tokenizer
BAD_RECORDS = "bad_records.jsonl"  # records that were left out, with place and reason
MANIFEST_VERSION = 3


class SourceEntry(NamedTuple):
    """A file that was read.

    Attributes:
      name: relative to the folder that was given.
      bytes: its size.
      sha256: of its content; of a file in several parts, of the digests of the parts.
    """

    name: str
    bytes: int
    sha256: str


class ShardEntry(NamedTuple):
    """A token file.

    Attributes:
      file: its name in the folder.
      documents: in it.
      tokens: in it.
      bytes_of_text: UTF-8 bytes of the targets in it.
      bytes: its size.
      sha256: of its content.
    """

    file: str
    documents: int
    tokens: int
    bytes_of_text: int
    bytes: int
    sha256: str


class CountsEntry(NamedTuple):
    """A file with the counts of one side's tokens.

    Attributes:
      file: its name in the folder.
      bytes: its size.
      sha256: of its content.
    """

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder says about itself; no times and no places, so equal input gives equal
    manifests.

    Attributes:
      version: of this layout.
      kind: `text`, `chat` or `pairs`.
      vocab_size: of the tokenizer.
      tokenizer_sha256: of its files.
      template_sha256: of the chat template's source; `None` where none was used.
      held_out: share of the records kept out of training.
      shard_tokens: at which a shard ends.
      sources: files that were read, in order.
      dropped: records without anything to learn from.
      bad_records: records that could not be read or encoded and were left out.
      documents: in all shards.
      tokens: in all shards.
      train: shards to train on.
      held_out_shards: shards to evaluate on.
      counts: of the tokens to train on; and of those to evaluate on, if there are any.
    """

    version: int
    kind: str
    vocab_size: int
    tokenizer_sha256: str
    template_sha256: str | None
    held_out: float
    shard_tokens: int
    sources: tuple[SourceEntry, ...]
    dropped: int
    bad_records: int
    documents: int
    tokens: int
    train: tuple[ShardEntry, ...]
    held_out_shards: tuple[ShardEntry, ...]
    counts: tuple[CountsEntry, ...]

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """All of them."""
        return self.train + self.held_out_shards

    @property
    def files(self) -> tuple[ShardEntry | CountsEntry, ...]:
        """All that have a size and a checksum."""
        return *self.shards, *self.counts

    def write(self, directory: Path) -> None:
        """Writes the manifest, whole or not at all."""
        values = dataclasses.asdict(self)
        for name in _ENTRIES:
            values[name] = [entry._asdict() for entry in getattr(self, name)]
        with atomic_write(directory / MANIFEST) as file:
            file.write((json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
          InputError: there is none: the folder was not prepared, or not to the end.
          InputError: it is of another version.
          CorruptError: it is damaged.
        """
        path = directory / MANIFEST
        try:
            stat = path.stat()
            return _read_manifest(path, stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror or error}; a folder that `prepare` finished "
                "expected (the same command resumes)"
            ) from None


@functools.lru_cache(16)
def _read_manifest(path: Path, changed: int, size: int) -> Manifest:
    """A manifest, read once for each change of its file: that of 15T tokens has 30 MB."""
    try:
        values = json.loads(path.read_bytes())
        version, kind = values["version"], values["kind"]
        if version == MANIFEST_VERSION and kind in KINDS and values["train"]:
            for name, entry in _ENTRIES.items():
                values[name] = _entries(entry, values[name])
            if len(values["counts"]) == 1 + bool(values["held_out_shards"]):
                return Manifest(**values)
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CorruptError(f"{path}: not a manifest, or damaged; prepare the data again") from None
    raise InputError(
        f"{path}: version {version!r:.20}, kind {kind!r:.20} given, version "
        f"{MANIFEST_VERSION} with shards of a known kind "
        "expected; prepare the data again, with another --output"
    )


_ENTRIES: dict[str, type] = {
    "sources": SourceEntry,
    "train": ShardEntry,
    "held_out_shards": ShardEntry,
    "counts": CountsEntry,
}


def manifest_sha256(directory: Path) -> str:
    """SHA-256 of a folder's manifest, which holds that of every file: the identity of the data."""
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(kind: type, listed: list[dict]) -> tuple:
    """Entries whose values have the declared types, and whose files lie in the folder."""
    types = tuple(kind.__annotations__.values())
    entries = tuple(kind(**values) for values in listed)
    for entry in entries:
        if tuple(map(type, entry)) != types or (
            kind is not SourceEntry and not _is_name(entry.file)
        ):
            raise ValueError
    return entries


def _is_name(file: str) -> bool:
    return "/" not in file and file not in ("", ".", "..")


# --- token set ---


OPEN_AT_ONCE = 64  # token files of a process, however many data sets it reads: one descriptor each

_Common = tuple[str, int, str]  # kind, vocabulary, tokenizer: equal in the headers of all shards


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """Token files one after another (`data.tokens.Tokens`); a file is opened when it is read from.

    Attributes:
      name: where they are.
      directory: the folder of the files.
      entries: of the manifest, in their order, at least one.
      counted: the file with the counts of their tokens.
      kind: of the documents.
      vocab_size: every token is below it.
      tokenizer_sha256: of the tokenizer's files.
    """

    name: str
    directory: Path
    entries: tuple[ShardEntry, ...]
    counted: CountsEntry
    kind: str
    vocab_size: int
    tokenizer_sha256: str

    @functools.cached_property
    def _ends(self) -> list[int]:
        """For each shard the number of tokens in it and those before it."""
        return list(itertools.accumulate(entry.tokens for entry in self.entries))

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._ends[-1]

    @functools.cached_property
    def documents(self) -> int:
        """Number of documents."""
        return sum(entry.documents for entry in self.entries)

    @functools.cached_property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of the targets."""
        return sum(entry.bytes_of_text for entry in self.entries)

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where they end before.

        Raises:
          InputError: a shard cannot be read.
          CorruptError: for a shard that is not the one of the manifest, and for a token outside the
            vocabulary: the file was damaged after it was written.
        """
        number = self.locate(first)
        parts = [self._read(number, first, stop)]
        while stop > self._ends[number] and number + 1 < len(self.entries):
            number += 1
            parts.append(self._read(number, first, stop))
        return joined(parts)

    def locate(self, token: int) -> int:
        """The number of the shard that holds a token; the last shard for one beyond the end."""
        return min(bisect.bisect_right(self._ends, token), len(self.entries) - 1)

    def _read(self, number: int, first: int, stop: int) -> Piece:
        """What one shard holds of these tokens."""
        file = self._file(number)
        start = self._ends[number] - file.size
        return file.read(max(0, first - start), min(stop - start, file.size))

    def _file(self, number: int) -> TokenFile:
        return _opened(
            self.directory,
            self.entries[number],
            (self.kind, self.vocab_size, self.tokenizer_sha256),
        )

    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.concatenate([self._file(number).lengths() for number in range(len(self.entries))])

    def documents_from(self, first: int, count: int) -> Iterator[Piece]:
        """Documents one by one; of other documents no token is read.

        Args:
          first: number of the first document, from 0.
          count: at most this many.
        """
        end = first + count
        for number, entry in enumerate(self.entries):
            if first >= entry.documents:
                first, end = first - entry.documents, end - entry.documents
                continue
            lengths = self._file(number).lengths()
            starts = np.cumsum(lengths) - lengths
            for start, length in zip(starts[first:end].tolist(), lengths[first:end].tolist()):
                yield self._file(number).read(start, start + length)
            first, end = 0, end - entry.documents
            if end <= 0:
                return

    def counts(self) -> TokenCounts:
        """Which tokens occur, as `prepare` counted them.

        Raises:
          CorruptError: the file with the counts is missing, or another than the manifest says.
        """
        path = self.directory / self.counted.file
        whole = path.is_file() and file_sha256(path) == self.counted.sha256
        kept = read_counts(path, self.vocab_size) if whole else None
        if kept is None:
            raise CorruptError(
                f"{path}: missing, or its SHA-256 is not that of the manifest; prepare "
                "the data again"
            )
        return kept


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """A prepared folder.

    Attributes:
      directory: where it is.
      manifest: of the folder.
      train: tokens to train on.
      held_out: tokens to evaluate on; `None` if nothing was held out.
    """

    directory: Path
    manifest: Manifest
    train: Shards
    held_out: Shards | None

    @classmethod
    def open(cls, directory: Path) -> "TokenSet":
        """Opens a folder after comparing the sizes of its files with the manifest.

        The header of a shard is compared when the shard is first read; see `damage` for the
        content.

        Raises:
          InputError: it was not prepared to the end.
          CorruptError: a file is missing, or not of the size that the manifest says.
        """
        manifest = Manifest.read(directory)
        sizes = _sizes(directory, manifest)
        for entry in manifest.files:
            if sizes.get(entry.file) != entry.bytes:
                raise _wrong_size(directory, entry, sizes)
        sides = [
            Shards(name, directory, entries, counted, *_common(manifest))
            for name, entries, counted in zip(
                (str(directory), f"{directory} (held out)"),
                (manifest.train, manifest.held_out_shards),
                manifest.counts,
            )
        ]
        return cls(directory, manifest, sides[0], sides[1] if len(sides) > 1 else None)

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.directory / TOKENIZER


def damage(directory: Path) -> list[str]:
    """What is wrong with a prepared folder, a line a file; reads everything.

    Raises:
      InputError: it was not prepared to the end.
      CorruptError: the manifest itself is damaged.
    """
    manifest = Manifest.read(directory)
    found, sizes = [], _sizes(directory, manifest)
    for counted in manifest.counts:
        if counted.file not in sizes or file_sha256(directory / counted.file) != counted.sha256:
            found.append(
                f"{directory / counted.file}: missing, or its SHA-256 is not that of the "
                "manifest; prepare the data again"
            )
    for entry in manifest.shards:
        try:
            if sizes.get(entry.file) != entry.bytes:
                raise _wrong_size(directory, entry, sizes)
            _open(directory, entry, _common(manifest)).verify()
            if file_sha256(directory / entry.file) != entry.sha256:
                found.append(
                    f"{directory / entry.file}: its SHA-256 is not that of the manifest; "
                    "prepare the data again"
                )
        except InputError as error:
            found.append(str(error))
    totals = sum(e.documents for e in manifest.shards), sum(e.tokens for e in manifest.shards)
    if totals != (manifest.documents, manifest.tokens):
        found.append(
            f"{directory}: the counts of the manifest do not add up; prepare the data again"
        )
    try:
        if hash_tokenizer(directory / TOKENIZER) != manifest.tokenizer_sha256:
            found.append(
                f"{directory / TOKENIZER}: not the tokenizer of the manifest; prepare "
                "the data again"
            )
    except InputError as error:
        found.append(str(error))
    return found


def _common(manifest: Manifest) -> _Common:
    return manifest.kind, manifest.vocab_size, manifest.tokenizer_sha256


def _sizes(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of the files that are there, by name."""
    wanted = {entry.file for entry in manifest.files}
    with os.scandir(directory) as listing:
        return {
            file.name: file.stat().st_size
            for file in listing
            if file.name in wanted and file.is_file()
        }


def _wrong_size(
    directory: Path, entry: ShardEntry | CountsEntry, sizes: dict[str, int]
) -> CorruptError:
    path = directory / entry.file
    if entry.file not in sizes:
        return CorruptError(
            f"{path}: missing, though the manifest names it; prepare the data again"
        )
    return CorruptError(
        f"{path}: {sizes[entry.file]} bytes, but the manifest says {entry.bytes}; "
        "prepare the data again"
    )


def _open(directory: Path, entry: ShardEntry, common: _Common) -> TokenFile:
    path = directory / entry.file
    file = TokenFile.open(path)
    header = file.header
    told = entry.documents, entry.tokens, entry.bytes_of_text, *common
    own = (
        header.documents,
        header.tokens,
        header.bytes_of_text,
        header.kind,
        header.vocab_size,
        header.tokenizer_sha256,
    )
    if told != own:
        raise CorruptError(f"{path}: another file than the manifest says; prepare the data again")
    return file


# One for the process: what a run reads from many data sets must not open more files than what it
# reads from one.
_opened = functools.lru_cache(OPEN_AT_ONCE)(_open)

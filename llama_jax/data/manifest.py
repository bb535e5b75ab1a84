"""`manifest.json` of a prepared folder: what it was made of, and what it holds."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.atomic import atomic_write
from llama_jax.data.token_header import KINDS
from llama_jax.errors import CorruptError, InputError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # folder with the files of the tokenizer
MANIFEST_VERSION = 2


class SourceEntry(NamedTuple):
    """A file that was read.

    Attributes:
      name: relative to the folder that was given.
      bytes: its size.
      sha256: of its content.
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
      bytes_of_text: UTF-8 bytes of what is learned from in it.
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
    """What a prepared folder says about itself; no times and no places, so equal input gives equal manifests.

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
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror or error}; a folder that `prepare` finished expected (the same command goes on)"
            ) from None
        try:
            values = json.loads(content)
            version, kind = values["version"], values["kind"]
            if version == MANIFEST_VERSION and kind in KINDS and values["train"]:
                for name, entry in _ENTRIES.items():
                    values[name] = _entries(entry, values[name])
                if len(values["counts"]) == 1 + bool(values["held_out_shards"]):
                    return cls(**values)
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CorruptError(f"{path}: not a manifest, or damaged; prepare the data again") from None
        raise InputError(
            f"{path}: version {version!r:.20}, kind {kind!r:.20} given, version {MANIFEST_VERSION} with shards of a known kind "
            "expected; prepare the data again, with another --output"
        )


_ENTRIES: dict[str, type] = {
    "sources": SourceEntry, "train": ShardEntry, "held_out_shards": ShardEntry, "counts": CountsEntry,
}  # fmt: skip


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
        if tuple(map(type, entry)) != types or (kind is not SourceEntry and not _is_name(entry.file)):
            raise ValueError
    return entries


def _is_name(file: str) -> bool:
    return "/" not in file and file not in ("", ".", "..")

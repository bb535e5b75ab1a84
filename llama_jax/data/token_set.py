"""A prepared folder, opened: its shards as one row of tokens for training and one for evaluation."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from llama_jax.data.manifest import TOKENIZER, Manifest, ShardEntry, file_sha256
from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.token_file import TokenFile
from llama_jax.data.tokens import Piece, joined
from llama_jax.errors import CorruptError, InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """Token files one after another (`data.tokens.Tokens`).

    Attributes:
      name: where they are.
      files: in their order, of one kind and one vocabulary.
    """

    name: str
    files: tuple[TokenFile, ...]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([file.size for file in self.files])

    @property
    def kind(self) -> str:
        """Of the documents."""
        return self.files[0].kind

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(file.documents for file in self.files)

    @property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of what is learned from."""
        return sum(file.bytes_of_text for file in self.files)

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        return self.files[0].vocab_size

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where they end before.

        Raises:
          CorruptError: for a token outside the vocabulary: the file was damaged after it was written.
        """
        number = int(np.searchsorted(self._ends, first, side="right"))
        parts = []
        for file, end in zip(self.files[number:], self._ends[number:].tolist()):
            start = end - file.size
            parts.append(file.read(max(0, first - start), min(stop, end) - start))
            if stop <= end:
                break
        return joined(parts) if parts else self.files[-1].read(self.files[-1].size, self.files[-1].size)

    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.concatenate([file.lengths() for file in self.files])


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """A prepared folder.

    Attributes:
      directory: where it is.
      manifest: what it says about itself.
      train: tokens to train on.
      held_out: tokens to evaluate on; `None` if nothing was held out.
    """

    directory: Path
    manifest: Manifest
    train: Shards
    held_out: Shards | None

    @classmethod
    def open(cls, directory: Path) -> "TokenSet":
        """Opens a folder after comparing its files with the manifest by size and header; see `damage` for the content.

        Raises:
          InputError: it was not prepared to the end.
          CorruptError: a file is missing, cut off, or another than the manifest says.
        """
        manifest = Manifest.read(directory)
        train = Shards(str(directory), tuple(_open_shard(directory, manifest, entry) for entry in manifest.train))
        held_out = tuple(_open_shard(directory, manifest, entry) for entry in manifest.held_out_shards)
        return cls(directory, manifest, train, Shards(f"{directory} (held out)", held_out) if held_out else None)

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
    found = []
    for entry in manifest.shards:
        try:
            _open_shard(directory, manifest, entry).verify()
            if file_sha256(directory / entry.file) != entry.sha256:
                found.append(f"{directory / entry.file}: its SHA-256 is not that of the manifest; prepare the data again")
        except InputError as error:
            found.append(str(error))
    totals = sum(e.documents for e in manifest.shards), sum(e.tokens for e in manifest.shards)
    if totals != (manifest.documents, manifest.tokens):
        found.append(f"{directory}: the counts of the manifest do not add up; prepare the data again")
    try:
        if hash_tokenizer(directory / TOKENIZER) != manifest.tokenizer_sha256:
            found.append(f"{directory / TOKENIZER}: not the tokenizer of the manifest; prepare the data again")
    except InputError as error:
        found.append(str(error))
    return found


def _open_shard(directory: Path, manifest: Manifest, entry: ShardEntry) -> TokenFile:
    path = directory / entry.file
    if not path.is_file():
        raise CorruptError(f"{path}: missing, though the manifest names it; prepare the data again")
    file = TokenFile.open(path)
    header = file.header
    told = entry.documents, entry.tokens, manifest.kind, manifest.vocab_size, manifest.tokenizer_sha256
    if told != (header.documents, header.tokens, header.kind, header.vocab_size, header.tokenizer_sha256):
        raise CorruptError(f"{path}: another file than the manifest says; prepare the data again")
    return file

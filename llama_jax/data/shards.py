"""From records to a prepared folder: shards of tokens, written one after another, and a manifest at
the end.

Which shard a document is in depends on the documents before it alone, so the result is the same for
any number of workers, and a second run goes on behind the shards that a first one finished.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from llama_jax.data.held_out import EXPECTED, held_out_share, is_held_out_amount
from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.records import Record, SourceFile, is_held_out, list_files, read_records
from llama_jax.data.token_file import VERSION, Kind, TokenFile, TokenWriter, token_writer
from llama_jax.data.token_set import (
    MANIFEST,
    MANIFEST_VERSION,
    TOKENIZER,
    CountsEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    file_sha256,
)
from llama_jax.data.tokens import (
    Counter,
    TokenCounts,
    add_counts,
    count_tokens,
    read_counts,
    write_counts,
)
from llama_jax.data.workers import Document, Encoder, encode_all
from llama_jax.errors import InputError
from llama_jax.storage import atomic_write
from llama_jax.text.chat import ChatTemplate
from llama_jax.text.tokenizer import load_tokenizer

# --- side ---
#
# One side of a prepared folder on its way: shard after shard, those that an earlier call finished
#   left as they are.


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
        """The counts of the finished shards. A process that was killed may have left the last shard
        uncounted.
        """
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
        return (
            file
            if file.header.sources_sha256 == self._stamp.sources_sha256(self._name, number)
            else None
        )

    def has(self, documents: int) -> bool:
        """Counts documents that come next; whether finished shards hold them."""
        if self._skipped >= self._kept_documents:
            return False
        self._skipped += documents
        return True

    def add(self, kind: Kind, documents: list[Document]) -> None:
        """Appends the documents of one record; they are not parted."""
        if self._writer is None:
            self._writer = self._stack.enter_context(
                token_writer(self._path(self.shards), self._stamp.vocab_size, kind)
            )
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

    def abandon(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes a shard that is not finished."""
        self._stack.__exit__(kind, error, trace)

    def open(self) -> list[TokenFile]:
        """All shards, whole, beside the file with their counts; what is left of an earlier, longer
        result is removed.
        """
        if self.shards:
            write_counts(self.counts_path, self._counts, self._counts_key(self.shards))
        else:
            self.counts_path.unlink(missing_ok=True)
        number = self.shards
        while self._path(number).exists():
            self._path(number).unlink()
            number += 1
        return [TokenFile.open(self._path(number)) for number in range(self.shards)]


# --- shards ---


TRAIN, HELD_OUT = "train", "held_out"

OnProgress = Callable[[str, int, int], None]


class Settings(NamedTuple):
    """How a folder is prepared.

    Attributes:
      held_out: what is kept out of training: a share of the records from 0 to below 1, or about a
        number of tokens; `None` is the smaller of 1 % and 10M tokens.
      shard_tokens: at which a shard ends; its last document is whole.
      workers: processes; changes nothing in the result.
      fields: for fields of a record, their names in the files; a part of the names of the sources.
    """

    held_out: float | None = None
    shard_tokens: int = 100_000_000
    workers: int = 1
    fields: Mapping[str, str] = {}


class Prepared(NamedTuple):
    """What `prepare_set` did.

    Attributes:
      manifest: of the folder.
      kept: shards that an earlier call had finished.
    """

    manifest: Manifest
    kept: int


class Text(NamedTuple):
    """How records become tokens.

    Attributes:
      files: of the tokenizer, by name: what `load_tokenizer` finds in a folder with them.
      template: how conversations are written; `None` where there are none.
    """

    files: Mapping[str, bytes]
    template: ChatTemplate | None


def prepare_set(
    paths: Sequence[str | Path],
    directory: Path,
    text: Text,
    settings: Settings,
    on_progress: OnProgress,
) -> Prepared:
    """Encodes files and folders into a prepared folder; the same call again goes on where an
    interrupted one ended.

    Args:
      paths: text, JSON lines, Parquet, or folders of them; their records are of one kind.
      directory: folder to write; it may hold an unfinished result of the same input.
      text: tokenizer and chat template; the tokenizer's files are copied into the folder.
      settings: see there.
      on_progress: called with `hash` or `encode`, the bytes of the sources done and all of them.

    Raises:
      InputError: naming what cannot be read or encoded; or if the folder holds, or another process
        writes, something else.
    """
    _check(settings)
    files = list_files(paths, settings.fields)
    directory.mkdir(parents=True, exist_ok=True)
    with _only_writer(directory):
        sources, stats = _hash_sources(files, on_progress), [_stat(file) for file in files]
        _place_tokenizer(directory, _files(text))
        encoder = Encoder(directory / TOKENIZER, text.template)
        share = held_out_share(settings.held_out, files, encoder)
        with _Folder(directory, encoder, share, settings, sources) as folder:
            if not folder.is_finished:
                folder.fill(files, on_progress)
                if [_stat(file) for file in files] != stats:
                    raise InputError(
                        "the sources changed while they were read; run again when "
                        "nothing writes to them"
                    )
            return folder.finish()


class _Folder:
    """The result on its way."""

    def __init__(
        self,
        directory: Path,
        encoder: Encoder,
        held_out: float,
        settings: Settings,
        sources: tuple[SourceEntry, ...],
    ) -> None:
        self._directory, self._encoder, self._settings, self._sources = (
            directory,
            encoder,
            settings,
            sources,
        )
        self._held_out = held_out  # share of the records
        self._tokenizer = hash_tokenizer(encoder.tokenizer_path)
        self._vocab_size = load_tokenizer(encoder.tokenizer_path).vocab_size
        template = encoder.template
        self._template = (
            None if template is None else hashlib.sha256(repr(template).encode()).hexdigest()
        )
        ingredients = [
            VERSION,
            self._tokenizer,
            self._template,
            held_out,
            settings.shard_tokens,
            sources,
        ]
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        for left in directory.glob(".*.partial"):  # of a process that was killed
            left.unlink()
        stamp = Stamp(key, self._tokenizer, self._vocab_size, settings.shard_tokens)
        self._sides = {name: Side(directory, name, stamp) for name in (TRAIN, HELD_OUT)}
        self.kept = sum(side.shards for side in self._sides.values())
        self._dropped = self._passed = 0  # records, bytes of the sources

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for side in self._sides.values():
            side.abandon(kind, error, trace)

    @property
    def is_finished(self) -> bool:
        """Whether a manifest of the same input is there.

        Raises:
          InputError: if it is of another input.
        """
        if not (self._directory / MANIFEST).exists():
            return False
        manifest = Manifest.read(self._directory)
        made = (
            manifest.tokenizer_sha256,
            manifest.template_sha256,
            manifest.held_out,
            manifest.shard_tokens,
            manifest.sources,
        )
        wanted = (
            self._tokenizer,
            self._template,
            self._held_out,
            self._settings.shard_tokens,
            self._sources,
        )
        if (
            made[0] != wanted[0]
            or made[2:] != wanted[2:]
            or (manifest.template_sha256 and made[1] != wanted[1])
        ):
            raise InputError(
                f"{self._directory}: holds a data set made of other input; name another "
                "--output, or remove it"
            )
        return True

    def fill(self, files: Sequence[SourceFile], on_progress: OnProgress) -> None:
        """Encodes what no finished shard holds."""
        total = sum(source.bytes for source in self._sources)
        missing = self._missing(files)
        for record, documents in encode_all(missing, self._encoder, self._settings.workers):
            self._side(record).add(record.kind, documents)
            self._passed += record.nbytes
            on_progress("encode", self._passed, total)
        for side in self._sides.values():
            side.close()

    def _side(self, record: Record) -> Side:
        return self._sides[HELD_OUT if is_held_out(record.key, self._held_out) else TRAIN]

    def _missing(self, files: Sequence[SourceFile]) -> Iterator[Record]:
        for record in read_records(files):
            if record.is_empty:
                self._dropped += 1
            elif not self._side(record).has(2 if record.kind == "pairs" else 1):
                yield record
                continue
            self._passed += record.nbytes

    def finish(self) -> Prepared:
        """Writes the manifest, unless it is there."""
        if self.is_finished:
            return Prepared(Manifest.read(self._directory), self.kept)
        opened = {name: side.open() for name, side in self._sides.items()}
        if not opened[TRAIN]:
            raise InputError(
                "no document to train on in these sources; give text, or a smaller --held-out"
            )
        shards = opened[TRAIN] + opened[HELD_OUT]
        kind = shards[0].kind
        manifest = Manifest(
            version=MANIFEST_VERSION,
            kind=kind,
            vocab_size=self._vocab_size,
            tokenizer_sha256=self._tokenizer,
            template_sha256=None if kind == "text" else self._template,
            held_out=self._held_out,
            shard_tokens=self._settings.shard_tokens,
            sources=self._sources,
            dropped=self._dropped,
            documents=sum(file.documents for file in shards),
            tokens=sum(file.size for file in shards),
            train=tuple(map(_entry, opened[TRAIN])),
            held_out_shards=tuple(map(_entry, opened[HELD_OUT])),
            counts=tuple(
                _counts_entry(side.counts_path) for side in self._sides.values() if side.shards
            ),
        )
        manifest.write(self._directory)
        return Prepared(manifest, self.kept)


def _files(text: Text) -> Mapping[str, bytes]:
    """What the folder keeps: the tokenizer's files, and the template in one of its own wherever it
    came from.
    """
    own = {} if text.template is None else {"chat_template.jinja": text.template.source.encode()}
    return {**text.files, **own}


def _place_tokenizer(directory: Path, files: Mapping[str, bytes]) -> None:
    """Copies the tokenizer's files, unless they are those of a finished result."""
    folder = directory / TOKENIZER
    present = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if folder.is_dir()
        else {}
    )
    if present == files:
        return
    if (directory / MANIFEST).exists():
        raise InputError(
            f"{directory}: holds a data set made with another tokenizer; name another "
            "--output, or remove it"
        )
    folder.mkdir(exist_ok=True)
    for name in present.keys() - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def _check(settings: Settings) -> None:
    if settings.held_out is not None and not is_held_out_amount(settings.held_out):
        raise InputError(f"--held-out: {settings.held_out} given; {EXPECTED} expected")
    if settings.shard_tokens < 1 or settings.workers < 1:
        raise InputError(
            f"--shard-tokens {settings.shard_tokens}, --workers {settings.workers}: at "
            "least 1 expected"
        )


def _hash_sources(files: Sequence[SourceFile], on_progress: OnProgress) -> tuple[SourceEntry, ...]:
    total, done = sum(file.path.stat().st_size for file in files), 0
    found = []
    for file in files:
        found.append(SourceEntry(file.name, file.path.stat().st_size, file_sha256(file.path)))
        done += found[-1].bytes
        on_progress("hash", done, total)
    return tuple(found)


def _stat(file: SourceFile) -> tuple[int, int]:
    stat = file.path.stat()
    return stat.st_size, stat.st_mtime_ns


def _entry(file: TokenFile) -> ShardEntry:
    size, digest = file.path.stat().st_size, file_sha256(file.path)
    return ShardEntry(file.path.name, file.documents, file.size, file.bytes_of_text, size, digest)


def _counts_entry(path: Path) -> CountsEntry:
    return CountsEntry(path.name, path.stat().st_size, file_sha256(path))


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(
            f"{directory}: another process prepares data there; wait for it, or name "
            "another --output"
        ) from None
    finally:
        os.close(handle)

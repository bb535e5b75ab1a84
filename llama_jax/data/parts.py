"""Parts of the sources: the unit of work of `prepare`, read, encoded and written by one worker.

A part is a range of lines of one large file, one whole file, or a group of consecutive small files.
The parts depend on the sources alone, so the result is the same for any number of workers. A part's
key is a hash of the names, sizes and modification times of its files and of the settings. A resumed
run keeps every part whose key has not changed and encodes the others, so a file that was edited
costs only its own parts.
"""

import base64
import collections
import contextlib
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.records import Record, Row, is_held_out, parse_row, read_rows
from llama_jax.data.sources import SourceFile, compression_of, feed_digest, kind_of
from llama_jax.data.token_file import Kind, TokenFile, TokenWriter, token_writer
from llama_jax.data.token_set import ShardEntry, file_sha256
from llama_jax.data.tokens import TokenCounts, add_counts
from llama_jax.data.workers import Document, Encoder, encode_record
from llama_jax.errors import CorruptError, InputError
from llama_jax.storage import atomic_write
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "held_out")
TRAIN, HELD_OUT = SPLITS

LEAST_BYTES = 4 << 20  # of a part, unless the shards are smaller
_MOST_PARTS = 512  # where the shards are large enough
_BYTES_PER_TOKEN = 4  # of text, about
_READ_AT_ONCE = 1 << 20
_REPORT_EVERY = 1 << 18  # bytes of the sources

Report = Callable[[int], None]


class SourcePart(NamedTuple):
    """A range of lines of one file, or whole files, encoded together.

    Attributes:
      files: consecutive files; one if a range is given.
      stats: size and modification time (ns) of each, when the work began.
      places: number of each among the sources of the same name: two folders may have files alike.
      start: of a range of a file with one record a line: lines that begin at this byte or later.
      stop: and before this one; `None` for whole files.
    """

    files: tuple[SourceFile, ...]
    stats: tuple[tuple[int, int], ...]
    places: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the sources."""
        if self.stop is None:
            return sum(size for size, _ in self.stats)
        return self.stop - self.start


class PartSettings(NamedTuple):
    """Settings shared by all parts of one result; small enough to be sent to a process.

    Attributes:
      directory: where finished parts are kept until the result is whole.
      encoder: makes tokens of records.
      held_out: share of the records.
      shard_tokens: at which a shard ends.
      vocab_size: of the tokenizer.
      tokenizer_sha256: of the tokenizer's files.
      key: hash of all settings that the tokens depend on.
      skip: whether bad records are left out and listed.
      most_bad: limit of bad records, beyond which the work stops.
    """

    directory: Path
    encoder: Encoder
    held_out: float
    shard_tokens: int
    vocab_size: int
    tokenizer_sha256: str
    key: str
    skip: bool = False
    most_bad: int = 0

    def part_key(self, part: SourcePart) -> str:
        """Identifies a part and everything that its tokens depend on."""
        names = [file.name for file in part.files]
        values = [self.key, names, part.places, part.stats, part.start, part.stop]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def shard_identity(self, part: SourcePart, name: str) -> str:
        """`sources_sha256` of a shard's header: equal input gives equal files."""
        sizes = [(file.name, size) for file, (size, _) in zip(part.files, part.stats)]
        values = [self.key, sizes, part.places, part.start, part.stop, name]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def path(self, key: str, name: str) -> Path:
        """A file of a finished part, in one of 256 folders."""
        return self.directory / key[:2] / f"{key}{name}"


class Done(NamedTuple):
    """The record of a finished part.

    Attributes:
      key: of `PartSettings.part_key`.
      kind: of its records; `None` if there are none.
      first: place of its first record.
      dropped: records without anything to learn from.
      bad: place and reason of each record that was left out.
      sources: SHA-256 of the bytes read of each file.
      shards: by split; `file` is the end of the name in the folder of parts.
      crc32: of the tokens of each shard.
      counts: token counts by split: base64 of compressed 64-bit numbers, and the largest token.
    """

    key: str
    kind: Kind | None
    first: str
    dropped: int
    bad: list[tuple[str, str]]
    sources: list[str]
    shards: dict[str, list[ShardEntry]]
    crc32: list[int]
    counts: dict[str, tuple[str, int]]

    def token_counts(self, split: str) -> TokenCounts | None:
        """The counts of one split; `None` without tokens."""
        if split not in self.counts:
            return None
        packed, largest = self.counts[split]
        return TokenCounts(
            np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.int64), largest
        )


def plan_parts(
    files: Sequence[SourceFile], stats: Sequence[tuple[int, int]], shard_tokens: int
) -> list[SourcePart]:
    """The parts of some files, in the order of the files.

    Args:
      files: the sources.
      stats: size and modification time (ns) of each.
      shard_tokens: at which a shard ends; a part rarely has more tokens.
    """
    total = sum(size for size, _ in stats)
    # A power of two, so that editing one file does not move the borders in all others.
    wanted = max(LEAST_BYTES, 1 << (total // _MOST_PARTS).bit_length())
    most = max(1, min(wanted, _BYTES_PER_TOKEN * shard_tokens))
    seen: collections.Counter[str] = collections.Counter()
    places = []
    for file in files:
        places.append(seen[file.name])
        seen[file.name] += 1
    parts: list[SourcePart] = []
    group: list[int] = []
    held = 0

    def end_group() -> None:
        nonlocal held
        if group:
            own = tuple(files[i] for i in group), tuple(stats[i] for i in group)
            parts.append(SourcePart(*own, tuple(places[i] for i in group)))
        group.clear()
        held = 0

    for number, (file, (size, _)) in enumerate(zip(files, stats)):
        if size < most // 2:
            # Groups also end at certain names, so that after a file of another size they soon fall
            # back in step with the earlier groups.
            group.append(number)
            held += size
            if held >= most or (held >= most // 4 and zlib.crc32(file.name.encode()) % 4 == 0):
                end_group()
            continue
        end_group()
        own = (file,), (stats[number],), (places[number],)
        if size > most and has_lines(file.path):
            borders = [*range(0, size, most), size]
            if len(borders) > 2 and borders[-1] - borders[-2] < most // 2:
                del borders[-2]
            parts += [SourcePart(*own, start, stop) for start, stop in itertools.pairwise(borders)]
        else:
            parts.append(SourcePart(*own))
    end_group()
    return parts


def has_lines(path: Path) -> bool:
    """Whether a file is JSON lines, so that reading can start at any line."""
    if kind_of(path) != "json" or compression_of(path) or path.suffix.lower() == ".json":
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return not file.read(_READ_AT_ONCE).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return False


def read_done(job: PartSettings, key: str) -> Done:
    """The record of a finished part."""
    values = json.loads(job.path(key, ".json").read_bytes())
    shards = {
        split: [ShardEntry(*e) for e in entries] for split, entries in values["shards"].items()
    }
    return Done(**{**values, "shards": shards})


def finished_part(job: PartSettings, part: SourcePart) -> Done | None:
    """The record of a part that an earlier call finished, if its shards are there with the recorded
    sizes and checksums, by their headers. The shards are not read.
    """
    key = job.part_key(part)
    try:
        done = read_done(job, key)
        entries = [entry for split in SPLITS for entry in done.shards[split]]
        for entry, crc32 in zip(entries, done.crc32, strict=True):
            path = job.path(key, entry.file)
            written = path.stat().st_size, TokenFile.header_of(path).tokens_crc32
            if written != (entry.bytes, crc32):
                return None
    except (OSError, ValueError, TypeError, KeyError, InputError, CorruptError):
        return None
    return done if done.key == key else None


def make_encode(job: PartSettings) -> Callable[[SourcePart, Report], None]:
    """The work of a process, called with each part."""
    tokenizer = load_tokenizer(job.encoder.tokenizer_path)
    return lambda part, report: encode_part(job, part, tokenizer, report)


def encode_part(job: PartSettings, part: SourcePart, tokenizer: Tokenizer, report: Report) -> None:
    """Encodes a part into shards, and records at the end that it is finished.

    Args:
      job: the settings.
      part: of the sources.
      tokenizer: of `job.encoder`.
      report: called with the bytes of the sources read since its last call.

    Raises:
      InputError: naming file and line of a record that cannot be read or encoded.
    """
    reader = PartReader(part, job.skip, job.most_bad)
    key, reported = job.part_key(part), 0
    job.path(key, "").parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        splits = {split: stack.enter_context(_Shards(job, part, split)) for split in SPLITS}
        for record in reader.records():
            if reader.passed >= reported + _REPORT_EVERY:
                report(reader.passed - reported)
                reported = reader.passed
            if record.is_empty:
                reader.dropped += 1
                continue
            documents: list[Document] = []
            with reader.blame_line(record.name):
                documents = encode_record(record, tokenizer, job.encoder.template)
            if documents:
                split = HELD_OUT if is_held_out(record.key, job.held_out) else TRAIN
                splits[split].add(record.kind, documents)
        for shards in splits.values():
            shards.close()
    if any(stat_source(file) != stat for file, stat in zip(part.files, part.stats)):
        raise InputError(
            f"{part.files[0].path}: changed while it was read; run again when nothing writes "
            "to the sources"
        )
    done = Done(
        key=key,
        kind=reader.kind,
        first=reader.first,
        dropped=reader.dropped,
        bad=reader.bad,
        sources=reader.digests(),
        shards={split: shards.entries for split, shards in splits.items()},
        crc32=[crc for shards in splits.values() for crc in shards.crc32],
        counts={
            split: (_packed(shards.counts), shards.counts.largest)
            for split, shards in splits.items()
            if shards.counts is not None
        },
    )
    with atomic_write(job.path(key, ".json")) as file:
        file.write(json.dumps(done._asdict()).encode())
    report(part.nbytes - reported)


def _packed(counts: TokenCounts) -> str:
    packed = zlib.compress(np.asarray(counts.targets, np.int64).tobytes())
    return base64.b64encode(packed).decode()


def stat_source(file: SourceFile) -> tuple[int, int]:
    """Size and modification time (ns)."""
    stat = file.path.stat()
    return stat.st_size, stat.st_mtime_ns


class _Shards:
    """The shards of one split of a part; a context manager that removes an unfinished one.

    Attributes:
      entries: finished shards.
      crc32: of the tokens of each.
      counts: of the tokens in them; `None` without any.
    """

    def __init__(self, job: PartSettings, part: SourcePart, split: str) -> None:
        self._job, self._part, self._split, self._key = job, part, split, job.part_key(part)
        self._stack = contextlib.ExitStack()
        self._writer: TokenWriter | None = None
        self._bytes = 0
        self.entries: list[ShardEntry] = []
        self.crc32: list[int] = []
        self.counts: TokenCounts | None = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def _name(self) -> str:
        return f"-{self._split}-{len(self.entries)}.tokens"

    def add(self, kind: Kind, documents: Sequence[Document]) -> None:
        """Appends the documents of one record; they stay in one shard."""
        if self._writer is None:
            path = self._job.path(self._key, self._name)
            writer = token_writer(path, self._job.vocab_size, kind)
            self._writer, self._bytes = self._stack.enter_context(writer), 0
        for ids, mask, size in documents:
            self._writer.add(ids, mask)
            self._bytes += size
        if self._writer.tokens >= self._job.shard_tokens:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is open."""
        writer, path = self._writer, self._job.path(self._key, self._name)
        if writer is None:
            return
        writer.finish(
            bytes_of_text=self._bytes,
            tokenizer_sha256=self._job.tokenizer_sha256,
            sources_sha256=self._job.shard_identity(self._part, self._name),
        )
        self._stack.close()
        self._writer, size, digest = None, path.stat().st_size, file_sha256(path)
        entry = ShardEntry(self._name, writer.documents, writer.tokens, self._bytes, size, digest)
        self.crc32.append(TokenFile.header_of(path).tokens_crc32)
        self.entries.append(entry)
        counts = writer.counts()
        self.counts = counts if self.counts is None else add_counts(self.counts, counts)


class PartReader:
    """The records of a part, the digests of its files, and the records that were left out.

    Attributes:
      kind: of the records; `None` before the first.
      first: place of the first record.
      dropped: records without anything to learn from, counted by the caller.
      bad: place and reason of each record that was left out.
      passed: bytes of the sources read so far.
    """

    def __init__(self, part: SourcePart, skip: bool = False, most_bad: int = 0) -> None:
        self._part, self._skip, self._most_bad = part, skip, most_bad
        self._digests = [hashlib.sha256() for _ in part.files]
        self.kind: Kind | None = None
        self.first, self.dropped, self.passed = "", 0, 0
        self.bad: list[tuple[str, str]] = []

    def digests(self) -> list[str]:
        """SHA-256 of the bytes read of each file."""
        return [digest.hexdigest() for digest in self._digests]

    def records(self) -> Iterator[Record]:
        """The records.

        Raises:
          InputError: naming the place, for what cannot be read, or is of another kind than the
            first record.
        """
        for file, digest in zip(self._part.files, self._digests):
            for row in self._rows(file, digest):
                self.passed += row.nbytes
                record = None
                with self.blame_line(row.place):
                    record = parse_row(row, file)
                if record is None:
                    continue
                if self.kind is None:
                    self.kind, self.first = record.kind, record.name
                if record.kind != self.kind:
                    raise self._with_line(
                        InputError(
                            f"{record.name}: {record.kind} given, but the first record was "
                            f"{self.kind}; prepare them apart"
                        )
                    )
                yield record

    @contextlib.contextmanager
    def blame_line(self, place: str) -> Iterator[None]:
        """Names the line of an error in the block; with `skip`, lists the record instead."""
        try:
            yield
        except InputError as error:
            named = self._with_line(error)
            if not self._skip:
                raise InputError(f"{named} (--bad-records skip leaves it out)") from None
            if len(self.bad) >= self._most_bad:
                raise InputError(
                    f"{named}; more than {self._most_bad:,} bad records (--most-bad-records)"
                ) from None
            reason = str(named).removeprefix(f"{self._lined(place)}: ")
            self.bad.append((self._lined(place), reason))

    def _rows(self, file: SourceFile, digest: Any) -> Iterator[Row]:
        if self._part.stop is None:
            yield from read_rows(file, digest)
        else:
            yield from _read_lines(file.path, self._part.start, self._part.stop, digest)

    def _with_line(self, error: InputError) -> InputError:
        """The error with the number of the line in the file, where a part begins within it."""
        prefix = f"{self._part.files[0].path}:"
        text = str(error)
        number, colon, rest = text.removeprefix(prefix).partition(":")
        if not (self._part.start and text.startswith(prefix) and number.isdecimal()):
            return error
        return InputError(f"{self._lined(prefix + number)}{colon}{rest}")

    def _lined(self, place: str) -> str:
        path = self._part.files[0].path
        number = place.removeprefix(f"{path}:")
        if not self._part.start or not number.isdecimal():
            return place
        return f"{path}:{_lines_before(path, self._part.start) + int(number)}"


def _read_lines(path: Path, start: int, stop: int, digest: Any) -> Iterator[Row]:
    """The lines that begin in a range of bytes, numbered from 1 at the start of the range."""
    try:
        with path.open("rb", buffering=_READ_AT_ONCE) as file:
            if start:
                file.seek(start - 1)
                file.readline()
            elif file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            else:
                digest.update(b"\xef\xbb\xbf")
            number = 1
            while file.tell() < stop and (line := file.readline()):
                digest.update(line)
                if not line.isspace():
                    yield Row(f"{path}:{number}", line, len(line))
                number += 1
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); a readable file expected"
        ) from None


def _lines_before(path: Path, start: int) -> int:
    """Lines of a file that begin before a byte."""
    count = 0
    with path.open("rb") as file:
        left = start - 1
        while left > 0:
            block = file.read(min(left, _READ_AT_ONCE))
            count += block.count(b"\n")
            left -= len(block)
    return count + 1


def part_digests(part: SourcePart) -> list[str]:
    """SHA-256 of the bytes of each file of a part, by reading them."""
    digests = [hashlib.sha256() for _ in part.files]
    for file, digest in zip(part.files, digests):
        if part.stop is None:
            feed_digest(file.path, digest)
        else:
            for _ in _read_lines(file.path, part.start, part.stop, digest):
                pass
    return [digest.hexdigest() for digest in digests]


def source_digests(parts: Iterable[tuple[SourcePart, Sequence[str]]]) -> list[str]:
    """SHA-256 of each source, in order: of its content, or for a file in several parts of the
    parts' digests.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for part, digests in parts:
        for file, place, digest in zip(part.files, part.places, digests):
            found.setdefault((file.name, place), []).append(digest)
    return [
        own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()
        for own in found.values()
    ]

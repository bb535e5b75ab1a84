"""From records to a prepared folder: parts of the sources are encoded by worker processes, which
write the shards; this process plans, counts and writes the manifest.

The result is the same for any number of workers, and a second run takes over the parts that an
interrupted one finished, without reading them or their sources.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.held_out import EXPECTED, held_out_share, is_held_out_amount
from llama_jax.data.parts import (
    HELD_OUT,
    SPLITS,
    TRAIN,
    Done,
    PartSettings,
    SourcePart,
    finished_part,
    make_encode,
    part_digests,
    plan_parts,
    read_done,
    source_digests,
    stat_source,
)
from llama_jax.data.prepare import hash_tokenizer
from llama_jax.data.sources import SourceFile, list_files
from llama_jax.data.token_file import VERSION
from llama_jax.data.token_set import (
    BAD_RECORDS,
    MANIFEST,
    MANIFEST_VERSION,
    TOKENIZER,
    CountsEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    file_sha256,
)
from llama_jax.data.tokens import TokenCounts, add_counts, write_counts
from llama_jax.data.workers import Encoder, WorkerDied, Workers, encode_text
from llama_jax.errors import InputError
from llama_jax.storage import atomic_write
from llama_jax.text.chat import ChatTemplate
from llama_jax.text.tokenizer import load_tokenizer

PARTS = "parts"  # folder of finished parts, until the result is whole
_SEEN = "sources.json"  # sizes and modification times of the sources of a finished result
_RENAMES = "renames.json"
_SHARE = "held_out.json"

OnProgress = Callable[[str, int, int], None]


class Settings(NamedTuple):
    """How a folder is prepared.

    Attributes:
      held_out: text kept out of training: a share of the records from 0 to below 1, or about a
        number of tokens; `None` is the smaller of 1 % and 10M tokens.
      shard_tokens: at which a shard ends; its last document is whole. A part of the sources ends
        its shards too.
      workers: processes; the result does not depend on them.
      fields: for fields of a record, their names in the files; a part of the names of the sources.
      bad_records: `stop` at the first record that cannot be read or encoded, or `skip` and list it.
      most_bad_records: limit of bad records, beyond which the work stops.
    """

    held_out: float | None = None
    shard_tokens: int = 100_000_000
    workers: int = 1
    fields: Mapping[str, str] = {}
    bad_records: str = "stop"
    most_bad_records: int = 1000


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
    """Encodes files and folders into a prepared folder; the same call again resumes an interrupted
    one.

    Args:
      paths: text, JSON lines, tables, Parquet, or folders of them; their records are of one kind.
      directory: folder to write; it may hold an unfinished result of the same input.
      text: tokenizer and chat template; the tokenizer's files are copied into the folder.
      settings: see there.
      on_progress: called with `hash` or `encode`, the bytes of the sources done and all of them.

    Raises:
      InputError: naming a record that cannot be read or encoded; or if the folder holds, or another
        process writes, something else.
    """
    _check(settings)
    files = list_files(paths, settings.fields)
    stats = [stat_source(file) for file in files]
    parts = plan_parts(files, stats, settings.shard_tokens)
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with _only_writer(directory), _cleaned_up(directory, made):
        _place_tokenizer(directory, _files(text))
        encoder = Encoder(directory / TOKENIZER, text.template)
        share = _share(directory, settings.held_out, files, encoder)
        job, template = _job(directory, encoder, share, settings)
        if (directory / MANIFEST).exists():
            manifest = Manifest.read(directory)
            _require_same(directory, manifest, job, template, files, stats, parts, on_progress)
            return Prepared(manifest, len(manifest.shards))
        _undo_renames(directory)
        done, kept = _encode(job, parts, settings.workers, on_progress)
        if [stat_source(file) for file in files] != stats:
            raise InputError(
                "the sources changed while they were read; run again when nothing writes to them"
            )
        manifest = _finish(directory, job, template, files, stats, parts, done)
        return Prepared(manifest, kept)


@contextlib.contextmanager
def _cleaned_up(directory: Path, made: bool) -> Iterator[None]:
    """Removes everything if the work fails before a part is finished."""
    try:
        yield
    except BaseException:
        if not (directory / MANIFEST).exists() and not any((directory / PARTS).glob("*/*.json")):
            shutil.rmtree(directory / PARTS, ignore_errors=True)
            (directory / _SHARE).unlink(missing_ok=True)
            if made:
                shutil.rmtree(directory / TOKENIZER, ignore_errors=True)
                with contextlib.suppress(OSError):
                    directory.rmdir()
        raise


def _job(
    directory: Path, encoder: Encoder, share: float, settings: Settings
) -> tuple[PartSettings, str | None]:
    """The settings of all parts, and the hash of the template."""
    tokenizer = load_tokenizer(encoder.tokenizer_path)
    tokenizer_sha256 = hash_tokenizer(encoder.tokenizer_path)
    template = None
    if encoder.template is not None:
        template = hashlib.sha256(repr(encoder.template).encode()).hexdigest()
    # How a text begins and ends is a rule of this program, not of the tokenizer's files.
    framing = encode_text(tokenizer, "")
    ingredients = [VERSION, tokenizer_sha256, template, framing, share, settings.shard_tokens]
    job = PartSettings(
        directory=directory / PARTS,
        encoder=encoder,
        held_out=share,
        shard_tokens=settings.shard_tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        key=hashlib.sha256(json.dumps(ingredients).encode()).hexdigest(),
        skip=settings.bad_records == "skip",
        most_bad=settings.most_bad_records,
    )
    return job, template


def _share(
    directory: Path, wanted: float | None, files: Sequence[SourceFile], encoder: Encoder
) -> float:
    """The share of the records to hold out. An estimate from the sources is kept beside the result,
    so that a file that is mended does not change it for all others.
    """
    path = directory / _SHARE
    names = hashlib.sha256(json.dumps([file.name for file in files]).encode()).hexdigest()
    key = [wanted, hash_tokenizer(encoder.tokenizer_path), names]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads(path.read_bytes())
        if values["key"] == key and 0 <= values["share"] < 1:
            return float(values["share"])
    share = held_out_share(wanted, files, encoder)
    if (directory / MANIFEST).exists():
        return share
    with atomic_write(path) as file:
        file.write(json.dumps({"key": key, "share": share}).encode())
    return share


def _encode(
    job: PartSettings, parts: Sequence[SourcePart], workers: int, on_progress: OnProgress
) -> tuple[list[Done], int]:
    """The records of all parts, and the number of shards that an earlier call had finished."""
    found = [_without_counts(finished_part(job, part)) for part in parts]
    kept = sum(len(entries) for done in found if done for entries in done.shards.values())
    total = sum(part.nbytes for part in parts)
    before = sum(part.nbytes for part, done in zip(parts, found) if done)
    missing = [number for number, done in enumerate(found) if done is None]
    first = _require_one_kind(None, *[done for done in found if done])
    bad = sum(len(done.bad) for done in found if done)
    for number in _work(job, parts, missing, workers, before, total, on_progress):
        done = found[number] = _without_counts(finished_part(job, parts[number]))
        if done is None:
            raise InputError(f"{job.directory}: changed while it was written; run again")
        first = _require_one_kind(first, done)
        bad += len(done.bad)
        if bad > job.most_bad:
            place, reason = done.bad[-1]
            raise InputError(
                f"{place}: {reason}; more than {job.most_bad:,} bad records (--most-bad-records)"
            )
    return [done for done in found if done is not None], kept


def _without_counts(done: Done | None) -> Done | None:
    """The record without its counts, which have a number for each token of the vocabulary."""
    return None if done is None else done._replace(counts={})


def _work(
    job: PartSettings,
    parts: Sequence[SourcePart],
    missing: Sequence[int],
    workers: int,
    before: int,
    total: int,
    on_progress: OnProgress,
) -> Iterator[int]:
    """Numbers of parts as they are finished, in order."""
    make = functools.partial(make_encode, job)
    if not missing:
        return
    if workers == 1:
        passed = before

        def report(amount: int) -> None:
            """Counts the bytes of the sources."""
            nonlocal passed
            passed += amount
            on_progress("encode", passed, total)

        encode = make()
        for number in missing:
            encode(parts[number], report)
            yield number
        return
    last: SourcePart | None = None
    with Workers(make, min(workers, len(missing))) as processes:
        given = (parts[number] for number in missing)
        numbers = iter(missing)
        try:
            for last, _ in processes.results(  # noqa: B007
                given, lambda amount: on_progress("encode", before + amount, total)
            ):
                yield next(numbers)
        except WorkerDied:
            where = "at the beginning" if last is None else f"after {last.files[-1].path}"
            raise InputError(
                f"{where} a worker process ended without an error (out of memory?); the same "
                "command resumes with what is missing, --workers 1 needs the least memory"
            ) from None
    on_progress("encode", total, total)


def _require_one_kind(first: Done | None, *parts: Done) -> Done | None:
    """The first part that has records; refuses one with records of another kind."""
    for done in parts:
        if done.kind is None:
            continue
        if first is None:
            first = done
        if done.kind != first.kind:
            raise InputError(
                f"{done.first}: {done.kind} given, but the first record was {first.kind}; "
                "prepare them apart"
            )
    return first


def _finish(
    directory: Path,
    job: PartSettings,
    template: str | None,
    files: Sequence[SourceFile],
    stats: Sequence[tuple[int, int]],
    parts: Sequence[SourcePart],
    done: Sequence[Done],
) -> Manifest:
    """Puts the shards into their places and writes the manifest."""
    renames: list[tuple[str, str]] = []
    entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for each in done:
        for split in SPLITS:
            for entry in each.shards[split]:
                name = f"{split}-{len(entries[split]):05d}.tokens"
                path = job.path(each.key, entry.file).relative_to(directory)
                renames.append((str(path), name))
                entries[split].append(entry._replace(file=name))
    if not entries[TRAIN]:
        raise InputError(
            "no document to train on in these sources; give text, or a smaller --held-out"
        )
    with atomic_write(job.directory / _RENAMES) as file:
        file.write(json.dumps(renames).encode())
    for left in (path for split in SPLITS for path in directory.glob(f"{split}-*.tokens")):
        left.unlink()
    for old, new in renames:
        (directory / old).rename(directory / new)
    counts = []
    for split in SPLITS:
        if not entries[split]:
            continue
        whole = _sum_counts(each.token_counts(split) for each in _reread(job, parts))
        path = directory / f"{split}_counts.json"
        write_counts(path, whole, f"{job.key} {split}")
        counts.append(CountsEntry(path.name, path.stat().st_size, file_sha256(path)))
    bad = [record for each in done for record in each.bad]
    if bad:
        with atomic_write(directory / BAD_RECORDS) as file:
            for place, reason in bad:
                line = json.dumps({"place": place, "reason": reason}, ensure_ascii=False)
                file.write((line + "\n").encode("utf-8", "replace"))
    with atomic_write(directory / _SEEN) as file:
        file.write(json.dumps([(f.name, *stat) for f, stat in zip(files, stats)]).encode())
    digests = source_digests((part, each.sources) for part, each in zip(parts, done))
    kind = next(each.kind for each in done if each.kind is not None)
    shards = [*entries[TRAIN], *entries[HELD_OUT]]
    manifest = Manifest(
        version=MANIFEST_VERSION,
        kind=kind,
        vocab_size=job.vocab_size,
        tokenizer_sha256=job.tokenizer_sha256,
        template_sha256=None if kind == "text" else template,
        held_out=job.held_out,
        shard_tokens=job.shard_tokens,
        sources=tuple(
            SourceEntry(file.name, size, digest)
            for file, (size, _), digest in zip(files, stats, digests, strict=True)
        ),
        dropped=sum(each.dropped for each in done),
        bad_records=len(bad),
        documents=sum(entry.documents for entry in shards),
        tokens=sum(entry.tokens for entry in shards),
        train=tuple(entries[TRAIN]),
        held_out_shards=tuple(entries[HELD_OUT]),
        counts=tuple(counts),
    )
    manifest.write(directory)
    shutil.rmtree(job.directory)
    return manifest


def _reread(job: PartSettings, parts: Sequence[SourcePart]) -> Iterator[Done]:
    """Finished parts with their counts, one at a time."""
    return (read_done(job, job.part_key(part)) for part in parts)


def _sum_counts(counts: Iterator[TokenCounts | None]) -> TokenCounts:
    whole: TokenCounts | None = None
    for each in counts:
        if each is not None:
            whole = each if whole is None else add_counts(whole, each)
    assert whole is not None
    return whole


def _undo_renames(directory: Path) -> None:
    """Moves shards back into the folder of parts, if a call was killed while moving them."""
    path = directory / PARTS / _RENAMES
    if not path.exists():
        return
    with contextlib.suppress(ValueError):
        for old, new in json.loads(path.read_bytes()):
            if not (directory / old).exists() and (directory / new).exists():
                (directory / new).rename(directory / old)
    path.unlink()


def _require_same(
    directory: Path,
    manifest: Manifest,
    job: PartSettings,
    template: str | None,
    files: Sequence[SourceFile],
    stats: Sequence[tuple[int, int]],
    parts: Sequence[SourcePart],
    on_progress: OnProgress,
) -> None:
    """Refuses a finished folder of other input. Sources whose sizes and modification times have not
    changed are not read again.

    Raises:
      InputError: if it was made of other settings or sources.
    """
    shutil.rmtree(job.directory, ignore_errors=True)
    same = (
        (manifest.tokenizer_sha256, manifest.held_out, manifest.shard_tokens)
        == (job.tokenizer_sha256, job.held_out, job.shard_tokens)
        and (not manifest.template_sha256 or manifest.template_sha256 == template)
        and [(entry.name, entry.bytes) for entry in manifest.sources]
        == [(file.name, size) for file, (size, _) in zip(files, stats)]
    )
    seen: object = None
    with contextlib.suppress(OSError, ValueError):
        seen = json.loads((directory / _SEEN).read_bytes())
    if same and seen != [[file.name, *stat] for file, stat in zip(files, stats)]:
        same = _digests(parts, on_progress) == [entry.sha256 for entry in manifest.sources]
    if not same:
        raise InputError(
            f"{directory}: holds a data set made of other input; name another "
            "--output, or remove it"
        )


def _digests(parts: Sequence[SourcePart], on_progress: OnProgress) -> list[str]:
    """The digests of the sources, by reading them."""
    total, passed, found = sum(part.nbytes for part in parts), 0, []
    for part in parts:
        found.append((part, part_digests(part)))
        passed += part.nbytes
        on_progress("hash", passed, total)
    return source_digests(found)


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

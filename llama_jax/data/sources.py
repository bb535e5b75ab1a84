"""Files to read: the kind of each by its suffix, what a folder holds and leaves out, and their
bytes without compression.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import InputError

FileKind = Literal["text", "json", "table", "parquet"]
Fields = Mapping[str, str]  # field of a record -> its name in the file

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
_KINDS: Mapping[str, FileKind] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
READABLE = (
    f"text ({' '.join(TEXT_SUFFIXES)}), .json, .jsonl, .csv, .tsv (each also with "
    f"{' '.join(COMPRESSIONS)}), .parquet, or a "
    "folder of them"
)
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_READ_AT_ONCE = 1 << 20
_NAMED = 5  # files named in a line about those that are left out


class SourceFile(NamedTuple):
    """A file to read.

    Attributes:
      name: the same wherever the folder that was given lies; it says the mapping of fields, if
        there is one.
      path: where the file is.
      fields: names of fields that the file calls otherwise.
    """

    name: str
    path: Path
    fields: Fields = {}


def kind_of(path: Path) -> FileKind | None:
    """How a file is read, by its suffix; `None` for an unknown suffix. A file without any suffix is
    text.
    """
    name = Path(path.stem) if compression_of(path) else path
    kind = _KINDS.get(name.suffix.lower(), "text" if not name.suffix and name == path else None)
    return None if kind == "parquet" and compression_of(path) else kind


def compression_of(path: Path) -> str | None:
    """The suffix of a compression; `None` for a plain file."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def list_files(paths: Sequence[str | Path], fields: Fields | None = None) -> list[SourceFile]:
    """The files of some files and folders, in the order given; a folder's by relative path, hidden
    ones left out.

    Args:
      paths: files of a known kind, and folders.
      fields: for a field of a record, its name in these files.

    Raises:
      InputError: naming the path that does not exist, is of an unknown kind, or is a folder without
        anything to read.
    """
    fields = fields or {}
    found: list[SourceFile] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted_files(path, ("",)) if _is_listed(file)]
            if not inside:
                raise InputError(f"{path}: nothing to read in this folder; {READABLE} expected")
            found += [_source(file.relative_to(path).as_posix(), file, fields) for file in inside]
        elif path.is_file():
            if kind_of(path) is None:
                raise InputError(
                    f"{path}: a file of unknown kind ({''.join(path.suffixes[-2:])}); "
                    f"{READABLE} expected. Convert it, or name "
                    "it for what it holds"
                )
            found.append(_source(path.name, path, fields))
        else:
            raise InputError(f"{path}: no such file or folder; {READABLE} expected")
    return found


def sorted_files(
    root: Path, suffixes: tuple[str, ...], left_out: Set[str] = frozenset()
) -> list[Path]:
    """Files below `root`, hidden ones and folders named in `left_out` excepted, by relative path
    with `/` on any system.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def left_out(paths: Sequence[str | Path]) -> str | None:
    """A line about the files of folders that are not read, hidden ones apart; `None` if there are
    none.
    """
    names = [
        file.relative_to(path).as_posix()
        for path in map(Path, paths)
        if path.is_dir()
        for file in sorted_files(path, ("",))
        if not _is_listed(file)
    ]
    if not names:
        return None
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"left out, of unknown kind: {', '.join(names[:_NAMED])}{more} (files: {len(names):,})"


def _is_listed(path: Path) -> bool:
    """Whether a file of a folder is read; one without a suffix is not, since nothing says that it
    is text.
    """
    return bool(path.suffix) and kind_of(path) is not None


def _source(name: str, path: Path, fields: Fields) -> SourceFile:
    if not fields or kind_of(path) == "text":
        return SourceFile(name, path)
    return SourceFile(
        f"{name} ({', '.join(f'{field}={own}' for field, own in sorted(fields.items()))})",
        path,
        fields,
    )


class Opened(NamedTuple):
    """An open file.

    Attributes:
      content: its bytes, without compression and without a byte order mark.
      position: bytes of the file itself that were read.
    """

    content: BinaryIO
    position: Callable[[], int]


@runtime_checkable
class Digest(Protocol):
    """A hash, as `hashlib` makes them."""

    def update(self, data: Any, /) -> None:
        """Takes more bytes."""
        ...


class _Hashed(io.RawIOBase):
    """A file whose bytes go into a hash as they are read, once and in order."""

    def __init__(self, raw: io.FileIO, digest: Digest) -> None:
        self._raw, self._digest = raw, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def tell(self) -> int:
        return self._raw.tell()


def feed_digest(path: Path, digest: Digest) -> None:
    """Reads a file into a hash."""
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)


@contextlib.contextmanager
def open_source(path: Path, digest: Digest | None = None) -> Iterator[Opened]:
    """Opens a file for reading, through its compression.

    Args:
      path: of the file.
      digest: fed with all bytes of the file itself, as they are read, by the end of the block.

    Raises:
      InputError: naming the file: it cannot be read, or is damaged or cut off; or a library is
        missing.
    """
    suffix = compression_of(path)
    try:
        with _open_hashed(path, digest) as raw:
            content: Any = io.BufferedReader(_decompressed(path, suffix, raw)) if suffix else raw
            if content.peek(3)[:3] == b"\xef\xbb\xbf":
                content.read(3)
            yield Opened(content, raw.tell)
            while digest is not None and raw.read(_READ_AT_ONCE):
                pass
    except _DAMAGE as error:
        raise InputError(f"{path}: damaged or cut off ({error}); copy or write it again") from None
    except OSError as error:
        what = "cannot be read" if error.errno or not suffix else "damaged or cut off"
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(
            f"{path}: {what} ({reason:.80}); a readable {suffix or 'file'} expected"
        ) from None


def _open_hashed(path: Path, digest: Digest | None) -> io.BufferedReader:
    if digest is None:
        return path.open("rb")
    return io.BufferedReader(_Hashed(path.open("rb", buffering=0), digest), _READ_AT_ONCE)


def _decompressed(path: Path, suffix: str, raw: io.BufferedReader) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"{path}: .zst is read by pyarrow; pip install 'llama-jax[data]'"
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")

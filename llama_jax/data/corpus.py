"""Documents of a corpus: files and folders of the user, or the sources of Python's standard library."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from llama_jax.errors import InputError

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")

# Tests and bundled copies of other projects; `encodings` and files named for the platform are tables made by programs.
_NOT_LIBRARY = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "idlelib", "lib2to3", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_NOT_LIBRARY_PREFIXES = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    """A text with a name that is the same on every machine: the file's path relative to the folder that was given."""

    name: str
    text: str


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name belongs to the held-out part, about `fraction` of all names.

    A function of the name alone, so a document never changes sides when others come or go.
    """
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return draw < fraction * 2**64


def read_corpus(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Reads files and folders, in the order given, as UTF-8 and without changing a byte.

    A folder yields its files with a text suffix (`TEXT_SUFFIXES`), subfolders included, hidden ones not, sorted by
    path. A file that is named directly is read whatever its suffix.

    Raises:
      InputError: naming the path that does not exist, is not UTF-8, or is a folder without text.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _read_folder(path)
        else:
            yield Document(path.name, _read_text(path))


def standard_library() -> Iterator[Document]:
    """The sources of the running interpreter's standard library without its tests, sorted by name: about 10 MB.

    The same documents on every machine with the same version of Python.

    Raises:
      InputError: if this interpreter came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted_files(root, (".py",), _NOT_LIBRARY) if _is_library(path.relative_to(root))]
    if not paths:
        raise InputError(f"{root}: no sources of the standard library here; name files or folders of text instead")
    for path in paths:
        with tokenize.open(path) as file:  # minds the encoding that a source declares
            yield Document(path.relative_to(root).as_posix(), file.read())


def _is_library(relative: Path) -> bool:
    return not relative.parts[0].startswith(_NOT_LIBRARY_PREFIXES)


def sorted_files(root: Path, suffixes: tuple[str, ...], left_out: Set[str] = frozenset()) -> list[Path]:
    """Files below `root`, hidden ones and folders named in `left_out` excepted, by relative path with `/` on any system."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_folder(root: Path) -> Iterator[Document]:
    paths = sorted_files(root, TEXT_SUFFIXES)
    if not paths:
        raise InputError(f"{root}: no text in this folder; files ending in {', '.join(TEXT_SUFFIXES)} expected")
    for path in paths:
        yield Document(path.relative_to(root).as_posix(), _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8 or leave it out") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; a readable file or folder of text expected") from None

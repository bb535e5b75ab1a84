"""Documents of a corpus: files and folders of the user, or the sources of Python's standard library."""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.records import list_files, read_records
from llama_jax.data.sources import sorted_files
from llama_jax.errors import InputError

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
    """The texts of files and folders, in the order given, as `prepare` reads them: see `data.sources`.

    A text file is one document, named by its path; a record of JSON, a table or Parquet is one, named by its text.

    Raises:
      InputError: naming what cannot be read or is no text: conversations are for `prepare`.
    """
    for record in read_records(list_files(paths)):
        if not isinstance(record.body, str):
            raise InputError(
                f"{record.name}: a conversation, text expected; turn it into tokens (python -m llama_jax prepare --input ...) "
                "and name the folder in data.sources, or in eval --data"
            )
        yield Document(record.key, record.body)


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

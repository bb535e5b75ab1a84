"""An output of JSON lines that is continued where it was interrupted, if it belongs to the same input."""

import contextlib
import fcntl
import io
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

from llama_jax.cli.requests import Request
from llama_jax.data.atomic import sync_directory
from llama_jax.errors import InputError


class Answered(NamedTuple):
    """What an output holds already.

    Attributes:
      rows: answers, one a line.
      size: bytes of whole lines; what is behind them was torn when the writing was interrupted.
      total: bytes in all; `None` if there is no such file.
    """

    rows: int = 0
    size: int = 0
    total: int | None = None


def identity_of(request: Request, sample: int, samples: int) -> dict:
    """The fields of an answer that say what it is the answer to."""
    number = {"sample": sample} if samples > 1 else {}
    return {"id": request.id, "index": request.number, **number, "request_sha256": request.digest}


def answered(output: str, requests: Sequence[Request], samples: int) -> Answered:
    """What is in an output of these requests already; `-`, standard output, holds nothing.

    Raises:
      InputError: naming file and line, for an output of another input, another model or other settings; for a path that
        cannot be a file.
    """
    path = pathlib.Path(output)
    if output == "-":
        return Answered()
    try:
        if not path.exists():
            if not path.parent.is_dir():
                raise InputError(f"{output}: there is no directory {path.parent}; create it, or name another file")
            return Answered()
        if not path.is_file():
            raise InputError(f"{output}: not a file; a file that is new or to be continued expected, or - for standard output")
        with path.open("rb") as file:
            return _checked(output, file, requests, samples)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{output}: cannot be read ({reason}); name another file") from None


def _checked(output: str, file: io.BufferedIOBase, requests: Sequence[Request], samples: int) -> Answered:
    """Compares every whole line with the answer that is expected there."""
    rows = size = 0
    for line in file:
        expected = identity_of(requests[rows // samples], rows % samples, samples) if rows < len(requests) * samples else None
        if expected is None or not (_belongs(line, expected) if line.endswith(b"\n") else _is_torn(line, expected)):
            raise InputError(
                f"{output}, line {rows + 1}: written for another input, another model or other settings; name another "
                "--output, or remove this one"
            )
        if line.endswith(b"\n"):
            rows, size = rows + 1, size + len(line)
    return Answered(rows, size, pathlib.Path(output).stat().st_size)


def _is_torn(line: bytes, identity: dict) -> bool:
    """Whether a line without an end is the beginning of the answer to a request; a loss of power may leave zeros in it."""
    begun, head = line.rstrip(b"\0"), json.dumps(identity, ensure_ascii=False).encode()[:-1]
    return begun.startswith(head) or head.startswith(begun)


def _belongs(line: bytes, identity: dict) -> bool:
    """Whether a line is the answer to a request."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {name: values.get(name) for name in identity} == identity


@contextlib.contextmanager
def continued(output: str, before: Answered) -> Iterator[io.BufferedIOBase]:
    """The output, open behind its whole lines.

    Raises:
      InputError: if it has changed since, or another process is writing it.
    """
    if output == "-":
        yield cast(io.BufferedIOBase, sys.stdout.buffer)
        return
    path = pathlib.Path(output)
    try:
        file: io.BufferedIOBase = path.open("xb") if before.total is None else path.open("r+b")
    except FileExistsError:
        raise InputError(f"{output}: appeared only now; another process seems to be writing it") from None
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); name another file") from None
    with file:
        _lock(output, file)
        if path.stat().st_size != (before.total or 0):
            raise InputError(f"{output}: has changed since it was read; another process seems to be writing it")
        file.truncate(before.size)
        file.seek(before.size)
        sync_directory(path.absolute().parent)
        yield file


def _lock(output: str, file: io.BufferedIOBase) -> None:
    """Keeps other processes of ours from writing the same file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output}: another process is writing it; wait for it, or name another file") from None

"""Files that are either whole or absent, whatever interrupts the writing."""

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file beside `path` that takes its place, synced to disk, when the block ends without
    an error.

    What an earlier writer of `path`, killed, has left beside it is removed.
    """
    remove_abandoned(path.parent, re.compile(rf"\.{re.escape(path.name)}\.\d+\.partial"))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file, claimed(partial):
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds a lock on a file or directory; the system lets go of it however the process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(
            OSError
        ):  # of a file system without locks: abandoned files stay there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(directory: Path, name: re.Pattern[str]) -> None:
    """Removes entries of such a name that no process has claimed: left by one that was killed."""
    with contextlib.suppress(OSError):  # a directory that is not there, or not ours
        for path in directory.iterdir():
            if name.fullmatch(path.name) and not path.is_symlink() and _abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _abandoned(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` last through a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- fresh directory ---
#
# A directory that is either whole or absent, whatever interrupts the writing.


_SLACK = 4 << 20  # bytes for headers and the rounding of file systems


@contextlib.contextmanager
def atomic_directory(target: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """Makes a directory beside `target` that takes its place when the block ends without an error.

    Until then it is called `target.partial-` and eight random digits; an error, or Ctrl-C, removes
    it. One that a killed process has left is removed when the next begins.

    Args:
      target: nothing, or an empty directory. Directories above it are made.
      nbytes: about to be written.

    Raises:
      InputError: if `target` is taken, if the disk has no room for `nbytes`, or if nothing can be
        made there.
    """
    target = pathlib.Path(os.path.realpath(target))
    _require_free(target)
    remove_abandoned(target.parent, re.compile(re.escape(target.name) + r"\.partial-[0-9a-f]{8}"))
    require_room(target, nbytes)
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        _make(partial)
        with claimed(partial):
            yield partial
            sync_directory(partial)
            _require_free(target)
            partial.rename(target)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_synced(path: pathlib.Path, content: bytes) -> None:
    """Writes a small file, synced to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make(partial: pathlib.Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{partial.parent}: cannot be written to ({error.strerror}); name another place"
        ) from None


def _require_free(target: pathlib.Path) -> None:
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise InputError(
            f"{target}: cannot be read ({error.strerror}); name another place"
        ) from None
    if taken:
        what = "a directory that is not empty" if target.is_dir() else "a file"
        raise InputError(
            f"{target}: {what} given, nothing or an empty directory expected; name "
            "another, or remove it yourself"
        )


def require_room(target: pathlib.Path, nbytes: int) -> None:
    """Refuses to begin what the disk of `target` has no room for.

    Raises:
      InputError: with the bytes needed and free.
    """
    above = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(above).free
    if free < nbytes + _SLACK:
        raise InputError(
            f"{target}: {nbytes / 1e9:.2f} GB to be written, {free / 1e9:.2f} GB free "
            "there; make room for it"
        )

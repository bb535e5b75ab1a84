"""Files that are either whole or absent, whatever interrupts the writing."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file beside `path` that takes its place, synced to disk, when the block ends without an error.

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
        with contextlib.suppress(OSError):  # of a file system without locks: what is left there stays
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

"""A directory that is either whole or absent, whatever interrupts the writing."""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

from llama_jax.data.atomic import claimed, remove_abandoned, sync_directory
from llama_jax.errors import InputError

_SLACK = 4 << 20  # bytes for headers and what a file system rounds up


@contextlib.contextmanager
def fresh_directory(target: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """Makes a directory beside `target` that takes its place when the block ends without an error.

    Until then it is called `target.partial-` and eight random digits; an error, or Ctrl-C, removes it. One that a killed
    process has left is removed when the next begins.

    Args:
      target: nothing, or an empty directory. Directories above it are made.
      nbytes: about to be written.

    Raises:
      InputError: if `target` is taken, if the disk has no room for `nbytes`, or if nothing can be made there.
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
        raise InputError(f"{partial.parent}: cannot be written to ({error.strerror}); name another place") from None


def _require_free(target: pathlib.Path) -> None:
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise InputError(f"{target}: cannot be read ({error.strerror}); name another place") from None
    if taken:
        what = "a directory that is not empty" if target.is_dir() else "a file"
        raise InputError(f"{target}: {what} given, nothing or an empty directory expected; name another, or remove it yourself")


def require_room(target: pathlib.Path, nbytes: int) -> None:
    """Refuses to begin what the disk of `target` has no room for.

    Raises:
      InputError: with the bytes needed and free.
    """
    above = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(above).free
    if free < nbytes + _SLACK:
        raise InputError(f"{target}: {nbytes / 1e9:.2f} GB to be written, {free / 1e9:.2f} GB free there; make room for it")

"""What lies in the directory of a run's checkpoints: which steps, and what each says of itself; no array is read.

Nothing here needs Orbax, which takes seconds to import.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_jax.axes import PyTree
from llama_jax.errors import CorruptError
from llama_jax.weights.manifest import Manifest, read_manifest


class Restored(NamedTuple):
    """A verified checkpoint.

    Attributes:
      step: optimizer updates it holds.
      state: the arrays.
      metadata: what `Checkpoints.save` was given.
      warnings: one line for every newer checkpoint that was damaged and passed over.
    """

    step: int
    state: PyTree
    metadata: dict
    warnings: list[str]


def list_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; nothing is opened."""
    return sorted(int(entry.name) for entry in numbered(directory) if has_files(entry))


def numbered(directory: Path) -> Iterator[Path]:
    """Directories named like a step, whole or not."""
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    return (entry for entry in entries if entry.is_dir() and entry.name.isdecimal() and str(int(entry.name)) == entry.name)


def has_files(directory: Path) -> bool:
    """Whether any file lies in a directory or below; an interrupted save may leave empty folders."""
    return any(path.is_file() for path in directory.rglob("*"))


def set_aside(entry: Path) -> None:
    """Renames `STEP` to `STEP.corrupt`, or `STEP.corrupt2` and so on where that exists."""
    names = (f"{entry.name}.corrupt{suffix}" for suffix in ["", *range(2, 1000)])
    entry.rename(next(entry.with_name(name) for name in names if not entry.with_name(name).exists()))


def step_manifest(directory: Path, step: int) -> Manifest:
    """The manifest of one checkpoint, its seal checked; raises as `read_manifest` does."""
    return read_manifest(directory / str(step) / "meta" / "metadata", step)


def newest_manifest(directory: Path) -> Manifest | None:
    """The manifest of the newest checkpoint that has a whole one, `None` if there is none; no array is read, nothing changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    for step in reversed(list_steps(directory)):
        with contextlib.suppress(CorruptError):
            return step_manifest(directory, step)
    return None


def read_metadata(directory: Path) -> dict | None:
    """The metadata of the newest checkpoint whose manifest is whole, `None` if there is none; nothing is changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    manifest = newest_manifest(directory)
    return None if manifest is None else manifest.metadata


def newest_whole(directory: Path, read: Callable[[int], PyTree]) -> Restored | None:
    """The newest checkpoint that reads without damage, `None` where there is none at all.

    Args:
      directory: as for `Checkpoints.open`.
      read: the arrays of a step.

    Raises:
      CorruptError: if there are checkpoints and all are damaged.
    """
    damage: list[str] = []
    for step in reversed(list_steps(directory)):
        try:
            return Restored(step, read(step), step_manifest(directory, step).metadata, damage)
        except CorruptError as error:
            damage.append(f"{error}; passed over for an older checkpoint")
    if damage:
        raise CorruptError(f"{directory}: all checkpoints are damaged ({damage[0]}); bring back a copy or start another run")
    return None

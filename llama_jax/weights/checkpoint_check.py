"""What lies in the directory of a run's checkpoints, whole or not, and whether it is what was saved; nothing is changed."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checkpoint import check_arrays
from llama_jax.weights.checkpoint_files import list_steps, step_manifest

_TOGETHER = 64 << 20  # bytes of arrays that are read at a time: a state need not fit into memory to be verified

Condition = Literal["committed", "ok", "damaged", "set aside", "not committed"]


class CheckpointState(NamedTuple):
    """One entry of a directory of checkpoints.

    Attributes:
      name: of the entry, such as `40` or `40.corrupt`.
      step: optimizer updates that it holds, or would.
      nbytes: of all its files.
      time: of its newest file, seconds since 1970.
      condition: `committed`: whole by its manifest; `ok`: all arrays were read and are what was saved; `damaged`: they are
        not; `set aside`: found damaged by a run that went on from an older one; `not committed`: left by an interrupted save,
        or still being written.
      reason: what is wrong with a damaged one.
    """

    name: str
    step: int
    nbytes: int
    time: float
    condition: Condition
    reason: str = ""


def list_checkpoints(directory: Path) -> list[CheckpointState]:
    """Everything in a directory of checkpoints, by step; manifests are read, arrays are not."""
    steps = {str(step) for step in list_steps(directory)}
    return sorted(
        (_describe(entry, entry.name in steps) for entry in _entries(directory)), key=lambda one: (one.step, one.name)
    )


def verify_checkpoints(directory: Path, step: int | None = None) -> Iterator[CheckpointState]:
    """Reads all arrays of the checkpoints of a directory, oldest first, and compares them with their checksums.

    Args:
      directory: of the checkpoints.
      step: of a single one.

    Raises:
      InputError: if there is no checkpoint, or not this one.
    """
    steps = list_steps(directory)
    if not steps:
        raise InputError(f"{directory}: no checkpoint there, the checkpoints of a run expected")
    if step is not None and step not in steps:
        raise InputError(f"--step: {step} given, one of {steps} expected, those in {directory}")
    return _verified(directory, steps if step is None else [step])


def _verified(directory: Path, steps: Iterable[int]) -> Iterator[CheckpointState]:
    for number in steps:
        with contextlib.suppress(FileNotFoundError):
            found = _describe(directory / str(number), True)
            if found.condition == "committed":
                reason = _damage(directory, number)
                (directory / str(number)).stat()  # one that a run has deleted in the meantime is not damaged
                found = found._replace(condition="damaged" if reason else "ok", reason=reason)
            yield found


def _entries(directory: Path) -> Iterator[Path]:
    """Directories whose names begin with a step."""
    for entry in directory.iterdir() if directory.is_dir() else []:
        if entry.is_dir() and re.fullmatch(r"\d+(\..+)?", entry.name):
            yield entry


def _describe(entry: Path, committed: bool) -> CheckpointState:
    step, _, more = entry.name.partition(".")
    stats = [path.stat() for path in entry.rglob("*") if path.is_file()]
    newest = max((stat.st_mtime for stat in stats), default=entry.stat().st_mtime)
    found = CheckpointState(entry.name, int(step), sum(stat.st_size for stat in stats), newest, "not committed")
    if more.startswith("corrupt"):
        return found._replace(condition="set aside")
    if not committed:
        return found
    try:
        step_manifest(entry.parent, int(step))
    except CorruptError as error:
        return found._replace(condition="damaged", reason=str(error))
    return found._replace(condition="committed")


def _damage(directory: Path, step: int) -> str:
    """What is wrong with the arrays of a checkpoint; empty if nothing is."""
    try:
        check_arrays(directory, step, _TOGETHER)
    except CorruptError as error:
        return str(error)
    return ""

"""Our own checkpoints: written atomically by Orbax, checked by us.

Orbax commits a checkpoint whole or not at all, but it does not look at the content: a flipped bit
in a data file is restored as a wrong weight, and a wrong dtype is cast, without a word. So each
checkpoint carries a manifest that is compared before a restore and recomputed after it.

On disk, `DIRECTORY/STEP/state` holds the arrays and `DIRECTORY/STEP/meta` the manifest with the
caller's metadata. A checkpoint found damaged becomes `STEP.corrupt`; nothing is ever deleted but
what `keep` and `discard` say.

This is the only module that imports Orbax.
"""

import contextlib
import json
import math
import os
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llama_jax.axes import Array, PyTree
from llama_jax.errors import CorruptError, InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.weights.integrity import (
    Manifest,
    by_path,
    check_content,
    check_like,
    describe,
    groups,
    read_manifest,
    seal,
)

# --- checkpoint files ---
#
# What lies in the directory of a run's checkpoints: which steps, and what each says of itself; no
# array is read.
#
# Nothing here needs Orbax, which takes seconds to import.


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
    return (
        entry
        for entry in entries
        if entry.is_dir() and entry.name.isdecimal() and str(int(entry.name)) == entry.name
    )


def has_files(directory: Path) -> bool:
    """Whether any file lies in a directory or below; an interrupted save may leave empty
    folders.
    """
    return any(path.is_file() for path in directory.rglob("*"))


def quarantine(entry: Path) -> None:
    """Renames `STEP` to `STEP.corrupt`, or `STEP.corrupt2` and so on where that exists."""
    names = (f"{entry.name}.corrupt{suffix}" for suffix in ["", *range(2, 1000)])
    entry.rename(
        next(entry.with_name(name) for name in names if not entry.with_name(name).exists())
    )


def step_manifest(directory: Path, step: int) -> Manifest:
    """The manifest of one checkpoint, its seal checked; raises as `read_manifest` does."""
    return read_manifest(directory / str(step) / "meta" / "metadata", step)


def newest_manifest(directory: Path) -> Manifest | None:
    """The manifest of the newest checkpoint that has a whole one, `None` if there is none; no array
    is read, nothing changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    for step in reversed(list_steps(directory)):
        with contextlib.suppress(CorruptError):
            return step_manifest(directory, step)
    return None


def read_metadata(directory: Path) -> dict | None:
    """The metadata of the newest checkpoint whose manifest is whole, `None` if there is none;
    nothing is changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    manifest = newest_manifest(directory)
    return None if manifest is None else manifest.metadata


def newest_whole(
    directory: Path, read: Callable[[int], PyTree], steps: Sequence[int] | None = None
) -> Restored | None:
    """The newest checkpoint that reads without damage, `None` where there is none at all.

    Args:
      directory: as for `Checkpoints.open`.
      read: the arrays of a step.
      steps: which to try, oldest first; those that are there by default.

    Raises:
      CorruptError: if there are checkpoints and all are damaged.
    """
    damage: list[str] = []
    for step in reversed(list_steps(directory) if steps is None else steps):
        try:
            return Restored(step, read(step), step_manifest(directory, step).metadata, damage)
        except CorruptError as error:
            damage.append(f"{error}; passed over for an older checkpoint")
    if damage:
        raise CorruptError(
            f"{directory}: all checkpoints are damaged ({damage[0]}); bring back a copy "
            "or start another run"
        )
    return None


# --- checkpoint ---


# What a file system or device reports when it is not the files that are wrong: never a reason to
# give a checkpoint up.
_NOT_DAMAGE = (
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "UNAUTHENTICATED",
)

_SMALLEST_CHUNK = 1 << 18  # bytes: with smaller ones there are more of them than it takes

_DISCARDED = ".discarded"  # at the end of a name: about to be deleted

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint that could not be written (a full disk, for one); the earlier ones are
    untouched.
    """


class Checkpoints:
    """The checkpoints of one run, written in the background; a context manager.

    A save that fails raises `SaveError` from the first of `poll`, `save`, `wait` and `close` that
    comes after it.

    With several processes all make the same calls. The first of them names, renames and decides;
    arrays are read and written by all.
    """

    def __init__(self, directory: Path, manager: ocp.CheckpointManager, hosts: Hosts) -> None:
        self._directory = directory
        self._manager = manager
        self._hosts = hosts
        self._pending: int | None = None

    @classmethod
    def open(cls, directory: Path, keep: int, hosts: Hosts | None = None) -> "Checkpoints":
        """Opens a directory for one writer, making it if need be; left-overs of interrupted saves
        are removed.

        Args:
          directory: holds the checkpoints of one run and nothing else.
          keep: newest checkpoints that survive; older ones are deleted once a newer one is
            committed.
          hosts: the processes of the run; this one alone by default.

        Raises:
          InputError: if the directory cannot be made.
        """
        directory, hosts = directory.absolute(), hosts or Hosts()
        hosts.first_does("checkpoints", lambda: _tidy(directory))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        return cls(directory, ocp.CheckpointManager(directory, options=options), hosts)

    def steps(self) -> list[int]:
        """Steps on disk, oldest first; one that is still being written is not among them."""
        return list_steps(self._directory)

    def agreed_steps(self) -> list[int]:
        """`steps()` as the first process sees them, the same for all; all come here together."""
        return json.loads(self._hosts.agree("steps", json.dumps(self.steps())))

    def save(self, step: int, state: PyTree, metadata: dict) -> None:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns.

        Args:
          step: optimizer updates done; above every step on disk.
          state: a tree of arrays.
          metadata: JSON values.

        Raises:
          InputError: if `step` is not above the newest.
          SaveError: if this save could not start, or if the one before it has failed; in the latter
            case this one is under way all the same.
        """
        failure = self._finish()
        newest = max(self.steps(), default=-1)
        if self._hosts.first and step <= newest:
            raise InputError(
                f"checkpoint step {step} given, one above {newest} expected, the newest "
                f"in {self._directory}"
            )
        if self._hosts.first:
            _sweep(self._directory, step)
        meta = ocp.args.JsonSave(seal(describe(step, state, metadata)))
        saved = ocp.args.StandardSave(state, save_args=jax.tree.map(_layer_a_chunk, state))
        refused = self._told(self._start(step, ocp.args.Composite(state=saved, meta=meta)))
        if refused:
            raise refused
        if failure:
            raise failure

    def poll(self) -> None:
        """Raises `SaveError` once a save in the background is known to have failed; never waits.

        With several processes it is known at the next save: they could not agree without waiting
        for each other.
        """
        if self._hosts.count == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
          SaveError: if it failed.
        """
        failure = self._finish()
        if failure:
            raise failure

    def metadata(self, step: int) -> dict:
        """The metadata of a checkpoint.

        Raises:
          InputError: if there is no such step.
          CorruptError: if the manifest is damaged.
        """
        return self._manifest(step).metadata

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The verified arrays of one checkpoint.

        Args:
          step: one of `steps()`.
          like: the expected state as `jax.ShapeDtypeStruct`s with shardings, which need not be
            those of the save.

        Raises:
          InputError: if there is no such step, or naming the path, if the trees, a shape or a dtype
            differ.
          CorruptError: if the content is not what was saved.
        """
        where = self._directory / str(step)

        def read() -> tuple[Manifest, PyTree]:
            """The part of this process."""
            manifest = self._manifest(step)
            check_like(manifest, like, where)
            return manifest, _read(where, like)

        manifest, state = self._all(read)
        check_content(manifest, state, where)
        return state

    def restore_newest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole, or `None` where there is none at all.

        Damaged ones are passed over with a warning and renamed to `STEP.corrupt`, so that training
        can resume from an older one. If none is whole, nothing is renamed.

        Raises:
          InputError: naming the path, if a checkpoint is whole but not of this run: nothing is
            passed over then.
          CorruptError: if there are checkpoints and all are damaged.
        """
        steps = self.agreed_steps()
        newest = newest_whole(self._directory, lambda step: self.restore(step, like), steps)
        if newest is not None:
            self._hosts.first_does(
                "set aside",
                lambda: self._quarantine([step for step in steps if step > newest.step]),
            )
            self._manager.reload()
        return newest

    def discard(self, steps: Sequence[int]) -> None:
        """Removes checkpoints for good; each is gone at once, whatever interrupts the rest. Waits
        for a save under way.

        Raises:
          SaveError: if that save failed; nothing is removed then.
        """
        self.wait()
        self._hosts.first_does(
            "discarded", lambda: _remove([self._directory / str(step) for step in steps])
        )
        self._manager.reload()

    def close(self) -> None:
        """Waits for the last save and releases the directory.

        Raises:
          SaveError: if that save failed.
        """
        failure = self._finish()
        self._manager.close()
        if failure:
            raise failure

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._hosts.count > 1 and isinstance(
            error, jax.errors.JaxRuntimeError | KeyboardInterrupt
        ):
            return  # another process is gone, or is going to be left: no save ends any more
        try:
            self.close()
        except SaveError:
            if error is None:  # otherwise the error of the body is the one to report
                raise

    def _manifest(self, step: int) -> Manifest:
        if step not in self.steps():
            raise InputError(
                f"checkpoint step {step} given, one of {self.steps()} expected, those in "
                f"{self._directory}"
            )
        return step_manifest(self._directory, step)

    def _all(self, action: Callable[[], T]) -> T:
        """Does something in every process; damage that one of them finds is damage for all."""
        if self._hosts.count == 1:
            return action()
        done: list[T] = []
        damage = ""
        try:
            done.append(action())
        except CorruptError as error:
            damage = str(error)
        found = [words for words in self._hosts.gather("read", damage) if words]
        if found:
            raise CorruptError(found[0])
        return done[0]

    def _quarantine(self, steps: Sequence[int]) -> None:
        for step in steps:
            quarantine(self._directory / str(step))

    def _start(self, step: int, arguments: ocp.args.Composite) -> SaveError | None:
        """Begins a save; gives its failure in this process."""
        try:
            started = self._manager.save(step, args=arguments)
        except Exception as error:
            return self._failed(step, error)
        self._pending = step if started else None
        return None if started else self._failed(step, RuntimeError("refused by Orbax"))

    def _finish(self) -> SaveError | None:
        """Waits for the pending save; gives its failure, in whatever process. All come here
        together.
        """
        return self._told(self._ended())

    def _told(self, failure: SaveError | None) -> SaveError | None:
        """The failure of any process, so that all do the same about it."""
        if self._hosts.count == 1:
            return failure
        found = [words for words in self._hosts.gather("saved", str(failure or "")) if words]
        return SaveError(found[0]) if found else None

    def _ended(self) -> SaveError | None:
        if self._pending is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return self._failed(self._pending, error)
        step, self._pending = self._pending, None
        there = (
            step in self.steps() or not self._hosts.first
        )  # what the others see of a shared directory may be late
        return None if there else self._failed(step, RuntimeError("not on disk after the save"))

    def _failed(self, step: int, error: Exception) -> SaveError:
        """Describes a failed save, and makes the manager forget it, which it would go on
        listing.
        """
        self._pending = None
        self._manager.reload()
        return SaveError(
            f"checkpoint {self._directory / str(step)} was not written: {_reason(error)}"
        )


def read_arrays(directory: Path, manifest: Manifest, like: PyTree) -> PyTree:
    """The arrays of one checkpoint with the content that was saved.

    Args:
      directory: as for `Checkpoints.open`.
      manifest: of the checkpoint.
      like: which arrays, all or a part, as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      CorruptError: if the content is not what was saved.
    """
    where = directory / str(manifest.step)
    state = _read(where, like)
    check_content(manifest, state, where)
    return state


def _layer_a_chunk(leaf: Array) -> ocp.SaveArgs:
    """How an array is cut in the files: stacked matrices by layers, so that one of them can be read
    alone.
    """
    if leaf.ndim < 3:
        return ocp.SaveArgs()
    shard = leaf.sharding.shard_shape(leaf.shape)
    return ocp.SaveArgs(
        chunk_byte_size=max(math.prod(shard[1:]) * leaf.dtype.itemsize, _SMALLEST_CHUNK),
        shard_axes=(0,),
    )


def _tidy(directory: Path) -> None:
    """Makes the directory, or sets aside what no save leaves behind."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be made ({error.strerror}); a writable directory expected"
        ) from None
    for entry in numbered(directory):
        if not has_files(entry):
            quarantine(entry)
    for entry in directory.glob(f"*{_DISCARDED}"):
        shutil.rmtree(entry)


def _sweep(directory: Path, step: int) -> None:
    """Removes the remains of a failed save of the same step; its writers may still be at work there
    for a moment.
    """
    for _ in range(20):
        left = list(directory.glob(f"{step}.orbax-checkpoint-tmp*"))
        if not left:
            return
        for entry in left:
            shutil.rmtree(entry, ignore_errors=True)
        time.sleep(0.1)


def _remove(entries: Sequence[Path]) -> None:
    for entry in entries:
        shutil.rmtree(entry.rename(entry.with_name(f"{entry.name}{_DISCARDED}")))


def _read(where: Path, like: PyTree) -> PyTree:
    """The arrays in a checkpoint, whatever their content; this process waits for no other."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    with blamed_on_files(where), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(where / "state", args=arguments)


def check_arrays(directory: Path, step: int, together: int) -> None:
    """Reads all arrays of a checkpoint, some at a time, and compares them with the saved checksums.

    Args:
      directory: as for `Checkpoints.open`.
      step: of the checkpoint.
      together: bytes of arrays that are read at a time; a larger one is read alone.

    Raises:
      CorruptError: if an array, or the manifest, is not what was saved.
    """
    manifest, where = step_manifest(directory, step), directory.absolute() / str(step)
    with blamed_on_files(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(where / "state").item_metadata.tree
    known = by_path(tree)
    for path in manifest.arrays:
        if path not in known:
            raise CorruptError(f"checkpoint {where}: {path} is damaged: not found in the files")
    paths, device = list(known), jnp.zeros(()).sharding
    shapes = {
        path: jax.ShapeDtypeStruct(r.shape, jnp.dtype(r.dtype), sharding=device)
        for path, r in manifest.arrays.items()
    }
    for group in groups(
        {path: math.prod(shape.shape) * shape.dtype.itemsize for path, shape in shapes.items()},
        together,
    ):
        leaves = [shapes[path] if path in group else ocp.PLACEHOLDER for path in paths]
        like = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        arguments = ocp.args.PyTreeRestore(
            item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        )
        with blamed_on_files(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = by_path(reader.restore(where / "state", args=arguments))
        check_content(manifest, {path: state[path] for path in group}, where)


@contextlib.contextmanager
def blamed_on_files(where: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes Orbax and TensorStore raise into `CorruptError`."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if any(word in str(error) for word in _NOT_DAMAGE):
            raise
        raise CorruptError(f"checkpoint {where} is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error in one line of readable length: TensorStore's run over many, what the system said
    far behind.
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return textwrap.shorten(
        os.strerror(int(code[1])) if code else f"{type(error).__name__}: {error}",
        160,
        placeholder=" ...",
    )

"""Our own checkpoints: written atomically by Orbax, checked by us.

Orbax commits a checkpoint whole or not at all, but it does not look at the content: a flipped bit in a data file is
restored as a wrong weight, and a wrong dtype is cast, without a word. So each checkpoint carries a manifest that is
compared before a restore and recomputed after it.

On disk, `DIRECTORY/STEP/state` holds the arrays and `DIRECTORY/STEP/meta` the manifest with the caller's metadata. A
checkpoint found damaged becomes `STEP.corrupt`; nothing is ever deleted but what `keep` says.

This is the only module that imports Orbax.
"""

import os
import re
import textwrap
from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp

from llama_jax.axes import PyTree
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checkpoint_files import Restored, has_files, list_steps, newest_whole, numbered, set_aside, step_manifest
from llama_jax.weights.manifest import Manifest, check_content, check_like, describe, seal

# What a file system or device reports when it is not the files that are wrong: never a reason to give a checkpoint up.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")


class SaveError(RuntimeError):
    """A checkpoint that could not be written (a full disk, for one); the earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run, written in the background; a context manager.

    A save that fails raises `SaveError` from the first of `poll`, `save`, `wait` and `close` that comes after it.
    """

    def __init__(self, directory: Path, manager: ocp.CheckpointManager) -> None:
        self._directory = directory
        self._manager = manager
        self._pending: int | None = None

    @classmethod
    def open(cls, directory: Path, keep: int) -> "Checkpoints":
        """Opens a directory for one writer, making it if need be; left-overs of interrupted saves are removed.

        Args:
          directory: holds the checkpoints of one run and nothing else.
          keep: newest checkpoints that survive; older ones are deleted once a newer one is committed.

        Raises:
          InputError: if the directory cannot be made.
        """
        directory = directory.absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: cannot be made ({error.strerror}); a writable directory expected") from None
        for entry in numbered(directory):
            if not has_files(entry):
                set_aside(entry)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        return cls(directory, ocp.CheckpointManager(directory, options=options))

    def steps(self) -> list[int]:
        """Steps on disk, oldest first; one that is still being written is not among them."""
        return list_steps(self._directory)

    def save(self, step: int, state: PyTree, metadata: dict) -> None:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns.

        Args:
          step: optimizer updates done; above every step on disk.
          state: a tree of arrays.
          metadata: JSON values.

        Raises:
          InputError: if `step` is not above the newest.
          SaveError: if this save could not start, or if the one before it has failed; in the latter case this one is
            under way all the same.
        """
        failure = self._finish()
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise InputError(f"checkpoint step {step} given, one above {newest} expected, the newest in {self._directory}")
        meta = ocp.args.JsonSave(seal(describe(step, state, metadata)))
        try:
            started = self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=meta))
        except Exception as error:
            raise self._failed(step, error) from error
        if not started:
            raise self._failed(step, RuntimeError("refused by Orbax"))
        self._pending = step
        if failure:
            raise failure

    def poll(self) -> None:
        """Raises `SaveError` once a save in the background is known to have failed; never waits."""
        if not self._manager.is_saving_in_progress():
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
          like: the expected state as `jax.ShapeDtypeStruct`s with shardings, which need not be those of the save.

        Raises:
          InputError: if there is no such step, or naming the path, if the trees, a shape or a dtype differ.
          CorruptError: if the content is not what was saved.
        """
        manifest = self._manifest(step)
        check_like(manifest, like, self._directory / str(step))
        return read_arrays(self._directory, manifest, like)

    def restore_newest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole, or `None` where there is none at all.

        Damaged ones are passed over with a warning and renamed to `STEP.corrupt`, so that training can go on from an older
        one. If none is whole, nothing is renamed.

        Raises:
          InputError: naming the path, if a checkpoint is whole but not of this run: nothing is passed over then.
          CorruptError: if there are checkpoints and all are damaged.
        """
        newest = newest_whole(self._directory, lambda step: self.restore(step, like))
        if newest is not None:
            for step in self.steps():
                if step > newest.step:
                    set_aside(self._directory / str(step))
            self._manager.reload()
        return newest

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except SaveError:
            if error is None:  # otherwise the error of the body is the one to report
                raise

    def _manifest(self, step: int) -> Manifest:
        if step not in self.steps():
            raise InputError(f"checkpoint step {step} given, one of {self.steps()} expected, those in {self._directory}")
        return step_manifest(self._directory, step)

    def _finish(self) -> SaveError | None:
        """Waits for the pending save; gives its failure."""
        if self._pending is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return self._failed(self._pending, error)
        step, self._pending = self._pending, None
        return None if step in self.steps() else self._failed(step, RuntimeError("not on disk after the save"))

    def _failed(self, step: int, error: Exception) -> SaveError:
        """Describes a failed save, and makes the manager forget it, which it would go on listing."""
        self._pending = None
        self._manager.reload()
        return SaveError(f"checkpoint {self._directory / str(step)} was not written: {_reason(error)}")


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
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(where / "state", args=arguments)
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever a damaged file makes Orbax and TensorStore raise
        if any(word in str(error) for word in _NOT_DAMAGE):
            raise
        raise CorruptError(f"checkpoint {where} is damaged: {_reason(error)}") from error
    check_content(manifest, state, where)
    return state


def _reason(error: Exception) -> str:
    """An error in one line of readable length: TensorStore's run over many, what the system said far behind."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return textwrap.shorten(os.strerror(int(code[1])) if code else f"{type(error).__name__}: {error}", 160, placeholder=" ...")

"""Our own checkpoints: written atomically by Orbax, checked by us.

Orbax commits a checkpoint whole or not at all, but it does not look at the content: a flipped bit in a data file is
restored as a wrong weight, and a wrong dtype is cast, without a word. So each checkpoint carries a manifest that is
compared before a restore and recomputed after it.

On disk, `DIRECTORY/STEP/state` holds the arrays and `DIRECTORY/STEP/meta` the manifest with the caller's metadata. A
checkpoint found damaged becomes `STEP.corrupt`; nothing is ever deleted but what `keep` says.

This is the only module that imports Orbax.
"""

import contextlib
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from llama_jax.axes import Array, PyTree
from llama_jax.errors import CorruptError, InputError
from llama_jax.parallel.sharding import TRAINING, Rules
from llama_jax.weights.assemble import parameter_sharding
from llama_jax.weights.checksum import by_path
from llama_jax.weights.manifest import Manifest, check_content, check_like, describe, nest, read_manifest, seal

_PARAMETERS = "params"  # the subtree of a state that inference needs

# What becomes of a parameter that has been read: from its path and the array to what takes its place in the tree, by path.
Place = Callable[[str, Array], Mapping[str, PyTree]]

# What a file system or device reports when it is not the files that are wrong: never a reason to give a checkpoint up.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")

_TOGETHER = 16 << 20  # bytes of small arrays that are read at a time


class SaveError(RuntimeError):
    """A checkpoint that could not be written (a full disk, for one); the earlier ones are untouched."""


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
        for entry in _numbered(directory):
            if not _has_files(entry):
                _set_aside(entry)
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
        return _read_arrays(self._directory, manifest, like)

    def restore_newest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole, or `None` where there is none at all.

        Damaged ones are passed over with a warning and renamed to `STEP.corrupt`, so that training can go on from an older
        one. If none is whole, nothing is renamed.

        Raises:
          InputError: naming the path, if a checkpoint is whole but not of this run: nothing is passed over then.
          CorruptError: if there are checkpoints and all are damaged.
        """
        newest = _newest(self._directory, lambda step: self.restore(step, like))
        if newest is not None:
            for step in self.steps():
                if step > newest.step:
                    _set_aside(self._directory / str(step))
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
        return _manifest(self._directory, step)

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


def _as_it_is(path: str, leaf: Array) -> dict[str, Array]:
    return {path: leaf}


def restore_parameters(
    directory: Path, dtype: jax.typing.DTypeLike | None = None, mesh: Mesh | None = None, rules: Rules = TRAINING,
    place: Place = _as_it_is,
) -> Restored:  # fmt: skip
    """The verified parameters of the newest whole checkpoint; the optimizer's state is not read.

    Nothing in the directory is changed, so a run may be writing to it. One array after the other, or several small ones, are
    read, verified, cast and placed: beside the result, no more than the largest of them is in memory. Damage that shows late
    begins anew with an older one.

    Args:
      directory: as for `Checkpoints.open`.
      dtype: to cast the parameters to; as they were saved when `None`.
      mesh: the devices to lay them out over, each shard read where it lives; the default device when `None`.
      rules: axis name -> mesh axes, for `mesh`.
      place: called with the path (such as `layers/attention/wq`) and the array of each; by default it takes its place as it is.

    Raises:
      InputError: if there is no checkpoint, or none of a state with `params`.
      CorruptError: if all are damaged.
    """
    directory = directory.absolute()

    def read(step: int) -> PyTree:
        """All parameters of one checkpoint."""
        flat: dict[str, PyTree] = {}
        for paths in _parameter_groups(directory, step):
            leaves = _restore(directory, step, paths, dtype, mesh, rules)
            while leaves:  # what has its place is let go before the next is read
                flat |= jax.block_until_ready(place(*leaves.popitem()))
        return unflatten_dict(flat, sep="/")

    newest = _newest(directory, read)
    if newest is None:
        raise InputError(f"{directory}: no checkpoint there, the checkpoints of a run expected")
    return newest


def restore_parameter(
    directory: Path, step: int, path: str, dtype: jax.typing.DTypeLike | None = None, mesh: Mesh | None = None,
    rules: Rules = TRAINING,
) -> Array:  # fmt: skip
    """One verified parameter of one checkpoint; arguments as for `restore_parameters`.

    Raises:
      CorruptError: if its content is not what was saved.
    """
    return _restore(directory.absolute(), step, [path], dtype, mesh, rules)[path]


def _restore(
    directory: Path, step: int, paths: Sequence[str], dtype: jax.typing.DTypeLike | None, mesh: Mesh | None, rules: Rules
) -> dict[str, Array]:
    """Verified parameters of one checkpoint by their paths."""
    manifest = _manifest(directory, step)
    like = {}
    for name in (f"{_PARAMETERS}/{path}" for path in paths):
        record = manifest.arrays[name]
        where = parameter_sharding(name, len(record.shape), mesh, rules) if mesh else jnp.zeros(()).sharding
        like[name] = jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=where)
    leaves = by_path(_read_arrays(directory, manifest, nest(like)))
    cast = {name: leaf if dtype is None else leaf.astype(dtype) for name, leaf in leaves.items()}
    return {path: cast[f"{_PARAMETERS}/{path}"] for path in paths}


def newest_manifest(directory: Path) -> Manifest | None:
    """The manifest of the newest checkpoint that has a whole one, `None` if there is none; no array is read, nothing changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    for step in reversed(list_steps(directory)):
        with contextlib.suppress(CorruptError):
            return _manifest(directory, step)
    return None


def read_metadata(directory: Path) -> dict | None:
    """The metadata of the newest checkpoint whose manifest is whole, `None` if there is none; nothing is changed.

    Args:
      directory: as for `Checkpoints.open`.
    """
    manifest = newest_manifest(directory)
    return None if manifest is None else manifest.metadata


def _parameter_groups(directory: Path, step: int) -> list[list[str]]:
    """The parameters in a checkpoint, by their paths below `params`; small ones are read together, a large one alone.

    Opening a checkpoint takes longer than reading a small array.
    """
    prefix, arrays = f"{_PARAMETERS}/", _manifest(directory, step).arrays
    sizes = {path.removeprefix(prefix): math.prod(record.shape) * jnp.dtype(record.dtype).itemsize
             for path, record in arrays.items() if path.startswith(prefix)}  # fmt: skip
    if not sizes:
        raise InputError(f"checkpoint {directory / str(step)}: no {_PARAMETERS} in it, the state of a training expected")
    return _groups(sizes, _TOGETHER)


def _groups(sizes: Mapping[str, int], together: int) -> list[list[str]]:
    """Neighbours of bounded size together; what is larger is alone."""
    groups: list[list[str]] = []
    room = 0
    for path, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = together
        groups[-1].append(path)
        room -= size
    return groups


def _newest(directory: Path, read: Callable[[int], PyTree]) -> Restored | None:
    """The newest checkpoint that reads without damage."""
    damage: list[str] = []
    for step in reversed(list_steps(directory)):
        try:
            return Restored(step, read(step), _manifest(directory, step).metadata, damage)
        except CorruptError as error:
            damage.append(f"{error}; passed over for an older checkpoint")
    if damage:
        raise CorruptError(f"{directory}: all checkpoints are damaged ({damage[0]}); bring back a copy or start another run")
    return None


def _manifest(directory: Path, step: int) -> Manifest:
    return read_manifest(directory / str(step) / "meta" / "metadata", step)


def _read_arrays(directory: Path, manifest: Manifest, like: PyTree) -> PyTree:
    """The arrays of `like`, which may be a part of the checkpoint, with the content that was saved."""
    where = directory / str(manifest.step)
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    with _blamed_on_files(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(where / "state", args=arguments)
    check_content(manifest, state, where)
    return state


def check_arrays(directory: Path, step: int, together: int) -> None:
    """Reads all arrays of a checkpoint, some at a time, and compares them with what was saved.

    Args:
      directory: as for `Checkpoints.open`.
      step: of the checkpoint.
      together: bytes of arrays that are read at a time; a larger one is read alone.

    Raises:
      CorruptError: if an array, or the manifest, is not what was saved.
    """
    manifest, where = _manifest(directory, step), directory.absolute() / str(step)
    with _blamed_on_files(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(where / "state").item_metadata.tree
    known = by_path(tree)
    for path in manifest.arrays:
        if path not in known:
            raise CorruptError(f"checkpoint {where}: {path} is damaged: not found in the files")
    paths, device = list(known), jnp.zeros(()).sharding
    shapes = {path: jax.ShapeDtypeStruct(r.shape, jnp.dtype(r.dtype), sharding=device) for path, r in manifest.arrays.items()}
    for group in _groups({path: math.prod(shape.shape) * shape.dtype.itemsize for path, shape in shapes.items()}, together):
        leaves = [shapes[path] if path in group else ocp.PLACEHOLDER for path in paths]
        like = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        arguments = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        with _blamed_on_files(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = by_path(reader.restore(where / "state", args=arguments))
        check_content(manifest, {path: state[path] for path in group}, where)


@contextlib.contextmanager
def _blamed_on_files(where: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes Orbax and TensorStore raise into `CorruptError`."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if any(word in str(error) for word in _NOT_DAMAGE):
            raise
        raise CorruptError(f"checkpoint {where} is damaged: {_reason(error)}") from error


def list_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; nothing is opened."""
    return sorted(int(entry.name) for entry in _numbered(directory) if _has_files(entry))


def _numbered(directory: Path) -> Iterator[Path]:
    """Directories named like a step, whole or not."""
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    return (entry for entry in entries if entry.is_dir() and entry.name.isdecimal() and str(int(entry.name)) == entry.name)


def _has_files(directory: Path) -> bool:
    return any(path.is_file() for path in directory.rglob("*"))


def _set_aside(entry: Path) -> None:
    """Renames `STEP` to `STEP.corrupt`, or `STEP.corrupt2` and so on where that exists."""
    names = (f"{entry.name}.corrupt{suffix}" for suffix in ["", *range(2, 1000)])
    entry.rename(next(entry.with_name(name) for name in names if not entry.with_name(name).exists()))


def _reason(error: Exception) -> str:
    """An error in one line of readable length: TensorStore's run over many, what the system said far behind."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return textwrap.shorten(os.strerror(int(code[1])) if code else f"{type(error).__name__}: {error}", 160, placeholder=" ...")

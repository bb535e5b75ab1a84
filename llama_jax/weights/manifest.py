"""What a checkpoint of ours says about itself: path, shape, dtype and checksum of every array, sealed by a hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.axes import PyTree
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.checksum import by_path, checksums
from llama_jax.weights.source import shown

_LONGEST = 1 << 48  # of an axis
_SCHEMA = 1  # raised when an older reader could not understand what is written


class ArrayRecord(NamedTuple):
    """One array of a checkpoint.

    Attributes:
      shape: its shape.
      dtype: name of its dtype, such as `bfloat16`.
      checksum: 16 hexadecimal digits of `checksum.checksums`.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str


class Manifest(NamedTuple):
    """Content of a sealed manifest.

    Attributes:
      step: optimizer updates the checkpoint holds.
      arrays: a record for every array, by path.
      metadata: JSON values of the caller.
    """

    step: int
    arrays: dict[str, ArrayRecord]
    metadata: dict


def describe(step: int, state: PyTree, metadata: dict) -> Manifest:
    """The manifest of a state; waits until its arrays are computed."""
    sums = checksums(state)
    arrays = {path: ArrayRecord(leaf.shape, leaf.dtype.name, sums[path]) for path, leaf in by_path(state).items()}
    return Manifest(step, arrays, metadata)


def seal(manifest: Manifest) -> dict:
    """The manifest as JSON values, with a hash over all of them."""
    arrays = {path: record._asdict() for path, record in manifest.arrays.items()}
    content = {"step": manifest.step, "arrays": arrays, "metadata": manifest.metadata}
    return {"schema": _SCHEMA, "sha256": _digest(content), "content": content}


def read_manifest(path: Path, step: int) -> Manifest:
    """The manifest in a file, its seal checked.

    Raises:
      InputError: if the file cannot be read, or was written by a newer llama_jax.
      CorruptError: if it is missing, is not what was sealed, or belongs to another step.
    """
    sealed = _read_json(path)
    try:
        if sealed["schema"] > _SCHEMA:
            raise InputError(f"{path}: schema {sealed['schema']} given, at most {_SCHEMA} expected; take a newer llama_jax")
        content = sealed["content"]
        if sealed["sha256"] != _digest(content) or content["step"] != step:
            raise CorruptError(f"{path}: the content does not match its seal")
        arrays = {name: _record(values) for name, values in content["arrays"].items()}
        if not isinstance(content["metadata"], dict):
            raise TypeError("metadata")
        return Manifest(step, arrays, content["metadata"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path}: not a manifest of a checkpoint ({shown(repr(error))})") from None


def _record(values: Any) -> ArrayRecord:
    """A record as it was sealed.

    Raises:
      KeyError, TypeError: for anything else.
    """
    shape, dtype, checksum = values["shape"], values["dtype"], values["checksum"]
    whole = isinstance(shape, list) and all(type(length) is int and 0 <= length < _LONGEST for length in shape)
    if not (whole and isinstance(dtype, str) and isinstance(checksum, str)):
        raise TypeError(f"record {values}")
    try:
        known = jnp.dtype(dtype)
    except ValueError:  # a TypeError for most names that there are not
        raise TypeError(f"dtype {shown(dtype)}") from None
    if known.name != dtype or known.hasobject or known.itemsize == 0:
        raise TypeError(f"dtype {dtype}")
    return ArrayRecord(tuple(shape), dtype, checksum)


def check_like(manifest: Manifest, like: PyTree, where: Path) -> None:
    """Compares paths, shapes and dtypes with an expected state; Orbax would cast a wrong dtype without a word.

    Raises:
      InputError: naming the first path that differs.
    """
    expected = {path: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for path, leaf in by_path(like).items()}
    given = {path: (record.shape, record.dtype) for path, record in manifest.arrays.items()}
    for path in sorted(expected.keys() | given.keys()):
        if given.get(path) != expected.get(path):
            there, here = (f"{at[path][1]}{list(at[path][0])}" if path in at else "no array" for at in (given, expected))
            raise InputError(f"checkpoint {where}: {path}: {there} given, {here} expected; take the config of that run")


def check_content(manifest: Manifest, state: PyTree, where: Path) -> None:
    """Recomputes the checksums of restored arrays.

    Raises:
      CorruptError: naming the first path whose content is not what was saved.
    """
    for path, leaf in by_path(state).items():
        if not isinstance(leaf, jax.Array):  # Orbax leaves the placeholder where its own index has lost the array
            raise CorruptError(f"checkpoint {where}: {path} is damaged: not found in the files")
    for path, checksum in checksums(state).items():
        if checksum != manifest.arrays[path].checksum:
            raise CorruptError(f"checkpoint {where}: {path} is damaged: checksum {checksum} read, "
                               f"{manifest.arrays[path].checksum} saved")  # fmt: skip


def nest(entries: dict[str, Any]) -> dict:
    """Nested dicts of a dict whose keys are paths."""
    tree: dict = {}
    for path, value in entries.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{path}: missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CorruptError(f"{path}: not a manifest of a checkpoint ({shown(values)})")
    return values


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def groups(sizes: Mapping[str, int], together: int) -> list[list[str]]:
    """Neighbours of bounded size together, what is larger alone: opening a checkpoint takes longer than reading a small array.

    Args:
      sizes: bytes by path.
      together: bytes of a group.
    """
    found: list[list[str]] = []
    room = 0
    for path, size in sizes.items():
        if size > room or not found:
            found.append([])
            room = together
        found[-1].append(path)
        room -= size
    return found

"""What a checkpoint of ours says about itself: path, shape, dtype and checksum of every array,
sealed by a hash.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.axes import Array, PyTree, Shaped, UInt32
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.source import shown

# --- checksum ---
#
# A checksum of an array that does not depend on how the array is laid out over devices.
#
# Every element is mixed with its position and the results are added modulo 2^32; sums commute, so
# any sharding gives the same value and each device reads only its own part. Two sums with different
# mixing make 64 bits. Within a sum the mixing is a bijection of the element, so a change of one
# element always changes it.


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(tree: PyTree) -> dict[str, str]:
    """Checksum of every array of a tree, as 16 hexadecimal digits.

    The value is part of the format of our checkpoints: the same on every device, sharding and
    version of JAX.

    Args:
      tree: arrays with elements of 1, 2, 4 or 8 bytes.

    Returns:
      Checksums by path; a path is `params/layers/attention/wq`.
    """
    # An array at a time: arrays of one shape share a program, whatever tree they stand in.
    sums = jax.device_get({path: _fold_whole(leaf) for path, leaf in by_path(tree).items()})
    return {path: f"{int(first):08x}{int(second):08x}" for path, (first, second) in sums.items()}


def by_path(tree: PyTree) -> dict:
    """The leaves of a tree by path; keys, indices and field names are joined by a slash."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fold(array: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """The two sums of `checksums` for one array; stacked matrices one after the other, to save
    memory.
    """
    if array.ndim < 3:
        return _fold(array, jnp.uint32(0))
    size = math.prod(array.shape[1:]) * (2 if array.dtype.itemsize == 8 else 1)
    starts = jnp.arange(array.shape[0], dtype=jnp.uint32) * jnp.uint32(size % 2**32)
    return jnp.sum(lax.map(lambda part: _fold(*part), (array, starts)), axis=0, dtype=jnp.uint32)


def _fold(array: Array, start: Array) -> Array:
    """The sums of an array whose first element stands at place `start` of a larger one."""
    bits = _bits(array)
    place = _mix(_positions(bits.shape) + start)
    first = _mix(bits ^ place)
    second = _mix(bits * jnp.uint32(0x9E3779B1) + _mix(~place))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


_fold_whole = jax.jit(fold)
fold_part = jax.jit(
    _fold
)  # the sums of a part of an array add up to those of the whole, modulo 2^32


def _bits(array: Array) -> Array:
    """The bits of each element as uint32; elements of 8 bytes become two on a new last axis."""
    plain = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    return lax.bitcast_convert_type(plain, _UNSIGNED[plain.dtype.itemsize]).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> Array:
    """Row-major index of every element, modulo 2^32."""
    strides = [np.uint32(math.prod(shape[axis + 1 :]) % 2**32) for axis in range(len(shape))]
    indices = (
        lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
        for axis, stride in enumerate(strides)
    )
    return sum(indices, start=jnp.zeros(shape, jnp.uint32))


def _mix(bits: Array) -> Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit.

    Source: the finaliser of MurmurHash3 (A. Appleby, public domain).
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


# --- manifest ---


_LONGEST = 1 << 48  # of an axis
_SCHEMA = 1  # raised when an older reader could not understand the file


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
    arrays = {
        path: ArrayRecord(leaf.shape, leaf.dtype.name, sums[path])
        for path, leaf in by_path(state).items()
    }
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
            raise InputError(
                f"{path}: schema {sealed['schema']} given, at most {_SCHEMA} expected; "
                "take a newer llama_jax"
            )
        content = sealed["content"]
        if sealed["sha256"] != _digest(content) or content["step"] != step:
            raise CorruptError(f"{path}: the content does not match its seal")
        arrays = {name: _record(values) for name, values in content["arrays"].items()}
        if not isinstance(content["metadata"], dict):
            raise TypeError("metadata")
        return Manifest(step, arrays, content["metadata"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"{path}: not a manifest of a checkpoint ({shown(repr(error))})"
        ) from None


def _record(values: Any) -> ArrayRecord:
    """A record as it was sealed.

    Raises:
      KeyError, TypeError: for anything else.
    """
    shape, dtype, checksum = values["shape"], values["dtype"], values["checksum"]
    whole = isinstance(shape, list) and all(
        type(length) is int and 0 <= length < _LONGEST for length in shape
    )
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
    """Compares paths, shapes and dtypes with an expected state; Orbax would cast a wrong dtype
    without a word.

    Raises:
      InputError: naming the first path that differs.
    """
    expected = {
        path: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
        for path, leaf in by_path(like).items()
    }
    given = {path: (record.shape, record.dtype) for path, record in manifest.arrays.items()}
    for path in sorted(expected.keys() | given.keys()):
        if given.get(path) != expected.get(path):
            there, here = (
                f"{at[path][1]}{list(at[path][0])}" if path in at else "no array"
                for at in (given, expected)
            )
            raise InputError(
                f"checkpoint {where}: {path}: {there} given, {here} expected; take the "
                "config of that run"
            )


def check_content(manifest: Manifest, state: PyTree, where: Path) -> None:
    """Recomputes the checksums of restored arrays.

    Raises:
      CorruptError: naming the first path whose content is not what was saved.
    """
    for path, leaf in by_path(state).items():
        if not isinstance(
            leaf, jax.Array
        ):  # Orbax leaves the placeholder where its own index has lost the array
            raise CorruptError(f"checkpoint {where}: {path} is damaged: not found in the files")
    for path, checksum in checksums(state).items():
        if checksum != manifest.arrays[path].checksum:
            raise CorruptError(
                f"checkpoint {where}: {path} is damaged: checksum {checksum} read, "
                f"{manifest.arrays[path].checksum} saved"
            )


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
    """Neighbours of bounded size together, what is larger alone: opening a checkpoint takes longer
    than reading a small array.

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

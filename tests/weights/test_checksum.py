"""Checksums of arrays against a plain Python implementation, over shardings and damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_jax.weights.integrity import _fold_whole, by_path, checksums, fold

_WORD = 2**32


def _mix(bits: int) -> int:
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B % _WORD
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 % _WORD
    return bits ^ (bits >> 16)


def _oracle(array: np.ndarray) -> str:
    """The definition, one element at a time, in Python's integers."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    first = second = 0
    for index, bits in enumerate(array.reshape(-1).view(unsigned).tolist()):
        place = _mix(index)
        first += _mix(bits ^ place)
        second += _mix((bits * 0x9E3779B1 + _mix(~place % _WORD)) % _WORD)
    return f"{first % _WORD:08x}{second % _WORD:08x}"


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]
SHAPES = [(), (1,), (0, 3), (7,), (3, 5), (2, 3, 4)]
# In `make test` each type with two shapes, and each shape with two types.
KINDS = [
    pytest.param(dtype, shape, marks=[pytest.mark.slow] * ((i + j) % 3 != 0))
    for i, dtype in enumerate(DTYPES)
    for j, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("dtype", "shape"), KINDS)
def test_agrees_with_the_definition(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 50
    array = np.abs(values).astype(jnp.dtype(dtype))
    assert checksums({"a": jnp.asarray(array)}) == {"a": _oracle(array)}


def test_the_value_is_part_of_the_format():
    assert (
        checksums({"a": jnp.arange(5, dtype=jnp.int32)})["a"]
        == _oracle(np.arange(5, dtype=np.int32))
        == "53dedf1e97d879c9"
    )


def test_is_the_same_under_every_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    array = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    specs = [
        PartitionSpec(),
        PartitionSpec("a", "b"),
        PartitionSpec("b", "a"),
        PartitionSpec(None, ("a", "b")),
    ]
    placed = {
        f"{i}": jax.device_put(array, NamedSharding(mesh, spec)) for i, spec in enumerate(specs)
    }
    assert set(checksums(placed).values()) == {_oracle(array)}


def test_every_single_bit_counts():
    array = np.random.default_rng(2).normal(size=(8, 8)).astype(np.float32)
    flipped = np.repeat(array.view(np.uint32)[None], 64 * 32, 0).reshape(64 * 32, 64)
    flipped[np.arange(64 * 32), np.arange(64 * 32) // 32] ^= np.left_shift(
        1, np.arange(64 * 32) % 32
    ).astype(np.uint32)
    flipped = np.concatenate([array[None], flipped.view(np.float32).reshape(-1, 8, 8)])
    found = np.asarray(jax.jit(jax.vmap(fold))(flipped))
    clean, folds = found[0], found[1:]
    assert (folds[:, 0] != clean[0]).all()
    assert (folds[:, 1] != clean[1]).all()


def test_exchanged_elements_and_rows_count():
    array = np.random.default_rng(3).normal(size=(16, 16)).astype(np.float32)
    variants = {
        "clean": array,
        "rows": array[::-1].copy(),
        "transposed": array.T.copy(),
        "pair": array.copy(),
    }
    variants["pair"][0, 0], variants["pair"][0, 1] = array[0, 1], array[0, 0]
    assert (
        len(set(checksums({name: jnp.asarray(value) for name, value in variants.items()}).values()))
        == 4
    )


def test_paths_are_joined_by_slashes():
    assert list(by_path({"a": [1, {"b": 2}]})) == ["a/0", "a/1/b"]


def test_arrays_of_one_shape_share_a_program():
    """A tree of hundreds of arrays, or one array after the other, compiles as often as there are
    shapes.
    """
    before = _fold_whole._cache_size()
    checksums({f"layer_{i}": jnp.full((7, 11), i, jnp.float32) for i in range(40)})
    for i in range(5):
        checksums({f"other_{i}": jnp.full((7, 11), i, jnp.float32)})
    assert _fold_whole._cache_size() == before + 1

"""Safetensors files written one tensor at a time, in as many shards as asked for.

The safetensors library writes a file from all of its tensors at once; here they pass by, so that a model of any size needs
the memory of one tensor. The format: eight bytes with the length of the header, little-endian; the header, a JSON object
from names to dtype, shape and place, padded with spaces; then the tensors without gaps, in the order of their places.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import ml_dtypes
import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import Shape, shown

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8
_ROWS = 64  # written at a time: a transposed copy in strips stays in the cache, and the cast needs no second tensor
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_PREFIXES = ("", "K", "M", "G", "T")

_NO_METADATA: Mapping[str, str] = {}

Reader = Callable[[str], np.ndarray]  # from the name of a tensor to its values, of any floating dtype


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written.

    Attributes:
      name: as it is called in the file.
      dtype: of the values in the file, one of `DTYPES`.
      shape: in the orientation of the file.
    """

    name: str
    dtype: np.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(size: str | int) -> int:
    """Bytes that a text such as `5GB` or `500MB` (decimal) or `2GiB` (binary) stands for; a number is bytes.

    Raises:
      InputError: for other texts, and for less than a byte.
    """
    found = _SIZE.fullmatch(str(size).strip())
    if found is None:
        raise InputError(f"size {shown(size)} given; a number with a unit expected, such as 5GB, 500MB or 2GiB")
    number, prefix, binary = found.groups()
    count = int(float(number) * (1024 if binary else 1000) ** _PREFIXES.index(prefix.upper()))
    if count < 1:
        raise InputError(f"size {shown(size)} given; at least one byte expected")
    return count


def plan_shards(tensors: Iterable[TensorSpec], largest: int) -> dict[str, list[TensorSpec]]:
    """Shares tensors out to files, in their order, as transformers does.

    Args:
      tensors: the model.
      largest: bytes of tensors in a file; a tensor above it has a file of its own.

    Returns:
      The tensors of each file by its name: `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on.
    """
    shards: list[list[TensorSpec]] = [[]]
    room = largest
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = largest
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_of(shards: dict[str, list[TensorSpec]]) -> dict:
    """The values of `model.safetensors.index.json`."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    metadata = {"total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
                "total_size": sum(tensor.nbytes for tensor in tensors)}  # fmt: skip
    return {"metadata": metadata, "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard}}


def write_safetensors(
    path: pathlib.Path, tensors: Sequence[TensorSpec], read: Reader, metadata: Mapping[str, str] = _NO_METADATA
) -> None:
    """Writes one file and syncs it to disk.

    Args:
      path: where; replaced if it exists.
      tensors: what it is to hold. Wider types are placed first, so that every tensor is aligned.
      read: gives the values of each tensor, once, in the order of the file.
      metadata: texts by name, for the header.

    Raises:
      InputError: naming the tensor, if a finite value is infinite in the dtype of the file.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(ordered, metadata))
        for tensor in ordered:
            _write_values(file, tensor, read(tensor.name))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, tensor: TensorSpec, values: np.ndarray) -> None:
    if values.shape != tensor.shape:
        raise InputError(f"tensor {tensor.name} has shape {values.shape}; {tensor.shape} expected")
    for strip in _strips(values):
        cast = _cast(strip, tensor)
        file.write(cast.view(np.uint8).data)


def _strips(values: np.ndarray) -> Iterator[np.ndarray]:
    """A matrix some rows at a time; a vector as it is."""
    step = _ROWS if values.ndim > 1 else values.shape[0]
    return (values[start : start + step] for start in range(0, values.shape[0], step))


def _cast(values: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    """The values in the dtype of the file, one after the other in memory."""
    if values.dtype == tensor.dtype:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values).astype(tensor.dtype)
    if not np.array_equal(np.isfinite(cast), np.isfinite(values)):
        largest = np.abs(np.where(np.isfinite(values), values, 0)).max()
        raise InputError(
            f"tensor {tensor.name} holds {largest:g}, beyond the range of {tensor.dtype.name}; take a wider dtype, as float32"
        )
    return cast

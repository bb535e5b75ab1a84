"""The tensors of a safetensors file, as views of the mapped file.

The library checks the header: no holes, no overlaps, nothing outside. The bytes are mapped here,
since the library copies each tensor once more than needed.

Source: the format's own description; eight bytes hold the length of a JSON header, the tensors'
  bytes follow it.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_jax.errors import InputError
from llama_jax.weights.source import Shape, shown

# Codes of the element types that weights have.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# And those of quantized files, which are no weights by themselves.
_NARROW = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(bool),
    **{
        f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
}
_LENGTH = 8
_LARGEST_HEADER = (
    16 << 20
)  # bytes; that of the largest model has 200 KB, and parsed it is many times as large


def map_safetensors(path: str | os.PathLike[str], narrow: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a file by name, nothing read but the header.

    Args:
      path: the file.
      narrow: whether 8-bit floats and whole numbers are taken as well, for a caller who checks
        types itself.

    Raises:
      InputError: naming the file (not its directory), for one that is damaged or holds a type other
        than F64, F32, F16, BF16.
    """
    types = {**_DTYPES, **_NARROW} if narrow else _DTYPES
    name = os.path.basename(path)
    with _damage_named(name):
        _require_short_header(path)
        with safe_open(path, framework="numpy"):
            pass
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        start = _LENGTH + int.from_bytes(data[:_LENGTH].tobytes(), "little")
        header = json.loads(data[_LENGTH:start].tobytes())
        return {
            tensor: _view(data[start:], tensor, at, types)
            for tensor, at in header.items()
            if tensor != "__metadata__"
        }


def _require_short_header(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):  # a pipe would make the reader wait
        raise FileNotFoundError("no such file, or not a regular one")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
    if _LARGEST_HEADER < length < os.path.getsize(path):
        raise InputError(
            f"{os.path.basename(path)} has a header of {length} bytes, larger than any model's"
        )


def _view(
    data: np.ndarray, name: str, at: dict[str, Any], types: Mapping[str, np.dtype]
) -> np.ndarray:
    """One tensor; the library has checked that it fits."""
    if at["dtype"] not in types:
        raise InputError(
            f"tensor {shown(name)} has type {at['dtype']}; supported are {', '.join(types)}"
        )
    begin, end = at["data_offsets"]
    return data[begin:end].view(types[at["dtype"]]).reshape(at["shape"])


@contextlib.contextmanager
def _damage_named(what: str) -> Iterator[None]:
    """Turns the errors of a damaged file into ours."""
    try:
        yield
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{what} cannot be read ({shown(str(error))}); fetch the file again"
        ) from None


# --- hugging face write ---
#
# Safetensors files written one tensor at a time, in as many shards as asked for.
#
# The safetensors library writes a file from all of its tensors at once; here they pass by, so that
# a model of any size needs the memory of one tensor. The format: eight bytes with the length of the
# header, little-endian; the header, a JSON object from names to dtype, shape and place, padded with
# spaces; then the tensors without gaps, in the order of their places.


INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8
# written at a time: a transposed copy in strips stays in the cache, and the cast needs no second
# tensor
_ROWS = 64
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_PREFIXES = ("", "K", "M", "G", "T")

_NO_METADATA: Mapping[str, str] = {}

Reader = Callable[
    [str], np.ndarray
]  # from the name of a tensor to its values, of any floating dtype


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
    """Bytes that a text such as `5GB` or `500MB` (decimal) or `2GiB` (binary) stands for; a number
    is bytes.

    Raises:
      InputError: for other texts, and for less than a byte.
    """
    found = _SIZE.fullmatch(str(size).strip())
    if found is None:
        raise InputError(
            f"size {shown(size)} given; a number with a unit expected, such as 5GB, 500MB or 2GiB"
        )
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
      The tensors of each file by its name: `model.safetensors`, or
        `model-00001-of-0000N.safetensors` and so on.
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
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def index_of(shards: dict[str, list[TensorSpec]]) -> dict:
    """The values of `model.safetensors.index.json`."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    return {
        "metadata": metadata,
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }


def write_safetensors(
    path: pathlib.Path,
    tensors: Sequence[TensorSpec],
    read: Reader,
    metadata: Mapping[str, str] = _NO_METADATA,
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
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
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
            f"tensor {tensor.name} holds {largest:g}, beyond the range of "
            f"{tensor.dtype.name}; take a wider dtype, as float32"
        )
    return cast

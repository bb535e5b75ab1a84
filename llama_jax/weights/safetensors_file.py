"""The tensors of a safetensors file, as views of the mapped file.

The library checks the header: no holes, no overlaps, nothing outside. The bytes are mapped here, since the library copies
each tensor once more than needed.

Source: the format's own description; eight bytes hold the length of a JSON header, the tensors' bytes follow it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

# Codes of the element types that weights have.
_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
# And those of quantized files, which are no weights by themselves.
_NARROW = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "BOOL": np.dtype(bool),
           **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}}  # fmt: skip
_LENGTH = 8
_LARGEST_HEADER = 16 << 20  # bytes; that of the largest model has 200 KB, and parsed it is many times as large


def map_safetensors(path: str | os.PathLike[str], narrow: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a file by name, nothing read but the header.

    Args:
      path: the file.
      narrow: whether 8-bit floats and whole numbers are taken as well, for a caller who checks types itself.

    Raises:
      InputError: naming the file (not its directory), for one that is damaged or holds a type other than F64, F32, F16, BF16.
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
        return {tensor: _view(data[start:], tensor, at, types) for tensor, at in header.items() if tensor != "__metadata__"}


def _require_short_header(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):  # a pipe would make the reader wait
        raise FileNotFoundError("no such file, or not a regular one")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
    if _LARGEST_HEADER < length < os.path.getsize(path):
        raise InputError(f"{os.path.basename(path)} has a header of {length} bytes, larger than any model's")


def _view(data: np.ndarray, name: str, at: dict[str, Any], types: Mapping[str, np.dtype]) -> np.ndarray:
    """One tensor; the library has checked that it fits."""
    if at["dtype"] not in types:
        raise InputError(f"tensor {shown(name)} has type {at['dtype']}; supported are {', '.join(types)}")
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
        raise InputError(f"{what} cannot be read ({shown(str(error))}); fetch the file again") from None

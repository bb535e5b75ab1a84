"""Weights as the bytes of GGUF's element types: the inverse of `gguf_blocks`, for the types that we write.

Source: `ggml-quants.c` of the ggml project (`quantize_row_q8_0_ref`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import blamed_on, shown

Encode = Callable[[np.ndarray], np.ndarray]

Q8_0_BLOCK = 32  # weights that share a scale

_STRIP = 1 << 20  # weights encoded at a time: 4 MiB of float32


class Encoding(NamedTuple):
    """One way to write the matrices of a model.

    Attributes:
      type: name of the element type, as ggml spells it.
      file_type: number of `general.file_type` for a model whose matrices are all of this type.
      encode: from rows, floating `[rows, columns]`, to their bytes, uint8.
    """

    type: str
    file_type: int
    encode: Encode


def strips(name: str, tensor: np.ndarray, encode: Encode) -> Iterator[np.ndarray]:
    """The bytes of one tensor, some rows at a time, so that little more than the tensor is in memory.

    Args:
      name: for messages.
      tensor: floating, 1-D or 2-D, in any memory layout.
      encode: one of `ENCODINGS`.

    Raises:
      InputError: naming the tensor, for weights that are not finite or not in the range of the type.
    """
    rows = tensor if tensor.ndim == 2 else tensor[None]
    step = max(1, _STRIP // rows.shape[1])
    for start in range(0, len(rows), step):
        with blamed_on(f"tensor {shown(name)}"):
            encoded = encode(np.ascontiguousarray(rows[start : start + step]))
        yield encoded


def _as_floats(dtype: type, alternative: str) -> Encode:
    def encode(rows: np.ndarray) -> np.ndarray:
        """Rounded to the nearest, ties to even."""
        with np.errstate(over="ignore", invalid="ignore"):
            encoded: np.ndarray = rows.astype(dtype)
        _require_finite(rows, encoded, alternative)
        return encoded.reshape(-1).view(np.uint8)

    return encode


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of a float16 scale and 32 signed bytes; the scale takes the largest weight to 127."""
    blocks = rows.astype(np.float32, copy=False).reshape(-1, Q8_0_BLOCK)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
        inverse = 1 / scales
        stored = scales.astype(np.float16)
    _require_finite(rows, stored, "float32 or bfloat16")
    inverse[~np.isfinite(inverse)] = 0  # of zero, and of scales so small that float16 makes them zero
    encoded = np.empty((len(blocks), 2 + Q8_0_BLOCK), np.uint8)
    encoded[:, :2] = stored.view(np.uint8)
    encoded[:, 2:] = _round(blocks * inverse).astype(np.int8).view(np.uint8)
    return encoded.reshape(-1)


def _round(numbers: np.ndarray) -> np.ndarray:
    """To whole numbers, halves away from zero, as C's `roundf`; numpy's own rounding takes halves to even ones."""
    sizes = np.abs(numbers)
    floors = np.floor(sizes)
    return np.copysign(floors + (sizes - floors >= 0.5), numbers)


def _require_finite(rows: np.ndarray, encoded: np.ndarray, alternative: str) -> None:
    """Refuses weights that became infinite, or were not finite to begin with."""
    if np.isfinite(encoded).all():
        return
    largest = float(np.abs(rows).max())
    if not np.isfinite(largest):
        raise InputError("some weights are not finite numbers; the model is damaged")
    raise InputError(f"a weight of size {largest:.6g} is out of range; take {alternative}")


ENCODINGS = {
    "float32": Encoding("F32", 0, _as_floats(np.float32, "smaller weights")),
    "float16": Encoding("F16", 1, _as_floats(np.float16, "float32 or bfloat16")),
    "bfloat16": Encoding("BF16", 32, _as_floats(ml_dtypes.bfloat16, "float32")),
    "q8_0": Encoding("Q8_0", 7, _q8_0),
}

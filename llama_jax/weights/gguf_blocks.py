"""The element types of GGUF: how many bytes a block takes, and how the common ones become numbers.

A quantised tensor is a row of blocks of 32 weights, each with its own float16 scale `d` (and offset
`m`): Q8_0 is `d * q` with q a signed byte; Q4_0 `d * (q - 8)` and Q4_1 `d * q + m` with q from 0 to
15, the low halves of the 16 bytes holding the first 16 weights and the high halves the last 16;
Q5_0 `d * (q - 16)` and Q5_1 `d * q + m` are the same with a fifth bit; IQ4_NL is Q4_0 with uneven
steps. The types of larger blocks are in `gguf_k_blocks`; where rows are not whole blocks of these,
llama.cpp takes the types here instead.

Source: the GGUF specification and `ggml-common.h` of the ggml project.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.errors import InputError
from llama_jax.weights.source import blamed_on, shown

# --- gguf k blocks ---
#
# How GGUF's K-quants become numbers: blocks of 256 weights whose sub-blocks have scales that are
# themselves quantised.
#
# | type | weight | sub-blocks | scale `s` and offset `o` of a sub-block |
# |---|---|---|---|
# | Q2_K | `d s q - m o`, q of 2 bits | 16 of 16 | 4 bits each |
# | Q3_K | `d s (q - 4)`, q of 3 bits | 16 of 16 | 6 bits, 32 taken off |
# | Q4_K | `d s q - m o`, q of 4 bits | 8 of 32 | 6 bits each |
# | Q5_K | `d s q - m o`, q of 5 bits | 8 of 32 | 6 bits each |
# | Q6_K | `d s (q - 32)`, q of 6 bits | 16 of 16 | a signed byte |
# | IQ4_XS | `d s u[q]`, q of 4 bits, `u` the steps of IQ4_NL | 8 of 32 | 6 bits, 32 taken off |
#
# `d` and `m` are float16, one a block. The functions here take blocks, uint8 `[blocks, bytes]`, and
# fill float32 `[blocks, 256]`. The order of the operations in float32 is ggml's, so that the
# weights are equal bit for bit.
#
# Source: `ggml-common.h` and `ggml-quants.c` of the ggml project.


# The 16 steps of IQ4_NL and IQ4_XS, closer together near zero.
UNEVEN = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)

_HALVES = np.array([[0], [4]], np.uint8)  # shifts, against bytes on the last axis
_QUARTERS = np.array([[0], [2], [4], [6]], np.uint8)
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def float16(data: np.ndarray) -> np.ndarray:
    """Two bytes a block, uint8 `[blocks, 2]`, to float32 `[blocks, 1]`."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def q2_k(blocks: np.ndarray, weights: np.ndarray) -> None:
    """84 bytes: 16 of scales (low half) and offsets (high half), 64 of quarters, `d`, `m`."""
    scales = blocks[:, :16]
    weights[:] = _unpacked(blocks[:, 16:80], 32, _QUARTERS, 3)
    _scale(weights, float16(blocks[:, 80:82]) * (scales & 15))
    _offset(weights, float16(blocks[:, 82:84]) * (scales >> 4))


def q3_k(blocks: np.ndarray, weights: np.ndarray) -> None:
    """110 bytes: 32 of high bits, 64 of quarters, 12 of scales, `d`."""
    high = _unpacked(blocks[:, :32], 32, _BITS, 1)
    high <<= 2
    high |= _unpacked(blocks[:, 32:96], 32, _QUARTERS, 3)
    weights[:] = high
    weights -= 4
    # Eight bytes hold the low halves of all 16 scales, four more bytes their upper two bits.
    scales = (
        _unpacked(blocks[:, 96:104], 8, _HALVES, 15)
        | _unpacked(blocks[:, 104:108], 4, _QUARTERS, 3) << 4
    )
    _scale(weights, float16(blocks[:, 108:110]) * (scales.astype(np.float32) - 32))


def q4_k(blocks: np.ndarray, weights: np.ndarray) -> None:
    """144 bytes: `d`, `m`, 12 of scales and offsets, 128 of halves."""
    weights[:] = _unpacked(blocks[:, 16:], 32, _HALVES, 15)
    _scale_and_offset(blocks, weights)


def q5_k(blocks: np.ndarray, weights: np.ndarray) -> None:
    """176 bytes: `d`, `m`, 12 of scales and offsets, 32 of high bits, 128 of halves."""
    high = _unpacked(blocks[:, 16:48], 32, _BITS, 1)
    high <<= 4
    high |= _unpacked(blocks[:, 48:], 32, _HALVES, 15)
    weights[:] = high
    _scale_and_offset(blocks, weights)


def q6_k(blocks: np.ndarray, weights: np.ndarray) -> None:
    """210 bytes: 128 of low halves, 64 of high quarters, 16 of scales, `d`."""
    high = _unpacked(blocks[:, 128:192], 32, _QUARTERS, 3)
    high <<= 4
    high |= _unpacked(blocks[:, :128], 64, _HALVES, 15)
    weights[:] = high
    weights -= 32
    _scale(weights, float16(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8))


def iq4_xs(blocks: np.ndarray, weights: np.ndarray) -> None:
    """136 bytes: `d`, 2 of the upper two bits of the scales, 4 of their low halves, 128 of
    halves.
    """
    weights[:] = UNEVEN[_unpacked(blocks[:, 8:], 16, _HALVES, 15)]
    # Scales in the order of the weights: the low half of a byte before its high half, the lowest
    # two bits first.
    scales = (
        _unpacked(blocks[:, 4:8], 1, _HALVES, 15) | _unpacked(blocks[:, 2:4], 1, _QUARTERS, 3) << 4
    )
    _scale(weights, float16(blocks[:, :2]) * (scales.astype(np.float32) - 32))


def _unpacked(data: np.ndarray, run: int, shifts: np.ndarray, mask: int) -> np.ndarray:
    """Pieces of bytes as numbers, uint8 `[blocks, numbers]`: of each `run` bytes first the lowest
    pieces, then the next.
    """
    pieces = np.right_shift(data.reshape(len(data), -1, 1, run), shifts)
    pieces &= mask
    return pieces.reshape(len(data), -1)


def _scale(weights: np.ndarray, factors: np.ndarray) -> None:
    """Multiplies sub-blocks by their factors, `[blocks, sub-blocks]`."""
    parts = weights.reshape(*factors.shape, -1)
    parts *= factors[:, :, None]


def _offset(weights: np.ndarray, offsets: np.ndarray) -> None:
    """Takes its offset off each sub-block, `[blocks, sub-blocks]`."""
    parts = weights.reshape(*offsets.shape, -1)
    parts -= offsets[:, :, None]


def _scale_and_offset(blocks: np.ndarray, weights: np.ndarray) -> None:
    """What Q4_K and Q5_K share: eight scales and eight offsets of 6 bits in bytes 4 to 15.

    The first four of each are the low 6 bits of four bytes; of the others those bytes hold the
    upper 2 bits, and the last four bytes the low 4 (scales in the low half, offsets in the high
    one).
    """
    first, second, lows = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, lows & 15 | first >> 2 & 48], axis=1)
    offsets = np.concatenate([second & 63, lows >> 4 | second >> 2 & 48], axis=1)
    _scale(weights, float16(blocks[:, :2]) * scales)
    _offset(weights, float16(blocks[:, 2:4]) * offsets)


# --- gguf encode ---
#
# Weights as the bytes of GGUF's element types: the inverse of `gguf_blocks`, for the types that we
# write.
#
# Source: `ggml-quants.c` of the ggml project (`quantize_row_q8_0_ref`).


Encode = Callable[[np.ndarray], np.ndarray]

Q8_0_BLOCK = 32  # weights that share a scale

_ENCODED_AT_ONCE = 1 << 20  # weights encoded at a time: 4 MiB of float32


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
    """The bytes of one tensor, some rows at a time, so that little more than the tensor is in
    memory.

    Args:
      name: for messages.
      tensor: floating, 1-D or 2-D, in any memory layout.
      encode: one of `ENCODINGS`.

    Raises:
      InputError: naming the tensor, for weights that are not finite or not in the range of the
        type.
    """
    rows = tensor if tensor.ndim == 2 else tensor[None]
    step = max(1, _ENCODED_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        with blamed_on(f"tensor {shown(name)}"):
            encoded = encode(np.ascontiguousarray(rows[start : start + step]))
        yield encoded


def _encode_floats(dtype: type, alternative: str) -> Encode:
    def encode(rows: np.ndarray) -> np.ndarray:
        """Rounded to the nearest, ties to even."""
        with np.errstate(over="ignore", invalid="ignore"):
            encoded: np.ndarray = rows.astype(dtype)
        _require_finite(rows, encoded, alternative)
        return encoded.reshape(-1).view(np.uint8)

    return encode


def _encode_q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of a float16 scale and 32 signed bytes; the scale takes the largest weight to 127."""
    blocks = rows.astype(np.float32, copy=False).reshape(-1, Q8_0_BLOCK)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
        inverse = 1 / scales
        stored = scales.astype(np.float16)
    _require_finite(rows, stored, "float32 or bfloat16")
    inverse[~np.isfinite(inverse)] = (
        0  # of zero, and of scales so small that float16 makes them zero
    )
    encoded = np.empty((len(blocks), 2 + Q8_0_BLOCK), np.uint8)
    encoded[:, :2] = stored.view(np.uint8)
    encoded[:, 2:] = _round(blocks * inverse).astype(np.int8).view(np.uint8)
    return encoded.reshape(-1)


def _round(numbers: np.ndarray) -> np.ndarray:
    """To whole numbers, halves away from zero, as C's `roundf`; numpy's own rounding takes halves
    to even ones.
    """
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
    "float32": Encoding("F32", 0, _encode_floats(np.float32, "smaller weights")),
    "float16": Encoding("F16", 1, _encode_floats(np.float16, "float32 or bfloat16")),
    "bfloat16": Encoding("BF16", 32, _encode_floats(ml_dtypes.bfloat16, "float32")),
    "q8_0": Encoding("Q8_0", 7, _encode_q8_0),
}


# --- gguf blocks ---


Decode = Callable[[np.ndarray], np.ndarray]
Fill = Callable[
    [np.ndarray, np.ndarray], None
]  # from blocks, uint8 `[n, bytes]`, into weights, float32 `[n, length]`

_STRIP = 1 << 16  # weights decoded at a time: 256 KiB of float32


class BlockType(NamedTuple):
    """One element type.

    Attributes:
      name: as ggml spells it.
      length: weights in a block.
      nbytes: bytes of a block.
      decode: from the bytes (uint8, 1-D) to the weights (1-D): float types as they are, quantised
        ones as float32; `None` for the types that are known by size only.
    """

    name: str
    length: int
    nbytes: int
    decode: Decode | None = None


def _as_floats(dtype: type) -> Decode:
    def decode(data: np.ndarray) -> np.ndarray:
        """The bytes as numbers, nothing copied."""
        return data.view(dtype)

    return decode


def _in_strips(length: int, nbytes: int, fill: Fill) -> Decode:
    """A decoder of blocks, a strip after the other: what is made on the way to the weights stays in
    the cache.
    """
    strip = _STRIP // length

    def decode(data: np.ndarray) -> np.ndarray:
        """The bytes of blocks as weights, float32."""
        blocks = data.reshape(-1, nbytes)
        weights = np.empty((len(blocks), length), np.float32)
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # a scale that is no number makes weights that are none
            for start in range(0, len(blocks), strip):
                fill(blocks[start : start + strip], weights[start : start + strip])
        return weights.reshape(-1)

    return decode


def _quantised(name: str, length: int, nbytes: int, fill: Fill) -> BlockType:
    return BlockType(name, length, nbytes, _in_strips(length, nbytes, fill))


def _fill_halves(data: np.ndarray, weights: np.ndarray) -> None:
    """Blocks of 16 bytes to 32 weights: low half bytes first, then the high ones."""
    weights[:, :16] = data & 15
    weights[:, 16:] = data >> 4


def _fill_fives(bits: np.ndarray, data: np.ndarray, weights: np.ndarray) -> None:
    """As `_fill_halves`, with a fifth bit of each weight in four more bytes, the first weight's the
    lowest.
    """
    numbers = np.unpackbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
    numbers <<= 4
    numbers[:, :16] |= data & 15
    numbers[:, 16:] |= data >> 4
    weights[:] = numbers


def _q4_0(blocks: np.ndarray, weights: np.ndarray) -> None:
    _fill_halves(blocks[:, 2:], weights)
    weights -= 8
    weights *= float16(blocks[:, :2])


def _q4_1(blocks: np.ndarray, weights: np.ndarray) -> None:
    _fill_halves(blocks[:, 4:], weights)
    weights *= float16(blocks[:, :2])
    weights += float16(blocks[:, 2:4])


def _iq4_nl(blocks: np.ndarray, weights: np.ndarray) -> None:
    weights[:, :16] = UNEVEN[blocks[:, 2:] & 15]
    weights[:, 16:] = UNEVEN[blocks[:, 2:] >> 4]
    weights *= float16(blocks[:, :2])


def _q5_0(blocks: np.ndarray, weights: np.ndarray) -> None:
    _fill_fives(blocks[:, 2:6], blocks[:, 6:], weights)
    weights -= 16
    weights *= float16(blocks[:, :2])


def _q5_1(blocks: np.ndarray, weights: np.ndarray) -> None:
    _fill_fives(blocks[:, 4:8], blocks[:, 8:], weights)
    weights *= float16(blocks[:, :2])
    weights += float16(blocks[:, 2:4])


def _q8_0(blocks: np.ndarray, weights: np.ndarray) -> None:
    weights[:] = blocks[:, 2:].view(np.int8)
    weights *= float16(blocks[:, :2])


# By the number that stands in the file.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _as_floats(np.float32)),
    1: BlockType("F16", 1, 2, _as_floats(np.float16)),
    2: _quantised("Q4_0", 32, 18, _q4_0),
    3: _quantised("Q4_1", 32, 20, _q4_1),
    6: _quantised("Q5_0", 32, 22, _q5_0),
    7: _quantised("Q5_1", 32, 24, _q5_1),
    8: _quantised("Q8_0", 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 40),
    10: _quantised("Q2_K", 256, 84, q2_k),
    11: _quantised("Q3_K", 256, 110, q3_k),
    12: _quantised("Q4_K", 256, 144, q4_k),
    13: _quantised("Q5_K", 256, 176, q5_k),
    14: _quantised("Q6_K", 256, 210, q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: _quantised("IQ4_NL", 32, 18, _iq4_nl),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: _quantised("IQ4_XS", 256, 136, iq4_xs),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8, _as_floats(np.float64)),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, _as_floats(ml_dtypes.bfloat16)),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
DECODERS: dict[str, Decode] = {
    block.name: block.decode for block in BLOCK_TYPES.values() if block.decode is not None
}

"""The element types of GGUF: how many bytes a block takes, and how the common ones become numbers.

A quantised tensor is a row of blocks of 32 weights, each with its own float16 scale `d` (and offset `m`):
Q8_0 is `d * q` with q a signed byte; Q4_0 `d * (q - 8)` and Q4_1 `d * q + m` with q from 0 to 15, the low halves of
the 16 bytes holding the first 16 weights and the high halves the last 16; Q5_0 `d * (q - 16)` and Q5_1 `d * q + m` are
the same with a fifth bit; IQ4_NL is Q4_0 with uneven steps. The types of larger blocks are in `gguf_k_blocks`; where
rows are not whole blocks of these, llama.cpp takes the types here instead.

Source: the GGUF specification and `ggml-common.h` of the ggml project.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.weights.gguf_k_blocks import UNEVEN, float16, iq4_xs, q2_k, q3_k, q4_k, q5_k, q6_k

Decode = Callable[[np.ndarray], np.ndarray]
Fill = Callable[[np.ndarray, np.ndarray], None]  # from blocks, uint8 `[n, bytes]`, into weights, float32 `[n, length]`

_STRIP = 1 << 16  # weights decoded at a time: 256 KiB of float32


class BlockType(NamedTuple):
    """One element type.

    Attributes:
      name: as ggml spells it.
      length: weights in a block.
      nbytes: bytes of a block.
      decode: from the bytes (uint8, 1-D) to the weights (1-D): float types as they are, quantised ones as float32;
        `None` for the types that are known by size only.
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
    """A decoder of blocks, a strip after the other: what is made on the way to the weights stays in the cache."""
    strip = _STRIP // length

    def decode(data: np.ndarray) -> np.ndarray:
        """The bytes of blocks as weights, float32."""
        blocks = data.reshape(-1, nbytes)
        weights = np.empty((len(blocks), length), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number makes weights that are none
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
    """As `_fill_halves`, with a fifth bit of each weight in four more bytes, the first weight's the lowest."""
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
DECODERS: dict[str, Decode] = {block.name: block.decode for block in BLOCK_TYPES.values() if block.decode is not None}

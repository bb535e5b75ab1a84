"""The element types of GGUF: how many bytes a block takes, and how the common ones become numbers.

A quantised tensor is a row of blocks of 32 weights, each with its own float16 scale `d` (and offset `m`):
Q8_0 is `d * q` with q a signed byte; Q4_0 `d * (q - 8)` and Q4_1 `d * q + m` with q from 0 to 15, the low halves of
the 16 bytes holding the first 16 weights and the high halves the last 16.

Source: the GGUF specification and `ggml-common.h` of the ggml project.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

Decode = Callable[[np.ndarray], np.ndarray]


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


def _halves(data: np.ndarray) -> np.ndarray:
    """Blocks of 16 bytes to float32 `[blocks, 32]`: low half bytes first, then the high ones."""
    weights = np.empty((len(data), 2, 16), np.float32)
    weights[:, 0] = data & 15
    weights[:, 1] = data >> 4
    return weights.reshape(-1, 32)


def _float16(data: np.ndarray) -> np.ndarray:
    """Two bytes a block to float32 `[blocks, 1]`."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _q4_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 18)
    weights = _halves(blocks[:, 2:])
    weights -= 8
    weights *= _float16(blocks[:, :2])
    return weights.reshape(-1)


def _q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    weights = _halves(blocks[:, 4:])
    weights *= _float16(blocks[:, :2])
    weights += _float16(blocks[:, 2:4])
    return weights.reshape(-1)


def _q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 34)
    weights = blocks[:, 2:].view(np.int8).astype(np.float32)
    weights *= _float16(blocks[:, :2])
    return weights.reshape(-1)


# By the number that stands in the file.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _as_floats(np.float32)),
    1: BlockType("F16", 1, 2, _as_floats(np.float16)),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
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
}
DECODERS: dict[str, Decode] = {block.name: block.decode for block in BLOCK_TYPES.values() if block.decode is not None}

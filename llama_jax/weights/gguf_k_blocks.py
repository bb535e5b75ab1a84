"""How GGUF's K-quants become numbers: blocks of 256 weights whose sub-blocks have scales that are themselves quantised.

| type | weight | sub-blocks | scale `s` and offset `o` of a sub-block |
|---|---|---|---|
| Q2_K | `d s q - m o`, q of 2 bits | 16 of 16 | 4 bits each |
| Q3_K | `d s (q - 4)`, q of 3 bits | 16 of 16 | 6 bits, 32 taken off |
| Q4_K | `d s q - m o`, q of 4 bits | 8 of 32 | 6 bits each |
| Q5_K | `d s q - m o`, q of 5 bits | 8 of 32 | 6 bits each |
| Q6_K | `d s (q - 32)`, q of 6 bits | 16 of 16 | a signed byte |
| IQ4_XS | `d s u[q]`, q of 4 bits, `u` the steps of IQ4_NL | 8 of 32 | 6 bits, 32 taken off |

`d` and `m` are float16, one a block. The functions here take blocks, uint8 `[blocks, bytes]`, and fill float32
`[blocks, 256]`. The order of the operations in float32 is ggml's, so that the weights are equal bit for bit.

Source: `ggml-common.h` and `ggml-quants.c` of the ggml project.
"""

import numpy as np

# The 16 steps of IQ4_NL and IQ4_XS, closer together near zero.
UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

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
    scales = _unpacked(blocks[:, 96:104], 8, _HALVES, 15) | _unpacked(blocks[:, 104:108], 4, _QUARTERS, 3) << 4
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
    """136 bytes: `d`, 2 of the upper two bits of the scales, 4 of their low halves, 128 of halves."""
    weights[:] = UNEVEN[_unpacked(blocks[:, 8:], 16, _HALVES, 15)]
    # Scales in the order of the weights: the low half of a byte before its high half, the lowest two bits first.
    scales = _unpacked(blocks[:, 4:8], 1, _HALVES, 15) | _unpacked(blocks[:, 2:4], 1, _QUARTERS, 3) << 4
    _scale(weights, float16(blocks[:, :2]) * (scales.astype(np.float32) - 32))


def _unpacked(data: np.ndarray, run: int, shifts: np.ndarray, mask: int) -> np.ndarray:
    """Pieces of bytes as numbers, uint8 `[blocks, numbers]`: of each `run` bytes first the lowest pieces, then the next."""
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

    The first four of each are the low 6 bits of four bytes; of the others those bytes hold the upper 2 bits, and the last
    four bytes the low 4 (scales in the low half, offsets in the high one).
    """
    first, second, lows = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, lows & 15 | first >> 2 & 48], axis=1)
    offsets = np.concatenate([second & 63, lows >> 4 | second >> 2 & 48], axis=1)
    _scale(weights, float16(blocks[:, :2]) * scales)
    _offset(weights, float16(blocks[:, 2:4]) * offsets)

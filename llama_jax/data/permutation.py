"""A seeded permutation that is computed, not stored: the order in which windows are read.

A balanced Feistel network is a bijection on 2^k numbers, whatever its round function; walking its cycles until a
number below `count` comes up makes it one on `count` numbers (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). Integer arithmetic only, so the order is the same on every machine and with every version of numpy. It is
part of a run's identity: changing it changes what a resumed training reads.
"""

import hashlib

import numpy as np

_ROUNDS = 8


def permute(indices: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `indices` under the permutation of `0 .. count - 1` that belongs to `seed` and `epoch`.

    Args:
      indices: integers from 0 to `count - 1`, one axis.
      count: how many numbers are permuted.
      seed: of the run.
      epoch: number of the pass over the data, from 0.

    Returns:
      int64, the shape of `indices`.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch)
    images = _feistel(indices.astype(np.uint64), half, keys)
    outside = np.flatnonzero(images >= count)
    while outside.size:
        images[outside] = _feistel(images[outside], half, keys)
        outside = outside[images[outside] >= count]
    return images.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"llama_jax order 1: {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit in reaches every bit out, modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

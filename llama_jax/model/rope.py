"""Rotary position embedding (arXiv:2104.09864), in the half layout: channel `i` of a head turns
with channel `i + H/2`.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float, Int
from llama_jax.config import LlamaConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosines and sines of the angles, one per position and channel pair (`R = H / 2` pairs)."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


def _stretch(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Frequencies after scaling: divided as a whole (`linear`) or for long wavelengths only
    (`llama3`).
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high, context = (
        float(x or 0)
        for x in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
    )
    wavelength = 2 * np.pi / frequencies
    # 0 where the wavelength is longer than context/low (divide), 1 where shorter than context/high
    # (keep), linear between.
    keep = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle by which each channel pair turns from one position to the next, radians, `[H/2]`
    float32.

    `theta^(-2i/H)`, scaled as the config says. Source for `llama3`: arXiv:2407.21783 and Meta's
    llama-models, models/llama3/model.py, with the factor taken from the config (it is 32 for Llama
    3.2, not 8).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def rotation(positions: Int[Array, "B T"], config: LlamaConfig) -> Rotation:
    """The rotation of each position, angles in float32."""
    angles = positions[:, :, None].astype(jnp.float32) * inverse_frequencies(config)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _rotate_half(head_dim: int, dtype: DTypeLike) -> Float[Array, "H H"]:
    """The matrix of a turn of every pair by 90 degrees: `x @ it` is `(-second, first)` of each
    pair, without rounding.
    """
    half = head_dim // 2
    matrix = np.zeros((head_dim, head_dim), np.float32)
    matrix[np.arange(half) + half, np.arange(half)] = -1
    matrix[np.arange(half), np.arange(half) + half] = 1
    return jnp.asarray(matrix, dtype)


def _by_halves(
    x: Float[Array, "B T n H"], turn: Rotation, heads: int = 2
) -> Float[Array, "B T n H"]:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (jnp.expand_dims(part, heads) for part in turn)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _by_matmul(
    x: Float[Array, "B T n H"], turn: Rotation, heads: int = 2
) -> Float[Array, "B T n H"]:
    """The same without arrays of half a head, which fill half of a TPU's lanes, and which CPUs are
    slow to put together.
    """
    matrix = _rotate_half(x.shape[-1], x.dtype)
    precision = (
        lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    )  # or a TPU would round `x` to bfloat16
    turned = jnp.dot(x, matrix, preferred_element_type=jnp.float32, precision=precision)
    cos, sin = (jnp.expand_dims(jnp.concatenate([part, part], axis=-1), heads) for part in turn)
    return x.astype(jnp.float32) * cos + turned * sin


def rotate(x: Float[Array, "B T n H"], turn: Rotation, heads: int = 2) -> Float[Array, "B T n H"]:
    """Turns the heads of queries or keys to their positions; computed in float32, returned in the
    dtype of `x`.

    Args:
      x: queries or keys.
      turn: the rotation of each position.
      heads: the axis of `x` that has the heads: 2, or 1 for `[B, n, T, H]`.
    """
    if x.shape[3 - heads] == 1:
        return _by_halves(x, turn, heads).astype(x.dtype)
    halves, product = (functools.partial(form, heads=heads) for form in (_by_halves, _by_matmul))
    return lax.platform_dependent(x, turn, cuda=halves, rocm=halves, default=product).astype(
        x.dtype
    )

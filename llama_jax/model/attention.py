"""One attention call for training and decoding, multi-head and grouped-query, and the table of its
backends.

All arrays have heads before length, so that the products are batched matrix products without
copies. A backend computes exactly what `reference` computes or is not in the table: no mask is ever
dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float, Num
from llama_jax.errors import InputError
from llama_jax.model.blockwise import blockwise_attention
from llama_jax.model.cudnn import fits_cudnn
from llama_jax.model.mask import NO_MASK, Mask, require_complete, visible
from llama_jax.model.splash import fits_splash


class Scales(NamedTuple):
    """Scales of integer keys and values, as in `llama_jax.model.cache.LayerCache`."""

    keys: Float[Array, "B K S"]
    values: Float[Array, "B K S"]


def reference_attention(
    q: Float[Array, "B N T H"],
    k: Num[Array, "B K S H"],
    v: Num[Array, "B K S H"],
    mask: Mask,
    causal: bool,
    scales: Scales | None = None,
) -> Float[Array, "B N T H"]:
    """softmax(q k^T / sqrt(H)) v with all scores in memory, scores and softmax in float32. A query
    that sees no key gets 0.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    k, v = (
        (k, v) if scales is None else (k.astype(q.dtype), v.astype(q.dtype))
    )  # integers: exact in any float type
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
    scores = (
        jnp.einsum("bkqh,bksh->bkqs", grouped, k, preferred_element_type=jnp.float32)
        * head_dim**-0.5
    )
    scores = scores if scales is None else scores * scales.keys[:, :, None]
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    seen = visible(mask, causal, batch, queries, keys)[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0)), 0.0)
    weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * queries, keys)
    weights = weights if scales is None else weights * scales.values[:, :, None]
    out = jnp.einsum(
        "bkqs,bksh->bkqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype).reshape(q.shape)


def in_float(k: Array, v: Array, scales: Scales | None, dtype: DTypeLike) -> tuple[Array, Array]:
    """Keys and values as floats: as they are without scales, integers times their scale with
    them.
    """
    if scales is None:
        return k, v
    return k.astype(dtype) * scales.keys[..., None].astype(dtype), v.astype(dtype) * scales.values[
        ..., None
    ].astype(dtype)


def _blockwise(
    q: Array, k: Array, v: Array, mask: Mask, causal: bool, scales: Scales | None = None
) -> Array:
    # Many queries share the keys, so writing out those of one layer is a small part of the work.
    return blockwise_attention(q, *in_float(k, v, scales, q.dtype), mask, causal)


BACKENDS: dict[str, Callable[..., Array]] = {
    "reference": reference_attention,
    "blockwise": _blockwise,
}

# Up to this many scores a head, one block of scores is smaller than the state of a blockwise pass.
_FEW_SCORES = 512 * 512


# Backends for one kind of device and for plain self-attention; see `model.context_parallel`.
KERNELS = ("splash", "cudnn")


def choose_backend(
    name: str,
    queries: int,
    keys: int,
    platform: str = "",
    head_dim: int = 0,
    parts: int = 1,
    dtype: str = "float32",
) -> str:
    """The backend that a name stands for.

    `auto` is, for whole sequences, `splash` on TPUs and `cudnn` on GPUs where these kernels take
    them; else `reference` for few scores (decoding, short sequences) and `blockwise` for many.
    Kernels and `blockwise` have no forward-mode derivative (`jax.jvp`): name `reference` for one.

    Args:
      name: `auto` or a backend.
      queries: of a sequence.
      keys: that they see.
      platform: `tpu` or `gpu` where sequences see themselves.
      head_dim: width of a head, for the same.
      parts: devices that share a sequence, for the same.
      dtype: of queries, keys and values, for the same.

    Raises:
      InputError: for an unknown name.
    """
    if name == "auto" and platform == "tpu" and fits_splash(queries, head_dim, parts):
        return "splash"
    if name == "auto" and platform == "gpu" and fits_cudnn(head_dim, dtype, parts, queries):
        return "cudnn"
    if name == "auto":
        return "reference" if queries * keys <= _FEW_SCORES else "blockwise"
    if name not in (*BACKENDS, *KERNELS):
        raise InputError(
            f"attention backend {name!r} is unknown; auto, "
            f"{', '.join((*BACKENDS, *KERNELS))} expected"
        )
    return name


def attend(
    q: Float[Array, "B N T H"],
    k: Num[Array, "B K S H"],
    v: Num[Array, "B K S H"],
    mask: Mask = NO_MASK,
    causal: bool = True,
    backend: str = "auto",
    scales: Scales | None = None,
) -> Float[Array, "B N T H"]:
    """Attention of every query over the keys it may see; `N` is a multiple of `K` (grouped
    queries).

    With `scales`, keys and values are integers, each head's vector times its scale.

    Raises:
      InputError: for an unknown backend or one of `KERNELS`, a document mask with other keys than
        the queries' own of which it does not say the documents, and for positions beside a start.
    """
    queries, keys = q.shape[2], k.shape[2]
    require_complete(mask, queries, keys)
    backend = choose_backend(backend, queries, keys)
    if backend in KERNELS:
        raise InputError(
            f"attention backend {backend} given for one call; an option of the model "
            "(`ModelOptions.attention`) expected"
        )
    return BACKENDS[backend](q, k, v, mask, causal, scales)

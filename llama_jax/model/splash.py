"""Flash attention on TPUs by the kernel `splash_attention` of `jax.experimental.pallas`, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.axes import Array, Float, Int
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import Rules, fitting_spec

_LARGEST_BLOCK = 2048  # rows of a block; small ones (128 is the kernel's default) leave most of the matrix unit idle
_LANES = 128


def fits_splash(length: int, head_dim: int) -> bool:
    """Whether the kernel takes rows of so many tokens and heads of that width."""
    return length % _LANES == 0 and head_dim % 64 == 0


def _block(length: int) -> int:
    """The largest block that divides a row."""
    return max(block for block in range(_LANES, min(length, _LARGEST_BLOCK) + 1, _LANES) if length % block == 0)


def _kernel(heads: int, length: int, interpret: bool) -> Any:
    """Causal attention of one row: q `[N, T, H]`, already scaled, k and v `[K, T, H]`; output and its logsumexp are `context`."""
    # Imported here: it takes a second, and only programs for TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = _block(length)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="context",
        interpret=interpret,
    )


def _rows(interpret: bool, q: Array, k: Array, v: Array, documents: Array | None) -> Array:
    """Attention of the rows and heads of one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    kernel = _kernel(q.shape[1], q.shape[2], interpret)
    if documents is None:
        return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    return jax.vmap(lambda q, k, v, row: kernel(q, k, v, SegmentIds(row, row)))(q, k, v, documents)


def splash_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    documents: Int[Array, "B T"] | None,
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Causal attention of rows over themselves; rows and heads are split over the mesh as the rules say.

    Args:
      q: queries, already divided by sqrt(H): the kernel does not.
      k: keys.
      v: values.
      documents: document numbers of packed rows.
      rules: axis name -> mesh axes.
      interpret: run the kernel's program step by step on any device, for tests.

    Raises:
      InputError: for a length or a head width that the kernel does not take.
    """
    if not fits_splash(q.shape[2], q.shape[3]):
        raise InputError(
            f"attention splash: {q.shape[2]} tokens a row and heads of {q.shape[3]} given; multiples of {_LANES} and 64 expected"
        )
    work = functools.partial(_rows, interpret)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return work(q, k, v, documents)
    heads = fitting_spec(("batch", "heads"), q.shape[:2], rules)
    kv_heads = fitting_spec(("batch", "kv_heads"), k.shape[:2], rules)
    rows = None if documents is None else PartitionSpec(heads[0])
    # The compiler cannot split a kernel: each device is told its part.
    return jax.shard_map(work, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False)(q, k, v, documents)

"""Flash attention on TPUs by the kernel `splash_attention` of `jax.experimental.pallas`, forward
and backward.

A compiler cannot split a kernel, so on a mesh every device gets its own sequences, heads and
tokens. Devices that share sequences gather all keys, put them into the order of the sequence, and
run the kernel over their own queries with their own part of the mask.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.axes import Array, Float, Int
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import (
    Rules,
    balanced_positions,
    fitting_spec,
    partition_spec,
    parts_of,
    require_divisible,
)

# sequences of a block; small ones (128 is the kernel's default) leave most of the matrix unit idle
_LARGEST_BLOCK = 2048
_LANES = 128
_BLOCKS = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
)


def fits_splash(length: int, head_dim: int, parts: int = 1) -> bool:
    """Whether the kernel takes sequences of this length, cut into this many parts, and heads of
    that width.
    """
    return length % (2 * parts * _LANES if parts > 1 else _LANES) == 0 and head_dim % 64 == 0


def _block(length: int) -> int:
    """The largest block that divides a number of tokens."""
    return max(
        block
        for block in range(_LANES, min(length, _LARGEST_BLOCK) + 1, _LANES)
        if length % block == 0
    )


def _kernel(heads: int, length: int, parts: int, interpret: bool) -> Any:
    """Causal attention of one sequence: q `[N, T, H]`, k, already scaled, and v `[K, T, H]`; output
    and its logsumexp are `context`.

    Args:
      heads: of one device.
      length: tokens of a sequence.
      parts: devices that share a sequence; their queries are in the order of `balanced_positions`.
      interpret: run the kernel's program step by step on any device.
    """
    # Imported here: it takes a second, and only programs for TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    mask = splash_attention_mask.CausalMask((length, length), shard_count=parts)
    if parts > 1:
        mask.q_sequence = balanced_positions(length, parts)
    block = _block(length // (2 * parts) if parts > 1 else length)
    sizes: dict[str, Any] = dict.fromkeys(_BLOCKS, block)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name="context",
        interpret=interpret,
    )


def _sequences(
    kernel: Any, q: Array, k: Array, v: Array, documents: Array | None, key_documents: Array | None
) -> Array:
    """Attention of the sequences and heads of one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    if documents is None:
        return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    return jax.vmap(lambda q, k, v, own, theirs: kernel(q, k, v, SegmentIds(own, theirs)))(
        q, k, v, documents, key_documents
    )


def _over_whole_sequences(
    kernel: Any, q: Array, k: Array, v: Array, documents: Array | None = None
) -> Array:
    return _sequences(kernel, q, k, v, documents, documents)


def _over_gathered(
    axes: tuple[str, ...],
    order: Any,
    kernel: Any,
    q: Array,
    k: Array,
    v: Array,
    documents: Array | None = None,
) -> Array:
    """The device's own queries over the keys of all, in the order of their sequence."""

    def whole(x: Array, axis: int) -> Array:
        """All devices' parts, in the order of the sequence."""
        return lax.all_gather(x, axes, axis=axis, tiled=True).take(order, axis=axis)

    return _sequences(
        kernel,
        q,
        whole(k, 2),
        whole(v, 2),
        documents,
        None if documents is None else whole(documents, 1),
    )


def splash_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    documents: Int[Array, "B T"] | None,
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Causal attention of sequences over themselves, split over the mesh set by `jax.set_mesh` as
    the rules say.

    Args:
      q: queries; where the mesh cuts sequences, they and all else are in the order of
        `balanced_positions`.
      k: keys.
      v: values.
      documents: document numbers of packed sequences.
      rules: axis name -> mesh axes.
      interpret: run the kernel's program step by step on any device, for tests.

    Raises:
      InputError: for a length or a head width that the kernel does not take.
    """
    parts = parts_of("length", rules)
    (batch, heads, length, head_dim), tokens = q.shape, () if documents is None else (documents,)
    if not fits_splash(length, head_dim, parts):
        raise InputError(
            f"attention splash: {length} tokens a sequence in {parts} parts and heads of "
            f"{head_dim} given; "
            f"a multiple of {2 * parts * _LANES if parts > 1 else _LANES} and of 64 expected"
        )
    k = k * head_dim**-0.5  # not the queries: there are several times as many
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return _over_whole_sequences(_kernel(heads, length, 1, interpret), q, k, v, *tokens)
    for axis, size in (("heads", heads), ("kv_heads", k.shape[1])):
        require_divisible(axis, size, parts_of(axis, rules))
    kernel = _kernel(heads // parts_of("heads", rules), length, parts, interpret)
    over_length = partition_spec(("length",), rules)[0]
    sequence = fitting_spec(("batch",), (batch,), rules)[0]
    q_spec = PartitionSpec(sequence, *partition_spec(("heads",), rules), over_length)
    k_spec = PartitionSpec(sequence, *partition_spec(("kv_heads",), rules), over_length)
    work = _over_whole_sequences
    if parts > 1:
        order = np.argsort(balanced_positions(length, parts))
        work = functools.partial(_over_gathered, dict(rules)["length"], order)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, over_length)))
    specs = (
        kernel_spec,
        q_spec,
        k_spec,
        k_spec,
        *(PartitionSpec(sequence, over_length) for _ in tokens),
    )
    return jax.shard_map(work, in_specs=specs, out_specs=q_spec, check_vma=False)(
        kernel, q, k, v, *tokens
    )

"""Flash attention on NVIDIA GPUs by cuDNN, forward and backward, sequences of packed documents
included.

The public call of JAX takes whole sequences, or a mask, which makes the kernel slow. Documents as
ranges of a sequence are fast, and are what JAX's own module of the kernel takes. Its rules of
differentiation are called here, so that rematerialisation can keep the statistics of the softmax
and need not run the kernel again. What the rules ask for is looked up by name, and a JAX whose
rules ask for anything unknown counts as one without cuDNN.

How many documents a sequence may have is fixed when the kernel is compiled. Rows with more, or with
a document in two places, are found while the program runs and take the slower way in blocks, as
  sequences of one document take the faster one: the result is the
same. GPUs before Hopper have the kernel for whole sequences alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llama_jax.axes import Array, Float, Int
from llama_jax.errors import InputError
from llama_jax.model.blockwise import blockwise_attention
from llama_jax.model.mask import Mask
from llama_jax.parallel.sharding import (
    Rules,
    fitting_spec,
    partition_spec,
    parts_of,
    require_divisible,
)

# Rows of documents that are shorter on average go the slower way. The statistics of the softmax
# grow with the number of documents: T * T / 128 numbers a sequence and head.
_TOKENS_A_DOCUMENT = 128
_WIDEST_HEAD = 128  # up to 256 on some GPUs, 128 on all


class Documents(NamedTuple):
    """Documents of packed sequences as ranges, in the form that the kernel takes; -1 behind the
    last one of a sequence.

    Attributes:
      lengths: tokens of each.
      offsets: first token of each.
      way: 0 if every sequence is one document, 1 if the ranges say all, 2 if not: more than `M`
        documents in a row, or one of them in two places.
    """

    lengths: Int[Array, "B M"]
    offsets: Int[Array, "B M1"]
    way: Int[Array, ""]


def ranges(documents: Int[Array, "B T"], most: int) -> Documents:
    """The ranges of equal document numbers, up to `most` a sequence; padding is a document like
    others.
    """
    length = documents.shape[1]
    changes = documents[:, 1:] != documents[:, :-1]
    begins = jnp.concatenate([jnp.ones_like(changes[:, :1]), changes], axis=1)
    offsets = jax.vmap(lambda sequence: jnp.nonzero(sequence, size=most + 1, fill_value=-1)[0])(
        begins
    ).astype(jnp.int32)
    ends = jnp.where(offsets[:, 1:] < 0, length, offsets[:, 1:])
    lengths = jnp.where(offsets[:, :-1] < 0, -1, ends - offsets[:, :-1])
    ordered = jnp.sort(documents, axis=1)
    different = 1 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1)
    count = jnp.sum(begins, axis=1)
    fit = jnp.all((count == different) & (count <= most))
    way = jnp.where(jnp.all(count == 1), 0, jnp.where(fit, 1, 2))
    return Documents(lengths, offsets.at[:, -1].set(-1), way)


class Kernel(NamedTuple):
    """JAX's rules of differentiation of the kernel, and what their arguments are called."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arrays: tuple[str, ...]  # arguments before the static ones; the rules keep them in this order
    static: dict[str, Any]
    packs: bool  # whether the GPU has the form for packed sequences: from compute capability 9.0 on


@functools.cache
def _kernel() -> Kernel | None:
    """The kernel's rules; `None` without cuDNN or with a JAX whose rules are others."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        version = cudnn.check_cudnn_version()
        forward, backward = (
            cudnn._dot_product_attention_fwd_rule,
            cudnn._dot_product_attention_bwd_rule,
        )
        layout = cudnn.AttentionLayout.BTNH.value
        takes, packs = cudnn.check_compute_capability("8.0"), cudnn.check_compute_capability("9.0")
    except (ImportError, AttributeError, RuntimeError):
        return None
    static = {
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "layout": layout,
        "sliding_window_length": None,
        "cudnn_version": version,
        "is_training": True,
        "return_residual": False,
        "score_mod": None,
    }
    given = {"query", "key", "value", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"}
    empty = {"bias", "page_table_k", "page_table_v", "score_mod_args"}
    names = tuple(inspect.signature(forward).parameters)
    arrays = tuple(name for name in names if name in given | empty)
    others = set(names[len(arrays) :]) | set(inspect.signature(backward).parameters) - {
        "res",
        "grad_output",
    }
    known = (
        names[: len(arrays)] == arrays
        and given <= set(arrays)
        and others <= {*static, "scale", "mask_type"}
    )
    return Kernel(forward, backward, arrays, static, packs) if known and takes else None


def _arguments(
    kernel: Kernel, q: Array, k: Array, v: Array, documents: Documents | None
) -> dict[str, Any]:
    """All arguments of the kernel's rules by name; a JAX that has no use for one does not get
    it.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    nothing = jnp.zeros(0, q.dtype)
    lengths, offsets = (
        (nothing, nothing) if documents is None else (documents.lengths, documents.offsets)
    )
    return {
        **kernel.static,
        "query": q,
        "key": k,
        "value": v,
        "bias": nothing,
        "page_table_k": nothing,
        "page_table_v": nothing,
        "q_seqlen": lengths,
        "kv_seqlen": lengths,
        "q_offsets": offsets,
        "kv_offsets": offsets,
        "score_mod_args": (),
        "scale": q.shape[-1] ** -0.5,
        "mask_type": MaskType.CAUSAL if documents is None else MaskType.PADDING_CAUSAL,
    }


def _run(rule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return rule(**{name: arguments[name] for name in inspect.signature(rule).parameters})


def _forward(q: Array, k: Array, v: Array, documents: Documents | None) -> tuple[Array, Array]:
    """Output and the statistics of its softmax, by the kernel."""
    kernel = _kernel()
    assert kernel is not None, "cuDNN was chosen where it is not"
    out, saved = _run(kernel.forward, _arguments(kernel, q, k, v, documents))
    return out, saved[-2]


def _backward(
    q: Array,
    k: Array,
    v: Array,
    documents: Documents | None,
    out: Array,
    statistics: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, by the kernel."""
    kernel = _kernel()
    assert kernel is not None, "cuDNN was chosen where it is not"
    arguments = _arguments(kernel, q, k, v, documents)
    saved = (*(arguments[name] for name in kernel.arrays), statistics, out)
    dq, dk, dv, *_ = _run(kernel.backward, {**arguments, "res": saved, "grad_output": d_out})
    return dq, dk, dv


def _one_of(documents: Documents, whole: Callable, packed: Callable, blocks: Callable) -> Any:
    """What the way of these documents gives, on GPUs without the form for packed sequences too."""
    kernel = _kernel()
    if kernel is not None and kernel.packs:
        return lax.switch(documents.way, (whole, packed, blocks))
    return lax.cond(documents.way == 0, whole, blocks)


def _in_blocks(q: Array, k: Array, v: Array, numbers: Array | None) -> Array:
    """The same without cuDNN, `[B, T, n, H]` in and out."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return blockwise_attention(q, k, v, Mask(documents=numbers), True).swapaxes(1, 2)


@jax.custom_vjp
def _attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    numbers: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of whole sequences, or of the documents in them."""
    return _attention_forward(q, k, v, numbers)[0]


def _attention_forward(q: Array, k: Array, v: Array, numbers: Array | None) -> tuple[Array, tuple]:
    batch, length, heads, _ = q.shape
    if numbers is None:
        out, *kept = _forward(q, k, v, None)
        documents = None
    else:
        documents = ranges(numbers, max(2, length // _TOKENS_A_DOCUMENT))
        empty = [
            jnp.zeros((sequences, heads, length), jnp.float32)
            for sequences in (batch, documents.lengths.size)
        ]

        def whole() -> list[Array]:
            """Rows of one document."""
            return [*_forward(q, k, v, None), empty[1]]

        def packed() -> list[Array]:
            """Rows of several."""
            out, statistics = _forward(q, k, v, documents)
            return [out, empty[0], statistics]

        def blocks() -> list[Array]:
            """Rows that the kernel does not take."""
            return [_in_blocks(q, k, v, numbers), *empty]

        out, *kept = _one_of(documents, whole, packed, blocks)
    out, *kept = (checkpoint_name(x, "context") for x in (out, *kept))
    return out, (q, k, v, numbers, documents, out, kept)


def _attention_backward(saved: tuple, d_out: Array) -> tuple:
    q, k, v, numbers, documents, out, kept = saved
    if documents is None:
        return (*_backward(q, k, v, None, out, kept[0], d_out), None)
    ways = (
        lambda: _backward(q, k, v, None, out, kept[0], d_out),
        lambda: _backward(q, k, v, documents, out, kept[1], d_out),
        lambda: jax.vjp(functools.partial(_in_blocks, numbers=numbers), q, k, v)[1](d_out),
    )
    return (*_one_of(documents, *ways), None)


_attention.defvjp(_attention_forward, _attention_backward)


def fits_cudnn(head_dim: int, dtype: str, parts: int = 1, length: int = 2) -> bool:
    """Whether the kernel is there and takes heads of that width, numbers of that type and sequences
    of that length.

    It takes no odd lengths and no sequences on several devices.
    """
    sizes = parts == 1 and length % 2 == 0 and head_dim % 8 == 0 and head_dim <= _WIDEST_HEAD
    return sizes and dtype in ("bfloat16", "float16") and bool(_kernel())


def cudnn_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    documents: Int[Array, "B T"] | None,
    rules: Rules,
) -> Float[Array, "B N T H"]:
    """Causal attention of sequences over themselves, split over the mesh set by `jax.set_mesh` as
    the rules say.

    Args:
      q: queries.
      k: keys.
      v: values.
      documents: document numbers of packed sequences.
      rules: axis name -> mesh axes.

    Raises:
      InputError: for types, heads or devices that the kernel does not take.
    """
    parts = parts_of("length", rules)
    if not fits_cudnn(q.shape[-1], q.dtype.name, parts, q.shape[2]):
        raise InputError(
            f"attention cudnn: heads of {q.shape[-1]} in {q.dtype.name} on {parts} "
            f"device(s) a sequence given, {q.shape[2]} tokens; "
            f"bfloat16 or float16, heads of {_WIDEST_HEAD} or less, a multiple of 8, "
            "whole sequences of an even length and a GPU "
            "with cuDNN expected (auto suits all)"
        )
    # The kernel wants tokens before heads, as the products before it leave them: these transposes
    # cancel.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    tokens = () if documents is None else (documents,)

    def local(q: Array, k: Array, v: Array, documents: Array | None = None) -> Array:
        """What one device does."""
        return _attention(q, k, v, documents)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        for axis, size in (("heads", q.shape[2]), ("kv_heads", k.shape[2])):
            require_divisible(axis, size, parts_of(axis, rules))
        sequence = fitting_spec(("batch",), q.shape[:1], rules)[0]
        q_spec = PartitionSpec(sequence, None, *partition_spec(("heads",), rules))
        k_spec = PartitionSpec(sequence, None, *partition_spec(("kv_heads",), rules))
        specs = (q_spec, k_spec, k_spec, *(PartitionSpec(sequence) for _ in tokens))
        local = jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)
    return local(q, k, v, *tokens).swapaxes(1, 2)

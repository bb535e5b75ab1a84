"""Memory-efficient attention (arXiv:2112.05682, arXiv:2205.14135) in plain XLA, with its own backward pass.

Scores exist for one block of queries and keys at a time; a running maximum and sum make the softmax exact. Forward keeps
the output and one logsumexp per query; backward forms the scores again. Memory grows linearly with the length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.axes import Array, Bool, Float, Int, Num

# Rows of one block. Larger blocks mean fewer loop turns, smaller ones less memory and less work thrown away at the diagonal.
BLOCK = 256
_HIDDEN = -1e30  # finite, so that a block without a visible key gives exp(0) times a zero mask instead of NaN


class _Blocks(NamedTuple):
    """What the mask of one block needs: shapes are those of the padded arrays cut into blocks."""

    start: Int[Array, " B"]
    lengths: Int[Array, " B"]
    documents: Int[Array, "blocks B C"] | None
    causal: bool
    size: int

    def visible(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B C E"]:
        """Whether the queries of block `i` see the keys of block `j`."""
        slots = (j * self.size + jnp.arange(self.size))[None, None, :]
        seen = jnp.broadcast_to(slots < self.lengths[:, None, None], (self.start.shape[0], self.size, self.size))
        if self.causal:
            positions = self.start[:, None] + i * self.size + jnp.arange(self.size)
            seen &= slots <= positions[:, :, None]
        if self.documents is not None:
            seen &= self.documents[i][:, :, None] == self.documents[j][:, None, :]
        return seen

    def key_blocks(self, i: Int[Array, ""], blocks: int) -> Int[Array, ""]:
        """How many leading key blocks the queries of block `i` need."""
        needed = jnp.max(self.lengths)
        if self.causal:
            needed = jnp.minimum(needed, jnp.max(self.start) + (i + 1) * self.size)
        return jnp.minimum(blocks, (needed + self.size - 1) // self.size)

    def first_query_block(self, j: Int[Array, ""]) -> Int[Array, ""]:
        """The first query block that needs key block `j`."""
        if not self.causal:
            return jnp.zeros((), jnp.int32)
        return jnp.maximum(0, (j * self.size - jnp.max(self.start)) // self.size)


def _cut(x: Num[Array, "B n T H"], size: int) -> Num[Array, "blocks B n C H"]:
    """Pads the length to whole blocks and brings the blocks to the front."""
    batch, heads, length, head_dim = x.shape
    blocks = -(-length // size)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * size - length), (0, 0)))
    return padded.reshape(batch, heads, blocks, size, head_dim).transpose(2, 0, 1, 3, 4)


def _join(blocks: Float[Array, "blocks B n C H"], length: int) -> Float[Array, "B n T H"]:
    """The inverse of `_cut`."""
    count, batch, heads, size, head_dim = blocks.shape
    return blocks.transpose(1, 2, 0, 3, 4).reshape(batch, heads, count * size, head_dim)[:, :, :length]


def _fold(q: Float[Array, "blocks B N C H"], kv_heads: int) -> Float[Array, "blocks B K G C H"]:
    """Queries grouped by the key/value head they share."""
    blocks, batch, heads, size, head_dim = q.shape
    return q.reshape(blocks, batch, kv_heads, heads // kv_heads, size, head_dim)


def _unfold(q: Float[Array, "blocks B K G C H"]) -> Float[Array, "blocks B N C H"]:
    """The inverse of `_fold`."""
    return q.reshape(q.shape[0], q.shape[1], -1, *q.shape[4:])


def _scores(q: Array, k: Array, seen: Array) -> Float[Array, "B K G C E"]:
    """Scaled scores of one block in float32, hidden ones at a large negative number."""
    scores = jnp.einsum("bkgch,bkeh->bkgce", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], scores, _HIDDEN)


def _forward(q: Array, k: Array, v: Array, blocks: _Blocks) -> tuple[Float[Array, "n B K G C H"], Float[Array, "n B K G C"]]:
    """Output and logsumexp of every query; q [blocks B K G C H], k and v [blocks B K C H]."""

    def query_block(i: Array) -> tuple[Array, Array]:
        """All keys that the queries of block `i` see, block by block."""

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds key block `j` to the running maximum, sum and output."""
            peak, total, out = carry
            seen = blocks.visible(i, j)
            scores = _scores(q[i], k[j], seen)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(seen[:, None, None], jnp.exp(scores - new_peak[..., None]), 0.0)
            shrink = jnp.exp(peak - new_peak)
            part = jnp.einsum("bkgce,bkeh->bkgch", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + part

        rows = q.shape[1:-1]
        nothing = (jnp.full(rows, _HIDDEN), jnp.zeros(rows), jnp.zeros(q.shape[1:]))
        peak, total, out = lax.fori_loop(0, blocks.key_blocks(i, k.shape[0]), key_block, nothing)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    return lax.map(query_block, jnp.arange(q.shape[0]))


def _backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, blocks: _Blocks
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v (float32), block by block: keys outside, queries inside, dq carried along."""
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # sum of weight * d_weight, per query

    def key_block(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        """Gradients of key block `j`; those of the queries that see it are added to `dq`."""

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds what query block `i` contributes."""
            dq, dk, dv = carry
            seen = blocks.visible(i, j)
            weights = jnp.where(seen[:, None, None], jnp.exp(_scores(q[i], k[j], seen) - lse[i][..., None]), 0.0)
            dv += jnp.einsum("bkgce,bkgch->bkeh", weights.astype(q.dtype), d_out[i], preferred_element_type=jnp.float32)
            d_weights = jnp.einsum("bkgch,bkeh->bkgce", d_out[i], v[j], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - inner[i][..., None]) * scale).astype(q.dtype)
            dk += jnp.einsum("bkgce,bkgch->bkeh", d_scores, q[i], preferred_element_type=jnp.float32)
            return dq.at[i].add(jnp.einsum("bkgce,bkeh->bkgch", d_scores, k[j], preferred_element_type=jnp.float32)), dk, dv

        nothing = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk, dv = lax.fori_loop(blocks.first_query_block(j), q.shape[0], query_block, (dq, nothing, nothing))
        return dq, (dk, dv)

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[0]))
    return dq, dk, dv


def _prepare(q: Array, k: Array, v: Array, start: Array | None, lengths: Array | None, documents: Array | None,
             causal: bool, size: int) -> tuple[Array, Array, Array, _Blocks]:  # fmt: skip
    """Everything cut into blocks; padded keys lie beyond `lengths`, so no query sees them."""
    batch, keys = k.shape[0], k.shape[2]
    start = jnp.zeros((batch,), jnp.int32) if start is None else start
    lengths = jnp.full((batch,), keys, jnp.int32) if lengths is None else jnp.minimum(lengths, keys)
    if documents is not None:
        documents = _cut(documents[:, None, :, None], size)[:, :, 0, :, 0]
    folded = _fold(_cut(q, size), k.shape[1])
    return folded, _cut(k, size), _cut(v, size), _Blocks(start, lengths, documents, causal, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def chunked_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    start: Int[Array, " B"] | None,
    lengths: Int[Array, " B"] | None,
    documents: Int[Array, "B T"] | None,
    causal: bool,
    size: int = BLOCK,
) -> Float[Array, "B N T H"]:
    """Exact attention in blocks of `size` queries by `size` keys; the mask is that of `llama_jax.model.attention.Mask`.

    Blocks that no query can see (beyond the causal diagonal or every row's length) are not computed.
    """
    return _chunked_forward(q, k, v, start, lengths, documents, causal, size)[0]


def _chunked_forward(q: Array, k: Array, v: Array, start: Array | None, lengths: Array | None, documents: Array | None,
                     causal: bool, size: int) -> tuple[Array, tuple]:  # fmt: skip
    qb, kb, vb, blocks = _prepare(q, k, v, start, lengths, documents, causal, size)
    out, lse = _forward(qb, kb, vb, blocks)
    out = checkpoint_name(_join(_unfold(out), q.shape[2]), "context")
    return out, (q, k, v, start, lengths, documents, out, checkpoint_name(lse, "context"))


def _chunked_backward(causal: bool, size: int, saved: tuple, d_out: Array) -> tuple:
    q, k, v, start, lengths, documents, out, lse = saved
    qb, kb, vb, blocks = _prepare(q, k, v, start, lengths, documents, causal, size)
    out_blocks, d_blocks = (_fold(_cut(x, size), k.shape[1]) for x in (out, d_out))
    dq, dk, dv = _backward(qb, kb, vb, out_blocks, lse, d_blocks, blocks)
    dq, dk, dv = _join(_unfold(dq), q.shape[2]), _join(dk, k.shape[2]), _join(dv, k.shape[2])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


chunked_attention.defvjp(_chunked_forward, _chunked_backward)

"""Memory-efficient attention (arXiv:2112.05682, arXiv:2205.14135) in plain XLA, with its own
backward pass.

Scores exist for one block of queries and keys at a time; a running maximum and sum make the softmax
exact. Forward keeps the output and one logsumexp per query; backward forms the scores again. Memory
grows linearly with the length.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from llama_jax.axes import Array, Bool, Float, Int, Num
from llama_jax.model.mask import Mask

# Rows of one block. Larger blocks mean fewer loop turns, smaller ones less memory and less work
# thrown away at the diagonal.
BLOCK = 256
_Carry = TypeVar("_Carry")
HIDDEN = (
    -1e30
)  # finite, so that a block without a visible key gives exp(0) times a zero mask instead of NaN


class Blocks(NamedTuple):
    """What the mask of one block needs: shapes are those of the padded arrays cut into blocks.

    Documents and positions are those of `Mask`; a padded query stands before all keys, a padded key
    behind all queries and beyond `lengths`.
    """

    start: Int[Array, " B"]
    lengths: Int[Array, " B"]
    documents: Int[Array, "blocks B C"] | None
    causal: bool
    size: int
    key_documents: Int[Array, "blocks B C"] | None = None
    positions: Int[Array, "blocks C"] | None = None
    key_positions: Int[Array, "blocks C"] | None = None

    def visible(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B C E"]:
        """Whether the queries of block `i` see the keys of block `j`."""
        slots = (j * self.size + jnp.arange(self.size))[None, None, :]
        seen = jnp.broadcast_to(
            slots < self.lengths[:, None, None], (self.start.shape[0], self.size, self.size)
        )
        if self.causal and self.positions is not None and self.key_positions is not None:
            seen &= self.key_positions[j] <= self.positions[i][:, None]
        elif self.causal:
            positions = self.start[:, None] + i * self.size + jnp.arange(self.size)
            seen &= slots <= positions[:, :, None]
        if self.documents is not None and self.key_documents is not None:
            seen &= self.documents[i][:, :, None] == self.key_documents[j][:, None, :]
        return seen

    def unless_hidden(
        self, i: Array, j: Array, add: Callable[[_Carry], _Carry], carry: _Carry
    ) -> _Carry:
        """Adds the block to the carry, unless positions say that none of its queries sees any of
        its keys.
        """
        if not self.causal or self.positions is None or self.key_positions is None:
            return add(carry)
        return lax.cond(
            needed(self.positions[i], self.key_positions[j]),
            add,
            lambda unchanged: unchanged,
            carry,
        )

    def key_blocks(self, i: Int[Array, ""], blocks: int) -> Int[Array, ""]:
        """How many leading key blocks the queries of block `i` need."""
        wanted = jnp.max(self.lengths)
        if self.causal and self.positions is None:
            wanted = jnp.minimum(wanted, jnp.max(self.start) + (i + 1) * self.size)
        return jnp.minimum(blocks, (wanted + self.size - 1) // self.size)

    def first_query_block(self, j: Int[Array, ""]) -> Int[Array, ""]:
        """The first query block that needs key block `j`."""
        if not self.causal or self.positions is not None:
            return jnp.zeros((), jnp.int32)
        return jnp.maximum(0, (j * self.size - jnp.max(self.start)) // self.size)


def needed(positions: Int[Array, "*n C"], key_positions: Int[Array, "*n C"]) -> Bool[Array, "*n"]:
    """Whether any query of a causal block sees any of its keys, going by positions."""
    return jnp.max(positions, axis=-1) >= jnp.min(key_positions, axis=-1)


def cut(x: Num[Array, "B n T H"], size: int) -> Num[Array, "blocks B n C H"]:
    """Pads the length to whole blocks and brings the blocks to the front."""
    batch, heads, length, head_dim = x.shape
    blocks = -(-length // size)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * size - length), (0, 0)))
    return padded.reshape(batch, heads, blocks, size, head_dim).transpose(2, 0, 1, 3, 4)


def join(blocks: Float[Array, "blocks B n C H"], length: int) -> Float[Array, "B n T H"]:
    """The inverse of `cut`."""
    count, batch, heads, size, head_dim = blocks.shape
    return blocks.transpose(1, 2, 0, 3, 4).reshape(batch, heads, count * size, head_dim)[
        :, :, :length
    ]


def fold(q: Float[Array, "blocks B N C H"], kv_heads: int) -> Float[Array, "blocks B K G C H"]:
    """Queries grouped by the key/value head they share."""
    blocks, batch, heads, size, head_dim = q.shape
    return q.reshape(blocks, batch, kv_heads, heads // kv_heads, size, head_dim)


def unfold(q: Float[Array, "blocks B K G C H"]) -> Float[Array, "blocks B N C H"]:
    """The inverse of `fold`."""
    return q.reshape(q.shape[0], q.shape[1], -1, *q.shape[4:])


def _scores(q: Array, k: Array, seen: Array) -> Float[Array, "B K G C E"]:
    """Scaled scores of one block in float32, hidden ones at a large negative number."""
    scores = (
        jnp.einsum("bkgch,bkeh->bkgce", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    return jnp.where(seen[:, None, None], scores, HIDDEN)


_Running = tuple[Float[Array, "B K G C"], Float[Array, "B K G C"], Float[Array, "B K G C H"]]


def _add_keys(
    q: Array, k: Array, v: Array, blocks: Blocks, i: Array, j: Array, running: _Running
) -> _Running:
    """Adds key block `j` to the running maximum, sum and output of query block `i`, which is
    `q`.
    """
    peak, total, out = running
    seen = blocks.visible(i, j)
    scores = _scores(q, k[j], seen)
    new_peak = jnp.maximum(peak, scores.max(-1))
    weights = jnp.where(seen[:, None, None], jnp.exp(scores - new_peak[..., None]), 0.0)
    shrink = jnp.exp(peak - new_peak)
    part = jnp.einsum(
        "bkgce,bkeh->bkgch", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
    )
    return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + part


def forward(
    q: Array, k: Array, v: Array, blocks: Blocks, dtype: DTypeLike
) -> tuple[Float[Array, "n B K G C H"], Float[Array, "n B K G C"]]:
    """Output and logsumexp of every query over these keys; q [blocks B K G C H], k and v [blocks B
    K C H].
    """

    def query_block(i: Array) -> tuple[Array, Array]:
        """All keys that the queries of block `i` see, block by block."""

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds key block `j`, where any query sees it."""
            return blocks.unless_hidden(
                i, j, functools.partial(_add_keys, q[i], k, v, blocks, i, j), carry
            )

        sequences = q.shape[1:-1]
        nothing = (jnp.full(sequences, HIDDEN), jnp.zeros(sequences), jnp.zeros(q.shape[1:]))
        peak, total, out = lax.fori_loop(0, blocks.key_blocks(i, k.shape[0]), key_block, nothing)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (out / total[..., None]).astype(dtype), peak + jnp.log(total)

    return lax.map(query_block, jnp.arange(q.shape[0]))


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, blocks: Blocks
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v (float32), block by block: keys outside, queries inside, dq carried
    along.

    Output and logsumexp are those over all keys, of which `k` and `v` may be a part: then the
    gradient of `q` is one too.
    """
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(
        d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1
    )  # sum of weight * d_weight, per query

    def key_block(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        """Gradients of key block `j`; those of the queries that see it are added to `dq`."""

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds what query block `i` contributes, where it sees any key."""
            return blocks.unless_hidden(i, j, functools.partial(add, i), carry)

        def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds what query block `i` contributes."""
            dq, dk, dv = carry
            seen = blocks.visible(i, j)
            weights = jnp.where(
                seen[:, None, None], jnp.exp(_scores(q[i], k[j], seen) - lse[i][..., None]), 0.0
            )
            dv += jnp.einsum(
                "bkgce,bkgch->bkeh",
                weights.astype(q.dtype),
                d_out[i],
                preferred_element_type=jnp.float32,
            )
            d_weights = jnp.einsum(
                "bkgch,bkeh->bkgce", d_out[i], v[j], preferred_element_type=jnp.float32
            )
            d_scores = (weights * (d_weights - inner[i][..., None]) * scale).astype(q.dtype)
            dk += jnp.einsum(
                "bkgce,bkgch->bkeh", d_scores, q[i], preferred_element_type=jnp.float32
            )
            return (
                dq.at[i].add(
                    jnp.einsum(
                        "bkgce,bkeh->bkgch", d_scores, k[j], preferred_element_type=jnp.float32
                    )
                ),
                dk,
                dv,
            )

        nothing = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk, dv = lax.fori_loop(
            blocks.first_query_block(j), q.shape[0], query_block, (dq, nothing, nothing)
        )
        return dq, (dk, dv)

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[0]))
    return dq, dk, dv


def cut_tokens(x: Int[Array, "B T"] | None, size: int) -> Int[Array, "blocks B C"] | None:
    """`cut` of one number a token and sequence; `None` stays."""
    return None if x is None else cut(x[:, None, :, None], size)[:, :, 0, :, 0]


def cut_positions(
    x: Int[Array, " T"] | None, size: int, padding: int
) -> Int[Array, "blocks C"] | None:
    """Positions in blocks; `None` stays."""
    return (
        None
        if x is None
        else jnp.pad(x, (0, -len(x) % size), constant_values=padding).reshape(-1, size)
    )


def prepare(
    q: Array, k: Array, v: Array, mask: Mask, causal: bool, size: int
) -> tuple[Array, Array, Array, Blocks]:
    """Queries `[blocks B K G C H]`, keys and values `[blocks B K C H]`, and their mask; no query
    sees a padded key.
    """
    batch, keys = k.shape[0], k.shape[2]
    start = jnp.zeros((batch,), jnp.int32) if mask.start is None else mask.start
    lengths = (
        jnp.full((batch,), keys, jnp.int32)
        if mask.lengths is None
        else jnp.minimum(mask.lengths, keys)
    )
    documents = cut_tokens(mask.documents, size)
    key_documents = (
        documents if mask.key_documents is None else cut_tokens(mask.key_documents, size)
    )
    positions = cut_positions(mask.positions, size, -1)
    key_positions = cut_positions(mask.key_positions, size, jnp.iinfo(jnp.int32).max)
    blocks = Blocks(
        start, lengths, documents, causal, size, key_documents, positions, key_positions
    )
    return fold(cut(q, size), k.shape[1]), cut(k, size), cut(v, size), blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    causal: bool,
    size: int = BLOCK,
) -> Float[Array, "B N T H"]:
    """Exact attention in blocks of `size` queries by `size` keys.

    Blocks that no query can see (beyond the causal diagonal or every sequence's length) are not
    computed.
    """
    return _blockwise_forward(q, k, v, mask, causal, size)[0]


def _blockwise_forward(
    q: Array, k: Array, v: Array, mask: Mask, causal: bool, size: int
) -> tuple[Array, tuple]:
    out, lse = forward(*prepare(q, k, v, mask, causal, size), q.dtype)
    out = checkpoint_name(join(unfold(out), q.shape[2]), "context")
    return out, (q, k, v, mask, out, checkpoint_name(lse, "context"))


def _blockwise_backward(causal: bool, size: int, saved: tuple, d_out: Array) -> tuple:
    q, k, v, mask, out, lse = saved
    qb, kb, vb, blocks = prepare(q, k, v, mask, causal, size)
    out_blocks, d_blocks = (fold(cut(x, size), k.shape[1]) for x in (out, d_out))
    dq, dk, dv = backward(qb, kb, vb, out_blocks, lse, d_blocks, blocks)
    dq, dk, dv = join(unfold(dq), q.shape[2]), join(dk, k.shape[2]), join(dv, k.shape[2])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)

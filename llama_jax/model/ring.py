"""Ring attention (arXiv:2310.01889): keys and values go round the devices that share a row, queries stay where they are.

A device computes with one block of keys while the next one is on its way, and merges what each block gives by logsumexps.
Backward goes round once more, and the gradients of keys and values travel with them, in float32, until they are at home.
Blocks of scores that no query sees are not computed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.axes import Array, Float, Int
from llama_jax.model import chunked
from llama_jax.model.mask import Mask


class Ring(NamedTuple):
    """The devices that share a row; static.

    Attributes:
      axes: mesh axes along which they lie.
      devices: how many there are.
      size: queries and keys of one block of scores.
    """

    axes: tuple[str, ...]
    devices: int
    size: int


class _Held(NamedTuple):
    """What goes round: a device's keys and values in blocks, and what the mask has to know of them."""

    keys: Float[Array, "blocks B K C H"]
    values: Float[Array, "blocks B K C H"]
    positions: Int[Array, "blocks C"]
    documents: Int[Array, "blocks B C"] | None


_Tree = TypeVar("_Tree")
_Part = tuple[Float[Array, "n B K G C H"], Float[Array, "n B K G C"]]  # output over some of the keys, and its logsumexp


def block_size(backend: str, tokens: int) -> int:
    """Queries and keys of a block of scores: as `chunked` has them, or all at once, but no block with tokens of both chunks.

    Args:
      backend: of the attention.
      tokens: that a device holds, in two chunks.
    """
    chunk = -(-tokens // 2)
    blocks = 1 if backend == "reference" else -(-chunk // chunked.BLOCK)
    return -(-chunk // blocks)


def _pass_on(tree: _Tree, ring: Ring) -> _Tree:
    """To the next device of the ring; what comes back is from the one before."""
    steps = [(device, (device + 1) % ring.devices) for device in range(ring.devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axes, steps), tree)


def _merged(one: _Part, other: _Part) -> _Part:
    """What some and what other keys give, as if they had been one softmax."""
    lse = jnp.logaddexp(one[1], other[1])
    out = sum(part * jnp.exp(part_lse - lse)[..., None] for part, part_lse in (one, other))
    return out, lse  # type: ignore[return-value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def ring_attention(
    q: Float[Array, "B N C H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    positions: Int[Array, " C"],
    documents: Int[Array, "B C"] | None,
    ring: Ring,
) -> Float[Array, "B N C H"]:
    """Causal attention of a device's queries over the keys of all devices; to be called inside `jax.shard_map`.

    Args:
      q: of the device's own tokens, as are keys, values, positions and documents.
      k: keys.
      v: values.
      positions: in the row.
      documents: number of each token's document, or `None` for one document.
      ring: the devices.
    """
    return _ring_forward(q, k, v, positions, documents, ring)[0]


def _prepare(
    q: Array, k: Array, v: Array, positions: Array, documents: Array | None, ring: Ring
) -> tuple[Array, _Held, Callable[[_Held], chunked.Blocks]]:
    """Queries in blocks, what goes round first, and the mask for what is held."""
    mask = Mask(documents=documents, positions=positions, key_positions=positions)
    q_blocks, keys, values, own = chunked.prepare(q, k, v, mask, True, ring.size)
    assert own.key_positions is not None
    held = _Held(keys, values, own.key_positions, own.key_documents)
    return q_blocks, held, lambda held: own._replace(key_positions=held.positions, key_documents=held.documents)


def _ring_forward(q: Array, k: Array, v: Array, positions: Array, documents: Array | None, ring: Ring) -> tuple[Array, tuple]:
    queries, held, blocks = _prepare(q, k, v, positions, documents, ring)

    def attended(held: _Held, sums: _Part) -> _Part:
        """With what the held keys add."""
        return _merged(sums, chunked.forward(queries, held.keys, held.values, blocks(held), jnp.float32))

    def turn(_: Array, carry: tuple[_Held, _Part]) -> tuple[_Held, _Part]:
        """One block; the next one is asked for first, so that it travels meanwhile."""
        held, sums = carry
        return _pass_on(held, ring), attended(held, sums)

    nothing = (jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:-1], chunked.HIDDEN))
    held, sums = lax.fori_loop(0, ring.devices - 1, turn, (held, nothing))
    out, lse = attended(held, sums)
    out = checkpoint_name(chunked.join(chunked.unfold(out), q.shape[2]).astype(q.dtype), "context")
    return out, (q, k, v, positions, documents, out, checkpoint_name(lse, "context"))


def _ring_backward(ring: Ring, saved: tuple, d_out: Array) -> tuple:
    q, k, v, positions, documents, out, lse = saved
    queries, held, blocks = _prepare(q, k, v, positions, documents, ring)
    out_blocks, d_blocks = (chunked.fold(chunked.cut(x, ring.size), k.shape[1]) for x in (out, d_out))

    def gradients(held: _Held) -> tuple[Array, tuple[Array, Array]]:
        """Of the queries, and of the held keys and values, as far as these meet."""
        dq, dk, dv = chunked.backward(queries, held.keys, held.values, out_blocks, lse, d_blocks, blocks(held))
        return dq, (dk, dv)

    def turn(_: Array, carry: tuple[_Held, Array, tuple]) -> tuple[_Held, Array, tuple]:
        """One block; its gradients so far come from the device that held it before, while its own part is computed."""
        held, dq, left = carry
        following, arrived = _pass_on(held, ring), _pass_on(left, ring)
        more, own = gradients(held)
        return following, dq + more, jax.tree.map(jnp.add, arrived, own)

    nothing = jnp.zeros(held.keys.shape, jnp.float32)
    start = (held, jnp.zeros(queries.shape, jnp.float32), (nothing, nothing))
    held, dq, left = lax.fori_loop(0, ring.devices - 1, turn, start)
    arrived = _pass_on(left, ring)
    more, own = gradients(held)
    dk, dv = _pass_on(jax.tree.map(jnp.add, arrived, own), ring)  # each device has last held its neighbour's
    dq = chunked.join(chunked.unfold(dq + more), q.shape[2])
    dk, dv = chunked.join(dk, k.shape[2]), chunked.join(dv, k.shape[2])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


ring_attention.defvjp(_ring_forward, _ring_backward)

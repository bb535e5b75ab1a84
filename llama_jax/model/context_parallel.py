"""Attention of sequences whose tokens lie on several devices, along the mesh axes that the rules
name for `length`.

Each device has its own queries and either gathers all keys and values (`all_gather`) or sees them
pass by (`ring`). In the first form a backend of `attend` is given the positions of its queries and
those of all keys, in the order of the devices; grouped queries keep the transfers small. In the
second one no device ever holds more than two blocks of keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from llama_jax.axes import Array, Float, Int, Num
from llama_jax.errors import InputError
from llama_jax.model import blockwise
from llama_jax.model.attention import KERNELS, Scales, attend, choose_backend, in_float
from llama_jax.model.cudnn import cudnn_attention
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.model.splash import splash_attention
from llama_jax.parallel.sharding import Rules, partition_spec, parts_of, require_divisible

# --- ring ---
#
# Ring attention (arXiv:2310.01889): keys and values go round the devices that share a sequence,
# queries stay where they are.
#
# A device computes with one block of keys while the next one is on its way, and merges what each
# block gives by logsumexps. Backward goes round once more, and the gradients of keys and values
# travel with them, in float32, until they are at home. Blocks of scores that no query sees are not
# computed.


class Ring(NamedTuple):
    """The devices that share a sequence; static.

    Attributes:
      axes: mesh axes along which they lie.
      devices: how many there are.
      size: queries and keys of one block of scores.
    """

    axes: tuple[str, ...]
    devices: int
    size: int


class _Held(NamedTuple):
    """The state that travels around the ring: a device's keys and values in blocks, and the mask's
    view of them.
    """

    keys: Float[Array, "blocks B K C H"]
    values: Float[Array, "blocks B K C H"]
    positions: Int[Array, "blocks C"]
    documents: Int[Array, "blocks B C"] | None


_Tree = TypeVar("_Tree")
_Part = tuple[
    Float[Array, "n B K G C H"], Float[Array, "n B K G C"]
]  # output over some of the keys, and its logsumexp


def block_size(backend: str, tokens: int) -> int:
    """Queries and keys of a block of scores: as `blockwise` has them, or all at once, but no block
    with tokens of both chunks.

    Args:
      backend: of the attention.
      tokens: that a device holds, in two chunks.
    """
    chunk = -(-tokens // 2)
    blocks = 1 if backend == "reference" else -(-chunk // blockwise.BLOCK)
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
    """Causal attention of a device's queries over the keys of all devices; to be called inside
    `jax.shard_map`.

    Args:
      q: of the device's own tokens, as are keys, values, positions and documents.
      k: keys.
      v: values.
      positions: in the sequence.
      documents: number of each token's document, or `None` for one document.
      ring: the devices.
    """
    return _ring_forward(q, k, v, positions, documents, ring)[0]


def _prepare(
    q: Array, k: Array, v: Array, positions: Array, documents: Array | None, ring: Ring
) -> tuple[Array, _Held, Callable[[_Held], blockwise.Blocks]]:
    """Queries in blocks, the first state of the ring, and the mask for the held keys."""
    mask = Mask(documents=documents, positions=positions, key_positions=positions)
    q_blocks, keys, values, own = blockwise.prepare(q, k, v, mask, True, ring.size)
    assert own.key_positions is not None
    held = _Held(keys, values, own.key_positions, own.key_documents)
    return (
        q_blocks,
        held,
        lambda held: own._replace(key_positions=held.positions, key_documents=held.documents),
    )


def _ring_forward(
    q: Array, k: Array, v: Array, positions: Array, documents: Array | None, ring: Ring
) -> tuple[Array, tuple]:
    queries, held, blocks = _prepare(q, k, v, positions, documents, ring)

    def attended(held: _Held, sums: _Part) -> _Part:
        """The sums with the held keys added."""
        return _merged(
            sums, blockwise.forward(queries, held.keys, held.values, blocks(held), jnp.float32)
        )

    def turn(_: Array, carry: tuple[_Held, _Part]) -> tuple[_Held, _Part]:
        """One block; the next one is asked for first, so that it travels meanwhile."""
        held, sums = carry
        return _pass_on(held, ring), attended(held, sums)

    nothing = (
        jnp.zeros(queries.shape, jnp.float32),
        jnp.full(queries.shape[:-1], blockwise.HIDDEN),
    )
    held, sums = lax.fori_loop(0, ring.devices - 1, turn, (held, nothing))
    out, lse = attended(held, sums)
    out = checkpoint_name(
        blockwise.join(blockwise.unfold(out), q.shape[2]).astype(q.dtype), "context"
    )
    return out, (q, k, v, positions, documents, out, checkpoint_name(lse, "context"))


def _ring_backward(ring: Ring, saved: tuple, d_out: Array) -> tuple:
    q, k, v, positions, documents, out, lse = saved
    queries, held, blocks = _prepare(q, k, v, positions, documents, ring)
    out_blocks, d_blocks = (
        blockwise.fold(blockwise.cut(x, ring.size), k.shape[1]) for x in (out, d_out)
    )

    def gradients(held: _Held) -> tuple[Array, tuple[Array, Array]]:
        """Of the queries, and of the held keys and values, as far as these meet."""
        dq, dk, dv = blockwise.backward(
            queries, held.keys, held.values, out_blocks, lse, d_blocks, blocks(held)
        )
        return dq, (dk, dv)

    def turn(_: Array, carry: tuple[_Held, Array, tuple]) -> tuple[_Held, Array, tuple]:
        """One block; its gradients so far come from the device that held it before, while its own
        part is computed.
        """
        held, dq, left = carry
        following, arrived = _pass_on(held, ring), _pass_on(left, ring)
        more, own = gradients(held)
        return following, dq + more, jax.tree.map(jnp.add, arrived, own)

    nothing = jnp.zeros(held.keys.shape, jnp.float32)
    start = (held, jnp.zeros(queries.shape, jnp.float32), (nothing, nothing))
    held, dq, left = lax.fori_loop(0, ring.devices - 1, turn, start)
    arrived = _pass_on(left, ring)
    more, own = gradients(held)
    dk, dv = _pass_on(
        jax.tree.map(jnp.add, arrived, own), ring
    )  # each device has last held its neighbour's
    dq = blockwise.join(blockwise.unfold(dq + more), q.shape[2])
    dk, dv = blockwise.join(dk, k.shape[2]), blockwise.join(dv, k.shape[2])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


# --- context ---


def attend_over_mesh(
    q: Float[Array, "B N T H"],
    k: Num[Array, "B K S H"],
    v: Num[Array, "B K S H"],
    mask: Mask,
    options: ModelOptions,
    scales: Scales | None = None,
) -> Float[Array, "B N T H"]:
    """Causal attention, by `attend` alone unless the mesh set by `jax.set_mesh` cuts sequences over
    devices.

    Args:
      q: queries.
      k: keys, of the same tokens where sequences are cut.
      v: values.
      mask: which keys a query sees; without positions, tokens are taken to be in the order of their
        sequence. A kernel on devices that share sequences takes them in the order of
        `balanced_positions`, whatever the mask says.
      options: backend, rules, and how devices share keys. A kernel takes sequences that see
        themselves; `auto` is taken for tokens after a cached prefix. `auto` itself takes, for
        sequences that see themselves and lie on one device each, the kernel of the platform for
        which the program is compiled, where there is one for these sizes.
      scales: of integer keys and values.

    Raises:
      InputError: where sequences are cut: for sizes that the mesh does not divide, and for a cache.
    """
    parts = parts_of("length", options.rules)
    in_order = mask.positions is None or parts > 1  # over devices that of `balanced_positions`
    if options.attention in KERNELS and mask.start is None and mask.lengths is None and in_order:
        kernel = splash_attention if options.attention == "splash" else cudnn_attention
        return kernel(q, *in_float(k, v, scales, q.dtype), mask.documents, options.rules)
    if parts == 1:
        backend = "auto" if options.attention in KERNELS else options.attention
        kernels = (
            _kernels(q, k, options)
            if options.attention == "auto" and mask == Mask(documents=mask.documents)
            else {}
        )
        if not kernels:
            return attend(q, k, v, mask, backend=backend, scales=scales)
        default = functools.partial(_plain, backend=backend)
        return lax.platform_dependent(
            q, *in_float(k, v, scales, q.dtype), mask.documents, default=default, **kernels
        )
    length = q.shape[2]
    if scales is not None or mask.start is not None or mask.lengths is not None:
        raise InputError(
            f"a cache was given on a mesh that cuts sequences in {parts}; use "
            "`whole_sequences` of the rules to decode on it"
        )
    for axis, size in (
        ("batch", q.shape[0]),
        ("heads", q.shape[1]),
        ("kv_heads", k.shape[1]),
        ("length", length),
    ):
        require_divisible(axis, size, parts_of(axis, options.rules))
    positions = jnp.arange(length, dtype=jnp.int32) if mask.positions is None else mask.positions
    tokens = (positions,) if mask.documents is None else (positions, mask.documents)
    q_spec, k_spec = (
        partition_spec(("batch", axis, "length", "width"), options.rules)
        for axis in ("heads", "kv_heads")
    )
    token_specs = (
        partition_spec(("length",), options.rules),
        partition_spec(("batch", "length"), options.rules),
    )
    local = _local(options, parts, length)
    specs = (q_spec, k_spec, k_spec, *token_specs[: len(tokens)])
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(q, k, v, *tokens)


def _kernels(q: Array, k: Array, options: ModelOptions) -> dict[str, Callable[..., Array]]:
    """The kernels that take whole sequences of these sizes, by the platform for which a program is
    compiled.
    """
    heads, length, head_dim = q.shape[1:]
    if heads % parts_of("heads", options.rules) or k.shape[1] % parts_of("kv_heads", options.rules):
        return {}
    found: dict[str, Callable[..., Array]] = {}
    if choose_backend("auto", length, length, "tpu", head_dim) == "splash":
        found["tpu"] = functools.partial(_splash, rules=options.rules)
    if choose_backend("auto", length, length, "gpu", head_dim, 1, q.dtype.name) == "cudnn":
        found["cuda"] = functools.partial(_cudnn, rules=options.rules)
    return found


def _plain(q: Array, k: Array, v: Array, documents: Array | None, *, backend: str) -> Array:
    return attend(q, k, v, Mask(documents=documents), backend=backend)


# Compiled on their own so that a model of many layers traces each kernel once.
@functools.partial(jax.jit, static_argnames="rules")
def _splash(q: Array, k: Array, v: Array, documents: Array | None, *, rules: Rules) -> Array:
    return splash_attention(q, k, v, documents, rules)


@functools.partial(jax.jit, static_argnames="rules")
def _cudnn(q: Array, k: Array, v: Array, documents: Array | None, *, rules: Rules) -> Array:
    return cudnn_attention(q, k, v, documents, rules)


def _local(options: ModelOptions, parts: int, length: int) -> Callable[..., Array]:
    """What each device does with its tokens: from q, k, v, positions and documents, if any, to the
    output.
    """
    axes = dict(options.rules)["length"]
    backend = choose_backend(options.attention, length // parts, length)
    if options.context_attention == "ring":
        return functools.partial(
            _ring, ring=Ring(axes, parts, block_size(backend, length // parts))
        )
    # The gathered keys are gathered anew for the backward pass, not kept: every layer would keep
    # those of whole sequences.
    kept = checkpoint_policies.save_only_these_names("context")
    gathered = functools.partial(_gathered, axes=axes, backend=backend)
    return jax.checkpoint(gathered, policy=kept, prevent_cse=not options.scan)


def _ring(
    q: Array, k: Array, v: Array, positions: Array, documents: Array | None = None, *, ring: Ring
) -> Array:
    return ring_attention(q, k, v, positions, documents, ring)


def _gathered(
    q: Float[Array, "B N C H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    positions: Int[Array, " C"],
    documents: Int[Array, "B C"] | None = None,
    *,
    axes: tuple[str, ...],
    backend: str,
) -> Float[Array, "B N C H"]:
    """The device's own queries over the keys of all devices; the gradients of keys are summed and
    scattered back.
    """

    def whole(x: Array, axis: int) -> Array:
        """Gathered along an axis, in the order of the devices."""
        return lax.all_gather(x, axes, axis=axis, tiled=True)

    theirs = None if documents is None else whole(documents, 1)
    mask = Mask(
        documents=documents,
        positions=positions,
        key_positions=whole(positions, 0),
        key_documents=theirs,
    )
    return attend(q, whole(k, 2), whole(v, 2), mask, backend=backend)

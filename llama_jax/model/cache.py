"""The key/value cache: a value passed into the forward pass and handed back, with a length per
sequence.

Slot = position: token `t` of a sequence lives in slot `t`, whatever the other sequences do, so
prompts of unequal length share a batch without padding tricks. Slots at and beyond a sequence's
length hold nothing that a query can see.

An `int8` cache holds each key and value of a head as 8-bit integers times one scale; attention
applies the scales to scores and probabilities, so the cache is never written out in a wider type.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float, Int, Num
from llama_jax.config import LlamaConfig
from llama_jax.parallel.sharding import Rules, parts_of


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, or of all layers stacked on a leading axis `L`.

    Every array has its sequences first (after `L`) and its slots third, so that `grow` and
    `take_sequences` need no table.

    Attributes:
      keys: in the dtype of the cache.
      values: in the dtype of the cache.
      key_scales: `key_scales[b, k, s] * keys[b, k, s]` is the key of slot `s` in an `int8` cache;
        `None` in all others.
      value_scales: the same for values.
    """

    keys: Num[Array, "*L B K S H"]
    values: Num[Array, "*L B K S H"]
    key_scales: Float[Array, "*L B K S"] | None = None
    value_scales: Float[Array, "*L B K S"] | None = None


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
      layers: one `LayerCache` with a leading axis `L` (scanned models) or a tuple of `L` (unrolled
        models).
      lengths: tokens of each sequence that the cache holds; also the position of the sequence's
        next token.
    """

    layers: LayerCache | tuple[LayerCache, ...]
    lengths: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Capacity of a sequence, in tokens."""
        layer = self.layers if isinstance(self.layers, LayerCache) else self.layers[0]
        return layer.keys.shape[-2]


def init_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32, scan: bool = False
) -> Cache:
    """An empty cache of `slots` tokens a sequence; `dtype` is a float type or `int8`, `scan` as in
    the model that will use it.
    """
    shape = ((config.layers,) if scan else ()) + (batch, config.kv_heads, slots)
    quantised = jnp.dtype(dtype) == jnp.int8

    def layer() -> LayerCache:
        """Fresh arrays each time: caches are donated, so no two may share memory."""
        scales = [jnp.zeros(shape, jnp.float32) for _ in range(2)] if quantised else [None, None]
        return LayerCache(*[jnp.zeros((*shape, config.head_dim), dtype) for _ in range(2)], *scales)

    return Cache(
        layer() if scan else tuple(layer() for _ in range(config.layers)),
        jnp.zeros((batch,), jnp.int32),
    )


def _each(
    change: Callable[[Array, int], Array], cache: Cache
) -> LayerCache | tuple[LayerCache, ...]:
    """The layers with every array changed by `change(array, axis of its sequences)`."""
    sequences = 1 if isinstance(cache.layers, LayerCache) else 0
    return jax.tree.map(lambda array: change(array, sequences), cache.layers)


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with capacity for `slots` tokens a sequence, at least as many as it has; new
    slots are empty.
    """

    def wider(array: Array, sequences: int) -> Array:
        """Zeros after the last slot."""
        axis = sequences + 2
        return jnp.pad(
            array, [(0, slots - array.shape[axis] if i == axis else 0) for i in range(array.ndim)]
        )

    return Cache(_each(wider, cache), cache.lengths)


def take_sequences(cache: Cache, sequences: Int[Array, " R"]) -> Cache:
    """The cache of sequences `sequences`, in that order; a sequence may come more than once."""
    return Cache(
        _each(lambda array, axis: jnp.take(array, sequences, axis=axis), cache),
        jnp.take(cache.lengths, sequences),
    )


def quantise_heads(
    x: Float[Array, "B K T H"],
) -> tuple[Int[Array, "B K T H"], Float[Array, "B K T"]]:
    """8-bit integers and the scale of each head's vector: `scale * integers` is `x` to within half
    a scale, float32.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def _write_in_turn(
    rows_a_round: int, layer: LayerCache, new: LayerCache, lengths: Int[Array, " B"]
) -> LayerCache:
    """A loop over sequences, some of them a round, in place on every device; a scatter takes
    several kernels a sequence on TPU.
    """

    def write(sequence: Array, layer: LayerCache) -> LayerCache:
        """One sequence of every array."""

        def place(slots: Array, pieces: Array) -> Array:
            """One array."""
            piece = lax.dynamic_slice_in_dim(pieces, sequence, 1)
            return lax.dynamic_update_slice(
                slots, piece, (sequence, 0, lengths[sequence], 0)[: slots.ndim]
            )

        return jax.tree.map(place, layer, new)

    return lax.fori_loop(
        0, lengths.shape[0], write, layer, unroll=min(rows_a_round, lengths.shape[0])
    )


def _write_at_once(layer: LayerCache, new: LayerCache, lengths: Int[Array, " B"]) -> LayerCache:
    """All sequences by one scatter an array: a GPU's loop would start several kernels for each of
    them.
    """

    def place(slots: Array, pieces: Array, first: Array) -> Array:
        """One array of one sequence."""
        return lax.dynamic_update_slice_in_dim(slots, pieces, first, axis=1)

    return jax.tree.map(lambda slots, pieces: jax.vmap(place)(slots, pieces, lengths), layer, new)


def _write_sequences(
    rows_a_round: int, layer: LayerCache, new: LayerCache, lengths: Int[Array, " B"]
) -> LayerCache:
    """Puts the `T` slots of `new`, each array in the cache's own type, into each sequence from its
    length on.
    """
    new = jax.tree.map(lambda pieces, slots: pieces.astype(slots.dtype), new, layer)
    in_turn = functools.partial(_write_in_turn, rows_a_round)
    if lengths.shape[0] == 1:
        return in_turn(layer, new, lengths)
    return lax.platform_dependent(
        layer, new, lengths, cuda=_write_at_once, rocm=_write_at_once, default=in_turn
    )


def append(
    layer: LayerCache,
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    rules: Rules = (),
    rows_a_round: int = 1,
) -> LayerCache:
    """The cache of one layer with the keys and values of `T` new tokens written from slot `lengths`
    of each sequence on.

    The caller sees to it that `lengths + T` does not exceed the capacity: XLA would clamp the slot,
    silently. On a mesh that cuts the sequences, as the rules say, each device writes its own: a
    loop over all of them would gather the new tokens sequence by sequence.

    Rows are written `rows_a_round` at a time. On TPU most of the time of a sequence is that of
    starting its kernels, of which a loop has more; but inside of a scan over layers more than one a
    round would cost a copy of the whole cache.
    """
    new: LayerCache = LayerCache(keys, values)
    if layer.key_scales is not None:
        (keys, key_scales), (values, value_scales) = quantise_heads(keys), quantise_heads(values)
        new = LayerCache(keys, values, key_scales, value_scales)
    write = functools.partial(_write_sequences, rows_a_round)
    if not rules or not _shared(layer, rules):
        return write(layer, new, lengths)
    sequences, heads = (dict(rules)[axis] for axis in ("batch", "kv_heads"))
    places = PartitionSpec(sequences, heads)
    write = jax.shard_map(
        write,
        in_specs=(places, places, PartitionSpec(sequences)),
        out_specs=places,
        check_vma=False,
    )
    return write(layer, new, lengths)


def _shared(layer: LayerCache, rules: Rules) -> bool:
    """Whether devices have sequences of their own: the mesh set by `jax.set_mesh` cuts them, and
    divides sequences and heads.
    """
    sequences, heads = layer.keys.shape[:2]
    parts = parts_of("batch", rules)
    return parts > 1 and sequences % parts == 0 and heads % parts_of("kv_heads", rules) == 0

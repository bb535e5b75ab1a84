"""The key/value cache: a value passed into the forward pass and handed back, with a length per row.

Slot = position: token `t` of a row lives in slot `t`, whatever the other rows do, so prompts of unequal length share a
batch without padding tricks. Slots at and beyond a row's length hold nothing that a query can see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float, Int
from llama_jax.config import LlamaConfig


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, or of all layers stacked on a leading axis `L`."""

    keys: Float[Array, "*L B K S H"]
    values: Float[Array, "*L B K S H"]


class Cache(NamedTuple):
    """What decoding remembers.

    Attributes:
      layers: one `LayerCache` with a leading axis `L` (scanned models) or a tuple of `L` (unrolled models).
      lengths: tokens of each row that the cache holds; also the position of the row's next token.
    """

    layers: LayerCache | tuple[LayerCache, ...]
    lengths: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Capacity of a row, in tokens."""
        layer = self.layers if isinstance(self.layers, LayerCache) else self.layers[0]
        return layer.keys.shape[-2]


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32, scan: bool = False) -> Cache:
    """An empty cache of `slots` tokens a row; `scan` as in the model that will use it."""
    shape = (batch, config.kv_heads, slots, config.head_dim)
    leading = (config.layers,) if scan else ()

    def layer() -> LayerCache:
        """Fresh arrays each time: caches are donated, so no two may share memory."""
        return LayerCache(jnp.zeros(leading + shape, dtype), jnp.zeros(leading + shape, dtype))

    return Cache(layer() if scan else tuple(layer() for _ in range(config.layers)), jnp.zeros((batch,), jnp.int32))


def _write_rows(slots: Array, new: Array, lengths: Array) -> Array:
    """Puts `new [B K T H]` into `slots [B K S H]` from each row's length on."""
    return jax.vmap(lambda row, piece, at: lax.dynamic_update_slice(row, piece, (0, at, 0)))(
        slots, new.astype(slots.dtype), lengths
    )


def append(
    layer: LayerCache, keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], lengths: Int[Array, " B"]
) -> LayerCache:
    """The cache of one layer with the keys and values of `T` new tokens written from slot `lengths` of each row on.

    The caller sees to it that `lengths + T` does not exceed the capacity: XLA would clamp the slot, silently.
    """
    return LayerCache(_write_rows(layer.keys, keys, lengths), _write_rows(layer.values, values, lengths))

"""Which keys a query sees: what every backend of the attention is given."""

from typing import NamedTuple

import jax.numpy as jnp

from llama_jax.axes import Array, Bool, Int
from llama_jax.errors import InputError


class Mask(NamedTuple):
    """Which keys a query sees; every field narrows it further.

    Attributes:
      start: key slot of each sequence's first query; `None` means 0. Query `t` of sequence `b`
        stands at slot `start[b] + t`.
      lengths: number of valid keys of each sequence; `None` means all.
      documents: document number of each query's token, for packed sequences; a query sees keys of
        its own document only. `None` means one document.
      positions: where each query stands in its sequence, the same for all sequences, for tokens in
        another order than that of the sequence; a causal query sees keys of its own and earlier
        positions. `None` means `start` and the order of the queries.
      key_positions: the same of the keys, given with `positions` and only then.
      key_documents: the same as `documents` of the keys; `None` means that queries and keys are of
        the same tokens (`S = T`).
    """

    start: Int[Array, " B"] | None = None
    lengths: Int[Array, " B"] | None = None
    documents: Int[Array, "B T"] | None = None
    positions: Int[Array, " T"] | None = None
    key_positions: Int[Array, " S"] | None = None
    key_documents: Int[Array, "B S"] | None = None


NO_MASK = Mask()


def require_complete(mask: Mask, queries: int, keys: int) -> None:
    """Refuses a mask that does not say all that it has to.

    Raises:
      InputError: for a document mask with other keys than the queries' own of which it does not say
        the documents; for positions without those of the keys, or beside a start.
    """
    own = queries == keys and mask.start is None and mask.positions is None
    if mask.documents is not None and mask.key_documents is None and not own:
        raise InputError(
            f"a document mask needs the keys of its own {queries} tokens; {keys} cache "
            "slots were given"
        )
    if (mask.positions is None) != (mask.key_positions is None) or (
        mask.positions is not None and mask.start is not None
    ):
        raise InputError("a mask with positions of queries needs positions of keys, and no start")


def visible(mask: Mask, causal: bool, batch: int, queries: int, keys: int) -> Bool[Array, "B T S"]:
    """The mask written out: whether query `t` of sequence `b` sees key `s`."""
    slots = jnp.arange(keys)[None, None, :]
    start = jnp.zeros((batch,), jnp.int32) if mask.start is None else mask.start
    seen = jnp.ones((batch, queries, keys), bool)
    if causal and mask.positions is not None and mask.key_positions is not None:
        seen &= mask.key_positions[None, :] <= mask.positions[:, None]
    elif causal:
        seen &= slots <= start[:, None, None] + jnp.arange(queries)[None, :, None]
    if mask.lengths is not None:
        seen &= slots < mask.lengths[:, None, None]
    if mask.documents is not None:
        theirs = mask.documents if mask.key_documents is None else mask.key_documents
        seen &= mask.documents[:, :, None] == theirs[:, None, :]
    return seen

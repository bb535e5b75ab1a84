"""Choosing the next token: a value with one number per row, no flags, so that one program serves every mixture."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from llama_jax.axes import Array, Float, Int
from llama_jax.errors import InputError

_SEEDS = 1 << 31  # seeds there are: those that int32 holds


class Sampling(NamedTuple):
    """How each row draws its tokens.

    Attributes:
      temperature: logits are divided by it; 0 means the most probable token, always.
      top_k: only the `k` most probable tokens are drawn from; 0 means all.
      top_p: only the most probable tokens that together reach this probability are drawn from; 1 means all.
      seed: a row's draws depend on its seed and on the position of the token, not on the other rows.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]


def _per_row(name: str, value: ArrayLike, rows: int, dtype: type, low: float, high: float) -> np.ndarray:
    """One value for all rows, or one a row, as an array `[rows]`."""
    values = np.asarray(value)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != rows):
        raise InputError(f"{name}: {values.size} values given for {rows} rows; one for all or one a row expected")
    whole = np.issubdtype(dtype, np.integer)
    kinds = int if whole else (int, float)
    bad = [v for v in values.ravel().tolist() if not (isinstance(v, kinds) and low <= v <= high)]
    if bad:
        raise InputError(f"{name}: {bad[0]!r} given; a {'whole ' if whole else ''}number from {low:g} to {high:g} expected")
    return np.broadcast_to(values, (rows,)).astype(dtype)


def make_sampling(
    rows: int,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    seed: ArrayLike = 0,
) -> Sampling:
    """A `Sampling` for `rows` rows from one number for all, or one a row.

    Rows that share one seed draw differently all the same: row `i` gets `seed + i`.

    Raises:
      InputError: naming the setting that is out of range or has the wrong number of values.
    """
    seeds = _per_row("seed", seed, rows, np.int64, 0, _SEEDS - 1)
    if np.ndim(seed) == 0:
        seeds = (seeds + np.arange(rows)) % _SEEDS
    return Sampling(
        jnp.asarray(_per_row("temperature", temperature, rows, np.float32, 0.0, 100.0)),
        jnp.asarray(_per_row("top_k", top_k, rows, np.int32, 0, 1 << 30)),
        jnp.asarray(_per_row("top_p", top_p, rows, np.float32, 0.0, 1.0)),
        jnp.asarray(seeds.astype(np.int32)),
    )


def restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and top-p, in that order; tokens that cannot be drawn are at -inf.

    The largest logit becomes 0. The most probable token always stays; tokens that tie with the last one kept stay too.
    Rows at temperature 0 are left at temperature 1: their draw is not used.
    """
    vocab = logits.shape[-1]
    # Relative to the largest, so that no temperature, however small, makes an infinity of it.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled /= jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    ordered = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(vocab)[None]
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, vocab)[:, None]
    probabilities = jax.nn.softmax(jnp.where(rank < top_k, ordered, -jnp.inf), axis=-1)
    # A sum of 50,000 rounded numbers may pass 1 early: top_p of 1 means all tokens, whatever the sum says.
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)[:, None]
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (rank == 0) | ((rank < top_k) & (before < top_p))
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def sample(logits: Float[Array, "B V"], sampling: Sampling, position: Int[Array, " B"]) -> Int[Array, " B"]:
    """The next token of each row.

    Args:
      logits: float32.
      sampling: settings of each row.
      position: position of the token to be drawn, which the row's randomness is folded with; no key is consumed twice.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        """Tokens of rows that are not greedy, each from its own key."""
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(sampling.seed, position)
        drawn = jax.vmap(jax.random.categorical)(keys, restrict(logits, sampling)).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, best)

    # Sorting a vocabulary costs as much as a layer; when every row is greedy it is not done.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: best)

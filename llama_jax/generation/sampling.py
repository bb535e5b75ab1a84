"""Choosing the next token: a value with one number per sequence, no flags, so that one program
serves every mixture.

The steps, in the order of transformers' processors: logit bias, penalties, temperature, top-k,
top-p, min-p, sample.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax
from numpy.typing import ArrayLike

from llama_jax.axes import Array, Bool, Float, Int, Key
from llama_jax.errors import InputError
from llama_jax.generation.checks import Unchecked, is_whole

_SEEDS = 1 << 31  # seeds there are: those that int32 holds
NOWHERE = 1 << 30  # a token id beyond every vocabulary: updates there are dropped
LogitBias = Mapping[
    Any, Any
]  # token id -> number; checked by value, since it often comes from JSON


class Penalties(NamedTuple):
    """What tokens that were there before lose.

    Attributes:
      repetition: logits of tokens in prompt or answer are divided by it where positive, multiplied
        where negative (arXiv:1909.05858); 1 means none.
      presence: taken off the logit of every token that the answer holds; 0 means none.
      frequency: taken off the logit once for each time the answer holds the token; 0 means none.
    """

    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]


class Bias(NamedTuple):
    """What is added to the logits of single tokens; unused places hold a token beyond the
    vocabulary.
    """

    tokens: Int[Array, "B M"]
    values: Float[Array, "B M"]


class Sampling(NamedTuple):
    """How each sequence samples its tokens.

    Attributes:
      temperature: logits are divided by it; 0 means the most probable token, always.
      top_k: only the `k` most probable tokens are sampled from; 0 means all.
      top_p: only the most probable tokens that together reach this probability are sampled from; 1
        means all.
      min_p: only tokens at least this fraction as probable as the most probable one are sampled
        from; 0 means all.
      key: a sequence's samples depend on its key and on the position of the token, not on the other
        sequences.
      penalties: of repeated tokens; `None` when no sequence has any, which saves their bookkeeping.
      bias: of single tokens; `None` when no sequence has any.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    key: Key[Array, " B"]
    penalties: Penalties | None = None
    bias: Bias | None = None


class History(NamedTuple):
    """What penalties look at: which tokens the prompt holds, and how often the answer holds
    each.
    """

    prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]


def _per_sequence(
    name: str, value: ArrayLike, sequences: int, dtype: type, low: float, high: float
) -> np.ndarray:
    """One value for all sequences, or one a sequence, as an array `[sequences]`."""
    values = np.asarray(value)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != sequences):
        raise InputError(
            f"{name}: {values.size} values given for {sequences} sequences; one for all "
            "or one a sequence expected"
        )
    whole = np.issubdtype(dtype, np.integer)
    kinds = int if whole else (int, float)
    bad = [
        v
        for v in values.ravel().tolist()
        if isinstance(v, bool) or not (isinstance(v, kinds) and low <= v <= high)
    ]
    if bad:
        raise InputError(
            f"{name}: {bad[0]!r} given; a {'whole ' if whole else ''}number from {low:g} "
            f"to {high:g} expected"
        )
    return np.broadcast_to(values, (sequences,)).astype(dtype)


def make_sampling(
    sequences: int,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    *,
    repetition_penalty: ArrayLike = 1.0,
    presence_penalty: ArrayLike = 0.0,
    frequency_penalty: ArrayLike = 0.0,
    logit_bias: LogitBias | Sequence[LogitBias] | None = (),
    seed: Unchecked = 0,
) -> Sampling:
    """A `Sampling` for `sequences` sequences; every setting is one for all sequences, or one a
    sequence.

    Args:
      sequences: sequences that sample: prompts times `samples`.
      temperature: see `Sampling`, as for the next three.
      top_k: whole numbers.
      top_p: from 0 to 1.
      min_p: from 0 to 1.
      repetition_penalty: see `Penalties`, as for the next two.
      presence_penalty: any number from -100 to 100.
      frequency_penalty: any number from -100 to 100.
      logit_bias: token id -> number, for all sequences or a mapping a sequence.
      seed: a whole number from 0 to 2^31 - 1 or a key of `jax.random.key`, for all sequences or one
        a sequence; may be traced. The sequences of one seed sample independently of each other and
        of those of every other seed; see `sequence_keys`.

    Raises:
      InputError: naming the setting that is out of range or has the wrong number of values.
    """
    return Sampling(
        jnp.asarray(_per_sequence("temperature", temperature, sequences, np.float32, 0.0, 100.0)),
        jnp.asarray(_per_sequence("top_k", top_k, sequences, np.int32, 0, 1 << 30)),
        jnp.asarray(_per_sequence("top_p", top_p, sequences, np.float32, 0.0, 1.0)),
        jnp.asarray(_per_sequence("min_p", min_p, sequences, np.float32, 0.0, 1.0)),
        sequence_keys(seed, sequences),
        _penalties(sequences, repetition_penalty, presence_penalty, frequency_penalty),
        _bias(sequences, logit_bias),
    )


def sequence_keys(seed: Unchecked, sequences: int, first: int = 0) -> Key[Array, " B"]:
    """The keys that `sequences` sequences sample with.

    With one seed or key, sequence `i` has that key with `first + i` folded in. With one seed a
    sequence, each sequence has the key that it would have alone: its seed's key with 0 folded in.
    Keys that are given one a sequence are taken as they are.

    Args:
      seed: a number, a key, or one of either a sequence; may be traced.
      sequences: how many keys.
      first: number of the first sequence, where these sequences are a part of those that share the
        seed.

    Raises:
      InputError: for anything else.
    """
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, dtypes.prng_key):
        _require_shape(seed, sequences)
        return (
            seed
            if seed.ndim
            else _folded(seed, np.arange(first, first + sequences, dtype=np.int32))
        )
    if not isinstance(seed, jax.core.Tracer):
        if isinstance(seed, jax.Array) and seed.dtype == jnp.uint32 and seed.shape == (2,):
            raise InputError(
                "seed: a raw key (jax.random.PRNGKey) given; jax.random.key or a whole "
                "number expected"
            )
        numbers = _per_sequence("seed", seed, sequences, np.int64, 0, _SEEDS - 1).astype(np.int32)
        seed = numbers if np.ndim(seed) else np.asarray(seed, np.int32)
    elif not jnp.issubdtype(seed.dtype, jnp.integer):
        raise InputError(
            f"seed: traced numbers of {seed.dtype} given; whole numbers or jax.random.key expected"
        )
    else:
        _require_shape(seed, sequences)
    if np.ndim(seed) == 0:
        return _folded(jax.random.key(seed), np.arange(first, first + sequences, dtype=np.int32))
    return _alone(seed)


def _require_shape(seed: Array, sequences: int) -> None:
    if seed.shape not in ((), (sequences,)):
        raise InputError(
            f"seed: shape {list(seed.shape)} given for {sequences} sequences; one for "
            "all or one a sequence expected"
        )


@jax.jit
def _folded(key: Key[Array, ""], sequences: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sequences)


@jax.jit
def _alone(seeds: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds)


def _penalties(
    sequences: int, repetition: ArrayLike, presence: ArrayLike, frequency: ArrayLike
) -> Penalties | None:
    values = (
        _per_sequence("repetition_penalty", repetition, sequences, np.float32, 0.01, 100.0),
        _per_sequence("presence_penalty", presence, sequences, np.float32, -100.0, 100.0),
        _per_sequence("frequency_penalty", frequency, sequences, np.float32, -100.0, 100.0),
    )
    idle = all((value == neutral).all() for value, neutral in zip(values, (1, 0, 0)))
    return None if idle else Penalties(*map(jnp.asarray, values))


def _bias(sequences: int, given: LogitBias | Sequence[LogitBias] | None) -> Bias | None:
    """Tokens and values of each sequence, filled up to a power of two so that few programs serve
    all.
    """
    tables = (
        [given] * sequences if isinstance(given, Mapping) else list(given or ()) or [{}] * sequences
    )
    if len(tables) != sequences:
        raise InputError(
            f"logit_bias: {len(tables)} tables given for {sequences} sequences; one for "
            "all or one a sequence expected"
        )
    for token, value in ((token, value) for table in tables for token, value in table.items()):
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_whole(token) and 0 <= token < NOWHERE and real and abs(value) <= 1e4):
            raise InputError(
                f"logit_bias: {token!r}: {value!r} given; a token id with a number from "
                "-10000 to 10000 expected"
            )
    longest = max(map(len, tables), default=0)
    if longest == 0:
        return None
    tokens = np.full((sequences, 1 << (longest - 1).bit_length()), NOWHERE, np.int32)
    values = np.zeros(tokens.shape, np.float32)
    for sequence, table in enumerate(tables):
        tokens[sequence, : len(table)], values[sequence, : len(table)] = (
            list(table.keys()),
            list(table.values()),
        )
    return Bias(jnp.asarray(tokens), jnp.asarray(values))


def begin_history(tokens: Int[Array, "B T"], lengths: Int[Array, " B"], vocab: int) -> History:
    """The history of prompts, padded on the right with anything, before the first token is
    drawn.
    """
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    sequences = jnp.arange(tokens.shape[0])[:, None]
    seen = (
        jnp.zeros((tokens.shape[0], vocab), bool)
        .at[sequences, jnp.where(real, tokens, NOWHERE)]
        .set(True, mode="drop")
    )
    return History(seen, jnp.zeros(seen.shape, jnp.int32))


def remember(history: History, token: Int[Array, " B"], drawn: Bool[Array, " B"]) -> History:
    """The history with one token more in every sequence where `drawn` is true."""
    sequences = jnp.arange(token.shape[0])
    return history._replace(counts=history.counts.at[sequences, token].add(drawn.astype(jnp.int32)))


def adjust(
    logits: Float[Array, "B V"], sampling: Sampling, history: History | None
) -> Float[Array, "B V"]:
    """Logits after bias and penalties."""
    if sampling.bias is not None:
        sequences = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[sequences, sampling.bias.tokens].add(sampling.bias.values, mode="drop")
    if sampling.penalties is None or history is None:
        return logits
    repetition, presence, frequency = (values[:, None] for values in sampling.penalties)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(history.prompt | (history.counts > 0), repeated, logits)
    return logits - presence * (history.counts > 0) - frequency * history.counts


def _boundary(
    gap: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """The smallest gap up to which the weights add up to at least `target`; beyond all if they
    never do.

    Exact, by bisection over the 31 bits of a non-negative float32, whose order is that of the bits:
    31 sums cost less than sorting a vocabulary, on every kind of device.
    """
    bits = lax.bitcast_convert_type(gap, jnp.int32)

    def narrow(i: Array, low: Array) -> Array:
        """Settles one bit: it is set if the weights below do not suffice."""
        candidate = low | (1 << (30 - i))
        enough = jnp.sum(jnp.where(bits < candidate[:, None], weights, 0.0), axis=-1) >= target
        return jnp.where(enough, low, candidate)

    low = lax.fori_loop(0, 31, narrow, jnp.zeros((gap.shape[0],), jnp.int32))
    boundary = lax.bitcast_convert_type(low, jnp.float32)
    return jnp.where(jnp.isnan(boundary), jnp.inf, boundary)[:, None]  # all bits set: never reached


def _limited(gap: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Which tokens top-k and then top-p leave."""
    vocab = gap.shape[-1]
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, vocab).astype(jnp.float32)
    kept = gap <= _boundary(gap, jnp.ones_like(gap), jnp.minimum(top_k, vocab))
    weights = jnp.where(kept, jnp.exp(-gap), 0.0)
    # Rounded sums may pass the total early: top_p of 1 means all tokens, whatever the sums say.
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p * jnp.sum(weights, axis=-1), jnp.inf)
    return kept & (gap <= _boundary(gap, weights, top_p))


def restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k, top-p and min-p, in that order; tokens that cannot be
    sampled are at -inf.

    The largest logit becomes 0. The most probable token always stays; tokens that tie with the last
    one kept stay too. Sequences at temperature 0 are left at temperature 1: their sample is not
    used.
    """
    # Relative to the largest, so that no temperature, however small, makes an infinity of it.
    gap = jnp.max(logits, axis=-1, keepdims=True) - logits
    gap /= jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    limits = jnp.any((sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1)))
    kept = lax.cond(limits, lambda: _limited(gap, sampling), lambda: jnp.ones(gap.shape, bool))
    kept &= jnp.exp(-gap) >= sampling.min_p[:, None]
    return jnp.where(kept, -gap, -jnp.inf)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, position: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each sequence.

    Args:
      logits: float32, after `adjust`.
      sampling: settings of each sequence.
      position: position of the token to be sampled, which is folded into the sequence's key;
        no key is consumed twice.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        """Tokens of sequences that are not greedy, each from its own key."""
        keys = jax.vmap(jax.random.fold_in)(sampling.key, position)
        drawn = jax.vmap(jax.random.categorical)(keys, restrict(logits, sampling)).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, best)

    # When every sequence is greedy nothing is sampled.
    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: best)

"""Autoregressive decoding as pure functions: prefill, one step, and a loop with early exit. No host work inside."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Bool, Float, Int, Parameters
from llama_jax.errors import InputError
from llama_jax.generation.sampling import Sampling, sample
from llama_jax.model.cache import Cache, init_cache
from llama_jax.model.llama import Llama, apply

NOTHING = -1  # stands in the output where a row was already done


class Progress(NamedTuple):
    """Where each row stands between two steps.

    Attributes:
      token: the row's last token, drawn but not yet in the cache.
      cache: keys and values of all tokens before `token`.
      remaining: tokens the row may still draw.
      done: whether the row has drawn a stop token or has nothing remaining.
    """

    token: Int[Array, " B"]
    cache: Cache
    remaining: Int[Array, " B"]
    done: Bool[Array, " B"]


def prefill(
    model: Llama, params: Parameters, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs prompts of unequal length, padded on the right with anything.

    Returns:
      Logits after each row's last real token (float32), and the cache with each row's real tokens in it.
    """
    features = apply(model, params, tokens, None, cache, method="features")
    last = jnp.take_along_axis(features.last, (lengths - 1)[:, None, None], axis=1)
    logits = apply(model, params, last, method="unembed")[:, 0]
    return logits, Cache(features.cache.layers, cache.lengths + lengths)


def decode(model: Llama, params: Parameters, token: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
    """Runs one token of each row; the cache grows by one token a row.

    Returns:
      Logits of the next token (float32) and the cache.
    """
    features = apply(model, params, token[:, None], None, cache, method="features")
    logits = apply(model, params, features.last, method="unembed")[:, 0]
    return logits, Cache(features.cache.layers, cache.lengths + 1)


def _advance(
    logits: Float[Array, "B V"], cache: Cache, sampling: Sampling, stop_ids: Int[Array, " M"], remaining: Array, done: Array
) -> tuple[Progress, Int[Array, " B"]]:
    """Draws the next token of each row that is not done; returns the new state and what was drawn."""
    token = sample(logits, sampling, cache.lengths)
    drawn = jnp.where(done, NOTHING, token)
    remaining = remaining - jnp.where(done, 0, 1)
    done = done | jnp.any(token[:, None] == stop_ids[None, :], axis=1) | (remaining <= 0)
    return Progress(token, cache, remaining, done), drawn


def begin(
    model: Llama, params: Parameters, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache,
    sampling: Sampling, stop_ids: Int[Array, " M"], budget: Int[Array, " B"],
) -> tuple[Progress, Int[Array, " B"]]:  # fmt: skip
    """Prefills the prompts and draws the first token of each row that may draw `budget > 0` tokens."""
    logits, cache = prefill(model, params, tokens, lengths, cache)
    return _advance(logits, cache, sampling, stop_ids, budget, budget <= 0)


def advance(
    model: Llama, params: Parameters, progress: Progress, sampling: Sampling, stop_ids: Int[Array, " M"],
    steps: Int[Array, ""] | int, room: int,
) -> tuple[Progress, Int[Array, "B room"]]:  # fmt: skip
    """Up to `steps` (at most `room`) decoding steps; ends as soon as every row is done.

    Returns:
      The state after them, and the tokens drawn, `NOTHING` where a row was done.
    """

    def unfinished(carry: tuple[Array, Progress, Array]) -> Array:
        """Whether steps are left and a row that needs them."""
        step, progress, _ = carry
        return (step < steps) & ~jnp.all(progress.done)

    def step(carry: tuple[Array, Progress, Array]) -> tuple[Array, Progress, Array]:
        """One token of every row."""
        step, progress, out = carry
        lengths = progress.cache.lengths
        logits, cache = decode(model, params, progress.token, progress.cache)
        # A row that is done runs along with the others: its length stays, so it overwrites a slot that nobody reads.
        cache = Cache(cache.layers, jnp.where(progress.done, lengths, cache.lengths))
        progress, drawn = _advance(logits, cache, sampling, stop_ids, progress.remaining, progress.done)
        return step + 1, progress, out.at[:, step].set(drawn)

    nothing = jnp.full((progress.token.shape[0], room), NOTHING, jnp.int32)
    _, progress, out = lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), progress, nothing))
    return progress, out


def generate_tokens(
    model: Llama,
    params: Parameters,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    sampling: Sampling,
    stop_ids: Int[Array, " M"],
    max_new_tokens: int,
) -> Int[Array, "B new"]:
    """The whole of it as one function to be jitted into a larger program: prompts in, tokens out.

    Args:
      model: the module; static under `jit`.
      params: parameters in the form that `model.options.scan` says.
      prompts: token ids, padded on the right with anything.
      lengths: real tokens of each row.
      sampling: settings of each row.
      stop_ids: tokens that end a row (the stop token itself is part of the output); may be empty.
      max_new_tokens: at most so many tokens a row; static. `T + max_new_tokens` slots are reserved.

    Returns:
      New tokens, filled up with `NOTHING` after a row's stop token.

    Raises:
      InputError: for a negative `max_new_tokens`.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: {max_new_tokens} given; 0 or more expected")
    rows, length = prompts.shape
    if max_new_tokens == 0:
        return jnp.zeros((rows, 0), jnp.int32)
    cache = init_cache(model.config, rows, length + max_new_tokens, model.options.compute_dtype, model.options.scan)
    budget = jnp.full((rows,), max_new_tokens, jnp.int32)
    progress, first = begin(model, params, prompts, lengths, cache, sampling, stop_ids, budget)
    _, rest = advance(model, params, progress, sampling, stop_ids, max_new_tokens - 1, room=max_new_tokens)
    return jnp.concatenate([first[:, None], rest[:, :-1]], axis=1)

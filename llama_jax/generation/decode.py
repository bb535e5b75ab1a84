"""Autoregressive decoding as pure functions: prefill, one step, and a loop with early exit. No host
work inside.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Bool, Float, Int, Parameters
from llama_jax.errors import InputError
from llama_jax.generation.checks import Unchecked, whole
from llama_jax.generation.sampling import History, Sampling, adjust, begin_history, remember, sample
from llama_jax.model.cache import Cache, init_cache, take_sequences
from llama_jax.model.llama import Llama, apply, require_tokens
from llama_jax.model.splash import fits_splash
from llama_jax.parallel.sharding import whole_sequences

NOTHING = -1  # stands in the output where a sequence was already done
BROKEN = (
    -2
)  # stands there once where the logits of a sequence are NaN or infinite, which ends the sequence


class Progress(NamedTuple):
    """Where each sequence stands between two steps.

    Attributes:
      token: the sequence's last token, sampled but not yet in the cache.
      cache: keys and values of all tokens before `token`.
      remaining: tokens that the sequence may still sample.
      done: whether the sequence has sampled a stop token or has nothing remaining.
      history: what penalties look at; `None` without penalties.
    """

    token: Int[Array, " B"]
    cache: Cache
    remaining: Int[Array, " B"]
    done: Bool[Array, " B"]
    history: History | None = None


class SampledTokens(NamedTuple):
    """Sampled tokens, with the requested log-probabilities; one column per step in the output of a
    loop.

    Log-probabilities are those of the model itself, before bias, penalties, temperature and
    restriction.

    Attributes:
      token: `NOTHING` where a sequence was done, `BROKEN` where its logits are not finite.
      logprob: of the token; `None` if not asked for.
      top_tokens: the `n` most probable tokens; `None` unless `n > 0` were asked for.
      top_logprobs: their log-probabilities.
    """

    token: Int[Array, " *R"]
    logprob: Float[Array, " *R"] | None = None
    top_tokens: Int[Array, "*R n"] | None = None
    top_logprobs: Float[Array, "*R n"] | None = None


class Rollout(NamedTuple):
    """What `generate_tokens` gives.

    Attributes:
      tokens: new tokens, filled up with `NOTHING` (-1) after a sequence's stop token; `BROKEN` (-2)
        is the last of a sequence whose logits are NaN or infinite, with a log-probability of NaN.
      logprobs: the log-probability of each under the model, 0 where there is none.
    """

    tokens: Int[Array, "R new"]
    logprobs: Float[Array, "R new"]


def sees_itself(model: Llama, length: int) -> bool:
    """Whether prefill of this length into an empty cache can use plain self-attention: not if the
    requested kernel does not take this length.
    """
    return model.options.attention != "splash" or fits_splash(length, model.config.head_dim)


def prefill(
    model: Llama,
    params: Parameters,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    fresh: bool = False,
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs prompts of unequal length, padded on the right with anything, after the tokens that the
    cache holds.

    Args:
      model: the module.
      params: its parameters.
      tokens: of the prompts.
      lengths: real tokens of each sequence.
      cache: what came before.
      fresh: nothing did; static.

    Returns:
      Logits after each sequence's last real token (float32; meaningless for a sequence without
      one), and the cache with each sequence's real tokens in it.
    """
    features = apply(model, params, tokens, None, cache, fresh=fresh, method="features")
    last = jnp.take_along_axis(features.last, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits = apply(model, params, last, method="unembed")[:, 0]
    return logits, Cache(features.cache.layers, cache.lengths + lengths)


def prefill_more(
    model: Llama,
    params: Parameters,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    logits: Float[Array, "B V"],
) -> tuple[Float[Array, "B V"], Cache]:
    """`prefill` of the next piece of long prompts; sequences that have no token in this piece keep
    their `logits`.
    """
    after, cache = prefill(model, params, tokens, lengths, cache)
    return jnp.where((lengths > 0)[:, None], after, logits), cache


def decode(
    model: Llama, params: Parameters, token: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs one token of each sequence; the cache grows by one token a sequence.

    Returns:
      Logits of the next token (float32) and the cache.
    """
    features = apply(model, params, token[:, None], None, cache, method="features")
    logits = apply(model, params, features.last, method="unembed")[:, 0]
    return logits, Cache(features.cache.layers, cache.lengths + 1)


def measured(
    logits: Float[Array, "*R V"],
    token: Int[Array, " *R"],
    drawn: Int[Array, " *R"],
    logprobs: int | None,
) -> SampledTokens:
    """The sampled tokens, with log-probabilities: of the token and of the `logprobs` most probable
    ones.
    """
    if logprobs is None:
        return SampledTokens(drawn)
    every = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(every, token[..., None], axis=-1)[..., 0]
    if logprobs == 0:
        return SampledTokens(drawn, chosen)
    values, tokens = lax.top_k(every, logprobs)
    return SampledTokens(drawn, chosen, tokens, values)


def finite(logits: Float[Array, "*R V"]) -> Bool[Array, " *R"]:
    """Whether the largest logit is a number: not NaN, which is larger than any other for `argmax`,
    and not infinite.

    The value at the argmax that decoding computes anyway, instead of another pass over the
    vocabulary.
    """
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.isfinite(jnp.take_along_axis(logits, best, axis=-1))[..., 0]


def _draw(
    logits: Float[Array, "B V"],
    progress: Progress,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    logprobs: int | None,
) -> tuple[Progress, SampledTokens]:
    """Draws the next token of each sequence that is not done."""
    done, history = progress.done, progress.history
    adjusted = adjust(logits, sampling, history)
    token, broken = sample(adjusted, sampling, progress.cache.lengths), ~done & ~finite(adjusted)
    if history is not None:
        history = remember(history, token, ~done)
    drawn = measured(
        logits, token, jnp.where(done, NOTHING, jnp.where(broken, BROKEN, token)), logprobs
    )
    remaining = progress.remaining - jnp.where(done, 0, 1)
    done = done | broken | jnp.any(token[:, None] == stop_ids, axis=1) | (remaining <= 0)
    return Progress(token, progress.cache, remaining, done, history), drawn


def begin(
    logits: Float[Array, "B V"],
    cache: Cache,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    budget: Int[Array, " B"],
    history: History | None,
    logprobs: int | None = None,
) -> tuple[Progress, SampledTokens]:
    """Samples the first token of each sequence that may sample `budget > 0` tokens, from the logits
    after its prompt.
    """
    nothing = jnp.zeros(budget.shape, jnp.int32)
    return _draw(
        logits, Progress(nothing, cache, budget, budget <= 0, history), sampling, stop_ids, logprobs
    )


def advance(
    model: Llama,
    params: Parameters,
    progress: Progress,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    steps: Int[Array, ""] | int,
    room: int,
    logprobs: int | None = None,
) -> tuple[Progress, SampledTokens]:
    """Up to `steps` (at most `room`) decoding steps; ends as soon as every sequence is done.

    Returns:
      The state after them, and the sampled tokens, `room` columns with `NOTHING` where a sequence
      was done.
    """

    def unfinished(carry: tuple[Array, Progress, SampledTokens]) -> Array:
        """Whether steps are left and a sequence that needs them."""
        step, progress, _ = carry
        return (step < steps) & ~jnp.all(progress.done)

    def step(carry: tuple[Array, Progress, SampledTokens]) -> tuple[Array, Progress, SampledTokens]:
        """One token of every sequence."""
        step, progress, out = carry
        lengths = progress.cache.lengths
        logits, cache = decode(model, params, progress.token, progress.cache)
        # A sequence that is done runs along with the others: its length stays, so it overwrites a
        # slot that nobody reads.
        cache = Cache(cache.layers, jnp.where(progress.done, lengths, cache.lengths))
        progress, drawn = _draw(
            logits, progress._replace(cache=cache), sampling, stop_ids, logprobs
        )
        return (
            step + 1,
            progress,
            jax.tree.map(lambda all_, new: all_.at[:, step].set(new), out, drawn),
        )

    start = (jnp.zeros((), jnp.int32), progress, empty(progress.token.shape[0], room, logprobs))
    _, progress, out = lax.while_loop(unfinished, step, start)
    return progress, out


def empty(sequences: int, room: int, logprobs: int | None) -> SampledTokens:
    """Space for sampled tokens in `room` columns."""
    tokens = jnp.full((sequences, room), NOTHING, jnp.int32)
    if logprobs is None:
        return SampledTokens(tokens)
    chosen = jnp.zeros((sequences, room))
    if logprobs == 0:
        return SampledTokens(tokens, chosen)
    return SampledTokens(
        tokens,
        chosen,
        jnp.zeros((sequences, room, logprobs), jnp.int32),
        jnp.zeros((sequences, room, logprobs)),
    )


def generate_tokens(
    model: Llama,
    params: Parameters,
    prompts: Any,
    lengths: Any,
    sampling: Sampling,
    stop_ids: Int[Array, "*R M"] | Sequence[int],
    max_new_tokens: Unchecked,
    samples: int = 1,
) -> Rollout:
    """The whole of it as one function to be jitted into a larger program: prompts in, tokens and
    log-probabilities out.

    Args:
      model: the module; static under `jit`.
      params: parameters in the form that `model.options.scan` says.
      prompts: token ids `[B, T]`, padded on the right with anything.
      lengths: real tokens of each sequence, `[B]`.
      sampling: settings of each of the `R = B * samples` sequences of the output.
      stop_ids: tokens that end a sequence (the stop token itself is part of the output), for all
        sequences or for each; may be empty, and filled up with `NOTHING`.
      max_new_tokens: limit of new tokens per sequence; static. `T + max_new_tokens` slots are
        reserved, as many as the model's context at most.
      samples: answers to each prompt, static; they share its prefill and lie next to each other in
        the output.

    Raises:
      InputError: while it is traced, for a `max_new_tokens` that is no whole number from 0 on, or
        that with `T` goes beyond the context; for prompts that are no array `[B, T]`; for lengths
        of another number of prompts and sampling of another number of sequences.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
    require_tokens(prompts)
    lengths = jnp.asarray(lengths)
    sequences, length = prompts.shape
    context = model.config.context_length
    if length + max_new_tokens > context:
        raise InputError(
            f"prompts of {length} tokens with max_new_tokens {max_new_tokens} given; "
            f"{context} (the model's context) or fewer together expected"
        )
    total = sequences * samples
    if lengths.shape != (sequences,):
        raise InputError(
            f"lengths of shape {list(lengths.shape)} given for {sequences} prompts; one "
            "a prompt expected"
        )
    if sampling.temperature.shape != (total,):
        raise InputError(
            f"sampling for {sampling.temperature.shape[0]} sequences given with "
            f"{sequences} prompts and {samples} samples of each; "
            f"make_sampling({total}, ...) expected: prompts times samples"
        )
    model = Llama(
        model.config, dataclasses.replace(model.options, rules=whole_sequences(model.options.rules))
    )
    if max_new_tokens == 0:
        return Rollout(jnp.zeros((total, 0), jnp.int32), jnp.zeros((total, 0)))
    options = model.options
    cache = init_cache(
        model.config, sequences, length + max_new_tokens, options.resolved_cache_dtype, options.scan
    )
    logits, cache = prefill(
        model, params, prompts, lengths, cache, fresh=sees_itself(model, length)
    )
    history = (
        None
        if sampling.penalties is None
        else begin_history(prompts, lengths, model.config.vocab_size)
    )
    if samples > 1:
        origin = jnp.repeat(jnp.arange(sequences), samples)
        logits, cache = logits[origin], take_sequences(cache, origin)
        history = jax.tree.map(lambda x: x[origin], history)
    stop_ids = jnp.asarray(stop_ids, jnp.int32)
    stops = jnp.broadcast_to(stop_ids, (total, stop_ids.shape[-1]))
    budget = jnp.full((total,), max_new_tokens, jnp.int32)
    progress, first = begin(logits, cache, sampling, stops, budget, history, logprobs=0)
    _, rest = advance(
        model,
        params,
        progress,
        sampling,
        stops,
        max_new_tokens - 1,
        room=max_new_tokens,
        logprobs=0,
    )
    tokens, logprobs = (
        jnp.concatenate([one[:, None], more[:, :-1]], axis=1)
        for one, more in zip(jax.tree.leaves(first), jax.tree.leaves(rest))
    )
    return Rollout(tokens, jnp.where(tokens == NOTHING, 0.0, logprobs))

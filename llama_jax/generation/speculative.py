"""Speculative decoding: several tokens are proposed cheaply and checked by the model in one pass
(arXiv:2211.17192).

The tokens are distributed exactly as without it, whatever the draft: a draft token `d` sampled from
`q` is kept with probability min(1, p(d) / q(d)); at the first rejection, a token is sampled from
max(p - q, 0), normalised. At temperature 0 a proposal is kept if it is the most probable token.
Slot = position makes taking back free: lengths alone decide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Bool, Float, Int, Parameters
from llama_jax.generation.decode import (
    BROKEN,
    NOTHING,
    Progress,
    SampledTokens,
    decode,
    empty,
    finite,
    measured,
)
from llama_jax.generation.sampling import Sampling, adjust, restrict
from llama_jax.model.cache import Cache
from llama_jax.model.llama import Llama, apply

_LONGEST_MATCH = 3  # tokens that prompt lookup compares at most

# What a sequence's random numbers are for, folded into its key beside the position.
_DRAFT, _ACCEPT, _REPLACE = 1, 2, 3


class DraftState(NamedTuple):
    """What proposals are made from.

    Attributes:
      text: each sequence's tokens so far, by slot; those beyond the sequence's last token are
        meaningless.
      cache: the draft model's, with the same lengths as the model's own; `None` for prompt lookup.
    """

    text: Int[Array, "B S"]
    cache: Cache | None


class Draft(NamedTuple):
    """Draft tokens, and the probabilities they were sampled with; `None` where nothing was
    sampled.
    """

    tokens: Int[Array, "B k"]
    probabilities: Float[Array, "B k V"] | None


def look_up(text: Int[Array, "B S"], last: Int[Array, " B"], count: int) -> Int[Array, "B k"]:
    """The tokens that followed the last tokens of each sequence at an earlier occurrence (prompt
    lookup).

    The place with the longest match, up to three tokens, is taken, the latest of these; a
    repetition is continued.

    Args:
      text: tokens by slot.
      last: slot of each sequence's last token.
      count: how many tokens to propose.
    """
    slots = jnp.arange(text.shape[1])[None]
    matched, longest = slots < last[:, None], jnp.zeros(text.shape, jnp.int32)
    for back in range(_LONGEST_MATCH):
        wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0)[:, None], axis=1)
        matched &= (jnp.roll(text, back, axis=1) == wanted) & (slots >= back)
        longest += matched
    found = jnp.argmax(longest * text.shape[1] + slots * (longest > 0), axis=1)
    period = jnp.maximum(last - found, 1)[:, None]
    places = found[:, None] + 1 + jnp.arange(count)[None] % period
    return jnp.take_along_axis(text, places, axis=1)


def _distribution(logits: Float[Array, "B ... V"], sampling: Sampling) -> Float[Array, "B ... V"]:
    """Probabilities that tokens are sampled with; at temperature 0 all of it lies on the most
    probable token.
    """
    vocab = logits.shape[-1]
    every = logits.reshape(-1, vocab)
    repeated = jax.tree.map(
        lambda x: jnp.repeat(x, every.shape[0] // logits.shape[0], axis=0), sampling
    )
    every = adjust(every, repeated, None)
    certain = jax.nn.one_hot(jnp.argmax(every, axis=-1), vocab)
    drawn = jax.nn.softmax(restrict(every, repeated), axis=-1)
    return jnp.where(repeated.temperature[:, None] > 0, drawn, certain).reshape(logits.shape)


def _keys(sampling: Sampling, positions: Int[Array, "B ..."], use: int) -> Array:
    """A key for each sequence, position and use."""

    def one(key: Array, at: Array) -> Array:
        """Of one position of one sequence."""
        return jax.random.fold_in(jax.random.fold_in(key, at), use)

    per_sequence = one if positions.ndim == 1 else jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(per_sequence)(sampling.key, positions)


def _drawn(probabilities: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """A token a sequence; of a distribution on one token, that token."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities)).astype(jnp.int32)


def propose(
    model: Llama,
    params: Parameters,
    token: Int[Array, " B"],
    cache: Cache,
    sampling: Sampling,
    count: int,
) -> tuple[Draft, Cache]:
    """`count` tokens sampled one after the other by a draft model, whose cache takes up `token` and
    all of them.
    """

    def step(
        carry: tuple[Array, Cache], _: None
    ) -> tuple[tuple[Array, Cache], tuple[Array, Array]]:
        """One token of every sequence."""
        token, cache = carry
        logits, cache = decode(model, params, token, cache)
        probabilities = _distribution(logits, sampling)
        token = _drawn(probabilities, _keys(sampling, cache.lengths, _DRAFT))
        return (token, cache), (token, probabilities)

    # One step more than proposals: the last one's keys and values are needed if all of them are
    # kept.
    (_, cache), (tokens, probabilities) = lax.scan(step, (token, cache), None, length=count + 1)
    return Draft(tokens[:count].T, probabilities[:count].swapaxes(0, 1)), cache


def judge(
    logits: Float[Array, "B W V"], draft: Draft, sampling: Sampling, lengths: Int[Array, " B"]
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Which proposals are kept, and the token that follows them.

    Args:
      logits: the model's, after the last token and after each of the `W - 1` proposals.
      draft: the proposals.
      sampling: settings of each sequence.
      lengths: position of each sequence's last token.

    Returns:
      Tokens, of which the first ones are kept proposals and one more the model's own; and how many
      count.
    """
    width = logits.shape[1]

    def greedily() -> tuple[Array, Array]:
        """The model's most probable tokens; those after a wrong proposal do not count."""
        best = jnp.argmax(_biased(logits, sampling), axis=-1).astype(jnp.int32)
        return best, _leading(best[:, :-1] == draft.tokens)

    def randomly() -> tuple[Array, Array]:
        """DraftState kept by chance, and a token of what probability is left."""
        p = _distribution(logits, sampling)
        q = (
            jax.nn.one_hot(draft.tokens, p.shape[-1])
            if draft.probabilities is None
            else draft.probabilities
        )
        keys = _keys(sampling, lengths[:, None] + 1 + jnp.arange(width - 1), _ACCEPT)
        chance = jax.vmap(jax.vmap(jax.random.uniform))(keys)
        p_of, q_of = (
            jnp.take_along_axis(x[:, : width - 1], draft.tokens[..., None], axis=-1)[..., 0]
            for x in (p, q)
        )
        kept = _leading(chance * q_of < p_of)
        left = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
        left, whole = (jnp.take_along_axis(x, kept[:, None, None], axis=1)[:, 0] for x in (left, p))
        left = jnp.where(
            jnp.any(left > 0, axis=-1, keepdims=True), left, whole
        )  # nothing left: p = q, but for rounding
        own = _drawn(left, _keys(sampling, lengths + 1 + kept, _REPLACE))
        tokens = jnp.where(
            jnp.arange(width) < kept[:, None], jnp.pad(draft.tokens, ((0, 0), (0, 1))), own[:, None]
        )
        return tokens.astype(jnp.int32), kept

    tokens, kept = lax.cond(jnp.any(sampling.temperature > 0), randomly, greedily)
    return tokens, kept + 1


def _biased(logits: Float[Array, "B W V"], sampling: Sampling) -> Float[Array, "B W V"]:
    """Logits of all positions after the bias of their sequence."""
    if sampling.bias is None:
        return logits
    return jax.vmap(lambda at: adjust(at, sampling, None), in_axes=1, out_axes=1)(logits)


def _leading(kept: Bool[Array, "B k"]) -> Int[Array, " B"]:
    """How many are kept before the first that is not."""
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)


def _accept(
    progress: Progress,
    tokens: Int[Array, "B W"],
    count: Int[Array, " B"],
    stop_ids: Array,
    sound: Bool[Array, "B W"],
) -> tuple[Progress, Array]:
    """Takes up to `count` tokens a sequence, up to a stop token and to the tokens that the sequence
    may still sample; the rest is `NOTHING`.

    The first token that is not `sound` becomes `BROKEN` and ends the sequence.
    """
    width = tokens.shape[1]
    stops = jnp.any(tokens[:, :, None] == stop_ids[:, None, :], axis=-1)
    until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, width + 1)
    until_broken = 1 + _leading(sound)
    count = jnp.where(
        progress.done, 0, jnp.minimum(jnp.minimum(count, progress.remaining), until_stop)
    )
    broken = until_broken <= count
    count = jnp.minimum(count, until_broken)
    emitted = jnp.where(
        jnp.arange(width) < count[:, None], jnp.where(sound, tokens, BROKEN), NOTHING
    )
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    remaining = progress.remaining - count
    cache = Cache(progress.cache.layers, progress.cache.lengths + count)
    done = progress.done | broken | (until_stop <= count) | (remaining <= 0)
    return Progress(jnp.where(count > 0, last, progress.token), cache, remaining, done), emitted


def speculate(
    model: Llama,
    params: Parameters,
    progress: Progress,
    proposals: DraftState,
    sampling: Sampling,
    stop_ids: Int[Array, "B M"],
    steps: Int[Array, ""] | int,
    *,
    room: int,
    count: int,
    draft_model: Llama | None = None,
    draft_params: Parameters | None = None,
    logprobs: int | None = None,
) -> tuple[Progress, DraftState, SampledTokens]:
    """Up to `steps` (at most `room`) rounds of `count` proposals and their judgement; ends as soon
    as every sequence is done.

    The cache needs slots for `count + 1` tokens beyond the longest text.

    Returns:
      The state after them, and the sampled tokens: `count + 1` columns per round, of which the
      first is `NOTHING` only where a sequence was done before.
    """
    width = count + 1

    def unfinished(carry: tuple[Array, Progress, DraftState, SampledTokens]) -> Array:
        """Whether rounds are left and a sequence that needs them."""
        return (carry[0] < steps) & ~jnp.all(carry[1].done)

    def guess(progress: Progress, proposals: DraftState) -> tuple[Draft, Cache | None]:
        """By the draft model, or by looking back."""
        if draft_model is None or draft_params is None or proposals.cache is None:
            return Draft(look_up(proposals.text, progress.cache.lengths, count), None), None
        return propose(draft_model, draft_params, progress.token, proposals.cache, sampling, count)

    def step(
        carry: tuple[Array, Progress, DraftState, SampledTokens],
    ) -> tuple[Array, Progress, DraftState, SampledTokens]:
        """One round of every sequence."""
        step, progress, proposals, out = carry
        draft, draft_cache = guess(progress, proposals)
        lengths = progress.cache.lengths
        checked = jnp.concatenate([progress.token[:, None], draft.tokens], axis=1)
        features = apply(model, params, checked, None, progress.cache, method="features")
        logits = apply(model, params, features.last, method="unembed")
        tokens, kept = judge(logits, draft, sampling, lengths)
        progress = progress._replace(cache=Cache(features.cache.layers, lengths))
        progress, emitted = _accept(progress, tokens, kept, stop_ids, finite(logits))
        drawn = measured(logits, tokens, emitted, logprobs)
        text = jax.vmap(
            lambda sequence, new, at: lax.dynamic_update_slice(sequence, new, (at + 1,))
        )(proposals.text, tokens, lengths)
        if draft_cache is not None:
            draft_cache = Cache(draft_cache.layers, progress.cache.lengths)
        out = jax.tree.map(
            lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, step * width, axis=1),
            out,
            drawn,
        )
        return step + 1, progress, DraftState(text, draft_cache), out

    nothing = empty(progress.token.shape[0], room * width, logprobs)
    _, progress, proposals, out = lax.while_loop(
        unfinished, step, (jnp.zeros((), jnp.int32), progress, proposals, nothing)
    )
    return progress, proposals, out

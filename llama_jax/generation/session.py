"""A batch of prompts being answered: the state that the host keeps between two calls of the
compiled programs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.axes import Array, Parameters
from llama_jax.errors import InputError
from llama_jax.generation.decode import BROKEN, NOTHING, SampledTokens, sees_itself
from llama_jax.generation.programs import (
    ROOM,
    Programs,
    bucket_sequences,
    bucket_size,
    bucket_slots,
)
from llama_jax.generation.sampling import Sampling, begin_history
from llama_jax.generation.speculative import DraftState
from llama_jax.model.cache import Cache


class NotFiniteError(InputError):
    """Logits of a sequence are NaN or infinite: no token can be chosen from them.

    Attributes:
      sequence: which, from 0.
    """

    def __init__(self, sequence: int, tokens: int, dtype: str) -> None:
        advice = (
            "take dtype bfloat16 or float32, whose numbers reach further, or check"
            if dtype == "float16"
            else "check"
        )
        super().__init__(
            f"sequence {sequence + 1}: logits that are NaN or infinite computed for new "
            f"token {tokens + 1}, finite numbers expected; "
            f"{advice} the weights for NaN and damage"
        )
        self.sequence = sequence


class Runner(NamedTuple):
    """Parameters, and the programs that run them."""

    params: Parameters
    programs: Programs


class Request(NamedTuple):
    """What is asked of a session, checked.

    Attributes:
      prompts: token ids of each prompt.
      max_new_tokens: limit of each sequence.
      sampling: settings of each sequence, `samples` sequences a prompt.
      stop_ids: of each sequence.
      samples: answers to each prompt.
      logprobs: `None`, 0 for those of the sampled tokens, `n` for the `n` best as well.
      prefix: tokens that need not be run again.
      guesses: draft tokens at a time; 0 for no speculation.
      draft: the draft model; `None` for prompt lookup.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: list[int]
    sampling: Sampling
    stop_ids: list[list[int]]
    samples: int
    logprobs: int | None
    prefix: "Prefix | None"
    guesses: int
    draft: Runner | None


class TokenChunk(NamedTuple):
    """New tokens of one sequence, in a chunk or in all.

    Attributes:
      token_ids: a stop token included.
      logprobs: log-probability of each under the model, whatever the sampling; `None` if not asked
        for.
      top_logprobs: for each, the most probable tokens with their log-probabilities, best first;
        `None` if not asked for.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def first(self, count: int) -> "TokenChunk":
        """The first `count` of them."""
        logprobs = None if self.logprobs is None else self.logprobs[:count]
        return TokenChunk(
            self.token_ids[:count],
            logprobs,
            None if self.top_logprobs is None else self.top_logprobs[:count],
        )


def joined(parts: Sequence[TokenChunk]) -> TokenChunk:
    """Chunks of one sequence, in their order, as one."""
    ids, logprobs, top = [list(column) for column in zip(*parts)] if parts else [[], [None], [None]]
    return TokenChunk(
        list(itertools.chain(*ids)),
        None if None in logprobs else list(itertools.chain(*logprobs)),
        None if None in top else list(itertools.chain(*top)),
    )


class Tokens(NamedTuple):
    """What one sequence gave; the fields of `TokenChunk`, and why it ended: `stop` (a stop token)
    or `length`.
    """

    token_ids: list[int]
    stop_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class Prefix(NamedTuple):
    """Tokens that need not be run again: prompts that begin alike take their keys and values from
    here.

    Attributes:
      token_ids: tokens in the cache.
      cache: of one sequence.
      runner: the parameters and programs of the cache; with others it means
        nothing.
    """

    token_ids: list[int]
    cache: Cache
    runner: Runner

    def shared(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt it saves; the last token is always run, for its
        logits.
        """
        most = min(len(self.token_ids), len(prompt) - 1)
        return next((i for i in range(most) if self.token_ids[i] != prompt[i]), most)


class Session:
    """Prompts on their way to their answers.

    Attributes:
      sequences: number of sequences, `samples` a prompt.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        """Prefills the prompts and samples their first tokens."""
        self._runner, self._request = runner, request
        programs, context = runner.programs, runner.programs.model.config.context_length
        self._prompts = [list(prompt) for prompt in request.prompts for _ in range(request.samples)]
        self.sequences = len(self._prompts)
        limits = zip(request.max_new_tokens, self._prompts)
        budgets = [min(limit, context - len(prompt)) for limit, prompt in limits]
        self._width = request.guesses + 1  # tokens that a step samples at most
        self._most_slots = (
            max(len(prompt) + budget for prompt, budget in zip(self._prompts, budgets))
            + request.guesses
        )
        self._longest_budget = max(budgets)
        self._position = max(map(len, self._prompts))
        self._drawn: list[list[TokenChunk]] = [[] for _ in self._prompts]
        self._finished: set[int] = set()
        sequences = bucket_sequences(self.sequences, programs.sequence_multiple)
        self._sampling, self._stops = (
            _padded(request.sampling, sequences),
            _padded(_stop_array(request.stop_ids), sequences),
        )
        logits, cache = self._prefilled(runner, request.prefix)
        budget = np.asarray(budgets + [0] * (sequences - self.sequences), np.int32)
        history = None if request.sampling.penalties is None else self._history(sequences)
        self._progress, self._first = programs.begin(
            logits, cache, self._sampling, self._stops, budget, history, logprobs=request.logprobs
        )
        self._proposals = self._begin_drafting(request.draft) if request.guesses else None

    def _prefilled(self, runner: Runner, prefix: Prefix | None) -> tuple[Array, Cache]:
        """Logits and cache of every sequence after its prompt; samples of one prompt share the
        work.
        """
        prompts, samples = self._request.prompts, self._request.samples
        first_sequences = bucket_sequences(len(prompts), runner.programs.sequence_multiple)
        logits, cache = prefilled(runner, prompts, first_sequences, self._most_slots, prefix)
        if samples == 1:
            return logits, cache
        sequences = bucket_sequences(self.sequences, runner.programs.sequence_multiple)
        origin = np.minimum(np.arange(sequences) // samples, len(prompts) - 1).astype(np.int32)
        return logits[origin], runner.programs.take_sequences(cache, origin, cache.slots)

    def _begin_drafting(self, draft: Runner | None) -> DraftState:
        """The text so far, and the draft model's cache of it."""
        progress = self._progress
        sequences = progress.token.shape[0]
        text, _ = padded_prompts(self._prompts, sequences, progress.cache.slots + 1)
        tokens = (
            jnp.asarray(text).at[jnp.arange(sequences), progress.cache.lengths].set(progress.token)
        )
        if draft is None:
            return DraftState(tokens, None)
        cache = self._prefilled(draft, None)[1]
        return DraftState(
            tokens, draft.programs.grow(cache, max(cache.slots, progress.cache.slots))
        )

    def _history(self, sequences: int) -> Any:
        """What penalties look at, with the prompts in it."""
        width = bucket_size(self._position)
        tokens, lengths = padded_prompts(self._prompts, sequences, width)
        return begin_history(
            jnp.asarray(tokens), jnp.asarray(lengths), self._runner.programs.model.config.vocab_size
        )

    def stream(self, chunk: int) -> Iterator[list[TokenChunk]]:
        """Yields the new tokens of every sequence, up to `chunk` (at most 32) a sequence at a time,
        until all sequences have ended.

        Raises:
          NotFiniteError: for logits that are NaN or infinite, when the tokens before them were
            given.
        """
        steps = min(chunk, ROOM)
        pending = jax.tree.map(lambda x: x[:, None], self._first)
        for _ in range(-(-self._longest_budget // steps) + 1):
            # The next chunk is under way before the last one is fetched: the device never waits for
            # the host.
            following = self._advance(steps)
            fetched: SampledTokens = jax.tree.map(np.asarray, pending)
            new = [_sequence(fetched, sequence) for sequence in range(self.sequences)]
            for drawn, tokens in zip(self._drawn, new):
                drawn.append(tokens)
            yield new
            self._require_finite(fetched)
            # A sequence that was not done before the last step has sampled a token in its first
            # column.
            ended = (
                fetched.token[: self.sequences, -min(self._width, fetched.token.shape[1])]
                == NOTHING
            )
            if ended.all():
                return
            pending = jax.tree.map(lambda x: x[:, : steps * self._width], following)

    def _require_finite(self, fetched: SampledTokens) -> None:
        """Refuses logits that cannot be sampled from, except of sequences that had ended before."""
        for sequence in np.flatnonzero(
            (fetched.token[: self.sequences] == BROKEN).any(axis=1)
        ).tolist():
            if sequence not in self._finished:
                tokens = sum(len(part.token_ids) for part in self._drawn[sequence])
                raise NotFiniteError(sequence, tokens, self._runner.programs.model.options.dtype)

    def _advance(self, steps: int) -> SampledTokens:
        """The next steps, in a cache with slots enough for them."""
        self._position += steps * self._width
        self._grow(min(self._position, self._most_slots))
        (params, programs), request = self._runner, self._request
        if self._proposals is None:
            self._progress, drawn = programs.advance(
                params,
                self._progress,
                self._sampling,
                self._stops,
                steps,
                logprobs=request.logprobs,
            )
            return drawn
        draft_params, draft_model = (
            (None, None) if request.draft is None else (request.draft[0], request.draft[1].model)
        )
        self._progress, self._proposals, drawn = programs.speculate(
            params,
            self._progress,
            self._proposals,
            self._sampling,
            self._stops,
            steps,
            count=request.guesses,
            draft_model=draft_model,
            draft_params=draft_params,
            logprobs=request.logprobs,
        )
        return drawn

    def _grow(self, needed: int) -> None:
        """Makes room for `needed` tokens a sequence where there is less."""
        cache = self._progress.cache
        if needed <= cache.slots:
            return
        slots = bucket_slots(needed, self._most_slots)
        self._progress = self._progress._replace(cache=self._runner.programs.grow(cache, slots))
        if self._proposals is not None:
            text, drafts = self._proposals
            text = jnp.pad(text, ((0, 0), (0, slots + 1 - text.shape[1])))
            self._proposals = DraftState(
                text,
                None
                if drafts is None
                else self._runner.programs.grow(drafts, max(slots, drafts.slots)),
            )

    def finish(self, sequence: int) -> None:
        """Ends a sequence before its time; tokens of the chunk under way may still come."""
        self._finished.add(sequence)
        done = self._progress.done.at[sequence].set(True)
        self._progress = self._progress._replace(done=done)

    def tokens(self, sequence: int) -> Tokens:
        """What a sequence has given so far."""
        ids, logprobs, top = joined(self._drawn[sequence])
        return Tokens(ids, stop_reason(ids, self._request.stop_ids[sequence]), logprobs, top)

    def prefix(self, sequence: int = 0) -> Prefix:
        """Prompt and answer of a sequence, as a prefix of later prompts, such as the next message
        of a conversation say.
        """
        cache = self._progress.cache
        known = self._prompts[sequence] + self.tokens(sequence).token_ids
        # A sequence that has ended may have written past its end: into its last slot, if it was
        # full.
        held = min(int(cache.lengths[sequence]), len(known), cache.slots - 1)
        sequences = jnp.full((self._runner.programs.sequence_multiple,), sequence, jnp.int32)
        return Prefix(
            known[:held],
            self._runner.programs.take_sequences(cache, sequences, cache.slots),
            self._runner,
        )


def prefilled(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    sequences: int,
    most_slots: int,
    prefix: Prefix | None,
) -> tuple[Array, Cache]:
    """Logits after each prompt, and the cache with the prompts in it; long prompts are run piece by
    piece.
    """
    params, programs = runner
    shared = [0 if prefix is None else prefix.shared(prompt) for prompt in prompts]
    rest = [prompt[start:] for prompt, start in zip(prompts, shared)]
    longest = max(map(len, rest))
    piece = programs.piece(sequences)
    widths = [piece] * ((longest - 1) // piece) + [bucket_size((longest - 1) % piece + 1)]
    # Every piece is written whole, its padding included.
    needed = max(shared) + sum(widths)
    slots = max(bucket_size(needed), bucket_slots(max(map(len, prompts)), most_slots))
    if prefix is None:
        cache = programs.init_cache(sequences, slots)
    else:
        cache = programs.take_sequences(prefix.cache, np.zeros((sequences,), np.int32), slots)
        cache = cache._replace(
            lengths=jnp.asarray(shared + [0] * (sequences - len(shared)), jnp.int32)
        )
    tokens, lengths = padded_prompts([prompt[: widths[0]] for prompt in rest], sequences, widths[0])
    logits, cache = programs.prefill(
        params,
        tokens,
        lengths,
        cache,
        fresh=prefix is None and sees_itself(programs.model, widths[0]),
    )
    for i, width in enumerate(widths[1:], start=1):
        tokens, lengths = padded_prompts(
            [prompt[i * piece : i * piece + width] for prompt in rest], sequences, width
        )
        logits, cache = programs.prefill_more(params, tokens, lengths, cache, logits)
    return logits, cache


def padded_prompts(
    prompts: Sequence[Sequence[int]], sequences: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one array, padded on the right, and their lengths; sequences without a prompt are
    empty.
    """
    tokens = np.zeros((sequences, width), np.int32)
    for sequence, prompt in zip(tokens, prompts):
        sequence[: len(prompt)] = prompt
    return tokens, np.asarray(
        [len(prompt) for prompt in prompts] + [0] * (sequences - len(prompts)), np.int32
    )


def _sequence(drawn: SampledTokens, sequence: int) -> TokenChunk:
    """What one sequence drew."""
    drew = drawn.token[sequence] >= 0
    ids = drawn.token[sequence][drew].tolist()
    if drawn.logprob is None:
        return TokenChunk(ids)
    logprobs = drawn.logprob[sequence][drew].tolist()
    if drawn.top_tokens is None or drawn.top_logprobs is None:
        return TokenChunk(ids, logprobs)
    tokens, values = (
        drawn.top_tokens[sequence][drew].tolist(),
        drawn.top_logprobs[sequence][drew].tolist(),
    )
    return TokenChunk(ids, logprobs, [list(zip(*pair)) for pair in zip(tokens, values)])


def _stop_array(stop_ids: list[list[int]]) -> np.ndarray:
    """The table as an array, filled up with `NOTHING` to a power of two so that few programs serve
    all.
    """
    longest = max(map(len, stop_ids))
    table = np.full(
        (len(stop_ids), 1 << (longest - 1).bit_length() if longest else 0), NOTHING, np.int32
    )
    for sequence, tokens in zip(table, stop_ids):
        sequence[: len(tokens)] = tokens
    return table


def _padded(settings: Any, sequences: int) -> Any:
    """The same settings with the last sequence's repeated for sequences that only fill up."""
    last = np.minimum(np.arange(sequences), jax.tree.leaves(settings)[0].shape[0] - 1)
    return jax.tree.map(
        lambda x: x[last] if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)[last],
        settings,
    )


def stop_reason(token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """`stop` when the last token is a stop token, else `length`."""
    return "stop" if token_ids and token_ids[-1] in stop_ids else "length"

"""Prompts on their way to their answers: what the host keeps between two calls of the compiled programs."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.axes import Array, Parameters
from llama_jax.errors import InputError
from llama_jax.generation.decode import BROKEN, NOTHING, Drawn, sees_itself
from llama_jax.generation.programs import ROOM, Programs, bucket_rows, bucket_size, bucket_slots
from llama_jax.generation.sampling import Sampling, begin_history
from llama_jax.generation.speculative import Proposals
from llama_jax.model.cache import Cache


class NotFiniteError(InputError):
    """Logits of a row are NaN or infinite: no token can be chosen from them.

    Attributes:
      row: which, from 0.
    """

    def __init__(self, row: int, tokens: int, dtype: str) -> None:
        advice = "take dtype bfloat16 or float32, whose numbers reach further, or check" if dtype == "float16" else "check"
        super().__init__(
            f"row {row + 1}: logits that are NaN or infinite computed for new token {tokens + 1}, finite numbers expected; "
            f"{advice} the weights for NaN and damage"
        )
        self.row = row


class Runner(NamedTuple):
    """Parameters, and the programs that run them."""

    params: Parameters
    programs: Programs


class Request(NamedTuple):
    """What is asked of a session, checked.

    Attributes:
      prompts: token ids of each prompt.
      max_new_tokens: limit of each row.
      sampling: settings of each row, `samples` rows a prompt.
      stop_ids: of each row.
      samples: answers to each prompt.
      logprobs: `None`, 0 for those of the tokens drawn, `n` for the `n` best as well.
      prefix: tokens that need not be run again.
      guesses: tokens to propose at a time; 0 for no speculation.
      draft: the draft model; `None` for prompt look-up.
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


class NewTokens(NamedTuple):
    """New tokens of one row, in a chunk or in all.

    Attributes:
      token_ids: a stop token included.
      logprobs: log-probability of each under the model, whatever the sampling; `None` if not asked for.
      top_logprobs: for each, the most probable tokens with their log-probabilities, best first; `None` if not asked for.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def first(self, count: int) -> "NewTokens":
        """The first `count` of them."""
        logprobs = None if self.logprobs is None else self.logprobs[:count]
        return NewTokens(self.token_ids[:count], logprobs, None if self.top_logprobs is None else self.top_logprobs[:count])


def joined(parts: Sequence[NewTokens]) -> NewTokens:
    """Chunks of one row, in their order, as one."""
    ids, logprobs, top = [list(column) for column in zip(*parts)] if parts else [[], [None], [None]]
    return NewTokens(
        list(itertools.chain(*ids)),
        None if None in logprobs else list(itertools.chain(*logprobs)),
        None if None in top else list(itertools.chain(*top)),
    )


class Tokens(NamedTuple):
    """What one row gave; the fields of `NewTokens`, and why it ended: `stop` (a stop token) or `length`."""

    token_ids: list[int]
    stop_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class Prefix(NamedTuple):
    """Tokens that need not be run again: prompts that begin alike take their keys and values from here.

    Attributes:
      token_ids: what the cache holds.
      cache: of one row.
      runner: what it was made with; with other parameters or another kind of cache it means nothing.
    """

    token_ids: list[int]
    cache: Cache
    runner: Runner

    def shared(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of a prompt it saves; the last token is always run, for its logits."""
        most = min(len(self.token_ids), len(prompt) - 1)
        return next((i for i in range(most) if self.token_ids[i] != prompt[i]), most)


class Session:
    """Prompts on their way to their answers.

    Attributes:
      rows: number of rows, `samples` a prompt.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        """Prefills the prompts and draws their first tokens."""
        self._runner, self._request = runner, request
        programs, context = runner.programs, runner.programs.model.config.context_length
        self._prompts = [list(prompt) for prompt in request.prompts for _ in range(request.samples)]
        self.rows = len(self._prompts)
        limits = zip(request.max_new_tokens, self._prompts)
        budgets = [min(limit, context - len(prompt)) for limit, prompt in limits]
        self._width = request.guesses + 1  # tokens that a step draws at most
        self._most_slots = max(len(prompt) + budget for prompt, budget in zip(self._prompts, budgets)) + request.guesses
        self._longest_budget = max(budgets)
        self._position = max(map(len, self._prompts))
        self._drawn: list[list[NewTokens]] = [[] for _ in self._prompts]
        self._finished: set[int] = set()
        rows = bucket_rows(self.rows, programs.row_multiple)
        self._sampling, self._stops = _padded(request.sampling, rows), _padded(_stop_array(request.stop_ids), rows)
        logits, cache = self._prefilled(runner, request.prefix)
        budget = np.asarray(budgets + [0] * (rows - self.rows), np.int32)
        history = None if request.sampling.penalties is None else self._history(rows)
        self._progress, self._first = programs.begin(
            logits, cache, self._sampling, self._stops, budget, history, logprobs=request.logprobs
        )
        self._proposals = self._begin_guessing(request.draft) if request.guesses else None

    def _prefilled(self, runner: Runner, prefix: Prefix | None) -> tuple[Array, Cache]:
        """Logits and cache of every row after its prompt; samples of one prompt share the work."""
        prompts, samples = self._request.prompts, self._request.samples
        first_rows = bucket_rows(len(prompts), runner.programs.row_multiple)
        logits, cache = prefilled(runner, prompts, first_rows, self._most_slots, prefix)
        if samples == 1:
            return logits, cache
        rows = bucket_rows(self.rows, runner.programs.row_multiple)
        origin = np.minimum(np.arange(rows) // samples, len(prompts) - 1).astype(np.int32)
        return logits[origin], runner.programs.take_rows(cache, origin, cache.slots)

    def _begin_guessing(self, draft: Runner | None) -> Proposals:
        """The text so far, and the draft model's cache of it."""
        progress = self._progress
        rows = progress.token.shape[0]
        text, _ = padded_prompts(self._prompts, rows, progress.cache.slots + 1)
        tokens = jnp.asarray(text).at[jnp.arange(rows), progress.cache.lengths].set(progress.token)
        if draft is None:
            return Proposals(tokens, None)
        cache = self._prefilled(draft, None)[1]
        return Proposals(tokens, draft.programs.grow(cache, max(cache.slots, progress.cache.slots)))

    def _history(self, rows: int) -> Any:
        """What penalties look at, with the prompts in it."""
        width = bucket_size(self._position)
        tokens, lengths = padded_prompts(self._prompts, rows, width)
        return begin_history(jnp.asarray(tokens), jnp.asarray(lengths), self._runner.programs.model.config.vocab_size)

    def stream(self, chunk: int) -> Iterator[list[NewTokens]]:
        """Yields the new tokens of every row, up to `chunk` (at most 32) a row at a time, until all rows have ended.

        Raises:
          NotFiniteError: for logits that are NaN or infinite, when the tokens before them were given.
        """
        steps = min(chunk, ROOM)
        pending = jax.tree.map(lambda x: x[:, None], self._first)
        for _ in range(-(-self._longest_budget // steps) + 1):
            # The next chunk is under way before the last one is fetched: the device never waits for the host.
            following = self._advance(steps)
            fetched: Drawn = jax.tree.map(np.asarray, pending)
            new = [_row(fetched, row) for row in range(self.rows)]
            for drawn, tokens in zip(self._drawn, new):
                drawn.append(tokens)
            yield new
            self._require_finite(fetched)
            # A row that was not done before the last step has drawn something in its first column.
            ended = fetched.token[: self.rows, -min(self._width, fetched.token.shape[1])] == NOTHING
            if ended.all():
                return
            pending = jax.tree.map(lambda x: x[:, : steps * self._width], following)

    def _require_finite(self, fetched: Drawn) -> None:
        """Refuses what cannot be sampled from, but for rows that had ended before it."""
        for row in np.flatnonzero((fetched.token[: self.rows] == BROKEN).any(axis=1)).tolist():
            if row not in self._finished:
                tokens = sum(len(part.token_ids) for part in self._drawn[row])
                raise NotFiniteError(row, tokens, self._runner.programs.model.options.dtype)

    def _advance(self, steps: int) -> Drawn:
        """The next steps, in a cache with slots enough for them."""
        self._position += steps * self._width
        self._grow(min(self._position, self._most_slots))
        (params, programs), request = self._runner, self._request
        if self._proposals is None:
            self._progress, drawn = programs.advance(
                params, self._progress, self._sampling, self._stops, steps, logprobs=request.logprobs
            )
            return drawn
        draft_params, draft_model = (None, None) if request.draft is None else (request.draft[0], request.draft[1].model)
        self._progress, self._proposals, drawn = programs.speculate(
            params, self._progress, self._proposals, self._sampling, self._stops, steps,
            count=request.guesses, draft_model=draft_model, draft_params=draft_params, logprobs=request.logprobs,
        )  # fmt: skip
        return drawn

    def _grow(self, needed: int) -> None:
        """Makes room for `needed` tokens a row where there is less."""
        cache = self._progress.cache
        if needed <= cache.slots:
            return
        slots = bucket_slots(needed, self._most_slots)
        self._progress = self._progress._replace(cache=self._runner.programs.grow(cache, slots))
        if self._proposals is not None:
            text, drafts = self._proposals
            text = jnp.pad(text, ((0, 0), (0, slots + 1 - text.shape[1])))
            self._proposals = Proposals(
                text, None if drafts is None else self._runner.programs.grow(drafts, max(slots, drafts.slots))
            )

    def finish(self, row: int) -> None:
        """Ends a row before its time; tokens of the chunk under way may still come."""
        self._finished.add(row)
        done = self._progress.done.at[row].set(True)
        self._progress = self._progress._replace(done=done)

    def tokens(self, row: int) -> Tokens:
        """What a row has given so far."""
        ids, logprobs, top = joined(self._drawn[row])
        return Tokens(ids, stop_reason(ids, self._request.stop_ids[row]), logprobs, top)

    def prefix(self, row: int = 0) -> Prefix:
        """Prompt and answer of a row, as a prefix of what is to follow, a next turn of a conversation say."""
        cache = self._progress.cache
        known = self._prompts[row] + self.tokens(row).token_ids
        # A row that has ended may have written behind its end: into its last slot, if it was full.
        held = min(int(cache.lengths[row]), len(known), cache.slots - 1)
        rows = jnp.full((self._runner.programs.row_multiple,), row, jnp.int32)
        return Prefix(known[:held], self._runner.programs.take_rows(cache, rows, cache.slots), self._runner)


def prefilled(
    runner: Runner, prompts: Sequence[Sequence[int]], rows: int, most_slots: int, prefix: Prefix | None
) -> tuple[Array, Cache]:
    """Logits after each prompt, and the cache with the prompts in it; long prompts are run piece by piece."""
    params, programs = runner
    shared = [0 if prefix is None else prefix.shared(prompt) for prompt in prompts]
    rest = [prompt[start:] for prompt, start in zip(prompts, shared)]
    longest = max(map(len, rest))
    piece = programs.piece(rows)
    widths = [piece] * ((longest - 1) // piece) + [bucket_size((longest - 1) % piece + 1)]
    # Every piece is written whole, its padding included.
    needed = max(shared) + sum(widths)
    slots = max(bucket_size(needed), bucket_slots(max(map(len, prompts)), most_slots))
    if prefix is None:
        cache = programs.init_cache(rows, slots)
    else:
        cache = programs.take_rows(prefix.cache, np.zeros((rows,), np.int32), slots)
        cache = cache._replace(lengths=jnp.asarray(shared + [0] * (rows - len(shared)), jnp.int32))
    tokens, lengths = padded_prompts([prompt[: widths[0]] for prompt in rest], rows, widths[0])
    logits, cache = programs.prefill(
        params, tokens, lengths, cache, fresh=prefix is None and sees_itself(programs.model, widths[0])
    )
    for i, width in enumerate(widths[1:], start=1):
        tokens, lengths = padded_prompts([prompt[i * piece : i * piece + width] for prompt in rest], rows, width)
        logits, cache = programs.prefill_more(params, tokens, lengths, cache, logits)
    return logits, cache


def padded_prompts(prompts: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one array, padded on the right, and their lengths; rows without a prompt are empty."""
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts] + [0] * (rows - len(prompts)), np.int32)


def _row(drawn: Drawn, row: int) -> NewTokens:
    """What one row drew."""
    drew = drawn.token[row] >= 0
    ids = drawn.token[row][drew].tolist()
    if drawn.logprob is None:
        return NewTokens(ids)
    logprobs = drawn.logprob[row][drew].tolist()
    if drawn.top_tokens is None or drawn.top_logprobs is None:
        return NewTokens(ids, logprobs)
    tokens, values = drawn.top_tokens[row][drew].tolist(), drawn.top_logprobs[row][drew].tolist()
    return NewTokens(ids, logprobs, [list(zip(*pair)) for pair in zip(tokens, values)])


def _stop_array(stop_ids: list[list[int]]) -> np.ndarray:
    """The table as an array, filled up with `NOTHING` to a power of two so that few programs serve all."""
    longest = max(map(len, stop_ids))
    table = np.full((len(stop_ids), 1 << (longest - 1).bit_length() if longest else 0), NOTHING, np.int32)
    for row, tokens in zip(table, stop_ids):
        row[: len(tokens)] = tokens
    return table


def _padded(settings: Any, rows: int) -> Any:
    """The same settings with the last row's repeated for rows that only fill up."""
    last = np.minimum(np.arange(rows), jax.tree.leaves(settings)[0].shape[0] - 1)
    return jax.tree.map(lambda x: x[last] if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)[last], settings)


def stop_reason(token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """`stop` when the last token is a stop token, else `length`."""
    return "stop" if token_ids and token_ids[-1] in stop_ids else "length"

"""Generation driven from the host: prompts in lists, compiled programs by bucket, tokens streamed in chunks."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.axes import Array, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.generation.decode import NOTHING, Progress, advance, begin
from llama_jax.generation.sampling import Sampling, make_sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import Llama, model_for
from llama_jax.model.options import ModelOptions

_SMALLEST_BUCKET = 16
_ROOM = 32  # tokens a row that one call of the decoding loop can return at most


class Bucket(NamedTuple):
    """The shapes of one pair of compiled programs."""

    rows: int
    length: int
    slots: int


class Tokens(NamedTuple):
    """What one prompt gave: the new token ids (a stop token included) and why it ended, `stop` or `length`."""

    token_ids: list[int]
    stop_reason: str


def bucket_size(count: int) -> int:
    """The smallest size of the series 16, 24, 32, 48, 64, 96, ... that holds `count`: at most a third is padding."""
    size = _SMALLEST_BUCKET
    while size < count:
        size *= 2
    return size * 3 // 4 if size > _SMALLEST_BUCKET and count <= size * 3 // 4 else size


def choose_bucket(lengths: Sequence[int], budgets: Sequence[int]) -> Bucket:
    """Shapes for prompts of these lengths with so many new tokens each.

    Rows are rounded up to a power of two, lengths and slots to the series of `bucket_size`.
    """
    rows = 1 << (len(lengths) - 1).bit_length()
    length = bucket_size(max(lengths))
    slots = max(prompt + new for prompt, new in zip(lengths, budgets))
    return Bucket(rows, length, bucket_size(max(length, slots)))


def _check_settings(rows: int, max_new_tokens: int, sampling: Sampling, chunk: int) -> None:
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: {max_new_tokens} given; 0 or more expected")
    if chunk < 1:
        raise InputError(f"chunk: {chunk} given; 1 or more expected")
    settings = sampling.temperature.shape[0]
    if settings != rows:
        raise InputError(f"sampling for {settings} rows given with {rows} prompts; make_sampling({rows}, ...) expected")


def _check(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> None:
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.context_length:
            raise InputError(
                f"prompt {i + 1} has {len(prompt)} tokens; 1 to {config.context_length} (the model's context) expected"
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise InputError(f"prompt {i + 1} holds token {outside[0]}; the vocabulary goes from 0 to {config.vocab_size - 1}")


class Programs:
    """The compiled programs of one model, kept for the life of the process and shared by all its generators.

    Attributes:
      model: the module that is run.
      begin: `llama_jax.generation.decode.begin`, compiled; consumes the cache.
      advance: `llama_jax.generation.decode.advance`, compiled; consumes the progress.
      compilations: programs compiled so far: one of each kind for every bucket met.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.compilations = 0
        self.begin = jax.jit(self._counted(functools.partial(begin, model)), donate_argnums=(3,))
        self.advance = jax.jit(self._counted(functools.partial(advance, model, room=_ROOM)), donate_argnums=(1,))

    def _counted(self, function: Callable) -> Callable:
        """The function, counting its traces: JAX traces once for each program that it compiles."""

        def traced(*args: Any) -> Any:
            """Runs in Python only while JAX traces."""
            self.compilations += 1
            return function(*args)

        return traced


@functools.cache
def programs_of(config: LlamaConfig, options: ModelOptions) -> Programs:
    """The programs of a model run in one way."""
    return Programs(Llama(config, options))


class Generator:
    """Decoding with one set of parameters.

    Attributes:
      params: the parameters.
      programs: what is compiled for them; reports the number of compilations.
    """

    def __init__(self, params: Parameters, config: LlamaConfig, **options: Any) -> None:
        """`params` in either form (unrolled decodes faster); `options` are those of `ModelOptions` except `scan`."""
        self.params = params
        self.programs = programs_of(config, model_for(params, config, **options).options)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
        chunk: int = 8,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of every prompt as they come, up to `chunk` a prompt at a time.

        Args:
          prompts: token ids of each prompt; lengths may differ.
          max_new_tokens: at most so many new tokens a prompt, and no more than the model's context leaves.
          sampling: settings of each prompt; greedy by default.
          stop_ids: tokens that end a prompt's text.
          chunk: decoding steps between two yields, up to 32.

        Raises:
          InputError: for an empty prompt, one longer than the context, a token outside the vocabulary, and settings that
            are out of range or for another number of prompts.
        """
        config = self.programs.model.config
        sampling = sampling if sampling is not None else make_sampling(len(prompts))
        _check(prompts, config)
        _check_settings(len(prompts), max_new_tokens, sampling, chunk)
        if not prompts:
            return
        lengths = [len(prompt) for prompt in prompts]
        budgets = [min(max_new_tokens, config.context_length - length) for length in lengths]
        bucket = choose_bucket(lengths, budgets)
        stops = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
        progress, drawn = self._prefill(prompts, budgets, bucket, sampling, stops)
        sampling = _pad_sampling(sampling, bucket.rows)
        steps = min(chunk, _ROOM)
        pending = drawn[:, None]
        for _ in range(-(-max(budgets) // steps) + 1):
            # The next chunk is under way before the last one is fetched: the device never waits for the host.
            progress, following = self.programs.advance(self.params, progress, sampling, stops, steps)
            fetched = np.asarray(pending)[: len(prompts)]
            yield [row[row != NOTHING].tolist() for row in fetched]
            if (fetched[:, -1] == NOTHING).all():
                return
            pending = following[:, :steps]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], budgets: list[int], bucket: Bucket, sampling: Sampling, stops: Array
    ) -> tuple[Progress, Array]:
        """Starts a bucket: prompts padded on the right, rows that stand in for missing prompts given no budget."""
        spare = bucket.rows - len(prompts)
        tokens = np.zeros((bucket.rows, bucket.length), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        lengths = jnp.asarray([len(prompt) for prompt in prompts] + [1] * spare, jnp.int32)
        model = self.programs.model
        options = model.options
        cache = init_cache(model.config, bucket.rows, bucket.slots, options.compute_dtype, options.scan)
        budget = jnp.asarray(budgets + [0] * spare, jnp.int32)
        return self.programs.begin(self.params, tokens, lengths, cache, _pad_sampling(sampling, bucket.rows), stops, budget)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
    ) -> list[Tokens]:
        """`stream` taken to its end: the new tokens of each prompt and why it ended."""
        texts: list[list[int]] = [[] for _ in prompts]
        for pieces in self.stream(prompts, max_new_tokens, sampling, stop_ids, chunk=_ROOM):
            for text, piece in zip(texts, pieces):
                text += piece
        return [Tokens(text, stop_reason(text, stop_ids)) for text in texts]


def stop_reason(token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """`stop` when the last token is a stop token, else `length`."""
    return "stop" if token_ids and token_ids[-1] in stop_ids else "length"


def _pad_sampling(sampling: Sampling, rows: int) -> Sampling:
    """The same settings with greedy rows added at the end."""
    spare = rows - sampling.temperature.shape[0]
    return Sampling(*[jnp.pad(values, (0, spare)) for values in sampling])

"""Generation driven from the host: prompts in lists, compiled programs by bucket, tokens streamed
in chunks.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.generation.checks import (
    MOST_DRAFT_TOKENS,
    MOST_LOGPROBS,
    Unchecked,
    check_prompts,
    stop_table,
    whole,
    wholes,
)
from llama_jax.generation.programs import ROOM, platform_of, programs_of, with_kernel
from llama_jax.generation.sampling import NOWHERE, Sampling, make_sampling
from llama_jax.generation.session import (
    Prefix,
    Request,
    Runner,
    Session,
    TokenChunk,
    Tokens,
    prefilled,
)
from llama_jax.model.llama import model_for


class Speculation(NamedTuple):
    """Speculative decoding: the same tokens, or samples of the same distribution, at another
    speed.

    Attributes:
      tokens: draft tokens that are checked at a time.
      draft: a generator of a smaller model with the same vocabulary; `None` takes the tokens that
        followed an earlier occurrence of the last ones (prompt lookup).
    """

    tokens: int = 4
    draft: "Generator | None" = None


class Generator:
    """Decoding with one set of parameters.

    Attributes:
      params: the parameters.
      programs: compiled for them; reports the compilations.
      speculation: the default speculative decoding of calls.
    """

    def __init__(
        self,
        params: Parameters,
        config: LlamaConfig,
        mesh: Mesh | None = None,
        speculation: Speculation | None = None,
        **options: Any,
    ) -> None:
        """A generator for parameters as they are.

        Args:
          params: in either form (unrolled decodes faster); with a mesh, sharded over it as `load`
            or training leave them.
          config: the architecture.
          mesh: devices to decode on together: sequences over the axes of `batch`, heads over those
            of `kv_heads` in the rules. A warning says where `fsdp` would have every weight gathered
            at every step.
          speculation: speculative decoding, which does not change the sampled tokens; `None`
            samples one at a time.
          **options: of `ModelOptions`, except `scan`; `dtype` is that of the parameters unless
            given.
        """
        if mesh is not None and mesh.shape.get("fsdp", 1) > 1:
            warnings.warn(
                f"a mesh with fsdp {mesh.shape['fsdp']} given: every decoding step "
                "gathers every weight; tensor in its place "
                "leaves them where they are",
                stacklevel=2,
            )
        self.params = params
        self.speculation = speculation
        resolved = with_kernel(
            model_for(params, config, **options).options, config, platform_of(params, mesh)
        )
        self.programs = programs_of(config, resolved, mesh)

    @property
    def runner(self) -> Runner:
        """Parameters and programs together."""
        return Runner(self.params, self.programs)

    def start(
        self,
        prompts: Unchecked,
        max_new_tokens: Unchecked,
        sampling: Sampling | None = None,
        stop_ids: Unchecked = (),
        *,
        samples: Unchecked = 1,
        logprobs: Unchecked = None,
        prefix: Unchecked = None,
        speculation: Unchecked = None,
    ) -> "Session":
        """Prefills prompts and samples their first tokens.

        Args:
          prompts: token ids of each prompt, one at least; lengths may differ. Lists, or an array of
            a sequence a prompt.
          max_new_tokens: limit of new tokens, for all sequences or one a sequence; the model's
            context is another.
          sampling: settings of each sequence (`samples` sequences a prompt, next to each other);
            greedy by default.
          stop_ids: tokens that end a sequence; for all sequences or for each.
          samples: answers to each prompt; they share its prefill.
          logprobs: `None` for no log-probabilities, 0 for those of the sampled tokens, `n` for the
            `n` best tokens' as well.
          prefix: tokens run before, from `prefix` or `Session.prefix`.
          speculation: for this call, instead of the generator's own.

        Raises:
          InputError: for an empty prompt, one longer than the context, a token outside the
            vocabulary, and settings that are out of range or for another number of sequences.
        """
        samples = whole("samples", samples, 1)
        sequences = len(prompts) * samples
        sampling = sampling if sampling is not None else make_sampling(sequences)
        config = self.programs.model.config
        prompts = check_prompts(prompts, config)
        limits = wholes("max_new_tokens", max_new_tokens, sequences, 0)
        _check_settings(sequences, sampling, logprobs, config)
        self._check_prefix(prefix)
        speculation = self.speculation if speculation is None else speculation
        if speculation is not None:
            _check_speculation(speculation, sampling, config)
        stops = stop_table(stop_ids, sequences)
        guesses, draft = (0, None) if speculation is None else speculation
        other = None if draft is None else draft.runner
        request = Request(
            prompts, limits, sampling, stops, samples, logprobs, prefix, guesses, other
        )
        return Session(self.runner, request)

    def stream(
        self,
        prompts: Unchecked,
        max_new_tokens: Unchecked,
        *args: Any,
        chunk: Unchecked = 8,
        **settings: Any,
    ) -> Iterator[list[TokenChunk]]:
        """Yields the new tokens of every sequence as they come, up to `chunk` (at most 32) a
        sequence at a time; see `start`.
        """
        chunk = whole("chunk", chunk, 1)
        if len(prompts):
            yield from self.start(prompts, max_new_tokens, *args, **settings).stream(chunk)

    def generate(
        self, prompts: Unchecked, max_new_tokens: Unchecked, *args: Any, **settings: Any
    ) -> list[Tokens]:
        """All new tokens of every sequence and why it ended; see `start`."""
        if len(prompts) == 0:
            return []
        session = self.start(prompts, max_new_tokens, *args, **settings)
        for _ in session.stream(ROOM):
            pass
        return [session.tokens(sequence) for sequence in range(session.sequences)]

    def _check_prefix(self, prefix: Unchecked) -> None:
        """Refuses keys and values of another model: nothing would go wrong but the text."""
        if prefix is not None and not isinstance(prefix, Prefix):
            raise InputError(
                f"prefix: a {type(prefix).__name__} given; one from this generator's "
                "prefix() expected"
            )
        if prefix is not None and (
            prefix.runner.programs is not self.programs or prefix.runner.params is not self.params
        ):
            raise InputError(
                "prefix: one of another model, other parameters or other options given; "
                "one from this generator's prefix() or from its sessions expected"
            )

    def prefix(self, token_ids: Unchecked) -> Prefix:
        """Runs tokens that several prompts will begin with.

        Raises:
          InputError: for tokens that the model cannot take.
        """
        (ids,) = check_prompts([token_ids], self.programs.model.config)
        _, cache = prefilled(self.runner, [ids], self.programs.sequence_multiple, 0, None)
        return Prefix(ids, cache, self.runner)


def _check_speculation(speculation: Unchecked, sampling: Sampling, config: LlamaConfig) -> None:
    if not isinstance(speculation, Speculation):
        raise InputError(
            f"speculation: a {type(speculation).__name__} given; Speculation(tokens) expected"
        )
    if not 1 <= whole("speculation.tokens", speculation.tokens, 1) <= MOST_DRAFT_TOKENS:
        raise InputError(
            f"speculation.tokens: {speculation.tokens} given; 1 to {MOST_DRAFT_TOKENS} expected"
        )
    if sampling.penalties is not None:
        raise InputError(
            "penalties given together with speculation, which cannot look at tokens not "
            "yet kept; leave out one"
        )
    other = (
        None if speculation.draft is None else speculation.draft.programs.model.config.vocab_size
    )
    if other not in (None, config.vocab_size):
        raise InputError(
            f"the draft model has {other} tokens and the model {config.vocab_size}; the "
            "same vocabulary expected"
        )


def _check_settings(
    sequences: int, sampling: Sampling, logprobs: Unchecked, config: LlamaConfig
) -> None:
    most = min(MOST_LOGPROBS, config.vocab_size)
    if logprobs is not None and whole("logprobs", logprobs, 0) > most:
        raise InputError(f"logprobs: {logprobs} given; 0 to {most} expected, or none")
    tokens = np.asarray(() if sampling.bias is None else sampling.bias.tokens)
    outside = tokens[(tokens >= config.vocab_size) & (tokens != NOWHERE)]
    if outside.size:
        raise InputError(
            f"logit_bias: token {outside[0]} given; the vocabulary goes from 0 to "
            f"{config.vocab_size - 1}"
        )
    settings = sampling.temperature.shape[0]
    if settings != sequences:
        raise InputError(
            f"sampling for {settings} sequences given with {sequences} sequences to "
            f"draw; make_sampling({sequences}, ...) expected"
        )


# --- beginning ---
#
# What several prompts begin with: found once, so that a shared system message is prefilled once for
# all of them.


_WORTH_IT = 16  # tokens; fewer are run again faster than their cache is copied


def common_prefix(prompts: Iterable[Sequence[int]]) -> list[int]:
    """The longest beginning that all prompts share, in token ids; of one prompt or none,
    nothing.
    """
    shared: list[int] = []
    for number, prompt in enumerate(prompts):
        most = len(prompt) if number == 0 else min(len(shared), len(prompt))
        same = (at for at in range(most) if number and prompt[at] != shared[at])
        shared = list(prompt[: next(same, most)])
    return shared


def shared_prefix(generator: Generator, beginning: Sequence[int], prompts: int) -> Prefix | None:
    """The common prefix of several prompts, prefilled; `None` where it would not save anything.

    Args:
      generator: that is to run the prompts.
      beginning: from `common_prefix`.
      prompts: how many there are.
    """
    return (
        generator.prefix(list(beginning)) if prompts > 1 and len(beginning) >= _WORTH_IT else None
    )


def saved(prefix: Prefix | None, lengths: Iterable[int]) -> int:
    """Tokens of prompts of these lengths, all of which begin with the prefix, that are not run
    again.
    """
    return (
        0 if prefix is None else sum(min(len(prefix.token_ids), length - 1) for length in lengths)
    )

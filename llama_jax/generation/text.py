"""Text in, text out: prompts through the tokenizer or the chat template, answers streamed back."""

import dataclasses
import inspect
import operator
import weakref
from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from llama_jax.errors import InputError
from llama_jax.generation.checks import (
    Unchecked,
    check_names,
    check_texts,
    is_whole,
    stop_strings,
    stop_table,
    whole,
    wholes,
)
from llama_jax.generation.generate import Generator
from llama_jax.generation.sampling import make_sampling
from llama_jax.generation.session import Prefix, Session, TokenChunk, joined, stop_reason
from llama_jax.model.options import ModelOptions
from llama_jax.text.chat import encode_chat
from llama_jax.text.stops import StopStrings
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, encode_prompt
from llama_jax.weights.load import Pretrained

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages | Sequence[int]

# Settings of `stream` that `make_sampling` takes.
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
)
# All that is taken by name on the way from `generate` to the generator: a misspelt name is near one
# of them.
_SETTINGS = (
    *_SAMPLING,
    "mesh",
    *(field.name for field in dataclasses.fields(ModelOptions) if field.name != "scan"),
    "max_new_tokens",
    "chat",
    "stop",
    "stop_ids",
    "samples",
    "logprobs",
    "prefix",
    "speculation",
    "generator",
    "chunk",
    "callback",
)


class Completion(NamedTuple):
    """What a prompt gave.

    Attributes:
      prompt: as it was given.
      text: the new text, without special tokens and without the stop string.
      token_ids: the new tokens, a stop token included.
      stop_reason: `stop` for a stop token, `stop_string`, or `length` for the limit of new tokens
        or of the context.
      prompt_tokens: tokens of the prompt, template included.
      new_tokens: number of new tokens.
      logprobs: log-probability of each new token under the model; `None` if not asked for.
      top_logprobs: for each new token, the most probable ones with their log-probabilities; `None`
        if not asked for.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    stop_reason: str
    prompt_tokens: int
    new_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class Piece(NamedTuple):
    """New text of one sequence, as it comes.

    Attributes:
      sequence: which answer, from 0; with `samples`, those of one prompt lie next to each other.
      text: text that is certain; may be empty.
      tokens: how many tokens it was.
      completion: the whole, with the last piece of a sequence; `None` before.
    """

    sequence: int
    text: str
    tokens: int
    completion: Completion | None


def require_tokenizer(model: Pretrained) -> Tokenizer:
    """The model's tokenizer.

    Raises:
      InputError: if it came without one.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.origin} has no tokenizer: a directory with its tokenizer.json or "
            "tokenizer.model beside the weights, or a GGUF file with one inside, expected"
        )
    return model.tokenizer


def require_generator_of(model: Pretrained, generator: Generator) -> None:
    """Refuses a generator of another architecture than the model's; its parameters may be others,
    such as quantized ones.

    Raises:
      InputError: with what to give instead.
    """
    if generator.programs.model.config != model.config:
        raise InputError(
            "generator: one of another model given; Generator(model.params, model.config) expected"
        )


def encode_user(model: Pretrained, prompt: Prompt, chat: bool) -> list[int]:
    """The ids that a prompt becomes: plain text, a conversation through the model's chat template,
    or token ids as they are.

    Args:
      model: from `llama_jax.load`.
      prompt: a text, messages `{"role": ..., "content": ...}`, or token ids.
      chat: whether a text is one user message.

    Raises:
      InputError: if a conversation is given to a model without a template.
    """
    tokenizer = require_tokenizer(model)
    if isinstance(prompt, str) and not chat:
        return encode_prompt(tokenizer, prompt)
    if prompt and not isinstance(prompt, str) and all(is_whole(token) for token in prompt):
        return [operator.index(token) for token in cast("Sequence[int]", prompt)]
    if model.template is None:
        raise InputError(f"{model.origin} has no chat template; ask without chat")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return encode_chat(model.template, tokenizer, cast("Messages", messages))


class _Row:
    """An answer on its way: the tokens so far and the text that they make.

    What a chunk costs does not depend on how much came before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        ids: list[int],
        stops: Sequence[str],
        stop_ids: list[int],
    ) -> None:
        self.prompt, self.ids = prompt, ids
        self.finished = False
        self.count = 0  # new tokens
        self._parts: list[TokenChunk] = []
        self._texts: list[str] = []
        self._stop_ids = stop_ids
        self._vocab_size = tokenizer.vocab_size
        self._decoder = StreamDecoder(tokenizer)
        self._watch = StopStrings(stops)

    def take(self, new: TokenChunk, limit: int) -> str:
        """Adds tokens up to the one that ends the sequence; the text that became certain."""
        added, used = "", 0
        for token in new.token_ids:
            used += 1
            # A model may have more entries than its tokenizer has tokens (padding); a token
            # sampled from these has no text.
            known = token < self._vocab_size
            added += self._watch.push(self._decoder.push(token)) if known else ""
            if self._watch.found:
                break
        self.count += used
        self._parts.append(new.first(used))
        ended = stop_reason(new.token_ids[:used], self._stop_ids) == "stop"
        self.finished = self._watch.found or self.count >= limit or ended
        if self.finished:
            added += self._watch.push(self._decoder.flush()) + self._watch.flush()
        self._texts.append(added)
        return added

    def completion(self) -> Completion:
        """The sequence as a result."""
        ids, logprobs, top = joined(self._parts)
        reason = "stop_string" if self._watch.found else stop_reason(ids, self._stop_ids)
        return Completion(
            self.prompt, "".join(self._texts), ids, reason, len(self.ids), len(ids), logprobs, top
        )


class TextSession:
    """Prompts on their way to their answers, as text; `stream` is the short way to use one.

    Attributes:
      session: the tokens underneath.
    """

    def __init__(
        self,
        model: Pretrained,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: Unchecked = 128,
        chat: bool = False,
        stop: Unchecked = (),
        stop_ids: Unchecked = (),
        samples: Unchecked = 1,
        logprobs: Unchecked = None,
        prefix: Unchecked = None,
        speculation: Unchecked = None,
        generator: Generator | None = None,
        **settings: Any,
    ) -> None:
        check_names(settings, _SETTINGS)
        check_texts(prompts)
        samples = whole("samples", samples, 1)
        tokenizer = require_tokenizer(model)
        encoded = [encode_user(model, prompt, chat) for prompt in prompts]
        sequences = len(prompts) * samples
        limits = wholes("max_new_tokens", max_new_tokens, sequences, 0)
        sampling = make_sampling(
            sequences, **{name: settings.pop(name) for name in _SAMPLING if name in settings}
        )
        stops = stop_strings(stop, sequences)
        ends = [[*model.stop_ids, *own] for own in stop_table(stop_ids, sequences)]
        generator = generator or Generator(model.params, model.config, **settings)
        require_generator_of(model, generator)
        self._sequences = [
            _Row(
                tokenizer,
                prompts[sequence // samples],
                encoded[sequence // samples],
                stops[sequence],
                ends[sequence],
            )
            for sequence in range(sequences)
        ]
        self._limits = [
            min(limit, model.config.context_length - len(sequence.ids))
            for limit, sequence in zip(limits, self._sequences)
        ]
        self.session: Session = generator.start(
            encoded,
            limits,
            sampling,
            ends,
            samples=samples,
            logprobs=logprobs,
            prefix=prefix,
            speculation=speculation,
        )

    def stream(self, chunk: int) -> Iterator[Piece]:
        """Yields the text of all sequences as it comes."""
        for chunks in self.session.stream(chunk):
            for i, (sequence, new, limit) in enumerate(zip(self._sequences, chunks, self._limits)):
                if sequence.finished:
                    continue
                before = sequence.count
                text = sequence.take(new, limit)
                if sequence.finished:
                    self.session.finish(i)
                yield Piece(
                    i,
                    text,
                    sequence.count - before,
                    sequence.completion() if sequence.finished else None,
                )
            if all(sequence.finished for sequence in self._sequences):
                return


def stream(
    model: Pretrained, prompts: Sequence[Prompt], *, chunk: Unchecked = 4, **settings: Any
) -> Iterator[Piece]:
    """The text of all prompts, decoded together, as it comes; the prompts are run at once.

    Every setting below that says "a sequence" may be one value for all sequences, or a list of one
    a sequence.

    Args:
      model: from `llama_jax.load`.
      prompts: texts, conversations as lists of messages `{"role": ..., "content": ...}`, or lists
        of token ids.
      chunk: decoding steps between two pieces, up to 32.
      **settings: any of these:
        `max_new_tokens` (128): a sequence; limit of new tokens; the model's context is another.
        `chat` (False): whether a text is one user message, to be put through the model's chat
        template. `temperature` (0): a sequence; 0 for the most probable token always.
        `top_k` (0): a sequence; sample from the `k` most probable tokens only; 0 for all.
        `top_p` (1): a sequence; sample from the most probable tokens that together reach this
        probability. `min_p` (0): a sequence; sample from tokens at least this fraction as probable
        as the best. `repetition_penalty` (1), `presence_penalty` (0), `frequency_penalty` (0): a
        sequence; see `Penalties`. `logit_bias`: a sequence; token id -> number added to its logit.
        `seed` (0): a number or a `jax.random.key`, for all sequences, which sample independently of
        each other, or one a sequence. `stop`: a sequence; strings that end the text and are no part
        of it.
        `stop_ids`: a sequence; token ids that end the text, beside the model's own.
        `samples` (1): answers to each prompt, which share its prefill; each is a sequence.
        `logprobs`: 0 for the log-probability of each new token, `n` for those of the `n` best as
          well.
        `prefix`: from `Generator.prefix` or `Session.prefix`, tokens that need not be run again.
        `speculation`: a `Speculation` (speculative decoding); the text is the same.
        `generator`: a `Generator` to use; else one is made with the remaining settings: `mesh` and
          those of `ModelOptions`.

    Raises:
      InputError: for settings out of range and prompts that the model cannot take.
    """
    chunk = whole("chunk", chunk, 1)
    check_texts(prompts)
    return TextSession(model, prompts, **settings).stream(chunk) if prompts else iter(())


def generate(
    model: Pretrained,
    prompts: Sequence[Prompt],
    *,
    callback: Callable[[Piece], object] | None = None,
    **settings: Any,
) -> list[Completion]:
    """The completions of all sequences, decoded together, in their order; settings are those of
    `stream`.

    Args:
      model: from `llama_jax.load`.
      prompts: texts, conversations or lists of token ids.
      callback: called with every piece of text as it comes.
      **settings: see `stream`.
    """
    found = {}
    for piece in stream(model, prompts, **{"chunk": 32 if callback is None else 4, **settings}):
        if callback is not None:
            callback(piece)
        if piece.completion is not None:
            found[piece.sequence] = piece.completion
    return [found[sequence] for sequence in sorted(found)]


# --- conversation ---
#
# A conversation with a chat model: turn after turn, each of them running only the tokens that are
# new.


class Conversation:
    """Messages so far, and the cache that they left.

    The whole conversation goes through the model's template anew at every turn; what begins like
    the turn before is taken from its cache. So a template that rewrites history (drops thoughts,
    moves the system message) stays right, and one that only appends costs nothing but the new
    words.

    Attributes:
      messages: `{"role": ..., "content": ...}`, in the order of speaking.
      reused: tokens of the last turn's prompt that were taken from the cache.
      generator: decodes all turns.
    """

    def __init__(
        self,
        model: Pretrained,
        messages: Messages = (),
        *,
        generator: Generator | None = None,
        **options: Any,
    ) -> None:
        """A conversation that nobody has answered in yet.

        Args:
          model: from `llama_jax.load`, with a chat template.
          messages: the conversation so far.
          generator: a `Generator` of this model to use; else one is made for the life of the
            conversation.
          **options: of the generator: `mesh` and those of `ModelOptions`.

        Raises:
          InputError: for a model without a chat template.
        """
        if model.template is None:
            raise InputError(f"{model.origin} has no chat template; a conversation needs one")
        self.messages: list[Mapping[str, str]] = list(messages)
        self.reused = 0
        self.generator = generator or Generator(model.params, model.config, **options)
        self._model = model
        self._prefix: Prefix | None = None
        self._open: weakref.ref[abc.Generator[Piece, None, None]] | None = (
            None  # weak: an answer dropped is an answer closed
        )

    def system(self, text: str) -> None:
        """Puts a system message in front, replacing an existing one; none for an empty
        text.
        """
        self._require_closed()
        led = bool(self.messages) and self.messages[0]["role"] == "system"
        self.messages[: int(led)] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self._require_closed()
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def ask(self, text: str, *, chunk: Unchecked = 4, **settings: Any) -> Iterator[Piece]:
        """The answer to the user's next message, as it comes.

        Question and answer join the messages when the answer has ended. An iterator that is closed
        before ends the answer: the text so far becomes the assistant's message; where nothing came,
        the messages stay as they were. So does one that nobody holds any more. One answer is given
        at a time.

        Args:
          text: the user's words.
          chunk: decoding steps between two pieces, up to 32.
          **settings: those of `llama_jax.generation.text.stream`, except `chat`, `samples`,
            `prefix` and `generator`.

        Raises:
          InputError: for settings out of range, messages that the template refuses, a conversation
            that leaves no room for an answer in the model's context, and while another answer is
            being given. The messages stay as they were.
        """
        self._require_closed()
        chunk = whole("chunk", chunk, 1)
        if settings.get("samples", 1) != 1:
            raise InputError(
                f"samples: {settings['samples']} given; a conversation goes on from 1 answer"
            )
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encoded(asked)
        reused = 0 if self._prefix is None else self._prefix.shared(ids)
        answer = TextSession(
            self._model, [asked], prefix=self._prefix, generator=self.generator, **settings
        )
        # The answer has a copy of its own: two caches would be one too many.
        self._prefix, self.reused = None, reused
        pieces = self._answer(asked, answer, chunk)
        self._open = weakref.ref(pieces)
        return pieces

    def _require_closed(self) -> None:
        """Refuses to change the messages under an answer that is to join them."""
        pieces = None if self._open is None else self._open()
        if pieces is not None and inspect.getgeneratorstate(pieces) != inspect.GEN_CLOSED:
            raise InputError(
                "an answer is still being given; read it to its end, or close() it, before going on"
            )

    def _encoded(self, asked: Messages) -> list[int]:
        """The ids of the conversation, with room for an answer behind them."""
        ids, context = encode_user(self._model, asked, chat=True), self._model.config.context_length
        if len(ids) >= context:
            raise InputError(
                f"the conversation has {len(ids)} tokens; fewer than {context} (the "
                "model's context) expected: "
                "begin anew, or say less"
            )
        return ids

    def _answer(
        self, asked: Messages, answer: TextSession, chunk: int
    ) -> abc.Generator[Piece, None, None]:
        """The pieces of an answer; however it ends, its words are kept."""
        said, ended = "", False
        session: Session | None = None
        try:
            for piece in answer.stream(chunk):
                said, ended = said + piece.text, piece.completion is not None
                yield piece
            session = answer.session
        except GeneratorExit:
            session = answer.session
            raise
        finally:
            if said or ended:
                self.messages = [*asked, {"role": "assistant", "content": said}]
            # After any other interruption the cache may be gone: the device was given it to write
            # into.
            self._prefix = None if session is None else session.prefix(0)

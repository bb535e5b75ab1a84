"""A conversation with a chat model: turn after turn, each of them running only the tokens that are new."""

import inspect
import weakref
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.errors import InputError
from llama_jax.generation.checks import Unchecked, whole
from llama_jax.generation.generate import Generator, Prefix, Session
from llama_jax.generation.text import Messages, Piece, TextSession, encode_user
from llama_jax.weights.load import Pretrained


class Conversation:
    """Messages so far, and the cache that they left.

    The whole conversation goes through the model's template anew at every turn; what begins like the turn before is
    taken from its cache. So a template that rewrites history (drops thoughts, moves the system message) stays right, and
    one that only appends costs nothing but the new words.

    Attributes:
      messages: `{"role": ..., "content": ...}`, in the order of speaking.
      reused: tokens of the last turn's prompt that were taken from the cache.
      generator: decodes all turns.
    """

    def __init__(
        self, model: Pretrained, messages: Messages = (), *, generator: Generator | None = None, **options: Any
    ) -> None:
        """A conversation that nobody has answered in yet.

        Args:
          model: from `llama_jax.load`, with a chat template.
          messages: what was said before.
          generator: a `Generator` of this model to use; else one is made for the life of the conversation.
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
        self._open: weakref.ref[abc.Generator[Piece, None, None]] | None = None  # weak: an answer dropped is an answer closed

    def system(self, text: str) -> None:
        """Puts a system message in front, in place of the one that is there; none for an empty text."""
        self._require_closed()
        led = bool(self.messages) and self.messages[0]["role"] == "system"
        self.messages[: int(led)] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self._require_closed()
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def ask(self, text: str, *, chunk: Unchecked = 4, **settings: Any) -> Iterator[Piece]:
        """The answer to what the user says next, as it comes.

        Question and answer join the messages when the answer has ended. An iterator that is closed before ends the answer:
        what came so far is what the assistant said; where nothing came, the messages stay as they were. So does one that nobody
        holds any more. One answer is given at a time.

        Args:
          text: the user's words.
          chunk: decoding steps between two pieces, up to 32.
          **settings: those of `llama_jax.generation.text.stream`, except `chat`, `samples`, `prefix` and `generator`.

        Raises:
          InputError: for settings out of range, messages that the template refuses, a conversation that leaves no room for an
            answer in the model's context, and while another answer is being given. The messages stay as they were.
        """
        self._require_closed()
        chunk = whole("chunk", chunk, 1)
        if settings.get("samples", 1) != 1:
            raise InputError(f"samples: {settings['samples']} given; a conversation goes on from 1 answer")
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encoded(asked)
        reused = 0 if self._prefix is None else self._prefix.shared(ids)
        answer = TextSession(self._model, [asked], prefix=self._prefix, generator=self.generator, **settings)
        # The answer has a copy of its own: two caches would be one too many.
        self._prefix, self.reused = None, reused
        pieces = self._answer(asked, answer, chunk)
        self._open = weakref.ref(pieces)
        return pieces

    def _require_closed(self) -> None:
        """Refuses to change the messages under an answer that is to join them."""
        pieces = None if self._open is None else self._open()
        if pieces is not None and inspect.getgeneratorstate(pieces) != inspect.GEN_CLOSED:
            raise InputError("an answer is still being given; read it to its end, or close() it, before going on")

    def _encoded(self, asked: Messages) -> list[int]:
        """The ids of the conversation, with room for an answer behind them."""
        ids, context = encode_user(self._model, asked, chat=True), self._model.config.context_length
        if len(ids) >= context:
            raise InputError(
                f"the conversation has {len(ids)} tokens; fewer than {context} (the model's context) expected: "
                "begin anew, or say less"
            )
        return ids

    def _answer(self, asked: Messages, answer: TextSession, chunk: int) -> abc.Generator[Piece, None, None]:
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
            # After any other interruption the cache may be gone: the device was given it to write into.
            self._prefix = None if session is None else session.prefix(0)

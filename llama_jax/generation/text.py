"""Text in, text out: prompts through the tokenizer or the chat template, answers streamed back."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator, stop_reason
from llama_jax.generation.sampling import make_sampling
from llama_jax.text.chat import encode_chat
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, encode_prompt
from llama_jax.weights.load import Pretrained


class Completion(NamedTuple):
    """What a prompt gave.

    Attributes:
      prompt: as it was given.
      text: the new text, without special tokens.
      token_ids: the new tokens, a stop token included.
      stop_reason: `stop` for a stop token, `length` for the limit of new tokens or of the context.
      prompt_tokens: tokens of the prompt, template included.
      new_tokens: number of new tokens.
    """

    prompt: str
    text: str
    token_ids: list[int]
    stop_reason: str
    prompt_tokens: int
    new_tokens: int


class Piece(NamedTuple):
    """New text of one prompt, as it comes.

    Attributes:
      row: which prompt, from 0.
      text: text that is certain; may be empty.
      tokens: how many tokens it was.
      completion: the whole, with the last piece of a prompt; `None` before.
    """

    row: int
    text: str
    tokens: int
    completion: Completion | None


def require_tokenizer(model: Pretrained) -> Tokenizer:
    """The model's tokenizer.

    Raises:
      InputError: if it came without one.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.origin} has no tokenizer: put its tokenizer.json or tokenizer.model beside the weights")
    return model.tokenizer


def encode_user(model: Pretrained, prompt: str, chat: bool) -> list[int]:
    """The ids that a prompt becomes: plain text, or one user message through the model's chat template.

    Raises:
      InputError: if `chat` is asked of a model without a template.
    """
    tokenizer = require_tokenizer(model)
    if not chat:
        return encode_prompt(tokenizer, prompt)
    if model.template is None:
        raise InputError(f"{model.origin} has no chat template; ask without chat")
    return encode_chat(model.template, tokenizer, [{"role": "user", "content": prompt}])


class _Row:
    """A prompt on its way: the tokens so far and the text that they make."""

    def __init__(self, model: Pretrained, prompt: str, chat: bool) -> None:
        self.prompt = prompt
        self.ids = encode_user(model, prompt, chat)
        self.new: list[int] = []
        self.text = ""
        self.finished = False
        self._tokenizer = require_tokenizer(model)
        self._decoder = StreamDecoder(self._tokenizer)

    def take(self, tokens: list[int], ended: bool) -> str:
        """Adds tokens; the text that became certain."""
        self.new += tokens
        # A model may have more rows than its tokenizer has tokens (padding); a token drawn from these has no text.
        known = [token for token in tokens if token < self._tokenizer.vocab_size]
        added = "".join(self._decoder.push(token) for token in known) + (self._decoder.flush() if ended else "")
        self.text += added
        return added

    def completion(self, stop_ids: Sequence[int]) -> Completion:
        """The row as a result."""
        reason = stop_reason(self.new, stop_ids)
        return Completion(self.prompt, self.text, self.new, reason, len(self.ids), len(self.new))


def stream(
    model: Pretrained,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    chat: bool = False,
    chunk: int = 4,
    **options: Any,
) -> Iterator[Piece]:
    """Yields the text of all prompts, decoded together, as it comes.

    Args:
      model: from `llama_jax.load`.
      prompts: texts; each is one user message with `chat`.
      max_new_tokens: limit of new tokens a prompt; the model's context is another.
      temperature: 0 for the most probable token always; one value for all or one a prompt, as for all settings.
      top_k: draw from the `k` most probable tokens only; 0 for all.
      top_p: draw from the most probable tokens that together reach this probability; 1 for all.
      seed: of the draws.
      chat: whether to put each prompt through the model's chat template.
      chunk: decoding steps between two pieces, up to 32.
      **options: `dtype`, `attention`, `rules` of `ModelOptions`.

    Raises:
      InputError: for settings out of range and prompts that the model cannot take.
    """
    rows = [_Row(model, prompt, chat) for prompt in prompts]
    sampling = make_sampling(len(rows), temperature, top_k, top_p, seed)
    generator = Generator(model.params, model.config, **options)
    limits = [min(max_new_tokens, model.config.context_length - len(row.ids)) for row in rows]
    for chunks in generator.stream([row.ids for row in rows], max_new_tokens, sampling, model.stop_ids, chunk):
        for i, (row, tokens, limit) in enumerate(zip(rows, chunks, limits)):
            if row.finished:
                continue
            total = row.new + tokens
            row.finished = len(total) >= limit or stop_reason(total, model.stop_ids) == "stop"
            text = row.take(tokens, row.finished)
            yield Piece(i, text, len(tokens), row.completion(model.stop_ids) if row.finished else None)


def generate(model: Pretrained, prompts: Sequence[str], **settings: Any) -> list[Completion]:
    """The completions of all prompts, decoded together, in their order; settings are those of `stream`."""
    pieces = stream(model, prompts, chunk=32, **settings)
    found = {piece.row: piece.completion for piece in pieces if piece.completion is not None}
    return [found[row] for row in range(len(prompts))]

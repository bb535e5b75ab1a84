"""Held-out loss: every token of a token file predicted once, in nats a token and bits a byte of text."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.axes import Array, Parameters
from llama_jax.data.batch import Batch
from llama_jax.data.batches import sequential_rows, sequential_windows
from llama_jax.data.packing import Name, pack
from llama_jax.data.token_set import TokenSet
from llama_jax.data.tokens import Tokens, largest_token
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama, model_for
from llama_jax.parallel.sharding import batch_spec
from llama_jax.text.tokenizer import encode_prompt
from llama_jax.training.corpora import require_same_tokenizer
from llama_jax.training.hosts import place
from llama_jax.training.loss import batch_loss
from llama_jax.weights.load import Pretrained

_TEXT_CHUNK = 1024  # tokens whose logits exist at one time


class Evaluation(NamedTuple):
    """How well a text is predicted.

    Attributes:
      tokens: targets that counted: every token of a document but its first.
      nats_per_token: mean of -log p.
      bits_per_byte: the same, in bits a byte of UTF-8 text: comparable between tokenizers. All bytes count, those of a first
        token that is not predicted too.
    """

    tokens: int
    nats_per_token: float
    bits_per_byte: float


def make_evaluation(nats: float, tokens: int, bytes_of_text: int) -> Evaluation:
    """An evaluation from the summed loss."""
    return Evaluation(tokens, nats / max(1, tokens), nats / math.log(2) / max(1, bytes_of_text))


def together(parts: Sequence[tuple[Evaluation, int]]) -> Evaluation:
    """The evaluation of several texts, given with their bytes, as one: every token counts alike."""
    nats = math.fsum(part.nats_per_token * part.tokens for part, _ in parts)
    return make_evaluation(nats, sum(part.tokens for part, _ in parts), sum(size for _, size in parts))


def batch_evaluator(model: Llama, loss_chunk: int) -> Callable[[Parameters, Batch], tuple[Array, Array]]:
    """A compiled function from parameters and a batch `[B, T]` to the summed loss and the number of targets."""
    return jax.jit(lambda params, batch: (batch_loss(model, params, batch, loss_chunk), jnp.sum(batch.weights)))


def evaluate(
    run: Callable[[Parameters, Batch], tuple[Array, Array]], params: Parameters, tokens: Tokens, length: int,
    batch_rows: int, mesh: Mesh, model: Llama, packing: Name = "cut",
) -> Evaluation:  # fmt: skip
    """Loss over all tokens, in rows of `length`, `batch_rows` at a time; `fit` parts no document that fits into a row."""
    rows = NamedSharding(mesh, batch_spec(model.options.rules))
    parts: list[tuple[Array, Array]] = []
    for batch in _in_order(tokens, length, batch_rows, packing):
        jax.block_until_ready(parts[-2:-1])  # the host must not run ahead and fill the device with batches
        parts.append(run(params, place(batch, rows)))
    nats, targets = (math.fsum(column) for column in zip(*jax.device_get(parts)))
    return make_evaluation(nats, int(targets), tokens.bytes_of_text)


def _in_order(tokens: Tokens, length: int, batch_rows: int, packing: Name) -> Iterator[Batch]:
    """All tokens once, in batches of rows of `length`."""
    if packing == "fit" or tokens.kind == "pairs":
        return sequential_rows(pack(tokens, length, packing), batch_rows)
    return sequential_windows(tokens, length, batch_rows)


def evaluate_prepared(model: Pretrained, data: TokenSet, length: int | None = None, **options: Any) -> Evaluation:
    """Loss of a model on the held-out part of prepared data: text in windows, conversations whole.

    Args:
      model: from `llama_jax.load`.
      data: prepared with the tokenizer of this model.
      length: tokens of a row; the model's context by default. What is longer is cut.
      **options: `dtype`, `attention`, `rules` of `ModelOptions`.

    Raises:
      InputError: if nothing was held out; for a length out of range, and tokens of another tokenizer.
    """
    tokens, context = data.held_out, model.config.context_length
    if tokens is None:
        raise InputError(f"{data.directory}: nothing was held out; prepare it with --held-out 0.01")
    require_same_tokenizer(data, model.tokenizer, "the model")
    if tokens.vocab_size > model.config.vocab_size and (largest := largest_token(tokens)) >= model.config.vocab_size:
        raise InputError(f"{tokens.name}: token {largest}; the vocabulary of the model goes to {model.config.vocab_size - 1}")
    length = min(context, max(1, tokens.size - 1)) if length is None else length
    if not 1 <= length <= context:
        raise InputError(f"rows of {length} tokens asked for; 1 to {context}, the model's context, expected")
    run = batch_evaluator(model_for(model.params, model.config, **options), _TEXT_CHUNK)
    nats, targets = 0.0, 0.0
    for row in _in_order(tokens, length, 1, "cut" if tokens.kind == "text" else "fit"):
        loss, count = run(model.params, row)
        nats, targets = nats + float(loss), targets + float(count)
    return make_evaluation(nats, int(targets), tokens.bytes_of_text)


def evaluate_text(model: Pretrained, text: str | Sequence[str], length: int | None = None, **options: Any) -> Evaluation:
    """Loss of a model on a text, or several, in windows of `length` tokens that each begin without a past.

    Every token is predicted once, but for the first of a text where the model's tokenizer puts no begin token before it.

    Args:
      model: from `llama_jax.load`.
      text: any text, or texts of which each has windows of its own.
      length: tokens of a window; the model's context by default.
      **options: `dtype`, `attention`, `rules` of `ModelOptions`.

    Raises:
      InputError: for a text of fewer than two tokens, a length out of range, a model without tokenizer, and a tokenizer
        with tokens that the model does not have.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.origin} has no tokenizer: put its tokenizer.json or tokenizer.model beside the weights")
    texts = [text] if isinstance(text, str) else list(text)
    rows = [np.asarray(encode_prompt(model.tokenizer, one), np.int32) for one in texts]
    longest, context = max(map(len, rows), default=0), model.config.context_length
    length = context if length is None else length
    if longest < 2 or not 1 <= length <= context:
        raise InputError(
            f"a text of {longest} tokens in windows of {length}: at least 2 tokens, windows of 1 to {context} (the model's "
            "context) expected"
        )
    length = min(length, longest - 1)
    vocabulary, largest = model.config.vocab_size, max(int(ids.max()) for ids in rows if len(ids))
    if largest >= vocabulary:
        raise InputError(f"the text holds token {largest}; the vocabulary goes from 0 to {vocabulary - 1}")
    llama = model_for(model.params, model.config, **options)
    run = batch_evaluator(llama, _TEXT_CHUNK)
    nats = math.fsum(float(run(model.params, window)[0]) for ids in rows for window in _text_windows(ids, length))
    targets = sum(max(0, len(ids) - 1) for ids in rows)
    return make_evaluation(nats, targets, sum(len(one.encode()) for one in texts))


def _text_windows(ids: np.ndarray, length: int) -> Iterator[Batch]:
    """One row at a time; the last one filled up with targets of weight 0."""
    for first in range(0, len(ids) - 1, length):
        window = ids[first : first + length + 1]
        padded = np.zeros(length + 1, np.int32)
        padded[: len(window)] = window
        weights = (np.arange(length) < len(window) - 1).astype(np.float32)
        yield Batch(padded[None, :-1], padded[None, 1:], weights[None], np.ones((1, length), np.int32))

"""Held-out loss: every token of a token file predicted once, in nats a token and bits a byte of text."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llama_jax.axes import Array, Parameters
from llama_jax.data.batches import Batch, sequential_windows
from llama_jax.data.token_file import TokenFile
from llama_jax.model.llama import Llama
from llama_jax.parallel.sharding import batch_spec
from llama_jax.training.loss import batch_loss


class Evaluation(NamedTuple):
    """How well a text is predicted.

    Attributes:
      tokens: targets that counted: every token of a document but its first.
      nats_per_token: mean of -log p.
      bits_per_byte: the same, in bits a byte of UTF-8 text: comparable between tokenizers.
    """

    tokens: int
    nats_per_token: float
    bits_per_byte: float


def make_evaluation(nats: float, tokens: int, bytes_of_text: int) -> Evaluation:
    """An evaluation from the summed loss."""
    return Evaluation(tokens, nats / max(1, tokens), nats / math.log(2) / max(1, bytes_of_text))


def batch_evaluator(model: Llama, loss_chunk: int) -> Callable[[Parameters, Batch], tuple[Array, Array]]:
    """A compiled function from parameters and a batch `[B, T]` to the summed loss and the number of targets."""
    return jax.jit(lambda params, batch: (batch_loss(model, params, batch, loss_chunk), jnp.sum(batch.weights)))


def evaluate(
    run: Callable[[Parameters, Batch], tuple[Array, Array]], params: Parameters, token_file: TokenFile, length: int,
    batch_rows: int, mesh: Mesh, model: Llama,
) -> Evaluation:  # fmt: skip
    """Loss over a whole token file, in windows of `length` tokens, `batch_rows` at a time."""
    rows = NamedSharding(mesh, batch_spec(model.options.rules))
    parts = [run(params, jax.device_put(batch, rows)) for batch in sequential_windows(token_file, length, batch_rows)]
    nats, targets = (math.fsum(float(part[i]) for part in parts) for i in range(2))
    return make_evaluation(nats, int(targets), token_file.header.bytes_of_text)

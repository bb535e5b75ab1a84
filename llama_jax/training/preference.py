"""Direct preference optimisation (arXiv:2305.18290): of two answers to a prompt the chosen one is made the likelier.

Rows come in pairs, row `2i` the chosen and row `2i + 1` the rejected answer, with weights on the tokens of the answers. What
the policy is compared with is the model without its adapters: the same arrays, not a second copy.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.axes import Array, Float, Parameters
from llama_jax.data.batches import Batch
from llama_jax.model.adapters import without_adapters
from llama_jax.model.llama import Llama
from llama_jax.training.loss import Objective, batch_row_losses


def preference_objective(beta: float) -> Objective:
    """Mean over pairs of -log sigmoid(beta * (log-ratio of the chosen row - log-ratio of the rejected one)).

    A row's log-ratio is log p of its answer under the policy minus that under the model without adapters. The further means
    are `accuracy`, the share of pairs whose chosen row has the larger log-ratio, `margin`, beta times the difference, and
    `chosen` and `rejected`, beta times the log-ratios.

    Args:
      beta: how much it costs to leave the model without adapters.
    """
    return Objective(functools.partial(_preference_loss, beta=beta), lambda batch: jnp.sum(_real_pairs(batch)))


def _real_pairs(batch: Batch) -> Float[Array, "... P"]:
    """1 for pairs whose rows both have targets, 0 for padding."""
    real = jnp.any(batch.weights > 0, axis=-1)
    return (real[..., 0::2] & real[..., 1::2]).astype(jnp.float32)


def _preference_loss(
    model: Llama, params: Parameters, batch: Batch, chunk: int, beta: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    reference = jax.lax.stop_gradient(batch_row_losses(model, without_adapters(params), batch, chunk))
    rewards = beta * (reference - batch_row_losses(model, params, batch, chunk))
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin, real = chosen - rejected, _real_pairs(batch)
    each = {"accuracy": margin > 0, "margin": margin, "chosen": chosen, "rejected": rejected}
    return -jnp.sum(real * jax.nn.log_sigmoid(margin)), {name: jnp.sum(real * values) for name, values in each.items()}

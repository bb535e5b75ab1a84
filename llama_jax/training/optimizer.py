"""AdamW with warm-up and cosine decay, as published for LLaMA (arXiv:2302.13971, section 2.3)."""

import jax
import jax.numpy as jnp
import optax

from llama_jax.axes import Parameters, PyTree
from llama_jax.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0): linear to the peak, then a cosine down to `final_fraction` of it.

    The first update already has a learning rate, the last of the warm-up has the peak, the last of all the final one.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup, decay = config.warmup_steps, max(1, steps - config.warmup_steps)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate after `count` updates."""
        done = jnp.asarray(count, jnp.float32) + 1
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((done - warmup) / decay, 0, 1)))
        return jnp.where(done <= warmup, peak * done / max(1, warmup), final + (peak - final) * cosine)

    return schedule


def decayed(params: Parameters) -> PyTree:
    """Which parameters weight decay applies to: matrices, not the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

"""The learning rate of every update: a linear warm-up, then one of four shapes."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from llama_jax.axes import Array, Float
from llama_jax.training.config_method import OptimizerConfig

# How much of the way from the last learning rate up to the peak is left after a share of the decay, from 0 to 1.
_SHAPES: Mapping[str, Callable[[Float[Array, "..."]], Float[Array, "..."]]] = {
    "cosine": lambda share: 0.5 * (1 + jnp.cos(jnp.pi * share)),
    "linear": lambda share: 1 - share,
    "wsd": lambda share: 1 - jnp.sqrt(share),
    "constant": jnp.ones_like,
}


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0).

    It rises linearly to the peak: the first update already has a learning rate, the last of the warm-up has the peak. Then it
    falls to `final_fraction` of the peak, which the last update has: `cosine` and `linear` from the warm-up on, `wsd` (warm-up,
    stable, decay; arXiv:2404.06395) in the last `decay_fraction` of the steps, by 1 - sqrt, which was the best of the shapes
    compared in arXiv:2405.18392. `config.decay_from`, where it is not 0, is where the fall begins. `constant` stays at the
    peak.

    Args:
      config: peak, warm-up and shape.
      steps: of the run; `config.schedule_steps`, where it is not 0, takes their place.
    """
    peak, final, warmup = config.learning_rate, config.learning_rate * config.final_fraction, config.warmup_steps
    length = config.schedule_steps or steps
    stable = length - round(config.decay_fraction * length) if config.schedule == "wsd" else 0
    begin = max(warmup, config.decay_from or stable)
    decay, shape = max(1, length - begin), _SHAPES[config.schedule]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate after `count` updates."""
        done = jnp.asarray(count, jnp.float32) + 1
        left = shape(jnp.clip((done - begin) / decay, 0, 1))
        return jnp.where(done <= warmup, peak * done / max(1, warmup), final + (peak - final) * left)

    return schedule

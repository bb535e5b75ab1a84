"""The optimizers, all built from optax: AdamW as published for LLaMA (arXiv:2302.13971, section
2.3), Adafactor, Lion, Muon.

They have no learning rate: their updates are multiplied by the schedule in the training step,
decoupled weight decay included, so that the learning rate of an update depends on its step alone.
What Adafactor and Muon do to a matrix they do to the matrix of every layer, whether the layers are
stacked or not.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.axes import Array, Float, Parameters, PyTree
from llama_jax.training.config_sections import OptimizerConfig

# Muon's momentum, by its author; the root mean square of its updates, chosen in arXiv:2502.16982 to
# be like AdamW's, so that one learning rate and one weight decay serve the matrices of the layers
# and what AdamW does to the rest.
MUON_MOMENTUM, MUON_RMS = 0.95, 0.2
ADAFACTOR_CLIP = (
    1.0  # largest root mean square of an update, before it is scaled by that of its matrix
)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, the optimizer's direction, decoupled weight decay: the update for a
    learning rate of 1.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale(-1.0),
    )


def decayed(params: Parameters) -> PyTree:
    """Which parameters weight decay applies to: matrices, not the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        config.beta1, config.beta2, config.eps, mu_dtype=config.moments_dtype
    )


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """The sign of a mean of gradients (arXiv:2302.06675)."""
    return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=config.moments_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Algorithm 4 of arXiv:1804.04235, without momentum: relative to the root mean square of each
    matrix.
    """
    return by_layer(
        optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(ADAFACTOR_CLIP),
            optax.scale_by_param_block_rms(),
        )
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Momentum made orthogonal for the matrices of the layers; AdamW for embedding, head and
    norms.
    """
    muon = optax.contrib.scale_by_muon(
        beta=MUON_MOMENTUM,
        mu_dtype=config.moments_dtype,
        weight_dimension_numbers=_matrix_dimensions,
    )
    matrices = optax.chain(muon, optax.stateless(_like_adamw))
    return optax.partition({"muon": matrices, "adamw": _adamw(config)}, _muon_or_adamw)


_DIRECTIONS: Mapping[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _muon_or_adamw(params: Parameters) -> PyTree:
    """Which of the two each parameter is given to; the factors of an adapter go where their matrix
    goes.
    """

    def label(path: tuple, _: object) -> str:
        return "muon" if any(key.key in LAYER_MATRICES for key in path) else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _matrix_dimensions(updates: PyTree) -> PyTree:
    """The last two dimensions of every leaf are the matrix, whatever stands before them."""
    return jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), updates
    )


def _like_adamw(updates: PyTree, _: PyTree = None) -> PyTree:
    """Orthogonal matrices, whose root mean square is 1 / sqrt of the longer side, with that of
    AdamW's updates.
    """
    return jax.tree.map(lambda update: update * (MUON_RMS * max(update.shape[-2:]) ** 0.5), updates)


def by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Does to every layer of stacked parameters what `inner` does to a parameter."""

    def init(params: PyTree) -> PyTree:
        """One state a layer, stacked."""
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        """The updates of every layer from its own state and parameters."""
        mapped = jax.vmap(inner.update) if jax.tree.leaves(updates) else inner.update
        return mapped(updates, state, params)

    stacked = optax.GradientTransformation(init, update)
    return optax.partition({"layers": stacked, "rest": inner}, _layers_or_rest)


def _layers_or_rest(params: Parameters) -> PyTree:
    """Which parameters have layers on a leading axis."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "layers" if path[0].key == "layers" else "rest", params
    )


# --- schedule ---
#
# The learning rate of every update: a linear warm-up, then one of four shapes.


# How much of the way from the last learning rate up to the peak is left after a share of the decay,
# from 0 to 1.
_SHAPES: Mapping[str, Callable[[Float[Array, "..."]], Float[Array, "..."]]] = {
    "cosine": lambda share: 0.5 * (1 + jnp.cos(jnp.pi * share)),
    "linear": lambda share: 1 - share,
    "wsd": lambda share: 1 - jnp.sqrt(share),
    "constant": jnp.ones_like,
}


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0).

    It rises linearly to the peak: the first update already has a learning rate, the last of the
    warm-up has the peak. Then it falls to `final_fraction` of the peak, which the last update has:
    `cosine` and `linear` from the
      warm-up on, `wsd` (warm-up,
    stable, decay; arXiv:2404.06395) in the last `decay_fraction` of the steps, by 1 - sqrt, which
    was the best of the shapes compared in arXiv:2405.18392. `config.decay_from`, where it is not 0,
    is where the fall begins. `constant` stays at the peak.

    Args:
      config: peak, warm-up and shape.
      steps: of the run; `config.schedule_steps`, where it is not 0, takes their place.
    """
    peak, final, warmup = (
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        config.warmup_steps,
    )
    length = config.schedule_steps or steps
    stable = length - round(config.decay_fraction * length) if config.schedule == "wsd" else 0
    begin = max(warmup, config.decay_from or stable)
    decay, shape = max(1, length - begin), _SHAPES[config.schedule]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate after `count` updates."""
        done = jnp.asarray(count, jnp.float32) + 1
        left = shape(jnp.clip((done - begin) / decay, 0, 1))
        return jnp.where(
            done <= warmup, peak * done / max(1, warmup), final + (peak - final) * left
        )

    return schedule

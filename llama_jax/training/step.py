"""One update as a pure function of (state, batch), and its sharded, compiled form."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from llama_jax.axes import Array, Float, Int, Parameters, PyTree
from llama_jax.data.batches import Batch
from llama_jax.model.llama import Llama
from llama_jax.parallel.sharding import batch_spec, replicated, tree_shardings
from llama_jax.training.loss import batch_loss


class TrainState(NamedTuple):
    """All that a run needs to go on: the data position is the step.

    Attributes:
      step: updates done.
      params: float32 master parameters, stacked form.
      optimizer: state of the optax optimizer.
    """

    step: Int[Array, ""]
    params: Parameters
    optimizer: PyTree


class StepMetrics(NamedTuple):
    """Figures of one update.

    Attributes:
      loss: mean over the batch's targets, nats a token.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: of this update.
      targets: tokens that counted in the loss.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]


class Recipe(NamedTuple):
    """What turns a batch into an update; static.

    Attributes:
      model: the module.
      optimizer: an optax optimizer that includes the learning rate.
      schedule: the learning rate, for the metrics.
      loss_chunk: tokens whose logits exist at one time.
    """

    model: Llama
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss_chunk: int


def summed_gradients(recipe: Recipe, params: Parameters, batch: Batch) -> tuple[Array, Parameters]:
    """Summed loss and its gradient over micro-batches `[A, B, T]`, added up one after the other.

    Sums, not means: dividing once by the targets of the whole batch weights every token alike, whatever the split.
    """
    loss_and_gradient = jax.value_and_grad(lambda p, micro: batch_loss(recipe.model, p, micro, recipe.loss_chunk))
    if batch.tokens.shape[0] == 1:
        return loss_and_gradient(params, jax.tree.map(lambda x: x[0], batch))

    def add(carry: tuple[Array, Parameters], micro: Batch) -> tuple[tuple[Array, Parameters], None]:
        """Adds the loss and gradient of a micro-batch."""
        return jax.tree.map(jnp.add, carry, loss_and_gradient(params, micro)), None

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return lax.scan(add, start, batch)[0]


def train_step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """One optimizer update from micro-batches `[A, B, T]`."""
    loss, gradient = summed_gradients(recipe, state.params, batch)
    targets = jnp.sum(batch.weights)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(targets, 1), gradient)
    updates, optimizer = recipe.optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss / jnp.maximum(targets, 1), optax.tree.norm(gradient), recipe.schedule(state.step), targets)
    return TrainState(state.step + 1, params, optimizer), metrics


def init_state(recipe: Recipe, key: Array) -> TrainState:
    """A fresh state at step 0."""
    params = recipe.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params))


def state_shapes(recipe: Recipe, mesh: Mesh) -> PyTree:
    """Shape, dtype and sharding of every array of the state, without making it."""
    shapes = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    shardings = tree_shardings(shapes, mesh, recipe.model.options.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def sharded_init(recipe: Recipe, mesh: Mesh) -> Callable[[Array], TrainState]:
    """`init_state` compiled so that every array is born on its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(recipe, mesh))
    return jax.jit(lambda key: init_state(recipe, key), out_shardings=shardings)


def batch_sharding(recipe: Recipe, mesh: Mesh) -> NamedSharding:
    """Where micro-batches `[A, B, T]` live: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, batch_spec(recipe.model.options.rules, leading=1))


def sharded_step(recipe: Recipe, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` compiled for a mesh; the state given is consumed."""
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(recipe, mesh))
    return jax.jit(
        lambda state, batch: train_step(recipe, state, batch),
        in_shardings=(shardings, batch_sharding(recipe, mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=(0,),
    )


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """A batch `[B, T]` as `[A, B/A, T]`: micro-batch `a` takes every row `i` with `i % A == a`."""
    return Batch(*[x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1) for x in batch])

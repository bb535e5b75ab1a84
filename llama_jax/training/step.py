"""One update as a pure function of (state, batch), and its sharded, compiled form."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from llama_jax.axes import Array, Bool, Float, Int, Key, Parameters, PyTree
from llama_jax.data.batches import Batches
from llama_jax.data.packing import Batch
from llama_jax.model.llama import Llama
from llama_jax.parallel.compiler import training_options
from llama_jax.parallel.sharding import (
    batch_spec,
    optimizer_shardings,
    replicated,
    tree_shardings,
    whole_sequences,
)
from llama_jax.training.loss import NEXT_TOKEN, Objective

# --- hosts ---
#
# The batch of a step on all devices of all hosts, each host reading the sequences of its own
# devices only; the step to end at.


def sequence_numbers(sequences: int, micro_batch_size: int, unit: int) -> np.ndarray:
    """Which sequences of a batch each micro-batch holds, `[A, B/A]`: the units are dealt out in
    turn.

    So a host that holds the same sequences of every micro-batch reads neighbouring sequences, and
    pairs stay together.
    """
    return (
        np.arange(sequences, dtype=np.int64)
        .reshape(micro_batch_size // unit, sequences // micro_batch_size, unit)
        .swapaxes(0, 1)
        .reshape(-1, micro_batch_size)
    )


def global_batch(
    batches: Batches, step: int, micro_batch_size: int, sharding: NamedSharding
) -> Batch:
    """The batch of a step as micro-batches `[A, B/A, T]`, sharded over the devices of all
    processes.

    Args:
      batches: the same on every process.
      step: from 0.
      micro_batch_size: sequences of a micro-batch; divides the sequences of the batch.
      sharding: of the result.
    """
    numbers = sequence_numbers(batches.sequences_at(step), micro_batch_size, batches.unit)
    return placed_sequences(
        functools.partial(batches.chosen_sequences, step), numbers, batches.length, sharding
    )


def placed_sequences(
    read: Callable[[np.ndarray], Batch], numbers: np.ndarray, length: int, sharding: NamedSharding
) -> Batch:
    """Sequences by their numbers, sharded over the devices of all processes; each process reads
    those of its own devices.

    Args:
      read: from numbers to sequences; the same on every process.
      numbers: of the sequences, of any shape, such as `[A, B/A]`.
      length: `T`, tokens of a sequence.
      sharding: of the result, `[*numbers.shape, T]`.
    """
    shape = (*numbers.shape, length)
    done: dict[tuple, Batch] = {}

    def part(field: int, index: tuple[slice, ...]) -> np.ndarray:
        """A field of the sequences that one device holds; devices that hold the same ones share
        them.
        """
        wanted = numbers[index[:-1]]
        key = wanted.shape, wanted.tobytes()
        if key not in done:
            done[key] = read(wanted.ravel())
        return done[key][field].reshape(*wanted.shape, -1)[..., index[-1]]

    fields = range(len(Batch._fields))
    return Batch(
        *[
            jax.make_array_from_callback(shape, sharding, functools.partial(part, field))
            for field in fields
        ]
    )


def preempted(step: int) -> bool:
    """Whether the processes of a run are to end after this step, as JAX's preemption service has
    found them to agree.

    To be asked by all after every step. It looks at the process alone, until one of them has been
    given SIGTERM.
    """
    return multihost_utils.reached_preemption_sync_point(step)


# --- guard ---
#
# The guard inside an update: where loss or gradient are not finite, or a spike, nothing changes but
# the count of steps.
#
# It is a part of the training state, so its memory is saved and restored with everything
# else, bit by bit.


RING = 128  # good updates whose loss and gradient norm are the running statistics
ENOUGH = RING // 2  # of them before anything is called a spike
WINDOW = 200  # updates of which is remembered whether they were skipped


class Guard(NamedTuple):
    """What is remembered of the updates so far.

    Attributes:
      losses: of the last `RING` good updates; the next one's place is `good % RING`.
      norms: of their gradients.
      good: updates that were made.
      skipped: updates that were skipped.
      streak: latest consecutive ones of these; 0 after a good update.
      recent: whether each of the last `WINDOW` updates was skipped; that of step `k` is at `k %
        WINDOW`.
    """

    losses: Float[Array, " ring"]
    norms: Float[Array, " ring"]
    good: Int[Array, ""]
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    recent: Bool[Array, " window"]


def fresh_guard() -> Guard:
    """That of a run without updates."""
    losses, norms = (jnp.zeros(RING, jnp.float32) for _ in range(2))
    good, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Guard(losses, norms, good, skipped, streak, jnp.zeros(WINDOW, jnp.bool_))


def acceptable(
    guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""], sigma: float | None
) -> Bool[Array, ""]:
    """Whether an update is to be made.

    Args:
      guard: of the updates before.
      loss: of this update.
      norm: of its gradient, before clipping.
      sigma: loss and norm may be this many standard deviations above the mean of the last good
        ones; any if `None`.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if sigma is None:
        return finite
    spike = _above(guard.losses, guard.good, loss, sigma) | _above(
        guard.norms, guard.good, norm, sigma
    )
    return finite & ~(spike & (guard.good >= ENOUGH))


def _above(
    ring: Float[Array, " ring"], count: Int[Array, ""], value: Float[Array, ""], sigma: float
) -> Bool[Array, ""]:
    """Whether a value lies `sigma` standard deviations above the mean of the filled part of a
    ring.
    """
    filled = jnp.arange(RING) < count
    number = jnp.clip(count, 1, RING)
    mean = jnp.sum(jnp.where(filled, ring, 0)) / number
    deviation = jnp.sqrt(jnp.sum(jnp.where(filled, (ring - mean) ** 2, 0)) / number)
    return value > mean + sigma * deviation


def kept_unless(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new arrays if all is well, else the old ones, bit by bit; the choice is made where the
    new ones are written.
    """
    return jax.tree.map(lambda fresh, stale: jnp.where(ok, fresh, stale), new, old)


def noted(
    guard: Guard,
    step: Int[Array, ""],
    ok: Bool[Array, ""],
    loss: Float[Array, ""],
    norm: Float[Array, ""],
) -> Guard:
    """The guard after an update; skipped updates do not enter the running statistics."""
    place = guard.good % RING

    def put(ring: Float[Array, " ring"], value: Float[Array, ""]) -> Float[Array, " ring"]:
        """A ring with the value of a good update."""
        return ring.at[place].set(jnp.where(ok, value, ring[place]))

    return Guard(
        losses=put(guard.losses, loss),
        norms=put(guard.norms, norm),
        good=guard.good + ok,
        skipped=guard.skipped + ~ok,
        streak=jnp.where(ok, 0, guard.streak + 1),
        recent=guard.recent.at[step % WINDOW].set(~ok),
    )


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


# --- step ---


class TrainState(NamedTuple):
    """All that a run needs to resume: the data position is the step.

    Attributes:
      step: updates done, skipped ones included.
      params: trained parameters, of `Recipe.param_dtype`: the master parameters, stacked form, or a
        tree of adapters.
      optimizer: state of the optax optimizer.
      guard: skipped updates, and the running statistics.
    """

    step: Int[Array, ""]
    params: Parameters
    optimizer: PyTree
    guard: Guard


class StepMetrics(NamedTuple):
    """Figures of one update.

    Attributes:
      loss: mean over the batch's targets, nats/token.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: of this update.
      targets: tokens that counted in the loss; whatever else an objective counts.
      skipped: whether the guard has kept it from changing anything.
      more: further means of the objective, by name.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]
    skipped: Bool[Array, ""]
    more: dict[str, Array]


# Number of the update, and of the micro-batch in it, for random numbers in training.
Draw = tuple[Int[Array, ""], Int[Array, ""]]


def fresh_parameters(model: Llama, key: Key[Array, ""]) -> Parameters:
    """Random parameters of a model."""
    options = model.options  # one token, which neither a mesh can cut nor every kernel takes
    model = Llama(
        model.config,
        dataclasses.replace(options, rules=whole_sequences(options.rules), attention="auto"),
    )
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def all_trained(trained: Parameters, frozen: PyTree = None, draw: Draw | None = None) -> Parameters:
    """The parameters of a model that is trained whole: the trained parameters."""
    return trained


class Recipe(NamedTuple):
    """What turns a batch into an update; static.

    Attributes:
      model: the module.
      optimizer: an optax optimizer with a learning rate of 1; its updates are multiplied by the
        schedule.
      schedule: from the step to the learning rate, whatever became of the steps before.
      loss_chunk: tokens of one device whose logits exist at one time.
      objective: the quantity that is minimized.
      init: makes fresh trained parameters.
      parameters: from trained parameters, frozen ones and the random numbers (`None` outside of
        training) to the parameters of the forward pass.
      param_dtype: of the trained parameters between updates.
      spike_sigma: an update this many standard deviations above the running mean is skipped; none
        for its height if `None`.
    """

    model: Llama
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss_chunk: int
    objective: Objective = NEXT_TOKEN
    init: Callable[[Llama, Key[Array, ""]], Parameters] = fresh_parameters
    parameters: Callable[[Parameters, PyTree, Draw | None], Parameters] = all_trained
    param_dtype: str = "float32"
    spike_sigma: float | None = None


Sums = tuple[tuple[Float[Array, ""], dict[str, Array]], Parameters]  # (loss, more), gradient


def summed_gradients(
    recipe: Recipe, state: TrainState, batch: Batch, frozen: PyTree = None
) -> Sums:
    """Summed loss and its gradient over micro-batches `[A, B, T]`, added up one after the other.

    Sums, not means: dividing once by the targets of the whole batch weights every token alike,
    whatever the split. What several micro-batches add up to is float32, whatever the type of the
    parameters.
    """

    def loss(
        trained: Parameters, micro: Batch, number: Int[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        """Of a micro-batch."""
        params = recipe.parameters(trained, frozen, (state.step, number))
        return recipe.objective.loss(recipe.model, params, micro, recipe.loss_chunk)

    def sums(micro: Batch, number: Int[Array, ""]) -> Sums:
        """Of a micro-batch, with the gradient of the trained parameters."""
        return jax.value_and_grad(loss, has_aux=True)(state.params, micro, number)

    first, count = jax.tree.map(lambda x: x[0], batch), batch.tokens.shape[0]
    if count == 1:
        return sums(first, jnp.int32(0))
    losses, gradient = jax.eval_shape(sums, first, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), losses)
    start = (zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), gradient))

    def add(carry: Sums, given: tuple[Batch, Int[Array, ""]]) -> tuple[Sums, None]:
        """Adds the sums of a micro-batch."""
        return jax.tree.map(jnp.add, carry, sums(*given)), None

    return lax.scan(add, start, (batch, jnp.arange(count)))[0]


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, frozen: PyTree = None
) -> tuple[TrainState, StepMetrics]:
    """One optimizer update of the trained parameters, from micro-batches `[A, B, T]`; frozen ones
    have no part in it.

    Whatever the type of the parameters, the update is computed in float32 and then rounded to it.
    One that the guard does not accept leaves parameters and optimizer as they were; the step counts
    all the same.
    """
    (loss, more), gradient = summed_gradients(recipe, state, batch, frozen)
    targets = recipe.objective.targets(batch)
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / jnp.maximum(targets, 1), gradient)
    wide = _in_dtype(state.params, "float32")
    updates, optimizer = recipe.optimizer.update(gradient, state.optimizer, wide)
    rate = recipe.schedule(state.step)
    params = _in_dtype(
        optax.apply_updates(wide, jax.tree.map(lambda update: rate * update, updates)),
        recipe.param_dtype,
    )
    loss, more = jax.tree.map(lambda total: total / jnp.maximum(targets, 1), (loss, more))
    norm = optax.tree.norm(gradient)
    ok = acceptable(state.guard, loss, norm, recipe.spike_sigma)
    params, optimizer = kept_unless(ok, (params, optimizer), (state.params, state.optimizer))
    metrics = StepMetrics(loss, norm, rate, targets, ~ok, more)
    return TrainState(
        state.step + 1, params, optimizer, noted(state.guard, state.step, ok, loss, norm)
    ), metrics


def _in_dtype(params: Parameters, dtype: str) -> Parameters:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def init_state(recipe: Recipe, key: Array) -> TrainState:
    """A fresh state at step 0."""
    return fresh_state(recipe, recipe.init(recipe.model, key))


def fresh_state(recipe: Recipe, params: Parameters) -> TrainState:
    """The state at step 0 of parameters that are given."""
    optimizer = recipe.optimizer.init(
        _in_dtype(params, "float32")
    )  # its state does not follow the type of the parameters
    return TrainState(
        jnp.zeros((), jnp.int32), _in_dtype(params, recipe.param_dtype), optimizer, fresh_guard()
    )


def state_shapes(recipe: Recipe, mesh: Mesh) -> PyTree:
    """Shape, dtype and sharding of every array of the state, without making it."""
    shapes = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    rules = recipe.model.options.rules
    shardings = tree_shardings(shapes._replace(optimizer=()), mesh, rules)
    shardings = shardings._replace(
        optimizer=optimizer_shardings(shapes.optimizer, shapes.params, mesh, rules)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def sharded_init(recipe: Recipe, mesh: Mesh) -> Callable[[Array], TrainState]:
    """`init_state` compiled so that every array is born on its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(recipe, mesh))
    return jax.jit(lambda key: init_state(recipe, key), out_shardings=shardings)


def batch_sharding(recipe: Recipe, mesh: Mesh) -> NamedSharding:
    """Where micro-batches `[A, B, T]` live: sequences over `data` and `fsdp`."""
    return NamedSharding(mesh, batch_spec(recipe.model.options.rules, leading=1))


def sharded_step(recipe: Recipe, mesh: Mesh, frozen: PyTree = None) -> jax.stages.Wrapped:
    """`train_step` compiled for a mesh; the given state is consumed, frozen parameters (the last
    argument, if any) is not.

    Args:
      recipe: what an update is.
      mesh: the devices.
      frozen: arrays, or their shapes, like those that the program will be given.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes(recipe, mesh))
    fixed = () if frozen is None else (tree_shardings(frozen, mesh, recipe.model.options.rules),)

    def step(state: TrainState, batch: Batch, *frozen: PyTree) -> tuple[TrainState, StepMetrics]:
        """By this name it is found in profiles."""
        return train_step(recipe, state, batch, *frozen)

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(recipe, mesh), *fixed),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=(0,),
        compiler_options=training_options(mesh) or None,
    )


def lowered_step(
    recipe: Recipe, mesh: Mesh, shape: tuple[int, int, int], frozen: PyTree = None
) -> jax.stages.Lowered:
    """`sharded_step`, ready to be compiled for arrays that are not there yet.

    Args:
      recipe: what an update is.
      mesh: the devices, or descriptions of them.
      shape: of the micro-batches, `[A, B, T]`.
      frozen: shapes of frozen parameters, with shardings.
    """
    place = batch_sharding(recipe, mesh)
    dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32)
    batch = Batch(*[jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes])
    fixed = () if frozen is None else (frozen,)
    with jax.set_mesh(mesh):
        return sharded_step(recipe, mesh, frozen).lower(state_shapes(recipe, mesh), batch, *fixed)


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """A batch `[B, T]` as `[A, B/A, T]`: micro-batch `a` takes every sequence `i` with `i % A ==
    a`.
    """
    return Batch(*[x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1) for x in batch])

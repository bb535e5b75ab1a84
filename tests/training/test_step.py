"""Loss, gradients, updates: against optax and PyTorch-style closed forms, across meshes, accumulation and forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import TINY, VARIANTS, random_parameters, random_tokens

from llama_jax.data.batches import Batch
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama, logits
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import PARAMETER_AXES, TRAINING, parameter_spec
from llama_jax.training.config_method import OptimizerConfig
from llama_jax.training.cross_entropy import cross_entropy
from llama_jax.training.guard import fresh_guard
from llama_jax.training.loss import batch_loss, mean_loss
from llama_jax.training.optimizer import decayed, make_optimizer
from llama_jax.training.schedule import learning_rate_schedule
from llama_jax.training.step import (
    Recipe,
    TrainState,
    batch_sharding,
    micro_batches,
    sharded_init,
    sharded_step,
    state_shapes,
    train_step,
)
from llama_jax.weights.forms import stack, unstack

# Divisible by every axis of a 2 x 2 x 2 mesh.
CONFIG = dataclasses.replace(TINY, vocab_size=96)


def random_batch(config=CONFIG, rows=8, length=24, seed=0) -> Batch:
    tokens = random_tokens(config, (rows, length + 1), seed)
    rng = np.random.default_rng(seed)
    documents = jnp.asarray(np.sort(rng.integers(1, 4, (rows, length)), axis=1), jnp.int32)
    # Rows weigh differently, as packed rows do, so that a mean of means would show.
    weights = jnp.asarray(rng.random((rows, length)) < np.linspace(0.3, 1, rows)[:, None], jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, documents)


def plain_loss(params, batch, config=CONFIG):
    """Mean loss by optax on whole logits."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch.tokens, config, batch.documents), batch.targets)
    return jnp.sum(each * batch.weights) / jnp.sum(batch.weights)


def sgd_recipe(config=CONFIG, rate=0.1, chunk=64, **options) -> Recipe:
    return Recipe(Llama(config, ModelOptions(**options)), optax.sgd(1.0), optax.constant_schedule(rate), chunk)


@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
def test_cross_entropy_and_gradients_equal_optax(chunk):
    rng = np.random.default_rng(0)
    features, head = jnp.asarray(rng.normal(size=(3, 11, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (3, 11)), jnp.int32)
    weights = jnp.asarray(rng.random((3, 11)), jnp.float32)

    def expected(features, head):
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(features @ head, targets)) * 0.7

    got = lambda f, h: cross_entropy(f, h, targets, weights, chunk) * 0.7  # noqa: E731
    np.testing.assert_allclose(got(features, head), expected(features, head), rtol=1e-6)
    for ours, theirs in zip(jax.grad(got, (0, 1))(features, head), jax.grad(expected, (0, 1))(features, head)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_whole_logits_never_exist():
    rows, length, dim, vocab = 2, 2048, 16, 4096
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((rows, length, dim), jnp.float32), ((dim, vocab), jnp.float32),
              ((rows, length), jnp.int32), ((rows, length), jnp.float32))]  # fmt: skip
    loss = jax.value_and_grad(lambda f, h, t, w: cross_entropy(f, h, t, w, 256), argnums=(0, 1))
    used = jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    whole = rows * length * vocab * 4
    print(f"temporaries {used / 2**20:.1f} MiB; logits in float32 would be {whole / 2**20:.1f} MiB")
    assert used < whole / 3


@pytest.mark.parametrize("variant", ["gqa-untied", "mqa-tied"])
def test_batch_loss_and_gradient_equal_optax_on_whole_logits(variant):
    config = VARIANTS[variant]
    params, batch = random_parameters(config), random_batch(config)
    ours = lambda p: batch_loss(Llama(config), p, batch, 50) / jnp.sum(batch.weights)  # noqa: E731
    value, gradient = jax.value_and_grad(ours)(params)
    expected_value, expected = jax.value_and_grad(plain_loss)(params, batch, config)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), gradient, expected)


def run_step(mesh_sizes, recipe, params, batch, accumulation=1):
    """Parameters and metrics after one step on a mesh of the given sizes."""
    count = int(np.prod(mesh_sizes))
    mesh = make_mesh(*mesh_sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        shapes = state_shapes(recipe, mesh)
        state = TrainState(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), fresh_guard())
        state = jax.tree.map(lambda x, like: jax.device_put(np.array(x), like.sharding), state, shapes)
        placed = jax.device_put(micro_batches(batch, accumulation), batch_sharding(recipe, mesh))
        state, metrics = sharded_step(recipe, mesh)(state, placed)
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("mesh_sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)], ids=str)
def test_mesh_equals_one_device(mesh_sizes, remat):
    """Loss, gradient (by its norm and by the SGD step it makes) and parameters."""
    params, batch = random_parameters(CONFIG), random_batch()
    recipe = sgd_recipe(rate=1.0, remat=remat)
    expected, expected_metrics = run_step((1, 1, 1), recipe, params, batch)
    got, metrics = run_step(mesh_sizes, recipe, params, batch)
    np.testing.assert_allclose(jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)
    np.testing.assert_allclose(expected_metrics.loss, plain_loss(params, batch), rtol=1e-6)
    moved = jax.tree.map(lambda before, after: float(jnp.abs(before - after).max()), params, expected)
    assert min(jax.tree.leaves(moved)) > 1e-4  # every parameter took part


def test_a_split_of_the_layers_changes_nothing_on_a_mesh():
    params, batch = random_parameters(CONFIG), random_batch()
    expected, metrics = run_step((1, 1, 1), sgd_recipe(rate=1.0), params, batch)
    got, split_metrics = run_step((2, 2, 2), sgd_recipe(rate=1.0, remat="1*all+context"), params, batch)
    np.testing.assert_allclose(jax.tree.leaves(split_metrics), jax.tree.leaves(metrics), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


def test_accumulation_weights_tokens_not_micro_batches():
    params, batch = random_parameters(CONFIG), random_batch()
    recipe = sgd_recipe(rate=1.0)
    whole, metrics = run_step((1, 1, 1), recipe, params, batch, accumulation=1)
    for accumulation in (4, 2):
        split, split_metrics = run_step((1, 1, 1), recipe, params, batch, accumulation)
        np.testing.assert_allclose(jax.tree.leaves(split_metrics), jax.tree.leaves(metrics), rtol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), split, whole)


def test_unrolled_step_equals_scanned_step():
    params, batch = random_parameters(CONFIG), random_batch()
    scanned, metrics = run_step((1, 1, 1), sgd_recipe(), params, batch)
    unrolled, unrolled_metrics = run_step((1, 1, 1), sgd_recipe(scan=False), unstack(params), batch)
    np.testing.assert_allclose(jax.tree.leaves(unrolled_metrics), jax.tree.leaves(metrics), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), stack(unrolled), scanned)


def test_state_is_born_sharded_and_stays_where_it_is():
    recipe = Recipe(Llama(CONFIG), make_optimizer(OptimizerConfig(warmup_steps=0)), optax.constant_schedule(1.0), 64)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        state = sharded_init(recipe, mesh)(jax.random.key(0))
        shapes = state_shapes(recipe, mesh)
        place = lambda batch: jax.device_put(micro_batches(batch, 1), batch_sharding(recipe, mesh))  # noqa: E731
        step = sharded_step(recipe, mesh)
        for seed in range(2):
            state, _ = step(state, place(random_batch(seed=seed)))
        assert step._cache_size() == 1
    jax.tree.map(
        lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim) or pytest.fail(str(x.sharding)), state, shapes
    )
    wq = state.params["layers"]["attention"]["wq"]
    moment = state.optimizer[1].mu["layers"]["attention"]["wq"]
    for array in (wq, moment):
        assert array.addressable_shards[0].data.size == array.size // 4  # fsdp x tensor; copied over data


def test_each_parameter_has_one_row_and_each_row_a_parameter():
    found = set()
    for config in VARIANTS.values():
        shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda c=config: random_parameters(c)))
        found |= {path[-1].key for path, _ in shapes}
        for path, leaf in shapes:
            spec = parameter_spec(path, leaf.ndim, TRAINING)
            assert len(spec) == leaf.ndim
            used = [axis for part in spec for axis in (part if isinstance(part, tuple) else (part,)) if axis is not None]
            assert len(used) == len(set(used))
    assert found == set(PARAMETER_AXES)
    assert {axis for axes in PARAMETER_AXES.values() for axis in axes} <= set(dict(TRAINING))


def test_mean_loss_weights_targets():
    params, batch = random_parameters(CONFIG), random_batch()
    tokens = jnp.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    weights = jnp.pad(batch.weights, ((0, 0), (1, 0)))
    expected = plain_loss(params, batch._replace(documents=jnp.ones_like(batch.documents)))
    np.testing.assert_allclose(mean_loss(params, tokens, CONFIG, weights), expected, rtol=1e-5)
    with pytest.raises(InputError, match="rows of 1 tokens"):
        mean_loss(params, tokens[:, :1], CONFIG)


def test_schedule_at_its_corners():
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=10, final_fraction=0.1)
    schedule = learning_rate_schedule(config, steps=110)
    np.testing.assert_allclose([schedule(0), schedule(4), schedule(9), schedule(59), schedule(109), schedule(500)],
                               [2e-4, 1e-3, 2e-3, 1.1e-3, 2e-4, 2e-4], rtol=1e-5)  # fmt: skip


def test_adamw_equals_its_formula_with_decay_on_matrices_only():
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, final_fraction=1.0, clip_norm=1e9, weight_decay=0.5)
    params, batch = random_parameters(CONFIG), random_batch()
    recipe = Recipe(Llama(CONFIG), make_optimizer(config), learning_rate_schedule(config, 10), 64)
    gradient = jax.grad(plain_loss)(params, batch)
    state = TrainState(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), fresh_guard())
    state, metrics = jax.jit(functools.partial(train_step, recipe))(state, micro_batches(batch, 1))
    np.testing.assert_allclose(metrics.learning_rate, 1e-2, rtol=1e-6)
    # After one step the corrected moments are g and g^2.
    for (path, after), before, g in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), jax.tree.leaves(gradient)
    ):
        decay = 0.0 if path[-1].key == "scale" else 0.5
        expected = before - 1e-2 * (g / (jnp.abs(g) + 1e-8) + decay * before)
        small = np.abs(np.asarray(g)) < 1e-5  # the sign of a gradient that is all rounding is not defined
        np.testing.assert_allclose(np.asarray(after)[~small], np.asarray(expected)[~small], atol=2e-5)
    flags = jax.tree_util.tree_leaves_with_path(decayed(params))
    assert {path[-1].key for path, flag in flags if not flag} == {"scale"}


def test_clipping_scales_the_gradient_down_to_the_norm():
    # An epsilon of 1 makes AdamW's update depend on the length of the gradient.
    config = OptimizerConfig(clip_norm=0.5, eps=1.0, warmup_steps=0)
    params = random_parameters(CONFIG)
    gradient = jax.grad(plain_loss)(params, random_batch())
    length = optax.tree.norm(gradient)
    assert length > 0.6

    def update(config, gradient):
        optimizer = make_optimizer(config)
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    by_hand = update(dataclasses.replace(config, clip_norm=1e9), jax.tree.map(lambda g: g * 0.5 / length, gradient))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), update(config, gradient), by_hand)
    untouched = update(dataclasses.replace(config, clip_norm=1e9), gradient)
    jax.tree.map(
        np.testing.assert_array_equal, update(dataclasses.replace(config, clip_norm=2 * float(length)), gradient), untouched
    )

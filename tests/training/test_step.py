"""Loss, gradients, updates: against optax and PyTorch-style closed forms, across meshes,
accumulation and forms.
"""

import dataclasses
import functools
import itertools

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
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.cross_entropy import cross_entropy
from llama_jax.training.loss import batch_loss, mean_loss
from llama_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from llama_jax.training.step import (
    Recipe,
    TrainState,
    batch_sharding,
    fresh_guard,
    fresh_state,
    micro_batches,
    sharded_init,
    sharded_step,
    state_shapes,
    train_step,
)
from llama_jax.weights.assemble import unstack

# Divisible by every axis of a 2 x 2 x 2 mesh.
CONFIG = dataclasses.replace(TINY, vocab_size=96, layers=2)


def random_batch(config=CONFIG, sequences=8, length=24, seed=0) -> Batch:
    tokens = np.asarray(random_tokens(config, (sequences, length + 1), seed))
    rng = np.random.default_rng(seed)
    documents = jnp.asarray(np.sort(rng.integers(1, 4, (sequences, length)), axis=1), jnp.int32)
    # Rows weigh differently, as packed sequences do, so that a mean of means would show.
    weights = jnp.asarray(
        rng.random((sequences, length)) < np.linspace(0.3, 1, sequences)[:, None], jnp.float32
    )
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), weights, documents)


@functools.cache
def parameters(config=CONFIG):
    """Random ones; a step that is given them must not consume them."""
    return random_parameters(config)


def plain_loss(params, batch, config=CONFIG):
    """Mean loss by optax on whole logits."""
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch.tokens, config, batch.documents), batch.targets
    )
    return jnp.sum(each * batch.weights) / jnp.sum(batch.weights)


plain_gradient = jax.jit(jax.value_and_grad(plain_loss), static_argnums=2)


def sgd_recipe(config=CONFIG, rate=0.1, chunk=64, **options) -> Recipe:
    return Recipe(
        Llama(config, ModelOptions(**options)), optax.sgd(1.0), optax.constant_schedule(rate), chunk
    )


@functools.cache
def of_whole_logits():
    """Features, head, targets and weights; 0.7 times the summed cross-entropy and its gradients, by
    optax.
    """
    rng = np.random.default_rng(0)
    features, head = (
        jnp.asarray(rng.normal(size=(3, 11, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 50)), jnp.float32),
    )
    targets = jnp.asarray(rng.integers(0, 50, (3, 11)), jnp.int32)
    weights = jnp.asarray(rng.random((3, 11)), jnp.float32)

    def expected(features, head):
        return (
            jnp.sum(
                weights * optax.softmax_cross_entropy_with_integer_labels(features @ head, targets)
            )
            * 0.7
        )

    return (features, head, targets, weights), jax.jit(jax.value_and_grad(expected, (0, 1)))(
        features, head
    )


@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
def test_cross_entropy_and_gradients_equal_optax(chunk):
    (features, head, targets, weights), (expected, slopes) = of_whole_logits()
    got = lambda f, h: cross_entropy(f, h, targets, weights, chunk) * 0.7
    alone, gradients = jax.jit(lambda f, h: (got(f, h), jax.grad(got, (0, 1))(f, h)))(
        features, head
    )
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, slopes):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_whole_logits_never_exist():
    sequences, length, dim, vocab = 2, 2048, 16, 4096
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((sequences, length, dim), jnp.float32),
            ((dim, vocab), jnp.float32),
            ((sequences, length), jnp.int32),
            ((sequences, length), jnp.float32),
        )
    ]
    loss = jax.value_and_grad(lambda f, h, t, w: cross_entropy(f, h, t, w, 256), argnums=(0, 1))
    used = jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    whole = sequences * length * vocab * 4
    print(f"temporaries {used / 2**20:.1f} MiB; logits in float32 would be {whole / 2**20:.1f} MiB")
    assert used < whole / 3


@pytest.mark.parametrize("variant", ["gqa-untied", "mqa-tied"])
def test_batch_loss_and_gradient_equal_optax_on_whole_logits(variant):
    config = VARIANTS[variant]
    params, batch = parameters(config), random_batch(config)
    ours = lambda p: batch_loss(Llama(config), p, batch, 50) / jnp.sum(batch.weights)
    value, gradient = jax.jit(jax.value_and_grad(ours))(params)
    expected_value, expected = plain_gradient(params, batch, config)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), gradient, expected)


def run_step(mesh_sizes, recipe, params, batch, accumulation=1):
    """Parameters and metrics after one step on a mesh of the given sizes."""
    count = int(np.prod(mesh_sizes))
    mesh = make_mesh(*mesh_sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        shapes = state_shapes(recipe, mesh)
        state = TrainState(
            jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), fresh_guard()
        )
        state = jax.tree.map(
            lambda x, like: jax.device_put(np.array(x), like.sharding), state, shapes
        )
        placed = jax.device_put(
            micro_batches(jax.device_get(batch), accumulation), batch_sharding(recipe, mesh)
        )
        state, metrics = sharded_step(recipe, mesh)(state, placed)
    return jax.device_get(state.params), jax.device_get(metrics)


@functools.cache
def one_device():
    """Parameters and metrics after a step on one device in the plainest way."""
    return run_step((1, 1, 1), sgd_recipe(rate=1.0), parameters(), random_batch())


def require_that_of_one_device(got, metrics, unrolled=False):
    """Loss, gradient (by its norm and by the SGD step it makes) and parameters."""
    expected, expected_metrics = one_device()
    expected = unstack(expected) if unrolled else expected
    np.testing.assert_allclose(
        jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), rtol=1e-5
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


def test_one_device_has_the_loss_of_whole_logits_and_moves_every_parameter():
    after, metrics = one_device()
    loss, gradient = plain_gradient(parameters(), random_batch(), CONFIG)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    moved = jax.tree.map(lambda before, after: np.asarray(before) - after, parameters(), after)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), moved, gradient)
    assert (
        min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(moved)) > 1e-4
    )  # every parameter took part


# Meshes and what is recomputed on them.
CASES = [
    *itertools.product([(2, 2, 2), (8, 1, 1), (1, 4, 2)], ["none", "full"]),
    *itertools.product([(2, 2, 2)], ["1*all+context", "q+k+v+context@host+gate@host"]),
]
OTHERS = [((2, 2, 2), "none"), ((2, 2, 2), "full"), ((8, 1, 1), "full"), ((1, 4, 2), "none")]


@pytest.mark.parametrize(
    ("mesh_sizes", "remat"),
    [pytest.param(*case, marks=pytest.mark.slow if case in OTHERS else []) for case in CASES],
    ids=str,
)
def test_mesh_equals_one_device(mesh_sizes, remat):
    """Also where the layers are split and where the memory of the host is used."""
    require_that_of_one_device(
        *run_step(mesh_sizes, sgd_recipe(rate=1.0, remat=remat), parameters(), random_batch())
    )


@pytest.mark.parametrize("accumulation", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_accumulation_weights_tokens_not_micro_batches(accumulation):
    require_that_of_one_device(
        *run_step((1, 1, 1), sgd_recipe(rate=1.0), parameters(), random_batch(), accumulation)
    )


def test_unrolled_step_equals_scanned_step():
    params = jax.tree.map(jnp.asarray, unstack(jax.device_get(parameters())))
    require_that_of_one_device(
        *run_step((1, 1, 1), sgd_recipe(rate=1.0, scan=False), params, random_batch()),
        unrolled=True,
    )


def test_state_is_born_sharded_and_stays_where_it_is():
    recipe = Recipe(
        Llama(CONFIG),
        make_optimizer(OptimizerConfig(warmup_steps=0)),
        optax.constant_schedule(1.0),
        64,
    )
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        state = sharded_init(recipe, mesh)(jax.random.key(0))
        shapes = state_shapes(recipe, mesh)
        place = lambda batch: jax.device_put(
            micro_batches(jax.device_get(batch), 1), batch_sharding(recipe, mesh)
        )
        step = sharded_step(recipe, mesh)
        for seed in range(2):
            state, _ = step(state, place(random_batch(seed=seed)))
        assert step._cache_size() == 1
    jax.tree.map(
        lambda x, like: (
            x.sharding.is_equivalent_to(like.sharding, x.ndim) or pytest.fail(str(x.sharding))
        ),
        state,
        shapes,
    )
    wq = state.params["layers"]["attention"]["wq"]
    moment = state.optimizer[1].mu["layers"]["attention"]["wq"]
    for array in (wq, moment):
        assert (
            array.addressable_shards[0].data.size == array.size // 4
        )  # fsdp x tensor; copied over data


def test_each_parameter_has_one_sequence_and_each_sequence_a_parameter():
    found = set()
    for config in (VARIANTS["gqa-untied"], VARIANTS["mqa-tied"]):
        shapes = jax.tree_util.tree_leaves_with_path(parameters(config))
        found |= {path[-1].key for path, _ in shapes}
        for path, leaf in shapes:
            spec = parameter_spec(path, leaf.ndim, TRAINING)
            assert len(spec) == leaf.ndim
            used = [
                axis
                for part in spec
                for axis in (part if isinstance(part, tuple) else (part,))
                if axis is not None
            ]
            assert len(used) == len(set(used))
    assert found == set(PARAMETER_AXES)
    assert {axis for axes in PARAMETER_AXES.values() for axis in axes} <= set(dict(TRAINING))


def test_mean_loss_weights_targets():
    params, batch = parameters(), random_batch()
    tokens = jnp.asarray(np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1))
    weights = jnp.asarray(np.pad(batch.weights, ((0, 0), (1, 0))))
    whole = batch._replace(documents=jnp.asarray(np.ones_like(batch.documents)))
    expected, _ = plain_gradient(params, whole, CONFIG)
    mean = jax.jit(lambda params, tokens, weights: mean_loss(params, tokens, CONFIG, weights))
    np.testing.assert_allclose(mean(params, tokens, weights), expected, rtol=1e-5)
    np.testing.assert_allclose(mean(params, tokens, weights > 0), expected, rtol=1e-5)
    assert not np.any(
        jax.grad(mean, argnums=2)(params, tokens, weights)
    )  # constants, in the divisor too
    # All T tokens are run: [2, 128] suits the kernel, which takes 128 and not 127.
    wide = dataclasses.replace(CONFIG, head_dim=64, context_length=128)
    loss = functools.partial(mean_loss, config=wide, attention="splash")
    assert jax.eval_shape(loss, parameters(wide), jnp.zeros((2, 128), jnp.int32)).shape == ()
    with pytest.raises(InputError, match="sequences of 1 tokens"):
        mean_loss(params, tokens[:, :1], CONFIG)


def test_adamw_equals_its_formula_with_decay_on_matrices_only():
    config = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=0, final_fraction=1.0, clip_norm=1e9, weight_decay=0.5
    )
    params, batch = parameters(), random_batch()
    recipe = Recipe(Llama(CONFIG), make_optimizer(config), learning_rate_schedule(config, 10), 64)
    _, gradient = plain_gradient(params, batch, CONFIG)
    step = jax.jit(
        lambda params, batch: train_step(
            recipe, fresh_state(recipe, params), micro_batches(batch, 1)
        )
    )
    state, metrics = step(params, batch)
    np.testing.assert_allclose(metrics.learning_rate, 1e-2, rtol=1e-6)
    # After one step the corrected moments are g and g^2.
    for (path, after), before, g in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        *[jax.tree.leaves(jax.device_get(x)) for x in (params, gradient)],
    ):
        decay = 0.0 if path[-1].key == "scale" else 0.5
        expected = before - 1e-2 * (g / (np.abs(g) + 1e-8) + decay * before)
        small = np.abs(g) < 1e-5  # the sign of a gradient that is all rounding is not defined
        np.testing.assert_allclose(np.asarray(after)[~small], expected[~small], atol=2e-5)
    flags = jax.tree_util.tree_leaves_with_path(decayed(params))
    assert {path[-1].key for path, flag in flags if not flag} == {"scale"}


def test_clipping_scales_the_gradient_down_to_the_norm():
    # An epsilon of 1 makes AdamW's update depend on the length of the gradient.
    config = OptimizerConfig(clip_norm=0.5, eps=1.0, warmup_steps=0)
    params, gradient = parameters(), plain_gradient(parameters(), random_batch(), CONFIG)[1]
    length = jax.jit(optax.tree.norm)(gradient)
    assert length > 0.6

    @jax.jit
    def updates(gradient, length):
        """Cut, cut by hand, far from the norm, not so far."""

        def update(gradient, norm):
            optimizer = make_optimizer(dataclasses.replace(config, clip_norm=norm))
            return optimizer.update(gradient, optimizer.init(params), params)[0]

        shorter = jax.tree.map(lambda g: g * 0.5 / length, gradient)
        return (
            update(gradient, 0.5),
            update(shorter, 1e9),
            update(gradient, 1e9),
            update(gradient, twice),
        )

    twice = 2 * float(length)
    cut, by_hand, untouched, longer = updates(gradient, length)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), cut, by_hand)
    jax.tree.map(np.testing.assert_array_equal, longer, untouched)

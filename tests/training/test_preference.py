"""Preferences: loss, gradient and figures against the formula of the paper in float64, pairs in micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import random_parameters
from test_adapter_training import CONFIG, close, make, run, train_config, warm_state
from test_step import random_batch

from llama_jax.model.adapters import merge
from llama_jax.model.llama import logits
from llama_jax.training.step import init_state, micro_batches, train_step

BETA = 0.3


def row_log_probabilities(params, batch):
    """Log p of each row's targets, from whole logits."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch.tokens, CONFIG, batch.documents), batch.targets)
    return -jnp.sum(each * batch.weights, axis=1)


def by_hand(policy, reference):
    """The paper's equation 7 in float64, and its figures."""
    rewards = BETA * (np.asarray(policy, np.float64) - np.asarray(reference, np.float64))
    margin = rewards[0::2] - rewards[1::2]
    return np.mean(np.log1p(np.exp(-margin))), margin, rewards


def test_loss_figures_and_gradient_equal_the_formula():
    recipe, params, batch = make(train_config(beta=BETA)), random_parameters(CONFIG), random_batch(CONFIG)
    recipe = recipe._replace(optimizer=optax.sgd(1.0))
    state = warm_state(recipe)._replace(optimizer=optax.sgd(1.0).init(None))
    after, metrics = jax.jit(functools.partial(train_step, recipe))(state, micro_batches(batch, 1, together=2), params)
    reference = row_log_probabilities(params, batch)
    policy = lambda adapters: row_log_probabilities(merge(params, adapters, 2.0), batch)  # noqa: E731
    loss, margin, rewards = by_hand(policy(state.params), reference)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(metrics.more["accuracy"], np.mean(margin > 0))
    np.testing.assert_allclose(metrics.more["margin"], np.mean(margin), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics.more["chosen"], np.mean(rewards[0::2]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics.more["rejected"], np.mean(rewards[1::2]), rtol=1e-3, atol=1e-4)
    # The gradient by the chain rule with slopes in float64: -beta sigmoid(-margin) for chosen rows, the opposite for rejected.
    slope = BETA / (1 + np.exp(margin)) / len(margin)
    slopes = jnp.asarray(np.stack([-slope, slope], axis=1).reshape(-1), jnp.float32)
    expected = jax.grad(lambda adapters: policy(adapters) @ slopes)(state.params)
    close(jax.tree.map(jnp.subtract, state.params, after.params), expected, atol=1e-4)


def test_fresh_adapters_are_indifferent():
    recipe, params, batch = make(train_config(beta=BETA)), random_parameters(CONFIG), random_batch(CONFIG)
    state = init_state(recipe, jax.random.key(0))
    _, metrics = jax.jit(functools.partial(train_step, recipe))(state, micro_batches(batch, 1), params)
    np.testing.assert_allclose(metrics.loss, np.log(2), rtol=1e-5)
    assert metrics.more["accuracy"] == 0 == metrics.more["margin"]


def test_pairs_stay_together_in_micro_batches_and_padding_counts_nothing():
    rows = random_batch(CONFIG)
    numbered = rows._replace(tokens=np.repeat(np.arange(8)[:, None], 24, 1))
    dealt = np.asarray(micro_batches(numbered, 2, together=2).tokens[:, :, 0])
    assert dealt.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    recipe = make(train_config(beta=BETA))._replace(optimizer=optax.sgd(1.0))
    params, step = random_parameters(CONFIG), jax.jit(functools.partial(train_step, recipe))
    state = warm_state(recipe)._replace(optimizer=optax.sgd(1.0).init(None))
    whole, figures = step(state, micro_batches(rows, 1), params)
    split, split_figures = step(state, micro_batches(rows, 2, together=2), params)
    close(split.params, whole.params)
    np.testing.assert_allclose(jax.tree.leaves(split_figures), jax.tree.leaves(figures), rtol=1e-4, atol=1e-6)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), rows)
    close(step(state, micro_batches(padded, 1), params)[0].params, whole.params)


def test_mesh_equals_one_device():
    recipe, params, batch = make(train_config(beta=BETA)), random_parameters(CONFIG), random_batch(CONFIG)
    recipe = recipe._replace(optimizer=optax.sgd(1.0))
    expected, figures = run(recipe, params, batch)
    got, split = run(recipe, params, batch, (2, 2, 2))
    close(got, expected)
    np.testing.assert_allclose(jax.tree.leaves(split), jax.tree.leaves(figures), rtol=1e-4, atol=1e-6)

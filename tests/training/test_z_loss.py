"""The z-loss: its value and gradients against float64; what is reported stays the cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import CONFIG, parameters, plain_loss, random_batch, run_step, sgd_recipe

from llama_jax.errors import InputError
from llama_jax.model.llama import logits
from llama_jax.training.config import RunConfig, TrainConfig
from llama_jax.training.config_sections import AdapterConfig, DataConfig, OptimizerConfig
from llama_jax.training.cross_entropy import cross_entropy, cross_entropy_and_z
from llama_jax.training.loss import NEXT_TOKEN, next_token

Z = 0.03


def naive(features, head, targets, weights, z_loss):
    """Summed cross-entropy and z-loss in float64, straight from their definitions."""
    scores = features.astype(np.float64) @ head.astype(np.float64)
    log_z = np.log(np.sum(np.exp(scores), axis=-1))
    at_target = np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return np.sum(weights * (log_z - at_target)), z_loss * np.sum(weights * log_z**2)


def slopes(function, at, step=1e-5):
    """Central differences in every entry."""
    found = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        there = at.astype(np.float64).copy()
        there[index] += step
        up = function(there)
        there[index] -= 2 * step
        found[index] = (up - function(there)) / (2 * step)
    return found


@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
def test_value_and_gradients_equal_float64(chunk):
    rng = np.random.default_rng(0)
    features, head = (
        rng.normal(size=(3, 5, 4)).astype(np.float32),
        rng.normal(size=(4, 9)).astype(np.float32),
    )
    targets, weights = (
        rng.integers(0, 9, (3, 5)).astype(np.int32),
        rng.random((3, 5)).astype(np.float32),
    )

    @jax.jit
    def values(features, head, targets, weights):
        """Without a gradient, beside it, and the gradient."""
        alone = cross_entropy_and_z(features, head, targets, weights, chunk, Z)
        beside, pull = jax.vjp(
            lambda f, h: cross_entropy_and_z(f, h, targets, weights, chunk, Z), features, head
        )
        return (
            alone,
            beside,
            pull((jnp.float32(0.7), jnp.float32(100.0))),
        )  # the second figure is for the eye, without gradient

    alone, beside, got = values(features, head, targets, weights)
    np.testing.assert_allclose(alone, naive(features, head, targets, weights, Z), rtol=1e-5)
    np.testing.assert_allclose(beside, naive(features, head, targets, weights, Z), rtol=1e-5)
    total = lambda f, h: 0.7 * sum(naive(f, h, targets, weights, Z))
    np.testing.assert_allclose(got[0], slopes(lambda f: total(f, head), features), atol=1e-5)
    np.testing.assert_allclose(got[1], slopes(lambda h: total(features, h), head), atol=1e-5)


def test_off_is_the_cross_entropy():
    assert next_token(0.0) is NEXT_TOKEN
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((2, 512, 16), jnp.float32),
            ((16, 512), jnp.float32),
            ((2, 512), jnp.int32),
            ((2, 512), jnp.float32),
        )
    ]

    def work(loss):
        """FLOPs and temporaries of a gradient."""
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    off = work(lambda *given: cross_entropy(*given, 64))
    assert work(lambda *given: cross_entropy_and_z(*given, 64, 0.0)[0]) == off
    assert (
        work(lambda *given: cross_entropy_and_z(*given, 64, Z)[0])[0] > off[0]
    )  # so the comparison sees it


@pytest.fixture(scope="module")
def on_whole_logits():
    """Parameters, their batch, and loss, z-loss and gradient of the sum of both, from whole
    logits.
    """
    params, batch = parameters(), random_batch()

    def both(params):
        """The sum of the two, and each of them."""
        scores = logits(params, batch.tokens, CONFIG, batch.documents)
        z = (
            Z
            * jnp.sum(batch.weights * jax.nn.logsumexp(scores, axis=-1) ** 2)
            / jnp.sum(batch.weights)
        )
        loss = plain_loss(params, batch)
        return loss + z, (loss, z)

    (_, (loss, z)), gradient = jax.device_get(
        jax.jit(jax.value_and_grad(both, has_aux=True))(params)
    )
    return params, batch, loss, z, gradient


@pytest.mark.parametrize(("mesh", "accumulation"), [((1, 1, 1), 4), ((2, 2, 2), 1)], ids=str)
def test_an_update_follows_both_and_reports_each(mesh, accumulation, on_whole_logits):
    params, batch, loss, z, gradient = on_whole_logits
    recipe = sgd_recipe(rate=1.0)._replace(objective=next_token(Z))
    after, metrics = run_step(mesh, recipe, params, batch, accumulation)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.more["z_loss"], z, rtol=1e-5)
    norm = (
        sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient)) ** 0.5
    )
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    moved = jax.tree.map(lambda before, g: np.asarray(before) - g, params, gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), after, moved)


def test_a_frozen_head_has_none():
    with pytest.raises(InputError, match=r"^optimizer\.z_loss: 0\.1 given, 0 with adapter\.rank"):
        TrainConfig(
            run=RunConfig(init="base"),
            model=CONFIG,
            data=DataConfig(length=24, tokenizer="base"),
            adapter=AdapterConfig(rank=4),
            optimizer=OptimizerConfig(z_loss=0.1),
        )

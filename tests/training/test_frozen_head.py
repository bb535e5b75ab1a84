"""The loss under a frozen head: against optax on whole logits, sequence by sequence; no gradient of
the head, no logits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import TINY, random_parameters
from test_step import random_batch

from llama_jax.model.llama import Llama, logits
from llama_jax.model.quantize import quantize
from llama_jax.training.cross_entropy import sequence_losses
from llama_jax.training.loss import NEXT_TOKEN, NEXT_TOKEN_FROZEN_HEAD, batch_sequence_losses


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
def test_rows_and_gradients_of_features_equal_optax(chunk):
    features, head, weights = (
        drawn((3, 11, 8)),
        drawn((8, 50), 1),
        jnp.asarray(np.abs(drawn((3, 11), 2))),
    )
    targets = jnp.asarray(np.random.default_rng(3).integers(0, 50, (3, 11)), jnp.int32)
    mix = jnp.asarray(np.float32([0.7, -2.0, 0.1]))  # each sequence's slope is another one

    def expected(features):
        return jnp.sum(
            weights * optax.softmax_cross_entropy_with_integer_labels(features @ head, targets),
            axis=1,
        )

    def ours(features):
        return sequence_losses(features, head, targets, weights, chunk)

    ways = [(way, lambda f, way=way: way(f) @ mix) for way in (ours, expected)]
    (got, slope), (wanted, of_optax) = jax.jit(
        lambda f: [(way(f), jax.grad(mixed)(f)) for way, mixed in ways]
    )(features)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose(slope, of_optax, atol=1e-5)


def test_frozen_head_costs_neither_logits_nor_a_gradient():
    sequences, length, dim, vocab = 2, 512, 64, 8192
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((sequences, length, dim), jnp.float32),
            ((dim, vocab), jnp.float32),
            ((sequences, length), jnp.int32),
            ((sequences, length), jnp.float32),
        )
    ]
    loss = jax.value_and_grad(lambda f, h, t, w: jnp.sum(sequence_losses(f, h, t, w, 64)))
    program = jax.jit(loss).lower(*shapes).compile()
    head, chunk, features = dim * vocab * 4, 64 * vocab * 4, sequences * length * dim * 4
    used = program.memory_analysis().temp_size_in_bytes
    print(f"temporaries {used / 2**20:.1f} MiB, head {head / 2**20:.1f}, chunk {chunk / 2**20:.1f}")
    assert (
        used <= 2 * chunk + 4 * features
    )  # 8 MiB below what a gradient of the head takes beside them at the least


@pytest.mark.parametrize("tied", [True, False])
def test_objectives_agree_and_quantised_heads_work(tied):
    config = dataclasses.replace(TINY, tied_head=tied)
    params, batch, model = random_parameters(config), random_batch(config), Llama(config)

    @jax.jit
    def losses(params, batch):
        """By either objective; of the sequences under a narrow head, and by optax."""
        whole, frozen = (
            objective.loss(model, params, batch, 50)[0]
            for objective in (NEXT_TOKEN, NEXT_TOKEN_FROZEN_HEAD)
        )
        narrow = quantize(params, 8)
        scores = logits(narrow, batch.tokens, config, batch.documents)
        each = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
        return (
            whole,
            frozen,
            batch_sequence_losses(model, narrow, batch, 50),
            jnp.sum(each * batch.weights, axis=1),
        )

    whole, frozen, sequences, expected = losses(params, batch)
    np.testing.assert_allclose(frozen, whole, rtol=1e-6)
    np.testing.assert_allclose(sequences, expected, rtol=1e-4)

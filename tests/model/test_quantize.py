"""Quantised weights: error bounds in closed form, both forms of the tree, meshes, bytes, and a real
model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix import matrix as every_pair
from support import (
    TINY,
    VARIANTS,
    float64_logits,
    float64_states,
    greedy_continues,
    random_parameters,
    random_tokens,
)

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator
from llama_jax.model.llama import embed, hidden_states, logits
from llama_jax.model.quantize import Quantized, dequantize, parameter_bytes, quantize
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, tree_shardings
from llama_jax.weights.assemble import unstack

SMALL = dataclasses.replace(TINY, layers=2)
GROUP = 4  # divides every matrix of TINY


@functools.cache
def quantised(config, bits: int):
    """Random parameters quantised; stacked."""
    return jax.jit(lambda params: quantize(params, bits, GROUP))(random_parameters(config))


def unrolled(params):
    """`unstack` as one program."""
    return jax.jit(unstack)(params)


def is_quantized(leaf) -> bool:
    return isinstance(leaf, Quantized)


@jax.jit
def dequantised(params):
    """The tree with plain matrices again."""

    def plain(path, leaf):
        if not is_quantized(leaf):
            return leaf
        return (
            dequantize(leaf) if path[-1].key == "embedding" else dequantize(leaf).swapaxes(-1, -2)
        )

    return jax.tree_util.tree_map_with_path(plain, params, is_leaf=is_quantized)


def matrix(*shape: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("name", "axis"), [("wq", 0), ("embedding", 1)])
def test_eight_bits_are_within_half_a_scale(name, axis):
    wide = matrix(32, 20) * np.logspace(-3, 3, 20 if axis == 0 else 32).reshape(
        (1, -1) if axis == 0 else (-1, 1)
    )
    wide[(slice(None), 3) if axis == 0 else (3,)] = 0
    held = jax.jit(quantize)({name: wide})[name]
    scale = np.abs(wide).max(axis, keepdims=True) / 127
    np.testing.assert_allclose(np.asarray(held.scales).ravel(), scale.ravel(), rtol=1e-6)
    assert (np.abs(np.asarray(dequantised({name: held})[name]) - wide) <= 0.5001 * scale).all()


def test_four_bits_take_the_best_multiplier():
    """Against every multiplier and every 4-bit number, tried out in float64."""
    wide = matrix(24, 5, seed=3).astype(np.float64) * np.repeat([0.1, 1.0, 0.5], 8)[:, None]
    wide[8:16, 2] = 0
    run = jax.jit(lambda params: dequantize(quantize(params, bits=4, group=8)["wq"]))
    got = np.asarray(run({"wq": wide.astype(np.float32)}), np.float64).T
    for column in range(5):
        scale = np.abs(wide[:, column]).max() / 105
        for group in np.arange(24).reshape(3, 8):
            grids = [m * scale * np.arange(-8, 8) for m in range(-15, 16) if m]
            errors = [
                np.sum(np.min((wide[group, column, None] - grid) ** 2, axis=1)) for grid in grids
            ]
            np.testing.assert_allclose(
                np.sum((got - wide)[group, column] ** 2), min(errors), rtol=1e-4, atol=1e-10
            )


def rounding_noise(params, seed: int = 11):
    """The parameters with an error drawn evenly from half an 8-bit step to both sides: what
    rounding does, without rounding.
    """
    rng = np.random.default_rng(seed)

    def disturb(path, leaf):
        name, wide = path[-1].key, np.asarray(leaf)
        if name == "scale":
            return leaf
        step = np.abs(wide).max(-1 if name == "embedding" else -2, keepdims=True) / 127
        return wide + step * rng.uniform(-0.5, 0.5, wide.shape)

    return jax.tree_util.tree_map_with_path(disturb, params)


@pytest.mark.parametrize(
    ("bits", "variant"),
    [
        (8, "gqa-untied"),
        (4, "gqa-tied-theta5e5"),
        pytest.param(8, "gqa-tied-theta5e5", marks=pytest.mark.slow),
        pytest.param(4, "gqa-untied", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_dequantised_weights(bits, variant):
    """To rounding those of plain matrices with the same numbers; as far from the weights before as
    rounding must go.
    """
    config = dataclasses.replace(VARIANTS[variant], layers=2)
    params, tokens, narrow = (
        random_parameters(config),
        random_tokens(config, (2, 20)),
        quantised(config, bits),
    )
    exact, plain, noisy = (
        float64_logits(p, tokens, config)
        for p in (params, dequantised(narrow), rounding_noise(params))
    )
    for form in (narrow, unrolled(narrow)):
        np.testing.assert_allclose(
            logits(form, tokens, config), plain, atol=1e-5 * np.abs(exact).max()
        )
    half = np.asarray(logits(narrow, tokens, config, dtype="bfloat16"))
    assert np.abs(half - plain).max() < 0.05 * np.abs(exact).max()
    # A 4-bit step is at most 127 / 8 times an 8-bit step: 8 steps hold the largest weight of a
    # group, not 127 of a channel.
    factor = 1 if bits == 8 else 127 / 8
    assert 0 < np.std(plain - exact) < 1.5 * factor * np.std(noisy - exact)


def test_a_quantised_tree_is_a_tree_of_parameters():
    """Other uses of parameters take it: embeddings, the residual stream, the loss's head,
    generation.
    """
    params, tokens = quantised(SMALL, 8), np.asarray(random_tokens(SMALL, (2, 6)))
    plain = jax.tree.map(np.asarray, dequantised(params))
    np.testing.assert_allclose(
        jax.jit(embed)(params, tokens), plain["embedding"][tokens], rtol=1e-6
    )
    np.testing.assert_allclose(
        hidden_states(params, jnp.asarray(tokens), SMALL),
        float64_states(plain, tokens, SMALL),
        atol=1e-4,
    )
    prompts = [[5, 6, 7], [9]]
    for prompt, row in zip(prompts, Generator(unrolled(params), SMALL).generate(prompts, 6)):
        assert len(row.token_ids) == 6
        assert greedy_continues(plain, prompt, row.token_ids, SMALL)


ON_MESH = dataclasses.replace(SMALL, vocab_size=98, tied_head=True)


@every_pair(
    bits=[8, 4],
    scan=[True, False],
    shape=[{"tensor": 2, "data": 2, "fsdp": 2}, {"tensor": 2, "data": 4}],
)
def test_a_mesh_computes_the_same(bits, scan, shape):
    params = quantised(ON_MESH, bits)
    expected = float64_logits(dequantised(params), random_tokens(ON_MESH, (4, 8)), ON_MESH)
    params = params if scan else unrolled(params)
    mesh = make_mesh(**shape)
    shardings = tree_shardings(params, mesh, TRAINING)
    assert {len(s.spec) for s in jax.tree.leaves(shardings)} <= {1, 2, 3}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        got = logits(placed, random_tokens(ON_MESH, (4, 8)), ON_MESH)
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    layer = placed["layers"] if scan else placed["layers_0"]
    gate = layer["feed_forward"]["gate"].values
    assert (
        gate.addressable_shards[0].data.size * 2 * shape.get("fsdp", 1) == gate.size
    )  # really cut


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes(bits):
    params = jax.eval_shape(lambda params: quantize(params, bits, GROUP), random_parameters(TINY))
    rows = {"wq": 48, "wk": 48, "wv": 48, "wo": 60, "gate": 48, "up": 48, "down": 64}
    columns = {"wq": 60, "wk": 20, "wv": 20, "wo": 48, "gate": 64, "up": 64, "down": 48}
    per_weight = 1 if bits == 8 else 1 / 2 + 1 / GROUP
    layers = 3 * sum(rows[n] * columns[n] * per_weight + 4 * columns[n] for n in rows)
    table, head, norms = 97 * 48 + 97 * 4, 97 * 48 + 97 * 4, 4 * 48 * (2 * 3 + 1)
    assert parameter_bytes(params) == layers + table + head + norms


def test_refusals_are_named():
    params = random_parameters(SMALL)
    for arguments, word in (
        ((params, 3), "bits: 3"),
        ((params, 4, 5), "group: 5"),
        ((params, 4, 32), "the 48 inputs of wk"),
        ((quantised(SMALL, 8),), "already"),
    ):
        with pytest.raises(InputError, match=word):
            quantize(*arguments)

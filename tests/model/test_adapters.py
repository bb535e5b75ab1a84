"""Adapters as leaves: against the dense formula, merged weights, both forms, meshes; what dropout does and where."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_parameters, random_tokens

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.errors import InputError
from llama_jax.model.adapters import Adapted, Dropout, combine, dropped, init_adapters, merge, without_adapters
from llama_jax.model.llama import logits
from llama_jax.model.product import product
from llama_jax.model.quantize import dequantize, quantize
from llama_jax.weights.forms import unstack

CONFIG = dataclasses.replace(TINY, head_dim=16)  # groups of 32 divide its inner width
PARAMS = random_parameters(CONFIG)
TOKENS = random_tokens(CONFIG, (2, 20))


def random_adapters(rank=4, targets=LAYER_MATRICES, config=CONFIG, std=0.1):
    """Adapters whose second factor is not zero."""
    fresh = init_adapters(jax.random.key(1), config, rank, targets)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, std, x.shape), jnp.float32), fresh)


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    fresh = init_adapters(jax.random.key(0), CONFIG, 4, ("wq", "down"))
    np.testing.assert_array_equal(logits(combine(PARAMS, fresh, 2.0), TOKENS, CONFIG), logits(PARAMS, TOKENS, CONFIG))
    assert set(fresh["layers"]) == {"attention", "feed_forward"}
    for path, inputs in ((("attention", "wq"), CONFIG.dim), (("feed_forward", "down"), CONFIG.ffn_dim)):
        a = fresh["layers"][path[0]][path[1]]["a"]
        assert a.shape == (CONFIG.layers, inputs, 4)
        assert 0.95 * inputs**-0.5 < float(jnp.abs(a).max()) <= inputs**-0.5  # kaiming uniform with a = sqrt(5)
        np.testing.assert_allclose(jnp.std(a), (3 * inputs) ** -0.5, rtol=0.1)
    alone = init_adapters(jax.random.key(0), CONFIG, 4, ("down",))
    np.testing.assert_array_equal(alone["layers"]["feed_forward"]["down"]["a"], fresh["layers"]["feed_forward"]["down"]["a"])


@pytest.mark.parametrize("targets", [LAYER_MATRICES, ("wo",), ("wk", "up")], ids="+".join)
def test_logits_equal_those_of_merged_weights_in_both_forms(targets):
    adapters = random_adapters(targets=targets)
    combined = combine(PARAMS, adapters, 0.5)
    got = logits(combined, TOKENS, CONFIG)
    by_hand = unstack(PARAMS)
    for name, node in unstack(adapters).items():
        for part, matrices in node.items():
            for matrix, low in matrices.items():
                delta = np.asarray(low["a"], np.float64) @ np.asarray(low["b"], np.float64) * 0.5
                by_hand[name][part] = by_hand[name][part] | {
                    matrix: by_hand[name][part][matrix] + jnp.asarray(delta, jnp.float32)
                }
    np.testing.assert_allclose(got, logits(by_hand, TOKENS, CONFIG), atol=1e-5)
    np.testing.assert_allclose(got, logits(merge(PARAMS, adapters, 0.5), TOKENS, CONFIG), atol=1e-5)
    np.testing.assert_allclose(got, logits(unstack(combined), TOKENS, CONFIG), atol=1e-5)
    assert float(jnp.abs(got - logits(PARAMS, TOKENS, CONFIG)).max()) > 0.01


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_gradients_equal_those_of_the_dense_formula(kind):
    rng = np.random.default_rng(0)
    rows, inputs, outputs, rank, scale = 20, 64, 32, 3, 0.7
    x, a, b, w, out = (
        rng.normal(size=s) for s in ((rows, inputs), (inputs, rank), (rank, outputs), (inputs, outputs), (rows, outputs))
    )
    if kind.startswith("int"):
        weight = quantize({"wq": jnp.asarray(w, jnp.float32)}, int(kind[3:]))["wq"]
        dense = np.asarray(dequantize(weight), np.float64).T
    else:
        weight = jnp.asarray(w, kind)
        dense = np.asarray(weight, np.float64)
    x32, a32, b32 = (jnp.asarray(v, jnp.float32) for v in (x, a, b))

    def loss(x, a, b):
        return jnp.sum(product(x, Adapted(weight, a, b, scale)) * out)

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(x32, a32, b32)
    expected = (x @ dense + x @ a @ b * scale) * out
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-4, atol=1e-3)
    by_hand = (out @ dense.T + out @ b.T @ a.T * scale, x.T @ out @ b.T * scale, (x @ a).T @ out * scale)
    for got, wanted in zip(gradients, by_hand):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_dropout_keeps_the_mean_and_the_share():
    x = jnp.ones((400, 500))
    out = dropped(x, Dropout(jax.random.key(0), 0.3))
    assert set(np.unique(out).tolist()) == {0.0, float(np.float32(1 / 0.7))}
    np.testing.assert_allclose(jnp.mean(out), 1.0, atol=5e-3)  # five standard deviations
    assert not np.array_equal(out[0], out[1])


def test_dropout_differs_between_layers_and_names_and_is_the_same_in_both_forms():
    adapters = random_adapters()
    dropout = Dropout(jax.random.key(3), 0.4)
    stacked = combine(PARAMS, adapters, 2.0, dropout)
    unrolled = combine(unstack(PARAMS), unstack(adapters), 2.0, dropout)
    np.testing.assert_allclose(logits(stacked, TOKENS, CONFIG), logits(unrolled, TOKENS, CONFIG), atol=1e-5)
    leaves = [{**stacked["layers"]["attention"], **stacked["layers"]["feed_forward"]}[name] for name in LAYER_MATRICES]
    flat = np.concatenate([np.asarray(jax.random.key_data(leaf.dropout.key)) for leaf in leaves])
    assert len(np.unique(flat, axis=0)) == len(flat) == 7 * CONFIG.layers
    other = combine(PARAMS, adapters, 2.0, Dropout(jax.random.key(4), 0.4))
    whole = combine(PARAMS, adapters, 2.0)
    assert float(jnp.abs(logits(other, TOKENS, CONFIG) - logits(stacked, TOKENS, CONFIG)).max()) > 0.01
    assert float(jnp.abs(logits(whole, TOKENS, CONFIG) - logits(stacked, TOKENS, CONFIG)).max()) > 0.01


def test_bare_parameters_come_back_as_the_same_arrays():
    bare = without_adapters(combine(PARAMS, random_adapters(), 2.0))
    assert jax.tree.structure(bare) == jax.tree.structure(PARAMS)
    assert all(one is other for one, other in zip(jax.tree.leaves(bare), jax.tree.leaves(PARAMS)))


def test_merging_keeps_the_type():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    merged = merge(narrow, random_adapters(), 2.0)
    jax.tree.map(lambda one, other: one.dtype == other.dtype or pytest.fail(str(one.dtype)), merged, narrow)


def test_what_cannot_be_is_refused_in_one_line():
    make = functools.partial(init_adapters, jax.random.key(0), CONFIG)
    for rank, targets, words in (
        (0, ("wq",), "rank: 0 given, 1 to 48"), (33, ("wk",), "rank: 33 given, 1 to 32 expected for wk"),
        (4, (), "'' given"), (4, ("wq", "wq"), "'wq' given, each once"), (4, ("q_proj",), "'q_proj' given, each once of wq"),
        (4, ("embedding",), "'embedding' given"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as error:
            make(rank, targets)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is quantised; merge into"):
        merge(quantize(PARAMS, 8), random_adapters(), 1.0)

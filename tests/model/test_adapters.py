"""Adapters as leaves: against the dense formula, merged weights, both forms, meshes; what dropout
does and where.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, float64_logits, random_parameters, random_tokens

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.errors import InputError
from llama_jax.model.llama import logits
from llama_jax.model.lora import (
    Adapted,
    Dropout,
    combine,
    dropped,
    init_adapters,
    merge,
    without_adapters,
)
from llama_jax.model.matmul import product
from llama_jax.model.quantize import dequantize, quantize
from llama_jax.weights.assemble import stack, unstack

CONFIG = dataclasses.replace(TINY, layers=2, head_dim=16)  # groups of 32 divide its inner width
PARAMS = random_parameters(CONFIG)
TOKENS = random_tokens(CONFIG, (2, 20))


def random_adapters(rank=4, targets=LAYER_MATRICES, config=CONFIG, std=0.1):
    """Adapters whose second factor is not zero."""
    fresh = jax.eval_shape(lambda: init_adapters(jax.random.key(1), config, rank, targets))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, std, x.shape).astype(np.float32)), fresh
    )


def numpy_of(tree):
    return jax.tree.map(np.asarray, tree)


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    make = jax.jit(
        functools.partial(init_adapters, config=CONFIG, rank=4), static_argnames="targets"
    )
    fresh = make(jax.random.key(0), targets=("wq", "down"))
    np.testing.assert_array_equal(
        logits(combine(PARAMS, fresh, 2.0), TOKENS, CONFIG), logits(PARAMS, TOKENS, CONFIG)
    )
    fresh = numpy_of(fresh)
    assert set(fresh["layers"]) == {"attention", "feed_forward"}
    for path, inputs in (
        (("attention", "wq"), CONFIG.dim),
        (("feed_forward", "down"), CONFIG.ffn_dim),
    ):
        a = fresh["layers"][path[0]][path[1]]["a"]
        assert a.shape == (CONFIG.layers, inputs, 4)
        assert (
            0.95 * inputs**-0.5 < np.abs(a).max() <= inputs**-0.5
        )  # kaiming uniform with a = sqrt(5)
        np.testing.assert_allclose(np.std(a), (3 * inputs) ** -0.5, rtol=0.1)
    alone = make(jax.random.key(0), targets=("down",))
    np.testing.assert_array_equal(
        alone["layers"]["feed_forward"]["down"]["a"], fresh["layers"]["feed_forward"]["down"]["a"]
    )


@pytest.mark.parametrize(
    "targets",
    [LAYER_MATRICES, pytest.param(("wo",), marks=pytest.mark.slow), ("wk", "up")],
    ids="+".join,
)
def test_logits_equal_those_of_merged_weights_in_both_forms(targets):
    """The merged weights once by hand and once by `merge`, run in float64."""
    adapters = random_adapters(targets=targets)
    by_hand = unstack(numpy_of(PARAMS))
    for name, node in unstack(numpy_of(adapters)).items():
        for part, matrices in node.items():
            for matrix, low in matrices.items():
                delta = low["a"].astype(np.float64) @ low["b"].astype(np.float64) * 0.5
                by_hand[name][part] = by_hand[name][part] | {
                    matrix: by_hand[name][part][matrix] + delta
                }
    expected = float64_logits(by_hand, TOKENS, CONFIG)
    np.testing.assert_allclose(
        float64_logits(merge(PARAMS, adapters, 0.5), TOKENS, CONFIG), expected, atol=1e-5
    )
    for form in (lambda tree: tree, unstack):
        run = jax.jit(
            lambda params, adapters, form=form: logits(
                combine(form(params), form(adapters), 0.5), TOKENS, CONFIG
            )
        )
        np.testing.assert_allclose(run(PARAMS, adapters), expected, atol=1e-5)
    assert np.abs(expected - float64_logits(PARAMS, TOKENS, CONFIG)).max() > 0.01


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_gradients_equal_those_of_the_dense_formula(kind):
    rng = np.random.default_rng(0)
    rows, inputs, outputs, rank, scale = 20, 64, 32, 3, 0.7
    x, a, b, w, out = (
        rng.normal(size=s)
        for s in (
            (rows, inputs),
            (inputs, rank),
            (rank, outputs),
            (inputs, outputs),
            (rows, outputs),
        )
    )
    if kind.startswith("int"):
        narrow = jax.jit(lambda params: quantize(params, int(kind[3:])))
        weight = narrow({"wq": w.astype(np.float32)})["wq"]
        dense = np.asarray(jax.jit(dequantize)(weight), np.float64).T
    else:
        weight = jnp.asarray(w, kind)
        dense = np.asarray(weight, np.float64)

    def loss(x, a, b):
        return jnp.sum(product(x, Adapted(weight, a, b, scale)) * out)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
        *(v.astype(np.float32) for v in (x, a, b))
    )
    expected = (x @ dense + x @ a @ b * scale) * out
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-4, atol=1e-3)
    by_hand = (
        out @ dense.T + out @ b.T @ a.T * scale,
        x.T @ out @ b.T * scale,
        (x @ a).T @ out * scale,
    )
    for got, wanted in zip(gradients, by_hand):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_dropout_keeps_the_mean_and_the_share():
    out = np.asarray(
        jax.jit(lambda key: dropped(jnp.ones((400, 500)), Dropout(key, 0.3)))(jax.random.key(0))
    )
    assert set(np.unique(out).tolist()) == {0.0, float(np.float32(1 / 0.7))}
    np.testing.assert_allclose(np.mean(out), 1.0, atol=5e-3)  # five standard deviations
    assert not np.array_equal(out[0], out[1])


def test_dropout_differs_between_layers_and_names_and_is_the_same_in_both_forms():
    adapters = random_adapters()

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, form):
        """Logits with dropout, and the key of every matrix of every layer."""
        combined = combine(form(PARAMS), form(adapters), 2.0, Dropout(key, 0.4))
        found = logits(combined, TOKENS, CONFIG)
        if form is unstack:
            return found, []
        leaves = [
            {**combined["layers"]["attention"], **combined["layers"]["feed_forward"]}[name]
            for name in LAYER_MATRICES
        ]
        return found, [jax.random.key_data(leaf.dropout.key) for leaf in leaves]

    stacked, keys = run(jax.random.key(3), stack)
    unrolled, _ = run(jax.random.key(3), unstack)
    np.testing.assert_allclose(stacked, unrolled, atol=1e-5)
    flat = np.concatenate([np.asarray(key) for key in keys])
    assert len(np.unique(flat, axis=0)) == len(flat) == 7 * CONFIG.layers
    other, whole = (
        run(jax.random.key(4), stack)[0],
        logits(combine(PARAMS, adapters, 2.0), TOKENS, CONFIG),
    )
    assert np.abs(np.asarray(other) - stacked).max() > 0.01
    assert np.abs(np.asarray(whole) - stacked).max() > 0.01


def test_bare_parameters_come_back_as_the_same_arrays():
    bare = without_adapters(combine(PARAMS, random_adapters(), 2.0))
    assert jax.tree.structure(bare) == jax.tree.structure(PARAMS)
    assert all(one is other for one, other in zip(jax.tree.leaves(bare), jax.tree.leaves(PARAMS)))


def test_merging_keeps_the_type():
    narrow = jax.eval_shape(
        lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), PARAMS
    )
    merged = jax.eval_shape(
        lambda params, adapters: merge(params, adapters, 2.0), narrow, random_adapters()
    )
    jax.tree.map(
        lambda one, other: one.dtype == other.dtype or pytest.fail(str(one.dtype)), merged, narrow
    )


def test_what_cannot_be_is_refused_in_one_line():
    make = functools.partial(init_adapters, jax.random.key(0), CONFIG)
    for rank, targets, words in (
        (0, ("wq",), "rank: 0 given, 1 to 48"),
        (33, ("wk",), "rank: 33 given, 1 to 32 expected for wk"),
        (4, (), "'' given"),
        (4, ("wq", "wq"), "'wq' given, each once"),
        (4, ("q_proj",), "'q_proj' given, each once of wq"),
        (4, ("embedding",), "'embedding' given"),
    ):
        with pytest.raises(InputError, match=words) as error:
            make(rank, targets)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is quantised; merge into"):
        merge(quantize(PARAMS, 8), random_adapters(), 1.0)

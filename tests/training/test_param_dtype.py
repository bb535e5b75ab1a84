"""Parameters in bfloat16: updates are those of float32, rounded; sums of micro-batches are float32;
runs go on bit by bit.
"""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import Recorder, changed, forget
from tiny_runs import MODEL, read_state, tiny_config, write_corpus

import llama_jax
from llama_jax.data.batches import Batch
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama
from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.loop import prepare
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.setup import fingerprint
from llama_jax.training.step import (
    Recipe,
    TrainState,
    init_state,
    micro_batches,
    summed_gradients,
    train_step,
)

NARROW = jnp.dtype("bfloat16")


def recipe(name: str, dtype: str) -> Recipe:
    return Recipe(
        Llama(MODEL),
        make_optimizer(OptimizerConfig(name=name)),
        lambda step: 1e-2,
        64,
        param_dtype=dtype,
    )


def batch(sequences: int = 4) -> Batch:
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (sequences, 32), np.int32)
    return Batch(
        tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), np.zeros_like(tokens)
    )


def fresh_state(recipe: Recipe) -> TrainState:
    return jax.jit(functools.partial(init_state, recipe))(jax.random.key(0))


@functools.cache
def gradient_of_a_batch(accumulation: int):
    """Of the fresh narrow parameters, summed."""
    narrow = recipe("adamw", "bfloat16")
    summed = jax.jit(lambda state, given: summed_gradients(narrow, state, given)[1])
    return summed(fresh_state(narrow), micro_batches(batch(), accumulation))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_update_is_that_of_float32_rounded(name):
    """From the same numbers and the same gradient: nothing between the two roundings is narrow.

    Operation by operation: inside of one program the compiler may contract products and sums of one
    form and not of the other.
    """
    narrow, wide = recipe(name, "bfloat16"), recipe(name, "float32")
    state = fresh_state(narrow)
    as_wide = state._replace(
        params=jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), state.params)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {NARROW}
    assert NARROW not in {leaf.dtype for leaf in jax.tree.leaves(state.optimizer)}
    given = micro_batches(batch(), 1), gradient_of_a_batch(1)
    after, expected = _with_gradient(narrow, state, *given), _with_gradient(wide, as_wide, *given)
    for got, want in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert got.dtype == NARROW
        np.testing.assert_array_equal(got, np.asarray(want).astype(NARROW))
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, expected.optimizer)


def _with_gradient(recipe, state, given, gradient):
    """A step whose gradient is given: that of a linear loss."""

    def loss(model, params, micro, chunk):
        """Has the gradient `gradient`, whatever the parameters."""
        products = jax.tree.map(
            lambda p, g: jnp.sum(p.astype(jnp.float32) * g.astype(jnp.float32)), params, gradient
        )
        return sum(jax.tree.leaves(products)), {}

    linear = recipe._replace(objective=recipe.objective._replace(loss=loss))
    return train_step(linear, state, given)[0]


def test_micro_batches_add_up_in_float32():
    one, four = gradient_of_a_batch(1), gradient_of_a_batch(4)
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {NARROW}
    assert {leaf.dtype for leaf in jax.tree.leaves(four)} == {jnp.dtype("float32")}
    for whole, parts in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        scale = float(np.max(np.abs(parts)))
        np.testing.assert_allclose(np.asarray(whole).astype(np.float32), parts, atol=0.02 * scale)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    return changed(
        tiny_config(tmp_path / "run", write_corpus(tmp_path / "text")),
        run={"steps": 4, "eval_every": 0, "checkpoint_every": 2},
        data={"accumulation": 2},
        optimizer={"name": "adafactor", "param_dtype": "bfloat16"},
    )


def test_a_run_goes_on_bit_for_bit_and_is_read_as_a_model(config, tmp_path):
    prepare(config, Recorder()).train()
    shutil.copytree(config.run.dir, tmp_path / "stopped")
    stopped = changed(config, run={"dir": str(tmp_path / "stopped")})
    forget(stopped, 4)
    with pytest.raises(InputError, match=r"optimizer\.param_dtype 'bfloat16', None was asked for"):
        prepare(changed(stopped, optimizer={"param_dtype": "float32"}), Recorder())
    prepare(stopped, Recorder()).train()
    states = read_state(stopped, 4), read_state(config, 4)
    assert fingerprint(states[0]) == fingerprint(states[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(states[0].params)} == {NARROW}
    model = llama_jax.load(str(pathlib.Path(config.run.dir)), "float32", "stacked")
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), states[1].params)
    jax.tree.map(np.testing.assert_array_equal, model.params, wide)

"""The two forms of the tree, rematerialisation, causality, rotary frequencies, norms: against closed forms and each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import LLAMA3_SCALING, TINY, VARIANTS, random_parameters, random_tokens

from llama_jax.errors import InputError
from llama_jax.model.layers import rms_norm, swiglu
from llama_jax.model.llama import Llama, embed, hidden_states, logits
from llama_jax.model.options import ModelOptions
from llama_jax.model.rope import _by_halves, _by_product, inverse_frequencies, rotate, rotation
from llama_jax.weights.forms import stack, unstack


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_scanned_equals_unrolled(variant):
    config = VARIANTS[variant]
    params, tokens = random_parameters(config), random_tokens(config, (2, 30))
    np.testing.assert_allclose(logits(params, tokens, config), logits(unstack(params), tokens, config), atol=2e-6)
    np.testing.assert_allclose(hidden_states(params, tokens, config), hidden_states(unstack(params), tokens, config), atol=2e-6)


def test_stack_and_unstack_are_inverse_and_fit_the_module():
    params = random_parameters(dataclasses.replace(TINY, layers=11))  # two digits: layers_10 comes after layers_9
    jax.tree.map(np.testing.assert_array_equal, stack(unstack(params)), params)
    assert stack(params) is params
    unrolled = Llama(TINY, ModelOptions(scan=False)).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.structure(unrolled) == jax.tree.structure(unstack(random_parameters(TINY)))


def gradient_program(params, tokens, config, remat):
    loss = lambda p: jnp.sum(logits(p, tokens, config, remat=remat, attention="chunked") ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params).compile()


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_rematerialisation_keeps_gradients(scan):
    params, tokens = random_parameters(TINY), random_tokens(TINY, (2, 24))
    params = params if scan else unstack(params)
    expected, *others = [
        gradient_program(params, tokens, TINY, remat)(params)
        for remat in ("none", "full", "q+k+v+context+middle+gate+up", "1*all+context")
    ]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), other, expected)


def test_rematerialisation_trades_memory_by_name():
    config = dataclasses.replace(TINY, layers=12, ffn_dim=256)
    params, tokens = random_parameters(config), random_tokens(config, (4, 256))
    memory = [
        gradient_program(params, tokens, config, remat).memory_analysis().temp_size_in_bytes
        for remat in ("full", "middle", "middle+gate+up", "none")
    ]
    print(f"temporaries by remat full, middle, middle+gate+up, none: {[f'{b / 2**20:.1f} MiB' for b in memory]}")
    assert memory == sorted(memory)
    assert memory[0] < 0.5 * memory[-1]


def test_unknown_options_are_named():
    for options, word in (({"remat": "q+everything"}, "everything"), ({"dtype": "float8"}, "float8")):
        with pytest.raises(InputError, match=word):
            ModelOptions(**options)


def test_no_position_sees_a_later_token():
    params, tokens = random_parameters(TINY), random_tokens(TINY, (1, 12))
    influence = jax.jacobian(lambda x: logits(params, x, TINY).sum(-1)[0])(embed(params, tokens))
    seen = np.abs(np.asarray(influence)).sum(axis=(1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((12, 12), bool)))


def test_documents_of_a_packed_row_equal_documents_alone():
    params = random_parameters(TINY)
    first, second = random_tokens(TINY, (1, 13), seed=1), random_tokens(TINY, (1, 9), seed=2)
    documents = jnp.asarray([[1] * 13 + [2] * 9], jnp.int32)
    packed = logits(params, jnp.concatenate([first, second], axis=1), TINY, documents)
    # Rotary positions are relative, so the second document may stand anywhere in the row.
    np.testing.assert_allclose(packed[:, :13], logits(params, first, TINY), atol=1e-5)
    np.testing.assert_allclose(packed[:, 13:], logits(params, second, TINY), atol=1e-5)


def test_bfloat16_compute_stays_close_and_returns_float32():
    params, tokens = random_parameters(TINY), random_tokens(TINY, (2, 30))
    wide, narrow = (logits(params, tokens, TINY, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.abs(wide - narrow).max()) < 0.05 * float(jnp.abs(wide).max())


def test_rms_norm_and_swiglu_equal_float64():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 16)), rng.normal(size=16)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-5), expected, atol=1e-6
    )
    # Epsilon sits inside the root and is the config's: a stream of zeros stays zero, a tiny one is not blown up.
    tiny = jnp.full((1, 16), 1e-4, jnp.float32)
    np.testing.assert_allclose(rms_norm(tiny, jnp.ones(16), 1e-6), 1e-4 / np.sqrt(1e-8 + 1e-6), rtol=1e-5)
    gate, up = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    got = swiglu(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, atol=1e-6)


def test_rotation_turns_pairs_of_the_half_layout():
    config = dataclasses.replace(TINY, head_dim=8, rope_theta=100.0)
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 8))
    positions = jnp.asarray([[0, 1, 7, 30, 2]], jnp.int32)
    got = np.asarray(rotate(jnp.asarray(x, jnp.float32), rotation(positions, config)))
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = np.asarray(positions)[:, :, None, None] * 100.0 ** (-np.arange(4) * 2 / 8)
    turned = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_rotary_embedding_are_one(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 16)), dtype)
    turn = rotation(jnp.arange(5)[None] * 700, dataclasses.replace(TINY, head_dim=16))
    np.testing.assert_allclose(_by_product(x, turn), _by_halves(x, turn), atol=1e-6)


def test_llama3_scaling_at_its_corners():
    plain = dataclasses.replace(TINY, rope_theta=5e5, head_dim=128)
    frequencies = inverse_frequencies(plain)
    for factor in (8.0, 32.0):
        scaled = inverse_frequencies(
            dataclasses.replace(plain, rope_scaling=dataclasses.replace(LLAMA3_SCALING, factor=factor))
        )
        wavelength = 2 * np.pi / frequencies
        short, long = wavelength < 32 / 4, wavelength > 32 / 1
        np.testing.assert_array_equal(scaled[short], frequencies[short])
        np.testing.assert_allclose(scaled[long], frequencies[long] / factor, rtol=1e-6)
        between = ~short & ~long
        assert between.any()
        smooth = (32 / wavelength[between] - 1) / 3
        np.testing.assert_allclose(
            scaled[between], (1 - smooth) * frequencies[between] / factor + smooth * frequencies[between], rtol=1e-6
        )


def test_linen_parameters_move_to_nnx():
    """The bridge to NNX: the same parameters under flax.nnx."""
    from flax import nnx

    tokens = random_tokens(TINY, (1, 6))
    bridged = nnx.bridge.ToNNX(Llama(TINY), rngs=nnx.Rngs(0)).lazy_init(tokens)
    params = (
        nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
        if hasattr(nnx, "to_pure_dict")
        else nnx.state(bridged, nnx.Param).to_pure_dict()
    )
    np.testing.assert_allclose(bridged(tokens), logits(params, tokens, TINY), atol=1e-6)

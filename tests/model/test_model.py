"""The two forms of the tree, rematerialisation, causality, rotary frequencies, norms: against
closed forms and each other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support import (
    LLAMA3_SCALING,
    TINY,
    VARIANTS,
    float64_logits,
    random_parameters,
    random_tokens,
    unrolled_parameters,
)

from llama_jax.errors import InputError
from llama_jax.generation.generate import Generator
from llama_jax.model.layers import rms_norm, swiglu
from llama_jax.model.llama import Llama, embed, hidden_states, logits
from llama_jax.model.lora import combine, init_adapters
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import quantize
from llama_jax.model.rope import _by_halves, _by_matmul, inverse_frequencies, rotate, rotation
from llama_jax.training.loss import mean_loss
from llama_jax.weights.assemble import stack, unstack

SMALL = dataclasses.replace(TINY, layers=2)
slow = pytest.mark.slow  # `test_parity` has both forms of every variant


@pytest.mark.parametrize(
    "variant",
    [
        name if name in ("mqa-tied", "gqa-untied") else pytest.param(name, marks=slow)
        for name in sorted(VARIANTS)
    ],
)
def test_scanned_equals_unrolled(variant):
    config = VARIANTS[variant]
    tokens = random_tokens(config, (2, 30))
    run = jax.jit(
        lambda params: (logits(params, tokens, config), hidden_states(params, tokens, config))
    )
    for one, other in zip(run(random_parameters(config)), run(unrolled_parameters(config))):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_stack_and_unstack_are_inverse_and_fit_the_module():
    params = random_parameters(
        dataclasses.replace(TINY, layers=11)
    )  # two digits: layers_10 comes after layers_9
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(lambda params: stack(unstack(params)))(params),
        params,
    )
    assert stack(params) is params
    model, tokens = Llama(TINY, ModelOptions(scan=False)), random_tokens(TINY, (1, 1))
    unrolled = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    assert jax.tree.structure(unrolled) == jax.tree.structure(unrolled_parameters(TINY))


def gradient_program(params, tokens, config, remat):
    loss = lambda p: jnp.sum(logits(p, tokens, config, remat=remat, attention="blockwise") ** 2)
    return jax.jit(jax.grad(loss)).lower(params).compile()


@functools.cache
def plain_gradients():
    """Without rematerialisation, scanned, in NumPy."""
    params = random_parameters(SMALL)
    return jax.tree.map(
        np.asarray, gradient_program(params, random_tokens(SMALL, (2, 24)), SMALL, "none")(params)
    )


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "full"),
        (True, "q+k+v+context+middle+gate+up"),
        (True, "1*all+context"),
        pytest.param(True, "q+k+v+context@host+gate@host", marks=slow),
        pytest.param(False, "none", marks=slow),
        pytest.param(False, "full", marks=slow),
        pytest.param(False, "q+k+v+context+middle+gate+up", marks=slow),
        pytest.param(False, "1*all+context", marks=slow),
        (False, "q+k+v+context@host+gate@host"),
    ],
)
def test_rematerialisation_keeps_gradients(scan, remat):
    params = random_parameters(SMALL) if scan else unrolled_parameters(SMALL)
    expected = plain_gradients() if scan else unstack(plain_gradients())
    got = gradient_program(params, random_tokens(SMALL, (2, 24)), SMALL, remat)(params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), got, expected)


def test_rematerialisation_trades_memory_by_name():
    config = dataclasses.replace(TINY, layers=12, ffn_dim=256)
    params, tokens = random_parameters(config), random_tokens(config, (4, 256))
    memory = [
        gradient_program(params, tokens, config, remat).memory_analysis().temp_size_in_bytes
        for remat in ("full", "middle", "middle+gate+up", "none")
    ]
    print(
        "temporaries by remat full, middle, middle+gate+up, none: "
        f"{[f'{b / 2**20:.1f} MiB' for b in memory]}"
    )
    assert memory == sorted(memory)
    assert memory[0] < 0.5 * memory[-1]


def test_unknown_options_are_named():
    for options, word in (
        ({"remat": "q+everything"}, "everything"),
        ({"dtype": "float8"}, "float8"),
    ):
        with pytest.raises(InputError, match=word):
            ModelOptions(**options)


def test_no_position_sees_a_later_token():
    params, tokens = random_parameters(SMALL), random_tokens(SMALL, (1, 12))
    influence = jax.jit(jax.jacobian(lambda x: logits(params, x, SMALL).sum(-1)[0]))(
        embed(params, tokens)
    )
    seen = np.abs(np.asarray(influence)).sum(axis=(1, 3)) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((12, 12), bool)))


def test_documents_of_a_packed_sequence_equal_documents_alone():
    params = random_parameters(SMALL)
    first, second = (np.asarray(random_tokens(SMALL, (1, size), seed=size)) for size in (13, 9))
    documents, sequence = (
        np.asarray([[1] * 13 + [2] * 9], np.int32),
        np.concatenate([first, second], axis=1),
    )
    packed = np.asarray(logits(params, jnp.asarray(sequence), SMALL, jnp.asarray(documents)))
    # Rotary positions are relative, so the second document may stand anywhere in the sequence.
    np.testing.assert_allclose(packed[:, :13], float64_logits(params, first, SMALL), atol=1e-5)
    np.testing.assert_allclose(packed[:, 13:], float64_logits(params, second, SMALL), atol=1e-5)


def test_bfloat16_compute_stays_close_and_returns_float32():
    params, tokens = random_parameters(SMALL), random_tokens(SMALL, (2, 30))
    wide, narrow = (
        float64_logits(params, tokens, SMALL),
        logits(params, tokens, SMALL, dtype="bfloat16"),
    )
    assert narrow.dtype == jnp.float32
    # More than float32 would be off, or it was not bfloat16 that computed.
    assert (
        1e-3 * np.abs(wide).max()
        < np.abs(wide - np.asarray(narrow)).max()
        < 0.05 * np.abs(wide).max()
    )


def test_rms_norm_and_swiglu_equal_float64():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 16)), rng.normal(size=16)
    norm = jax.jit(rms_norm, static_argnums=2)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(
        norm(x.astype(np.float32), scale.astype(np.float32), 1e-5), expected, atol=1e-6
    )
    # Epsilon sits inside the root and is the config's: a stream of zeros stays zero, a tiny one is
    # not blown up.
    tiny = np.full((1, 16), 1e-4, np.float32)
    np.testing.assert_allclose(
        norm(tiny, np.ones(16, np.float32), 1e-6), 1e-4 / np.sqrt(1e-8 + 1e-6), rtol=1e-5
    )
    gate, up = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    got = jax.jit(swiglu)(gate.astype(np.float32), up.astype(np.float32))
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, atol=1e-6)


def test_rotation_turns_pairs_of_the_half_layout():
    config = dataclasses.replace(TINY, head_dim=8, rope_theta=100.0)
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 8))
    positions = np.asarray([[0, 1, 7, 30, 2]], np.int32)
    got = jax.jit(lambda x, positions: rotate(x, rotation(positions, config)))(
        x.astype(np.float32), positions
    )
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(4) * 2 / 8)
    turned = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_rotary_embedding_are_one(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 16)), dtype)
    config, positions = (
        dataclasses.replace(TINY, head_dim=16),
        np.arange(5, dtype=np.int32)[None] * 700,
    )
    both = jax.jit(
        lambda x, at: [form(x, rotation(at, config)) for form in (_by_matmul, _by_halves)]
    )
    np.testing.assert_allclose(
        *(np.asarray(out, np.float32) for out in both(x, positions)), atol=1e-6
    )


def test_llama3_scaling_at_its_corners():
    plain = dataclasses.replace(TINY, rope_theta=5e5, head_dim=128)
    frequencies = inverse_frequencies(plain)
    for factor in (8.0, 32.0):
        scaled = inverse_frequencies(
            dataclasses.replace(
                plain, rope_scaling=dataclasses.replace(LLAMA3_SCALING, factor=factor)
            )
        )
        wavelength = 2 * np.pi / frequencies
        short, long = wavelength < 32 / 4, wavelength > 32 / 1
        np.testing.assert_array_equal(scaled[short], frequencies[short])
        np.testing.assert_allclose(scaled[long], frequencies[long] / factor, rtol=1e-6)
        between = ~short & ~long
        assert between.any()
        smooth = (32 / wavelength[between] - 1) / 3
        np.testing.assert_allclose(
            scaled[between],
            (1 - smooth) * frequencies[between] / factor + smooth * frequencies[between],
            rtol=1e-6,
        )


def test_linen_parameters_move_to_nnx():
    """The bridge to NNX: the same parameters under flax.nnx."""
    from flax import nnx

    config = dataclasses.replace(TINY, layers=1)
    tokens = random_tokens(config, (1, 6))
    bridged = nnx.jit(lambda: nnx.bridge.ToNNX(Llama(config), rngs=nnx.Rngs(0)).lazy_init(tokens))()
    params = (
        nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
        if hasattr(nnx, "to_pure_dict")
        else nnx.state(bridged, nnx.Param).to_pure_dict()
    )
    got = nnx.jit(lambda model, tokens: model(tokens))(bridged, tokens)
    np.testing.assert_allclose(got, float64_logits(params, tokens, config), atol=1e-6)


def products(function, *args) -> set[str]:
    """The dtypes that the matmuls of a function multiply, inside of loops and calls too."""
    found: set[str] = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.update(str(operand.aval.dtype) for operand in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "adapted"])
def test_what_is_computed_in_is_what_the_parameters_are_in(form):
    """Logits, hidden states, loss and the cache; another dtype only where one is given."""
    dtype = form if "float" in form else "bfloat16"
    params = jax.tree.map(lambda x: x.astype(dtype), unrolled_parameters(SMALL))
    if form == "int8":
        params = quantize(params)
    if form == "adapted":
        params = combine(
            params, unstack(init_adapters(jax.random.key(0), SMALL, 2, ("wq", "down"))), 1.0
        )
    tokens = random_tokens(SMALL, (1, 6))
    for function in (logits, hidden_states, mean_loss):
        dtypes = products(functools.partial(function, config=SMALL), params, tokens)
        assert dtype in dtypes
        # Scores times values and the loss are summed in float32; what goes into a matmul is not.
        assert "float32" not in dtypes or form in ("int8", "adapted") or function is mean_loss, (
            function
        )
    wide = products(functools.partial(logits, config=SMALL, dtype="float32"), params, tokens)
    assert "float32" in wide
    generator = Generator(params, SMALL)
    assert generator.programs.model.options.dtype == dtype
    assert (
        jax.eval_shape(lambda: generator.programs._init_cache(1, 16)).layers[0].keys.dtype == dtype
    )

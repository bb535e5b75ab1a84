"""The product of activations and weights in every form, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix import matrix as every_pair

from llama_jax.model.matmul import _filled_up, _quantized_on_gpu, product
from llama_jax.model.quantize import Quantized, dequantize, quantize

ROWS = (1, 2, 5, 40)  # one row, few, and more than are split


def drawn(*shape: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def weight(form: str, axis: int):
    """A weight of a form, contracted along `axis`, and its numbers in float64."""
    matrix = jnp.asarray(drawn(*((96, 40) if axis == 0 else (40, 96)), seed=1))
    if form in ("float32", "bfloat16"):
        matrix = matrix.astype(form)
        return matrix, np.asarray(matrix, np.float64)
    bits = int(form.removeprefix("int"))
    (held,) = jax.jit(lambda params: quantize(params, bits))(
        {"embedding" if axis else "wq": matrix}
    ).values()
    matrix = np.asarray(jax.jit(dequantize)(held), np.float64)  # channels first
    return held, matrix if axis else matrix.T


FORMS = [
    ("float32", 0),
    ("float32", 1),
    ("bfloat16", 0),
    ("bfloat16", 1),
    ("int8", 0),
    ("int8", 1),
    ("int4", 0),
]


@every_pair(form_axis=FORMS, rows=ROWS, dtype=["float32", "bfloat16"])
def test_product_equals_float64(form_axis, rows, dtype):
    form, axis = form_axis
    held, matrix = weight(form, axis)
    if form == "float32":  # a weight is never wider than the activations
        held, matrix = held.astype(dtype), np.asarray(held.astype(dtype), np.float64)
    x = (drawn(rows, 96, seed=2) * np.logspace(-3, 3, rows)[:, None]).astype(dtype)[
        :, None
    ]  # rows of very unequal size
    got = np.asarray(jax.jit(functools.partial(product, axis=axis, dtype=jnp.float32))(x, held))
    assert got.shape == (rows, 1, 40)
    assert got.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ (matrix.T if axis else matrix)
    # Integer parts leave at most half of the last part's step of every entry of a row, the largest
    # of which is 127 first steps.
    step = (
        np.abs(x.astype(np.float64)).max(-1, keepdims=True)
        / 127
        / 254 ** (2 if dtype == "float32" else 1)
    )
    left = 0.5 * step * np.abs(matrix).sum(axis) if isinstance(held, Quantized) else 0.0
    assert (np.abs(got - expected) <= left + 2e-6 * np.abs(expected).max(-1, keepdims=True)).all()
    assert jax.eval_shape(functools.partial(product, axis=axis), x, held).dtype == x.dtype


@pytest.mark.parametrize(
    ("form", "axis"), [("bfloat16", 0), ("bfloat16", 1), ("int8", 0), ("int4", 0)]
)
def test_one_row_in_the_form_for_gpus_equals_float64(form, axis):
    held, matrix = weight(form, axis)
    x = drawn(1, 96, seed=2)
    run = (
        _quantized_on_gpu
        if isinstance(held, Quantized)
        else functools.partial(_filled_up, axis=axis, dtype=jnp.float32)
    )
    got = np.asarray(jax.jit(run)(x, held), np.float64) * (
        np.asarray(held.scales)[:, 0] if isinstance(held, Quantized) else 1.0
    )
    np.testing.assert_allclose(
        got, np.asarray(x, np.float64) @ (matrix.T if axis else matrix), rtol=2e-5, atol=2e-5
    )


def test_a_row_of_zeros_gives_zeros():
    for form in ("float32", "bfloat16", "int8", "int4"):
        assert not np.asarray(
            jax.jit(product)(np.zeros((1, 96), np.float32), weight(form, 0)[0])
        ).any()


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_gradients_pass_through(form):
    """Activations have the gradient of the linear map, although rounding has none."""
    held, matrix = weight(form, 0)
    factors = drawn(2, 40, seed=5)
    got = jax.jit(jax.grad(lambda x: jnp.sum(product(x, held) * factors)))(drawn(2, 96))
    np.testing.assert_allclose(got, np.asarray(factors, np.float64) @ matrix.T, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("form", ["bfloat16", "bfloat16 table", "int8", "int4"])
def test_no_wide_copy_of_the_weights(form):
    """A loop of products of one row with a large narrow matrix: XLA plans no memory of the order of
    the matrix.

    In a loop, as in decoding: what does not change from turn to turn may be widened once, before
    it.
    """
    axis = int("table" in form)
    held = jnp.asarray(drawn(1024, 1024))
    held = (
        held.astype(jnp.bfloat16)
        if "bfloat16" in form
        else quantize({"wq": held}, int(form[-1]))["wq"]
    )

    def planned(multiply, dtype="float32"):
        turns = jax.jit(
            lambda x, w: jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(multiply(x, w)), x)
        )
        return (
            turns.lower(drawn(1, 1024).astype(dtype), held)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    for dtype in ("float32", "bfloat16"):
        assert planned(functools.partial(product, axis=axis), dtype) < 2**17
    widened = dequantize if isinstance(held, Quantized) else lambda w: w.astype(jnp.float32)
    assert planned(lambda x, w: x @ widened(w)) >= 4 * 2**20  # what the measure would see

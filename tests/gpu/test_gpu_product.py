"""The product of activations and weights on a GPU, one row and more, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.matmul import product
from llama_jax.model.quantize import dequantize, quantize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 2, 8, 40])
@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_product_equals_float64(form, axis, rows):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(1024, 512) if axis == 0 else (512, 1024)), jnp.bfloat16)
    held, numbers = matrix, np.asarray(matrix, np.float64)
    if form != "bfloat16":
        (held,) = quantize(
            {"embedding" if axis else "wq": matrix}, int(form.removeprefix("int"))
        ).values()
        numbers = np.asarray(dequantize(held), np.float64)
        numbers = numbers if axis else numbers.T
    x = jnp.asarray(rng.normal(size=(rows, 1, 1024)), jnp.bfloat16)
    got = jax.jit(functools.partial(product, axis=axis, dtype=jnp.float32))(x, held)
    expected = np.asarray(x, np.float64) @ (numbers.T if axis else numbers)
    assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()

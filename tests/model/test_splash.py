"""The TPU kernel for attention, its program run step by step on the CPU, against float64 written
out, forward and backward.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by

from llama_jax.errors import InputError
from llama_jax.model.attention import choose_backend
from llama_jax.model.context_parallel import attend_over_mesh
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.model.splash import fits_splash, splash_attention
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, balanced_positions


def draw(length, width, heads=4, kv_heads=2, batch=2, seed=0):
    """q, k, v, the gradient of the output, and documents."""
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    arrays = [rng.normal(size=(batch, n, length, width)).astype(np.float32) for n in counts]
    return arrays, np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)


def check(run, arrays, seen):
    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return (out, *pull(d_out))

    for ours, theirs in zip(both(*arrays), float64_attention(*arrays, seen)):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("length", "width", "packed"),
    [
        (256, 64, True),
        (384, 128, False),
        pytest.param(256, 64, False, marks=slow),
        pytest.param(384, 128, True, marks=slow),
    ],
)
def test_equals_float64(length, width, packed):
    arrays, documents = draw(length, width, batch=1)
    documents = jnp.asarray(documents) if packed else None
    run = lambda q, k, v: splash_attention(q, k, v, documents, TRAINING, interpret=True)
    check(run, arrays, seen_by(np.arange(length), documents))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 2, "tensor": 2}, marks=slow),
        {"fsdp": 1, "context": 2, "tensor": 2},
        {"fsdp": 2, "context": 2},
    ],
    ids=str,
)
def test_equals_float64_on_a_mesh(sizes):
    """Rows over `fsdp`, heads over `tensor`, tokens over `context` in the order of balanced
    work.
    """
    length, parts = 512, sizes.get("context", 1)
    arrays, documents = draw(length, 64)
    order = balanced_positions(length, parts) if parts > 1 else np.arange(length)
    moved, placed = [x[:, :, order] for x in arrays], documents[:, order]
    mesh = make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        run = lambda q, k, v: splash_attention(
            q, k, v, jnp.asarray(placed), TRAINING, interpret=True
        )
        check(run, moved, seen_by(order, placed))


def test_what_the_kernel_does_not_take_is_refused():
    (q, k, v, _), _ = draw(200, 64)
    q, k, v = map(jnp.asarray, (q, k, v))
    with pytest.raises(
        InputError,
        match="200 tokens a sequence in 1 parts and heads of 64 given; a multiple of 128",
    ):
        splash_attention(q, k, v, None, TRAINING)


def test_tokens_behind_a_cache_go_the_way_of_auto():
    (q, k, v, _), _ = draw(200, 64)
    mask = Mask(start=jnp.zeros(2, jnp.int32))
    ways = [ModelOptions(attention="splash"), ModelOptions()]
    both = jax.jit(lambda q, k, v: [attend_over_mesh(q, k, v, mask, options) for options in ways])
    np.testing.assert_array_equal(*both(q, k, v))


def test_auto_takes_it_for_training_on_tpus_only():
    assert choose_backend("auto", 8192, 8192, "tpu", 128) == "splash"
    assert (
        choose_backend("auto", 8192, 8192, "tpu", 80)
        == choose_backend("auto", 8000, 8000, "tpu", 128)
        == "blockwise"
    )
    assert choose_backend("auto", 8192, 8192, "cpu", 128) == "blockwise"
    assert fits_splash(8192, 64, 32)
    assert not fits_splash(8192, 64, 64)  # chunks of 64 tokens

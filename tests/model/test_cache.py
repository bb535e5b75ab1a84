"""The cache: growing, taking sequences, and 8-bit keys and values against their dequantised
selves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, float64_logits, random_parameters, random_tokens, unrolled_parameters

from llama_jax.errors import InputError
from llama_jax.generation.decode import decode, prefill
from llama_jax.model.attention import Mask, Scales, attend
from llama_jax.model.cache import (
    Cache,
    _write_at_once,
    _write_in_turn,
    append,
    grow,
    init_cache,
    quantise_heads,
    take_sequences,
)
from llama_jax.model.llama import model_for
from llama_jax.model.options import ModelOptions

CONFIG = dataclasses.replace(TINY, layers=2)
LENGTHS = np.asarray([5, 9, 1], np.int32)


@functools.cache
def filled(dtype, scan, slots=16):
    """A model, its parameters, and a cache after a ragged prefill."""
    params = random_parameters(CONFIG) if scan else unrolled_parameters(CONFIG)
    model = model_for(params, CONFIG)
    tokens, lengths = random_tokens(CONFIG, (3, 9)), jnp.asarray(LENGTHS)
    run = jax.jit(
        lambda params: prefill(
            model, params, tokens, lengths, init_cache(CONFIG, 3, slots, dtype, scan)
        )
    )
    return model, params, run(params)[1]


def any_cache(dtype, scan, slots=12) -> Cache:
    """A cache full of random numbers."""
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: init_cache(CONFIG, 3, slots, dtype, scan))
    layers = jax.tree.map(lambda x: rng.integers(1, 99, x.shape).astype(x.dtype), empty.layers)
    return Cache(layers, LENGTHS)


def layer(cache: Cache, i: int):
    """One layer of either form, as NumPy arrays."""
    arrays = jax.tree.map(np.asarray, cache.layers)
    return jax.tree.map(lambda x: x[i], arrays) if hasattr(arrays, "keys") else arrays[i]


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_taken_and_slots_added(dtype, scan):
    cache = any_cache(dtype, scan)
    wide = jax.jit(lambda cache, sequences: take_sequences(grow(cache, 20), sequences))(
        cache, np.asarray([2, 1, 1, 0])
    )
    assert wide.slots == 20
    assert wide.lengths.tolist() == [1, 9, 9, 5]
    assert jax.tree.structure(wide) == jax.tree.structure(cache)
    for i in range(CONFIG.layers):
        for was, now in zip(jax.tree.leaves(layer(cache, i)), jax.tree.leaves(layer(wide, i))):
            assert now.dtype == was.dtype
            np.testing.assert_array_equal(now[:, :, :12], was[[2, 1, 1, 0]])
            assert not now[:, :, 12:].any()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_decoding_goes_on_after_growing(dtype):
    """A sequence moved into a larger cache gives the logits that it gave at home."""
    model, params, cache = filled(dtype, scan=False)
    token, order = np.asarray([3, 4, 5], np.int32), np.asarray([1, 0])

    @jax.jit
    def both(params, cache, token, order):
        moved = take_sequences(grow(cache, 24), order)
        return decode(model, params, token, cache)[0], *decode(model, params, token[order], moved)

    expected, got, after = both(params, cache, token, order)
    np.testing.assert_allclose(got, np.asarray(expected)[order], atol=1e-5)
    assert after.lengths.tolist() == [10, 6]


def test_integers_are_within_half_a_scale():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    x[0, 1, 2] = 0.0  # no scale divides by zero
    values, scales = jax.jit(quantise_heads)(x)
    assert values.dtype == jnp.int8
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / 127, rtol=1e-6)
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scales)[..., None] - x)
    assert (error <= np.asarray(scales)[..., None] * 0.5001).all()
    assert error[0, 1, 2].max() == 0


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("queries", [1, 7])
def test_integer_attention_equals_attention_on_dequantised_keys_and_values(backend, queries):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(3, 6, queries, 16)).astype(np.float32)
    narrow = jax.jit(quantise_heads)
    (k, k_scale), (v, v_scale) = (
        narrow(rng.normal(size=(3, 2, 24, 16)).astype(np.float32)) for _ in "kv"
    )
    run = jax.jit(
        lambda q, k, v, scales: attend(
            q, k, v, Mask(start=jnp.asarray(LENGTHS)), backend=backend, scales=scales
        )
    )
    got = run(q, k, v, Scales(k_scale, v_scale))
    wide = [
        np.asarray(x, np.float64) * np.asarray(s)[..., None]
        for x, s in ((k, k_scale), (v, v_scale))
    ]
    keys, values = (np.repeat(x, 3, axis=1) for x in wide)
    scores = np.einsum("bnth,bnsh->bnts", np.asarray(q, np.float64), keys) / 4
    seen = (
        np.arange(24)[None, None] <= (np.asarray(LENGTHS)[:, None] + np.arange(queries))[:, :, None]
    )
    weights = np.where(seen[:, None], np.exp(scores), 0)
    np.testing.assert_allclose(
        got,
        np.einsum("bnts,bnsh->bnth", weights / weights.sum(-1, keepdims=True), values),
        atol=2e-6,
    )


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
def test_ragged_decoding_with_an_integer_cache(scan):
    """Rows of unequal length, token by token: near the logits of whole sequences without a cache,
    in float64.
    """
    model, params, cache = filled("int8", scan)
    tokens, more = (np.asarray(random_tokens(CONFIG, *how)) for how in (((3, 9),), ((3, 4), 7)))
    step = jax.jit(lambda token, cache: decode(model, params, token, cache))
    for i in range(more.shape[1]):
        got, cache = step(more[:, i], cache)
    for sequence, length in enumerate(LENGTHS.tolist()):
        whole = np.concatenate([tokens[sequence, :length], more[sequence]])[None]
        expected = float64_logits(params, whole, CONFIG)[0, -1]
        # More than float32 would be off, or there were no integers.
        assert (
            1e-4 * np.abs(expected).max()
            < np.abs(np.asarray(got)[sequence] - expected).max()
            < 0.02 * np.abs(expected).max()
        )


def test_bytes_of_the_cache():
    shape = 3 * TINY.kv_heads * 12 * TINY.layers * 2  # vectors of a head, keys and values
    for dtype, each in (
        ("float32", 4 * TINY.head_dim),
        ("bfloat16", 2 * TINY.head_dim),
        ("int8", TINY.head_dim + 4),
    ):
        for scan in (True, False):
            layers = jax.eval_shape(
                lambda dtype=dtype, scan=scan: init_cache(TINY, 3, 12, dtype, scan)
            ).layers
            assert (
                sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(layers))
                == shape * each
            )


def test_appending_touches_the_new_slots_only():
    empty = jax.eval_shape(lambda: init_cache(TINY, 2, 8, "int8")).layers[0]
    cache = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), empty)
    new = np.full((2, TINY.kv_heads, 2, TINY.head_dim), 2.54, np.float32)
    after = jax.tree.map(np.asarray, jax.jit(append)(cache, new, -new, np.asarray([0, 5])))
    for sequence, at in ((0, 0), (1, 5)):
        touched = np.isin(np.arange(8), [at, at + 1])
        assert (after.keys[sequence][:, touched] == 127).all()
        assert (after.values[sequence][:, touched] == -127).all()
        np.testing.assert_allclose(after.key_scales[sequence][:, touched], 0.02, rtol=1e-6)
        assert all((array[sequence][:, ~touched] == 1).all() for array in after)


def test_cache_dtype_follows_the_activations_unless_named():
    assert ModelOptions(dtype="bfloat16").resolved_cache_dtype == jnp.bfloat16
    assert ModelOptions(dtype="bfloat16", cache_dtype="int8").resolved_cache_dtype == jnp.int8
    with pytest.raises(InputError, match="'int4' given"):
        ModelOptions(cache_dtype="int4")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_two_ways_to_write_sequences_write_the_same(dtype):
    """GPUs write all sequences at once, others in turn; sequences of unequal length, several
    tokens.
    """
    cache, rng = (
        jax.eval_shape(lambda: init_cache(TINY, 3, 12, dtype)).layers[0],
        np.random.default_rng(0),
    )
    lengths = np.asarray([0, 5, 9], np.int32)
    draw = lambda shape, dtype: rng.integers(-9, 9, shape).astype(dtype)
    new = jax.tree.map(lambda x: draw((*x.shape[:2], 3, *x.shape[3:]), x.dtype), cache)
    cache = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cache)
    ways = jax.jit(lambda *x: (_write_at_once(*x), _write_in_turn(2, *x)))(cache, new, lengths)
    for at_once, in_turn in zip(*map(jax.tree.leaves, ways)):
        np.testing.assert_array_equal(at_once, in_turn)
        for sequence, start in enumerate(lengths.tolist()):
            assert not np.asarray(at_once)[sequence, :, :start].any()

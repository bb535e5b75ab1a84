"""Backends against float64 attention written out, with every mask, forward and backward; memory of
the blockwise form.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention
from matrix import ALL, matrix

from llama_jax.errors import InputError
from llama_jax.model.attention import BACKENDS, Mask, attend, choose_backend
from llama_jax.model.blockwise import blockwise_attention

HEADS = [
    pytest.param((4, 4), id="mha"),
    pytest.param((6, 2), id="gqa"),
    pytest.param((4, 1), id="mqa"),
]


def draw(heads, queries, keys, seed=0, width=8, batch=2):
    rng = np.random.default_rng(seed)
    n, k = heads
    shapes = ((batch, n, queries, width), (batch, k, keys, width), (batch, k, keys, width))
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def masks(queries, keys):
    """Combinations of start, lengths and documents that make sense for these sizes; all of them in
    `make test-all`.

    Of fields of two programs: those with all that there is, and those with as little as possible.
    """
    starts = [None] if queries == keys else [np.asarray([keys - queries, 3], np.int32)]
    lengths = [None, np.asarray([keys, keys // 3], np.int32), np.asarray([0, keys - 1], np.int32)]
    documents = [None]
    if queries == keys:
        documents.append(
            np.sort(np.random.default_rng(5).integers(1, 4, (2, keys)), axis=1).astype(np.int32)
        )
    every = [Mask(*fields) for fields in itertools.product(starts, lengths, documents)]
    return every if ALL or len(documents) == 1 else [every[0], every[3], every[5]]


def seen_by(mask, causal, batch, queries, keys):
    """Which keys each query sees, `[B, T, S]`, query by query."""
    seen = np.zeros((batch, queries, keys), bool)
    for b, t, s in itertools.product(range(batch), range(queries), range(keys)):
        position = t + (0 if mask.start is None else int(mask.start[b]))
        seen[b, t, s] = (
            (not causal or s <= position)
            and (mask.lengths is None or s < int(mask.lengths[b]))
            and (mask.documents is None or int(mask.documents[b, s]) == int(mask.documents[b, t]))
        )
    return seen


def run_blockwise(q, k, v, mask, causal):
    return blockwise_attention(q, k, v, mask, causal, 8)


@functools.partial(jax.jit, static_argnums=5)
def outputs_and_gradients(q, k, v, d_out, mask, causal):
    """Of both backends."""
    found = []
    for run in (BACKENDS["reference"], run_blockwise):
        out, pull = jax.vjp(lambda q, k, v, run=run: run(q, k, v, mask, causal), q, k, v)
        found.append((out, *pull(d_out)))
    return found


@matrix(heads=HEADS, sizes=[(21, 21), (5, 21), (1, 17)], causal=[True, False])
def test_backends_equal_float64(heads, sizes, causal):
    """Forward and backward, with every mask."""
    q, k, v = draw(heads, *sizes)
    d_out = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
    for mask in masks(*sizes):
        expected = float64_attention(q, k, v, d_out, seen_by(mask, causal, 2, *sizes))
        for found in outputs_and_gradients(q, k, v, d_out, mask, causal):
            np.testing.assert_allclose(found[0], expected[0], atol=2e-6, rtol=0)
            for got, wanted in zip(found[1:], expected[1:]):
                np.testing.assert_allclose(got, wanted, atol=5e-6, rtol=0)


def test_blockwise_equals_reference_at_block_size_and_in_bfloat16():
    wide = draw((4, 2), 700, 700, width=16, batch=1)
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    blockwise, reference = (
        jax.jit(functools.partial(attend, backend=backend))
        for backend in ("blockwise", "reference")
    )
    got = blockwise(*narrow)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(blockwise(*wide), reference(*wide), atol=2e-6)
    rounded = reference(*[np.asarray(x, np.float32) for x in narrow])
    np.testing.assert_allclose(np.asarray(got, np.float32), rounded, atol=0.02)


def test_no_information_from_later_tokens_or_other_documents():
    q, k, v = draw((2, 1), 24, 24, batch=1)
    documents = np.asarray([[1] * 10 + [2] * 14], np.int32)
    for run in (BACKENDS["reference"], run_blockwise):
        summed = lambda v, run=run: run(q, k, v, Mask(documents=jnp.asarray(documents)), True).sum(
            axis=(0, 1, 3)
        )
        seen = (
            np.abs(np.asarray(jax.jit(jax.jacobian(summed))(v))).sum(axis=(1, 2, 4)) > 0
        )  # [T, S]
        allowed = np.tril(np.ones((24, 24), bool)) & (documents[0][:, None] == documents[0][None])
        np.testing.assert_array_equal(seen, allowed)


def temporary_bytes(backend, length):
    """XLA's figure for the temporaries of forward and backward at one length."""
    shape = jax.ShapeDtypeStruct((1, 2, length, 32), jnp.float32)
    step = jax.grad(lambda q, k, v: attend(q, k, v, backend=backend).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_blockwise_grows_linearly():
    blockwise, reference = (
        [temporary_bytes(backend, length) for length in lengths]
        for backend, lengths in (("blockwise", (4096, 8192, 16384)), ("reference", (8192, 16384)))
    )
    for name, sizes in (
        ("blockwise at 4k, 8k, 16k", blockwise),
        ("reference at 8k, 16k", reference),
    ):
        print(f"temporaries of {name}: {[f'{b / 2**20:.1f} MiB' for b in sizes]}")
    assert blockwise[1] < 2.1 * blockwise[0]
    assert blockwise[2] < 2.1 * blockwise[1]
    assert reference[1] > 3.5 * reference[0]
    assert blockwise[2] < reference[1] / 50


def test_choice_of_backend_and_refusals():
    assert choose_backend("auto", 1, 100_000) == "reference"
    assert choose_backend("auto", 4096, 4096) == "blockwise"
    with pytest.raises(InputError, match=r"flash9.*reference"):
        choose_backend("flash9", 1, 1)
    q, k, v = draw((2, 1), 4, 9)
    with pytest.raises(InputError, match="document"):
        attend(q, k, v, Mask(documents=jnp.ones((2, 4), jnp.int32)))

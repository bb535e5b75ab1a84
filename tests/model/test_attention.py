"""Backends against float64 attention written out, with every mask, forward and backward; memory of the chunked form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.model.attention import BACKENDS, Mask, attend, choose_backend
from llama_jax.model.chunked import chunked_attention

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def float64_attention(q, k, v, mask, causal):
    """softmax(q k^T / sqrt(H)) v, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, queries, width = q.shape
    group = heads // k.shape[1]
    out = np.zeros_like(q)
    for b, n, t in itertools.product(range(batch), range(heads), range(queries)):
        position = t + (0 if mask.start is None else int(mask.start[b]))
        keys = [
            s
            for s in range(k.shape[2])
            if (not causal or s <= position)
            and (mask.lengths is None or s < int(mask.lengths[b]))
            and (mask.documents is None or int(mask.documents[b, s]) == int(mask.documents[b, t]))
        ]
        if keys:
            scores = k[b, n // group, keys] @ q[b, n, t] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[b, n, t] = weights / weights.sum() @ v[b, n // group, keys]
    return out


def draw(heads, queries, keys, seed=0, width=8, batch=2):
    rng = np.random.default_rng(seed)
    n, k = heads
    shapes = ((batch, n, queries, width), (batch, k, keys, width), (batch, k, keys, width))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def masks(queries, keys):
    """Every combination of start, lengths and documents that makes sense for these sizes."""
    starts = [None] if queries == keys else [jnp.asarray([keys - queries, 3], jnp.int32)]
    lengths = [None, jnp.asarray([keys, keys // 3], jnp.int32), jnp.asarray([0, keys - 1], jnp.int32)]
    documents = [None]
    if queries == keys:
        documents.append(jnp.asarray(np.sort(np.random.default_rng(5).integers(1, 4, (2, keys)), axis=1), jnp.int32))
    return [Mask(*fields) for fields in itertools.product(starts, lengths, documents)]


def run_chunked(q, k, v, mask, causal):
    return chunked_attention(q, k, v, mask, causal, 8)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(21, 21), (5, 21), (1, 17)])
def test_backends_equal_float64(causal, heads, queries, keys):
    q, k, v = draw(heads, queries, keys)
    for mask in masks(queries, keys):
        expected = float64_attention(q, k, v, mask, causal)
        for run in (BACKENDS["reference"], run_chunked):
            np.testing.assert_allclose(run(q, k, v, mask, causal), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(21, 21), (5, 21)])
def test_gradients_of_chunked_equal_reference(causal, heads, queries, keys):
    q, k, v = draw(heads, queries, keys, seed=1)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(run, mask):
        return jax.grad(lambda q, k, v: jnp.sum(run(q, k, v, mask, causal) * weight), argnums=(0, 1, 2))(q, k, v)

    for mask in masks(queries, keys):
        for got, expected in zip(gradients(run_chunked, mask), gradients(BACKENDS["reference"], mask)):
            np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)


def test_chunked_equals_reference_at_block_size_and_in_bfloat16():
    q, k, v = draw((4, 2), 700, 700, width=16, batch=1)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = attend(*narrow, backend="chunked")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(attend(q, k, v, backend="chunked"), attend(q, k, v, backend="reference"), atol=2e-6)
    wide = attend(*[x.astype(jnp.float32) for x in narrow], backend="reference")
    np.testing.assert_allclose(got.astype(jnp.float32), wide, atol=0.02)


def test_no_information_from_later_tokens_or_other_documents():
    q, k, v = draw((2, 1), 24, 24, batch=1)
    documents = jnp.asarray([[1] * 10 + [2] * 14], jnp.int32)
    for run in (BACKENDS["reference"], run_chunked):
        influence = jax.jacobian(lambda v, run=run: run(q, k, v, Mask(documents=documents), True).sum(axis=(0, 1, 3)))(v)
        seen = np.abs(np.asarray(influence)).sum(axis=(1, 2, 4)) > 0  # [T, S]
        allowed = np.tril(np.ones((24, 24), bool)) & (np.asarray(documents[0])[:, None] == np.asarray(documents[0])[None])
        np.testing.assert_array_equal(seen, allowed)


def temporary_bytes(backend, length):
    """XLA's figure for the temporaries of forward and backward at one length."""
    shape = jax.ShapeDtypeStruct((1, 2, length, 32), jnp.float32)
    step = jax.grad(lambda q, k, v: attend(q, k, v, backend=backend).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_chunked_grows_linearly():
    sizes = {backend: [temporary_bytes(backend, length) for length in (4096, 8192, 16384)] for backend in BACKENDS}
    for backend, bytes_ in sizes.items():
        print(f"temporaries of {backend} at 4k, 8k, 16k: {[f'{b / 2**20:.1f} MiB' for b in bytes_]}")
    chunked, reference = sizes["chunked"], sizes["reference"]
    assert chunked[1] < 2.1 * chunked[0]
    assert chunked[2] < 2.1 * chunked[1]
    assert reference[2] > 3.5 * reference[1]
    assert chunked[2] < reference[2] / 50


def test_choice_of_backend_and_refusals():
    assert choose_backend("auto", 1, 100_000) == "reference"
    assert choose_backend("auto", 4096, 4096) == "chunked"
    with pytest.raises(InputError, match=r"flash9.*reference"):
        choose_backend("flash9", 1, 1)
    q, k, v = draw((2, 1), 4, 9)
    with pytest.raises(InputError, match="document"):
        attend(q, k, v, Mask(documents=jnp.ones((2, 4), jnp.int32)))

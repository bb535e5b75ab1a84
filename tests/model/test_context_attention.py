"""Attention over devices against float64 written out, forward and backward, and what each device has to compute for it."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by
from jax.sharding import PartitionSpec
from support import TINY, random_parameters, random_tokens

from llama_jax.errors import InputError
from llama_jax.model import chunked
from llama_jax.model.attention import attend
from llama_jax.model.context import attend_over_mesh
from llama_jax.model.llama import Llama, apply, logits
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.model.ring import Ring, block_size, ring_attention
from llama_jax.parallel.context import balanced_positions
from llama_jax.parallel.mesh import make_mesh

HEADS, KV_HEADS, LENGTH = 4, 2, 48


def draw(seed=0, width=8, batch=2):
    """q, k, v, the gradient of the output, and documents."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=(batch, n, LENGTH, width)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return arrays, jnp.asarray(np.sort(rng.integers(1, 4, (batch, LENGTH)), axis=1), jnp.int32)


def check(run, arrays, seen):
    """Output and gradients of `run` as float64 has them."""
    out, pull = jax.vjp(run, *arrays[:3])
    for ours, theirs in zip((out, *pull(arrays[3])), float64_attention(*arrays, seen)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


ORDERS = {"balanced": balanced_positions(LENGTH, 4), "any": np.random.default_rng(1).permutation(LENGTH).astype(np.int32)}


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("order", ORDERS)
def test_tokens_in_another_order_are_masked_by_their_positions(order, backend, packed):
    """In blocks of 7, so that some hold padding and some tokens of two chunks."""
    arrays, documents = draw()
    documents, positions = documents if packed else None, jnp.asarray(ORDERS[order])
    mask = Mask(documents=documents, positions=positions, key_positions=positions, key_documents=documents)
    run = lambda q, k, v: attend(q, k, v, mask, backend=backend)  # noqa: E731
    if backend == "chunked":
        run = lambda q, k, v: chunked.chunked_attention(q, k, v, mask, True, 7)  # noqa: E731
    check(run, arrays, seen_by(positions, documents))


def test_queries_of_a_part_see_the_keys_of_all():
    arrays, documents = draw()
    positions = jnp.asarray(ORDERS["balanced"])
    own = slice(12, 24)
    mask = Mask(None, None, documents[:, own], positions[own], positions, documents)
    whole = attend(*arrays[:3], Mask(None, None, documents, positions, positions, documents), backend="reference")
    for backend in ("reference", "chunked"):
        part = attend(arrays[0][:, :, own], *arrays[1:3], mask, backend=backend)
        np.testing.assert_allclose(part, whole[:, :, own], atol=1e-6)


@pytest.mark.parametrize("mask", [
    Mask(documents=jnp.ones((2, 4), jnp.int32), positions=jnp.arange(4), key_positions=jnp.arange(4)),
    Mask(positions=jnp.arange(4)), Mask(key_positions=jnp.arange(4)),
    Mask(start=jnp.zeros((2,), jnp.int32), positions=jnp.arange(4), key_positions=jnp.arange(4)),
], ids=["documents", "no keys", "no queries", "start"])  # fmt: skip
def test_half_a_mask_is_refused(mask):
    x = jnp.zeros((2, 2, 4, 8))
    with pytest.raises(InputError):
        attend(x, x, x, mask)


def on_ring(devices, size, axis="context"):
    """Ring attention as a function of whole arrays."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:devices], devices)
    heads, tokens = PartitionSpec(None, None, axis), PartitionSpec(None, axis)
    run = functools.partial(ring_attention, ring=Ring((axis,), devices, size))
    specs = (heads, heads, heads, PartitionSpec(axis), tokens)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))


@pytest.mark.parametrize(("devices", "size"), [(2, 12), (2, 5), (4, 4), (3, 8)])
def test_ring_equals_float64(devices, size):
    """Whole chunks, parts of chunks, and blocks that hold tokens of two chunks."""
    arrays, documents = draw()
    positions, ring = balanced_positions(LENGTH, devices), on_ring(devices, size)
    placed = documents[:, positions]
    check(lambda q, k, v: ring(q, k, v, jnp.asarray(positions), placed), arrays, seen_by(positions, placed))


@pytest.mark.parametrize("how", ["gathered", "ring"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_heads_rows_and_length_over_devices_at_once(how, backend):
    """Without positions: tokens in their own order, and no documents."""
    arrays, _ = draw()
    options = ModelOptions(attention=backend, context_attention=how)
    with jax.set_mesh(make_mesh(1, 2, 2, context=2)):
        run = jax.jit(lambda q, k, v: attend_over_mesh(q, k, v, Mask(), options))
        check(run, arrays, seen_by(np.arange(LENGTH), None))


# --- the work of each device ---


def computed_blocks(monkeypatch, run) -> dict[int, int]:
    """Blocks of scores that each device computes while `run` is called, counted where they are."""
    counts: collections.Counter[int] = collections.Counter()
    scores = chunked._scores

    def counted(*arguments):
        jax.debug.callback(lambda device: counts.update([int(device)]), jax.lax.axis_index("context"))
        return scores(*arguments)

    monkeypatch.setattr(chunked, "_scores", counted)
    jax.block_until_ready(run())
    jax.effects_barrier()
    return dict(counts)


@pytest.mark.parametrize(("how", "passes"), [("gathered", 3), ("ring", 2)])
def test_every_device_computes_as_many_blocks(how, passes, monkeypatch):
    """Of 2C x 2C pairs of chunks those on and below the diagonal, `2C + 1` a device, once forward and once backward.

    (To count them keeps alive a second forward pass under `jax.checkpoint`, which is not there otherwise: next test.)
    """
    devices, arrays = 4, draw()[0]
    options = ModelOptions(attention="chunked", context_attention=how)

    def work(positions):
        """Blocks by device; each holds one chunk."""
        mask = Mask(positions=jnp.asarray(positions), key_positions=jnp.asarray(positions))
        with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:devices], devices)), monkeypatch.context() as patch:
            patch.setattr("llama_jax.model.attention.chunked_attention", functools.partial(chunked.chunked_attention, size=6))
            total = jax.jit(jax.grad(lambda q, k, v: attend_over_mesh(q, k, v, mask, options).sum(), (0, 1, 2)))
            return computed_blocks(patch, lambda: total(*arrays[:3]))

    assert work(balanced_positions(LENGTH, devices)) == dict.fromkeys(range(devices), passes * (2 * devices + 1))
    in_order = work(np.arange(LENGTH, dtype=np.int32))
    assert sum(in_order.values()) == passes * devices * (2 * devices + 1)
    assert max(in_order.values()) > 3 * min(in_order.values())  # what the order is for


def test_gathered_keys_are_gathered_again_and_no_score_is_computed_again():
    """Two products a block forward and five backward are all that there are; keys and values are gathered in both."""
    arrays, options = draw()[0][:3], ModelOptions(attention="chunked", scan=False)
    with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:4], 4)):
        total = jax.jit(jax.grad(lambda q, k, v: attend_over_mesh(q, k, v, Mask(), options).sum(), (0, 1, 2)))
        text = total.lower(*arrays).as_text()  # before the compiler for CPUs, which knows no barriers and merges the gathers
    assert text.count("stablehlo.dot_general") == 2 + 5
    assert len(re.findall(r"stablehlo.all_gather.*-> tensor<2x2x48x8xf32>", text)) == 2 + 2


@pytest.mark.parametrize(("length", "devices"), [(16, 1), (48, 4), (96, 3)])
def test_balanced_positions_are_chunks_from_both_ends(length, devices):
    positions = balanced_positions(length, devices)
    assert sorted(positions) == list(range(length))
    sums = positions.reshape(devices, -1).sum(1)  # the causal work of a device is the sum of its positions, but for a constant
    assert len(set(sums)) == 1


@pytest.mark.parametrize(("backend", "tokens", "size"), [("reference", 48, 24), ("chunked", 48, 24), ("chunked", 4096, 256),
                                                         ("chunked", 600, 150), ("chunked", 7, 4)])  # fmt: skip
def test_block_size_parts_a_chunk_evenly(backend, tokens, size):
    assert block_size(backend, tokens) == size


# --- the model ---


def test_model_goes_by_positions():
    """Logits of tokens in another order are the logits of the row in that order."""
    tokens, order = random_tokens(TINY, (2, LENGTH)), jnp.asarray(ORDERS["balanced"])
    params, model = random_parameters(TINY), Llama(TINY)
    documents = draw()[1]
    expected = logits(params, tokens, TINY, documents)[:, order]
    last = apply(model, params, tokens[:, order], documents[:, order], method="features", positions=order).last
    np.testing.assert_allclose(apply(model, params, last, method="unembed"), expected, atol=1e-4)


def test_rows_that_devices_cannot_share_are_refused():
    params, q = random_parameters(TINY), jnp.zeros((2, 4, 8, 8))
    cached = Mask(start=jnp.zeros((2,), jnp.int32))
    with jax.set_mesh(make_mesh(1, 1, 2, context=4)):
        with pytest.raises(InputError, match=r"^length: 42 given, a multiple of 4 expected, .* a smaller mesh\n"):
            logits(params, random_tokens(TINY, (2, 42)), TINY)
        with pytest.raises(InputError, match="a cache was given on a mesh that cuts rows in 4"):
            attend_over_mesh(q, q, q, cached, ModelOptions())
    with pytest.raises(InputError, match="context_attention 'spiral' given; gathered or ring expected"):
        ModelOptions(context_attention="spiral")

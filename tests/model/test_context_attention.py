"""Attention over devices against float64 written out, forward and backward, and what each device
has to compute for it.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import float64_attention, seen_by
from jax.sharding import PartitionSpec
from matrix import matrix
from support import TINY, float64_logits, random_parameters, random_tokens

from llama_jax.errors import InputError
from llama_jax.model import blockwise
from llama_jax.model.attention import attend
from llama_jax.model.context_parallel import Ring, attend_over_mesh, block_size, ring_attention
from llama_jax.model.llama import Llama, apply, logits
from llama_jax.model.mask import Mask
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import balanced_positions

HEADS, KV_HEADS, LENGTH = 4, 2, 48


def draw(seed=0, width=8, batch=2):
    """q, k, v, the gradient of the output, and documents."""
    rng = np.random.default_rng(seed)
    counts = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    arrays = [rng.normal(size=(batch, n, LENGTH, width)).astype(np.float32) for n in counts]
    return arrays, np.sort(rng.integers(1, 4, (batch, LENGTH)), axis=1).astype(np.int32)


def check(run, arrays, seen):
    """Output and gradients of `run` as float64 has them."""

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return (out, *pull(d_out))

    for ours, theirs in zip(both(*arrays), float64_attention(*arrays, seen)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


ORDERS = {
    "balanced": balanced_positions(LENGTH, 4),
    "any": np.random.default_rng(1).permutation(LENGTH).astype(np.int32),
}


@matrix(order=list(ORDERS), backend=["reference", "blockwise"], packed=[False, True])
def test_tokens_in_another_order_are_masked_by_their_positions(order, backend, packed):
    """In blocks of 7, so that some hold padding and some tokens of two chunks."""
    arrays, documents = draw()
    documents, positions = jnp.asarray(documents) if packed else None, jnp.asarray(ORDERS[order])
    mask = Mask(
        documents=documents, positions=positions, key_positions=positions, key_documents=documents
    )
    run = lambda q, k, v: attend(q, k, v, mask, backend=backend)
    if backend == "blockwise":
        run = lambda q, k, v: blockwise.blockwise_attention(q, k, v, mask, True, 7)
    check(run, arrays, seen_by(positions, documents))


def test_queries_of_a_part_see_the_keys_of_all():
    arrays, documents = draw()
    positions, own = ORDERS["balanced"], slice(12, 24)
    mask = Mask(
        None, None, *map(jnp.asarray, (documents[:, own], positions[own], positions, documents))
    )
    whole = float64_attention(*arrays, seen_by(positions, documents))[0]
    for backend in ("reference", "blockwise"):
        part = jax.jit(lambda q, k, v, backend=backend: attend(q, k, v, mask, backend=backend))
        np.testing.assert_allclose(
            part(arrays[0][:, :, own], *arrays[1:3]), whole[:, :, own], atol=1e-6
        )


@pytest.mark.parametrize(
    "mask",
    [
        Mask(
            documents=jnp.ones((2, 4), jnp.int32),
            positions=jnp.arange(4),
            key_positions=jnp.arange(4),
        ),
        Mask(positions=jnp.arange(4)),
        Mask(key_positions=jnp.arange(4)),
        Mask(
            start=jnp.zeros((2,), jnp.int32), positions=jnp.arange(4), key_positions=jnp.arange(4)
        ),
    ],
    ids=["documents", "no keys", "no queries", "start"],
)
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


@pytest.mark.parametrize(
    ("devices", "size"),
    [
        pytest.param(2, 12, marks=pytest.mark.slow),
        pytest.param(2, 5, marks=pytest.mark.slow),
        (4, 4),
        (3, 8),
    ],
)
def test_ring_equals_float64(devices, size):
    """Whole chunks, parts of chunks, and blocks that hold tokens of two chunks."""
    arrays, documents = draw()
    positions, ring = balanced_positions(LENGTH, devices), on_ring(devices, size)
    placed = documents[:, positions]
    check(
        lambda q, k, v: ring(q, k, v, jnp.asarray(positions), jnp.asarray(placed)),
        arrays,
        seen_by(positions, placed),
    )


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("all_gather", "reference"),
        ("ring", "blockwise"),
        pytest.param("all_gather", "blockwise", marks=pytest.mark.slow),
        pytest.param("ring", "reference", marks=pytest.mark.slow),
    ],
)
def test_heads_sequences_and_length_over_devices_at_once(how, backend):
    """Without positions: tokens in their own order, and no documents."""
    arrays, _ = draw()
    options = ModelOptions(attention=backend, context_attention=how)
    with jax.set_mesh(make_mesh(1, 2, 2, context=2)):
        check(
            lambda q, k, v: attend_over_mesh(q, k, v, Mask(), options),
            arrays,
            seen_by(np.arange(LENGTH), None),
        )


# --- the work of each device ---


def computed_blocks(monkeypatch, run) -> dict[int, int]:
    """Blocks of scores that each device computes while `run` is called, counted where they are."""
    counts: collections.Counter[int] = collections.Counter()
    scores = blockwise._scores

    def counted(*arguments):
        jax.debug.callback(
            lambda device: counts.update([int(device)]), jax.lax.axis_index("context")
        )
        return scores(*arguments)

    monkeypatch.setattr(blockwise, "_scores", counted)
    jax.block_until_ready(run())
    jax.effects_barrier()
    return dict(counts)


@pytest.mark.parametrize(("how", "passes"), [("all_gather", 3), ("ring", 2)])
def test_every_device_computes_as_many_blocks(how, passes, monkeypatch):
    """Of 2C x 2C pairs of chunks those on and below the diagonal, `2C + 1` a device, once forward
    and once backward.

    (To count them keeps alive a second forward pass under `jax.checkpoint`, which is not there
    otherwise: next test.)
    """
    devices, arrays = 4, draw()[0]
    options = ModelOptions(attention="blockwise", context_attention=how)

    def work(positions):
        """Blocks by device; each holds one chunk."""
        mask = Mask(positions=jnp.asarray(positions), key_positions=jnp.asarray(positions))
        with (
            jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:devices], devices)),
            monkeypatch.context() as patch,
        ):
            patch.setattr(
                "llama_jax.model.attention.blockwise_attention",
                functools.partial(blockwise.blockwise_attention, size=6),
            )
            total = jax.jit(
                jax.grad(lambda q, k, v: attend_over_mesh(q, k, v, mask, options).sum(), (0, 1, 2))
            )
            return computed_blocks(patch, lambda: total(*arrays[:3]))

    assert work(balanced_positions(LENGTH, devices)) == dict.fromkeys(
        range(devices), passes * (2 * devices + 1)
    )
    in_order = work(np.arange(LENGTH, dtype=np.int32))
    assert sum(in_order.values()) == passes * devices * (2 * devices + 1)
    assert max(in_order.values()) > 3 * min(in_order.values())  # what the order is for


def test_gathered_keys_are_gathered_again_and_no_score_is_computed_again():
    """Two products a block forward and five backward are all that there are; keys and values are
    gathered in both.
    """
    arrays, options = draw()[0][:3], ModelOptions(attention="blockwise", scan=False)
    with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:4], 4)):
        total = jax.jit(
            jax.grad(lambda q, k, v: attend_over_mesh(q, k, v, Mask(), options).sum(), (0, 1, 2))
        )
        text = total.lower(
            *arrays
        ).as_text()  # before the compiler for CPUs, which knows no barriers and merges the gathers
    assert text.count("stablehlo.dot_general") == 2 + 5
    assert len(re.findall(r"stablehlo.all_gather.*-> tensor<2x2x48x8xf32>", text)) == 2 + 2


@pytest.mark.parametrize(("length", "devices"), [(16, 1), (48, 4), (96, 3)])
def test_balanced_positions_are_chunks_from_both_ends(length, devices):
    positions = balanced_positions(length, devices)
    assert sorted(positions) == list(range(length))
    sums = positions.reshape(devices, -1).sum(
        1
    )  # the causal work of a device is the sum of its positions, but for a constant
    assert len(set(sums)) == 1


@pytest.mark.parametrize(
    ("backend", "tokens", "size"),
    [
        ("reference", 48, 24),
        ("blockwise", 48, 24),
        ("blockwise", 4096, 256),
        ("blockwise", 600, 150),
        ("blockwise", 7, 4),
    ],
)
def test_block_size_parts_a_chunk_evenly(backend, tokens, size):
    assert block_size(backend, tokens) == size


# --- the model ---


def test_model_goes_by_positions():
    """Logits of tokens in another order are the logits of the sequence in that order."""
    config = dataclasses.replace(TINY, layers=2)
    tokens, order = np.asarray(random_tokens(config, (2, LENGTH))), ORDERS["balanced"]
    params, model, documents = random_parameters(config), Llama(config), draw()[1]

    @jax.jit
    def run(params, tokens, documents, positions):
        last = apply(model, params, tokens, documents, method="features", positions=positions).last
        return apply(model, params, last, method="unembed")

    expected = float64_logits(params, tokens, config, documents)[:, order]
    np.testing.assert_allclose(
        run(params, tokens[:, order], documents[:, order], order), expected, atol=1e-4
    )


def test_rows_that_devices_cannot_share_are_refused():
    params, q = random_parameters(TINY), jnp.zeros((2, 4, 8, 8))
    cached = Mask(start=jnp.zeros((2,), jnp.int32))
    with jax.set_mesh(make_mesh(1, 1, 2, context=4)):
        with pytest.raises(
            InputError, match=r"^length: 42 given, a multiple of 4 expected, .* a smaller mesh\n"
        ):
            logits(params, random_tokens(TINY, (2, 42)), TINY)
        with pytest.raises(
            InputError, match="a cache was given on a mesh that cuts sequences in 4"
        ):
            attend_over_mesh(q, q, q, cached, ModelOptions())
    with pytest.raises(
        InputError, match="context_attention 'spiral' given; all_gather or ring expected"
    ):
        ModelOptions(context_attention="spiral")

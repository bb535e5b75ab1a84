"""Rows over several devices: the same loss and gradients as one device on every mesh, and what the
program then consists of.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_parameters, random_tokens

from llama_jax.data.batches import Batch
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import tree_shardings
from llama_jax.training.cross_entropy import cross_entropy
from llama_jax.training.loss import batch_loss, batch_sequence_losses
from llama_jax.weights.assemble import unstack

LENGTH, ROWS = 64, 8
# Every axis of every mesh of eight devices divides it; a sequence has two documents.
CONFIG = dataclasses.replace(
    TINY, vocab_size=64, dim=32, layers=2, heads=16, kv_heads=8, head_dim=4
)
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]


def packed_batch(seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = np.asarray(random_tokens(CONFIG, (ROWS, LENGTH + 1), seed))
    documents = (1 + (np.arange(LENGTH) >= rng.integers(2, LENGTH - 2, (ROWS, 1)))).astype(np.int32)
    weights = (rng.random((ROWS, LENGTH)) < np.linspace(0.3, 1, ROWS)[:, None]).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, documents)


@functools.cache
def parameters():
    return random_parameters(CONFIG)


def mean_loss_of(options):
    model = Llama(CONFIG, options)
    return lambda params, batch: batch_loss(model, params, batch, 96) / jnp.sum(batch.weights)


@functools.cache
def expected():
    """Loss and gradients on one device, of a batch with documents."""
    return jax.device_get(
        jax.jit(jax.value_and_grad(mean_loss_of(ModelOptions())))(parameters(), packed_batch())
    )


@functools.cache
def program(sizes, options):
    """Loss and gradients on a mesh, compiled, and its arguments on it."""
    data, fsdp, context, tensor = sizes
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: int(np.prod(sizes))], context)
    params = (
        parameters()
        if options.scan
        else jax.tree.map(jnp.asarray, unstack(jax.device_get(parameters())))
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(params, mesh, options.rules))
        sequences = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        batch = jax.device_put(packed_batch(), sequences)
        return (
            jax.jit(jax.value_and_grad(mean_loss_of(options))).lower(params, batch).compile(),
            params,
            batch,
        )


def require_that_of_one_device(sizes, options):
    run, params, batch = program(sizes, options)
    loss, gradients = jax.device_get(run(params, batch))
    wanted, slopes = expected()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    slopes = slopes if options.scan else unstack(slopes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradients, slopes)


FORMS = [
    (sizes, how)
    for sizes in MESHES
    for how in ("all_gather", "ring")
    if how == "all_gather" or sizes[2] > 1
]
# Context beside each other axis (tensor below) and of each size, fsdp of 2 and 4, tensor of 8. What
# the test of the step has besides: data, fsdp and tensor beside each other; and that of the
# cross-entropy: fsdp of 8.
QUICK = (
    ((1, 2, 4, 1), "all_gather"),
    ((1, 2, 4, 1), "ring"),
    ((4, 1, 2, 1), "ring"),
    ((1, 1, 8, 1), "ring"),
    ((2, 4, 1, 1), "all_gather"),
    ((1, 1, 1, 8), "all_gather"),
)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        pytest.param(
            *form,
            id=f"{'x'.join(map(str, form[0]))}-{form[1]}",
            marks=[] if form in QUICK else pytest.mark.slow,
        )
        for form in FORMS
    ],
)
def test_every_mesh_equals_one_device(sizes, how):
    require_that_of_one_device(sizes, ModelOptions(context_attention=how))


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        pytest.param("all_gather", {"remat": "full"}, marks=pytest.mark.slow),
        ("all_gather", {"remat": "q+k+v+context", "attention": "blockwise"}),
        ("ring", {"remat": "context"}),
        ("ring", {"scan": False}),
    ],
    ids=str,
)
def test_recomputed_and_unrolled_layers_equal_one_device(how, changes):
    require_that_of_one_device((1, 2, 2, 2), ModelOptions(context_attention=how, **changes))


def test_losses_of_sequences_under_a_frozen_head():
    """What preferences are made of."""
    model, params, batch = Llama(CONFIG), parameters(), packed_batch()
    run = jax.jit(lambda params, batch: batch_sequence_losses(model, params, batch, 96))
    alone = run(params, batch)
    with jax.set_mesh(make_mesh(2, 1, 2, context=2)):
        np.testing.assert_allclose(run(params, batch), alone, rtol=1e-5)


@functools.cache
def of_all():
    """Features, head, targets, weights, and the summed cross-entropy with its gradients in float64,
    from whole logits.
    """
    rng = np.random.default_rng(0)
    features, head = (
        rng.normal(size=(8, 12, 8)).astype(np.float32),
        rng.normal(size=(8, 20)).astype(np.float32),
    )
    targets, weights = (
        rng.integers(0, 20, (8, 12)).astype(np.int32),
        rng.random((8, 12)).astype(np.float32),
    )
    scores = features.astype(np.float64) @ head.astype(np.float64)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = np.eye(20)[targets]
    loss = -np.sum(weights * np.log((probabilities * wanted).sum(-1)))
    slope = weights[..., None] * (probabilities - wanted)
    return (
        (features, head, targets, weights),
        loss,
        (slope @ head.T, np.einsum("btd,btv->dv", features, slope)),
    )


SHARES = [(1, 1, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2), (1, 8, 1, 1)]  # data, fsdp, tensor, context


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}",
            marks=[]
            if case[1] == 7 or case in (((2, 2, 1, 2), 1), ((1, 2, 2, 2), 1000))
            else pytest.mark.slow,
        )
        for case in itertools.product(SHARES, (1, 7, 1000))
    ],
)
def test_cross_entropy_by_device(sizes, chunk):
    """Each device sweeps over its own tokens and its own part of the vocabulary; together they have
    the loss of all.
    """
    (features, head, targets, weights), expected_value, wanted = of_all()
    ours = lambda f, h: cross_entropy(f, h, jnp.asarray(targets), jnp.asarray(weights), chunk)
    data, fsdp, tensor, context = sizes
    with jax.set_mesh(make_mesh(data, fsdp, tensor, jax.devices()[: np.prod(sizes)], context)):
        value, got = jax.jit(jax.value_and_grad(ours, (0, 1)))(features, head)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for ours_of, theirs in zip(got, wanted):
        np.testing.assert_allclose(ours_of, theirs, atol=1e-5)


# --- what the compiled program consists of ---


def gathers(text: str) -> list[tuple[int, ...]]:
    """Shapes of the floats that are gathered from other devices."""
    found = re.findall(r"= (?:\()?f32\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


def compiled(sizes, how="all_gather") -> str:
    return program(sizes, ModelOptions(context_attention=how))[0].as_text()


KEYS = (
    ROWS // 2,
    CONFIG.kv_heads,
    LENGTH,
    CONFIG.head_dim,
)  # of whole sequences, for two groups of sequences


def test_ring_passes_keys_on_and_gathers_none():
    gathered, ring = compiled((1, 2, 4, 1)), compiled((1, 2, 4, 1), "ring")
    assert gathers(gathered).count(KEYS) == 4  # keys and values, forward and backward
    assert "collective-permute" not in gathered
    assert "collective-permute" in ring
    assert [shape for shape in gathers(ring) if len(shape) > 2] == []  # weights alone


@pytest.mark.parametrize("how", ["all_gather", "ring"])
def test_no_activation_moves_but_keys_and_values(how):
    """Tokens change their order as numbers: no stream is gathered along its length, none
    exchanged.
    """
    text = compiled((1, 2, 4, 1), how)
    assert "all-to-all" not in text
    assert [shape for shape in gathers(text) if len(shape) > 2 and shape != KEYS] == []


def test_a_whole_sequence_on_each_device_has_none_of_it():
    text = compiled((2, 4, 1, 1))
    assert "collective-permute" not in text
    assert [shape for shape in gathers(text) if len(shape) > 2] == []


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 2])
def test_stream_between_blocks_is_cut_over_tensor(length):
    """Where it divides, each device keeps its own tokens for the backward pass; else all of them,
    as inside of the blocks.
    """
    model, params, tokens = Llama(CONFIG), parameters(), packed_batch().tokens[:, :length]

    def streams(params, tokens):
        return model.apply({"params": params}, tokens, method="features", mutable=["residual"])[1][
            "residual"
        ]["layers"]["stream"]

    alone = jax.jit(streams)(params, tokens)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        stream = jax.jit(streams)(params, tokens)
    np.testing.assert_allclose(stream, alone, atol=1e-5)
    share = length // 4 if length % 4 == 0 else length
    assert stream.addressable_shards[0].data.shape == (CONFIG.layers, ROWS // 2, share, CONFIG.dim)

"""Rows over several devices: the same loss and gradients as one device on every mesh, and what the program then consists of."""

import dataclasses
import functools
import itertools

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
from llama_jax.training.loss import batch_loss

LENGTH, ROWS = 64, 8
# Every axis of every mesh of eight devices divides it; a row has two documents.
CONFIG = dataclasses.replace(TINY, vocab_size=64, dim=32, layers=2, heads=16, kv_heads=8, head_dim=4)
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]


def packed_batch(seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = random_tokens(CONFIG, (ROWS, LENGTH + 1), seed)
    documents = jnp.asarray(1 + (np.arange(LENGTH) >= rng.integers(2, LENGTH - 2, (ROWS, 1))), jnp.int32)
    weights = jnp.asarray(rng.random((ROWS, LENGTH)) < np.linspace(0.3, 1, ROWS)[:, None], jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, documents)


def mean_loss_of(options):
    model = Llama(CONFIG, options)
    return lambda params, batch: batch_loss(model, params, batch, 96) / jnp.sum(batch.weights)


@functools.cache
def expected():
    """Loss and gradients on one device, of a batch with documents."""
    return jax.jit(jax.value_and_grad(mean_loss_of(ModelOptions())))(random_parameters(CONFIG), packed_batch())


def program(sizes, options):
    """Loss and gradients on a mesh, not yet called, and its arguments on it."""
    data, fsdp, context, tensor = sizes
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: int(np.prod(sizes))], context)
    params = random_parameters(CONFIG)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(params, mesh, options.rules))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        return mesh, jax.jit(jax.value_and_grad(mean_loss_of(options))), params, jax.device_put(packed_batch(), rows)


FORMS = [(sizes, how) for sizes in MESHES for how in ("gathered", "ring") if how == "gathered" or sizes[2] > 1]


@pytest.mark.parametrize(
    ("sizes", "how"), FORMS, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
def test_every_mesh_equals_one_device(sizes, how):
    mesh, run, params, batch = program(sizes, ModelOptions(context_attention=how))
    with jax.set_mesh(mesh):
        loss, gradients = jax.device_get(run(params, batch))
    np.testing.assert_allclose(loss, expected()[0], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradients, expected()[1])

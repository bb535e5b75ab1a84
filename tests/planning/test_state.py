"""Bytes of parameters, adapters and optimizers: those of the arrays that the training step
declares, on their shards.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from support import TINY

from llama_jax.accounting import LAYER_MATRICES
from llama_jax.model.llama import Llama
from llama_jax.model.lora import init_adapters
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import quantize
from llama_jax.parallel.chips import parse_topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.memory import optimizer_bytes, parameter_bytes, weight_bytes
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import Recipe, fresh_parameters, state_shapes

# Sides on both sides of Adafactor's 128, divided by every mesh below.
CONFIG = dataclasses.replace(
    TINY, vocab_size=512, dim=192, heads=8, kv_heads=4, head_dim=16, ffn_dim=320
)
# data, fsdp, tensor, context
MESHES = [(1, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 2, 2, 2), (1, 1, 1, 4)]


def bytes_on_a_device(tree) -> int:
    """Of all arrays but counters and Muon's three coefficients."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [
        leaf for path, leaf in pairs if getattr(path[-1], "name", "") not in ("count", "ns_coeffs")
    ]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def declared(config, sizes, optimizer, rank=0):
    """The state that the training step declares."""
    data, fsdp, tensor, context = sizes
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: math.prod(sizes)], context)
    adapters = (
        (lambda model, key: init_adapters(key, model.config, rank, LAYER_MATRICES))
        if rank
        else fresh_parameters
    )
    recipe = Recipe(
        Llama(config, ModelOptions()),
        make_optimizer(optimizer),
        lambda step: 1.0,
        2048,
        init=adapters,
    )
    return state_shapes(recipe, mesh)


def job(config, sizes, optimizer, rank=0) -> Job:
    mesh = MeshSizes(*sizes)
    topology = parse_topology(f"h100:{math.prod(sizes)}")
    return Job(
        config,
        topology,
        mesh,
        128,
        8,
        optimizer=optimizer.name,
        moment_dtype=optimizer.moments_dtype,
        rank=rank,
    )


@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "tied"),
    [
        *[("adamw", "float32", sizes, False) for sizes in MESHES],
        *[("adafactor", "float32", sizes, False) for sizes in MESHES],
        ("adamw", "bfloat16", (2, 2, 2, 1), True),
        ("lion", "bfloat16", (1, 2, 4, 1), False),
        ("muon", "bfloat16", (2, 1, 2, 2), False),
    ],
)
def test_whole_training_is_the_state_of_the_step(name, dtype, sizes, tied):
    config, optimizer = (
        dataclasses.replace(CONFIG, tied_head=tied),
        OptimizerConfig(name=name, moments_dtype=dtype),
    )
    state = declared(config, sizes, optimizer)
    planned = job(config, sizes, optimizer)
    assert parameter_bytes(planned) == bytes_on_a_device(state.params)
    assert optimizer_bytes(planned) == bytes_on_a_device(state.optimizer)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("adamw", (1, 1, 1, 1)),
        ("adamw", (2, 2, 2, 1)),
        ("lion", (1, 4, 1, 2)),
        ("muon", (1, 2, 4, 1)),
    ],
)
def test_adapters_are_the_state_of_the_step(name, sizes):
    optimizer = OptimizerConfig(name=name)
    state = declared(CONFIG, sizes, optimizer, rank=4)
    planned = job(CONFIG, sizes, optimizer, rank=4)
    assert parameter_bytes(planned) == bytes_on_a_device(state.params)
    assert optimizer_bytes(planned) == bytes_on_a_device(state.optimizer)


@pytest.mark.parametrize(("bits", "dtype"), [(8, "int8"), (4, "int4")])
def test_quantised_weights_are_those_of_quantize(bits, dtype):
    config = dataclasses.replace(CONFIG, layers=2)
    params = jax.eval_shape(
        lambda: Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    )
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    narrow = jax.eval_shape(lambda given: quantize(given, bits), params)
    assert weight_bytes(config, dtype) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(narrow)
    )

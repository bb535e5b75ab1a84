"""The memory of a step against what XLA says of compiled ones: published sizes for TPUs, a small
model on CPUs.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from support import TINY

from llama_jax.data.batches import Batch
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.parallel.chips import parse_topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.job import Job, MeshSizes, parse_mesh
from llama_jax.planning.memory import training_memory
from llama_jax.presets import preset
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import Recipe, batch_sharding, sharded_step, state_shapes

# Training steps of 8,192 tokens/chip compiled ahead of time (jax 0.12, libtpu 0.0.50): bytes of
# arguments and temporaries in GB. They scanned the layers, kept these activations, formed the
# head's gradient in float32 and had AdamW moments in float32 (405B: both moments in bfloat16, and
# the head's gradient, as is taken from the fact that the step fitted at all).
COMPILED = [
    ("llama3.1-8b", "v5p:4x4x4", 1, "all", 1.51, 32.76),
    ("llama3.1-8b", "v5p:4x4x4", 2, "all", 1.51, 58.47),
    ("llama3.1-70b", "v5p:4x4x8", 1, "attention", 6.63, 64.85),
    ("llama3.1-405b", "v5p:8x8x8", 1, "context", 6.38, 100.24),
    ("llama3.1-8b", "v6e:8x8", 1, "no_up", 1.51, 25.25),
]


def on_chips(model: str, name: str, sequences: int = 1, **changes) -> Job:
    """A sequence of 8,192 tokens/chip, or several."""
    topology = parse_topology(name)
    return Job(
        preset(model),
        topology,
        parse_mesh(None, topology),
        8192,
        sequences * topology.chips,
        **changes,
    )


@pytest.mark.parametrize(
    ("model", "name", "sequences", "remat", "arguments", "temporaries"), COMPILED
)
def test_published_sizes_are_0_to_5_percent_above_the_compiled_steps(
    model, name, sequences, remat, arguments, temporaries
):
    job = on_chips(model, name, sequences, remat=remat)
    memory = training_memory(job)
    kept, needed = memory.parameters + memory.optimizer, memory.total
    if (
        model == "llama3.1-405b"
    ):  # what that step had narrower: moments by 4 bytes a parameter, the head's gradient by 4
        kept -= memory.parameters
        needed -= memory.parameters + 4 * job.config.vocab_size * job.config.dim
    assert kept / 1e9 == pytest.approx(arguments, rel=0.01)
    assert 1 <= needed / 1e9 / (arguments + temporaries) < 1.05


SMALL = dataclasses.replace(
    TINY,
    vocab_size=1024,
    dim=256,
    layers=8,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn_dim=768,
    context_length=1024,
)


@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        ((1, 1, 1, 1), "full"),
        pytest.param((1, 8, 1, 1), "attention", marks=pytest.mark.slow),
        ((1, 8, 1, 1), "none"),
        ((1, 2, 2, 2), "attention"),
    ],
)
def test_a_small_step_is_within_10_percent_of_the_compiled_one(sizes, remat):
    data, fsdp, tensor, context = sizes
    devices = math.prod(sizes)
    length, sequences, chunk = 1024, 4 * devices, 1024
    model = Llama(SMALL, ModelOptions(remat=remat, attention="blockwise"))
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[:devices], context)
    recipe = Recipe(model, make_optimizer(OptimizerConfig()), lambda step: 1e-3, chunk)
    sharding = batch_sharding(recipe, mesh)
    kinds = (jnp.int32, jnp.int32, jnp.float32, jnp.int32)
    batch = Batch(
        *[jax.ShapeDtypeStruct((1, sequences, length), kind, sharding=sharding) for kind in kinds]
    )
    with jax.set_mesh(mesh):
        compiled = (
            sharded_step(recipe, mesh)
            .lower(state_shapes(recipe, mesh), batch)
            .compile()
            .memory_analysis()
        )
    job = Job(
        SMALL,
        parse_topology(f"h100:{devices}"),
        MeshSizes(data, fsdp, tensor, context),
        length,
        sequences,
        remat=remat,
        compute_dtype="float32",
        loss_chunk=chunk,
    )
    needed = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    assert training_memory(job)._replace(beside=0.0).total == pytest.approx(needed, rel=0.1)


@pytest.mark.parametrize(
    ("model", "changes", "taken"),
    [
        ("llama3.2-1b", {}, 51.0),
        ("llama3.1-8b", {"rank": 16}, 16.06 + 36.26),
    ],  # the base, and what XLA asked for beside it
)
def test_it_is_within_4_percent_of_what_a_gpu_took(model, changes, taken):
    """GB, `benchmarks/results/gpu_h200.txt`."""
    sequences = 8 if changes else 16
    job = Job(
        preset(model),
        parse_topology("h200:1"),
        MeshSizes(),
        4096,
        sequences,
        microbatches=4,
        remat="all",
        loss_chunk=4096,
        **changes,
    )
    assert training_memory(job).total / 1e9 == pytest.approx(taken, rel=0.04)


def test_tensor_and_context_share_activations():
    whole = on_chips("llama3.1-8b", "v5p:4x4x4", remat="attention")
    alone = training_memory(whole)
    context = training_memory(dataclasses.replace(whole, mesh=MeshSizes(fsdp=32, context=2)))
    tensor = training_memory(dataclasses.replace(whole, mesh=MeshSizes(fsdp=32, tensor=2)))
    assert context.activations == pytest.approx(
        alone.activations
    )  # two sequences over two chips each
    assert tensor.activations == pytest.approx(
        alone.activations
    )  # the stream between blocks is split as well
    assert tensor.gathered == alone.gathered / 2 == context.gathered / 2
    assert context.parameters == alone.parameters  # stored over `context` as over `fsdp`
    assert tensor.parameters == pytest.approx(alone.parameters, rel=0.001)


def test_what_saves_memory_saves_it():
    base = on_chips("llama3.1-8b", "v5p:4x4x4", 4, remat="attention")
    memory = training_memory(base)
    halves = training_memory(dataclasses.replace(base, microbatches=2))
    assert halves.activations == memory.activations / 2
    assert halves.gradients == 2 * memory.gradients
    assert (
        training_memory(dataclasses.replace(base, moment_dtype="bfloat16")).optimizer
        == 0.75 * memory.optimizer
    )
    assert (
        training_memory(dataclasses.replace(base, loss_chunk=base.loss_chunk // 2)).logits
        == memory.logits / 2
    )
    assert (
        training_memory(dataclasses.replace(base, optimizer="adafactor")).optimizer
        < 0.01 * memory.optimizer
    )
    adapters = training_memory(dataclasses.replace(base, rank=16, base_dtype="int8"))
    assert adapters.frozen < memory.parameters / 3
    assert adapters.gradients < memory.gradients / 4  # one factor of two is whole on every chip
    assert adapters.head < memory.head / 2

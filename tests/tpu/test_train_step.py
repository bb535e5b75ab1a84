"""The training step of Llama 3 8B as the compiler for TPUs leaves it, for 64 chips of v5p: what it
moves, copies and holds.

Compiled ahead of time on the CPU, never run. The shapes are those of the whole model with two of
its 32 layers, all alike.
"""

import dataclasses
import functools
import re

import pytest

from llama_jax.parallel.chips import parse_topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.compile import Compiled, compile_training, topology_devices
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import make_plan
from llama_jax.presets import preset

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = pytest.mark.tpu

CONFIG = dataclasses.replace(preset("llama3-8b"), layers=2)
JOB = Job(
    CONFIG,
    parse_topology("v5p:4x4x4"),
    MeshSizes(fsdp=64),
    8192,
    64,
    remat="q+k+v+context+middle+gate+up",
)
LAYER = (
    4 * (2 * CONFIG.dim * (CONFIG.dim + 1024) + 3 * CONFIG.dim * CONFIG.ffn_dim) / 2
)  # bytes of a layer's weights, bfloat16


@functools.cache
def compiled() -> Compiled:
    return compile_training(JOB)


def test_state_is_updated_in_place():
    assert compiled().aliased > 0.95 * compiled().arguments


def test_memory_is_as_planned():
    """The closed form is never more than 2 % below what the compiler has, and at most 15 %
    above.
    """
    total = compiled().arguments + compiled().temporaries
    assert -0.02 < make_plan(JOB).memory.total / total - 1 < 0.15


def test_attention_runs_forward_once_a_layer():
    times = compiled().prediction
    assert times is not None
    assert (times.forward_kernels, times.backward_kernels, times.unknown_loops) == (2, 2, 0)


def test_gradients_of_layers_are_scattered_beside_the_products():
    """All-reduces are left for the head, the norms and sums of a few numbers."""
    times = compiled().prediction
    assert times is not None
    scattered = sum(size for kind, size in times.moved.items() if "reduce-scatter" in kind)
    summed = sum(size for kind, size in times.moved.items() if "all-reduce" in kind)
    assert scattered >= 2 * LAYER
    assert summed < 1.1 * 2 * CONFIG.vocab_size * CONFIG.dim


def copied() -> list[tuple[int, ...]]:
    """The shapes that are copied in loops, without sides of 1, as often as they are."""
    times = compiled().prediction
    assert times is not None
    found = [(what, count) for what, count in times.copies.items()]
    assert all(" bf16[" in what for what, _ in found), found
    sides = [
        (re.findall(r"\d+", what.partition("[")[2].partition("]")[0]), count)
        for what, count in found
    ]
    return [
        tuple(int(side) for side in shape if side != "1")
        for shape, count in sides
        for _ in range(count)
    ]


def test_neither_stream_nor_weights_are_copied_in_the_loop_over_layers():
    dim, ffn, keys = CONFIG.dim, CONFIG.ffn_dim, CONFIG.kv_heads * CONFIG.head_dim
    weights = {(dim, dim), (dim, keys), (keys, dim), (dim, ffn), (ffn, dim)}
    assert not weights & set(copied())
    assert (JOB.length, dim) not in copied()


def test_heads_are_copied_only_for_the_gradients_of_weights():
    """The output of attention and the gradients of q, k and v, which those products sum over all
    tokens.
    """
    heads = [(count, CONFIG.head_dim, JOB.length) for count in (CONFIG.heads, CONFIG.kv_heads)]
    assert sorted(copied()) == sorted(2 * CONFIG.layers * heads)


def test_a_mesh_axis_may_be_smaller_than_those_of_the_torus():
    mesh = make_mesh(1, 256, 2, topology_devices(parse_topology("v5p:8x8x8")))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 256, "context": 1, "tensor": 2}

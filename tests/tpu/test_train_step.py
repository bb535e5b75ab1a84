"""The training step of Llama 3 8B as the compiler for TPUs leaves it, for 64 chips of v5p: what it moves, copies and holds.

Compiled ahead of time on the CPU, never run. The shapes are those of the whole model with two of its 32 layers, all alike.
"""

import dataclasses
import functools

import pytest

from llama_jax.planning.ahead import Compiled, compile_training
from llama_jax.planning.chips import parse_topology
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import make_plan
from llama_jax.presets import preset

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = pytest.mark.tpu

CONFIG = dataclasses.replace(preset("llama3-8b"), layers=2)
JOB = Job(CONFIG, parse_topology("v5p:4x4x4"), MeshSizes(fsdp=64), 8192, 64, remat="q+k+v+context+middle+gate+up")
LAYER = 4 * (2 * CONFIG.dim * (CONFIG.dim + 1024) + 3 * CONFIG.dim * CONFIG.ffn_dim) / 2  # bytes of a layer's weights, bfloat16


@functools.cache
def compiled() -> Compiled:
    return compile_training(JOB)


def test_state_is_updated_in_place():
    assert compiled().aliased > 0.95 * compiled().arguments


def test_memory_is_as_planned():
    """The closed form is never more than 2 % below what the compiler has, and at most 15 % above."""
    total = compiled().arguments + compiled().temporaries
    assert -0.02 < make_plan(JOB).memory.total / total - 1 < 0.15


def test_attention_runs_forward_once_a_layer():
    times = compiled().prediction
    assert times is not None
    assert (times.forward_kernels, times.backward_kernels, times.unknown_loops) == (2, 2, 0)


def test_gradients_of_layers_are_scattered_beside_the_products():
    """All-reduces are left for embedding and head, the norms and sums of a few numbers."""
    times = compiled().prediction
    assert times is not None
    scattered = sum(size for kind, size in times.moved.items() if "reduce-scatter" in kind)
    summed = sum(size for kind, size in times.moved.items() if "all-reduce" in kind)
    assert scattered >= 2 * LAYER
    assert summed < 1.1 * 2 * (2 * CONFIG.vocab_size * CONFIG.dim)


def copied(shape: str) -> list[str]:
    times = compiled().prediction
    assert times is not None
    return [what for what in times.copies if shape in what]


def test_the_stream_is_not_copied_in_the_loop_over_layers():
    assert copied(f"[1,8192,{CONFIG.dim}]") == []


@pytest.mark.xfail(reason="`wo` is laid out anew after it is gathered along its outputs", strict=False)
def test_no_weight_is_copied_in_the_loop_over_layers():
    assert copied(f"[1,{CONFIG.dim},") == []

"""The decoding loop of Llama 3 8B as the compiler for TPUs leaves it: nothing as large as a cache
or a weight is copied.

Compiled ahead of time on the CPU, never run. The shapes are those of the whole model with four of
its 32 layers, which are alike: eight sequences of 2048 slots in bfloat16.
"""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from compiled import Program, arrays
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from llama_jax.generation.decode import Progress
from llama_jax.generation.programs import Programs
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import parameter_bytes, quantize
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, partition_spec, tree_shardings
from llama_jax.presets import preset
from llama_jax.weights.assemble import unstack

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = pytest.mark.tpu

CONFIG = dataclasses.replace(preset("llama3-8b"), layers=4)
ROWS, SLOTS = 8, 2048
CHIPS = ("v5e:1x1", "v5p:1x1x1")
SLICES = ("v5e:2x2", "v5p:2x2x1")


def devices(topology: str):
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, platform="tpu").devices


def inputs(options: ModelOptions, bits: int | None):
    """Shapes of everything that the decoding loop takes."""

    def make():
        params = Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(
            lambda x: x.astype(options.compute_dtype), params if options.scan else unstack(params)
        )
        cache = init_cache(CONFIG, ROWS, SLOTS, options.resolved_cache_dtype, options.scan)
        zeros = jnp.zeros((ROWS,), jnp.int32)
        progress = Progress(zeros, cache, zeros, zeros == 0)
        return (
            quantize(params, bits) if bits else params,
            progress,
            make_sampling(ROWS),
            jnp.zeros((ROWS, 2), jnp.int32),
        )

    return jax.eval_shape(make), jax.ShapeDtypeStruct((), jnp.int32)


def placed(tree, sharding):
    """The shapes, on their devices."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, sharding
    )


def everywhere(tree, sharding):
    return placed(tree, jax.tree.map(lambda _: sharding, tree))


def sharded(params, mesh):
    """The parameters as they lie on a mesh; the table of shardings reads arrays, not their
    shapes.
    """
    found = []
    jax.eval_shape(lambda params: found.append(tree_shardings(params, mesh, TRAINING)), params)
    return placed(params, found[0])


class Compiled(NamedTuple):
    """A loop, and bytes of one device: those of the caches, of what the loop reuses, holds besides,
    and hands back.
    """

    program: Program
    cache: int
    alias: int
    temporary: int
    output: int


@functools.cache
def compiled(
    topology: str,
    bits: int | None = None,
    tensor: int = 1,
    donate: bool = True,
    data: int = 1,
    **options,
) -> Compiled:
    """The loop compiled as `Programs` does it."""
    options = ModelOptions(dtype="bfloat16", **{"scan": False, **options})
    (params, progress, sampling, stops), steps = inputs(options, bits)
    mesh = make_mesh(data, 1, tensor, devices(topology)) if data * tensor > 1 else None
    whole = (
        SingleDeviceSharding(devices(topology)[0])
        if mesh is None
        else NamedSharding(mesh, PartitionSpec())
    )
    heads = partition_spec(("batch", "kv_heads", "length", "width"), TRAINING)
    params = everywhere(params, whole) if mesh is None else sharded(params, mesh)
    layers = everywhere(
        progress.cache.layers, whole if mesh is None else NamedSharding(mesh, heads)
    )
    progress = everywhere(progress._replace(cache=progress.cache._replace(layers=())), whole)
    progress = progress._replace(cache=progress.cache._replace(layers=layers))
    program = Programs(Llama(CONFIG, options), mesh).advance.__wrapped__
    program = program if donate else jax.jit(program.__wrapped__, static_argnames="logprobs")
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = program.lower(
            params, progress, *everywhere((sampling, stops, steps), whole), logprobs=None
        )
    result = lowered.compile()
    memory = result.memory_analysis()
    sizes = (memory.alias_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
    return Compiled(Program(result.as_text()), parameter_bytes(layers) // (tensor * data), *sizes)


def smallest(bits: int | None, tensor: int = 1) -> int:
    """Bytes of the smallest weight matrix on a device, smaller than a cache of one layer; logits
    are smaller still.
    """
    return CONFIG.dim * CONFIG.kv_heads * CONFIG.head_dim * (1 if bits else 2) // tensor


FORMS = {"bf16": (None, "auto"), "cache8": (None, "int8"), "weights8": (8, "auto")}
ONE_CHIP = [
    pytest.param(chip, *form, id=f"{name}-{chip}") for name, form in FORMS.items() for chip in CHIPS
]


@pytest.mark.parametrize(("topology", "bits", "cache"), ONE_CHIP)
def test_one_chip_copies_no_cache_and_no_weight_in_the_loop(topology, bits, cache):
    found = compiled(topology, bits, cache_dtype=cache)
    assert found.alias >= found.cache
    assert found.program.written(smallest(bits)) == []


@pytest.mark.parametrize(("topology", "bits", "cache"), ONE_CHIP)
def test_one_chip_writes_a_sequence_of_the_cache_with_few_kernels(topology, bits, cache):
    """At most one kernel a sequence and array, and a few for tokens; a loop of one sequence a round
    takes two, a scatter four.
    """
    kernels = compiled(topology, bits, cache_dtype=cache).program.sequence_kernels()
    assert (
        ROWS * CONFIG.layers <= kernels <= ROWS * (4 if cache == "int8" else 2) * CONFIG.layers + 4
    )


@pytest.mark.parametrize(("topology", "bits", "cache"), ONE_CHIP)
def test_one_chip_holds_little_besides(topology, bits, cache):
    """Less than one wide matrix, say a dequantised one: the activations and logits of eight
    tokens.
    """
    assert compiled(topology, bits, cache_dtype=cache).temporary < 4 * smallest(None)


@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize("bits", [None, 8], ids=["bf16", "weights8"])
def test_tensor_parallel_chips_gather_no_cache_and_no_weight(topology, bits):
    found = compiled(topology, bits, tensor=4)
    logits = f"f32[{ROWS},{CONFIG.vocab_size}]"
    assert found.alias >= found.cache
    assert found.temporary < 4 * smallest(None) / 2
    assert [
        array for array in found.program.written(smallest(bits, 4)) if logits not in array
    ] == []
    assert [
        array for array in found.program.gathered(smallest(bits, 4)) if logits not in array
    ] == []
    assert found.program.gathered(ROWS * CONFIG.dim)  # sums over the chips, of eight tokens


@pytest.mark.parametrize("bits", [None, 8], ids=["bf16", "weights8"])
def test_chips_that_share_sequences_write_their_own(bits):
    """Four copies of the model: no sequence is moved, nothing is but a few bytes that say whether
    all are done.
    """
    found = compiled("v5e:2x2", bits, data=4)
    assert found.alias >= found.cache
    assert found.program.written(smallest(bits)) == []
    assert found.program.gathered(ROWS * CONFIG.head_dim) == []


def test_layers_run_by_a_scan_copy_nothing_either():
    found = compiled(CHIPS[0], scan=True)
    assert found.alias >= found.cache
    assert found.program.written(smallest(None)) == []
    assert found.temporary < 4 * smallest(None)


def test_reading_notices_a_cache_that_is_not_donated():
    found = compiled(CHIPS[0], donate=False)
    assert found.alias == 0
    assert found.output >= found.cache


def test_arrays_of_a_result():
    text = "(bf16[8,4]{1,0:T(8,128)(2,1)}, s8[16]{0:T(128)S(1)}, u32[]{:S(2)}, f32[]{:T(128)})"
    assert arrays(text) == [("bf16[8,4]", 64), ("f32[]", 4)]

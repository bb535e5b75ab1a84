"""A training step compiled for chips that are not here: its memory as the compiler has it, its time
as it estimates.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from llama_jax.accounting import matmul_parameters
from llama_jax.axes import PyTree
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.generation.decode import Progress
from llama_jax.generation.programs import Programs
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.attention import choose_backend
from llama_jax.model.cache import Cache, init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import quantize
from llama_jax.parallel.chips import Topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import (
    TRAINING,
    partition_spec,
    replicated,
    tree_shardings,
    whole_sequences,
)
from llama_jax.planning.cost_model import Prediction, predict, predict_round
from llama_jax.planning.job import Job
from llama_jax.planning.speed import DecodePlan, flops_per_token
from llama_jax.training.config import TrainConfig
from llama_jax.training.config_sections import OptimizerConfig
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.setup import make_recipe
from llama_jax.training.step import Recipe, lowered_step
from llama_jax.weights.assemble import unstack

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """A step as compiled for one chip.

    Attributes:
      arguments: bytes of state and batch.
      temporaries: bytes of everything else; the compiler checks only these against the chip's
        memory.
      hosted: bytes in the memory of the host.
      aliased: bytes of results that take the place of arguments.
      seconds: that compiling took.
      prediction: of its time; `None` for chips whose clock is not known.
      flops: of the model, one chip's part of a step.
      text: the program.
    """

    arguments: int
    temporaries: int
    hosted: int
    aliased: int
    seconds: float
    prediction: Prediction | None
    flops: float
    text: str


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Descriptions of the chips of slices, closed to rings where the real ones are: without,
    gathers become sums.

    Raises:
      InputError: for GPUs; where the compiler for TPUs is not installed.
    """
    if not topology.chip.axes:
        raise InputError(
            f"topology {topology.name}: programs are compiled ahead for TPUs; leave out --compile"
        )
    rings = [size % topology.chip.ring == 0 for size in topology.shape]
    several = math.prod(topology.shape) > 1
    try:
        description = topologies.get_topology_desc(
            f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}",
            platform="tpu",
            chip_config_name="megacore" if topology.chip.axes == 3 else "default",
            chips_per_host_bounds=(2, 2, 1) if several else (1, 1, 1),
            num_slices=topology.slices,
            wrap=(*rings, *[False] * (3 - len(rings))),
        )
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"topology {topology.name}: no compiler for TPUs here "
            f"({str(error).partition('.')[0]:.80}); install it, no TPU is "
            "needed, by pip install 'jax[tpu]', or leave out --compile"
        ) from None
    return description.devices


def compile_training(job: Job) -> Compiled:
    """Compiles the training step of a job, on this machine, for its topology.

    Raises:
      InputError: for a job that cannot be compiled here.
      jax.errors.JaxRuntimeError: with RESOURCE_EXHAUSTED in it, if even the temporaries do not fit.
    """
    return _compile(job_recipe(job), job)


def compile_config(config: TrainConfig, job: Job) -> Compiled:
    """Compiles the training step of a config as `train.py` builds it on TPUs, on this machine.

    Args:
      config: of the run.
      job: what it describes, see `llama_jax.planning.plan.job_of`; its topology, and what `remat:
        auto` stands for.

    Raises:
      InputError: for a job that cannot be compiled here.
      jax.errors.JaxRuntimeError: with RESOURCE_EXHAUSTED in it, if even the temporaries do not fit.
    """
    require_whole(job)
    compute = dataclasses.replace(config.compute, remat=job.remat)
    return _compile(make_recipe(dataclasses.replace(config, compute=compute), "tpu"), job)


def _compile(recipe: Recipe, job: Job) -> Compiled:
    mesh = make_mesh(
        job.mesh.data,
        job.mesh.fsdp,
        job.mesh.tensor,
        topology_devices(job.topology),
        job.mesh.context,
    )
    shape = (job.microbatches, job.sequences // job.microbatches, job.length)
    config, tokens = job.config, job.tokens / job.topology.chips
    product = (
        config.layers * tokens * job.length * config.heads * config.head_dim
    )  # half of the square, two FLOPs each
    lowered = lowered_step(recipe, mesh, shape)
    return timed_compile(
        lowered,
        mesh,
        job.topology,
        lambda text: predict(text, job.topology, product),
        flops_per_token(job) * tokens,
    )


def timed_compile(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    topology: Topology,
    prediction: Callable[[str], Prediction],
    flops: float,
) -> Compiled:
    """A program compiled for a mesh of a topology, with the compiler's memory figures.

    Args:
      lowered: the program.
      mesh: of the topology's chips.
      topology: the chips.
      prediction: of its time, from its text; not asked where the clock of the chips is not known.
      flops: of the model, one chip's part.
    """
    started = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = lowered.compile()
    seconds, text, memory = (
        time.monotonic() - started,
        compiled.as_text(),
        compiled.memory_analysis(),
    )
    assert text is not None
    assert memory is not None
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.host_temp_size_in_bytes,
        memory.alias_size_in_bytes,
        seconds,
        prediction(text) if topology.chip.clock else None,
        flops,
        text,
    )


def too_large(error: Exception) -> float | None:
    """Bytes of temporaries, where an error of the compiler says that the memory of a device does
    not hold them; else `None`.
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        return None
    return float(found[1]) * _UNITS[found[2]]


def require_whole(job: Job) -> None:
    """Refuses adapters, whose step needs a model.

    Raises:
      InputError: for them.
    """
    if job.rank:
        raise InputError(
            "--rank (adapter.rank) and --compile given; only the training of whole "
            "models is compiled ahead"
        )


def job_recipe(job: Job) -> Recipe:
    """The update of a job, as a run of the same settings has it on TPUs.

    Raises:
      InputError: for adapters, whose step needs a model.
    """
    require_whole(job)
    attention = choose_backend(
        "auto", job.length, job.length, "tpu", job.config.head_dim, job.mesh.context
    )
    options = ModelOptions(dtype=job.compute_dtype, scan=True, remat=job.remat, attention=attention)
    dtypes = {"moments_dtype": job.moment_dtype, "param_dtype": job.param_dtype}
    settings = OptimizerConfig(name=job.optimizer, **dtypes)  # type: ignore[arg-type]
    optimizer, schedule = make_optimizer(settings), learning_rate_schedule(settings, 1000)
    return Recipe(
        Llama(job.config, options), optimizer, schedule, job.loss_chunk, param_dtype=job.param_dtype
    )


# --- ahead decode ---
#
# A decoding step compiled for chips that are not here: the loop that generation runs, with a
# model's shapes and no weights.


_BITS = {"int8": 8, "int4": 4}
_RULES = whole_sequences(TRAINING)
_STOPS = 2  # stop tokens of a sequence


def compile_decoding(
    config: LlamaConfig, plan: DecodePlan, dtype: str, cache_dtype: str
) -> Compiled:
    """Compiles the decoding loop for the chips of a plan, on this machine; its times are those of
    one step.

    Args:
      config: the architecture.
      plan: mesh, sequences and length.
      dtype: of the weights: `bfloat16`, `float32`, `int8` or `int4`.
      cache_dtype: of keys and values.

    Raises:
      InputError: for a job that cannot be compiled here.
      jax.errors.JaxRuntimeError: with RESOURCE_EXHAUSTED in it, if even the temporaries do not fit.
    """
    mesh = make_mesh(
        plan.mesh.data, plan.mesh.fsdp, plan.mesh.tensor, topology_devices(plan.topology)
    )
    wide = "bfloat16" if dtype in _BITS else dtype
    options = ModelOptions(dtype=wide, scan=False, cache_dtype=cache_dtype, rules=_RULES)
    inputs = _placed(*_shapes(config, options, plan, _BITS.get(dtype)), mesh)
    loop = Programs(Llama(config, options), mesh).advance.__wrapped__  # type: ignore[attr-defined]
    with jax.set_mesh(mesh):
        lowered = loop.lower(*inputs, logprobs=None)
    flops = 2.0 * matmul_parameters(config) * plan.batch / plan.topology.chips
    return timed_compile(
        lowered, mesh, plan.topology, lambda text: predict_round(text, plan.topology), flops
    )


def _shapes(
    config: LlamaConfig, options: ModelOptions, plan: DecodePlan, bits: int | None
) -> tuple[PyTree, Progress, PyTree]:
    """Parameters as they are served, what stands between two steps, and the other arguments of the
    loop.
    """

    def make() -> tuple[PyTree, Progress, PyTree]:
        """Traced for its shapes."""
        params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: leaf.astype(options.compute_dtype), unstack(params))
        cache = init_cache(config, plan.batch, plan.length, options.resolved_cache_dtype)
        zeros = jnp.zeros((plan.batch,), jnp.int32)
        rest = make_sampling(plan.batch), jnp.zeros((plan.batch, _STOPS), jnp.int32), jnp.int32(0)
        return (
            quantize(params, bits) if bits else params,
            Progress(zeros, cache, zeros, zeros == 0),
            rest,
        )

    return jax.eval_shape(make)


def _placed(params: PyTree, progress: Progress, rest: PyTree, mesh: Mesh) -> tuple:
    """The same on the mesh: weights and cache as generation lays them, a few numbers a sequence
    everywhere.
    """
    layers = progress.cache.layers
    heads = NamedSharding(mesh, partition_spec(("batch", "kv_heads"), _RULES))
    small = (progress._replace(cache=Cache((), progress.cache.lengths)), rest)
    progress, rest = _with(small, jax.tree.map(lambda _: replicated(mesh), small))
    cache = Cache(_with(layers, jax.tree.map(lambda _: heads, layers)), progress.cache.lengths)
    return (
        _with(params, tree_shardings(params, mesh, _RULES)),
        progress._replace(cache=cache),
        *rest,
    )


def _with(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )

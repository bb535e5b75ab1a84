"""A decoding step compiled for chips that are not here: the loop that generation runs, with a model's shapes and no weights."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llama_jax.accounting import matmul_parameters
from llama_jax.axes import PyTree
from llama_jax.config import LlamaConfig
from llama_jax.generation.decode import Progress
from llama_jax.generation.programs import Programs
from llama_jax.generation.sampling import make_sampling
from llama_jax.model.cache import Cache, init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.options import ModelOptions
from llama_jax.model.quantize import quantize
from llama_jax.parallel.context import whole_rows
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import TRAINING, partition_spec, replicated, tree_shardings
from llama_jax.planning.ahead import Compiled, timed_compile, topology_devices
from llama_jax.planning.decode import DecodePlan
from llama_jax.planning.ruler import predict_round
from llama_jax.weights.forms import unstack

_BITS = {"int8": 8, "int4": 4}
_RULES = whole_rows(TRAINING)
_STOPS = 2  # stop tokens of a row


def compile_decoding(config: LlamaConfig, plan: DecodePlan, dtype: str, cache_dtype: str) -> Compiled:
    """Compiles the decoding loop for the chips of a plan, on this machine; its times are those of one step.

    Args:
      config: the architecture.
      plan: mesh, rows and length.
      dtype: of the weights: `bfloat16`, `float32`, `int8` or `int4`.
      cache_dtype: of keys and values.

    Raises:
      InputError: for what cannot be compiled here.
      jax.errors.JaxRuntimeError: with RESOURCE_EXHAUSTED in it, if even the temporaries do not fit.
    """
    mesh = make_mesh(plan.mesh.data, plan.mesh.fsdp, plan.mesh.tensor, topology_devices(plan.topology))
    wide = "bfloat16" if dtype in _BITS else dtype
    options = ModelOptions(dtype=wide, scan=False, cache_dtype=cache_dtype, rules=_RULES)
    inputs = _placed(*_shapes(config, options, plan, _BITS.get(dtype)), mesh)
    loop = Programs(Llama(config, options), mesh).advance.__wrapped__  # type: ignore[attr-defined]
    with jax.set_mesh(mesh):
        lowered = loop.lower(*inputs, logprobs=None)
    flops = 2.0 * matmul_parameters(config) * plan.batch / plan.topology.chips
    return timed_compile(lowered, mesh, plan.topology, lambda text: predict_round(text, plan.topology), flops)


def _shapes(config: LlamaConfig, options: ModelOptions, plan: DecodePlan, bits: int | None) -> tuple[PyTree, Progress, PyTree]:
    """Parameters as they are served, what stands between two steps, and the other arguments of the loop."""

    def make() -> tuple[PyTree, Progress, PyTree]:
        """Traced for its shapes."""
        params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(lambda leaf: leaf.astype(options.compute_dtype), unstack(params))
        cache = init_cache(config, plan.batch, plan.length, options.resolved_cache_dtype)
        zeros = jnp.zeros((plan.batch,), jnp.int32)
        rest = make_sampling(plan.batch), jnp.zeros((plan.batch, _STOPS), jnp.int32), jnp.int32(0)
        return quantize(params, bits) if bits else params, Progress(zeros, cache, zeros, zeros == 0), rest

    return jax.eval_shape(make)


def _placed(params: PyTree, progress: Progress, rest: PyTree, mesh: Mesh) -> tuple:
    """The same on the mesh: weights and cache as generation lays them, a few numbers a row everywhere."""
    layers = progress.cache.layers
    heads = NamedSharding(mesh, partition_spec(("batch", "kv_heads"), _RULES))
    small = (progress._replace(cache=Cache((), progress.cache.lengths)), rest)
    progress, rest = _with(small, jax.tree.map(lambda _: replicated(mesh), small))
    cache = Cache(_with(layers, jax.tree.map(lambda _: heads, layers)), progress.cache.lengths)
    return _with(params, tree_shardings(params, mesh, _RULES)), progress._replace(cache=cache), *rest


def _with(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)

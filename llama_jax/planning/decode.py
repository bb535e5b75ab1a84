"""Decoding in closed form: memory of weights and cache on a chip, bytes a step moves, the limit that they set."""

import math
from typing import NamedTuple

from llama_jax.accounting import cache_bytes_per_token, matmul_parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.planning.chips import Topology
from llama_jax.planning.job import ITEMSIZES, MeshSizes
from llama_jax.planning.state import weight_bytes


class DecodePlan(NamedTuple):
    """What it takes to generate, each chip with its part of the weights.

    Attributes:
      topology: the chips.
      mesh: `tensor` splits weights, cache and products; `data` the rows.
      batch: rows, all chips together.
      length: tokens of prompt and answer together.
      weights: bytes on a chip.
      cache: bytes on a chip, keys and values of full rows.
      logits: bytes on a chip, float32.
      moved: bytes that a chip reads in a step with full rows: every matrix once, and the cache.
      limit: bytes that a chip has.
    """

    topology: Topology
    mesh: MeshSizes
    batch: int
    length: int
    weights: float
    cache: float
    logits: float
    moved: float
    limit: float

    @property
    def total(self) -> float:
        """Bytes on a chip."""
        return self.weights + self.cache + self.logits

    @property
    def step(self) -> float:
        """Seconds that a step takes at least."""
        return self.moved / self.topology.chip.bandwidth

    @property
    def tokens_per_second(self) -> float:
        """Of all rows, at most: at the nominal bandwidth, without the time that chips wait for each other."""
        return self.batch / self.step

    @property
    def bytes_per_token(self) -> float:
        """Read for one new token, all chips together."""
        return self.moved * math.prod(self.mesh) / self.batch


def decode_mesh(config: LlamaConfig, topology: Topology) -> MeshSizes:
    """The most chips to a copy of the weights that the heads allow, within a slice or node; copies on the rest."""
    ways = math.gcd(topology.near, config.kv_heads)
    return MeshSizes(data=topology.chips // ways, tensor=ways)


def make_decode_plan(
    config: LlamaConfig,
    topology: Topology,
    batch: int | None,
    length: int,
    dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
    mesh: MeshSizes | None = None,
) -> DecodePlan:
    """Memory and limit of decoding.

    Args:
      config: the architecture.
      topology: the chips.
      batch: rows at a time, all chips together, a multiple of `data`; `None` for one a copy of the model.
      length: tokens of prompt and answer together.
      dtype: of the weights: `bfloat16`, `float32`, `int8` or `int4`.
      cache_dtype: of keys and values; `int8` has a float32 scale a vector.
      mesh: `data` and `tensor`; by default `decode_mesh`.

    Raises:
      InputError: for rows that copies of the model cannot share, and for other axes of the mesh.
    """
    mesh = decode_mesh(config, topology) if mesh is None else mesh
    if mesh.fsdp * mesh.context != 1 or config.kv_heads % mesh.tensor:
        raise InputError(f"mesh {mesh} given; decoding takes data and tensor, a divisor of kv_heads ({config.kv_heads})")
    batch = mesh.data if batch is None else batch
    if batch % mesh.data:
        raise InputError(f"batch {batch} given; a multiple of the copies of the model ({mesh.data}) expected; see --mesh")
    slot = cache_bytes_per_token(config, 1) * (ITEMSIZES[cache_dtype] + (4 / config.head_dim if cache_dtype == "int8" else 0))
    weights = weight_bytes(config, dtype, tensor=mesh.tensor)
    rows = batch // mesh.data
    cache = rows * length * slot / mesh.tensor
    head = 1 if dtype == "int4" else ITEMSIZES[dtype]  # 4-bit models keep a head of 8 bits
    table = config.vocab_size * config.dim
    read = (ITEMSIZES[dtype] * (matmul_parameters(config) - table) + head * table) / mesh.tensor
    logits = rows * config.vocab_size * 4 / mesh.tensor
    return DecodePlan(topology, mesh, batch, length, weights, cache, logits, read + cache, topology.chip.memory)

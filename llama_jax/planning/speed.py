"""Time of a training step in closed form: lower bounds of compute, memory and links, and the time
to be expected.
"""

import math
from typing import NamedTuple

from llama_jax.accounting import cache_bytes_per_token, matmul_parameters, training_flops_per_token
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model.remat import layer_parts, saved_names
from llama_jax.parallel.chips import Topology
from llama_jax.planning.job import ITEMSIZES, Job, MeshSizes
from llama_jax.planning.memory import (
    model_arrays,
    optimizer_bytes,
    recomputed_bytes,
    recomputed_flops,
    trained_size,
    weight_bytes,
)

# Bytes between chip and memory for one token and layer, forward and backward, over the bytes of its
# named activations: each is written and read in both passes, in fused kernels (8B: 24 MB/token in
# all).
_TRAFFIC = 8
_FORWARD, _BACKWARD = (
    1,
    1,
)  # times that weights are gathered over `fsdp` and `context` in a micro-batch


class Speed(NamedTuple):
    """Seconds of one optimizer update, and what follows from them.

    Attributes:
      flops_per_token: of the model, forward and backward, causal attention, nothing recomputed.
      recomputed: FLOPs done a second time, over those.
      compute: seconds at the chip's peak.
      expected_compute: seconds at the share of the peak that is to be expected.
      memory: seconds to move weights, activations and state between chip and memory, at its nominal
        bandwidth.
      streams: seconds in which the products wait for the stream between blocks to come over
        `tensor`, at nominal bandwidth.
      links: seconds of all transfers between chips of a slice or node, at nominal bandwidth.
      network: seconds of all transfers between slices or nodes.
      tokens: of the update.
      chips: that work together.
      peak: FLOP/s of one chip.
    """

    flops_per_token: float
    recomputed: float
    compute: float
    expected_compute: float
    memory: float
    streams: float
    links: float
    network: float
    tokens: int
    chips: int
    peak: float

    @property
    def step(self) -> float:
        """Seconds to be expected: of the slowest of four that work at the same time, products and
        their waits being one.
        """
        return max(self.expected_compute + self.streams, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        """Which of the four that is."""
        times = {
            "compute": self.expected_compute + self.streams,
            "memory": self.memory,
            "links": self.links,
            "network": self.network,
        }
        return max(times, key=lambda name: times[name])

    @property
    def tokens_per_second(self) -> float:
        """Of all chips."""
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """FLOPs of the model a second over the peak; attention counted as causal, recomputation not
        at all.
        """
        return self.flops_per_token * self.tokens_per_second / self.chips / self.peak


def flops_per_token(job: Job) -> float:
    """FLOPs of the model, forward and backward, for one token; under adapters no gradient of a
    frozen matrix is formed.
    """
    return training_flops_per_token(job.config, job.length, job.rank)


def training_speed(job: Job) -> Speed:
    """The time of an update."""
    chip, chips = job.topology.chip, job.topology.chips
    each = flops_per_token(job)
    again = recomputed_flops(job.config, job.remat, job.length)
    compute = (each + again) * job.tokens / chips / chip.peak
    near, far = traffic(job)
    return Speed(
        flops_per_token=each,
        recomputed=again / each,
        compute=compute,
        expected_compute=compute / chip.share,
        memory=_memory_traffic(job) / chip.bandwidth,
        streams=_tensor_traffic(job) / _along_tensor(job),
        links=near / job.topology.link,
        network=far / chip.network,
        tokens=job.tokens,
        chips=chips,
        peak=chip.peak,
    )


def _along_tensor(job: Job) -> float:
    """Bytes a second that a chip takes in from those that share a layer's products with it."""
    ways, topology = job.mesh.tensor, job.topology
    return topology.along(ways) if ways <= topology.near else topology.chip.network


def _memory_traffic(job: Job) -> float:
    """Bytes a chip and update between chip and memory."""
    config, width, micro = job.config, ITEMSIZES[job.compute_dtype], job.microbatches
    named = recomputed_bytes(config, "full", int(width), job.mesh.tensor)
    activations = _TRAFFIC * named * config.layers * job.chip_tokens * micro
    weights = 3 * width * matmul_parameters(config) / job.mesh.tensor * micro
    head = width * config.vocab_size * config.dim / job.mesh.tensor
    chunks = micro * job.chip_tokens / job.chunk_tokens
    # A chunk reads the head twice, and its gradient (float32) is read and written.
    loss = chunks * head * 2 + (0 if job.rank else chunks * 2 * 4 * head / width)
    state = 2 * (trained_size(job) * ITEMSIZES[job.param_dtype] + optimizer_bytes(job))
    gradients = 2 * micro * trained_size(job) * ITEMSIZES[job.param_dtype]
    return activations + weights + loss + state + gradients


def traffic(job: Job) -> tuple[float, float]:
    """Bytes a chip and update that come in over links, and over the network between slices or
    nodes.
    """
    mesh, near = job.mesh, job.topology.near
    inside = {
        "tensor": _tensor_traffic(job),
        "context": _context_traffic(job),
        "fsdp": _weight_traffic(job),
    }
    totals, reach = [0.0, 0.0], 1
    for axis in (
        "tensor",
        "context",
        "fsdp",
    ):  # from the inside out: what fits into a slice stays there
        reach *= getattr(mesh, axis)
        totals[reach > near] += inside[axis]
    reach *= mesh.data
    totals[reach > near] += _data_traffic(job)
    return totals[0], totals[1]


def _weight_traffic(job: Job) -> float:
    """Over `fsdp` and `context` together: weights gathered for both passes (once where they are
    kept), gradients scattered.

    Head and embedding are gathered once.
    """
    config, mesh, width = job.config, job.mesh, ITEMSIZES[job.compute_dtype]
    arrays = [array for array in model_arrays(config, 1, mesh.tensor) if len(array.shape) == 2]
    layers = sum(array.size for array in arrays if array.in_layer)
    outer = sum(array.size for array in arrays if not array.in_layer)
    times = _FORWARD + (0 if job.remat == "none" else _BACKWARD)
    stored = min(width, ITEMSIZES[job.base_dtype]) if job.rank else width
    gathers = stored * (times * layers + outer)
    gradients = 0.0 if job.rank else width * (layers + outer)
    return job.microbatches * (mesh.stored - 1) / mesh.stored * (gathers + gradients)


def _tensor_traffic(job: Job) -> float:
    """The stream gathered over `tensor` before attention and feed-forward and scattered after them,
    in both passes.

    A gather and a scatter are a sum; gathers are made again where the gathered stream is not kept,
    a scatter where `middle` is not.
    """
    mesh, width = job.mesh, ITEMSIZES[job.compute_dtype]
    sums = 0.0
    for layers, remat in layer_parts(job.remat, job.config.layers):
        sums += layers * (
            4 + (0.0 if remat == "none" else 1.0 if "middle" in saved_names(remat) else 1.5)
        )
    stream = job.chip_tokens * job.config.dim * width
    return job.microbatches * sums * 2 * (mesh.tensor - 1) / mesh.tensor * stream


def _context_traffic(job: Job) -> float:
    """Keys and values of whole sequences gathered in both passes, their gradients scattered."""
    mesh, width = job.mesh, ITEMSIZES[job.compute_dtype]
    keys = (
        2
        * job.config.kv_heads
        * job.config.head_dim
        / mesh.tensor
        * width
        * job.chip_batch_size
        * job.length
    )
    return job.microbatches * job.config.layers * 3 * (mesh.context - 1) / mesh.context * keys


def _data_traffic(job: Job) -> float:
    """Gradients summed over copies of the model."""
    copies, width = job.mesh.data, ITEMSIZES[job.compute_dtype]
    return job.microbatches * 2 * (copies - 1) / copies * trained_size(job) * width


# --- decode ---
#
# Decoding in closed form: memory of weights and cache on a chip, bytes/step moves, the limit that
# they set.


class DecodePlan(NamedTuple):
    """What it takes to generate, each chip with its part of the weights.

    Attributes:
      topology: the chips.
      mesh: `tensor` splits weights, cache and products; `data` the sequences.
      batch: sequences, all chips together.
      length: tokens of prompt and answer together.
      weights: bytes on a chip.
      cache: bytes on a chip, keys and values of full sequences.
      logits: bytes on a chip, float32.
      moved: bytes that a chip reads in a step with full sequences: every matrix once, and the
        cache.
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
        """Of all sequences, at most: at the nominal bandwidth, without the time that chips wait for
        each other.
        """
        return self.batch / self.step

    @property
    def bytes_per_token(self) -> float:
        """Read for one new token, all chips together."""
        return self.moved * math.prod(self.mesh) / self.batch


def decode_mesh(config: LlamaConfig, topology: Topology) -> MeshSizes:
    """The most chips to a copy of the weights that the heads allow, within a slice or node; copies
    on the rest.
    """
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
      batch: sequences at a time, all chips together, a multiple of `data`; `None` for one a copy of
        the model.
      length: tokens of prompt and answer together.
      dtype: of the weights: `bfloat16`, `float32`, `int8` or `int4`.
      cache_dtype: of keys and values; `int8` has a float32 scale a vector.
      mesh: `data` and `tensor`; by default `decode_mesh`.

    Raises:
      InputError: for sequences that copies of the model cannot share, and for other axes of the
        mesh.
    """
    mesh = decode_mesh(config, topology) if mesh is None else mesh
    if mesh.fsdp * mesh.context != 1 or config.kv_heads % mesh.tensor:
        raise InputError(
            f"mesh {mesh} given; decoding takes data and tensor, a divisor of kv_heads "
            f"({config.kv_heads})"
        )
    batch = mesh.data if batch is None else batch
    if batch % mesh.data:
        raise InputError(
            f"batch {batch} given; a multiple of the copies of the model ({mesh.data}) "
            "expected; see --mesh"
        )
    slot = cache_bytes_per_token(config, 1) * (
        ITEMSIZES[cache_dtype] + (4 / config.head_dim if cache_dtype == "int8" else 0)
    )
    weights = weight_bytes(config, dtype, tensor=mesh.tensor)
    sequences = batch // mesh.data
    cache = sequences * length * slot / mesh.tensor
    head = 1 if dtype == "int4" else ITEMSIZES[dtype]  # 4-bit models keep a head of 8 bits
    table = config.vocab_size * config.dim
    read = (ITEMSIZES[dtype] * (matmul_parameters(config) - table) + head * table) / mesh.tensor
    logits = sequences * config.vocab_size * 4 / mesh.tensor
    return DecodePlan(
        topology, mesh, batch, length, weights, cache, logits, read + cache, topology.chip.memory
    )

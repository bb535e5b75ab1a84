"""Memory of one chip in a training step, part by part, in closed form.

What the compiler needs beyond what is kept was fitted to what XLA says of compiled steps (see `tests/planning/test_memory.py`):
of 8B, 70B and 405B for TPUs (of the configs for pods it lies 16 % below to 10 % above: `docs/pods.md`), and of a small model
for CPUs; for GPUs to one training that was seen and to what another asked for (`benchmarks/results/gpu_h200.txt`).
"""

from typing import NamedTuple

from llama_jax.accounting import layer_matrices
from llama_jax.model.remat import layer_parts, saved_names
from llama_jax.planning.job import ITEMSIZES, Job
from llama_jax.planning.remat import all_saved_bytes, recomputed_bytes, score_bytes
from llama_jax.planning.state import frozen_bytes, optimizer_bytes, parameter_bytes, trained_arrays, trained_size

ACCURACY = (
    "within 7 % of what XLA reports of most compiled TPU steps, up to 16 % below on v5e; "
    "within 10 % of small ones on CPUs; "
    "GPUs: fitted to one training that was seen and what another asked for, within 4 % of both; fragmentation is not modelled"
)
# What is alive of the layer that the backward pass is in, over the bytes of its named activations: what one more row adds to a
# compiled step beyond what is kept. TPUs: the difference of two compiled steps of 8B. Others, with attention in plain XLA:
# compiled steps of a small model on CPUs, one and eight, which the closed form meets within 10 %.
_IN_FLIGHT_TPU, _IN_FLIGHT, _IN_FLIGHT_ALONE = 1.14, 3.0, 2.7  # alone: on one device products take all rows as one
# Beyond the state, over this form: 1B with AdamW took 36.2 GB of 30.5 on a GPU, 8B with adapters asked for 36.3 of 31.7.
_ON_GPU = 1.17
_LAYERS_GATHERED = 2  # the one at work and the next, whose weights are on their way
_TABLE_COPIES = 8  # fitted to a compiled step of 8B with two layers, where this is the most at one time
# Copies of what an update makes of the largest array, float32, before it is added: sums over a matrix come between.
_UPDATE_COPIES = {"adamw": 0, "lion": 0, "adafactor": 1, "muon": 3}


class Memory(NamedTuple):
    """Bytes on one chip.

    Attributes:
      parameters: that are trained.
      frozen: weights under adapters.
      optimizer: its state.
      gradients: of what is trained; where micro-batches are added up a sum in float32, too.
      activations: kept for the backward pass, all layers.
      gathered: weights of the layers in use; with remat `none`, of all layers.
      working: the layer at work in the backward pass: gradients of its activations, and what it computes again.
      logits: of one chunk of the loss, and their gradient.
      head: head and embedding gathered for use, and the gradient of the head as it is added up.
      beside: on GPUs, what more than these was found to be taken.
      update: of the optimizer and, just before, of sums of gradients; at another time than activations, gathered, working,
        logits, head and beside.
    """

    parameters: float
    frozen: float
    optimizer: float
    gradients: float
    activations: float
    gathered: float
    working: float
    logits: float
    head: float
    beside: float
    update: float

    @property
    def total(self) -> float:
        """The most at one time."""
        lasting = self.parameters + self.frozen + self.optimizer + self.gradients
        return lasting + max(self.passes + self.beside, self.update)

    @property
    def passes(self) -> float:
        """Of the forward and backward passes, `beside` apart."""
        return self.activations + self.gathered + self.working + self.logits + self.head


def training_memory(job: Job) -> Memory:
    """The memory of one chip in a training step."""
    sums = ITEMSIZES["float32"] if job.microbatches > 1 else 0
    memory = Memory(
        parameters=parameter_bytes(job),
        frozen=frozen_bytes(job),
        optimizer=optimizer_bytes(job),
        gradients=trained_size(job) * (ITEMSIZES[job.param_dtype] + sums),
        activations=_activations(job),
        gathered=_gathered(job),
        working=_working(job),
        logits=job.chunk_tokens * job.config.vocab_size / job.mesh.tensor * (4 + _width(job)),
        head=_head(job),
        beside=0.0,
        update=_UPDATE_COPIES[job.optimizer] * 4 * max(array.size for array in trained_arrays(job)) + _whole_tables(job),
    )
    if job.topology.chip.axes or job.topology.chip.name == "unknown":
        return memory
    statistics = _packed_statistics(job)
    return memory._replace(beside=(_ON_GPU - 1) * (memory.passes + memory.gradients + statistics) + statistics)


def _packed_statistics(job: Job) -> float:
    """What cuDNN's attention keeps for packed rows, where it is used: a logsumexp of the row for each document it may have."""
    packs = job.topology.chip.name != "a100" and job.compute_dtype != "float32" and job.mesh.context == 1
    if not packs or job.config.head_dim > 128 or job.config.head_dim % 8:
        return 0.0
    documents = max(2, job.length // 128)
    kept = sum(layers for layers, remat in layer_parts(job.remat, job.config.layers) if "context" in saved_names(remat))
    return 4 * max(kept, 1) * documents * job.chip_tokens * job.config.heads / job.mesh.tensor


def _width(job: Job) -> int:
    return int(ITEMSIZES[job.compute_dtype])


def _activations(job: Job) -> float:
    config, tensor, width = job.config, job.mesh.tensor, _width(job)
    each = 0.0
    if job.remat == "none":
        each = score_bytes(config, job.length, tensor) + width * job.rank * len(layer_matrices(config))
    return job.chip_tokens * (all_saved_bytes(config, job.remat, width, tensor) + config.layers * each)


def _gathered(job: Job) -> float:
    """Weights in the compute dtype beside the parameters themselves."""
    config, mesh = job.config, job.mesh
    layer = sum(inputs * outputs for inputs, outputs in layer_matrices(config).values()) / mesh.tensor * _width(job)
    stored = job.base_dtype if job.rank else job.param_dtype
    in_place = mesh.stored == 1 and ITEMSIZES[stored] <= _width(job)
    layers = config.layers if job.remat == "none" else min(_LAYERS_GATHERED, config.layers)
    return 0.0 if in_place else layers * layer


def _working(job: Job) -> float:
    """Of the layer that the backward pass is in."""
    config, mesh, width = job.config, job.mesh, _width(job)
    named = recomputed_bytes(config, "full", width, mesh.tensor)
    again = recomputed_bytes(config, job.remat, width, mesh.tensor)
    in_flight = _IN_FLIGHT_TPU if job.topology.chip.axes else _IN_FLIGHT if job.topology.chips > 1 else _IN_FLIGHT_ALONE
    each = in_flight * named + again + score_bytes(config, job.length, mesh.tensor)
    keys = 2 * config.kv_heads * config.head_dim / mesh.tensor * width
    gathered = 2 * keys * job.chip_rows * job.length if mesh.context > 1 else 0.0  # keys and values, and their gradients
    streams = 2 * config.dim * width * (1 - 1 / mesh.tensor)  # what a block gathers of the stream, and its gradient
    return job.chip_tokens * (each + streams) + gathered


def _whole_tables(job: Job) -> float:
    """Behind the layers' backward passes, on TPUs: gradients of head and embedding before each chip has its part alone."""
    if job.rank or not job.topology.chip.axes or job.mesh.stored == 1:
        return 0.0
    return job.config.vocab_size * job.config.dim / job.mesh.tensor * (4 + _TABLE_COPIES * _width(job))


def _head(job: Job) -> float:
    """Head and embedding in the compute dtype; the head's gradient as a chip adds it up in float32, and cast for the others."""
    table = job.config.vocab_size * job.config.dim / job.mesh.tensor
    width = _width(job)
    frozen_here = job.rank and job.mesh.stored == 1
    tables = 0 if frozen_here else 1 if job.config.tied_head else 2
    return table * (tables * width + (0 if job.rank else 4 + width))

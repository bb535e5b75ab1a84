"""Memory of one chip in a training step, part by part, in closed form.

What the compiler needs beyond what is kept was fitted to what XLA says of compiled steps (see
`tests/planning/test_memory.py`): of 8B, 70B and 405B for TPUs (of the configs for pods it lies 16 %
below to 10 % above: `docs/pods.md`), and of a small model for CPUs; for GPUs to one training that
was seen and to what another asked for (`benchmarks/results/gpu_h200.txt`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from llama_jax.accounting import layer_matrices, parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.model.remat import hosted_names, layer_parts, saved_names
from llama_jax.planning.job import ITEMSIZES, Job

# --- state ---
#
# Bytes that a training keeps between two updates: parameters, frozen weights, the state of the
# optimizer; closed form.
#
# Every matrix is split over `fsdp` times `context` times `tensor`, norms are on every chip whole:
# `llama_jax.parallel.sharding`. A test compares with the tree and the shardings that the training
# step itself declares. `stored` is `fsdp` times `context`.


# Adafactor keeps sums of rows and columns where both sides have so many; optax's
# min_dim_size_to_factor
_FACTORED = 128
# The side along which a matrix is gathered, where it is not the one on the residual stream: 0 for
# rows, 1 for columns.
_GATHERED_SIDE = {"embedding": 0, "wo": 0, "down": 0, "wq": 1, "wk": 1, "wv": 1}
_ONTO_STREAM = ("embedding", "wo", "down")  # matrices whose columns are the residual stream


class Array(NamedTuple):
    """An array of parameters, or as many as there are layers.

    Attributes:
      layers: how many there are, or 1.
      shape: of one.
      ways: in which each dimension is split.
      in_layer: whether it is a matrix of a layer, which Muon treats.
    """

    layers: int
    shape: tuple[int, ...]
    ways: tuple[int, ...]
    in_layer: bool

    @property
    def size(self) -> float:
        """Numbers on one chip."""
        total = float(self.layers)
        for size, ways in zip(self.shape, self.ways):
            total *= size / ways
        return total


def model_arrays(config: LlamaConfig, stored: int, tensor: int) -> list[Array]:
    """The arrays of a whole model."""
    layer = parameter_shapes(config)["layers"]
    layers = config.layers
    outer = ("embedding",) if config.tied_head else ("embedding", "head")
    norms = [Array(layers, (config.dim,), (1,), False)] * 2 + [Array(1, (config.dim,), (1,), False)]
    found = [
        Array(1, shape, _ways(name, shape, stored, tensor), False)
        for name, shape in parameter_shapes(config).items()
        if name in outer
    ]
    for name, shape in {**layer["attention"], **layer["feed_forward"]}.items():
        found.append(Array(layers, shape[1:], _ways(name, shape[1:], stored, tensor), True))
    return found + norms


def _ways(name: str, shape: tuple[int, int], stored: int, tensor: int) -> tuple[int, int]:
    """How a matrix is split: its side on the residual stream by `fsdp` and `context`, the other by
    `tensor`.

    What is split only to be stored goes to the side by which the parts are gathered, where the mesh
    divides that.
    """
    ways = (tensor, stored) if name in _ONTO_STREAM else (stored, tensor)
    side = _GATHERED_SIDE.get(name)
    if side is None or shape[side] % (stored * tensor):
        return ways
    return (1, stored * tensor) if side else (stored * tensor, 1)


def adapter_arrays(config: LlamaConfig, rank: int, stored: int, tensor: int) -> list[Array]:
    """The factors of adapters of a rank on all matrices of the layers."""
    found = []
    for name, (inputs, outputs) in layer_matrices(config).items():
        first, second = (tensor, stored) if name in _ONTO_STREAM else (stored, tensor)
        found += [
            Array(config.layers, (inputs, rank), (first, 1), True),
            Array(config.layers, (rank, outputs), (1, second), True),
        ]
    return found


def trained_arrays(job: Job) -> list[Array]:
    """What an update changes."""
    stored, tensor = job.mesh.stored, job.mesh.tensor
    return (
        adapter_arrays(job.config, job.rank, stored, tensor)
        if job.rank
        else model_arrays(job.config, stored, tensor)
    )


def trained_size(job: Job) -> float:
    """Numbers on one chip that an update changes."""
    return sum(array.size for array in trained_arrays(job))


def parameter_bytes(job: Job) -> float:
    """Bytes of the trained parameters, on one chip."""
    return trained_size(job) * ITEMSIZES[job.param_dtype]


def frozen_bytes(job: Job) -> float:
    """Bytes of the frozen model under adapters, on one chip; 0 without adapters."""
    if not job.rank:
        return 0.0
    return weight_bytes(job.config, job.base_dtype, job.mesh.stored, job.mesh.tensor)


def weight_bytes(config: LlamaConfig, dtype: str, stored: int = 1, tensor: int = 1) -> float:
    """Bytes on one chip of a model that is not trained, in a float type or quantised (see
    `llama_jax.model.quantize`).

    Quantised, every matrix has a float32 scale a channel; 4-bit ones an 8-bit number for each 32
    weights, too; embedding and head hold 8 bits; norms stay in bfloat16.
    """
    if dtype in ("float32", "bfloat16"):
        return sum(array.size for array in model_arrays(config, stored, tensor)) * ITEMSIZES[dtype]
    total = 0.0
    for array in model_arrays(config, stored, tensor):
        if len(array.shape) == 1:
            total += array.size * 2
        elif array.in_layer:
            groups = 1 / 32 if dtype == "int4" else 0
            total += array.size * (ITEMSIZES[dtype] + groups + 4 / array.shape[0])
        else:
            total += array.size * (1 + 4 / config.dim)
    return total


def optimizer_bytes(job: Job) -> float:
    """Bytes of the optimizer's state on one chip, without its counters of a few bytes."""
    mean = ITEMSIZES[job.moment_dtype]
    return sum(sum(_moments(array, job.optimizer, mean)) for array in trained_arrays(job))


def _moments(array: Array, optimizer: str, mean: float) -> Iterator[float]:
    """Bytes of each part of the state that belongs to an array: the mean of its gradient, of the
    square, and their like.
    """
    if optimizer == "adafactor":
        yield 4 * _factored_size(array)
        return
    yield mean * array.size
    if optimizer == "adamw" or (optimizer == "muon" and not array.in_layer):
        yield 4 * array.size


def _factored_size(array: Array) -> float:
    """Numbers that Adafactor keeps: sums over rows and over columns, or all squares; and a
    number for each part left out.
    """
    factored = len(array.shape) == 2 and min(array.shape) >= _FACTORED
    if not factored:
        return array.size + 2 * array.layers
    (rows, columns), (first, second) = array.shape, array.ways
    return array.layers * (rows / first + columns / second + 1)


# --- remat ---
#
# The activations that rematerialization keeps of a layer for the backward pass, in bytes, and the
# FLOPs that it computes again, in FLOPs.


_SHORT_SCORES = 512 * 512  # up to here attention keeps its scores, see `llama_jax.model.attention`
_ROOT_BYTES = (
    2 * 4
    # of one token and layer: both norms keep the root of the mean square, float32, whatever else is
    # kept
)
_SCORE_BYTES = 26  # of each: five arrays in float32, two masks, the softmax in the compute dtype


def activation_bytes(config: LlamaConfig, itemsize: int, tensor: int = 1) -> dict[str, float]:
    """Bytes of each named activation of one token in one layer, on one of `tensor` devices that
    share the heads.

    `context` brings along the float32 logsumexp of each head; of `middle`, as of the stream between
    blocks, each of the devices has some tokens.
    """
    query, key = config.heads * config.head_dim / tensor, config.kv_heads * config.head_dim / tensor
    ffn, heads = config.ffn_dim / tensor, config.heads / tensor
    wide = {
        "q": query,
        "k": key,
        "v": key,
        "context": query,
        "middle": config.dim / tensor,
        "gate": ffn,
        "up": ffn,
    }
    return {
        name: size * itemsize + (4 * heads if name == "context" else 0)
        for name, size in wide.items()
    }


def saved_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes that one layer keeps of one token for the backward pass: its input, what `remat` names,
    and the roots in its norms.

    `none` keeps all that differentiation asks for, which is more than the names: both norms in
    float32 (before and after scaling) with the roots of their mean squares, the normed streams, and
    six arrays as wide as the feed-forward layer.

    Args:
      config: the architecture.
      remat: setting of `compute.remat`, without split.
      itemsize: bytes of a number of the activations.
      tensor: devices that share heads and feed-forward channels.
    """
    each = activation_bytes(config, itemsize, tensor)
    if remat != "none":
        here = saved_names(remat) - hosted_names(remat)
        return (config.dim * itemsize + _ROOT_BYTES) / tensor + sum(each[name] for name in here)
    streams = (
        config.dim * (4 * 4 / tensor + 2 * itemsize) + 16 / tensor
    )  # blocks gather what they have normed
    return (
        streams
        + each["q"]
        + each["k"]
        + each["v"]
        + each["context"]
        + 3 * (each["gate"] + each["up"])
    )


def all_saved_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes that all layers keep of one token; the setting may be a split."""
    parts = layer_parts(remat, config.layers)
    return sum(count * saved_bytes(config, each, itemsize, tensor) for count, each in parts)


def hosted_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes that all layers keep of one token in the memory of the host, by `remat`, which may be a
    split.
    """
    each = activation_bytes(config, itemsize, tensor)
    parts = layer_parts(remat, config.layers)
    return sum(count * sum(each[name] for name in hosted_names(part)) for count, part in parts)


def recomputed_bytes(config: LlamaConfig, remat: str, itemsize: int, tensor: int = 1) -> float:
    """Bytes of the named activations of one token that the backward pass makes again, in a layer
    that keeps least.
    """
    kept = frozenset.intersection(
        *(saved_names(each) for _, each in layer_parts(remat, config.layers))
    )
    return sum(
        size
        for name, size in activation_bytes(config, itemsize, tensor).items()
        if name not in kept
    )


def score_bytes(config: LlamaConfig, length: int, tensor: int = 1) -> float:
    """Bytes of one token's scores, masks and softmax in one layer, where sequences are short enough
    for attention to keep them.
    """
    return (
        _SCORE_BYTES * config.heads / tensor * length if length * length <= _SHORT_SCORES else 0.0
    )


def recomputed_flops(config: LlamaConfig, remat: str, length: int) -> int:
    """FLOPs of one token, all layers, that the backward pass does a second time; attention counted
    as causal.

    The product with `down` is never among them: nothing in the backward pass needs what it gives.
    """
    dim = config.dim
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    costs = {
        "q": 2 * dim * query,
        "k": 2 * dim * key,
        "v": 2 * dim * key,
        "context": 2 * query * length,
        "middle": 2 * query * dim,
        "gate": 2 * dim * config.ffn_dim,
        "up": 2 * dim * config.ffn_dim,
    }
    parts = [(count, saved_names(each)) for count, each in layer_parts(remat, config.layers)]
    return sum(
        count * sum(cost for name, cost in costs.items() if name not in kept)
        for count, kept in parts
    )


# --- memory ---


ACCURACY = (
    "within 7 % of what XLA reports of most compiled TPU steps, up to 16 % below on v5e; "
    "within 10 % of small ones on CPUs; "
    "GPUs: fitted to one training that was seen and what another asked for, within 4 % "
    "of both; fragmentation is not modelled"
)
# What is alive of the layer that the backward pass is in, over the bytes of its named activations:
# what one more sequence adds to a compiled step beyond what is kept. TPUs: the difference of two
# compiled steps of 8B. Others, with
#   attention in plain XLA:
# compiled steps of a small model on CPUs, one and eight, which the closed form meets within 10 %.
_IN_FLIGHT_TPU, _IN_FLIGHT, _IN_FLIGHT_ALONE = (
    1.14,
    3.0,
    2.7,
)  # alone: on one device products take all sequences as one
# Beyond the state, over this form: 1B with AdamW took 36.2 GB of 30.5 on a GPU, 8B with adapters
# asked for 36.3 of 31.7.
_ON_GPU = 1.17
_LAYERS_GATHERED = 2  # the one at work and the next, whose weights are on their way
_TABLE_COPIES = (
    8  # fitted to a compiled step of 8B with two layers, where this is the most at one time
)
# Copies of what an update makes of the largest array, float32, before it is added: sums over a
# matrix come between.
_UPDATE_COPIES = {"adamw": 0, "lion": 0, "adafactor": 1, "muon": 3}


class Memory(NamedTuple):
    """Bytes on one chip.

    Attributes:
      parameters: that are trained.
      frozen: weights under adapters.
      optimizer: its state.
      gradients: of the trained parameters; where micro-batches are added up a sum in float32, too.
      activations: kept for the backward pass, all layers.
      gathered: weights of the layers in use; with remat `none`, of all layers.
      working: the layer at work in the backward pass: gradients of its activations, and what it
        computes again.
      logits: of one chunk of the loss, and their gradient.
      head: head and embedding gathered for use, and the gradient of the head as it is added up.
      beside: on GPUs, what more than these was found to be taken.
      update: of the optimizer and, just before, of sums of gradients; at another time than
        activations, gathered, working, logits, head and beside.
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
        update=_UPDATE_COPIES[job.optimizer] * 4 * max(array.size for array in trained_arrays(job))
        + _whole_tables(job),
    )
    if job.topology.chip.axes or job.topology.chip.name == "unknown":
        return memory
    statistics = _packed_statistics(job)
    return memory._replace(
        beside=(_ON_GPU - 1) * (memory.passes + memory.gradients + statistics) + statistics
    )


def _packed_statistics(job: Job) -> float:
    """What cuDNN's attention keeps for packed sequences, where it is used: a logsumexp of the
    sequence for each document it may have.
    """
    packs = (
        job.topology.chip.name != "a100"
        and job.compute_dtype != "float32"
        and job.mesh.context == 1
    )
    if not packs or job.config.head_dim > 128 or job.config.head_dim % 8:
        return 0.0
    documents = max(2, job.length // 128)
    kept = sum(
        layers
        for layers, remat in layer_parts(job.remat, job.config.layers)
        if "context" in saved_names(remat)
    )
    return 4 * max(kept, 1) * documents * job.chip_tokens * job.config.heads / job.mesh.tensor


def _width(job: Job) -> int:
    return int(ITEMSIZES[job.compute_dtype])


def _activations(job: Job) -> float:
    config, tensor, width = job.config, job.mesh.tensor, _width(job)
    each = 0.0
    if job.remat == "none":
        each = score_bytes(config, job.length, tensor) + width * job.rank * len(
            layer_matrices(config)
        )
    return job.chip_tokens * (
        all_saved_bytes(config, job.remat, width, tensor) + config.layers * each
    )


def _gathered(job: Job) -> float:
    """Weights in the compute dtype beside the parameters themselves."""
    config, mesh = job.config, job.mesh
    layer = (
        sum(inputs * outputs for inputs, outputs in layer_matrices(config).values())
        / mesh.tensor
        * _width(job)
    )
    stored = job.base_dtype if job.rank else job.param_dtype
    in_place = mesh.stored == 1 and ITEMSIZES[stored] <= _width(job)
    layers = config.layers if job.remat == "none" else min(_LAYERS_GATHERED, config.layers)
    return 0.0 if in_place else layers * layer


def _working(job: Job) -> float:
    """Of the layer that the backward pass is in."""
    config, mesh, width = job.config, job.mesh, _width(job)
    named = recomputed_bytes(config, "full", width, mesh.tensor)
    again = recomputed_bytes(config, job.remat, width, mesh.tensor)
    in_flight = (
        _IN_FLIGHT_TPU
        if job.topology.chip.axes
        else _IN_FLIGHT
        if job.topology.chips > 1
        else _IN_FLIGHT_ALONE
    )
    each = in_flight * named + again + score_bytes(config, job.length, mesh.tensor)
    keys = 2 * config.kv_heads * config.head_dim / mesh.tensor * width
    gathered = (
        2 * keys * job.chip_batch_size * job.length if mesh.context > 1 else 0.0
    )  # keys and values, and their gradients
    streams = (
        2 * config.dim * width * (1 - 1 / mesh.tensor)
    )  # what a block gathers of the stream, and its gradient
    return job.chip_tokens * (each + streams) + gathered


def _whole_tables(job: Job) -> float:
    """Behind the layers' backward passes, on TPUs: gradients of head and embedding before each chip
    has its part alone.
    """
    if job.rank or not job.topology.chip.axes or job.mesh.stored == 1:
        return 0.0
    return (
        job.config.vocab_size * job.config.dim / job.mesh.tensor * (4 + _TABLE_COPIES * _width(job))
    )


def _head(job: Job) -> float:
    """Head and embedding in the compute dtype; the head's gradient as a chip adds it up in float32,
    and cast for the others.
    """
    table = job.config.vocab_size * job.config.dim / job.mesh.tensor
    width = _width(job)
    frozen_here = job.rank and job.mesh.stored == 1
    tables = 0 if frozen_here else 1 if job.config.tied_head else 2
    return table * (tables * width + (0 if job.rank else 4 + width))

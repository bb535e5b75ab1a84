"""Bytes that a training keeps between two updates: parameters, frozen weights, the state of the optimizer; closed form.

Every matrix is split over `fsdp` times `context` times `tensor`, norms are on every chip whole: `llama_jax.parallel.sharding`.
A test compares with the tree and the shardings that the training step itself declares. `stored` is `fsdp` times `context`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llama_jax.accounting import layer_matrices, parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.planning.job import ITEMSIZES, Job

_FACTORED = 128  # Adafactor keeps sums of rows and columns where both sides have so many; optax's min_dim_size_to_factor
# The side along which a matrix is gathered, where it is not the one on the residual stream: 0 for rows, 1 for columns.
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
    found = [Array(1, shape, _ways(name, shape, stored, tensor), False) for name, shape in parameter_shapes(config).items()
             if name in outer]  # fmt: skip
    for name, shape in {**layer["attention"], **layer["feed_forward"]}.items():
        found.append(Array(layers, shape[1:], _ways(name, shape[1:], stored, tensor), True))
    return found + norms


def _ways(name: str, shape: tuple[int, int], stored: int, tensor: int) -> tuple[int, int]:
    """How a matrix is split: its side on the residual stream by `fsdp` and `context`, the other by `tensor`.

    What is split only to be stored goes to the side by which the parts are gathered, where the mesh divides that.
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
    return adapter_arrays(job.config, job.rank, stored, tensor) if job.rank else model_arrays(job.config, stored, tensor)


def trained_size(job: Job) -> float:
    """Numbers on one chip that an update changes."""
    return sum(array.size for array in trained_arrays(job))


def parameter_bytes(job: Job) -> float:
    """Bytes of what is trained, on one chip."""
    return trained_size(job) * ITEMSIZES[job.param_dtype]


def frozen_bytes(job: Job) -> float:
    """Bytes of the frozen model under adapters, on one chip; 0 without adapters."""
    if not job.rank:
        return 0.0
    return weight_bytes(job.config, job.base_dtype, job.mesh.stored, job.mesh.tensor)


def weight_bytes(config: LlamaConfig, dtype: str, stored: int = 1, tensor: int = 1) -> float:
    """Bytes on one chip of a model that is not trained, in a float type or quantised (see `llama_jax.model.quantize`).

    Quantised, every matrix has a float32 scale a channel; 4-bit ones an 8-bit number for each 32 weights, too; embedding and
    head hold 8 bits; norms stay in bfloat16.
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
    """Bytes of each part of the state that belongs to an array: the mean of its gradient, of the square, and their like."""
    if optimizer == "adafactor":
        yield 4 * _factored_size(array)
        return
    yield mean * array.size
    if optimizer == "adamw" or (optimizer == "muon" and not array.in_layer):
        yield 4 * array.size


def _factored_size(array: Array) -> float:
    """Numbers that Adafactor keeps: sums over rows and over columns, or all squares; and a number for each part left out."""
    factored = len(array.shape) == 2 and min(array.shape) >= _FACTORED
    if not factored:
        return array.size + 2 * array.layers
    (rows, columns), (first, second) = array.shape, array.ways
    return array.layers * (rows / first + columns / second + 1)

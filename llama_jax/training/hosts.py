"""The batch of a step on all devices of all hosts, each host reading the rows of its own devices only; the step to end at."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from llama_jax.data.batch import Batch
from llama_jax.data.batches import Batches


def row_numbers(rows: int, micro_rows: int, unit: int) -> np.ndarray:
    """Which rows of a batch each micro-batch holds, `[A, B/A]`: the units are dealt out in turn.

    So a host that holds the same rows of every micro-batch reads neighbouring rows, and pairs stay together.
    """
    return (
        np.arange(rows, dtype=np.int64)
        .reshape(micro_rows // unit, rows // micro_rows, unit)
        .swapaxes(0, 1)
        .reshape(-1, micro_rows)
    )


def global_batch(batches: Batches, step: int, micro_rows: int, sharding: NamedSharding) -> Batch:
    """The batch of a step as micro-batches `[A, B/A, T]`, sharded over the devices of all processes.

    Args:
      batches: the same on every process.
      step: from 0.
      micro_rows: rows of a micro-batch; divides the rows of the batch.
      sharding: of the result.
    """
    numbers = row_numbers(batches.rows_at(step), micro_rows, batches.unit)
    return placed_rows(functools.partial(batches.chosen_rows, step), numbers, batches.length, sharding)


def placed_rows(read: Callable[[np.ndarray], Batch], numbers: np.ndarray, length: int, sharding: NamedSharding) -> Batch:
    """Sequences by their numbers, sharded over the devices of all processes; each process reads those of its own devices.

    Args:
      read: from numbers to sequences; the same on every process.
      numbers: of the sequences, of any shape, such as `[A, B/A]`.
      length: `T`, tokens of a sequence.
      sharding: of the result, `[*numbers.shape, T]`.
    """
    shape = (*numbers.shape, length)
    done: dict[tuple, Batch] = {}

    def part(field: int, index: tuple[slice, ...]) -> np.ndarray:
        """A field of the sequences that one device holds; devices that hold the same ones share them."""
        wanted = numbers[index[:-1]]
        key = wanted.shape, wanted.tobytes()
        if key not in done:
            done[key] = read(wanted.ravel())
        return done[key][field].reshape(*wanted.shape, -1)[..., index[-1]]

    fields = range(len(Batch._fields))
    return Batch(*[jax.make_array_from_callback(shape, sharding, functools.partial(part, field)) for field in fields])


def preempted(step: int) -> bool:
    """Whether the processes of a run are to end after this step, as JAX's preemption service has found them to agree.

    To be asked by all after every step. It looks at the process alone, until one of them has been given SIGTERM.
    """
    return multihost_utils.reached_preemption_sync_point(step)

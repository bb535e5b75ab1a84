"""Copies of the same numbers on several devices, compared: where they differ, a device computes wrongly."""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llama_jax.axes import Array, PyTree
from llama_jax.errors import DivergedError
from llama_jax.parallel.sharding import replicated
from llama_jax.weights.checksum import by_path, fold


class Difference(NamedTuple):
    """Devices that hold another content than most of those with the same part of an array.

    Attributes:
      path: of the array.
      devices: that differ.
      others: that agree with each other.
    """

    path: str
    devices: tuple[jax.Device, ...]
    others: tuple[jax.Device, ...]

    def __str__(self) -> str:
        odd, rest = (", ".join(map(str, devices)) for devices in (self.devices, self.others))
        return f"{self.path} on {odd} is not what it is on {rest}"


def require_equal_replicas(params: PyTree, mesh: Mesh, step: int) -> None:
    """Compares the copies of parameters on different devices.

    Raises:
      DivergedError: naming the step, the first parameter whose copies differ, and the devices.
    """
    found = differing_replicas({"params": params}, mesh)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DivergedError(
            f"step {step}: {found[0]}{more}: a device or its memory is at fault; go on without it from the last checkpoint"
        )


def differing_replicas(tree: PyTree, mesh: Mesh) -> list[Difference]:
    """Compares every part of every array that several devices hold, by checksum; each device reads its own memory only.

    Of two copies nobody can say which one is wrong: both are named.

    Args:
      tree: arrays with shardings over the mesh.
      mesh: the devices.
    """
    arrays = by_path(tree)
    sums = jax.device_get(_program(mesh, tuple(leaf.sharding.spec for leaf in arrays.values()))(list(arrays.values())))
    found = []
    for (path, leaf), rows in zip(arrays.items(), sums):
        holders: dict[str, list[int]] = collections.defaultdict(list)
        places = leaf.sharding.devices_indices_map(leaf.shape)
        for number, device in enumerate(mesh.devices.flat):
            holders[str(places[device])].append(number)
        odd = [difference for numbers in holders.values() for difference in _odd(path, rows, numbers, mesh)]
        found += odd
    return found


def _odd(path: str, rows: np.ndarray, numbers: list[int], mesh: Mesh) -> list[Difference]:
    """The difference among devices (by their numbers in the mesh) that hold the same part, if there is one."""
    kinds: dict[bytes, list[jax.Device]] = collections.defaultdict(list)
    for number in numbers:
        kinds[rows[number].tobytes()].append(mesh.devices.flat[number])
    if len(kinds) == 1:
        return []
    most, *rest = sorted(kinds.values(), key=len, reverse=True)
    return [Difference(path, tuple(device for kind in rest for device in kind), tuple(most))]


@functools.lru_cache(maxsize=4)
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[Array]], list[Array]]:
    """From arrays to the two sums of what each device holds of them: `[devices, 2]` in the order of the mesh, everywhere."""
    each = jax.shard_map(
        lambda parts: [fold(part)[None] for part in parts],
        mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(mesh.axis_names), check_vma=False,
    )  # fmt: skip
    return jax.jit(each, out_shardings=replicated(mesh))

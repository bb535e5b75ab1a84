"""The mesh: devices arranged along the named axes `data`, `fsdp`, `context` and `tensor`."""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.errors import InputError

# The last one has the nearest neighbours: `tensor` communicates in every product, `context` once a
# layer, `data` once a step.
MESH_AXES = ("data", "fsdp", "context", "tensor")


def resolve_sizes(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes, with at most one -1 replaced by the remaining number of devices.

    Raises:
      InputError: when the product does not come to the number of devices.
    """
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {tuple(sizes)}: positive numbers and at most one -1 expected")
    if devices % known or (-1 not in sizes and known != devices):
        shown = " * ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes))
        raise InputError(
            f"mesh {shown} does not make up the {devices} devices here; set one axis to "
            "-1 to take the rest"
        )
    return tuple(devices // known if size == -1 else size for size in sizes)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    context: int = 1,
) -> Mesh:
    """A mesh over `devices` (all by default), ordered by the physical topology; -1 takes what the
    others leave.

    Devices of several slices (or GPUs of several nodes), which a slower network joins, are cut
    along the outermost axis that they divide: `data`, where it is a multiple of their number. Use
    it as `with jax.set_mesh(mesh):`.

    Raises:
      InputError: when the sizes do not make up the number of devices, or the slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = resolve_sizes([data, fsdp, context, tensor], len(devices))
    # Automatic axes: the compiler partitions, the two tables only pin parameters and activations.
    #   (Explicit axes,
    # the default of jax.make_mesh, do not work inside linen's scan.)
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array of these sizes, neighbours in it near each other."""
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return _laid_out(sizes, devices)
    if len(set(slices.values())) > 1:
        counts = ", ".join(f"{count} in slice {index}" for index, count in sorted(slices.items()))
        raise InputError(f"mesh: slices of one size expected, devices are {counts}")
    outer = across_slices(sizes, len(slices))
    inner = [size // parts for size, parts in zip(sizes, outer)]
    found = np.empty(sizes, object)
    for index, place in zip(sorted(slices), np.ndindex(*outer)):
        corner = tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, inner))
        found[corner] = _laid_out(
            inner, [device for device in devices if getattr(device, "slice_index", 0) == index]
        )
    return found


def _laid_out(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice: each axis along whole axes of the torus where that goes, else along
    parts of them.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices=devices)
    except NotImplementedError:  # such as 8 chips for an axis of a slice of 4x4
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)


def across_slices(sizes: Sequence[int], slices: int) -> tuple[int, ...]:
    """In how many parts the slices cut each axis, the outermost first: of `data` as many as divide
    it.

    Raises:
      InputError: when the axes cannot be cut into this many slices.
    """
    parts, left = [], slices
    for size in sizes:
        parts.append(math.gcd(size, left))
        left //= parts[-1]
    if left > 1:
        shown = " * ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes))
        raise InputError(
            f"mesh {shown} cannot be cut along {slices} slices; set mesh.data to "
            f"{slices} or a multiple of it"
        )
    return tuple(parts)

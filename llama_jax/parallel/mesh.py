"""The mesh: devices arranged along the named axes `data`, `fsdp`, `context` and `tensor`."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.errors import InputError

# The last one has the nearest neighbours: `tensor` communicates in every product, `context` once a layer, `data` once a step.
MESH_AXES = ("data", "fsdp", "context", "tensor")


def resolve_sizes(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes, with at most one -1 replaced by what the number of devices leaves.

    Raises:
      InputError: when the product does not come to the number of devices.
    """
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {tuple(sizes)}: positive numbers and at most one -1 expected")
    if devices % known or (-1 not in sizes and known != devices):
        shown = " * ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes))
        raise InputError(f"mesh {shown} does not make up the {devices} devices here; set one axis to -1 to take the rest")
    return tuple(devices // known if size == -1 else size for size in sizes)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, context: int = 1
) -> Mesh:
    """A mesh over `devices` (all by default), ordered by the physical topology; -1 takes what the others leave.

    Use it as `with jax.set_mesh(mesh):`.

    Raises:
      InputError: when the sizes do not make up the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = resolve_sizes([data, fsdp, context, tensor], len(devices))
    try:
        arranged = mesh_utils.create_device_mesh(sizes, devices=devices)
    except NotImplementedError:  # an axis smaller than those of the torus, such as tensor=2 in 8x8x8
        arranged = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    # Automatic axes: the compiler partitions, the two tables only pin parameters and activations. (Explicit axes,
    # the default of jax.make_mesh, do not work inside linen's scan.)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

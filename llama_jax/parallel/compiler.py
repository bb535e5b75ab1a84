"""Options of XLA's compiler by device and purpose, passed with a program and not through the
environment.

Measured on programs compiled for TPUs, never run (`docs/performance.md`):

- `sparse_core_collective_offload`: gathers and scatters run beside the products, on another core,
  and gradients are reduce-scattered; without it every gradient is summed whole, on every device,
  while the products wait.
- `scoped_vmem_limit`: memory on the chip for one kernel; products come to 98 % of the peak in the
  compiler's estimate, from 75 %, and attention in blocks of 2,048 fits.
- `disable_hlo_passes`: a pass that moves sums over devices out of loops gives up a step of several
  micro-batches on v4, v5e and v5p with an error of its own (libtpu 0.0.50:
  `while_loop_all_reduce_code_motion.cc: user->opcode() == HloOpcode::kAdd`).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_SCATTERS = {
    _OFFLOAD + "all_gather": "true",
    _OFFLOAD + "reduce_scatter": "true",
    _OFFLOAD + "nd_reduce_scatter": "true",
}
_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
_LOOPS = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
# By the beginning of `device_kind`; the first that fits counts. v5e has no SparseCore.
_TRAINING: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("TPU v5 lite", {**_LOOPS, "xla_tpu_scoped_vmem_limit_kib": "65536"}),
    ("TPU v5e", {**_LOOPS, "xla_tpu_scoped_vmem_limit_kib": "65536"}),
    ("TPU v5", {**_LOOPS, **_MEMORY, **_SCATTERS, _OFFLOAD + "3d_all_gather": "true"}),
    ("TPU v6", {**_LOOPS, **_MEMORY, **_SCATTERS, _OFFLOAD + "2d_all_gather": "true"}),
    ("TPU", _LOOPS),
)
_MATRIX_UNITS = (("TPU v6", 256), ("TPU", 128))


def matrix_unit() -> int:
    """Side of the matrix unit of the TPUs of the mesh set by `jax.set_mesh`; 0 without a mesh or
    TPUs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device else ""
    return next((side for name, side in _MATRIX_UNITS if kind.startswith(name)), 0)


def training_options(mesh: Mesh) -> dict[str, str]:
    """What a training step is compiled with for the devices of a mesh, as far as their compiler
    knows it.
    """
    device = mesh.devices.flat[0]
    wanted = next(
        (options for kind, options in _TRAINING if device.device_kind.startswith(kind)), None
    )
    return accepted(tuple(wanted.items()), device) if wanted else {}


@functools.lru_cache
def accepted(options: tuple[tuple[str, str], ...], device: jax.Device) -> dict[str, str]:
    """The options that the compiler for a device takes, found by compiling a small program with
    each.
    """
    alone = Mesh(np.array([device]), ("one",))
    with jax.set_mesh(alone):
        small = jax.ShapeDtypeStruct(
            (8, 128), jnp.float32, sharding=NamedSharding(alone, PartitionSpec())
        )
        program = jax.jit(jnp.negative).lower(small)

    def takes(given: Mapping[str, str]) -> bool:
        """Whether a program compiles with these."""
        try:
            program.compile(compiler_options=dict(given))
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return (
        dict(options)
        if takes(dict(options))
        else {name: value for name, value in options if takes({name: value})}
    )

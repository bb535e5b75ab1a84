"""Whether devices compute and talk to each other as they should: a product on each, a sum over all."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_SIDE = 256  # of the matrices that are multiplied
_ROWS = 1 << 18  # float32 numbers a device that are summed: 1 MiB


class CollectiveTest(NamedTuple):
    """What came out.

    Attributes:
      wrong: `device_kind` and number of the devices whose product or sum is not what it should be.
      seconds: of one sum over all devices, compiled before.
    """

    wrong: list[str]
    seconds: float


def collective_test(devices: Sequence[jax.Device]) -> CollectiveTest:
    """Multiplies on every device and sums over all of them, compared with NumPy; small whole numbers, so exactly."""
    wrong = {str(device) for device in devices if not _multiplies(device)}
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    addends = np.repeat(np.arange(1, len(devices) + 1, dtype=np.float32), _ROWS)
    shards = jax.device_put(addends, NamedSharding(mesh, PartitionSpec("all")))
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all")[None], mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec("all")
        )
    )
    jax.block_until_ready(total(shards))
    start = time.perf_counter()
    sums = jax.block_until_ready(total(shards))
    seconds = time.perf_counter() - start
    expected = len(devices) * (len(devices) + 1) / 2
    wrong |= {str(shard.device) for shard in sums.addressable_shards if not np.all(np.asarray(shard.data) == expected)}
    return CollectiveTest(sorted(wrong), seconds)


def _multiplies(device: jax.Device) -> bool:
    """Whether a device gets a product of small whole numbers exactly right, which every precision holds."""
    rows = np.arange(_SIDE * _SIDE).reshape(_SIDE, _SIDE)
    a, b = (rows * 7 % 3 - 1).astype(np.float32), (rows * 5 % 3 - 1).astype(np.float32)
    product = jnp.matmul(jax.device_put(a, device), jax.device_put(b, device))
    return bool(np.array_equal(np.asarray(product), a @ b))

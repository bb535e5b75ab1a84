"""Before the first compile: whether all processes of a run are the same program with the same
config on the same data.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.axes import Array, PyTree
from llama_jax.errors import DivergedError
from llama_jax.parallel.hosts import Hosts, numbers
from llama_jax.parallel.sharding import replicated
from llama_jax.storage import atomic_write
from llama_jax.training.config import TrainConfig
from llama_jax.weights.integrity import by_path, fold

RUN_HOSTS = "hosts.json"  # in a run's directory: what each process said of itself at the last start

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_OWN = ("distributed",)  # sections of the config in which processes differ
_SHOWN = 3  # differences told in the one line
_VISIBLE_SECONDS = 30  # a shared file system may show a new file late


def describe_program(config: TrainConfig) -> dict[str, str]:
    """What a process is, but for its data: versions, the revision of the sources where git knows
    it, every config value.
    """
    from llama_jax import __version__

    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {"python": platform.python_version(), "llama_jax": __version__, **_revision()}
    return (
        own | versions | {f"config {key}": value for key, value in _flat(_shared(config)).items()}
    )


def describe_devices() -> dict[str, str]:
    """The devices of this process; JAX meets them here at the latest, on all processes at a
    time.
    """
    devices = jax.local_devices()
    return {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def require_same(hosts: Hosts, name: str, said: Mapping[str, str]) -> None:
    """Compares what all processes say of themselves.

    Args:
      hosts: of the run.
      name: of the meeting.
      said: by this process, item by item.

    Raises:
      AgreedStop: on all of them, naming which process differs in which item.
    """
    found = differences([json.loads(text) for text in hosts.gather(name, json.dumps(said))])
    if found:
        hosts.fail(f"the processes are not alike: {'; '.join(found)}")


def require_same_data(hosts: Hosts, metadata: Mapping, directory: Path) -> None:
    """Compares the data and devices of all processes, and whether they share the run's directory.

    Raises:
      AgreedStop: on all of them, see `require_same` and `require_shared`.
    """
    if hosts.count == 1:
        return
    said = describe_devices() | _flat(metadata)
    require_same(hosts, "data", said)
    require_shared(hosts, directory, {"host": platform.node()} | said)


def differences(said: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines on the items that are not the same everywhere: who differs from most, or from process 0
    where there is no most.
    """
    lines = []
    for item in dict.fromkeys(key for one in said for key in one):
        values = [one.get(item, "nothing") for one in said]
        counts = collections.Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        for value in counts:
            if value != usual:
                who = numbers(
                    [number for number, one in enumerate(values) if one == value], len(said)
                )
                lines.append(f"{who} has {item} {value:.60}, the others {usual:.60}")
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"{more} more differences"] if more > 0 else [])


def require_shared(hosts: Hosts, directory: Path, said: Mapping[str, str]) -> None:
    """Writes what each process is into the run's directory, where all must find it: it is to be the
    same directory.

    Raises:
      AgreedStop: on all of them, naming a process that does not see what process 0 writes.
    """
    processes = [json.loads(one) for one in hosts.gather("hosts", json.dumps(said))]
    content = hosts.agree("hosts file", json.dumps({"time": time.time(), "processes": processes}))
    if hosts.first:
        with atomic_write(directory / RUN_HOSTS) as file:
            file.write(content.encode())
    hosts.wait("hosts file written")
    if not hosts.first and not _appears(directory / RUN_HOSTS, content.encode()):
        who = f"run.dir: process {hosts.process}"
        hosts.fail(
            f"{who} does not see what process 0 writes in {directory}; name a directory "
            "that all share"
        )
    hosts.wait("hosts file seen")


def _appears(path: Path, content: bytes) -> bool:
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (path.is_file() and path.read_bytes() == content):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _shared(config: TrainConfig) -> dict:
    return {
        name: section for name, section in dataclasses.asdict(config).items() if name not in _OWN
    }


def _flat(values: Mapping, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": str(value)}
        )
    return flat


def _revision() -> dict[str, str]:
    """The commit of our own sources and whether they were changed since, where they lie in a git
    repository.
    """
    root = Path(__file__).parents[1]
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"revision": done.stdout.strip()} if done.returncode == 0 else {}


# --- replicas ---
#
# Copies of the same numbers on several devices, compared: where they differ, a device computes
# wrongly.


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
        return f"{self.path} on {odd} differs from {rest}"


def require_equal_replicas(params: PyTree, mesh: Mesh, step: int) -> None:
    """Compares the copies of parameters on different devices.

    Raises:
      DivergedError: naming the step, the first parameter whose copies differ, and the devices.
    """
    found = differing_replicas({"params": params}, mesh)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DivergedError(
            f"step {step}: {found[0]}{more}: a device or its memory is at fault; resume "
            "without it from the last checkpoint"
        )


def differing_replicas(tree: PyTree, mesh: Mesh) -> list[Difference]:
    """Compares every part of every array that several devices hold, by checksum; each device reads
    its own memory only.

    Of two copies nobody can say which one is wrong: both are named.

    Args:
      tree: arrays with shardings over the mesh.
      mesh: the devices.
    """
    arrays = by_path(tree)
    sums = jax.device_get(
        _program(mesh, tuple(leaf.sharding.spec for leaf in arrays.values()))(list(arrays.values()))
    )
    found = []
    for (path, leaf), rows in zip(arrays.items(), sums):
        holders: dict[str, list[int]] = collections.defaultdict(list)
        places = leaf.sharding.devices_indices_map(leaf.shape)
        for number, device in enumerate(mesh.devices.flat):
            holders[str(places[device])].append(number)
        odd = [
            difference
            for numbers in holders.values()
            for difference in _odd(path, rows, numbers, mesh)
        ]
        found += odd
    return found


def _odd(path: str, rows: np.ndarray, numbers: list[int], mesh: Mesh) -> list[Difference]:
    """The difference among devices (by their numbers in the mesh) that hold the same part, if there
    is one.
    """
    kinds: dict[bytes, list[jax.Device]] = collections.defaultdict(list)
    for number in numbers:
        kinds[rows[number].tobytes()].append(mesh.devices.flat[number])
    if len(kinds) == 1:
        return []
    most, *rest = sorted(kinds.values(), key=len, reverse=True)
    return [Difference(path, tuple(device for kind in rest for device in kind), tuple(most))]


@functools.lru_cache(maxsize=4)
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[Array]], list[Array]]:
    """From arrays to the two sums of what each device holds of them: `[devices, 2]` in the order of
    the mesh, everywhere.
    """
    each = jax.shard_map(
        lambda parts: [fold(part)[None] for part in parts],
        mesh=mesh,
        in_specs=(list(specs),),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )
    return jax.jit(each, out_shardings=replicated(mesh))


# --- collective ---
#
# Whether devices compute and talk to each other as they should: a product on each, a sum over all.


_SIDE = 256  # of the matrices that are multiplied
_ROWS = 1 << 18  # float32 numbers summed at a time on each device: 1 MiB


class CollectiveTest(NamedTuple):
    """What came out.

    Attributes:
      wrong: `device_kind` and number of the devices whose product or sum is wrong.
      seconds: of one sum over all devices, compiled before.
    """

    wrong: list[str]
    seconds: float


def collective_test(devices: Sequence[jax.Device]) -> CollectiveTest:
    """Multiplies on every device and sums over all of them, compared with NumPy; small whole
    numbers, so exactly.
    """
    wrong = {str(device) for device in devices if not _multiplies(device)}
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    addends = np.repeat(np.arange(1, len(devices) + 1, dtype=np.float32), _ROWS)
    shards = jax.device_put(addends, NamedSharding(mesh, PartitionSpec("all")))
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all")[None],
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec("all"),
        )
    )
    jax.block_until_ready(total(shards))
    start = time.perf_counter()
    sums = jax.block_until_ready(total(shards))
    seconds = time.perf_counter() - start
    expected = len(devices) * (len(devices) + 1) / 2
    wrong |= {
        str(shard.device)
        for shard in sums.addressable_shards
        if not np.all(np.asarray(shard.data) == expected)
    }
    return CollectiveTest(sorted(wrong), seconds)


def _multiplies(device: jax.Device) -> bool:
    """Whether a device gets a product of small whole numbers exactly right, which every precision
    holds.
    """
    rows = np.arange(_SIDE * _SIDE).reshape(_SIDE, _SIDE)
    a, b = (rows * 7 % 3 - 1).astype(np.float32), (rows * 5 % 3 - 1).astype(np.float32)
    product = jnp.matmul(jax.device_put(a, device), jax.device_put(b, device))
    return bool(np.array_equal(np.asarray(product), a @ b))

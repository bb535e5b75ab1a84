"""Before the first compile: whether all processes of a run are the same program with the same config on the same data."""

import collections
import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from llama_jax.data.atomic import atomic_write
from llama_jax.parallel.hosts import Hosts, numbers
from llama_jax.training.config import TrainConfig

RUN_HOSTS = "hosts.json"  # in a run's directory: what each process said of itself at the last start

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_OWN = ("distributed",)  # sections of the config in which processes differ
_SHOWN = 3  # differences told in the one line
_VISIBLE_SECONDS = 30  # a shared file system may show a new file late


def describe_program(config: TrainConfig) -> dict[str, str]:
    """What a process is, but for its data: versions, the revision of the sources where git knows it, every config value."""
    from llama_jax import __version__

    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {"python": platform.python_version(), "llama_jax": __version__, **_revision()}
    return own | versions | {f"config {key}": value for key, value in _flat(_shared(config)).items()}


def describe_devices() -> dict[str, str]:
    """The devices of this process; JAX meets them here at the latest, on all processes at a time."""
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
    """Lines on the items that are not the same everywhere: who differs from most, or from process 0 where there is no most."""
    lines = []
    for item in dict.fromkeys(key for one in said for key in one):
        values = [one.get(item, "nothing") for one in said]
        counts = collections.Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        for value in counts:
            if value != usual:
                who = numbers([number for number, one in enumerate(values) if one == value], len(said))
                lines.append(f"{who} has {item} {value:.60}, the others {usual:.60}")
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"{more} more differences"] if more > 0 else [])


def require_shared(hosts: Hosts, directory: Path, said: Mapping[str, str]) -> None:
    """Writes what each process is into the run's directory, where all must find it: it is to be the same directory.

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
        hosts.fail(f"{who} does not see what process 0 writes in {directory}; name a directory that all share")
    hosts.wait("hosts file seen")


def _appears(path: Path, content: bytes) -> bool:
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (path.is_file() and path.read_bytes() == content):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _shared(config: TrainConfig) -> dict:
    return {name: section for name, section in dataclasses.asdict(config).items() if name not in _OWN}


def _flat(values: Mapping, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def _revision() -> dict[str, str]:
    """The commit of our own sources and whether they were changed since, where they lie in a git repository."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"revision": done.stdout.strip()} if done.returncode == 0 else {}

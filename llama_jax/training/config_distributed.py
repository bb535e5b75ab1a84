"""The section `distributed` of a run's config: its processes, one a host."""

import dataclasses
from typing import Literal

from llama_jax.errors import InputError

_MODES = ("auto", "on", "off")
_LARGEST = 10**6


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Which processes train together; all are given the same config but for `process`.

    Attributes:
      mode: `off`: this process alone; `on`: with others; `auto`: with others where `coordinator` is given, or where the
        environment says so (JAX_COORDINATOR_ADDRESS, Slurm, Open MPI, a TPU pod).
      coordinator: `HOST:PORT` of process 0, reached by all and listened at by it alone; null to take the environment's.
      processes: how many there are; null to take the environment's.
      process: number of this one, from 0; null to take the environment's.
      startup_seconds: how long to wait for the others at the start, and for process 0 while it prepares the data.
      heartbeat_seconds: a process that is not heard of for so long is taken to be dead, and the others end.

    Raises:
      InputError: naming the key, for a value of the wrong kind or out of range.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    startup_seconds: int = 1800
    heartbeat_seconds: int = 100

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InputError(f"distributed.mode: {self.mode!r} given, {' or '.join(_MODES)} expected")
        for name, low in (("processes", 1), ("process", 0), ("startup_seconds", 1), ("heartbeat_seconds", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= _LARGEST
            if not (whole or (value is None and name.startswith("process"))):
                raise InputError(f"distributed.{name}: {value!r} given, a whole number from {low} to {_LARGEST} expected")
        if self.coordinator is not None and not isinstance(self.coordinator, str):
            raise InputError(f"distributed.coordinator: {self.coordinator!r} given, HOST:PORT or null expected")
        if self.process is not None and self.processes is not None and self.process >= self.processes:
            raise InputError(
                f"distributed.process: {self.process} given, below distributed.processes ({self.processes}) expected"
            )

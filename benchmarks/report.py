"""What every benchmark prints first: the command, the device, the versions."""

import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping


def heading(*packages: str) -> str:
    """Command, processor, cores, Python and package versions, one line each."""
    import jax

    names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", *packages))
    device = jax.devices()[0]
    return "\n".join(
        [
            f"command   python {' '.join(sys.argv)}",
            f"device    {device.device_kind} x {jax.device_count()} ({cpu}, {os.cpu_count()} cores)",
            f"versions  Python {platform.python_version()}, {versions}",
        ]
    )


def best_of_rounds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest time in seconds of each run; the runs take turns, so that a slow spell of the machine hits all alike."""
    for run in runs.values():
        run()  # compilation and caches
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best

"""What every benchmark prints first: the command, the device, the versions."""

import importlib.metadata
import os
import pathlib
import platform
import sys


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

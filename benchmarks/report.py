"""What every benchmark prints first: the command, the device, the versions."""

import importlib.metadata
import os
import pathlib
import platform
import sys


def heading(*packages: str, device: str = "") -> str:
    """Command, device (that of JAX in this process unless it is given), Python and package
    versions, one line each.
    """
    import jax

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    facts = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    # Machines of one name differ in the width of their vectors, and speeds with it.
    widest = next(
        (name for name in ("avx512f", "avx2", "avx") if name in facts.get("flags", "").split()),
        "no AVX",
    )
    cpu = f"{facts.get('model name', platform.processor())}, {widest}"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "flax", *packages)
    )
    device = device or f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    return "\n".join(
        [
            f"command   python {' '.join(sys.argv)}",
            f"device    {device} ({cpu}, {os.cpu_count()} cores)",
            f"versions  Python {platform.python_version()}, {versions}",
        ]
    )

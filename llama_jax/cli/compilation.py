"""What JAX is told before it starts: where to keep compiled programs, and how many threads virtual devices need."""

import os
import pathlib
import re


def keep_compiled_programs() -> None:
    """Points JAX to a compilation cache of this user, unless JAX_COMPILATION_CACHE_DIR says otherwise.

    The directory is readable by its owner only: it holds native code that JAX will run.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        directory = base / "llama_jax" / "compiled"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except (OSError, RuntimeError):
        return  # a home that cannot be written to, or a user without one: compile anew each time
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_room_for_virtual_devices() -> None:
    """Gives XLA's CPU client threads enough for virtual devices (XLA_FLAGS=--xla_force_host_platform_device_count=8).

    It has one thread a core by default; with fewer threads than devices waiting in collectives, a program can stand still
    until XLA aborts it. To be called before JAX meets its devices.
    """
    found = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if found:
        os.environ.setdefault("NPROC", str(max(16, 2 * int(found[1]))))

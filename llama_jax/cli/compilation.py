"""Compiled programs kept between runs, so that the second start of a model takes seconds less than the first."""

import os
import pathlib


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

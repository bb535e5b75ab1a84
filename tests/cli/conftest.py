"""Fixtures of the command line's tests: programs that run inside a test."""

import functools
import signal
from collections.abc import Callable

import jax
import pytest

from llama_jax.parallel.mesh import make_mesh
from llama_jax.training import setup


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Takes back the handlers of programs that run inside the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def on_devices(monkeypatch) -> Callable[[int], None]:
    """Gives trainings inside the test so many devices."""
    return lambda count: monkeypatch.setattr(
        setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:count])
    )

"""These tests run where there is an NVIDIA GPU, and say so where there is none."""

import jax
import pytest


def pytest_collection_modifyitems(items):
    """Skips what cannot run here."""
    if jax.devices()[0].platform == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="needs an NVIDIA GPU; `make test-gpu` runs it on one")
            )

"""Every test runs in float64, with rank promotion refused; warnings are errors (`pyproject.toml`)."""

import os

# Several JAX processes share the cores under `pytest -n auto`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs of one file are of no use to the next, and add up to gigabytes."""
    yield
    jax.clear_caches()

"""Every test runs in float64, with rank promotion refused; warnings are errors (`pyproject.toml`)."""

import os

# Several JAX processes share the cores under `pytest -n auto`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend their time in the compiler: they do with fewer of its optimizations, in processes that they start, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def optimizations(request):
    """Values to the bit are those of programs with all optimizations: of tests whose names say so."""
    jax.config.update("jax_disable_most_optimizations", "to_the_bit" not in request.node.name)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Compiled programs of one file are of no use to the next, and add up to gigabytes."""
    yield
    jax.clear_caches()

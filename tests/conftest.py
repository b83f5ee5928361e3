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


# Values to the bit are those of programs with all optimizations.
TO_THE_BIT = ("test_differentiable.py", "test_every_optax_transform.py")


@pytest.fixture(autouse=True, scope="module")
def small(request):
    """Compiled programs of one file are of no use to the next, and add up to gigabytes."""
    jax.config.update("jax_disable_most_optimizations", request.path.name not in TO_THE_BIT)
    yield
    jax.clear_caches()

"""Every test runs in float64, with rank promotion refused; warnings are errors (`pyproject.toml`)."""

import os

# Several JAX processes share the cores under `pytest -n auto`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def quick_and_small(request):
    """Compiled programs of one file are of no use to the next, and add up to gigabytes.

    The rules' tests spend their time in the compiler: they do with less of its optimizations. Tests of values to the
    bit, in the other rooms, have all of them.
    """
    names = ("test_im2col.py", "test_adaptation.py", "test_few_shot.py")
    quick = request.path.parent.name == "hypergrad" or request.path.name in names
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()

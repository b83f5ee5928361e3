"""Every test runs in float64, with rank promotion refused; warnings are errors (`pyproject.toml`)."""

import gc
import importlib.metadata
import os

# Several JAX processes share the cores under `pytest -n auto`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend their time in the compiler: they do with fewer of its optimizations, in processes that they start, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Without XLA's fusion emitters, JAX 0.10 compiles in half the time. JAX 0.12 has no such flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Of processes with two threads each on two cores, every tenth second goes to threads that wait for one another.
if hasattr(os, "sched_setaffinity") and os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw").isdecimal():
    cores = sorted(os.sched_getaffinity(0))
    if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
        os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})

import jax
import pytest

# Tracing makes many objects. Python looks for cycles among them so often that this takes a seventh of the tests' time.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache, for the next file and run, and for other workers and processes.

    There is no lock. A worker that reads a program while another one writes it gets a warning, and compiles it again.
    """
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(items):
    """Marks the examples of docstrings `once`."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True)
def optimizations(request):
    """Programs have few optimizations (see above), except in tests that are marked `optimized`."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Compiled programs of one file are of no use to the next, and add up to gigabytes."""
    yield
    jax.clear_caches()

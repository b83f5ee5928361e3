"""Measurements of the benchmarks of JAX programs, errors of their results, and the formatting."""

import os
import platform
import time

import jax
import numpy as np
import optax

import metaopt
from metaopt import base


def num_cores() -> int:
    """Returns the number of cores that this process may use. `taskset` reduces it, and XLA takes as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiled(function, *args):
    """Returns the compiled program, and the seconds to trace and compile it."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


def temporary_mib(program) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def relative_error(actual: base.PyTree, expected: base.PyTree) -> float:
    """Returns the largest relative error of a leaf."""
    relative = jax.tree.map(lambda a, b: np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b), actual, expected)
    return float(np.max(jax.tree.leaves(relative)))  # NaN if there is one


def circumstances(command: str, *, memory: bool = True) -> str:
    """Returns the last paragraph of a report: the command and its environment.

    With `memory`, it also explains how to read memory.
    """
    versions = {"JAX": jax.__version__, "optax": optax.__version__, "metaopt": metaopt.__version__}
    return (
        f"`{command}` with Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {jax.default_backend()}, {num_cores()} cores."
        + (" Memory is the figure of the compiler; compare only ratios within one JAX version." if memory else "")
    )

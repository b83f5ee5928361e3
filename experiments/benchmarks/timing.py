"""What the benchmarks of JAX programs measure, and how they print it."""

import os
import platform
import time

import jax
import optax

import metaopt


def num_cores() -> int:
    """The cores this process may use: `taskset` narrows them, and XLA takes as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiled(function, *args):
    """The compiled program, and the seconds that tracing and compiling it took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


def temporary_mib(program) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def circumstances(command: str, *, memory: bool = True) -> str:
    """The last paragraph of a report: what ran, on what; `memory`: and how memory is to be read."""
    versions = {"JAX": jax.__version__, "optax": optax.__version__, "metaopt": metaopt.__version__}
    return (
        f"`{command}` with Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {jax.default_backend()}, {num_cores()} cores."
        + (" Memory is what the compiler states: compare ratios within one JAX version." if memory else "")
    )

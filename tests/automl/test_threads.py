"""Fits use one thread each: folds and models run in parallel instead. Their processes stay."""

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metaopt.automl import _workers

PROGRAM = """
import importlib, os
from experiments.automl import fit_seconds
from metaopt.automl import _kinds
from metaopt.automl._portfolio import portfolio

kinds = {member.kind: member for member in portfolio("classification", "best", None, 1000) if member.kind != "network"}
kinds["hist_gradient_boosting"] = portfolio("classification", "best", "hist_gradient_boosting", 1000)[0]
for kind in kinds:
    importlib.import_module(_kinds.KINDS[kind].module)  # some libraries start threads when they are imported
rows = fit_seconds.data(2000, 10, 3, seed=0)
_kinds.fit_fold("linear", kinds["linear"].settings, rows)
count = lambda: len(os.listdir("/proc/self/task"))
for kind, member in kinds.items():
    before = count()
    _kinds.fit_fold(kind, member.settings, rows)
    print(kind, before, count())
"""


@pytest.mark.once
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_no_fit_starts_threads_that_stay():
    # OpenMP keeps the threads that it has started, so that they can be counted after the fit.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [line.split() for line in done.stdout.splitlines()]
    assert {"lightgbm", "xgboost", "extra_trees", "hist_gradient_boosting"} <= {kind for kind, *_ in counts}
    assert [row for row in counts if row[1] != row[2]] == []


@pytest.fixture
def all_cores(monkeypatch):
    """Workers of pytest-xdist have one core each, in which all processes would have one thread."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    _workers.stop("network")
    yield os.sched_getaffinity(0)
    _workers.stop("network")
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_the_process_of_networks_has_one_thread_of_each_kind(all_cores):
    def compile_a_program():
        import jax
        import jax.numpy as jnp

        program = jax.jit(lambda x: [jnp.sin(i * x) @ jnp.cos(x + i) + jnp.sort(x, 0) for i in range(60)])
        lowered, start, processor = program.lower(jnp.ones((60, 60))), time.perf_counter(), time.process_time()
        lowered.compile()
        return (time.process_time() - processor) / (time.perf_counter() - start)

    worker = _workers.network_worker()
    threads_in_use = worker.submit(compile_a_program).result()
    threads = worker.submit(os.listdir, "/proc/self/task").result()
    names = [worker.submit(Path(f"/proc/self/task/{thread}/comm").read_text).result().strip() for thread in threads]
    numbers = collections.Counter(name for name in names if name.startswith("tf_XLA"))
    assert numbers and set(numbers.values()) == {1}
    assert threads_in_use < 1.4  # the compiler's threads may have no names; other programs only lower this mean
    cores = [worker.submit(os.sched_getaffinity, int(thread)).result() for thread in threads]
    assert all(own == all_cores for own in cores)  # the restriction to one core has ended


@pytest.mark.parametrize("name", [1, "network"])
def test_a_process_that_grows_stays(name):
    def grow():
        sys.grown = np.ones(60_000_000)  # 480 MB

    pool = _workers.network_worker() if name == "network" else _workers.workers(name)
    process = pool.submit(os.getpid).result(timeout=300)
    time.sleep(1.1)  # joblib looks at the memory once in a second
    pool.submit(grow).result(timeout=300)
    time.sleep(0.5)
    assert pool.submit(os.getpid).result(timeout=300) == process
    _workers.stop(name)

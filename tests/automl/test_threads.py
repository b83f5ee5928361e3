"""Fits use one thread each: folds and models run in parallel instead. Processes that grow are not ended."""

import collections
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metaopt.automl import _workers

PROGRAM = """
import importlib, os, time
from experiments.automl import fit_seconds
from metaopt.automl import _kinds
from metaopt.automl._portfolio import portfolio

os.sched_setaffinity(0, range(os.cpu_count()))  # pytest-xdist may have left one core
for kind in _kinds.KINDS:
    if importlib.util.find_spec(_kinds.KINDS[kind].module.partition(".")[0]):
        importlib.import_module(_kinds.KINDS[kind].module)  # some libraries start threads when they are imported
classes = fit_seconds.data(2000, 10, 3, seed=0)
numbers = classes._replace(y=classes.y / 2, valid_y=classes.valid_y / 2, num_classes=0)
count = lambda: len(os.listdir("/proc/self/task"))
for problem, rows in (("classification", classes), ("regression", numbers)):
    members = [*portfolio(problem, "best", None, 1000), *portfolio(problem, "best", "hist_gradient_boosting", 1000)]
    kinds = {member.kind: member for member in members if member.kind != "network"}
    _kinds.fit_fold("linear", kinds["linear"].settings, rows)
    for kind, member in kinds.items():
        before, begin, wall = count(), time.process_time(), time.perf_counter()
        _kinds.fit_fold(kind, member.settings, rows)
        share = (time.process_time() - begin) / (time.perf_counter() - wall)
        print(problem, kind, before, count(), share)
"""


@pytest.mark.once
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
def test_no_fit_starts_threads_that_stay():
    # OpenMP keeps the threads that it has started, so that they can be counted after the fit. Pools that exist since
    # the import show in the processor time: two busy threads on two cores use more of it than one second per second.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    kinds = {"linear", "lightgbm", "xgboost", "extra_trees", "random_forest", "hist_gradient_boosting"}
    for problem, more in (("classification", set()), ("regression", {"gaussian_process"})):
        assert kinds | more <= {row[1] for row in rows if row[0] == problem}
    assert [row for row in rows if row[2] != row[3] or float(row[4]) > 1.2] == []


@pytest.fixture
def all_cores(monkeypatch):
    """Lets this process use all cores, as outside of pytest-xdist. Networks get a new process, without a cache."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    _workers.stop("network")
    if len(os.sched_getaffinity(0)) < 2:  # for example in a container
        pytest.skip("one core has one thread")
    yield os.sched_getaffinity(0)
    _workers.stop("network")
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_the_process_of_networks_has_one_thread_of_each_kind(all_cores):
    def compile_a_program():
        """Returns the names of all threads, their cores, and the shares of the compilation's processor time."""
        import jax
        import jax.numpy as jnp

        def of_threads(read):
            values = {}
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                    values[thread] = read(thread)
            return values

        def ticks(thread):  # fields 14 and 15, of which the second, the name, may have spaces
            return sum(map(int, Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[11:13]))

        program = jax.jit(lambda x: [jnp.sin(i * x) @ jnp.cos(x + i) + jnp.sort(x, 0) for i in range(60)])
        lowered, before = program.lower(jnp.ones((60, 60))), of_threads(ticks)
        lowered.compile()
        used = {thread: after - before.get(thread, 0) for thread, after in of_threads(ticks).items()}
        shares = [share / sum(used.values()) for share in used.values()]
        names = of_threads(lambda thread: Path(f"/proc/self/task/{thread}/comm").read_text().strip())
        return list(names.values()), list(of_threads(lambda thread: os.sched_getaffinity(int(thread))).values()), shares

    names, cores, shares = _workers.network_worker().submit(compile_a_program).result(timeout=300)
    numbers = collections.Counter(name for name in names if name.startswith("tf_XLA"))
    assert numbers and set(numbers.values()) == {1}
    assert max(shares) > 0.7  # one thread compiles; the compiler's threads may have no names
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

"""Worker processes, in which fits use one thread each and can be stopped."""

import contextlib
import importlib
import multiprocessing
import os
import sys
from typing import Any

from metaopt import _extras
from metaopt.automl import _kinds

_POOLS: dict[Any, Any] = {}  # (process, "network" or a number of workers) -> executor; a fork needs its own
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def workers(num_jobs: int) -> Any:
    """Processes for all kinds but the network. They end after 120 s without a task.

    If one dies, the next call starts new ones. `joblib.Parallel` has other processes, so the user's code may call it at
    the same time.
    """
    cloudpickle = _extras.require("cloudpickle", "automl", "AutoML")
    for module in (_kinds, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # the workers then import neither metaopt nor JAX
    return _pool(num_jobs, num_jobs, timeout=120, env=_THREADS, initializer=_start)


def network_worker() -> Any:
    """The process that trains networks, on the CPU. It keeps its last programs, and ends after 300 s without a task."""
    env = {**_THREADS, "JAX_PLATFORMS": "cpu", "NPROC": "1"}  # XLA reads NPROC
    return _pool("network", 1, timeout=300, env=env, initializer=_start_with_jax)


def stop(name: Any) -> None:
    """Kills the processes of `workers(name)`, or the one of `network_worker()` if `name` is "network"."""
    pool = _POOLS.pop((os.getpid(), name), None)
    if pool is not None:
        pool.shutdown(wait=False, kill_workers=True)


def can_start() -> bool:
    """Whether this process may start others. The workers of `multiprocessing.Pool`, for example, may not."""
    return not multiprocessing.current_process().daemon


def _pool(name: Any, size: int, **options: Any) -> Any:
    pool = _POOLS.get((os.getpid(), name))
    if pool is None or pool._flags.broken is not None or pool._flags.shutdown:
        loky = _extras.require("joblib.externals.loky", "automl", "AutoML")
        pool = _POOLS[os.getpid(), name] = loky.ProcessPoolExecutor(size, **options)
    return pool


def _start() -> None:
    """Imports libraries in a new process, which takes a second."""
    _stay()
    importlib.import_module("sklearn.ensemble")


def _start_with_jax() -> None:
    """Starts JAX while this process may use one core only, so that XLA starts one thread of each kind.

    XLA has no setting for the number of its compiler threads. After the start, they may run on all cores again.
    """
    _stay()
    can_restrict = hasattr(os, "sched_setaffinity") and os.path.isdir("/proc/self/task")  # Linux
    cores = os.sched_getaffinity(0) if can_restrict else set()
    if can_restrict:
        os.sched_setaffinity(0, {min(cores)})
    import jax

    jax.jit(lambda x: x + 1)(0.0).block_until_ready()
    if can_restrict:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # of a thread that has ended since
                os.sched_setaffinity(int(thread), cores)
    importlib.import_module("metaopt.automl._network_folds")  # another second, while the first task is prepared


def _stay() -> None:
    """Keeps joblib from ending this process when it grows. Else joblib ends processes that have grown by 300 MB.

    The compiled programs of the process would be lost. joblib also warns if tasks are waiting when it ends a process.
    If warnings are errors, these tasks would wait forever.
    """
    vars(importlib.import_module("joblib.externals.loky.process_executor"))["_MAX_MEMORY_LEAK_SIZE"] = sys.maxsize

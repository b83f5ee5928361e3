"""Worker processes, in which fits use one thread each and can be stopped."""

import importlib
import multiprocessing
import os
import sys
from typing import Any

from metaopt import _extras
from metaopt.automl import _kinds

_POOLS: dict[Any, Any] = {}  # (process, "network" or a number of workers) -> executor; a fork cannot use its parent's
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def workers(num_jobs: int) -> Any:
    """Processes for all kinds but the network. They stay for later calls; new ones start if one has died.

    They are not those of `joblib.Parallel`, which the user's code may use at the same time.
    """
    cloudpickle = _extras.require("cloudpickle", "automl", "AutoML")
    for module in (_kinds, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # so that they need not import metaopt and JAX
    return _pool(num_jobs, num_jobs, timeout=120, env=_THREADS, initializer=_start)


def network_worker() -> Any:
    """The process that trains networks, on the CPU. It stays for a while, with the programs that it has compiled."""
    env = {**_THREADS, "JAX_PLATFORMS": "cpu", "NPROC": "1"}  # XLA reads NPROC
    return _pool("network", 1, timeout=300, env=env, initializer=_start_with_jax)


def stop(name: Any) -> None:
    """Kills the processes of `workers(name)`, or with the name "network" that of `network_worker()`."""
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

    XLA has no setting for the threads of its compiler. Afterwards, these threads may run on all cores again.
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
            os.sched_setaffinity(int(thread), cores)
    importlib.import_module("metaopt.automl._network_folds")  # another second, while the first task is prepared


def _stay() -> None:
    """Makes this process stay when it grows. joblib ends processes that have grown by 300 MB.

    They hold compiled programs. Also, joblib warns if a task waits for a process that ends. Where warnings are errors,
    the task would then wait forever.
    """
    vars(importlib.import_module("joblib.externals.loky.process_executor"))["_MAX_MEMORY_LEAK_SIZE"] = sys.maxsize

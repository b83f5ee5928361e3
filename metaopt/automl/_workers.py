"""Worker processes, in which fits use one thread each and can be stopped."""

import os
from typing import Any

from metaopt import _extras
from metaopt.automl import _kinds

_POOLS: dict[Any, Any] = {}  # "network", or a number of workers -> executor
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def workers(num_jobs: int) -> Any:
    """Processes for all kinds but the network. They stay for later calls; new ones start if one has died.

    They are not those of `joblib.Parallel`, which the user's code may use at the same time.
    """
    cloudpickle = _extras.require("cloudpickle", "automl", "AutoML")
    cloudpickle.register_pickle_by_value(_kinds)  # so that they need not import JAX
    return _pool(num_jobs, num_jobs, timeout=120, env=_THREADS)


def network_worker() -> Any:
    """The process that trains networks, on the CPU. It stays for a while, with the programs that it has compiled."""
    env = {**_THREADS, "JAX_PLATFORMS": "cpu", "NPROC": "1"}  # XLA reads NPROC
    return _pool("network", 1, timeout=300, env=env, initializer=_start_jax_with_one_thread)


def stop(name: Any) -> None:
    """Kills the processes of `workers(name)`, or with the name "network" that of `network_worker()`."""
    if name in _POOLS:
        _POOLS.pop(name).shutdown(wait=False, kill_workers=True)


def _pool(name: Any, size: int, **options: Any) -> Any:
    pool = _POOLS.get(name)
    if pool is None or pool._flags.broken is not None or pool._flags.shutdown:
        loky = _extras.require("joblib.externals.loky", "automl", "AutoML")
        pool = _POOLS[name] = loky.ProcessPoolExecutor(size, **options)
    return pool


def _start_jax_with_one_thread() -> None:
    """Starts JAX while this process may use one core only, so that XLA starts one thread of each kind.

    XLA has no setting for the threads of its compiler. Afterwards, these threads may run on all cores again.
    """
    can_restrict = hasattr(os, "sched_setaffinity") and os.path.isdir("/proc/self/task")  # Linux
    cores = os.sched_getaffinity(0) if can_restrict else set()
    if can_restrict:
        os.sched_setaffinity(0, {min(cores)})
    import jax

    jax.jit(lambda x: x + 1)(0.0).block_until_ready()
    if can_restrict:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)

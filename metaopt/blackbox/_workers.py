"""Runs trials on joblib's workers: threads, processes, or a cluster of Dask or Ray. A lost worker loses no trial."""

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from metaopt import _extras, base
from metaopt.blackbox import _dask
from metaopt.blackbox._records import append_records
from metaopt.blackbox._trials import ObjectiveFn, run_here, run_isolated

_log = logging.getLogger(__name__)
_LOSSES = 3  # losses of workers in a row, with no ended trial between them
# Names of the errors for a lost worker: of loky, of Dask (a lost task, lost data, or no worker for 10 s), and of Ray.
_LOST = {"BrokenExecutor", "KilledWorker", "CancelledError", "TimeoutError"}
_LOST |= {"RayActorError", "WorkerCrashedError", "ObjectLostError"}


class Runner(NamedTuple):
    """The arguments that all trials of a collection share."""

    run: Callable[..., base.Record | None]
    objective: ObjectiveFn
    tasks: dict[str, Any]
    store: Any
    study: str
    num_workers: int | None
    deadline: float  # of `time.monotonic`


class Isolated:
    """`run_isolated` with its limits, as an object that joblib can send."""

    def __init__(self, time_limit, memory_limit, owner):
        self.limits = {"time_limit": time_limit, "memory_limit": memory_limit, "owner": owner}

    def __call__(self, objective, task, trial, begins_before):
        return run_isolated(objective, task, trial, begins_before=begins_before, **self.limits)


def run_in_worker(objective, task, trial, begins_before):
    """Runs a trial in the worker itself. Returns None if the deadline has passed."""
    late = begins_before is not None and time.time() >= begins_before  # a pool of processes takes seconds to start
    return None if late else run_here(objective, task, trial)


def identity(record: base.Record) -> tuple:
    """The task, number and fidelity of a trial."""
    return record.task, record.trial, record.fidelity


@contextlib.contextmanager
def workers(backend: str | None, num_workers: int | None) -> Iterator[None]:
    """Selects a backend of joblib by its name; None keeps the current one."""
    if backend is None:
        yield
        return
    joblib = _extras.require("joblib", "records", "`collect`")
    options: dict[str, Any] = {}
    if backend == "dask":
        _extras.require("distributed", "dask", '`backend="dask"`')
    if backend == "ray":
        ray = _extras.require("ray", "ray", '`backend="ray"`')
        _extras.require("ray.util.joblib", "ray", '`backend="ray"`').register_ray()
        if not ray.is_initialized():
            ray.init()
        # With these options, Ray restarts only a lost worker and its trial, as Dask does. Otherwise `run_all` would
        # restart all running trials.
        options["ray_remote_args"] = {"max_restarts": _LOSSES, "max_task_retries": _LOSSES}
        options["n_jobs"] = -1 if num_workers is None else num_workers
    with joblib.parallel_config(backend=backend, **options):
        yield


def run_all(runner: Runner, trials: Iterator[base.Record]) -> Iterator[base.Record]:
    """Runs trials and yields their records as they end; each is appended to the store at once.

    If the backend reports that a worker is lost, the trials that were running run again. Which of them were on this
    worker is not known.

    Args:
      runner: the arguments that all trials share.
      trials: an iterator. Asking a searcher takes time, so this thread takes a few more trials than can run at a time.

    Yields:
      The records.
    """
    queue = collections.deque(itertools.islice(trials, 1))
    if not queue:
        return
    joblib = _extras.require("joblib", "records", "`collect`")
    backend: Any = joblib.parallel.get_active_backend(prefer="threads")[0]
    streams = backend.supports_return_generator  # Ray's backend does not
    kwargs: dict[str, Any] = {"n_jobs": runner.num_workers, "prefer": "threads", "batch_size": 1}
    kwargs |= {"return_as": "generator_unordered", "pre_dispatch": "n_jobs"} if streams else {}
    with _dask.repaired(backend, runner.deadline):
        at_once = max(joblib.effective_n_jobs(joblib.Parallel(**kwargs).n_jobs), 1)
    # joblib takes as many trials at a time as can run. Four times as many keep the queue from running empty.
    # After a loss, the queue also has the trials that were running, and the cluster may be smaller.
    refill = lambda: queue.extend(itertools.islice(trials, max(4 * at_once - len(queue), 0)))
    refill()
    running: dict[tuple, base.Record] = {}  # trials that joblib has taken, and whose records it has not returned
    losses = 0
    while (queue or running) and time.monotonic() < runner.deadline:
        queue.extendleft([running.pop(name) for name in reversed(list(running))])
        stop = threading.Event()
        jobs = _jobs(joblib.delayed(_run_named), runner, queue, running, stop)
        parallel: Any = joblib.Parallel(**kwargs)
        try:
            with _dask.repaired(backend, runner.deadline):
                for name, record in parallel(jobs if streams else list(itertools.islice(jobs, at_once))):
                    running.pop(name)
                    if record is not None:  # otherwise the trial had no time to begin
                        losses = 0
                        if runner.store is not None:
                            append_records(runner.store, [record], study=runner.study)
                        yield record
                    refill()
        except Exception as error:
            losses += 1
            is_over = time.monotonic() >= runner.deadline
            if not _is_loss(error) or (losses == _LOSSES and not is_over):
                raise
            rest = "No time is left for the running trials." if is_over else "The running trials start again."
            _log.warning(f"A worker was lost ({type(error).__name__}: {error}). {rest}")
        finally:
            stop.set()


def _jobs(
    delayed: Callable[..., Any],
    runner: Runner,
    queue: collections.deque[base.Record],
    running: dict[tuple, base.Record],
    stop: threading.Event,
) -> Iterator[Any]:
    """Yields delayed calls. joblib takes the next one when a worker is free, in any of joblib's threads."""
    while queue:
        left = runner.deadline - time.monotonic()
        if stop.is_set() or left <= 0:
            return
        trial = queue.popleft()
        running[identity(trial)] = trial
        if runner.store is not None:
            append_records(runner.store, [trial._replace(status="RUNNING")], study=runner.study)
        begins_before = time.time() + left if left < float("inf") else None
        yield delayed(runner.run, runner.objective, runner.tasks[trial.task], trial, begins_before)


def _run_named(run, objective, task, trial, begins_before):
    return identity(trial), run(objective, task, trial, begins_before)


def _is_loss(error: Exception) -> bool:
    """Whether an error of a backend states that a worker is lost. The trials themselves raise no such errors."""
    return bool(_LOST & {kind.__name__ for kind in type(error).__mro__})

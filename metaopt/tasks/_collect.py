"""Collects records: any searcher, any Python callable, many tasks at a time; interrupted and continued at any point.

There is one loop. In each round the searcher of every task is asked for a batch of trials; they run, through joblib,
wherever there is room; then every searcher is told what came of its own, in the order in which it had asked. A trial
depends on its own seed alone. So what is found depends on the size of a batch, and not on how many workers there are.

A collection is continued by doing it again: the searchers are asked again from the start, which gives the same trials,
and those of which the store has the end are told without being run. Nothing of a searcher is ever saved.
"""

import contextlib
import itertools
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _locks, base
from metaopt.progress import report_progress
from metaopt.tasks._random_search import random_search
from metaopt.tasks._records import append_records, read_records
from metaopt.tasks._trials import ObjectiveFn, end_children, memory_is_known, run_here, run_isolated

_ENDED = ("COMPLETE", "PRUNED", "FAIL")


def collect(
    objective: ObjectiveFn,
    space: base.PyTree,
    tasks: Mapping[str, Any] | Sequence[Any],
    *,
    num_trials: float,
    key: jax.Array,
    searcher: base.Searcher | None = None,
    batch_size: int | None = None,
    same_trials: bool = False,
    resumes: bool = False,
    store: str | os.PathLike[str] | None = None,
    study: str = "",
    retry_failed: bool = False,
    num_workers: int | None = None,
    isolated: bool = True,
    time_limit: float | None = None,
    memory_limit: float | None = None,
    budget: float | None = None,
    progress: bool | None = None,
) -> list[base.Record]:
    """Runs trials of an objective on tasks, and records them.

    By default every trial runs in a spawned child process, whose end is a record and no more: one that raises, returns
    no finite number, crashes or exceeds a limit has status "FAIL" and a reason. The children belong to the workers, not
    to joblib: a pool that kills one of its own processes takes the pool's other trials along, and cannot say which
    limit it was. So joblib's workers only wait, in threads by default; under `joblib.parallel_config(backend=...)`
    they are threads or processes of loky, Dask (`pip install "dask[distributed]"`) or Ray (`pip install ray`), each
    with children on its own machine:

        client = distributed.Client("scheduler:8786")         # "dask"; it registers itself
        ray.util.joblib.register_ray()                        # "ray"
        with joblib.parallel_config(backend="dask", n_jobs=64):
            records = tasks.collect(objective, space, named, num_trials=100, key=key, store="records.db")

    The store is written by this process alone, as trials end (with Ray, whenever as many as run at a time have
    ended). Where a backend's workers are processes, it must be able to send the objective and the tasks to them.

    Args:
      objective: `(trial, task) -> outcome`, a number, smaller is better. `trial` is a `Record`: it should obey
        `trial.configuration`, plain values by name, use `trial.seed` for all that is random, and `trial.fidelity` if
        the searcher asks for less than the full budget. It may raise `tasks.Pruned(outcome)`.
      space: a tree of leaves.
      tasks: what the objective is given, by name; or a list of what has a `name`, as `Table`s do.
      num_trials: how many full budgets to spend on each task: a trial at fidelity 1/9 counts 1/9.
      key: of the search; each task's is folded from it and the task's name.
      searcher: by default `random_search()`: the space's default first, then random configurations. `enqueue` has
        configurations of one's own before those of any searcher, or after so many of them.
      batch_size: how many trials a task's searcher is asked for at a time, before it hears of them. By default 1, and
        for random search, which does not listen, all.
      same_trials: give every task's searcher the same key. Random search then tries the same configurations with the
        same seeds everywhere, which makes the records a matrix.
      resumes: whether the objective continues a trial that it has run at a lower fidelity (from a checkpoint of its
        own), so that only the difference of the two is spent.
      store: a file of records (`append_records`), made where there is none; by default, none. A trial of which it has
        the end is not run again, a failed one neither: where the objective has been corrected since, `retry_failed`.
        While a collection runs, a small file next to it, which ends in `.lock`, holds the process id. A killed
        collection leaves that file behind, which is harmless.
      study: the collection's name in the store. One is continued by calling again with the same space, searcher,
        `batch_size`, `same_trials`, `resumes` and key; `num_trials` may be larger, tasks may come and go, and
        configurations be enqueued `after` what has been run. One collection of a study at a time: several studies may
        share a store.
      retry_failed: run trials that have failed once more, in every call that says so. The new record is what counts
        from then on; the old one stays in the store (`read_records(history=True)`). A searcher that listens has heard
        of the failure, and goes on from it: it is not asked for other trials than it was.
      num_workers: how many trials run at a time, on one core each: joblib's `n_jobs`. Of every task, at most
        `batch_size` of them.
      isolated: whether trials run in children, on POSIX systems. Otherwise they run in joblib's workers: faster where
        a trial takes less than milliseconds, without limits, and no protection against what ends the process.
      time_limit: seconds a trial; by default none, and a trial that hangs holds up the collection for good.
      memory_limit: MiB of a trial's process and what that starts; read 20 times a second, on Linux. Python with metaopt
        and JAX takes 200 to 300 of them.
      budget: seconds in all, after which no trial begins; those that run then go on to their end, or their limit: a
        collection takes less than one trial's limit more (by this machine's clock, which workers on others should
        share). Trials that were about to begin stay "RUNNING" in the store, until the next call.
      progress: None reports trials on standard error: by a bar in a terminal or notebook, and elsewhere by a line every
        10 s. True prints also a line at the end of a short collection; False reports nothing.

    Returns:
      The records of these tasks, each "COMPLETE", "PRUNED" or "FAIL", task by task in the order of the trials; without
      what the budget did not allow.

    Raises:
      ValueError: an argument is not valid, the store has this study from another space, searcher or key, or another
        collection of it is under way.
      FileNotFoundError: the folder of the store does not exist.
      RuntimeError: a child cannot start, or cannot read the objective or a task.
      ImportError: joblib or, for isolated trials, cloudpickle is not installed.

    >>> import jax
    >>> from metaopt import spaces, tasks
    >>> def objective(trial, task):
    ...     return (trial.configuration["x"] - task) ** 2
    >>> space = {"x": spaces.interval(-1.0, 1.0)}
    >>> kwargs = {"num_trials": 3, "key": jax.random.key(0), "isolated": False}
    >>> records = tasks.collect(objective, space, {"left": -0.5, "right": 0.5}, **kwargs)
    >>> [(record.task, record.trial, record.status) for record in records][2:4]
    [('left', 2, 'COMPLETE'), ('right', 0, 'COMPLETE')]
    >>> records[0].configuration, records[0].outcome
    ({'x': 0.0}, 0.25)
    """
    if not callable(objective):
        raise ValueError(
            "`objective` must be a function `(trial, task) -> outcome`, which runs a trial; got "
            f"{type(objective).__name__}."
        )
    base.check_positive("num_trials", num_trials)
    _check_key(key)
    if searcher is not None:
        base.check_searcher(searcher)
    base.check_integer("batch_size", batch_size, 1, optional=True)
    for name, value in (("time_limit", time_limit), ("memory_limit", memory_limit), ("budget", budget)):
        base.check_positive(name, value, optional=True)
    if not isolated and (time_limit is not None or memory_limit is not None):
        raise ValueError("A limit needs `isolated=True`: what runs in this process cannot be ended.")
    if isolated and os.name != "posix":
        raise ValueError(f"Isolated trials need a POSIX system; on {os.name!r}, use `isolated=False`.")
    if memory_limit is not None and not memory_is_known():
        raise ValueError("`memory_limit` needs Linux, whose /proc says what a process holds; leave it out.")
    named = _by_name(tasks)
    if batch_size is None:
        batch_size = 1 if searcher is not None else max(1, round(num_trials))
    searcher = random_search() if searcher is None else searcher

    owner = uuid.uuid4().hex
    run = _run_here if not isolated else _Isolated(time_limit, memory_limit, owner)
    deadline = float("inf") if budget is None else time.monotonic() + budget
    states = {
        name: searcher.init(key if same_trials else jax.random.fold_in(key, zlib.crc32(name.encode())), space)
        for name in named
    }
    told: dict[str, list[base.Record]] = {name: [] for name in named}
    asking, spent = set(named), dict.fromkeys(named, 0.0)
    paid: dict[tuple[str, int], float] = {}  # the highest fidelity of each trial, where it resumes
    try:
        with _alone(store, study), _progress(num_trials * len(named), progress) as show:
            # What its searcher heard of a trial is how it ended at first.
            ended, heard = _read_ended(store, study, named, retry_failed)
            while asking:
                batches: dict[str, list[base.Record]] = {}
                for name in [name for name in named if name in asking]:
                    # A whole batch is asked for, even where less is left to spend, so that more can be spent later.
                    asked, states[name] = searcher.ask(states[name], batch_size)
                    batches[name] = []
                    for trial in asked:
                        if spent[name] < num_trials - 1e-6:  # a sum of thirds is no whole number
                            spent[name] += trial.fidelity - paid.get((name, trial.trial), 0.0)
                            if resumes:
                                paid[name, trial.trial] = trial.fidelity
                            batches[name].append(trial._replace(task=name))
                    if not asked or spent[name] >= num_trials - 1e-6:
                        asking.discard(name)
                waiting = []
                for trial in (trial for batch in batches.values() for trial in batch):
                    known = ended.get(_identity(trial))
                    if known is None:
                        waiting.append(trial)
                    elif (known.configuration, known.seed) != (trial.configuration, trial.seed):
                        raise ValueError(
                            f"{store} has trial {trial.trial} of {trial.task!r} with another configuration or seed "
                            f"than is asked for now: it comes from another space, searcher, key or `batch_size`, or "
                            "other configurations were enqueued (to try some in the middle of a collection, `enqueue` "
                            "takes `after`, the number of trials that it has). "
                            f"Give this collection another `study` than {study!r}."
                        )
                    else:
                        show(known)
                for record in _run_all(run, objective, named, waiting, store, study, num_workers, deadline):
                    ended[_identity(record)] = record
                    show(record)
                for name, batch in batches.items():
                    done = [ended[_identity(trial)] for trial in batch if _identity(trial) in ended]
                    told[name] += done
                    if len(done) < len(batch):
                        asking.clear()  # the budget is spent
                    else:
                        of_first = [heard.get(_identity(record), record) for record in done]
                        states[name] = searcher.tell(states[name], of_first)
    finally:
        if isolated:
            end_children(owner)
    return [record for records in told.values() for record in records]


def _check_key(key: Any) -> None:
    """Typed keys, and those of `jax.random.PRNGKey`."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (typed and shape == () or dtype == jnp.uint32 and shape is not None and len(shape) == 1):
        got = repr(key) if shape is None else f"an array of {dtype}, shape {shape}"
        raise ValueError(f"`key` must be one key, such as `jax.random.key(0)`; got {got}.")


def _by_name(tasks: Any) -> dict[str, Any]:
    if isinstance(tasks, Mapping):
        named = dict(tasks)
    else:
        what = "`tasks` must be a dict of what the objective is given by name, or a list of what has a `name`, as"
        of_one = " `[table]` is a list of one." * hasattr(tasks, "name")
        refusal = ValueError(f"{what} `Table`s do; got {type(tasks).__name__}.{of_one}")
        if isinstance(tasks, str) or isinstance(tasks, tuple) and hasattr(tasks, "_fields"):  # one, such as a `Table`
            raise refusal
        try:
            given = iter(tasks)
        except TypeError as error:
            raise refusal from error
        tasks = list(given)
        for i, task in enumerate(tasks):
            if not hasattr(task, "name"):
                raise ValueError(f"{what} `Table`s do; `tasks[{i}]` has none, and is {type(task).__name__}.")
        named = {task.name: task for task in tasks}
    if len(named) < len(tasks):
        names = [task.name for task in tasks]
        raise ValueError(f"The names of `tasks` must differ; {max(names, key=names.count)!r} is there twice or more.")
    if unnamed := [name for name in named if not isinstance(name, str)]:
        raise ValueError(f"The names of `tasks` must be strings, as records hold them; got {unnamed[0]!r}.")
    return named


class _Isolated:
    """`run_isolated` with its limits, for joblib to send."""

    def __init__(self, time_limit, memory_limit, owner):
        self.limits = {"time_limit": time_limit, "memory_limit": memory_limit, "owner": owner}

    def __call__(self, objective, task, trial, begins_before):
        return run_isolated(objective, task, trial, begins_before=begins_before, **self.limits)


def _run_here(objective, task, trial, begins_before):
    late = begins_before is not None and time.time() >= begins_before  # a pool of processes takes seconds to start
    return None if late else run_here(objective, task, trial)


def _identity(record: base.Record) -> tuple:
    return record.task, record.trial, record.fidelity


@contextlib.contextmanager
def _alone(store, study: str) -> Iterator[None]:
    """Raises ValueError if another collection of the study is running: both would run the same trials.

    The lock file lies next to the store. Forked workers (joblib's "multiprocessing") hold the lock too; threads, loky
    and the processes of trials do not.
    """
    path = "" if store is None else os.path.realpath(store)  # through every link, it is the same file
    if store is not None and not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(
            f"The store {os.fspath(store)} cannot be made: there is no folder of it. Make that first."
        )
    if store is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locks.exclusive(f"{path}-{zlib.crc32(study.encode()):08x}.lock"))
        except _locks.Locked:
            raise ValueError(
                f"Another collection of the study {study!r} in {store} is under way, and runs the same trials. "
                "`num_workers` runs more of them at a time; another search needs another `study`."
            ) from None
        yield


def _read_ended(store, study, named, retry_failed) -> tuple[dict[tuple, base.Record], dict[tuple, base.Record]]:
    """How the trials of the study in the store ended at last, and at first; one without an end is queued again."""
    if store is None or not os.path.exists(store):
        return {}, {}
    rows = read_records(store, study=study, status=_ENDED, history=True)
    rows = [record for record in rows if record.task in named]
    last = {_identity(record): record for record in rows}
    if retry_failed:
        last = {name: record for name, record in last.items() if record.status != "FAIL"}
    return last, {_identity(record): record for record in reversed(rows)}


def _run_all(run, objective, named, trials, store, study, num_workers, deadline) -> Iterator[base.Record]:
    """The records of trials as they end, each appended to the store at once."""
    if not trials:
        return
    try:
        import joblib
    except ImportError as error:
        raise ImportError('`collect` needs joblib; install it with `pip install "metaopt-jax[records]"`.') from error
    stopped = False

    def jobs():
        for trial in trials:  # taken by joblib when a worker is free
            left = deadline - time.monotonic()
            if stopped or left <= 0:
                return
            if store is not None:
                append_records(store, [trial._replace(status="RUNNING")], study=study)
            begins_before = time.time() + left if left < float("inf") else None
            yield joblib.delayed(run)(objective, named[trial.task], trial, begins_before)

    backend: Any = joblib.parallel.get_active_backend(prefer="threads")[0]
    as_they_end = {"return_as": "generator_unordered", "pre_dispatch": "n_jobs"}
    streams = backend.supports_return_generator  # Ray's does not
    kwargs: dict[str, Any] = {"batch_size": 1} | (as_they_end if streams else {})
    parallel: Any = joblib.Parallel(n_jobs=num_workers, prefer="threads", **kwargs)
    at_once = None if streams else joblib.effective_n_jobs(parallel.n_jobs)
    waiting = jobs()
    try:
        while some := list(itertools.islice(waiting, at_once)) if at_once else waiting:
            for record in parallel(some):
                if record is None:  # it had no time to begin
                    continue
                if store is not None:
                    append_records(store, [record], study=study)
                yield record
            if not at_once:
                break
    finally:
        stopped = True


@contextlib.contextmanager
def _progress(total: float, show: bool | None) -> Iterator[Callable[[base.Record], None]]:
    """Yields a function that counts a record, one that the store already had included."""
    done, counts = 0.0, {"failed": 0, "pruned": 0}
    with report_progress(total, show, "{failed} failed, {pruned} pruned", unit="trial", failed=0, pruned=0) as report:

        def count(record):
            nonlocal done
            done += record.fidelity
            counts["failed"] += record.status == "FAIL"
            counts["pruned"] += record.status == "PRUNED"
            report(done, **counts)

        yield count

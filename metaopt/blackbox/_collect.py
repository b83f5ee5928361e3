"""Collects records from any searcher and any Python callable, on many tasks at a time.

You can interrupt a collection at any point and continue it later. There is one loop. In each round, `collect` asks the
searcher of every task for a batch of trials, shortly before a worker is free for them. joblib runs the trials. Then
every searcher receives the records of the trials that it proposed, in the order of its proposals. A trial depends only
on its own seed. So the records depend on the batch size, but not on the number of workers.

To continue a collection, call `collect` again. It asks the searchers from the start, which gives the same trials.
Trials that have ended, according to the store, do not run again; the searcher receives their stored records. The state
of a searcher is never saved.
"""

import collections
import contextlib
import logging
import math
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from metaopt import _locks, base
from metaopt._progress import report_progress
from metaopt.blackbox._origins import check_origins
from metaopt.blackbox._random_search import random_search
from metaopt.blackbox._records import read_records
from metaopt.blackbox._trials import ObjectiveFn, end_children, memory_is_known
from metaopt.blackbox._workers import Isolated, Runner, identity, run_all, run_in_worker, workers

_log = logging.getLogger(__name__)

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
    backend: str | None = None,
    isolated: bool = True,
    time_limit: float | None = None,
    memory_limit: float | None = None,
    budget: float | None = None,
    progress: bool | None = None,
) -> list[base.Record]:
    """Runs trials of an objective on tasks, and records them.

    By default every trial runs in a spawned child process. If a trial raises, returns a non-finite number, crashes or
    exceeds a limit, its record has status "FAIL" and a reason, and the collection continues. joblib's workers only
    start the child processes and wait for them. (A process pool would lose its other trials when one of its processes
    is ended.) By default the workers are threads. `backend`, or `joblib.parallel_config(backend=...)`, makes them
    processes of loky, Dask (extra `dask`) or Ray (extra `ray`). The children of a worker run on its machine. For
    example:

        client = distributed.Client("scheduler:8786")         # or `ray.init("auto")` and `backend="ray"`
        records = blackbox.collect(objective, space, named, num_trials=100, key=key, store="records.db", backend="dask")

    If a worker is lost, for example because its machine is gone, its trials run again. They depend only on their seeds,
    so the records are the same. Dask and Ray send such trials to another worker. If a backend gives up, or cannot do
    so, `collect` restarts all trials that were running, and logs a warning. If a backend reports three losses in a row,
    and no trial ends between them, `collect` raises its error. The store then has all trials that have ended, and the
    next call continues.

    Only this process writes to the store, as soon as a trial ends. With Ray, it writes after each group of trials that
    ran at the same time. If the workers of a backend are processes, the backend must be able to send the objective and
    the tasks to them.

    Args:
      objective: `(trial, task) -> outcome`, a number; smaller is better. It may return several outcomes: a dict by
        name, or a tuple, whose names are "0", "1" and so on. The records keep all of them (`outcomes`). Searchers use
        the first one, unless they have an argument `objectives`. `trial` is a `Record`. The objective should use
        `trial.configuration` (plain values by name) and use `trial.seed` for all random numbers. It should also use
        `trial.fidelity` if the searcher proposes fractions of the full budget. It may raise
        `blackbox.Pruned(outcome)`. If it forks its process, the fork ends when the objective returns or raises, and its
        result is ignored.
      space: a tree of leaves.
      tasks: the second arguments of the objective: a dict by name, or a list of objects with a `name`, such as
        `tasks.Table`s.
      num_trials: the number of full budgets to spend on each task; a trial at fidelity 1/9 counts as 1/9.
      key: the key of the search. The key of each task is folded from it and the name of the task.
      searcher: by default `random_search()`: first the default of the space, then random configurations. `enqueue`
        places your own configurations before or among those of any searcher.
      batch_size: the number of trials that a task's searcher proposes at a time. The searcher receives their
        records before the next batch. By default 1. The default random search (`searcher=None`) does not need
        records. So its trials do not wait for one another, and it proposes trials as workers become free.
      same_trials: whether the searchers of all tasks get the same key. Random search then tries the same configurations
        with the same seeds on every task, and the records form a matrix.
      resumes: whether the objective continues a trial from its own checkpoint of a lower fidelity. Then only the
        difference of the two fidelities counts as spent.
      store: a file of records (`append_records`), created if it does not exist; None stores nothing. A trial that has
        ended in the store is not run again, even if it failed (see `retry_failed`). So `collect` raises an error if the
        NumPy or JAX arrays, or the pandas frames, in a task (a pytree) have changed since then. The log warns once if
        the source text of the objective has changed. `collect` does not detect other changes: of numbers or other
        objects in a task, of files that the objective reads, or of functions that it calls. After such a change, use
        another `store` or `study`. During a collection, a lock file lies next to the store; its name ends in `.lock`. A
        killed collection may leave this file behind; it is harmless.
      study: the name of the collection in the store. To continue a collection, call again with the same space,
        searcher, `batch_size`, `same_trials`, `resumes` and key. `num_trials` may be larger, tasks may be added or left
        out, and configurations may be enqueued `after` the trials that have run. Only one collection of a study runs at
        a time. Several studies may share a store.
      retry_failed: whether to run failed trials once more, in every call with this argument. The new record replaces
        the old one, which stays in the store (`read_records(history=True)`). The searcher still receives the record of
        the failure, so that it proposes the same trials as before.
      num_workers: the number of trials that run at a time, on one core each: joblib's `n_jobs`. If `batch_size` or
        `searcher` is given, at most `batch_size` trials of each task run at a time.
      backend: of joblib, such as "loky", "dask" or "ray". None uses that of `joblib.parallel_config`, or else threads.
        Dask uses all cores of its cluster. So does Ray, if `num_workers` is None.
      isolated: whether trials run in child processes, on POSIX systems. Otherwise they run in joblib's workers. This is
        faster for trials that take milliseconds. But then `time_limit` and `memory_limit` are impossible, and a crash
        ends this process, or the worker process in which the trial runs.
      time_limit: seconds for each trial. None sets no limit, and a trial that hangs stops the collection.
      memory_limit: MiB for the process of a trial and the processes that it starts, read 20 times a second, on Linux.
        Python with metaopt and JAX takes 200 to 300 MiB.
      budget: seconds for the whole collection; None or `inf` sets no limit. After this time, no trial begins. Running
        trials continue until they end or reach their limit. So a collection exceeds its budget by less than the limit
        of one trial. Workers on other machines should have the same clock. Trials that were about to begin stay
        "RUNNING" in the store until the next call.
      progress: None reports trials on standard error: with a bar in a terminal or notebook, otherwise with a line every
        10 s. With one task and one outcome, the report has the best outcome so far. True also prints a line at the end
        of a short collection; False reports nothing.

    Returns:
      The records of these tasks, each "COMPLETE", "PRUNED" or "FAIL", ordered by task and then by trial. Trials that
      did not begin within the budget have no record.

    Raises:
      KeyboardInterrupt: if SIGINT (Ctrl-C) arrived. The store has all trials that were written before. Without a
        store, the records are lost.
      ValueError: if an argument is invalid.
      ValueError: if the store has this study from another space, searcher or key, or from other data of a task,
        or another collection of it is running.
      FileNotFoundError: if the folder of the store does not exist.
      RuntimeError: if a child cannot start, or cannot read the objective or a task.
      ImportError: if joblib, Dask, Ray or (for isolated trials) cloudpickle is needed and not installed.

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> def objective(trial, task):
    ...     return (trial.configuration["x"] - task) ** 2
    >>> space = {"x": spaces.interval(-1.0, 1.0)}
    >>> kwargs = {"num_trials": 3, "key": jax.random.key(0), "isolated": False}
    >>> records = blackbox.collect(objective, space, {"left": -0.5, "right": 0.5}, **kwargs)
    >>> [(record.task, record.trial, record.status) for record in records][2:4]
    [('left', 2, 'COMPLETE'), ('right', 0, 'COMPLETE')]
    >>> records[0].configuration, records[0].outcome
    ({'x': 0.0}, 0.25)
    """
    if not num_trials < float("inf"):  # inf and NaN would never end
        raise ValueError(
            f"`num_trials` must be finite; got {num_trials}. Give a large number, and a `budget` in seconds."
        )
    _check_limits(isolated, time_limit, memory_limit)
    named = _by_name(tasks)
    # Random search proposes the same trials, one at a time or all at once.
    all_at_once = batch_size is None and searcher is None
    searcher = random_search() if searcher is None else searcher
    task_key = lambda name: key if same_trials else jax.random.fold_in(key, zlib.crc32(name.encode()))
    searches = [
        _TaskSearch(name, searcher, searcher.init(task_key(name), space), num_trials, resumes) for name in named
    ]
    owner = uuid.uuid4().hex
    run = Isolated(time_limit, memory_limit, owner) if isolated else run_in_worker
    deadline = float("inf") if budget is None else time.monotonic() + budget
    trial_runner = Runner(run, objective, named, store, study, num_workers, deadline)
    try:
        with _alone(store, study), workers(backend, num_workers), _progress(num_trials, len(named), progress) as report:
            _search(searches, trial_runner, batch_size or 1, all_at_once, retry_failed, report)
    except KeyboardInterrupt as error:
        if error.args:  # the message of a `fit` in the objective names its checkpoint
            raise
        # joblib's traceback is long, and does not state which trials are stored.
        raise KeyboardInterrupt(_interrupted(store)) from None
    finally:
        if isolated:
            end_children(owner)
    return [record for search in searches for record in search.records]


def _interrupted(store: Any) -> str:
    """The message of the exception for Ctrl-C."""
    if store is None:
        return "Ctrl-C ended the collection. Its records are lost, because it has no `store`."
    return (
        f"Ctrl-C ended the collection. {os.fspath(store)} has all trials that were written before: the same call "
        "continues from there."
    )


def _search(
    searches: "list[_TaskSearch]",
    runner: Runner,
    batch_size: int,
    all_at_once: bool,
    retry_failed: bool,
    report: Callable[[base.Record], None],
) -> None:
    """Runs rounds until all searches have ended, or time is over."""

    def read(stored, trial):
        _check_same(stored, trial, runner.store, runner.study)
        report(stored)

    # A searcher receives the first end of a trial, even if a failed trial was run again.
    last_end, first_end = _read_ended(runner, retry_failed)
    if runner.store is not None:
        check_origins(runner, {record.task for record in last_end.values()})
    if last_end:
        _log.info("%s has %d trials of these tasks, which do not run again.", runner.store, len(last_end))
    while searching := [search for search in searches if not search.ended]:
        trials = _ask_round(searching, batch_size, all_at_once, last_end, runner.deadline, read)
        for record in run_all(runner, trials):
            last_end[identity(record)] = record
            report(record)
        for _ in trials:  # `run_all` stops at the deadline; this reads the remaining ended trials of the store
            pass
        if not all([search.tell(last_end, first_end) for search in searching]):
            break


class _TaskSearch:
    """The search on one task.

    Attributes:
      name: the name of the task.
      records: the records of the trials that have ended, in the order of the trials.
      batch: the trials of this round.
      whole: whether the searcher was asked for all trials of this round.
      ended: whether the searcher will not be asked again.
    """

    def __init__(self, name: str, searcher: base.Searcher, state: Any, num_trials: float, resumes: bool):
        self.name, self.records, self.batch, self.whole, self.ended = name, [], [], False, False
        self._searcher, self._state, self._num_trials = searcher, state, num_trials
        self._spent = 0.0  # in full budgets
        self._paid_fidelity: dict[int, float] | None = {} if resumes else None  # the highest fidelity of each trial

    def ask(self, num: int) -> list[base.Record]:
        """Asks for a whole batch even if `num_trials` allows fewer, so that a later call may raise `num_trials`."""
        asked, self._state = self._searcher.ask(self._state, num)
        trials = []
        for trial in asked:
            if self._spent < self._num_trials - 1e-6:  # a sum of thirds is not exactly an integer
                self._spent += trial.fidelity
                if self._paid_fidelity is not None:
                    self._spent -= self._paid_fidelity.get(trial.trial, 0.0)
                    self._paid_fidelity[trial.trial] = trial.fidelity
                trials.append(trial._replace(task=self.name))
        self.ended = not asked or self._spent >= self._num_trials - 1e-6
        self.batch += trials
        return trials

    def tell(self, last_end: dict[tuple, base.Record], first_end: dict[tuple, base.Record]) -> bool:
        """Ends a round. If all trials have ended, the searcher receives their records. Returns whether they have."""
        done = [last_end[identity(trial)] for trial in self.batch if identity(trial) in last_end]
        self.records += done
        complete = self.whole and len(done) == len(self.batch)
        if complete:
            first_records = [first_end.get(identity(record), record) for record in done]
            self._state = self._searcher.tell(self._state, first_records)
        return complete


def _ask_round(
    searches: list[_TaskSearch],
    batch_size: int,
    all_at_once: bool,
    ended: Mapping[tuple, base.Record],
    deadline: float,
    read: Callable[[base.Record, base.Record], None],
) -> Iterator[base.Record]:
    """Asks the searchers for one batch after the other, and yields the trials that have to run.

    With `all_at_once`, all trials of a search form one round. `read(stored, trial)` is called for each trial that has
    ended. After the deadline, this function asks a searcher only while the store has more of the searcher's trials.
    """
    num_stored = collections.Counter(task for task, *_ in ended)
    for search in searches:
        num_stored[search.name] -= len(search.records)
        search.batch, search.whole = [], False
    for search in searches:
        while not search.whole and (num_stored[search.name] > 0 or time.monotonic() < deadline):
            for trial in search.ask(batch_size):
                stored = ended.get(identity(trial))
                if stored is None:
                    yield trial
                else:
                    num_stored[search.name] -= 1
                    read(stored, trial)
            search.whole = search.ended or not all_at_once


def _check_same(stored: base.Record, trial: base.Record, store: Any, study: str) -> None:
    """Raises ValueError if the store has another trial under this number."""
    if (stored.configuration, stored.seed) != (trial.configuration, trial.seed):
        raise ValueError(
            f"{store} has trial {trial.trial} of {trial.task!r} with another configuration or seed than the searcher "
            "proposes now. Either the space, searcher, key or `batch_size` has changed, or other configurations "
            "were enqueued. To enqueue during a collection, pass the number of trials so far as `after` to `enqueue`; "
            f"otherwise use another `study` than {study!r}."
        )


def _check_limits(isolated: bool, time_limit, memory_limit) -> None:
    """Raises ValueError if a limit cannot be enforced here."""
    if not isolated and (time_limit is not None or memory_limit is not None):
        raise ValueError("A limit needs `isolated=True`, because a trial in this process cannot be stopped.")
    if memory_limit is not None and not memory_is_known():
        raise ValueError(
            "`memory_limit` needs Linux, whose /proc reports the memory of a process; omit it on other systems."
        )


def _by_name(tasks: Any) -> dict[str, Any]:
    if isinstance(tasks, Mapping):
        named = dict(tasks)
    else:
        tasks = list(tasks)
        names = [task.name for task in tasks]
        named = dict(zip(names, tasks, strict=True))
        if len(named) < len(names):
            name = max(names, key=names.count)
            raise ValueError(f"The names of `tasks` must differ; {name!r} occurs more than once.")
    return named


@contextlib.contextmanager
def _alone(store, study: str) -> Iterator[None]:
    """Raises ValueError if another collection of the study is running, because it would run the same trials.

    The operating system locks a file next to the store. The lock ends when this process and its forks have ended. Such
    forks are joblib's "multiprocessing" workers and forks made by the objective. The child processes of trials do not
    hold the lock.
    """
    path = "" if store is None else os.path.realpath(store)  # links to the same file share the lock
    if store is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locks.exclusive(f"{path}-{zlib.crc32(study.encode()):08x}.lock"))
        except _locks.Locked:
            raise ValueError(
                f"Another collection of the study {study!r} in {store} is running, and would run the same trials. "
                "Use `num_workers` to run more trials at a time, or another `study` for another search."
            ) from None
        yield


def _read_ended(runner: Runner, retry_failed: bool) -> tuple[dict[tuple, base.Record], dict[tuple, base.Record]]:
    """Returns two dicts, trial -> its last ended record and trial -> its first. Trials without a last one run again."""
    if runner.store is None or not os.path.exists(runner.store):
        return {}, {}
    rows = read_records(runner.store, study=runner.study, status=_ENDED, history=True)
    rows = [record for record in rows if record.task in runner.tasks]
    last_end = {identity(record): record for record in rows}
    if retry_failed:
        last_end = {name: record for name, record in last_end.items() if record.status != "FAIL"}
    return last_end, {identity(record): record for record in reversed(rows)}


@contextlib.contextmanager
def _progress(num_trials: float, num_tasks: int, show: bool | None) -> Iterator[Callable[[base.Record], None]]:
    """Yields a function that counts a record, including records that the store already had.

    It shows the best outcome at the full budget if there is one task: those of several tasks have different scales.
    """
    done, best, counts = 0.0, math.inf, {"failed": 0, "pruned": 0}
    text = "{failed} failed, {pruned} pruned{best}"
    total = num_trials * num_tasks
    with report_progress(total, show, text, unit="trial", failed=0, pruned=0, best="") as report:

        def count(record):
            nonlocal done, best
            done += record.fidelity
            counts["failed"] += record.status == "FAIL"
            counts["pruned"] += record.status == "PRUNED"
            if num_tasks == 1 and record.status == "COMPLETE" and record.fidelity == 1 and record.outcomes is None:
                best = min(best, record.outcome)
            report(done, best=f", best outcome {best:.4g}" if best < math.inf else "", **counts)

        yield count

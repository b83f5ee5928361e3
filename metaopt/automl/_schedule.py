"""Fits the members of a portfolio on all folds, within a time limit."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metaopt.automl import _kinds, _workers
from metaopt.automl._kinds import FoldData
from metaopt.automl._portfolio import Member
from metaopt.automl._time_model import TimeModel

_log = logging.getLogger(__name__)

_QUICK_SECONDS = 1.0  # a member whose folds take less in total comes first


class FoldResult(NamedTuple):
    """A model of one fold, its predictions of the validation rows, and the seconds of fit and prediction."""

    model: Any
    predicted: np.ndarray
    fit_seconds: float
    predict_seconds: float


class MemberResult(NamedTuple):
    """A member that is fitted on all folds."""

    member: Member
    folds: list[FoldResult]


class Clock:
    """Measures the time that is left of `limit` seconds. None means no limit."""

    def __init__(self, limit: float | None):
        self.start, self.limit = time.monotonic(), limit

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - self.elapsed()


class Work(NamedTuple):
    """How the members are fitted.

    Attributes:
      folds: the data of each fold, for all kinds but the network.
      network_task: `(settings) -> (function, *arguments)`. In another process, the function trains a network on
        all folds, and returns their `FoldResult`s.
      times: predicts the seconds of fits.
      clock: the clock of the whole `fit`.
      reserve: seconds that are kept for the end.
      num_jobs: the number of fits at a time.
    """

    folds: list[FoldData]
    network_task: Callable[[dict[str, Any]], tuple]
    times: TimeModel
    clock: Clock
    reserve: float
    num_jobs: int


def fit_members(
    members: list[Member], work: Work, finished: Callable[[MemberResult, int], None]
) -> tuple[list[MemberResult], dict[str, str]]:
    """Fits members until all are fitted or the time is over.

    A quick member comes first, so that there is a result. Then the first network of the portfolio begins, if its
    expected seconds are below 70 % of the time left. After that, the next member is the one with the largest expected
    gain per second among those that fit in the time left. The expected gain of the i-th member of the portfolio is 1/i.
    If none of them fits in the time left, and no member has begun, the fastest one begins.

    Networks run in a process of their own, and other members in worker processes. If there is a result when the time is
    over, processes that still work are killed. They are also killed if a fit takes much longer than expected
    (`TimeModel.longest_seconds`), because some libraries can hang. A member that hangs or crashes is lost; folds of
    other members in the killed processes begin again. If this process cannot start others, all members run in one
    thread of it. If the time is over, the thread ends after the fold that it fits.

    Args:
      members: the portfolio, the most useful members first.
      work: see `Work`.
      finished: called after each member, with the member and the number of members that are done.

    Returns:
      The fitted members, in the order of the portfolio; and a dict with the reason why each other member has no result,
        by its name.
    """
    run = _Run(members, work)
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        while run.start_tasks():
            done, _ = concurrent.futures.wait(run.running, run.patience(), concurrent.futures.FIRST_COMPLETED)
            if not done and run.is_over():
                run.stop()
                break
            if not done:
                run.stop_hung()
            for future in done:
                member = run.collect(future)
                if member is not None:
                    finished(member, len(run.results) + len(run.failed))
    ordered = [run.results[member.name] for member in members if member.name in run.results]
    late = {member.name: "would take longer than the time left" for member in members if member.name not in run.results}
    return ordered, late | run.failed


class _Run:
    """The state of `fit_members`.

    Attributes:
      waiting: members that have not begun, by name, with their place in the portfolio.
      begun: members whose folds are not all submitted yet.
      running: future -> (member, fold); the fold is None for a network, which is trained on all folds at once.
      parts: the results of the folds of unfinished members.
      results: finished members.
      began: future -> the time at which its fit began, in another process.
      failed: the reason of each member that failed or was stopped.
      alone: tasks that ran while no other task was running.
      network_began: whether the first network has begun.
    """

    def __init__(self, members: list[Member], work: Work):
        self.work = work
        self.waiting = {member.name: (place, member) for place, member in enumerate(members)}
        self.begun: list[tuple[Member, list[int]]] = []
        self.running: dict[concurrent.futures.Future, tuple[Member, int | None]] = {}
        self.began: dict[concurrent.futures.Future, float] = {}
        self.parts: dict[str, dict[int, FoldResult]] = {}
        self.results: dict[str, MemberResult] = {}
        self.failed: dict[str, str] = {}
        self.alone: set[concurrent.futures.Future] = set()
        self.network_began = False
        num_fits = len(work.folds) * sum(member.kind != "network" for member in members)
        self.num_workers = min(work.num_jobs, num_fits)
        self.has_processes = _workers.can_start()
        # Without processes, only one thread, since fits change settings of warnings and thread pools for all threads.
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        if self.has_processes:
            try:
                worker = _workers.workers(self.num_workers) if num_fits else _workers.network_worker()
                worker.submit(int)  # the processes start now
            except (OSError, NotImplementedError, RuntimeError) as error:  # for example without semaphores
                _log.warning("no processes can be started (%s), so models are fitted one after another", error)
                self.has_processes = False
        self.num_slots = work.num_jobs if self.has_processes else 1

    def time_left(self) -> float:
        return self.work.clock.left() - self.work.reserve

    def is_over(self) -> bool:
        """Whether the time is over. The first result is awaited, however late it is."""
        return bool(self.results) and self.time_left() <= 0

    def patience(self) -> float | None:
        """Seconds until the time is over or a fit is taken to hang. None means forever."""
        ends = [self.deadline(future) - time.monotonic() for future in self.began]
        if self.results and self.work.clock.limit is not None:
            ends.append(self.time_left())
        return max(0.0, min(ends)) if ends else None

    def deadline(self, future: concurrent.futures.Future) -> float:
        """The time at which a fit is taken to hang.

        A fit has more time if there is no result yet. It also has more time without a limit, because results then must
        not depend on the speed of the machine.
        """
        member, is_hurried = self.running[future][0], bool(self.results) and self.work.clock.limit is not None
        num_folds = len(self.work.folds)
        return self.began[future] + self.work.times.longest_seconds(member.kind, member.settings, num_folds, is_hurried)

    def seconds(self, member: Member) -> float:
        """Expected seconds of a member on all workers."""
        times, num_folds = self.work.times, len(self.work.folds)
        if member.kind == "network":
            return times.network_seconds(member.settings, num_folds)
        return times.fit_seconds(member.kind, member.settings) * -(-num_folds // self.work.num_jobs)

    def start_tasks(self) -> bool:
        """Starts tasks while there are free slots. Returns whether a task runs."""
        while len(self.running) < self.num_slots:
            if not self.begun:
                member = self.next_member()
                if member is None:
                    break
                self.parts[member.name] = {}
                self.begun.append((member, [] if member.kind == "network" else list(range(len(self.work.folds)))))
            member, folds = self.begun[0]
            if member.kind == "network":
                self.begun.pop(0)
                self.start_network(member)
                continue
            fold = folds.pop(0)
            workers = _workers.workers(self.num_workers) if self.has_processes else self.thread
            task = (_kinds.fit_fold, member.kind, member.settings, self.work.folds[fold])
            future = self.start(workers, task, member, fold)
            if self.num_slots == 1:
                self.alone.add(future)
            if not folds:
                self.begun.pop(0)
        return bool(self.running)

    def start_network(self, member: Member) -> None:
        worker = _workers.network_worker() if self.has_processes else self.thread
        worker.submit(int)  # a new process starts now
        try:
            self.start(worker, self.work.network_task(member.settings), member, None)
        except Exception as error:  # a library's, or the new process has ended
            self.fail(member, error)

    def start(self, workers: Any, task: tuple, member: Member, fold: int | None) -> concurrent.futures.Future:
        future = workers.submit(*task)
        self.running[future] = (member, fold)
        if self.has_processes:
            self.began[future] = time.monotonic()
        return future

    def next_member(self) -> Member | None:
        """Takes the waiting member with the largest gain per second among those that fit in the time left."""
        quick = [m for _, m in self.waiting.values() if m.kind != "network" and self.is_quick(m)]
        if quick and not self.parts:
            return self.waiting.pop(quick[0].name)[1]
        first = next((m for _, m in self.waiting.values() if m.kind == "network"), None)
        if first is not None and not self.network_began and self.seconds(first) < 0.7 * self.time_left():
            self.network_began = True  # its compilation uses one core, next to other models
            return self.waiting.pop(first.name)[1]
        gains = {}  # per second
        for name, (place, member) in self.waiting.items():
            seconds = self.seconds(member)
            if seconds < self.time_left() and not (self.network_runs() and member.kind == "network"):
                gains[name] = 1 / (1 + place) / max(seconds, 1e-3)
        if gains:
            return self.waiting.pop(max(gains, key=gains.__getitem__))[1]
        if self.parts.keys() - self.failed.keys() or not self.waiting:
            return None
        # A late result is better than none.
        durations = {name: self.seconds(member) for name, (_, member) in self.waiting.items()}
        fastest = min(durations, key=durations.__getitem__)  # of equally fast ones, the first of the portfolio
        message = "the time limit is too short for any model; fitting %s anyway, which takes about %.0f s"
        _log.warning(message, fastest, durations[fastest])
        return self.waiting.pop(fastest)[1]

    def is_quick(self, member: Member) -> bool:
        """Whether all folds of a member other than a network take little time."""
        return self.work.times.fit_seconds(member.kind, member.settings) * len(self.work.folds) < _QUICK_SECONDS

    def network_runs(self) -> bool:
        """Whether a network is trained."""
        return any(fold is None for _, fold in self.running.values())

    def collect(self, future: concurrent.futures.Future) -> MemberResult | None:
        """Records a finished task. Returns its member if that was its last fold."""
        member, fold = self.running.pop(future)
        self.began.pop(future, None)
        if member.name in self.failed:
            return None
        try:
            result = future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            # A worker that dies ends the tasks of all workers. They run again one by one, to see whose fault it was.
            if fold is None:  # networks have a process of their own
                self.fail(member, error)
            elif future in self.alone:
                self.num_slots = self.work.num_jobs
                self.fail(member, error)
            else:
                self.num_slots = 1
                self.begun.insert(0, (member, [fold]))
            return None
        except Exception as error:  # a library's
            self.fail(member, error)
            return None
        if fold is None:
            seconds = sum(part.fit_seconds for part in result)
            self.work.times.observe_network(member.settings, len(result), seconds)
            self.parts[member.name] = dict(enumerate(result))
        else:
            self.work.times.observe(member.kind, member.settings, result[2])
            self.parts[member.name][fold] = FoldResult(*result)
        parts = self.parts[member.name]
        if len(parts) < len(self.work.folds):
            return None
        results = [parts[i] for i in range(len(parts))]
        try:
            self.results[member.name] = MemberResult(member, _settled(member.kind, results, self.work.folds))
        except Exception as error:  # a library's
            self.fail(member, error)
            return None
        return self.results[member.name]

    def fail(self, member: Member, error: BaseException) -> None:
        """Records why a member has failed, and drops the rest of its folds."""
        self.failed[member.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        _log.warning("the model %s failed: %s", member.name, self.failed[member.name])
        self.begun = [(other, folds) for other, folds in self.begun if other.name != member.name]

    def stop_hung(self) -> None:
        """Ends the workers of fits that hang. Other fits of these workers begin again."""
        now = time.monotonic()
        tasks = {future: task for future, task in self.running.items() if not future.done()}
        hung = {future for future in tasks if self.deadline(future) <= now}
        networks = {future for future, (_, fold) in tasks.items() if fold is None}
        for name, ended in (("network", networks), (self.num_workers, tasks.keys() - networks)):
            if not hung & ended:
                continue
            _workers.stop(name)
            self.num_slots = self.work.num_jobs  # if one task ran alone
            for future in ended:
                member, fold = self.running.pop(future)
                del self.began[future]
                if fold is not None and future not in hung and member.name not in self.failed:
                    self.begun.insert(0, (member, [fold]))
            for member in {tasks[future][0].name: tasks[future][0] for future in hung & ended}.values():
                if member.name not in self.failed:
                    self.fail(member, TimeoutError("took much longer than expected, and was stopped"))

    def stop(self) -> None:
        """Ends the workers: the time is over."""
        for member, _ in self.running.values():
            self.failed.setdefault(member.name, "out of time")
        if self.has_processes and self.network_runs():
            _workers.stop("network")
        if self.has_processes and any(fold is not None for _, fold in self.running.values()):
            _workers.stop(self.num_workers)
        self.running.clear()

    def close(self) -> None:
        if self.running:  # the caller was interrupted, or its `finished` has failed
            self.stop()
        self.thread.shutdown(wait=False, cancel_futures=True)


def _settled(kind: str, results: list[FoldResult], folds: list[FoldData]) -> list[FoldResult]:
    """The results with the final number of rounds, for kinds that have rounds."""
    if kind == "network" or _kinds.KINDS[kind].best_rounds is None:
        return results
    settled = _kinds.settled(kind, [result.model for result in results], folds)
    return [
        result._replace(model=model, predicted=predicted)
        for result, (model, predicted) in zip(results, settled, strict=True)
    ]

"""Runs one trial at a time in a child process. If the child crashes, this is recorded and the search goes on.

A child is started by `exec`, never by a fork of a process in which JAX runs threads. It serves one trial after another,
because starting Python with JAX takes seconds. So the next trial finds the side effects of earlier ones: caches, the
working directory, and the state of random generators other than those of `random` and NumPy.

If a trial exceeds a limit, its child is ended, together with the processes that it started. If a trial ends the child
(by a segmentation fault, or because the system kills it), this gives a record, too. A child whose parent is gone ends
itself.

A process that a trial has started in a separate session (`setsid`, a daemon) can survive. It survives if the child ends
by itself, or if the child's parent is gone. If a limit ends the child, then on Linux only processes that have lost
their own parent survive. On other systems, every process in a separate session survives.

Objective, task and trial are sent by cloudpickle: functions of a notebook and of `__main__` are sent by value.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from metaopt import _extras
from metaopt.base import Record


class ObjectiveFn(Protocol):
    """A black box: `(trial, task) -> outcome`, a number; smaller is better. Several outcomes are a dict or a tuple."""

    def __call__(self, trial: Record, task: Any, /) -> float | Mapping[str, float] | Sequence[float]: ...


_SECONDS_TO_START = 300.0
# One thread per trial, unless the environment states another number. With one thread, workers do not compete for cores,
# and the order of sums does not depend on the number of workers.
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Pruned(Exception):
    """An objective raises it to end its trial early: `raise blackbox.Pruned(outcome)`. The trial's status is "PRUNED".

    With a text, as in `raise blackbox.Pruned("too slow")`, the text is the reason in the record, and the outcome is
    NaN. An objective with several outcomes passes all of them in the form in which it returns them; NaN is an unknown
    outcome.
    """


def run_here(objective: ObjectiveFn, task: Any, trial: Record) -> Record:
    """Runs a trial in this process: an exception becomes a record, and limits are not supported.

    If the objective forks the process, only the original process returns. A fork that leaves the objective ends at
    once. Its exit code is 0, or the code of its `SystemExit`; after another exception it prints a traceback, and the
    code is 1.

    Args:
      objective: `(trial, task) -> outcome`, a number; smaller is better. Several outcomes are a dict by name, or a
        tuple, whose names are then "0", "1" and so on.
      task: the argument of the objective.
      trial: the trial to run.

    Returns:
      The trial with its outcome, cost, status and reason.
    """
    start, outcome, outcomes, reason = time.perf_counter(), math.nan, None, ""
    # A copy, because objectives often call `kwargs.pop("kind")`. The record, the searcher and the store must keep the
    # original configuration.
    running = trial._replace(status="RUNNING", configuration=dict(trial.configuration))
    try:
        outcome, outcomes = _as_outcomes(_call_without_forks(objective, running, task))
        status = "COMPLETE"
    except Pruned as pruned:
        status, reason = "PRUNED", "by the objective"
        try:
            outcome, outcomes = _as_outcomes(pruned.args[0]) if pruned.args else (math.nan, None)
        except Exception:
            reason = _text(pruned.args[0])
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            raise  # `training.fit` in the objective has received the signal that this process must end
        status, reason = "FAIL", f"{type(error).__name__}: {_text(error)}"
    if status == "COMPLETE":
        every = {"": outcome} if outcomes is None else outcomes
        if lost := [(name, value) for name, value in every.items() if not math.isfinite(value)]:
            name, value = lost[0]
            outcome, outcomes, status = math.nan, None, "FAIL"
            reason = f"the outcome {name!r} is {value}" if name else f"the outcome is {value}"
    record = trial._replace(outcome=outcome, outcomes=outcomes, status=status, reason=reason)
    return record._replace(cost=time.perf_counter() - start)


def _as_outcomes(value: Any) -> tuple[float, dict[str, float] | None]:
    """Returns the first outcome, and all of them by name if the objective has returned a dict, a tuple or a list."""
    if isinstance(value, (tuple, list)):
        value = {str(number): outcome for number, outcome in enumerate(value)}
    if not isinstance(value, Mapping):
        return float(value), None
    if not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"several outcomes must have names, which are strings; got {value!r}")
    outcomes = {name: float(outcome) for name, outcome in value.items()}
    return next(iter(outcomes.values())), outcomes


def _call_without_forks(objective: ObjectiveFn, trial: Record, task: Any) -> Any:
    """Calls the objective. A fork made by the objective ends here: it must not store, report or clean up."""
    process, code = os.getpid(), 0
    _flush()  # so that a fork does not write again what this process has buffered
    try:
        return objective(trial, task)
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif os.getpid() != process:
            traceback.print_exc()
        raise
    finally:
        if os.getpid() != process:
            _flush()
            os._exit(code & 0xFF)  # runs no `finally` and no exit handler: those belong to the original process


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a stream may be None, closed or full
            stream.flush()


def _text(value: Any) -> str:
    """Returns the text of a value in a form that files accept: messages may contain file names that are not UTF-8."""
    try:
        return str(value)[:2_000].encode("utf-8", "backslashreplace").decode()
    except Exception as error:
        return f"(no text: {type(error).__name__})"


class _Child(NamedTuple):
    process: subprocess.Popen
    connection: Connection


_idle: list[_Child] = []
_busy: dict[int, tuple[str, _Child]] = {}  # process -> (owner, child)


def run_isolated(
    objective: ObjectiveFn,
    task: Any,
    trial: Record,
    *,
    time_limit: float | None = None,
    memory_limit: float | None = None,
    owner: str = "",
    begins_before: float | None = None,
) -> Record | None:
    """Runs a trial in a child.

    Args:
      objective: `(trial, task) -> outcome`.
      task: any argument that the objective takes.
      trial: the trial to run; `random` and `numpy.random` of the child are seeded with its seed.
      time_limit: seconds, without the child's start and imports.
      memory_limit: MiB of the child and the processes that it starts, including Python and its libraries.
      owner: the owner of the trial, for `end_children`.
      begins_before: the deadline, by `time.time()`, for the beginning of the trial: a child takes seconds to start.

    Returns:
      The trial with its outcome, cost, status and reason; None if it could not begin in time.

    Raises:
      RuntimeError: if a child cannot be started, or cannot read the objective or the task.
      ImportError: if cloudpickle is not installed.
    """
    cloudpickle = _extras.require("cloudpickle", "records", "An isolated trial")
    start = time.perf_counter()
    seconds_left = lambda: math.inf if begins_before is None else begins_before - time.time()
    message = cloudpickle.dumps((objective, task, trial))
    child = _take(seconds_left())
    if child is None:
        return None
    _busy[child.process.pid] = owner, child
    fails = lambda reason: trial._replace(status="FAIL", cost=time.perf_counter() - start, reason=reason)
    reuse_child = False
    try:
        child.connection.send_bytes(message)
        for answer_of in ("read", "run"):
            start = time.perf_counter()
            # Reading imports the modules of the objective. The time limit of the first trial must not include this.
            reads = answer_of == "read"
            limit = None if time_limit is None else time_limit + (_SECONDS_TO_START if reads else 0)
            exceeded = _wait(child, min(limit or math.inf, seconds_left()) if reads else limit, memory_limit)
            if exceeded and reads and seconds_left() <= 0:
                return None
            if exceeded:
                return fails(f"{exceeded} (while it read the objective and the task)" if reads else exceeded)
            answer = child.connection.recv()
            if reads and answer is not None:
                raise RuntimeError(
                    f"A trial's process cannot read the objective or the task: {answer}. Their modules must be "
                    "importable there; `isolated=False` runs trials in this process."
                )
        assert isinstance(answer, Record)
        reuse_child = memory_limit is None or _memory(child.process.pid) < memory_limit / 2
        return answer
    except (EOFError, ConnectionError):
        return fails(_how_it_ended(child.process))
    finally:
        _busy.pop(child.process.pid, None)
        if reuse_child:
            _idle.append(child)
        else:
            _end(child)


def end_children(owner: str) -> None:
    """Ends the children that run the trials of an owner, and all idle children.

    Args:
      owner: as in `run_isolated`.
    """
    for child_owner, child in list(_busy.values()):
        if child_owner == owner:
            _kill(child)  # the thread that waits for the child cleans up
    while (child := _take_idle()) is not None:
        _end(child)


def _take_idle() -> _Child | None:
    """Returns an idle child, or None; other threads take idle children, too."""
    try:
        return _idle.pop()
    except IndexError:
        return None


atexit.register(end_children, "")


def memory_is_known() -> bool:
    """Returns whether the memory of a process can be read here.

    Returns:
      True on Linux.
    """
    return Path("/proc/self/statm").is_file()


def _take(seconds: float) -> _Child | None:
    """Returns a child that waits for a trial, or None if none is ready within `seconds`."""
    while (child := _take_idle()) is not None:
        if child.process.poll() is None:
            return child
        _end(child)
    own_end, child_end = multiprocessing.Pipe()
    environment = _THREADS | os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from metaopt.blackbox import _trials; _trials._serve({child_end.fileno()})"],
        stdin=subprocess.PIPE,  # never written to: it closes when the parent ends
        env=environment,
        pass_fds=[child_end.fileno()],
        start_new_session=True,  # so that its own processes end with it, and Ctrl-C does not reach it
    )
    child_end.close()
    child = _Child(process, own_end)
    try:
        if own_end.poll(max(0.0, min(_SECONDS_TO_START, seconds))) and own_end.recv() == "ready":
            return child
    except (EOFError, ConnectionError):
        seconds = math.inf  # the child has ended by itself
    if seconds < _SECONDS_TO_START:
        _end(child)
        return None
    reason = "it did not start in time" if process.poll() is None else _how_it_ended(process)
    _end(child)
    raise RuntimeError(f"A process for trials cannot be started ({reason}); its error is above, on standard error.")


def _serve(descriptor: int) -> None:
    """The child's own loop: receives a trial, sends None (or why it cannot read the trial), then sends the record."""
    parent_pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def end_with_the_parent():
        os.read(parent_pipe, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    connection = Connection(descriptor)
    connection.send("ready")
    while True:
        try:
            objective, task, trial = connection.recv()
        except EOFError:
            return
        except BaseException as error:
            connection.send(f"{type(error).__name__}: {_text(error)}")
            continue
        connection.send(None)
        random.seed(trial.seed)
        np.random.seed(trial.seed)
        record = run_here(objective, task, trial)
        del objective, task, trial
        connection.send(record)


def _wait(child: _Child, time_limit, memory_limit) -> str:
    """Waits for the child's answer. Returns the limit that the child exceeded, or "". Raises EOFError if the child has
    ended.
    """
    start = time.perf_counter()
    while True:
        seconds_left = math.inf if time_limit is None else time_limit - (time.perf_counter() - start)
        ended = child.process.poll() is not None  # before polling the pipe, so that its last message is still read
        if child.connection.poll(0.0 if ended else min(max(seconds_left, 0.0), 1.0 if memory_limit is None else 0.05)):
            return ""
        if ended:  # a forked process may still hold the pipe open
            raise EOFError
        if seconds_left <= 0:
            return f"time limit of {time_limit:g} s"
        if memory_limit is not None and _memory(child.process.pid) > memory_limit:
            return f"memory limit of {memory_limit:g} MiB"


def _memory(process: int) -> float:
    """Returns the resident MiB of a process and of all processes that it has started."""
    try:
        folder = Path(f"/proc/{process}")
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for thread in (folder / "task").iterdir() for child in _children(thread)]
    except (OSError, IndexError):  # the process is gone
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(_memory(child) for child in children)


def _children(thread: Path) -> list[int]:
    try:
        return [int(child) for child in (thread / "children").read_text().split()]
    except OSError:  # the thread is gone, or the kernel does not report children
        return []


def _how_it_ended(process: subprocess.Popen) -> str:
    code = process.wait()
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {name}" + ("; the system may have run out of memory" if name == "SIGKILL" else "")


def _kill(child: _Child) -> None:
    sessions = _descendants(child.process.pid)  # before the child ends, because then they lose their parent
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # the whole group is gone
        pass
    for process in sessions:
        try:
            os.kill(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # the process was in the group, or has ended
            pass


def _descendants(process: int) -> list[int]:
    """Returns the processes that a process has started, in any session, as far as Linux reports them."""
    try:
        children = [child for thread in Path(f"/proc/{process}/task").iterdir() for child in _children(thread)]
    except OSError:
        return []
    return children + [other for child in children for other in _descendants(child)]


def _end(child: _Child) -> None:
    _kill(child)
    child.process.wait()
    child.connection.close()
    assert child.process.stdin is not None
    child.process.stdin.close()

"""Progress reports of long calls: bars in a terminal or notebook, and lines on standard error elsewhere."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metaopt._jaxpr import Tracer

EVERY = 8.0  # seconds between two lines; up to 10 on a busy machine, since a line waits for the next tick
SOON = 2.0  # seconds after which a compilation gets its first line
HINT_AFTER = 5.0  # seconds of compilation after which we mention JAX's cache
HINT = (
    "JAX can keep compiled programs for later runs: set the environment variable "
    "JAX_COMPILATION_CACHE_DIR=FOLDER, or pass `compilation_cache=FOLDER` to `training.fit` or `nas.train_loop`."
)


class Report:
    """The progress of one long call. The loop of this call calls `report(completed, **fields)` after every step."""

    def __init__(
        self,
        display: "Display",
        total: float | None,
        unit: str,
        text: str,
        start: float,
        fields: dict,
        time_limit: float | None = None,
        time_left: bool = True,
    ):
        self.time_limit = math.inf if time_limit is None else time_limit
        self.time_left = time_left
        self.display, self.total, self.unit, self.text, self.fields = display, total, unit, text, fields
        self.completed, self.began = start, display.clock()
        self.first: tuple[float, float] | None = None  # when the first step ended; compilations come before that
        self.phase: tuple[str, float, bool] | None = None  # name, when it began, whether it is a compilation

    def __call__(self, completed: float, **fields: Any) -> None:
        self.completed = completed
        self.fields = self.fields | fields
        self.first = self.first or (self.display.clock(), completed)
        self.display.update(self)

    @contextlib.contextmanager
    def during(self, name: str, *, compiles: bool = False) -> Iterator[None]:
        """Shows a phase of the call other than its steps, such as "evaluating", while the body runs."""
        outer, self.phase = self.phase, (name, self.display.clock(), compiles)
        try:
            yield
        finally:
            self.phase = outer

    @contextlib.contextmanager
    def compiling(self, program: str) -> Iterator[None]:
        """Shows a compilation as the phase. If it takes more than 2 s, a log has a line then and one at its end."""
        began = self.display.clock()
        with self.during(f"compiling {program}", compiles=True):
            yield
        self.display.compiled(self, program, began)

    def __str__(self) -> str:
        """The phase and its duration, or the values of the last step."""
        phase = self.phase  # another thread may change it
        if phase is None:
            has_no_values = self.first is None and any(value != value for value in self.fields.values())  # NaN
            return "" if has_no_values else self.text.format(**self.fields)
        return f"{phase[0]}, {_duration(self.display.clock() - phase[1])}"

    def line(self) -> str:
        """The line in a log: steps, values, time, and time left."""
        now, parts = self.display.clock(), [str(self)]
        if self.total is not None and (self.phase is None or self.completed > 0):
            parts.insert(0, f"{self.unit} {self.completed:.6g}/{self.total:.6g}")
        if self.phase is None:
            parts.append(_duration(now - self.began))
            begun = self.first is not None and self.first[1] < self.completed  # then there is an estimate
            if not begun and self.time_limit < math.inf:
                parts[-1] += f" (limit {_duration(max(0.0, self.time_limit))})"
            if self.total is not None and self.first is not None and begun and self.completed < self.total:
                pace = (now - self.first[0]) / (self.completed - self.first[1])
                left = min(pace * (self.total - self.completed), max(0.0, self.time_limit - (now - self.began)))
                parts.append(f"about {_duration(left)} left" if left and self.time_left else "")
        return ", ".join(part for part in parts if part)


class Display:
    """Shows the reports of a process, which may be nested, as bars or as lines that a thread prints."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, tick_every: float = 1.0):
        self.clock, self.tick_every = clock, tick_every
        self.reports: list[Report] = []
        self.bars: Any = None
        self.bar_of: dict[Report, Any] = {}
        self.last_line, self.hint_given = 0.0, False
        self.lock, self.stop = threading.RLock(), contextlib.ExitStack()

    def add(self, report: Report) -> None:
        with self.lock:
            if not self.reports:
                self.last_line, self.bars = report.began, _bars()
                self.stop.enter_context(_ticking(self.tick, self.tick_every) if self.bars is None else self.bars)
            self.reports.append(report)
            if self.bars is not None and report.total is not None:
                total, done = report.total, report.completed
                self.bar_of[report] = self.bars.add_task("", total=total, completed=done, report=report)

    def remove(self, report: Report, show: bool | None) -> None:
        with self.lock:
            is_empty = report.total is None and not report.text  # its line would be a number of seconds only
            if self.bars is None and (show or self.last_line > report.began) and not is_empty:
                self.print(report.line())
            self.reports.remove(report)
            bar = self.bar_of.pop(report, None)
            if not self.reports:
                self.stop.close()
            elif self.bars is not None and bar is not None:
                self.bars.remove_task(bar)

    def update(self, report: Report) -> None:
        if report in self.bar_of:
            self.bars.update(self.bar_of[report], completed=report.completed)

    def tick(self) -> None:
        """Prints a line if one is due."""
        now, reports = self.clock(), list(self.reports)
        phases = [report.phase for report in reports]  # another thread may change them
        compilations = [phase[1] for phase in phases if phase is not None and phase[2]]
        soon = any(self.last_line <= began and now - began >= SOON for began in compilations)
        if reports and (soon or now - self.last_line >= EVERY):
            self.print(": ".join(report.line() for report in reports))

    def compiled(self, report: Report, program: str, began: float) -> None:
        if report not in self.reports:
            return
        seconds = self.clock() - began
        if self.bars is None and self.last_line > began:
            self.print(f"compiled {program} in {_duration(seconds)}")
        if seconds >= HINT_AFTER and not self.hint_given and not jax.config.jax_compilation_cache_dir:
            self.hint_given = True
            self.print(HINT)

    def print(self, line: str) -> None:
        self.last_line = self.clock()
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            if self.bars is not None:
                self.bars.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)


DISPLAY = Display()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DISPLAY.__init__)  # a fork has none of the reports and threads of its parent


@contextlib.contextmanager
def report_progress(
    total: float | None,
    show: bool | None,
    text: str = "",
    *,
    unit: str = "step",
    start: float = 0,
    time_limit: float | None = None,
    time_left: bool = True,
    display: Display = DISPLAY,
    **fields: Any,
) -> Iterator[Report]:
    """Reports the progress of a loop on standard error.

    A terminal or notebook shows a bar. Elsewhere, for example in a log file, a line appears every 10 s. If a line has
    appeared, a last one appears at the end. Reports may be nested.

    Args:
      total: the number of steps. None if the caller has no steps to count; then there is no bar.
      show: False reports nothing. True always prints a line at the end. None is the default described above.
      text: a format for the values of the last step, such as "value {value:.3g}".
      unit: the name of a step, such as "trial".
      start: the number of steps of an earlier, interrupted run.
      time_limit: the seconds after which the loop will end, for the estimate of the remaining time. The loop itself
        must end.
      time_left: whether to estimate the remaining time. False suits steps that take very different times.
      display: all reports of a process share one display; tests have their own.
      **fields: initial values for the fields of `text`. If one of them is NaN, the text is left out until the first
        call of `report`.

    Returns:
      A context manager, whose value is a function `report(completed, **fields)`. Call it after every step with the
      number of completed steps, and with values for the fields of `text`.
    """
    report = Report(display, total, unit, text, start, fields, time_limit, time_left)
    if show is False:
        yield report
        return
    display.add(report)
    try:
        yield report
    finally:
        display.remove(report, show)


def reporting(function: Callable, program: str) -> Callable:
    """Reports the compilations of a jitted function, at its first call and at calls with other shapes or types.

    Args:
      function: the jitted function.
      program: its name in the report.

    Returns:
      The same function. Calls inside a traced function report nothing.
    """
    compiled = set()

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(*args)
        types = structure, *((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if types in compiled:
            return function(*args)
        with report_progress(None, None) as report, report.compiling(program):
            outputs = function(*args)
        compiled.add(types)
        return outputs

    return call


def _bars() -> Any:
    """A display of bars if standard error is a terminal or notebook, else None."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        def render(self, task):
            return super().render(task) if task.fields["report"].time_left else Text("")

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return None
    text = TextColumn("{task.fields[report]}", markup=False)  # formats the report again whenever it is drawn
    to_terminal = console.is_jupyter or sys.stdout.isatty()  # else rich would send a redirected stdout there, too
    columns = BarColumn(), MofNCompleteColumn(), text, TimeLeft()
    return Progress(*columns, console=console, redirect_stdout=to_terminal)


@contextlib.contextmanager
def _ticking(tick: Callable[[], None], every: float) -> Iterator[None]:
    """Calls `tick` from a thread; XLA lets other threads run while it compiles."""
    ended = threading.Event()

    def run():
        while not ended.wait(every):
            tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.1f} min" if minutes < 9.95 else f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"

"""Lines in a log and bars in a terminal.

The clock of `Log` is set by hand. Elsewhere, `print_line` prints what would appear after some seconds. One test waits.
"""

import importlib
import io
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import _progress, base, few_shot, nas, tasks, training
from metaopt._progress import Display, report_progress

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Log:
    """A display without a terminal, whose clock and ticks are set by the test."""

    def __init__(self, capsys):
        self.clock, self.capsys = Clock(), capsys
        self.display = Display(self.clock, tick_every=3600.0)

    def report(self, total=20, show=None, text="value {value:.3g}", **kwargs):
        return report_progress(total, show, text, display=self.display, value=np.nan, **kwargs)

    def wait(self, seconds):
        for _ in range(seconds):
            self.clock.now += 1.0
            self.display.tick()

    def lines(self):
        return self.capsys.readouterr().err.splitlines()


@pytest.fixture
def log(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    return Log(capsys)


def test_a_log_has_a_line_at_least_every_ten_seconds_and_one_at_the_end(log):
    with log.report() as report:
        for step in range(1, 21):
            log.wait(6)
            report(step, value=1 / step)
    lines = log.lines()
    assert lines[:3] == [
        "step 1/20, value 1, 8 s",
        "step 2/20, value 0.5, 16 s, about 3.0 min left",  # 10 s for one step, and 18 are left
        "step 3/20, value 0.333, 24 s, about 2.5 min left",  # 18 s for two
    ]
    assert _progress.EVERY + _progress.DISPLAY.tick_every <= 10
    assert len(lines) == 120 // 8 + 1 and lines[-1] == "step 20/20, value 0.05, 2.0 min"


def test_the_time_left_is_at_most_that_of_the_limit(log):
    with log.report(time_limit=30.0) as report:
        log.wait(8)
        report(1, value=1)
        log.wait(8)
        report(2, value=1)
        log.wait(8)
        log.wait(16)
    assert [line.split(", ")[-1] for line in log.lines()] == [
        "8 s (limit 30 s)",  # no step is done yet
        "16 s (limit 30 s)",
        "about 6 s left",
        "32 s",  # the limit is over
        "40 s",
        "40 s",
    ]


def test_a_report_of_unequal_steps_does_not_estimate_the_time_left(log):
    with log.report(time_left=False) as report:
        report(1, value=1)
        report(2, value=1)
        log.wait(8)
    assert log.lines()[0] == "step 2/20, value 1, 8 s"


@pytest.mark.parametrize(("show", "expected"), [(None, []), (False, []), (True, ["step 8/20, value 3, 7 s"])])
def test_a_short_run_has_no_line_unless_it_is_asked_for(log, show, expected):
    with log.report(show=show) as report:
        log.wait(7)
        report(8, value=3.0)
    assert log.lines() == expected


def test_nothing_is_reported_on_request(log):
    with log.report(show=False) as report, report.compiling("one step"):
        log.wait(40)
        report(1, value=1.0)
    assert log.lines() == []


def test_a_run_that_continues_counts_its_own_steps_for_the_time_left(log):
    with log.report(start=10) as report:
        report(11, value=1.0)
        log.wait(8)
        report(14, value=1.0)
        log.wait(8)
    assert log.lines()[1] == "step 14/20, value 1, 16 s, about 32 s left"  # 16 s for 3 steps


@pytest.fixture
def no_cache():
    former = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", former)


def test_a_run_that_continues_shows_no_values_before_its_first_step(log):
    with log.report(start=10) as report:
        log.wait(8)
        report(11, value=np.nan)
        log.wait(8)
    assert log.lines() == ["step 10/20, 8 s", "step 11/20, value nan, 16 s", "step 11/20, value nan, 16 s"]


def test_a_compilation_is_reported_after_two_seconds_and_at_its_end(log, no_cache):
    with log.report() as report:
        with report.compiling("the initial state"):
            log.wait(1)
        assert log.lines() == []
        for _ in range(2):
            with report.compiling("one step"):
                log.wait(13)
    first = ["compiling one step, 2 s", "compiling one step, 10 s", "compiled one step in 13 s"]
    assert log.lines() == [*first, _progress.HINT, *first, "step 0/20, 27 s"]  # the hint comes once


def test_no_hint_if_the_cache_is_on(log):
    assert jax.config.jax_compilation_cache_dir  # of these tests
    with log.report() as report, report.compiling("one step"):
        log.wait(60)
    assert _progress.HINT not in log.lines()


def test_other_phases_have_their_name_and_seconds(log):
    with log.report() as report:
        report(5, value=2.0)
        with report.during("evaluating"):
            log.wait(8)
        log.wait(8)
    assert log.lines()[:2] == ["step 5/20, evaluating, 8 s", "step 5/20, value 2, 16 s"]


def test_nested_reports_share_a_line(log):
    with log.report(total=None, text="tuning") as outer, outer.during("learning the kernel"):
        log.wait(5)
        with log.report(unit="trial"):
            log.wait(3)
    assert log.lines()[0] == "learning the kernel, 8 s: trial 0/20, 3 s"


def no_state(key, hyperparams, task):
    return ()


def test_the_thread_ends_also_if_a_compilation_raises(capsys):
    threads = lambda: [thread for thread in threading.enumerate() if thread.name == "progress"]
    running = []

    def estimate(hyperparams, task, state):
        running.extend(threads())
        raise ArithmeticError("at trace time")

    learner = training.learner(base.Estimator(no_state, estimate, kind="exact"), optax.sgd(0.1))
    with pytest.raises(ArithmeticError):
        training.fit(learner, lambda key: 1.0, hyperparams=1.0, num_steps=1, key=KEY)
    assert len(set(running)) == 1 and threads() == []


def test_a_terminal_has_a_bar_and_keeps_what_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    fit(progress=None, callback=lambda step, metrics: print(f"step {step}"))
    out, err = capsys.readouterr()
    assert "5/5" in err and "value 4" in err
    assert out.split() == "step 1 step 2 step 3 step 4 step 5".split()  # stdout is a file here
    fit(progress=False)
    assert capsys.readouterr() == ("", "")


def fit(tick=lambda: None, **kwargs):
    """F = λ² from λ = 2, with a rate that changes nothing. `tick` runs in both traces: of the state and of one step."""

    def estimate(hyperparams, task, state):
        tick()
        return base.Estimate(hyperparams**2, 2 * hyperparams, jnp.array(True), {}), state

    def update(updates, params=None):
        tick()  # the estimator is traced once for both programs
        return updates

    optimizer = optax.chain(optax.stateless(update), optax.sgd(0.0))
    learner = training.learner(base.Estimator(no_state, estimate, kind="exact"), optimizer)
    options = {"hyperparams": 2.0, "num_steps": 5, "key": KEY}
    return training.fit(learner, lambda key: 1.0, **options | kwargs)


def untimed(text):
    """The lines without their seconds. Equal neighbors are one line: on a busy machine, the thread repeats lines."""
    lines = [re.sub(r"(,| in) (\d+ s.*)?$", "", line) for line in text.splitlines()]
    return [line for line, _ in itertools.groupby(lines)]


def print_line():
    """Prints the line of all reports, as a thread does after some seconds. It is empty if none is shown."""
    line = ": ".join(report.line() for report in _progress.DISPLAY.reports)
    if line:
        _progress.DISPLAY.print(line)


@pytest.mark.once
def test_a_compilation_of_some_seconds_has_a_line_in_a_log(monkeypatch):
    """Waits for the thread: a line appears while the state is compiled."""
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    latest = time.monotonic() + 20.0

    def wait():
        while "\n" not in log.getvalue() and time.monotonic() < latest:
            time.sleep(0.01)

    fit(wait)
    first, *_, last = log.getvalue().splitlines()
    seconds = re.fullmatch(r"compiling the initial state, (\d+) s", first)
    assert seconds and int(seconds[1]) in range(2, 21)
    assert untimed(log.getvalue())[:2] == ["compiling the initial state", "compiled the initial state"]
    assert re.search(r"\ncompiled the initial state in \d+ s\n", log.getvalue())
    assert re.fullmatch(r"step 5/5, value 4, hypergrad norm 4, \d+ s", last)


def test_fit_reports_compilations_evaluations_and_steps_in_a_log(capsys):
    def evaluate(key, hyperparams):
        print_line()
        return hyperparams**2

    fit(print_line, evaluate=evaluate, eval_every=5, callback=lambda step, metrics: print_line())
    step = lambda number: f"step {number}/5, value 4, hypergrad norm 4"
    assert untimed(capsys.readouterr().err) == [
        "compiling the initial state",
        "compiled the initial state",
        "evaluating",
        "compiling one step",
        "compiled one step",
        *map(step, range(1, 5)),
        "step 5/5, evaluating",
        step(5),
    ]
    fit(print_line, evaluate=evaluate, callback=lambda step, metrics: print_line(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_run_that_continues_reports_both_traces(capsys, tmp_path):
    fit(num_steps=2, checkpoint_dir=tmp_path, progress=False)
    fit(print_line, checkpoint_dir=tmp_path)
    assert untimed(capsys.readouterr().err) == [
        "step 2/5, tracing the initial state",
        "step 2/5, tracing one step",
        "step 5/5, value 4, hypergrad norm 4",
    ]


def test_the_evaluation_of_episodes_reports_compilations_in_a_log(capsys):
    traces = []

    def constant(key, support, query):
        traces.append(1)
        print_line()
        return jnp.zeros((1, 2, 2))

    rows = {"x": jnp.zeros((2, 1)), "y": jnp.arange(2), "mask": jnp.ones(2), "class_mask": jnp.ones(2)}
    episode = tasks.Episode(rows, rows)
    run = lambda **kwargs: few_shot.evaluate_episodes({"zero": constant}, lambda key: episode, KEY, **kwargs)
    run(num_episodes=4, chunk_size=2)
    assert untimed(capsys.readouterr().err) == ["compiling zero", "compiled zero", "episode 4/4, episodes: zero"]
    assert len(traces) == 1
    run(num_episodes=4, chunk_size=2, progress=False)
    assert capsys.readouterr().err == ""


def test_the_scores_of_a_search_report_their_compilations_in_a_log(capsys):
    def constant(supernet, params, weights, batch):
        print_line()  # at trace time
        return batch["x"].sum()

    network = nas.Network({}, (nas.Layer("linear", 2),), 2)
    score = nas.training_free_scores(network, (3,), {"constant": constant}, ops=nas.BLOCKS)
    lines = lambda: untimed(capsys.readouterr().err)
    for num_rows, compiles in ((2, True), (2, False), (4, True)):
        score(KEY, {}, {"x": jnp.ones((num_rows, 3))})
        assert lines() == ["compiling the scores", "compiled the scores"] * compiles
    assert jax.jit(lambda x: score(KEY, {}, {"x": x}))(jnp.ones((5, 3)))["constant"] == 15
    assert capsys.readouterr().err == ""

    one = nas.single_path_one_shot(
        network, (3,), ops=nas.BLOCKS, num_steps=1, loss=lambda outputs, batch: print_line() or outputs.sum()
    )
    one.score(one.supernet.init(KEY), {}, {"x": jnp.ones((2, 3))})
    assert lines() == ["compiling the score", "compiled the score"]


# ---- JAX's persistent compilation cache ------------------------------------------------------------------------------


def test_the_cache_is_restored_after_the_call(tmp_path):
    former = jax.config.jax_compilation_cache_dir
    folders = []
    fit(compilation_cache=tmp_path, callback=lambda *args: folders.append(jax.config.jax_compilation_cache_dir))
    assert set(folders) == {str(tmp_path)} and jax.config.jax_compilation_cache_dir == former
    files = set(tmp_path.iterdir())
    assert files
    fit(lambda: None, hyperparams=np.array([2.0, 3.0]).sum())  # compiles again, elsewhere
    assert set(tmp_path.iterdir()) == files


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from metaopt import few_shot, inner, nas

events = []
jax.monitoring.register_event_listener(lambda event, **kwargs: events.append(event))
loss = lambda params, hyperparams, batch: (params - batch["x"].mean()) ** 2
import optax
loop = inner.loop(loss, lambda hyperparams: optax.sgd(0.1), init=lambda key, h, data: jnp.zeros(()))
jax.jit(lambda x: x + 1)(1.0)  # JAX has compiled already, without a cache
data = {"x": jnp.ones(3)}
nas.train_loop(loop, data, num_steps=2, key=jax.random.key(0), compilation_cache=sys.argv[1])
print(events.count("/jax/compilation_cache/cache_hits"), events.count("/jax/compilation_cache/cache_misses"))
"""


@pytest.mark.once
def test_a_second_process_reads_its_programs_from_the_cache(tmp_path):
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run():
        command = [sys.executable, "-c", PROGRAM, tmp_path / "programs"]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr[-4000:]
        return map(int, process.stdout.split())

    (first_hits, first_misses), (hits, misses) = run(), run()
    assert first_misses - misses >= 2 and hits - first_hits >= 2  # the initial state and the step


# ---- Experiments -----------------------------------------------------------------------------------------------------

JOB = """
def first(tick):
    tick()

def second(tick):
    import jax
    jax.jit(lambda x: tick() or x)(1.0)  # traced, and so compiled

def main(tick):
    first(tick)
    second(tick)
"""


def test_a_script_reports_its_place_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job.py"])  # a line names the script by it
    script = importlib.import_module("experiments.script")
    job = {}
    exec(compile(JOB, str(ROOT / "experiments" / "job.py"), "exec"), job)
    script.run(lambda: job["main"](print_line))
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["job.py begins", "first (job.py:3)", "compiling in second (job.py:7)", "job.py"]


def test_every_experiment_reports_its_place():
    """Scripts that run without metaopt, in the environments of other libraries, cannot."""
    scripts = [path for path in (ROOT / "experiments").rglob("*.py") if "__name__ ==" in path.read_text()]
    silent = {path.name for path in scripts if not re.search(r"script\.(run|reporting)\(", path.read_text())}
    silent = {name for name in silent if not name.endswith("peers.py")}
    assert len(scripts) > 20 and silent == {"pages.py"}  # which writes an index

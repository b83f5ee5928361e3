"""Collections: the trials depend only on the key, and a failing trial ends no other trial."""

import argparse
import inspect
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import black_boxes
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from metaopt import base, blackbox, spaces
from metaopt.blackbox import _origins, _trials, _workers

TASKS = {"left": -0.5, "right": 0.5}
KEY = jax.random.key(3)


def collect(objective=black_boxes.pure, *, on=TASKS, num_trials=6, **kwargs):
    kwargs = {"key": KEY, "isolated": False} | kwargs
    return blackbox.collect(objective, black_boxes.SPACE, on, num_trials=num_trials, **kwargs)


def listener(*, stop=math.inf):
    """A searcher whose trials depend on all earlier records, on their order, and on the number of trials per `ask`."""

    def init(key, space):
        return {"key": key, "space": space, "asked": 0, "told": 0.0}

    def ask(state, num):
        num = int(min(num, stop - state["asked"]))
        numbers = range(state["asked"], state["asked"] + num)
        x = [0.9 * math.sin(state["told"] + number + num) for number in numbers]
        trials = [
            base.Record("", {"x": x, "size": 1}, seed=n, status="WAITING", trial=n)
            for n, x in zip(numbers, x, strict=True)
        ]
        return trials, state | {"asked": state["asked"] + num}

    def tell(state, records):
        digest = state["told"]
        for record in records:
            digest = 2 * digest + (record.outcome if math.isfinite(record.outcome) else 1.0)
        return state | {"told": digest}

    return base.Searcher(init, ask, tell)


LISTENER = listener()
G: Any = blackbox.MetaOptimizer._make([lambda *_: None] * len(blackbox.MetaOptimizer._fields))


def without_cost(records):
    return [repr(record._replace(cost=0.0)) for record in records]


def test_every_task_gets_its_trials_in_order_the_default_first():
    records = collect()
    assert [(record.task, record.trial) for record in records] == [(t, n) for t in TASKS for n in range(6)]
    assert all(record.status == "COMPLETE" and record.cost > 0 for record in records)
    assert records[0].configuration == records[6].configuration == {"x": 0.0, "size": 6, "kind": "a"}
    # Every configuration is one of the space, and all differ; `only_b` is there where it matters.
    assert len({repr(record.configuration) for record in records}) == 11
    for record in records:
        spaces.from_configuration(black_boxes.SPACE, record.configuration)
        assert ("only_b" in record.configuration) == (record.configuration["kind"] == "b")
    same = collect(same_trials=True)
    assert [r.configuration for r in same[:6]] == [r.configuration for r in same[6:]]
    assert [r.seed for r in same[:6]] == [r.seed for r in same[6:]]
    # A task's trials do not depend on which others there are.
    assert without_cost(collect(on={"right": 0.5})) == without_cost(records[6:])


@pytest.mark.parametrize("searcher", [None, listener()], ids=["random", "listens"])
def test_workers_change_nothing(searcher):
    kwargs = {"objective": black_boxes.uneven, "searcher": searcher, "batch_size": 4, "num_trials": 9}
    one = without_cost(collect(num_workers=1, **kwargs))
    assert without_cost(collect(num_workers=4, **kwargs)) == one
    if searcher is not None:  # the size of a batch does: the test is of a searcher that listens
        assert without_cost(collect(**kwargs | {"batch_size": 3})) != one


class Killed(BaseException):
    pass


@pytest.mark.parametrize("searcher", [None, listener()], ids=["random", "listens"])
def test_an_interrupted_collection_continues_to_the_same_records(tmp_path, searcher):
    store, calls = tmp_path / "records.db", []

    def dies(trial, task):
        calls.append(trial)
        if len(calls) == 8:
            raise Killed
        return black_boxes.pure(trial, task)

    kwargs = {"searcher": searcher, "batch_size": 4}
    whole = collect(num_trials=10, **kwargs)
    with pytest.raises(Killed):
        collect(dies, num_trials=5, store=store, **kwargs)
    # Seven had ended, and the eighth is known to have been running; it is queued again.
    assert [record.status for record in blackbox.read_records(store)] == ["COMPLETE"] * 7 + ["RUNNING"]
    collect(dies, num_trials=5, store=store, **kwargs)
    assert len(calls) == 11 and len(blackbox.read_records(store, status="COMPLETE")) == 10
    records = collect(dies, num_trials=10, store=store, **kwargs)
    assert len(calls) == 21
    assert without_cost(records) == without_cost(whole)
    # Nothing is run again, and more tasks and other studies may come.
    collect(dies, num_trials=10, store=store, **kwargs)
    collect(dies, on=TASKS | {"new": 0.0}, num_trials=2, store=store, **kwargs)
    collect(dies, num_trials=1, store=store, study="b", **kwargs)
    assert len(calls) == 25
    message = "trial 0 of 'left' with another configuration or seed .* another `study` than ''"
    with pytest.raises(ValueError, match=message):
        collect(store=store, key=jax.random.key(4), searcher=blackbox.random_search(first=[{"x": 0.5}]))


MINE = [{"x": -0.75, "size": 3, "kind": "b", "only_b": 0.5}, {"x": 0.25}]


@pytest.mark.parametrize("searcher", [blackbox.random_search(), LISTENER], ids=["random", "listens"])
def test_enqueued_configurations_come_first_also_after_a_kill_with_any_number_of_workers(tmp_path, searcher):
    store, calls, kwargs = tmp_path / "records.db", [], {"batch_size": 4, "num_workers": 4}

    def dies(trial, task):
        calls.append(trial)
        if len(calls) == 5:
            raise Killed
        return black_boxes.pure(trial, task)

    ours = blackbox.enqueue(searcher, MINE)
    whole = collect(num_trials=9, searcher=ours, batch_size=4)
    assert [r.trial for r in whole] == 2 * [*range(9)] and len({r.seed for r in whole}) > 4
    assert [r.configuration for r in whole[9:11]] == [MINE[0], {"x": 0.25, "size": 6, "kind": "a"}]
    with pytest.raises(Killed):
        collect(dies, num_trials=9, searcher=ours, store=store, batch_size=4)
    assert without_cost(collect(dies, num_trials=5, searcher=ours, store=store, **kwargs)) == without_cost(
        whole[:5] + whole[9:14]
    )
    assert without_cost(collect(dies, num_trials=9, searcher=ours, store=store, **kwargs)) == without_cost(whole)
    assert len(calls) == 19
    # The searcher receives their records. If it ignores records, it proposes the same trials as without them.
    others = collect(num_trials=9, searcher=blackbox.enqueue(searcher, []), batch_size=4)
    same = [r.configuration for r in whole[2:9]] == [r.configuration for r in others[:7]]
    assert same == (searcher is not LISTENER)
    if searcher is not LISTENER:
        other = collect(num_trials=4, searcher=ours, batch_size=4, key=jax.random.key(4))
        assert other[3].configuration != whole[3].configuration and other[0].seed != whole[0].seed
    with pytest.raises(ValueError, match="enqueued"):
        collect(store=store, searcher=blackbox.enqueue(searcher, MINE[1:]), **kwargs)


@pytest.mark.parametrize(
    ("searcher", "batch"), [(blackbox.random_search(), 4), (LISTENER, 3)], ids=["random", "listens"]
)
@pytest.mark.once
def test_enqueueing_during_a_collection_does_not_change_earlier_trials(tmp_path, searcher, batch):
    store, calls, kwargs = tmp_path / "records.db", [], {"batch_size": batch}

    def dies(trial, task):
        calls.append(trial)
        if len(calls) == 18:
            raise Killed
        return black_boxes.pure(trial, task)

    before = collect(dies, num_trials=6, store=store, searcher=searcher, **kwargs)
    ours = blackbox.enqueue(searcher, MINE, after=6)
    whole = collect(num_trials=12, searcher=ours, **kwargs)
    with pytest.raises(Killed):
        collect(dies, num_trials=12, store=store, searcher=ours, **kwargs)
    records = collect(dies, num_trials=12, store=store, searcher=ours, num_workers=3, **kwargs)
    assert len(calls) == 25 and without_cost(records) == without_cost(whole)  # one of them died
    assert without_cost(whole[:6] + whole[12:18]) == without_cost(before)
    assert [r.configuration for r in whole[6:8]] == [MINE[0], {"x": 0.25, "size": 6, "kind": "a"}]
    assert [r.trial for r in whole[:12]] == [*range(12)] and len({r.seed for r in whole[:12]}) == 12
    # And again.
    more = blackbox.enqueue(ours, [{"x": -0.1}], after=12)
    records = collect(num_trials=15, store=store, searcher=more, **kwargs)
    assert without_cost(records[:12]) == without_cost(whole[:12]) and records[12].configuration["x"] == -0.1
    # `after` must not be below the number of trials that have run.
    with pytest.raises(ValueError, match="pass the number of trials so far as `after` to `enqueue`"):
        collect(num_trials=15, store=store, searcher=blackbox.enqueue(searcher, MINE, after=5), **kwargs)
    # If the searcher ends before `after`, they come next.
    ends = blackbox.enqueue(listener(stop=2), [{"x": 0.25}], after=9)
    assert [r.trial for r in collect(num_trials=9, searcher=ends, on={"t": 0.0})] == [0, 1, 2]


def test_tried_configurations_are_not_repeated_on_request():
    x = lambda searcher, **kwargs: [
        r.configuration["x"] for r in collect(num_trials=5, searcher=searcher, on={"t": 0.0}, **kwargs)
    ]
    drawn = x(blackbox.random_search())
    assert drawn[0] == 0.0
    # A searcher begins with the default. It does not run twice, for any size of a batch.
    for batch_size in (1, 4):
        tried = x(blackbox.enqueue(blackbox.random_search(), [{"x": 0.5}, {}]), batch_size=batch_size)
        assert tried[:2] == [0.5, 0.0] and len(set(tried)) == 5 and tried[3:] == drawn[1:3]
    mine = [{"x": 0.5}, {}, {"x": 0.5}]
    for batch_size in (1, 4):
        after = lambda size=batch_size, **kwargs: x(
            blackbox.enqueue(blackbox.random_search(), mine, after=2, **kwargs), batch_size=size
        )
        assert after() == [*drawn[:2], 0.5, 0.0, 0.5]
        assert after(skip_if_exists=True) == [*drawn[:2], 0.5, *drawn[2:4]]
    # Its own `first`, its own trials, and others' trials at a fraction of the budget do not count as tried.
    twice = blackbox.random_search(first=[{"x": 0.5}, {"x": 0.5}])
    assert x(twice)[:2] == [0.5, 0.5] == x(twice, batch_size=2)[:2]
    state = twice.init(KEY, black_boxes.SPACE)
    record = base.Record("", {"x": 0.5, "size": 6, "kind": "a"}, trial=-2, status="RUNNING")
    whole = record._replace(fidelity=1 - 1e-8)  # but for rounding
    for earlier, num in (
        (record._replace(fidelity=0.5), 2),
        (whole, 0),
        (record, 0),
        (record._replace(status="FAIL"), 0),
    ):
        (first, second), _ = twice.ask(twice.tell(state, [earlier]), 2)
        assert [first.configuration["x"], second.configuration["x"]].count(0.5) == num
    queue = blackbox.enqueue(blackbox.random_search(), mine, skip_if_exists=True)
    state = queue.tell(queue.init(KEY, black_boxes.SPACE), [record])
    assert [trial.configuration["x"] for trial in queue.ask(state, 2)[0]] == [0.0]
    queue = blackbox.enqueue(blackbox.random_search(), mine, after=1, skip_if_exists=True)
    state = queue.ask(queue.init(KEY, black_boxes.SPACE), 1)[1]  # the default runs
    assert [trial.configuration["x"] for trial in queue.ask(state, 2)[0]] == [0.5]


def test_an_objective_that_sigterm_ended_ends_the_collection():
    """`training.fit` raises SystemExit(143); other exits are failed trials."""
    kwargs = {"on": {"t": 0.0}, "num_trials": 1}
    with pytest.raises(SystemExit) as error:
        collect(lambda trial, task: sys.exit(143), **kwargs)
    assert error.value.code == 143
    assert collect(lambda trial, task: sys.exit(1), **kwargs)[0].status == "FAIL"


def test_one_collection_of_a_study_at_a_time(tmp_path):
    store, link, refused = tmp_path / "records.db", tmp_path / "link.db", []
    link.symlink_to(store)

    def starts_another(trial, task):
        collect(store=store, study="other")
        for same in (store, link):
            with pytest.raises(ValueError, match=f"Another collection of the study 'one' in .*{same.name} is running"):
                collect(store=same, study="one")
        refused.append(trial)
        return 0.0

    kwargs = {"on": {"t": 0.0}, "num_trials": 1, "store": store, "study": "one"}
    assert collect(starts_another, **kwargs)[0].status == "COMPLETE" and len(refused) == 1
    collect(**kwargs | {"num_trials": 3})  # it has ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.db", "records.db"]
    with pytest.raises(FileNotFoundError, match="none/records.db"):
        collect(store=tmp_path / "none" / "records.db")


@pytest.mark.parametrize("searcher", [None, listener()], ids=["random", "listens"])
def test_failed_trials_are_run_again_on_request_and_later_ones_stay(tmp_path, searcher):
    store, calls = tmp_path / "records.db", []

    def objective(trial, task):
        calls.append(trial.trial)
        if corrected or trial.trial != 1:
            return black_boxes.pure(trial, task)
        raise KeyError("a bug")

    kwargs = {"on": {"t": 0.5}, "num_trials": 4, "store": store, "searcher": searcher, "batch_size": 1}
    corrected = False
    first = collect(objective, **kwargs)
    corrected = True
    second = collect(objective, **kwargs)
    assert calls == [0, 1, 2, 3] and without_cost(second) == without_cost(first) and second[1].status == "FAIL"
    retried = collect(objective, retry_failed=True, **kwargs)
    assert calls == [0, 1, 2, 3, 1] and [r.status for r in retried] == ["COMPLETE"] * 4
    assert without_cost(retried[:1] + retried[2:]) == without_cost(first[:1] + first[2:])
    # It counts from then on, the collection goes on, and the failure is still known.
    more = collect(objective, **kwargs | {"num_trials": 6})
    assert without_cost(more[:4]) == without_cost(retried) and calls[5:] == [4, 5]
    assert without_cost(collect(objective, retry_failed=True, **kwargs)) == without_cost(retried) and len(calls) == 7
    history = [r.status for r in blackbox.read_records(store, history=True) if r.trial == 1]
    assert history == ["RUNNING", "FAIL", "RUNNING", "COMPLETE"]
    assert [r.status for r in blackbox.read_records(store)] == ["COMPLETE"] * 6


def fidelities():
    """A searcher that asks for a third of the budget, then for the whole, of one configuration."""

    def ask(state, num):
        numbers = range(state, state + num)
        trial = lambda n: base.Record("", {"x": 0.1}, fidelity=(1 / 3, 1.0)[n % 2], status="WAITING", trial=n // 2)
        return [trial(number) for number in numbers], state + num

    return base.Searcher(lambda key, space: 0, ask, lambda state, records: state)


def test_a_trial_keeps_its_number_at_every_fidelity_behind_what_is_enqueued():
    records = collect(searcher=blackbox.enqueue(fidelities(), [{"x": 0.5}]), num_trials=4, on={"t": 0.0})
    assert [(r.trial, round(r.fidelity, 2)) for r in records] == [
        (0, 1.0),
        (1, 0.33),
        (1, 1.0),
        (2, 0.33),
        (2, 1.0),
        (3, 0.33),
    ]


def test_a_searcher_is_told_of_enqueued_trials_like_those_of_others():
    heard, inner = [], fidelities()
    spy = inner._replace(tell=lambda state, records: heard.append([r.trial for r in records]) or state)
    collect(searcher=blackbox.enqueue(spy, [{"x": 0.5}, {"x": 0.1}]), num_trials=4, on={"t": 0.0})
    assert heard == [[-2], [-4], [0], [0], [1], [1]]
    heard.clear()
    within = blackbox.enqueue(blackbox.enqueue(spy, [{"x": 0.5}]), [{"x": 0.1}])  # the spy does not count its trials
    records = collect(searcher=within, num_trials=3, on={"t": 0.0})
    assert heard == [[-5], [-2], [0], [0]] and records[0].seed != records[1].seed


def test_a_trial_at_a_fraction_of_the_budget_counts_as_much():
    objective = lambda trial, task: trial.fidelity
    records = collect(objective, searcher=fidelities(), num_trials=4, on={"t": 0})
    assert [record.outcome for record in records] == [1 / 3, 1] * 3
    assert [record.trial for record in records] == [0, 0, 1, 1, 2, 2]


def test_progress_counts_trials_and_failures(capsys):
    fails = lambda trial, task: math.nan if trial.trial else 1.0
    collect(fails, num_trials=3, progress=True)
    assert "trial 6/6, 4 failed, 0 pruned" in capsys.readouterr().err
    collect(fails, num_trials=3)
    assert capsys.readouterr().err == ""  # no terminal


def test_a_changed_objective_is_reported_once_and_returns_the_stored_outcomes(tmp_path, caplog):
    store = tmp_path / "records.db"
    earlier = collect(num_trials=2, store=store)
    assert collect(num_trials=2, store=store) == earlier and caplog.messages == []
    changed = lambda trial, task: 7.0
    assert collect(changed, num_trials=2, store=store) == earlier
    (message,) = caplog.messages
    assert message.startswith(f"The source text of the objective has changed since the trials in {store}")
    assert collect(changed, num_trials=2, store=store) == earlier and len(caplog.messages) == 1
    assert {record.outcome for record in collect(changed, num_trials=2, store=store, study="changed")} == {7.0}
    assert len(caplog.messages) == 1


def test_trials_of_other_data_are_refused(tmp_path):
    store = tmp_path / "records.db"
    table = lambda value: {"x": np.array([[value, 2.0]]), "name": "a text"}
    mean = lambda trial, task: float(task["x"].mean())
    first = collect(mean, on={"one": table(0.0), "two": table(1.0)}, num_trials=1, store=store)
    assert collect(mean, on={"two": table(1.0)}, num_trials=1, store=store) == first[1:]
    with pytest.raises(ValueError, match=r"The data of 'one' have changed since the trials in .*records.db"):
        collect(mean, on={"one": table(3.0), "two": table(1.0), "three": table(5.0)}, num_trials=2, store=store)
    assert len(blackbox.read_records(store)) == 2
    third, fourth = {"three": table(5.0)}, {"one": table(3.0)}
    collect(mean, on=third, num_trials=1, store=store, budget=1e-9)  # no trial has begun
    assert collect(mean, on={"three": table(6.0)}, num_trials=1, store=store)[0].outcome == 4.0
    assert collect(mean, on=fourth, num_trials=1, store=store, study="new")[0].outcome == 2.5
    for study, tasks in (("", {"one": table(0.0)}), ("new", fourth)):  # each study has its own data
        assert len(collect(mean, on=tasks, num_trials=2, store=store, study=study)) == 2


def test_a_digest_depends_on_the_numbers_of_a_task_their_types_and_places():
    x = np.arange(6.0).reshape(2, 3)
    single = x.astype(np.float32)
    frame = pd.DataFrame({"a": [1, 2], "b": ["u", None]})
    same = [
        [{"x": x, "n": 1}, {"n": 2, "x": np.asfortranarray(x)}, {"x": x, "n": 1, "loader": object()}],
        [base.Task({"x": single}, None), base.Task({"x": jnp.asarray(single)}, None)],
        [jax.random.key(0), jax.random.key(0)],
        [(frame, x), (frame.set_index(np.array([4, 5])), x)],
    ]
    digests = []
    for tasks in same:
        values = {_origins.digest_of(task) for task in tasks}
        assert len(values) == 1
        digests += values
    others = [
        {"x": x.reshape(3, 2), "n": 1},
        {"x": single, "n": 1},
        {"x": x, "n": np.array(2)},
        {"y": x, "n": 1},
        {"x": -x, "n": 1},
        jax.random.key(1),
        (frame.assign(b=["u", "v"]), x),
        (frame, -x),
    ]
    digests += [_origins.digest_of(task) for task in others]
    assert None not in digests and len(set(digests)) == len(digests)
    for unknown in ("path.csv", 3, object(), {1: x, "a": x}, np.array([None]), {}, pd.DataFrame({"a": [object()]})):
        assert _origins.digest_of(unknown) is None


def test_progress_of_one_task_has_the_best_outcome_at_the_full_budget(capsys):
    falls = lambda trial, task: (5.0 if trial.trial % 2 else 3.0) if trial.fidelity == 1 else 0.0
    for tasks, text in (({"t": 0}, "0 pruned, best outcome 3, "), ({"s": 0, "t": 0}, "0 pruned, ")):
        collect(falls, searcher=fidelities(), num_trials=4, on=tasks, progress=True)
        last = capsys.readouterr().err.splitlines()[-1]
        assert text in last and ("best" in text) == ("best" in last), last


def test_a_searcher_may_end_by_itself():
    assert len(collect(searcher=listener(stop=3), batch_size=2, num_trials=100)) == 6


def test_first_configurations_come_first():
    records = collect(searcher=blackbox.random_search(first=[{"kind": "b"}, {"x": 0.5, "size": 2}]), on={"t": 0.0})
    assert records[0].configuration == {"x": 0.0, "size": 6, "kind": "b", "only_b": pytest.approx(1e-2)}
    assert records[1].configuration == {"x": 0.5, "size": 2, "kind": "a"}
    # The later draws are the same as without `first`.
    assert without_cost(records[2:]) == without_cost(collect(on={"t": 0.0})[2:])


@pytest.mark.parametrize(
    ("task", "status", "outcome", "reason"),
    [
        ("raise", "FAIL", math.nan, "KeyError: 'no such column'"),
        ("raise bytes", "FAIL", math.nan, r"FileNotFoundError: data/\udcff.csv"),
        ("raise in silence", "FAIL", math.nan, "Speechless: (no text: OSError)"),
        ("prune in silence", "PRUNED", math.nan, "(no text: OSError)"),
        ("exit", "FAIL", math.nan, "SystemExit: enough"),
        ("nan", "FAIL", math.nan, "the outcome is nan"),
        ("inf", "FAIL", math.nan, "the outcome is inf"),
        ("text", "FAIL", math.nan, "ValueError: could not convert string to float: 'much'"),
        ("prune", "PRUNED", 0.5, "by the objective"),
        ("prune in words", "PRUNED", math.nan, "too slow"),
        ("change", "COMPLETE", 0.25, ""),
        ("good", "COMPLETE", 0.25, ""),
    ],
)
def test_an_error_that_ends_one_trial_is_a_record(tmp_path, task, status, outcome, reason):
    store = tmp_path / "records.db"
    (record,) = collect(black_boxes.misbehave, on={"t": task}, num_trials=1, store=store)
    assert repr(blackbox.read_records(store)) == repr([record])
    assert (record.status, record.reason) == (status, reason)
    assert record.outcome == outcome or math.isnan(outcome) and math.isnan(record.outcome)
    assert record.configuration == {"x": 0.0, "size": 6, "kind": "a"}  # whatever the objective does with its own


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork")  # JAX and Python 3.12 warn of threads
@pytest.mark.parametrize(
    ("ending", "code"), [(None, 0), (KeyError("fork"), 1), (Killed(), 1), (SystemExit(3), 3), (SystemExit("text"), 1)]
)
def test_a_fork_made_by_the_objective_ends_where_the_objective_ends(ending, code, capfd):
    process, codes = os.getpid(), []

    def forks(trial, task):
        if child := os.fork():
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            return 0.25
        print("printed by the fork")
        if ending is not None:
            raise ending
        return 1.0

    try:
        records = collect(forks, on={"t": 0.0}, num_trials=2, num_workers=1)
    finally:
        if os.getpid() != process:
            os._exit(99)  # the fork came back to the collector
    assert codes == [code, code] and [record.outcome for record in records] == [0.25, 0.25]
    assert capfd.readouterr().out == "printed by the fork\n" * 2


@pytest.mark.once
def test_a_trial_that_would_end_the_process_is_a_record_and_the_others_run(tmp_path):
    on = {name: name for name in ("good", "hang", "crash", "raise", "fork", "good again")} | {"good again": "good"}
    start, store = time.monotonic(), tmp_path / "records.db"
    kwargs = {"isolated": True, "time_limit": 1.0, "num_trials": 1, "store": store}
    records = collect(black_boxes.misbehave, on=on, **kwargs)
    endings = [(record.status, record.reason) for record in records]
    assert endings == [
        ("COMPLETE", ""),
        ("FAIL", "time limit of 1 s"),
        ("FAIL", "signal SIGSEGV"),
        ("FAIL", "KeyError: 'no such column'"),
        ("COMPLETE", ""),
        ("COMPLETE", ""),
    ]
    assert [record.outcome for record in records[4:]] == [0.5, 0.25]  # not those of the fork
    assert 1.0 <= records[1].cost < 5.0 and time.monotonic() - start < 300
    # Failures are kept, and not tried again.
    assert without_cost(collect(black_boxes.misbehave, on=on, **kwargs)) == without_cost(records)
    assert len(blackbox.read_records(store, history=True)) == 12


def test_the_end_of_a_child_is_noticed_while_a_grandchild_holds_its_pipe():
    """As the workers of a data loader do."""
    receiver, sender = multiprocessing.Pipe()
    process = subprocess.Popen(
        ["sh", "-c", "sleep 60 & kill -SEGV $$"],
        stdin=subprocess.PIPE,
        pass_fds=[sender.fileno()],
        start_new_session=True,
    )
    sender.close()
    child = _trials._Child(process, receiver)
    try:
        with pytest.raises(EOFError):
            _trials._wait(child, 5.0, None)
        assert _trials._how_it_ended(process) == "signal SIGSEGV"
    finally:
        _trials._end(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc reports the memory of a process has started")
def test_a_grandchild_in_its_own_session_ends_with_the_child():
    code = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
    code += "print(p.pid, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    _trials._kill(_trials._Child(process, multiprocessing.Pipe()[0]))
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while (state := state_of(grandchild)) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state in ("", "Z")


def state_of(process):
    """The state of a process in Linux, or "" if the process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.once
def test_ending_children_tolerates_a_thread_that_takes_one(tmp_path):
    """Another thread takes the only idle child before the n-th instruction of `end_children`, for all n."""
    begun, may_end = tmp_path / "begun", tmp_path / "may_end"
    process_ids, num_left = [], 0

    def objective(trial, task):
        begun.touch()
        while not may_end.exists():
            time.sleep(1e-3)
        return os.getpid()

    def run():
        record = _trials.run_isolated(objective, None, base.Record("", {}, status="WAITING"), owner="other")
        process_ids.append(record.outcome)

    def trace(frame, event, argument):
        nonlocal num_left
        frame.f_trace_opcodes = True
        if event == "opcode":
            num_left -= 1
            if num_left == 0:
                thread.start()
                while not begun.exists() and thread.is_alive():
                    time.sleep(1e-3)
        return trace

    _trials.end_children("nobody")
    before = sys.gettrace()
    may_end.touch()
    run()
    # As soon as the child has ended, the other thread starts another one.
    while len(set(process_ids)) == 1 and len(process_ids) < 1_000:
        begun.unlink()
        may_end.unlink()
        num_left = len(process_ids)
        thread = threading.Thread(target=run)
        inspect.currentframe().f_trace_opcodes = True  # Python 3.12 needs it here, too
        sys.settrace(trace)
        try:
            _trials.end_children("nobody")
        finally:
            sys.settrace(before)
            may_end.touch()
        thread.join()
    _trials.end_children("nobody")
    assert len(process_ids) > 9 and len(set(process_ids)) == 2


def test_tasks_come_as_any_iterable_and_keys_of_both_kinds():
    named = [argparse.Namespace(name=name) for name in TASKS]
    kwargs = {"objective": lambda trial, task: 1.0, "num_trials": 2}

    class Suite(list):
        name = "a suite"  # the name of the whole list; each task has a name, too

    class Indexed:  # as the data sets of PyTorch are
        __len__, __getitem__ = named.__len__, named.__getitem__

    for on in (Suite(named), Indexed()):
        assert without_cost(collect(on=on, **kwargs)) == without_cost(collect(on=named, **kwargs))
    one, other = (collect(on=on, **kwargs) for on in (named, iter(named)))
    assert without_cost(one) == without_cost(other) and {record.task for record in one} == set(TASKS)
    assert len(collect(key=jax.random.PRNGKey(0), **kwargs)) == 4


def test_the_budget_ends_a_collection_and_the_next_one_goes_on(tmp_path):
    calls = []

    def objective(trial, task):
        calls.append(trial)
        time.sleep(0.1)
        return 0.0

    store, start = tmp_path / "records.db", time.monotonic()
    records = collect(objective, on={"t": 0}, num_trials=50, store=store, budget=0.25)
    seconds = time.monotonic() - start
    assert 1 <= len(records) == len(calls) <= 3 and seconds >= 0.25
    assert len(collect(objective, on={"t": 0}, num_trials=4, store=store)) == 4 == len(calls)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("by_default", [True, False])
def test_trials_are_asked_for_shortly_before_they_run(monkeypatch, num_workers, by_default):
    """By default, every trial after the first one of a task draws a configuration."""
    inner, configuration, begun, most = blackbox.random_search(), spaces.configuration, [], []
    drawn = list(TASKS) if by_default else []

    def ask(state, num):
        trials, state = inner.ask(state, num)
        drawn.extend(trials)
        return trials, state

    def draw(*args):
        drawn.append(args)
        return configuration(*args)

    def objective(trial, task):
        begun.append(trial)
        most.append(len(drawn) - len(begun))
        time.sleep(0.01)
        if len(begun) >= 10:
            raise Killed
        return 0.0

    counting = base.Searcher(inner.init, ask, inner.tell)
    if by_default:
        monkeypatch.setattr(spaces, "configuration", draw)  # counts the configurations that the default searcher draws
    on = TASKS if by_default else {str(task): 0.0 for task in range(100)}
    kwargs = {"num_trials": 20_000, "searcher": None if by_default else counting, "num_workers": num_workers}
    with pytest.raises(Killed):
        collect(objective, on=on, **kwargs)
    assert max(most) <= 6 * num_workers
    num_asked = len(drawn)
    assert collect(objective, on=on, budget=1e-9, **kwargs) == [] and len(drawn) == num_asked


def test_random_search_by_default_runs_the_trials_of_a_plain_loop_within_any_budget(tmp_path):
    expected, inner = [], blackbox.random_search()
    for name in TASKS:
        state = inner.init(jax.random.fold_in(KEY, zlib.crc32(name.encode())), black_boxes.SPACE)
        expected += [(name, trial.seed, trial.configuration) for trial in inner.ask(state, 7)[0]]
    draws = lambda records: [(record.task, record.seed, record.configuration) for record in records]
    for kwargs in ({}, {"num_workers": 3}, {"budget": math.inf}):
        assert draws(collect(black_boxes.uneven, num_trials=7, **kwargs)) == expected
    # The records that a store has are returned after the budget is spent, too: here all but one.
    store = tmp_path / "records.db"
    collect(lambda trial, task: {0.5: 1.0}[task] if trial.trial == 2 else 0.0, num_trials=7, store=store)
    records = collect(num_trials=9, store=store, budget=1e-9, retry_failed=True)
    assert draws(records) == expected[:2] + expected[3:]


def test_a_budget_is_overrun_by_less_than_a_trial():
    """No trial of .3 s begins after .5 s. A child that is not ready in time is not waited for."""
    collect(black_boxes.pure, on={"t": 0}, num_trials=50, budget=1e-3)  # compiles
    begun = []

    def objective(trial, task):
        begun.append(time.monotonic())
        time.sleep(0.3)
        return 0.0

    start = time.monotonic()
    assert len(collect(objective, on={"t": 0}, num_trials=50, budget=0.5)) == len(begun) >= 1
    assert begun[-1] - start < 0.5 < time.monotonic() - start < 0.5 + 0.3 + 0.2
    trial = base.Record("t", {}, status="WAITING")
    for seconds in (0.05, -1.0):
        start = time.monotonic()
        before = time.time() + seconds
        assert _trials.run_isolated(black_boxes.misbehave, "good", trial, begins_before=before) is None
        assert time.monotonic() - start < 0.5
    assert _workers.run_in_worker(black_boxes.misbehave, "good", trial, time.time() - 1) is None
    assert _workers.run_in_worker(black_boxes.misbehave, "good", trial, time.time() + 60).outcome == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_hung_trials_overrun_a_budget_by_less_than_their_limit(num_workers, tmp_path):
    """Every one of them ends its child, and the next one needs seconds to start."""
    start, store = time.monotonic(), tmp_path / "records.db"
    kwargs = {"on": {"t": "hang"}, "isolated": True, "time_limit": 2.0, "num_workers": num_workers, "num_trials": 50}
    records = collect(black_boxes.misbehave, budget=9.0, store=store, **kwargs)
    assert 9.0 - 0.1 < time.monotonic() - start < 9.0 + 2.0
    assert 1 <= len(records) < 50 and {r.reason for r in records} == {"time limit of 2 s"}
    assert all(r.cost < 2.5 for r in records)
    rest = len(blackbox.read_records(store)) - len(records)  # they had no time to begin, and are queued again
    assert 0 <= rest <= num_workers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("memory", "memory limit of 700 MiB"),
        ("memory below", "memory limit of 700 MiB"),
        ("exit at once", "exit code 3"),
    ],
)
def test_children_that_end_or_are_ended(task, reason):
    (record,) = collect(black_boxes.misbehave, on={"t": task}, num_trials=1, isolated=True, memory_limit=700)
    assert (record.status, record.reason) == ("FAIL", reason)


@pytest.mark.slow
def test_isolated_workers_change_nothing_and_generators_are_seeded():
    kwargs = {"isolated": True, "num_trials": 4}
    one = collect(black_boxes.quadratic, **kwargs)
    assert {record.status for record in one} == {"COMPLETE"}
    assert without_cost(collect(black_boxes.quadratic, num_workers=4, **kwargs)) == without_cost(one)


@pytest.mark.slow
def test_an_objective_that_a_child_cannot_read_is_an_error_and_no_record():
    module = type(sys)("nowhere")
    exec("def objective(trial, task): return 0.0", vars(module))
    sys.modules["nowhere"] = module
    with pytest.raises(RuntimeError, match="cannot read the objective or the task: ModuleNotFoundError.*nowhere"):
        collect(vars(module)["objective"], isolated=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_joblib_s_backends(backend):
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend=backend, n_jobs=2):
        records = collect(black_boxes.quadratic, isolated=True, num_trials=2)
    assert without_cost(records) == without_cost(collect(black_boxes.quadratic, isolated=True, num_trials=2))


@pytest.mark.parametrize("stored", [True, False])
def test_ctrl_c_says_what_remains_and_how_to_continue(tmp_path, stored):
    store = tmp_path / "records.db" if stored else None

    def objective(trial, task):
        if trial.trial == 2:
            raise KeyboardInterrupt  # as Python does for SIGINT, which a job in the background may ignore
        return black_boxes.pure(trial, task)

    expected = (
        f"{store} has all trials that were written before: the same call continues"
        if stored
        else "Its records are lost"
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        collect(objective, on={"left": -0.5}, store=store)
    assert expected in str(caught.value)
    assert "joblib" not in "".join(traceback.format_exception(caught.value))  # not its twenty frames
    if stored:
        assert len(blackbox.read_records(store, status="COMPLETE")) == 2
        continued = collect(on={"left": -0.5}, store=store)
        assert without_cost(continued) == without_cost(collect(on={"left": -0.5}))


def test_ctrl_c_in_a_fit_of_the_objective_keeps_its_message():
    def objective(trial, task):
        raise KeyboardInterrupt("the checkpoint of the fit")

    with pytest.raises(KeyboardInterrupt, match="the checkpoint of the fit"):
        collect(objective)


COLLECTOR = """
import sys, black_boxes, jax
from metaopt import blackbox
blackbox.collect(black_boxes.slow, black_boxes.SPACE, {"left": -0.5}, num_trials=int(sys.argv[2]),
                 key=jax.random.key(3), store=sys.argv[1], num_workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_collector_loses_the_trials_in_flight_and_its_children_end(tmp_path, number):
    store = tmp_path / "records.db"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_ENABLE_X64": "1"}
    collector = subprocess.Popen(
        [sys.executable, "-c", COLLECTOR, str(store), "50"], env=environment, stderr=subprocess.DEVNULL
    )
    num = lambda: len(blackbox.read_records(store, status="COMPLETE")) if store.exists() else 0
    deadline = time.monotonic() + 120
    while num() < 4 and collector.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    below = {int(p) for f in Path(f"/proc/{collector.pid}/task").glob("*/children") for p in f.read_text().split()}
    collector.send_signal(number)
    collector.wait(timeout=60)
    assert below and 4 <= num() < 50
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{process}").exists() for process in below):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{process}").exists() for process in below)
    assert len(blackbox.read_records(store, status="RUNNING")) <= 2
    records = collect(black_boxes.slow, on={"left": -0.5}, num_trials=12, store=store, isolated=True, num_workers=2)
    whole = collect(black_boxes.slow, on={"left": -0.5}, num_trials=12, isolated=True)
    assert without_cost(records) == without_cost(whole)

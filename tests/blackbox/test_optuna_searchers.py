"""Optuna's samplers and pruners as searchers."""

import math

import jax
import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record

optuna = pytest.importorskip("optuna")

KEY = jax.random.key(0)
SPACE = {
    "x": spaces.interval(-1.0, 1.0),
    "y": spaces.interval(1e-4, 1.0, log=True),
    "kind": spaces.choice(["good", "bad"], default="bad"),
    "shift": spaces.active_if(spaces.interval(0.0, 1.0), "kind", ["bad"]),
    "three": spaces.fixed(3),
}


def bowl(trial, task):
    c = trial.configuration
    assert c["three"] == 3 and ("shift" in c) == (c["kind"] == "bad")
    return (c["x"] - task) ** 2 + (math.log10(c["y"]) + 3) ** 2 / 10 + (c["kind"] == "bad") * (0.5 + c.get("shift", 0))


def collect(searcher, objective=bowl, num_trials=25, *, on, **kwargs):
    kwargs = {"num_trials": num_trials, "key": KEY, "searcher": searcher, "isolated": False} | kwargs
    return blackbox.collect(objective, SPACE, on, **kwargs)


def best(records):
    """The mean over tasks of the smallest outcome."""
    names = {record.task for record in records}
    return sum(min(record.outcome for record in records if record.task == name) for name in names) / len(names)


def test_one_rung_has_only_full_budgets():
    records = collect(blackbox.bohb(num_rungs=1), num_trials=3, on={"a": 0.6})
    assert [record.fidelity for record in records] == [1.0, 1.0, 1.0]


def test_tpe_finds_more_than_random_search():
    on = {"a": 0.6, "b": -0.6, "c": 0.3, "d": -0.9}
    records = collect(blackbox.tpe(), batch_size=2, on=on)
    assert records[0].configuration == {"x": 0.0, "y": pytest.approx(1e-2), "kind": "bad", "shift": 0.5, "three": 3}
    assert best(records) < 0.7 * best(collect(None, on=on))


@pytest.mark.once
def test_the_same_key_gives_the_same_trials_however_they_are_interrupted(tmp_path):
    store = tmp_path / "records.db"
    fails = lambda trial, task: math.nan if trial.trial % 5 == 3 else bowl(trial, task)
    kwargs = {"on": {"a": 0.6}, "batch_size": 4}
    for searcher in (blackbox.tpe(num_random=4), blackbox.bohb(num_random=2, num_rungs=3)):
        whole = collect(searcher, fails, 14, **kwargs)
        collect(searcher, fails, 7, store=store, study=str(searcher), **kwargs)
        collected = collect(searcher, fails, 14, store=store, study=str(searcher), num_workers=3, **kwargs)
        repr_of = lambda records: [repr(record._replace(cost=0.0)) for record in records]
        assert repr_of(collected) == repr_of(whole) and sum(record.status == "FAIL" for record in whole) >= 2


def test_bohb_runs_only_the_best_few_trials_at_the_full_budget():
    budgets = lambda trial, task: bowl(trial, task) + (1 - trial.fidelity) / 10
    searcher = blackbox.bohb(num_rungs=3)
    records = collect(searcher, budgets, num_trials=20, on={"a": 0.6})
    trials_at = lambda fidelity: {r.trial: r for r in records if r.fidelity == pytest.approx(fidelity)}
    low, middle, full = trials_at(1 / 9), trials_at(1 / 3), trials_at(1.0)
    assert len(low) + len(middle) + len(full) == len(records) and set(full) < set(middle) < set(low)
    assert sum(record.fidelity for record in records) == pytest.approx(20, abs=1)
    # One configuration a trial, and a seed.
    assert all(low[n].configuration == middle[n].configuration == full[n].configuration for n in full)
    assert all(low[n].seed == full[n].seed for n in full)
    mean = lambda records: sum(record.outcome for record in records) / len(records)
    assert mean([low[n] for n in full]) < mean(list(low.values()))
    # Trials that resume pay only for the rest of the budget.
    resumed = collect(searcher, budgets, num_trials=20, on={"a": 0.6}, resumes=True)
    assert len(resumed) > len(records)


def test_tpe_learns_from_trials_that_it_did_not_ask_for():
    searcher = blackbox.tpe(num_random=0)
    history = [
        Record("a", {"x": i / 20 - 1, "y": 1e-3, "kind": "good", "three": 3}, (i / 20 - 1.6) ** 2) for i in range(40)
    ]
    state = searcher.init(KEY, SPACE)
    state = searcher.tell(state, history)
    state = searcher.ask(state, 1)[1]  # the default
    trials, _ = searcher.ask(state, 5)
    assert [record.trial for record in trials] == list(range(1, 6))
    assert sum(record.configuration["x"] for record in trials) / 5 > 0.2


@pytest.mark.parametrize("searcher", [blackbox.tpe(num_random=0), blackbox.bohb(num_random=0, num_rungs=2)])
def test_a_foreign_record_with_the_number_of_a_running_trial_leaves_it_running(searcher):
    (own,), state = searcher.ask(searcher.init(KEY, SPACE), 1)
    foreign = Record("a", {"x": 0.5, "y": 1e-3, "kind": "good", "three": 3}, 0.1, trial=own.trial)
    state = searcher.tell(state, [foreign])
    assert list(state.trials) == [own.trial] and len(state.study.trials) == 2
    state = searcher.tell(state, [own._replace(status="FAIL")])
    assert not state.trials and [trial.state.name for trial in state.study.trials] == ["FAIL", "COMPLETE"]


def test_asha_with_configurations_of_tpe_is_better_than_with_random_ones():
    budgets = lambda trial, task: bowl(trial, task) + (1 - trial.fidelity) / 10
    on = {"a": 0.6, "b": -0.6, "c": 0.3}
    searcher = blackbox.tpe(num_random=5)
    collections = [collect(blackbox.asha(inner, num_rungs=3), budgets, 8, on=on) for inner in (searcher, None)]
    full = [[record for record in records if record.fidelity == 1.0] for records in collections]
    assert best(full[0]) < best(full[1])
    # It hears of the end of each trial at each fidelity, failed ones among them.
    state = searcher.init(KEY, SPACE)
    trials, state = searcher.ask(state, 3)
    ended_at = lambda record, fidelity, **ended: record._replace(fidelity=fidelity, **ended)
    complete = {"status": "COMPLETE", "outcome": 0.5}
    state = searcher.tell(state, [ended_at(trials[0], 1 / 9, **complete), ended_at(trials[1], 1 / 9, status="FAIL")])
    state = searcher.tell(state, [ended_at(trials[0], 1 / 3, **complete), ended_at(trials[0], 1.0, **complete)])
    names = [trial.state.name for trial in state.study.trials]
    assert names == ["PRUNED", "FAIL", "RUNNING", "PRUNED", "COMPLETE"] and list(state.trials) == [2]


@pytest.mark.parametrize("rounded", [lambda f: float(np.float32(f)), lambda f: round(f, 4)])
@pytest.mark.parametrize("make", [blackbox.asha, blackbox.bohb])
def test_a_fidelity_rounded_to_float32_is_recognized_and_another_one_is_rejected(make, rounded):
    space, searcher = {"x": spaces.interval(0.0, 1.0)}, make(num_rungs=3)
    trials, state = searcher.ask(searcher.init(KEY, space), 6)
    exact = [trial._replace(status="COMPLETE", outcome=trial.configuration["x"]) for trial in trials]
    records = [record._replace(fidelity=rounded(record.fidelity)) for record in exact]
    if records[0].fidelity == 0.1111:
        with pytest.raises(ValueError, match=r"fidelity must be one of .*\[0.111.*; got 0.1111 for trial 0"):
            searcher.tell(state, records)
        # The failed call changed nothing. A trial of another search (another seed) may have any fidelity.
        state = searcher.tell(state, [records[0]._replace(seed=records[0].seed + 1)])
        records = exact
    next_, _ = searcher.ask(searcher.tell(state, records), 6)
    promoted = [trial.trial for trial in next_ if trial.fidelity == pytest.approx(1 / 3)]
    trials, state = searcher.ask(searcher.init(KEY, space), 6)
    expected, _ = searcher.ask(searcher.tell(state, exact), 6)
    assert promoted == [trial.trial for trial in expected if trial.fidelity == pytest.approx(1 / 3)] != []


@pytest.mark.parametrize(
    "searcher, fidelity, status",
    [
        (blackbox.bohb(num_random=0, first=[], num_rungs=2), 1 / 3, "COMPLETE"),
        (blackbox.bohb(num_random=0, first=[], num_rungs=2), 0.5, "COMPLETE"),
        (blackbox.bohb(num_random=0, first=[], num_rungs=2), 1.0, "PRUNED"),
        (blackbox.tpe(num_random=0, first=[]), 1.0, "PRUNED"),
    ],
)
def test_low_budgets_and_pruned_trials_of_others_are_learned_from(searcher, fidelity, status):
    space, points = {"x": spaces.interval(0.0, 1.0)}, [i / 40 for i in range(41)]
    history = [
        Record("t", {"x": x}, (x - 0.8) ** 2, fidelity, trial=100 + i, status=status) for i, x in enumerate(points)
    ]
    others = [history[0]._replace(status="FAIL"), history[0]._replace(outcome=math.nan)]
    state = searcher.tell(searcher.init(KEY, space), history + others)
    assert [trial.state.name for trial in state.study.trials] == ["PRUNED"] * 41
    trials, state = searcher.ask(state, 6)
    assert sum(abs(record.configuration["x"] - 0.8) for record in trials) / 6 < 0.12
    # Trials that completed a budget rank before those that were given up, and the full budget ranks first.
    more = [history[0]._replace(trial=200 + i, fidelity=f, status="COMPLETE") for i, f in enumerate((0.3, 0.9, 1.0))]
    low, high, full = searcher.tell(state, more).study.trials[-3:]
    step = lambda trial: max(trial.intermediate_values)
    assert full.state.name == "COMPLETE" and step(high) > step(low) >= 1
    assert {step(trial) for trial in state.study.trials[:41]} <= ({0} if status == "PRUNED" else {1, 2})


def test_tpe_ignores_records_with_another_fixed_value(caplog):
    searcher = blackbox.tpe()
    state = searcher.init(KEY, {"x": spaces.interval(0.0, 1.0), "three": spaces.fixed(3), "tiny": spaces.fixed(0.1)})
    given = [
        {"x": 0.5, "three": 4},
        {"x": 0.6, "three": np.array(3), "tiny": 0.1 + 1e-9},
        {"x": 0.7},
        {"x": 0.8, "three": np.float32("nan"), "tiny": None},
    ]
    state = searcher.tell(state, [Record("a", c, 0.1, trial=7 + i) for i, c in enumerate(given)])
    assert [trial.params["x"] for trial in state.study.trials] == [0.6, 0.7, 0.8]
    (warning,) = caplog.records
    assert "1 of 4 records do not fit" in warning.getMessage() and "`three` must be 3; got 4" in warning.getMessage()


def test_tpe_ignores_records_outside_its_space_and_warns_once(caplog):
    searcher = blackbox.tpe()
    state = searcher.init(KEY, {"rate": spaces.interval(1e-4, 0.1, log=True), "kind": spaces.choice(["a", "b"])})
    foreign = [{"rate": 0.5, "kind": "a"}, {"rate": 0.01, "kind": "c"}, {"rate": 0.1 + 1e-9, "old": 3}]
    state = searcher.tell(state, [Record("a", c, 0.1, fidelity=1 - 1e-8, trial=7 + i) for i, c in enumerate(foreign)])
    # The full budget, but for rounding.
    assert [trial.params for trial in state.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))] == [
        {"rate": 0.1}
    ]
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "3 of 3 records do not fit this searcher. Records outside the space are not used, and names that "
        "the space does not have are ignored. The first: The configuration's `rate` must be between 0.0001 and 0.1; "
        "got 0.5."
    )
    normal = [
        Record("a", {"rate": 0.05, "kind": "b"}, 0.2, trial=20),
        Record("a", {"rate": 9.0}, status="FAIL", trial=21),
    ]
    state = searcher.tell(state, normal)
    assert len(caplog.records) == 1
    searcher.tell(state, [*normal, Record("a", {"rate": 0.05, "old": 3}, 0.2, trial=22)])
    assert "1 of 3 records" in caplog.messages[1] and caplog.messages[1].endswith(
        "The first: The space has no `old`; it has `kind`, `rate`."
    )

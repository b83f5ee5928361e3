"""Several outcomes of a trial: returned by objectives, kept in files, frames and studies, and compared."""

import json
import math
import sqlite3

import jax
import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record
from metaopt.blackbox import _goals

LINE = {"x": spaces.interval(0.0, 1.0)}
KEY = jax.random.key(0)


def error_and_size(trial, task):
    x = trial.configuration["x"]
    if x < 0.2:
        raise blackbox.Pruned({"error": 1 - x, "size": math.nan})
    return {"error": (1 - x) ** 2, "size": x * task if x < 0.9 else math.inf}


def collect(objective, **options):
    options = {"num_trials": 20, "key": KEY, "isolated": False, "progress": False} | options
    return blackbox.collect(objective, LINE, {"t": 10.0}, **options)


def same(records, others):
    return [repr(record) for record in records] == [repr(record) for record in others]  # NaN equals NaN


def test_collect_records_every_outcome_and_continues_from_its_file(tmp_path):
    whole = collect(error_and_size)
    assert {record.status for record in whole} == {"COMPLETE", "PRUNED", "FAIL"}
    for record in whole:
        x = record.configuration["x"]
        if record.status == "COMPLETE":
            assert record.outcomes == {"error": (1 - x) ** 2, "size": x * 10} and record.outcome == (1 - x) ** 2
        elif record.status == "PRUNED":
            assert repr(record.outcomes) == repr({"error": 1 - x, "size": math.nan}) and record.outcome == 1 - x
        else:
            assert record.outcomes is None and record.reason == "the outcome 'size' is inf"
    without_cost = lambda records: [record._replace(cost=0.0) for record in records]
    collect(error_and_size, num_trials=7, store=tmp_path / "records.db")
    resumed = collect(error_and_size, store=tmp_path / "records.db")
    assert same(without_cost(resumed), without_cost(whole))
    assert same(blackbox.read_records(tmp_path / "records.db"), resumed)
    assert blackbox.recover_records(tmp_path / "records.db", tmp_path / "copy.db") == 40  # begun and ended
    assert same(blackbox.read_records(tmp_path / "copy.db"), resumed)


def test_outcomes_of_a_child_process_and_of_tuples_have_names():
    (record,) = collect(lambda trial, task: (0.5, np.float32(2.0)), num_trials=1, isolated=True)
    assert record.outcomes == {"0": 0.5, "1": 2.0} and record.outcome == 0.5
    for wrong in ({}, (), {1: 0.5}, {"error": "low"}, {"": 0.5}):
        (record,) = collect(lambda trial, task, wrong=wrong: wrong, num_trials=1)
        assert record.status == "FAIL" and record.outcomes is None and record.reason.startswith("ValueError")


def test_a_row_with_broken_outcomes_is_named_and_repeats_differ_by_any_outcome(tmp_path):
    file, record = (
        tmp_path / "records.db",
        Record("t", {"x": 0.5}, 0.25, 1.0, 2.0, outcomes={"error": 0.25, "size": 3.0}),
    )
    repeats = [record, record._replace(outcomes={"error": 0.25, "size": 4.0}), record]
    blackbox.append_records(file, repeats)
    assert blackbox.read_records(file) == repeats[:2]
    for text in ("no JSON", json.dumps({"error": 0.5}), json.dumps([0.25]), json.dumps({"error": "low"})):
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE records SET outcomes = ? WHERE id = 2", (text,))
        connection.close()
        with pytest.raises(ValueError, match="row 2 .* is broken. .*outcomes must be"):
            blackbox.read_records(file)


def test_outcomes_come_back_from_frames(tmp_path):
    pd = pytest.importorskip("pandas")
    records = [r._replace(cost=1.0, reason="") for r in collect(error_and_size)]
    assert same(blackbox.records_from_frame(blackbox.records_to_frame(records, wide=True)), records)
    frame = blackbox.records_to_frame(records, wide=True)
    sizes = [math.nan if r.outcomes is None else r.outcomes["size"] for r in records]
    np.testing.assert_array_equal(frame["outcomes.size"], sizes)
    frame.to_csv(tmp_path / "records.csv", index=False)
    texts, gaps = {"task": str, "reason": str}, {"outcome": "", "cost": ""}
    exact = {"float_precision": "round_trip"} if int(pd.__version__.split(".")[0]) < 3 else {}
    read = pd.read_csv(tmp_path / "records.csv", dtype=texts, na_values=gaps, keep_default_na=False, **exact)
    assert same(blackbox.records_from_frame(read), records)


def records_of_studies():
    outcomes = [
        {"error": e, "seconds": s, "size": m} for e, s, m in ((0.1, 9.0, 4.0), (0.2, 2.0, 7.0), (0.3, 3.0, 2.0))
    ]
    records = [Record("t", {"x": i / 10}, o["error"], 1.0, 1.0, 5, trial=i, outcomes=o) for i, o in enumerate(outcomes)]
    records += [records[0]._replace(trial=3, status="FAIL", outcome=math.nan, outcomes=None, reason="signal SIGSEGV")]
    part = {"error": 0.6, "seconds": 1.0, "size": math.nan}
    return [*records, records[0]._replace(trial=4, status="PRUNED", outcome=0.6, fidelity=0.5, outcomes=part)]


def test_records_of_several_outcomes_become_a_study_and_come_back():
    optuna = pytest.importorskip("optuna")
    records = records_of_studies()
    study = blackbox.to_optuna_study(records, LINE, constraints={"size": 5.0})
    assert study.metric_names == ["error", "seconds"] and [d.name for d in study.directions] == ["MINIMIZE"] * 2
    assert [trial.values for trial in study.trials] == [[0.1, 9.0], [0.2, 2.0], [0.3, 3.0], None, None]
    assert [trial.system_attrs.get("constraints") for trial in study.trials] == [[-1.0], [2.0], [-3.0], None, None]
    assert [trial.number for trial in study.best_trials] == [0, 2]  # Optuna's own front, of feasible trials
    front = blackbox.best_records(records, ("error", "seconds"), {"size": 5.0})
    assert [record.trial for record in front] == [0, 2]
    assert same(blackbox.from_optuna_study(study), records)
    one = blackbox.to_optuna_study(records, LINE, objectives=["seconds"], constraints={"size": 5.0})
    assert one.best_value == 3.0 and one.trials[4].intermediate_values == {500: 1.0}
    assert same(blackbox.from_optuna_study(one), records)
    assert optuna.trial.TrialState.PRUNED == one.trials[4].state


def test_a_study_of_several_objectives_that_optuna_made_is_read():
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["minimize", "maximize"])
    for x, state in ((0.25, "COMPLETE"), (0.75, "COMPLETE"), (0.5, "PRUNED"), (0.5, "FAIL")):
        done = state == "COMPLETE"
        constraints = {"constraints": [x - 0.5], "constraints:named": 1.0} if done else {}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state],
            values=[x, 2 * x] if done else None,
            params={"x": x},
            distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
            system_attrs=constraints,
        )
        study.add_trial(trial)
    records = blackbox.from_optuna_study(study)
    assert [record.status for record in records] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    names = ["0", "1", "constraint 0", "constraint named"]
    assert records[0].outcomes == dict(zip(names, [0.25, -0.5, -0.25, 1.0], strict=True))
    assert records[0].outcome == 0.25 and records[2].outcomes is records[3].outcomes is None
    kept = records[:2]
    assert [r.outcomes for r in blackbox.from_optuna_study(blackbox.to_optuna_study(kept, LINE))] == [
        r.outcomes for r in kept
    ]


def test_best_first_orders_fronts_feasible_trials_first_and_one_objective_by_its_outcome():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 2))
    order = _goals.best_first(points, np.zeros((40, 0)))
    dominates = (points[:, None] <= points[None]).all(-1) & (points[:, None] < points[None]).any(-1)
    assert sorted(order) == list(range(40))
    place = np.argsort(order)
    assert (place[:, None] < place[None])[dominates].all()
    first_front = int((~dominates.any(0)).sum())
    assert first_front > 3 and order[0] == points[:, 0].argmin() and order[1] == points[:, 1].argmin()
    excess = rng.normal(size=(40, 2))
    excess[7] = np.nan
    constrained = _goals.best_first(points, excess)
    feasible = (excess <= 0).all(1)
    num = int(feasible.sum())
    assert sorted(constrained[:num]) == np.flatnonzero(feasible).tolist() and len(constrained) == 39
    assert 7 not in constrained
    violation = (np.maximum(excess, 0) / np.nanmax(np.maximum(excess, 0), axis=0)).sum(1)
    assert (np.diff(violation[constrained[num:]]) >= 0).all()
    assert _goals.best_first(points[:, :1], np.zeros((40, 0))) == points[:, 0].argsort().tolist()


def test_an_infinite_outcome_does_not_hide_the_order_of_other_infeasible_trials():
    objectives, excess = np.zeros((4, 1)), np.array([[np.inf], [1000.0], [0.01], [-1.0]])
    np.testing.assert_array_equal(_goals.ranks(objectives, excess), [3, 2, 1, 0])


def test_a_failed_trial_may_lack_an_outcome():
    records = [
        Record("t", {}, 1.0, outcomes={"a": 1.0, "b": 2.0}),
        Record("t", {}, math.nan, status="FAIL", outcomes={"a": math.nan}),
    ]
    outcomes = [record.outcome for record in _goals.records_of_outcome(records, "b")]
    np.testing.assert_array_equal(outcomes, [2.0, math.nan])

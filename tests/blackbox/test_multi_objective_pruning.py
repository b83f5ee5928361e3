"""Pruning with several objectives: successive halving by fronts, in metaopt and in Optuna's studies."""

import jax
import numpy as np
import pytest

from metaopt import blackbox, nas, spaces
from metaopt.base import Record

LINE = {"x": spaces.interval(0.0, 1.0)}
KEY = jax.random.key(0)


def curves(trial, task):
    """At every fidelity the front is x in [0, ½]: there error falls with x, and size grows."""
    x = trial.configuration["x"]
    above = max(x - 0.5, 0.0)
    return {"error": (1 - x) ** 2 + 3 * above + 1 - trial.fidelity, "size": x + above, "heat": 1 - x}


def halving(**options):
    searcher = blackbox.asha(blackbox.random_search(first=()), reduction_factor=3, num_rungs=3, **options)
    collect = {"searcher": searcher, "num_trials": 12, "key": KEY, "isolated": False, "progress": False}
    return blackbox.collect(curves, LINE, {"t": None}, **collect)


def xs(records, fidelity):
    return np.array([r.configuration["x"] for r in records if abs(r.fidelity - fidelity) < 1e-6])


def test_halving_by_fronts_continues_trials_that_spread_over_the_front():
    records = halving(objectives=["error", "size"])
    begun, whole = xs(records, 1 / 9), xs(records, 1.0)
    assert (begun > 0.55).sum() > 5 and len(whole) >= 3
    assert whole.max() < 0.55 and np.ptp(whole) > 0.25  # the front is [0, ½]
    by_error = xs(halving(), 1.0)
    assert np.ptp(by_error) < 0.25 and by_error.min() > 0.25  # without `objectives`, the first outcome decides
    hot = xs(halving(objectives=["error", "size"], constraints={"heat": 0.75}), 1.0)
    assert hot.min() >= 0.25 and hot.max() < 0.55


def test_the_searcher_of_a_halving_learns_from_every_outcome():
    names = [f"t{i}" for i in range(3)]
    records = [Record(name, {"x": x}, trial=i) for name in names for i, x in enumerate(np.linspace(0, 1, 7).tolist())]
    records = [r._replace(outcomes=(y := curves(r, None)), outcome=y["error"]) for r in records]
    goals = {"objectives": ["error", "size"], "constraints": {"heat": 0.75}}
    g = blackbox.train_meta_optimizer(records, space=LINE, num_steps=0, **goals)
    searcher = blackbox.asha(g.searcher(), reduction_factor=3, num_rungs=2, **goals)
    options = {"searcher": searcher, "num_trials": 4, "key": KEY, "isolated": False, "progress": False}
    trials = blackbox.collect(curves, LINE, {"new": None}, **options)
    assert {round(trial.fidelity, 3) for trial in trials} == {0.333, 1.0}
    assert blackbox.best_records(trials, **goals)


def test_optuna_prunes_trials_of_several_objectives():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        x = trial.suggest_float("x", 0.0, 1.0)
        for step in (1, 3, 9):
            outcomes = curves(Record("t", {"x": x}, fidelity=step / 9), None)
            values = outcomes["error"], -outcomes["size"]
            if blackbox.should_prune(trial, values, step):
                raise optuna.TrialPruned
        return values

    study.optimize(objective, n_trials=40)
    ends = {state: [t.params["x"] for t in study.trials if t.state.name == state] for state in ("PRUNED", "COMPLETE")}
    assert len(ends["PRUNED"]) > 8 and min(ends["PRUNED"]) > 0.5  # the front is [0, ½]
    assert sum(x < 0.5 for x in ends["COMPLETE"]) == sum(t.params["x"] < 0.5 for t in study.trials)
    assert all(t.values is None for t in study.trials if t.state.name == "PRUNED")
    records = blackbox.from_optuna_study(study)
    pruned = [record for record in records if record.status == "PRUNED"]
    assert {round(record.fidelity, 3) for record in pruned} <= {0.111, 0.333, 1.0} and len(pruned) > 8
    for record in pruned:
        expected = curves(record, None)
        assert record.outcomes == pytest.approx({"0": expected["error"], "1": expected["size"]})


def test_a_trial_is_pruned_if_a_third_of_the_trials_at_its_step_are_on_earlier_fronts():
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["minimize", "minimize"])
    rng = np.random.default_rng(0)
    told, decisions = [], []
    for number in range(60):
        values = rng.uniform(size=2)
        told.append(values)
        every, fronts = np.array(told), np.zeros(len(told), int)
        left = np.arange(len(told))
        while len(left):  # numbers of fronts
            fronts[left] += 1
            left = np.setdiff1d(left, left[nas.pareto_front(every[left])])
        better = (fronts[:-1] < fronts[-1]).sum()
        expected = fronts[-1] > 1 and better >= len(told) / 3
        decisions.append(blackbox.should_prune(study.ask(), values.tolist(), 5))
        assert decisions[-1] == expected, number
        assert not blackbox.should_prune(study.ask(), values.tolist(), number + 100)  # nothing else is at this step
    assert 10 < sum(decisions) < 50
    decide = lambda *values: blackbox.should_prune(study.ask(), values, 4)
    assert [decide(0.0, 0.0), decide(2.0, 2.0), decide(1.0, 1.0)] == [False, True, True]  # one of three is a third
    infeasible = blackbox.should_prune(study.ask(), [0.0, 0.0], 6, constraints=[0.1])
    assert not infeasible  # the first one at this step
    assert not blackbox.should_prune(study.ask(), [1.0, 1.0], 6, constraints=[-0.1])
    assert blackbox.should_prune(study.ask(), [-1.0, -1.0], 6, constraints=[0.2])

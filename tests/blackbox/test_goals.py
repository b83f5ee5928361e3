"""Searches with several objectives and constraints: a plane with a known front, in closed form."""

import functools
import math

import jax
import numpy as np
import pytest

import metaopt
from metaopt import blackbox, nas, spaces
from metaopt.base import Record

PLANE = {"x": spaces.interval(0.0, 1.0), "z": spaces.interval(0.0, 1.0)}
LIMIT = 0.3, 0.3  # reference of the hypervolume
KEY = jax.random.key(0)


def near_and_far(trial, task):
    """Squared distances to two points: the front is the segment between them. `left` is feasible if x is at most ½."""
    x, z = trial.configuration["x"], trial.configuration["z"]
    (a, b), (c, d) = task
    return {"near": (x - a) ** 2 + (z - b) ** 2, "far": (x - c) ** 2 + (z - d) ** 2, "left": x}


def task_of(seed):
    rng = np.random.default_rng(seed)
    return rng.uniform([[0.2, 0.2], [0.5, 0.5]], [[0.4, 0.4], [0.8, 0.8]])


@functools.cache
def earlier():
    rng = np.random.default_rng(100)
    tasks = {f"earlier {i}": task_of(1000 + i) for i in range(6)}
    records = []
    for name, task in tasks.items():
        for number in range(14):
            trial = Record(name, dict(zip("xz", rng.uniform(size=2).tolist(), strict=True)), trial=number, seed=1)
            outcomes = near_and_far(trial, task)
            records.append(trial._replace(outcome=outcomes["near"], outcomes=outcomes))
    return records


@functools.cache
def trained(*objectives, num_steps=40, **constraints):
    return blackbox.train_meta_optimizer(
        earlier(), space=PLANE, objectives=objectives or None, constraints=constraints or None, num_steps=num_steps
    )


def search(searcher, task, key, num_trials=16, objective=near_and_far, **options):
    options = {"searcher": searcher, "num_trials": num_trials, "isolated": False, "progress": False} | options
    return blackbox.collect(objective, PLANE, {"new": task}, key=key, **options)


def volume(records, constraints=None):
    front = blackbox.best_records(records, ("near", "far"), constraints)
    points = np.reshape([(r.outcomes["near"], r.outcomes["far"]) for r in front if r.outcomes], (-1, 2))
    return nas.hypervolume(points, LIMIT)


def volume_of_segment(task):
    """Of the whole front: with distance d between the points, f₁ = (t d)² and f₂ = ((1 − t) d)²."""
    t = np.linspace(0, 1, 20_001)
    squared = float(((task[0] - task[1]) ** 2).sum())
    return nas.hypervolume(np.stack([t**2, (1 - t) ** 2], 1) * squared, LIMIT)


@pytest.mark.once
def test_the_front_is_found_with_fewer_trials_than_at_random():
    """Paired over six tasks and keys: the shares of the whole front's hypervolume after 16 trials."""
    g, shares = trained("near", "far"), []
    for seed in range(20, 26):
        task, key = task_of(seed), jax.random.key(seed)
        whole = volume_of_segment(task)
        found = volume(search(g.searcher(), task, key))
        shares.append((found / whole, volume(search(None, task, key)) / whole))
        assert found <= whole * (1 + 1e-9)
    shares = np.array(shares)
    print(shares)
    assert (shares[:, 0] > shares[:, 1]).sum() >= 5 and (shares[:, 0] - shares[:, 1]).mean() > 0.05


@pytest.mark.once
def test_constraints_hold_in_most_trials_and_the_best_feasible_trial_is_reported():
    """The unconstrained best is infeasible: `near` is smallest at x above the bound."""
    g = trained("near", left=0.3)
    feasible, best = [], []
    for seed in range(20, 24):
        task = np.array([[0.5, 0.4], [0.9, 0.9]])  # the best feasible trial is at x = 0.3: 0.04
        records = search(g.searcher(), task + 0.02 * (seed - 20), jax.random.key(seed))
        (found,) = blackbox.best_records(records, ["near"], {"left": 0.3})
        expected = min(r.outcome for r in records if r.configuration["x"] <= 0.3)
        assert found.outcome == expected and min(r.outcome for r in records) < expected
        limit = (0.2 + 0.02 * (seed - 20)) ** 2
        assert found.outcome >= limit * (1 - 1e-6)
        best.append(found.outcome - limit)
        feasible.append(np.mean([r.configuration["x"] <= 0.3 for r in records[1:]]))
    print(feasible, best)
    assert np.mean(feasible) > 0.5 and np.mean(best) < 0.01


def test_before_a_feasible_trial_the_probability_of_feasibility_decides():
    g = trained("near", left=0.1)
    tried = [{"x": x, "z": z} for x in (0.3, 0.6, 0.9) for z in (0.2, 0.8)]
    told = [near_and_far(Record("", c), task_of(5)) for c in tried]
    (suggested,) = g.suggest(tried, told)
    assert suggested["x"] < 0.1
    rows = [[y["near"], y["left"]] for y in told]
    assert g.suggest(tried, rows) == [suggested]  # the same as an array
    two = [{"x": 0.05, "z": 0.5}, {"x": 0.06, "z": 0.4}]  # of eight trials, because the one after seven is random
    failed = g.suggest([*tried, *two], [*rows, *[[math.nan, math.nan]] * 2])
    unknown = g.suggest([*tried, *two], [*rows, *[[math.nan, 0.05]] * 2])
    assert failed != [suggested] and unknown != failed and unknown[0]["x"] < 0.1


def test_running_trials_are_avoided_and_candidates_are_chosen_once():
    pool = [{"x": x, "z": z} for x in (0.1, 0.3, 0.5, 0.7) for z in (0.2, 0.4, 0.6)]
    g = blackbox.train_meta_searcher(
        earlier(), space=PLANE, candidates=pool, objectives=["near", "far"], constraints={"left": 0.6}, num_steps=0
    )
    task = task_of(5)
    told = [near_and_far(Record("", c), task) for c in pool[:3]]
    several = g.suggest(pool[:3], told, num=3)
    assert len({tuple(c.values()) for c in several}) == 3 and not any(c in pool[:3] for c in several)
    whole = search(g.searcher(), task, KEY, num_trials=len(pool), batch_size=4)
    assert len({tuple(r.configuration.values()) for r in whole}) == len(pool)
    front = blackbox.best_records(whole, ["near", "far"], {"left": 0.6})
    points = np.array(
        [[y["near"], y["far"]] for y in (near_and_far(Record("", c), task) for c in pool if c["x"] <= 0.6)]
    )
    expected = points[nas.pareto_front(points)]
    np.testing.assert_allclose([[r.outcomes["near"], r.outcomes["far"]] for r in front if r.outcomes], expected)


def test_a_running_trial_is_not_suggested_again():
    g, task = trained("near", "far"), task_of(5)
    tried = [{"x": 0.3, "z": 0.2}, {"x": 0.6, "z": 0.7}, {"x": 0.5, "z": 0.5}, {"x": 0.9, "z": 0.1}]
    told = [near_and_far(Record("", c), task) for c in tried]
    (first,) = g.suggest(tried, told)
    (second,) = g.suggest(tried, told, pending=[first])
    (ended,) = g.suggest([*tried, first], [*told, near_and_far(Record("", first), task)])
    away = lambda c: math.hypot(c["x"] - first["x"], c["z"] - first["z"])
    assert away(second) > 0.05 and away(ended) > 0.02


def test_an_unnumbered_trial_counts_once_however_its_numbers_are_stored():
    """As Python's numbers, as from a file, or as NumPy's; a repeat has another outcome."""
    searcher = trained("near", "far", num_steps=0).searcher()
    y = {"near": 0.1, "far": 0.2, "left": 0.5}
    record = Record("", {"x": 0.5, "z": 0.5}, 0.1, outcomes=y)
    as_numpy = record._replace(outcomes={name: np.float64(value) for name, value in y.items()})
    repeat = record._replace(outcomes={"far": 0.3, "near": 0.1})
    state = searcher.tell(searcher.init(KEY, PLANE), [record, as_numpy, repeat])
    for one in (state, *state.others):
        assert len(one.tried) == 2


def test_a_running_trial_counts_with_its_expected_outcomes():
    """The outcomes that an optimizer of only this outcome predicts, given the ended trials."""
    tried = [{"x": 0.3, "z": 0.2}, {"x": 0.6, "z": 0.7}, {"x": 0.5, "z": 0.5}, {"x": 0.9, "z": 0.1}]
    told, running = [near_and_far(Record("", c), task_of(5)) for c in tried], {"x": 0.35, "z": 0.45}
    expected = {
        name: trained(name, num_steps=0).outcomes([running], tried=tried, outcomes=[y[name] for y in told]).mean.item()
        for name in ("near", "far")
    }
    g = trained("near", "far", num_steps=0)
    (suggested,) = g.suggest(tried, told, pending=[running])
    (as_ended,) = g.suggest([*tried, running], [*told, expected])
    assert suggested == pytest.approx(as_ended, abs=1e-3)
    (without,) = g.suggest(tried, told)
    assert math.hypot(without["x"] - running["x"], without["z"] - running["z"]) < 0.3
    assert suggested != pytest.approx(without, abs=0.03)


def test_a_loaded_optimizer_suggests_the_same(tmp_path):
    g = trained("near", "far", left=0.5)
    assert g.objectives == ("near", "far") and g.constraints == {"left": 0.5} and len(g.other_surrogates) == 2
    metaopt.save(tmp_path / "g", g)
    loaded = metaopt.load(tmp_path / "g")
    tried = [{"x": 0.3, "z": 0.2}, {"x": 0.6, "z": 0.7}]
    told = [near_and_far(Record("", c), task_of(5)) for c in tried]
    assert loaded.suggest(tried, told) == g.suggest(tried, told)
    assert loaded.objectives == g.objectives and loaded.constraints == g.constraints


def test_records_without_the_names_are_refused_and_one_outcome_is_the_default():
    searcher = trained("near", "far").searcher()
    with pytest.raises(ValueError, match="A complete trial of task 'new' lacks the outcomes 'near', 'far'"):
        search(searcher, task_of(5), KEY, num_trials=2, objective=lambda trial, task: 0.5)
    one = blackbox.train_meta_optimizer(earlier(), space=PLANE, num_steps=0)
    named = blackbox.train_meta_optimizer(earlier(), space=PLANE, num_steps=0, objectives=["near"])
    without = [r._replace(outcomes=None) for r in earlier()]
    plain = blackbox.train_meta_optimizer(without, space=PLANE, num_steps=0)
    assert one.objectives == () and named.objectives == ("near",)
    assert blackbox.train_meta_optimizer(without, space=PLANE, num_steps=0, constraints={}).constraints == {}
    assert one.predict() == named.predict() == plain.predict()


@pytest.mark.once
def test_a_study_of_several_objectives_and_constraints():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    g, task = trained("near", "far", left=0.5), task_of(3)

    def objective(trial):
        outcomes = near_and_far(Record("", {n: trial.suggest_float(n, 0.0, 1.0) for n in "xz"}), task)
        trial.set_user_attr("left", outcomes["left"])
        if trial.number == 2:
            raise optuna.TrialPruned
        return outcomes["near"], -outcomes["far"]

    def constraints(trial):
        return [trial.user_attrs["left"] - 0.5]

    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=blackbox.optuna_sampler(g, seed=0, constraints_func=constraints)
    )
    study.optimize(objective, n_trials=12)
    whole = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(whole) == 11 and all(
        list(trial.system_attrs["constraints"]) == [trial.user_attrs["left"] - 0.5] for trial in whole
    )
    records = [
        r._replace(outcomes={"near": r.outcomes["0"], "far": r.outcomes["1"]})
        for r in blackbox.from_optuna_study(study)
        if r.outcomes
    ]
    front = blackbox.best_records([r for r in records if r.configuration["x"] <= 0.5], ["near", "far"])
    assert sorted(t.number for t in study.best_trials) == sorted(r.trial for r in front)
    assert np.mean([trial.params["x"] <= 0.5 for trial in whole[3:]]) > 0.6


def test_tpe_learns_from_the_named_objective_below_the_full_budget():
    """Not from the first outcome. Optuna compares pruned trials by their last intermediate value."""
    optuna = pytest.importorskip("optuna")
    searcher = blackbox.tpe(objectives=["far"], constraints={"left": 0.5})
    told = [
        r._replace(fidelity=0.5, **changes)
        for r, changes in zip(earlier()[:3], ({"trial": 1000}, {"trial": 1001, "status": "PRUNED"}, {}), strict=True)
    ]
    (own,), state = searcher.ask(searcher.init(KEY, PLANE), 1)
    told[2] = own._replace(status="COMPLETE", outcome=told[2].outcome, outcomes=told[2].outcomes, fidelity=0.5)
    lost = own._replace(trial=1002, status="PRUNED", outcome=0.3)  # knows only its first outcome
    half = own._replace(trial=1003, status="PRUNED", outcome=0.3, outcomes={"near": 0.3, "far": 0.7, "left": math.nan})
    state = searcher.tell(state, [*told, lost, half])
    trials = sorted(state.study.trials, key=lambda trial: trial.number)
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.PRUNED}
    values = [list(trial.intermediate_values.values()) for trial in trials]
    far = lambda record: pytest.approx([record.outcomes["far"]])
    assert values == [far(told[2]), far(told[0]), far(told[1]), [0.7]]
    constraints = [trial.system_attrs["constraints"][0] for trial in trials]
    assert constraints == pytest.approx([r.outcomes["left"] - 0.5 for r in (told[2], *told[:2])] + [math.inf])


@pytest.mark.once
def test_tpe_of_several_objectives_and_constraints():
    """Optuna's own model; it has no earlier records, so it needs more trials."""
    pytest.importorskip("optuna")
    goals = {"objectives": ["near", "far"], "constraints": {"left": 0.5}}
    shares = []
    for seed in range(20, 23):
        searchers = blackbox.tpe(num_random=8, **goals), None
        found = [search(s, task_of(seed), jax.random.key(seed), num_trials=40) for s in searchers]
        shares.append([np.mean([r.configuration["x"] <= 0.5 for r in records[8:]]) for records in found])
        shares[-1] += [volume(records, {"left": 0.5}) for records in found]
    print(np.array(shares))
    by_tpe, at_random, volume_by_tpe, volume_at_random = np.mean(shares, axis=0)
    assert by_tpe > at_random + 0.15 and volume_by_tpe > volume_at_random
    searcher = blackbox.tpe(**goals)
    state = searcher.init(KEY, PLANE)
    state = searcher.tell(state, [r._replace(trial=r.trial + 1000) for r in earlier()[:14]])
    assert [len(trial.values) for trial in state.study.trials] == [2] * 14
    expected = [r.configuration["x"] - 0.5 for r in earlier()[:14]]
    np.testing.assert_allclose([trial.system_attrs["constraints"][0] for trial in state.study.trials], expected)

"""A trained searcher as a sampler of Optuna: the code of the study does not change."""

import jax
import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record
from metaopt.blackbox import _goals, _optuna_studies

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "x": spaces.interval(0.0, 1.0),
    "kind": spaces.choice(["a", "b"], default="b"),
    "only_a": spaces.active_if(spaces.integer(1, 3), "kind", ["a"]),
}
# A finite set keeps the compiled programs small.
POOL = [
    {"x": float(x), "kind": kind} | ({"only_a": n} if kind == "a" else {})
    for x in np.linspace(0, 1, 9)
    for kind, n in (("a", 1), ("a", 3), ("b", 0))
]


def loss(configuration, best=0.25):
    return (
        (configuration["x"] - best) ** 2 + 0.1 * (configuration["kind"] == "b") + 0.02 * configuration.get("only_a", 0)
    )


@pytest.fixture(scope="module")
def g():
    bests = 10 * (0.125, 0.25, 0.875)  # so many tasks that their best counts for more than the default
    records = [Record(f"t{t}", c, loss(c, best)) for t, best in enumerate(bests) for c in POOL]
    return blackbox.train_meta_searcher(records, space=SPACE, candidates=POOL, num_steps=0)


def objective(trial):
    """A usual objective: it suggests parameters one by one, and one of them is not in the space of g."""
    kind = trial.suggest_categorical("kind", ["a", "b"])
    configuration = {"x": trial.suggest_float("x", 0.0, 1.0), "kind": kind}
    if kind == "a":
        configuration["only_a"] = trial.suggest_int("only_a", 1, 3)
    return loss(configuration) + 0.0 * trial.suggest_float("other", 0.0, 1.0)


@pytest.mark.once
def test_it_samples_the_trials_of_the_searcher(g):
    study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=3))
    study.optimize(objective, n_trials=9)
    searcher, ended = g.searcher(first=()), []
    state = searcher.init(jax.random.key(3), None)
    for trial in study.trials:
        (record,), state = searcher.ask(state, 1)
        assert {n: v for n, v in trial.params.items() if n != "other"} == record.configuration
        ended.append(record._replace(status="COMPLETE", outcome=trial.value))
        state = searcher.tell(state, ended[-1:])
    assert study.trials[0].params.keys() >= g.predict().keys() and study.best_value == min(map(loss, POOL))
    assert ("only_a" in study.trials[0].params) == (study.trials[0].params["kind"] == "a")


def raises(error):
    raise error


@pytest.mark.once
@pytest.mark.parametrize(
    "ends",
    [
        lambda trial: raises(RuntimeError("no data yet")),
        lambda trial: raises(optuna.TrialPruned),
        lambda trial: trial.report(9.0, 0) or raises(optuna.TrialPruned),
        lambda trial: 9.0,
    ],
    ids=["failed", "pruned", "pruned with a value", "complete"],
)
def test_a_trial_that_ends_before_it_asks_is_not_used(ends):
    # The best of what is known is the default, which an empty configuration would be taken for.
    space = {"x": spaces.interval(0.0, 1.0)}
    pool = [{"x": float(x)} for x in np.linspace(0, 1, 9)]
    records = [Record(f"t{slope}", c, slope * abs(c["x"] - 0.5)) for slope in (1, 2) for c in pool]
    g = blackbox.train_meta_searcher(records, space=space, num_steps=0)

    objective = lambda trial: abs(trial.suggest_float("x", 0.0, 1.0) - 0.5) if trial.number else ends(trial)
    study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=3))
    study.optimize(objective, n_trials=2, catch=(RuntimeError,))
    assert study.trials[0].params == {} and study.trials[1].params["x"] == pytest.approx(g.predict()["x"], abs=0.05)


@pytest.mark.once
def test_a_trial_that_fails_midway_counts_with_its_whole_configuration(g):
    heard = []

    def overheard(*args, **kwargs):
        searcher = g.searcher(*args, **kwargs)
        return searcher._replace(tell=lambda state, records: heard.extend(records) or searcher.tell(state, records))

    def ends_midway(trial):
        trial.suggest_categorical("kind", ["a", "b"])
        raise optuna.TrialPruned if trial.number else RuntimeError

    study = optuna.create_study(sampler=blackbox.optuna_sampler(g._replace(searcher=overheard), seed=3))
    study.optimize(ends_midway, n_trials=2, catch=(RuntimeError,))
    study.ask().suggest_float("x", 0.0, 1.0)  # then it hears of what has ended
    first, second = (record.configuration for record in heard if record.status == "FAIL")
    assert first == g.predict() and first["x"] != 0.5 and second in POOL and first != second


@pytest.mark.once
def test_maximizing_is_minimizing_the_negative(g):
    one, other = (
        optuna.create_study(direction=d, sampler=blackbox.optuna_sampler(g, seed=0)) for d in ("minimize", "maximize")
    )
    one.optimize(objective, n_trials=5)
    other.optimize(lambda trial: -objective(trial), n_trials=5)
    assert [t.params["x"] for t in one.trials] == [t.params["x"] for t in other.trials]


@pytest.mark.once
def test_a_study_is_continued_from_its_storage_by_another_process_s_sampler(g, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    whole = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0))
    whole.optimize(objective, n_trials=7)
    kwargs = {"study_name": "s", "storage": storage, "load_if_exists": True}
    for num in (3, 4):
        part = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0), **kwargs)
        part.optimize(objective, n_trials=num)
    ours = lambda study: [{n: v for n, v in t.params.items() if n != "other"} for t in study.trials]
    assert ours(part) == ours(whole)


@pytest.mark.once
def test_running_trials_count_and_threads_do_not_repeat_one_another(g):
    sampler = blackbox.optuna_sampler(g, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=2)
    trials = [study.ask() for _ in range(4)]
    assert [trial.relative_params for trial in trials] == 4 * [{}]  # each is drawn, and none has asked for a parameter
    assert len({tuple(spaces.suggest(trial, SPACE).items()) for trial in trials}) == 4
    for trial in trials:
        study.tell(trial, objective(trial))
    study.optimize(objective, n_trials=8, n_jobs=3)
    tried = [tuple(sorted((n, v) for n, v in t.params.items() if n != "other")) for t in study.trials]
    assert len(set(tried)) == len(tried) == 14


@pytest.mark.once
def test_a_trial_that_ends_while_another_is_drawn_is_not_repeated(g):
    """It had been neither among those that ended, read first, nor among those that run, read next."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0), storage=storage)
    running, get_trials, ended = study.ask(), storage.get_all_trials, []
    first = spaces.suggest(running, SPACE)

    def ends_after_a_read(*args, states=None, **kwargs):
        trials = get_trials(*args, states=states, **kwargs)
        if not ended and states != (optuna.trial.TrialState.WAITING,):  # which Optuna reads itself, before it samples
            ended.append(study.tell(running, loss(first)))
        return trials

    storage.get_all_trials = ends_after_a_read  # simulates another process that ends its trial
    assert spaces.suggest(study.ask(), SPACE) != first and ended


@pytest.mark.once
def test_brackets_of_a_pruner_share_their_trials(g):
    """Optuna makes a new study of each bracket for every trial."""
    ended, real = [], g.searcher

    def listening(*args, **kwargs):
        searcher = real(*args, **kwargs)
        tell = lambda state, records: (
            ended.extend(r for r in records if r.status != "RUNNING") or searcher.tell(state, records)
        )
        return searcher._replace(tell=tell)

    pruner = optuna.pruners.HyperbandPruner(1, 9, 3)
    sampler = blackbox.optuna_sampler(g._replace(searcher=listening), seed=0)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=4)
    running = [study.ask() for _ in range(4)]
    assert [trial.relative_params for trial in running] == 4 * [{}]
    drawn = [tuple(spaces.suggest(trial, SPACE).items()) for trial in running]
    before = [tuple((n, t.params[n]) for n in ("kind", "only_a", "x") if n in t.params) for t in study.trials[:4]]
    assert len(set(drawn + [tuple(sorted(c)) for c in before])) == len({*map(tuple, map(sorted, drawn)), *before}) == 8
    assert sorted(record.trial for record in ended) == [0, 1, 2, 3]


@pytest.mark.once
def test_an_objective_may_ask_for_other_labels_ranges_and_scales(g):
    best = g.predict()  # x is 0.25, kind is "a", only_a is 1

    def first(fn):
        study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0))
        study.optimize(lambda trial: fn(trial) and 0.0, n_trials=1)
        return study.trials[0].params

    assert first(lambda t: t.suggest_categorical("kind", ["c", "b", "a"])) == {"kind": best["kind"]}
    assert first(lambda t: t.suggest_float("x", 1e-3, 0.5, log=True)) == {"x": best["x"]}
    assert first(lambda t: t.suggest_float("x", 0.0, 2.0, step=0.125)) == {"x": best["x"]}
    assert first(lambda t: t.suggest_float("only_a", 0.5, 9.0)) == {"only_a": float(best["only_a"])}
    assert first(lambda t: t.suggest_categorical("only_a", [0, best["only_a"]])) == {"only_a": best["only_a"]}
    # The nearest step, also below a bound that is not on a step.
    nearest = min((0.0, 0.2, 0.4, 0.6), key=lambda x: abs(x - best["x"]))
    assert first(lambda t: t.suggest_float("x", 0.0, 2.0, step=0.2)) == {"x": pytest.approx(nearest)}
    below = best["x"] - 0.01
    with pytest.warns(UserWarning, match="not divisible"):
        assert first(lambda t: t.suggest_float("x", 0.0, best["x"] + 0.01, step=below)) == {"x": pytest.approx(below)}
    # The value of g is not one of these.
    assert first(lambda t: t.suggest_categorical("kind", ["c", "d"]))["kind"] in "cd"
    assert first(lambda t: t.suggest_float("x", 0.5, 1.0))["x"] >= 0.5
    assert first(lambda t: t.suggest_int("x", 0, 5))["x"] in range(6)
    assert first(lambda t: t.suggest_float("kind", 0.0, 1.0))["kind"] <= 1.0


@pytest.mark.once
def test_a_bound_is_proposed_exactly_also_in_float32():
    space = {"rate": spaces.interval(1e-4, 0.1, log=True)}
    records = [Record(f"t{t}", {"rate": r}, abs(np.log10(r) + 1 + t / 9)) for t in (0, 1) for r in (1e-4, 1e-2, 0.1)]
    with jax.enable_x64(False):
        g = blackbox.train_meta_searcher(records, space=space, num_steps=0)
        assert g.predict() == {"rate": 0.1} and g.candidates == [{"rate": rate} for rate in (1e-4, 1e-2, 0.1)]
        study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0))
        study.optimize(lambda trial: trial.suggest_float("rate", 1e-4, 0.1, log=True), n_trials=1)
        (record,), _ = (searcher := g.searcher(first=[{"rate": 0.012345678901}])).ask(
            searcher.init(jax.random.key(0), space), 1
        )
    assert study.trials[0].params == {"rate": 0.1} and record.configuration == {"rate": 0.012345678901}


@pytest.mark.once
def test_pruned_failed_enqueued_and_foreign_trials(g):
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=1), pruner=pruner)
    study.enqueue_trial({"x": 0.9, "kind": "b"})

    def epochs(trial):
        value = objective(trial)
        if trial.number == 3:
            raise ValueError
        for step in range(3):
            trial.report(value + 1 / (1 + step), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study.optimize(epochs, n_trials=9, catch=(ValueError,))
    states = [trial.state.name for trial in study.trials]
    assert study.trials[0].params["x"] == 0.9 and states[3] == "FAIL" and "PRUNED" in states
    assert len({tuple(sorted((n, v) for n, v in t.params.items() if n != "other")) for t in study.trials}) == 9
    # Ranges that are not the space's: drawn by themselves, and learned from all the same.
    study.optimize(lambda trial: trial.suggest_float("x", 2.0, 3.0), n_trials=2)
    assert study.trials[-1].params["x"] >= 2.0


def test_an_infinite_value_is_a_failure(g):
    """Optuna takes it as a value."""

    def drawn_after(bad):
        def bad_at_first(trial):
            value = objective(trial)
            return bad() if trial.number < 2 else value

        study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=1))
        study.optimize(bad_at_first, n_trials=5, catch=(ZeroDivisionError,))
        return [trial.params for trial in study.trials]

    assert drawn_after(lambda: np.inf) == drawn_after(lambda: 1 / 0) != drawn_after(lambda: 1.0)


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_parameters_that_an_objective_does_not_ask_for_are_drawn_once(g, value):
    """Three configurations have the same x, and each of them is drawn at most once."""
    study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=1))
    study.optimize(lambda trial: value + abs(trial.suggest_float("x", 0.0, 1.0) - 1), n_trials=12)
    xs = [trial.params["x"] for trial in study.trials]
    assert max(map(xs.count, xs)) <= 3


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.once
def test_late_steps_have_different_fidelities_below_one(g, number):
    steps = (90_000, 0, 5_000, 5_001, 2_000_002, 2_000_001, 2_000_000, 2**31 - 1)  # as a storage may have them
    values = {"x": 0.5, "kind": "a"}
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        params=values,
        distributions={name: d for name, d in spaces.to_optuna(g.space).items() if name in values},
        intermediate_values={step: float(step) for step in steps},
    )
    trial.number = number
    searcher = g.searcher()
    records = _optuna_studies._as_told(trial, [1.0], {}, _goals.Goals((), {}))
    (tried,) = searcher.tell(searcher.init(jax.random.key(0), None), records).tried.values()
    # To six digits: 2,000,000 to 2,000,002 are one step, with the last value, of the first trial, too.
    assert list(tried.outcomes.values()) == [0, 5_000, 5_001, 90_000, 2_000_002, 2**31 - 1]
    assert tried.last == 2**31 - 1 and tried.reached < 1

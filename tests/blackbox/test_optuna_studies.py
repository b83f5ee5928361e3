"""Records as Optuna's studies, and studies as records."""

import math

import numpy as np
import pytest

from metaopt import blackbox, spaces
from metaopt.base import Record

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "rate": spaces.interval(1e-3, 1.0, log=True),
    "kind": spaces.choice(["a", "b"]),
    "depth": spaces.active_if(spaces.integer(1, 8), "kind", ["b"]),
    "three": spaces.fixed(3),
}
RECORDS = [
    Record("t", {"rate": 0.5, "kind": "b", "depth": 2, "three": 3}, 0.25, 1.0, 1.5, 11, trial=0),
    Record("t", {"rate": 0.1, "kind": "a", "three": 3}, math.nan, 1.0, 2.0, 12, "FAIL", 1, "time limit of 1 s"),
    Record("t", {"rate": 0.2, "kind": "a", "three": 3}, 0.75, 0.25, 0.5, 13, trial=2),
    Record("t", {"rate": 0.2, "kind": "a", "three": 3}, 0.5, 0.5, 1.0, 13, trial=2),
]


def test_records_become_a_study_and_come_back():
    study = blackbox.to_optuna_study(RECORDS, SPACE, study_name="t")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED"]
    assert study.best_value == 0.25 and study.best_params == {"rate": 0.5, "kind": "b", "depth": 2}
    assert study.trials[2].intermediate_values == {250: 0.75, 500: 0.5}
    assert study.trials[1].user_attrs["metaopt:reason"] == "time limit of 1 s"
    loaded = blackbox.from_optuna_study(study)
    without = lambda record: {name: value for name, value in record.configuration.items() if name != "three"}
    expected = [RECORDS[0], RECORDS[1], RECORDS[3]._replace(status="PRUNED", fidelity=0.5)]
    assert list(map(repr, loaded)) == [repr(record._replace(configuration=without(record))) for record in expected]


def test_numbers_and_tasks_come_back_and_a_person_s_attributes_are_not_metaopt_s():
    records = [RECORDS[0]._replace(trial=7, task="mine"), RECORDS[1]._replace(trial=9, task="mine")]
    study = blackbox.to_optuna_study(records, SPACE)
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"trial": "b", "cost": "9 EUR", "seed": "x"}))
    loaded = blackbox.from_optuna_study(study)
    assert [(r.task, r.trial, r.seed) for r in loaded[:2]] == [("mine", 7, 11), ("mine", 9, 12)]
    assert (loaded[2].trial, loaded[2].seed) == (2, 0) and isinstance(loaded[2].cost, float)
    assert {r.task for r in blackbox.from_optuna_study(study, task="other")} == {"other"}


def test_a_trial_that_ended_without_a_number_has_failed(tmp_path):
    nan, partial = RECORDS[0]._replace(outcome=math.nan), RECORDS[2]._replace(outcome=math.nan)
    study = blackbox.to_optuna_study([nan, partial, RECORDS[0]._replace(trial=3, outcome=math.inf)], SPACE)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE"]
    (loaded, *_) = blackbox.from_optuna_study(study)
    assert loaded.status == "FAIL" and math.isnan(loaded.outcome) and loaded.configuration["depth"] == 2


def test_numbers_of_numpy_are_python_s(tmp_path):
    pytest.importorskip("sqlalchemy")
    numbers = {"rate": np.float32(0.5), "kind": np.str_("b"), "depth": np.int64(2), "three": np.int64(3)}
    record = RECORDS[0]._replace(configuration=numbers, outcome=np.float32(0.25), seed=np.int64(11))
    study = blackbox.to_optuna_study([record], SPACE, storage=f"sqlite:///{tmp_path}/study.db")
    assert study.best_params == {"rate": 0.5, "kind": "b", "depth": 2} and study.best_value == 0.25
    assert study.trials[0].user_attrs["metaopt:seed"] == 11


def test_a_study_that_optuna_made_is_read():
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        configuration = spaces.suggest(trial, SPACE)
        assert ("depth" in configuration) == (configuration["kind"] == "b") and configuration["three"] == 3
        return configuration["rate"]

    study.optimize(objective, n_trials=8)
    records = blackbox.from_optuna_study(study, task="mine")
    assert [record.outcome for record in records] == [-trial.value for trial in study.trials]
    assert all(record.task == "mine" and record.cost >= 0 and record.status == "COMPLETE" for record in records)
    for record in records:
        spaces.from_configuration(SPACE, record.configuration)


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_pruned_trial_has_the_fidelity_of_its_last_step(first_step):
    study = optuna.create_study()
    for num_reports in (1, 3, 4):
        trial = study.ask()
        for step in range(num_reports):
            trial.report(10.0 - step, step + first_step)
        if num_reports < 4:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, 5.0)
    records = blackbox.from_optuna_study(study)
    assert [(record.status, record.fidelity, record.outcome) for record in records] == [
        ("PRUNED", 0.25, 10.0),
        ("PRUNED", 0.75, 8.0),
        ("COMPLETE", 1.0, 5.0),
    ]


def test_numbers_of_float32_next_to_a_bound_are_within_it_and_others_are_refused():
    record = RECORDS[0]._replace(configuration={"rate": 1.0000001, "kind": "a"})
    assert blackbox.to_optuna_study([record], SPACE).best_params == {"rate": 1.0, "kind": "a"}


def test_trials_of_one_number_and_another_seed_or_configuration_are_others():
    """As `read_records` returns them of two studies, each of which counts from 0."""
    space = {"x": spaces.interval(0.0, 1.0)}
    one = Record("t", {"x": 0.1}, 1.0, seed=1, trial=0)
    records = [one, one._replace(configuration={"x": 0.9}, outcome=0.2, seed=2), one._replace(seed=3, outcome=0.7)]
    records += [one._replace(configuration={"x": 0.3}), one._replace(outcome=0.8), one._replace(fidelity=0.5)]
    study = blackbox.to_optuna_study(records, space)
    trials = [(trial.params["x"], trial.value, trial.user_attrs["metaopt:seed"]) for trial in study.trials]
    assert trials == [(0.1, 1.0, 1), (0.9, 0.2, 2), (0.1, 0.7, 3), (0.3, 1.0, 1), (0.1, 0.8, 1)]
    assert [trial.intermediate_values for trial in study.trials[:2]] == [{1000: 1.0, 500: 1.0}, {1000: 0.2}]
    assert blackbox.from_optuna_study(study) == records[:5]


def test_two_studies_of_one_task_are_kept_in_one_file(tmp_path):
    """Both are numbered from 0; one configuration is the first one of both."""
    records = []
    for seed in (0, 1):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        study.enqueue_trial({"x": 0.5})
        study.optimize(lambda trial, seed=seed: trial.suggest_float("x", 0, 1) + seed, n_trials=10)
        records += blackbox.from_optuna_study(study, task="t")
    for part in (records[:10], records[10:]):
        blackbox.append_records(tmp_path / "records.db", part)
    assert blackbox.read_records(tmp_path / "records.db") == records and len(records) == 20
    assert len(blackbox.to_optuna_study(records, {"x": spaces.interval(0.0, 1.0)}).trials) == 20


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_existing_study_gets_only_the_trials_that_it_does_not_have(kind, tmp_path):
    if kind == "file":
        pytest.importorskip("sqlalchemy")
    storage = optuna.storages.InMemoryStorage() if kind == "memory" else f"sqlite:///{tmp_path}/study.db"
    add = lambda records: (
        blackbox.to_optuna_study(records, SPACE, storage=storage, study_name="t", load_if_exists=True).trials
    )
    twice = [*RECORDS, RECORDS[0]]  # the last one is a trial of another study
    assert len(add(twice)) == len(add(twice)) == 4
    more = RECORDS[0]._replace(trial=5, outcome=0.1)
    assert [trial.value for trial in add([*twice, more])[3:]] == [0.25, 0.1]
    assert len(add([more._replace(seed=12), RECORDS[3]._replace(outcome=0.4)])) == 7


def test_records_of_a_study_are_not_added_to_it_again():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="t", sampler=optuna.samplers.RandomSampler(0))

    def objective(trial):
        value = trial.suggest_float("x", 0, 1)
        trial.report(value, 1)
        if value < 0.5:
            raise optuna.TrialPruned
        return value if value < 0.7 else math.nan

    study.optimize(objective, n_trials=8)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED", "FAIL"}
    records = blackbox.from_optuna_study(study)
    records.append(Record("t", {"x": 0.1}, 0.1, trial=8))
    options = {"storage": storage, "study_name": "t", "load_if_exists": True}
    assert len(blackbox.to_optuna_study(records, {"x": spaces.interval(0.0, 1.0)}, **options).trials) == 9


def test_a_pruned_trial_with_constraints_is_not_added_again():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="t", directions=["minimize"] * 2)
    for _ in range(3):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
        blackbox.should_prune(trial, [0.5, 0.25], 1, constraints=[0.125])
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    records = blackbox.from_optuna_study(study)
    options = {"storage": storage, "study_name": "t", "load_if_exists": True}
    assert len(records) == 3
    assert len(blackbox.to_optuna_study(records, {"x": spaces.interval(0.0, 1.0)}, **options).trials) == 3


def test_a_study_that_maximizes_gets_no_outcomes_of_the_wrong_sign():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="t", direction="maximize")
    with pytest.raises(ValueError, match="study 't' maximizes an objective, but .* always minimized"):
        blackbox.to_optuna_study(RECORDS, SPACE, storage=storage, study_name="t", load_if_exists=True)
    assert study.trials == []


def test_steps_are_as_fine_as_a_trial_s_fidelities():
    space = {"x": spaces.interval(0.0, 1.0)}
    epochs = (1, 2, 3, 4, 5, 6, 4_000)
    records = [Record("t", {"x": 0.5}, 1 / e, e / 4_000) for e in epochs]
    (trial,) = blackbox.to_optuna_study(records, space).trials
    assert list(trial.intermediate_values.values()) == [1 / e for e in epochs]
    assert list(trial.intermediate_values) == [2, 5, 8, 10, 12, 15, 10_000] and trial.value == 1 / 4_000
    # No report is at step 0, which Optuna takes for a first report. Fidelities that differ by rounding are one.
    (trial,) = blackbox.to_optuna_study([records[0]._replace(fidelity=1e-4)], space).trials
    assert list(trial.intermediate_values) == [1]
    thirds = [records[0]._replace(fidelity=f) for f in (0.1 + 0.2, 0.3)]
    assert [list(t.intermediate_values) for t in blackbox.to_optuna_study(thirds, space).trials] == [[300], [300]]
    # A third in float32 is the same fidelity as a third: its record is another trial, and the steps stay the same.
    several = [records[0]._replace(fidelity=f, outcome=f) for f in (1 / 3, float(np.float32(1 / 3)), 2 / 3, 1.0)]
    several += [records[0]._replace(fidelity=0.99999997, outcome=2.0)]
    trials = blackbox.to_optuna_study(several, space).trials
    assert [list(t.intermediate_values) for t in trials] == [[333, 667, 1000], [333, 1000]]
    assert [t.value for t in trials] == [1.0, 2.0]

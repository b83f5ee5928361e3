"""What `blackbox` rejects: options of collections and searchers, records, new tasks, tables, studies, models."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from metaopt import blackbox, spaces, tasks
from metaopt.base import Record, Task
from metaopt.blackbox import _encoding

KEY = jax.random.key(0)
LINE = {"x": spaces.interval(0.0, 1.0)}
SPACE = LINE | {"kind": spaces.choice(["a", "b"])}
POOL = [{"x": x, "kind": kind} for x in (0.1, 0.4, 0.9) for kind in "ab"]
RECORDS = [Record(f"t{t}", c, (c["x"] - t / 2) ** 2 + (c["kind"] == "b")) for t in range(2) for c in POOL]
HALF = [r._replace(status="PRUNED", fidelity=0.5) for r in RECORDS]
ONE = Record("one trial", POOL[0], 0.0)
NAMED: Any = {"nr_inst": 100.0}
TABLE = tasks.Table("iris", "iris", np.ones((12, 2)) * np.arange(12)[:, None], np.arange(12) % 2, np.zeros(2, bool))
RUN = {"run_id": 7, "data_name": "iris", "value": 37.2, "parameters": {}}
RMSE = RUN | {"function": "root_mean_squared_error"}
CORNER = Record("3", {"x0": 0.5, "x1": 0.5}, 0.25)
IMAGES = np.arange(12 * 16.0).reshape(12, 4, 4) % 7, np.arange(12) % 3
ROWS = {"x": TABLE.x, "y": TABLE.y, "class_mask": np.ones(2)}
CURVES = [
    Record(str(best), c, (c["x"] - best) ** 2 + 1 - f, f)
    for best in (0.0, 0.5, 1.0)
    for c in POOL
    for f in (0.25, 0.5, 1.0)
]
OPTIONAL = {"kind": SPACE["kind"], "x": spaces.active_if(SPACE["x"], "kind", ["b"])}
NAMED_OUTCOMES = [r._replace(outcomes={"a": r.outcome, "b": 1 - r.outcome, "c": r.configuration["x"]}) for r in RECORDS]
train = functools.partial(blackbox.train_meta_optimizer, space=SPACE, num_steps=0)
train_searcher = functools.partial(blackbox.train_meta_searcher, space=SPACE, num_steps=0)
evolution = blackbox.regularized_evolution


@functools.cache
def trained(with_features=False) -> Any:
    return train(RECORDS, features={"t0": [1.0], "t1": [2.0]} if with_features else None)


def train_on_datasets(t0: Any = TABLE, t1: Any = TABLE, **options):
    return train(RECORDS, datasets={"t0": t0} if t1 is None else {"t0": t0, "t1": t1}, **options)


@functools.cache
def curve_searcher() -> Any:
    return blackbox.train_curve_searcher(CURVES, space=SPACE, num_steps=0)


def tell_another_fidelity(searcher, fidelity):
    """A trial that the searcher asked for."""
    (trial,), state = searcher.ask(searcher.init(KEY, SPACE), 1)
    searcher.tell(state, [trial._replace(status="COMPLETE", outcome=0.5, fidelity=fidelity)])


def ask_for_budgets_twice():
    pytest.importorskip("optuna")
    searcher = blackbox.asha(blackbox.bohb(num_rungs=2))
    searcher.ask(searcher.init(KEY, SPACE), 1)


def encode(space, configuration):
    return _encoding.encoder(space)(configuration, True)


def encode_for_sklearn(name, configuration):
    pytest.importorskip("sklearn")
    return encode(blackbox.sklearn_model(name).space, configuration)


def changed(**fields):
    """Records of which the second one has other fields."""
    return [RECORDS[0], RECORDS[1]._replace(**fields), *RECORDS[2:]]


def collect(objective: Any = lambda trial, task: 0.0, on: Any = None, **options):
    defaults = {"num_trials": 6, "key": KEY, "isolated": False, "progress": False}
    return blackbox.collect(objective, SPACE, {"t": 0.0} if on is None else on, **defaults | options)


def frame(**columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def read_frame(**columns):
    return blackbox.records_from_frame(frame(**columns))


def train_on_frame(**changes):
    pytest.importorskip("pandas")
    return train_searcher(blackbox.records_to_frame(RECORDS).assign(**changes))


def curves(records):
    return blackbox.train_curve_searcher(records, space=SPACE)


def to_hpob(*records, **configuration):
    records = records or (CORNER, CORNER._replace(configuration=configuration))
    blackbox.to_hpob("never.json", "a", records)


def openml(*rows, **options):
    return blackbox.from_openml_evaluations(rows, **options)


def to_optuna(*records: Any, space=SPACE, **options):
    pytest.importorskip("optuna")
    return blackbox.to_optuna_study(iter(records), space, **options)


@functools.cache
def trained_on_two(**constraints) -> Any:
    return train(NAMED_OUTCOMES, objectives=["a", "b"], constraints=constraints)


def sample_two_objectives(g, num=2, constraints=None, **options):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["minimize"] * num, sampler=blackbox.optuna_sampler(g, **options))
    attributes = {"system_attrs": {} if constraints is None else {"constraints": constraints}}
    where = {"params": {"x": 0.5}, "distributions": {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}}
    study.add_trial(optuna.trial.create_trial(values=[0.0] * num, **where, **attributes))
    study.optimize(lambda trial: (trial.suggest_float("x", 0.0, 1.0),) * num, n_trials=1)


def prune(values, step=1, **options):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["minimize", "minimize"])
    return blackbox.should_prune(study.ask(), values, step, **options)


def sampler(**options):
    pytest.importorskip("optuna")
    return blackbox.optuna_sampler(trained(), **options)


def tpe_of_a_simplex():
    pytest.importorskip("optuna")
    blackbox.tpe().init(KEY, {"mix": spaces.simplex(2)})


def sklearn_objective(name):
    module = pytest.importorskip("sklearn.preprocessing")
    return blackbox.sklearn_objective(getattr(module, name)())


def sklearn_run(name, **configuration):
    pytest.importorskip("sklearn")
    trial = Record("t", configuration, seed=5, status="RUNNING")
    return blackbox.sklearn_objective(blackbox.sklearn_model(name).estimator)(trial, (TABLE.x, None))


def at_fidelities(*fidelities):
    return [Record("t", {"x": 0.5}, f, f) for f in fidelities]


RECORD = r"`records\[1\]`"
NEW_TASK = "`new_task` must be a `base.Task` .*, or None; got "
PATH = r"`scaling.transform\(tasks.metafeatures\(table\), clip=3.0\)`, .* `tasks.to_task\(tasks.prepare\(table\), "
REFUSALS = [
    # Collections.
    (lambda: collect(num_trials=math.inf), "`num_trials` must be finite; got inf"),
    (lambda: collect(num_trials=math.nan), "`num_trials` must be finite; got nan"),
    (lambda: collect(time_limit=1), "A limit needs `isolated=True`"),
    (lambda: collect(on=[TABLE, TABLE]), "must differ; 'iris' occurs more than once"),
    (lambda: collect(searcher=blackbox.random_search(first=[{"y": 1}])), "The space has no `y`"),
    # Searchers.
    (lambda: blackbox.bohb(reduction_factor=1), "`reduction_factor` must be at least 2; got 1"),
    (lambda: blackbox.asha(reduction_factor=1), "`reduction_factor` must be at least 2, .* got 1, 1 and 4"),
    (lambda: blackbox.asha(num_brackets=5), "`num_brackets` in 1..`num_rungs`; got 3, 5 and 4"),
    (ask_for_budgets_twice, "`searcher` proposed a trial at fidelity 0.333333"),
    (
        lambda: tell_another_fidelity(curve_searcher().searcher(), 0.2501),
        r"fidelity must be one of .*\[0.25, 0.5, 1.0\], .*; got 0.2501 for trial 0",
    ),
    (lambda: curve_searcher().predict([Record("", {"x": 0.7}, 1.0, 0.25)]), "is not one of the candidates"),
    (lambda: curve_searcher().predict([Record("", POOL[0], 1.0, 0.3)]), "fidelity must be one of"),
    (lambda: curve_searcher().predict((), (0.0, 0.5)), "`levels` must lie between 0 and 1"),
    (lambda: evolution().init(KEY, LINE), "dict of `spaces.integer`"),
    (lambda: evolution().init(KEY, [spaces.integer(0, 1)]), "dict of `spaces.integer`"),
    (
        lambda: evolution().init(KEY, {"a": spaces.integer(0, 3, shape=(2,))}),
        r"without shape; got `a`, a `spaces.integer` of shape \(2,\). Write one leaf for each entry",
    ),
    (
        lambda: evolution().init(KEY, {"a": spaces.integer(0, 3), "rate": spaces.real(0.0, scale=1.0)}),
        "without shape; got `rate`, a `spaces.real`. Use `tpe` for other leaves",
    ),
    (tpe_of_a_simplex, "belongs to a simplex, which cannot be converted"),
    (
        lambda: trained().searcher().init(KEY, SPACE | {"x": spaces.interval(0.0, 2.0)}),
        "not the space of this searcher .leaves, bounds or labels differ",
    ),
    (lambda: trained().searcher(first=[{"x": 2, "kind": "a"}]), "`x` must be between 0.0 and 1.0; got 2"),
    (lambda: trained().searcher(acquisition="best"), "`acquisition` must be one of"),
    (lambda: trained().searcher(acquisition="ei_per_cost"), "'ei_per_cost' needs `train_meta_optimizer"),
    (lambda: sampler(acquisition="best"), "`acquisition` must be one of"),
    # Earlier records.
    (lambda: train(RECORDS, features={"t0": [1.0], "t1": [1.0, 2.0]}), "must have the same shape"),  # by NumPy
    *(
        (lambda n=n: train(RECORDS, **{n: {0: [1.0]}}), f"`{n}` has none of the records' tasks, 't0', 't1'; .* are 0")
        for n in ("features", "families")
    ),
    (lambda: train([r._replace(status="FAIL") for r in RECORDS]), "it has none"),
    (lambda: train(HALF), r"it has none \(12 PRUNED; the largest fidelity with an outcome is 0.5\)"),
    (lambda: train([ONE]), "a task with trials of different outcomes. Every task has only one trial, or the same out"),
    (lambda: train([ONE, ONE]), "a task with trials of different outcomes"),
    (lambda: train(RECORDS, candidates=[]), "`candidates` is empty. Pass None to search"),
    (lambda: train(RECORDS, transformer_share=2), r"`transformer_share` must lie in \[0, 1\]; got 2"),
    (lambda: train(RECORDS, deep_share=2), r"`deep_share` must lie in \[0, 1\]; got 2"),
    (lambda: train(changed(status="TIMEOUT")), RECORD + "'s status must be one of WAITING, .*; got 'TIMEOUT'"),
    (lambda: train(changed(fidelity=27)), RECORD + r"'s fidelity must lie in \(0, 1\]; got 27. .* not a number of"),
    (lambda: train(changed(outcome="0.5")), RECORD + "'s outcome must be a number, or NaN if .*; got '0.5'"),
    (lambda: train(changed(configuration=[0.5, "a"])), "configuration must be a dict from parameter names to values"),
    (lambda: train(changed(task=3)), "task must be a string"),
    (lambda: train_searcher(RECORDS, costs=True), "`costs=True` needs records with a `cost`"),
    (
        lambda: train_searcher([r._asdict() for r in RECORDS]),
        r"`records\[0\]` must be a `Record`; got dict. Use `Record",
    ),
    (lambda: train_searcher(RECORDS[0]), r"`records\[0\]` must be a `Record`; got str"),
    (lambda: train_searcher([Record("t", {"layers": [1, 2]}, 1.0)], space=None), "`layers` has the value"),
    (
        lambda: curves([ONE, ONE._replace(task="b"), ONE._replace(task="c", status="FAIL")]),
        "`records` must .* for at least three tasks, .*; got 2",
    ),
    (
        lambda: curves([ONE._replace(task=t, fidelity=f, outcome=f) for t in "abc" for f in (0.25, 0.5)]),
        "at fidelity 1, the full budget, .*; the largest fidelity is 0.5",
    ),
    (
        lambda: curves([r._replace(task=t) for t in "abc" for r in (ONE._replace(fidelity=0.5), *RECORDS[1:3])]),
        "Each configuration must have a finite outcome at each fidelity",
    ),
    (
        lambda: train_searcher([r._replace(configuration={"kind": "c", "x": 0.5}) for r in RECORDS]),
        "No record can be a candidate: .* The first record has {'kind': 'c'}",
    ),
    # Data of tasks.
    (lambda: train_on_datasets(t1=None), "`datasets` lacks 1 of the records' tasks, such as 't1'"),
    (lambda: train_on_datasets(t1=ROWS), r"all be dicts of rows; got \['dict of rows', 'table'\]"),
    (lambda: train_on_datasets(t1=IMAGES), r"all be images, .*; got \['images', 'table'\]"),
    (lambda: train_on_datasets(t1=(np.zeros(3), np.zeros(3))), "x of two or more axes.*'t1' has a tuple"),
    (lambda: train_on_datasets(t1=(TABLE.x, np.full(12, np.nan))), "y must be finite; 12 of 12"),
    (lambda: train_on_datasets(t1=(TABLE.x, TABLE.y[1:])), "meta-features need x .* y .rows."),
    (lambda: train_on_datasets(features={"t0": [0.0], "t1": [1.0]}), "Give either `features`"),
    (lambda: train_on_datasets().predict(IMAGES), "but training had a table"),
    (lambda: train_on_datasets(IMAGES, IMAGES).predict((TABLE.x, TABLE.y)), "but training had images"),
    (lambda: trained().predict((TABLE.x, TABLE.y)), "but training had no tables or images"),
    # Data frames.
    (lambda: train_on_frame(status="DONE"), r"`records\[0\]`'s status must be one of"),
    (
        lambda: train_on_frame(configuration=1.5),
        'column "configuration" must hold dicts, or JSON of dicts; got 1.5',
    ),
    *(
        (
            lambda text=text: read_frame(task=["a", "b"], configuration=['{"x": 1}', text]),
            '"configuration" must hold dicts, or JSON of dicts; got .* in row 1',
        )
        for text in ('{"x": ', "[1]", None)
    ),
    (
        lambda: trained().predict(pd.DataFrame({"size": [1.0], "color": ["red"]})),
        NEW_TASK + "DataFrame. If g was trained with `datasets` of Tables, make a `tasks.Table` of this frame, too",
    ),
    (
        lambda: read_frame(task=["a"], configuration=["{}"], reason=[12]),
        "column 'reason' must contain strings; got 12 in row 0",
    ),
    # New tasks.
    *(
        (lambda task=task: trained().predict(task), NEW_TASK + got)
        for task, got in (
            (TABLE, "Table"),
            ("iris", "str"),
            (np.ones((2, 2)), r"shape \(2, 2\)"),
            (pd.DataFrame({"size": [1.0, 2.0]}), r"shape \(2, 1\).* pass labels too"),
            (1.0, "float"),
        )
    ),
    (lambda: trained().suggest([], [], "iris"), NEW_TASK + "str"),
    (lambda: trained().searcher("iris"), NEW_TASK + "str"),
    (lambda: trained(True).predict(TABLE), f"got Table. A table's features are {PATH}"),
    (lambda: trained(True).predict(tasks.prepare(TABLE)), f"got PreparedTable. A table's features are {PATH}"),
    (lambda: trained(True).predict(np.zeros(3)), r"A new task must have features of shape \[1\]; got shape \(3,\)"),
    (lambda: trained().predict(Task(None, None, NAMED)), "those features as an array of numbers"),
    (
        lambda: trained().predict(np.zeros((4, 3))),
        r"got shape \(4, 3\)\. If g was trained with `datasets` .* `g\.predict\(x, y\)`",
    ),
    *(
        (lambda wrong=wrong: trained().outcomes([wrong]), message)
        for wrong, message in (({"y": 0.9}, "no `y`"), ({"kind": "c"}, "`kind` must be one of"), ({"x": 9}, "between"))
    ),
    (lambda: trained().outcomes(POOL, tried=[{"y": 0.9}], outcomes=[0.1]), "no `y`"),
    (lambda: trained().suggest([{"y": 0.9}], [0.1]), "no `y`"),
    (lambda: trained().suggest([], [], pending=[{"y": 0.9}]), "no `y`"),
    (lambda: encode(OPTIONAL, {"kind": "b", "x": math.nan}), "`x` is active, and must have a value; got nan"),
    *(
        (lambda name=name, wrong=wrong: encode_for_sklearn(name, wrong), f"`{[*wrong][0]}` must be one of")
        for name, wrong in (
            ("random_forest_classifier", {"max_features": 0.3}),
            ("random_forest_classifier", {"criterion": None}),
            ("svm_classifier", {"kernel": []}),
        )
    ),
    (lambda: trained().outcomes(POOL, levels=[1.0]), r"`levels` must lie in \(0, 1\)"),
    (lambda: trained().outcomes(POOL, outcomes=[1.0]), r"one number for each configuration, \[0\]; got shape \(1,\)"),
    (
        lambda: trained().outcomes(POOL, tried=POOL[:2], outcomes=np.zeros((2, 2))),
        r"`outcomes` must be one number for each .*; got shape \(2, 2\)",
    ),
    (lambda: trained().suggest(POOL[:2], [1.0]), r"one number for each configuration, \[2\]; got shape \(1,\)"),
    (
        lambda: trained().suggest(np.array([[0.1], [0.4]]), [3.0, 2.0]),
        r"`configurations\[0\]` must be a dict from parameter names",
    ),
    (lambda: trained().suggest(POOL[:1], [3.0], pending=POOL[0]), r"`pending\[0\]` must be a dict .*; got 'x'"),
    # Published tables.
    *(
        (lambda wrong=wrong: to_hpob(**wrong), r"numbers in \[0, 1\] for \['x0', 'x1'\]; got .* Give .* `space`")
        for wrong in ({"x0": 0.5}, {"x0": 0.5, "x1": np.float32(2)}, {"x0": 0.5, "x1": "rbf"})
    ),
    (lambda: to_hpob(CORNER._replace(status="FAIL"), CORNER._replace(fidelity=0.5)), "it has none"),
    (lambda: openml(RMSE | {"value": 0.5}), "of 'root_mean_squared_error', for which smaller is better. Pass `higher"),
    (lambda: openml(RUN), "Run 7 has the value 37.2. .* Pass `higher_is_better=True` or `False`"),
    (
        lambda: openml(RMSE, RUN | {"function": "predictive_accuracy"}, higher_is_better=False),
        r"values of one function; got \['predictive_accuracy', 'root_mean",
    ),
    (lambda: openml(RUN | {"value": "much"}), "could not convert string to float: 'much'"),  # by Python
    # Studies of Optuna.
    (
        lambda: to_optuna(Record("t", {"x": 2.0, "kind": "a"}, 1.0, trial=0)),
        "value 2.0 of parameter 'x' isn't contained in the distribution Float",  # by Optuna
    ),
    (
        lambda: to_optuna(*RECORDS[:2], direction="maximize"),
        "`direction` is not allowed, because outcomes are always minimized",
    ),
    (lambda: to_optuna(*RECORDS), r"of one task, because an Optuna study has one; got \['t0', 't1'\]"),
    (
        lambda: to_optuna(*at_fidelities(1e-10), space=LINE),
        "has the fidelity 1e-10, less than a billionth of the full budget",
    ),
    (
        lambda: to_optuna(*at_fidelities(1.4e-9, 1.0, 1e-9), space=LINE),
        "has the fidelities 1e-09 and 1.4e-09, within a billionth of the full budget",
    ),
    (lambda: to_optuna(ONE, ONE._asdict()), RECORD + " must be a `Record`; got dict"),
    # Several outcomes.
    (lambda: train(changed(outcomes={"a": 7.0})), RECORD + "'s outcomes must be None .* got {'a': 7"),
    (lambda: train(changed(outcomes={})), RECORD + "'s outcomes must be None or a dict"),
    (lambda: read_frame(task=["a"], configuration=["{}"], outcomes=["[1]"]), "or JSON of dicts; got .*1.* in row 0"),
    (lambda: train(NAMED_OUTCOMES, objectives="ab"), "`objectives` must be the names .*; got 'ab'"),
    (lambda: blackbox.asha(objectives=[0, 1]), r"`objectives` must be the names .*; got \[0, 1\]"),  # pyright: ignore
    (lambda: train(NAMED_OUTCOMES, objectives=[]), r"`objectives` must be the names .*; got \[\]"),
    (lambda: train(NAMED_OUTCOMES, objectives=["a", "a"]), r"must be different outcomes, .*; got \('a', 'a'\) and {}"),
    (lambda: blackbox.asha(objectives=["a"], constraints={"a": 1}), "must be different outcomes"),
    (lambda: train(NAMED_OUTCOMES, constraints={"b": math.nan}), "with finite bounds; got .*'b': nan"),
    (lambda: train(NAMED_OUTCOMES, objectives=["a", "z"]), "task 't0' lacks the outcomes 'z'; it has 'a', 'b', 'c'"),
    (lambda: train(RECORDS, objectives=["a"]), "lacks the outcomes 'a'; it has no outcomes by name. .* return a dict"),
    (lambda: train([*NAMED_OUTCOMES, ONE], objectives=["b"]), "of task 'one trial' lacks the outcomes 'b'"),
    (lambda: train(RECORDS, constraints={"c": 1}), "`constraints` are on the outcomes 'c', but .* no outcomes by name"),
    (lambda: train(NAMED_OUTCOMES, objectives=["a"], transformers=1), "`transformers` predict one outcome; omit them"),
    (
        lambda: train([r._replace(outcomes=r.outcomes | {"c": 1.0}) for r in NAMED_OUTCOMES], constraints={"c": 1.0}),
        "`records` of the outcome `c` must contain a task with trials of different outcomes",
    ),
    (lambda: trained_on_two().searcher(acquisition="ucb"), "must be 'ei' with `objectives` or .*; got 'ucb'"),
    (
        lambda: trained_on_two().suggest(POOL[:2], [0.1, 0.2]),
        r"the outcomes 'a', 'b' for each of 2 configurations, as dicts or as an array \[2, 2\]; got shape \(2,\)",
    ),
    (
        lambda: blackbox.best_records(NAMED_OUTCOMES[:3], ["a", "z"]),
        "trial of task 't0' lacks the outcomes 'z'; it has 'a', 'b', 'c'. Correct the names, let the objective return",
    ),
    (lambda: blackbox.best_records(RECORDS), r"`records` must all be of one task, .*; got the tasks \['t0', 't1'\]"),
    (
        lambda: trained_on_two().suggest(POOL[:2], [{"a": 0.1, "b": 0.2}, {"a": 0.1, "B": 0.2}]),
        r"`outcomes\[1\]` lacks 'b'; it has 'a', 'B'. Give NaN for an unknown outcome",
    ),
    (lambda: sample_two_objectives(trained()), "study has 2 objectives, but the meta-optimizer .* with 1. Train it"),
    (lambda: sample_two_objectives(trained_on_two(), 3), "study has 3 objectives, but the meta-optimizer .* with 2"),
    (
        lambda: sample_two_objectives(trained_on_two(c=0.5)),
        r"Trial 0 has the constraints \[\]; the meta-optimizer was trained with \['c'\]. Give .* `constraints_func`",
    ),
    (lambda: sample_two_objectives(trained_on_two(c=0.5), constraints=[1, 2]), r"has the constraints \['0', '1'\]"),
    (lambda: sampler(constraints_func=lambda trial: [0.0]), "`constraints_func` needs a meta-optimizer that predicts"),
    (lambda: prune([0.5]), r"`values` must be one number for each of 2 objectives; got \[0.5\]"),
    (lambda: prune([0.5, 0.5], step=-1), "`step` must be at least 0; got -1"),
    (lambda: prune([0.5, 0.5], reduction_factor=1), "`reduction_factor` must be at least 2; got 1"),
    # Models of scikit-learn.
    (lambda: sklearn_objective("StandardScaler"), "`scoring` must be given"),
    (lambda: sklearn_run("k_means", rate=1), "Invalid parameter 'rate'"),
]


TYPES = [
    (lambda: blackbox.tabulate([Record("3", {"x": 1j}, 0.25)]), "a complex cannot be written as JSON: 1j"),
    (lambda: read_frame(task=["a"]), "missing 1 required positional argument: 'configuration'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_refusals_of_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()

"""`AutoClassifier` and `AutoRegressor`: scikit-learn's contract, rows, folds, inputs and predictions."""

import concurrent.futures
import contextlib
import gc
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
import sklearn
import skops.io
import threadpoolctl
from sklearn import datasets, inspection, linear_model, metrics
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

import metaopt
from metaopt import automl, spaces, tasks
from metaopt.automl import _inputs, _network_folds, _rows, _workers
from metaopt.automl._time_model import TimeModel

QUICK = {"time_limit": None, "models": ("linear", "lightgbm"), "preset": "instant", "n_jobs": 1, "verbose": False}
NETWORKS = {"network", *(f"network {i}" for i in range(2, 9))}  # of the preset "instant"


@pytest.fixture(scope="module")
def wine():
    x, y = datasets.load_wine(return_X_y=True, as_frame=True)
    x["cellar"] = pd.Categorical(np.where(x["hue"] > 1, "old", "new"))
    y = np.array(["red", "rosé", "none"])[y]
    order = np.random.default_rng(0).permutation(len(y))
    return x.iloc[order[:120]], y[order[:120]], x.iloc[order[120:]], y[order[120:]]


@pytest.fixture(scope="module")
def fitted(wine):
    x, y, *_ = wine
    return automl.AutoClassifier(**QUICK | {"models": ("network", "linear", "lightgbm", "xgboost")}).fit(x, y)


@pytest.fixture(scope="module")
def regressor():
    x, y = datasets.load_diabetes(return_X_y=True, as_frame=True)
    return automl.AutoRegressor(**QUICK | {"models": ("network", "linear")}).fit(x[:300], y[:300]), x[300:], y[300:]


@pytest.mark.once
@pytest.mark.parametrize("kind", [automl.AutoClassifier, automl.AutoRegressor])
def test_scikit_learns_contract(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about check_estimator's own odd data
        results = check_estimator(kind(**QUICK | {"models": ("linear",), "time_limit": 20.0}), on_skip=None)
    assert len(results) > 50


def test_a_frame_with_text_categories_is_fitted_and_new_rows_are_predicted(wine, fitted):
    _, _, x, y = wine
    probabilities = fitted.predict_proba(x)
    assert list(fitted.classes_) == ["none", "red", "rosé"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-9)
    assert metrics.accuracy_score(y, fitted.predict(x)) > 0.9
    board = fitted.leaderboard_
    assert set(board["model"]) == {*NETWORKS, "linear", "lightgbm", "xgboost"}
    assert board["weight"].sum() == pytest.approx(1) and board["score"].is_monotonic_decreasing
    # The ensemble is selected and calibrated on these rows. The floor of probabilities costs at most 1 / n.
    assert fitted.score_ >= board["score"].max() - 1 / len(wine[1])


def test_rows_are_predicted_one_at_a_time_and_by_the_names_of_columns(wine, fitted):
    x = wine[2]
    whole = fitted.predict_proba(x)
    np.testing.assert_allclose(fitted.predict_proba(x.iloc[[3]]), whole[[3]], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="now missing"):
        fitted.predict_proba(x[x.columns[1:]])
    np.testing.assert_array_equal(fitted.predict_proba(x.assign(more=1)[["more", *x.columns]]), whole)
    with pytest.raises(ValueError, match="in the same order"):  # scikit-learn's contract
        fitted.predict_proba(x[x.columns[::-1]])


def test_threads_that_predict_at_a_time_leave_the_settings_of_the_process(wine, fitted):
    x, filters = wine[2], list(warnings.filters)
    num_threads = lambda: sorted((pool["filepath"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info())
    whole, before = fitted.predict_proba(x), num_threads()  # the first call loads libraries
    predict = lambda _: np.testing.assert_array_equal(fitted.predict_proba(x), whole)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(predict, range(24)))
    assert warnings.filters == filters and num_threads() == before


def test_columns_that_were_dropped_need_not_be_in_new_rows(wine):
    x, y, new, truth = wine
    wide = x.assign(number=np.random.default_rng(0).permutation(len(y)) + 1, same=3)
    model = automl.AutoClassifier(**QUICK | {"models": ("linear",)}).fit(wide, y)
    predicted = model.predict_proba(new.assign(number=0, same=0))
    np.testing.assert_array_equal(model.predict_proba(new), predicted)
    ordered = lambda X: X[[name for name in model.feature_names_in_ if name in X.columns]]  # as the error shows
    for X in (new[new.columns[::-1]], new[new.columns[::-1]].assign(number=0, more=1)):
        with pytest.raises(
            ValueError, match="`X\\[\\[name for name in model.feature_names_in_ if name in X.columns\\]\\]`"
        ):
            model.predict_proba(X)
        np.testing.assert_array_equal(model.predict_proba(ordered(X)), predicted)
    with pytest.raises(ValueError, match="now missing:\n- hue"):  # it is needed: `reindex` would fill it with gaps
        model.predict_proba(ordered(new[new.columns[::-1]].drop(columns=["hue"])))
    importance = model.importance(new, truth, n_repeats=2).set_index("column")
    assert (importance.loc[["number", "same"]] == 0).all(axis=None) and importance["mean"].max() > 0


@pytest.mark.parametrize(("argument", "frame"), [("groups", pd.DataFrame), ("time", dict)])
def test_groups_and_times_may_be_names_of_columns(argument, frame):
    rng = np.random.default_rng(0)
    columns = {"part": np.repeat(np.arange(12), 5), "x": rng.normal(size=60)}
    model = automl.AutoRegressor(**QUICK | {"models": ("linear",)})
    y = columns["x"] + columns["part"]
    expected = clone(model).fit(pd.DataFrame({"x": columns["x"]}), y, **{argument: columns["part"]})
    model.fit(frame(columns), y, **{argument: "part"})
    assert list(model.feature_names_in_) == ["x"] and model.score_ == expected.score_
    np.testing.assert_array_equal(model.predict(frame(columns)), expected.predict(pd.DataFrame({"x": columns["x"]})))


def test_a_fit_that_fails_leaves_no_older_model(wine):
    x, y, *_ = wine
    model = automl.AutoClassifier(**QUICK | {"models": "linear"}).fit(x, y)
    with pytest.raises(ValueError, match="one class"):
        model.fit(x[x.columns[::-1]], np.zeros(len(y)))
    for call in (lambda: model.predict(x), lambda: model.leaderboard_, lambda: model.importance(x, y)):
        with pytest.raises(NotFittedError):
            call()


def test_dicts_of_columns_and_lists_of_dicts(wine):
    x, y, new, _ = wine
    model = automl.AutoClassifier(**QUICK | {"models": "linear"})
    expected = model.fit(x, y).predict_proba(new)
    for form in ("list", "records"):
        other = clone(model).fit(x.to_dict(form), y)
        np.testing.assert_allclose(other.predict_proba(new.to_dict(form)), expected)


def test_regression_predicts_in_the_units_of_the_target(regressor):
    model, x, y = regressor
    predicted = model.predict(x)
    assert metrics.r2_score(y, predicted) > 0.35
    # Both members have a share in the leaderboard, and RMSE is in units of the target's deviation.
    assert set(model.leaderboard_["model"]) == {*NETWORKS, "linear"}
    assert -0.9 < model.score_ < -0.6


def test_saved_estimators_predict_the_same_and_files_hold_no_pickle(wine, fitted, regressor, tmp_path):
    model, x, _ = regressor
    for estimator, rows in ((fitted, wine[2]), (model, x)):
        metaopt.save(tmp_path / "model.npz", estimator)
        loaded = metaopt.load(tmp_path / "model.npz")
        assert type(loaded) is type(estimator) and loaded.get_params() == estimator.get_params()
        np.testing.assert_array_equal(loaded.predict(rows), estimator.predict(rows))
        pd.testing.assert_frame_equal(loaded.leaderboard_, estimator.leaderboard_)
    np.testing.assert_array_equal(loaded.predict_interval(x), model.predict_interval(x))
    with np.load(tmp_path / "model.npz", allow_pickle=False) as file:
        assert all(file[name].dtype.kind != "O" for name in file.files)


@pytest.mark.parametrize("is_other_version", [False, True])
def test_a_library_that_predicts_other_values_or_fails_is_an_error(is_other_version, wine, tmp_path, monkeypatch):
    model = automl.AutoClassifier(**QUICK | {"models": "linear"}).fit(*wine[:2])
    metaopt.save(tmp_path / "model.npz", model)
    regression, note = linear_model.LogisticRegression, r"\.$"
    predict_proba = regression.predict_proba
    if is_other_version:
        note = rf" \(it was saved with sklearn {sklearn.__version__}; install these versions, here are sklearn 1.0\)"
        monkeypatch.setattr(sklearn, "__version__", "1.0")
        metaopt.load(tmp_path / "model.npz")  # other versions are no error by themselves
    monkeypatch.setattr(regression, "predict_proba", lambda self, x: predict_proba(self, x)[:, ::-1])
    with pytest.raises(ValueError, match="its models predict other values than when they were saved" + note):
        metaopt.load(tmp_path / "model.npz")
    monkeypatch.setattr(regression, "predict_proba", lambda self, x: self.multi_class)
    with pytest.raises(
        ValueError, match="do not fit each other: 'LogisticRegression' object has no attribute.*" + note
    ):
        metaopt.load(tmp_path / "model.npz")


def small_forests(wine, kind):
    """Three trees of each forest: files of whole forests take seconds."""
    model = automl.AutoClassifier(**QUICK | {"models": kind}).fit(*wine[:2])
    for forest in model.ensemble_.members[0].models:
        forest.estimators_ = forest.estimators_[:3]
    return model


@pytest.fixture(scope="module")
def extra_trees(wine):
    return small_forests(wine, "extra_trees")


@pytest.fixture(scope="module")
def random_forest(wine):
    return small_forests(wine, "random_forest")


@pytest.fixture(scope="module")
def hist_gradient_boosting(wine):
    return automl.AutoClassifier(**QUICK | {"models": "hist_gradient_boosting"}).fit(*wine[:2])


@pytest.mark.parametrize(
    "kind", ["extra_trees", pytest.param("random_forest", marks=pytest.mark.once), "hist_gradient_boosting"]
)
def test_every_kind_of_scikit_learn_is_saved(kind, wine, request, tmp_path):
    model, new = request.getfixturevalue(kind), wine[2]
    metaopt.save(tmp_path / "model.npz", model)
    np.testing.assert_array_equal(metaopt.load(tmp_path / "model.npz").predict_proba(new), model.predict_proba(new))


class Unknown:
    """A type that no model contains."""


@contextlib.contextmanager
def damaged_first_model(path, estimator):
    """Saves an estimator whose first model the body damages. `metaopt.save` would predict with the damaged model."""
    metaopt.save(path, estimator)
    member = estimator.ensemble_.members[0]
    yield member.models[0]
    with np.load(path) as file:
        arrays = dict(file)
    arrays[f"{member.member.name} 0: model"] = np.frombuffer(skops.io.dumps(member.models[0]), np.uint8)
    np.savez(path, **arrays)


def test_a_model_with_another_type_is_rejected(extra_trees, tmp_path):
    with damaged_first_model(tmp_path / "model.npz", extra_trees) as forest:
        forest.unknown = Unknown()
    del forest.unknown
    with pytest.raises(ValueError, match="Untrusted types.*Unknown"):
        metaopt.load(tmp_path / "model.npz")


def test_a_tree_with_categorical_nodes_is_rejected(hist_gradient_boosting, tmp_path):
    """No kind has them; their sets of levels would be at positions that a file names."""
    # scikit-learn has no public name for these nodes.
    with damaged_first_model(tmp_path / "model.npz", hist_gradient_boosting) as model:
        is_categorical = model._predictors[0][0].nodes["is_categorical"]
        is_categorical[0] = 1
    is_categorical[0] = 0
    with pytest.raises(ValueError, match="by categories"):
        metaopt.load(tmp_path / "model.npz")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature", 1000, "splits a column that does not exist"),
        ("children_left", 10**6, "whose child does not exist"),
        ("children_right", 0, "whose child does not exist"),  # a loop
    ],
)
def test_a_tree_that_points_outside_is_rejected(field, value, message, extra_trees, tmp_path):
    with damaged_first_model(tmp_path / "model.npz", extra_trees) as forest:
        nodes = getattr(forest.estimators_[0].tree_, field)
        correct, nodes[0] = nodes[0], value
    nodes[0] = correct
    with pytest.raises(ValueError, match=message):
        metaopt.load(tmp_path / "model.npz")


@pytest.mark.once
def test_equal_seeds_give_equal_results_in_any_order_of_rows(wine):
    x, y, new, _ = wine
    order = np.random.default_rng(1).permutation(len(y))
    first = automl.AutoClassifier(**QUICK).fit(x, y).predict_proba(new)
    np.testing.assert_allclose(automl.AutoClassifier(**QUICK).fit(x.iloc[order], y[order]).predict_proba(new), first)
    other = automl.AutoClassifier(**QUICK | {"random_state": 1}).fit(x, y).predict_proba(new)
    assert np.abs(other - first).max() > 1e-4


@pytest.mark.once
@pytest.mark.parametrize("kind", [automl.AutoClassifier, automl.AutoRegressor])
def test_equal_seeds_give_equal_results_with_any_number_of_workers(kind, wine):
    if kind is automl.AutoClassifier:
        x, y, new, more = *wine[:3], ()
    else:
        x, y = datasets.load_diabetes(return_X_y=True, as_frame=True)
        x, y, new, more = x[:150], y[:150], x[150:], ("gaussian_process",)
    trees = ("lightgbm", "xgboost", "extra_trees", "random_forest", "hist_gradient_boosting")
    options = QUICK | {"models": ("network", "linear", *trees, *more)}
    models = [kind(**options | {"n_jobs": num_jobs}).fit(x, y) for num_jobs in (1, 2)]
    boards = [model.leaderboard_.sort_values("model").reset_index(drop=True) for model in models]
    assert len(boards[0]) == len(NETWORKS) + len(options["models"]) - 1
    for column in ("model", "score", "weight"):
        assert list(boards[0][column]) == list(boards[1][column])
    np.testing.assert_array_equal(models[0].predict(new), models[1].predict(new))


def test_a_time_limit_is_kept_and_the_rest_is_named(wine):
    x, y, *_ = wine
    model = automl.AutoClassifier(**QUICK | {"preset": "best", "time_limit": 1e-3}).fit(x, y)
    assert len(model.leaderboard_) == 1  # a late result is better than none
    assert (
        set(model.ensemble_.failed.values()) <= {"would take longer than the time left", "out of time"}
        and model.ensemble_.failed
    )


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """Worker processes import the given sources instead of libraries, which this process has already imported."""

    def replace(num_jobs, **sources):
        for name, source in sources.items():
            importlib.import_module(name)
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        _workers.stop(num_jobs)  # new workers import them again
        _workers.workers(num_jobs).submit(int).result(timeout=300)

    monkeypatch.syspath_prepend(tmp_path)  # joblib sets the paths of new workers to those of this process
    yield replace
    for num_jobs in range(1, 5):
        _workers.stop(num_jobs)


@pytest.fixture(scope="module")
def larger_table():
    return datasets.make_classification(800, 10, n_informative=5, n_classes=6, random_state=0)


def test_a_model_that_fails_costs_only_itself(wine, replaced):
    replaced(2, lightgbm="raise MemoryError('too large')")
    model = automl.AutoClassifier(**QUICK | {"n_jobs": 2}).fit(*wine[:2])
    assert list(model.leaderboard_["model"]) == ["linear"]
    assert model.ensemble_.failed == {"lightgbm": "MemoryError: too large"}


@pytest.mark.once
def test_a_model_that_kills_its_worker_costs_only_itself(larger_table, replaced):
    replaced(3, lightgbm="import os\nos._exit(1)")
    options = QUICK | {"models": ("lightgbm", "extra_trees"), "n_jobs": 3}
    # Extra trees come first. The last of their 7 folds runs next to LightGBM's first one, dies with it, and runs again.
    model = automl.AutoClassifier(**options).fit(*larger_table, groups=np.arange(800) % 7)
    assert list(model.leaderboard_["model"]) == ["extra_trees"]
    assert "TerminatedWorkerError" in model.ensemble_.failed["lightgbm"]


HUNG = "TimeoutError: took much longer than expected, and was stopped"
# The real library, after some seconds.
LATE = """
import importlib, pathlib, sys, time
time.sleep(6)
folder = str(pathlib.Path(__file__).parent)
sys.path[:] = [path for path in sys.path if path != folder]
del sys.modules[__name__]
importlib.import_module(__name__)
"""


@pytest.fixture
def hangs_after(monkeypatch):
    """Sets the seconds after which a fit of some kinds is taken to hang."""

    def set_seconds(**seconds):
        monkeypatch.setattr(TimeModel, "longest_seconds", lambda self, kind, *_: seconds.get(kind, 300.0))

    return set_seconds


@pytest.mark.once
@pytest.mark.parametrize("num_jobs", [1, 3])
def test_a_model_that_hangs_costs_only_itself(num_jobs, wine, replaced, hangs_after):
    replaced(num_jobs, lightgbm="import time\ntime.sleep(1000)", xgboost=LATE)
    hangs_after(lightgbm=3.0)
    options = QUICK | {"models": ("lightgbm", "xgboost", "extra_trees", "linear"), "n_jobs": num_jobs}
    # With 3 jobs, the two folds of LightGBM hang next to one of XGBoost, which begins again.
    model = automl.AutoClassifier(**options).fit(*wine[:2], groups=np.arange(len(wine[1])) % 2)
    assert model.not_fitted_ == {"lightgbm": HUNG}
    assert set(model.leaderboard_["model"]) == {"xgboost", "extra_trees", "linear"}


def test_if_the_first_model_hangs_until_the_time_is_over_another_is_fitted(wine, replaced, hangs_after):
    replaced(2, lightgbm="import time\ntime.sleep(1000)")
    hangs_after(lightgbm=2.0)
    options = QUICK | {"models": ("lightgbm", "extra_trees"), "n_jobs": 2, "time_limit": 1.0}
    model = automl.AutoClassifier(**options).fit(*wine[:2])
    assert model.not_fitted_ == {"lightgbm": HUNG} and list(model.leaderboard_["model"]) == ["extra_trees"]


@pytest.mark.once
def test_a_network_that_hangs_costs_only_itself(wine, hangs_after, monkeypatch):
    monkeypatch.setattr(_network_folds, "fit_folds", lambda *_: time.sleep(1000))
    hangs_after(network=1.0)
    model = automl.AutoClassifier(**QUICK | {"models": ("network", "linear")}).fit(*wine[:2])
    assert model.not_fitted_ == dict.fromkeys(NETWORKS, HUNG) and list(model.leaderboard_["model"]) == ["linear"]


@pytest.mark.once
def test_a_tree_that_is_too_slow_is_stopped(wine, replaced, tmp_path):
    source = "import os, pathlib, time\npathlib.Path(__file__).with_name(f'{os.getpid()}.pid').touch()\ntime.sleep(300)"
    replaced(2, lightgbm=source)
    model = automl.AutoClassifier(**QUICK | {"time_limit": 20.0, "n_jobs": 2}).fit(*wine[:2])
    assert list(model.leaderboard_["model"]) == ["linear"]
    assert model.not_fitted_ == {"lightgbm": "out of time"}
    assert_ends([int(file.stem) for file in tmp_path.glob("*.pid")])


def test_a_network_that_is_too_slow_is_stopped(wine, monkeypatch, tmp_path):
    def slow(*_):  # a function inside of a test can be sent to another process
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(300)

    monkeypatch.setattr(_network_folds, "fit_folds", slow)
    monkeypatch.setattr(TimeModel, "network_seconds", lambda *_: 0.1)
    options = QUICK | {"models": ("network", "linear"), "time_limit": 20.0, "n_jobs": 2}
    model = automl.AutoClassifier(**options).fit(*wine[:2])
    assert "linear" in set(model.leaderboard_["model"])
    assert model.not_fitted_["network"] == "out of time"
    (process,) = (int(file.stem) for file in tmp_path.glob("*.pid"))
    assert process != os.getpid()
    assert_ends([process])


def test_a_network_that_ends_its_process_costs_only_itself(wine, monkeypatch):
    monkeypatch.setattr(_network_folds, "fit_folds", lambda *_: os._exit(1))
    options = QUICK | {"models": ("network", "linear"), "time_limit": None}
    model = automl.AutoClassifier(**options).fit(*wine[:2])
    assert "TerminatedWorkerError" in model.not_fitted_["network"]
    assert "linear" in set(model.leaderboard_["model"])


def test_if_g_fails_only_networks_are_missing(wine, monkeypatch):
    def fail(*_):
        raise ValueError("no features")

    monkeypatch.setattr(_network_folds, "predicted_hyperparams", fail)
    options = QUICK | {"models": ("network", "linear"), "time_limit": None}
    model = automl.AutoClassifier(**options).fit(*wine[:2])
    assert model.not_fitted_["network"] == "ValueError: no features"
    assert "linear" in set(model.leaderboard_["model"])


DAEMON = """
import multiprocessing

def fit(number):
    from sklearn.datasets import load_iris
    from metaopt import automl
    options = {"models": ("network", "linear"), "preset": "instant", "time_limit": None, "n_jobs": 2, "verbose": False}
    model = automl.AutoClassifier(**options)
    return sorted(model.fit(*load_iris(return_X_y=True)).leaderboard_["model"])

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(fit, [0])[0], sep=",")
"""


@pytest.mark.once
def test_a_process_that_cannot_start_others_fits_all_models_itself(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(DAEMON)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.strip().split(",")) == {"linear", *NETWORKS}


def test_where_no_process_starts_one_thread_fits_all_models(wine, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no semaphores")

    monkeypatch.setattr(_workers, "workers", fail)
    model = automl.AutoClassifier(**QUICK | {"n_jobs": 2}).fit(*wine[:2])
    assert set(model.leaderboard_["model"]) == {"linear", "lightgbm"}
    assert "no processes can be started (no semaphores)" in caplog.text


@pytest.mark.once
def test_an_interrupt_ends_the_workers(larger_table, replaced, tmp_path):
    source = """
        import os, pathlib, signal, time

        folder = pathlib.Path(__file__).parent
        (folder / f"{os.getpid()}.pid").touch()
        time.sleep(0.2)  # meanwhile, the other workers begin
        try:
            (folder / "interrupted").touch(exist_ok=False)
            os.kill(os.getppid(), signal.SIGINT)  # as Ctrl-C
        except FileExistsError:
            pass  # another worker has done it
        time.sleep(30)
    """
    replaced(4, lightgbm=source)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    options = QUICK | {"models": "lightgbm", "n_jobs": 4}
    try:
        with pytest.raises(KeyboardInterrupt):
            automl.AutoClassifier(**options).fit(*larger_table)
    finally:
        signal.signal(signal.SIGINT, former)
    assert_ends([int(file.stem) for file in tmp_path.glob("*.pid")])


def assert_ends(processes):
    """Waits until the processes have ended, for 10 s at most."""
    assert processes
    limit = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_any_seed_of_scikit_learn_is_valid(wine):
    model = automl.AutoClassifier(**QUICK | {"random_state": 2**32 - 1}).fit(*wine[:2])
    assert not model.ensemble_.failed
    with pytest.raises(ValueError, match="Seed must be"):
        automl.AutoClassifier(**QUICK | {"random_state": -1}).fit(*wine[:2])


def test_a_group_is_on_one_side_of_a_split():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    groups = rng.integers(0, 30, 200)
    rows = _rows.sorted_rows(rng.normal(size=(200, 2)), y, np.ones(200), groups)
    splits = _rows.split_rows(rows, 2, seed=0)
    assert len(splits) == 8
    for train, valid in splits:
        assert not set(rows.groups[train]) & set(rows.groups[valid])
    np.testing.assert_array_equal(np.sort(np.concatenate([valid for _, valid in splits])), np.arange(200))


def test_models_are_validated_on_later_rows():
    rng = np.random.default_rng(0)
    time = rng.integers(0, 50, 200).astype(float)
    rows = _rows.sorted_rows(rng.normal(size=(200, 2)), rng.normal(size=200), np.ones(200), None, time)
    splits = _rows.split_rows(rows, 0, seed=0)
    assert len(splits) == 8
    for train, valid in splits:
        assert rows.time[train].max() < rows.time[valid].min()


@pytest.mark.once
def test_random_folds_are_too_optimistic_where_groups_decide():
    """Each group has its own target: a model can remember it, but learns nothing about new groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 8)
    x = rng.normal(size=(40, 3))[groups] + 0.01 * rng.normal(size=(320, 3))
    y = rng.integers(0, 2, 40)[groups]
    options = QUICK | {"models": ("extra_trees",), "eval_metric": "accuracy"}
    by_chance = automl.AutoClassifier(**options).fit(x, y, groups=groups).score_
    assert automl.AutoClassifier(**options).fit(x, y).score_ > 0.95
    assert by_chance < 0.75


def test_integer_weights_are_repeated_rows_and_others_are_kept():
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])
    rows = _rows.sorted_rows(x, y, np.array([1.0, 3.0, 2.0]))
    assert len(rows.y) == 6 and (rows.weight == 1).all()
    assert sorted(rows.x[:, 0].tolist()) == [0, 2, 2, 2, 4, 4]
    rows = _rows.sorted_rows(x, y, np.array([0.5, 1.5, 1.0]))
    assert dict(zip(rows.x[:, 0], rows.weight, strict=True)) == {0: 0.5, 2: 1.5, 4: 1.0}
    assert _rows.repeated(np.array([0.5, 1.5, 1.0])).tolist() == [1, 1, 2]
    assert _rows.repeated(np.array([2.0, 1.0])).tolist() == [0, 0, 1]


def test_target_encodings_of_training_rows_do_not_see_their_own_target():
    """A column of 100 levels that has nothing to do with the target."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(100.0), 3)[:, None]
    y = rng.normal(size=300)
    flags = (np.ones(1, bool), np.ones(1, bool))
    inputs, views = _inputs.fit_inputs(codes, y, *flags, np.arange(300), 0, seed=0)
    assert abs(np.corrcoef(views.trees[:, 0], y)[0, 1]) < 0.2
    # The final table, for new rows, does use these targets.
    applied = _inputs.apply_inputs(inputs, codes).trees[:, 0]
    assert np.corrcoef(applied, y)[0, 1] > 0.4
    unseen = _inputs.apply_inputs(inputs, np.array([[1000.0], [np.nan]])).trees[:, 0]
    np.testing.assert_allclose(unseen, y.mean())


def test_conformal_sets_and_intervals_cover(regressor):
    model, x, y = regressor
    ends = model.predict_interval(x, coverage=0.8)
    inside = (ends[:, 0] <= y) & (y <= ends[:, 1])
    assert abs(inside.mean() - 0.8) < 0.08  # 142 rows: a standard error of 3.4 %
    x, y = datasets.make_classification(600, n_informative=4, flip_y=0.2, random_state=0)
    model = automl.AutoClassifier(**QUICK | {"models": ("linear",)}).fit(x[:300], y[:300])
    sets = model.predict_set(x[300:], coverage=0.9)
    assert abs(sets[np.arange(300), y[300:]].mean() - 0.9) < 0.06
    assert sets.any(axis=1).all()


def test_out_of_fold_scores_of_small_tables_are_not_chosen_by_their_own_rows():
    """Random targets: boosting that stops by the validation rows would look better than the class shares."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)), rng.integers(0, 2, 80)
    model = automl.AutoClassifier(**QUICK | {"models": ("lightgbm", "xgboost")}).fit(x, y)
    assert model.leaderboard_["score"].max() < -np.log(2)


def test_leaks_ids_and_constants_are_reported(wine, caplog):
    x, y, *_ = wine
    x = x.assign(answer=y, number=np.random.default_rng(0).permutation(len(y)) + 1, same=3)
    model = automl.AutoClassifier(**QUICK | {"models": ("linear",)}).fit(x, y)
    report = model.report_.set_index("column")["action"]
    assert report["answer"] == "suspected" and report["number"] == "dropped" and report["same"] == "dropped"
    assert "answer" in caplog.text and "number" in caplog.text


@pytest.mark.parametrize(("seconds", "suspected"), [(None, ("0", "24")), (60.0, ("0", "24")), (1e-3, ("0",))])
def test_leaks_are_searched_for_a_fifth_of_the_time(seconds, suspected):
    """The search looks at the clock after 20 columns."""
    y, x = np.arange(200) % 2, np.random.default_rng(0).random((200, 25))
    x[:, [0, 24]] = y[:, None] + 0.1 * x[:, [0, 24]]
    model = automl.AutoClassifier(**QUICK | {"models": "linear", "time_limit": seconds}).fit(x, y)
    assert model.suspected_leaks_ == suspected


def test_importance_finds_the_column_that_decides():
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(300, 3)), columns=["a", "b", "c"])
    y = x["b"] + 0.1 * rng.normal(size=300) > 0
    model = automl.AutoClassifier(**QUICK | {"models": ("linear",)}).fit(x[:200], y[:200])
    importance = model.importance(x[200:], y[200:])
    assert importance["column"][0] == "b" and importance["mean"][0] > 0.2
    expected = inspection.permutation_importance(model, x[200:], y[200:], random_state=0)
    table = importance.set_index("column").loc[["a", "b", "c"]]
    np.testing.assert_array_equal(table, np.stack([expected.importances_mean, expected.importances_std], axis=1))


def test_importance_warns_once_of_each_column(caplog):
    x = np.random.default_rng(0).normal(size=(60, 2))
    model = automl.AutoRegressor(**QUICK | {"models": ("linear",)}).fit(x, x[:, 0])
    caplog.clear()
    model.importance(x + [9, 99], x[:, 0], n_repeats=2)
    assert [message.partition(" has ")[0] for message in caplog.messages] == ["the column '0'", "the column '1'"]
    model.predict(x + [9, 99])  # warns again
    assert len(caplog.messages) == 4


def test_importance_reports_its_progress(capsys):
    x = np.random.default_rng(0).normal(size=(60, 2))
    model = automl.AutoRegressor(**QUICK | {"models": ("linear",)}).fit(x, x[:, 0])
    model.set_params(verbose=True).importance(x, x[:, 0], n_repeats=2)
    assert "score 4/4, shuffling 1" in capsys.readouterr().err


def test_progress_names_the_metric_and_a_time_limit_that_is_too_short(wine, capsys, caplog):
    automl.AutoClassifier(**QUICK | {"models": ("network",), "time_limit": 0.01, "verbose": True}).fit(*wine[:2])
    assert "the time limit is too short for any model; fitting network anyway, which takes about" in caplog.text
    assert "best model network, score -" in (err := capsys.readouterr().err) and "(minus log_loss)" in err


def test_the_network_predicts_in_numpy_as_in_jax(wine):
    table = tasks.from_sklearn()[1]
    prepared = tasks.prepare(table)
    network, task = automl.tabular_network(), automl.tabular_task(prepared)
    hyperparams = jax.device_get(automl.predict_hyperparams(prepared))
    fold = _network_folds.FoldRows(prepared.train.x, prepared.train.y, np.ones(len(prepared.train.y)))
    (model,) = _network_folds.fit_networks([fold], None, prepared.num_classes, hyperparams, {}, 0)
    rows = {**task.valid, "x": prepared.test.x}
    expected = np.exp(network.log_probabilities(model.params, hyperparams, rows))
    np.testing.assert_allclose(_network_folds.predict(model, prepared.test.x), expected, rtol=2e-4, atol=1e-6)


def test_dates_as_labels_are_saved(tmp_path):
    x, y = np.arange(40.0)[:, None], pd.date_range("2020-01-01", periods=2).repeat(20)
    model = automl.AutoClassifier(**QUICK | {"models": "linear"}).fit(x, y)
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    assert loaded.classes_.dtype == model.classes_.dtype
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array([0, 1] * 20, object), [0, 1]),
        (pd.Categorical(["b", "a"] * 20), ["a", "b"]),
        (pd.array([True, False] * 20, dtype="boolean"), [False, True]),
        (["a", 1] * 20, ["1", "a"]),
    ],
)
def test_labels_of_any_type(y, classes):
    x = np.random.default_rng(0).normal(size=(40, 2))
    model = automl.AutoClassifier(**QUICK | {"models": ("linear",)}).fit(x, y)
    assert list(model.classes_) == classes and set(model.predict(x)) <= set(classes)


@pytest.mark.once
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="memory maps are counted on Linux only")
def test_programs_of_earlier_shapes_are_dropped():
    """Linux limits the memory maps of a process, and each compiled program has hundreds of them."""
    rng = np.random.default_rng(0)
    hyperparams = jax.device_get(spaces.default(automl.tabular_network().space))
    maps = []
    for width in (5, 12, 20, 30, 40, 60, 90, 120):
        x, y = rng.normal(size=(60, width)).astype(np.float32), rng.integers(0, 2, 60)
        fold = _network_folds.FoldRows(x, y, np.ones(60))
        _network_folds.fit_networks([fold], None, 2, hyperparams, {"num_steps": 3}, 0)
        gc.collect()
        maps.append(len(pathlib.Path("/proc/self/maps").read_text().splitlines()))
    assert maps[5] - maps[0] > 500
    assert maps[7] - maps[5] < 100

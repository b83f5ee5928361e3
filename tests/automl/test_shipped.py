"""The g that comes with the package: its predictions, its inputs, and rows that it must not read."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl, base, spaces, tasks
from metaopt.automl import _network_folds, _shipped


def test_what_is_learned_takes_less_than_two_megabytes():
    files = list(pathlib.Path(metaopt.__file__).parent.rglob("*.npz"))
    assert len(files) >= 2 and sum(file.stat().st_size for file in files) < 2e6


@pytest.fixture(scope="module")
def prepared():
    return tasks.prepare(tasks.from_sklearn()[1])


def test_a_prediction_lies_in_the_space_of_the_network(prepared):
    hyperparams = automl.predict_hyperparams(prepared)
    network = automl.tabular_network()
    assert automl.shipped_predictor().space == network.space
    assert set(hyperparams) == set(network.space)
    for name, leaf in network.space.items():
        assert leaf.low <= float(hyperparams[name]) <= leaf.high, name


def test_it_is_g_at_the_scaled_meta_features(prepared):
    trained = automl.shipped_predictor()
    features = trained.scaled_features(tasks.metafeatures(prepared, groups=_shipped.GROUPS, seed=0))
    z = trained.predictor.apply(trained.meta_params, base.Task(None, None, features))
    expected = spaces.to_constrained(trained.space, z)
    predicted = automl.predict_hyperparams(prepared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), predicted, expected)


def test_each_problem_has_its_own_g(prepared):
    x, categorical = prepared.train.raw, np.zeros(prepared.train.raw.shape[1], bool)
    number = prepared.train.x[:, 0].astype(np.float64)
    predicted = _network_folds.predicted_hyperparams(x, number, categorical, np.ones(len(x)), 0, seed=0)
    codes = _network_folds.intervals(number).astype(np.int32)
    described = tasks.metafeatures((x, codes, categorical), groups=_shipped.GROUPS, seed=0)
    by_problem = {}
    for problem in ("classification", "regression"):
        trained = automl.shipped_predictor(problem)
        features = trained.scaled_features(described)
        by_problem[problem] = trained.predict(base.Task(None, None, features))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), predicted, by_problem["regression"])
    of_classes = _network_folds.predicted_hyperparams(x, codes, categorical, np.ones(len(x)), 10, seed=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), of_classes, by_problem["classification"])
    assert abs(np.log(float(predicted["rate"]) / float(of_classes["rate"]))) > 1e-3


def test_only_training_rows_are_read(prepared):
    changed = lambda rows: rows._replace(raw=rows.raw * 7, x=rows.x * 7, y=rows.y[::-1])
    other = prepared._replace(valid=changed(prepared.valid), test=changed(prepared.test))
    jax.tree.map(np.testing.assert_array_equal, automl.predict_hyperparams(prepared), automl.predict_hyperparams(other))


def test_different_tables_get_different_hyperparameters(prepared):
    digits = tasks.prepare(tasks.from_sklearn()[3], max_rows=600, max_features=64)
    a, b = automl.predict_hyperparams(prepared), automl.predict_hyperparams(digits)
    assert abs(np.log(float(a["decay_hidden"]) / float(b["decay_hidden"]))) > 0.05


def test_features_far_outside_give_one_prediction_for_all():
    trained = automl.shipped_predictor()
    features = [trained.scaled_features(dict.fromkeys(trained.scaling.names, value)) for value in (1e30, -1e30)]
    z = [trained.predictor.apply(trained.meta_params, base.Task(None, None, f)) for f in features]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), *z)


def test_a_table_without_columns_has_a_prediction():
    arguments = np.zeros((30, 0)), np.arange(30) % 2, np.zeros(0, bool), np.ones(30)
    hyperparams = _network_folds.predicted_hyperparams(*arguments, num_classes=2, seed=0)
    assert np.isfinite([float(value) for value in hyperparams.values()]).all()


def test_a_table_of_constant_columns_has_a_prediction():
    x, y = np.zeros((30, 2)), np.arange(30) % 2
    hyperparams = automl.predict_hyperparams((x, y, np.zeros(2, bool)))
    assert all(np.isfinite(value) for value in hyperparams.values())


def frame_and_arrays():
    """A frame with a text column, gaps and two rows without a label, and the same table as arrays."""
    rng = np.random.default_rng(0)
    size, color = rng.normal(size=90), rng.integers(0, 3, 90)
    label = (size + (color == 1) + 0.5 * rng.normal(size=90) > 0).astype(np.int32)
    size[5] = np.nan
    sold = np.array(["no", "yes"], object)[label]
    sold[[7, 8]] = None
    frame = {"size": size, "sold": sold, "color": np.array(["blue", "green", "red"])[color]}
    rows = np.setdiff1d(np.arange(90), [7, 8])
    return frame, (np.stack([size, color], 1)[rows], label[rows], np.array([False, True]))


@pytest.mark.parametrize("kind", ["dict", "pandas", "labels apart", "numbered columns", "dicts", "rows", "array"])
def test_a_frame_and_its_target_are_the_same_as_arrays(kind):
    frame, arrays = frame_and_arrays()
    expected = automl.predict_hyperparams(arrays)
    inputs = {name: values for name, values in frame.items() if name != "sold"}
    arguments = {
        "dict": (frame, "sold"),
        "pandas": (pd.DataFrame(frame), "sold"),
        "labels apart": (pd.DataFrame(inputs), pd.Series(frame["sold"])),
        "numbered columns": (pd.DataFrame(dict(enumerate(frame.values()))), 1),
        "dicts": ([dict(zip(frame, row, strict=True)) for row in zip(*frame.values(), strict=True)], "sold"),
        "rows": (list(zip(*frame.values(), strict=True)), np.int64(1)),
        "array": (np.stack([np.asarray(values, object) for values in frame.values()], axis=1), -2),
    }[kind]
    predicted = automl.predict_hyperparams(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), predicted, expected)
    changed = automl.predict_hyperparams((arrays[0] * [1, 0], *arrays[1:]))  # the column of texts matters
    assert any(abs(float(changed[name]) / float(expected[name]) - 1) > 1e-3 for name in expected)


def test_the_target_of_a_square_array_is_a_column():
    array = np.random.default_rng(0).normal(size=(40, 40)).round(2)
    array[:, 3] = np.arange(40) % 2
    predicted = automl.predict_hyperparams(array, 3)
    expected = automl.predict_hyperparams((np.delete(array, 3, axis=1), np.arange(40) % 2, np.zeros(39, bool)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), predicted, expected)


def test_extreme_numbers_of_a_frame_have_a_prediction():
    frame = {"size": np.geomspace(1.0, 1e30, 60), "sold": np.arange(60) % 2}
    hyperparams = automl.predict_hyperparams(frame, "sold")
    assert all(np.isfinite(value) for value in hyperparams.values())


def test_a_batch_of_tables(prepared):
    trained = automl.shipped_predictor()
    described = tasks.metafeatures(prepared, groups=_shipped.GROUPS, seed=0)
    rows = [described, {name: 2 * value for name, value in described.items()}]
    features = np.stack([trained.scaled_features(row) for row in rows])
    batch = jax.vmap(trained.predict)(base.Task(None, None, features))
    for i in range(2):
        one = trained.predict(base.Task(None, None, features[i]))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), batch, one)
    assert float(batch["rate"][0]) != float(batch["rate"][1])


@pytest.mark.once
def test_it_is_saved_and_loaded_in_a_fresh_process(tmp_path):
    trained = automl.shipped_predictor()
    metaopt.save(tmp_path / "g.npz", trained)
    code = """
import json, sys
import numpy as np, jax
import metaopt
from metaopt import base
jax.config.update("jax_enable_x64", sys.argv[2] == "True")
trained = metaopt.load(sys.argv[1])
features = np.linspace(-3, 3, len(trained.scaling.names), dtype=np.float32)
hyperparams = trained.predict(base.Task(None, None, features))
weights = [np.asarray(x).tolist() for x in jax.tree.leaves(trained.meta_params)]
print(json.dumps([trained.predictor.config, trained.scaling, weights, jax.tree.map(float, hyperparams)]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "g.npz"), str(jax.config.jax_enable_x64)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    config, scaling, weights, hyperparams = json.loads(process.stdout)
    assert config == trained.predictor.config and config["kind"] == "ensemble" and config["num_members"] == 3
    assert scaling == [list(field) for field in trained.scaling]
    assert weights == [np.asarray(x).tolist() for x in jax.tree.leaves(trained.meta_params)]
    features = np.linspace(-3, 3, len(trained.scaling.names), dtype=np.float32)
    expected = trained.predict(base.Task(None, None, features))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), hyperparams, expected)


def test_the_first_use_may_be_inside_a_traced_function():
    automl.shipped_predictor.cache_clear()
    inside = jax.jit(lambda x: x * jax.tree.leaves(automl.shipped_predictor().meta_params)[0])(2.0)
    outside = jax.tree.leaves(automl.shipped_predictor().meta_params)[0]
    np.testing.assert_allclose(inside, 2 * outside)

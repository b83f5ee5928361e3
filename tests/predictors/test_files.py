"""Predictors on disk: the same bits come back, and nothing else is accepted."""

import json

import chex
import jax
import numpy as np
import pytest

import metaopt
from metaopt import base, predictors, spaces, tasks

KEY = jax.random.key(0)
SPACE = {"rate": spaces.interval(1e-3, 1.0, log=True), "nested": [spaces.simplex(3), spaces.fixed(0.5)]}
MAKE = {
    "mlp": lambda: predictors.mlp(SPACE, 2, num_hidden=3, hyperparams=None),
    "dataset_embedding": lambda: predictors.dataset_embedding(SPACE, num_features=2, width=4, max_rows=7),
    "mlp, spread": lambda: predictors.mlp(SPACE, 2, num_hidden=3, spread=0.5),
    "ensemble": lambda: predictors.ensemble(predictors.mlp(SPACE, 2, num_hidden=3), 2),
    "limited": lambda: predictors.ensemble(predictors.mlp(SPACE, 2, num_hidden=3, limit=0.2), 2),
    "limited_embedding": lambda: predictors.dataset_embedding(SPACE, num_features=2, width=4, max_rows=7, limit=0.2),
}


def weights(predictor):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), predictor.init(KEY))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.once
def test_a_round_trip_returns_the_same_bits(name, x64, tmp_path):
    with jax.enable_x64(x64):
        predictor = MAKE[name]()
        phi = weights(predictor)
        described = [{"log_n": 0.1, "entropy": -2.5}, {"log_n": 1.7, "entropy": 3e4}]
        scaling = tasks.fit_scaling(described)
        metaopt.save(tmp_path / "g.npz", predictors.TrainedPredictor(predictor, phi, scaling))
        loaded = metaopt.load(tmp_path / "g.npz")
    chex.assert_trees_all_equal(loaded.meta_params, phi)
    assert [x.dtype for x in jax.tree.leaves(loaded.meta_params)] == [x.dtype for x in jax.tree.leaves(phi)]
    assert loaded.space == SPACE
    assert loaded.scaling == scaling and type(loaded.scaling) is tasks.FeatureScaling
    for features in described:
        np.testing.assert_array_equal(
            loaded.scaling.transform(features, clip=3.0), scaling.transform(features, clip=3.0)
        )
    assert loaded.predictor.config == predictor.config
    data = {"x": np.ones((5, 2)), "y": np.arange(5) % 2, "mask": np.ones(5)}
    task = base.Task({**data, "feature_mask": np.ones(2), "class_mask": np.ones(2)}, None, np.array([0.3, 0.1]))
    task = jax.tree.map(jax.numpy.asarray, task)
    chex.assert_trees_all_equal(loaded.predictor.apply(loaded.meta_params, task), predictor.apply(phi, task))
    assert [path.name for path in tmp_path.iterdir()] == ["g.npz"]  # no temporary file is left


def test_features_are_scaled_as_the_predictor_needs_them():
    scaling = tasks.FeatureScaling(("a", "b"), (0.0, 1.0), (1.0, 2.0), (False, False))
    described = {"a": 7.0, "b": -1e9}
    free, limited = (
        predictors.TrainedPredictor(g, weights(g), scaling)
        for g in (MAKE["mlp"](), predictors.ensemble(predictors.mlp(SPACE, 2, limit=2), 2))
    )
    np.testing.assert_array_equal(free.scaled_features(described), [3.0, -3.0])
    np.testing.assert_array_equal(limited.scaled_features(described), [7.0, -100.0])
    # The table is outside by most of its distance, so its prediction is that of the start.
    z = limited.predictor.apply(limited.meta_params, base.Task(None, None, limited.scaled_features(described)))
    mean = limited.meta_params["center"].mean(0)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(z)[0], mean, atol=0.05)


@pytest.mark.parametrize("name", [*MAKE, "ensemble, spread"])
def test_a_prediction_is_lambda_in_natural_units_for_one_task_and_for_a_batch(name):
    wide = predictors.mlp(SPACE, 2, num_hidden=3, spread=0.5)
    predictor = predictors.ensemble(wide, 2) if name == "ensemble, spread" else MAKE[name]()
    trained = predictors.TrainedPredictor(predictor, weights(predictor))
    rng = np.random.default_rng(1)
    data = {"x": rng.normal(size=(3, 5, 2)), "y": np.arange(15).reshape(3, 5) % 2, "mask": np.ones((3, 5))}
    data |= {"feature_mask": np.ones((3, 2)), "class_mask": np.ones((3, 2))}
    batch = jax.tree.map(jax.numpy.asarray, base.Task(data, None, rng.normal(size=(3, 2))))
    predicted = [trained.predict(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    for i, one in enumerate(predicted):
        z = predictor.apply(trained.meta_params, jax.tree.map(lambda x, i=i: x[i], batch))
        z = z.center if "spread" in name else z
        chex.assert_trees_all_equal(one, spaces.to_constrained(SPACE, z))
    assert len({float(one["rate"]) for one in predicted}) == 3
    stacked = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *predicted)
    chex.assert_trees_all_close(jax.jit(jax.vmap(trained.predict))(batch), stacked, rtol=1e-6)


def test_your_own_predictor_in_natural_units():
    own = base.Predictor(lambda key: 2.0, lambda phi, task: {"rate": phi * task.features.sum()})
    trained = predictors.TrainedPredictor(own, 2.0)
    assert trained.predict(base.Task(None, None, np.array([0.5, 1.0]))) == {"rate": 3.0}


def test_a_predictor_of_one_lambda_for_all_tasks(tmp_path):
    """Its weights are as many as the dimensions of λ."""
    predictor = predictors.mlp(SPACE, 0, num_hidden=0)
    phi = weights(predictor)
    metaopt.save(tmp_path / "g.npz", predictors.TrainedPredictor(predictor, phi))
    chex.assert_trees_all_equal(metaopt.load(tmp_path / "g.npz").meta_params, phi)
    assert sum(x.size for x in jax.tree.leaves(phi)) == spaces.num_dims(SPACE)


def saved(path):
    predictor = MAKE["mlp"]()
    metaopt.save(path, predictors.TrainedPredictor(predictor, weights(predictor)))
    with np.load(path) as file:
        arrays = dict(file)
    return arrays, json.loads(arrays.pop("header").tobytes())


def rewrite(path, arrays, header):
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def test_bfloat16_comes_back_as_float32(tmp_path):
    predictor = MAKE["mlp"]()
    phi = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), weights(predictor))
    metaopt.save(tmp_path / "g.npz", predictors.TrainedPredictor(predictor, phi))
    loaded = metaopt.load(tmp_path / "g.npz").meta_params
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda x: x.astype(jax.numpy.float32), phi))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "does not describe a `TrainedPredictor` .*: TypeError"),
        ({"config": {"kind": "mlp"}}, "does not describe a `TrainedPredictor` .*: it lacks 'space'"),
        (
            {"config": {"kind": "forest", "space": spaces.to_json(SPACE)}},
            "does not describe a `TrainedPredictor` .*it lacks 'forest'",
        ),
        (
            {"config": {**predictors.mlp(SPACE, 2, num_hidden=3).config, "limit": -1.0}},
            "`limit` must be positive",
        ),
        (
            {"scaling": {"names": ["n", "m"], "center": [0.0], "scale": [1.0], "log": [False]}},
            r"the fields of its scaling have the lengths \[2, 1, 1, 1\]",
        ),
        (
            {"scaling": {"names": ["n"], "center": ["nan"], "scale": [1.0], "log": [False]}},
            "the array center of its scaling has entries that are not finite",
        ),
        (
            {"scaling": {"names": ["n"], "center": [0.0], "scale": [0.0], "log": [False]}},
            "its scaling has a scale that is not positive",
        ),
        ({"trained_on": ["iris"]}, "its `trained_on` is not a dict of texts"),
        ({"trained_on": {"iris": 3}}, "its `trained_on` is not a dict of texts"),
    ],
)
def test_other_headers(change, message, tmp_path):
    path = tmp_path / "g.npz"
    arrays, header = saved(path)
    rewrite(path, arrays, {**header, **change})
    with pytest.raises(ValueError, match=message):
        metaopt.load(path)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "g.npz"
    arrays, header = saved(path)
    name = "['linear']"
    rewrite(path, {**arrays, name: arrays[name][:1]}, header)
    with pytest.raises(
        ValueError,
        match=r"\['linear'\] should be floating-point of shape \(2, 4\), but it is float64 of shape \(1, 4\)",
    ):
        metaopt.load(path)
    rewrite(path, {k: v for k, v in arrays.items() if k != name}, header)
    with pytest.raises(ValueError, match=r"\['linear'\] should be floating-point of shape \(2, 4\), but it is missing"):
        metaopt.load(path)
    rewrite(path, {**arrays, "['more']": np.zeros(2)}, header)
    with pytest.raises(ValueError, match=r"it has unexpected arrays: \['more'\]"):
        metaopt.load(path)


def test_a_predictor_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "g.npz"
    saved(path)
    before = path.read_bytes()
    predictor = MAKE["mlp"]()
    scaling = tasks.FeatureScaling(("n", "m"), (0.0,), (1.0,), (False,))
    for trained, message in (
        (predictors.TrainedPredictor(predictor, weights(predictor), scaling), "fields of its scaling have the lengths"),
        (predictors.TrainedPredictor(predictor._replace(config={}), weights(predictor)), "has no `config`"),
    ):
        with pytest.raises(ValueError, match=message):
            metaopt.save(path, trained)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

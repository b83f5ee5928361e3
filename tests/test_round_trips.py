"""Whatever is saved is loaded with equal types and equal values in every field."""

import dataclasses
import importlib
import inspect
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import (
    automl,
    base,
    blackbox,
    evaluation,
    few_shot,
    hypergrad,
    nas,
    predictors,
    spaces,
    tasks,
    training,
    transforms,
)

KEY = jax.random.key(0)
SPACE = {
    "rate": spaces.interval(1e-3, 1.0, log=True),
    "nested": [spaces.simplex(3), spaces.fixed(0.5)],
    "gain": (spaces.real(1.0, shape=(2,)), spaces.positive(0.1)),
    "depth": spaces.integer(1, 9, default=3),
    "kind": spaces.choice(["a", None, 2, 0.5, True]),
    "only_a": spaces.active_if(spaces.interval(0.0, 1.0), "kind", ["a"]),
}
RECORDS = [
    base.Record(
        "t", {"x": 0.1, "n": 3, "flag": True, "text": "é", "none": None}, 0.25, 1 / 3, 2.0, 7, "PRUNED", 1, "r"
    ),
    base.Record("t", {"x": 1.0, "n": 1}, 1.0, cost=2.0, seed=2**31 - 2, trial=2),
    base.Record("u", {"nested": [1, 2.0]}, math.nan, status="FAIL", trial=1, seed=3),
]


def assert_same(loaded, expected, path="it"):
    """Equal types and values, field by field; functions are made again and are not compared."""
    if callable(expected) and not isinstance(expected, type):
        assert callable(loaded), path
        return
    arrays = isinstance(expected, jax.Array) and isinstance(loaded, jax.Array)
    assert arrays or type(loaded) is type(expected), f"{path}: {type(loaded)} for {type(expected)}"
    if isinstance(expected, (np.ndarray, jax.Array)):
        assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape), path
        if jax.dtypes.issubdtype(expected.dtype, jax.dtypes.prng_key):
            loaded, expected = jax.random.key_data(loaded), jax.random.key_data(expected)
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected), path)
    elif isinstance(expected, dict):
        assert loaded.keys() == expected.keys(), path
        for name, value in expected.items():
            assert_same(loaded[name], value, f"{path}[{name!r}]")
    elif hasattr(expected, "_fields"):
        for name in expected._fields:
            assert_same(getattr(loaded, name), getattr(expected, name), f"{path}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(loaded) == len(expected), path
        for i, (one, other) in enumerate(zip(loaded, expected, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(loaded, field.name), getattr(expected, field.name), f"{path}.{field.name}")
    else:
        assert loaded == expected or (loaded != loaded and expected != expected), f"{path}: {loaded!r} for {expected!r}"


def restored(path, value, **parts):
    metaopt.save(path, value)
    return metaopt.load(path, **parts), value


def predictor(path):
    g = predictors.mlp(SPACE, 2, num_hidden=3)
    scaling = tasks.fit_scaling([{"n": 1.0, "m": 2.0}, {"n": 3.0, "m": 1e6}, {"n": 5.0, "m": 7.0}])
    return restored(path, predictors.TrainedPredictor(g, g.init(KEY), scaling, {"iris": "5f1e"}))


def meta_optimizer(path):
    space = {"x": spaces.interval(0.0, 1.0), "kind": spaces.choice(["a", "b"])}
    pool = [{"x": x, "kind": kind} for x in (0.0, 0.5, 1.0) for kind in ("a", "b")]
    records = [
        base.Record(f"t{t}", c, (c["x"] - t / 3) ** 2 + (c["kind"] == "b"), cost=1 + c["x"], trial=i)
        for t in range(4)
        for i, c in enumerate(pool)
    ]
    features = {f"t{t}": [float(t), -1.0] for t in range(4)}
    options: Any = {"num_members": 2, "num_steps": 0, "deep_kernels": 1, "transformers": 1, "costs": True}
    g = blackbox.train_meta_optimizer(records, space=space, candidates=pool, features=features, **options)
    return restored(path, g)


def cell_searcher(path):
    ops = ("none", "a", "b")
    cells = [{"e0": x, "e1": y} for x, y in itertools.product(ops, repeat=2)]
    records = [base.Record(f"t{t}", c, float(i * t % 5)) for t in range(3) for i, c in enumerate(cells)]
    graph = lambda cell: nas.edge_graph([(0, 1, cell["e0"]), (1, 2, cell["e1"])], output=(2,))
    sizes: Any = {"width": 4, "num_layers": 1, "num_members": 2, "batch_size": 9, "num_steps": 0}
    h = nas.train_cell_searcher(records, graph, features={f"t{t}": [float(t)] for t in range(3)}, **sizes)
    return restored(path, h)


def meta_architecture(path):
    cell = nas.complete_cell(1, ("none", "skip_connect"), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("mlp", 2), nas.Layer("cell", 2)), 2)
    rule = lambda problem: hypergrad.unrolled(problem, num_steps=1)
    options = {"ops": nas.BLOCKS, "optimizer": lambda hyperparams: optax.sgd(0.5), "learn_init": True}
    search = nas.architecture_search(network, (3,), rule, **options)
    meta = nas.meta_architecture_search(search, predictors.mlp({"cell": spaces.real(shape=(1, 2))}, 2))
    return restored(path, nas.TrainedMetaArchitecture(meta, meta.hyperparams(KEY)), meta=meta)


def trained_network(path):
    cell = nas.complete_cell(1, ("linear",), preprocess=False)
    network = nas.Network({"cell": cell}, (nas.Layer("mlp", 2), nas.Layer("cell", 2)), 2)
    supernet = nas.supernet(network, (3,), ops=nas.BLOCKS)
    rows = {"x": np.arange(12.0).reshape(4, 3)}
    return restored(path, nas.trained_network(supernet, supernet.init(KEY), rows), ops=nas.BLOCKS)


def scores_of_methods(path):
    by_method = lambda *values: {"one": np.array(values, np.float32), "two": np.array(values)}
    scores = {"a": by_method([0.0, 0.5], [0.25, 1.0]), "b": by_method([0.5], [math.nan])}
    flags = {"a": True, "b": False}
    marks = by_method(0.1, 0.2)
    return restored(
        path, evaluation.Evaluation(scores, by_method(5, 5), by_method(1.0, 2.5), flags, False, marks, "accuracy")
    )


def benchmark(path):
    valid = np.array([[[0.5, 0.25]], [[np.nan, 0.75]]], np.float32)
    table = (("a", "b"), (2, 1), np.array([[0, 0], [1, 0]]), (0.5, 1.0), valid, valid[..., -1], 2 * valid)
    return restored(path, nas.Benchmark("mine", ("t",), *table, query=lambda *_: (0.0, 0.0)))


def split(path):
    parts = {"train": {"letters": {"classes": ["a", "é"]}}, "test": {"letters": {"rows": [0, 3]}, "digits": {}}}
    return restored(path, tasks.Split(parts))


def table_encoder(path):
    columns = {
        "n": [2**60, 2**60 + 1, 2**60],
        "w": ["é", "é", None],
        "t": ["2020-01-31", "2021-03-01", ""],
        "l": [[]] * 3,
    }
    return restored(path, tasks.fit_encoder(columns))


def auto_classifier(path):
    return _estimator(path, automl.AutoClassifier, np.array(["é", "b"])[np.arange(40) % 2])


def auto_regressor(path):
    return _estimator(path, automl.AutoRegressor, np.linspace(-1e3, 1e3, 40))


def auto_clusterer(path):
    x = np.random.default_rng(0).normal(size=(40, 2)) + 9 * (np.arange(40) % 2)[:, None]
    fitted = automl.AutoClusterer(3, algorithms=("kmeans", "mixture"), n_jobs=1).fit(x)
    metaopt.save(path, fitted)
    values = lambda model: (type(model), model.get_params(), model.predict(x), model.labels_, model.algorithm_)
    return values(metaopt.load(path)), values(fitted)


def tabular_model(path):
    frame = {"size": [1.5, 2.5, None, 4.5] * 5, "color": ["red", "blue"] * 10, "sold": ["no", "yes", "yes", "no"] * 5}
    table = tasks.prepare(frame, "sold", test_fraction=0.0)
    network = automl.tabular_network(num_steps=2, num_members=2, num_hidden=3)
    hyperparams = spaces.default(network.space)
    params = automl.train(network, KEY, hyperparams, automl.tabular_task(table))
    model = automl.TabularModel(params, hyperparams, table.encoder, table.columns, table.classes)
    metaopt.save(path, model)
    return metaopt.load(path), model


def _estimator(path, kind, y):
    x = np.random.default_rng(0).normal(size=(40, 2))
    fitted = kind(models=("linear",), time_limit=None, verbose=False).fit(x, y)
    metaopt.save(path, fitted)
    values = lambda model: (type(model), model.get_params(), model.predict(x), model.score_, model.ensemble_.failed)
    return values(metaopt.load(path)), values(fitted)


def learned_transform(path):
    weights = transforms.init_learned(KEY)
    return restored(path, jax.tree.map(np.asarray, weights))  # it comes back as NumPy's arrays


def pytree(path):
    """λ and a model's state with the types that occur in them, also those that `.npz` files do not have."""
    integers = [jnp.array([0, 255], jnp.uint8), jnp.int32(-7), jnp.array([-(2**63), 2**63 - 1], jnp.int64)]
    hyperparams = {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.array([1.5, -2.0], jnp.bfloat16)},
        "optimizer": [optax.ScaleByScheduleState(count=jnp.int32(3)), (jnp.float16(0.1),)],
        "state": {"integers": integers, "mask": jnp.array([True, False]), "waves": jnp.array([1 + 2j, -1j])},
        "keys": [KEY, jax.random.split(jax.random.key(1, impl="rbg"), 3), jax.random.PRNGKey(2)],
    }
    return restored(path, hyperparams, like=jax.eval_shape(lambda: hyperparams))


def store(path):
    blackbox.append_records(path, RECORDS)
    return blackbox.read_records(path), RECORDS


def frame(path):
    pytest.importorskip("pandas")
    return blackbox.records_from_frame(blackbox.records_to_frame(RECORDS)), RECORDS


def space(path):
    return spaces.from_json(json.loads(json.dumps(spaces.to_json(SPACE)))), SPACE


def network(path):
    return restored(path, nas.darts_space(7))


def elastic_network(path):
    return restored(path, nas.mlp_space(3))


def cost_table(path):
    term = nas.CostTerm((("cell", 0), ("cell", 1)), np.array([[0.5, 1.0], [2.0, 3.0]]))
    return restored(path, nas.CostTable(0.25, (term,), "ms"))


MEMBERS = {
    "predictors.TrainedPredictor": predictor,
    "blackbox.MetaOptimizer": meta_optimizer,
    "nas.CellSearcher": cell_searcher,
    "nas.TrainedMetaArchitecture": meta_architecture,
    "evaluation.Evaluation": scores_of_methods,
    "pytree": pytree,
    "nas.TrainedNetwork": trained_network,
    "nas.Benchmark": benchmark,
    "automl.AutoClassifier": auto_classifier,
    "automl.AutoClusterer": auto_clusterer,
    "automl.AutoRegressor": auto_regressor,
    "automl.TabularModel": tabular_model,
    "tasks.Split": split,
    "tasks.TableEncoder": table_encoder,
    "transforms.LearnedWeights": learned_transform,
    "blackbox.append_records": store,
    "blackbox.records_to_frame": frame,
    "spaces.to_json": space,
    "nas.Network": network,
    "nas.ElasticNetwork": elastic_network,
    "nas.CostTable": cost_table,
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.once
def test_loaded_values_have_the_types_and_values_of_the_saved_ones(name, tmp_path):
    assert_same(*MEMBERS[name](tmp_path / "file"))


def test_everything_that_can_be_saved_has_a_row():
    importlib.import_module("metaopt.automl._saved")  # registers its types when they are used
    rooms = (automl, blackbox, evaluation, few_shot, nas, predictors, spaces, tasks, training, transforms)
    public = {f"{room.__name__.split('.')[-1]}.{name}" for room in rooms for name in room.__all__}
    with pytest.raises(TypeError, match="it saves") as error:
        metaopt.save("never", object())
    types = str(error.value).split("it saves ")[1].split(", and ")[0].split(", ")
    names = {name for name in public if name.split(".")[1] in types}
    assert len(names) == len(types)
    texts = {name for name in public if name.endswith(".to_json")}
    assert names | texts <= MEMBERS.keys() - {"pytree"} <= public and all(map(inspect.isfunction, MEMBERS.values()))


def test_a_loaded_scaling_scales_as_before(tmp_path):
    loaded, saved = predictor(tmp_path / "file")
    assert loaded.scaling is not None and saved.scaling is not None
    features = {"n": 4.0, "m": 100.0}
    np.testing.assert_array_equal(
        loaded.scaling.transform(features, clip=9.0), saved.scaling.transform(features, clip=9.0)
    )

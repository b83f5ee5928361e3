"""Kinds of models besides the network: how one is fitted on the training rows of a fold, predicts, and is saved.

Every fit uses one thread. Folds and models run in parallel instead.

Worker processes run this module. `cloudpickle` sends its code to them, so that they do not import metaopt. The module
itself imports nothing from metaopt, because a worker would then import JAX, which takes seconds.
"""

import importlib
import io
import json
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Views(NamedTuple):
    """The same rows for different kinds of models.

    Attributes:
      trees: [n, k] float64 with NaN in gaps: numbers, codes of categories, and target encodings.
      filled: [n, k] the same, with medians in gaps.
      dense: [n, D] float32: normal scores and one-hot levels.
    """

    trees: np.ndarray
    filled: np.ndarray
    dense: np.ndarray


class FoldData(NamedTuple):
    """The inputs of a fit.

    Attributes:
      views: the views of the training rows.
      y: [n] classes 0..K-1, all of which occur, or numbers.
      weight: [n], with mean 1.
      valid_views: the views of the validation rows.
      valid_y: [m]; boosting stops early by them.
      valid_weight: [m], zero for rows whose class does not occur in `y`.
      categorical: [k] bool, of the columns for trees.
      num_classes: K, or 0 for regression.
      seed: the seed of the fit.
      stops: whether boosting stops early; the same in all folds. A fold with m = 0 never stops early: `settled` gives
        its model the mean number of rounds of the other folds.
    """

    views: Views
    y: np.ndarray
    weight: np.ndarray
    valid_views: Views
    valid_y: np.ndarray
    valid_weight: np.ndarray
    categorical: np.ndarray
    num_classes: int
    seed: int
    stops: bool


class Kind(NamedTuple):
    """One kind of models.

    Attributes:
      module: the package that it needs.
      fit: `(settings, data) -> model`.
      predict: `(model, views) -> [n, K]` probabilities, or [n] numbers.
      dumps: `(model) -> bytes`, in the library's own format, without pickle.
      loads: `(bytes) -> model`.
      best_rounds: `(model) -> int`, the round with the smallest validation loss, or 0 if it did not stop early. None
        for kinds without rounds.
      first_rounds: `(model, num) -> model`, its first rounds, or all of them for num = 0.
    """

    module: str
    fit: Callable[[dict[str, Any], FoldData], Any]
    predict: Callable[[Any, Views, int], np.ndarray]
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]
    best_rounds: Callable[[Any], int] | None = None
    first_rounds: Callable[[Any, int], Any] | None = None


def fit_fold(kind: str, settings: dict[str, Any], data: FoldData) -> tuple[Any, np.ndarray, float, float]:
    """Fits a model and predicts the validation rows.

    Returns:
      The model, its predictions [m, K] or [m], and the seconds of fit and prediction.

    Raises:
      FloatingPointError: if predictions are not finite.
    """
    importlib.import_module(KINDS[kind].module)  # takes a second in a new process
    start = time.perf_counter()
    model = fit(kind, settings, data)
    middle = time.perf_counter()
    predicted = predict(kind, model, data.valid_views, data.num_classes)
    if not np.isfinite(predicted).all():
        raise FloatingPointError("its predictions are not finite")
    return model, predicted, middle - start, time.perf_counter() - middle


def fit(kind: str, settings: dict[str, Any], data: FoldData) -> Any:
    """Fits a model of a kind, with one thread in the thread pools of all libraries. For one class it returns None.

    Raises:
      Exception: whatever the library raises.
    """
    import threadpoolctl

    if data.num_classes == 1:
        return None
    importlib.import_module(KINDS[kind].module)  # the limit below only affects loaded libraries
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence; the out-of-fold score shows the quality
        return KINDS[kind].fit(settings, data)


def predict(kind: str, model: Any, views: Views, num_classes: int) -> np.ndarray:
    """Predicts rows: [n, K] probabilities, or [n] numbers if `num_classes` is 0."""
    import threadpoolctl

    if not len(views.dense):  # libraries reject tables without rows
        return np.zeros((0, num_classes) if num_classes else 0)
    if num_classes == 1:
        return np.ones((len(views.dense), 1))
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(KINDS[kind].predict(model, views, num_classes), np.float64)


def settled(kind: str, models: list[Any], folds: list[FoldData]) -> list[tuple[Any, np.ndarray]]:
    """Gives each boosted model the mean number of rounds at which the other folds stopped.

    If a fold's own validation rows chose its number of rounds, its out-of-fold score would be too good. A single fold
    keeps its own number.

    Args:
      kind: a kind that has rounds.
      models: the models of all folds.
      folds: their data.

    Returns:
      The shortened model of each fold, with its predictions of the validation rows.
    """
    best_rounds, first_rounds = KINDS[kind].best_rounds, KINDS[kind].first_rounds
    assert best_rounds is not None and first_rounds is not None
    best = np.array([0 if model is None else best_rounds(model) for model in models])
    results = []
    for i, (model, data) in enumerate(zip(models, folds, strict=True)):
        others = np.delete(best, i)
        rounds = round(others[others > 0].mean()) if (others > 0).any() else best[i]
        model = None if model is None else first_rounds(model, int(rounds))
        results.append((model, predict(kind, model, data.valid_views, data.num_classes)))
    return results


# --- arrays as bytes ---


def _dump_arrays(model):
    file = io.BytesIO()
    np.savez(file, **model)
    return file.getvalue()


def _load_arrays(*names):
    def loads(data):
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in names}

    return loads


# --- scikit-learn ---


def _sklearn_kind(names: tuple[str, str], view: str, fixed: dict[str, Any]) -> Kind:
    """Kinds of scikit-learn: (module.Classifier, module.Regressor), and the view that they read."""

    def fit_model(settings, data):
        module, _, name = names[0 if data.num_classes else 1].rpartition(".")
        options = {**fixed, **settings}
        make = getattr(importlib.import_module(f"sklearn.{module}"), name)
        accepted = make().get_params()
        if "random_state" in accepted:
            options["random_state"] = data.seed
        model = make(**{key: value for key, value in options.items() if key in accepted})
        # Histogram boosting takes ten times as long with weights, even if they are equal.
        weight = None if np.ptp(data.weight) == 0 else data.weight
        return model.fit(getattr(data.views, view), data.y, sample_weight=weight)

    def predict_rows(model, views, num_classes):
        x = getattr(views, view)
        return model.predict_proba(x) if num_classes else model.predict(x)

    def dumps(model):
        return importlib.import_module("skops.io").dumps(model)

    def loads(data):
        # skops rejects other types before it creates an object. Listing the types first would double the time.
        model = importlib.import_module("skops.io").loads(data, trusted=list(_TRUSTED))
        _check_trees(model)
        return model

    return Kind("sklearn.ensemble", fit_model, predict_rows, dumps, loads)


def _check_trees(model) -> None:
    """Raises ValueError if a loaded tree has a child or column that does not exist, and would read foreign memory."""
    nodes = [(t.children_left, t.children_right, t.feature) for t in map(_tree, getattr(model, "estimators_", ()))]
    for predictor in (p for stage in getattr(model, "_predictors", ()) for p in stage):
        inner = predictor.nodes["is_leaf"] == 0
        if predictor.nodes["is_categorical"].any():  # sets of levels are not checked
            raise ValueError("a tree splits a column by categories, which no saved model does")
        left, right = (np.where(inner, predictor.nodes[side].astype(int), -1) for side in ("left", "right"))
        nodes.append((left, right, np.where(inner, predictor.nodes["feature_idx"], 0)))
    for left, right, feature in nodes:
        place = np.arange(len(left))
        inner = left != -1
        for child in (left, right):  # children come after their parent: no loops
            if ((child[inner] <= place[inner]) | (child[inner] >= len(left))).any():
                raise ValueError("a tree has a node whose child does not exist")
        if ((feature[inner] < 0) | (feature[inner] >= model.n_features_in_)).any():
            raise ValueError("a tree splits a column that does not exist")


def _tree(estimator) -> Any:
    return estimator.tree_


# Types inside scikit-learn's models that skops does not trust by itself. None of them runs code when it is loaded.
_TRUSTED = (
    "sklearn.tree._tree.Tree",
    "sklearn._loss.link.IdentityLink",
    "sklearn._loss.link.Interval",
    "sklearn._loss.link.LogitLink",
    "sklearn._loss.link.MultinomialLogit",
    "sklearn._loss.loss.HalfBinomialLoss",
    "sklearn._loss.loss.HalfMultinomialLoss",
    "sklearn._loss.loss.HalfSquaredError",
    "sklearn._loss._loss.CyHalfBinomialLoss",
    "sklearn._loss._loss.CyHalfMultinomialLoss",
    "sklearn._loss._loss.CyHalfSquaredError",
    "_loss.CyHalfBinomialLoss",  # the same types in older versions of scikit-learn
    "_loss.CyHalfMultinomialLoss",
    "_loss.CyHalfSquaredError",
    "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
)


# --- Gaussian process, for regression ---

_SEARCH_ROWS = 300  # for the search of length scales and noise; a step costs the cube of this number
_PROCESS_ROWS = 2000  # for the prediction
_MOST_SCALES = 50  # with more columns, all share one length scale


def _fit_gaussian_process(settings, data):
    """Matérn kernel of order 5/2; length scales and noise maximize the marginal likelihood of a sample of the rows.

    A row of weight w has the noise variance σ²/w, and so counts as w equal rows. The search does not use the weights.
    """
    del settings
    process = importlib.import_module("sklearn.gaussian_process")
    kernels = process.kernels
    x, order = data.views.dense.astype(np.float64), np.random.default_rng(data.seed).permutation(len(data.y))
    few, most = order[:_SEARCH_ROWS], order[:_PROCESS_ROWS]
    width = x.shape[1]
    scale = np.full(width, width**0.5) if width <= _MOST_SCALES else width**0.5
    smooth = kernels.ConstantKernel(1.0, (1e-3, 1e3)) * kernels.Matern(scale, (1e-2, 1e4), nu=2.5)
    search = process.GaussianProcessRegressor(smooth + kernels.WhiteKernel(0.1, (1e-5, 10.0)))
    best = search.fit(x[few], data.y[few]).kernel_
    noise = best.k2.noise_level / data.weight[most]
    final = process.GaussianProcessRegressor(best.k1, alpha=noise, optimizer=None).fit(x[most], data.y[most])
    scales = np.broadcast_to(best.k1.k2.length_scale, width)
    # The Cholesky factor is not kept: its size is the square of the number of rows.
    return {"x": x[most], "coefficients": best.k1.k1.constant_value * final.alpha_, "scales": scales}


def _predict_gaussian_process(model, views, num_classes):
    del num_classes
    kernels = importlib.import_module("sklearn.gaussian_process.kernels")
    kernel = kernels.Matern(model["scales"], nu=2.5)
    return kernel(views.dense.astype(np.float64), model["x"]) @ model["coefficients"]


# --- boosting ---

LEAST_TO_STOP = 64  # validation rows of a fold; fewer would choose a number of rounds by chance
_FIXED_ROUNDS = 150


def _fit_lightgbm(settings, data):
    lightgbm = importlib.import_module("lightgbm")
    settings = dict(settings)
    rounds, patience = settings.pop("num_rounds"), settings.pop("patience")
    objective = "multiclass" if data.num_classes > 2 else "binary" if data.num_classes else "regression"
    options = {
        "objective": objective,
        "seed": data.seed,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
        **({"num_class": data.num_classes} if data.num_classes > 2 else {}),
        **settings,
    }
    levels = np.flatnonzero(data.categorical).tolist()
    names = [str(i) for i in range(data.views.trees.shape[1])]
    made = {"feature_name": names, "categorical_feature": levels, "free_raw_data": False}
    train = lightgbm.Dataset(data.views.trees, data.y, weight=data.weight, params={"verbosity": -1}, **made)
    stop: dict[str, Any] = {}
    if not data.stops:
        rounds = min(rounds, _FIXED_ROUNDS)
    elif data.valid_weight.any():
        valid = train.create_valid(data.valid_views.trees, data.valid_y, weight=data.valid_weight)
        stop = {"valid_sets": [valid], "callbacks": [lightgbm.early_stopping(patience, verbose=False)]}
    # Without the last argument, LightGBM drops the rounds after the best one. The fold may need them: see `settled`.
    return lightgbm.train(options, train, rounds, **stop, keep_training_booster=True)


def _first_lightgbm(model, num):
    return importlib.import_module("lightgbm").Booster(model_str=model.model_to_string(num_iteration=num or -1))


def _predict_lightgbm(model, views, num_classes):
    predicted = model.predict(views.trees, num_threads=1)
    return np.stack([1 - predicted, predicted], axis=1) if num_classes == 2 else predicted


def _load_lightgbm(data):
    return importlib.import_module("lightgbm").Booster(model_str=data.decode())


def _fit_xgboost(settings, data):
    xgboost = importlib.import_module("xgboost")
    settings = dict(settings)
    rounds, patience = settings.pop("num_rounds"), settings.pop("patience")
    objective = "multi:softprob" if data.num_classes > 2 else "binary:logistic" if data.num_classes else None
    options = {
        "objective": objective or "reg:squarederror",
        "seed": data.seed,
        "nthread": 1,
        "verbosity": 0,
        "tree_method": "hist",
        **({"num_class": data.num_classes} if data.num_classes > 2 else {}),
        **settings,
    }
    train = xgboost.DMatrix(data.views.trees, data.y, weight=data.weight, nthread=1)
    stop: dict[str, Any] = {}
    if not data.stops:
        rounds = min(rounds, _FIXED_ROUNDS)
    elif data.valid_weight.any():
        valid = xgboost.DMatrix(data.valid_views.trees, data.valid_y, weight=data.valid_weight, nthread=1)
        stop = {"evals": [(valid, "valid")], "early_stopping_rounds": patience, "verbose_eval": False}
    return xgboost.train(options, train, rounds, **stop)


def _best_xgboost(model):
    last = model.attr("best_iteration")  # counted from 0
    return 0 if last is None else int(last) + 1


def _first_xgboost(model, num):
    return model[: min(num, model.num_boosted_rounds())] if num else model


def _predict_xgboost(model, views, num_classes):
    xgboost = importlib.import_module("xgboost")
    predicted = model.predict(xgboost.DMatrix(views.trees, nthread=1))
    return np.stack([1 - predicted, predicted], axis=1) if num_classes == 2 else predicted


def _load_xgboost(data):
    booster = importlib.import_module("xgboost").Booster({"nthread": 1})
    booster.load_model(bytearray(data))
    return booster


def _fit_catboost(settings, data):
    """Returns the trees as arrays: CatBoost's own reader crashes on damaged files. Codes of categories are numbers."""
    catboost = importlib.import_module("catboost")
    settings = dict(settings)
    rounds, patience = settings.pop("num_rounds"), settings.pop("patience")
    objective = "MultiClass" if data.num_classes > 2 else "Logloss" if data.num_classes else "RMSE"
    options = {"loss_function": objective, "random_seed": data.seed, "thread_count": 1, "allow_writing_files": False}
    options["nan_mode"] = "Min"  # a gap is below all borders
    stop: dict[str, Any] = {}
    if not data.stops:
        rounds = min(rounds, _FIXED_ROUNDS)
    elif data.valid_weight.any():
        valid = catboost.Pool(data.valid_views.trees, data.valid_y, weight=data.valid_weight, thread_count=1)
        stop = {"eval_set": valid, "early_stopping_rounds": patience}
    model = catboost.CatBoost({**options, **settings, "iterations": rounds})
    # `use_best_model=True` would drop the rounds after the best one. The fold may need them: see `settled`.
    train = catboost.Pool(data.views.trees, data.y, weight=data.weight, thread_count=1)
    model.fit(train, **stop, use_best_model=False, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.json"
        model.save_model(str(path), format="json")
        trees = json.loads(path.read_text())
    return _symmetric_trees(trees, model.get_best_iteration() + 1 if stop else 0)


def _symmetric_trees(trees: dict[str, Any], best_rounds: int) -> dict[str, np.ndarray]:
    """CatBoost's JSON as arrays.

    All nodes of one depth share a split. T trees of depth D have columns and borders [T, D], leaves [T, 2^D, K] and
    bias [K]. Trees that are shallower than D are padded with infinite borders.
    """
    parts, (scale, bias) = trees["oblivious_trees"], trees["scale_and_bias"]
    depth = max([1, *(len(part["splits"] or ()) for part in parts)])
    columns, borders = np.zeros((len(parts), depth), np.int32), np.full((len(parts), depth), np.inf, np.float32)
    leaves = np.zeros((len(parts), 2**depth, len(bias)))
    for t, part in enumerate(parts):
        for k, split in enumerate(part["splits"] or ()):
            columns[t, k], borders[t, k] = split["float_feature_index"], split["border"]
        values = np.reshape(part["leaf_values"], (-1, len(bias)))
        leaves[t, : len(values)] = scale * values
    arrays = {"columns": columns, "borders": borders, "leaves": leaves, "bias": np.array(bias, float)}
    return arrays | {"best_rounds": np.array(best_rounds)}


def _first_catboost(model, num):
    return {**model, **{name: model[name][: num or None] for name in ("columns", "borders", "leaves")}}


def _predict_catboost(model, views, num_classes):
    x = np.where(np.isnan(views.trees), -np.inf, views.trees).astype(np.float32)
    raw = np.tile(model["bias"], (len(x), 1))
    bits = 2 ** np.arange(model["columns"].shape[1])
    for columns, borders, leaves in zip(model["columns"], model["borders"], model["leaves"], strict=True):
        raw += leaves[(x[:, columns] > borders) @ bits]
    if not num_classes:
        return raw[:, 0]
    logits = np.concatenate([np.zeros_like(raw), raw], axis=1) if num_classes == 2 else raw
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


# --- all kinds ---

KINDS: dict[str, Kind] = {
    "linear": _sklearn_kind(("linear_model.LogisticRegression", "linear_model.Ridge"), "dense", {"max_iter": 300}),
    "extra_trees": _sklearn_kind(
        ("ensemble.ExtraTreesClassifier", "ensemble.ExtraTreesRegressor"), "filled", {"n_estimators": 200}
    ),
    "random_forest": _sklearn_kind(
        ("ensemble.RandomForestClassifier", "ensemble.RandomForestRegressor"), "filled", {"n_estimators": 200}
    ),
    "hist_gradient_boosting": _sklearn_kind(
        ("ensemble.HistGradientBoostingClassifier", "ensemble.HistGradientBoostingRegressor"), "trees", {}
    ),
    "gaussian_process": Kind(
        "sklearn.gaussian_process",
        _fit_gaussian_process,
        _predict_gaussian_process,
        _dump_arrays,
        _load_arrays("x", "coefficients", "scales"),
    ),
    "lightgbm": Kind(
        "lightgbm",
        _fit_lightgbm,
        _predict_lightgbm,
        lambda model: model.model_to_string().encode(),
        _load_lightgbm,
        lambda model: max(0, model.best_iteration),
        _first_lightgbm,
    ),
    "xgboost": Kind(
        "xgboost",
        _fit_xgboost,
        _predict_xgboost,
        lambda model: bytes(model.save_raw("ubj")),
        _load_xgboost,
        _best_xgboost,
        _first_xgboost,
    ),
    "catboost": Kind(
        "catboost",
        _fit_catboost,
        _predict_catboost,
        _dump_arrays,
        _load_arrays("columns", "borders", "leaves", "bias", "best_rounds"),
        lambda model: int(model["best_rounds"]),
        _first_catboost,
    ),
}

"""The network of `tabular_network`, trained on all folds in one program, with hyperparameters that g predicts."""

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from metaopt import _cache, base, hypergrad, spaces, tasks, training
from metaopt.automl._inputs import intervals
from metaopt.automl._network import HINGES, tabular_network, train
from metaopt.automl._rows import repeated
from metaopt.automl._schedule import FoldResult
from metaopt.automl._shipped import GROUPS, predicted

SPREAD = 0.5  # standard deviation of draws around λ, in unconstrained coordinates
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)  # columns after padding; equal shapes share one compiled program


class NetworkModel(NamedTuple):
    """A trained network, as NumPy arrays.

    Attributes:
      params: θ, without padding.
      scales: the hyperparameters that enter a prediction.
      centers: [B] the mean target of each interval, or None for classification.
    """

    params: dict[str, np.ndarray]
    scales: dict[str, float]
    centers: np.ndarray | None


class FoldRows(NamedTuple):
    """Rows of one fold, for training or validation: dense x [n, D], y [n] and weights [n]."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray


class NetworkData(NamedTuple):
    """The rows and labels of all folds.

    Attributes:
      train: the training rows of each fold.
      train_labels: their classes [n], or for regression their intervals.
      valid: the validation rows of each fold.
      valid_labels: the classes or intervals of the validation rows.
      num_labels: the number of classes or intervals.
      classes: the classes that occur in the training rows of each fold, or None for regression.
      seed: the seed of the training runs.
    """

    train: list[FoldRows]
    train_labels: list[np.ndarray]
    valid: list[FoldRows]
    valid_labels: list[np.ndarray]
    num_labels: int
    classes: list[np.ndarray] | None
    seed: int


def predicted_hyperparams(
    x: np.ndarray, y: np.ndarray, categorical: np.ndarray, weight: np.ndarray, num_classes: int, seed: int
) -> base.HyperParams:
    """g's hyperparameters for a table: x [n, d] with NaN in gaps, y [n] classes or numbers."""
    rows = repeated(weight)
    labels = y if num_classes else intervals(y)
    _, codes = np.unique(labels, return_inverse=True)
    bounded = np.clip(x, -1e15, 1e15)  # larger numbers would overflow in squares
    if not x.shape[1]:  # meta-features need a column
        bounded, categorical = np.zeros((len(x), 1)), np.zeros(1, bool)
    table = bounded[rows], codes[rows].astype(np.int32), categorical
    features = tasks.metafeatures(table, groups=GROUPS, seed=seed)
    return jax.device_get(predicted("classification" if num_classes else "regression", features))


def draw(hyperparams: base.HyperParams, number: int, seed: int) -> base.HyperParams:
    """λ itself for number 0, else λ plus normal noise in unconstrained coordinates."""
    if number == 0:
        return hyperparams
    space = tabular_network().space
    z = jax.device_get(spaces.to_unconstrained(space, hyperparams))
    rng = np.random.default_rng((seed, number))
    drawn = {name: np.float32(value + SPREAD * rng.normal()) for name, value in sorted(z.coordinates.items())}
    return jax.device_get(spaces.to_constrained(space, spaces.Unconstrained(drawn)))


def fit_folds(
    data: NetworkData, hyperparams: base.HyperParams, settings: dict[str, Any], programs: str | None
) -> list[FoldResult]:
    """Trains a network on all folds and predicts the validation rows, usually in the process of networks.

    Args:
      data: the rows.
      hyperparams: g's λ for the table.
      settings: "num_refined", the number of hypergradient steps, or else "draw", the number for `draw`. Optional:
        "num_steps".
      programs: the folder of JAX's persistent compilation cache, or None.

    Returns:
      The result of each fold.

    Raises:
      FloatingPointError: if predictions are not finite.
    """
    start = time.perf_counter()
    with _cache.compilation_cache(programs):
        if settings.get("num_refined"):
            validated = [i for i, rows in enumerate(data.valid) if len(rows.y)]
            select = lambda part: [part[i] for i in validated]
            parts = select(data.train), select(data.train_labels), select(data.valid), select(data.valid_labels)
            hyperparams = refined(*parts, data.num_labels, hyperparams, settings["num_refined"], data.seed)
        else:
            hyperparams = draw(hyperparams, settings["draw"], data.seed)
        bins = None if data.classes is not None else data.train_labels
        models = fit_networks(data.train, bins, data.num_labels, hyperparams, settings, data.seed)
    seconds = (time.perf_counter() - start) / len(models)
    results = []
    for i, (model, rows) in enumerate(zip(models, data.valid, strict=True)):
        begin = time.perf_counter()
        predicted = predict(model, rows.x)
        if not np.isfinite(predicted).all():
            raise FloatingPointError("its predictions are not finite")
        predicted = predicted if data.classes is None else predicted[:, data.classes[i]]
        results.append(FoldResult(model, predicted, seconds, time.perf_counter() - begin))
    return results


def fit_networks(
    folds: list[FoldRows],
    bins: list[np.ndarray] | None,
    num_classes: int,
    hyperparams: base.HyperParams,
    settings,
    seed,
) -> list[NetworkModel]:
    """Trains one network per fold; all folds are one compiled program.

    Args:
      folds: the training rows of each fold.
      bins: for regression, one array [n] per fold: the interval of each row's target. The network then predicts the
        probability of each interval. Its prediction is the mean of the intervals' mean targets under these
        probabilities. None for classification.
      num_classes: C for classification, the number of intervals for regression.
      hyperparams: λ.
      settings: a mapping; its "num_steps" replaces the default of 100 training steps.
      seed: the seed of the training runs.

    Returns:
      One model per fold.
    """
    labels = [fold.y for fold in folds] if bins is None else bins
    data = [_padded(fold, y, folds, num_classes) for fold, y in zip(folds, labels, strict=True)]
    stacked = {name: np.stack([part[name] for part in data]) for name in data[0]}
    keys = jax.random.split(jax.random.key(seed), len(folds))
    trained = _train(settings.get("num_steps", 100), _shapes(stacked))(keys, hyperparams, stacked)
    params = jax.device_get(trained)
    scales = {name: float(hyperparams[name]) for name in _SCALES}
    models = []
    for i, (fold, y) in enumerate(zip(folds, labels, strict=True)):
        own = {name: np.asarray(value[i]) for name, value in params.items()}
        centers = None if bins is None else _centers(fold, y, num_classes)
        models.append(NetworkModel(_without_padding(own, fold.x.shape[1], num_classes), scales, centers))
    return models


def refined(
    folds: list[FoldRows],
    labels: list[np.ndarray],
    valid: list[FoldRows],
    valid_labels: list[np.ndarray],
    num_classes: int,
    hyperparams: base.HyperParams,
    num_steps: int,
    seed: int,
) -> base.HyperParams:
    """λ after a few hypergradient steps on the mean validation loss of the folds.

    Args:
      folds: the training rows of each fold.
      labels: their classes, or intervals.
      valid: the validation rows of each fold.
      valid_labels: their classes, or intervals.
      num_classes: the number of classes or intervals.
      hyperparams: the λ before the first step.
      num_steps: the number of steps of Adam with rate .1.
      seed: the seed of the runs.

    Returns:
      The visited λ with the smallest loss.
    """
    parts = [
        [_padded(fold, y, group, num_classes) for fold, y in zip(group, ys, strict=True)]
        for group, ys in ((folds, labels), (valid, valid_labels))
    ]
    train_rows, valid_rows = ({name: np.stack([part[name] for part in group]) for name in group[0]} for group in parts)
    refine = _refine(num_steps, _shapes(train_rows) + _shapes(valid_rows))
    result = refine(jax.random.key(seed), hyperparams, base.Task(train_rows, valid_rows))
    return jax.device_get(result.hyperparams)


# Only the programs of the last few shapes are kept. Each program occupies some memory maps, and Linux allows 65,530
# maps per process. When the programs of all shapes were kept, the fits of about 25 tables in one process used them up.
_kept = functools.lru_cache(maxsize=6)


@_kept
def _refine(num_steps: int, shapes: tuple):
    del shapes
    network = tabular_network()
    estimator = hypergrad.unrolled(spaces.constrain(network.problem, network.space), num_steps=network.num_steps)
    tune = training.fine_tune(
        hypergrad.over_tasks(estimator),
        num_steps=num_steps,
        optimizer=optax.adam(0.1),
        space=network.space,
        same_key=True,
    )
    # With level 1, the compilation takes about half the time, and the program runs as fast as with level 3.
    return jax.jit(tune, compiler_options={"xla_backend_optimization_level": 1})


def predict(model: NetworkModel, x: np.ndarray) -> np.ndarray:
    """Returns probabilities, as `TabularNetwork.log_probabilities` does, or the expected target for regression.

    It uses NumPy, which needs no compilation.

    Args:
      model: the model of one fold.
      x: [n, D] dense rows.

    Returns:
      [n, C] probabilities, or [n] numbers for regression.
    """
    params, scales = model.params, model.scales
    x = np.asarray(x, np.float32)
    hinges = [scales["hinge_scale"] * np.maximum(x - c, 0) for c in HINGES]
    additive = np.concatenate([x, *hinges], axis=1) @ params["linear"]
    activations = np.maximum(scales["hidden_scale"] * (x @ params["hidden"]) + params["bias"], 0)
    num_members, num_hidden, _ = params["output"].shape
    activations = activations.reshape(len(x), num_members, num_hidden)
    logits = scales["output_scale"] * np.einsum("nmh,mhc->mnc", activations, params["output"])
    logits = logits + params["output_bias"][:, None] + scales["linear_scale"] * additive
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = (p / p.sum(axis=-1, keepdims=True)).mean(axis=0).astype(np.float64)
    return p if model.centers is None else p @ model.centers


_SCALES = ("hinge_scale", "hidden_scale", "output_scale", "linear_scale")


@_kept
def _train(num_steps: int, shapes: tuple):
    del shapes
    network = tabular_network(num_steps=num_steps)

    def run(key, hyperparams, data):
        return train(network, key, hyperparams, base.Task(data, data))

    return jax.jit(jax.vmap(run, in_axes=(0, None, 0)))


def _shapes(data: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(value.shape for value in data.values())


def _padded(fold: FoldRows, y: np.ndarray, folds: list[FoldRows], num_classes: int) -> dict[str, Any]:
    """The data of a task, repeated by weight and padded to a shape that many tables share."""
    rows = repeated(fold.weight)
    longest = max(len(repeated(other.weight)) for other in folds)
    size = max(64, 2 ** int(np.ceil(np.log2(longest))))
    widest = max(other.x.shape[1] for other in folds)
    width = next(w for w in (*WIDTHS, widest) if w >= widest)
    classes = num_classes if num_classes < 4 else -(-num_classes // 4) * 4
    x, labels = np.zeros((size, width), np.float32), np.zeros(size, np.int32)
    x[: len(rows), : fold.x.shape[1]], labels[: len(rows)] = fold.x[rows], y[rows]
    return {
        "x": x,
        "y": labels,
        "mask": (np.arange(size) < len(rows)).astype(np.float32),
        "feature_mask": (np.arange(width) < fold.x.shape[1]).astype(np.float32),
        "class_mask": (np.arange(classes) < num_classes).astype(np.float32),
        "num_features": np.float32(max(1, fold.x.shape[1])),
        "num_rows": np.int32(len(rows)),
    }


def _without_padding(params: dict[str, np.ndarray], num_features: int, num_classes: int) -> dict[str, np.ndarray]:
    width = params["hidden"].shape[0]
    linear = params["linear"].reshape(1 + len(HINGES), width, -1)[:, :num_features, :num_classes]
    return {
        "hidden": params["hidden"][:num_features],
        "bias": params["bias"],
        "output": params["output"][..., :num_classes],
        "output_bias": params["output_bias"][:, :num_classes],
        "linear": linear.reshape(-1, num_classes),
    }


def _centers(fold: FoldRows, y: np.ndarray, num: int) -> np.ndarray:
    """The weighted mean target of each interval. An interval without rows gets the mean target of all rows."""
    weight = np.bincount(y, fold.weight, minlength=num)
    total = np.bincount(y, fold.weight * fold.y, minlength=num)
    overall = np.average(fold.y, weights=fold.weight)
    return np.where(weight > 0, total / np.maximum(weight, 1e-300), overall)

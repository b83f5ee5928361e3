"""The algorithm behind `AutoClassifier` and `AutoRegressor`: folds, members, weights and calibration."""

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _progress
from metaopt.automl import _ensemble, _kinds, _network_folds, _schedule
from metaopt.automl._ensemble import Target
from metaopt.automl._inputs import Inputs, apply_inputs, fit_inputs, intervals
from metaopt.automl._kinds import FoldData
from metaopt.automl._portfolio import Member
from metaopt.automl._rows import Split, TrainingRows, repeated, split_rows
from metaopt.automl._time_model import TimeModel

# A prediction changes settings of warnings and of thread pools for the whole process. If two threads predicted at a
# time, they could restore these settings in the wrong order.
_PREDICTING = threading.Lock()


class FittedMember(NamedTuple):
    """A member with one model per fold, its out-of-fold score, its weight and its cost.

    Attributes:
      member: name, kind and settings.
      models: one per fold. If the rows have times, only the model of all rows.
      score: out of fold; larger is better.
      weight: the weight in the ensemble.
      fit_seconds: the seconds to fit all folds.
      predict_seconds: the seconds to predict the validation rows of all folds.
    """

    member: Member
    models: list[Any]
    score: float
    weight: float
    fit_seconds: float
    predict_seconds: float


class FittedEnsemble(NamedTuple):
    """The result of `fit_ensemble`.

    Attributes:
      inputs: the inputs of each fold. If the rows have times, only those of all rows.
      classes: for each fold, the classes that its training rows have; empty for regression.
      members: all fitted members, by decreasing score. Models of members without weight are dropped.
      failed: name -> reason, of members that were not fitted.
      temperature: the temperature of the calibration, 1 for regression.
      out_of_fold: the calibrated prediction of each row, NaN for rows that were not validated.
      num_classes: C, or 0.
      score: the score of `out_of_fold`.
    """

    inputs: list[Inputs]
    classes: list[np.ndarray]
    members: list[FittedMember]
    failed: dict[str, str]
    temperature: float
    out_of_fold: np.ndarray
    num_classes: int
    score: float


class Options(NamedTuple):
    """Settings of a fit; see `AutoClassifier`."""

    metric: str
    clock: _schedule.Clock
    num_jobs: int
    seed: int
    verbose: bool | None


class Columns(NamedTuple):
    """Which columns [d] of x are categorical, and which of these have many levels."""

    categorical: np.ndarray
    high_cardinality: np.ndarray


class _Fold(NamedTuple):
    """A split with its fitted inputs; `data` is for all kinds but the network."""

    split: Split
    inputs: Inputs
    classes: np.ndarray
    data: FoldData


def fit_ensemble(
    rows: TrainingRows, columns: Columns, num_classes: int, members: list[Member], options: Options
) -> FittedEnsemble:
    """Fits members on folds, and weights and calibrates them by their out-of-fold predictions.

    Args:
      rows: the rows, from `sorted_rows`.
      columns: the columns of x.
      num_classes: C, or 0 for regression.
      members: the portfolio.
      options: see `Options`.

    Returns:
      A `FittedEnsemble`.

    Raises:
      RuntimeError: if no member could be fitted.
    """
    splits = split_rows(rows, num_classes, options.seed)
    scored = _validated(rows, splits)
    stops = min(len(split.valid) for split in splits) >= _kinds.LEAST_TO_STOP
    if rows.time is not None:  # add models of all rows, which predict new rows
        splits = [*splits, Split(np.arange(len(rows.y)), np.zeros(0, int))]
    seeds = range(options.seed, options.seed + len(splits))
    folds = [_prepare_fold(rows, columns, num_classes, stops, *part) for part in zip(splits, seeds, strict=True)]
    num_rows = max(len(split.train) for split in splits)
    views = folds[0].data.views
    times = TimeModel(num_rows, views.trees.shape[1], num_classes, views.dense.shape[1])
    work = _schedule.Work(
        folds=[fold.data for fold in folds],
        network_task=_network_task(rows, columns, num_classes, folds, options.seed),
        times=times,
        clock=options.clock,
        reserve=0.0 if options.clock.limit is None else 0.02 * options.clock.limit + 0.2,
        num_jobs=options.num_jobs,
    )
    target = Target(rows.y[scored], rows.weight[scored])
    limit, name = options.clock.left(), _ensemble.score_name(options.metric)
    with _progress.report_progress(
        len(members), options.verbose, "{best}", unit="model", time_limit=limit, best=""
    ) as report:
        scores: dict[str, float] = {}

        def finished(result: _schedule.MemberResult, count: int) -> None:
            scores[result.member.name] = _ensemble.score(
                options.metric, _joined(result, rows, folds, num_classes)[scored], target
            )
            best = max(scores, key=scores.__getitem__)
            report(count, best=f"best model {best}, score {scores[best]:.4g} ({name})")

        results, failed = _schedule.fit_members(members, work, finished)
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RuntimeError(f"No model was fitted ({reasons}). Raise `time_limit`, or pass other `models`.")
    return _combine(results, failed, rows, folds, scored, scores, num_classes, options)


def predict_ensemble(fitted: FittedEnsemble, x: np.ndarray) -> np.ndarray:
    """Predicts rows: the weighted mean over members of the means over folds, calibrated.

    Calls of several threads run one after another.

    Args:
      fitted: the result of `fit_ensemble`.
      x: [n, d].

    Returns:
      [n, C] probabilities, or [n] numbers.
    """
    shape = (len(x), fitted.num_classes) if fitted.num_classes else (len(x),)
    total = np.zeros(shape)
    with _PREDICTING:
        for i, inputs in enumerate(fitted.inputs):
            views = apply_inputs(inputs, x)
            for member in fitted.members:
                if member.weight:
                    predicted = _predict_model(member.member.kind, member.models[i], views, fitted.classes[i])
                    total += member.weight * _all_classes(predicted, fitted.classes[i], fitted.num_classes)
    mean = total / len(fitted.inputs)
    if not fitted.num_classes:
        return mean
    return _ensemble.smoothed(_ensemble.tempered(mean, fitted.temperature), len(fitted.out_of_fold))


def num_jobs(value: int | None) -> int:
    """The number of fits at a time: −1 and None mean one per usable core, as in joblib."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if value is None or value == -1:
        return cores
    if value < -1:
        return max(1, cores + 1 + value)
    return max(1, value)


# --- folds ---


def _prepare_fold(
    rows: TrainingRows, columns: Columns, num_classes: int, stops: bool, split: Split, seed: int
) -> _Fold:
    train, valid = split
    y, weight = rows.y[train], rows.weight[train]
    classes = np.unique(y) if num_classes else np.zeros(0, int)
    units = (rows.copies if rows.groups is None else rows.groups)[train]
    inputs, views = fit_inputs(rows.x[train], y, *columns, repeated(weight), num_classes, seed, units)
    valid_views = apply_inputs(inputs, rows.x[valid])
    valid_y, valid_weight, class_in_training = rows.y[valid], rows.weight[valid], np.ones(len(valid), bool)
    if num_classes:
        class_in_training = np.isin(valid_y, classes)
        y, valid_y = np.searchsorted(classes, y), np.searchsorted(classes, valid_y)
    categorical = np.zeros(views.trees.shape[1], bool)
    categorical[: len(inputs.kept)] = columns.categorical[inputs.kept]
    if not class_in_training.all():  # boosting ignores rows of other classes when it stops, but predicts them
        valid_y = np.where(class_in_training, valid_y, 0)
        valid_weight = np.where(class_in_training, valid_weight, 0.0)
    weight = weight / weight.mean()
    data = FoldData(views, y, weight, valid_views, valid_y, valid_weight, categorical, len(classes), seed, stops=stops)
    return _Fold(split, inputs, classes, data)


def _network_task(rows, columns, num_classes, folds, seed) -> Callable[[dict[str, Any]], tuple]:
    """A function `(settings) -> (function, *arguments)` for `Work`; g predicts λ at its first call, in this process."""
    cache: dict[str, Any] = {}
    labels = rows.y if num_classes else intervals(rows.y)
    data = _network_folds.NetworkData(
        train=[_network_rows(fold.data.views.dense, rows, fold.split.train) for fold in folds],
        train_labels=[labels[fold.split.train] for fold in folds],
        valid=[_network_rows(fold.data.valid_views.dense, rows, fold.split.valid) for fold in folds],
        valid_labels=[labels[fold.split.valid] for fold in folds],
        num_labels=num_classes or int(labels.max()) + 1,
        classes=[fold.classes for fold in folds] if num_classes else None,
        seed=seed,
    )

    def task(settings: dict[str, Any]) -> tuple:
        if not cache:
            import threadpoolctl

            with threadpoolctl.threadpool_limits(1):
                cache["hyperparams"] = _network_folds.predicted_hyperparams(
                    rows.x, rows.y, columns.categorical, rows.weight, num_classes, seed
                )
        programs = jax.config.jax_compilation_cache_dir
        return _network_folds.fit_folds, data, cache["hyperparams"], settings, programs

    return task


def _network_rows(dense: np.ndarray, rows: TrainingRows, index: np.ndarray) -> _network_folds.FoldRows:
    return _network_folds.FoldRows(dense, rows.y[index], rows.weight[index])


def _predict_model(kind: str, model: Any, views, classes: np.ndarray) -> np.ndarray:
    if kind != "network":
        return _kinds.predict(kind, model, views, len(classes))
    predicted = _network_folds.predict(model, views.dense)
    return predicted[:, classes] if len(classes) else predicted


def _all_classes(predicted: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Adds a column of zeros for each class that a fold lacks."""
    if not num_classes or len(classes) == num_classes:
        return predicted
    full = np.zeros((len(predicted), num_classes))
    full[:, classes] = predicted
    return full


# --- from members to an ensemble ---


def _validated(rows: TrainingRows, splits: list[Split]) -> np.ndarray:
    """Positions of the rows that have out-of-fold predictions."""
    return np.unique(np.concatenate([split.valid for split in splits]))


def _joined(result: _schedule.MemberResult, rows: TrainingRows, folds: list[_Fold], num_classes: int) -> np.ndarray:
    """The out-of-fold predictions of a member, NaN for rows that were not validated."""
    joined = np.full((len(rows.y), num_classes) if num_classes else (len(rows.y),), np.nan)
    for fold, part in zip(folds, result.folds, strict=True):
        joined[fold.split.valid] = _all_classes(part.predicted, fold.classes, num_classes)
    return joined


def _combine(results, failed, rows, folds, scored, scores, num_classes, options) -> FittedEnsemble:
    target = Target(rows.y[scored], rows.weight[scored])
    predictions = [_joined(result, rows, folds, num_classes) for result in results]
    max_members = _ensemble.max_members(len(rows.y))
    validated = [predicted[scored] for predicted in predictions]
    is_late = lambda: options.clock.left() < 0
    weights = _ensemble.greedy_weights(validated, target, options.metric, max_members, is_late)
    mean = np.tensordot(weights, np.stack(predictions), 1)
    temperature = _ensemble.fit_temperature(mean[scored], target) if num_classes else 1.0
    calibrated = _ensemble.smoothed(_ensemble.tempered(mean, temperature), len(rows.y)) if num_classes else mean
    kept = slice(-1 if rows.time is not None else None, None)  # with time, only the models of all rows
    members = [
        FittedMember(
            result.member,
            [part.model for part in result.folds[kept]] if weight else [],
            scores[result.member.name],
            float(weight),
            sum(part.fit_seconds for part in result.folds),
            sum(part.predict_seconds for part in result.folds),
        )
        for result, weight in zip(results, weights, strict=True)
    ]
    members.sort(key=lambda member: -member.score)
    return FittedEnsemble(
        [fold.inputs for fold in folds[kept]],
        [fold.classes for fold in folds[kept]],
        members,
        failed,
        temperature,
        calibrated,
        num_classes,
        _ensemble.score(options.metric, calibrated[scored], target),
    )

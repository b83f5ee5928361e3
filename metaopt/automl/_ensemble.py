"""Weights of an ensemble, its calibration, and conformal prediction, all from out-of-fold predictions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LOWEST = 1e-7  # a probability in a log loss
NUM_STEPS = 40

METRICS = {
    "classification": ("log_loss", "accuracy", "balanced_accuracy", "roc_auc"),
    "regression": ("rmse", "mae", "r2"),
}


_SIGNED = {
    "log_loss": "minus log_loss",
    "rmse": "minus rmse, in standard deviations of the target",
    "mae": "minus mae, in standard deviations of the target",
}


def score_name(metric: str) -> str:
    """Describes the score by a metric: its name, and for losses their sign and unit."""
    return _SIGNED.get(metric, metric)


class Target(NamedTuple):
    """Targets of the rows with out-of-fold predictions: y [n] and weights [n]."""

    y: np.ndarray
    weight: np.ndarray


def score(metric: str, predicted: np.ndarray, target: Target) -> float:
    """The value of a metric, where larger is better: losses have a minus sign.

    Args:
      metric: one of `METRICS`.
      predicted: [n, C] probabilities, or [n] numbers.
      target: the target of the same rows.
    """
    from sklearn import metrics

    y, weight = target
    if metric == "log_loss":
        return -float(np.average(-np.log(np.maximum(predicted[np.arange(len(y)), y], LOWEST)), weights=weight))
    if metric in ("rmse", "mae"):
        error = np.abs(predicted - y)
        return -float(np.average(error, weights=weight) if metric == "mae" else _root(error**2, weight))
    if metric == "r2":
        if len(y) == 1:  # no deviation: scikit-learn returns NaN here, and 0 or 1 for equal numbers
            return float(predicted[0] == y[0])
        return float(metrics.r2_score(y, predicted, sample_weight=weight))
    if metric == "roc_auc":
        return _roc_auc(predicted, target)
    label = predicted.argmax(axis=1)
    if metric == "accuracy":
        return float(np.average(label == y, weights=weight))
    recalls = [np.average(label[y == c] == c, weights=weight[y == c]) for c in np.unique(y)]
    return float(np.mean(recalls))


def greedy_weights(
    predictions: list[np.ndarray],
    target: Target,
    metric: str,
    max_members: int,
    is_late: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Weights of an ensemble by greedy selection with replacement.

    Each of 40 steps adds the member that improves the mean of the selected predictions most. The weights are the shares
    of the members in the best prefix of the steps. Among prefixes with equal scores, the one with fewer members wins.

    Args:
      predictions: M arrays, [n, C] or [n].
      target: the target of the same rows.
      metric: one of `METRICS`.
      max_members: the largest number of different members.
      is_late: `() -> bool`, whether no further step may begin. The first step always takes place.

    Returns:
      [M] float64, with sum 1.

    Source: Caruana et al., "Ensemble selection from libraries of models", ICML 2004.
    """
    total = np.zeros_like(predictions[0])
    counts = np.zeros(len(predictions))
    best, best_counts = -math.inf, counts
    for step in range(1, NUM_STEPS + 1):
        allowed = np.flatnonzero(counts) if (counts > 0).sum() >= max_members else np.arange(len(predictions))
        # Members that are selected already come first, so that they win ties.
        allowed = sorted(allowed.tolist(), key=lambda m: counts[m] == 0)
        scores = [score(metric, (total + predictions[m]) / step, target) for m in allowed]
        chosen = allowed[int(np.argmax(scores))]
        counts = counts.copy()
        counts[chosen] += 1
        total = total + predictions[chosen]
        value = max(scores)
        num, best_num = (counts > 0).sum(), (best_counts > 0).sum()
        if value > best + 1e-9 or (value > best - 1e-9 and num < best_num):
            best, best_counts = value, counts
        if is_late():
            break
    return best_counts / best_counts.sum()


def max_members(num_rows: int) -> int:
    """The largest number of members: 4 up to 100 rows, 15 at 2,500, linear in log n; at most 25."""
    return int(np.clip(round(4 + 11 * math.log(num_rows / 100) / math.log(25)), 4, 25))


def fit_temperature(probabilities: np.ndarray, target: Target) -> float:
    """T ∈ [1/4, 4] that minimizes the log loss of p^(1/T) / Σ p^(1/T), with the prior log T ~ N(0, 1/16).

    Without the prior, a few dozen rows that are all predicted correctly would make all probabilities 0 or 1.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, https://arxiv.org/abs/1706.04599
    """
    from scipy import optimize

    def loss(log_t):
        return -score("log_loss", tempered(probabilities, math.exp(log_t)), target) + 8 * log_t**2 / len(target.y)

    result = optimize.minimize_scalar(loss, bounds=(-math.log(4), math.log(4)), method="bounded")
    return math.exp(result.x) if result.fun < loss(0.0) else 1.0


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """p^(1/T), normalized over the last axis."""
    log_p = np.log(np.maximum(probabilities, LOWEST)) / temperature
    p = np.exp(log_p - log_p.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def smoothed(probabilities: np.ndarray, num_rows: int) -> np.ndarray:
    """(1 − ε) p + ε / C with ε = 1 / (n + 1): one wrong prediction among n + 1 is always possible."""
    weight = 1 / (num_rows + 1)
    return (1 - weight) * probabilities + weight / probabilities.shape[-1]


def conformal_threshold(scores: np.ndarray, weight: np.ndarray, coverage: float) -> float:
    """The smallest q with Σ weight [score ≤ q] ≥ coverage (Σ weight + mean weight), or infinity if there is none.

    With equal weights it is the ⌈(n + 1) coverage⌉-th smallest of n nonconformity scores. The new row is assumed to
    have the mean weight.

    Source: Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005; with weights, Tibshirani et al.,
    "Conformal prediction under covariate shift", NeurIPS 2019, https://arxiv.org/abs/1904.06222
    """
    order = np.argsort(scores)
    share = np.cumsum(weight[order]) / weight.mean()
    place = int(np.searchsorted(share, coverage * (len(scores) + 1) * (1 - 1e-12)))
    return float(scores[order[place]]) if place < len(scores) else math.inf


def _root(square: np.ndarray, weight: np.ndarray) -> float:
    return math.sqrt(np.average(square, weights=weight))


def _roc_auc(predicted: np.ndarray, target: Target) -> float:
    """Area under the curve. With more than two classes, the mean of the areas of each class against the others.

    The mean is over the classes that occur.
    """
    from sklearn import metrics

    y, weight = target
    classes = [c for c in np.unique(y) if (y != c).any()]
    if predicted.shape[1] == 2:
        classes = classes[-1:]
    areas = [metrics.roc_auc_score(y == c, predicted[:, c], sample_weight=weight) for c in classes]
    return float(np.mean(areas)) if areas else 0.5

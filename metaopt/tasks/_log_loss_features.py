"""The group "log_loss" of `metafeatures`: how well simple learners predict the classes, by their log loss.

Accuracies (the group "landmarking") do not show how much a learner has to be regularized. The differences between
three strengths of the same penalty do.
"""

import math
import warnings

import numpy as np

from metaopt import _extras

_MAX_ROWS = 600
_NUM_FOLDS = 3
_NUM_NEIGHBORS = 15
_PENALTIES = {"ridge_strong": 0.003, "ridge_medium": 0.1, "ridge_weak": 3.0}  # C of scikit-learn: 1 / penalty
_LEAST_PROBABILITY = 1e-4
_LEAST_PRIOR_LOSS = 0.02  # gains are divided by at least this: the prior's loss is near 0 if one class is very frequent


def log_loss_features(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, float]:
    """Returns the features of a table with encoded columns x [n, D] and classes y [n] in {0, …, K − 1}, all present."""
    shuffled = np.random.default_rng(seed).permutation(len(y))[:_MAX_ROWS]
    losses = _cross_validated_losses(x[shuffled].astype(np.float64), y[shuffled], int(y.max()) + 1)
    prior = losses.pop("prior")
    gain = {k: float(np.clip(1.0 - loss / max(prior, _LEAST_PRIOR_LOSS), -2.0, 1.0)) for k, loss in losses.items()}
    num_columns = max(x.shape[1], 1)
    values = {
        "prior": prior,
        **gain,
        "medium_gain": gain["ridge_medium"] - gain["ridge_strong"],
        "weak_gain": gain["ridge_weak"] - gain["ridge_medium"],
        "neighbors_gain": gain["neighbors"] - max(gain[name] for name in _PENALTIES),
        "best": max(gain.values()),
        "log_columns": math.log(num_columns),
        "log_rows": math.log(len(y)),
        "log_minority": math.log(np.bincount(y).min()),
        "log_rows_per_column": math.log(len(y) / num_columns),
    }
    return {f"log_loss.{name}": value for name, value in values.items()}


def _cross_validated_losses(x: np.ndarray, y: np.ndarray, num_classes: int) -> dict[str, float]:
    """Returns the mean log loss over all rows, each predicted by learners that were trained without its fold.

    The rows must be in random order. They are not sorted by class, because ties between neighbors at equal distances
    are decided by this order.
    """
    _extras.require("sklearn", "examples", 'The group "log_loss" of meta-features')
    from threadpoolctl import threadpool_limits  # scikit-learn needs it too

    x = x[:, np.ptp(x, axis=0) > 0]
    fold = np.empty(len(y), int)
    fold[np.argsort(y, kind="stable")] = np.arange(len(y)) % min(_NUM_FOLDS, len(y))  # stratified
    losses: dict[str, np.ndarray] = {}
    with threadpool_limits(1), warnings.catch_warnings():  # here, threads cost more than they save
        warnings.simplefilter("ignore")  # learners that did not converge in 60 steps
        for k in range(fold.max() + 1):
            train, test = fold != k, fold == k
            for name, probability in _probabilities(x[train], y[train], x[test], num_classes).items():
                floored = np.maximum(probability, _LEAST_PROBABILITY)
                true_probability = floored[np.arange(len(floored)), y[test]] / floored.sum(axis=1)
                losses.setdefault(name, np.empty(len(y)))[test] = -np.log(true_probability)
    return {name: float(row_losses.mean()) for name, row_losses in losses.items()}


def _probabilities(x: np.ndarray, y: np.ndarray, new_x: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Returns [len(new_x), K] probabilities of each learner.

    With fewer than two classes, or without columns, all learners get the probabilities of the prior.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    shares = (np.bincount(y, minlength=num_classes) + 0.5) / (len(y) + 0.5 * num_classes)
    prior = np.tile(shares, (len(new_x), 1))
    classes = np.unique(y)
    if len(classes) < 2 or not x.shape[1]:
        return dict.fromkeys(("prior", *_PENALTIES, "neighbors"), prior)

    def predict(learner):
        probability = np.zeros_like(prior)
        probability[:, classes] = learner.fit(x, y).predict_proba(new_x)
        return probability

    num = min(_NUM_NEIGHBORS, len(y))
    neighbors = predict(KNeighborsClassifier(num, algorithm="brute"))
    ridges = {name: predict(LogisticRegression(C=c, max_iter=60, tol=1e-3)) for name, c in _PENALTIES.items()}
    return {"prior": prior, **ridges, "neighbors": (num * neighbors + 2.0 * prior) / (num + 2.0)}

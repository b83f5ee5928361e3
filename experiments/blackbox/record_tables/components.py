"""The first trial by features: Gaussian processes predict principal components of the tasks' regrets.

The regrets [S, C] of the earlier tasks have the mean m over tasks, and a few directions v_j in which tasks differ. A
Gaussian process predicts each component from a task's ranked features, with mean μ_j. Its length scale and noise are
those with the smallest error on families that are left out. If the features do not reduce this error, the component
stays at its mean. So a new task has the expected regrets m + Σ_j μ_j v_j. The best configuration c₀ on average is
replaced only if this is supported:

    the largest E[f(c₀) − f(c)] − κ sd[f(c₀) − f(c)],    0 for c₀

The variance is the sum of the posterior variances of the components and of the variance of the mean over tasks. κ = 1
was chosen on families of folds 0 to 2 only.
"""

from typing import NamedTuple

import numpy as np

from experiments.blackbox.record_tables.tables import Records
from metaopt.blackbox import _surrogates

NUM_COMPONENTS = 8
LENGTHS, RIDGES = (0.5, 1.0, 2.0, 4.0), (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of ranked features; noise over signal
CONSTANT = 100.0  # the variance of the constant of a process, over that of its signal
DEVIATIONS = (0.0, 1.0)  # κ


class Expected(NamedTuple):
    """Expected regrets on n new tasks, with C configurations and P components.

    Attributes:
      average: [C] the mean regret over earlier tasks.
      directions: [P, C].
      mean: [n, P] the expected components.
      variance: [n, P] their variances.
      deviations: [S, C] the regrets of earlier tasks minus their mean.
    """

    average: np.ndarray
    directions: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    deviations: np.ndarray


def kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """Returns a squared exponential of features [n, F] and [m, F], and a constant."""
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0) / a.shape[1]
    return np.exp(-square / (2 * length**2)) + CONSTANT


def left_out(gram: np.ndarray, ridge: float, values: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Returns the predictions [S, P] of values [S, P], each without its family, in closed form."""
    hat = gram @ np.linalg.inv(gram + ridge * np.eye(len(gram)))
    fitted, predictions = hat @ values, np.empty_like(values)
    for name in np.unique(family):
        rows = np.flatnonzero(family == name)
        rest = np.linalg.solve(np.eye(len(rows)) - hat[np.ix_(rows, rows)], values[rows] - fitted[rows])
        predictions[rows] = values[rows] - rest
    return predictions


def expect(regret: np.ndarray, features: np.ndarray, family: np.ndarray, new: np.ndarray) -> Expected:
    """Learns from regrets [S, C], NaN where a configuration failed, and ranked features [S, F]; `new` is [n, F]."""
    average = np.nan_to_num(np.nanmean(regret, 0), nan=1.0)
    filled = np.where(np.isnan(regret), average, regret)
    deviations = filled - filled.mean(0)
    directions = np.linalg.svd(deviations, full_matrices=False)[2][:NUM_COMPONENTS]
    values = deviations @ directions.T
    error = lambda gram, ridge: ((values - left_out(gram, ridge, values, family)) ** 2).sum(0)
    smallest = error(np.zeros((len(values), len(values))) + CONSTANT, 1e-3)  # without features
    chosen: list[tuple[float, float] | None] = [None] * len(directions)
    for length in LENGTHS:
        gram = kernel(features, features, length)
        for ridge in RIDGES:
            errors = error(gram, ridge)
            for j in np.flatnonzero(errors < smallest):
                smallest[j], chosen[j] = errors[j], (length, ridge)
    mean, variance = np.zeros((2, len(new), len(directions)))
    for j, choice in enumerate(chosen):
        if choice is not None:
            length, ridge = choice
            inverse = np.linalg.inv(kernel(features, features, length) + ridge * np.eye(len(features)))
            between = kernel(new, features, length)
            signal = values[:, j] @ inverse @ values[:, j] / len(values)  # the largest likelihood
            mean[:, j] = between @ inverse @ values[:, j]
            variance[:, j] = signal * np.maximum(1 + CONSTANT - ((between @ inverse) * between).sum(1), 0)
    return Expected(average, directions, mean, variance, deviations)


def choose(expected: Expected, task: int, open_: np.ndarray, num_deviations: float) -> int:
    """Returns the configuration for a new task: the best on average, unless another one is supported.

    `open_` [C] are the configurations that may be chosen.
    """
    average, directions, mean, variance, deviations = expected
    best = int(np.where(open_, average, np.inf).argmin())
    regret = average + mean[task] @ directions
    apart = (directions - directions[:, [best]]) ** 2
    of_average = ((deviations - deviations[:, [best]]) ** 2).mean(0) / len(deviations)
    gain = regret[best] - regret - num_deviations * np.sqrt(variance[task] @ apart + of_average)
    gain[best] = 0
    return int(np.where(open_, gain, -np.inf).argmax())


def by_components(data: Records, folds: np.ndarray | None = None) -> dict[float, np.ndarray]:
    """Returns κ -> [T] regrets of the first trial. Each fold is predicted from the others."""
    folds = data.fold if folds is None else folds
    first = {num: np.zeros(len(folds)) for num in DEVIATIONS}
    for fold in np.unique(folds):
        train, test = folds != fold, np.flatnonzero(folds == fold)
        ranked = _surrogates.rank_features(np.sort(data.features[train], 0).T, data.features, len(folds))
        expected = expect(data.regret[train], ranked[train], data.family[train], ranked[test])
        for place, t in enumerate(test):
            open_ = np.isfinite(data.regret[t])
            for num, regrets in first.items():
                regrets[t] = data.regret[t, choose(expected, place, open_, num)]
    return first

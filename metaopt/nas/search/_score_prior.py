"""Scores of a finite set of architectures on a new task, predicted in closed form from earlier tasks and trials.

Losses of a task become normal scores, since tasks have different metrics. Scores are linear in features φ(a) of an
architecture, and each task t has its own coefficients c_t. The coefficients c_t' of the new task have a Gaussian prior,
whose mean and covariance come from the T earlier tasks. The features do not explain the whole score of an architecture.
The rest has a part that all tasks share (u), a part of this task only (d), and validation noise (ε):

    score_t(a) = φ(a)·c_t + u_a + d_at + ε,    c_t' ~ N(mean_T c, cov_T c + diag(cov_T c))

The variances of φ's blocks maximize the marginal likelihood of the earlier tasks' scores. The variances of u, d and ε
are computed from mean products of residuals. The residuals of two tasks share only u. The validation and test residuals
of one task share u and d.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_PAIRS = 1_000  # columns for pairs of entries; if there could be more, only single entries get columns


class ScorePrior(NamedTuple):
    """The prior of the scores on a new task, made by `score_prior`. A architectures, T tasks.

    Attributes:
      features: [A, D], φ.
      mean: [A] the expected scores.
      spread: [A, T] the scaled deviations of the earlier tasks' fitted scores from their mean: directions in which
        tasks differ.
      own: [D] additional variances of a new task's coefficients.
      alone: [A] the variance of an architecture's score that the features do not explain.
      noise: the variance of the validation noise.
    """

    features: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    own: np.ndarray
    alone: np.ndarray
    noise: float


def normal_scores(losses: np.ndarray) -> np.ndarray:
    """Standard normal quantiles of ranks, larger is better; equal losses have equal scores.

    Args:
      losses: [A]; infinite ones are the worst.

    Returns:
      [A].
    """
    from scipy.stats import norm, rankdata

    return norm.ppf((len(losses) + 0.5 - rankdata(losses)) / len(losses))


def configuration_columns(
    configurations: Sequence[Mapping[str, Any]], like: Sequence[Mapping[str, Any]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One-hot columns of the entries of configurations, and of all pairs of entries.

    Args:
      configurations: A configurations; a missing entry counts as a separate value.
      like: the configurations whose values, and pairs of values, have a column; `configurations` by default.

    Returns:
      [A, D] and [A, P] of 0 and 1; P is 0 if there could be more than `MAX_PAIRS` pairs of values.
    """
    like = configurations if like is None else like
    names = list(dict.fromkeys(name for c in like for name in c))
    values = {name: list(dict.fromkeys(c.get(name) for c in like)) for name in names}

    def columns(rows):
        return [np.array([[c.get(name) == v for v in values[name]] for c in rows], bool) for name in names]

    def pairs_of(digits):
        return [(a[:, :, None] & b[:, None, :]).reshape(len(a), -1) for a, b in itertools.combinations(digits, 2)]

    like_columns, own_columns = columns(like), columns(configurations)
    nothing = np.zeros((len(configurations), 0))
    if not names:
        return nothing, nothing
    digits = np.concatenate(own_columns, 1).astype(np.float64)
    if len(names) < 2 or sum(len(values[a]) * len(values[b]) for a, b in itertools.combinations(names, 2)) > MAX_PAIRS:
        return digits, nothing
    present = np.concatenate([pairs.any(0) for pairs in pairs_of(like_columns)])
    return digits, np.concatenate(pairs_of(own_columns), 1)[:, present].astype(np.float64)


def score_prior(
    blocks: Sequence[tuple[np.ndarray, Sequence[float]]], scores: np.ndarray, tests: np.ndarray | None = None
) -> ScorePrior:
    """Fits the prior to earlier tasks.

    Args:
      blocks: pairs of features [A, D_i], which share one variance, and the variances to choose from, relative to the
        noise variance.
      scores: [A, T] `normal_scores` of validation losses, NaN if an architecture was not tried.
      tests: [A, T] `normal_scores` of test losses, NaN if unknown. If None, the residuals that tasks do not share count
        as real differences, not as noise.

    Returns:
      A `ScorePrior` of all A architectures, tried or not. Its time is about the product of three numbers: the
        combinations of variances, the different sets of architectures that tasks tried, and D³. If a set is smaller
        than D, its size cubed replaces D³.
    """
    scores = np.asarray(scores, np.float64)
    tests = scores if tests is None else np.asarray(tests, np.float64)
    features = np.concatenate([block for block, _ in blocks], 1)
    tried, num_tasks = np.isfinite(scores), scores.shape[1]
    coefficients = task_coefficients(blocks, scores)
    fitted = features @ coefficients
    both = tried & np.isfinite(tests)
    rest, rest_test = np.where(tried, scores - fitted, 0.0), np.where(both, tests - fitted, 0.0)
    times = tried.sum(1)  # [A]
    shared, real, total = _residual_variances(rest, rest_test, tried, both)
    trust = shared / np.maximum(shared + (total - shared) / np.maximum(times, 1), 1e-12) * (times > 0)
    mean = coefficients.mean(1)
    deviations = (coefficients - mean[:, None]) / np.sqrt(max(num_tasks - 1, 1))
    return ScorePrior(
        features,
        features @ mean + trust * rest.sum(1) / np.maximum(times, 1),
        features @ deviations,
        (deviations**2).sum(1),
        shared * (1 - trust) + real - shared,
        max(total - real, 1e-6),
    )


def _residual_variances(
    residuals: np.ndarray, test_residuals: np.ndarray, tried: np.ndarray, has_test: np.ndarray
) -> tuple[float, float, float]:
    """The variances of u, of u + d and of u + d + ε, from mean products of residuals.

    Args:
      residuals: [A, T] residuals of the validation scores, 0 where not tried.
      test_residuals: [A, T] residuals of the test scores, 0 where not in `has_test`.
      tried: [A, T] whether an architecture was tried.
      has_test: [A, T] whether it also has a test score.
    """
    times = tried.sum(1)
    total = (residuals**2).sum() / tried.sum()
    # Over pairs of two tasks, Σ_{s ≠ t} r_s r_t = (Σ_t r_t)² − Σ_t r_t²; such residuals share only u.
    shared_moment = (residuals.sum(1) ** 2 - (residuals**2).sum(1)).sum() / max((times * (times - 1)).sum(), 1)
    shared = max(shared_moment, 0.0)
    # The validation and test residuals of one task share u and d.
    noise_free = min(max((residuals * test_residuals).sum() / max(has_test.sum(), 1), shared), total)
    return shared, noise_free, total


def task_coefficients(blocks: Sequence[tuple[np.ndarray, Sequence[float]]], scores: np.ndarray) -> np.ndarray:
    """Fits each task separately, as `score_prior` does: [D, T], the posterior means of each task's coefficients."""
    features = np.concatenate([block for block, _ in blocks], 1)
    groups = _groups(features, scores)
    widths = [block.shape[1] for block, _ in blocks]
    grid = (np.repeat(v, widths) for v in itertools.product(*(grid for _, grid in blocks)))
    variances = max(grid, key=lambda variances: _likelihood(variances, groups))
    coefficients = np.zeros((features.shape[1], scores.shape[1]))
    for group in groups:
        matrix, right = _system(variances, group)
        solution = np.linalg.solve(matrix, right)
        dual = group.gram is None
        weighted = (
            variances[:, None] * (group.features.T @ solution) if dual else np.sqrt(variances)[:, None] * solution
        )
        coefficients[:, group.tasks] = weighted
    return coefficients


class _Group(NamedTuple):
    """Tasks that tried the same n architectures.

    Attributes:
      tasks: indices of the k tasks.
      features: [n, D] Φ of these architectures if n ≤ D, else empty.
      scores: [n, k] y.
      gram: [D, D] ΦᵀΦ if n > D, else None.
      products: [D, k] Φᵀy.
    """

    tasks: list[int]
    features: np.ndarray
    scores: np.ndarray
    gram: np.ndarray | None
    products: np.ndarray


def _groups(features: np.ndarray, scores: np.ndarray) -> list[_Group]:
    """Groups tasks by the architectures that they tried."""
    tried = np.isfinite(scores)
    tasks_of: dict[bytes, list[int]] = {}
    for t in range(scores.shape[1]):
        tasks_of.setdefault(tried[:, t].tobytes(), []).append(t)
    groups = []
    for tasks in tasks_of.values():
        rows = tried[:, tasks[0]]
        phi, y = features[rows], scores[rows][:, tasks]
        many = len(phi) > phi.shape[1]
        groups.append(_Group(tasks, phi[:0] if many else phi, y, phi.T @ phi if many else None, phi.T @ y))
    return groups


def _system(variances: np.ndarray, group: _Group) -> tuple[np.ndarray, np.ndarray]:
    """The smaller one of two matrices with the same determinant, and its right side.

    I + V^½ΦᵀΦV^½ [D, D] with V^½Φᵀy, or I + ΦVΦᵀ [n, n] with y.
    """
    if group.gram is None:
        return np.eye(len(group.scores)) + (group.features * variances) @ group.features.T, group.scores
    scale = np.sqrt(variances)
    return np.eye(len(scale)) + scale[:, None] * group.gram * scale, scale[:, None] * group.products


def _likelihood(variances: np.ndarray, groups: list[_Group]) -> float:
    """log p(scores) up to a constant, summed over tasks; each task's noise variance maximizes it."""
    from scipy.linalg import solve_triangular

    total = 0.0
    for group in groups:
        matrix, right = _system(variances, group)
        factor = np.linalg.cholesky(matrix)
        squares = (solve_triangular(factor, right, lower=True) ** 2).sum(0)
        num = len(group.scores)
        rest = squares if group.gram is None else (group.scores**2).sum(0) - squares  # yᵀ (I + ΦVΦᵀ)⁻¹ y
        total -= (num * np.log(rest.clip(1e-9) / num)).sum() / 2 + right.shape[1] * np.log(np.diag(factor)).sum()
    return float(total)


def score_posterior(prior: ScorePrior, tried: Sequence[int], losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance of all noise-free scores after trials on the new task.

    Only the order of the trials is used. Their normal scores are shifted and scaled to the mean and variance that the
    prior expects within these trials. This variance is tr(H C) / k + var(expected), where C is the covariance of the
    trials and H subtracts the mean. So if the prior expects similar scores, trials change little. A failed trial is
    worse than all others, and at least a standard deviation below its expected score. So even a single failed trial is
    informative.

    Args:
      prior: the prior of the earlier tasks.
      tried: [k] indices of architectures.
      losses: [k] their losses; infinite for a failed trial.

    Returns:
      [A] and [A].
    """
    variance = (prior.spread**2).sum(1) + prior.features**2 @ prior.own + prior.alone
    if not len(tried):
        return prior.mean, variance
    rows = np.asarray(tried)
    covariance = prior.spread @ prior.spread[rows].T  # [A, k]
    covariance += (prior.features * prior.own) @ prior.features[rows].T
    covariance += (np.arange(len(prior.mean))[:, None] == rows) * prior.alone[rows]
    inner = covariance[rows] + prior.noise * np.eye(len(rows))
    expected = prior.mean[rows]
    scores = expected
    if len(rows) > 1:
        order = normal_scores(losses)
        within = np.diag(inner).mean() - inner.mean() + expected.var()
        scores = expected.mean() + np.sqrt(within) * order / max(order.std(), 1e-12)
    scores = np.where(np.isinf(losses), np.minimum(scores, expected - np.sqrt(np.diag(inner))), scores)
    weights = np.linalg.solve(inner, covariance.T).T
    return prior.mean + weights @ (scores - expected), variance - (weights * covariance).sum(1)


def score_improvement(prior: ScorePrior, tried: Sequence[int], losses: np.ndarray) -> np.ndarray:
    """The expected improvement of the score over the best trial that did not fail.

    Args:
      prior: the prior of the earlier tasks.
      tried: [k] indices of architectures.
      losses: [k]; infinite for a failed trial.

    Returns:
      [A]; −∞ for tried architectures. If no trial has succeeded, the value of each other architecture is its expected
        score.
    """
    from scipy.stats import norm

    mean, variance = score_posterior(prior, tried, losses)
    rows = np.asarray(tried, int)
    ended = rows[np.isfinite(losses)]
    gain = mean.copy()
    if len(ended):
        std = np.sqrt(np.maximum(variance, 1e-12))
        z = (mean - mean[ended].max()) / std
        gain = std * (z * norm.cdf(z) + norm.pdf(z))
    gain[rows] = -np.inf
    return gain

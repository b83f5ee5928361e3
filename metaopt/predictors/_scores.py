"""What earlier tasks say of a finite set of architectures, and what trials on a new task change in it: in closed form.

Losses of a task become normal scores, since tasks have different metrics. In features φ(a) a task is a vector of
coefficients with a Gaussian prior that the earlier tasks T make, and what φ does not say of an architecture is partly
its own on every task (u), partly on this one (d), partly noise of validation (ε):

    score_t(a) = φ(a)·c_t + u_a + d_at + ε,    c_t' ~ N(mean_T c, cov_T c + as much again)

The variances of φ's blocks maximize the marginal likelihood of the earlier tasks' scores; those of u, d and ε are
moments of their residuals (of validation and test together: u is what tasks share, d what validation and test share).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_PAIRS = 1_000  # columns of pairs of entries; where there would be more, entries alone


class ScorePrior(NamedTuple):
    """What the earlier tasks say of the scores on a new one; made by `score_prior`. A architectures, T tasks.

    Attributes:
      features: [A, D], φ.
      mean: [A] what is expected.
      spread: [A, T] along which tasks differ.
      own: [D] variances of what a new task's coefficients have of their own.
      alone: [A] the variance of what an architecture has of its own.
      noise: the variance of validation.
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
      configurations: A of them; what one lacks counts as a value of its own.
      like: those whose values, and pairs of values, have a column; `configurations` by default.

    Returns:
      [A, D] and [A, P] of 0 and 1; P is 0 where there would be more than `MAX_PAIRS`.
    """
    like = configurations if like is None else like
    names = list(dict.fromkeys(name for c in like for name in c))
    values = {name: list(dict.fromkeys(c.get(name) for c in like)) for name in names}

    def columns(rows):
        return [np.array([[c.get(name) == v for v in values[name]] for c in rows], bool) for name in names]

    def pairs_of(digits):
        return [(a[:, :, None] & b[:, None, :]).reshape(len(a), -1) for a, b in itertools.combinations(digits, 2)]

    own, at = columns(like), columns(configurations)
    nothing = np.zeros((len(configurations), 0))
    if not names:
        return nothing, nothing
    digits = np.concatenate(at, 1).astype(np.float64)
    if len(names) < 2 or sum(len(values[a]) * len(values[b]) for a, b in itertools.combinations(names, 2)) > MAX_PAIRS:
        return digits, nothing
    seen = np.concatenate([pairs.any(0) for pairs in pairs_of(own)])
    return digits, np.concatenate(pairs_of(at), 1)[:, seen].astype(np.float64)


def score_prior(
    blocks: Sequence[tuple[np.ndarray, Sequence[float]]], scores: np.ndarray, tests: np.ndarray | None = None
) -> ScorePrior:
    """The prior that earlier tasks make.

    Args:
      blocks: features [A, D_i] with one variance each, and the variances to choose from, over that of the noise.
      scores: [A, T] `normal_scores` of validation, NaN where an architecture was not tried.
      tests: [A, T] those of test losses, NaN where they are not known; without them, what tasks do not share is taken
        for no noise.

    Returns:
      A `ScorePrior` of all A architectures, tried or not. Takes time of about the number of combinations of variances,
      times tasks that did not try the same architectures, times D³ (or the cube of what a task tried, if that is less).

    Raises:
      ValueError: a task has no score, or shapes do not fit.
    """
    scores = np.asarray(scores, np.float64)
    tests = scores if tests is None else np.asarray(tests, np.float64)
    features = np.concatenate([block for block, _ in blocks], 1)
    known = np.isfinite(scores)
    if tests.shape != scores.shape or len(features) != len(scores) or not known.any(0).all():
        raise ValueError(
            f"`scores` and `tests` must have shape [{len(features)}, tasks] and a number for every task; got shapes "
            f"{scores.shape} and {tests.shape}."
        )
    groups: dict[bytes, list[int]] = {}  # tasks that tried the same
    for t in range(scores.shape[1]):
        groups.setdefault(known[:, t].tobytes(), []).append(t)
    reduced = []
    for those in groups.values():
        rows = known[:, those[0]]
        q, r = np.linalg.qr(features[rows])
        y = scores[rows][:, those]
        reduced.append((those, r, q.T @ y, (y**2).sum(0), len(y)))

    def likelihood(variances) -> float:
        """log p(scores) up to a constant, summed over tasks; the noise's variance is at its maximum."""
        total = 0.0
        for those, r, z, squares, num in reduced:
            factor = np.linalg.cholesky(np.eye(len(r)) + (r * variances) @ r.T)
            noise = (squares - (z**2).sum(0) + (np.linalg.solve(factor, z) ** 2).sum(0)).clip(1e-9) / num
            total -= (num * np.log(noise)).sum() / 2 + len(those) * np.log(np.diag(factor)).sum()
        return float(total)

    widths = [block.shape[1] for block, _ in blocks]
    grid = (np.repeat(v, widths) for v in itertools.product(*(grid for _, grid in blocks)))
    best = max(grid, key=likelihood)
    num_tasks = scores.shape[1]
    coefficients = np.zeros((features.shape[1], num_tasks))
    for those, r, z, _, _ in reduced:
        coefficients[:, those] = (r * best).T @ np.linalg.solve(np.eye(len(r)) + (r * best) @ r.T, z)
    fitted = features @ coefficients
    both = known & np.isfinite(tests)
    rest, rest_test = np.where(known, scores - fitted, 0.0), np.where(both, tests - fitted, 0.0)
    times = known.sum(1)  # [A]
    total = (rest**2).sum() / known.sum()
    together = (rest.sum(1) ** 2 - (rest**2).sum(1)).sum() / max((times * (times - 1)).sum(), 1)
    shared = max(together, 0.0)  # u
    real = min(max((rest * rest_test).sum() / max(both.sum(), 1), shared), total)  # u and d
    trust = shared / np.maximum(shared + (total - shared) / np.maximum(times, 1), 1e-12) * (times > 0)
    mean = coefficients.mean(1)
    apart = (coefficients - mean[:, None]) / np.sqrt(max(num_tasks - 1, 1))
    return ScorePrior(
        features,
        features @ mean + trust * rest.sum(1) / np.maximum(times, 1),
        features @ apart,
        (apart**2).sum(1),
        shared * (1 - trust) + real - shared,
        max(total - real, 1e-6),
    )


def score_posterior(prior: ScorePrior, tried: Sequence[int], losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance of all real scores after trials on the new task.

    Of trials only the order is used, laid on what was expected of them. One that failed is worse than all others, and
    at least a standard deviation below what was expected of it, so that it says something alone, too.

    Args:
      prior: of the earlier tasks.
      tried: [k] architectures.
      losses: [k] what came of them; infinite where a trial failed.

    Returns:
      [A] and [A].
    """
    variance = (prior.spread**2).sum(1) + prior.features**2 @ prior.own + prior.alone
    if not len(tried):
        return prior.mean, variance
    at = np.asarray(tried)
    covariance = prior.spread @ prior.spread[at].T  # [A, k]
    covariance += (prior.features * prior.own) @ prior.features[at].T
    covariance += (np.arange(len(prior.mean))[:, None] == at) * prior.alone[at]
    inner = covariance[at] + prior.noise * np.eye(len(at))
    expected = prior.mean[at]
    scores = expected
    if len(at) > 1:
        scores = expected.mean() + np.sqrt(np.diag(inner).mean()) * normal_scores(losses)
    scores = np.where(np.isinf(losses), np.minimum(scores, expected - np.sqrt(np.diag(inner))), scores)
    weights = np.linalg.solve(inner, covariance.T).T
    return prior.mean + weights @ (scores - expected), variance - (weights * covariance).sum(1)


def score_improvement(prior: ScorePrior, tried: Sequence[int], losses: np.ndarray) -> np.ndarray:
    """What a trial promises: the expected improvement of the score over the best of what was tried and did not fail.

    Args:
      prior: of the earlier tasks.
      tried: [k] architectures.
      losses: [k]; infinite where a trial failed.

    Returns:
      [A]; −∞ for what was tried, and without a trial that ended the expected score of all others.
    """
    from scipy.stats import norm

    mean, variance = score_posterior(prior, tried, losses)
    at = np.asarray(tried, int)
    ended = at[np.isfinite(losses)]
    gain = mean.copy()
    if len(ended):
        std = np.sqrt(np.maximum(variance, 1e-12))
        z = (mean - mean[ended].max()) / std
        gain = std * (z * norm.cdf(z) + norm.pdf(z))
    gain[at] = -np.inf
    return gain

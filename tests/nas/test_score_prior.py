"""Scores of architectures on a new task: against Gaussians that are written out, and variances that made the data."""

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from metaopt.nas.search._score_prior import (
    ScorePrior,
    configuration_columns,
    normal_scores,
    score_improvement,
    score_posterior,
    score_prior,
)

RNG = np.random.default_rng(0)
GRID = (1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 9.0)


def test_normal_scores_are_of_ranks():
    normal = normal_scores(np.array([3.0, np.inf, 1.0, 3.0]))
    np.testing.assert_allclose(normal, norm.ppf([0.5, 0.125, 0.875, 0.5]))


def test_columns_are_entries_and_pairs_that_are_there():
    cells = [{"a": 0, "b": "x"}, {"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 2}]
    digits, pairs = configuration_columns(cells)
    assert digits.shape == (4, 6) and (digits.sum(1) == 2).all()  # a: 0, 1, 2; b: x, y, none
    np.testing.assert_array_equal(pairs, np.eye(4))
    others, pairs = configuration_columns([{"a": 2, "b": "x"}, {"a": 7, "b": "y"}], cells)
    np.testing.assert_array_equal(others, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(pairs, np.zeros((2, 4)))
    many = [{"a": i, "b": i % 50} for i in range(50)]
    assert [x.shape for x in configuration_columns(many)] == [(50, 100), (50, 0)]  # 2,500 pairs


def data(num_tasks, missing):
    blocks = [(RNG.normal(size=(12, 3)), GRID), (RNG.normal(size=(12, 2)), GRID)]
    scores = blocks[0][0] @ RNG.normal(size=(3, num_tasks)) + 0.3 * RNG.normal(size=(12, num_tasks))
    for t in range(num_tasks):
        scores[RNG.permutation(12)[:missing], t] = np.nan
    return blocks, scores


@pytest.mark.parametrize("missing", [0, 5, 9])  # with 9, fewer scores than columns
def test_variances_are_those_of_the_largest_marginal_likelihood(missing):
    blocks, scores = data(4, missing)
    phi = np.concatenate([block for block, _ in blocks], 1)

    def likelihood(variances):
        prior, total = np.repeat(variances, (3, 2)), 0.0
        for y in scores.T:
            rows = np.isfinite(y)
            shape = np.eye(rows.sum()) + (phi[rows] * prior) @ phi[rows].T
            noise = y[rows] @ np.linalg.solve(shape, y[rows]) / rows.sum()  # at its maximum
            total += multivariate_normal.logpdf(y[rows], cov=noise * shape)
        return total

    prior = np.repeat(max(itertools.product(GRID, GRID), key=likelihood), (3, 2))
    coefficients = []
    for y in scores.T:
        rows = np.isfinite(y)
        shape = np.eye(rows.sum()) + (phi[rows] * prior) @ phi[rows].T
        coefficients.append((phi[rows] * prior).T @ np.linalg.solve(shape, y[rows]))
    coefficients = np.stack(coefficients, 1)
    fitted = score_prior(blocks, scores)
    spread = phi @ (coefficients - coefficients.mean(1, keepdims=True)) / np.sqrt(3)
    np.testing.assert_allclose(fitted.spread, spread, atol=1e-9)
    np.testing.assert_allclose(fitted.own, coefficients.var(1, ddof=1), rtol=1e-6)
    # What φ does not say is shared as far as residuals of several tasks go together.
    untried = ~np.isfinite(scores).any(1)
    np.testing.assert_allclose(fitted.mean[untried], (phi @ coefficients.mean(1))[untried], atol=1e-9)


def test_own_effects_of_architectures_are_separated_from_noise():
    num, shared, own, noise = 4_000, 0.5, 0.3, 0.2
    u, d = RNG.normal(size=(num, 1)) * shared**0.5, RNG.normal(size=(num, 4)) * own**0.5
    real = u + d
    valid, tests = (real + RNG.normal(size=real.shape) * e**0.5 for e in (noise, 0.1))
    blocks = [(np.ones((num, 1)), GRID)]
    prior = score_prior(blocks, valid, tests)
    trust = shared / (shared + (own + noise) / 4)
    np.testing.assert_allclose(prior.noise, noise, atol=0.03)
    np.testing.assert_allclose(prior.alone, shared * (1 - trust) + own, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(prior.mean, u[:, 0])[0, 1], trust**0.5, atol=0.03)
    assert score_prior(blocks, valid).noise == 1e-6  # nothing says that it is noise
    some = np.where(RNG.uniform(size=tests.shape) < 0.5, tests, np.nan)
    np.testing.assert_allclose(score_prior(blocks, valid, some).noise, noise, atol=0.04)


def test_the_posterior_is_the_gaussian_given_the_trials():
    phi, spread = RNG.normal(size=(9, 3)), RNG.normal(size=(9, 2))
    prior = ScorePrior(phi, RNG.normal(size=9), spread, RNG.uniform(0.1, 1, 3), RNG.uniform(0.1, 1, 9), 0.2)
    whole = spread @ spread.T + (phi * prior.own) @ phi.T + np.diag(prior.alone)
    tried, losses = [4, 0, 7], np.array([0.3, np.inf, -2.0])
    covariance = whole[np.ix_(tried, tried)] + 0.2 * np.eye(3)
    order = norm.ppf([0.5, 1 / 6, 5 / 6])
    within = np.trace((np.eye(3) - 1 / 3) @ covariance) / 3 + prior.mean[tried].var()
    scores = prior.mean[tried].mean() + np.sqrt(within) * order / order.std()
    scores[1] = min(scores[1], prior.mean[0] - covariance[1, 1] ** 0.5)  # it failed
    gain = whole[:, tried] @ np.linalg.inv(covariance)
    mean, variance = score_posterior(prior, tried, losses)
    np.testing.assert_allclose(mean, prior.mean + gain @ (scores - prior.mean[tried]), rtol=1e-9)
    np.testing.assert_allclose(variance, np.diag(whole - gain @ whole[tried]), rtol=1e-9)
    improvement = score_improvement(prior, tried, losses)
    assert np.isneginf(improvement[tried]).all()
    draws = mean + np.sqrt(variance) * RNG.normal(size=(400_000, 9))
    expected = np.maximum(draws - mean[[4, 7]].max(), 0).mean(0)
    rest = np.delete(np.arange(9), tried)
    np.testing.assert_allclose(improvement[rest], expected[rest], atol=0.01)
    at_start = score_posterior(prior, [], np.zeros(0))
    np.testing.assert_allclose(at_start, [prior.mean, np.diag(whole)], rtol=1e-9)
    np.testing.assert_array_equal(score_improvement(prior, [], np.zeros(0)), prior.mean)


def test_failures_lower_the_expected_scores_also_without_outcomes():
    prior = ScorePrior(
        np.eye(4), np.array([2.0, 1.0, 0.9, 0.0]), np.zeros((4, 1)), np.full(4, 0.3), np.full(4, 0.2), 0.25
    )
    for tried in ([0], [0, 1], [1, 0, 3, 2]):
        failed = np.full(len(tried), np.inf)
        mean, _ = score_posterior(prior, tried, failed)
        # Architectures are independent here; a third of a surprise is taken for noise.
        np.testing.assert_array_less(mean[tried], prior.mean[tried] - 0.57)
        rest = np.setdiff1d(np.arange(4), tried)
        np.testing.assert_allclose(mean[rest], prior.mean[rest])
        gain = score_improvement(prior, tried, failed)
        assert np.isneginf(gain[tried]).all()
        np.testing.assert_array_equal(gain[rest], mean[rest])  # there is nothing to improve over
    # The best completed one counts, whatever the prediction for the failed one was.
    mean, variance = score_posterior(prior, [0, 3], np.array([np.inf, 1.0]))
    z = (mean[1] - mean[3]) / variance[1] ** 0.5
    gain = variance[1] ** 0.5 * (z * norm.cdf(z) + norm.pdf(z))
    np.testing.assert_allclose(score_improvement(prior, [0, 3], np.array([np.inf, 1.0]))[1], gain)

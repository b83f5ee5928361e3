"""Predicted curves against Gaussian processes that are written out here, and against the curves' distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from metaopt.blackbox import _curves

RNG = np.random.default_rng(0)
S, M, F = 5, 4, 3
CURVES = RNG.uniform(size=(S, M, F))
X = RNG.uniform(size=(M, 2))
FIDELITIES = np.array([0.25, 0.5, 1.0])
POSTERIOR = jax.jit(_curves.curve_posterior)
LOSS = jax.jit(_curves.curve_loss)


def observed(entries, y):
    """Padded by one that does not count."""
    candidate, fidelity = np.array([*entries, (0, 0)]).T
    mask = np.append(np.ones(len(y)), 0.0)
    return _curves.Observed(
        jnp.asarray(candidate), jnp.asarray(fidelity), jnp.asarray(np.append(y, 1e6)), jnp.asarray(mask)
    )


def covariance(surrogate, curves, a, b):
    """The covariance of two entries, from the curves themselves."""
    alpha, beta, gamma, delta, _ = np.exp(surrogate.noise.log_scales)
    lengths = np.exp(surrogate.noise.log_lengths)
    d = curves - curves.mean(0)
    near = np.exp(-(((X[a[0]] - X[b[0]]) / lengths) ** 2).sum() / 2)
    u, r = np.asarray(surrogate.spread), np.asarray(surrogate.correlation)
    own = beta + gamma * near + delta * (a[0] == b[0])
    return alpha * np.mean(d[:, *a] * d[:, *b]) + own * u[a] * u[b] * r[a[1], b[1]]


def dense(surrogate, curves, observed_entries, entries):
    """The joint mean and covariance of what is seen and asked for, noise included."""
    both = [*observed_entries, *entries]
    matrix = np.array([[covariance(surrogate, curves, a, b) for b in both] for a in both])
    noise = [np.exp(surrogate.noise.log_scales[4]) * surrogate.spread[a] ** 2 for a in both]
    mean = np.array([curves.mean(0)[a] for a in both])
    return mean, matrix + np.diag(noise)


@pytest.mark.once
def test_the_posterior_equals_that_of_a_dense_gaussian_process():
    surrogate = _curves.curve_surrogate(CURVES, X, FIDELITIES)
    observed_entries, entries = [(0, 0), (0, 1), (2, 0), (2, 2)], [(0, 2), (1, 2), (3, 0)]
    y = np.array([0.3, 0.4, 0.9, 0.1])
    mean, matrix = dense(surrogate, CURVES, observed_entries, entries)
    k, cross = matrix[:4, :4] + 1e-6 * np.eye(4), matrix[4:, :4]
    expected = mean[4:] + cross @ np.linalg.solve(k, y - mean[:4])
    variance = np.diag(matrix)[4:] - np.diag(cross @ np.linalg.solve(k, cross.T))
    predicted = POSTERIOR(surrogate, observed(observed_entries, y), *jnp.asarray(entries).T)
    np.testing.assert_allclose(predicted[0], expected, rtol=1e-9)
    np.testing.assert_allclose(predicted[1], np.sqrt(variance), rtol=1e-6)


def test_without_an_outcome_the_mean_of_the_tasks_is_expected():
    surrogate = _curves.curve_surrogate(CURVES, X, FIDELITIES)
    nothing = jax.tree.map(lambda leaf: leaf[-1:], observed([(0, 0)], [0.0]))
    mean, _ = POSTERIOR(surrogate, nothing, jnp.arange(M), jnp.full(M, 2))
    np.testing.assert_allclose(mean, CURVES.mean(0)[:, 2], rtol=1e-12)


@pytest.mark.once
def test_the_loss_is_the_likelihood_under_the_other_tasks():
    surrogate = _curves.curve_surrogate(CURVES, X, FIDELITIES)
    observed_entries, task = [(0, 0), (0, 1), (1, 0), (3, 2)], 1
    y = np.array([CURVES[task][entry] for entry in observed_entries])
    others = np.delete(CURVES, task, 0)
    spread = _curves.curve_surrogate(others, X, FIDELITIES).spread
    mean, matrix = dense(surrogate._replace(spread=spread), others, observed_entries, [])
    nll = -stats.multivariate_normal(mean, matrix + 1e-6 * np.eye(4)).logpdf(y) - 4 * np.log(2 * np.pi) / 2
    noise = surrogate.noise
    prior = ((noise.log_lengths + 0.5) ** 2).sum() / 2 + ((noise.log_scales + 2) ** 2).sum() / 16
    value = LOSS(noise, surrogate, task, observed(observed_entries, y))
    np.testing.assert_allclose(value, (nll + 0.1 * prior) / 4, rtol=1e-9)
    loss = lambda noise: LOSS(noise, surrogate, task, observed(observed_entries, y))
    check_grads(loss, (jax.tree.map(lambda leaf: leaf + 0.1, noise),), order=1, modes=["rev"], rtol=1e-6)


def test_a_task_left_out_leaves_the_others_mean_and_deviations():
    surrogate = _curves.curve_surrogate(CURVES, X, FIDELITIES)
    without_task, others = _curves.leave_out(surrogate, jnp.asarray(2)), np.delete(CURVES, 2, 0)
    np.testing.assert_allclose(without_task.mean, others.mean(0), rtol=1e-12)
    np.testing.assert_allclose(without_task.spread, _curves.curve_surrogate(others, X, FIDELITIES).spread, rtol=1e-12)
    deviations = np.insert(others - others.mean(0), 2, 0.0, axis=0)
    np.testing.assert_allclose(without_task.deviations, deviations * np.sqrt(S / (S - 1)), atol=1e-12)


def test_gaps_are_filled_from_the_task_s_level_and_the_candidate_s_own_curve():
    """Curves of tasks differ by a level: a gap gets the mean of the other tasks plus the level of its task."""
    level = np.linspace(-0.2, 0.2, 30)[:, None, None]
    base = np.array([[0.8, 0.6, 0.5], [0.7, 0.4, 0.2]])
    curves = base + level + 0.001 * RNG.normal(size=(30, 2, 3))
    gap = curves.copy()
    gap[4, 1, 2] = gap[7, 0, 1:] = np.nan
    surrogate = _curves.curve_surrogate(gap, np.zeros((2, 1)), FIDELITIES)
    filled = surrogate.mean[None] + surrogate.deviations
    np.testing.assert_allclose(filled[np.isfinite(gap)], gap[np.isfinite(gap)], atol=1e-12)
    np.testing.assert_allclose(filled, curves, atol=0.02)


@pytest.mark.once
def test_intervals_with_heavy_tailed_errors_cover_after_calibration():
    """Most tasks are near the mean, some are far off: a normal distribution's middle half would hold nearly all."""
    rng = np.random.default_rng(1)
    tail = rng.standard_t(1.5, size=(540, 6, 2)) * 0.02
    curves = 0.5 + tail
    surrogate = _curves.curve_surrogate(curves[:40], np.zeros((6, 1)), np.array([0.5, 1.0]))
    before = np.asarray(surrogate.errors)
    np.testing.assert_allclose(before[0], stats.norm.ppf((np.arange(40) + 0.5) / 40), atol=1e-6)
    surrogate = _curves.calibrate(surrogate, jax.random.key(0), num_candidates=6)
    assert (np.diff(surrogate.errors) >= 0).all() and surrogate.errors.shape == (3, 40)
    nothing = jax.tree.map(lambda leaf: leaf[-1:], observed([(0, 0)], [0.0]))
    mean, std = POSTERIOR(surrogate, nothing, jnp.arange(6), jnp.full(6, 1))
    z = (curves[40:, :, 1] - np.asarray(mean)) / np.asarray(std)
    inside = lambda errors: np.mean((z > np.quantile(errors, 0.25)) & (z < np.quantile(errors, 0.75)))
    assert abs(inside(surrogate.errors[0]) - 0.5) < 0.12 < inside(before[0]) - 0.5


@pytest.mark.once
def test_filled_gaps_are_not_used_in_calibration():
    """The errors are those of outcomes that there are, given outcomes that there are."""
    rng = np.random.default_rng(2)
    curves = 0.5 + 0.1 * rng.normal(size=(9, 2, 2)).cumsum(2)
    curves[::2, 1, 1] = curves[1, 0, 0] = np.nan  # ends, and a beginning
    is_known = np.isfinite(curves)
    surrogate = _curves.curve_surrogate(curves, np.zeros((2, 1)), np.array([0.5, 1.0]))
    np.testing.assert_array_equal(surrogate.known, is_known)
    quantiles = _curves.calibrate(surrogate, jax.random.key(0), num_candidates=2, num_draws=1).errors
    for num_seen in (0, 1):
        z = []
        for s in range(9):
            begun = observed([(0, 0), (1, 0)], curves[s, :, 0])
            conditions = begun._replace(mask=jnp.array([*(is_known[s, :, 0] & bool(num_seen)), False]) * 1.0)
            mean, std = POSTERIOR(_curves.leave_out(surrogate, s), conditions, jnp.arange(2), jnp.ones(2, int))
            z += [
                (curves[s, c, 1] - mean[c]) / std[c]
                for c in range(2)
                if is_known[s, c, 1] and (is_known[s, c, 0] or not num_seen)
            ]
        assert len(z) == 13 - num_seen
        np.testing.assert_allclose(quantiles[num_seen], np.quantile(z, (np.arange(40) + 0.5) / 40), rtol=1e-6)
    # Only one task has both candidates, so more observed fidelities do not reduce the errors.
    checkered = np.where(np.arange(9)[:, None, None] % 2 == np.arange(2), rng.normal(size=(9, 2, 2)), np.nan)
    checkered[0] = rng.normal(size=(2, 2))
    errors = _curves.calibrate(
        _curves.curve_surrogate(checkered, np.zeros((2, 1)), np.array([0.5, 1.0])), jax.random.key(0)
    ).errors
    np.testing.assert_array_equal(errors[1], errors[0])


def test_improvement_is_the_mean_over_errors():
    mean, std = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5])
    errors = jnp.array([[-2.0, 0.0, 2.0], [-1.0, 0.0, 4.0]])
    improvements = _curves.curve_improvement(mean, std, errors, jnp.array(1.5))
    np.testing.assert_allclose(improvements, [(2.5 + 0.5) / 3, 0.0])

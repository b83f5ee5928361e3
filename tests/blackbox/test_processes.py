"""Processes with an unknown offset and scale against densities and integrals that are written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.blackbox import _processes

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(5, 5))
COVARIANCE = ROOT @ ROOT.T / 5
MU = RNG.normal(size=(5, 2))
Y = 30.0 + 8.0 * (MU[:, 0] + 0.5 * RNG.normal(size=5))
MASK = np.array([1.0, 1, 1, 1, 0])
condition = jax.jit(_processes.condition, static_argnames="own_scale")


def log_density(log_scale, mu, y=Y[:4], covariance=COVARIANCE[:4, :4]):
    """Log density of the differences of outcomes, which do not depend on the offset; up to a constant."""
    contrast = np.eye(len(y))[1:] - 1 / len(y)
    c = contrast @ (covariance + _processes.NOISE * np.eye(len(y))) @ contrast.T
    r = contrast @ (y / np.exp(log_scale) - mu)
    return -r @ np.linalg.solve(c, r) / 2 - (len(y) - 1) * log_scale


@pytest.mark.parametrize("num_dims", [0, 3, _processes._FEW + 1])  # summed one by one, and at once
def test_square_distances_are_sums_of_weighted_squares(num_dims):
    x, z = RNG.normal(size=(4, num_dims)), RNG.normal(size=(2, num_dims))
    weights = RNG.uniform(1, 2, num_dims)
    expected = [[sum(w * (a - b) ** 2 for w, a, b in zip(weights, p, q, strict=True)) for q in z] for p in x]
    distances = jax.jit(_processes.square_distances)(x, z, weights)
    np.testing.assert_allclose(distances, expected, rtol=1e-12)


def test_the_last_scale_is_the_likeliest_and_weighs_as_all_units_do():
    conditioned = condition(MU, COVARIANCE, jnp.array([[0.0, 1.0], [0.5, 1.5]]), (Y, MASK))
    assert conditioned.scales.shape == conditioned.log_likelihood.shape == (2, 3)
    grid = np.linspace(0.75 - 10, 0.75 + 10, 200_001)  # around the median of the scales
    for k in range(2):
        values = np.array([log_density(b, MU[:4, k]) for b in grid[::100]])
        best = grid[::100][values.argmax()]
        assert abs(np.log(conditioned.scales[k, 2]) - best) < 0.02
        # What Laplace's method gives for the mean of the likelihood over log b, to a tenth or two.
        top = values.max()
        mean = np.log(np.trapezoid(np.exp(values - top), grid[::100]) / 20) + top
        at_first = conditioned.log_likelihood[k, 0] - log_density(np.log(conditioned.scales[k, 0]), MU[:4, k])
        np.testing.assert_allclose(conditioned.log_likelihood[k, 2], mean + at_first, atol=0.25)


@pytest.mark.once
def test_one_trial_leaves_scales_equal_and_equal_outcomes_do_not_choose_the_smallest():
    alone = condition(MU, COVARIANCE, jnp.array([[0.0, 1.0]]), (Y, np.eye(5)[0]))
    np.testing.assert_allclose(alone.scales[:, 2], 1.0)
    np.testing.assert_allclose(alone.log_likelihood[:, 2], alone.log_likelihood[:, 0])
    equal = condition(MU, COVARIANCE, jnp.array([[0.0, 1.0]]), (np.full(5, 3.0), MASK))
    assert np.isfinite(equal.log_likelihood).all() and (np.abs(np.log(equal.scales) - 0.5) < 10.001).all()
    gradient = jax.grad(
        lambda mu: condition(mu, COVARIANCE, jnp.array([[0.0]]), (np.full(5, 3.0), MASK)).log_likelihood.sum()
    )
    assert np.isfinite(gradient(jnp.asarray(MU))).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.once
def test_outcomes_in_other_units_are_explained_as_well(factor):
    """The scale of the new task and its predictions change with the unit."""
    scales = jnp.array([[0.0, 1.0]])
    features, cross = RNG.normal(size=(3, 2)), RNG.normal(size=(3, 5)) / 9
    nothing = jnp.zeros((3, 0))
    one, other = (condition(MU, COVARIANCE, scales, (Y * f, MASK)) for f in (1.0, factor))
    np.testing.assert_allclose(other.scales[:, 2], factor * one.scales[:, 2], rtol=1e-6)
    means = [
        _processes.predict(process, features, cross, jnp.ones(3), nothing)[0].reshape(3, 2, 3)[:, :, 2]
        for process in (one, other)
    ]
    np.testing.assert_allclose(means[1], factor * means[0], rtol=1e-6)
    # The scales of earlier tasks explain the trials much worse.
    assert (other.log_likelihood[0, 2] > other.log_likelihood[0, :2] + 3).all()

"""Expected hypervolume improvement: against numerical integration, samples, and Optuna's hypervolume, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from metaopt import nas
from metaopt.blackbox import _hypervolume
from metaopt.blackbox._acquisition import expected_improvement
from metaopt.blackbox._posterior import Mixture

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def mixture(num_points, num_components, seed):
    rng = np.random.default_rng(seed)
    weights = np.log(rng.dirichlet(np.ones(num_components)))
    shape = num_points, num_components
    return Mixture(*map(jnp.asarray, (weights, rng.normal(0.4, 0.5, shape), rng.uniform(0.1, 0.7, shape))))


def front_of(num, num_objectives, seed=1):
    points = np.random.default_rng(seed).uniform(size=(8 * num, num_objectives))
    return points[nas.pareto_front(points)][:num]


def test_two_objectives_against_numerical_integration():
    """E[HVI] is the integral over a of P(y ≤ a) over the region that the front does not dominate."""
    front, reference = front_of(5, 2), np.array([1.1, 1.2])
    mixtures = [mixture(3, 2, seed) for seed in (2, 3)]
    got = _hypervolume.hypervolume_improvement(mixtures, _hypervolume.make_front(front, reference))
    below = lambda one, p, a: float(
        np.exp(one.log_weights) @ stats.norm.cdf(a, np.asarray(one.mean[p]), np.asarray(one.std[p]))
    )
    steps = np.array([-np.inf, *np.sort(front[:, 0]), reference[0]])
    for p in range(3):
        expected = 0.0
        for low, high in zip(steps[:-1], steps[1:], strict=True):
            ceiling = min([y for x, y in front if x <= low], default=reference[1])
            width = integrate.quad(lambda a, p=p: below(mixtures[0], p, a), max(low, -8), high, epsabs=1e-11)[0]
            height = integrate.quad(lambda a, p=p: below(mixtures[1], p, a), -8, ceiling, epsabs=1e-11, limit=200)[0]
            expected += width * height
        np.testing.assert_allclose(got[p], expected, rtol=1e-7)


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_any_number_of_objectives_against_samples_and_optuna_s_hypervolume(num_objectives):
    hypervolume = pytest.importorskip("optuna._hypervolume").compute_hypervolume
    front, reference = front_of(6, num_objectives), np.full(num_objectives, 1.1)
    mixtures = [mixture(1, 3, seed) for seed in range(num_objectives)]
    padded = np.concatenate([front, np.tile(reference, (3, 1))])
    got = _hypervolume.hypervolume_improvement(mixtures, _hypervolume.make_front(padded, reference))
    which = [RNG.choice(3, size=4000, p=np.exp(one.log_weights)) for one in mixtures]
    samples = np.stack([RNG.normal(one.mean[0, k], one.std[0, k]) for one, k in zip(mixtures, which, strict=True)], 1)
    before = hypervolume(front, reference)
    assert before == pytest.approx(nas.hypervolume(front, reference), rel=1e-12)
    inside = (samples < reference).all(1)
    gains = np.zeros(len(samples))
    gains[inside] = [hypervolume(np.vstack([front, y]), reference) - before for y in samples[inside]]
    error = gains.std() / np.sqrt(len(gains))
    assert gains.mean() > 10 * error and abs(got[0] - gains.mean()) < 4 * error


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_a_certain_outcome_gains_exactly_its_hypervolume(num_objectives):
    front, reference = front_of(7, num_objectives), np.full(num_objectives, 1.1)
    y = RNG.uniform(-0.3, 0.8, size=(30, num_objectives))
    certain = [
        Mixture(jnp.zeros(1), jnp.asarray(y[:, m : m + 1]), jnp.full((30, 1), 1e-9)) for m in range(num_objectives)
    ]
    got = _hypervolume.hypervolume_improvement(certain, _hypervolume.make_front(front, reference))
    before = nas.hypervolume(front, reference)
    expected = [nas.hypervolume(np.vstack([front, row]), reference) - before for row in y]
    assert 3 < np.count_nonzero(np.array(expected) > 1e-6) < 28
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_one_objective_is_the_expected_improvement_and_units_do_not_change_the_choice():
    one = mixture(9, 2, 5)
    front = _hypervolume.make_front(np.array([[0.3], [0.2]]), np.array([1.0]))
    got = _hypervolume.hypervolume_improvement([one], front)
    np.testing.assert_allclose(got, expected_improvement(one, jnp.asarray(0.2)), rtol=1e-12)
    two, points = [mixture(9, 2, seed) for seed in (5, 6)], front_of(6, 2)
    scales = np.array([1e3, 0.01])
    limit = lambda front, scales: _hypervolume.reference_point(front, front, scales)
    before = _hypervolume.hypervolume_improvement(two, _hypervolume.make_front(points, limit(points, np.ones(2))))
    scaled = [one._replace(mean=one.mean * s, std=one.std * s) for one, s in zip(two, scales, strict=True)]
    scaled_front = _hypervolume.make_front(points * scales, limit(points * scales, scales))
    after = _hypervolume.hypervolume_improvement(scaled, scaled_front)
    np.testing.assert_allclose(after, before * scales.prod(), rtol=1e-9)


def test_the_reference_is_beyond_the_front_and_at_least_half_of_a_typical_distance():
    front = np.array([[0.0, 5.0], [2.0, 4.0]])
    every = np.array([*front, [3.0, 14.0]])
    reference = lambda others, *scales: _hypervolume.reference_point(front, others, np.array(scales)).tolist()
    assert reference(front, 1.0, 1.0) == [2.2, 5.1]
    assert reference(every, 1.0, 1.0) == [2.2, 9.0]  # 4 + ½ (14 − 4)
    assert reference(front, 8.0, 1.0) == [4.0, 5.1]
    assert [_hypervolume.max_points(m) for m in (1, 2, 3, 4, 5)] == [2**14, 2**14 - 1, 127, 24, 10]

"""A process with a network in its kernel, against a Gaussian process that NumPy computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from metaopt.blackbox import _deep_kernel, _posterior, _surrogates

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(9, 3))
Y = np.sin(4 * X[:, 0]) + X[:, 1]
FEATURES = np.array([0.5, -1.0])
DEEP = _deep_kernel.init_deep_kernel(jax.random.key(0), 3, 2, num_hidden=4)
DEEP = DEEP._replace(mean=jnp.array([0.3, -0.2, 0.1, 0.4]), hidden_bias=jnp.array([0.1, 0.2, -0.1, 0.0]))
LOSS = jax.jit(_deep_kernel.deep_kernel_loss, static_argnames="penalty")
CONDITION = jax.jit(_posterior.condition)  # with the number of steps as an argument: one program for all
POSTERIOR_AT, JOINT_AT = jax.jit(_posterior.posterior_at), jax.jit(_posterior.joint_posterior_at)
ADAPT = jax.jit(_deep_kernel.adapt_deep_kernel)
LOG_SCALES = jnp.array([-0.5, 0.5])


def by_numpy(deep, x, features=FEATURES):
    """Means and covariances of configurations."""
    deep = jax.tree.map(np.asarray, deep)
    hidden = np.tanh(x @ deep.configuration + features @ deep.task + deep.bias)
    phi = np.tanh(hidden @ deep.hidden + deep.hidden_bias)
    distance = (((phi[:, None] - phi[None]) / np.exp(deep.log_lengths)) ** 2).sum(-1)
    smooth = 0.99 / (1 + np.exp(-deep.logit_smooth))
    same = (x[:, None] == x[None]).all(-1)
    return phi @ deep.mean, np.exp(deep.log_amplitude) * (smooth * np.exp(-distance / 2) + (1 - smooth) * same)


def log_density(mean, covariance, y):
    """Of differences of outcomes; up to a constant."""
    contrast = np.linalg.svd(np.eye(len(y)) - 1 / len(y))[0][:, :-1].T  # orthonormal
    c = contrast @ (covariance + 1e-3 * np.eye(len(y))) @ contrast.T
    r = contrast @ (y - mean)
    return -r @ np.linalg.solve(c, r) / 2 - np.linalg.slogdet(c)[1] / 2


def padded(x, y, far=9.0):
    """At 12, so that one program serves all; what padding holds does not matter, as long as it is nobody's neighbor."""
    num = 12 - len(y)
    mask = np.concatenate([np.ones(len(y)), np.zeros(num)])
    return jnp.asarray(np.concatenate([x, far + RNG.uniform(size=(num, 3))])), jnp.asarray(np.pad(y, (0, num))), mask


@pytest.mark.once
def test_the_loss_is_the_likelihood_and_its_gradient_is_right():
    other = DEEP._replace(log_lengths=DEEP.log_lengths + 0.5, log_amplitude=DEEP.log_amplitude - 1)
    loss = lambda deep: LOSS(deep, padded(X, Y), FEATURES, penalty=0.0)
    expected = [log_density(*by_numpy(deep, X), Y) for deep in (DEEP, other)]
    np.testing.assert_allclose(loss(DEEP) - loss(other), (expected[1] - expected[0]) / (len(Y) - 1), rtol=1e-6)
    check_grads(lambda deep: LOSS(deep, padded(X, Y), FEATURES), (DEEP,), order=1, modes=["rev"], rtol=1e-5)


def surrogate(deep, share):
    trials = [_surrogates.TaskTrials(X, 2.0 * (Y + s * X[:, 2])) for s in range(3)]
    model = _surrogates.surrogate(trials, _surrogates.Kernel(jnp.zeros(3), jnp.array(2.0), jnp.array(-2.0)), X)
    return model._replace(deep=jax.tree.map(lambda leaf: leaf[None], deep), deep_share=share)


def test_expected_outcomes_have_a_column_for_each_deep_kernel():
    members = [DEEP, DEEP._replace(mean=-DEEP.mean)]
    members = [_deep_kernel.at_features(deep, jnp.asarray(FEATURES)) for deep in members]
    model = surrogate(DEEP, 1.0)._replace(deep=jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    outcomes = _surrogates.expected_outcomes(model, X[:4])  # X are the reference configurations
    plain = _surrogates.expected_outcomes(model._replace(deep=None), X[:4])
    assert outcomes.shape == (4, 3 + 2) and plain.shape == (4, 3)
    np.testing.assert_array_equal(outcomes[:, :3], plain)
    for column, sign in ((3, 1), (4, -1)):
        mean = sign * by_numpy(DEEP, X)[0]
        expected = mean - mean.mean() + np.asarray(model.curves).mean()
        np.testing.assert_allclose(outcomes[:, column], expected[:4], rtol=1e-6)


@pytest.mark.slow
def test_without_adaptation_the_posterior_is_that_of_universal_kriging():
    model = surrogate(_deep_kernel.at_features(DEEP, jnp.asarray(FEATURES)), 1.0)
    weights = _surrogates.task_weights(model)
    np.testing.assert_allclose(weights, [0, 0, 0, 1])
    tried_rows, query_rows = np.array([1, 4, 7]), np.array([0, 1, 8])
    y = np.array([1.0, 0.2, 0.6])
    conditioned = CONDITION(model, weights, padded(X[tried_rows], y), adaptation_steps=0)
    mixture = POSTERIOR_AT(model, conditioned, jnp.asarray(X[query_rows]))
    mean, cov = by_numpy(DEEP, X)
    scales = np.asarray(conditioned.deep.processes.scales)[0, 0]
    assert len(scales) == 6 and mixture.mean.shape == (3, 4 * 3 + 6 + 6)
    for b, mu, std in zip(scales, mixture.mean.T[-6:], mixture.std.T[-6:], strict=True):
        wide = b**2 * cov + 1e5  # the offset as one more Gaussian, as wide as the sky
        gain = wide[np.ix_(query_rows, tried_rows)] @ np.linalg.inv(
            wide[np.ix_(tried_rows, tried_rows)] + b**2 * 1e-3 * np.eye(3)
        )
        np.testing.assert_allclose(mu, b * mean[query_rows] + gain @ (y - b * mean[tried_rows]), atol=1e-4)
        variance = np.diag(wide[np.ix_(query_rows, query_rows)] - gain @ wide[np.ix_(tried_rows, query_rows)])
        np.testing.assert_allclose(std**2, variance, rtol=1e-3, atol=1e-5)
    # All the weight is on it, by the likelihood of each scale.
    weights = np.exp(np.asarray(mixture.log_weights))
    np.testing.assert_allclose(weights[-6:].sum(), 1)
    one, other = (
        log_density(mean[tried_rows], cov[np.ix_(tried_rows, tried_rows)], y / b) - 2 * np.log(b) for b in scales[:2]
    )
    np.testing.assert_allclose(np.log(weights[-6] / weights[-5]), one - other, rtol=1e-5)
    expected = by_numpy(DEEP, X)[0]  # X are the reference configurations, too
    expected += np.asarray(model.curves).mean() - expected.mean()
    np.testing.assert_allclose(_surrogates.expected_outcomes(model, X)[:, 3], expected, rtol=1e-6)
    # The whole share is the whole: whatever explains the trials, nothing else is believed.
    as_before = CONDITION(model, _surrogates.task_weights(model), padded(X, 2.0 * Y), adaptation_steps=0)
    np.testing.assert_array_equal(jnp.exp(as_before.log_weights[:-6]), 0.0)
    # Adapted networks and joint predictions agree, too.
    adapted = CONDITION(model, _surrogates.task_weights(model), padded(X[tried_rows], y), adaptation_steps=10)
    joint = JOINT_AT(model, adapted, jnp.asarray(X[query_rows]), jnp.asarray(X[2:4]))
    marginals = POSTERIOR_AT(model, adapted, jnp.asarray(X[query_rows]))
    np.testing.assert_allclose(joint.mean[:3], marginals.mean, rtol=1e-6)
    variances = np.asarray(joint.variance)[np.asarray(joint.process_index), :3]
    np.testing.assert_allclose(np.sqrt(variances.T) * np.asarray(joint.scales), marginals.std, rtol=1e-5)


@pytest.mark.once
def test_adaptation_to_the_trials_does_not_raise_the_weight_of_a_deep_kernel():
    model = surrogate(_deep_kernel.at_features(DEEP, jnp.asarray(FEATURES)), 0.5)
    tried_rows, y = np.array([1, 3, 4, 6, 7]), np.array([1.0, 0.2, 0.6, 0.1, 0.9])
    before, after = (
        CONDITION(model, _surrogates.task_weights(model), padded(X[tried_rows], y), adaptation_steps=n) for n in (0, 10)
    )
    # The best weight of a deep kernel against the weight of an earlier task.
    best = lambda conditioned: conditioned.log_weights[-6:].max() - conditioned.log_weights[0]
    np.testing.assert_allclose(best(before), best(after), rtol=1e-6)

    # The adapted one does explain the trials better.
    def likelihood(conditioned):
        deep = jax.tree.map(lambda leaf: leaf[0], conditioned.deep.members)
        return max(
            log_density(*by_numpy(deep, X[tried_rows], 0 * FEATURES), y / b) - 4 * np.log(b)
            for b in np.asarray(before.deep.processes.scales)[0, 0]
        )

    assert likelihood(after) > likelihood(before) + 0.05


@pytest.mark.slow
def test_adaptation_uses_the_best_and_the_latest_of_many_trials():
    """Each real trial once, in whatever order, and padding only where there is nothing else."""
    rng = np.random.default_rng(1)
    for num_real in (30, 20, 10, 5):
        y, mask = rng.normal(size=40), np.arange(40) < num_real
        kept, kept_y, kept_mask = _deep_kernel.best_and_latest(
            (jnp.arange(40.0)[:, None], jnp.asarray(y), jnp.asarray(mask, float)), 16
        )
        best = set(np.argsort(y[:num_real])[:8].tolist())
        expected = best | set([i for i in range(num_real) if i not in best][-8:])
        kept_rows = np.asarray(kept)[:, 0].astype(int)
        assert sorted(kept_rows[np.asarray(kept_mask) > 0].tolist()) == sorted(expected) and len(kept_rows) == 16
        np.testing.assert_array_equal(kept_y, y[kept_rows])
    num = _deep_kernel.MAX_ADAPTED + 12
    many = (jnp.asarray(rng.uniform(size=(num, 3))), jnp.asarray(rng.normal(size=num)), jnp.ones(num))
    some = _deep_kernel.best_and_latest(many, _deep_kernel.MAX_ADAPTED)
    adapted, same, other = (
        ADAPT(DEEP, LOG_SCALES, trials, num_steps=1) for trials in (many, some, [x[12:] for x in many])
    )
    jax.tree.map(lambda one, same: np.testing.assert_allclose(one, same, rtol=1e-6), adapted, same)
    assert not all(np.allclose(x, y, rtol=1e-3) for x, y in zip(adapted, other, strict=True))


@pytest.mark.once
def test_a_few_steps_make_a_tasks_own_trials_likelier():
    start = _deep_kernel.at_features(DEEP, jnp.asarray(FEATURES))
    y = 5.0 - 2.0 * Y  # unlike anything
    likelihood = lambda deep: np.logaddexp.reduce(
        [log_density(*by_numpy(deep, X, 0 * FEATURES), y / np.exp(b)) - 8 * b for b in LOG_SCALES]
    )
    values = [likelihood(ADAPT(start, LOG_SCALES, padded(X, y), num_steps=n)) for n in (0, 5, 20)]
    assert values[0] < values[1] - 0.5 < values[2] - 1
    for one, other in zip(
        ADAPT(start, LOG_SCALES, padded(X, y)), ADAPT(start, LOG_SCALES, padded(X, y, 99.0)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-8)
    for one, other in zip(ADAPT(start, LOG_SCALES, padded(X[:1], y[:1])), start, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("features", [None, FEATURES])
def test_a_tasks_features_enter_once(features):
    sorted_features = np.sort(RNG.normal(size=(2, 3)))
    model = surrogate(DEEP, 0.5)._replace(sorted_features=sorted_features)
    on_task = _surrogates.at_task(model, features)
    if features is None:
        assert on_task is model
    else:
        ranks = _surrogates.rank_features(sorted_features, features[None], 1)[0]
        expected = np.asarray(DEEP.bias + ranks @ DEEP.task)
        np.testing.assert_allclose(on_task.deep.bias[0], expected)
        assert np.abs(expected - DEEP.bias).max() > 0.1

"""The mixture of Gaussian processes against Gaussian processes that are written out here."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.blackbox import _acquisition, _posterior, _surrogates

KERNEL = _surrogates.Kernel(jnp.array([-0.5, -1.0]), jnp.array(1.5), jnp.array(-2.0))
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(12, 2))
POSTERIOR = jax.jit(_posterior.posterior)


def curve(a, b):
    return (X[:, 0] - a) ** 2 + b * X[:, 1]


def surrogate(num=6, **kwargs):
    trials = [_surrogates.TaskTrials(X, 3.0 + (s + 1) * curve(s / 5, 0.3 * (s % 2))) for s in range(num)]
    return _surrogates.surrogate(trials, KERNEL, X, **kwargs)


@pytest.mark.parametrize("num", [3, 40], ids=["few coordinates", "many"])
@pytest.mark.once
def test_the_kernel_is_its_formula_with_its_gradients(num):
    rng = np.random.default_rng(1)
    kernel = _surrogates.Kernel(jnp.asarray(rng.normal(size=num) + 1), jnp.array(0.3), jnp.array(-2.0))
    x = rng.uniform(size=(4, num))
    z = np.concatenate([x[1:2], rng.uniform(size=(5, num))])
    smooth = 0.99 / (1 + np.exp(-0.3))

    def formula(lengths, x):
        distance = (((x[:, None] - z[None]) / np.exp(lengths)) ** 2).sum(-1)
        return smooth * np.exp(-distance / 2)

    matrix = _surrogates.kernel_matrix(kernel, jnp.asarray(x), jnp.asarray(z))
    same = np.zeros((4, 6))
    same[1, 0] = 1 - smooth
    np.testing.assert_allclose(matrix, formula(np.asarray(kernel.log_lengths), x) + same, rtol=1e-10, atol=1e-12)
    weighed = lambda lengths, x: (
        _surrogates.kernel_matrix(kernel._replace(log_lengths=lengths), x, jnp.asarray(z)) * jnp.arange(1, 7)[None]
    ).sum()
    by_lengths, by_x = jax.grad(weighed, (0, 1))(kernel.log_lengths, jnp.asarray(x))
    lengths, h = np.asarray(kernel.log_lengths), 1e-6
    weighted_sum = lambda lengths, x: (formula(lengths, x) * np.arange(1, 7)).sum()
    for d in (0, num - 1):
        step = h * np.eye(num)[d]
        np.testing.assert_allclose(
            by_lengths[d], (weighted_sum(lengths + step, x) - weighted_sum(lengths - step, x)) / (2 * h), rtol=1e-5
        )
        moved = np.zeros_like(x)
        moved[2, d] = h
        np.testing.assert_allclose(
            by_x[2, d],
            (weighted_sum(lengths, x + moved) - weighted_sum(lengths, x - moved)) / (2 * h),
            rtol=1e-5,
            atol=1e-9,
        )


def test_the_explained_share_is_that_of_a_plain_gaussian_process():
    rng = np.random.default_rng(2)
    tried, x, variance = rng.uniform(size=(3, 2)), rng.uniform(size=(4, 2)), np.exp(-2.0)
    smooth = 0.99 / (1 + np.exp(-1.5))
    distance = lambda a, b: (((a[:, None] - b[None]) / np.exp([-0.5, -1.0])) ** 2).sum(-1)
    k = lambda a, b: variance * (smooth * np.exp(-distance(a, b) / 2) + (1 - smooth) * (distance(a, b) == 0))
    remaining = k(x, x) - k(x, tried) @ np.linalg.inv(k(tried, tried) + 1e-3 * np.eye(3)) @ k(tried, x)
    share = _surrogates.explained_share(KERNEL, tried, x)
    np.testing.assert_allclose(share, 1 - np.diag(remaining) / variance, rtol=1e-9)
    assert (share > 0).all() and (_surrogates.explained_share(KERNEL, x, x) > 0.98).all()


def test_functions_of_fully_seen_tasks_are_their_normalized_outcomes():
    model = surrogate()
    y = curve(0.4, 0.0)
    np.testing.assert_allclose(model.curves[2], (y - y.min()) / (y.max() - y.min()), atol=1e-2)
    # Away from the reference configurations they are interpolated; at them, they are themselves.
    np.testing.assert_allclose(_surrogates.expected_outcomes(model, jnp.asarray(X)), model.curves.T, atol=1e-3)
    np.testing.assert_allclose(np.exp(model.log_scales[2]), 3 * (y.max() - y.min()))


@pytest.mark.once
def test_one_task_without_closeness_is_a_gaussian_process_with_a_flat_offset():
    """ρ = 0: one process around the mean of all; its formulas are those of universal kriging, solved densely."""
    model = surrogate(closeness=0.0, residual=0.05)
    tried_rows, query_rows = np.array([1, 4, 7]), np.array([0, 2, 9])
    y = jnp.array([1.0, 0.2, 0.6])
    trials = (jnp.asarray(X[tried_rows]), y, jnp.ones(3))
    mixture = POSTERIOR(model, jnp.full(6, 1 / 6), trials, jnp.asarray(X[query_rows]))
    curves = np.asarray(model.coefficients)
    functions = np.asarray(_surrogates.kernel_matrix(model.kernel, jnp.asarray(X), model.reference)) @ curves
    mean, deviations = functions[:, 0], functions[:, 1:]
    cov = deviations @ deviations.T / 6 + 0.05 * np.asarray(_surrogates.kernel_matrix(KERNEL, jnp.asarray(X), X))
    for s, f in ((0, 1), (3, 0)):
        b = np.exp(float(model.log_scales[s]) + (-0.7, 0.0, 0.7)[f])
        # The offset as one more Gaussian, as wide as the sky.
        wide = b**2 * cov + 1e4
        gain = wide[np.ix_(query_rows, tried_rows)] @ np.linalg.inv(
            wide[np.ix_(tried_rows, tried_rows)] + b**2 * 1e-3 * np.eye(3)
        )
        expected = b * mean[query_rows] + gain @ (np.asarray(y) - b * mean[tried_rows])
        variance = np.diag(wide[np.ix_(query_rows, query_rows)] - gain @ wide[np.ix_(tried_rows, query_rows)])
        np.testing.assert_allclose(mixture.mean[:, 4 * s + f], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mixture.std[:, 4 * s + f] ** 2, variance, rtol=1e-2, atol=1e-4)


@pytest.mark.once
def test_the_weights_are_the_likelihoods():
    """The components differ only in task and scale; the likelihood is the density of the differences of outcomes."""
    model = surrogate(closeness=0.6)
    tried_rows, y = np.array([1, 4, 7]), np.array([1.0, 0.2, 0.6])
    weights = jnp.array([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    trials = (jnp.asarray(X[tried_rows]), jnp.asarray(y), jnp.ones(3))
    mixture = POSTERIOR(model, weights, trials, jnp.asarray(X[:1]))
    functions = np.asarray(_surrogates.expected_outcomes(model, jnp.asarray(X[tried_rows])))
    mean = functions.mean(1, keepdims=True)
    cov = 0.64 * (functions - mean) @ (functions - mean).T / 6
    cov += model.residual * np.asarray(
        _surrogates.kernel_matrix(KERNEL, jnp.asarray(X[tried_rows]), X[tried_rows])
    ) + 1e-3 * np.eye(3)
    contrast = np.array([[1.0, -1, 0], [0, 1, -1]])  # differences do not depend on the offset

    def log_density(s, f):
        b = np.exp(float(model.log_scales[s]) + f)
        r = contrast @ (y / b - (mean[:, 0] + 0.6 * (functions[:, s] - mean[:, 0])))
        c = contrast @ cov @ contrast.T
        return -r @ np.linalg.solve(c, r) / 2 - 2 * np.log(b) + np.log(float(weights[s]))

    expected = log_density(1, 0.7) - log_density(3, -0.7)
    np.testing.assert_allclose(mixture.log_weights[4 + 2] - mixture.log_weights[12], expected, rtol=1e-3)


@pytest.mark.once
def test_padding_units_and_offsets_change_nothing():
    model = surrogate()
    weights, x = jnp.full(6, 1 / 6), jnp.asarray(X)
    y = jnp.array([1.0, 0.2, 0.6])
    one = POSTERIOR(model, weights, (x[:3], y, jnp.ones(3)), x)
    padded = (
        jnp.concatenate([x[:3], 99 + x[:2]]),
        jnp.array([1.0, 0.2, 0.6, 5.0, jnp.nan]),
        jnp.array([1.0, 1, 1, 0, 0]),
    )
    chex.assert_trees_all_close(POSTERIOR(model, weights, padded, x), one, rtol=1e-6)
    moved = POSTERIOR(model, weights, (x[:3], y + 7, jnp.ones(3)), x)
    chex.assert_trees_all_close(moved, one._replace(mean=one.mean + 7), rtol=1e-6, atol=1e-6)


@pytest.mark.once
def test_acquisitions_are_those_of_samples():
    mixture = _posterior.Mixture(jnp.log(jnp.array([0.3, 0.7])), jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.5]]))
    key, member_key = jax.random.split(jax.random.key(0))
    member = jax.random.bernoulli(member_key, 0.7, (200_000,)).astype(int)
    y = mixture.mean[0, member] + mixture.std[0, member] * jax.random.normal(key, member.shape)
    improvement = jnp.maximum(0.4 - y, 0)
    error = improvement.std() / np.sqrt(len(member))
    assert abs(_acquisition.expected_improvement(mixture, jnp.array(0.4))[0] - improvement.mean()) < 3 * error
    bound = _acquisition.lower_confidence_bound(mixture, 2.0)[0]
    np.testing.assert_allclose(bound, 2 * y.std() - y.mean(), atol=0.02)


def test_a_failed_trial_is_expected_beyond_the_worst_outcome():
    """Compares with the mean of the samples of the mixture that are at least as bad as the bound."""
    mean, std = jnp.array([[0.0, 1.0], [-1.0, 0.5], [3.0, 3.0]]), jnp.array([[1.0, 0.5], [0.2, 0.1], [0.1, 0.1]])
    mixture = _posterior.Mixture(jnp.log(jnp.array([0.3, 0.7])), mean, std)
    rng, num = np.random.default_rng(0), 400_000
    member = (rng.random(num) < 0.7).astype(int)
    for i, bound in ((0, 0.8), (1, 0.55), (2, -1.0)):
        y = np.asarray(mean)[i, member] + np.asarray(std)[i, member] * rng.normal(size=num)
        y = y[y >= bound]
        censored = _acquisition.censored_mean(mixture, jnp.array(bound))[i]
        np.testing.assert_allclose(censored, y.mean(), atol=4 * y.std() / np.sqrt(len(y)))
    far = _acquisition.censored_mean(mixture, jnp.array(50.0))
    np.testing.assert_allclose(far, 50.0)


@pytest.mark.once
def test_the_improvement_of_a_batch_by_one_more_trial_equals_that_of_samples():
    """Outcomes of x and of what runs are drawn together, by NumPy, from the mixture with its covariances."""
    model, weights = surrogate(closeness=0.5, residual=0.05), jnp.full(6, 1 / 6)
    trials = (jnp.asarray(X[:3]), jnp.array([1.0, 0.2, 0.6]), jnp.ones(3))
    candidates, running, best = jnp.asarray(X[3:6]), jnp.asarray(X[6:8]), jnp.array(0.2)
    conditioned = jax.jit(_posterior.condition)(model, weights, trials)
    joint = jax.jit(_posterior.joint_posterior_at)(
        model, conditioned, jnp.zeros((0, 2)), jnp.concatenate([candidates, running])
    )
    mixture = POSTERIOR(model, weights, trials, candidates)
    np.testing.assert_allclose(joint.log_weights, mixture.log_weights, rtol=1e-6)
    np.testing.assert_allclose(joint.mean[:3], mixture.mean, rtol=1e-6)
    np.testing.assert_allclose(joint.variance, np.diagonal(joint.covariance, axis1=1, axis2=2), atol=1e-9)
    variances = np.asarray(joint.variance)[np.asarray(joint.process_index), :3]
    np.testing.assert_allclose(np.sqrt(variances.T) * np.asarray(joint.scales), mixture.std, rtol=1e-4)
    rng, num = np.random.default_rng(0), 100_000
    ks = rng.choice(len(joint.scales), num, p=np.exp(np.asarray(joint.log_weights, np.float64)))
    chol = np.linalg.cholesky(np.asarray(joint.covariance) + 1e-9 * np.eye(5))[np.asarray(joint.process_index)[ks]]
    y = np.asarray(joint.mean)[:, ks].T + np.asarray(joint.scales)[ks, None] * np.einsum(
        "nij,nj->ni", chol, rng.normal(size=(num, 5))
    )
    alone = np.maximum(0.2 - y[:, 3:].min(1), 0)
    added = np.stack([np.maximum(0.2 - np.minimum(y[:, i], y[:, 3:].min(1)), 0) - alone for i in range(3)])
    padded = (jnp.concatenate([running, 99 + running]), jnp.array([1.0, 1, 0, 0]))
    score = jax.jit(_acquisition.batch_expected_improvement, static_argnames="num_samples")
    values = score(model, conditioned, padded, candidates, best, jax.random.key(0), num_samples=10_000)
    np.testing.assert_allclose(values, added.mean(1), atol=4 * added.std(1).max() / np.sqrt(10_000))
    without = _acquisition.expected_improvement(mixture, best)
    assert (values < without).all() and values[2] < 0.5 * without[2]  # what runs counts


def test_a_failed_trial_is_worse_than_expected():
    y = np.stack([curve(s / 5, 0.0) for s in range(6)])
    whole = [_surrogates.TaskTrials(X, row) for row in y]
    failed = y[0].copy()
    failed[3] = np.nan
    model = _surrogates.surrogate([_surrogates.TaskTrials(X, failed), *whole[1:]], KERNEL, X)
    absent = _surrogates.TaskTrials(np.delete(X, 3, 0), np.delete(y[0], 3))
    other = _surrogates.surrogate([absent, *whole[1:]], KERNEL, X)
    assert model.curves[0, 3] > other.curves[0, 3] + 0.2
    np.testing.assert_allclose(np.delete(model.curves[0], 3), np.delete(other.curves[0], 3), atol=0.05)


@pytest.mark.once
def test_attention_leaves_the_family_out_and_learns_what_matters():
    num = 40
    features = np.stack([np.arange(num) % 2, RNG.normal(size=num)], 1)
    curves = np.where(features[:, :1] > 0, [[0.0, 1.0]], [[1.0, 0.0]])
    ranked = jnp.asarray(_surrogates.rank_features(np.sort(features, 0).T, features, num))
    same = np.eye(num, dtype=bool)
    data = {"features": ranked, "curves": jnp.asarray(curves), "same_family": jnp.asarray(same)}
    data["weights"] = jnp.full((1, num), 1 / num)
    attention = {"log_rates": jnp.full((1, 2), -2.0), "logit_share": jnp.zeros(1)}
    gradient = jax.jit(jax.grad(_surrogates.attention_loss))(attention, data)
    assert gradient["log_rates"][0, 0] < -abs(gradient["log_rates"][0, 1])
    weights = _surrogates.attention_weights(
        jax.tree.map(lambda a: a[0], attention), ranked, ranked, data["same_family"]
    )
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (np.asarray(weights)[same] == 0).all()


def test_the_attention_loss_is_the_regret_of_choosing_by_tasks_of_other_families():
    rng = np.random.default_rng(4)
    features, curves, family = rng.normal(size=(5, 2)), rng.uniform(size=(5, 3)), np.array([0, 0, 1, 1, 2])
    rates, share, weights = np.array([0.7, 1.5]), 0.6, np.array([0.1, 0.3, 0.2, 0.1, 0.3])
    expected = 0.2 * rates.sum()
    for t in range(5):
        others = [s for s in range(5) if family[s] != family[t]]
        near = np.exp([-(((features[t] - features[s]) * rates) ** 2).sum() / 2 for s in others])
        mixed = (share * near / near.sum() + (1 - share) / len(others)) @ curves[others]
        chosen = np.exp(-mixed / 0.5)
        expected += weights[t] * (chosen / chosen.sum()) @ curves[t] / curves.std()
    attention = {"log_rates": jnp.log(rates)[None], "logit_share": jnp.log(jnp.array([share / (1 - share)]))}
    data = {"features": features, "curves": curves, "same_family": family[:, None] == family, "weights": weights[None]}
    loss = _surrogates.attention_loss(attention, jax.tree.map(jnp.asarray, data), temperature=0.5, penalty=0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_features_become_ranks_whatever_their_units():
    features = np.array([[1.0, 5.0], [10.0, np.nan], [1e6, 7.0], [2.0, 6.0]])
    ranked = _surrogates.rank_features(np.sort(features, 0).T, features, 4)
    np.testing.assert_allclose(ranked[:, 0], np.sqrt(3) * np.array([-0.75, 0.25, 0.75, -0.25]))
    assert ranked[1, 1] == 0
    np.testing.assert_array_equal(_surrogates.rank_features(np.sort(features, 0).T, None, 4), 0)


def test_diverged_outcomes_do_not_set_the_scale():
    y, scale = _surrogates.normalize(np.array([0.0, 0.1, 0.2, 0.3, 1e18, np.nan]))
    assert scale == pytest.approx(1.2) and y[4] == 1 and np.isnan(y[5])
    assert _surrogates.normalize(np.array([2.0, 2.0]))[1] == 1
    # Three in four outcomes equal the best one, so the others set the scale, in any unit.
    y, scale = _surrogates.normalize(np.array([3.0] * 7 + [3.0 + 1e-6, 3.0 + 2e-6]))
    assert scale == pytest.approx(2e-6) and y[-2:].tolist() == pytest.approx([0.5, 1.0])

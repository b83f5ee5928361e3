"""A transformer over trials: its invariances, and its predictions of known functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy import stats

from metaopt import hypergrad, training
from metaopt.blackbox import _deep_kernel, _transformer

RNG = np.random.default_rng(0)
X, AT = RNG.uniform(size=(6, 3)), RNG.uniform(size=(4, 3))
Y = np.array([0.3, 0.9, np.nan, 0.1, 0.5, np.nan])
INIT = _transformer.init_transformer(jax.random.key(0), 3, 2, width=8, num_layers=2)
# Away from where all bins are alike; two members.
NETWORKS = jax.tree.map(lambda leaf: leaf[None] + RNG.normal(size=(2, *leaf.shape)) / 4, INIT)


@jax.jit
def predict(networks, trials, x, scale=1.0):
    return _transformer.predict_binned(networks, _transformer.read_trials(networks, trials, scale), x)


def padded(x, y, num=8, far=1e3):
    pad = num - len(y)
    mask = np.concatenate([np.ones(len(y)), np.zeros(pad)])
    x = np.concatenate([x, np.full((pad, 3), far)])
    return jnp.asarray(x), jnp.asarray(np.concatenate([y, np.full(pad, far)])), jnp.asarray(mask)


@pytest.mark.once
def test_predictions_do_not_depend_on_order_padding_or_units_of_trials():
    predicted = predict(NETWORKS, padded(X, Y), AT)
    np.testing.assert_allclose(predicted.probs.sum(1) + predicted.failure, 1)
    order = RNG.permutation(6)
    for other in (
        predict(NETWORKS, padded(X[order], Y[order]), AT),
        predict(NETWORKS, padded(X, Y, far=np.nan), AT),
        predict(NETWORKS, padded(X, Y, num=6), AT),
    ):
        for one, same in zip(other, predicted, strict=True):
            np.testing.assert_allclose(one, same, rtol=1e-9)
    # The other points of a prediction do not matter either.
    np.testing.assert_allclose(predict(NETWORKS, padded(X, Y), AT[:2]).probs, predicted.probs[:2], rtol=1e-9)
    other = predict(NETWORKS, padded(X, 1e4 * Y - 7), AT, 5.0)
    np.testing.assert_allclose(other.probs, predicted.probs, rtol=1e-6)
    np.testing.assert_allclose(other.edges, 1e4 * predicted.edges - 7, rtol=1e-6)
    swapped = Y[[1, 0, 2, 3, 4, 5]]
    succeeded = np.where(np.arange(6) == 2, 0.4, Y)
    for changed in (padded(X, swapped), padded(X, succeeded), padded(X[:5], Y[:5]), padded(X + 0.1, Y)):
        assert np.abs(predict(NETWORKS, changed, AT).probs - predicted.probs).max() > 1e-4
    # Features enter by β.
    on_task = _deep_kernel.at_features(NETWORKS, jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(on_task.bias, NETWORKS.bias + NETWORKS.task[:, 0] - NETWORKS.task[:, 1])


@pytest.mark.parametrize(
    "y, low, high", [([], 0, 1), ([np.nan, np.nan], 0, 1), ([3.0], 1.0, 5.0), ([3.0, np.nan], 1, 5)]
)
@pytest.mark.once
def test_a_task_without_a_scale_has_that_of_earlier_ones(y, low, high):
    """No trial: normalized outcomes. One: as far from it as outcomes lie apart."""
    y = np.array(y, float)
    scale = 2.0 if np.isfinite(y).any() else 1.0
    predicted = predict(NETWORKS, padded(X[: len(y)], y, num=2), AT, scale)
    inside = (predicted.edges[1:] > low) & (predicted.edges[:-1] <= high)
    assert np.isfinite(predicted.probs).all() and (predicted.probs[:, inside] > 0).all()
    np.testing.assert_array_equal(predicted.probs[:, ~inside], 0)
    # Equal outcomes have none either, nor have nearly equal ones: the more there are, the closer all are taken to be.
    for same in ([3.0, 3.0], [3.0, 3.0 + 1e-9], [3.0, 3.0, 3.0]):
        predicted = predict(NETWORKS, padded(X[: len(same)], same), AT, scale)
        np.testing.assert_allclose(predicted.edges, 3 + scale / 10 / (len(same) - 1) * _transformer._edges(), rtol=1e-6)
        assert np.isfinite(predicted.probs).all()


def binned_std(probs, failure):
    return _transformer.binned_moments(_transformer.Binned(jnp.array([0.0, 1.0, 4.0]), probs, failure), 6.5)[1][0]


@pytest.mark.slow
def test_scores_are_those_of_samples_and_their_gradients_are_right():
    predicted = predict(NETWORKS, padded(X, Y), AT)
    num = 200_000
    bins = np.stack(
        [RNG.choice(101, num, p=np.append(p, f)) for p, f in zip(predicted.probs, predicted.failure, strict=True)]
    )
    edges = np.append(predicted.edges, np.nan)
    y = edges[bins] + RNG.uniform(size=bins.shape) * (edges[np.minimum(bins + 1, 101)] - edges[bins])
    y = np.where(bins == 100, 60.0, y)  # worse than any
    for best in (0.1, -0.33, 4.0):
        gains = np.where(bins == 100, 0, np.maximum(best - y, 0))
        error = gains.std(1) / np.sqrt(num)
        assert (np.abs(_transformer.binned_improvement(predicted, best) - gains.mean(1)) < 4 * error).all()
    mean, std = _transformer.binned_moments(predicted, 60.0)
    assert (np.abs(mean - y.mean(1)) < 4 * y.std(1) / np.sqrt(num)).all()
    np.testing.assert_allclose(std, y.std(1), rtol=0.02)
    uniform = _transformer.Binned(
        jnp.array([0.0, 1.0, 4.0]), jnp.array([[1.0, 0.0], [0.0, 0.5]]), jnp.array([0.0, 0.5])
    )
    mean, std = _transformer.binned_moments(uniform, 6.5)
    np.testing.assert_allclose(mean, [0.5, 4.5])
    np.testing.assert_allclose(std**2, [1 / 12, (9 / 12 + 2 * 4.0) / 2])
    # If failure is certain, the deviation is 0, and its derivative is finite.
    certain = lambda remaining: binned_std(jnp.array([[remaining, 0.0]]), jnp.array([1.0 - remaining]))
    assert np.isfinite(jax.grad(certain)(0.0))
    for level in (0.1, 0.5, 0.85):
        share = (y < np.asarray(_transformer.binned_quantile(predicted, level))[:, None]).mean(1)
        np.testing.assert_allclose(share, level, atol=0.005)
    improvement = lambda x: _transformer.binned_improvement(predict(NETWORKS, padded(X, Y), x), 0.1)
    check_grads(improvement, (jnp.asarray(AT),), order=1, modes=["rev"], rtol=1e-5)
    assert np.abs(jax.jacrev(improvement)(jnp.asarray(AT))).max() > 1e-3


@pytest.mark.once
def test_the_loss_is_the_cross_entropy_of_predictions_with_its_gradient():
    member = jax.tree.map(lambda leaf: leaf[0], NETWORKS)
    features = jnp.array([0.5, -1.0])
    y = np.array([0.2, np.nan, 1.0, 0.05])  # one better than all that are shown, one that fails
    shown, targets = padded(X, Y), (jnp.asarray(AT), jnp.asarray(y), jnp.array([1.0, 1.0, 1.0, 0.0]))
    on_task = jax.tree.map(lambda leaf: leaf[None], _deep_kernel.at_features(member, features))
    predicted = predict(on_task, shown, AT)
    bins = np.searchsorted(predicted.edges, y, side="right") - 1
    expected = -np.log([predicted.probs[0, bins[0]], predicted.failure[1], predicted.probs[2, bins[2]]]).mean()
    loss = jax.jit(_transformer.transformer_loss)
    np.testing.assert_allclose(loss(member, shown, targets, features), expected, rtol=1e-9)
    check_grads(lambda member: loss(member, shown, targets, features), (member,), order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.slow
def test_predictions_of_gaussian_processes_are_calibrated_and_near_exact_inference():
    """Trained on functions from a prior, it comes near to the posterior that solving equations gives."""
    num_shown, num_asked, noise = 8, 8, 0.1  # the noise is at least the width of a bin
    kernel = lambda a, b: jnp.exp(-(((a - b.T) / 0.3) ** 2) / 2)

    def draw(key):
        x_key, y_key, n_key = jax.random.split(key, 3)
        x = jax.random.uniform(x_key, (num_shown + num_asked, 1))
        chol = jnp.linalg.cholesky(kernel(x, x) + noise * jnp.eye(len(x)))
        y = chol @ jax.random.normal(y_key, (len(x),))
        mask = (jnp.arange(num_shown) < jax.random.randint(n_key, (), 3, num_shown + 1)).astype(x.dtype)
        return (x[:num_shown], y[:num_shown], mask), (x[num_shown:], y[num_shown:], jnp.ones(num_asked)), jnp.zeros(0)

    sample_tasks = lambda key: jax.vmap(draw)(jax.random.split(key, 32))
    estimator = hypergrad.direct(lambda network, task, key: _transformer.transformer_loss(network, *task))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, 800)))
    network = training.fit(
        training.learner(hypergrad.over_tasks(estimator), optimizer),
        sample_tasks,
        hyperparams=_transformer.init_transformer(jax.random.key(0), 1, 0),
        num_steps=800,
        steps_per_call=100,
        key=jax.random.key(1),
        progress=False,
    ).hyperparams
    networks = jax.tree.map(lambda leaf: leaf[None], network)
    levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9])

    def judge(key):
        (x, y, mask), (x_new, outcome, _), _ = draw(key)
        predicted = predict(networks, (x, y, mask), x_new)
        below = jnp.stack([outcome < _transformer.binned_quantile(predicted, level) for level in levels]).mean(1)
        median = _transformer.binned_quantile(predicted, 0.5)
        gram = kernel(x, x) * mask[:, None] * mask[None] + jnp.diag(jnp.where(mask > 0, noise, 1.0))
        exact = (kernel(x_new, x) * mask[None]) @ jnp.linalg.solve(gram, y * mask)
        wrong = [jnp.abs(guess - outcome).mean() for guess in (0 * exact, exact, median)]
        return below, jnp.stack(wrong), jnp.stack([median, exact])

    share, wrong, guesses = jax.jit(jax.vmap(judge))(jax.random.split(jax.random.key(2), 500))
    error = np.asarray(share).std(0) / np.sqrt(len(share))  # outcomes of one task are not independent
    assert (error < 0.02).all()
    # Training ends after 800 steps, a hundredth or two from calibration, on which side the order of sums decides.
    assert (np.abs(share.mean(0) - levels) < 0.02 + 3 * error).all(), share.mean(0)
    prior, exact, ours = wrong.mean(0)
    assert exact < 0.7 * prior  # trials say something
    assert ours < exact + 0.25 * (prior - exact), wrong.mean(0)
    assert stats.spearmanr(*guesses.transpose(1, 0, 2).reshape(2, -1)).statistic > 0.9

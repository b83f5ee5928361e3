"""Exact gradients mixed with evolution strategies, on functions whose smoothing is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from metaopt import base, hypergrad, predictors

KEY = jax.random.key(0)


def sampled(estimator, lam, num_seeds):
    def one(key):
        return estimator.estimate(lam, None, estimator.init(key, lam, None))[0]

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, num_seeds))


# F(u, v) = |u|² + v + sin(20 v)/2 + noise (v + 100); smoothed, the sine is damped by exp(−(20σ)²/2). For u the
# exact gradient varies less, for v evolution strategies do, since a pair shares its noise.

LAM = {"u": jnp.array([1.0, -0.5]), "v": jnp.array(0.3)}
SIGMA = 0.2


def wavy(hyperparams, task, key):
    u, v = hyperparams["u"], hyperparams["v"]
    return (u**2).sum() + v + jnp.sin(20 * v) / 2 + jax.random.normal(key) * (v + 100)


def smoothed_slopes():
    v = float(LAM["v"])
    return np.array([2.0, -1.0, 1 + 10 * np.exp(-((20 * SIGMA) ** 2) / 2) * np.cos(20 * v)])


def terms(num_pairs, num_seeds):
    """Both terms of every pair, [seeds, N, 3] each, drawn in numpy."""
    rng = np.random.default_rng(0)
    epsilon, noise = rng.normal(size=(num_seeds, num_pairs, 3)), rng.normal(size=(num_seeds, num_pairs, 1))
    lam = np.array([1.0, -0.5, 0.3])

    def value(x):
        return (x[..., :2] ** 2).sum(-1) + x[..., 2] + np.sin(20 * x[..., 2]) / 2 + noise[..., 0] * x[..., 2]

    def slope(x):
        return np.concatenate([2 * x[..., :2], 1 + 10 * np.cos(20 * x[..., 2:]) + noise], -1)

    ahead, behind = lam + SIGMA * epsilon, lam - SIGMA * epsilon
    es = epsilon * ((value(ahead) - value(behind)) / 2 / SIGMA)[..., None]
    return es, (slope(ahead) + slope(behind)) / 2


@pytest.mark.once
def test_unbiased_with_the_smaller_variance_of_every_leaf():
    estimator = hypergrad.mix_with_es(hypergrad.direct(wavy), sigma=SIGMA, num_pairs=8)
    out = sampled(estimator, LAM, 10_000)
    mixed = np.concatenate([out.hypergrad["u"], out.hypergrad["v"][:, None]], 1)
    error = mixed.std(0) / np.sqrt(len(mixed))
    es, exact = (x.mean(1) for x in terms(8, 10_000))
    # The exact term for u does not vary at all (F is quadratic in u): the mixture is that to rounding.
    np.testing.assert_allclose(mixed[:, :2], np.broadcast_to([2.0, -1.0], (10_000, 2)), rtol=1e-9)
    assert abs(mixed[:, 2].mean() - smoothed_slopes()[2]) < 3 * error[2]
    assert es[:, 2].var() < exact[:, 2].var() / 3  # and yet the exact term brings something
    assert mixed[:, 2].var() < es[:, 2].var()
    np.testing.assert_allclose(out.metrics["sampling_variance"].mean(), mixed.var(0).sum(), rtol=0.2)
    assert out.done.all() and estimator.kind == "unbiased"


@pytest.mark.once
def test_weights_from_the_same_samples_would_be_biased():
    # F = exp(3λ), a skewed gradient: ∇F_σ = 3 exp(3λ + 9σ²/2).
    lam, sigma, num_pairs = 0.1, 0.5, 5
    expected = 3 * np.exp(3 * lam + 9 * sigma**2 / 2)
    estimator = hypergrad.mix_with_es(
        hypergrad.direct(lambda hp, task, key: jnp.exp(3 * hp)), sigma=sigma, num_pairs=num_pairs
    )
    mixed = np.asarray(sampled(estimator, jnp.array(lam), 40_000).hypergrad)
    epsilon = np.random.default_rng(0).normal(size=(40_000, num_pairs))
    ahead, behind = np.exp(3 * (lam + sigma * epsilon)), np.exp(3 * (lam - sigma * epsilon))
    es, exact = epsilon * (ahead - behind) / 2 / sigma, 3 * (ahead + behind) / 2
    a, b = es.var(1), exact.var(1)
    same = (a * exact.mean(1) + b * es.mean(1)) / (a + b)

    def off(x):
        return (x.mean() - expected) / (x.std() / np.sqrt(len(x)))

    assert abs(off(mixed)) < 3 < 6 < abs(off(same))


@pytest.mark.once
def test_a_chaotic_training_is_left_to_evolution_strategies():
    # x ← λx(1 − x), 60 times at λ = 3.7: gradients of 1e9 and more, of a value in [0, 1].
    def chaotic(hyperparams, task, key):
        x, _ = jax.lax.scan(lambda x, _: (hyperparams * x * (1 - x), None), jnp.array(0.3), length=60)
        return (x - 0.4) ** 2

    direct, lam = hypergrad.direct(chaotic), jnp.array(3.7)
    out = sampled(hypergrad.mix_with_es(direct, sigma=0.05, num_pairs=8), lam, 4_000)
    epsilon = np.random.default_rng(0).normal(size=(2, 4_000, 8))
    exact = jax.jit(jax.vmap(jax.grad(lambda lam: chaotic(lam, None, KEY))))(3.7 + 0.05 * epsilon[0].reshape(-1))
    assert np.std(exact) > 1e6
    assert out.metrics["exact_weight"].mean() < 1e-3
    values = jax.jit(jax.vmap(lambda lam: chaotic(lam, None, KEY)))
    shifted = [np.asarray(values(jnp.asarray(3.7 + s * 0.05 * epsilon[1].reshape(-1)))) for s in (1, -1)]
    es = (epsilon[1] * (shifted[0] - shifted[1]).reshape(4_000, 8) / 0.1).mean(1)
    mixed = np.asarray(out.hypergrad)
    assert mixed.var() < 1.3 * es.var()
    assert abs(mixed.mean() - es.mean()) < 3 * np.sqrt((mixed.var() + es.var()) / 4_000)


@pytest.mark.once
def test_gradients_that_are_not_finite_are_left_out_by_leaf():
    # The derivative of √max(v, 0) is NaN below zero; its value is fine.
    def loss(hyperparams, task, key):
        return hyperparams["u"].sum() + jnp.sqrt(jnp.maximum(hyperparams["v"], 0))

    lam = {**LAM, "v": jnp.array(-0.1)}
    estimator = hypergrad.mix_with_es(hypergrad.direct(loss), sigma=SIGMA, num_pairs=5)
    out = sampled(estimator, lam, 4_000)
    np.testing.assert_allclose(out.hypergrad["u"], 1, rtol=1e-9)
    nodes = np.linspace(0, 2, 200_001)
    density = np.exp(-(((nodes + 0.1) / SIGMA) ** 2) / 2) / np.sqrt(2 * np.pi) / SIGMA
    expected = np.trapezoid(np.sqrt(nodes) * (nodes + 0.1) / SIGMA**2 * density, nodes)
    v = np.asarray(out.hypergrad["v"])
    assert np.isfinite(v).all() and abs(v.mean() - expected) < 3 * v.std() / np.sqrt(4_000)
    assert (out.metrics["exact_weight"] < 1).all()


@pytest.mark.once
def test_over_tasks_amortized_and_carried():
    apply = lambda phi, task: {"log_penalty": phi @ task.features}
    predictor, phi = base.Predictor(lambda key: phi, apply), jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    rule = hypergrad.lookahead(problems.RIDGE, commit=0, num_steps=2)
    tasks = problems.stack([problems.regression_task(seed) for seed in range(2)])
    estimator = hypergrad.over_tasks(
        predictors.amortize(hypergrad.mix_with_es(rule, sigma=1e-4, num_pairs=3), predictor)
    )
    state = jax.jit(estimator.init)(KEY, phi, tasks)
    out, after = jax.jit(estimator.estimate)(phi, tasks, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # With such a small σ, evolution strategies vary far more than the gradient, so only the exact rule remains.
    plain = hypergrad.over_tasks(predictors.amortize(rule, predictor))
    expected, _ = jax.jit(lambda: plain.estimate(phi, tasks, plain.init(KEY, phi, tasks)))()
    chex.assert_trees_all_close(out.hypergrad, expected.hypergrad, rtol=1e-4, atol=1e-7)
    assert out.metrics["exact_weight"] > 1 - 1e-6 and out.metrics["num_finite"] == 2
    assert set(expected.metrics) < set(out.metrics) and out.done.tolist() == expected.done.tolist()


@pytest.mark.once
def test_a_value_that_is_not_finite_leaves_its_task_out():
    estimator = hypergrad.over_tasks(
        hypergrad.mix_with_es(hypergrad.direct(lambda hp, task, key: hp * task.valid), sigma=0.1, num_pairs=3)
    )
    tasks = base.Task(jnp.zeros(3), jnp.array([1.0, jnp.nan, 3.0]))
    out, _ = jax.jit(lambda: estimator.estimate(2.0, tasks, estimator.init(KEY, 2.0, tasks)))()
    np.testing.assert_allclose(out.hypergrad, 2.0, rtol=1e-9)
    assert out.metrics["num_nonfinite"] == 1 and out.done.all()

"""SAMA: its formula with Adam's derivative written out, its truncation, its relation to one-step lookahead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(0)
LAM = {"penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}


def problem(optimizer, loss=problems.penalized):
    loop = inner.loop(loss, lambda hyperparams: optimizer, init=problems.zeros)
    return inner.problem(loop, lambda params, hyperparams, batch: problems.mean_squares(params, batch))


def estimated(estimator, lam=LAM):
    return jax.jit(estimator.estimate)(lam, problems.TASK, jax.jit(estimator.init)(KEY, lam, problems.TASK))


@pytest.mark.parametrize("epsilon", [0.5, None])
@pytest.mark.once
def test_equals_its_formula_with_adam_by_hand(epsilon):
    # After t = 2 steps of Adam, with M = m̂ and V = v̂ of the second:
    # ∂(−r M/(√V + e))/∂g = −r [(1 − β1)/(1 − β1²)/(√V + e) − M (1 − β2)/(1 − β2²) g/(√V (√V + e)²)].
    train, valid = problems.TASK.train, problems.TASK.valid
    rate, b1, b2, e = 0.1, 0.8, 0.95, 1e-3
    w, m, v = np.zeros(4), np.zeros(4), np.zeros(4)
    for t in (1, 2):
        g = np.asarray(jax.grad(problems.penalized)(jnp.asarray(w), LAM, train))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        M, root = m / (1 - b1**t), np.sqrt(v / (1 - b2**t))
        w = w - rate * M / (root + e)
    slope = (1 - b1) / (1 - b1**2) / (root + e) - M * (1 - b2) / (1 - b2**2) * g / (root * (root + e) ** 2)
    u = -rate * slope * np.asarray(jax.grad(problems.mean_squares)(jnp.asarray(w), valid))
    # ∇λ ℓ = θ²/2, so its derivative along u is θ u, and the central difference is exact.
    estimate, state = estimated(hypergrad.sama(problem(optax.adam(rate, b1, b2, e)), num_steps=2, epsilon=epsilon))
    np.testing.assert_allclose(state.inner.params, w, rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergrad["penalty"], w * u, rtol=1e-9)
    np.testing.assert_allclose(estimate.value, problems.mean_squares(jnp.asarray(w), valid), rtol=1e-12)
    assert np.abs(w * u).min() > 1e-6


def test_the_mixed_product_is_a_central_difference_after_the_step():
    # ∇λ ℓ = λθ³, whose central difference is λ(3 θ² u + ε² u³/|u|²).
    def cubic(params, hyperparams, batch):
        return problems.mean_squares(params, batch) + (hyperparams["penalty"] ** 2 * params**3).sum() / 2

    rate, epsilon = 0.2, 0.3
    w = -rate * jax.grad(cubic)(jnp.zeros(4), LAM, problems.TASK.train)
    u = -rate * jax.grad(problems.mean_squares)(w, problems.TASK.valid)
    expected = LAM["penalty"] * (3 * w**2 * u + epsilon**2 * u**3 / (u**2).sum())
    estimate, _ = estimated(hypergrad.sama(problem(optax.sgd(rate), cubic), epsilon=epsilon))
    np.testing.assert_allclose(estimate.hypergrad["penalty"], expected, rtol=1e-10)


@pytest.mark.once
def test_equals_one_step_lookahead_where_the_mixed_derivative_is_constant():
    def tilted(params, hyperparams, batch):
        return problems.mean_squares(params, batch) + jnp.vdot(jnp.sin(hyperparams["penalty"]), params)

    tilted_problem = problem(optax.adam(0.1, eps=0.5), tilted)
    estimate, _ = estimated(hypergrad.sama(tilted_problem))
    expected, _ = estimated(hypergrad.lookahead(tilted_problem, commit=0))
    assert optax.tree.norm(expected.hypergrad) > 1e-2
    np.testing.assert_allclose(estimate.hypergrad["penalty"], expected.hypergrad["penalty"], rtol=1e-9)
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-12)


def test_the_identity_in_the_place_of_the_base_jacobian_scales_by_rate_and_curvature():
    # ℓ = Σ c (θ − λ)²/2, so θ* = λ and dF/dλ = ∂f/∂θ. One step gives rate · c times this.
    curvature, rate = jnp.array([0.5, 1.0, 2.0, 3.0]), 0.3
    bowl = problem(
        optax.sgd(rate),
        lambda params, hyperparams, batch: (curvature * (params - hyperparams["penalty"]) ** 2).sum() / 2,
    )
    estimate, _ = estimated(hypergrad.sama(bowl, num_steps=300))
    truth = jax.grad(problems.mean_squares)(LAM["penalty"], problems.TASK.valid)
    np.testing.assert_allclose(estimate.hypergrad["penalty"], rate * curvature * truth, rtol=1e-8)


def test_answers_for_a_rate_and_carries_the_training():
    def rated(rate, w):
        return problems.mean_squares(w - rate * jax.grad(problems.penalized)(w, LAM, train), problems.TASK.valid)

    train = problems.TASK.train
    loop = inner.loop(
        lambda params, hyperparams, batch: problems.penalized(params, LAM, batch), optax.sgd, init=problems.zeros
    )
    estimator = hypergrad.sama(
        inner.problem(loop, lambda params, hyperparams, batch: problems.mean_squares(params, batch)),
        num_steps=2,
        horizon=4,
    )
    rate, state, is_done = jnp.array(0.1), estimator.init(KEY, jnp.array(0.1), problems.TASK), []
    for steps in (2, 4):
        estimate, state = jax.jit(estimator.estimate)(rate, problems.TASK, state)
        is_done.append(bool(estimate.done))
        before = inner.run(loop, num_steps=steps - 1)(KEY, rate, train).params
        np.testing.assert_allclose(estimate.hypergrad, jax.grad(rated)(0.1, before), rtol=1e-10)
    assert is_done == [False, True] and estimate.metrics["inner_steps"] == 4

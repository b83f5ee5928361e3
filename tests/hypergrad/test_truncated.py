"""Truncation: each window against its closed form, T1–T2 against its formula, horizons that do not end together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, training

KEY = jax.random.key(0)

# θ ← θ − r(θ − a) from θ_0 = λ.start, and f = (θ − b)²/2 + λ.start²: after k steps of a window from θ_s,
#   θ_{s+k} = a + (1 − r)^k (θ_s − a).
A, B = 1.5, 0.9
LOOP = inner.loop(
    lambda params, hyperparams, data: (params - data) ** 2 / 2,
    lambda hyperparams: optax.sgd(hyperparams["rate"]),
    init=lambda key, hyperparams, data: hyperparams["start"],
)
PROBLEM = inner.problem(LOOP, lambda params, hyperparams, b: (params - b) ** 2 / 2 + hyperparams["start"] ** 2)
LAM = {"rate": jnp.array(0.2), "start": jnp.array(-0.3)}
TASK = base.Task(jnp.array(A), jnp.array(B))


def window_by_hand(lam, start, weights):
    """F of one window, and its derivatives with respect to r and to where the window starts."""
    k, decay = np.arange(1, len(weights) + 1), 1 - float(lam["rate"])
    theta = A + decay**k * (start - A)
    by_theta = weights * (theta - B)
    value = (weights * (theta - B) ** 2).sum() / 2 + float(lam["start"]) ** 2
    return value, (by_theta * -k * decay ** (k - 1) * (start - A)).sum(), (by_theta * decay**k).sum(), theta[-1]


@pytest.mark.parametrize(("outer", "weights", "remat"), [("last", [0, 0, 1], "none"), ("mean", [1 / 3] * 3, "step")])
def test_every_window_equals_its_closed_form_while_hyperparams_move(outer, weights, remat):
    estimator = hypergrad.truncated(PROBLEM, num_steps=9, truncation_length=3, outer=outer, remat=remat)
    estimate = jax.jit(estimator.estimate)
    lam, state, start = LAM, estimator.init(KEY, LAM, TASK), float(LAM["start"])
    for window in range(3):
        out, state = estimate(lam, TASK, state)
        value, by_rate, by_start, start = window_by_hand(lam, start, np.array(weights))
        direct = 2 * float(lam["start"])
        np.testing.assert_allclose(out.value, value, rtol=1e-12)
        np.testing.assert_allclose(out.hypergrad["rate"], by_rate, rtol=1e-12)
        # The initialization has a part in the window that starts the run, and in no other.
        np.testing.assert_allclose(out.hypergrad["start"], direct + by_start * (window == 0), rtol=1e-12)
        np.testing.assert_allclose(state.inner.params, start, rtol=1e-12)
        assert (out.done, out.metrics["inner_steps"]) == (window == 2, 3 * (window + 1))
        lam = {"rate": lam["rate"] + 0.05, "start": lam["start"] + 0.1}
    assert estimator.kind == "biased"


def test_a_window_of_one_step_equals_the_formula_of_t1t2():
    # Luketina et al.: dF/dλ = ∂f/∂λ − η (∂f/∂θ)(θ') ∂²ℓ/∂θ∂λ, θ' = θ − η ∇θ ℓ.
    eta = 0.1
    loop = inner.loop(problems.penalized, lambda hyperparams: optax.sgd(eta), init=problems.zeros)
    problem = inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch) + hp["penalty"].sum())
    lam = {"penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}
    estimator = hypergrad.truncated(problem, num_steps=3, truncation_length=1)
    estimate, state = jax.jit(estimator.estimate), estimator.init(KEY, lam, problems.TASK)
    theta = np.zeros(problems.NUM_FEATURES)
    for step in range(3):
        out, state = estimate(lam, problems.TASK, state)
        after = theta - eta * jax.grad(problems.penalized)(theta, lam, problems.TASK.train)
        f_theta = jax.grad(problems.mean_squares)(after, problems.TASK.valid)
        np.testing.assert_allclose(out.hypergrad["penalty"], 1 - eta * f_theta * theta, rtol=1e-12)  # ∂²ℓ/∂θ∂λ = θ
        assert out.done == (step == 2)
        theta = after


@pytest.mark.once
def test_staggered_slots_do_not_end_together_and_every_horizon_is_whole():
    batch = problems.stack([problems.regression_task(seed) for seed in range(4)])
    estimator = hypergrad.over_tasks(hypergrad.truncated(problems.RIDGE, num_steps=8, truncation_length=2))
    learner = training.learner(estimator, optax.sgd(0.1), stagger=4)
    state, step = jax.jit(learner.init)(KEY, problems.LAM, batch), jax.jit(learner.step)
    np.testing.assert_array_equal(state.estimator_state.inner.step, [0, 2, 4, 6])
    # A slot that is ahead is where plain training at the first λ takes it.
    for slot in range(4):
        task, start = jax.tree.map(lambda x, slot=slot: x[slot], (batch, state.estimator_state))
        expected = inner.run(problems.RIDGE_LOOP)(start.start_key, problems.LAM, task.train, 2 * slot)
        np.testing.assert_allclose(start.inner.params, expected.params, rtol=1e-12)
    is_done, num_steps = [], []
    for _ in range(12):
        state, _ = step(state)
        is_done.append(np.asarray(state.done))
        num_steps.append(np.asarray(state.estimator_state.inner.step))
    is_done, num_steps = np.array(is_done), np.array(num_steps)
    np.testing.assert_array_equal(is_done.sum(1), 1)  # one of four at every step
    np.testing.assert_array_equal(is_done, num_steps == 8)  # and none before its eighth
    for slot in range(4):
        assert set(np.diff(np.flatnonzero(is_done[:, slot]))) == {4}

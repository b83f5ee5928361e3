"""F2SA and BOME: their formulas by hand, and ridge's closed form at their stated order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(0)
LAM = problems.LAM


def closed_form(lam):
    """F of `ridge`, whose outer loss sees λ too, so that it has a minimum."""
    return problems.closed_form(lam) + 0.01 * (lam["log_penalty"] ** 2).sum()


def outer_loss(params, lam, batch):
    return problems.mean_squares(params, batch) + 0.01 * (lam["log_penalty"] ** 2).sum()


def inner_loss(params, lam, batch):
    return problems.penalized(params, {"penalty": jnp.exp(lam["log_penalty"])}, batch)


def ridge(rate=0.4, sampler=None, outer_loss=outer_loss):
    loop = inner.loop(inner_loss, lambda lam: optax.sgd(rate), init=problems.zeros, sampler=sampler)
    return inner.problem(loop, outer_loss)


def penalized_value(lam, mu):
    """min_y [f + μ g] − μ min_z g, two linear solves."""
    train, valid = problems.TASK.train, problems.TASK.valid

    def quadratic(data):
        return data["x"].T @ data["x"] / len(data["y"]), data["x"].T @ data["y"] / len(data["y"])

    (g_matrix, g_vector), (f_matrix, f_vector) = quadratic(train), quadratic(valid)
    g_matrix = g_matrix + jnp.diag(jnp.exp(lam["log_penalty"]))
    y = jnp.linalg.solve(f_matrix + mu * g_matrix, f_vector + mu * g_vector)
    gap = inner_loss(y, lam, train) - inner_loss(problems.solution(lam), lam, train)
    return outer_loss(y, lam, valid) + mu * gap


def difference(estimate, expected):
    return float(jnp.linalg.norm(estimate.hypergrad["log_penalty"] - expected["log_penalty"]))


@pytest.mark.once
def test_f2sa_equals_the_gradient_of_its_penalized_problem_and_its_bias_is_inverse_to_the_multiplier():
    estimator = hypergrad.f2sa(ridge(), num_steps=600, multiplier=lambda count: 5.0 * 4.0**count)
    estimate, state = jax.jit(estimator.estimate), estimator.init(KEY, LAM, problems.TASK)
    truth, errors = jax.grad(closed_form)(LAM), []
    expect = jax.jit(jax.grad(penalized_value))
    for mu in (5.0, 20.0, 80.0, 320.0, 1280.0):
        out, state = estimate(LAM, problems.TASK, state)
        expected = expect(LAM, mu)
        np.testing.assert_allclose(out.hypergrad["log_penalty"], expected["log_penalty"], rtol=1e-8)
        assert out.metrics["multiplier"] == mu and out.metrics["gap"] > 0
        errors.append(difference(out, truth))
    np.testing.assert_allclose(out.value, closed_form(LAM), rtol=1e-9)
    assert errors[0] > 1e-3
    for coarse, fine in zip(errors[2:-1], errors[3:], strict=True):
        assert 3.8 < coarse / fine < 4.2


def test_f2sa_takes_the_steps_of_its_algorithm():
    mu, rate, train, valid = 3.0, 0.2, problems.TASK.train, problems.TASK.valid
    estimator = hypergrad.f2sa(ridge(rate), num_steps=2, multiplier=mu)
    y = z = jnp.zeros(4)
    state = estimator.init(KEY, LAM, problems.TASK)
    for _ in range(2):
        estimate, state = jax.jit(estimator.estimate)(LAM, problems.TASK, state)
        for _ in range(2):
            z = z - rate * jax.grad(inner_loss)(z, LAM, train)
            y = y - rate / mu * (mu * jax.grad(inner_loss)(y, LAM, train) + jax.grad(outer_loss)(y, LAM, valid))
    # ∇λ ℓ = exp(λ) θ²/2.
    expected = 0.02 * LAM["log_penalty"] + mu * jnp.exp(LAM["log_penalty"]) * (y**2 - z**2) / 2
    np.testing.assert_allclose(state.inner.params, z, rtol=1e-12)
    np.testing.assert_allclose(state.penalized.params, y, rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], expected, rtol=1e-10)
    np.testing.assert_allclose(estimate.value, outer_loss(z, LAM, valid), rtol=1e-12)


@pytest.mark.once
def test_both_runs_of_f2sa_see_the_same_batches():
    # An outer loss that θ does not enter penalizes nothing: whatever the multiplier, the runs are one.
    blind = ridge(
        sampler=inner.minibatch(3, replace=True), outer_loss=lambda params, lam, batch: (lam["log_penalty"] ** 2).sum()
    )
    estimator = hypergrad.f2sa(blind, num_steps=4, multiplier=1e6)
    estimate, state = jax.jit(estimator.estimate)(LAM, problems.TASK, estimator.init(KEY, LAM, problems.TASK))
    np.testing.assert_array_equal(state.penalized.params, state.inner.params)
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], 2 * LAM["log_penalty"], rtol=1e-12)


@pytest.mark.parametrize("barrier", [0.1, 3.0])
@pytest.mark.once
def test_bome_takes_the_step_of_its_algorithm(barrier):
    rate, train, valid = 0.2, problems.TASK.train, problems.TASK.valid
    theta = inner.run(ridge(rate).loop, num_steps=1)(KEY, LAM, train).params
    z = theta
    for _ in range(3):
        z = z - rate * jax.grad(inner_loss)(z, LAM, train)

    def stacked(function):  # over (θ, λ) together
        grads = jax.grad(lambda x: function(x[:4], {"log_penalty": x[4:]}))
        return np.asarray(grads(jnp.concatenate([theta, LAM["log_penalty"]])))

    f = stacked(lambda params, lam: outer_loss(params, lam, valid))
    q = stacked(lambda params, lam: inner_loss(params, lam, train) - inner_loss(z, lam, train))
    mu = max((barrier * (q @ q) - f @ q) / (q @ q), 0.0)
    assert (mu == 0) == (barrier == 0.1)
    estimator = hypergrad.bome(ridge(rate), num_steps=3, barrier=barrier)
    state = estimator.init(KEY, LAM, problems.TASK)
    state = state._replace(inner=inner.step(ridge(rate).loop, state.inner, LAM, train))
    estimate, after = jax.jit(estimator.estimate)(LAM, problems.TASK, state)
    np.testing.assert_allclose(estimate.metrics["multiplier"], mu, rtol=1e-10)
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], (f + mu * q)[4:], rtol=1e-10)
    np.testing.assert_allclose(after.inner.params, theta - rate * (f + mu * q)[:4], rtol=1e-10)
    np.testing.assert_allclose(estimate.value, outer_loss(theta, LAM, valid), rtol=1e-12)


def test_the_value_of_bome_is_that_of_the_average_of_a_schedule_free_optimizer():
    """y = 0.5 x + 0.5 z after two steps from 0 with ℓ = (θ − λ)²/2, by hand: λ = 2, z = 0.2, 0.38; x = 0.2, 0.29."""
    loop = inner.loop(
        lambda params, lam, batch: (params - lam) ** 2 / 2,
        lambda lam: optax.contrib.schedule_free_sgd(0.1, b1=0.5),
        init=lambda *_: jnp.array(0.0),
    )
    estimator = hypergrad.bome(inner.problem(loop, lambda params, lam, batch: params**2), num_steps=2, barrier=0.7)
    lam = jnp.array(2.0)
    state = estimator.init(KEY, lam, problems.TASK)
    for _ in range(2):
        state = state._replace(inner=inner.step(loop, state.inner, lam, None))
    estimate, _ = estimator.estimate(lam, problems.TASK, state)
    np.testing.assert_allclose(loop.iterate(state.inner), 0.335, rtol=1e-12)
    np.testing.assert_allclose(estimate.value, 0.29**2, rtol=1e-12)
    y, z = 0.335, inner.run(loop, num_steps=4)(KEY, lam, None).params  # ∇f and ∇q are taken at y
    grads = jax.grad(lambda y, lam: y**2, (0, 1))(y, 2.0), jax.grad(lambda y, lam: (y - lam) ** 2 / 2, (0, 1))(y, 2.0)
    q = np.array([grads[1][0], grads[1][1] - (2.0 - z)])
    mu = max(0.7 - float(np.dot(grads[0], q)) / float(q @ q), 0)
    np.testing.assert_allclose(estimate.metrics["multiplier"], mu, rtol=1e-12)


@pytest.mark.once
def test_bome_arrives_at_the_minimum_within_its_step_size():
    newton = jax.jit(lambda x: x - jnp.linalg.solve(jax.hessian(f)(x), jax.grad(f)(x)))
    f = lambda x: closed_form({"log_penalty": x})
    best = jnp.zeros(4)
    for _ in range(10):
        best = newton(best)
    assert jnp.linalg.norm(jax.grad(f)(best)) < 1e-13
    distances = []
    for rate in (0.2, 0.1):
        estimator = hypergrad.bome(ridge(rate), num_steps=100)

        def descend(carry, _, estimator=estimator):
            lam, state = carry
            estimate, state = estimator.estimate(lam, problems.TASK, state)
            return (optax.tree.add_scale(lam, -1.0, estimate.hypergrad), state), estimate.metrics["multiplier"]

        start = (LAM, estimator.init(KEY, LAM, problems.TASK))
        (lam, _), multipliers = jax.jit(lambda start, descend=descend: jax.lax.scan(descend, start, length=1000))(start)
        distances.append(float(jnp.linalg.norm(lam["log_penalty"] - best)))
        assert multipliers[-1] > 0.5 / rate
    assert jnp.linalg.norm(LAM["log_penalty"] - best) > 1 and distances[0] < 0.03
    assert 1.7 < distances[0] / distances[1] < 2.3


def test_the_multiplier_of_bome_at_an_inner_minimum_is_the_barrier():
    # At θ = 0 the gap and its gradient are zero.
    loop = inner.loop(
        lambda params, lam, batch: lam * params**2, lambda lam: optax.sgd(0.1), init=lambda *_: jnp.array(0.0)
    )
    estimator = hypergrad.bome(inner.problem(loop, lambda params, lam, batch: params + lam), num_steps=2, barrier=0.7)
    lam = jnp.array(2.0)
    estimate, _ = estimator.estimate(lam, problems.TASK, estimator.init(KEY, lam, problems.TASK))
    assert estimate.hypergrad == 1 and estimate.metrics["multiplier"] == 0.7

"""Every exact estimator against ridge regression, whose θ*(λ) is a linear solve."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import problems
import pytest
from jax.test_util import check_grads

from metaopt import hypergrad, inner, predictors, spaces

ESTIMATORS = {
    "unrolled": partial(hypergrad.unrolled, num_steps=400),
    "unrolled_step": partial(hypergrad.unrolled, num_steps=400, remat="step"),
    "unrolled_sqrt": partial(hypergrad.unrolled, num_steps=400, remat="sqrt"),
    "lookahead": partial(hypergrad.lookahead, commit=20, num_steps=400),
    "implicit": partial(hypergrad.implicit, num_steps=40, solver=hypergrad.cg(tol=1e-10)),
    "implicit_step": partial(
        hypergrad.implicit, num_steps=40, condition="step", solver=hypergrad.neumann(num_steps=40, rate=1.0)
    ),
    "warm_implicit": partial(hypergrad.warm_implicit, num_steps=40, adjoint_rate=0.4),
}
KEY = jax.random.key(0)


def converged(estimator, hyperparams, task, calls=10):
    chex.clear_trace_counter()
    estimate = jax.jit(chex.assert_max_traces(estimator.estimate, n=1))
    state = estimator.init(KEY, hyperparams, task)
    for _ in range(calls):
        out, state = estimate(hyperparams, task, state)
    return out


def check(estimate, value_and_grad):
    value, expected = value_and_grad
    assert optax.tree.norm(expected) > 3e-3  # or else the test says nothing
    chex.assert_trees_all_close(estimate.value, value, rtol=1e-9)
    chex.assert_trees_all_close(estimate.hypergrad, expected, rtol=1e-6, atol=1e-9)
    assert estimate.done.dtype == bool


@pytest.mark.once
def test_the_closed_form_itself():
    check_grads(jax.jit(problems.closed_form), (problems.LAM,), order=1, rtol=1e-6)
    # θ* is where the gradient of the inner loss vanishes, and training arrives there.
    theta = problems.solution(problems.LAM)
    context = problems.RIDGE_LOOP.context(problems.RIDGE_LOOP.init(KEY, problems.LAM, problems.TASK.train))
    grads = jax.grad(problems.RIDGE_LOOP.loss, has_aux=True)(theta, problems.LAM, problems.TASK.train, context)[0]
    chex.assert_trees_all_close(grads, jnp.zeros_like(theta), atol=1e-14)
    trained = inner.run(problems.RIDGE_LOOP, num_steps=400)(KEY, problems.LAM, problems.TASK.train)
    chex.assert_trees_all_close(trained.params, theta, rtol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.once
def test_converges_to_the_closed_form(name):
    estimator = ESTIMATORS[name](problems.RIDGE)
    estimate = converged(estimator, problems.LAM, problems.TASK)
    check(estimate, value_and_grad(problems.closed_form)(problems.LAM))


@functools.cache
def value_and_grad(function):
    return jax.jit(jax.value_and_grad(function))


def closed_form_of_coordinates(unconstrained):
    penalty = spaces.to_constrained(problems.SPACE, unconstrained)["penalty"]
    return problems.closed_form({"log_penalty": jnp.log(penalty)})


# Checkpoints change nothing here, as `test_unroll` shows.
COMPOSED = [name for name in ESTIMATORS if name not in ("unrolled_step", "unrolled_sqrt")]


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.once
def test_through_a_change_of_coordinates(name):
    unconstrained = spaces.Unconstrained({"penalty": jnp.array([2.0, -1.0, 1.5, 0.5])})
    estimator = ESTIMATORS[name](spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE))
    estimate = converged(estimator, unconstrained, problems.TASK)
    check(estimate, value_and_grad(closed_form_of_coordinates)(unconstrained))


REAL = {"log_penalty": spaces.real(-1.0, shape=(problems.NUM_FEATURES,))}
PREDICTOR = predictors.mlp(REAL, 2, num_hidden=3)
TASKS = [problems.regression_task(seed) for seed in range(3)]


def closed_form_of_weights(phi):
    lam = [spaces.to_constrained(REAL, PREDICTOR.apply(phi, task)) for task in TASKS]
    return sum(map(problems.closed_form, lam, TASKS)) / len(TASKS)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.once
def test_predicted_for_a_batch_of_tasks(name):
    phi = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), PREDICTOR.init(KEY))
    problem = spaces.constrain(problems.RIDGE, REAL)
    estimator = hypergrad.over_tasks(predictors.amortize(ESTIMATORS[name](problem), PREDICTOR))
    estimate = converged(estimator, phi, problems.stack(TASKS))
    check(estimate, value_and_grad(closed_form_of_weights)(phi))
    assert estimate.done.shape == (3,)
    assert estimate.metrics["num_finite"] == 3


@pytest.mark.parametrize("name", ["unrolled", "unrolled_sqrt"])
@pytest.mark.once
def test_second_derivatives_through_an_estimator(name):
    estimator = ESTIMATORS[name](problems.RIDGE)
    hessian = jax.jit(jax.jacfwd(lambda lam: estimator.estimate(lam, problems.TASK, KEY)[0].hypergrad))(problems.LAM)
    expected = jax.jit(jax.hessian(problems.closed_form))(problems.LAM)
    assert optax.tree.norm(expected) > 1e-2
    chex.assert_trees_all_close(hessian, expected, rtol=1e-6, atol=1e-9)

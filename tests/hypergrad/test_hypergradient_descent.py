"""Hypergradient descent: its closed form for SGD, one step of lookahead at the inner loss, and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(0)
PENALTY = {"penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}


def ridge(params, hyperparams, batch):
    return problems.penalized(params, PENALTY, batch)


def outer_loss(params, hyperparams, batch):
    raise AssertionError("the outer loss is not looked at")


@pytest.mark.once
def test_equals_the_product_of_successive_gradients_on_minibatches():
    loop = inner.loop(
        ridge, lambda hp: optax.sgd(hp["rate"]), init=problems.zeros, sampler=inner.minibatch(5, replace=True)
    )
    estimator = hypergrad.hypergradient_descent(inner.problem(loop, outer_loss), horizon=3)
    rates = [0.05, 0.2, 0.1]
    state = jax.jit(estimator.init)(KEY, {"rate": jnp.array(rates[0])}, problems.TASK)
    by_hand = loop.init(jax.random.key(0), {"rate": 0.0}, problems.TASK.train)._replace(key=state.inner.key)
    once, gradient, w = jax.jit(estimator.estimate), jax.jit(jax.value_and_grad(ridge)), jnp.zeros(4)

    @jax.jit
    def batch(step):
        return loop.batch(by_hand._replace(step=jnp.asarray(step, jnp.int32)), problems.TASK.train)

    for step, rate in enumerate(rates):
        before = gradient(w, None, batch(step))[1]
        w = w - rate * before
        value, after = gradient(w, None, batch(step + 1))
        estimate, state = once({"rate": jnp.array(rate)}, problems.TASK, state)
        np.testing.assert_allclose(estimate.hypergrad["rate"], -jnp.vdot(after, before), rtol=1e-11)
        np.testing.assert_allclose(estimate.value, value, rtol=1e-12)
        np.testing.assert_allclose(state.inner.params, w, rtol=1e-12)
        assert bool(estimate.done) == (step == 2) and abs(estimate.hypergrad["rate"]) > 1e-3


def _noisy_loss(params, hyperparams, batch, context):
    noise = 0.1 * jax.random.normal(context.key, params.shape)
    return ridge(params + noise, None, batch) + 0.1 * jnp.vdot(context.model_state, params), params


@pytest.mark.once
def test_equals_one_step_of_lookahead_with_the_inner_loss_as_the_outer_one():
    loop = inner.loop(
        _noisy_loss,
        lambda hp: optax.adamw(hp["rate"], b1=hp["momentum"], weight_decay=hp["decay"]),
        init=lambda key, hp, data: (jnp.ones(4), jnp.zeros(4)),
        with_context=True,
    )
    problem = inner.problem(
        loop,
        lambda params, hp, batch, context: _noisy_loss(params, hp, batch, context)[0],
        outer_batch=lambda key, task: task.train,
        with_context=True,
    )
    lam = {"rate": jnp.array(0.1), "momentum": jnp.array(0.7), "decay": jnp.array(0.3)}
    estimator, one_step = hypergrad.hypergradient_descent(problem), hypergrad.lookahead(problem, commit=0)
    state, start = (jax.jit(e.init)(KEY, lam, problems.TASK) for e in (estimator, one_step))
    once, expect = jax.jit(estimator.estimate), jax.jit(one_step.estimate)
    for _ in range(3):
        expected, _ = expect(lam, problems.TASK, start._replace(inner=state.inner))
        estimate, state = once(lam, problems.TASK, state)
    assert min(abs(leaf) for leaf in jax.tree.leaves(expected.hypergrad)) > 1e-5
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), estimate.hypergrad, expected.hypergrad)


def test_an_estimate_takes_one_gradient():
    calls = []

    def counted(params, hyperparams, batch):
        calls.append(None)
        return ridge(params, hyperparams, batch)

    loop = inner.loop(counted, lambda hp: optax.sgd(hp["rate"]), init=problems.zeros)
    estimator, lam = hypergrad.hypergradient_descent(inner.problem(loop, outer_loss)), {"rate": jnp.array(0.1)}
    state = estimator.init(KEY, lam, problems.TASK)
    calls.clear()
    jax.eval_shape(estimator.estimate, lam, problems.TASK, state)
    assert len(calls) == 1

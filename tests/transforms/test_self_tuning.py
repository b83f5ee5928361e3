"""Optimizers that tune themselves: hypergradient descent as it is written down, and as the estimator has it."""

import chex
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metaopt import base, hypergrad, inner, transforms

START = np.array([1.0, -0.5, 2.0])
CURVATURE = np.array([1.0, 3.0, 0.2])
RATE, BETA, NUM_STEPS = 0.05, 0.01, 6


def rate_sgd(tuner, rule):
    return transforms.self_tuning(lambda hp: optax.sgd(hp["rate"]), {"rate": RATE}, tuner, rule=rule)


def train(optimizer, num_steps=NUM_STEPS):
    """λ at each step on a quadratic, and the parameters at the end."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(CURVATURE * params, state, params)
        return (params + updates, state), state.hyperparams

    params = jnp.array(START)
    (params, _), lams = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps))()
    return lams, params


@pytest.mark.parametrize("rule", ["additive", "multiplicative", "normalized", "stack"])
def test_the_rate_of_sgd_is_hypergradient_descent(rule):
    if rule == "stack":
        tuner = transforms.self_tuning(lambda hp: optax.sgd(hp), BETA, optax.sgd(0.3), rule="additive")
        lams, _ = train(rate_sgd(tuner, "additive"))
    else:
        lams, _ = train(rate_sgd(optax.sgd(BETA), rule))
    theta, rate, beta, last, last_h, expected = START, RATE, BETA, None, 0.0, []
    for _ in range(NUM_STEPS):
        g = CURVATURE * theta
        if last is not None:
            h = -g @ last
            if rule == "multiplicative":
                rate = rate * np.exp(-beta * rate * h)
            elif rule == "normalized":
                rate = rate * np.exp(-beta * h / (np.linalg.norm(g) * np.linalg.norm(last)))
            else:
                beta = beta + (0.3 * h * last_h if rule == "stack" else 0.0)
                rate = rate - beta * h
            last_h = h
        theta, last = theta - rate * g, g
        expected.append(rate)
    np.testing.assert_allclose(lams["rate"], expected, rtol=1e-10)
    assert len(set(expected)) == NUM_STEPS


def test_the_signal_of_adamw_is_that_of_the_estimator():
    # The tuner keeps λ and shows what it was given.
    seen = optax.GradientTransformation(
        lambda hp: optax.tree.zeros_like(hp), lambda h, state, hp=None: (optax.tree.zeros_like(h), h)
    )
    factory = lambda hp: optax.adamw(hp["rate"], b1=hp["b1"], weight_decay=hp["decay"])
    lam = jax.tree.map(jnp.asarray, {"rate": 0.1, "b1": 0.7, "decay": 0.2})
    optimizer = transforms.self_tuning(factory, lam, seen, rule="additive")

    def loss(params, hp, data):
        return jnp.sum(CURVATURE * params**2) / 2

    loop = inner.loop(loss, factory, init=lambda key, hp, data: jnp.array(START))
    problem = inner.problem(loop, loss)
    estimator = hypergrad.hypergradient_descent(problem)
    task = base.Task(None, None)
    state = estimator.init(jax.random.key(0), lam, task)
    params = jnp.array(START)
    opt_state = optimizer.init(params)
    update, estimate = jax.jit(optimizer.update), jax.jit(estimator.estimate)
    hypergradient = optax.tree.zeros_like(lam)  # before the first step there is nothing to judge
    for _ in range(4):
        updates, opt_state = update(CURVATURE * params, opt_state, params)
        params = params + updates
        chex.assert_trees_all_close(opt_state.tuner, hypergradient, rtol=1e-9)  # of the last step
        out, state = estimate(lam, task, state)
        hypergradient = out.hypergrad


@pytest.mark.parametrize("start", [1e-4, 1.0])
def test_it_recovers_from_a_bad_rate(start):
    # 1e-4 does nothing in 100 steps; 1 is above 2/3, where gradient descent diverges.
    _, tuned = train(transforms.self_tuning(lambda hp: optax.sgd(hp), start, optax.sgd(0.1)), 100)
    plain = (1 - start * CURVATURE) ** 100 * START
    assert np.max(np.abs(tuned)) < 0.02 and np.max(np.abs(plain)) > 0.9


def test_flax_holds_it():
    def loss(params):
        return jnp.sum((params["w"] - 1) ** 2)

    params = {"w": jnp.zeros(2)}
    optimizer = transforms.self_tuning(lambda hp: optax.adam(hp["rate"]), {"rate": 1e-3}, optax.sgd(0.1))
    train_state = flax.training.train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    for _ in range(4):
        train_state = step(train_state)
    assert train_state.opt_state.hyperparams["rate"] > 1.2e-3
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    for _ in range(4):
        nnx_optimizer.update(model, nnx.grad(lambda m: jnp.sum((m(jnp.ones((1, 2))) - 9) ** 2))(model))
    assert nnx_optimizer.opt_state.hyperparams["rate"][...] > 1.2e-3


def test_bad_arguments():
    with pytest.raises(ValueError, match='`rule` must be "additive"'):
        transforms.self_tuning(optax.sgd, 0.1, optax.sgd(0.1), rule="exact")
    with pytest.raises(ValueError, match="`hyperparams` must be positive, since the normalized rule"):
        transforms.self_tuning(lambda hp: optax.adamw(0.1, weight_decay=hp["d"]), {"d": 0.0}, optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer = transforms.self_tuning(optax.sgd, 0.1, optax.sgd(0.1))
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))

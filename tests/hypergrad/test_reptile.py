"""Reptile's direction through any map from λ to the initialization."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner

DATA = problems.TASK


def test_the_direction_is_pulled_back_to_lambda():
    """θ_0 = M λ: the hypergradient is Mᵀ (θ_0 − θ_T)."""
    rng = np.random.default_rng(0)
    matrix, lam = rng.normal(size=(problems.NUM_FEATURES, 2)), rng.normal(size=2)
    problem = inner.problem(
        inner.loop(
            lambda params, hp, batch: problems.mean_squares(params, batch),
            lambda hp: optax.sgd(0.1),
            init=lambda key, hp, data: jnp.asarray(matrix) @ hp,
        ),
        lambda params, hp, batch: problems.mean_squares(params, batch),
    )
    estimator = hypergrad.reptile(problem, num_steps=3)
    state = estimator.init(jax.random.key(0), jnp.asarray(lam), DATA)
    out, after = jax.jit(estimator.estimate)(jnp.asarray(lam), DATA, state)
    x, y, theta = np.asarray(DATA.train["x"]), np.asarray(DATA.train["y"]), matrix @ lam
    for _ in range(3):
        theta = theta - 0.1 * x.T @ (x @ theta - y) / len(y)
    np.testing.assert_allclose(out.hypergrad, matrix.T @ (matrix @ lam - theta), rtol=1e-10)
    xv, yv = np.asarray(DATA.valid["x"]), np.asarray(DATA.valid["y"])
    assert out.value == pytest.approx(((xv @ theta - yv) ** 2).mean() / 2, rel=1e-10)
    assert out.done and estimator.kind == "pseudo" and after != state


def test_the_initialization_sees_the_training_rows():
    """θ_0 = λ mean(x) of the training rows: the hypergradient is mean(x)ᵀ (θ_0 − θ_1)."""
    loop = inner.loop(
        lambda params, hp, batch: problems.mean_squares(params, batch),
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: hp * data["x"].mean(0),
    )
    estimator = hypergrad.reptile(
        inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch)), num_steps=1
    )
    lam = jnp.array(0.7)
    estimate, _ = jax.jit(estimator.estimate)(lam, DATA, estimator.init(jax.random.key(0), lam, DATA))
    x, y = np.asarray(DATA.train["x"]), np.asarray(DATA.train["y"])
    gradient = x.T @ (0.7 * x @ x.mean(0) - y) / len(y)
    np.testing.assert_allclose(estimate.hypergrad, 0.1 * x.mean(0) @ gradient, rtol=1e-10)


def test_a_rule_of_whole_runs_has_the_value_of_unrolled_from_the_same_key():
    """The initialization and both batches are random."""
    loop = inner.loop(
        lambda params, hp, batch: ((params - batch) ** 2).sum() / 2,
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: hp + jax.random.normal(key, (2,)),
        sampler=lambda key, step, data: data + jax.random.normal(jax.random.fold_in(key, step), (2,)),
    )
    problem = inner.problem(
        loop,
        lambda params, hp, batch: ((params - batch) ** 2).sum(),
        outer_batch=lambda key, task: task.valid + jax.random.normal(key, (2,)),
    )
    hp, task, key = jnp.ones(2), base.Task(jnp.zeros(2), jnp.zeros(2)), jax.random.key(5)
    rules = [rule(problem, num_steps=3) for rule in (hypergrad.unrolled, hypergrad.forward, hypergrad.reptile)]
    values = [rule.estimate(hp, task, rule.init(key, hp, task))[0].value for rule in rules]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)

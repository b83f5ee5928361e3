"""Lookahead: DARTS written by hand, its first-order form, and the carried state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner

KEY = jax.random.key(0)
LOOP = inner.loop(problems.penalized, lambda hyperparams: optax.sgd(0.1), init=problems.zeros)
PROBLEM = inner.problem(
    LOOP, lambda params, hyperparams, batch: problems.mean_squares(params, batch) + 0.1 * hyperparams["penalty"].sum()
)
LAM = {"penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}


def committed(num_steps):
    return inner.run(LOOP, num_steps=num_steps)(KEY, LAM, problems.TASK.train).params


def test_one_step_equals_second_order_darts():
    # Liu et al., Eq. 7, with the exact product, at w after a step:
    # ∂f/∂α(w') − ξ (∂²ℓ/∂α∂w)(w) ∂f/∂w(w'), w' = w − ξ ∇w ℓ(w).
    train, valid, xi = problems.TASK.train, problems.TASK.valid, 0.1
    w = committed(1)
    ahead = w - xi * jax.grad(problems.penalized)(w, LAM, train)
    f, (f_w, f_alpha) = jax.value_and_grad(PROBLEM.outer_loss, argnums=(0, 1))(ahead, LAM, valid, None)
    mixed = jax.grad(lambda lam: jnp.vdot(jax.grad(problems.penalized)(w, lam, train), f_w))(LAM)
    expected = jax.tree.map(lambda direct, second: direct - xi * second, f_alpha, mixed)
    estimator = hypergrad.lookahead(PROBLEM)
    estimate, state = jax.jit(estimator.estimate)(LAM, problems.TASK, estimator.init(KEY, LAM, problems.TASK))
    assert optax.tree.norm(mixed) > 1e-2
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (f, expected), rtol=1e-11)
    chex.assert_trees_all_close(state.inner.params, w, rtol=1e-12)  # the virtual step is dropped
    assert estimate.metrics["inner_steps"] == state.inner.step == 1


def test_no_virtual_step_is_first_order_darts():
    estimator = hypergrad.lookahead(PROBLEM, commit=2, num_steps=0)
    estimate, _ = estimator.estimate(LAM, problems.TASK, estimator.init(KEY, LAM, problems.TASK))
    expected = jax.value_and_grad(lambda lam: PROBLEM.outer_loss(committed(2), lam, problems.TASK.valid, None))(LAM)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), expected, rtol=1e-12)


@pytest.mark.parametrize("remat", ["none", "step", "sqrt"])
def test_without_commitment_it_is_the_unrolled_estimate(remat):
    estimator = hypergrad.lookahead(PROBLEM, commit=0, num_steps=6, remat=remat)
    estimate, _ = jax.jit(estimator.estimate)(LAM, problems.TASK, estimator.init(KEY, LAM, problems.TASK))
    expected, _ = jax.jit(hypergrad.unrolled(PROBLEM, num_steps=6).estimate)(LAM, problems.TASK, KEY)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (expected.value, expected.hypergrad), rtol=1e-11)


@pytest.mark.once
def test_the_horizon_ends_once_so_many_steps_are_committed():
    for horizon, expected in ((4, [False, True, True]), (3, [False, True, True]), (None, [False] * 3)):
        estimator = hypergrad.lookahead(PROBLEM, commit=2, horizon=horizon)
        state, is_done, once = estimator.init(KEY, LAM, problems.TASK), [], jax.jit(estimator.estimate)
        for _ in range(3):
            estimate, state = once(LAM, problems.TASK, state)
            is_done.append(bool(estimate.done))
        assert is_done == expected


def test_the_gradient_is_an_argument_of_the_virtual_steps():
    def stopped_grad(function, **options):
        gradient = jax.grad(function, **options)
        return lambda *args: jax.lax.stop_gradient(gradient(*args))

    estimator = hypergrad.lookahead(PROBLEM, num_steps=2, grad=stopped_grad)
    estimate, _ = estimator.estimate(LAM, problems.TASK, estimator.init(KEY, LAM, problems.TASK))
    np.testing.assert_allclose(estimate.hypergrad["penalty"], np.full(4, 0.1), rtol=1e-12)  # only the direct part ∂f/∂λ


@pytest.mark.once
def test_one_step_recomputes_too():
    # XLA inlines a loop of one step; its values must not be kept.
    def losses(params, batch):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return (x.mean(1) - batch["y"]) ** 2

    loss = inner.weighted(losses, lambda hyperparams, batch: jax.nn.sigmoid(hyperparams))
    loop = inner.loop(loss, lambda hyperparams: optax.sgd(0.1), init=lambda *_: [jnp.eye(32)] * 16)
    problem = inner.problem(loop, lambda params, hyperparams, batch: losses(params, batch).mean())
    data, lam, memory = {"x": jnp.ones((512, 32)), "y": jnp.ones(512)}, jnp.zeros(512), {}
    for remat in ("none", "step"):
        estimator = hypergrad.lookahead(problem, commit=0, remat=remat)
        state = jax.eval_shape(estimator.init, KEY, lam, base.Task(data, data))
        program = jax.jit(estimator.estimate).lower(lam, base.Task(data, data), state).compile()
        memory[remat] = program.memory_analysis().temp_size_in_bytes
    assert memory["step"] < 0.9 * memory["none"]

"""Schedules of λ by window: training by hand, the parts of every step, what stays constant."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(3)
LOOP = inner.loop(
    problems.penalized,
    lambda hyperparams: optax.sgd(hyperparams["rate"]),
    init=lambda key, hyperparams, data: hyperparams["start"],
)
PROBLEM = inner.problem(
    LOOP, lambda params, hp, batch: problems.mean_squares(params, batch) + hp["penalty"].sum() * hp["rate"]
)
WINDOWS = {"rate": 3, "penalty": 2, "start": 0}
LAM = {
    "rate": jnp.array([0.3, 0.2, 0.1]),
    "penalty": jnp.array([[0.5, 0.1, 0.3, 0.8], [0.2, 0.4, 0.1, 0.0]]),
    "start": jnp.array([0.1, -0.2, 0.3, 0.4]),
}
# ⌊3t/7⌋ and ⌊2t/7⌋
RATE, PENALTY = [0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.once
def test_every_step_sees_the_value_of_its_window():
    def by_hand(lam):
        theta, losses = lam["start"], []
        for rate, penalty in zip(RATE, PENALTY, strict=True):
            now = {"rate": lam["rate"][rate], "penalty": lam["penalty"][penalty]}
            theta = theta - now["rate"] * jax.grad(problems.penalized)(theta, now, problems.TASK.train)
            losses.append(PROBLEM.outer_loss(theta, now, problems.TASK.valid, None))
        return jnp.stack(losses).mean()

    problem = inner.piecewise(PROBLEM, WINDOWS, num_steps=7)
    expected = jax.jit(jax.value_and_grad(by_hand))(LAM)
    for rule in (hypergrad.unrolled, hypergrad.forward):
        out, _ = jax.jit(rule(problem, num_steps=7, outer="mean").estimate)(LAM, problems.TASK, KEY)
        chex.assert_trees_all_close((out.value, out.hypergrad), expected, rtol=1e-10)


@pytest.mark.once
def test_a_window_has_the_sum_of_its_steps():
    # At a constant schedule: the contributions of single steps add up to those of windows.
    num_steps, num_windows = 6, 2
    problem = inner.piecewise(PROBLEM, num_windows, num_steps=num_steps)

    @jax.jit
    def both(lam):
        repeated = jax.tree.map(lambda x: jnp.stack([x] * num_windows), lam)
        out, _ = hypergrad.unrolled(problem, num_steps=num_steps).estimate(repeated, problems.TASK, KEY)
        return out.hypergrad, hypergrad.trace(PROBLEM, num_steps=num_steps)(KEY, lam, problems.TASK)

    repeated_grads, parts = both({**LAM, "rate": jnp.array(0.2), "penalty": LAM["penalty"][0]})
    expected = jax.tree.map(lambda x: x.reshape(num_windows, -1, *x.shape[1:]).sum(1), parts.steps)
    expected = jax.tree.map(lambda x, start, outer: x.at[0].add(start).at[-1].add(outer), expected, *parts[::2])
    chex.assert_trees_all_close(repeated_grads, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.once
def test_steps_beyond_the_last_window_keep_its_value():
    problem = inner.piecewise(PROBLEM, WINDOWS, num_steps=3)
    params = inner.run(problem.loop, num_steps=5)(KEY, LAM, problems.TASK.train).params
    more = {
        **LAM,
        "rate": LAM["rate"][jnp.array([0, 1, 2, 2, 2])],
        "penalty": LAM["penalty"][jnp.array([0, 0, 1, 1, 1])],
    }
    longer = inner.piecewise(PROBLEM, {"rate": 5, "penalty": 5, "start": 0}, num_steps=5)
    expected = inner.run(longer.loop, num_steps=5)(KEY, more, problems.TASK.train).params
    np.testing.assert_allclose(params, expected, rtol=1e-12)

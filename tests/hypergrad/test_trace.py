"""Contributions of single steps: finite differences of λ at one step, and their sum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner
from metaopt.hypergrad import _trace

KEY = jax.random.key(3)
NUM_STEPS = 3
WEIGHTS = [0.5, 0.0, 2.0]
LAM = problems.EVERYTHING_LAM


def by_hand(uses):
    """F where each place at which λ enters has its own."""
    train_key, _ = jax.random.split(jax.random.split(KEY)[0])
    loop = problems.EVERYTHING_LOOP

    def step(state, x):
        lam, weight = x
        state = inner.step(loop, state, lam, problems.TASK.train)
        f = problems.EVERYTHING.outer_loss(loop.params(state), uses.outer, problems.TASK.valid, loop.context(state))
        return state, weight * f

    state = loop.init(train_key, uses.start, problems.TASK.train)
    return jax.lax.scan(step, state, (uses.steps, jnp.array(WEIGHTS)))[1].sum()


@pytest.mark.once
def test_each_contribution_equals_finite_differences_of_its_hyperparams_alone():
    @jax.jit
    def contributions(lam):
        return hypergrad.trace(problems.EVERYTHING, num_steps=NUM_STEPS, outer=WEIGHTS)(KEY, lam, problems.TASK)

    traced = contributions(LAM)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), traced)
    steps = jax.tree.map(lambda x: jnp.stack([x] * NUM_STEPS), LAM)
    base = _trace.Contributions(LAM, steps, LAM)

    def places():
        """One direction for each place, zero at the others."""
        zero = optax.tree.zeros_like(base)
        yield zero._replace(start=direction.start)
        yield zero._replace(outer=direction.outer)
        for t in range(NUM_STEPS):
            yield zero._replace(steps=jax.tree.map(lambda x, t=t: jnp.zeros_like(x).at[t].set(x[t]), direction.steps))

    directions = problems.stack(list(places()))
    eps = 1e-5
    shifted = jax.jit(jax.vmap(lambda v, sign: by_hand(optax.tree.add_scale(base, sign * eps, v)), (0, None)))
    expected = (shifted(directions, 1.0) - shifted(directions, -1.0)) / (2 * eps)
    assert (abs(expected) > 1e-4).all()
    np.testing.assert_allclose(jax.vmap(lambda v: optax.tree.vdot(traced, v))(directions), expected, rtol=1e-6)


@pytest.mark.once
def test_the_sum_is_the_hypergradient():
    # Over a batch of tasks, at the unrolled estimator's keys.
    batch = problems.stack([problems.regression_task(seed) for seed in range(2)])
    keys = jax.random.split(KEY, 2)
    options = {"num_steps": 5, "remat": "sqrt"}

    @jax.jit
    def both(lam):
        parts = jax.vmap(hypergrad.trace(problems.RIDGE, **options), (0, None, 0))(keys, lam, batch)
        unrolled = hypergrad.unrolled(problems.RIDGE, **options).estimate
        return parts, jax.vmap(unrolled, (None, 0, 0))(lam, batch, keys)[0].hypergrad

    parts, expected = both(problems.LAM)
    assert parts.steps["log_penalty"].shape == (2, 5, problems.NUM_FEATURES)
    total = jax.tree.map(lambda start, steps, outer: start + steps.sum(1) + outer, *parts)
    assert optax.tree.norm(expected) > 1e-2
    chex.assert_trees_all_close(total, expected, rtol=1e-12)

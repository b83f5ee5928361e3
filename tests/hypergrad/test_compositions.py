"""Carried rules under change of coordinates, amortization, seeds and tasks, against loops written out."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import problems
import pytest

from metaopt import hypergrad, inner, predictors, spaces

KEY = jax.random.key(0)
SPACE = {"tuned": spaces.positive(0.1, shape=())}
NUM_SEEDS, TASKS = 2, [problems.regression_task(seed) for seed in range(2)]
RULES = {
    "bome": partial(hypergrad.bome, num_steps=2, barrier=5.0),
    "darts_fd": hypergrad.darts_fd,
    "f2sa": partial(hypergrad.f2sa, num_steps=2, multiplier=lambda count: jnp.float64(2.0) + count),
    "hypergradient_descent": hypergrad.hypergradient_descent,
    "sama": hypergrad.sama,
}


def problem(name):
    """Seeds differ in where they start; λ is the rate for the rule of rates, else a penalty."""
    rated = name == "hypergradient_descent"
    loop = inner.loop(
        lambda params, lam, batch: problems.penalized(params, {"penalty": 0.2 if rated else lam["tuned"]}, batch),
        lambda lam: optax.sgd(lam["tuned"] if rated else 0.1, momentum=0.5),
        init=lambda key, lam, data: jnp.tile(jax.random.key_data(key) % 97 / data["x"].dtype.type(97), 2),
    )
    return inner.problem(loop, lambda params, lam, batch: problems.mean_squares(params, batch))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.once
def test_equals_loops_over_tasks_and_seeds(name):
    rule = RULES[name](spaces.constrain(problem(name), SPACE))
    predictor = predictors.mlp(SPACE, 2, num_hidden=2)
    phi = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), predictor.init(KEY))
    seeds = hypergrad.over_seeds(predictors.amortize(rule, predictor), NUM_SEEDS)
    whole = hypergrad.over_tasks(seeds)

    def one(key, task):
        """The second estimate's value and hypergradient by φ, of one task and seed."""
        lam, pullback = jax.vjp(lambda phi: predictor.apply(phi, task), phi)
        _, state = rule.estimate(lam, task, rule.init(key, lam, task))
        out, _ = rule.estimate(lam, task, state)
        return out.value, pullback(out.hypergrad)[0]

    def all_at_once(key, tasks):
        state = whole.init(key, phi, tasks)
        scanned, out = jax.lax.scan(lambda s, _: whole.estimate(phi, tasks, s)[::-1], state, length=2)
        return jax.tree.map(lambda x: x[1], out), scanned, state

    out, scanned, state = jax.jit(all_at_once)(KEY, problems.stack(TASKS))
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, state)
    # All that is carried went on, but for the keys of the training runs.
    numbers = [
        [x for x in jax.tree.leaves(s) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)] for s in (scanned, state)
    ]
    assert all((after != before).any() for after, before in zip(*numbers, strict=True))
    once = jax.jit(one)
    keys = [jax.random.split(key, NUM_SEEDS) for key in jax.random.split(KEY, len(TASKS))]
    parts = [once(key, task) for task, row in zip(TASKS, keys, strict=True) for key in row]
    assert abs(parts[0][0] - parts[1][0]) > 1e-6  # seeds differ
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *parts)
    assert optax.tree.norm(expected[1]) > 1e-5
    chex.assert_trees_all_close((out.value, out.hypergrad), expected, rtol=1e-9, atol=1e-12)
    assert out.metrics["num_finite"] == len(TASKS) and out.done.shape == (len(TASKS),)


@pytest.mark.parametrize("name", RULES)
def test_float32_stays_float32(name):
    rule = RULES[name](problem(name))
    lam, task = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ({"tuned": 0.1}, TASKS[0]))
    state = jax.eval_shape(rule.init, KEY, lam, task)
    estimate, after = jax.eval_shape(rule.estimate, lam, task, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert estimate.hypergrad["tuned"].dtype == estimate.value.dtype == jnp.float32

"""What only needs F computes no hypergradient, under `jit` and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import base, predictors, spaces, training

KEY = jax.random.key(0)
SPACE = {"a": spaces.real(0.0, shape=(2,))}
START = spaces.to_unconstrained(SPACE, spaces.default(SPACE))
TASK = base.Task((), (), jnp.ones(1))
WIDE = predictors.mlp(SPACE, 1, num_hidden=0, spread=0.5)


def counting():
    """F(λ) = |λ − 1|², and a list with an entry for every hypergradient that is computed."""
    calls = []

    def slope(x):
        calls.append(x)
        return np.asarray(2 * (x - 1))

    def estimate(hyperparams, task, state):
        x = hyperparams.coordinates["a"]
        hypergrad_ = jax.pure_callback(slope, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")
        value = ((x - 1) ** 2).sum()
        return base.Estimate(value, spaces.Unconstrained({"a": hypergrad_}), jnp.array(True), {}), state

    return base.Estimator(lambda key, hyperparams, task: key, estimate, kind="exact"), calls


def best_of(estimator, **options):
    wide = predictors.best_of(estimator, WIDE, num_proposals=7, **options)
    return lambda key, _, task: wide.estimate(WIDE.init(key), task, wide.init(key, None, task))


RUNS = {  # name: what runs, and the hypergradients that it needs
    "propose": (lambda e: training.propose(e, num_proposals=7, rounds=2), 0),
    "propose in chunks": (lambda e: training.propose(e, num_proposals=7, chunk=3), 0),
    "best_of": (best_of, 1),
    "best_of in chunks": (lambda e: best_of(e, chunk=3), 1),
    "fine_tune": (lambda e: training.fine_tune(e, num_steps=2), 2),
    "fine_tune without steps": (lambda e: training.fine_tune(e, num_steps=0), 0),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("compiled", [True, False])
def test_hypergradients_that_are_not_used_are_not_computed(name, compiled):
    make, num = RUNS[name]
    estimator, calls = counting()
    run = make(estimator)
    jax.block_until_ready(jax.tree.leaves((jax.jit(run) if compiled else run)(KEY, START, TASK)[0]))
    assert len(calls) == num

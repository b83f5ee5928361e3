"""Changing coordinates changes the problem, and nothing else: against the chain rule by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from metaopt import base, spaces

SPACE = {
    "rate": spaces.interval(1e-2, 1.0, log=True),
    "start": spaces.real(1.0, 2.0),
    "decay": spaces.positive(0.1),
    "curvature": spaces.fixed(0.7),
}
TASK = base.Task(train=2.0, valid=1.5)
CONTEXT = base.Context(jax.random.key(0), jnp.array(0))

# θ ∈ R on g = ½ c (θ − train)² + ½ decay θ², and f = ½ (θ − valid)² + decay².
LOOP = base.InnerLoop(
    init=lambda key, hyperparams, data: hyperparams["start"],
    batch=lambda state, data: data,
    loss=lambda params, hyperparams, batch, context: (
        0.5 * hyperparams["curvature"] * (params - batch) ** 2 + 0.5 * hyperparams["decay"] * params**2,
        None,
    ),
    update=lambda state, grads, model_state, hyperparams: state - hyperparams["rate"] * grads,
    params=lambda state: state,
    context=lambda state: CONTEXT,
    iterate=lambda state: state,
)
PROBLEM = base.Problem(
    LOOP,
    outer_loss=lambda params, hyperparams, batch, context: 0.5 * (params - batch) ** 2 + hyperparams["decay"] ** 2,
    outer_batch=lambda key, task: task.valid,
)
Z = spaces.Unconstrained({"rate": jnp.array(0.3), "start": jnp.array(-0.4), "decay": jnp.array(0.2), "curvature": None})


def outer(problem, hyperparams, num_steps=3):
    """F(λ) through the contract."""
    loop = problem.loop
    state = loop.init(jax.random.key(0), hyperparams, TASK.train)
    for _ in range(num_steps):
        batch, context = loop.batch(state, TASK.train), loop.context(state)
        grads, model_state = jax.grad(loop.loss, has_aux=True)(loop.params(state), hyperparams, batch, context)
        state = loop.update(state, grads, model_state, hyperparams)
    return problem.outer_loss(loop.params(state), hyperparams, TASK.valid, loop.context(state))


def by_hand(z, num_steps=3):
    """F(λ(z)) in NumPy, from the closed form of gradient descent on a quadratic."""
    rate = 1e-2 * 100 ** (1 / (1 + np.exp(-z["rate"])))
    start, decay, c = 1 + 2 * z["start"], 0.1 * np.exp(z["decay"]), 0.7
    best = c * 2.0 / (c + decay)
    theta = best + (1 - rate * (c + decay)) ** num_steps * (start - best)
    return 0.5 * (theta - 1.5) ** 2 + decay**2


def test_value_is_that_of_the_problem_by_hand():
    constrained = spaces.constrain(PROBLEM, SPACE)
    z = {name: float(value) for name, value in Z.coordinates.items() if value is not None}
    value = jax.jit(lambda z: outer(constrained, z))(Z)
    assert float(value) == pytest.approx(by_hand(z), rel=1e-12)
    assert float(value) == pytest.approx(float(outer(PROBLEM, spaces.to_constrained(SPACE, Z))), rel=1e-12)


@pytest.mark.once
def test_gradient_obeys_the_chain_rule():
    constrained = spaces.constrain(PROBLEM, SPACE)
    composed = jax.jit(lambda z: outer(constrained, z))
    gradient = jax.jit(jax.grad(composed))(Z)
    value = spaces.to_constrained(SPACE, Z)
    direct = jax.jit(jax.grad(lambda hyperparams: outer(PROBLEM, hyperparams)))(value)
    s = 1 / (1 + np.exp(-0.3))
    expected = {
        "rate": direct["rate"] * value["rate"] * np.log(100) * s * (1 - s),
        "start": direct["start"] * 2.0,
        "decay": direct["decay"] * value["decay"],
        "curvature": None,
    }
    chex.assert_trees_all_close(gradient, spaces.Unconstrained(expected), rtol=1e-10)
    assert min(abs(float(leaf)) for leaf in jax.tree.leaves(gradient)) > 1e-3
    check_grads(composed, (Z,), order=1, rtol=1e-6)


@pytest.mark.parametrize("part", ["init", "loss", "update", "outer_loss"])
def test_every_function_that_sees_the_hyperparams_is_composed(part):
    constrained = spaces.constrain(PROBLEM, SPACE)
    value = spaces.to_constrained(SPACE, Z)
    arguments = {
        "init": lambda hyperparams: dict(key=jax.random.key(0), hyperparams=hyperparams, data=TASK.train),
        "loss": lambda hyperparams: dict(params=0.5, hyperparams=hyperparams, batch=2.0, context=CONTEXT),
        "update": lambda hyperparams: dict(state=0.5, grads=1.0, model_state=None, hyperparams=hyperparams),
        "outer_loss": lambda hyperparams: dict(params=0.5, hyperparams=hyperparams, batch=1.5, context=CONTEXT),
    }[part]
    ours, theirs = (p.outer_loss if part == "outer_loss" else getattr(p.loop, part) for p in (constrained, PROBLEM))
    chex.assert_trees_all_equal(ours(**arguments(Z)), theirs(**arguments(value)))


def test_the_rest_is_untouched_and_the_original_stays():
    constrained = spaces.constrain(PROBLEM, SPACE)
    assert constrained.outer_batch is PROBLEM.outer_batch
    for name in ("batch", "params", "context"):
        assert getattr(constrained.loop, name) is getattr(PROBLEM.loop, name)
    assert constrained.loop.init is not LOOP.init and PROBLEM.loop is LOOP


def test_perturbations_stay_in_the_range():
    rates = []
    problem = PROBLEM._replace(outer_loss=lambda params, hyperparams, batch, context: hyperparams["rate"])
    for step in (-1e3, -3.0, 3.0, 1e3):
        z = spaces.Unconstrained(Z.coordinates | {"rate": Z.coordinates["rate"] + step})
        rates.append(float(spaces.constrain(problem, SPACE).outer_loss(0.0, z, 0.0, CONTEXT)))
    assert rates == sorted(rates) and 1e-2 <= rates[0] and rates[-1] <= 1.0

"""A recommendation follows from counts of memory and operations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner
from metaopt.hypergrad import _recommend


def network():
    """Matrix products dominate; λ is a penalty and a rate."""

    def loss(params, hp, batch):
        return (jnp.tanh(batch @ params) ** 2).mean() + hp["penalty"] * (params**2).sum()

    loop = inner.loop(loss, lambda hp: optax.sgd(hp["rate"]), init=lambda key, hp, data: jnp.eye(64))
    return inner.problem(loop, lambda params, hp, batch: (jnp.tanh(batch @ params) ** 2).mean())


def test_exact_reverse_costs_what_counting_by_hand_says():
    problem, task = network(), problems.TASK._replace(train=jnp.ones((256, 64)), valid=jnp.ones((1, 64)))
    hp = {"penalty": jnp.array(0.1), "rate": jnp.array(0.1)}
    rules = {
        "kept": hypergrad.unrolled(problem, num_steps=20),
        "recomputed": hypergrad.unrolled(problem, num_steps=20, remat="step", grad=jax.grad),
    }
    costs = {c.name: c for c in hypergrad.recommend(problem, hp, task, num_steps=20, rules=rules).costs}
    # Plain: 2 products a step (x W, and xᵀδ). Reverse: those; then x V, and two products for its tangents.
    np.testing.assert_allclose(costs["kept"].flops, (2 + 1 + 2 + 1) / 2, rtol=0.35)
    assert costs["recomputed"].flops > costs["kept"].flops


def test_what_is_taken_follows_memory():
    problem, task = network(), problems.TASK._replace(train=jnp.ones((256, 64)), valid=jnp.ones((9, 64)))
    hp = {"penalty": jnp.array(0.1), "rate": jnp.array(0.1)}
    rules = {
        "large": hypergrad.unrolled(problem, num_steps=100, grad=jax.grad),
        "small": hypergrad.unrolled(problem, num_steps=100, remat="sqrt"),
        "biased": hypergrad.lookahead(problem),
        "implicit": hypergrad.warm_implicit(problem, num_steps=1, adjoint_rate=0.1),
    }
    free = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules)
    memory = {c.name: c.memory for c in free.costs}
    assert free.take in ("large", "small") and memory["small"] < 0.2 * memory["large"]
    # The rate is a leaf that an implicit rule refuses.
    assert "['rate']" in {c.name: c.refused for c in free.costs}["implicit"] and math.isnan(memory["implicit"])
    assert f"* {free.take}" in str(free) and "refused" in str(free)
    bounded = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules, max_memory=memory["small"])
    assert bounded.take == "small"
    least = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules, max_memory=memory["biased"])
    assert least.take == "biased" and "No exact rule fits" in least.why
    with pytest.raises(ValueError, match="No rule answers within `max_memory` = 1e-09 MiB"):
        hypergrad.recommend(problem, hp, task, num_steps=100, rules={"biased": rules["biased"]}, max_memory=1e-9)


def test_the_default_rules():
    found = hypergrad.recommend(problems.RIDGE, problems.LAM, problems.TASK, num_steps=9)
    assert {c.name for c in found.costs} >= {'unrolled, remat="none"', "forward", "implicit", "truncated, 3 steps"}
    assert not any(c.refused for c in found.costs)


@pytest.mark.parametrize(("num_steps", "window"), [(10, 2), (7, 1), (16, 4)])
def test_the_default_window_divides_the_horizon(num_steps, window):
    assert f"truncated, {window} steps" in _recommend.candidates(problems.RIDGE, problems.LAM, num_steps)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`num_steps` must be at least 1; got 0"):
        hypergrad.recommend(problems.RIDGE, problems.LAM, problems.TASK, num_steps=0)

"""The compared programs: plain training, the rules, and the same written by hand."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp

from metaopt import base, hypergrad, inner

# Lower bounds on the time of exact reverse mode, from counting forward passes, in units of plain training. They are for
# no recomputation, one level of it, and two levels.
FLOORS = {"none": 2.75, "step": 3.7, "sqrt": 4.7}
PLAIN, LAYERWISE = "plain training", "each layer recomputed"
NAIVE, RECOMMENDED = "reverse, none", "mixed, step"  # the report's text names these
LONG = 256  # from this T on, conv nets and transformers run fewer rules
LONG_PROGRAMS = (
    *(PLAIN, f"by hand: {PLAIN}", "by hand: step", "by hand: sqrt"),
    *("reverse, step", "mixed, step", "mixed, grads", "mixed, sqrt"),
)
SMOKE_PROGRAMS = (PLAIN, "by hand: step", NAIVE, RECOMMENDED, "forward, two λ")


class Rule(NamedTuple):
    make: Callable  # (problem, num_steps=T) -> Estimator
    floor: float  # time divided by plain training
    by_hand: str | None = None  # checkpoints of the hand-written scan in the comparison
    few: bool = False  # λ is the rate and one penalty for all layers
    layerwise: bool = False  # the loss recomputes its layers


def unrolled(remat: str, grad: Callable, **kwargs) -> Rule:
    return Rule(partial(hypergrad.unrolled, remat=remat, grad=grad), FLOORS[remat], remat, **kwargs)


RULES = {
    **{f"reverse, {remat}": unrolled(remat, jax.grad) for remat in FLOORS},
    **{f"mixed, {remat}": unrolled(remat, hypergrad.mixed_grad) for remat in FLOORS},
    "mixed, grads": Rule(partial(hypergrad.unrolled, remat="grads"), FLOORS["step"], "step"),
    f"mixed, step, {LAYERWISE}": unrolled("step", hypergrad.mixed_grad, layerwise=True),
    "forward, two λ": Rule(partial(hypergrad.forward, chunk=1), floor=1 + 1.75 * 2, few=True),
}


def train_by_hand(case: cases.Case, hyperparams: dict, task: base.Task, order: jax.Array, remat: str) -> dict:
    """Runs Adam in a scan, written without metaopt, with a square root that is safe at zero."""

    def step(carry, rows):
        params, mu, nu, count = carry
        batch = jax.tree.map(lambda x: x[rows], task.train["rows"])
        grads = jax.grad(lambda p: case.loss(p, batch) + cases.penalty(p, hyperparams["decay"]))(params)
        count = count + 1
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
        nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g**2, nu, grads)

        def move(param, m, n):
            n = n / (1 - 0.999**count)
            root = jnp.where(n > 0, jnp.sqrt(jnp.where(n > 0, n, 1)), 0)
            return param - hyperparams["rate"] * (m / (1 - 0.9**count)) / (root + cases.EPS)

        return (jax.tree.map(move, params, mu, nu), mu, nu, count), None

    body = step if remat == "none" else jax.checkpoint(step, prevent_cse=False)
    if remat == "sqrt":
        checkpointed_step, root = body, round(len(order) ** 0.5)
        order = order.reshape(root, root, -1)
        body = jax.checkpoint(lambda carry, rows: jax.lax.scan(checkpointed_step, carry, rows), prevent_cse=False)
    params = task.train["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(body, (params, zeros, zeros, jnp.zeros([])), order)[0][0]


def by_hand(case: cases.Case, remat: str) -> Callable:
    """Returns (λ, task) -> F(λ)."""

    def objective(hyperparams, task):
        return case.loss(train_by_hand(case, hyperparams, task, task.train["order"], remat), task.valid)

    return objective


def plain(problem: base.Problem, num_steps: int) -> Callable:
    """Returns (λ, task) -> F(λ), by metaopt without derivatives."""
    train = inner.run(problem.loop, num_steps)

    def program(hyperparams, task):
        state = train(jax.random.key(0), hyperparams, task.train)
        return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, problem.loop.context(state))

    return program


def estimate(rule: Rule, case: cases.Case, num_steps: int) -> Callable:
    """Returns (λ, task) -> (F, dF/dλ), by a rule."""
    estimator = rule.make(cases.problem_of(case, rule.layerwise), num_steps=num_steps)

    def program(hyperparams, task):
        if rule.few:
            # The same λ as for the other rules, with one penalty for all layers.
            hyperparams = {"rate": hyperparams["rate"], "decay": jnp.asarray(cases.FEW["decay"])}
        state = estimator.init(jax.random.key(0), hyperparams, task)
        result, _ = estimator.estimate(hyperparams, task, state)
        return result.value, result.hypergrad

    return program

"""Shows where a hypergradient comes from: the contribution of every inner step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, inner
from metaopt.hypergrad import _mixed, _unroll


class Contributions(NamedTuple):
    """The parts of dF/dλ, by the place where λ enters. Their sum (with `steps` summed over its leading axis) is dF/dλ.

    Attributes:
      start: the part through the initialization; like λ.
      steps: ∂F/∂λ_t, where only step t (its inner loss and its update) uses λ_t; like λ with a leading axis of T.
      outer: the part through the outer loss itself, ∂f/∂λ; like λ.
    """

    start: base.HyperParams
    steps: base.HyperParams
    outer: base.HyperParams


def trace(
    problem: base.Problem,
    *,
    num_steps: int,
    outer: str | Sequence[float] | np.ndarray = "last",
    remat: str | int = "none",
    grad: Callable = _mixed.mixed_grad,
) -> Callable:
    """Splits the hypergradient of `unrolled` into the contribution of every inner step, for plots or debugging.

        dF/dλ = ∂F/∂λ_start + Σ_{t=1..T} ∂F/∂λ_t + ∂F/∂λ_outer

    Here each place where λ enters has its own copy of λ, and all copies have the same value. If contributions grow as t
    falls, the product of Jacobians explodes. If they vanish as t falls, they show how short a truncation may be. Time
    and memory are those of `unrolled`, plus T copies of λ. Works under jit, vmap and further differentiation.

    Args:
      problem: any problem; λ may enter the initialization, the inner loss, the optimizer and the outer loss.
      num_steps: T, at least 0.
      outer: as in `unrolled`: "last", "mean", or T weights.
      remat: "none", "step", "grads", "sqrt" or a number of levels; see `unroll`.
      grad: the function that takes the inner gradient; see `inner.step`.

    Returns:
      `(key, hyperparams, task) -> Contributions`, in outer loss per unit of λ, of the training that
      `unrolled(...).estimate` runs from the state `key`. The fields are `start`, the part through the initialization,
      and `outer`, the part through f itself, both like λ; and `steps`, like λ with a leading axis of T.

    Raises:
      ValueError: if `num_steps` or the number of weights is wrong.

    >>> import jax, optax
    >>> from metaopt import base, hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (params - data) ** 2 / 2,
    ...     lambda hp: optax.sgd(hp["rate"]),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> problem = inner.problem(loop, lambda params, hp, data: params)
    >>> task = base.Task(jax.numpy.array(1.0), None)
    >>> parts = hypergrad.trace(problem, num_steps=2)(
    ...     jax.random.key(0), {"rate": 0.25}, task
    ... )
    >>> print(parts.steps["rate"].round(4))  # θ_2 = 1 − (1 − rate_1)(1 − rate_2)
    [0.75 0.75]
    """
    weights = _unroll.step_weights(outer, num_steps)
    loop = problem.loop

    def contributions(key, hyperparams, task):
        run_key, _ = jax.random.split(key)  # as in an estimate of `unrolled`
        train_key, outer_key = jax.random.split(run_key)
        batch = problem.outer_batch(outer_key, task)

        def objective(copies):
            def step(state, hyperparams):
                return inner.step(loop, state, hyperparams, task.train, grad=grad)

            def outer_loss(state):
                return problem.outer_loss(loop.params(state), copies.outer, batch, loop.context(state))

            state = loop.init(train_key, copies.start, task.train)
            return _unroll.weighted_scan(
                step, outer_loss, state, copies.steps, weights=weights, num_steps=num_steps, remat=remat
            )[0]

        steps = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_steps, *jnp.shape(x))), hyperparams)
        return jax.grad(objective)(Contributions(hyperparams, steps, hyperparams))

    return contributions

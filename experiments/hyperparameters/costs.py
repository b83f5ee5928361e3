"""The cost of a hypergradient, in units of plain training."""

import jax

from metaopt import base, hypergrad, inner, spaces


def unrolled_cost(problem: base.Problem, space: base.PyTree, task: base.Task, num_steps: int) -> float:
    """Returns the cost of an unrolled hypergradient, in training runs with their validation, by operations."""
    problem, key = spaces.constrain(problem, space), jax.random.key(0)
    z = spaces.to_unconstrained(space, spaces.default(space))
    estimator = hypergrad.unrolled(problem, num_steps=num_steps, remat="step")

    def plain(z):
        # With `trace_fn`, training is a scan, whose length `flops` counts.
        state, _ = inner.run(problem.loop, num_steps, trace_fn=lambda state: ())(key, z, task.train)
        return problem.outer_loss(problem.loop.params(state), z, task.valid, problem.loop.context(state))

    return hypergrad.flops(lambda z: estimator.estimate(z, task, key)[0].hypergrad, z) / hypergrad.flops(plain, z)

"""Reptile: uses the path of training as if it were a gradient of the starting point."""

import jax
import jax.numpy as jnp
import optax

from metaopt import _jaxpr, base, inner
from metaopt.hypergrad import _refusals

_REASON = "the initialization of θ does not depend on them. Use `hypergrad.unrolled` for them, or keep them out of λ."


def reptile(problem: base.Problem, *, num_steps: int) -> base.Estimator:
    """Moves the initialization towards the point where training ends:

        hypergrad = (∂θ_0/∂λ)ᵀ (θ_0 − θ_T),

    so that the step λ ← λ − ε hypergrad becomes λ + ε (θ_T − λ) if θ_0 = λ. It is the gradient of |θ_0(λ) − θ_T|²/2
    with θ_T held constant. It is not a gradient of F. For plain gradient descent at a rate α, (θ_0 − θ_T)/α is the sum
    of the gradients along the path.

    The cost is a training run without derivatives. The memory does not depend on T.

    Args:
      problem: each leaf of λ must enter the initialization. θ_T is trained only on `task.train`. If no query set is
        held back, put all data of the task there.
      num_steps: T. With T = 1, the expected direction is that of joint training on all tasks; with T = 0, it is zero.

    Returns:
      An `Estimator` of kind "pseudo", `done` after every estimate. Its state is a key. `value` is f(θ_T).

    Raises:
      ValueError: if `num_steps` is negative; at trace time, if θ_0 does not depend on a leaf of λ.

    Source: Nichol, Achiam & Schulman, 2018, https://arxiv.org/abs/1803.02999
    """
    loop = problem.loop
    train = inner.run(loop, num_steps)

    def start(hyperparams, key, data):
        return loop.params(loop.init(key, hyperparams, data))

    def init(key, hyperparams, task):
        used = _jaxpr.used_leaves(start, hyperparams, key, task.train)
        is_answered = dict(zip(_refusals.paths(hyperparams), used, strict=True))
        _refusals.refuse_unanswered("Reptile", is_answered, _REASON)
        return key

    def estimate(hyperparams, task, state):
        run_key, key = jax.random.split(state)
        train_key, outer_key = jax.random.split(run_key)
        started, pullback = jax.vjp(lambda hyperparams: start(hyperparams, train_key, task.train), hyperparams)
        trained = train(train_key, hyperparams, task.train)
        batch = problem.outer_batch(outer_key, task)
        value = problem.outer_loss(loop.params(trained), hyperparams, batch, loop.context(trained))
        (hypergrad,) = pullback(optax.tree.sub(started, loop.params(trained)))
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="pseudo")

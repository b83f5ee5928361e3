"""Hypergradient descent: an optimizer's λ is judged by the inner loss one step later."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base
from metaopt.hypergrad import _refusals


class HypergradientDescentState(NamedTuple):
    """What `hypergradient_descent` carries.

    Attributes:
      inner: the inner loop's state.
      grads: ∇θ g there, on the batch of its next step.
      model_state: what the inner loss gave beside g.
    """

    inner: base.InnerState
    grads: base.Params
    model_state: base.PyTree


def hypergradient_descent(problem: base.Problem, *, horizon: int | None = None) -> base.Estimator:
    """Estimates how the inner loss of the next batch changes with the optimizer's λ, one step of training at a time.

        θ_{t+1} = Φ(θ_t, G_t, λ),    G_t = ∇θ g(θ_t; batch t),    hypergrad = (∂Φ/∂λ)ᵀ G_{t+1}

    with θ_t, G_t and the optimizer's state held constant; for the rate of SGD it is −G_{t+1}·G_t. That is the exact
    one-step hypergradient with the inner loss in the place of the outer one, which is not looked at. It is
    short-sighted (Wu et al., ICLR 2018): it knows of no later step, nor of validation data.

    Costs nothing beside training, but for a pullback through the optimizer's operations and one more copy of the
    gradient, which is carried. The estimate itself is not meant to be differentiated.

    Args:
      problem: each leaf of λ must enter the optimizer, and not the inner loss, which cannot judge what it is made of.
      horizon: `done` once so many steps are taken; None never ends.

    Returns:
      An `Estimator` of kind "biased"; each estimate takes one inner step. Its value is g(θ_{t+1}) on the next batch.
      Metrics: "inner_steps", and "inner_grad_norm", ‖G_{t+1}‖.

    Raises:
      ValueError: `horizon` is below 1; at trace time, a leaf of λ does not enter `update`, or enters the inner loss.

    Source: Baydin et al., ICLR 2018, https://arxiv.org/abs/1703.04782
    """
    base.check_integer("horizon", horizon, 1, optional=True)
    loop = problem.loop

    def evaluate(state, hyperparams, data):
        batch, context = loop.batch(state, data), loop.context(state)
        gradient = jax.value_and_grad(loop.loss, has_aux=True)
        (value, model_state), grads = gradient(loop.params(state), hyperparams, batch, context)
        return value, HypergradientDescentState(state, grads, model_state)

    def init(key, hyperparams, task):
        state = loop.init(key, hyperparams, task.train)
        in_update = _refusals.entering(problem, state, hyperparams, task, "update")
        in_loss = _refusals.entering(problem, state, hyperparams, task, "inner")
        refused = [path for path in in_update if in_loss[path] or not in_update[path]]
        if refused:
            raise ValueError(
                f"Hypergradient descent cannot answer for the leaves {', '.join(refused)} of λ: it answers for what "
                "enters the optimizer's update and not the inner loss, which would judge itself. Use "
                "`hypergrad.lookahead` or `hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
            )
        return evaluate(state, hyperparams, task.train)[1]

    def estimate(hyperparams, task, state):
        def update(hyperparams):
            after = loop.update(state.inner, state.grads, state.model_state, hyperparams)
            return loop.params(after), after

        _, pullback, after = jax.vjp(update, hyperparams, has_aux=True)
        value, state = evaluate(after, hyperparams, task.train)
        (hypergrad,) = pullback(state.grads)
        taken = loop.context(after).step
        done = jnp.array(False) if horizon is None else taken >= horizon
        metrics = {"inner_steps": taken, "inner_grad_norm": optax.tree.norm(state.grads)}
        return base.Estimate(value, hypergrad, done, metrics), state

    return base.Estimator(init, estimate, kind="biased")

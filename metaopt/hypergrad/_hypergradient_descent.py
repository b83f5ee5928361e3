"""Hypergradient descent: the inner loss one step later judges the optimizer's λ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, base
from metaopt.hypergrad import _refusals

_REASON = (
    "each leaf must enter the optimizer's update and must not enter the inner loss, since the inner loss is the "
    "criterion here. Use `hypergrad.lookahead` or `hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
)


class HypergradientDescentState(NamedTuple):
    """The state of `hypergradient_descent`.

    Attributes:
      inner: the inner loop's state.
      grads: ∇θ ℓ at this state, on the batch of its next step.
      model_state: the auxiliary output of the inner loss at this state.
    """

    inner: base.InnerState
    grads: base.Params
    model_state: base.PyTree


def hypergradient_descent(problem: base.Problem, *, horizon: int | None = None) -> base.Estimator:
    """Estimates how the inner loss of the next batch changes with the optimizer's λ, for one training step at a time.

        θ_{t+1} = Φ(θ_t, G_t, λ),    G_t = ∇θ ℓ(θ_t; batch t),    hypergrad = (∂Φ/∂λ)ᵀ G_{t+1}

    θ_t, G_t and the optimizer's state are held constant. For the rate of SGD, the hypergradient is −G_{t+1}·G_t. It is
    the exact one-step hypergradient if the inner loss replaces the outer loss, which is not evaluated. It is
    short-sighted (Wu et al., ICLR 2018): it ignores all later steps and the validation data.

    Besides training, the cost is only a pullback through the optimizer's operations and one more copy of the gradient
    in the state. The estimate itself is not meant to be differentiated.

    Args:
      problem: each leaf of λ must enter the optimizer and must not enter the inner loss. The inner loss cannot judge
        leaves that define it.
      horizon: `done` once this many steps are taken; with None or 0 the run never ends.

    Returns:
      An `Estimator` of kind "biased". Each estimate takes one inner step. Its value is ℓ(θ_{t+1}) on the next batch.
      Metrics: "inner_steps", and "inner_grad_norm", which is ‖G_{t+1}‖.

    Raises:
      ValueError: if `horizon` is negative; at trace time, if a leaf of λ does not enter `update`, or enters the inner
        loss.

    Source: Baydin et al., ICLR 2018, https://arxiv.org/abs/1703.04782
    """
    _checks.check_positive("horizon", horizon, zero=True, optional=True)  # with −1, every estimate would be done
    loop = problem.loop

    def evaluate(state, hyperparams, data):
        batch, context = loop.batch(state, data), loop.context(state)
        gradient = jax.value_and_grad(loop.loss, has_aux=True)
        (value, model_state), grads = gradient(loop.iterate(state), hyperparams, batch, context)
        return value, HypergradientDescentState(state, grads, model_state)

    def init(key, hyperparams, task):
        state = loop.init(key, hyperparams, task.train)
        in_update = _refusals.entering(problem, state, hyperparams, task, "update")
        in_loss = _refusals.entering(problem, state, hyperparams, task, "inner")
        is_answered = {path: in_update[path] and not in_loss[path] for path in in_update}
        _refusals.refuse_unanswered("Hypergradient descent", is_answered, _REASON)
        return evaluate(state, hyperparams, task.train)[1]

    def estimate(hyperparams, task, state):
        def update(hyperparams):
            after = loop.update(state.inner, state.grads, state.model_state, hyperparams)
            return loop.iterate(after), after

        _, pullback, after = jax.vjp(update, hyperparams, has_aux=True)
        value, state = evaluate(after, hyperparams, task.train)
        (hypergrad,) = pullback(state.grads)
        taken = loop.context(after).step
        done = jnp.array(False) if not horizon else taken >= horizon
        metrics = {"inner_steps": taken, "inner_grad_norm": optax.tree.norm(state.grads)}
        return base.Estimate(value, hypergrad, done, metrics), state

    return base.Estimator(init, estimate, kind="biased")

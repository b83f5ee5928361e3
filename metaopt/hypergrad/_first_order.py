"""Bilevel hypergradients without second derivatives, by the value function of the inner problem.

θ*(λ) minimizes g, so F(λ) = f(θ*(λ), λ) is f under the constraint q(θ, λ) = g(θ, λ) − min_z g(z, λ) ≤ 0. With a
multiplier μ on it, and y(λ) the minimizer of f + μ g, the envelope theorem gives a gradient made of first derivatives:

    d/dλ min_y [f(y, λ) + μ (g(y, λ) − min_z g(z, λ))] = ∇λ f(y, λ) + μ (∇λ g(y, λ) − ∇λ g(z, λ)) = dF/dλ + O(1/μ).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import base, inner
from metaopt.hypergrad import _refusals
from metaopt.hypergrad._lookahead import LookaheadState


class F2saState(NamedTuple):
    """What `f2sa` carries.

    Attributes:
      inner: the inner loop's state, trained on g: z.
      penalized: another, trained on f + μ g: y.
      count: [] int32, the estimates so far.
      key: what later estimates draw from.
    """

    inner: base.InnerState
    penalized: base.InnerState
    count: jax.Array
    key: jax.Array


def _refuse(problem: base.Problem, state: base.InnerState, hyperparams: base.HyperParams, task: base.Task) -> None:
    entering = _refusals.entering(problem, state, hyperparams, task, "inner", "outer")
    refused = [path for path, enters in entering.items() if not enters]
    if refused:
        raise ValueError(
            f"A value-function rule cannot answer for the leaves {', '.join(refused)} of λ: neither the gradient of "
            "the inner loss nor the outer loss depends on them, only the initialization or the optimizer's update "
            "does, and the least inner loss does not know which way led to it. Use `hypergrad.unrolled` for them, or "
            "fix them (`spaces.fixed`)."
        )


def f2sa(problem: base.Problem, *, num_steps: int, multiplier: float | Callable) -> base.Estimator:
    """Estimates dF/dλ by two training runs, one on g and one on f + μ g.

        z ← z − rate · ∇θ g(z, λ),    y ← y − rate · (∇θ g(y, λ) + ∇θ f(y, λ)/μ),    `num_steps` times,
        hypergrad = ∇λ f(y, λ) + μ (∇λ g(y, λ) − ∇λ g(z, λ)).

    (y descends f + μ g, divided by μ, so that the loop's optimizer suits both.) Both runs go on from one estimate to
    the next. At their minima it is the gradient of min_y f + μ (g − min_z g), whose distance from dF/dλ is O(1/μ);
    before, an error e of y or z adds μ |∂²g/∂λ∂θ| e. So μ grows while they converge. On minibatches both runs see the
    same batches and noise, since μ multiplies their difference; the variance still grows with μ.

    Costs three gradients an inner step, three ∇λ an estimate, and memory for one of them and two inner states.

    Args:
      problem: its `loop.loss` is g, strictly convex in θ near its minimum; its `outer_loss` is f, smooth in θ. λ must
        enter one of them, leaf by leaf. The optimizer must rest where its gradient vanishes.
      num_steps: inner steps per estimate, at least 1.
      multiplier: μ, positive, in units of f over units of g; or a schedule `count -> μ` of the estimates so far, such
        as `lambda count: 10.0 + count`.

    Returns:
      An `Estimator` of kind "biased" that never ends by itself; its value is f(z, λ). Metrics: "multiplier", and "gap",
      g(y, λ) − g(z, λ).

    Raises:
      ValueError: an argument is out of range; at trace time, a leaf of λ enters `init` or `update` alone.

    Source: Kwon et al., ICML 2023, Alg. 1, https://arxiv.org/abs/2301.10945
    """
    base.check_integer("num_steps", num_steps, 1)
    if not callable(multiplier) and not multiplier > 0:
        raise ValueError(f"`multiplier` must be positive, or a schedule; got {multiplier}.")
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        _refuse(problem, state, hyperparams, task)
        return F2saState(state, state, jnp.zeros([], jnp.int32), key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        mu = multiplier(state.count) if callable(multiplier) else multiplier

        def penalized_grad(i):
            """The gradient of g + f/μ in the place of that of g."""

            def grad(loss, **options):
                def gradient(params, hyperparams, batch, context):
                    grads, model_state = jax.grad(loss, **options)(params, hyperparams, batch, context)
                    outer_batch = problem.outer_batch(jax.random.fold_in(outer_key, i), task)
                    outer_grads = jax.grad(problem.outer_loss)(params, hyperparams, outer_batch, context)
                    return jax.tree.map(lambda g, f: g + (f / mu).astype(g.dtype), grads, outer_grads), model_state

                return gradient

            return grad

        def step(i, states):
            z, y = states
            z = inner.step(loop, z, hyperparams, task.train)
            return z, inner.step(loop, y, hyperparams, task.train, grad=penalized_grad(i))

        z, y = jax.lax.fori_loop(0, num_steps, step, (state.inner, state.penalized))
        outer_batch = problem.outer_batch(jax.random.fold_in(outer_key, num_steps), task)

        def outer_loss(hyperparams, state):
            return problem.outer_loss(loop.params(state), hyperparams, outer_batch, loop.context(state))

        def inner_loss(hyperparams, state):
            return loop.loss(loop.params(state), hyperparams, loop.batch(state, task.train), loop.context(state))[0]

        f_hyper = jax.grad(outer_loss)(hyperparams, y)
        g_y, g_y_hyper = jax.value_and_grad(inner_loss)(hyperparams, y)
        g_z, g_z_hyper = jax.value_and_grad(inner_loss)(hyperparams, z)
        hypergrad = jax.tree.map(
            lambda f, g_y, g_z: (f + mu * (g_y - g_z)).astype(f.dtype), f_hyper, g_y_hyper, g_z_hyper
        )
        metrics = {"multiplier": jnp.asarray(mu, g_y.dtype), "gap": g_y - g_z}
        after = F2saState(z, y, state.count + 1, key)
        return base.Estimate(outer_loss(hyperparams, z), hypergrad, jnp.array(False), metrics), after

    return base.Estimator(init, estimate, kind="biased")


def bome(problem: base.Problem, *, num_steps: int, barrier: float = 0.5) -> base.Estimator:
    """Estimates a direction for λ by a dynamic barrier on the inner loss; θ takes one step with it.

        z = Φ^num_steps(θ, λ)  (no derivative),    q(θ, λ) = g(θ, λ) − g(z, λ),    ∇ over (θ, λ) together,
        μ = max(0, η − ⟨∇f, ∇q⟩/‖∇q‖²),    θ ← θ − rate · (∇θ f + μ ∇θ q),    hypergrad = ∇λ f + μ ∇λ q.

    μ is the least multiplier with which the step lowers q at the rate η‖∇q‖², so no penalty is tuned. The hypergradient
    has the form of `f2sa`'s, with θ in the place of y. With constant step sizes θ circles around the inner minimum,
    μ is about their inverse, and the bias is of their order: let the inner rate and the outer one decay. z must be near
    the inner minimum, so that `num_steps` grows as the rate falls.

    Costs, per estimate, `num_steps` gradients, one of f and one of g over (θ, λ), one ∇λ g, and memory for one of them.

    Args:
      problem: its `loop.loss` is g, its `outer_loss` is f; λ must enter one of them, leaf by leaf. Plain SGD is what
        the paper has; a momentum carries ∇f into z's steps.
      num_steps: inner steps from θ to z, at least 1.
      barrier: η, positive: larger follows the inner minimum more closely.

    Returns:
      An `Estimator` of kind "biased" that never ends by itself; its value is f(θ, λ) before the step. Metrics:
      "multiplier", μ, and "gap", q.

    Raises:
      ValueError: an argument is out of range; at trace time, a leaf of λ enters `init` or `update` alone.

    Source: Liu et al., NeurIPS 2022, Alg. 1, https://arxiv.org/abs/2209.08709
    """
    base.check_integer("num_steps", num_steps, 1)
    base.check_positive("barrier", barrier)
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        _refuse(problem, state, hyperparams, task)
        return LookaheadState(state, key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        now = state.inner
        z = jax.lax.fori_loop(0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, task.train), now)
        at, batch, context = (loop.params(now), hyperparams), loop.batch(now, task.train), loop.context(now)
        f, f_grads = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(
            *at, problem.outer_batch(outer_key, task), context
        )
        (g, model_state), g_grads = jax.value_and_grad(loop.loss, argnums=(0, 1), has_aux=True)(*at, batch, context)

        def inner_loss_at_z(hyperparams):
            # The batch and the noise are those at θ, so that they cancel in q.
            z_context = context._replace(model_state=loop.context(z).model_state)
            return loop.loss(loop.params(z), hyperparams, batch, z_context)[0]

        g_z, g_z_hyper = jax.value_and_grad(inner_loss_at_z)(hyperparams)
        q_grads = (g_grads[0], optax.tree.sub(g_grads[1], g_z_hyper))
        square = optax.tree.norm(q_grads, squared=True)
        slope = optax.tree.vdot(f_grads, q_grads) / jnp.where(square == 0, 1, square)
        mu = jnp.maximum(barrier - slope, 0)
        grads, hypergrad = jax.tree.map(lambda f, q: f + mu.astype(f.dtype) * q, f_grads, q_grads)
        after = LookaheadState(loop.update(now, grads, model_state, hyperparams), key)
        return base.Estimate(f, hypergrad, jnp.array(False), {"multiplier": mu, "gap": g - g_z}), after

    return base.Estimator(init, estimate, kind="biased")

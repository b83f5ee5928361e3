"""Bilevel hypergradients without second derivatives, from the value function of the inner problem.

θ*(λ) minimizes ℓ. So F(λ) = f(θ*(λ), λ) is the minimum of f over all θ with q(θ, λ) = ℓ(θ, λ) − min_z ℓ(z, λ) ≤ 0. We
replace this constraint by the penalty μ q, with a multiplier μ > 0. Let y(λ) minimize f + μ ℓ, and let z(λ) minimize ℓ.
The envelope theorem then gives a gradient that needs only first derivatives:

    d/dλ min_y [f(y, λ) + μ (ℓ(y, λ) − min_z ℓ(z, λ))] = ∇λ f(y, λ) + μ (∇λ ℓ(y, λ) − ∇λ ℓ(z, λ)) = dF/dλ + O(1/μ).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _schedule_free, base, inner
from metaopt.hypergrad import _refusals
from metaopt.hypergrad._lookahead import LookaheadState


class F2saState(NamedTuple):
    """The state of `f2sa`.

    Attributes:
      inner: the inner loop's state for z, trained on ℓ.
      penalized: the inner loop's state for y, trained on f + μ ℓ.
      count: [] int32, the number of estimates so far.
      key: the PRNG key for later estimates.
    """

    inner: base.InnerState
    penalized: base.InnerState
    count: jax.Array
    key: jax.Array


_REASON = (
    "neither the gradient of the inner loss nor the outer loss depends on them, only the initialization or the "
    "optimizer's update does, and the minimum of the inner loss does not depend on the path to it. Use "
    "`hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
)


def _refuse_unanswered(
    problem: base.Problem, state: base.InnerState, hyperparams: base.HyperParams, task: base.Task
) -> None:
    entering = _refusals.entering(problem, state, hyperparams, task, "inner", "outer")
    _refusals.refuse_unanswered("A value-function rule", entering, _REASON)


def _penalized_grad(
    loss: Callable, *, problem: base.Problem, task: base.Task, key: jax.Array, mu: jax.Array | float, **options
) -> Callable:
    """Returns the gradient of ℓ + f/μ over θ: `jax.grad(loss, **options)` plus ∇θ f/μ, for `inner.step(grad=)`."""

    def gradient(params, hyperparams, batch, context):
        grads, model_state = jax.grad(loss, **options)(params, hyperparams, batch, context)
        outer_grads = jax.grad(problem.outer_loss)(params, hyperparams, problem.outer_batch(key, task), context)
        add = lambda inner, outer: inner + (outer / mu).astype(inner.dtype)
        return jax.tree.map(add, grads, outer_grads), model_state

    return gradient


def _train(
    problem: base.Problem,
    num_steps: int,
    hyperparams: base.HyperParams,
    task: base.Task,
    states: tuple[base.InnerState, base.InnerState],
    key: jax.Array,
    mu: jax.Array | float,
) -> tuple[base.InnerState, base.InnerState]:
    """Returns the states of z, trained on ℓ, and of y, trained on ℓ + f/μ. Step i draws f's batch from `key` and i."""

    def step(i, states):
        z, y = states
        z = inner.step(problem.loop, z, hyperparams, task.train)
        grad = functools.partial(_penalized_grad, problem=problem, task=task, key=jax.random.fold_in(key, i), mu=mu)
        return z, inner.step(problem.loop, y, hyperparams, task.train, grad=grad)

    return jax.lax.fori_loop(0, num_steps, step, states)


def f2sa(problem: base.Problem, *, num_steps: int, multiplier: float | Callable) -> base.Estimator:
    """Estimates dF/dλ from two training runs, one on ℓ and one on f + μ ℓ.

        z ← z − rate · ∇θ ℓ(z, λ),    y ← y − rate · (∇θ ℓ(y, λ) + ∇θ f(y, λ)/μ),    `num_steps` times,
        hypergrad = ∇λ f(y, λ) + μ (∇λ ℓ(y, λ) − ∇λ ℓ(z, λ)).

    The run of y descends (f + μ ℓ)/μ, so that the loop's optimizer suits both runs. Both runs continue from one
    estimate to the next. At their minima, the hypergradient is the gradient of min_y f + μ (ℓ − min_z ℓ), whose
    distance from dF/dλ is O(1/μ). Before convergence, an error e in y or z adds μ |∂²ℓ/∂λ∂θ| e. So μ should grow while
    they converge. With minibatches, both runs use the same batches and noise, since μ multiplies the difference of
    their gradients. The variance still grows with μ.

    The cost is three gradients per inner step and three ∇λ per estimate. The memory is that of one gradient and two
    inner states.

    Args:
      problem: its `loop.loss` is ℓ, strictly convex in θ near its minimum; its `outer_loss` is f, smooth in θ. Each
        leaf of λ must enter one of them. The optimizer must rest where its gradient vanishes.
      num_steps: inner steps per estimate, at least 1.
      multiplier: μ, positive, in units of f over units of ℓ; or a schedule `count -> μ`, where `count` is the number of
        estimates so far, such as `lambda count: 10.0 + count`.

    Returns:
      An `Estimator` of kind "biased" that never ends by itself. Its value is f(z, λ). Metrics: "multiplier", and "gap",
      which is ℓ(y, λ) − ℓ(z, λ).

    Raises:
      ValueError: at trace time, if a leaf of λ enters only `init` or `update`.

    Source: Kwon et al., ICML 2023, Alg. 1, https://arxiv.org/abs/2301.10945
    """
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        _refuse_unanswered(problem, state, hyperparams, task)
        return F2saState(state, state, jnp.zeros([], jnp.int32), key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        mu = multiplier(state.count) if callable(multiplier) else multiplier
        z, y = _train(problem, num_steps, hyperparams, task, (state.inner, state.penalized), outer_key, mu)
        outer_batch = problem.outer_batch(jax.random.fold_in(outer_key, num_steps), task)

        def outer_loss(hyperparams, state):
            return problem.outer_loss(loop.params(state), hyperparams, outer_batch, loop.context(state))

        def inner_loss(hyperparams, state):
            return loop.loss(loop.iterate(state), hyperparams, loop.batch(state, task.train), loop.context(state))[0]

        f_hyper = jax.grad(outer_loss)(hyperparams, y)
        l_y, l_y_hyper = jax.value_and_grad(inner_loss)(hyperparams, y)
        l_z, l_z_hyper = jax.value_and_grad(inner_loss)(hyperparams, z)
        hypergrad = jax.tree.map(
            lambda f, l_y, l_z: (f + mu * (l_y - l_z)).astype(f.dtype), f_hyper, l_y_hyper, l_z_hyper
        )
        metrics = {"multiplier": jnp.asarray(mu, l_y.dtype), "gap": l_y - l_z}
        after = F2saState(z, y, state.count + 1, key)
        return base.Estimate(outer_loss(hyperparams, z), hypergrad, jnp.array(False), metrics), after

    return base.Estimator(init, estimate, kind="biased")


def bome(problem: base.Problem, *, num_steps: int, barrier: float = 0.5) -> base.Estimator:
    """Estimates a direction for λ with a dynamic barrier on the inner loss; θ takes one step at the same time.

        z = Φ^num_steps(θ, λ)  (no derivative),    q(θ, λ) = ℓ(θ, λ) − ℓ(z, λ),    ∇ over (θ, λ) together,
        μ = max(0, η − ⟨∇f, ∇q⟩/‖∇q‖²),    θ ← θ − rate · (∇θ f + μ ∇θ q),    hypergrad = ∇λ f + μ ∇λ q.

    μ is the smallest multiplier with which the step lowers q at the rate η‖∇q‖², so you need not tune a penalty. The
    hypergradient has the form of the one in `f2sa`, with θ instead of y. With constant step sizes, θ circles around the
    inner minimum. μ is then about the inverse of the step sizes, and the bias is of the order of the step sizes. So the
    inner and the outer rate should decay. z must be near the inner minimum, so `num_steps` should grow as the rate
    falls.

    The cost per estimate is `num_steps` gradients, one gradient of f and one of ℓ over (θ, λ), and one ∇λ ℓ. The memory
    is that of one gradient.

    Args:
      problem: its `loop.loss` is ℓ, its `outer_loss` is f; each leaf of λ must enter one of them. The paper uses plain
        SGD; momentum carries ∇f into the steps of z.
      num_steps: inner steps from θ to z, at least 1.
      barrier: η, positive; a larger η follows the inner minimum more closely.

    Returns:
      An `Estimator` of kind "biased" that never ends by itself. Its value is f at `loop.params` before the step. ∇f is
      taken at `loop.iterate`, which differs with a schedule-free optimizer. Metrics: "multiplier", which is μ, and
      "gap", which is q.

    Raises:
      ValueError: at trace time, if a leaf of λ enters only `init` or `update`.

    Source: Liu et al., NeurIPS 2022, Alg. 1, https://arxiv.org/abs/2209.08709
    """
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        _refuse_unanswered(problem, state, hyperparams, task)
        return LookaheadState(state, key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        now = state.inner
        z = jax.lax.fori_loop(0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, task.train), now)
        point, batch, context = (loop.iterate(now), hyperparams), loop.batch(now, task.train), loop.context(now)
        outer_batch = problem.outer_batch(outer_key, task)
        f, f_grads = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(*point, outer_batch, context)
        if _schedule_free.states(now):
            f = problem.outer_loss(loop.params(now), hyperparams, outer_batch, context)
        inner_gradient = jax.value_and_grad(loop.loss, argnums=(0, 1), has_aux=True)
        (inner_loss, model_state), inner_grads = inner_gradient(*point, batch, context)

        def inner_loss_at_z(hyperparams):
            # The batch and the noise are the same as at θ, so that they cancel in q.
            z_context = context._replace(model_state=loop.context(z).model_state)
            return loop.loss(loop.iterate(z), hyperparams, batch, z_context)[0]

        loss_at_z, hyper_grad_at_z = jax.value_and_grad(inner_loss_at_z)(hyperparams)
        q_grads = (inner_grads[0], optax.tree.sub(inner_grads[1], hyper_grad_at_z))
        square = optax.tree.norm(q_grads, squared=True)
        slope = optax.tree.vdot(f_grads, q_grads) / jnp.where(square == 0, 1, square)
        mu = jnp.maximum(barrier - slope, 0)
        grads, hypergrad = jax.tree.map(lambda f, q: f + mu.astype(f.dtype) * q, f_grads, q_grads)
        after = LookaheadState(loop.update(now, grads, model_state, hyperparams), key)
        metrics = {"multiplier": mu, "gap": inner_loss - loss_at_z}
        return base.Estimate(f, hypergrad, jnp.array(False), metrics), after

    return base.Estimator(init, estimate, kind="biased")

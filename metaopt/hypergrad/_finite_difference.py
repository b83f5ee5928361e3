"""One-step hypergradients without second derivatives: the mixed product as a central difference.

Through one step θ' = Φ(θ, ∇θ g(θ, λ), λ) of any optimizer, θ held constant, the chain rule is

    d f(θ', λ)/dλ = ∂f/∂λ + (∂Φ/∂λ)ᵀ v + (∂²g/∂λ∂θ)ᵀ u,    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v.

Everything but the last product is a gradient that training takes anyway, or a pullback through the optimizer's few
operations. The product is the derivative of ∇λ g along u, which two gradients estimate:

    (∂²g/∂λ∂θ)ᵀ u ≈ ‖u‖/2ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ − ε u/‖u‖, λ)].
"""

import jax
import jax.numpy as jnp
import optax

from metaopt import base, inner
from metaopt.hypergrad import _refusals
from metaopt.hypergrad._lookahead import LookaheadState


def check(epsilon: float | None, horizon: int | None) -> None:
    base.check_positive("epsilon", epsilon, optional=True)
    base.check_integer("horizon", horizon, 1, optional=True)


def start(problem: base.Problem, rule: str) -> base.EstimatorInitFn:
    """`init` of the one-step rules; refuses the leaves of λ that no step sees."""
    loop = problem.loop

    def init(key, hyperparams, task):
        init_key, key = jax.random.split(key)
        state = loop.init(init_key, hyperparams, task.train)
        places = ("inner", "model_state", "update", "outer")
        entering = _refusals.entering(problem, state, hyperparams, task, *places)
        refused = [path for path, enters in entering.items() if not enters]
        if refused:
            raise ValueError(
                f"`{rule}` cannot answer for the leaves {', '.join(refused)} of λ: neither the inner loss's gradient, "
                "nor the optimizer's update, nor the outer loss depends on them, and one step does not know where "
                "training began. Use `hypergrad.unrolled` for them, or fix them (`spaces.fixed`)."
            )
        return LookaheadState(state, key)

    return init


def derivative_along(function, params, direction, epsilon):
    """The derivative of `function` at `params` along `direction`: from two points at a distance of ε, or exactly."""
    if epsilon is None:
        return jax.jvp(function, (params,), (direction,))[1]
    norm = optax.tree.norm(direction)
    size = epsilon / jnp.where(norm == 0, 1, norm)
    ahead, behind = (function(optax.tree.add_scale(params, s, direction)) for s in (size, -size))
    return jax.tree.map(lambda a, b: (a - b) / (2 * size), ahead, behind)


def one_step(problem, state, hyperparams, task, key, *, epsilon, around):
    """f after one step from `state`, its one-step hypergradient, the state after the step, and ‖u‖.

    Args:
      problem: any.
      state: θ, and the optimizer's state; held constant.
      hyperparams: λ.
      task: its training data give the step's batch.
      key: for the outer batch.
      epsilon: the distance ε in θ; None takes the product exactly.
      around: where the mixed product is taken: "before" the step, as the chain rule has it, or "after" it.
    """
    loop = problem.loop
    params, batch, context = loop.params(state), loop.batch(state, task.train), loop.context(state)
    grads, model_state = jax.grad(loop.loss, has_aux=True)(params, hyperparams, batch, context)

    def outer(grads, model_state, hyperparams):
        ahead = loop.update(state, grads, model_state, hyperparams)
        outer_batch = problem.outer_batch(key, task)
        return problem.outer_loss(loop.params(ahead), hyperparams, outer_batch, loop.context(ahead)), ahead

    value, pullback, ahead = jax.vjp(outer, grads, model_state, hyperparams, has_aux=True)
    u, to_model_state, direct = pullback(jnp.ones_like(value))
    # λ may move the model state too; that is a first derivative, and nothing where there is no model state.
    _, pullback = jax.vjp(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[1], hyperparams)
    (through_model_state,) = pullback(to_model_state)

    def hyper_grad(params):
        return jax.grad(lambda hyperparams: loop.loss(params, hyperparams, batch, context)[0])(hyperparams)

    mixed = derivative_along(hyper_grad, params if around == "before" else loop.params(ahead), u, epsilon)
    hypergrad = jax.tree.map(lambda h, m, x: (h + m + x).astype(h.dtype), direct, through_model_state, mixed)
    return value, hypergrad, ahead, optax.tree.norm(u)


def finish(value, hypergrad, loop, state, horizon, norm) -> base.Estimate:
    taken = loop.context(state).step
    done = jnp.array(False) if horizon is None else taken >= horizon
    return base.Estimate(value, hypergrad, done, {"inner_steps": taken, "direction_norm": norm})


def darts_fd(
    problem: base.Problem, *, commit: int = 1, epsilon: float | None = 0.01, horizon: int | None = None
) -> base.Estimator:
    """Estimates dF/dλ one step ahead without second derivatives: DARTS's finite difference, for any optimizer.

        θ ← Φ^commit(θ, λ)  (no derivative),    θ' = Φ(θ, ∇θ g(θ, λ), λ),    v = ∂f/∂θ',    u = (∂Φ/∂grads)ᵀ v,
        dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)ᵀ v + ‖u‖/2ε · [∇λ g(θ + ε u/‖u‖, λ) − ∇λ g(θ − ε u/‖u‖, λ)].

    With SGD u = −rate · v and this is DARTS; with Adam u goes through its moments. It is `lookahead(problem,
    commit=commit)` up to O(ε²), and exact for what enters the optimizer or the outer loss alone, such as a rate. In
    float32 rounding adds an error of about 1e-7 |∇λ g| ‖u‖/ε, so that ε must not be small.

    Costs, beside the committed steps, four gradients (∇θ g, ∇θ f, two ∇λ g), one more pullback where there is a model
    state, and memory for one of them. Where λ only weighs examples (`inner.weighted`) a ∇λ g is one forward pass, and
    `epsilon=None` takes the product exactly by one Jacobian-vector product of it. The estimate itself is not meant to
    be differentiated.

    Args:
      problem: λ must enter the inner loss, the optimizer or the outer loss. Both points see the same batch and noise.
      commit: steps of training per estimate, at least 0.
      epsilon: ε, the distance in θ at which ∇λ g is evaluated, positive, in units of θ; None differentiates ∇λ g in
        forward mode instead, exactly, so that it is `lookahead`.
      horizon: `done` once so many steps are committed; None never ends.

    Returns:
      An `Estimator` of kind "biased", whose value is f(θ'). Metrics: "inner_steps", and "direction_norm", ‖u‖.

    Raises:
      ValueError: an argument is out of range; at trace time, a leaf of λ is used by `init` alone.

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055, Eq. 7 and 8.
    """
    base.check_integer("commit", commit, 0)
    check(epsilon, horizon)
    loop = problem.loop

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        committed = jax.lax.fori_loop(0, commit, lambda _, s: inner.step(loop, s, hyperparams, task.train), state.inner)
        value, hypergrad, _, norm = one_step(
            problem, committed, hyperparams, task, outer_key, epsilon=epsilon, around="before"
        )
        return finish(value, hypergrad, loop, committed, horizon, norm), LookaheadState(committed, key)

    return base.Estimator(start(problem, "darts_fd"), estimate, kind="biased")

"""Implicit hypergradients: they use the condition that trained parameters satisfy, not the path that led to them.

At a minimum of the inner loss, R(θ*, λ) = ∇θ ℓ(θ*, λ) = 0. At a fixed point of a training step Φ,
R = θ* − Φ(θ*, λ) = 0. For any path that led there, the implicit function theorem gives

    dF/dλ = ∂f/∂λ − (∂R/∂λ)ᵀ v,    (∂R/∂θ)ᵀ v = ∂f/∂θ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import _checks, base, inner
from metaopt.hypergrad import _solvers, _stationary


class ImplicitState(NamedTuple):
    """The state of `implicit`.

    Attributes:
      inner: the inner loop's state; None without a warm start.
      adjoint: v, shaped like θ (with `condition="step"`, like the floating-point leaves of `inner`); None without a
        warm start.
      key: the PRNG key for later estimates.
    """

    inner: base.InnerState
    adjoint: base.Params
    key: jax.Array


def implicit(
    problem: base.Problem,
    *,
    num_steps: int,
    solver: _solvers.Solver | None = None,
    damping: float = 0.0,
    batch: str | Callable[[jax.Array, base.Data], base.Batch] = "next",
    condition: str = "gradient",
    gauss_newton: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    warm_start: bool = True,
    horizon: int | None = None,
) -> base.Estimator:
    """Estimates dF/dλ at a point where training has come to rest, with one linear solve for the adjoint v:

        dF/dλ = ∂f/∂λ − (∂R/∂λ)ᵀ v,    (A + δI) v = ∂f/∂θ,

        condition="gradient":  R = ∇θ ℓ,            A = ∂²ℓ/∂θ²
        condition="step":      R = θ − Φ(θ, λ),     A = I − (∂Φ/∂θ)ᵀ        Φ: a training step; θ: all that it changes

    The estimate is exact at a strict minimum (or a fixed point), with δ = 0 and an exact linear solve. Each of these
    conditions causes a bias:

    - θ is not at rest. The bias is of the order of ‖R‖, which is `metrics["inner_grad_norm"]` (or `"inner_step_norm"`).
      `training.fit` logs a warning once if ‖R‖ is large compared with ‖∂f/∂θ‖. With `condition="step"`, R has the unit
      of θ. So `fit` instead compares `metrics["outer_grad_shift"]`, an estimate of how much ∂f/∂θ changes between θ and
      the fixed point. It costs one more product with Aᵀ and one with ∂²f/∂θ². So f must then have a second derivative.
    - The linear solve is not exact. The bias is −(∂R/∂λ)ᵀ A⁻¹ (Av − ∂f/∂θ). `metrics["adjoint_residual"]` is
      ‖(A + δI) v − ∂f/∂θ‖.
    - Damping. The bias is δ (∂R/∂λ)ᵀ (A + δI)⁻¹ A⁻¹ ∂f/∂θ: damping hides the contribution of flat directions. Damping
      helps if A is nearly singular, or if θ is not at rest and A has negative eigenvalues above −δ.
    - A is sampled, and the mean of an inverse is not the inverse of the mean. To second order in Δ = A_batch − A, the
      mean of v is too large by A⁻¹ E[Δ A⁻¹ Δ] v. Averaging over estimates does not remove this bias; larger batches do.
    - With `condition="gradient"`, the outer loss reads model state (batch statistics). The dependence of this state on
      θ and λ is ignored; `condition="step"` includes it.

    R is linearized once per estimate, which stores the nonlinear values. Each product with A runs only the linear
    program. It costs about as much as two gradients of ℓ without their nonlinear part. The memory is that of one
    second-order gradient plus the solver's memory, and does not depend on the number of training steps. Time and memory
    do not depend on the number of λ: thousands cost as much as one. The rounding error, relative to the norm of the
    hypergradient, is about κ times the machine precision, where κ is the condition number of A + δI: in float32, 1e-7
    κ. This holds if the solve and the training have converged as far as float32 allows.

    Args:
      problem: its `loop.loss` is ℓ, its `outer_loss` is f. Each leaf of λ must enter one of them. A rate and a penalty
        in one array count as one leaf, so keep them in separate leaves. With the condition "gradient", the optimizer
        must rest where ∇θ ℓ is zero, so a penalty belongs in ℓ. With "step", the optimizer may rest elsewhere (a
        decoupled weight decay, a projection), and λ may enter through its update. The hypergradient of a rate is then
        zero, which is correct at a fixed point. With "step", θ stands for all floating-point leaves of the inner state,
        including momentum and running statistics. Φ should be a contraction: gradient descent with or without momentum,
        not Adam.
      num_steps: inner steps before the solve, at least 1.
      solver: the solver of the linear system, by default `hypergrad.cg`. With the condition "step" the default is 20
        steps of `neumann` at a rate of 1: the fixed-point rule. A is symmetric with the condition "gradient".
      damping: δ ≥ 0, in units of curvature.
      batch: the batch on which R and A are evaluated; all products of one solve use the same batch. "next" is the batch
        of the next training step. "full" is all training data, as one batch. A function `(key, data) -> batch` is also
        allowed.
      condition: "gradient" or "step".
      gauss_newton: `(outputs_fn, loss_fn)` with ℓ = loss_fn(outputs_fn(θ, λ, batch, context), λ, batch, context).
        A is then Jᵀ (∂²loss_fn/∂outputs²) J with J = ∂outputs/∂θ. For any network, this A is positive semidefinite if
        loss_fn is convex in the outputs. It is exact if the outputs are linear in θ or the slopes ∂loss_fn/∂outputs are
        zero. The product (∂R/∂λ)ᵀ v always uses ℓ itself. If a penalty depends on θ, include θ in the outputs. λ is the
        problem's λ: after `spaces.constrain` it is unconstrained.
      warm_start: continues from θ and v of the last estimate, so that both follow a slowly moving λ. Otherwise, every
        estimate trains from a fresh start and is `done`.
      horizon: with a warm start, `done` once this many inner steps are taken; with None or 0 the run never ends.

    Returns:
      An `Estimator` of kind "biased", since it is exact only in the limit. `hypergrad` is in outer loss per unit of λ.
      The estimate itself is not meant to be differentiated (`implicit_solve` is). Metrics: those above,
      "outer_grad_norm", which is ‖∂f/∂θ‖, and "num_products", the number of products with A.

    Raises:
      ValueError: if `num_steps`, `damping` or `horizon` is negative, `batch` or `condition` is unknown, or two
        arguments exclude each other.
      ValueError: at trace time, if only `init` uses a leaf of λ. With the condition "gradient", also if only `update`
        uses it.

    Source: Bengio, 2000; Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355; Lorraine, Vicol & Duvenaud, AISTATS
      2020, https://arxiv.org/abs/1911.02590; with the condition "step", Grazzi et al., ICML 2020,
      https://arxiv.org/abs/2006.16218. iMAML is `warm_start=False` with a proximal term in ℓ: Rajeswaran et al.,
      NeurIPS 2019, https://arxiv.org/abs/1909.04630.
    """
    _stationary.check(num_steps, damping, batch, condition)
    _checks.check_positive("horizon", horizon, zero=True, optional=True)  # with −1, every estimate would be done
    if horizon and not warm_start:
        raise ValueError(f"`horizon` needs `warm_start=True`, or must be None; got {horizon}.")
    if gauss_newton is not None and condition == "step":
        raise ValueError('`gauss_newton` approximates a Hessian: it needs `condition="gradient"`; got "step".')
    solver = _stationary.default_solver(solver, condition)
    rule = _Rule(problem, num_steps, solver, damping, batch, condition, gauss_newton, warm_start, horizon)

    def init(key, hyperparams, task):
        return _init(rule, key, hyperparams, task)

    def estimate(hyperparams, task, state):
        return _estimate(rule, hyperparams, task, state)

    return base.Estimator(init, estimate, kind="biased")


class _Rule(NamedTuple):
    """The arguments of `implicit`."""

    problem: base.Problem
    num_steps: int
    solver: _solvers.Solver
    damping: float
    batch: str | Callable
    condition: str
    gauss_newton: tuple[Callable[..., Any], Callable[..., Any]] | None
    warm_start: bool
    horizon: int | None


def _init(rule: _Rule, key: jax.Array, hyperparams: base.HyperParams, task: base.Task) -> ImplicitState:
    loop = rule.problem.loop
    loop_key, key = jax.random.split(key)
    state = loop.init(loop_key, hyperparams, task.train)
    _stationary.refuse_unanswered(rule.problem, state, hyperparams, task, rule.condition)
    if not rule.warm_start:
        return ImplicitState(None, None, key)
    x, _ = _stationary.unknowns(loop, state, rule.condition)
    return ImplicitState(state, optax.tree.zeros_like(x), key)


def _estimate(
    rule: _Rule, hyperparams: base.HyperParams, task: base.Task, state: ImplicitState
) -> tuple[base.Estimate, ImplicitState]:
    problem, loop, condition = rule.problem, rule.problem.loop, rule.condition
    init_key, outer_key, batch_key, solver_key, key = jax.random.split(state.key, 5)
    start = state.inner if rule.warm_start else loop.init(init_key, hyperparams, task.train)
    trained = jax.lax.fori_loop(0, rule.num_steps, lambda _, s: inner.step(loop, s, hyperparams, task.train), start)
    x, put = _stationary.unknowns(loop, trained, condition)
    rows = _stationary.draw(rule.batch, batch_key, loop, trained, task.train)
    outer_rows = problem.outer_batch(outer_key, task)

    def outer_loss(x, hyperparams):
        state = put(x)
        return problem.outer_loss(loop.params(state), hyperparams, outer_rows, loop.context(state))

    f, (f_x, f_hyper) = jax.value_and_grad(outer_loss, argnums=(0, 1))(x, hyperparams)
    residual_fn = _stationary.residual_fn(loop, put, trained, task.train, rows, condition)
    residual, pullback = jax.vjp(residual_fn, x, hyperparams)
    if rule.gauss_newton is None:
        product = lambda v: pullback(v)[0]
    else:
        product = _gauss_newton_product(*rule.gauss_newton, x, hyperparams, rows, loop.context(trained))
    matvec = lambda v: optax.tree.add_scale(product(v), rule.damping, v)
    guess = state.adjoint if rule.warm_start else optax.tree.zeros_like(f_x)
    v, num_products = rule.solver(matvec, f_x, guess, key=solver_key)
    hypergrad = optax.tree.sub(f_hyper, pullback(v)[1])
    done = jnp.array(not rule.warm_start) if not rule.horizon else loop.context(trained).step >= rule.horizon
    metrics = {
        "adjoint_residual": optax.tree.norm(optax.tree.sub(matvec(v), f_x)),
        "outer_grad_norm": optax.tree.norm(f_x),
        {"gradient": "inner_grad_norm", "step": "inner_step_norm"}[condition]: optax.tree.norm(residual),
        "num_products": jnp.asarray(num_products),
    }
    if condition == "step":
        outer_grad = jax.grad(lambda x: outer_loss(x, hyperparams))
        metrics["outer_grad_shift"] = _outer_grad_shift(outer_grad, x, residual, pullback(residual)[0])
    carried = (trained, v) if rule.warm_start else (None, None)
    return base.Estimate(f, hypergrad, done, metrics), ImplicitState(*carried, key)


def _outer_grad_shift(outer_grad: Callable, x: Any, residual: Any, transposed_product: Any) -> jax.Array:
    """Estimates how much ∂f/∂x would change until rest, []: ‖(∂²f/∂x²) Δx‖, with Δx = κ R and κ = ‖R‖² / ⟨R, A R⟩.

    κ is the inverse of A's Rayleigh quotient at the residual R. `transposed_product` is Aᵀ R.
    """
    norm = optax.tree.norm(residual)
    size = jnp.where(norm == 0, 1, norm)  # a NaN stays a NaN
    unit = lambda tree: jax.tree.map(lambda leaf: leaf / size.astype(leaf.dtype), tree)  # no underflow near rest
    quotient = jnp.abs(optax.tree.vdot(unit(transposed_product), unit(residual)))
    shift = optax.tree.norm(jax.jvp(outer_grad, (x,), (unit(residual),))[1])
    return jnp.where(norm == 0, 0, norm * shift / jnp.where(quotient == 0, 1, quotient))


def _gauss_newton_product(
    outputs_fn: Callable,
    loss_fn: Callable,
    params: base.Params,
    hyperparams: base.HyperParams,
    batch: base.Batch,
    context: base.Context,
) -> Callable:
    """v ↦ Jᵀ (∂²loss/∂outputs²) J v, where each factor is linearized once."""
    outputs, push = jax.linearize(lambda params: outputs_fn(params, hyperparams, batch, context), params)
    pull = jax.linear_transpose(push, params)
    _, curvature = jax.linearize(jax.grad(lambda outputs: loss_fn(outputs, hyperparams, batch, context)), outputs)
    return lambda v: pull(curvature(push(v)))[0]


def warm_implicit(problem: base.Problem, *, num_steps: int, adjoint_rate: float) -> base.Estimator:
    """`implicit` with gradient steps for the adjoint, as many as for θ: v ← v − rate ((∂²ℓ/∂θ²) v − ∂f/∂θ).

    θ and v are carried from one outer step to the next. So both stay near their fixed points while λ moves slowly, and
    neither the inner problem nor the linear system is solved from scratch.

    Args:
      problem: as for `implicit`, with the condition "gradient" and the next batch.
      num_steps: inner steps, and adjoint steps, per estimate; at least 1.
      adjoint_rate: the rate of these steps, positive, in units of 1/curvature; v converges if it is below 2 /
        λmax(∂²ℓ/∂θ²).

    Returns:
      An `Estimator` of kind "biased" that never ends by itself. It has the metrics of `implicit`.

    Raises:
      ValueError: at trace time, if a leaf of λ is used only by `init` or `update`.

    Source: Arbel & Mairal, ICLR 2022, Alg. 1, https://arxiv.org/abs/2111.14580
    """
    return implicit(problem, num_steps=num_steps, solver=_solvers.neumann(num_steps=num_steps, rate=adjoint_rate))

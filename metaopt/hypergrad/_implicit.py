"""Implicit hypergradients: they use the condition that trained parameters satisfy, not the path that led to them.

At a minimum of the inner loss, R(θ*, λ) = ∇θ ℓ(θ*, λ) = 0. At a fixed point of a training step Φ,
R = θ* − Φ(θ*, λ) = 0. For any path that led there, the implicit function theorem gives

    dF/dλ = ∂f/∂λ − (∂R/∂λ)ᵀ v,    (∂R/∂θ)ᵀ v = ∂f/∂θ.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from metaopt import _checks, base, inner
from metaopt._jaxpr import jaxpr_as_fun, used_leaves
from metaopt.hypergrad import _solvers

CONDITIONS = ("gradient", "step")
BATCHES = ("next", "full")


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


def _paths(hyperparams: base.HyperParams) -> list[str]:
    return [jax.tree_util.keystr(path) or "itself" for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]


def _refusal(paths: list[str], condition: str, depends: str) -> str:
    if condition == "step":
        what, only, use = "a training step", "the initialization", ""
    else:
        what, only = "the gradient of the inner loss", "the initialization or the optimizer's update"
        use = ', `condition="step"` where the optimizer rests elsewhere for their sake (a decoupled weight decay)'
    return (
        f"An implicit rule cannot answer for the leaves {', '.join(paths)} of λ: neither {what} {depends}, only {only} "
        f"does, and a minimum does not depend on the path to it. Use `hypergrad.unrolled` for them{use}, or fix them "
        "(`spaces.fixed`)."
    )


def _refuse_unanswerable(
    problem: base.Problem,
    state: base.InnerState,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    condition: str = "gradient",
) -> None:
    """Rejects leaves of λ that neither the condition nor f depends on, such as a rate or an initialization.

    A minimum does not depend on the rate or the initialization that led to it. The implicit hypergradient of such a
    leaf would be zero, which is wrong.

    Args:
      problem: the problem of the implicit rule.
      state: a state of the inner loop; only its shapes matter.
      hyperparams: λ; only its shapes matter.
      task: a task; only its shapes matter.
      condition: "gradient" to test whether ∇θ ℓ depends on λ, or "step" to test whether a training step does.

    Raises:
      ValueError: if there are such leaves; the message names them.
    """
    loop = problem.loop

    def outer_loss(hyperparams, state, key, task):
        return problem.outer_loss(loop.params(state), hyperparams, problem.outer_batch(key, task), loop.context(state))

    def at_rest(hyperparams, state, data):
        x, put = _unknown(loop, state, condition)
        return _residual_fn(loop, put, state, data, loop.batch(state, data), condition)(x, hyperparams)

    in_inner = used_leaves(at_rest, hyperparams, state, task.train)
    in_outer = used_leaves(outer_loss, hyperparams, state, jax.random.key(0), task)
    refused = [path for path, g, f in zip(_paths(hyperparams), in_inner, in_outer, strict=True) if not (g or f)]
    if refused:
        raise ValueError(_refusal(refused, condition, "nor the outer loss depends on them"))


def _check(num_steps: int, damping: float, batch: Any, condition: str) -> None:
    _checks.check_integer("num_steps", num_steps, 1)
    _checks.check_positive("damping", damping, zero=True)
    if not callable(batch) and batch not in BATCHES:
        raise ValueError(f'`batch` must be "next", "full" or a function `(key, data) -> batch`; got {batch!r}.')
    if condition not in CONDITIONS:
        raise ValueError(f"`condition` must be one of {', '.join(map(repr, CONDITIONS))}; got {condition!r}.")


def _draw(batch: Any, key: jax.Array, loop: base.InnerLoop, state: base.InnerState, data: base.Data) -> base.Batch:
    if callable(batch):
        return batch(key, data)
    return data if batch == "full" else loop.batch(state, data)


def _unknown(loop: base.InnerLoop, state: base.InnerState, condition: str) -> tuple[Any, Callable]:
    """Returns x, the values that come to rest, and a function `x -> state` that puts x into the state.

    With the condition "gradient", x is θ: the leaves of the state that `loop.params` reads. With "step", x contains all
    leaves that have a derivative: θ, momentum, running statistics.
    """
    leaves, structure = jax.tree.flatten(state)
    if condition == "gradient":
        places = jax.tree.leaves(loop.params(structure.unflatten(range(len(leaves)))))
        x = loop.params(state)
    else:
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        x = [leaves[place] for place in places]

    def put(x):
        filled = dict(enumerate(leaves)) | dict(zip(places, jax.tree.leaves(x), strict=True))
        return structure.unflatten(filled[i] for i in range(len(leaves)))

    return x, put


def _residual_fn(
    loop: base.InnerLoop, put: Callable, state: base.InnerState, data: base.Data, batch: base.Batch, condition: str
) -> Callable:
    """R(x, λ), which is zero when training is at rest."""
    if condition == "gradient":
        context = loop.context(state)
        return lambda params, hyperparams: jax.grad(loop.loss, has_aux=True)(params, hyperparams, batch, context)[0]
    loop_on_batch = loop._replace(batch=lambda state, data: batch)

    def displacement(x, hyperparams):
        after = inner.step(loop_on_batch, put(x), hyperparams, data)
        return optax.tree.sub(x, _unknown(loop, after, condition)[0])

    return displacement


def implicit(
    problem: base.Problem,
    *,
    num_steps: int,
    solver: _solvers.Solver | None = None,
    damping: float = 0.0,
    batch: str | Callable[[jax.Array, base.Data], base.Batch] = "next",
    condition: str = "gradient",
    gauss_newton: tuple[Callable, Callable] | None = None,
    warm_start: bool = True,
    horizon: int | None = None,
) -> base.Estimator:
    """Estimates dF/dλ at a point where training has come to rest, with one linear solve for the adjoint v:

        dF/dλ = ∂f/∂λ − (∂R/∂λ)ᵀ v,    (A + δI) v = ∂f/∂θ,

        condition="gradient":  R = ∇θ ℓ,            A = ∂²ℓ/∂θ²
        condition="step":      R = θ − Φ(θ, λ),     A = I − (∂Φ/∂θ)ᵀ        Φ: a training step; θ: all that it changes

    The estimate is exact at a strict minimum (or a fixed point), with δ = 0 and an exact linear solve. Each of these
    causes a bias:

    - θ is not at rest. The bias is of the order of ‖R‖, which is `metrics["inner_grad_norm"]` (or
      `"inner_step_norm"`). With `condition="gradient"`, `training.fit` logs a warning once if this norm is large next
      to ‖∂f/∂θ‖ (`rest_warning`).
    - The linear solve is not exact. The bias is −(∂R/∂λ)ᵀ A⁻¹ (Av − ∂f/∂θ). `metrics["adjoint_residual"]` is
      ‖(A + δI) v − ∂f/∂θ‖.
    - Damping. The bias is δ (∂R/∂λ)ᵀ (A + δI)⁻¹ A⁻¹ ∂f/∂θ: damping hides the contribution of flat directions. It helps
      if A is nearly singular, or if θ is not at rest and A has negative eigenvalues above −δ.
    - A is sampled, and the mean of an inverse is not the inverse of the mean. To second order in Δ = A_batch − A, the
      mean of v is too large by A⁻¹ E[Δ A⁻¹ Δ] v. Averaging over estimates does not remove this bias; larger batches do.
    - With `condition="gradient"`, the outer loss reads model state (batch statistics). The dependence of this state on
      θ and λ is ignored; `condition="step"` includes it.

    R is linearized once per estimate. Each product with A runs that linear program, and costs about as much as two
    gradients of ℓ without their nonlinear part. The memory is that of one second-order gradient plus the solver's
    memory, and does not depend on the number of training steps. Time and memory do not depend on the number of λ:
    thousands cost as much as one. The rounding error, relative to the norm of the hypergradient, is about κ(A + δI)
    times the machine precision ε: in float32, 1e-7 κ. This holds if the solve and the training have converged as far as
    float32 allows.

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
      damping: δ ≥ 0, in curvature.
      batch: the batch on which R and A are evaluated; all products of one solve use the same batch. "next" is the batch
        of the next training step. "full" is all training data, as one batch. A function `(key, data) -> batch` is also
        allowed.
      condition: "gradient" or "step".
      gauss_newton: `(outputs_fn, loss_fn)` with ℓ = loss_fn(outputs_fn(θ, λ, batch, context), λ, batch, context).
        A is then Jᵀ (∂²loss_fn/∂outputs²) J with J = ∂outputs/∂θ. For any network, this A is positive semidefinite if
        loss_fn is convex in the outputs. It is exact if the outputs are linear in θ or the slopes ∂loss_fn/∂outputs are
        zero. The mixed product always uses ℓ itself. If a penalty depends on θ, include θ in the outputs. λ is the
        problem's λ: after `spaces.constrain` it is unconstrained.
      warm_start: continues from θ and v of the last estimate, so that both follow a slowly moving λ. Otherwise, every
        estimate trains from a fresh start and is `done`.
      horizon: with a warm start, `done` once this many inner steps are taken; with None the run never ends.

    Returns:
      An `Estimator` of kind "biased", since it is exact only in the limit. `hypergrad` is in outer loss per unit of λ.
      The estimate itself is not meant to be differentiated (`implicit_solve` is). Metrics: the two norms above,
      "outer_grad_norm", which is ‖∂f/∂θ‖, and "num_products", the number of products with A.

    Raises:
      ValueError: if an argument is out of range, or two arguments exclude each other; at trace time, if a leaf of λ is
        used only by `init` (or, with the condition "gradient", only by `update`).

    Source: Bengio, 2000; Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355; Lorraine, Vicol & Duvenaud, AISTATS
      2020, https://arxiv.org/abs/1911.02590; with the condition "step", Grazzi et al., ICML 2020,
      https://arxiv.org/abs/2006.16218. iMAML is `warm_start=False` with a proximal term in ℓ: Rajeswaran et al.,
      NeurIPS 2019, https://arxiv.org/abs/1909.04630.
    """
    _check(num_steps, damping, batch, condition)
    _checks.check_integer("horizon", horizon, 1, optional=True)
    if horizon is not None and not warm_start:
        raise ValueError(f"`horizon` needs `warm_start=True`, or must be None; got {horizon}.")
    if gauss_newton is not None and condition == "step":
        raise ValueError('`gauss_newton` approximates a Hessian: it needs `condition="gradient"`; got "step".')
    solver = _default(solver, condition)
    loop = problem.loop

    def init(key, hyperparams, task):
        loop_key, key = jax.random.split(key)
        state = loop.init(loop_key, hyperparams, task.train)
        _refuse_unanswerable(problem, state, hyperparams, task, condition=condition)
        if not warm_start:
            return ImplicitState(None, None, key)
        return ImplicitState(state, optax.tree.zeros_like(_unknown(loop, state, condition)[0]), key)

    def estimate(hyperparams, task, state):
        init_key, outer_key, batch_key, solver_key, key = jax.random.split(state.key, 5)
        start = state.inner if warm_start else loop.init(init_key, hyperparams, task.train)
        trained = jax.lax.fori_loop(0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, task.train), start)
        x, put = _unknown(loop, trained, condition)
        rows, outer_rows = _draw(batch, batch_key, loop, trained, task.train), problem.outer_batch(outer_key, task)

        def outer_loss(x, hyperparams):
            state = put(x)
            return problem.outer_loss(loop.params(state), hyperparams, outer_rows, loop.context(state))

        f, (f_x, f_hyper) = jax.value_and_grad(outer_loss, argnums=(0, 1))(x, hyperparams)
        residual_fn = _residual_fn(loop, put, trained, task.train, rows, condition)
        residual, pullback = jax.vjp(residual_fn, x, hyperparams)
        if gauss_newton is None:
            product = lambda v: pullback(v)[0]
        else:
            product = _gauss_newton_product(*gauss_newton, x, hyperparams, rows, loop.context(trained))
        matvec = lambda v: optax.tree.add_scale(product(v), damping, v)
        guess = state.adjoint if warm_start else optax.tree.zeros_like(f_x)
        v, num_products = solver(matvec, f_x, guess, key=solver_key)
        hypergrad = optax.tree.sub(f_hyper, pullback(v)[1])
        taken = loop.context(trained).step
        done = jnp.array(not warm_start) if horizon is None else taken >= horizon
        metrics = {
            "adjoint_residual": optax.tree.norm(optax.tree.sub(matvec(v), f_x)),
            "outer_grad_norm": optax.tree.norm(f_x),
            {"gradient": "inner_grad_norm", "step": "inner_step_norm"}[condition]: optax.tree.norm(residual),
            "num_products": jnp.asarray(num_products),
        }
        carried = (trained, v) if warm_start else (None, None)
        return base.Estimate(f, hypergrad, done, metrics), ImplicitState(*carried, key)

    return base.Estimator(init, estimate, kind="biased")


_REST_TOLERANCE = 0.3  # limit of ‖∇θ ℓ‖ / ‖∂f/∂θ‖
REST_ADVICE = (
    "Take more inner steps per estimate (`num_steps`) or a better inner optimizer, or use `hypergrad.unrolled`, which "
    "needs no stationary point. The noise of a minibatch counts too: an implicit rule with `batch='full'` leaves it "
    "out."
)


def far_from_rest(metrics: Mapping[str, Any]) -> list[str]:
    """One sentence for each implicit rule in `metrics` that ran far from a stationary point; see `rest_warning`."""
    sentences = []
    for name in metrics:
        prefix = name.removesuffix("inner_grad_norm")
        inner_norm, outer_norm = float(metrics[name]), float(metrics.get(f"{prefix}outer_grad_norm", math.nan))
        if prefix != name and inner_norm > _REST_TOLERANCE * outer_norm:
            sentences.append(
                f"An implicit rule runs far from a stationary point of the inner loss, so that its hypergradient is "
                f"biased: `{name}` is {inner_norm:.3g} and `{prefix}outer_grad_norm` is {outer_norm:.3g}."
            )
    return sentences


def rest_warning(metrics: Mapping[str, Any]) -> str:
    """Returns a warning if an implicit rule ran far from a stationary point of ℓ, where its hypergradient is biased.

    θ is about A⁻¹ ∇θ ℓ away from rest, where A is the Hessian of the inner loss ℓ. This changes ∂f/∂θ, the right-hand
    side of the linear system, by (∂²f/∂θ²) A⁻¹ ∇θ ℓ. If f and ℓ have about the same curvature (one loss on two data
    sets), this change is ∇θ ℓ. So ‖∇θ ℓ‖ / ‖∂f/∂θ‖ estimates the relative error of the hypergradient, in any unit of
    the loss. The limit is 0.3.

    Args:
      metrics: scalars by name: the metrics of an estimate, or their means over some steps. The function compares
        "inner_grad_norm" with "outer_grad_norm", also under the prefixes of `partition`. Other rules have no such pair.

    Returns:
      A description of the problem and its remedies, or "".
    """
    sentences = far_from_rest(metrics)
    return " ".join([*sentences, REST_ADVICE]) if sentences else ""


def _default(solver: _solvers.Solver | None, condition: str) -> _solvers.Solver:
    if solver is not None:
        return solver
    return _solvers.cg() if condition == "gradient" else _solvers.neumann(num_steps=20, rate=1.0)


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
    """`implicit` with as many plain steps for the adjoint as for θ: v ← v − rate ((∂²ℓ/∂θ²) v − ∂f/∂θ).

    θ and v are carried from one outer step to the next. So both stay near their fixed points while λ moves slowly, and
    neither the inner problem nor the linear system is solved from scratch.

    Args:
      problem: as for `implicit`, with the condition "gradient" and the next batch.
      num_steps: inner steps, and adjoint steps, per estimate; at least 1.
      adjoint_rate: in 1/curvature, positive; v converges if the rate is below 2 / λmax(∂²ℓ/∂θ²).

    Returns:
      An `Estimator` of kind "biased" that never ends by itself. It has the metrics of `implicit`.

    Raises:
      ValueError: if `num_steps < 1`, or `adjoint_rate` is not positive; at trace time, if a leaf of λ is used only by
        `init` or `update`.

    Source: Arbel & Mairal, ICLR 2022, Alg. 1, https://arxiv.org/abs/2111.14580
    """
    _checks.check_positive("adjoint_rate", adjoint_rate)
    return implicit(problem, num_steps=num_steps, solver=_solvers.neumann(num_steps=num_steps, rate=adjoint_rate))


def _shield(function: Callable) -> Any:
    """Evaluates `function()` without a derivative, also for the variables that it closes over, and without its cost.

    If only the result were wrapped in `stop_gradient`, JAX would still compute or store the tangents of all its steps.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    leaves = jaxpr_as_fun(closed.replace(consts=jax.lax.stop_gradient(closed.consts)))()
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _refuse_derivative(leaf: jax.Array, message: str) -> jax.Array:
    """Returns `leaf`; a derivative with respect to it raises a `ValueError`."""

    @jax.custom_jvp
    def identity(x):
        return x

    @partial(identity.defjvp, symbolic_zeros=True)
    def refuse(primals, tangents):
        if type(tangents[0]) is not SymbolicZero:
            raise ValueError(message)
        return primals[0], jnp.zeros_like(primals[0])

    return identity(leaf)


def implicit_solve(
    loop: base.InnerLoop,
    *,
    num_steps: int,
    solver: _solvers.Solver | None = None,
    damping: float = 0.0,
    batch: str | Callable[[jax.Array, base.Data], base.Batch] = "next",
    condition: str = "gradient",
) -> Callable:
    """Training as a differentiable function. Its derivative is that of the point where training comes to rest:

        dθ*/dλ = −(∂R/∂θ)⁻¹ ∂R/∂λ,    R = ∇θ ℓ, or θ − Φ(θ, λ).

    It can replace `unroll`, and its memory does not depend on the number of steps. Forward and reverse mode, jit, vmap
    and any nesting work. So several levels of optimization are possible: derivatives of any order are exact if θ is at
    rest. Each derivative costs one solve. Variables that the loss closes over are differentiated too. The biases are
    those of `implicit`.

    Args:
      loop: the inner loop, which trains θ.
      num_steps: training steps, at least 1. No derivative passes through them.
      solver: as for `implicit`.
      damping: δ ≥ 0.
      batch: as for `implicit`.
      condition: "gradient" or "step".

    Returns:
      `(key, hyperparams, data) -> InnerState`. The derivative of `loop.params` of this state, with respect to λ and the
      data, is that of θ*. With the condition "gradient", everything else in the state is constant. With "step", the
      other floating-point leaves have a derivative too. A derivative with respect to a leaf of λ raises a `ValueError`
      if training depends on the leaf and R does not (a rate, an initialization).

    Raises:
      ValueError: if an argument is out of range.

    >>> import jax, optax
    >>> from metaopt import hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (params - data) ** 2 / 2 + hp["penalty"] * params**2 / 2,
    ...     lambda hp: optax.sgd(0.5),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> solve = hypergrad.implicit_solve(loop, num_steps=50)
    >>> outer = lambda penalty: loop.params(solve(jax.random.key(0), {"penalty": penalty}, jax.numpy.array(1.0)))
    >>> print(f"{jax.grad(outer)(1.0):.4f} {jax.grad(jax.grad(outer))(1.0):.4f}")  # θ* = 1 / (1 + penalty)
    -0.2500 0.2500
    """
    _check(num_steps, damping, batch, condition)
    solver = _default(solver, condition)

    def solve(key, hyperparams, data):
        train_key, batch_key, solver_key = jax.random.split(key, 3)

        def train(hyperparams, key, data, num_steps=num_steps):
            state = loop.init(key, hyperparams, data)
            return jax.lax.fori_loop(0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, data), state)

        def rest(state, key, data):
            x, put = _unknown(loop, state, condition)
            return x, put, _residual_fn(loop, put, state, data, _draw(batch, key, loop, state, data), condition)

        def one_step(hyperparams, key, data):
            return loop.params(train(hyperparams, key, data, num_steps=1))

        def at_rest(hyperparams, state, key, data):
            x, _, residual = rest(state, key, data)
            return residual(x, hyperparams)

        trained = _shield(lambda: train(hyperparams, train_key, data))
        in_training = used_leaves(one_step, hyperparams, train_key, data)
        in_rest = used_leaves(at_rest, hyperparams, trained, batch_key, data)
        leaves, structure = jax.tree.flatten(hyperparams)
        for i, path in enumerate(_paths(hyperparams)):
            if in_training[i] and not in_rest[i]:
                leaves[i] = _refuse_derivative(leaves[i], _refusal([path], condition, "depends on them"))
        hyperparams = structure.unflatten(leaves)

        def tangent_solve(linear, y):
            matvec = lambda v: optax.tree.add_scale(linear(v), damping, v)

            def solve_linear(matvec, b):
                return solver(matvec, b, optax.tree.zeros_like(b), key=solver_key)[0]

            symmetric = condition == "gradient"
            return jax.lax.custom_linear_solve(matvec, y, solve_linear, solve_linear, symmetric=symmetric)

        x, put, residual = rest(trained, batch_key, data)
        solve_again = lambda f, x: x  # training has already solved it
        return put(jax.lax.custom_root(lambda x: residual(x, hyperparams), x, solve_again, tangent_solve))

    return solve

"""Implicit hypergradients: by the condition that trained parameters meet, not by the way that led to them.

At a minimum of the inner loss R(θ*, λ) = ∇θ g(θ*, λ) = 0; at a fixed point of a training step Φ, R = θ* − Φ(θ*, λ) = 0.
The implicit function theorem then gives, whatever way led there,

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
from jax.extend import core

from metaopt import base, inner
from metaopt.hypergrad import _solvers
from metaopt.rewrite import used_leaves

CONDITIONS = ("gradient", "step")
BATCHES = ("next", "full")


class ImplicitState(NamedTuple):
    """What `implicit` carries.

    Attributes:
      inner: the inner loop's state; None without a warm start.
      adjoint: v, shaped like θ (with `condition="step"`, the floating-point leaves of `inner`); None without a warm
        start.
      key: what later estimates draw from.
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
        f"does, and a minimum does not know which way led to it. Use `hypergrad.unrolled` for them{use}, or fix them "
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
    """Refuses leaves of λ which neither the condition nor f depends on.

    A minimum does not know which rate or which initialization led to it: the implicit hypergradient there would be
    zero, and wrong.

    Args:
      problem: what the implicit rule is for.
      state: of the inner loop; only its shapes matter.
      hyperparams: λ.
      task: likewise.
      condition: "gradient", where ∇θ g depends on λ, or "step", where a training step does.

    Raises:
      ValueError: there are such leaves; the message names them.
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
    base.check_integer("num_steps", num_steps, 1)
    base.check_positive("damping", damping, zero=True)
    if not callable(batch) and batch not in BATCHES:
        raise ValueError(f'`batch` must be "next", "full" or a function `(key, data) -> batch`; got {batch!r}.')
    if condition not in CONDITIONS:
        raise ValueError(f"`condition` must be one of {', '.join(map(repr, CONDITIONS))}; got {condition!r}.")


def _draw(batch: Any, key: jax.Array, loop: base.InnerLoop, state: base.InnerState, data: base.Data) -> base.Batch:
    if callable(batch):
        return batch(key, data)
    return data if batch == "full" else loop.batch(state, data)


def _unknown(loop: base.InnerLoop, state: base.InnerState, condition: str) -> tuple[Any, Callable]:
    """x, what comes to rest, and `x -> state` with x in its places.

    With the condition "gradient" x is θ, in the leaves of the state that `loop.params` reads. With "step" it is all
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
    """R(x, λ), which is zero where training rests."""
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
    """Estimates dF/dλ where training has come to rest, by one linear solve for the adjoint v:

        dF/dλ = ∂f/∂λ − (∂R/∂λ)ᵀ v,    (A + δI) v = ∂f/∂θ,

        condition="gradient":  R = ∇θ g,            A = ∂²g/∂θ²
        condition="step":      R = θ − Φ(θ, λ),     A = I − (∂Φ/∂θ)ᵀ        Φ: a training step; θ: all it changes

    Exact at a strict minimum (a fixed point), with δ = 0 and v solved for. What is biased otherwise:

    - θ not at rest, by the order of ‖R‖, `metrics["inner_grad_norm"]` (`"inner_step_norm"`); `training.fit` logs a
      warning once if it is large (`rest_warning`);
    - v not solved for, by −(∂R/∂λ)ᵀ A⁻¹ (Av − ∂f/∂θ), `metrics["adjoint_residual"]` = ‖(A + δI) v − ∂f/∂θ‖;
    - damping, by δ (∂R/∂λ)ᵀ (A + δI)⁻¹ A⁻¹ ∂f/∂θ: it hides what flat directions contribute. It serves where A is nearly
      singular, or where θ is not at rest and A has negative eigenvalues above −δ;
    - a sampled A, since the mean of an inverse is not the inverse of the mean: to second order in Δ = A_batch − A the
      mean of v is too large by A⁻¹ E[Δ A⁻¹ Δ] v. Averaging over estimates does not remove it; larger batches do;
    - with `condition="gradient"`, model state (batch statistics) that the outer loss reads: how it depends on θ and λ
      is left out; `condition="step"` has it.

    R is linearized once per estimate, and each product with A is a run of that linear program: about as much as two
    gradients of g less their nonlinear part. Memory is that of one second-order gradient and what the solver needs,
    and does not depend on the number of training steps. Neither depends on the number of λ: thousands cost as much as
    one. The error of rounding is about κ(A + δI) times the machine's ε: in float32, 1e-7 κ of the hypergradient's
    norm, where the solve and the training rest have gone as far as float32 lets them.

    Args:
      problem: its `loop.loss` is g, its `outer_loss` is f; λ must enter through one of them, leaf by leaf (a rate and a
        penalty in one array count as one leaf: keep them apart). With the condition "gradient" the optimizer must rest
        where ∇θ g is zero: a penalty belongs in g. With "step" it may rest elsewhere (a decoupled weight decay, a
        projection), and λ may enter through its update; a rate's hypergradient is then the zero that is true at a fixed
        point. θ stands there for all floating-point leaves of the inner state, momentum and running statistics among
        them. Φ should be a contraction: gradient descent, with momentum or without, not Adam.
      num_steps: inner steps before the solve, at least 1.
      solver: of the linear system, `hypergrad.cg` by default (with the condition "step", 20 steps of `neumann` at a
        rate of 1: the fixed-point rule); A is symmetric with the condition "gradient".
      damping: δ ≥ 0, in curvature.
      batch: what R and A are evaluated on, all of a solve's products alike: "next", the batch of the next training
        step; "full", all of the training data, as one batch; or `(key, data) -> batch`.
      condition: "gradient" or "step".
      gauss_newton: `(outputs_fn, loss_fn)` with g = loss_fn(outputs_fn(θ, λ, batch, context), λ, batch, context);
        A is then Jᵀ (∂²loss_fn/∂outputs²) J with J = ∂outputs/∂θ, positive semidefinite where loss_fn is convex in the
        outputs, whatever the network. Exact where the outputs are linear in θ or the slopes ∂loss_fn/∂outputs are zero;
        the mixed product is always g's own. Where a penalty sees θ, put θ among the outputs. λ is the problem's:
        unconstrained after `spaces.constrain`.
      warm_start: goes on from the last estimate's θ and v, so that both follow a slowly moving λ; else every estimate
        trains afresh and is `done`.
      horizon: `done` once so many inner steps are taken, at a warm start; None never ends.

    Returns:
      An `Estimator` of kind "biased": exact in the limit alone. `hypergrad` is in outer loss per unit of λ; the
      estimate itself is not meant to be differentiated (`implicit_solve` is). Metrics: the two norms above, and
      "num_products" with A.

    Raises:
      ValueError: an argument is out of range; at trace time, a leaf of λ is used by `init` (or `update`) alone.

    Source: Bengio, 2000; Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355; Lorraine, Vicol & Duvenaud, AISTATS
      2020, https://arxiv.org/abs/1911.02590; with the condition "step", Grazzi et al., ICML 2020,
      https://arxiv.org/abs/2006.16218. iMAML is `warm_start=False` with a proximal term in g: Rajeswaran et al.,
      NeurIPS 2019, https://arxiv.org/abs/1909.04630.
    """
    _check(num_steps, damping, batch, condition)
    base.check_integer("horizon", horizon, 1, optional=True)
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


_REST_TOLERANCE = 0.3  # of ‖∇θ g‖ / ‖∂f/∂θ‖
REST_ADVICE = (
    "Take more inner steps per estimate (`num_steps`) or a better inner optimizer, or use `hypergrad.unrolled`, which "
    "needs no stationary point. The noise of a minibatch counts too: an implicit rule with `batch='full'` leaves it "
    "out."
)


def far_from_rest(metrics: Mapping[str, Any]) -> list[str]:
    """One sentence for each implicit rule in the metrics that ran far from a stationary point; see `rest_warning`."""
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
    """Warns if an implicit rule ran far from a stationary point of the inner loss g, where its hypergradient is biased.

    θ is about A⁻¹ ∇θ g away from rest, with A the Hessian of g. This changes ∂f/∂θ, the right-hand side of the linear
    system, by (∂²f/∂θ²) A⁻¹ ∇θ g, which is ∇θ g if f and g have about the same curvature (one loss on two data sets).
    So ‖∇θ g‖ / ‖∂f/∂θ‖ estimates the relative error of the hypergradient, in any unit of the loss. The limit is 0.3.

    Args:
      metrics: scalars by name: the metrics of an estimate, or their means over some steps. The function compares
        "inner_grad_norm" with "outer_grad_norm", also under the prefixes of `partition`. Other rules have no such pair.

    Returns:
      What is wrong and how to change it, or "".
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
    """v ↦ Jᵀ (∂²loss/∂outputs²) J v, each factor linearized once."""
    outputs, push = jax.linearize(lambda params: outputs_fn(params, hyperparams, batch, context), params)
    pull = jax.linear_transpose(push, params)
    _, curvature = jax.linearize(jax.grad(lambda outputs: loss_fn(outputs, hyperparams, batch, context)), outputs)
    return lambda v: pull(curvature(push(v)))[0]


def warm_implicit(problem: base.Problem, *, num_steps: int, adjoint_rate: float) -> base.Estimator:
    """`implicit` whose adjoint takes as many plain steps as θ does: v ← v − rate ((∂²g/∂θ²) v − ∂f/∂θ).

    θ and v are carried from one outer step to the next, so that both stay near their fixed points while λ moves slowly:
    neither the inner problem nor the linear system is solved from scratch.

    Args:
      problem: as for `implicit`, with the condition "gradient" and the next batch.
      num_steps: inner steps, and adjoint steps, per estimate; at least 1.
      adjoint_rate: in 1/curvature, positive; v converges below 2 / λmax(∂²g/∂θ²).

    Returns:
      An `Estimator` of kind "biased" that never ends by itself; metrics as `implicit`'s.

    Raises:
      ValueError: `num_steps` is below 1, `adjoint_rate` is not positive; at trace time, a leaf of λ is used by `init`
        or `update` alone.

    Source: Arbel & Mairal, ICLR 2022, Alg. 1, https://arxiv.org/abs/2111.14580
    """
    base.check_positive("adjoint_rate", adjoint_rate)
    return implicit(problem, num_steps=num_steps, solver=_solvers.neumann(num_steps=num_steps, rate=adjoint_rate))


def _shield(function: Callable) -> Any:
    """`function()` without a derivative, also with regard to what it closes over, and without the cost of one.

    Stopping the gradient of what comes out would leave the tangents of all its steps to be computed, or stored.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    leaves = core.jaxpr_as_fun(closed.replace(consts=jax.lax.stop_gradient(closed.consts)))()
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _refuse_derivative(leaf: jax.Array, message: str) -> jax.Array:
    """`leaf`; asked for a derivative with regard to it, a `ValueError`."""

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
    """Training as a differentiable function whose derivative is that of where it comes to rest:

        dθ*/dλ = −(∂R/∂θ)⁻¹ ∂R/∂λ,    R = ∇θ g, or θ − Φ(θ, λ).

    In the place of `unroll`, with memory that does not depend on the number of steps. Forward and reverse mode, jit,
    vmap and any nesting work (levels of optimization: derivatives of any order are exact where θ is at rest). Each
    derivative costs a solve. What the loss closes over is differentiated too. Biases as for `implicit`.

    Args:
      loop: how θ is trained.
      num_steps: at least 1; training passes no derivative on.
      solver: as for `implicit`.
      damping: δ ≥ 0.
      batch: as for `implicit`.
      condition: "gradient" or "step".

    Returns:
      `(key, hyperparams, data) -> InnerState`; the derivative of `loop.params` of it is that of θ*, with regard to λ
      and the data, and all else in it is constant. Asked for the derivative with regard to a leaf of λ that training
      depends on and R does not (a rate, an initialization), it raises a `ValueError`.

    Raises:
      ValueError: an argument is out of range.

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
        solve_again = lambda f, x: x  # training did
        return put(jax.lax.custom_root(lambda x: residual(x, hyperparams), x, solve_again, tangent_solve))

    return solve

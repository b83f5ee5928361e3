"""Implicit hypergradients with warm-started inner parameters and adjoint.

At a minimum of the inner loss ∇θ g(θ*, λ) = 0, and so, whatever way led there,

    dF/dλ = ∂f/∂λ − (∂²g/∂λ∂θ)ᵀ v,    (∂²g/∂θ²) v = ∂f/∂θ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from metaopt import base, inner


class WarmImplicitState(NamedTuple):
    """What `warm_implicit` carries.

    Attributes:
      inner: the inner loop's state.
      adjoint: v, shaped like θ.
      key: what later estimates draw from.
    """

    inner: base.InnerState
    adjoint: base.Params
    key: jax.Array


def used_leaves(function: Callable, hyperparams: base.HyperParams, *args: Any) -> list[bool]:
    """Which leaves of λ `function(hyperparams, *args)` depends on, by dead-code elimination of its jaxpr.

    Args:
      function: any traceable function.
      hyperparams: λ.
      *args: its further arguments.

    Returns:
      One bool for each leaf of λ.
    """
    closed = jax.make_jaxpr(function)(hyperparams, *args)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return list(used[: len(jax.tree.leaves(hyperparams))])


def refuse_unanswerable(problem: base.Problem, state: base.InnerState, hyperparams: base.HyperParams, task) -> None:
    """Raises a `ValueError` that names the leaves of λ which neither ∇θ g nor f depends on.

    A minimum does not know which rate or which initialization led to it: the implicit hypergradient there would be
    zero, and wrong.

    Args:
      problem: what the implicit rule is for.
      state: of the inner loop; only its shapes matter.
      hyperparams: λ.
      task: likewise.
    """
    loop = problem.loop

    def inner_grad(hyperparams, state, data):
        batch, context = loop.batch(state, data), loop.context(state)
        return jax.grad(loop.loss, has_aux=True)(loop.params(state), hyperparams, batch, context)[0]

    def outer_loss(hyperparams, state, key, task):
        return problem.outer_loss(loop.params(state), hyperparams, problem.outer_batch(key, task), loop.context(state))

    in_inner = used_leaves(inner_grad, hyperparams, state, task.train)
    in_outer = used_leaves(outer_loss, hyperparams, state, jax.random.key(0), task)
    paths = [jax.tree_util.keystr(path) or "itself" for path, _ in jax.tree_util.tree_leaves_with_path(hyperparams)]
    refused = [path for path, g, f in zip(paths, in_inner, in_outer, strict=True) if not (g or f)]
    if refused:
        raise ValueError(
            f"An implicit rule cannot answer for the leaves {', '.join(refused)} of λ: neither the gradient of the "
            "inner loss nor the outer loss depends on them, only the initialization or the optimizer's update does, "
            "and a minimum does not know which way led to it. Use `hypergrad.unrolled` for them, or fix them "
            "(`spaces.fixed`)."
        )


def warm_implicit(problem: base.Problem, *, num_steps: int, adjoint_rate: float) -> base.Estimator:
    """Estimates dF/dλ = ∂f/∂λ − (∂²g/∂λ∂θ)ᵀv, where v tracks (∂²g/∂θ²)⁻¹ ∂f/∂θ.

    θ and v are carried from one outer step to the next, so that both stay near their fixed points while λ moves slowly:
    no inner problem is solved from scratch. Exact at the fixed points; before, the bias is that of θ and of v, and
    `metrics["adjoint_residual"]` = ‖(∂²g/∂θ²)v − ∂f/∂θ‖ and `metrics["inner_grad_norm"]` = ‖∇θ g‖ say how far they are.
    Memory does not depend on the number of steps. The estimate itself is not meant to be differentiated.

    Args:
      problem: its `loop.loss` is g, its `outer_loss` is f; λ must enter through one of them, leaf by leaf (a rate and a
        penalty in one array count as one leaf: keep them apart). g should be strictly convex in θ near its minimum, and
        the optimizer must rest where ∇θ g does: penalties belong in g, not in a decoupled decay. On minibatches, the
        Hessian is that of the next batch.
      num_steps: inner steps, and adjoint steps, per estimate; at least 1.
      adjoint_rate: in 1/curvature, positive; v converges below 2 / λmax(∂²g/∂θ²).

    Returns:
      An `Estimator` that never ends by itself; `hypergrad` is shaped like λ, in outer loss per unit of λ.

    Raises:
      ValueError: `num_steps` is below 1, `adjoint_rate` is not positive; at trace time, a leaf of λ is used by `init`
        or `update` alone.

    Source: Arbel & Mairal, ICLR 2022, Alg. 1, https://arxiv.org/abs/2111.14580
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    if not adjoint_rate > 0:
        raise ValueError(f"`adjoint_rate` must be positive; got {adjoint_rate}.")
    loop = problem.loop

    def init(key, hyperparams, task):
        loop_key, key = jax.random.split(key)
        state = loop.init(loop_key, hyperparams, task.train)
        refuse_unanswerable(problem, state, hyperparams, task)
        return WarmImplicitState(state, optax.tree.zeros_like(loop.params(state)), key)

    def estimate(hyperparams, task, state):
        outer_key, key = jax.random.split(state.key)
        trained = jax.lax.fori_loop(
            0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, task.train), state.inner
        )
        at, context = (loop.params(trained), hyperparams), loop.context(trained)  # (θ, λ)
        outer = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))
        f, (f_params, f_hyper) = outer(*at, problem.outer_batch(outer_key, task), context)
        batch = loop.batch(trained, task.train)

        def inner_grad(params, hyperparams):
            return jax.grad(loop.loss, has_aux=True)(params, hyperparams, batch, context)[0]

        g_params, pullback = jax.vjp(inner_grad, *at)  # v ↦ ((∂²g/∂θ²)v, (∂²g/∂λ∂θ)ᵀv)

        def residual(v):
            return optax.tree.sub(pullback(v)[0], f_params)

        def descend(_, v):
            return optax.tree.add_scale(v, -adjoint_rate, residual(v))

        v = jax.lax.fori_loop(0, num_steps, descend, state.adjoint)
        hypergrad = optax.tree.sub(f_hyper, pullback(v)[1])
        metrics = {
            "adjoint_residual": optax.tree.norm(residual(v)),
            "inner_grad_norm": optax.tree.norm(g_params),
            "outer_grad_norm": optax.tree.norm(f_params),
        }
        return base.Estimate(f, hypergrad, jnp.array(False), metrics), WarmImplicitState(trained, v, key)

    return base.Estimator(init, estimate, kind="biased")  # exact in the limit alone

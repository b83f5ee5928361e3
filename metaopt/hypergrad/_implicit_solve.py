"""Training as a function whose derivative is that of the point where training comes to rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import _jaxpr, _trees, base, inner
from metaopt.hypergrad import _refusals, _solvers, _stationary


def shielded(function: Callable) -> Any:
    """Evaluates `function()` without a derivative, also with respect to the variables that it closes over.

    Its cost is that of the plain function. If only the result were wrapped in `stop_gradient`, JAX would still compute
    or store the tangents of all its steps.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    leaves = _jaxpr.jaxpr_as_fun(closed.replace(consts=jax.lax.stop_gradient(closed.consts)))()
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _refusing_zero(
    hyperparams: base.HyperParams, in_training: list[bool], in_residual: list[bool], condition: str
) -> jax.Array:
    """0, whose derivative raises a ValueError for each leaf of λ that training depends on and R does not."""
    guard = jnp.zeros([])
    reason_text = _stationary.reason(condition, "depends on them")
    leaves = zip(_refusals.paths(hyperparams), jax.tree.leaves(hyperparams), in_training, in_residual, strict=True)
    for path, leaf, enters_training, enters_residual in leaves:
        if enters_training and not enters_residual:
            message = f"An implicit rule cannot estimate the hypergradient of the leaves {path} of λ: {reason_text}"
            guard = guard + _jaxpr.refuse_derivative(jnp.zeros([]), leaf, message)
    return guard


def implicit_solve(
    loop: base.InnerLoop,
    *,
    num_steps: int,
    solver: _solvers.Solver | None = None,
    damping: float = 0.0,
    batch: str | Callable[[jax.Array, base.Data], base.Batch] = "next",
    condition: str = "gradient",
) -> Callable:
    """Makes training a differentiable function, whose derivative is that of the point where training comes to rest:

        dθ*/dλ = −(∂R/∂θ)⁻¹ ∂R/∂λ,    R = ∇θ ℓ, or θ − Φ(θ, λ).

    It can replace `unroll`, and its memory does not depend on the number of steps. Forward and reverse mode, jit, vmap
    and any nesting work. So several levels of optimization are possible: derivatives of any order are exact if θ is at
    rest. Each derivative costs one solve. Variables that the loss closes over are differentiated too. The biases are
    those of `implicit`. It has no metrics, so nothing warns if θ is far from rest: use those of `implicit`.

    Args:
      loop: the inner loop, which trains θ.
      num_steps: training steps, at least 1. No derivative passes through them.
      solver: as for `implicit`.
      damping: δ ≥ 0.
      batch: as for `implicit`.
      condition: "gradient" or "step".

    Returns:
      `(key, hyperparams, data) -> InnerState`. The derivative of `loop.params` of this state, with respect to λ and the
      data, is that of θ*. With the condition "gradient", everything else in the state is constant, except for the
      sequence that a schedule-free optimizer averages. With "step", the other floating-point leaves have a derivative
      too. A derivative with respect to a leaf of λ raises a `ValueError` if training depends on the leaf and R does not
      (a rate, an initialization).

    Raises:
      ValueError: if `num_steps` or `damping` is negative, or `batch` or `condition` is unknown.

    >>> import jax, optax
    >>> from metaopt import hypergrad, inner
    >>> loop = inner.loop(
    ...     lambda params, hp, data: (
    ...         (params - data) ** 2 / 2 + hp["penalty"] * params**2 / 2
    ...     ),
    ...     lambda hp: optax.sgd(0.5),
    ...     init=lambda key, hp, data: jax.numpy.zeros([]),
    ... )
    >>> solve = hypergrad.implicit_solve(loop, num_steps=50)
    >>> outer = lambda penalty: loop.params(
    ...     solve(jax.random.key(0), {"penalty": penalty}, jax.numpy.array(1.0))
    ... )
    >>> # θ* = 1 / (1 + penalty)
    >>> print(f"{jax.grad(outer)(1.0):.4f} {jax.grad(jax.grad(outer))(1.0):.4f}")
    -0.2500 0.2500
    """
    _stationary.check(num_steps, damping, batch, condition)
    solver = _stationary.default_solver(solver, condition)

    def train(hyperparams, key, data, num_steps=num_steps):
        state = loop.init(key, hyperparams, data)
        return jax.lax.fori_loop(0, num_steps, lambda _, s: inner.step(loop, s, hyperparams, data), state)

    def at_rest(state, key, data):
        x, put = _stationary.unknowns(loop, state, condition)
        rows = _stationary.draw(batch, key, loop, state, data)
        return x, put, _stationary.residual_fn(loop, put, state, data, rows, condition)

    def one_step(hyperparams, key, data):
        return loop.params(train(hyperparams, key, data, num_steps=1))

    def residual_at(hyperparams, state, key, data):
        x, _, residual = at_rest(state, key, data)
        return residual(x, hyperparams)

    def solve(key, hyperparams, data):
        train_key, batch_key, solver_key = jax.random.split(key, 3)
        trained = shielded(lambda: train(hyperparams, train_key, data))
        in_training = _jaxpr.used_leaves(one_step, hyperparams, train_key, data)
        in_residual = _jaxpr.used_leaves(residual_at, hyperparams, trained, batch_key, data)
        guard = _refusing_zero(hyperparams, in_training, in_residual, condition)
        x, put, residual = at_rest(trained, batch_key, data)

        def function(x):
            return jax.tree.map(lambda r: r + guard.astype(r.dtype), residual(x, hyperparams))

        def tangent_solve(linear, b):
            matvec = lambda v: optax.tree.add_scale(linear(v), damping, v)
            return linear_solve(solver, solver_key, matvec, b, symmetric=condition == "gradient")

        already_solved = lambda function, x: x
        state = put(jax.lax.custom_root(function, x, already_solved, tangent_solve))
        # Leaves outside x, such as statistics, have no implicit derivative. Adding `guard` makes their derivatives
        # raise the same errors.
        return jax.tree.map(lambda leaf: leaf + guard.astype(leaf.dtype) if _trees.is_inexact(leaf) else leaf, state)

    return solve


def linear_solve(
    solver: _solvers.Solver, key: jax.Array, matvec: Callable, b: base.PyTree, *, symmetric: bool
) -> base.PyTree:
    """Returns x with matvec(x) = b. The derivative of x is one more linear solve.

    Args:
      solver: of the system, and of the transposed system.
      key: for the solver.
      matvec: a linear function.
      b: a pytree.
      symmetric: whether the matrix is symmetric.
    """

    def solve(matvec, b):
        return solver(matvec, b, optax.tree.zeros_like(b), key=key)[0]

    return jax.lax.custom_linear_solve(lambda v: _joined(matvec(v)), _joined(b), solve, solve, symmetric=symmetric)


def _joined(tree: base.PyTree) -> base.PyTree:
    """Returns the same values, where JAX regards each leaf as a function of all leaves. XLA removes the difference.

    JAX cannot transpose `custom_linear_solve` if it sees that a leaf of b is constant: that of a leaf of θ on which λ
    has no direct effect.
    """
    total = sum((jnp.real(leaf).sum().astype(jnp.float32) for leaf in jax.tree.leaves(tree)), start=jnp.zeros([]))
    return jax.tree.map(lambda leaf: jnp.where(False, jnp.asarray(total, leaf.dtype), leaf), tree)

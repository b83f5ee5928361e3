"""The minimum of a loss as a differentiable function, whatever solver finds it."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from metaopt import _checks, base
from metaopt.hypergrad import _implicit_solve, _solvers


def argmin(
    loss: Callable,
    *,
    minimize: Callable[[Callable, base.Params], base.Params] | None = None,
    num_steps: int = 500,
    tol: float = 1e-5,
    solver: _solvers.Solver | None = None,
) -> Callable:
    """Makes a function that returns the minimum of a loss. Its derivative is that of the implicit function theorem:

        θ*(λ, data) = argmin_θ ℓ(θ, λ, data),    dθ*/dλ = −(∂²ℓ/∂θ²)⁻¹ ∂²ℓ/∂λ∂θ.

    The derivative does not depend on the path of the solver, and its memory does not depend on the number of steps.
    Forward and reverse mode, jit, vmap and any nesting work. Each derivative costs one linear solve. Variables that
    `loss` closes over are differentiated too. The derivative with respect to the start is zero. The derivative is exact
    at a strict minimum. Otherwise its error is of the order of the gradient of `loss` at the returned point, plus the
    residual of the linear solve. Divide both by the smallest curvature for the error of θ* and of its derivative. So
    with badly conditioned data, such as columns of different units, a small residual may leave a large error, and no
    warning is given. To check the linear solve, compare with `solver=hypergrad.dense()`; scaled columns are the remedy.

    It is `implicit_solve` for a loss without an inner loop. Use `implicit_solve` if training has batches or a state.
    For a root of a function F that is not the gradient of a loss, such as T(θ) − θ, minimize ½‖F‖². Its minimum with
    F = 0 is the root, and has the same derivative; the condition number of the linear system is squared.

    Args:
      loss: `(params, hyperparams, data) -> []`, twice differentiable.
      minimize: `(fn, params) -> params`, the solver: it minimizes `fn(params) -> []` from `params`. It may be any
        function that JAX can trace; no derivative passes through it. By default it is optax's L-BFGS with its line
        search.
      num_steps: the largest number of steps of the default solver, at least 1.
      tol: the default solver ends when the norm of the gradient is below it; positive. If `num_steps` end first, no
        warning is given: check `optax.tree.norm(jax.grad(loss)(params, hyperparams, data))` at the returned point.
      solver: the solver of the linear system, whose matrix is symmetric; by default
        `hypergrad.cg(num_steps=100, tol=min(1e-6, tol))`, also with `minimize`. (`hypergrad.cg()` takes at most 20
        steps.)

    Returns:
      `(params, hyperparams, data) -> params`, a function that maps a start to the minimum.

    Raises:
      ValueError: if `num_steps` is below 1 or `tol` is not positive, or if `solver` is not a function, or is a factory
        such as `hypergrad.cg` that was not called.

    Source: Blondel et al., NeurIPS 2022, https://arxiv.org/abs/2105.15183

    >>> import jax
    >>> from metaopt import hypergrad
    >>> solve = hypergrad.argmin(
    ...     lambda params, hp, data: (params - data) ** 2 / 2 + hp * params**2 / 2
    ... )
    >>> outer = lambda penalty: solve(0.0, penalty, 1.0)
    >>> print(f"{outer(1.0):.4f} {jax.grad(outer)(1.0):.4f}")  # θ* = 1 / (1 + penalty)
    0.5000 -0.2500
    """
    _checks.check_integer("num_steps", num_steps, 1)
    _checks.check_positive("tol", tol)
    find = minimize or (lambda fn, params: _lbfgs(fn, params, num_steps, tol))
    linear_solver = _solvers.checked(solver or _solvers.cg(num_steps=100, tol=min(1e-6, tol)))

    def solve(params, hyperparams, data=None):
        def objective(params):
            return loss(params, hyperparams, data)

        def tangent_solve(matvec, b):
            return _implicit_solve.linear_solve(linear_solver, jax.random.key(0), matvec, b, symmetric=True)

        minimum = _implicit_solve.shielded(lambda: find(objective, params))
        return jax.lax.custom_root(jax.grad(objective), minimum, lambda fn, x: x, tangent_solve)

    return solve


def _lbfgs(fn: Callable, params: base.Params, num_steps: int, tol: float) -> base.Params:
    """Steps of L-BFGS until the gradient is small."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(fn)

    def unfinished(carry: tuple[base.Params, Any]) -> jax.Array:
        count, norm = optax.tree.get(carry[1], "count"), optax.tree.norm(optax.tree.get(carry[1], "grad"))
        return (count == 0) | (count < num_steps) & (norm >= tol)

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=fn)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jax.numpy.asarray, params)
    return jax.lax.while_loop(unfinished, step, (params, optimizer.init(params)))[0]

"""Linear solvers for implicit hypergradients: A v = b, where A is available only through products with vectors.

A is the Hessian of the inner loss (positive definite at a strict minimum), or its Gauss–Newton approximation. It can
also be I − Jᵀ, where J is the Jacobian of a training step; this matrix is not symmetric. Each factory returns a
`Solver`, and any function with the same signature works too. Let κ = λmax/λmin of A, and let ε be the machine
precision. Then no solver's v is more accurate than about κε relative to its norm.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse import linalg

from metaopt import _checks, base


class Matvec(Protocol):
    def __call__(self, v: base.Params) -> base.Params:
        """The product A v, linear in v; both are shaped like θ."""
        ...


class Solver(Protocol):
    """Solves A v = b: `(matvec, b, initial, *, key) -> (v, num_products)`. It must be traceable.

    `matvec(v)` is A v; `b`, v and the guess `initial` are shaped like θ; `num_products` counts the calls of `matvec`.
    """

    def __call__(
        self, matvec: Matvec, b: base.Params, initial: base.Params, *, key: jax.Array
    ) -> tuple[base.Params, Any]:
        """v with A v ≈ b from the guess `initial`, and the number of products with A; it must be traceable."""
        ...


def _vdot(x: base.Params, y: base.Params) -> jax.Array:
    """⟨x, y⟩ as a sum in float32 or better, since a dot product loses precision on some accelerators."""

    def leaf(x, y):
        dtype = jnp.result_type(x, jnp.float32)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    return sum(jax.tree.leaves(jax.tree.map(leaf, x, y)), jnp.zeros([], jnp.float32))


def _add_scaled(x: base.Params, scale: jax.Array, y: base.Params) -> base.Params:
    """x + scale · y in the precision of x."""
    return jax.tree.map(lambda x, y: x + scale.astype(x.dtype) * y, x, y)


def _unless_nan(v: base.Params, residual: base.Params) -> base.Params:
    """v, or NaN if the guess's residual is not finite: the loop then ends at once, and its v is only the guess."""
    return jax.tree.map(lambda v, r: jnp.where(jnp.isfinite(r), v, jnp.nan), v, residual)


def cg(*, num_steps: int = 20, tol: float = 1e-6, normal: bool = False) -> Solver:
    """Conjugate gradients for a symmetric positive definite A: the standard choice at a minimum of the inner loss.

    After k steps, the error in the norm of A is at most 2((√κ − 1)/(√κ + 1))^k times that of the guess. If the number
    of steps equals the number of entries of θ, the solution is exact up to rounding. If the curvature along the next
    direction is not positive, the solver stops and returns its current v. (JAX's own CG continues along such a
    direction, and does not report its number of products.)

    Args:
      num_steps: the maximum number of steps, at least 1; one product each, or two if `normal`.
      tol: stops once ‖Av − b‖ ≤ tol ‖b‖, for the residual that the recurrence carries. With 0 it takes all steps.
      normal: solves the normal equations AᵀA v = Aᵀb instead, for any nonsingular A, including indefinite Hessians.
        This squares the condition number, and `tol` refers to ‖Aᵀ(Av − b)‖ ≤ tol ‖Aᵀb‖.

    Returns:
      A `Solver` that starts from the guess. It needs the memory of four vectors like θ.

    Source: Hestenes & Stiefel, 1952; for hypergradients Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import hypergrad
    >>> b = jnp.array([2.0, 6.0])
    >>> v, num_products = hypergrad.cg()(
    ...     lambda v: jnp.array([1.0, 2.0]) * v, b, 0 * b, key=jax.random.key(0)
    ... )
    >>> print(jax.device_get(v).round(3), num_products)
    [2. 3.] 3
    """

    def solve(matvec, b, initial, *, key):
        del key
        squared_tolerance = tol**2 * _vdot(b, b)
        start = r = optax.tree.sub(b, matvec(initial))

        def unfinished(carry):
            *_, rr, k = carry
            return (rr > squared_tolerance) & (k < num_steps)

        def step(carry):
            v, r, p, rr, k = carry
            ap = matvec(p)
            curvature = _vdot(p, ap)
            is_not_positive = ~(curvature > 0)
            rate = jnp.where(is_not_positive, 0, rr / jnp.where(is_not_positive, 1, curvature))
            v, r = _add_scaled(v, rate, p), _add_scaled(r, -rate, ap)
            new_rr = jnp.where(is_not_positive, 0, _vdot(r, r))  # zero ends the loop
            return v, r, _add_scaled(r, new_rr / rr, p), new_rr, k + 1

        v, *_, k = jax.lax.while_loop(unfinished, step, (initial, r, r, _vdot(r, r), 0))
        return _unless_nan(v, start), k + 1

    return _normal_equations(solve) if normal else solve


def _normal_equations(solver: Solver) -> Solver:
    """Solves AᵀA v = Aᵀb by `solver`; JAX derives the products with Aᵀ from `matvec`."""

    def solve(matvec, b, initial, *, key):
        transpose = jax.linear_transpose(matvec, b)
        v, k = solver(lambda v: transpose(matvec(v))[0], transpose(b)[0], initial, key=key)
        return v, 2 * k + 1

    return solve


def gmres(*, num_steps: int = 20) -> Solver:
    """GMRES (from JAX): the smallest residual over a Krylov space, for any nonsingular A.

    Args:
      num_steps: the dimension of the space, with one product each; at least 1. There are no restarts.

    Returns:
      A `Solver` that starts from the guess. It needs the memory of `num_steps` vectors like θ.

    Source: Saad & Schultz, 1986; for hypergradients Blondel et al., NeurIPS 2022, https://arxiv.org/abs/2105.15183
    """

    def solve(matvec, b, initial, *, key):
        del key
        # Solve for the correction, from zero: JAX's tolerance divides by ‖b‖, which may be 0 even if the guess is not.
        r = optax.tree.sub(b, matvec(initial))
        dim = min(num_steps, sum(leaf.size for leaf in jax.tree.leaves(b)))
        # Only the method "incremental" does not square the condition number.
        change, _ = linalg.gmres(matvec, r, tol=0.0, restart=dim, maxiter=1, solve_method="incremental")
        return _unless_nan(optax.tree.add(initial, change), r), dim + 3

    return solve


def bicgstab(*, num_steps: int = 20, tol: float = 1e-6) -> Solver:
    """BiCGSTAB (from JAX), for any nonsingular A, in the memory of a few vectors. Its residual may also rise.

    Args:
      num_steps: the maximum number of steps, with two products each; at least 1.
      tol: stops once ‖Av − b‖ ≤ tol ‖b‖; positive. With 0, a step after exact convergence divides 0 by 0.

    Returns:
      A `Solver` that starts from the guess. Its number of products is that of all `num_steps` steps, even if it stops
      earlier, since JAX does not report the steps taken.

    Source: van der Vorst, 1992.
    """

    def solve(matvec, b, initial, *, key):
        del key
        r = optax.tree.sub(b, matvec(initial))
        atol: Any = tol * jnp.sqrt(_vdot(b, b))
        change, _ = linalg.bicgstab(matvec, r, tol=0.0, atol=atol, maxiter=num_steps)
        return _unless_nan(optax.tree.add(initial, change), r), 2 * num_steps + 2

    return solve


def neumann(*, num_steps: int, rate: float) -> Solver:
    """K steps of v ← v − rate (A v − b). From a guess of zero, this is the truncated Neumann series

        v_K = rate Σ_{k<K} (I − rate A)^k b,    v_K − v = (I − rate A)^K (v_0 − v).

    It converges if the spectral radius of I − rate A is below 1. For a symmetric A this means rate < 2 / λmax. With
    `condition="step"` of `implicit` and a rate of 1 it is the fixed-point rule v ← (∂Φ/∂θ)ᵀ v + ∂f/∂θ. That rule
    converges whenever training converges, and at the same speed.

    Args:
      num_steps: K, with one product each; at least 1.
      rate: positive, in units of 1/curvature.

    Returns:
      A `Solver` that starts from the guess.

    Source: Lorraine, Vicol & Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590
    """

    def solve(matvec, b, initial, *, key):
        del key
        rate_array = jnp.asarray(rate)

        def step(_, v):
            return _add_scaled(v, -rate_array, optax.tree.sub(matvec(v), b))

        return jax.lax.fori_loop(0, num_steps, step, initial), num_steps

    return solve


def nystrom(*, rank: int, damping: float) -> Solver:
    """Nyström approximation of a positive semidefinite A from k of its columns, inverted with Woodbury's formula:

        v = (A_k + ρI)⁻¹ b,    A_k = C W⁺ Cᵀ = B Bᵀ,    C = A[:, K],  W = A[K, K],    K random,

        (B Bᵀ + ρI)⁻¹ b = (b − B (ρI + BᵀB)⁻¹ Bᵀ b) / ρ.

    It needs no iterations and no rate. At full rank A_k = A, and only the bias from ρ remains:
    v − A⁻¹b = −ρ (A + ρI)⁻¹ A⁻¹b. At a lower rank, directions that A_k misses are treated as if their curvature were ρ.
    Negative eigenvalues of W are treated as 0.

    Args:
      rank: k, the number of columns and of products, at least 1. If θ has fewer entries, all columns are used.
      damping: ρ, positive, in units of curvature.

    Returns:
      A `Solver` that draws its columns with the key and needs no guess. It needs the memory of k vectors like θ.

    Raises:
      ValueError: if `rank < 1`, or `damping` is not positive.

    Source: Hataya & Yamada, AISTATS 2023, https://arxiv.org/abs/2302.09726
    """
    _checks.check_integer("rank", rank, 1)  # −1 would take all columns but one
    _checks.check_positive("damping", damping)

    def solve(matvec, b, initial, *, key):
        del initial
        narrow, unravel = ravel_pytree(b)
        flat = narrow.astype(jnp.promote_types(narrow.dtype, jnp.float32))  # factorizations need at least float32
        columns = jax.random.choice(key, flat.size, (min(rank, flat.size),), replace=False)

        def column(i):
            return ravel_pytree(matvec(unravel(jnp.zeros_like(narrow).at[i].set(1))))[0].astype(flat.dtype)

        c = jax.lax.map(column, columns)  # [k, n]: one product at a time
        w = c[:, columns]
        eigenvalues, q = jnp.linalg.eigh((w + w.T) / 2)
        positive = eigenvalues > len(columns) * jnp.finfo(flat.dtype).eps * eigenvalues[-1]
        scale = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, eigenvalues, 1)), 0)
        with jax.default_matmul_precision("highest"):
            # Bᵀ, a factor of A_k. Woodbury's formula with W + CᵀC/ρ instead would square the condition number.
            bt = scale[:, None] * (q.T @ c)
            inner = jnp.linalg.solve(bt @ bt.T + damping * jnp.eye(len(columns), dtype=flat.dtype), bt @ flat)
            return unravel(((flat - bt.T @ inner) / damping).astype(narrow.dtype)), len(columns)

    return solve


def dense() -> Solver:
    """Builds the whole matrix and solves directly: for θ of up to a few thousand entries, and to check other solvers.

    Returns:
      A `Solver` that takes n products at once and the memory of n² numbers. It needs no guess.
    """

    def solve(matvec, b, initial, *, key):
        del initial, key
        flat, unravel = ravel_pytree(b)
        rows = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
        wide = jnp.promote_types(flat.dtype, jnp.float32)  # factorizations need at least float32
        v = jnp.linalg.solve(rows.T.astype(wide), flat.astype(wide))
        return unravel(v.astype(flat.dtype)), flat.size

    return solve


def lineax(solver: Any, *, tags: Any = ()) -> Solver:
    """Any solver from lineax (`pip install "metaopt-jax[lineax]"`), such as `lineax.CG(rtol=1e-6, atol=0)`.

    Args:
      solver: a `lineax.AbstractLinearSolver`.
      tags: properties of A that the caller guarantees, such as `lineax.positive_semidefinite_tag`, which CG and
        Cholesky require.

    Returns:
      A `Solver`. Iterative solvers start from the guess. If they do not converge, the result is their last iterate. The
      number of products is lineax's count of steps, or the number of entries of θ if lineax reports no count.
    """
    import lineax as lx

    def solve(matvec, b, initial, *, key):
        del key
        operator = lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), tags)
        solution = lx.linear_solve(operator, b, solver, options={"y0": initial}, throw=False)
        size = sum(leaf.size for leaf in jax.tree.leaves(b))
        v = _unless_nan(solution.value, optax.tree.sub(b, matvec(initial)))
        return v, solution.stats.get("num_steps", size)

    return solve


def checked(solver: Solver) -> Solver:
    """Returns a solver.

    Raises:
      ValueError: if it is not a function, or a function such as `cg` that returns solvers.
    """
    factories = {"bicgstab": bicgstab, "cg": cg, "dense": dense, "gmres": gmres, "lineax": lineax, "neumann": neumann}
    for name, factory in (factories | {"nystrom": nystrom}).items():
        if solver is factory:
            raise ValueError(
                f"`solver` must be the result of `hypergrad.{name}(...)`, not the function itself: call it."
            )
    if not callable(solver):
        raise ValueError(f"`solver` must be a function, such as `hypergrad.cg(num_steps=20)`; got {solver!r}.")
    return solver

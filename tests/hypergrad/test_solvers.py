"""Every linear solver against numpy's, on matrices that are not diagonal, not symmetric, not well conditioned."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metaopt import hypergrad

KEY = jax.random.key(0)
SIZE = 7
TREE = {"w": jnp.zeros([3, 2]), "b": jnp.zeros([])}
ZERO, UNRAVEL = ravel_pytree(TREE)


def matrix(condition, symmetric=True, seed=0):
    """Singular values (eigenvalues, where symmetric) spread evenly in the logarithm, from 1/κ to 1."""
    rng = np.random.default_rng(seed)
    first, second = (np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    return first @ np.diag(np.geomspace(1, 1 / condition, SIZE)) @ (first if symmetric else second).T


B = np.random.default_rng(1).normal(size=SIZE)
GUESS = np.random.default_rng(2).normal(size=SIZE)


@partial(jax.jit, static_argnums=0)
def run(solver, a, b, guess):
    """θ is a tree of two leaves."""
    matvec = lambda v: UNRAVEL(a @ ravel_pytree(v)[0])
    v, num_products = solver(matvec, UNRAVEL(b), UNRAVEL(guess), key=KEY)
    return ravel_pytree(v)[0], num_products


def solve(solver, a, b=B, guess=GUESS):
    """v and the number of products."""
    v, num_products = run(solver, *map(jnp.asarray, (a, b, guess)))
    return np.asarray(v), int(num_products)


def lineax_cg():
    lx = pytest.importorskip("lineax")
    return hypergrad.lineax(lx.CG(rtol=1e-12, atol=0.0), tags=lx.positive_semidefinite_tag)


def lineax_lu():
    return hypergrad.lineax(pytest.importorskip("lineax").LU())


# Factory, whether A must be symmetric and positive definite.
SOLVERS = {
    "cg": (lambda: hypergrad.cg(num_steps=30, tol=1e-13), True),
    "normal_cg": (lambda: hypergrad.cg(num_steps=60, tol=1e-14, normal=True), False),
    "gmres": (lambda: hypergrad.gmres(num_steps=30), False),
    "bicgstab": (lambda: hypergrad.bicgstab(num_steps=60, tol=1e-13), False),
    "neumann": (lambda: hypergrad.neumann(num_steps=1000, rate=1.0), True),
    "dense": (hypergrad.dense, False),
    "lineax_cg": (lineax_cg, True),
    "lineax_lu": (lineax_lu, False),
}


@cache
def cached_solver(name):
    return SOLVERS[name][0]()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.once
def test_each_solver_equals_numpy(name):
    for a in [matrix(30.0)] + ([] if SOLVERS[name][1] else [matrix(30.0, symmetric=False)]):
        v, _ = solve(cached_solver(name), a)
        np.testing.assert_allclose(v, np.linalg.solve(a, B), rtol=1e-9)


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "dense"])
@pytest.mark.once
def test_an_ill_conditioned_matrix(name):
    # A recurrence whose residual is stale or not scaled shows here: it stops early, or far away.
    condition, eps = 1e5, np.finfo(float).eps
    a = matrix(condition)
    v, _ = solve(cached_solver(name), a)
    expected = np.linalg.solve(a, B)
    assert np.linalg.norm(a @ v - B) < 1e-10 * np.linalg.norm(B)
    assert np.linalg.norm(v - expected) < 20 * condition * eps * np.linalg.norm(expected)


def test_conjugate_gradients_in_as_many_steps_as_entries():
    condition, eps = 10.0, np.finfo(float).eps
    a = matrix(condition)
    v, num_products = solve(hypergrad.cg(num_steps=SIZE, tol=0.0), a, guess=0 * B)
    expected = np.linalg.solve(a, B)
    assert num_products == SIZE + 1
    assert np.linalg.norm(v - expected) < 100 * condition * eps * np.linalg.norm(expected)
    # Fewer steps are the best of their Krylov space, in the norm of A; as many different eigenvalues, as many steps.
    v, _ = solve(hypergrad.cg(num_steps=3, tol=0.0), a, guess=0 * B)
    basis = np.stack([np.linalg.matrix_power(a, k) @ B for k in range(3)], 1)
    best = basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ B)
    np.testing.assert_allclose(v, best, rtol=1e-9)
    two = np.eye(SIZE) + 3 * np.outer(B, B) + 0.5 * np.outer(GUESS, GUESS)
    v, _ = solve(hypergrad.cg(num_steps=3, tol=0.0), two)
    np.testing.assert_allclose(v, np.linalg.solve(two, B), rtol=1e-9)


@pytest.mark.once
def test_gmres_is_the_smallest_residual_of_its_space():
    a = matrix(30.0, symmetric=False)
    v, num_products = solve(hypergrad.gmres(num_steps=3), a, guess=0 * B)
    assert num_products == 3 + 3  # the residuals at the guess (twice) and at the end
    basis = np.stack([np.linalg.matrix_power(a, k) @ B for k in range(3)], 1)
    best = basis @ np.linalg.lstsq(a @ basis, B)[0]
    np.testing.assert_allclose(v, best, rtol=1e-9)


def test_negative_curvature():
    a = matrix(30.0) - 0.5 * np.eye(SIZE)  # eigenvalues of both signs
    v, _ = solve(hypergrad.cg(num_steps=200, tol=1e-14, normal=True), a)
    np.testing.assert_allclose(v, np.linalg.solve(a, B), rtol=1e-9)
    b = np.linalg.matrix_power(matrix(30.0), 2) @ B  # more of it where the curvature is positive
    v, num_products = solve(hypergrad.cg(), a, b, guess=0 * B)
    assert 2 < num_products < SIZE and np.isfinite(v).all()
    assert v @ a @ v > 0 and b @ v > 0
    # It stops at once, with the guess.
    np.testing.assert_array_equal(solve(hypergrad.cg(), -np.eye(SIZE))[0], GUESS)


def test_neumann_equals_its_stated_truncation():
    a, rate, num_steps = matrix(30.0), 0.7, 5
    shrink = np.eye(SIZE) - rate * a
    series = rate * sum(np.linalg.matrix_power(shrink, k) for k in range(num_steps)) @ B
    solver = hypergrad.neumann(num_steps=num_steps, rate=rate)
    v, num_products = solve(solver, a, guess=0 * B)
    assert num_products == num_steps
    np.testing.assert_allclose(v, series, rtol=1e-12)
    exact = np.linalg.solve(a, B)
    v, _ = solve(solver, a)
    np.testing.assert_allclose(v - exact, np.linalg.matrix_power(shrink, num_steps) @ (GUESS - exact), rtol=1e-10)


@pytest.mark.once
def test_nystrom():
    rho = 0.05
    a = matrix(1e4)
    damped = np.linalg.solve(a + rho * np.eye(SIZE), B)
    v, num_products = solve(hypergrad.nystrom(rank=SIZE + 5, damping=rho), a)
    assert num_products == SIZE
    np.testing.assert_allclose(v, damped, rtol=1e-9)
    exact = np.linalg.solve(a, B)
    np.testing.assert_allclose(v - exact, -rho * np.linalg.solve(a + rho * np.eye(SIZE), exact), rtol=1e-7)
    # The formula of the paper, for the columns drawn; as many columns as the matrix has ranks give all of it.
    solver = hypergrad.nystrom(rank=3, damping=rho)
    columns = np.asarray(jax.random.choice(KEY, SIZE, (3,), replace=False))
    c, w = a[:, columns], a[np.ix_(columns, columns)]
    v, num_products = solve(solver, a)
    assert num_products == 3
    np.testing.assert_allclose(v, B / rho - c @ np.linalg.solve(w + c.T @ c / rho, c.T @ B) / rho**2, rtol=1e-8)
    assert np.linalg.norm(v - damped) > 0.1
    u = np.random.default_rng(3).normal(size=(SIZE, 2))
    v, _ = solve(solver, u @ u.T)
    np.testing.assert_allclose(v, np.linalg.solve(u @ u.T + rho * np.eye(SIZE), B), rtol=1e-8)


def test_nystrom_without_any_curvature():
    v, _ = solve(hypergrad.nystrom(rank=3, damping=0.5), np.zeros((SIZE, SIZE)))
    np.testing.assert_allclose(v, B / 0.5, rtol=1e-12)


@pytest.mark.once
def test_nystrom_leaves_out_the_eigenvalues_that_rounding_makes_and_no_others():
    # In float64 an eigenvalue of 1e-8 of the largest one is exact to eight digits, and decides the answer.
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    a, rho = q * np.logspace(-8, 0, SIZE) @ q.T, 1e-9
    v, _ = solve(hypergrad.nystrom(rank=SIZE, damping=rho), a)
    np.testing.assert_allclose(v, np.linalg.solve(a + rho * np.eye(SIZE), B), rtol=1e-5)

    # In float32 the zeros of a matrix of rank 1 are about 1e-8: their inverses would be noise.
    rho, eps = 1e-3, np.finfo(np.float32).eps
    solver = jax.jit(lambda a, b: hypergrad.nystrom(rank=20, damping=rho)(lambda v: a @ v, b, b, key=KEY)[0])
    for _ in range(20):
        u, b = rng.normal(size=20), rng.normal(size=20)
        a = np.outer(u, u).astype(np.float32)
        exact = np.linalg.solve(a.astype(float) + rho * np.eye(20), b)
        error = np.linalg.norm(solver(jnp.asarray(a), jnp.asarray(b, jnp.float32)) - exact) / np.linalg.norm(exact)
        assert error < 0.3 * eps * (u @ u) / rho


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab", "neumann", "lineax_cg"])
@pytest.mark.once
def test_starts_from_the_guess(name):
    a = matrix(30.0)
    exact = np.linalg.solve(a, B)
    few = {
        "cg": lambda: hypergrad.cg(num_steps=1),
        "normal_cg": lambda: hypergrad.cg(num_steps=1, normal=True),
        "bicgstab": lambda: hypergrad.bicgstab(num_steps=1),
        "neumann": lambda: hypergrad.neumann(num_steps=1, rate=1.0),
    }.get(name, SOLVERS[name][0])
    v, num_products = solve(few(), a, guess=exact)
    np.testing.assert_allclose(v, exact, rtol=1e-12)
    if name == "cg":
        assert num_products == 1
    # An outer loss without a slope, after one that had some.
    v, _ = solve(cached_solver(name), a, b=0 * B)
    np.testing.assert_allclose(v, 0 * B, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [
        hypergrad.cg(num_steps=50),
        hypergrad.neumann(num_steps=3, rate=0.5),
        hypergrad.nystrom(rank=3, damping=0.1),
        hypergrad.dense(),
    ],
)
@pytest.mark.once
def test_counts_its_products(solver):
    a, count = jnp.asarray(matrix(30.0)), 0

    def counted(v):
        nonlocal count
        count += 1
        return v

    def matvec(v):
        v = jax.pure_callback(counted, jax.typeof(v), v, vmap_method="sequential")
        return a @ v

    product = jax.custom_jvp(matvec)
    product.defjvp(lambda primals, tangents: (product(*primals), product(*tangents)))
    _, num_products = jax.block_until_ready(solver(product, jnp.asarray(B), jnp.zeros(SIZE), key=KEY))
    assert int(num_products) == count


@pytest.mark.parametrize("name", [*SOLVERS, "nystrom"])
def test_a_system_with_nan_does_not_return_the_guess(name):
    solver = hypergrad.nystrom(rank=3, damping=0.1) if name == "nystrom" else cached_solver(name)
    a, nan = matrix(30.0), np.where(np.arange(SIZE) == 2, np.nan, 0.0)
    for bad, b in ((a, B + nan), (a + np.diag(nan), B)):
        for guess in (0 * B, GUESS):
            assert np.isnan(solve(solver, bad, b, guess)[0]).any()


@pytest.mark.parametrize("name", ["cg", "normal_cg", "bicgstab", "neumann", "nystrom", "dense"])
@pytest.mark.once
def test_float32_stays_float32(name):
    make = SOLVERS.get(name, (lambda: hypergrad.nystrom(rank=3, damping=0.1), True))[0]
    a, b = jnp.asarray(matrix(30.0), jnp.float32), {"v": jnp.asarray(B, jnp.float32)}
    v, _ = make()(lambda v: {"v": a @ v["v"]}, b, b, key=KEY)
    assert v["v"].dtype == jnp.float32 and jnp.isfinite(v["v"]).all()


@pytest.mark.parametrize(
    "solver", [hypergrad.cg(), hypergrad.cg(normal=True), hypergrad.neumann(num_steps=9, rate=0.3)]
)
def test_leaves_of_different_precision(solver):
    b = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(3, jnp.float32)}
    v, _ = jax.jit(lambda b: solver(lambda v: jax.tree.map(lambda x: 2 * x, v), b, b, key=KEY))(b)
    assert jax.tree.map(lambda x: x.dtype, v) == jax.tree.map(lambda x: x.dtype, b)
    np.testing.assert_allclose(v["single"], 0.5, rtol=2e-2)

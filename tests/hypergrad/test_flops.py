"""Counts against programs whose operations are known."""

import jax
import jax.numpy as jnp
import pytest

from metaopt import hypergrad, inner


def test_flops_of_products_scans_and_branches():
    a, b, x = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(5)
    assert hypergrad.flops(jnp.matmul, a, b) == 2 * 2 * 3 * 4
    assert hypergrad.flops(lambda a, b: (a @ b, 3 * a)[0], a, b) == 48  # what no output needs is not counted
    batched = lambda a, b: jnp.einsum("nij,njk->nik", a, b)
    assert hypergrad.flops(batched, jnp.ones((7, 2, 3)), jnp.ones((7, 3, 4))) == 7 * 48
    assert hypergrad.flops(lambda x: jnp.sum(x * x), x) == 5 + 5
    looped = lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, length=10)[0]
    assert hypergrad.flops(looped, jnp.ones((2, 3)), jnp.ones((3, 3))) == 10 * 2 * 2 * 3 * 3
    branch = lambda p, a: jax.lax.cond(p, lambda a: a @ a.T, lambda a: jnp.zeros((2, 2)), a)
    assert 24 <= hypergrad.flops(branch, True, a) < 24 + 10


def test_the_solver_of_a_linear_solve_is_counted():
    a, b = jnp.ones((8, 8)), jnp.ones(8)

    def solver(matvec, b):
        return jax.lax.fori_loop(0, 3, lambda i, x: x - (matvec(x) - b), b)

    solved = lambda a, b: jax.lax.custom_linear_solve(lambda v: a @ v, b, solver, solver)
    looped = lambda a, b: solver(lambda v: a @ v, b)
    # Not the products that the solver was given, nor those of its transpose: a few operations of the loop's counter.
    assert hypergrad.flops(looped, a, b) >= 3 * 128
    assert hypergrad.flops(solved, a, b) == pytest.approx(hypergrad.flops(looped, a, b), rel=0.02)


def test_flops_of_convolutions():
    # [1, 6, 6, 2] * [3, 3, 2, 5] -> [1, 4, 4, 5], each entry 3·3·2 products; and depthwise, where each is 3·3.
    image, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 5))
    convolve = lambda x, k, groups: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    assert hypergrad.flops(lambda x, k: convolve(x, k, 1), image, kernel) == 2 * 80 * 18
    assert hypergrad.flops(lambda x, k: convolve(x, k, 2), image, jnp.ones((3, 3, 1, 4))) == 2 * 64 * 9
    # The way that they are written on CPU takes as many; with kernels per task, as many times the tasks.
    one = jax.grad(lambda k, x: convolve(x, k, 1).sum())
    fast = jax.grad(lambda k, x: inner.im2col(lambda x, k: convolve(x, k, 1))(x, k).sum())
    arguments = [a.astype(jnp.float32) for a in (kernel, image)]
    assert hypergrad.flops(fast, *arguments, products_only=True) == hypergrad.flops(one, *arguments, products_only=True)
    tasks = [jnp.stack([a] * 3) for a in arguments]
    forward = lambda k, x: inner.im2col(lambda x, k: convolve(x, k, 1))(x, k)
    assert hypergrad.flops(jax.vmap(forward), *tasks, products_only=True) == 3 * 2 * 80 * 18


def test_the_operations_of_a_root_are_counted_inside():
    a = jnp.eye(100)
    root = lambda b: jax.lax.custom_root(lambda u: u - b, b, lambda f, u: a @ u, lambda g, y: y)
    assert 20_000 <= hypergrad.flops(root, jnp.ones(100)) < 80_000

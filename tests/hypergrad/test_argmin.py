"""The minimum of a loss, by L-BFGS or a given solver, and its implicit derivative."""

import chex
import jax
import jax.numpy as jnp
import optax
import problems
import pytest
from jax.test_util import check_grads

from metaopt import hypergrad, inner

START = jnp.zeros(problems.NUM_FEATURES)


def ridge_loss(params, hyperparams, data):
    return problems.penalized(params, {"penalty": jnp.exp(hyperparams["log_penalty"])}, data)


def descend(fn, params):
    """Gradient descent, as a user's solver."""
    return jax.lax.fori_loop(0, 300, lambda _, params: params - 0.4 * jax.grad(fn)(params), params)


SOLVERS = {
    "lbfgs": {"tol": 1e-12},
    "given": {"minimize": descend},
    "dense": {"minimize": descend, "solver": hypergrad.dense()},
}


@pytest.mark.parametrize("name", SOLVERS)
def test_equals_the_closed_form_of_ridge_regression(name):
    options = {"solver": hypergrad.cg(num_steps=50, tol=1e-13), **SOLVERS[name]}
    solve = hypergrad.argmin(ridge_loss, **options)
    outer = lambda lam: problems.mean_squares(solve(START, lam, problems.TASK.train), problems.TASK.valid)
    value, gradient = jax.jit(jax.value_and_grad(outer))(problems.LAM)
    expected = jax.value_and_grad(problems.closed_form)(problems.LAM)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-9)
    chex.assert_trees_all_close(jax.jacfwd(outer)(problems.LAM), expected[1], rtol=1e-9)
    hessian = jax.hessian(problems.closed_form)(problems.LAM)
    chex.assert_trees_all_close(jax.jit(jax.hessian(outer))(problems.LAM), hessian, rtol=1e-7)


def test_data_and_closed_over_values_are_differentiated_and_the_start_is_not():
    data = problems.TASK.train

    def trained(y, start):
        loss = lambda params, hyperparams, _: ridge_loss(params, hyperparams, {**data, "y": y})
        return hypergrad.argmin(loss, minimize=descend, solver=hypergrad.dense())(start, problems.LAM).sum()

    check_grads(jax.jit(lambda y: trained(y, START)), (data["y"],), order=1, modes=["rev"], rtol=1e-6)
    assert not jax.grad(trained, argnums=1)(data["y"], START).any()


def test_works_for_many_tasks_and_trees_of_parameters():
    loss = lambda params, hyperparams, data: (
        optax.l2_loss(params["a"] + params["b"][0] - data)
        + sum(hyperparams * (leaf**2).sum() / 2 for leaf in jax.tree.leaves(params))
    )
    solve = hypergrad.argmin(loss, tol=1e-12)
    start = {"a": jnp.zeros([]), "b": jnp.zeros(2)}
    minimum = lambda penalty, data: solve(start, penalty, data)["a"]
    penalties, data = jnp.array([0.5, 2.0]), jnp.array([1.0, -3.0])
    values, slopes = jax.vmap(jax.value_and_grad(minimum))(penalties, data)  # a = b₀ = data / (2 + penalty)
    chex.assert_trees_all_close(values, data / (2 + penalties), rtol=1e-9)
    chex.assert_trees_all_close(slopes, -data / (2 + penalties) ** 2, rtol=1e-6)


def test_the_tolerance_of_the_linear_solve_follows_that_of_the_minimum():
    curvatures, weights = jnp.array([1e-2, 1e6]), jnp.array([0.5, 1e6])
    loss = lambda params, penalty, data: (curvatures * (params - 1) ** 2 / 2 + penalty * params**2 / 2).sum()
    newton = lambda fn, params: params - jnp.linalg.solve(jax.hessian(fn)(params), jax.grad(fn)(params))

    def derivative(**options):
        solve = hypergrad.argmin(loss, minimize=newton, **options)
        return jax.jit(jax.grad(lambda penalty: weights @ solve(jnp.zeros(2), penalty)))(1e-2)

    # θ = c / (c + penalty), so dθ/dpenalty = −c / (c + penalty)²: −25 and −1e-6.
    for options in ({"tol": 1e-9}, {"solver": hypergrad.dense()}):
        chex.assert_trees_all_close(derivative(**options), -13.5, rtol=1e-7)


def test_a_solver_that_stops_early_is_seen_in_the_gradient_that_it_leaves():
    early = hypergrad.argmin(ridge_loss, num_steps=1)(START, problems.LAM, problems.TASK.train)
    late = hypergrad.argmin(ridge_loss)(START, problems.LAM, problems.TASK.train)
    norms = [optax.tree.norm(jax.grad(ridge_loss)(x, problems.LAM, problems.TASK.train)) for x in (early, late)]
    assert norms[0] > 1e-3 and norms[1] < 1e-5


@pytest.mark.once
def test_a_leaf_that_no_hyperparameter_touches_directly():
    x = jnp.linspace(-1.0, 1.0, 20)

    def loss(params, penalty, y):
        return ((x * params["w"] + params["b"] - y) ** 2).mean() + penalty * params["w"] ** 2

    start, y, second_moment = {"w": jnp.zeros([]), "b": jnp.zeros([])}, 3 * x + 1, (x**2).mean()
    of_argmin = hypergrad.argmin(loss, tol=1e-12, solver=hypergrad.cg(num_steps=50, tol=1e-13))
    loop = inner.loop(loss, lambda hp: optax.sgd(0.4), init=lambda key, hp, y: start)
    of_loop = hypergrad.implicit_solve(loop, num_steps=200, solver=hypergrad.cg(num_steps=50, tol=1e-13))
    expected = lambda penalty: 3 * second_moment / (second_moment + penalty)  # the bias is 1
    derivatives = [jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(jax.grad(f))), lambda f: jax.grad(jax.jacfwd(f))]
    for outer in (
        lambda penalty: of_argmin(start, penalty, y)["w"],
        lambda penalty: loop.params(of_loop(jax.random.key(0), penalty, y))["w"],
    ):
        for derivative in derivatives:
            chex.assert_trees_all_close(derivative(outer)(0.1), derivative(expected)(0.1), rtol=1e-8)


def test_a_fixed_point_is_a_minimum_of_half_the_squared_residual():
    step = lambda z, shift: 0.9 * jnp.roll(z, 1) + shift**2  # its Jacobian is not symmetric
    half_square = lambda z, shift, data: ((step(z, shift) - z) ** 2).sum() / 2
    solve = hypergrad.argmin(half_square, tol=1e-12, solver=hypergrad.cg(num_steps=50))
    shift = jnp.linspace(-1.0, 1.0, 5)
    jacobian = jax.jit(jax.jacobian(lambda shift: solve(jnp.zeros(5), shift)))(shift)
    matrix = jnp.eye(5) - 0.9 * jnp.roll(jnp.eye(5), 1, axis=0)
    chex.assert_trees_all_close(jacobian, jnp.linalg.inv(matrix) @ jnp.diag(2 * shift), rtol=1e-6, atol=1e-6)

"""Mixed mode: the same numbers as reverse over reverse, in every way in which it is used."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.test_util import check_grads

from metaopt import hypergrad, inner

KEY = jax.random.key(0)


def layer(x, w):
    return jnp.tanh(x @ w), None


def loss(params, hyperparams, batch, remat=False):
    """Two layers in a scan, a penalty for each, integer indices among the data."""
    step = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    x, _ = jax.lax.scan(step, params["in"][batch["index"]], params["hidden"])
    penalty = (jnp.exp(hyperparams["log_penalty"]) * (params["hidden"] ** 2).sum((1, 2))).sum()
    return ((x.sum(1) - hyperparams["scale"] * batch["y"]) ** 2).mean() + penalty


def inputs():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(5, 3)), "hidden": rng.normal(size=(2, 3, 3))}
    hyperparams = {"log_penalty": np.array([-2.0, -1.0]), "scale": np.array(0.7)}
    batch = {"index": np.array([0, 4, 4, 2]), "y": rng.normal(size=4)}
    return jax.tree.map(jnp.asarray, (params, hyperparams, batch))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.once
def test_value_and_pullback_are_those_of_reverse_over_reverse(remat):
    params, hyperparams, batch = inputs()
    g = functools.partial(loss, remat=remat)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    def pulled_back(grad):
        def gradient(params, hyperparams, y):
            return grad(g)(params, hyperparams, {**batch, "y": y})

        value, pullback = jax.vjp(gradient, params, hyperparams, batch["y"])
        return value, pullback(v)

    chex.assert_trees_all_close(
        jax.jit(pulled_back, static_argnums=0)(hypergrad.mixed_grad),
        jax.jit(pulled_back, static_argnums=0)(jax.grad),
        rtol=1e-12,
    )


@pytest.mark.once
def test_auxiliary_outputs_pass_their_cotangent_on():
    # a = (a float that depends on everything, a count): the state of a model.
    def with_aux(params, hyperparams, batch):
        value = loss(params, hyperparams, batch)
        return value, {"mean": hyperparams["scale"] * params["in"].mean() ** 2, "count": batch["index"].sum()}

    params, hyperparams, batch = inputs()

    def objective(params, hyperparams, grad):
        grads, aux = grad(with_aux, has_aux=True)(params, hyperparams, batch)
        return sum((leaf**3).sum() for leaf in jax.tree.leaves(grads)) + jnp.sin(aux["mean"]) + aux["count"]

    outputs, expected = (
        jax.grad(functools.partial(objective, grad=grad), argnums=(0, 1))(params, hyperparams)
        for grad in (hypergrad.mixed_grad, jax.grad)
    )
    chex.assert_trees_all_close(outputs, expected, rtol=1e-12)


@pytest.mark.slow
def test_everything_through_training():
    # Dropout, minibatches, running statistics, Adam; λ enters everywhere; stretches within which gradients are kept.
    def estimate(grad):
        estimator = hypergrad.unrolled(problems.EVERYTHING, num_steps=5, remat="sqrt", grad=grad)
        return jax.jit(estimator.estimate)(problems.EVERYTHING_LAM, problems.TASK, KEY)[0]

    mixed, reverse = estimate(hypergrad.mixed_grad), estimate(jax.grad)
    chex.assert_trees_all_close(mixed.value, reverse.value, rtol=1e-13)
    chex.assert_trees_all_close(mixed.hypergrad, reverse.hypergrad, rtol=1e-9, atol=1e-12)


@pytest.mark.once
def test_finite_differences_and_a_second_derivative():
    # Reverse over reverse over mixed: the outer loss's own curvature in λ.
    solve = hypergrad.unroll(problems.RIDGE_LOOP, num_steps=3, grad=hypergrad.mixed_grad)

    def outer(log_penalty):
        params = solve(KEY, {"log_penalty": log_penalty}, problems.TASK.train).params
        return problems.mean_squares(params, problems.TASK.valid)

    check_grads(jax.jit(outer), (problems.LAM["log_penalty"],), order=2, modes=["rev"], rtol=1e-5)


@pytest.mark.once
def test_tasks_under_vmap():
    tasks = problems.stack([problems.regression_task(seed) for seed in range(3)])
    solve = hypergrad.unroll(problems.RIDGE_LOOP, num_steps=3, remat="step", grad=hypergrad.mixed_grad)

    def hypergradient(task):
        return jax.grad(lambda hp: problems.mean_squares(solve(KEY, hp, task.train).params, task.valid))(problems.LAM)

    alone = problems.stack([hypergradient(jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(3)])
    chex.assert_trees_all_close(jax.vmap(hypergradient)(tasks), alone, rtol=1e-12)


@pytest.mark.once
def test_closed_over_values_of_a_loss_are_differentiated():
    def outer(scale, grad):
        loop = inner.loop(
            lambda params, hyperparams, batch: ((params - scale * batch) ** 2).sum(),
            lambda hyperparams: optax.sgd(hyperparams),
            init=lambda key, hyperparams, data: jnp.zeros(2),
        )
        solve = hypergrad.unroll(loop, num_steps=3, grad=grad)
        return solve(KEY, jnp.array(0.1), jnp.array([1.0, 2.0])).params.sum()

    # θ_T = scale · batch · (1 − (1 − 2 rate)^T)
    np.testing.assert_allclose(jax.grad(outer)(2.0, hypergrad.mixed_grad), 3.0 * (1 - 0.8**3), rtol=1e-12)


@pytest.mark.once
def test_no_activation_is_kept_across_steps():
    # The residuals of reverse over reverse hold activations of every step; those of mixed mode do not: a batch ten
    # times as large adds nothing per step.
    def memory(grad, rows):
        loop = inner.loop(
            lambda params, hyperparams, batch: (jnp.tanh(jnp.tanh(batch @ params) @ params) ** 2).mean(),
            lambda hyperparams: optax.sgd(hyperparams),
            init=lambda key, hyperparams, data: jnp.eye(8),
        )
        solve = hypergrad.unroll(loop, num_steps=50, grad=grad)
        outer = lambda rate, data: solve(KEY, rate, data).params.sum()
        compiled = jax.jit(jax.grad(outer)).lower(0.1, jnp.ones((rows, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grown = {grad: memory(grad, 1000) - memory(grad, 100) for grad in (hypergrad.mixed_grad, jax.grad)}
    assert grown[hypergrad.mixed_grad] < 0.2 * grown[jax.grad]


def test_a_custom_vjp_in_the_loss():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct,))
    loop = inner.loop(
        lambda params, hyperparams, batch: square(params).sum(),
        lambda hyperparams: optax.sgd(hyperparams),
        init=lambda key, hyperparams, data: jnp.ones(2),
    )
    problem = inner.problem(loop, lambda params, hyperparams, batch: params.sum())
    estimate, _ = hypergrad.unrolled(problem, num_steps=2).estimate(jnp.array(0.1), problems.TASK, KEY)
    np.testing.assert_allclose(estimate.hypergrad, 2 * 2 * 0.8 * -2, rtol=1e-12)  # d/dr 2 (1 − 2r)²


def closing_over(labels, scale, key):
    """A hypergradient by the rate, through a loss that holds an index, a key and a float of its surroundings."""

    def loss(params, hyperparams, batch):
        noise = jax.random.normal(key, params.shape)
        return ((params * scale + noise - batch[labels]) ** 2).sum()

    def solve(grad):
        loop = inner.loop(loss, lambda hp: optax.sgd(hp), init=lambda key, hp, data: jnp.zeros(2))
        train = hypergrad.unroll(loop, num_steps=3, remat="step", grad=grad)
        return jax.grad(lambda rate: (train(KEY, rate, jnp.array([1.0, 2.0, 4.0])).params ** 2).sum())(0.1)

    return solve


@pytest.mark.parametrize("transform", ["jit", "vmap of grad", "grad of vmap", "scan"])
@pytest.mark.once
def test_traced_indices_keys_and_floats_that_a_loss_closes_over(transform):
    labels, scales = jnp.array([[0, 1], [2, 0]]), jnp.array([0.5, 2.0])
    keys = jax.random.split(jax.random.key(1), 2)

    def result(grad):
        one = lambda labels, scale, key: closing_over(labels, scale, key)(grad)
        if transform == "jit":
            return jax.jit(one)(labels[0], scales[0], keys[0])
        if transform == "vmap of grad":
            return jax.vmap(jax.grad(one, argnums=1))(labels, scales, keys)
        if transform == "grad of vmap":
            return jax.grad(lambda s: jax.vmap(one)(labels, s, keys).sum())(scales)
        loop = lambda s: jax.lax.scan(lambda c, x: (c + one(x[0], s, x[1]), None), 0.0, (labels, keys))[0]
        return jax.grad(loop)(0.7)

    np.testing.assert_allclose(result(hypergrad.mixed_grad), result(jax.grad), rtol=1e-10)


@pytest.mark.parametrize("remat", ["none", "step", "grads"])
@pytest.mark.once
def test_an_outer_loop_does_not_keep_the_gradients_of_an_inner_one(remat):
    size = 200

    def memory(num_outer, grad):
        inner_loop = inner.loop(
            lambda params, hp, batch: ((params - hp) ** 2).sum(),
            lambda hp: optax.sgd(0.1),
            init=lambda key, hp, data: jnp.zeros(size),
        )
        solve = hypergrad.unroll(inner_loop, num_steps=20, remat=remat, grad=grad)
        outer_loop = inner.loop(
            lambda params, hp, batch: (solve(KEY, params, batch).params ** 3).sum() * hp,
            lambda hp: optax.sgd(0.01),
            init=lambda key, hp, data: jnp.ones(size),
        )
        train = hypergrad.unroll(outer_loop, num_steps=num_outer, remat="step")
        program = jax.jit(jax.grad(lambda hp: train(KEY, hp, 0.0).params.sum())).lower(1.0).compile()
        return program.memory_analysis().temp_size_in_bytes

    # A step of the outer loop stores its own state and gradient, not the 20 gradients within it.
    assert (memory(80, hypergrad.mixed_grad) - memory(20, hypergrad.mixed_grad)) / 60 < 5 * size * 8


@pytest.mark.once
def test_all_gradients_and_few_states():
    # Adam's state is three times the parameters; the loss has matrix products, the update has none. 19 = 3 · 5 + 4.
    size, num_steps = 20, 19
    loop = inner.loop(
        lambda params, hp, batch: (jnp.tanh(jnp.tanh(batch @ params) @ params) ** 2).mean(),
        lambda hp: optax.adam(hp),
        init=lambda key, hp, data: jnp.eye(size),
    )
    data = jnp.cos(jnp.arange(100.0 * size)).reshape(100, size)

    def outer(hp, remat):
        solve = hypergrad.unroll(loop, num_steps=num_steps, remat=remat, grad=hypergrad.mixed_grad)
        return (solve(KEY, hp, data).params ** 2).sum()

    by_remat = {}
    for remat in ("step", "grads", "sqrt"):
        residuals = jax.eval_shape(lambda hp, remat=remat: jax.vjp(functools.partial(outer, remat=remat), hp)[1], 0.1)
        stored = sum(leaf.size for leaf in jax.tree.leaves(residuals)) / size**2  # in copies of the parameters
        slope = jax.grad(functools.partial(outer, remat=remat))
        by_remat[remat] = jax.jit(slope)(0.1), stored, hypergrad.flops(slope, 0.1)
    (step, step_stored, step_flops), (grads, grads_stored, grads_flops), (sqrt, sqrt_stored, sqrt_flops) = (
        by_remat.values()
    )
    assert abs(step) > 1e-3
    np.testing.assert_allclose([grads, sqrt], step, rtol=1e-11)
    assert step_stored >= 4 * num_steps and num_steps + 9 <= grads_stored <= num_steps + 20 and sqrt_stored <= 20, (
        by_remat
    )
    assert step_flops < grads_flops < step_flops + 0.2 * (sqrt_flops - step_flops), by_remat

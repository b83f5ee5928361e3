"""Training as a function that is differentiated at rest: orders, modes, levels, and rejected leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(0)
TIGHT = hypergrad.cg(num_steps=30, tol=1e-13)
SOLVE = hypergrad.implicit_solve(problems.RIDGE_LOOP, num_steps=300, solver=TIGHT)


def outer(lam, solve=SOLVE, task=problems.TASK):
    return problems.mean_squares(problems.RIDGE_LOOP.params(solve(KEY, lam, task.train)), task.valid)


def test_values_are_those_of_training():
    state = SOLVE(KEY, problems.LAM, problems.TASK.train)
    np.testing.assert_allclose(state.params, problems.solution(problems.LAM), rtol=1e-12)
    assert state.step == 300


@pytest.mark.parametrize(
    ("solver", "condition"),
    [
        (TIGHT, "gradient"),
        (hypergrad.cg(num_steps=30, tol=1e-14, normal=True), "step"),  # with momentum, so that A is not symmetric
        (hypergrad.neumann(num_steps=200, rate=1.0), "step"),
    ],
)
@pytest.mark.once
def test_first_and_second_derivatives_in_both_modes(solver, condition):
    # Not quadratic: a first-order rule, which holds θ* constant in its own Hessian, has a wrong second derivative.
    loop, batch = problems.LOGISTIC.loop, problems.LOGISTIC_TASK.valid
    solve = hypergrad.implicit_solve(loop, num_steps=300, solver=solver, condition=condition)

    @jax.jit
    def derivatives(lam):
        def function(lam):
            state = solve(KEY, lam, problems.LOGISTIC_TASK.train)
            return problems.LOGISTIC.outer_loss(loop.params(state), lam, batch, loop.context(state))

        return jax.grad(function)(lam), jax.jacfwd(function)(lam), jax.jacfwd(jax.grad(function))(lam)

    reverse, forward, hessian = (out["log_penalty"] for out in derivatives(problems.LAM))
    answer = lambda shift: problems.logistic_answer({"log_penalty": problems.LAM["log_penalty"] + shift})[-1]
    np.testing.assert_allclose(reverse, answer(0.0), rtol=1e-8)
    np.testing.assert_allclose(forward, answer(0.0), rtol=1e-8)
    differences = [(answer(h) - answer(-h)) / 2e-4 for h in 1e-4 * np.eye(problems.NUM_FEATURES)]
    np.testing.assert_allclose(hessian["log_penalty"], differences, rtol=1e-5, atol=1e-8)


@pytest.mark.once
def test_reverse_over_reverse_equals_forward_over_reverse():
    direction = {"log_penalty": jnp.array([1.0, -1.0, 0.5, 2.0])}
    expected = jax.jvp(jax.grad(problems.closed_form), (problems.LAM,), (direction,))[1]
    product = jax.jit(jax.grad(lambda lam: optax.tree.vdot(jax.grad(outer)(lam), direction)))(problems.LAM)
    chex.assert_trees_all_close(product, expected, rtol=1e-9)


@pytest.mark.once
def test_equals_the_estimator():
    estimator = hypergrad.implicit(problems.RIDGE, num_steps=300, solver=TIGHT)
    estimate, _ = estimator.estimate(problems.LAM, problems.TASK, estimator.init(KEY, problems.LAM, problems.TASK))
    value, grads = jax.value_and_grad(outer)(problems.LAM)
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (value, grads), rtol=1e-9)


@pytest.mark.once
def test_batched_equals_a_loop():
    tasks = [problems.regression_task(seed) for seed in range(3)]
    few = hypergrad.implicit_solve(problems.RIDGE_LOOP, num_steps=5, solver=hypergrad.cg(num_steps=2))
    gradient = jax.jit(jax.grad(lambda lam, task: outer(lam, few, task)))
    batched = jax.vmap(gradient, in_axes=(None, 0))(problems.LAM, problems.stack(tasks))
    chex.assert_trees_all_close(batched, problems.stack([gradient(problems.LAM, task) for task in tasks]), rtol=1e-10)


def test_closed_over_values_and_data_are_differentiated():
    def solution(scale, y):
        loop = inner.loop(
            lambda params, hp, batch: scale * problems.mean_squares(params, batch) + (params**2).sum() / 2,
            lambda hp: optax.sgd(0.3),
            init=problems.zeros,
        )
        solve = hypergrad.implicit_solve(loop, num_steps=200, solver=TIGHT)
        return loop.params(solve(KEY, None, {**problems.TASK.train, "y": y})).sum()

    x, y = (np.asarray(problems.TASK.train[name]) for name in ("x", "y"))
    scale_slope, y_slope = jax.jit(jax.grad(solution, argnums=(0, 1)))(2.0, problems.TASK.train["y"])
    # θ = (2 XᵀX/N + I)⁻¹ 2 Xᵀy/N
    inverse = np.linalg.inv(2 * x.T @ x / len(y) + np.eye(4))
    theta = inverse @ (2 * x.T @ y / len(y))
    np.testing.assert_allclose(y_slope, (inverse @ (2 * x.T / len(y))).sum(0), rtol=1e-9)
    np.testing.assert_allclose(scale_slope, (inverse @ (x.T @ (y - x @ theta) / len(y))).sum(), rtol=1e-9)


# Three levels, all quadratic in their own unknown:
#   θ(φ, ρ)    minimizes θᵀAθ/2 + exp(ρ) |θ|²/2 − θᵀCφ       θ = M φ,  M = (A + e^ρ I)⁻¹ C
#   φ(λ, ρ)    minimizes |θ(φ, ρ) − t|²/2 + Σ exp(λ) φ²/2    φ = S⁻¹ Mᵀ t,  S = MᵀM + diag e^λ
#   F(λ, ρ)  = |φ|²/2 + Σ θ(φ, ρ)

RNG = np.random.default_rng(4)
A, C = np.diag([1.0, 2.0, 1.5]) + 0.3, RNG.normal(size=(3, 2)) + 1.0
T = RNG.normal(size=3)
LEVELS = {"lam": jnp.array([-0.5, 0.2]), "rho": jnp.array(-1.0)}


def three_levels_in_numpy():
    lam, rho = np.asarray(LEVELS["lam"]), float(LEVELS["rho"])
    lowest = np.linalg.inv(A + np.exp(rho) * np.eye(3))
    m = lowest @ C
    s = m.T @ m + np.diag(np.exp(lam))
    phi = np.linalg.solve(s, m.T @ T)
    by_phi = phi + m.sum(0)  # dF/dφ
    lam_slope = [by_phi @ np.linalg.solve(s, -np.exp(lam[i]) * phi[i] * np.eye(2)[i]) for i in range(2)]
    dm = -np.exp(rho) * lowest @ m
    dphi = np.linalg.solve(s, dm.T @ T - (dm.T @ m + m.T @ dm) @ phi)
    value = phi @ phi / 2 + (m @ phi).sum()
    return value, {"lam": np.array(lam_slope), "rho": by_phi @ dphi + (dm @ phi).sum()}


def implicit_level(loop):
    return hypergrad.implicit_solve(loop, num_steps=60, solver=hypergrad.cg(num_steps=6, tol=1e-14))


def unrolled_level(loop):
    return hypergrad.unroll(loop, num_steps=60)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(implicit_level, implicit_level), (implicit_level, unrolled_level), (unrolled_level, implicit_level)],
)
@pytest.mark.once
def test_three_levels(lower, upper):
    def lowest_loss(theta, hp, batch):
        return theta @ A @ theta / 2 + jnp.exp(hp["rho"]) * theta @ theta / 2 - theta @ (C @ hp["phi"])

    lowest = inner.loop(lowest_loss, lambda hp: optax.sgd(0.4), init=lambda key, hp, data: jnp.zeros(3))

    def theta(phi, rho):
        return lowest.params(lower(lowest)(KEY, {"phi": phi, "rho": rho}, None))

    def middle_loss(phi, hp, batch):
        return ((theta(phi, hp["rho"]) - T) ** 2).sum() / 2 + (jnp.exp(hp["lam"]) * phi**2).sum() / 2

    middle = inner.loop(middle_loss, lambda hp: optax.sgd(0.5), init=lambda key, hp, data: jnp.zeros(2))

    def top(hp):
        phi = middle.params(upper(middle)(KEY, hp, None))
        return (phi**2).sum() / 2 + theta(phi, hp["rho"]).sum()

    value, expected = three_levels_in_numpy()
    out = jax.jit(jax.value_and_grad(top))(LEVELS)
    chex.assert_trees_all_close(out, (jnp.asarray(value), expected), rtol=1e-7)


# Leaves that it rejects, if their derivative is taken.


def loop_with_everything():
    return inner.loop(
        problems.penalized,
        lambda hp: optax.sgd(hp["rate"]),
        init=lambda key, hp, data: hp["start"] * jnp.ones(problems.NUM_FEATURES),
    )


@pytest.mark.once
def test_refuses_the_derivative_of_a_rate_and_of_an_initialization():
    loop = loop_with_everything()
    solve = hypergrad.implicit_solve(loop, num_steps=5)
    lam = {"penalty": jnp.full(4, 0.3), "rate": jnp.array(0.3), "start": jnp.array(0.1), "other": jnp.array(1.0)}

    def objective(lam):
        return lam["other"] * loop.params(solve(KEY, lam, problems.TASK.train)).sum()

    for name in ("rate", "start"):
        for wrap in (lambda f: f, jax.jit):
            with pytest.raises(ValueError, match=rf"leaves \['{name}'\] of λ: neither the gradient.*unrolled"):
                jax.grad(wrap(lambda x, name=name: objective({**lam, name: x})))(lam[name])
    with pytest.raises(ValueError, match="cannot estimate the hypergradient"):
        jax.jacfwd(objective)(lam)
    fixed = {name: lam[name] for name in ("rate", "start")}
    grads = jax.jit(jax.grad(lambda tuned: objective({**tuned, **fixed})))({k: lam[k] for k in ("penalty", "other")})
    assert optax.tree.norm(grads["penalty"]) > 0 and grads["other"] != 0
    # The step depends on the rate, and not on the start.
    step = hypergrad.implicit_solve(loop, num_steps=300, condition="step", solver=hypergrad.gmres())
    with pytest.raises(ValueError, match=r"leaves \['start'\] of λ: neither a training step"):
        jax.grad(lambda x: loop.params(step(KEY, {**lam, "start": x}, problems.TASK.train)).sum())(0.1)


def test_training_stores_nothing():
    def memory(num_steps):
        solve = hypergrad.implicit_solve(problems.RIDGE_LOOP, num_steps=num_steps)
        compiled = jax.jit(jax.grad(lambda lam: outer(lam, solve))).lower(problems.LAM).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(10) == memory(2000)


@pytest.mark.once
def test_sampled_batches_are_drawn_from_the_key():
    def half(key, data):
        rows = jax.random.permutation(key, 20)[:10]
        return jax.tree.map(lambda leaf: leaf[rows], data)

    gradients = {}
    for name, batch in {"next": "next", "full": "full", "half": half}.items():
        solve = hypergrad.implicit_solve(problems.RIDGE_LOOP, num_steps=50, solver=hypergrad.dense(), batch=batch)
        gradients[name] = np.asarray(jax.jit(jax.grad(lambda lam, s=solve: outer(lam, s)))(problems.LAM)["log_penalty"])
    np.testing.assert_allclose(gradients["next"], gradients["full"], rtol=1e-12)  # the loop sees all rows
    assert np.linalg.norm(gradients["half"] - gradients["full"]) > 1e-5

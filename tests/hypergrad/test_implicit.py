"""Implicit hypergradients: rules, biases, warm starts, and the leaves that they reject."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import _checks, base, hypergrad, inner, spaces

KEY = jax.random.key(0)
LAM = {
    "penalty": jnp.full(problems.NUM_FEATURES, 0.3),
    "outer": jnp.array(1.0),
    "rate": jnp.array(0.3),
    "start": jnp.array(0.1),
}


def problem(loss=problems.penalized):
    loop = inner.loop(
        loss,
        lambda hyperparams: optax.sgd(hyperparams["rate"]),
        init=lambda key, hyperparams, data: hyperparams["start"] * jnp.ones(problems.NUM_FEATURES),
    )
    return inner.problem(
        loop, lambda params, hyperparams, batch: hyperparams["outer"] * problems.mean_squares(params, batch)
    )


def implicit(problem):
    return hypergrad.warm_implicit(problem, num_steps=3, adjoint_rate=0.3)


def estimated(estimator, hyperparams, task, calls=1):
    """The last of some estimates; in numpy."""
    state = estimator.init(KEY, hyperparams, task)
    estimate = jax.jit(estimator.estimate)
    for _ in range(calls):
        out, state = estimate(hyperparams, task, state)
    return jax.tree.map(np.asarray, out)


def logistic_outputs(params, hyperparams, batch, context):
    return {"logits": batch["x"] @ params, "params": params}


def logistic_loss(outputs, hyperparams, batch, context):
    penalty = (jnp.exp(hyperparams["log_penalty"]) * outputs["params"] ** 2).sum() / 2
    return jnp.logaddexp(0.0, -batch["y"] * outputs["logits"]).mean() + penalty


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.once
def test_the_initialization_sees_the_training_rows(warm_start):
    """θ_0 = mean(x) of the training rows; a step of rate 0 stays there."""
    loop = inner.loop(
        problems.penalized, lambda hyperparams: optax.sgd(0.0), init=lambda key, hp, data: data["x"].mean(0)
    )
    start = inner.problem(loop, lambda params, hyperparams, batch: problems.mean_squares(params, batch))
    estimator = hypergrad.implicit(start, num_steps=1, solver=hypergrad.dense(), warm_start=warm_start)
    out = estimated(estimator, {"penalty": jnp.full(problems.NUM_FEATURES, 0.3)}, problems.TASK)
    theta = problems.TASK.train["x"].mean(0)
    np.testing.assert_allclose(out.value, problems.mean_squares(theta, problems.TASK.valid), rtol=1e-12)


RULES = {
    "cg": {"solver": hypergrad.cg(tol=1e-12)},
    "normal_cg": {"solver": hypergrad.cg(tol=1e-13, normal=True)},
    "gmres": {"solver": hypergrad.gmres()},
    "bicgstab": {"solver": hypergrad.bicgstab(tol=1e-12)},
    "neumann": {"solver": hypergrad.neumann(num_steps=400, rate=1.0)},
    "nystrom": {"solver": hypergrad.nystrom(rank=4, damping=0.3)},
    "dense": {"solver": hypergrad.dense()},
    "step": {"condition": "step", "solver": hypergrad.neumann(num_steps=400, rate=1.0)},
    "step_gmres": {"condition": "step", "solver": hypergrad.gmres()},
    "gauss_newton": {"solver": hypergrad.dense(), "gauss_newton": (logistic_outputs, logistic_loss)},
    "no_warm_start": {"solver": hypergrad.cg(tol=1e-12), "warm_start": False},
    "own": {
        "solver": lambda matvec, b, initial, *, key: (
            jnp.linalg.solve(jax.vmap(matvec)(jnp.eye(problems.NUM_FEATURES)), b),
            problems.NUM_FEATURES,
        )
    },
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.once
def test_logistic_regression(name):
    _, hessian, f_theta, mixed, expected = problems.logistic_answer(problems.LAM)
    assert np.linalg.norm(expected) > 0.01
    if name == "nystrom":
        expected = expected + damping_bias(0.3, hessian, f_theta, mixed)
    estimator = hypergrad.implicit(problems.LOGISTIC, num_steps=300, **RULES[name])
    estimate = estimated(estimator, problems.LAM, problems.LOGISTIC_TASK)
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], expected, rtol=1e-9, atol=1e-12)
    at_rest = estimate.metrics["inner_step_norm" if "step" in name.split("_")[:1] else "inner_grad_norm"]
    assert at_rest < 1e-13 and (name == "nystrom" or estimate.metrics["adjoint_residual"] < 1e-10)


def damping_bias(damping, hessian, f_theta, mixed):
    return damping * mixed * np.linalg.solve(hessian + damping * np.eye(4), np.linalg.solve(hessian, f_theta))


def test_damping_has_the_stated_bias():
    _, hessian, f_theta, mixed, exact = problems.logistic_answer(problems.LAM)
    damping = 0.3
    estimator = hypergrad.implicit(problems.LOGISTIC, num_steps=300, damping=damping, solver=hypergrad.dense())
    estimate = estimated(estimator, problems.LAM, problems.LOGISTIC_TASK)
    bias = damping_bias(damping, hessian, f_theta, mixed)
    assert np.linalg.norm(bias) > 1e-3
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"] - exact, bias, rtol=1e-9)
    assert estimate.metrics["adjoint_residual"] < 1e-14  # the residual of the damped system


def test_an_adjoint_that_is_not_solved_for_has_the_stated_bias():
    _, hessian, f_theta, mixed, exact = problems.logistic_answer(problems.LAM)
    num_steps, rate = 3, 0.8
    solver = hypergrad.neumann(num_steps=num_steps, rate=rate)
    estimator = hypergrad.implicit(problems.LOGISTIC, num_steps=300, solver=solver, warm_start=False)
    estimate = estimated(estimator, problems.LAM, problems.LOGISTIC_TASK)
    v = rate * sum(np.linalg.matrix_power(np.eye(4) - rate * hessian, k) for k in range(num_steps)) @ f_theta
    residual = hessian @ v - f_theta
    np.testing.assert_allclose(estimate.metrics["adjoint_residual"], np.linalg.norm(residual), rtol=1e-9)
    bias = -mixed * np.linalg.solve(hessian, residual)
    assert np.linalg.norm(bias) > 1e-3
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"] - exact, bias, rtol=1e-8)


@pytest.mark.once
def test_a_sampled_hessian_has_the_bias_of_the_mean_of_inverses():
    # Every pair of rows of a small task: θ at rest on all rows, the system on two of them.
    task = problems.logistic_task()
    task = task._replace(train=jax.tree.map(lambda leaf: leaf[:6], task.train))
    theta, hessian, f_theta, mixed, exact = problems.logistic_answer(problems.LAM, task)
    x, y = np.asarray(task.train["x"]), np.asarray(task.train["y"])
    odds = 1 / (1 + np.exp(y * (x @ theta)))
    pairs = np.array(list(itertools.combinations(range(6), 2)))
    penalty = np.diag(np.exp(np.asarray(problems.LAM["log_penalty"])))
    hessians = [x[i].T @ ((odds * (1 - odds))[i][:, None] * x[i]) / 2 + penalty for i in pairs]
    np.testing.assert_allclose(np.mean(hessians, 0), hessian, rtol=1e-12)
    each = np.array([0.2 * problems.LAM["log_penalty"] - mixed * np.linalg.solve(h, f_theta) for h in hessians])

    def pair(key, data):
        rows = jnp.asarray(pairs)[jax.random.randint(key, (), 0, len(pairs))]
        return jax.tree.map(lambda leaf: leaf[rows], data)

    estimator = hypergrad.implicit(
        problems.LOGISTIC, num_steps=300, solver=hypergrad.dense(), batch=pair, warm_start=False
    )

    @jax.jit
    def draw(keys):
        states = jax.vmap(lambda key: estimator.init(key, problems.LAM, task))(keys)
        return jax.vmap(lambda state: estimator.estimate(problems.LAM, task, state)[0].hypergrad)(states)

    samples = np.asarray(draw(jax.random.split(KEY, 200))["log_penalty"])
    # Each is one of the fifteen, and they come out equally often.
    nearest = np.abs(samples[:, None] - each[None]).max(-1)
    assert nearest.min(1).max() < 1e-9 and len(set(nearest.argmin(1))) == len(pairs)
    error = samples.mean(0) - each.mean(0)
    assert (np.abs(error) < 3 * each.std(0) / np.sqrt(len(samples))).all()
    # To second order the bias is as stated: of its sign and size.
    delta = [h - hessian for h in hessians]
    v = np.linalg.solve(hessian, f_theta)
    second = -mixed * np.linalg.solve(hessian, np.mean([d @ np.linalg.solve(hessian, d) for d in delta], 0) @ v)
    bias = each.mean(0) - exact
    assert np.linalg.norm(bias) > 1e-4 and np.linalg.norm(bias - second) < 0.5 * np.linalg.norm(bias)


@pytest.mark.once
def test_batches():
    lam, task = problems.LAM, problems.TASK
    loop = inner.loop(
        lambda params, hp, batch: problems.penalized(params, {"penalty": jnp.exp(hp["log_penalty"])}, batch),
        lambda hp: optax.sgd(0.3),
        init=problems.zeros,
        sampler=inner.minibatch(5),
    )
    sampled = inner.problem(loop, problems.RIDGE.outer_loss, with_context=True)
    outs = {
        name: estimated(hypergrad.implicit(sampled, num_steps=4, batch=name), lam, task) for name in ("next", "full")
    }
    # By hand, at the θ that four steps lead to, on the fifth batch and on all rows.
    state = jax.jit(inner.run(loop, num_steps=4))(jax.random.split(KEY)[0], lam, task.train)
    penalty, theta = np.exp(lam["log_penalty"]), np.asarray(state.params)
    slope = np.asarray(jax.grad(problems.mean_squares)(state.params, task.valid))
    for name, rows in [("next", loop.batch(state, task.train)), ("full", task.train)]:
        x = np.asarray(rows["x"])
        hessian = x.T @ x / len(x) + np.diag(penalty)
        expected = -penalty * theta * np.linalg.solve(hessian, slope)
        np.testing.assert_allclose(outs[name].hypergrad["log_penalty"], expected, rtol=1e-5)
        residual = hessian @ theta - x.T @ np.asarray(rows["y"]) / len(x)
        np.testing.assert_allclose(outs[name].metrics["inner_grad_norm"], np.linalg.norm(residual), rtol=1e-9)


def test_the_hessian_is_linearized_once():
    estimator = hypergrad.implicit(problems.LOGISTIC, num_steps=2)
    state = estimator.init(KEY, problems.LAM, problems.LOGISTIC_TASK)
    jaxpr = jax.make_jaxpr(estimator.estimate)(problems.LAM, problems.LOGISTIC_TASK, state).jaxpr
    (solve,) = [e.params["body_jaxpr"] for e in jaxpr.eqns if e.primitive.name == "while"]
    whole, products = (re.findall(r" = (\w+)", str(part)) for part in (jaxpr, solve))
    assert "exp" in whole and "exp" not in products
    assert products.count("dot_general") == 2  # X and Xᵀ


@pytest.mark.once
def test_gauss_newton():
    # A small network, not convex: the product against Jᵀ J of `jax.jacobian`, and the penalty's own curvature.
    def outputs(params, hyperparams, batch, context):
        return {"y": jnp.tanh(batch["x"] @ params["w"]) @ params["v"], "params": params}

    def loss(outputs, hyperparams, batch, context):
        penalty = hyperparams["penalty"] * optax.tree.norm(outputs["params"], squared=True) / 2
        return ((outputs["y"] - batch["y"]) ** 2).mean() / 2 + penalty

    def start(key, hyperparams, data):
        return {"w": jax.random.normal(key, (4, 3)), "v": jnp.ones(3)}

    loop = inner.loop(
        lambda params, hp, batch, context: (loss(outputs(params, hp, batch, context), hp, batch, context), None),
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: (start(key, hp, data), None),
        with_context=True,
    )
    net = inner.problem(
        loop, lambda params, hp, batch: loss(outputs(params, hp, batch, None), {"penalty": 0.0}, batch, None)
    )
    lam = {"penalty": jnp.array(0.02)}
    probe = {"w": jnp.cos(jnp.arange(12.0)).reshape(4, 3), "v": jnp.array([1.0, -2.0, 0.5])}
    estimator = hypergrad.implicit(
        net,
        num_steps=2,
        solver=lambda matvec, b, initial, *, key: (matvec(probe), 1),  # shows a product, in the adjoint
        gauss_newton=(outputs, loss),
    )
    state = estimator.init(KEY, lam, problems.TASK)
    _, after = jax.jit(estimator.estimate)(lam, problems.TASK, state)
    flat, unravel = jax.flatten_util.ravel_pytree(after.inner.params)

    @jax.jit
    def derivatives(flat):
        jacobian = jax.jacobian(lambda flat: outputs(unravel(flat), lam, problems.TASK.train, None)["y"])(flat)
        return jacobian, jax.hessian(lambda flat: loop.loss(unravel(flat), lam, problems.TASK.train, None)[0])(flat)

    jacobian, hessian = map(np.asarray, derivatives(flat))
    vector = jax.flatten_util.ravel_pytree(probe)[0]
    expected = jacobian.T @ (jacobian @ vector) / len(jacobian) + 0.02 * vector
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(after.adjoint)[0], expected, rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(hessian)[0] < 0  # where the exact one is not convex


@pytest.mark.once
def test_a_decoupled_decay_at_the_fixed_point_of_the_step():
    # θ ← θ − rate (m + p θ), m ← (∇ mean squares + m)/2, rests where ridge does though the penalty is in no loss, with
    # a momentum that is not zero.
    loop = inner.loop(
        lambda params, hp, batch: problems.mean_squares(params, batch),
        lambda hp: optax.chain(
            optax.ema(0.5, debias=False),
            add_decay(jnp.exp(hp["log_penalty"])),
            optax.scale_by_learning_rate(hp["rate"]),
        ),
        init=problems.zeros,
    )
    decoupled = inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch))
    lam = {**problems.LAM, "rate": jnp.array(0.3)}
    estimate = estimated(hypergrad.implicit(decoupled, num_steps=300, condition="step"), lam, problems.TASK, calls=8)
    expected = jax.grad(problems.closed_form)(problems.LAM)["log_penalty"]
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], expected, rtol=1e-8)
    np.testing.assert_allclose(estimate.hypergrad["rate"], 0.0, atol=1e-12)  # true, at a fixed point
    assert estimate.metrics["inner_step_norm"] < 1e-13
    with pytest.raises(ValueError, match=r"leaves \['log_penalty'\], \['rate'\] of λ.*`condition=\"step\"`"):
        hypergrad.implicit(decoupled, num_steps=1).init(KEY, lam, problems.TASK)


def add_decay(penalty):
    def update(updates, state, params):
        return updates + penalty * params, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_imaml():
    # Adaptation by min mean squares + ρ|θ − λ|²/2 has dF/dλ = (I + H/ρ)⁻¹ ∂f/∂θ.
    rho = 0.5

    def proximal(params, start, batch):
        return problems.mean_squares(params, batch) + rho * ((params - start) ** 2).sum() / 2

    loop = inner.loop(proximal, lambda start: optax.sgd(0.3), init=lambda key, start, data: start)
    maml = inner.problem(loop, lambda params, start, batch: problems.mean_squares(params, batch))
    start = jnp.array([1.0, -1.0, 0.5, 0.0])
    estimate = estimated(hypergrad.implicit(maml, num_steps=200, warm_start=False), start, problems.TASK)
    x, y = np.asarray(problems.TASK.train["x"]), np.asarray(problems.TASK.train["y"])
    hessian = x.T @ x / len(y)
    theta = np.linalg.solve(hessian + rho * np.eye(4), x.T @ y / len(y) + rho * np.asarray(start))
    xv, yv = np.asarray(problems.TASK.valid["x"]), np.asarray(problems.TASK.valid["y"])
    slope = xv.T @ (xv @ theta - yv) / len(yv)
    np.testing.assert_allclose(estimate.hypergrad, np.linalg.solve(np.eye(4) + hessian / rho, slope), rtol=1e-8)
    assert estimate.done


@pytest.mark.once
def test_a_warm_start_helps_along_a_moving_path():
    few = {"num_steps": 2, "solver": hypergrad.cg(num_steps=1, tol=0.0)}
    warm, cold = (
        hypergrad.implicit(problems.LOGISTIC, **few, warm_start=w, horizon=9 if w else None) for w in (True, False)
    )
    residuals, ends = {}, {}
    for name, estimator in {"warm": warm, "cold": cold}.items():
        state = estimator.init(KEY, problems.LAM, problems.LOGISTIC_TASK)
        estimate = jax.jit(estimator.estimate)
        outs = [estimate(problems.LAM, problems.LOGISTIC_TASK, state)]
        for i in range(1, 6):
            lam = jax.tree.map(lambda x, i=i: x + 1e-4 * i, problems.LAM)
            outs.append(estimate(lam, problems.LOGISTIC_TASK, outs[-1][1]))
        residuals[name] = np.array([[o.metrics[m] for m in ("adjoint_residual", "inner_grad_norm")] for o, _ in outs])
        ends[name] = [bool(o.done) for o, _ in outs]
    np.testing.assert_allclose(residuals["warm"][0], residuals["cold"][0], rtol=1e-9)
    assert (residuals["warm"][-1] < 0.1 * residuals["cold"][-1]).all()
    assert ends["warm"] == [False] * 4 + [True] * 2  # 2, 4, 6, 8, 10 steps taken
    assert ends["cold"] == [True] * 6


@pytest.mark.once
def test_over_tasks_equals_a_loop():
    estimator = hypergrad.implicit(problems.LOGISTIC, num_steps=20, solver=hypergrad.cg(tol=0.05))
    tasks = [problems.logistic_task(seed) for seed in range(3)]
    each = [estimated(estimator, problems.LAM, task) for task in tasks]
    counts = {int(out.metrics["num_products"]) for out in each}
    together = estimated(hypergrad.over_tasks(estimator), problems.LAM, problems.stack(tasks))
    assert len(counts) > 1  # solves of different lengths, side by side
    mean = jax.tree.map(lambda *x: sum(x) / 3, *[out.hypergrad for out in each])
    chex.assert_trees_all_close(together.hypergrad, mean, rtol=1e-10)
    np.testing.assert_allclose(together.metrics["num_products"], np.mean([o.metrics["num_products"] for o in each]))


def test_float32_is_exact_to_its_precision_times_the_condition():
    _, hessian, *_, expected = problems.logistic_answer(problems.LAM)
    lam, task = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (problems.LAM, problems.LOGISTIC_TASK))
    estimate = estimated(hypergrad.implicit(problems.LOGISTIC, num_steps=300), lam, task)
    error = np.linalg.norm(estimate.hypergrad["log_penalty"] - expected) / np.linalg.norm(expected)
    assert 0 < error < np.finfo(np.float32).eps * np.linalg.cond(hessian)


def test_carries_parameters_and_adjoint_to_their_fixed_points():
    estimator = implicit(problems.RIDGE)
    state = estimator.init(KEY, problems.LAM, problems.TASK)
    residuals = []
    for _ in range(60):
        estimate, state = jax.jit(estimator.estimate)(problems.LAM, problems.TASK, state)
        residuals.append([float(estimate.metrics[name]) for name in ("adjoint_residual", "inner_grad_norm")])
    residuals = np.array(residuals)
    assert (residuals[0] > 1e-3).all() and (residuals[-1] < 1e-12).all()
    assert not estimate.done
    np.testing.assert_allclose(state.inner.params, problems.solution(problems.LAM), rtol=1e-10)


@pytest.mark.parametrize("name", ["rate", "start"])
def test_refuses_in_other_coordinates_and_batched(name):
    space = {name_: spaces.positive(jnp.asarray(value), shape=value.shape) for name_, value in LAM.items()}
    space = {name_: leaf if name_ in (name, "penalty") else spaces.fixed(LAM[name_]) for name_, leaf in space.items()}
    estimator = hypergrad.over_tasks(implicit(spaces.constrain(problem(), space)))
    unconstrained = spaces.to_unconstrained(space, LAM)
    with pytest.raises(ValueError, match=rf"cannot estimate the hypergradient of the leaves \['{name}'\] of λ"):
        estimator.init(KEY, unconstrained, problems.stack([problems.TASK]))
    space[name] = spaces.fixed(LAM[name])
    estimator = implicit(spaces.constrain(problem(), space))
    estimator.init(KEY, spaces.to_unconstrained(space, LAM), problems.TASK)  # fixed, it is no longer asked for


def test_hyperparams_of_the_inner_and_of_the_outer_loss_have_a_hypergradient():
    space = {name: spaces.fixed(value) for name, value in LAM.items()} | {
        "penalty": spaces.positive(0.3, shape=(problems.NUM_FEATURES,)),
        "outer": spaces.positive(1.0),
    }
    estimator = implicit(spaces.constrain(problem(), space))
    unconstrained = spaces.to_unconstrained(space, LAM)
    estimate, _ = estimator.estimate(unconstrained, problems.TASK, estimator.init(KEY, unconstrained, problems.TASK))
    slopes = estimate.hypergrad.coordinates
    np.testing.assert_allclose(slopes["outer"], estimate.value, rtol=1e-12)  # F = exp(z) · mean squares
    assert optax.tree.norm(slopes["penalty"]) > 0


@pytest.mark.parametrize("x64", [False, True])
def test_float32_stays_float32(x64):
    with jax.enable_x64(x64):
        task, lam = jax.tree.map(lambda x: np.asarray(x, np.float32), (problems.TASK, problems.LAM))
        estimator = implicit(problems.RIDGE)
        state = estimator.init(KEY, lam, task)
        estimate, after = jax.jit(estimator.estimate)(lam, task, state)
        assert isinstance(estimate, base.Estimate)
        assert {leaf.dtype for leaf in jax.tree.leaves((estimate.hypergrad, after.adjoint))} == {np.dtype(np.float32)}


# Far from rest.


@pytest.mark.parametrize("condition", ["gradient", "step"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the unit of both losses
@pytest.mark.once
def test_warns_where_the_hypergradient_is_far_from_that_at_rest(scale, condition):
    loop = inner.loop(
        lambda params, lam, batch: scale * problems.RIDGE_LOOP.loss(params, lam, batch, CONTEXT)[0],
        lambda lam: optax.sgd(0.4 / scale),
        init=problems.zeros,
    )
    ridge = inner.problem(loop, lambda params, lam, batch: scale * problems.mean_squares(params, batch))
    exact = scale * np.asarray(jax.grad(problems.closed_form)(problems.LAM)["log_penalty"])
    solver = hypergrad.dense()
    errors, warned = [], []
    for num_steps in (1, 2, 3, 30):
        estimator = hypergrad.implicit(ridge, num_steps=num_steps, solver=solver, warm_start=False, condition=condition)
        estimate = estimated(estimator, problems.LAM, problems.TASK)
        errors.append(np.linalg.norm(estimate.hypergrad["log_penalty"] - exact) / np.linalg.norm(exact))
        message = " ".join(_checks.far_from_rest(estimate.metrics))
        warned.append("far from a stationary point" in message)
        assert warned[-1] or message == ""
    assert warned == [error > 0.3 for error in errors] == [True, True, True, False]


CONTEXT = base.Context(KEY, jnp.array(0))


def test_the_warning_names_the_rule_of_a_partition_and_ignores_other_rules():
    norms = {"a/inner_grad_norm": 1.0, "a/outer_grad_norm": 2.0, "b/inner_grad_norm": 1.0, "b/outer_grad_norm": 9.0}
    message = " ".join(_checks.far_from_rest({**norms, "inner_grad_norm": 5.0, "value": 0.0}))
    assert "`a/inner_grad_norm` is 1 and `a/outer_grad_norm` is 2" in message and message.count("_grad_norm` is") == 2
    assert _checks.far_from_rest({"inner_grad_norm": np.nan, "outer_grad_norm": 1.0}) == []


AVERAGED = {
    "all": lambda rate: optax.contrib.schedule_free_sgd(rate, b1=0.5),
    "some": lambda rate: optax.partition(
        {"a": optax.contrib.schedule_free_sgd(rate, b1=0.5), "b": optax.sgd(rate)}, {"a": "a", "b": "b"}
    ),
}


@pytest.mark.parametrize("parts", AVERAGED)
@pytest.mark.parametrize("rule", ["implicit", "implicit_solve"])
def test_the_average_of_a_schedule_free_optimizer_moves_with_the_minimum(rule, parts):
    """ℓ = (a − λ)²/2 + (b − 3λ)²/2 and f = 2a + b², whose derivative at rest is 2 + 18λ."""
    loop = inner.loop(
        lambda params, lam, batch: ((params["a"] - lam) ** 2 + (params["b"] - 3 * lam) ** 2) / 2,
        lambda lam: AVERAGED[parts](0.5),
        init=lambda key, lam, data: {"a": jnp.array(0.1), "b": jnp.array(0.2)},
    )
    outer, lam, task = lambda params: 2 * params["a"] + params["b"] ** 2, jnp.array(0.7), base.Task((), ())
    if rule == "implicit":
        problem = inner.problem(loop, lambda params, lam, batch: outer(params))
        slope = estimated(hypergrad.implicit(problem, num_steps=4000), lam, task).hypergrad
    else:
        solve = hypergrad.implicit_solve(loop, num_steps=4000)
        slope = jax.jit(jax.grad(lambda lam: outer(loop.params(solve(KEY, lam, ())))))(lam)
    np.testing.assert_allclose(slope, 2 + 18 * 0.7, rtol=2e-3)  # the average approaches the minimum as 1/t

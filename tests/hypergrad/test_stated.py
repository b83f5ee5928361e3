"""Every deterministic rule against its documented formula in NumPy: logistic regression, at rest and before.

    ℓ = mean log(1 + exp(−y xᵀθ)) + Σ exp(λ_d) θ_d²/2,    m ← m/2 + ∇θ ℓ,    θ ← θ − rate · m,
    f = the same mean on the validation rows + 0.1 Σ λ_d²,

where λ has the logarithms of the penalties, the rate, or both. At rest the expected hypergradient is
`problems.logistic_answer`. Before, it is the rule's own formula, with tangents in NumPy. The same formulas bound the
effect of rounding, in float32 and with parameters in bfloat16.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner

KEY = jax.random.key(0)
TASK = problems.LOGISTIC_TASK
LAM = {"log_penalty": problems.LAM["log_penalty"], "rate": jnp.array(1.0)}
MOMENTUM, NUM, LONG = 0.5, problems.NUM_FEATURES, 300


def in_bfloat16(loss):
    """The loss, computed in bfloat16 for parameters and rows in float32. The page of rules shows these lines."""
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    return lambda params, batch: loss(narrow(params), narrow(batch)).astype(jnp.float32)


def logistic(dtype=None, rate=1.0, momentum: float | None = MOMENTUM, log_loss=problems.log_loss):
    """With parameters in `dtype`: by default that of the data."""

    def loss(params, hp, batch):
        log_penalty = hp.get("log_penalty", jnp.linspace(-2.0, 0.0, NUM, dtype=params.dtype))  # those of LAM
        return log_loss(params, batch) + (jnp.exp(log_penalty) * params**2).sum() / 2

    def outer_loss(params, hp, batch):
        return log_loss(params, batch) + 0.1 * (hp["log_penalty"] ** 2).sum() * ("log_penalty" in hp)

    loop = inner.loop(
        loss,
        lambda hp: optax.sgd(hp.get("rate", rate), momentum=momentum),
        init=lambda key, hp, data: jnp.zeros(NUM, dtype or data["x"].dtype),
    )
    return inner.problem(loop, outer_loss)


def estimated(rule, lam, task=TASK, calls=1):
    """The last of `calls` estimates."""
    estimate, state = jax.jit(rule.estimate), rule.init(KEY, lam, task)
    for _ in range(calls):
        out, state = estimate(lam, task, state)
    return out


# The same in NumPy.

PENALTY = np.exp(np.asarray(LAM["log_penalty"]))
DIRECT = 0.2 * np.asarray(LAM["log_penalty"])
(X, Y), (XV, YV) = ((np.asarray(rows["x"]), np.asarray(rows["y"])) for rows in (TASK.train, TASK.valid))


def fit_grad(theta, x, y):
    return -x.T @ (y / (1 + np.exp(y * (x @ theta)))) / len(y)


def fit_hessian(theta, x, y):
    odds = 1 / (1 + np.exp(y * (x @ theta)))
    return x.T @ ((odds * (1 - odds))[:, None] * x) / len(y)


def fit(theta, x, y):
    return np.log1p(np.exp(-y * (x @ theta))).mean()


def g_grad(theta):
    return fit_grad(theta, X, Y) + PENALTY * theta


def hessian(theta):
    return fit_hessian(theta, X, Y) + np.diag(PENALTY)


def f_grad(theta):
    return fit_grad(theta, XV, YV)


def run(num_steps, theta=None, momentum=None, rate=1.0, only=None):
    """θ, m, and the tangents of both by (log penalties, rate) after each step, from a constant start.

    `only`: if given, λ enters only this step (counted from 0).
    """
    theta = np.zeros(NUM) if theta is None else theta
    momentum = np.zeros(NUM) if momentum is None else momentum
    by, by_m, states = np.zeros((NUM, NUM + 1)), np.zeros((NUM, NUM + 1)), []
    for t in range(num_steps):
        enters = only is None or only == t
        direct = np.column_stack([np.diag(PENALTY * theta), np.zeros(NUM)]) * enters
        by_m = MOMENTUM * by_m + hessian(theta) @ by + direct
        momentum = MOMENTUM * momentum + g_grad(theta)
        theta, by = theta - rate * momentum, by - rate * by_m
        by[:, -1] -= momentum * enters
        states.append(SimpleNamespace(theta=theta, momentum=momentum, by=by.copy()))
    return states


def total(state):
    """∂f/∂λ + (∂f/∂θ) dθ/dλ: first the penalties', then the rate's."""
    return np.append(DIRECT, 0) + f_grad(state.theta) @ state.by


def onward(before, num_steps):
    """The states of `num_steps` more steps, from `before` many that are held constant."""
    start = run(before)[-1]
    return run(num_steps, start.theta, start.momentum)


def sama(num_steps):
    # The mixed product after the step: v = ∂f/∂θ, u = −rate v.
    state = run(num_steps)[-1]
    v = f_grad(state.theta)
    return np.append(DIRECT - PENALTY * state.theta * v, -state.momentum @ v)


def implicit(num_steps, adjoint_rate=None):
    theta = run(num_steps)[-1].theta
    v = np.linalg.solve(hessian(theta), f_grad(theta))
    if adjoint_rate is not None:  # v in as many steps from zero
        v = v - np.linalg.matrix_power(np.eye(NUM) - adjoint_rate * hessian(theta), num_steps) @ v
    return DIRECT - PENALTY * theta * v


def f2sa(num_steps, mu):
    z = run(num_steps)[-1].theta
    y, m = np.zeros(NUM), np.zeros(NUM)
    for _ in range(num_steps):
        m = MOMENTUM * m + g_grad(y) + f_grad(y) / mu
        y = y - m
    return DIRECT + mu * PENALTY * (y**2 - z**2) / 2


def bome(num_steps, barrier, calls):
    theta, m = np.zeros(NUM), np.zeros(NUM)
    for _ in range(calls):
        z = run(num_steps, theta, m)[-1].theta
        f = np.append(f_grad(theta), DIRECT)
        q = np.append(g_grad(theta), PENALTY * (theta**2 - z**2) / 2)
        direction = f + max(0, barrier - f @ q / (q @ q)) * q
        m = MOMENTUM * m + direction[:NUM]
        theta = theta - m
    return direction[NUM:]


# At rest: the hypergradient at the solution, zero for the rate.

AT_REST = {
    "unrolled": partial(hypergrad.unrolled, num_steps=LONG, grad=jax.grad),
    "unrolled_mixed": partial(hypergrad.unrolled, num_steps=LONG),
    "unrolled_sqrt": partial(hypergrad.unrolled, num_steps=LONG, remat="sqrt"),
    "unrolled_three_levels": partial(hypergrad.unrolled, num_steps=LONG, remat=3),
    "truncated": partial(hypergrad.truncated, num_steps=LONG, truncation_length=LONG, remat="step"),
    "forward": partial(hypergrad.forward, num_steps=LONG),
    "lookahead": partial(hypergrad.lookahead, commit=20, num_steps=LONG),
    "partition": lambda problem: hypergrad.partition(
        problem,
        {
            "rate": partial(hypergrad.unrolled, num_steps=LONG),
            "log_penalty": partial(hypergrad.warm_implicit, num_steps=LONG, adjoint_rate=0.8),
        },
        lambda path: path,
    ),
}


# Other tests show that these equal other rules, or they are tested before rest.
SLOW = ("unrolled", "unrolled_sqrt", "unrolled_three_levels", "truncated", "partition")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in AT_REST])
@pytest.mark.once
def test_at_rest(name):
    theta, *_, expected = problems.logistic_answer(LAM)
    estimate = estimated(AT_REST[name](logistic()), LAM)
    assert np.linalg.norm(expected - DIRECT) > 0.01
    np.testing.assert_allclose(estimate.value, fit(theta, XV, YV) + 0.1 * (LAM["log_penalty"] ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergrad["log_penalty"], expected, rtol=1e-10)
    assert abs(estimate.hypergrad["rate"]) < 1e-12


def test_f2sa_at_rest_has_the_bias_of_its_multiplier():
    rule = hypergrad.f2sa(logistic(), num_steps=LONG, multiplier=lambda count: 40.0 * 4.0**count)
    theta, *_, exact = problems.logistic_answer(LAM)
    lam, errors = {"log_penalty": LAM["log_penalty"]}, []
    estimate, state = jax.jit(rule.estimate), rule.init(KEY, lam, TASK)
    for mu in (40.0, 160.0, 640.0):
        estimated, state = estimate(lam, TASK, state)
        y = theta
        for _ in range(20):  # Newton's method
            curvature = fit_hessian(y, XV, YV) + mu * hessian(y)
            y = y - np.linalg.solve(curvature, f_grad(y) + mu * g_grad(y))
        expected = DIRECT + mu * PENALTY * (y**2 - theta**2) / 2
        np.testing.assert_allclose(estimated.hypergrad["log_penalty"], expected, rtol=1e-9)
        errors.append(np.linalg.norm(expected - exact))
    assert errors[0] > 1e-3 and 3.8 < errors[0] / errors[1] < 4.2 and 3.9 < errors[1] / errors[2] < 4.1


def test_bome_circles_around_the_hypergradient_at_the_distance_of_its_rate():
    lam = {"log_penalty": LAM["log_penalty"]}

    @jax.jit
    @jax.vmap
    def mean(rate):
        rule = hypergrad.bome(logistic(rate=rate, momentum=None), num_steps=60)

        def estimate(state, _):
            out, state = rule.estimate(lam, TASK, state)
            return state, out.hypergrad["log_penalty"]

        return jax.lax.scan(estimate, rule.init(KEY, lam, TASK), length=1200)[1][200:].mean(0)

    means = np.asarray(mean(jnp.array([0.4, 0.2])))
    coarse, fine = np.linalg.norm(means - problems.logistic_answer(LAM)[-1], axis=1)
    assert fine > 1e-3 and 1.8 < coarse / fine < 2.2


# Before rest: the rule, the leaves of λ that it differentiates, the number of calls, the formula, and the limits of the
# rounding error in float32 (ε = 1.2e-7) and with parameters in bfloat16 (ε = 7.8e-3), relative to the part of θ. The
# limits are larger for differences between nearby parameters, and for scalar products that are small next to their
# factors.

BOTH, PENALTIES, RATE = ("log_penalty", "rate"), ("log_penalty",), ("rate",)
ON_THE_WAY = {
    "unrolled": (
        partial(hypergrad.unrolled, num_steps=4, outer="mean", remat="sqrt"), BOTH, 1,
        lambda: np.mean([total(state) for state in run(4)], 0), 1e-6, 2e-2,
    ),
    "truncated": (
        partial(hypergrad.truncated, num_steps=6, truncation_length=3), BOTH, 2,
        lambda: total(onward(3, 3)[-1]), 1e-6, 2e-2,
    ),
    "truncated, 1 step": (
        partial(hypergrad.truncated, num_steps=3, truncation_length=1), BOTH, 3,
        lambda: total(onward(2, 1)[-1]), 1e-6, 2e-2,
    ),
    "forward": (
        partial(hypergrad.forward, num_steps=4, outer=[0.0, 2.0, 0.0, 1.0]), BOTH, 1,
        lambda: 2 * total(run(4)[1]) + total(run(4)[3]), 1e-6, 2e-2,
    ),
    "lookahead": (
        partial(hypergrad.lookahead, commit=2, num_steps=2), BOTH, 2, lambda: total(onward(4, 2)[-1]), 1e-6, 2e-2,
    ),
    "partition": (
        lambda problem: hypergrad.partition(
            problem,
            {"rate": partial(hypergrad.unrolled, num_steps=3), "log_penalty": partial(hypergrad.implicit, num_steps=3)},
            lambda path: path,
        ),
        BOTH, 1, lambda: np.append(implicit(3), total(run(3)[-1])[-1]), 1e-6, 2e-2,
    ),
    "implicit": (partial(hypergrad.implicit, num_steps=3), PENALTIES, 1, lambda: implicit(3), 1e-6, 2e-2),
    "warm_implicit": (
        partial(hypergrad.warm_implicit, num_steps=3, adjoint_rate=0.8), PENALTIES, 1,
        lambda: implicit(3, 0.8), 1e-6, 2e-2,
    ),
    "darts_fd": (
        partial(hypergrad.darts_fd, commit=2), BOTH, 2, lambda: total(onward(4, 1)[-1]), 1e-5, 3e-1,
    ),
    "darts_fd_exact": (
        partial(hypergrad.darts_fd, commit=2, epsilon=None), BOTH, 2, lambda: total(onward(4, 1)[-1]), 1e-6, 2e-2,
    ),
    "sama": (partial(hypergrad.sama, num_steps=2), BOTH, 2, lambda: sama(4), 1e-5, 3e-1),
    "f2sa": (
        partial(hypergrad.f2sa, num_steps=4, multiplier=5.0), PENALTIES, 1, lambda: f2sa(4, 5.0), 2e-6, 2e-1,
    ),
    "bome": (partial(hypergrad.bome, num_steps=5, barrier=2.0), PENALTIES, 2, lambda: bome(5, 2.0, 2), 1e-6, 2e-2),
    "hypergradient_descent": (
        hypergrad.hypergradient_descent, RATE, 3,
        lambda: -run(3)[-1].momentum @ g_grad(run(3)[-1].theta), 1e-5, 2e-1,
    ),
}  # fmt: skip


def relative_error(name, precision, **options):
    rule, leaves, calls, formula, *_ = ON_THE_WAY[name]
    lam, task = jax.tree.map(lambda x: x.astype(precision), ({leaf: LAM[leaf] for leaf in leaves}, TASK))
    estimate = estimated(rule(logistic(**options)), lam, task, calls)
    assert all(x.dtype == precision for x in (estimate.value, *jax.tree.leaves(estimate.hypergrad)))
    computed = np.concatenate([np.atleast_1d(np.asarray(estimate.hypergrad[leaf], float)) for leaf in leaves])
    expected = np.atleast_1d(formula())
    through_params = expected.copy()
    if "log_penalty" in leaves:
        through_params[:NUM] -= DIRECT * (3 if name == "forward" else 1)  # its weights sum to 3
    assert np.linalg.norm(through_params) > 2e-3 and len(computed) == len(expected)
    return np.linalg.norm(computed - expected) / np.linalg.norm(through_params)


@pytest.mark.parametrize("name", ON_THE_WAY)
@pytest.mark.once
def test_on_the_way(name):
    assert relative_error(name, jnp.float64) < 1e-10


QUICK = ("f2sa",)  # the others are slow together; `unrolled` and `implicit` have such tests elsewhere
NARROW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ON_THE_WAY]


@pytest.mark.parametrize("name", NARROW)
def test_float32(name):
    error = relative_error(name, jnp.float32)
    assert 1e-10 < error < ON_THE_WAY[name][4], error


@pytest.mark.parametrize("name", NARROW)
def test_parameters_in_bfloat16(name):
    error = relative_error(name, jnp.float32, dtype=jnp.bfloat16)
    assert 1e-6 < error < ON_THE_WAY[name][5], error


@pytest.mark.parametrize("name", ["unrolled", "implicit"])
@pytest.mark.once
def test_losses_in_bfloat16(name):
    error = relative_error(name, jnp.float32, log_loss=in_bfloat16(problems.log_loss))
    assert 1e-6 < error < ON_THE_WAY[name][5], error


def test_contributions_of_steps():
    parts = jax.jit(hypergrad.trace(logistic(), num_steps=3))(KEY, LAM, TASK)
    for t in range(3):
        state = run(3, only=t)[-1]
        expected = f_grad(state.theta) @ state.by
        assert np.abs(expected).min() > 1e-4 or t == 0  # θ is zero before the first step: no penalty acts
        np.testing.assert_allclose(parts.steps["log_penalty"][t], expected[:NUM], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(parts.steps["rate"][t], expected[NUM], rtol=1e-12)
    np.testing.assert_allclose(parts.outer["log_penalty"], DIRECT, rtol=1e-12)
    assert not parts.start["log_penalty"].any() and not parts.start["rate"].any() and not parts.outer["rate"].any()

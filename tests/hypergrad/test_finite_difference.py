"""DARTS's finite difference: written out by hand, and against lookahead, whose product it estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner
from metaopt.hypergrad import _finite_difference

KEY = jax.random.key(0)

# λ enters the loss, its auxiliary output, the optimizer and the outer loss; there are noise and a count.


def _loss(params, hyperparams, batch, context):
    noise = 0.1 * jax.random.normal(context.key, params.shape)
    stats, count = context.model_state
    value = (jnp.tanh(params + noise - hyperparams["target"]) ** 2 + 0.1 * params * stats).sum()
    return value, (0.5 * stats + hyperparams["target"] * params, count + 1)


def _outer_loss(params, hyperparams, batch, context):
    stats, count = context.model_state
    return (jnp.sin(params) ** 2 + hyperparams["scale"] * stats**2).sum() * count


LAM = {"rate": jnp.array(0.2), "scale": jnp.array(0.3), "target": jnp.array([1.0, -0.5])}
TASK = base.Task(None, None)


def padded(loss):
    """The same loss, whose operations write more bytes than those whose gradients are in one computation."""

    def padded_loss(params, *args):
        value, aux = loss(params, *args)
        return value + 0.0 * jnp.broadcast_to(params.sum(), _finite_difference.LARGE // 8 + 1).mean(), aux

    return padded_loss


def problem(optimizer=optax.adam, outer_loss=_outer_loss, init=None, loss=_loss):
    start = (jnp.array([0.3, -0.2]), (jnp.zeros(2), jnp.array(0)))
    loop = inner.loop(
        loss,
        lambda hyperparams: optimizer(hyperparams["rate"]),
        init=init or (lambda key, hyperparams, data: start),
        with_context=True,
    )
    return inner.problem(loop, outer_loss, with_context=True)


def estimated(estimator, lam=LAM, task=TASK):
    return jax.jit(estimator.estimate)(lam, task, jax.jit(estimator.init)(KEY, lam, task))


@pytest.fixture(scope="module")
def exact():
    return estimated(hypergrad.lookahead(problem(), commit=2))


@pytest.fixture(scope="module")
def error(exact):
    """The largest relative error over the leaves that the difference approximates, by the difference and ε."""

    @functools.partial(jax.jit, static_argnames="difference")
    def hypergrad_at(epsilon, state, difference):
        # A traced ε: one program for all.
        step = _finite_difference.one_step
        return step(problem(), state, LAM, TASK, KEY, epsilon=epsilon, around="before", difference=difference)[1]

    state = exact[1].inner
    expected = estimated_by_lookahead(state)
    return lambda difference, epsilon: jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), hypergrad_at(epsilon, state, difference), expected
    )


def estimated_by_lookahead(state):
    """Without commitment, from `state`, with the outer batch's key of no effect."""
    estimator = hypergrad.lookahead(problem(), commit=0)
    start = estimator.init(KEY, LAM, TASK)._replace(inner=state)
    return estimator.estimate(LAM, TASK, start)[0].hypergrad


@pytest.mark.once
@pytest.mark.parametrize(("difference", "order"), [("central", 2), ("forward", 1)])
def test_the_error_falls_with_the_distance_by_its_order(error, difference, order):
    errors = [error(difference, epsilon) for epsilon in (0.02, 0.01, 0.005, 1e-5)]
    assert errors[0]["target"] > 1e-6
    for coarse, fine in zip(errors[:2], errors[1:3], strict=True):
        assert 0.95 * 2**order < coarse["target"] / fine["target"] < 1.05 * 2**order
    assert errors[3]["target"] < (1e-7 if order == 2 else 1e-4)
    # Leaves that enter only the optimizer or the outer loss are exact at every distance.
    assert max(max(e["rate"], e["scale"]) for e in errors) < 1e-12


@pytest.mark.once
def test_without_a_distance_it_is_lookahead(exact):
    estimate, state = estimated(hypergrad.darts_fd(problem(), commit=2, epsilon=None))
    expected, expected_state = exact
    assert min(float(jnp.abs(leaf).min()) for leaf in jax.tree.leaves(expected.hypergrad)) > 1e-2
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), estimate.hypergrad, expected.hypergrad)
    assert estimate.metrics["inner_steps"] == 2
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, expected_state))  # the same is carried


@pytest.mark.once
@pytest.mark.parametrize(
    ("rule", "options"),
    [("darts_fd", {}), ("darts_fd", {"difference": "forward"}), ("darts_fd", {"epsilon": None}), ("sama", {})],
)
def test_one_gradient_at_a_time_gives_what_all_in_one_program_do(rule, options):
    num = {"darts_fd": "commit", "sama": "num_steps"}[rule]
    estimate = lambda loss: estimated(getattr(hypergrad, rule)(problem(loss=loss), **{num: 2}, **options))
    at_once, one_by_one = estimate(_loss), estimate(padded(_loss))
    assert min(float(jnp.abs(leaf).min()) for leaf in jax.tree.leaves(at_once[0].hypergrad)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), at_once[0], one_by_one[0])
    np.testing.assert_allclose(at_once[1].inner.params, one_by_one[1].inner.params, rtol=1e-13)
    assert at_once[1].inner.step == one_by_one[1].inner.step == 2


def test_one_gradient_at_a_time_heeds_a_product_that_is_not_finite():
    # The branch is taken; nothing but the product depends on λ.
    loop = inner.loop(
        padded(lambda params, target, batch, context: (((params - target) ** 2).sum(), None)),
        lambda target: optax.sgd(0.1),
        init=lambda key, target, data: (jnp.zeros(2), None),
        with_context=True,
    )
    aimed = inner.problem(loop, lambda params, target, batch: (params**2).sum())
    estimate, _ = estimated(hypergrad.darts_fd(aimed), jnp.full(2, jnp.nan))
    assert jnp.isnan(estimate.hypergrad).all()


@pytest.mark.parametrize(("rows", "im2col", "one_by_one"), [(1, None, False), (64, None, True), (64, False, False)])
def test_large_losses_take_one_gradient_at_a_time_without_convolutions_of_xla(rows, im2col, one_by_one):
    def loss(w, hyperparams, x):
        return (jax.lax.conv(x, w, (1, 1), "SAME") ** 2).mean() * hyperparams

    loop = inner.loop(
        loss,
        lambda hyperparams: optax.sgd(0.1),
        init=lambda key, hyperparams, data: jnp.ones((8, 4, 3, 3), jnp.float32),
        im2col=im2col,
    )
    x, lam = jnp.ones((rows, 4, 32, 32), jnp.float32), jnp.float32(1)
    task = base.Task(x, x)
    estimator = hypergrad.darts_fd(inner.problem(loop, lambda w, hyperparams, x: (w**2).mean()))
    state = estimator.init(KEY, lam, task)
    program = str(jax.make_jaxpr(estimator.estimate)(lam, task, state))
    assert ("cond[" in program) == one_by_one


@pytest.mark.once
def test_equals_darts_by_hand():
    # Liu et al., Eq. 7 and 8: ∂f/∂α(w') − ξ (∇α ℓ(w+) − ∇α ℓ(w−))/2ε, w± = w ± ε v, v = ∂f/∂w', ε = 0.01/|v|.
    loop = inner.loop(problems.penalized, lambda hyperparams: optax.sgd(0.1), init=problems.zeros)
    ridge = inner.problem(
        loop,
        lambda params, hyperparams, batch: (
            problems.mean_squares(params, batch) + 0.1 * (hyperparams["penalty"] ** 2).sum()
        ),
    )
    lam, xi = {"penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}, 0.1
    w = inner.run(loop, num_steps=3)(KEY, lam, problems.TASK.train).params
    ahead = w - xi * jax.grad(problems.penalized)(w, lam, problems.TASK.train)
    v = jax.grad(problems.mean_squares)(ahead, problems.TASK.valid)
    epsilon = 0.01 / np.sqrt((v**2).sum())
    plus, minus = w + epsilon * v, w - epsilon * v
    mixed = (plus**2 / 2 - minus**2 / 2) / (2 * epsilon)  # ∇α ℓ = w²/2
    estimate, _ = estimated(hypergrad.darts_fd(ridge, commit=3), lam, problems.TASK)
    assert jnp.abs(mixed).min() > 1e-4
    np.testing.assert_allclose(estimate.hypergrad["penalty"], 0.2 * lam["penalty"] - xi * mixed, rtol=1e-10)
    np.testing.assert_allclose(estimate.metrics["direction_norm"], xi * np.sqrt((v**2).sum()), rtol=1e-12)


@pytest.mark.parametrize("rule", ["darts_fd", "sama"])
def test_the_distance_is_that_of_the_parameters(rule):
    """∇λ ℓ = w³/3 differs at w ± ε v by (2 w² ε v + 2 ε³ v³/3), with |v| = 1: the error is ε² v³/3."""
    loop = inner.loop(
        lambda w, lam, batch: lam * (w**3).sum() / 3,
        lambda lam: optax.sgd(0.1),
        init=lambda key, lam, data: jnp.array([0.6, -0.8]),
    )
    cubic = inner.problem(loop, lambda w, lam, batch: (w**2).sum() / 2)
    lam, w = jnp.array(0.5), np.array([0.6, -0.8])
    ahead = w - 0.1 * 0.5 * w**2
    v, epsilon = ahead / np.linalg.norm(ahead), 0.3
    if rule == "darts_fd":
        estimate, _ = estimated(hypergrad.darts_fd(cubic, commit=0, epsilon=epsilon), lam)
        expected = -0.1 * np.linalg.norm(ahead) * (w**2 @ v + epsilon**2 * (v**3).sum() / 3)
    else:
        estimate, _ = estimated(hypergrad.sama(cubic, num_steps=1, epsilon=epsilon), lam)
        expected = -0.1 * np.linalg.norm(ahead) * (ahead**2 @ v + epsilon**2 * (v**3).sum() / 3)
    np.testing.assert_allclose(estimate.hypergrad, expected, rtol=1e-10)


def test_where_the_outer_loss_does_not_see_the_parameters():
    flat = problem(outer_loss=lambda params, hyperparams, batch, context: hyperparams["scale"] ** 2)
    estimate, _ = estimated(hypergrad.darts_fd(flat))
    np.testing.assert_allclose(estimate.hypergrad["scale"], 0.6, rtol=1e-14)
    assert (estimate.hypergrad["target"] == 0).all() and estimate.hypergrad["rate"] == 0  # and not NaN


def test_hyperparams_that_enter_only_the_model_state_have_a_hypergradient():
    def loss(params, hyperparams, batch, context):
        return ((params - 1) ** 2).sum(), context.model_state + jnp.exp(hyperparams)

    loop = inner.loop(
        loss, lambda hp: optax.sgd(0.1), init=lambda key, hp, data: (jnp.zeros(2), jnp.zeros([])), with_context=True
    )
    moved = inner.problem(
        loop, lambda params, hp, batch, context: context.model_state * (params**2).sum(), with_context=True
    )
    lam = jnp.array(0.3)
    estimate, _ = estimated(hypergrad.darts_fd(moved, commit=0), lam)
    np.testing.assert_allclose(estimate.hypergrad, np.exp(0.3) * 2 * 0.2**2, rtol=1e-12)


@pytest.mark.once
def test_the_horizon_ends_once_so_many_steps_are_committed():
    estimator = hypergrad.darts_fd(problem(), commit=2, horizon=4)
    once, state, is_done = jax.jit(estimator.estimate), estimator.init(KEY, LAM, TASK), []
    for _ in range(2):
        estimate, state = once(LAM, TASK, state)
        is_done.append(bool(estimate.done))
    assert is_done == [False, True]

"""Every finding is made where its cause was put, and not where it was not."""

import io
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, spaces
from metaopt.hypergrad import _perturbed_run


def quadratic(rate, curvature=1.0):
    loop = inner.loop(
        lambda params, hp, batch: curvature * (params**2).sum() / 2 * jnp.exp(hp),
        lambda hp: optax.sgd(rate),
        init=lambda key, hp, data: jnp.ones(3),
    )
    return inner.problem(loop, lambda params, hp, batch: (params**2).sum())


def words(diagnosis):
    return " ".join(f"{f.what} {f.advice}" for f in diagnosis.findings)


def test_a_healthy_run_has_no_finding():
    diagnosis = hypergrad.diagnose(quadratic(0.2), jnp.array(0.0), problems.TASK, num_steps=50)
    assert diagnosis.findings == [] and str(diagnosis) == (
        "No problem was found. Checked: the losses and gradients of 50 steps; the outer loss at the end and its "
        "gradients; the growth of a perturbation of θ. Hypergradients were not checked: pass `estimator`."
    )
    # θ ← (1 − rate) θ: the growth is exact.
    np.testing.assert_allclose(diagnosis.growth, np.log(0.8), rtol=1e-9)
    np.testing.assert_allclose(diagnosis.products, np.log(0.8) * np.arange(1, 51), rtol=1e-9)


@pytest.mark.parametrize(
    ("outer_loss", "name"),
    [
        # The branch that is not taken has an infinite derivative.
        (lambda params, hp, batch: jnp.where(params > -1, params, jnp.sqrt(params - params)).sum() + hp, "θ"),
        (lambda params, hp, batch: (params**2).sum() + jnp.sqrt(hp), "λ"),
    ],
)
def test_a_finite_outer_loss_without_a_finite_gradient_is_found(outer_loss, name):
    problem = inner.problem(quadratic(0.2).loop, outer_loss)
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=5)
    (finding,) = diagnosis.findings
    assert finding.what.startswith("The outer loss is finite") and f"with respect to {name} is not" in finding.what
    assert "`jnp.where`" in finding.advice


@pytest.mark.parametrize(
    "outer_loss",
    [
        lambda params, hp, batch: jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, (params**2).sum()),
        lambda params, hp, batch: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), params.dtype), params.sum()),
    ],
)
def test_an_outer_loss_without_a_derivative_is_only_evaluated(outer_loss):
    problem = inner.problem(quadratic(0.2).loop, outer_loss)
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=5)
    assert diagnosis.findings == [] and diagnosis.checked[1] == "the outer loss at the end"


def _without_derivative(residual, cotangent):
    raise NotImplementedError


@pytest.mark.parametrize("filtering", ["off", "quiet_remove_frames"])
def test_an_error_in_a_derivative_rule_of_the_caller_is_raised(filtering):
    @jax.custom_vjp
    def norm(params):
        return (params**2).sum()

    def backward(residual, cotangent):
        raise ValueError("the caller's mistake")

    norm.defvjp(lambda params: (norm(params), None), backward)
    problem = inner.problem(quadratic(0.2).loop, lambda params, hp, batch: norm(params))
    loop = lambda params, hp, batch: jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, (params**2).sum())
    former = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", filtering)
    try:
        with pytest.raises(ValueError, match="the caller's mistake"):
            hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=2)
        arguments = inner.problem(problem.loop, loop), jnp.array(0.0), problems.TASK, jax.random.key(0)
        assert not _perturbed_run.has_gradient(*arguments)
        norm.defvjp(lambda params: (norm(params), None), _without_derivative)
        assert not _perturbed_run.has_gradient(problem, *arguments[1:])
    finally:
        jax.config.update("jax_traceback_filtering", former)


@pytest.mark.parametrize("optimizer", [optax.adam, optax.rmsprop])
def test_squares_that_overflow_are_no_finding(optimizer):
    """The perturbation of Adam's second moments is the square of large gradients."""
    x = np.random.default_rng(0).uniform(0, 1e6, (50, 3)).astype(np.float32)
    loop = inner.loop(
        lambda params, hp, batch: jnp.mean((batch @ params - batch[:, 0]) ** 2),
        lambda hp: optimizer(0.01),
        init=lambda key, hp, data: jnp.zeros(3, jnp.float32),
    )
    problem = inner.problem(loop, lambda params, hp, batch: jnp.mean((batch @ params - batch[:, 0]) ** 2) + hp)
    diagnosis = hypergrad.diagnose(problem, jnp.float32(0.0), base.Task(x, x), num_steps=50)
    assert np.isfinite(diagnosis.growth) and "derivative" not in words(diagnosis)


@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)])
def test_parameters_may_have_16_bits_and_different_types(dtypes):
    loop = inner.loop(
        lambda params, hp, batch: sum((x**2).sum() for x in params),
        lambda hp: optax.adam(0.1, mu_dtype=jnp.float32),
        init=lambda key, hp, data: tuple(jnp.ones(3, dtype) for dtype in dtypes),
    )
    problem = inner.problem(loop, lambda params, hp, batch: sum((x**2).sum() for x in params) + hp)
    diagnosis = hypergrad.diagnose(problem, jnp.float32(0.0), problems.TASK, num_steps=20)
    assert np.isfinite(np.float32(diagnosis.growth)) and "not finite" not in words(diagnosis)


def test_a_gradient_without_a_finite_derivative_is_found():
    loop = inner.loop(
        lambda params, hp, batch: (jnp.abs(params) ** 1.5).sum(),
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: jnp.array([0.0, 1.0]),
    )
    problem = inner.problem(loop, lambda params, hp, batch: params.sum() + hp)
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=5)
    assert "From step 0 of 5 on, the derivative of the step with respect to θ is not finite" in words(diagnosis)


def test_the_inner_loss_is_that_of_the_training_rows():
    loop = inner.loop(
        lambda params, hp, batch: ((params - batch) ** 2).sum() / 2,
        lambda hp: optax.sgd(0.5),
        init=lambda key, hp, data: jnp.zeros(1),
    )
    problem = inner.problem(loop, lambda params, hp, batch: ((params - batch) ** 2).sum())
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.0), base.Task(jnp.ones(1), 9 * jnp.ones(1)), num_steps=3)
    np.testing.assert_allclose(diagnosis.inner_loss, [1 / 2, 1 / 8, 1 / 32])
    np.testing.assert_allclose(diagnosis.inner_grad_norm, [1, 1 / 2, 1 / 4])


def test_a_perturbation_that_ends_stays_zero():
    diagnosis = hypergrad.diagnose(quadratic(1.0), jnp.array(0.0), problems.TASK, num_steps=5)  # θ is 0 after one step
    np.testing.assert_array_equal(diagnosis.products, -np.inf)


def test_each_leaf_has_a_perturbation_of_its_own():
    # Training stays where a = b. Only a perturbation with a ≠ b grows, by 1 − 2.5 = −1.5 a step.
    loop = inner.loop(
        lambda params, hp, batch: (2.5 * (params["a"] - params["b"]) ** 2 + 0.5 * (params["a"] + params["b"]) ** 2) / 4,
        lambda hp: optax.sgd(1.0),
        init=lambda key, hp, data: {"a": jnp.ones([]), "b": jnp.ones([])},
    )
    problem = inner.problem(loop, lambda params, hp, batch: params["a"])
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=50)
    np.testing.assert_allclose(diagnosis.growth, np.log(1.5), rtol=1e-6)


def test_exploding_products_and_a_loss_that_does_not_fall():
    diagnosis = hypergrad.diagnose(quadratic(2.5), jnp.array(0.0), problems.TASK, num_steps=50)
    np.testing.assert_allclose(diagnosis.growth, np.log(1.5), rtol=1e-9)
    assert "Products of Jacobians explode" in words(diagnosis) and "does not fall" in words(diagnosis)
    assert "The rate is too large" in words(diagnosis) and "too small" not in words(diagnosis)


def test_a_loss_that_stays_may_have_a_rate_that_is_too_small():
    diagnosis = hypergrad.diagnose(quadratic(1e-30), jnp.array(0.0), problems.TASK, num_steps=50)
    assert "The rate is too small or too large" in words(diagnosis)


def named_leaves(rate, space=None, constrained=None):
    """The leaves of λ that `diagnose` blames for a run on a quadratic, with SGD and a penalty that is harmless."""
    loop = inner.loop(
        lambda params, hp, batch: (1 + hp["decay"]) * (params**2).sum() / 2,
        lambda hp: optax.sgd(hp["rate"]),
        init=lambda key, hp, data: jnp.ones(3),
    )
    problem, hp = inner.problem(loop, lambda params, hp, batch: (params**2).sum()), {"decay": 0.01, "rate": rate}
    if constrained:
        problem, hp = spaces.constrain(problem, constrained), spaces.to_unconstrained(constrained, hp)
    found = hypergrad.diagnose(problem, hp, problems.TASK, num_steps=50, space=space).findings
    return [(f.what[:9], f.advice[-14:]) for f in found if "likely the cause" in f.what]


def test_the_leaf_that_mends_the_run_is_named():
    wide = {"decay": spaces.interval(1e-3, 1.0), "rate": spaces.interval(1e-3, 1e12, log=True)}
    rate = [("λ['rate']", "smaller value.")]
    assert named_leaves(2.5) == named_leaves(2.5, wide) == named_leaves(2.5, wide, wide) == rate
    assert named_leaves(0.2) == named_leaves(1e10) == []  # nothing to mend; a tenth is still too large
    assert named_leaves(2.5, None, wide) == []  # a tenth of λ is unknown in coordinates without their space
    narrow = wide | {"rate": spaces.interval(1.0, 3.0)}
    assert named_leaves(2.5, narrow, narrow) == []  # a tenth is outside the space


def test_the_leaf_that_mends_the_run_best_is_named_first():
    loop = inner.loop(
        lambda params, hp, batch: (params**2).sum() / 2,
        lambda hp: optax.sgd(hp["first"] * hp["second"]),
        init=lambda key, hp, data: jnp.ones(3),
    )
    for better in ("first", "second"):
        problem = inner.problem(loop, lambda params, hp, batch, better=better: (params**2).sum() + hp[better])
        found = hypergrad.diagnose(problem, {"first": 2.5, "second": 1.0}, problems.TASK, num_steps=50).findings
        leaves = [finding.what.split(" is likely")[0] for finding in found if "likely the cause" in finding.what]
        assert leaves[0] == f"λ['{better}']" and len(leaves) == 2


def test_a_run_that_no_leaf_mends_lists_what_was_tried():
    loop = inner.loop(
        lambda params, hp, batch: (params**2).sum() / 2 + 0 * hp["decay"],
        lambda hp: optax.sgd(hp["rate"]),
        init=lambda key, hp, data: jnp.ones(3),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    wide = {"decay": spaces.interval(1e-3, 0.1), "rate": spaces.interval(1e-3, 1e12, log=True)}
    narrow = {"decay": spaces.interval(0.5, 2.0), "rate": spaces.interval(5e9, 5e10, log=True)}
    signed = {"decay": spaces.interval(-2.0, 2.0), "rate": spaces.real(-1.0)}

    def last(hp, space, in_coordinates=False, pass_space=True):
        run, lam = problem, hp
        if in_coordinates:
            run, lam = spaces.constrain(problem, space), spaces.to_unconstrained(space, hp)
        options = {"num_steps": 50, "space": space if pass_space else None}
        return hypergrad.diagnose(run, lam, problems.TASK, **options).findings[-1].what

    tried = "a tenth of λ['decay'], a tenth of λ['rate'], ten times λ['rate']"
    assert last({"decay": 0.05, "rate": 1e10}, wide) == f"No change of one leaf of λ repairs the run. Tried: {tried}."
    assert last({"decay": 1.0, "rate": 1e10}, narrow) == (
        "No other λ was tried: a tenth and ten times the value of each positive leaf are outside the space."
    )
    assert last({"decay": -1.0, "rate": -1.0}, signed) == "No other λ was tried: no leaf is positive."
    assert last({"decay": 0.05, "rate": 1e10}, wide, True, False) == "No other λ was tried: its space is unknown."


def test_leaves_that_are_not_numbers_are_not_tried():
    loop = inner.loop(
        lambda params, hp, batch: (params**2).sum() / 2,
        lambda hp: optax.sgd(hp["rate"]),
        init=lambda key, hp, data: 1 + jax.random.uniform(hp["key"], (3,)),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    hp = {"key": jax.random.key(0), "rate": 2.5, "width": 3}
    found = hypergrad.diagnose(problem, hp, problems.TASK, num_steps=50).findings
    assert [f.what[:9] for f in found if "likely the cause" in f.what] == ["λ['rate']"]


@pytest.mark.parametrize(("num_leaves", "is_named"), [(8, True), (9, False)])
def test_up_to_eight_leaves_are_tried(num_leaves, is_named):
    loop = inner.loop(
        lambda params, hp, batch: (params**2).sum() / 2,
        lambda hp: optax.sgd(hp[0]),
        init=lambda key, hp, data: jnp.ones(3),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    diagnosis = hypergrad.diagnose(problem, [2.5] * num_leaves, problems.TASK, num_steps=50)
    sentence = "λ[0] is likely the cause: with a tenth of its value, training is finite and the inner loss falls."
    assert (sentence in words(diagnosis)) == is_named
    assert ("λ has 9 positive leaves, and `diagnose` tries at most 8." in words(diagnosis)) != is_named


def test_compilations_and_runs_are_reported(monkeypatch):
    """A terminal shows them next to a bar, which a thread draws again and again."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    problem, latest = quadratic(0.2), time.monotonic() + 20.0
    rule = hypergrad.unrolled(problem, num_steps=2)

    def wait_for(text):
        while text not in terminal.getvalue():
            assert time.monotonic() < latest, terminal.getvalue()
            time.sleep(0.01)

    def outer_loss(*args):
        wait_for("compiling the training run with a perturbation")
        return problem.outer_loss(*args)

    def estimate(*args):
        wait_for("compiling 5 estimates")
        return rule.estimate(*args)

    options = {"num_steps": 50, "estimator": rule._replace(estimate=estimate)}
    hypergrad.diagnose(problem._replace(outer_loss=outer_loss), jnp.array(0.0), problems.TASK, **options)
    assert "2/2" in terminal.getvalue()


def test_a_single_chaotic_step_is_named():
    # θ shrinks by .9 a step, and is multiplied by 1 − .5 · 10 = −4 in one: not enough for products to explode.
    def loss(params, hyperparams, batch, context):
        return jnp.where(context.step == 12, 10.0, 0.2) * (params**2).sum() / 2

    loop = inner.loop(loss, lambda hp: optax.sgd(hp), init=lambda key, hp, data: (jnp.ones(2), None), with_context=True)
    problem = inner.problem(loop, lambda params, hyperparams, batch: params.sum())
    diagnosis = hypergrad.diagnose(problem, jnp.array(0.5), problems.TASK, num_steps=20)
    assert any("chaotic in places: at step 12 a perturbation grows by 4.0" in f.what for f in diagnosis.findings), (
        diagnosis
    )
    np.testing.assert_allclose(np.diff(diagnosis.products)[[10, 11]], np.log([0.9, 4.0]), rtol=1e-9)


def test_divergence_names_the_step():
    diagnosis = hypergrad.diagnose(quadratic(1e10), jnp.array(0.0), problems.TASK, num_steps=50)
    first = int(np.flatnonzero(~np.isfinite(diagnosis.inner_loss))[0])
    assert 0 < first < 50 and f"From step {first} of 50 on" in words(diagnosis)


def test_a_gradient_that_is_not_finite_while_the_loss_is():
    loop = inner.loop(
        lambda params, hp, batch: jnp.sqrt((params**2).sum()),
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: jnp.zeros(3),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    text = words(hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=2))
    assert "Before any step, the inner loss is finite, but its gradient is not." in text
    assert "without a finite derivative" in text and "labels" not in text and "diverges" not in text


def test_a_loss_that_is_not_finite_at_the_start_is_not_called_divergence():
    loop = inner.loop(
        lambda params, hp, batch: optax.losses.softmax_cross_entropy_with_integer_labels(params, batch).mean(),
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: jnp.zeros((2, 3)),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    for labels, is_finite in (([0, 2], True), ([0, 3], False)):  # of three classes
        labels = jnp.array(labels)
        text = words(hypergrad.diagnose(problem, jnp.array(0.0), base.Task(labels, labels), num_steps=2))
        assert ("Look for labels that are not among the classes" in text) != is_finite and "diverges" not in text


def test_an_unconverged_inner_loop():
    diagnosis = hypergrad.diagnose(quadratic(0.01), jnp.array(0.0), problems.TASK, num_steps=50)
    assert "has not converged" in words(diagnosis) and "implicit" in words(diagnosis)


def test_lambda_at_a_bound():
    space = spaces.interval(1e-3, 1.0, log=True)
    for start, is_at_bound in ((0.9999, True), (0.1, False)):
        natural = quadratic(0.2), jnp.array(start)
        in_coordinates = spaces.constrain(natural[0], space), spaces.to_unconstrained(space, natural[1])
        for problem, lam in (natural, in_coordinates):
            diagnosis = hypergrad.diagnose(problem, lam, problems.TASK, num_steps=30, space=space)
            assert ("is at a bound" in words(diagnosis)) == is_at_bound and "the bounds of λ" in diagnosis.checked


@pytest.mark.once
def test_an_unfinished_solve_and_a_dead_leaf():
    estimator = hypergrad.warm_implicit(problems.RIDGE, num_steps=5, adjoint_rate=1e-4)
    diagnosis = hypergrad.diagnose(problems.RIDGE, problems.LAM, problems.TASK, num_steps=60, estimator=estimator)
    assert "The linear solve has not converged: adjoint_residual" in words(diagnosis)
    better = hypergrad.warm_implicit(problems.RIDGE, num_steps=20, adjoint_rate=0.4)
    diagnosis = hypergrad.diagnose(problems.RIDGE, problems.LAM, problems.TASK, num_steps=60, estimator=better)
    assert "linear solve" not in words(diagnosis)

    stopped = problems.RIDGE._replace(outer_loss=lambda params, hp, batch, context: jax.lax.stop_gradient(params).sum())
    dead = hypergrad.unrolled(stopped, num_steps=2)
    diagnosis = hypergrad.diagnose(stopped, problems.LAM, problems.TASK, num_steps=60, estimator=dead)
    assert "The hypergradient of λ['log_penalty'] is zero" in words(diagnosis)


def test_a_residual_is_judged_by_the_gradient_that_it_belongs_to():
    def reporting(metrics):
        def estimate(hyperparams, task, state):
            return base.Estimate(jnp.array(1.0), jnp.ones_like(hyperparams), jnp.array(True), metrics), state

        return base.Estimator(lambda key, hyperparams, task: key, estimate, "biased")

    metrics = {
        "large/adjoint_residual": 1e-3,
        "large/outer_grad_norm": 1e-6,
        "small/adjoint_residual": 20.0,  # small next to a large gradient
        "small/outer_grad_norm": 1e3,
        "adjoint_residual": 0.0,  # nothing to solve
        "outer_grad_norm": 0.0,
        "unknown/residual": 5.0,  # without a scale
        "broken/residual": np.nan,
    }
    estimator = reporting(jax.tree.map(jnp.asarray, metrics))
    report = hypergrad.diagnose(quadratic(0.2), jnp.array(0.0), problems.TASK, num_steps=30, estimator=estimator)
    assert report.checked[-1] == "5 hypergradients of the rule"
    unsolved = [f.what.split(": ")[1].split(" =")[0] for f in report.findings if "linear solve" in f.what]
    assert sorted(unsolved) == ["broken/residual", "large/adjoint_residual"]


def test_a_loss_that_changes_by_rounding_alone_has_converged():
    loop = inner.loop(
        lambda params, hp, batch: 1e6 + (params**2).sum() / 2 * jnp.exp(hp),
        lambda hp: optax.sgd(1e-6),
        init=lambda key, hp, data: jnp.full(3, 1e-3),
    )
    problem = inner.problem(loop, lambda params, hp, batch: (params**2).sum())
    report = hypergrad.diagnose(problem, jnp.array(0.0), problems.TASK, num_steps=40)
    assert "has not converged" not in words(report)


@pytest.mark.once
def test_an_implicit_rule_that_does_not_reach_rest():
    def diagnosed(num_steps):
        estimator = hypergrad.implicit(problems.RIDGE, num_steps=num_steps, warm_start=False)
        options = {"num_steps": 200, "estimator": estimator, "num_estimates": 1}
        return words(hypergrad.diagnose(problems.RIDGE, problems.LAM, problems.TASK, **options))

    assert "far from a stationary point" in diagnosed(2) and "far from a stationary point" not in diagnosed(50)


def test_optimizer_states_and_noise_are_carried():
    diagnosis = hypergrad.diagnose(problems.EVERYTHING, problems.EVERYTHING_LAM, problems.TASK, num_steps=12)
    assert np.isfinite(diagnosis.growth) and diagnosis.inner_loss.shape == (12,)

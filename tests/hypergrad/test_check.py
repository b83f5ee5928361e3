"""The check tells right from wrong, on estimators whose faults are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner
from metaopt.hypergrad import _check

CHECK = functools.partial(hypergrad.check, num_directions=3, num_estimates=30, num_samples=16)
UNROLLED = hypergrad.unrolled(problems.RIDGE, num_steps=5)


def broken(estimator, change, kind=None):
    """An estimator whose hypergradient goes through `change`."""

    def estimate(hyperparams, task, state):
        out, state = estimator.estimate(hyperparams, task, state)
        return out._replace(hypergrad=change(out.hypergrad)), state

    return base.Estimator(estimator.init, estimate, kind or estimator.kind)


def test_a_problem_in_float32_is_checked_in_float64():
    with jax.enable_x64(False):
        lam, task = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (problems.LAM, problems.TASK))
        report = CHECK(UNROLLED, lam, task)
    assert report.passed and report.float32_operations == [] and report.leaves[0].relative_error < 1e-8
    assert report.cosine > 0.999999 and "right" in str(report) and str(report).startswith("passed")


def point_of(estimator, *, num_estimates=30):
    """The hypergradients of ridge regression at λ, and F next to it: one compiled program for several comparisons."""
    options = {"num_estimates": num_estimates, "num_samples": 16, "epsilon": 1e-4, "rtol": 1e-3}
    return _check.evaluated(estimator, problems.LAM, problems.TASK, **options)


def compared(kind, point, change):
    """The check of a hypergradient that went through `change`."""
    return _check.compared(kind, point._replace(grads=list(map(change, point.grads))), num_directions=3, radius=0.1)


def test_a_wrong_hypergradient_fails():
    point = point_of(UNROLLED)
    leaf = "['log_penalty']"
    wrong, dead = f"It is not the derivative of F: {leaf}.", f"F depends on {leaf}, and the hypergradient does not"
    for change, status, message in (
        (lambda h: 1.01 * h, "wrong", wrong),
        (np.zeros_like, "dead", dead),
        (
            lambda h: np.where(np.arange(problems.NUM_FEATURES) == 0, np.nan, h),
            "not finite",
            f"The hypergradient of {leaf}, or F, is not finite",
        ),
        (lambda h: -h, "wrong", wrong),
    ):
        report = compared("exact", point, change)
        assert not report.passed and [leaf.status for leaf in report.leaves] == [status]
        assert report.message.startswith(message)
    assert compared("exact", point, lambda h: h).message == "No problem was found."
    # A pseudo-gradient only has to be finite.
    assert compared("pseudo", point, np.zeros_like).passed
    assert not compared("pseudo", point, lambda h: np.inf * h).passed


def test_a_leaf_that_nothing_uses_is_zero_and_no_fault():
    problem = problems.RIDGE._replace(
        outer_loss=lambda params, hp, batch, context: problems.mean_squares(params, batch) + 0 * hp["log_penalty"].sum()
    )
    estimator = hypergrad.unrolled(problem, num_steps=0)  # zero steps: only f sees λ, times 0
    report = CHECK(estimator, problems.LAM, problems.TASK)
    assert report.passed and report.leaves[0].status == "zero" and "does not depend on" in report.message


def test_parameters_held_in_float32_are_checked_in_float64():
    target = np.linspace(0, 1, problems.NUM_FEATURES, dtype=np.float32)

    def loss(params, hyperparams, batch):
        narrow = (params["narrow"] ** 2).sum().astype(float)
        return ((params["wide"] - target) ** 2 * jnp.exp(hyperparams)).sum() + narrow

    def init(key, hyperparams, data):
        return {"wide": jnp.zeros(problems.NUM_FEATURES), "narrow": jnp.ones(2, jnp.float32)}

    loop = inner.loop(loss, lambda hp: optax.sgd(0.1 * jnp.exp(hp)), init=init)
    problem = inner.problem(loop, lambda params, hp, batch: sum((x**2).sum().astype(float) for x in params.values()))
    for estimator in (
        hypergrad.unrolled(problem, num_steps=2),
        hypergrad.lookahead(problem, commit=0)._replace(kind="exact"),
    ):
        report = CHECK(estimator, jnp.array(0.1), problems.TASK)
        assert report.passed and report.float32_operations == [] and report.leaves[0].relative_error < 1e-8


@pytest.mark.once
def test_a_biased_rule_is_compared_with_the_hypergradient_that_it_approximates():
    converged = hypergrad.warm_implicit(problems.RIDGE, num_steps=20, adjoint_rate=0.4)
    report = CHECK(converged, problems.LAM, problems.TASK)
    assert report.passed and report.leaves[0].status == "right"
    early = hypergrad.warm_implicit(problems.RIDGE, num_steps=1, adjoint_rate=0.01)
    point = point_of(early, num_estimates=2)
    report = compared("biased", point, lambda h: h)
    assert report.leaves[0].status == "wrong" and report.leaves[0].relative_error > 0.1
    # Uphill, though: that is all that its kind promises.
    assert report.passed and report.cosine > 0
    assert not compared("biased", point, lambda h: -h).passed


@pytest.mark.once
def test_an_unbiased_rule_is_judged_by_its_own_spread():
    point = point_of(UNROLLED._replace(kind="unbiased"))
    normals = np.random.default_rng(0).normal(size=(16, problems.NUM_FEATURES))
    assert point.grads[0].shape == normals.shape
    assert compared("unbiased", point, lambda h: h + 0.002 * normals).passed
    report = compared("unbiased", point, lambda h: h + 0.002 * normals + 0.01)
    assert report.verdict == "failed" and report.leaves[0].standard_error > 0
    report = compared("unbiased", point, lambda h: h + normals)
    assert report.verdict == "inconclusive" and "num_samples" in report.message


ROLLED = {"num_steps": 6, "truncation_length": 2, "sigma": 0.1, "num_pairs": 4}


@pytest.mark.once
def test_an_unbiased_rule_is_judged_over_its_whole_episode():
    # In the first window these are the same rule; later windows differ.
    persistent = hypergrad.persistent_es(problems.RIDGE, **ROLLED)
    assert CHECK(persistent, problems.LAM, problems.TASK).passed

    def late(hyperparams, task, state):
        out, after = persistent.estimate(hyperparams, task, state)
        scale = jnp.where(out.metrics["inner_steps"] > 2, 100.0, 1.0)
        return out._replace(hypergrad=jax.tree.map(lambda h: scale * h, out.hypergrad)), after

    assert not CHECK(base.Estimator(persistent.init, late, "unbiased"), problems.LAM, problems.TASK).passed


@pytest.mark.once
def test_a_biased_rule_with_random_estimates_is_averaged_over_keys():
    def windows(problem):
        return hypergrad.truncated_es(problem, num_steps=4, truncation_length=4, sigma=0.1, num_pairs=1)

    rule = windows(problems.RIDGE)
    report = CHECK(rule, problems.LAM, problems.TASK)
    assert rule.kind == "biased" and report.leaves[0].standard_error > 0
    starts = [rule.init(k, problems.LAM, problems.TASK) for k in jax.random.split(jax.random.key(0), 16)]
    values = [rule.estimate(problems.LAM, problems.TASK, start)[0].value for start in starts]
    assert report.value == pytest.approx(float(np.mean(values)), rel=1e-9)
    part = hypergrad.partition(problems.RIDGE, {"es": windows}, {"log_penalty": "es"})
    assert CHECK(part, problems.LAM, problems.TASK).leaves[0].standard_error > 0


@pytest.mark.parametrize(("noise", "verdict"), [(0.1, "passed"), (100.0, "inconclusive")])
def test_noise_does_not_decide_whether_a_biased_rule_points_uphill(noise, verdict):
    def estimate(h, task, key):
        noisy = 3 * h + noise * jax.random.normal(key, h.shape)  # the gradient is 2 h
        return base.Estimate((h**2).sum(), noisy, jnp.array(True), {"sampling_variance": noise**2 * h.size}), key

    rule, h = base.Estimator(lambda key, h, task: key, estimate, kind="biased"), jnp.ones(20)
    for seed in range(3):
        report = CHECK(rule, h, problems.TASK, key=jax.random.key(seed))
        assert report.verdict == verdict and ("too noisy" in report.message) == (verdict == "inconclusive")


def test_the_message_names_the_bias_and_a_wrong_sign():
    def check(hypergrad_of):
        return CHECK(of_function(lambda h: (h**2).sum(), hypergrad_of)._replace(kind="biased"), h, problems.TASK)

    h = jnp.array([0.7, 0.1])
    assert check(lambda h: 2 * h).message == "No problem was found."
    report = check(lambda h: 3 * h)
    assert report.passed and report.message == "The relative errors of λ show the bias of the rule."
    assert "The hypergradient of λ has the wrong sign" in check(lambda h: -3 * h).message


def test_a_biased_rule_ends_with_its_horizon():
    # After the full horizon the whole run counts, and nothing of the next: a window of all steps is exact.
    whole = hypergrad.truncated(problems.RIDGE, num_steps=4, truncation_length=4)._replace(kind="biased")
    report = CHECK(whole, problems.LAM, problems.TASK)
    assert report.leaves[0].status == "right" and report.leaves[0].relative_error < 1e-6
    value = (
        hypergrad.unrolled(problems.RIDGE, num_steps=4)
        .estimate(problems.LAM, problems.TASK, jax.random.key(0))[0]
        .value
    )
    np.testing.assert_allclose(report.value, value, rtol=1e-12)


def test_roughness_at_the_scale_of_the_differences_does_not_pass():
    def estimate(hyperparams, task, state):
        value = jnp.sin(1e5 * hyperparams).sum()
        return base.Estimate(value, jnp.full_like(hyperparams, 1e-9), jnp.array(True), {}), state

    rough = base.Estimator(lambda key, hyperparams, task: key, estimate, "exact")
    report = hypergrad.check(rough, jnp.array([0.3]), problems.TASK)
    # Small steps resolve the waves, whose slope is about 1e5.
    assert report.verdict == "failed" and report.leaves[0].status == "wrong"


def test_a_callback_in_float32_is_named_and_judged_by_its_rounding():
    @jax.custom_jvp
    def sine(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.pure_callback(np.sin, shape, x.astype(jnp.float32)).astype(x.dtype)

    sine.defjvps(lambda t, _, x: jnp.cos(x) * t)

    def estimate(hyperparams, task, state):
        value, grad = jax.value_and_grad(lambda h: jnp.asarray(jnp.exp(sine(h)).sum()))(hyperparams)
        return base.Estimate(value, grad, jnp.array(True), {}), state

    estimator = base.Estimator(lambda key, hyperparams, task: key, estimate, "exact")
    report = CHECK(estimator, jnp.array([0.3, 0.7]), problems.TASK)
    assert report.passed and "pure_callback" in report.float32_operations[0] and "pure_callback" in report.message
    assert CHECK(broken(estimator, lambda h: 1.02 * h), jnp.array([0.3, 0.7]), problems.TASK).verdict == "failed"


def of_function(fn, grad=None):
    """An exact estimator of a function of λ, with `grad` as its hypergradient."""

    def estimate(hyperparams, task, state):
        value, slope = jax.value_and_grad(fn)(hyperparams)
        return base.Estimate(value, slope if grad is None else grad(hyperparams), jnp.array(True), {}), state

    return base.Estimator(lambda key, hyperparams, task: key, estimate, "exact")


@pytest.mark.parametrize(("lam", "unit"), [(2.4e-7, 1.0), (0.0, 1.0), (1e-12, 1.0), (-1e-5, 1e-5)])
def test_a_leaf_near_zero_moves_by_a_step_that_shows(lam, unit):
    fn = lambda h: 3.0 + 0.01 * jnp.sin(h)
    report = CHECK(of_function(fn), jnp.array(lam), problems.TASK)
    assert report.passed and report.leaves[0].status == "right"
    np.testing.assert_allclose(abs(report.leaves[0].finite_difference), 0.01 * unit, rtol=1e-4)
    wrong = CHECK(of_function(fn, lambda h: 0.0102 * jnp.cos(h)), jnp.array(lam), problems.TASK)
    assert wrong.verdict == "failed" and wrong.leaves[0].status == "wrong"


def test_a_slope_of_rounding_errors_is_zero():
    rows = jnp.array([0.3, 1.7, 2.9])
    report = CHECK(of_function(lambda h: jnp.var(rows + h), lambda h: 1e-17 * h), jnp.array(0.7), problems.TASK)
    assert report.passed and report.leaves[0].status == "zero"


def test_a_kink_near_lambda_is_avoided_and_reported():
    report = CHECK(of_function(lambda h: h + 5 * jax.nn.relu(h - 1.00001)), jnp.array(1.0), problems.TASK)
    assert report.passed and "kink or a sharp bend within 0.0001" in report.leaves[0].note and "kink" in report.message
    np.testing.assert_allclose(report.leaves[0].finite_difference, report.leaves[0].hypergrad, rtol=1e-6)


@pytest.mark.parametrize("num_draws", [300, 3_000, 100_000])
def test_a_random_mask_whose_rate_is_in_lambda_is_reported(num_draws):
    """F is about (scale · h − 2) h. Between the jumps, its slope has the wrong sign, or is zero."""
    draws = jax.random.uniform(jax.random.key(0), (num_draws,))
    wrong_sign, zero = (
        CHECK(of_function(lambda h, scale=scale: (scale * h - 2.0) * (draws < h).mean()), jnp.array(0.4), problems.TASK)
        for scale in (1.0, 0.0)
    )
    assert wrong_sign.passed and "F jumps" in wrong_sign.message and "random mask" in wrong_sign.message
    assert not zero.passed and zero.leaves[0].status in ("dead", "inconclusive")


def test_jumps_against_the_slope_are_seen():
    draws = jax.random.uniform(jax.random.key(0), (100_000,))
    report = CHECK(of_function(lambda h: h - 0.8 * (draws < h).mean()), jnp.array(0.4), problems.TASK)
    assert "F jumps: its slope is 0.4 between the jumps, and 0.0793 over" in report.message


SMALL = {
    "one small jump": lambda h: 3 * h + 1e-6 * (h > 1.00001),
    "a small jump near an optimum": lambda h: 3 * (h - 1.00001) ** 2 + 0.1 * (h - 1) ** 3 + 1e-7 * (h > 1.00001),
    "a small jump near the end of the domain": lambda h: 3 * h + 1e-6 * (h > 1.00001) + 0 * jnp.sqrt(1.05 - h),
    "a kink with another slope behind it": lambda h: h + 50 * jax.nn.relu(h - 1.00001),
    "waves that eight points miss": lambda h: jnp.sin(400 * h) + h,
    "a cubic near its optimum": lambda h: (h - 1.01) ** 2 + 40 * (h - 1.01) ** 3,
}


@pytest.mark.parametrize("name", SMALL)
def test_small_jumps_kinks_and_curvature_pass(name):
    report = CHECK(of_function(SMALL[name]), jnp.array(1.0), problems.TASK)
    assert report.passed and report.leaves[0].status == "right" and "jumps" not in report.message


@pytest.mark.parametrize(("slope", "status"), [(0.5, "inconclusive"), (2.0, "inconclusive"), (4.5, "wrong")])
def test_a_kink_at_lambda_is_inconclusive_unless_the_slope_is_on_neither_side(slope, status):
    # The slopes are 0 on the left and 2 on the right.
    report = CHECK(of_function(lambda h: jnp.abs(h - 1) + h, lambda h: slope), jnp.array(1.0), problems.TASK)
    assert report.leaves[0].status == status
    if status == "inconclusive":
        assert report.verdict == "inconclusive" and not report.passed and str(report).startswith("INCONCLUSIVE")
        assert "kink at λ" in report.message and "another λ" in report.message


def test_noise_in_the_loss_is_inconclusive_and_measured():
    def noisy(h):
        return h + 1e-4 * jax.lax.stop_gradient(jnp.sin(1e15 * h))

    report = CHECK(of_function(noisy), jnp.array(0.7), problems.TASK)
    assert report.verdict == "inconclusive" and "noise of" in report.message and "hidden" in report.message
    amplitude = float(report.leaves[0].note.split("noise of ")[1].split(" ")[0])
    assert 1e-5 < amplitude < 1e-3
    # An error beyond the noise is found all the same.
    assert CHECK(of_function(noisy, lambda h: -h), jnp.array(0.7), problems.TASK).verdict == "failed"
    biased = of_function(noisy)._replace(kind="biased")
    assert CHECK(biased, jnp.array(0.7), problems.TASK).passed  # uphill it is, whatever the noise


def test_a_biased_rule_whose_direction_is_hidden_by_noise_is_inconclusive():
    rough = of_function(lambda h: jnp.sin(1e15 * h) + 1e-9 * h, lambda h: jnp.ones_like(h))._replace(kind="biased")
    report = CHECK(rough, jnp.array(0.7), problems.TASK)
    assert report.verdict == "inconclusive" and "too rough to decide" in report.message


def test_metasmoothness_falls_where_the_slope_does_not_last():
    def estimator(frequency):
        def init(key, hyperparams, task):
            return key

        def estimate(hyperparams, task, state):
            value, slope = jax.value_and_grad(lambda h: jnp.sin(frequency * h).sum() + h.sum())(hyperparams)
            return base.Estimate(value, slope, jnp.array(True), {}), state

        return base.Estimator(init, estimate, "exact")

    smooth, rough = (hypergrad.check(estimator(f), jnp.linspace(1.0, 2.0, 5), problems.TASK) for f in (0.1, 500.0))
    assert smooth.passed and smooth.metasmoothness > 0.99
    assert rough.metasmoothness < 0.5 and "rough" in rough.message


def test_the_hypergradient_is_computed_once():
    calls = []

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    def cosine(x):
        calls.append(None)
        return np.cos(x)

    shape = jax.ShapeDtypeStruct((), jnp.float64)
    sine.defjvps(lambda t, _, x: jax.pure_callback(cosine, shape, x) * t)
    report = CHECK(of_function(sine), jnp.array(0.7), problems.TASK)
    assert report.passed and len(calls) == 1

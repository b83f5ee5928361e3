"""Fine-tuning: the best λ of those visited, never worse than the start by its own measure."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, spaces, training

KEY = jax.random.key(0)
TASK = base.Task(jnp.zeros(1), jnp.array(1.0))


def quadratic(noise=0.0, bad=lambda hyperparams: False):
    """F(λ) = (λ − valid)² + noise; NaN where λ is bad."""

    def estimate(hyperparams, task, state):
        f, grads = jax.value_and_grad(lambda x: (x - task.valid) ** 2)(hyperparams)
        f = jnp.where(bad(hyperparams), jnp.nan, f + noise * jax.random.normal(state))
        grads = jnp.where(bad(hyperparams), jnp.nan, grads)
        return base.Estimate(f, grads, jnp.array(True), {}), jax.random.fold_in(state, 0)

    return base.Estimator(lambda key, hyperparams, task: key, estimate, kind="exact")


def test_every_value_is_that_of_the_lambda_visited():
    tuned = jax.jit(training.fine_tune(quadratic(), num_steps=3, optimizer=optax.sgd(0.25)))(KEY, 3.0, TASK)
    expected = [4.0, 1.0, 0.25, 0.0625]  # λ − 1 halves at every step
    np.testing.assert_allclose(tuned.values, expected)
    assert (tuned.step, tuned.value, tuned.hyperparams) == (3, 0.0625, 1.25)


def test_steps_and_the_last_value_share_one_trace():
    rule, traces = quadratic(), []

    def estimate(*args):
        traces.append(args)
        return rule.estimate(*args)

    tune = training.fine_tune(rule._replace(estimate=estimate), num_steps=3)
    jax.eval_shape(jax.vmap(tune, (0, None, None)), jax.random.split(KEY, 2), 3.0, TASK)
    assert len(traces) == 1


def test_each_call_outside_jit_sees_what_the_loss_then_reads():
    rule, factor = quadratic(), 1.0

    def estimate(*args):
        out, state = rule.estimate(*args)
        return out._replace(value=factor * out.value), state

    tune = training.fine_tune(rule._replace(estimate=estimate), num_steps=1, optimizer=optax.sgd(0.25))
    np.testing.assert_allclose(tune(KEY, 3.0, TASK).values, [4.0, 1.0])
    factor = 10.0
    np.testing.assert_allclose(tune(KEY, 3.0, TASK).values, [40.0, 10.0])


@pytest.mark.once
def test_keeps_the_best_and_not_the_last():
    # The error changes sign and doubles: 1, 4, 16 ...
    tuned = training.fine_tune(quadratic(), num_steps=3, optimizer=optax.sgd(1.5))(KEY, 2.0, TASK)
    np.testing.assert_allclose(tuned.values, [1, 4, 16, 64])
    assert (tuned.step, tuned.value, tuned.hyperparams) == (0, 1.0, 2.0)
    # With a schedule that overshoots once: 1, 4, 0, 0.
    schedule = optax.piecewise_constant_schedule(1.5, {1: 1 / 3})
    tuned = training.fine_tune(quadratic(), num_steps=3, optimizer=optax.sgd(schedule))(KEY, 2.0, TASK)
    assert (tuned.step, tuned.value, tuned.hyperparams) == (2, 0.0, 1.0)


@pytest.mark.once
def test_never_worse_than_the_start():
    tune = training.fine_tune(quadratic(noise=3.0), num_steps=4, same_key=False)
    tune = jax.jit(jax.vmap(tune, (0, 0, None)))
    tuned = tune(jax.random.split(KEY, 50), jnp.linspace(-2, 4, 50), TASK)
    assert (tuned.value <= tuned.values[:, 0]).all()
    np.testing.assert_array_equal(tuned.value, tuned.values.min(axis=1))
    assert len(set(tuned.step.tolist())) > 2


@pytest.mark.once
def test_values_are_compared_under_one_key():
    same, new = (
        training.fine_tune(quadratic(noise=3.0), num_steps=4, optimizer=optax.sgd(0.25), same_key=same_key)
        for same_key in (True, False)
    )
    exact = 4.0 * 0.25 ** np.arange(5)
    for seed in range(5):
        tuned = jax.jit(same)(jax.random.key(seed), 3.0, TASK)
        noise = tuned.values - exact
        np.testing.assert_allclose(noise, np.full(5, noise[0]), rtol=1e-9)  # it cancels
        assert tuned.step == 4 and noise[0] != 0
        assert len(set((jax.jit(new)(jax.random.key(seed), 3.0, TASK).values - exact).round(6).tolist())) == 5
    default = training.fine_tune(quadratic(noise=3.0), num_steps=4, optimizer=optax.sgd(0.25))
    np.testing.assert_array_equal(jax.jit(default)(jax.random.key(4), 3.0, TASK).values, tuned.values)
    other_key = jax.jit(same)(jax.random.key(0), 3.0, TASK).values
    assert other_key[0] != tuned.values[0]  # another key, another noise


@pytest.mark.once
@pytest.mark.parametrize("same_key", [True, False])
def test_every_horizon_starts_with_the_same_key(same_key):
    """The problem has a random start, random batches and noise in the loss. λ does not change."""
    for estimator in (
        hypergrad.unrolled(problems.NOISY, num_steps=2),
        hypergrad.truncated(problems.NOISY, num_steps=4, truncation_length=2),
    ):
        tune = training.fine_tune(estimator, num_steps=4, optimizer=optax.sgd(0.0), same_key=same_key)
        values = jax.jit(tune)(KEY, 0.7, problems.NOISY_TASK).values
        values = values[np.isfinite(values)]
        assert len(values) in (5, 2)
        assert (np.ptp(values) < 1e-12) == same_key


def test_the_first_and_the_last_training_run_share_no_key():
    keys = []

    def init(key, hyperparams, task):
        if not isinstance(key, jax.core.Tracer):  # those of renewed slots
            keys.append(key)
        return key

    training.fine_tune(quadratic()._replace(init=init), num_steps=1, same_key=False)(KEY, 3.0, TASK)
    assert len(keys) == 2
    families = [jnp.stack([key, *jax.random.split(key)]) for key in keys]  # a key, and those derived from it
    first, last = ({tuple(bits) for bits in jax.random.key_data(family).tolist()} for family in families)
    assert not first & last


def test_no_steps_return_the_start():
    tuned = jax.jit(training.fine_tune(quadratic(), num_steps=0))(KEY, 3.0, TASK)
    assert (tuned.step, tuned.value, tuned.hyperparams) == (0, 4.0, 3.0)
    assert tuned.values.shape == (1,)


def test_values_that_are_not_finite_are_never_the_best():
    # λ goes 3, 2, 1.5 ...; it is bad below 2.5, and stays where the hypergradient is not finite.
    tune = training.fine_tune(quadratic(bad=lambda x: x < 2.5), num_steps=3, optimizer=optax.sgd(0.25))
    tuned = tune(KEY, 3.0, TASK)
    assert (tuned.step, tuned.value, tuned.hyperparams) == (0, 4.0, 3.0)
    assert np.isnan(tuned.values).tolist() == [False, True, True, True]
    all_bad = tune(KEY, 1.0, TASK)
    assert np.isnan(all_bad.value) and all_bad.step == 0 and all_bad.hyperparams == 1.0


@pytest.mark.once
def test_in_its_space_over_tasks_and_better():
    tune = training.fine_tune(problems.DISTANCE, num_steps=4, optimizer=optax.adam(0.5))
    tasks = problems.DISTANCE_TASKS
    start = spaces.to_unconstrained(problems.SPACE, {"penalty": jnp.array([0.1, 0.5, 1.0, 2.0])})
    starts = jax.tree.map(lambda x: jnp.stack([x, x + 0.1, x - 0.1]), start)
    keys = jax.random.split(KEY, 3)
    batched = jax.jit(jax.vmap(tune))(keys, starts, problems.stack(tasks))
    one = jax.jit(tune)
    singles = [one(keys[i], jax.tree.map(lambda x, i=i: x[i], starts), tasks[i]) for i in range(3)]
    chex.assert_trees_all_close(batched, problems.stack(singles), rtol=1e-8)
    assert (spaces.to_constrained(problems.SPACE | {}, singles[0].hyperparams)["penalty"] > 0).all()
    assert (batched.value < batched.values[:, 0]).all()
    assert batched.step.dtype == jnp.int32


@pytest.mark.once
def test_with_its_space_it_takes_and_returns_natural_units():
    start, task = {"penalty": jnp.array([0.1, 0.5, 1.0, 2.0])}, problems.DISTANCE_TASKS[0]
    coordinates = spaces.to_unconstrained(problems.SPACE, start)
    expected = jax.jit(training.fine_tune(problems.DISTANCE, num_steps=2))(KEY, coordinates, task)
    tune = jax.jit(training.fine_tune(problems.DISTANCE, num_steps=2, space=problems.SPACE))
    for initial in (start, coordinates):  # λ, or unconstrained coordinates, as a predictor returns them
        tuned = tune(KEY, initial, task)
        penalty = 0.3 * np.exp(expected.hyperparams.coordinates["penalty"])  # λ = default · exp(z)
        np.testing.assert_allclose(tuned.hyperparams["penalty"], penalty, rtol=1e-12)
        np.testing.assert_allclose(tuned.values, expected.values, rtol=1e-12)
    assert (tuned.hyperparams["penalty"] != start["penalty"]).any()
    # A traced λ outside its space cannot raise: nothing is finite.
    outside = tune(KEY, {"penalty": -start["penalty"]}, task)
    assert np.isnan(outside.hyperparams["penalty"]).all() and np.isnan(outside.values).all()


def test_float32_stays_float32():
    with jax.enable_x64(False):
        tuned = jax.jit(training.fine_tune(quadratic(), num_steps=2))(
            KEY, np.float32(3), base.Task(np.zeros(1, np.float32), np.float32(1))
        )
        assert [leaf.dtype.name for leaf in tuned] == ["float32", "float32", "int32", "float32"]


def test_an_implicit_rule_far_from_rest_is_reported(caplog):
    slow = inner.loop(
        lambda theta, lam, data: ((theta - lam) ** 2).sum(), lambda lam: optax.sgd(0.01), init=lambda *_: jnp.zeros(1)
    )
    task = base.Task(None, jnp.ones(1))
    for num_steps, is_far in ((600, False), (2, True)):
        rule = hypergrad.implicit(
            inner.problem(slow, lambda theta, lam, data: ((theta - data) ** 2).sum()), num_steps=num_steps
        )
        training.fine_tune(rule, num_steps=2)(KEY, 3.0, task)
        assert ("An implicit rule runs far from a stationary point" in caplog.text) == is_far


def test_a_linear_solve_that_makes_the_residual_larger_is_reported(caplog):
    """At the second product, conjugate gradients see the negative eigenvalue, and return the step before it."""
    for curvature, is_useless in ((0.5, False), (-0.5, True)):
        loop = inner.loop(
            lambda theta, lam, data, c=curvature: (theta[0] ** 2 + c * theta[1] ** 2) / 2 + lam * theta[0],
            lambda lam: optax.sgd(0.1),
            init=lambda *_: jnp.zeros(2),
        )
        rule = hypergrad.implicit(inner.problem(loop, lambda theta, lam, data: theta @ data), num_steps=1)
        training.fine_tune(rule, num_steps=2)(KEY, 0.1, base.Task(None, jnp.array([1.0, 1.3])))
        assert ("The linear solve of an implicit rule left a larger residual" in caplog.text) == is_useless
        assert "far from a stationary point" not in caplog.text


def test_a_rule_that_carries_training_returns_its_last_lambda():
    """Its values fall because θ is trained: they say nothing about which λ is best."""
    estimator = hypergrad.lookahead(problems.RIDGE, commit=1, num_steps=1)
    start = {"log_penalty": jnp.full(problems.NUM_FEATURES, 3.0)}
    tuned = jax.jit(training.fine_tune(estimator, num_steps=4))(KEY, start, problems.TASK)
    assert np.isnan(tuned.values).tolist() == [True] * 4 + [False] and tuned.step == 4
    assert (jnp.abs(tuned.hyperparams["log_penalty"] - 3.0) > 0.1).all()


@pytest.mark.once
def test_the_last_value_counts_only_where_it_ended_a_horizon():
    """Training overfits, so that F is small early in it; the horizon is 4 estimates."""
    estimator = hypergrad.truncated(problems.RIDGE, num_steps=8, truncation_length=2)
    start = {"log_penalty": jnp.full(problems.NUM_FEATURES, 3.0)}
    tuned = jax.jit(training.fine_tune(estimator, num_steps=8))(KEY, start, problems.TASK)
    assert np.isfinite(tuned.values).tolist() == [False, False, False, True] * 2 + [False]
    assert tuned.step == 3 + 4 * (tuned.values[7] < tuned.values[3]) and tuned.value == tuned.values[tuned.step]

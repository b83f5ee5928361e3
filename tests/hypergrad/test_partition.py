"""Estimators by leaf: rates by unrolling and penalties implicitly, at the current value of each other."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, inner, predictors, spaces

KEY = jax.random.key(0)
NUM_STEPS = 6
LOOP = inner.loop(problems.penalized, lambda hyperparams: optax.sgd(hyperparams["rate"]), init=problems.zeros)
PROBLEM = inner.problem(LOOP, lambda params, hyperparams, batch: problems.mean_squares(params, batch))
LAM = {"rate": jnp.array(0.3), "penalty": jnp.array([0.5, 0.1, 0.3, 0.8])}
UNROLLED = partial(hypergrad.unrolled, num_steps=NUM_STEPS)
IMPLICIT = partial(hypergrad.warm_implicit, num_steps=40, adjoint_rate=0.3)
TRUNCATED = partial(hypergrad.truncated, num_steps=4, truncation_length=2)
LABELS = {"rate": "unrolled", "penalty": "implicit"}


def hessian(lam):
    x = problems.TASK.train["x"]
    return x.T @ x / len(x) + jnp.diag(lam["penalty"])


def solution(lam):
    """θ* of ridge."""
    x, y = problems.TASK.train["x"], problems.TASK.train["y"]
    return jnp.linalg.solve(hessian(lam), x.T @ y / len(y))


def trained(lam):
    """θ_T of gradient descent from zero."""
    shrunk = jnp.linalg.matrix_power(jnp.eye(problems.NUM_FEATURES) - lam["rate"] * hessian(lam), NUM_STEPS)
    return solution(lam) - shrunk @ solution(lam)


def outer_of(theta):
    return lambda lam: problems.mean_squares(theta(lam), problems.TASK.valid)


@pytest.mark.once
def test_each_leaf_has_its_closed_form_at_the_current_value_of_the_others():
    estimator = hypergrad.partition(PROBLEM, {"unrolled": UNROLLED, "implicit": IMPLICIT}, LABELS)
    estimate, state = jax.jit(estimator.estimate), estimator.init(KEY, LAM, problems.TASK)
    for lam in (LAM, {"rate": jnp.array(0.2), "penalty": 1.5 * LAM["penalty"]}):
        for _ in range(8):  # θ and v of the implicit rule converge
            out, state = estimate(lam, problems.TASK, state)
        value, unrolled = jax.value_and_grad(outer_of(trained))(lam)
        implicit = jax.grad(outer_of(solution))(lam)
        assert abs(unrolled["rate"]) > 1e-4 and optax.tree.norm(implicit["penalty"]) > 1e-3
        # The other rule gives another hypergradient.
        assert optax.tree.norm(optax.tree.sub(unrolled, implicit)["penalty"]) > 1e-4
        np.testing.assert_allclose(out.value, value, rtol=1e-10)
        np.testing.assert_allclose(out.hypergrad["rate"], unrolled["rate"], rtol=1e-9)
        np.testing.assert_allclose(out.hypergrad["penalty"], implicit["penalty"], rtol=1e-8)
    assert {"unrolled/value", "implicit/value", "implicit/adjoint_residual"} <= set(out.metrics)
    assert (estimator.kind, bool(out.done)) == ("biased", False)


@pytest.mark.once
def test_a_wrapped_partition_is_a_partition_of_the_wrapped():
    # In unconstrained coordinates, with a fixed leaf, a predictor and a batch of tasks; labels by path.
    space = {"rate": spaces.positive(0.3), "penalty": spaces.positive(0.3, shape=(4,)), "extra": spaces.fixed(1.0)}
    problem = spaces.constrain(PROBLEM, space)
    predictor = predictors.mlp(space, 2)
    rules = {"a": UNROLLED, "b": partial(hypergrad.forward, num_steps=NUM_STEPS)}
    batch = problems.stack([problems.regression_task(seed) for seed in range(2)])
    weights = predictor.init(KEY)

    def estimate(single):
        estimator = hypergrad.over_tasks(predictors.amortize(hypergrad.over_seeds(single, 2), predictor))
        return jax.jit(lambda w: estimator.estimate(w, batch, estimator.init(KEY, w, batch))[0])(weights)

    # Both rules are exact and there is no noise, so one rule for all leaves equals two rules by leaf.
    expected = estimate(UNROLLED(problem))
    assert optax.tree.norm(expected.hypergrad) > 1e-3
    split = hypergrad.partition(problem, rules, lambda path: "a" if path == "rate" else "b")
    assert split.kind == "exact"
    out = estimate(split)
    chex.assert_trees_all_close(out.hypergrad, expected.hypergrad, rtol=1e-9, atol=1e-13)
    assert out.done.all()
    # Labels as a tree are structured like λ, without the mark of coordinates.
    by_tree = hypergrad.partition(problem, rules, {"rate": "a", "penalty": "b", "extra": "b"})
    z = spaces.to_unconstrained(space, spaces.default(space))
    shapes = [jax.eval_shape(rule.init, KEY, z, problems.TASK) for rule in (by_tree, split)]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])


@pytest.mark.once
def test_one_label_is_that_estimator():
    for make in (UNROLLED, TRUNCATED):
        whole, alone = hypergrad.partition(PROBLEM, {"all": make}, "all"), make(PROBLEM)
        assert whole.kind == alone.kind
        state = whole.init(KEY, LAM, problems.TASK)
        expected_state = alone.init(jax.random.split(KEY)[0], LAM, problems.TASK)
        estimate, expected_estimate = jax.jit(whole.estimate), jax.jit(alone.estimate)
        for _ in range(2):
            (out, state), (expected, expected_state) = (
                estimate(LAM, problems.TASK, state),
                expected_estimate(LAM, problems.TASK, expected_state),
            )
            chex.assert_trees_all_close(out[:3], expected[:3], rtol=1e-12)


@pytest.mark.once
def test_an_estimator_that_ends_before_the_others_starts_afresh():
    rules = {"unrolled": UNROLLED, "implicit": TRUNCATED}
    estimator = hypergrad.partition(PROBLEM, rules, LABELS)
    estimate, state = jax.jit(estimator.estimate), estimator.init(KEY, LAM, problems.TASK)
    is_done = []
    for _ in range(2):
        out, state = estimate(LAM, problems.TASK, state)
        is_done.append(bool(out.done))
    assert is_done == [False, True]  # the slot ends with the longest horizon
    never = hypergrad.partition(PROBLEM, {"unrolled": TRUNCATED, "implicit": IMPLICIT}, LABELS)
    estimate, state = jax.jit(never.estimate), never.init(KEY, LAM, problems.TASK)
    unrolled_steps, implicit_steps = [], []
    for _ in range(5):
        out, state = estimate(LAM, problems.TASK, state)
        assert not out.done
        unrolled_steps.append(int(out.metrics["unrolled/inner_steps"]))
        implicit_steps.append(int(state.states["implicit"].inner.step))
    assert unrolled_steps == [2, 4, 2, 4, 2] and implicit_steps == [40, 80, 120, 160, 200]

"""Warm-started implicit hypergradients: warm starts, what they refuse and by what name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, predictors, spaces

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


def test_refuses_a_rate_and_an_initialization_by_name():
    with pytest.raises(ValueError, match=r"cannot answer for the leaves \['rate'\], \['start'\] of λ.*unrolled"):
        implicit(problem()).init(KEY, LAM, problems.TASK)


@pytest.mark.parametrize("name", ["rate", "start"])
def test_refuses_in_other_coordinates_and_batched(name):
    space = {name_: spaces.positive(jnp.asarray(value), shape=value.shape) for name_, value in LAM.items()}
    space = {name_: leaf if name_ in (name, "penalty") else spaces.fixed(LAM[name_]) for name_, leaf in space.items()}
    estimator = hypergrad.over_tasks(implicit(spaces.constrain(problem(), space)))
    unconstrained = spaces.to_unconstrained(space, LAM)
    with pytest.raises(ValueError, match=rf"cannot answer for the leaves \['{name}'\] of λ"):
        estimator.init(KEY, unconstrained, problems.stack([problems.TASK]))
    space[name] = spaces.fixed(LAM[name])
    estimator = implicit(spaces.constrain(problem(), space))
    estimator.init(KEY, spaces.to_unconstrained(space, LAM), problems.TASK)  # fixed, it is no longer asked for


def test_refuses_a_leaf_that_no_gradient_of_the_inner_loss_sees():
    # λ adds to g, and so ∇θ g does not depend on it.
    shifted = problem(lambda params, hp, batch: problems.penalized(params, hp, batch) + hp["start"])
    with pytest.raises(ValueError, match=r"\['start'\]"):
        implicit(shifted).init(KEY, LAM, problems.TASK)


def test_answers_for_the_inner_and_the_outer_loss():
    space = {name: spaces.fixed(value) for name, value in LAM.items()} | {
        "penalty": spaces.positive(0.3, shape=(problems.NUM_FEATURES,)),
        "outer": spaces.positive(1.0),
    }
    estimator = implicit(spaces.constrain(problem(), space))
    unconstrained = spaces.to_unconstrained(space, LAM)
    estimate, _ = estimator.estimate(unconstrained, problems.TASK, estimator.init(KEY, unconstrained, problems.TASK))
    np.testing.assert_allclose(estimate.hypergrad["outer"], estimate.value, rtol=1e-12)  # F = exp(z) · mean squares
    assert optax.tree.norm(estimate.hypergrad["penalty"]) > 0


def test_refuses_what_a_predictor_puts_out():
    space = {name: spaces.positive(0.1, shape=value.shape) for name, value in LAM.items()}
    predictor = predictors.mlp(space, 2)
    estimator = predictors.amortize(implicit(spaces.constrain(problem(), space)), predictor)
    with pytest.raises(ValueError, match=r"\['rate'\], \['start'\]"):
        estimator.init(KEY, predictor.init(KEY), problems.TASK)


def test_used_leaves():
    def function(hyperparams, x):
        return jax.jit(lambda a, b: a * x)(hyperparams["a"], hyperparams["b"]), 0.0 * x

    assert hypergrad.used_leaves(function, {"a": 1.0, "b": 2.0}, 3.0) == [True, False]


def test_leaves_of_a_bare_array():
    loop = inner.loop(
        lambda params, hp, batch: problems.mean_squares(params, batch), lambda hp: optax.sgd(hp), init=problems.zeros
    )
    bare = inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch))
    with pytest.raises(ValueError, match="the leaves itself of λ"):
        implicit(bare).init(KEY, jnp.array(0.1), problems.TASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0, "adjoint_rate": 0.1}, "`num_steps` must be at least 1; got 0"),
        ({"num_steps": 1, "adjoint_rate": 0.0}, "`adjoint_rate` must be positive; got 0.0"),
        ({"num_steps": 1, "adjoint_rate": float("nan")}, "`adjoint_rate` must be positive; got nan"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        hypergrad.warm_implicit(problems.RIDGE, **options)


@pytest.mark.parametrize("x64", [False, True])
def test_float32_stays_float32(x64):
    with jax.enable_x64(x64):
        task, lam = jax.tree.map(lambda x: np.asarray(x, np.float32), (problems.TASK, problems.LAM))
        estimator = implicit(problems.RIDGE)
        state = estimator.init(KEY, lam, task)
        estimate, after = jax.jit(estimator.estimate)(lam, task, state)
        assert isinstance(estimate, base.Estimate)
        assert {leaf.dtype for leaf in jax.tree.leaves((estimate.hypergrad, after.adjoint))} == {np.dtype(np.float32)}

"""The best of K draws: its derivative for fixed draws, relations to amortize and propose, and that training works."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.flatten_util import ravel_pytree

from metaopt import base, hypergrad, predictors, spaces, training

KEY = jax.random.key(0)
SPACE = {"log_penalty": spaces.real(-1.0, shape=(problems.NUM_FEATURES,))}
RIDGE = hypergrad.unrolled(spaces.constrain(problems.RIDGE, SPACE), num_steps=4)
MAKE = {
    "mlp": lambda **options: predictors.mlp(SPACE, 2, num_hidden=3, **options),
    "ensemble": lambda **options: predictors.ensemble(predictors.mlp(SPACE, 2, num_hidden=3, **options), 2),
}


def random_weights(predictor, scale=0.4):
    flat, unravel = ravel_pytree(predictor.init(KEY))
    return unravel(flat + scale * jax.random.normal(jax.random.key(1), flat.shape))


def estimate_of(estimator, phi, key=KEY, task=problems.TASK):
    return jax.jit(estimator.estimate)(phi, task, estimator.init(key, phi, task))[0]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.once
def test_the_hypergradient_is_the_derivative_for_fixed_draws(name):
    predictor = MAKE[name](spread=0.8)
    phi = random_weights(predictor)
    flat, unravel = ravel_pytree(phi)
    estimator = predictors.best_of(RIDGE, predictor, num_proposals=6)
    estimate = jax.jit(lambda flat, key: estimator.estimate(unravel(flat), problems.TASK, key)[0])
    slopes_of_spread = []
    for seed in range(3):
        key = jax.random.key(seed)
        step = 1e-5 * np.eye(flat.size)
        slopes = [(estimate(flat + d, key).value - estimate(flat - d, key).value) / 2e-5 for d in step]
        hypergrad_ = estimate(flat, key).hypergrad
        np.testing.assert_allclose(ravel_pytree(hypergrad_)[0], slopes, rtol=1e-5, atol=1e-9)
        slopes_of_spread.append(jnp.abs(hypergrad_["log_spread"]["linear"]).max())
    assert max(slopes_of_spread) > 1e-6  # not in every estimate: a center that is the best has none


def test_by_hand_on_a_quadratic():
    """F(λ) = |λ − 1|²: dF/dz = 2 (λ_b − 1) and dF/d log s = 2 (λ_b − 1) (λ_b − z)."""
    space = {"a": spaces.real(0.0, shape=(2,))}
    candidates = []

    def loss(z, task, key):
        jax.debug.callback(
            lambda x, key: candidates.append((np.array(x), tuple(np.ravel(key)))), z.coordinates["a"], bits(key)
        )
        return ((z.coordinates["a"] - 1) ** 2).sum()

    predictor = predictors.mlp(space, 0, num_hidden=0, spread=0.5)
    estimator = predictors.best_of(hypergrad.direct(loss), predictor, num_proposals=7)
    estimate = estimate_of(estimator, predictor.init(KEY), task=base.Task((), (), jnp.zeros(0)))
    jax.effects_barrier()
    assert len({key for _, key in candidates}) == 1  # one key for all candidates and for the hypergradient
    draws = {tuple(x) for x, _ in candidates}
    assert len(draws) == 7 and (0.0, 0.0) in draws
    best = np.array(min(draws, key=lambda x: ((np.array(x) - 1) ** 2).sum()))
    assert best.any()
    np.testing.assert_allclose(estimate.value, ((best - 1) ** 2).sum(), rtol=1e-12)
    assert estimate.metrics["center_value"] == 2.0 and estimate.done
    np.testing.assert_allclose(estimate.hypergrad["center"], 2 * (best - 1), rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergrad["log_spread"]["center"], 2 * (best - 1) * best, rtol=1e-12)


def bits(key):
    return jax.random.key_data(key)


@pytest.mark.once
def test_one_proposal_is_amortize():
    plain, wide = MAKE["mlp"](), MAKE["mlp"](spread=0.3)
    phi = random_weights(plain)
    estimate = estimate_of(predictors.best_of(RIDGE, wide, num_proposals=1), wide.init(KEY) | phi)
    expected = estimate_of(predictors.amortize(RIDGE, plain), phi)  # the ridge problem uses no key
    spread = estimate.hypergrad.pop("log_spread")
    chex.assert_trees_all_close((estimate.value, estimate.hypergrad), (expected.value, expected.hypergrad), rtol=1e-10)
    chex.assert_trees_all_equal(spread, jax.tree.map(jnp.zeros_like, spread))


@pytest.mark.once
def test_propose_draws_from_the_prediction():
    predictor = MAKE["mlp"](spread=0.8)
    phi = random_weights(predictor)
    prediction = predictor.apply(phi, problems.TASK)
    explicit = training.propose(RIDGE, spread=prediction.spread, space=SPACE)
    expected = explicit(KEY, prediction.center, problems.TASK)
    proposed = jax.jit(training.propose(RIDGE, space=SPACE))(KEY, prediction, problems.TASK)
    chex.assert_trees_all_close(proposed, expected, rtol=1e-10)
    assert proposed.index > 0
    # An own spread replaces the predicted one.
    still = training.propose(RIDGE, space=SPACE, spread=0.0, num_proposals=3)(KEY, prediction, problems.TASK)
    np.testing.assert_allclose(still.values, np.full(3, proposed.values[0]), rtol=1e-10)
    tuned, from_center = (
        training.fine_tune(RIDGE, num_steps=1)(KEY, start, problems.TASK) for start in (prediction, prediction.center)
    )
    chex.assert_trees_all_equal(tuned, from_center)


@pytest.mark.once
def test_candidates_that_are_not_finite_are_not_the_best():
    space = {"a": spaces.real(0.0, shape=())}

    def loss(z, task, key):  # unbounded below where it is not finite
        return jnp.where(z.coordinates["a"] > 0.1, jnp.nan, -z.coordinates["a"])

    predictor = predictors.mlp(space, 0, spread=1.0)
    estimate = estimate_of(
        predictors.best_of(hypergrad.direct(loss), predictor, num_proposals=20, chunk=3),
        predictor.init(KEY),
        task=base.Task((), (), jnp.zeros(0)),
    )
    assert np.isfinite(estimate.value) and np.isfinite(ravel_pytree(estimate.hypergrad)[0]).all()


@pytest.mark.once
def test_training_widens_the_spread_where_tasks_differ_and_features_do_not_say_how():
    """F(λ) = (λ_0 − task)² + λ_1²: the best spread is large for λ_0, and small for λ_1."""
    space = {"a": spaces.real(0.0, shape=(2,))}
    loss = lambda z, task, key: (z.coordinates["a"][0] - task.valid) ** 2 + z.coordinates["a"][1] ** 2
    predictor = predictors.mlp(space, 1, num_hidden=2, spread=0.3)
    estimator = hypergrad.over_tasks(predictors.best_of(hypergrad.direct(loss), predictor, num_proposals=8))
    learner = training.learner(estimator, optax.adam(0.03))

    def draw(key):
        return base.Task(jnp.zeros((16, 1)), jax.random.normal(key, (16,)), jnp.ones((16, 1)))

    def step(state, key):
        state, metrics = learner.step(state, draw(key))
        return state, metrics

    state = learner.init(KEY, predictor.init(KEY), draw(KEY))
    state, metrics = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(KEY, 300)))(state)
    prediction = predictor.apply(state.hyperparams, jax.tree.map(lambda x: x[0], draw(KEY)))
    center, spread = (part.coordinates["a"] for part in prediction)
    assert 0.6 < spread[0] < 2 and spread[1] < 0.25 and np.abs(center).max() < 0.3
    assert metrics["value"][-50:].mean() < 0.5 * metrics["value"][:20].mean()
    assert abs(metrics["center_value"][-50:].mean() - 1) < 0.3


@pytest.mark.parametrize("kind", base.ESTIMATOR_KINDS)
def test_the_kind(kind):
    expected = "biased" if kind == "unbiased" else kind
    assert predictors.best_of(RIDGE._replace(kind=kind), MAKE["mlp"](spread=0.1)).kind == expected


def test_the_embedding_of_a_data_set_predicts_a_spread_too():
    predictor = predictors.dataset_embedding(SPACE, width=4, num_hidden=2, num_features=2, spread=0.4)
    data = {"x": jnp.ones((6, 3)), "y": jnp.arange(6) % 2, "class_mask": jnp.ones(2)}
    prediction = predictor.apply(predictor.init(KEY), base.Task(data, None, jnp.ones(2)))
    chex.assert_trees_all_close(prediction.center, spaces.to_unconstrained(SPACE, spaces.default(SPACE)))
    np.testing.assert_allclose(prediction.spread.coordinates["log_penalty"], np.full(4, 0.4), rtol=1e-12)
    phi = random_weights(predictor)
    other = predictor.apply(phi, base.Task(data | {"x": data["x"].at[0].set(3.0)}, None, jnp.ones(2)))
    assert (
        other.spread.coordinates["log_penalty"]
        != predictor.apply(phi, base.Task(data, None, jnp.ones(2))).spread.coordinates["log_penalty"]
    ).all()

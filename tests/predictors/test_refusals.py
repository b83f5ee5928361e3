"""What `predictors` rejects: spaces without leaves, limits of no features, features and weights that do not fit."""

import jax
import jax.numpy as jnp
import optax
import problems
import pytest

from metaopt import base, hypergrad, predictors, spaces, training

KEY = jax.random.key(0)
SPACE = {"log_penalty": spaces.real(-1.0, shape=(problems.NUM_FEATURES,))}
RIDGE = hypergrad.unrolled(spaces.constrain(problems.RIDGE, SPACE), num_steps=1)
LEARNER = training.learner(RIDGE, optax.sgd(0.1))
TASK = problems.TASK


def mlp(space=SPACE, num_features=2, **options):
    return predictors.mlp(space, num_features, num_hidden=3, **options)


def embedding(space=SPACE, **options):
    return predictors.dataset_embedding(space, width=4, **options)


PLAIN, WIDE = mlp(), mlp(spread=0.1)
PREDICTION = WIDE.apply(WIDE.init(KEY), TASK)  # has a spread
TRAINED = predictors.TrainedPredictor(PLAIN, PLAIN.init(KEY))


def estimate(estimator, predictor):
    phi = predictor.init(KEY)
    return jax.eval_shape(estimator.estimate, phi, TASK, estimator.init(KEY, phi, TASK))


def fit(**options):
    training.fit(LEARNER, lambda key: TASK, hyperparams=PREDICTION, num_steps=1, key=KEY, **options)


def two_of_three_members():
    ensemble = predictors.ensemble(PLAIN, 3)
    ensemble.apply(jax.tree.map(lambda x: x[:2], ensemble.init(KEY)), TASK)


NO_LEAF = "`space` must have at least one leaf that is tuned; got "
ONE_LAMBDA = "must be one λ, and this is a prediction with a spread: pass its `.cent"
REFUSALS = [
    (lambda: mlp({"rate": spaces.fixed(0.1)}), NO_LEAF + "{'rate'"),
    (lambda: embedding({}), NO_LEAF + "{}"),
    (lambda: mlp(limit=-2.0), "`limit` must be positive, or None; got -2.0"),
    (lambda: embedding(limit=2.0), "`limit` clips `task.features`, but `num_features` is 0"),
    (lambda: estimate(predictors.best_of(RIDGE, PLAIN), PLAIN), "`predictor` must predict a spread; make it with"),
    (lambda: estimate(predictors.amortize(RIDGE, WIDE), WIDE), "predicts a spread, which has no gradient here: use `p"),
    (lambda: TRAINED.predict(base.Task(None, None, jnp.array([0.0, jnp.nan]))), r"must be finite; got \[ 0. nan\]. `s"),
    (two_of_three_members, r"an ensemble of 3 must be stacked, leaves \[3, ...\]; got shape \(2, "),
    # A prediction with a spread instead of one λ.
    (lambda: spaces.to_constrained(SPACE, PREDICTION), ONE_LAMBDA),
    (lambda: spaces.to_unconstrained(SPACE, PREDICTION), ONE_LAMBDA),
    (lambda: spaces.encode(SPACE, PREDICTION), ONE_LAMBDA),
    (lambda: spaces.configuration(SPACE, PREDICTION), ONE_LAMBDA),
    (lambda: LEARNER.init(KEY, PREDICTION, TASK), ONE_LAMBDA),
    (fit, ONE_LAMBDA),
    (lambda: fit(space=SPACE), ONE_LAMBDA),
    (lambda: RIDGE.estimate(PREDICTION, TASK, RIDGE.init(KEY, PREDICTION, TASK)), ONE_LAMBDA),
    (lambda: hypergrad.check(RIDGE, PREDICTION, TASK, key=KEY), ONE_LAMBDA),
    # A trained predictor.
    (lambda: TRAINED.scaled_features({"n": 7.0}), "has no `scaling`"),
    (
        lambda: TRAINED.predict(base.Task(None, None, jnp.ones((3, 2)))),
        r"`task.features` must have shape \(2,\); got shape \(3, 2\).*jax.vmap",
    ),
    (lambda: TRAINED.predict(base.Task(None, None)), r"`task.features` must have shape \(2,\); got shape \(\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""A plain function as an estimator."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import hypergrad, training

KEY = jax.random.key(0)


@pytest.mark.once
def test_equals_the_closed_form_that_it_wraps():
    estimator = hypergrad.over_tasks(
        hypergrad.direct(lambda hyperparams, task, key: problems.closed_form(hyperparams, task))
    )
    tasks = [problems.regression_task(seed) for seed in range(3)]
    batch = problems.stack(tasks)
    estimate, _ = jax.jit(estimator.estimate)(problems.LAM, batch, estimator.init(KEY, problems.LAM, batch))
    step = 1e-5
    for i in range(problems.NUM_FEATURES):
        shift = jnp.zeros(problems.NUM_FEATURES).at[i].set(step)
        ahead, behind = (
            np.mean([problems.closed_form({"log_penalty": problems.LAM["log_penalty"] + s * shift}, t) for t in tasks])
            for s in (1, -1)
        )
        np.testing.assert_allclose(estimate.hypergrad["log_penalty"][i], (ahead - behind) / (2 * step), rtol=1e-6)
    assert estimate.done.tolist() == [True] * 3 and estimator.kind == "exact"


def test_every_call_has_a_fresh_key():
    estimator = hypergrad.direct(lambda hyperparams, task, key: hyperparams * jax.random.normal(key))
    state = estimator.init(KEY, 1.0, None)
    first, second = estimator.estimate(2.0, None, state), estimator.estimate(2.0, None, state)
    chex.assert_trees_all_equal(first[0], second[0])
    later, _ = estimator.estimate(2.0, None, first[1])
    assert later.value != first[0].value == 2 * first[0].hypergrad


def test_fit_runs_it():
    # A linear g(features) trained on records: the minimum of a surrogate has a closed form.
    rng = np.random.default_rng(0)
    features, outcomes = jnp.asarray(rng.normal(size=(30, 2))), jnp.asarray(rng.normal(size=30))

    def loss(hyperparams, task, key):
        return ((features @ hyperparams - outcomes) ** 2).mean()

    learner = training.learner(hypergrad.direct(loss), optax.sgd(0.3))
    result = training.fit(learner, lambda key: jnp.zeros(1), hyperparams=jnp.zeros(2), num_steps=100, key=KEY)
    np.testing.assert_allclose(result.hyperparams, np.linalg.lstsq(features, outcomes)[0], rtol=1e-6)


def test_an_optax_schedule_that_reads_its_peak_is_explained():
    def trained_loss(hyperparams, task, key):
        return optax.warmup_cosine_decay_schedule(0.0, hyperparams, 2, 8)(4)

    estimator = hypergrad.direct(trained_loss)
    with pytest.raises(ValueError, match="reads the value of a traced array.*`transforms.cosine_schedule`"):
        jax.jit(estimator.estimate)(0.1, None, estimator.init(KEY, 0.1, None))

"""One g, three trainings: from records, by unrolled and by implicit hypergradients, against a λ*(t) that is known.

Task t shrinks a vector a by ridge regression with an orthonormal design, g = |θ − a|²/2 + λ|θ|²/2, so that
θ*(λ) = a/(1 + λ). The validation target is a/(1 + μ(t)), and f = |θ − a/(1 + μ)|²/2 is smallest, zero, at
λ*(t) = μ(t) = exp(x·w + b): a function of the task's features that a linear g in log λ says exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, blackbox, hypergrad, inner, predictors, spaces, training
from metaopt.blackbox import _surrogates

SPACE = {"penalty": spaces.interval(0.1, 10.0, log=True)}
W, B = np.array([0.8, -0.5]), 0.3
NUM_TASKS = 12


def make_task(x, a):
    best = np.exp(x @ W + B)
    return base.Task({"a": a}, {"target": a / (1 + best)}, x), best


RNG = np.random.default_rng(0)
MADE = [make_task(RNG.uniform(-1, 1, size=2), RNG.normal(size=5)) for _ in range(NUM_TASKS)]
TASKS = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *[task for task, _ in MADE])
NEW = [make_task(x, RNG.normal(size=5)) for x in RNG.uniform(-0.8, 0.8, size=(8, 2))]

LOOP = inner.loop(
    lambda params, hyperparams, batch: (
        ((params - batch["a"]) ** 2).sum() / 2 + hyperparams["penalty"] * (params**2).sum() / 2
    ),
    lambda hyperparams: optax.sgd(0.15),
    init=lambda key, hyperparams, data: jnp.zeros_like(data["a"]),
)
PROBLEM = inner.problem(LOOP, lambda params, hyperparams, batch: ((params - batch["target"]) ** 2).sum() / 2)
NUM_STEPS = 60  # at rest to 2e-5


def from_records():
    """F_t is what records of random λ say about it: the surrogate's function of task t."""
    draws = np.exp(np.random.default_rng(1).uniform(np.log(0.1), np.log(10.0), size=(NUM_TASKS, 40)))
    records = [
        base.Record(
            f"t{t}", {"penalty": float(p)}, float(((task.train["a"] / (1 + p) - task.valid["target"]) ** 2).sum() / 2)
        )
        for t, (task, _) in enumerate(MADE)
        for p in draws[t]
    ]
    features = {f"t{t}": task.features for t, (task, _) in enumerate(MADE)}
    learned = blackbox.train_meta_optimizer(
        records, space=SPACE, features=features, num_members=2, num_steps=60, key=jax.random.key(0)
    )

    def loss(z, task, key):
        x = spaces.encode(SPACE, spaces.to_constrained(SPACE, z))
        same = jnp.argmin(((learned.surrogate.features - task.valid["ranked"][None]) ** 2).sum(1))
        return _surrogates.expected_outcomes(learned.surrogate, x[None])[0, same]

    ranked = _surrogates.rank_features(learned.surrogate.sorted_features, np.asarray(TASKS.features), NUM_TASKS)
    return learned, hypergrad.direct(loss), TASKS._replace(valid={"ranked": jnp.asarray(ranked)})


def train(estimator, batch, g):
    """φ of a linear g, by the same lines for all three."""
    estimator = hypergrad.over_tasks(predictors.amortize(estimator, g))
    rates = optax.cosine_decay_schedule(0.05, 300)
    learner = training.learner(estimator, optax.adam(rates))
    fitted = training.fit(
        learner,
        lambda key: batch,
        hyperparams=g.init(jax.random.key(0)),
        num_steps=300,
        key=jax.random.key(1),
        progress=False,
    )
    return fitted.hyperparams


@pytest.mark.once
def test_three_trainings_of_one_g_agree_with_the_known_penalty():
    g = predictors.mlp(SPACE, 2, num_hidden=0)
    learned, direct, recorded = from_records()
    problem = spaces.constrain(PROBLEM, SPACE)
    phis = {
        "records": train(direct, recorded, g),
        "unrolled": train(hypergrad.unrolled(problem, num_steps=NUM_STEPS), TASKS, g),
        "implicit": train(hypergrad.implicit(problem, num_steps=NUM_STEPS, solver=hypergrad.dense()), TASKS, g),
    }
    expected = np.log([best for _, best in NEW])
    predict = lambda phi: np.array(
        [np.log(spaces.to_constrained(SPACE, g.apply(phi, task))["penalty"]) for task, _ in NEW]
    )
    predicted = {name: predict(phi) for name, phi in phis.items()}
    for name, tolerance in (("unrolled", 0.05), ("implicit", 0.05), ("records", 0.15)):
        assert np.abs(predicted[name] - expected).max() < tolerance, (name, predicted[name] - expected)
    np.testing.assert_allclose(predicted["unrolled"], predicted["implicit"], atol=1e-3)
    # The ready-made one, which weighs earlier tasks by their features and knows no linear function: it comes to .37 of
    # the error of the best constant.
    ready = np.log([learned.predict(task)["penalty"] for task, _ in NEW])
    constant = np.abs(expected - expected.mean()).mean()
    assert np.abs(ready - expected).mean() < 0.5 * constant

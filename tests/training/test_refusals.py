"""What `training` rejects before it takes a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import small_estimators as small

from metaopt import base, hypergrad, inner, spaces, training

KEY = jax.random.key(0)
QUADRATIC = small.quadratic()


class Rates(NamedTuple):
    inner: Any
    momentum: Any


SPACE = {"rates": Rates(spaces.interval(1e-3, 1.0, log=True), spaces.fixed(0.5)), "shift": spaces.real(shape=(2,))}
PROBLEM = inner.problem(
    inner.loop(
        lambda params, hp, data: ((params - data - hp["shift"]) ** 2).sum(),
        lambda hp: optax.sgd(hp["rates"].inner, momentum=hp["rates"].momentum),
        init=lambda key, hp, data: jnp.zeros(2),
    ),
    lambda params, hp, data: ((params - data) ** 2).sum(),
)
LAM = {"rates": Rates(0.2, 0.5), "shift": np.array([1.0, -1.0])}
NAN = jax.tree.map(lambda x: x * jnp.nan, spaces.to_unconstrained(SPACE, LAM))
RIDGE = hypergrad.unrolled(spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE), num_steps=1)
PENALTY = spaces.default(problems.SPACE)
OTHER = {"penalty": spaces.positive(0.2, shape=(problems.NUM_FEATURES,))}


def fit(hyperparams=7.0, sample_tasks=lambda key: np.ones(3), **options):
    learner = training.learner(QUADRATIC, optax.sgd(0.1))
    training.fit(learner, sample_tasks, hyperparams=hyperparams, key=KEY, **{"num_steps": 5} | options)


def fit_in_space(problem=None, space=SPACE, hyperparams=LAM):
    """The problem takes coordinates, unless another one is passed."""
    problem = spaces.constrain(PROBLEM, SPACE) if problem is None else problem
    learner = training.learner(hypergrad.over_tasks(hypergrad.unrolled(problem, num_steps=1)), optax.sgd(0.1))
    tasks = base.Task(np.ones((2, 2)), np.ones((2, 2)))
    training.fit(learner, lambda key: tasks, hyperparams=hyperparams, key=KEY, num_steps=1, space=space)


def init(hyperparams, tasks):
    return training.learner(QUADRATIC, optax.sgd(0.1)).init(KEY, hyperparams, tasks)


def step_of_a_state_for_all_tasks():
    estimator = QUADRATIC._replace(init=lambda key, hyperparams, task: jnp.zeros(()))
    init, step = training.learner(estimator, optax.sgd(0.1))
    step(init(KEY, 1.0, np.ones(2)), np.ones(2))


def sharded():
    estimator = training.shard(QUADRATIC, jax.make_mesh((1,), ("tasks",)))
    estimator.estimate(1.0, np.ones(2), np.ones(2))


def propose(**options):
    training.propose(RIDGE, **options)(KEY, PENALTY, problems.TASK)


SPREAD = "`spread` must be finite and at least 0; got "
REFUSALS = [
    # `fit` and `learner`.
    (lambda: fit({"a": jnp.nan}), r"The initial `hyperparams\['a'\]` is not finite: nan"),
    (lambda: fit({"layers": 3}), r"`hyperparams\['layers'\]` has dtype int64, but only floating-point"),
    (lambda: fit(steps_per_call=0), "`steps_per_call` must be at least 1; got 0"),
    (lambda: fit(patience=3), "pass `evaluate`"),
    (lambda: fit(sample_tasks=lambda key: np.ones((0, 2))), "a batch without tasks"),
    (lambda: init({"lr": 0.1, "layers": [2]}, np.ones(2)), r"`hyperparams\['layers'\]\[0\]` has dtype int.*a closure"),
    (lambda: init({"flag": True}, np.ones(2)), "dtype bool"),
    (lambda: init({}, np.ones(2)), "nothing to tune"),
    (lambda: init(1.0, {"a": np.ones((0, 3))}), r"`tasks\['a'\]` has shape \(0, 3\)"),
    (step_of_a_state_for_all_tasks, r"`done` has shape \(2,\).*shape \(\)"),
    (sharded, 'needs the metric "num_finite".*`hypergrad.over_tasks` first'),
    # Units.
    (lambda: fit_in_space(space=None), "λ is in natural units here .got dict.*Pass `space=` to `training.fit`"),
    (lambda: fit_in_space(PROBLEM), "These are unconstrained coordinates and not λ.*spaces.constrain"),
    (
        lambda: fit_in_space(hyperparams={**LAM, "rates": Rates(-0.2, 0.5)}),
        "at `rates.inner`: it must be between 0.001 and 1.0; got -0.2",
    ),
    (lambda: fit_in_space(hyperparams={**LAM, "shift": np.array([0.0, np.nan])}), "at `shift`: .* got nan"),
    (
        lambda: fit_in_space(hyperparams={**LAM, "rates": Rates(0.2, 0.9)}),
        "at `rates.momentum`: it must be the value that the space fixes, 0.5; got 0.9",
    ),
    (lambda: fit_in_space(hyperparams={"rates": LAM["rates"]}), "λ does not fit the space at `shift`"),
    (lambda: fit_in_space(hyperparams=NAN), r"The initial `hyperparams\['rates'\].inner` is not finite"),
    # `fine_tune` and `propose`.
    (lambda: training.fine_tune(QUADRATIC, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: training.fine_tune(QUADRATIC, num_steps=2.5), "`num_steps` must be an integer of at least 0; got 2.5"),
    (lambda: propose(num_proposals=0), "`num_proposals` must be at least 1; got 0"),
    (lambda: propose(rounds=0), "`rounds` must be at least 1; got 0"),
    (lambda: propose(chunk=0), "`chunk` must be at least 1, or None; got 0"),
    (lambda: propose(spread=-0.5), SPREAD + "-0.5"),
    (lambda: propose(spread=np.nan), SPREAD + "nan"),
    (lambda: propose(spread={"a": None, "b": jnp.array([1.0, -1e-9])}), SPREAD + "Array"),
    (lambda: propose(spread=spaces.Unconstrained({"a": np.float32(np.inf)})), SPREAD),
    (lambda: propose(spread="0.5"), SPREAD + "'0.5'"),
    (propose, "λ is in natural units here"),
    (lambda: propose(spread=jnp.ones(3), space=problems.SPACE), "[Bb]roadcast"),  # an error of JAX
    (lambda: propose(spread={"rate": 0.1}, space=problems.SPACE), "penalty"),
    (lambda: propose(space=OTHER), "`space` and the problem's space differ"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()

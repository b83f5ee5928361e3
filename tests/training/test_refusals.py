"""What `training` rejects: λ, tasks and spaces that do not fit, and estimators that break their contract."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import small_estimators as small

from metaopt import base, few_shot, hypergrad, inner, spaces, training

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
WIDER = SPACE | {"rates": Rates(spaces.interval(1e-3, 2.0, log=True), spaces.fixed(0.5))}  # of the same structure
TASK = base.Task(np.ones(2), np.ones(2))
TASKS = base.Task(np.ones((2, 2)), np.ones((2, 2)))
NAN = jax.tree.map(lambda x: x * jnp.nan, spaces.to_unconstrained(SPACE, LAM))
RIDGE = hypergrad.unrolled(spaces.constrain(problems.POSITIVE_RIDGE, problems.SPACE), num_steps=1)
PENALTY = spaces.default(problems.SPACE)
OTHER = {"penalty": spaces.positive(0.2, shape=(problems.NUM_FEATURES,))}


def fit(hyperparams=7.0, sample_tasks=lambda key: np.ones(3), **options):
    learner = training.learner(QUADRATIC, optax.sgd(0.1))
    training.fit(learner, sample_tasks, hyperparams=hyperparams, **{"num_steps": 5, "key": KEY} | options)


def fit_swapped():
    learner = training.learner(QUADRATIC, optax.sgd(0.1))
    training.fit(lambda key: np.ones(3), learner, hyperparams=7.0, key=KEY, num_steps=5)


def fit_other_shapes():
    """The second draw has another shape, and some of the first tasks are not done."""
    sizes = iter([4, 5])
    learner = training.learner(small.carried(), optax.adam(0.1))
    sample_tasks = lambda key: small.sample(key, next(sizes))
    training.fit(learner, sample_tasks, hyperparams={"x": 0.5}, key=KEY, num_steps=5)


def fit_in_space(problem=None, space=SPACE, hyperparams=LAM, sample_tasks=lambda key: TASKS, **options):
    """The problem takes coordinates, unless another one is passed."""
    problem = spaces.constrain(PROBLEM, SPACE) if problem is None else problem
    learner = training.learner(hypergrad.over_tasks(hypergrad.unrolled(problem, num_steps=1)), optax.sgd(0.1))
    options = {"hyperparams": hyperparams, "key": KEY, "num_steps": 2, "space": space} | options
    training.fit(learner, sample_tasks, **options)


def fine_tune_in_another_space():
    rule = hypergrad.unrolled(spaces.constrain(PROBLEM, WIDER), num_steps=1)
    training.fine_tune(rule, space=SPACE, num_steps=1)(KEY, LAM, TASK)


def init(hyperparams, tasks):
    return training.learner(QUADRATIC, optax.sgd(0.1)).init(KEY, hyperparams, tasks)


def init_of(estimator):
    return training.learner(estimator, optax.sgd(0.1)).init(KEY, 1.0, np.ones(2))


def step_of_a_state_for_all_tasks():
    estimator = QUADRATIC._replace(init=lambda key, hyperparams, task: jnp.zeros(()))
    init, step = training.learner(estimator, optax.sgd(0.1))
    step(init(KEY, 1.0, np.ones(2)), np.ones(2))


def sharded():
    estimator = training.shard(QUADRATIC, jax.make_mesh((1,), ("tasks",)))
    estimator.estimate(1.0, np.ones(2), np.ones(2))


def step_of(broken):
    """A step of an estimator whose results are changed by `broken`."""
    estimate = lambda *args: broken(*QUADRATIC.estimate(*args))
    init, step = training.learner(QUADRATIC._replace(estimate=estimate), optax.sgd(0.1))
    jax.eval_shape(lambda: step(init(KEY, 1.0, np.ones(2))))


def propose(**options):
    training.propose(RIDGE, **options)(KEY, PENALTY, problems.TASK)


REFUSALS = [
    # `fit` and `learner`.
    (
        lambda: fit(sample_tasks=base.Task(1.0, 2.0)),
        r"`sample_tasks`, a function `\(key\).* got Learner and Task\. For",
    ),
    (fit_swapped, "The first arguments of `fit` are `learner`.* got function and Learner"),
    (
        lambda: training.learner(QUADRATIC, 0.1),
        r"`optimizer` must be an optax transform, such as `optax.adam\(0.1\)`; got 0.1",
    ),
    (lambda: fit(key=3), r"`key` must be a random key, such as `jax.random.key\(3\)`; got 3"),
    (
        lambda: fit(callback="run.jsonl"),
        r"`callback` must be a function .*; got 'run.jsonl'.*`training.log_to\(file\)`",
    ),
    (lambda: fit(callback=[len, 3]), "`callback` must be a function .*; got 3"),
    (lambda: fit(callback=3), "`callback` must be a function .*; got 3"),
    (lambda: training.fine_tune(RIDGE)(0, PENALTY, problems.TASK), "`key` must be a random key"),
    (lambda: fit_in_space(sample_tasks=lambda key: TASKS._asdict()), r"A task must be .* got a dict with the keys"),
    (lambda: fit({"a": jnp.nan}), r"The initial `hyperparams\['a'\]` is not finite: nan"),
    (lambda: fit({"layers": 3}), r"`hyperparams\['layers'\]` has dtype int64, but only floating-point"),
    (lambda: fit(patience=3), "pass `evaluate`"),
    (lambda: fit(keep_best=1, checkpoint_dir="never made"), "`keep_best` needs evaluations: pass `evaluate`"),
    (
        lambda: fit(keep_best=-1, checkpoint_dir="never made", evaluate=lambda key, hyperparams: 0.0),
        "`keep_best` must be at least 0; got -1",
    ),
    (lambda: fit(keep_nonfinite=-1, checkpoint_dir="never made"), "`keep_nonfinite` must be at least 0; got -1"),
    (lambda: fit(keep_nonfinite=1), "`keep_best` and `keep_nonfinite` are .* pass `checkpoint_dir` too"),
    (lambda: training.log_to("run.jsonl", every=0), "`every` must be at least 1; got 0"),
    (lambda: training.log_to("run.csv"), r'must end in "\.jsonl"'),
    *(
        (
            lambda name=name, value=value: fit(**{name: value}),
            f"`{name}` must be a whole number of at least 1; got {value}",
        )
        for name in ("eval_every", "checkpoint_every")
        for value in (0, -1, 2.5)
    ),
    *(
        (lambda value=value: fit(steps_per_call=value), f"`steps_per_call` must be .*at least 1; got {value}")
        for value in (0, -1, 2.0, True)
    ),
    (lambda: fit(sample_tasks=lambda key: np.ones((0, 2))), "a batch without tasks"),
    (lambda: init({"lr": 0.1, "layers": [2]}, np.ones(2)), r"`hyperparams\['layers'\]\[0\]` has dtype int.*a closure"),
    (lambda: init({"flag": True}, np.ones(2)), "dtype bool"),
    (lambda: init({}, np.ones(2)), "nothing to tune"),
    (lambda: init(1.0, {"a": np.ones((0, 3))}), r"`tasks\['a'\]` has shape \(0, 3\)"),
    (
        fit_other_shapes,
        r"shapes \[\(5,\)\] where \[\(4,\)\] are carried, and slots \[.*\] of 4 are not done.*Pad",
    ),
    # Units.
    (lambda: fit_in_space(space=None), "but got λ in natural units .dict.*Pass `space=` to `training.fit`"),
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
    *(
        (
            lambda num=num: fit_in_space(spaces.constrain(PROBLEM, WIDER), steps_per_call=num),
            r"`space` and the problem's space differ.*high=1\.0.* and .*high=2\.0",
        )
        for num in (1, 2)
    ),
    (lambda: training.fine_tune(QUADRATIC, num_steps=-1), "`num_steps` must be at least 0; got -1"),
    (lambda: training.fine_tune(QUADRATIC, num_steps=2.5), "`num_steps` must be an integer"),
    (fine_tune_in_another_space, "the problem's space differ"),
    (lambda: fit_in_space(hyperparams=NAN), r"The initial `hyperparams\['rates'\].inner` is not finite"),
    # `propose`.
    (propose, "but got λ in natural units"),
    (lambda: propose(spread=jnp.ones(3), space=problems.SPACE), "[Bb]roadcast"),  # an error of JAX
    *(
        (lambda value=value: propose(spread=value, space=problems.SPACE), "`spread` must be finite and at least 0")
        for value in (-0.1, jnp.nan, {"penalty": np.inf})
    ),
    (lambda: propose(spread={"rate": 0.1}, space=problems.SPACE), "penalty"),
    (lambda: propose(space=OTHER), "`space` and the problem's space differ"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ERRORS_OF_OTHERS = [
    # Of Python.
    (lambda: init_of(few_shot.maml(lambda params, batch: 0.0)), TypeError, "'Adaptation' object is not callable"),
    (sharded, KeyError, "num_finite"),
    # Of JAX: every leaf of a state must start with the axes of `done`.
    (step_of_a_state_for_all_tasks, TypeError, "true_fun"),
    # Of chex, at trace time.
    *(
        (lambda broken=broken: step_of(broken), AssertionError, None)
        for broken in (
            lambda out, state: (out._replace(value=jnp.ones(2)), state),
            lambda out, state: (out._replace(hypergrad=jnp.ones(2)), state),
            lambda out, state: (out._replace(done=jnp.ones(2)), state),
            lambda out, state: (out, jnp.ones(3)),
        )
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS_OF_OTHERS)
def test_errors_of_others(call, error, message):
    with pytest.raises(error, match=message):
        call()

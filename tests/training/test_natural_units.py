"""`fit` with a space takes and returns λ in natural units, and in between it is the run in coordinates to the bit."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small

from metaopt import _tuned_space, base, hypergrad, inner, spaces, training

KEY = jax.random.key(0)


class Rates(NamedTuple):
    inner: Any
    momentum: Any


# f = Σ (θ − valid)² after three steps of a rate, with weights of a choice, a momentum that is fixed, and a shift.
SPACE = {
    "rates": Rates(spaces.interval(1e-3, 1.0, log=True, default=0.1), spaces.fixed(0.5)),
    "mix": spaces.choice(["small", "large"]),
    "shift": spaces.real(0.5, 2.0, shape=(2,)),
}
LOOP = inner.loop(
    lambda params, hp, data: ((params - data - hp["shift"]) ** 2).sum() * (hp["mix"] @ jnp.array([0.2, 1.0])),
    lambda hp: optax.sgd(hp["rates"].inner, momentum=hp["rates"].momentum),
    init=lambda key, hp, data: jnp.zeros(2),
)
PROBLEM = inner.problem(LOOP, lambda params, hp, data: ((params - data) ** 2).sum())
ESTIMATOR = hypergrad.over_tasks(hypergrad.unrolled(spaces.constrain(PROBLEM, SPACE), num_steps=3))
LEARNER = training.learner(ESTIMATOR, optax.adam(0.1))
LAM = {
    "rates": Rates(jnp.array(0.2), jnp.array(0.5)),
    "mix": jnp.array([0.3, 0.7]),
    "shift": jnp.array([1.0, -1.0]),
}


def sample_tasks(key):
    train, valid = jax.random.normal(key, (2, 4, 2))
    return base.Task(train, valid)


def fit(learner=LEARNER, **kwargs):
    defaults = {"hyperparams": LAM, "num_steps": 4, "key": KEY, "space": SPACE, "progress": False}
    return training.fit(learner, sample_tasks, **(defaults | kwargs))


def by_hand(z):
    """λ from the coordinates, in NumPy."""
    z, sigmoid = z.coordinates, lambda x: 1 / (1 + np.exp(-x))
    weights = np.exp(z["mix"] - np.max(z["mix"]))
    return {
        "rates": Rates(10 ** (-3 + 3 * sigmoid(np.asarray(z["rates"].inner))), 0.5),
        "mix": weights / weights.sum(),
        "shift": 0.5 + 2.0 * np.asarray(z["shift"]),
    }


@pytest.mark.once
def test_natural_units_are_the_manual_conversions_to_the_bit():
    """A nested space with a choice, a fixed leaf and an array; the held-out loss, the last and the best λ."""
    judged, judged_z = [], []
    loss = lambda hp: (hp["shift"] ** 2).sum() + hp["rates"].inner
    natural = fit(evaluate=lambda key, hp: judged.append(hp) or loss(hp), eval_every=2)
    manual = fit(
        space=None,
        hyperparams=spaces.to_unconstrained(SPACE, LAM),
        evaluate=lambda key, z: judged_z.append(z) or loss(spaces.to_constrained(SPACE, z)),
        eval_every=2,
    )
    assert small.bits(natural.state) == small.bits(manual.state)
    assert small.bits((natural.history, natural.evaluations)) == small.bits((manual.history, manual.evaluations))
    assert isinstance(natural.state.hyperparams, spaces.Unconstrained)
    for name in ("hyperparams", "best_hyperparams"):
        expected = spaces.to_constrained(SPACE, getattr(manual, name))
        assert small.bits(getattr(natural, name)) == small.bits(expected)
        chex.assert_trees_all_close(getattr(natural, name), by_hand(getattr(manual, name)), rtol=1e-12)
    assert len(judged) == 3
    chex.assert_trees_all_close(judged, [by_hand(z) for z in judged_z], rtol=1e-12)
    chex.assert_trees_all_close(judged[0], LAM, rtol=1e-12)
    assert not np.allclose(judged[-1]["shift"], LAM["shift"])


def test_coordinates_of_a_predictor_are_taken_as_they_are():
    natural, marked = fit(num_steps=1), fit(num_steps=1, hyperparams=spaces.to_unconstrained(SPACE, LAM))
    assert small.bits(natural.state) == small.bits(marked.state)
    chex.assert_trees_all_equal(natural.hyperparams, marked.hyperparams)


@pytest.mark.once
def test_several_steps_a_call():
    chex.assert_trees_all_close(fit(steps_per_call=2).hyperparams, fit().hyperparams, rtol=1e-12)


@pytest.mark.once
def test_a_continued_run_is_the_unbroken_one(tmp_path):
    evaluate = lambda key, hp: (hp["shift"] ** 2).sum()
    unbroken = fit(evaluate=evaluate, eval_every=1)
    fit(num_steps=2, evaluate=evaluate, eval_every=1, checkpoint_dir=tmp_path)
    continued = fit(evaluate=evaluate, eval_every=1, checkpoint_dir=tmp_path)
    assert small.bits(continued) == small.bits(unbroken)
    assert jax.tree.structure(continued) == jax.tree.structure(unbroken)
    with pytest.raises(ValueError, match="initial hyperparams"):
        fit(hyperparams=spaces.default(SPACE), checkpoint_dir=tmp_path)


@pytest.mark.once
def test_over_the_devices_of_a_mesh():
    learner = training.learner(training.shard(ESTIMATOR, jax.make_mesh((1,), ("tasks",))), optax.adam(0.1))
    chex.assert_trees_all_close(fit(learner).hyperparams, fit().hyperparams, rtol=1e-10)


MASK = {"rates": Rates(True, None), "mix": False, "shift": True}
OPTIMIZERS = {
    "mask": lambda mask: optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), jax.tree.map(np.invert, mask))),
    "labels": lambda mask: optax.multi_transform(
        {"tuned": optax.sgd(0.1), "kept": optax.set_to_zero()},
        jax.tree.map(lambda tuned: "tuned" if tuned else "kept", mask),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_labels_and_masks_of_the_optimizer_are_marked_like_the_coordinates(name):
    optimizer = OPTIMIZERS[name](spaces.Unconstrained(MASK))
    tuned = fit(training.learner(ESTIMATOR, optimizer), num_steps=1).hyperparams
    assert tuned["rates"].inner != LAM["rates"].inner
    np.testing.assert_allclose(tuned["mix"], LAM["mix"], rtol=1e-12)
    task = jax.tree.map(lambda leaf: leaf[0], sample_tasks(KEY))
    rule = hypergrad.unrolled(spaces.constrain(PROBLEM, SPACE), num_steps=1)
    for call in (
        lambda: fit(training.learner(ESTIMATOR, OPTIMIZERS[name](MASK))),
        lambda: training.fine_tune(rule, optimizer=OPTIMIZERS[name](MASK), space=SPACE, num_steps=1)(KEY, LAM, task),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "`spaces.Unconstrained({...})` instead of" in error.value.__notes__[0]


@pytest.mark.parametrize("bound", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.once
def test_a_run_from_a_bound_leaves_it(bound, dtype):
    """F = (log λ − log 0.03)²: its gradient points inward from either bound."""
    space = {"rate": spaces.interval(1e-3, 1.0, log=True)}

    def estimate(hyperparams, task, state):
        loss = lambda z: (jnp.log(spaces.to_constrained(space, z)["rate"]) - np.log(0.03)) ** 2
        value, hypergrad_ = jax.value_and_grad(loss)(hyperparams)
        return base.Estimate(value, hypergrad_, jnp.array(True), {}), state

    estimator = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
    result = training.fit(
        training.learner(estimator, optax.adam(0.1)),
        lambda key: 1.0,
        hyperparams={"rate": dtype(bound)},
        space=space,
        num_steps=60,
        key=KEY,
        progress=False,
    )
    assert result.hyperparams["rate"].dtype == dtype
    assert 1.5e-3 < result.hyperparams["rate"] < 0.7  # far from both bounds
    assert not spaces.at_bounds(space, result.hyperparams)["rate"]
    # With plain gradient descent the first step already moves λ.
    first = training.fit(
        training.learner(estimator, optax.sgd(1.0)),
        lambda key: 1.0,
        hyperparams={"rate": dtype(bound)},
        space=space,
        num_steps=1,
        key=KEY,
        progress=False,
    )
    assert abs(np.log(first.hyperparams["rate"] / bound)) > 7e-3


OTHER = SPACE | {"rates": Rates(spaces.interval(1e-3, 2.0, log=True), spaces.fixed(0.5))}
LEAVES_ONLY = hypergrad.direct(lambda z, task, key: sum((leaf**2).sum() for leaf in jax.tree.leaves(z)))
CONVERTS_NOTHING = "nothing in the estimator converts unconstrained coordinates to λ"


def learner_of(problem, space):
    rule = hypergrad.unrolled(spaces.constrain(problem, space), num_steps=3)
    return training.learner(hypergrad.over_tasks(rule), optax.adam(0.1))


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_an_estimator_that_converts_nothing_is_reported(steps_per_call, caplog):
    fit(training.learner(hypergrad.over_tasks(LEAVES_ONLY), optax.adam(0.1)), steps_per_call=steps_per_call)
    assert CONVERTS_NOTHING in caplog.text


def test_fine_tuning_with_an_estimator_that_converts_nothing_is_reported(caplog):
    task = jax.tree.map(lambda leaf: leaf[0], sample_tasks(KEY))
    training.fine_tune(LEAVES_ONLY, space=SPACE, num_steps=1)(KEY, LAM, task)
    assert CONVERTS_NOTHING in caplog.text


def test_a_space_that_is_noted_again_is_kept_once():
    """Otherwise the record grows with each call of `fine_tune` outside `jit`."""
    step = lambda: None
    for space in (SPACE, SPACE, dict(SPACE)):
        with _tuned_space.recording(step):
            _tuned_space.note(space)
    assert len(_tuned_space._RECORDS[step]) == 2


def test_a_second_run_of_one_learner_is_compared_with_its_own_space(caplog):
    """Although JAX does not trace the step again."""
    learner = learner_of(PROBLEM, SPACE)
    fit(learner, num_steps=1)
    with pytest.raises(ValueError, match="the problem's space differ"):
        fit(learner, num_steps=1, space=OTHER)
    # An equal space counts as the same space. So does one with another default, which is not in this formula.
    same = Rates(spaces.interval(1e-3, 1.0, log=True, default=0.9), spaces.fixed(0.5))
    fit(learner, num_steps=1, space=SPACE | {"rates": same, "mix": spaces.choice(["few", "many"])})
    assert CONVERTS_NOTHING not in caplog.text


def test_a_space_of_a_problem_inside_the_problem_is_not_compared():
    inside = spaces.constrain(PROBLEM, OTHER)

    def loss(hyperparams, task, key):
        state = hypergrad.unroll(inside.loop, num_steps=1)(key, spaces.to_unconstrained(OTHER, LAM), task.train)
        return ((inside.loop.params(state) - hyperparams["shift"]) ** 2).sum()

    rule = hypergrad.direct(lambda z, task, key: loss(spaces.to_constrained(SPACE, z), task, key))
    fit(training.learner(hypergrad.over_tasks(rule), optax.adam(0.1)), num_steps=1)


def test_a_loss_that_was_compiled_before_gives_at_most_a_warning():
    rule = hypergrad.direct(jax.jit(lambda z, task, key: (spaces.to_constrained(SPACE, z)["shift"] ** 2).sum()))
    fit(training.learner(hypergrad.over_tasks(rule), optax.adam(0.1)), num_steps=1)

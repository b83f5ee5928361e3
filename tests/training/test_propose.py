"""Proposals: the best of K draws under one key, never worse than the start, and draws that follow the better half."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, spaces, training

KEY = jax.random.key(0)
TASK = base.Task(jnp.zeros(1), jnp.array([1.0, -2.0]))
START = jnp.array([0.0, 0.0])


def quadratic(noise=0.0, bad=lambda hyperparams: False):
    """F(λ) = |λ − valid|² + noise of the key; NaN where λ is bad."""

    def estimate(hyperparams, task, state):
        f = ((hyperparams - task.valid) ** 2).sum() + noise * jax.random.normal(state)
        return base.Estimate(jnp.where(bad(hyperparams), jnp.nan, f), hyperparams, jnp.array(True), {}), state

    return base.Estimator(lambda key, hyperparams, task: key, estimate, kind="exact")


def candidates_of(estimator, key=KEY, start=START, **options):
    """The result, and every candidate in the order of the runs."""
    candidates = []

    def estimate(hyperparams, task, state):
        jax.debug.callback(
            lambda x, key: candidates.append((np.array(x), tuple(np.ravel(key)))), hyperparams, bits(state)
        )
        return estimator.estimate(hyperparams, task, state)

    proposed = jax.jit(training.propose(estimator._replace(estimate=estimate), chunk=1, **options))(key, start, TASK)
    jax.effects_barrier()
    order = {float(((x - np.array(TASK.valid)) ** 2).sum()): (x, key) for x, key in candidates}
    return proposed, candidates, order


def bits(key):
    return jax.random.key_data(key)


def test_every_value_is_that_of_its_candidate_and_the_first_is_the_start():
    proposed, candidates, order = candidates_of(quadratic(), num_proposals=8, spread=0.7)
    assert len(candidates) == 8 and proposed.values.shape == (8,) and proposed.index.dtype == jnp.int32
    np.testing.assert_array_equal(order[float(proposed.values[0])][0], START)
    np.testing.assert_allclose(sorted(order), np.sort(proposed.values), rtol=1e-12)
    assert proposed.value == proposed.values.min() == proposed.values[proposed.index] < proposed.values[0]
    np.testing.assert_allclose(((proposed.hyperparams - TASK.valid) ** 2).sum(), proposed.value, rtol=1e-12)


def test_all_candidates_of_all_rounds_share_the_key_of_their_run_and_differ():
    _, candidates, order = candidates_of(quadratic(), num_proposals=4, rounds=3)
    assert len(candidates) == 12 and len({key for _, key in candidates}) == 1
    assert len(order) == 12  # draws differ between candidates and between rounds
    _, others, other_order = candidates_of(quadratic(), key=jax.random.key(1), num_proposals=4, rounds=3)
    assert {key for _, key in others} != {key for _, key in candidates}
    assert len(order.keys() & other_order.keys()) == 1  # the start only
    # Its noise cancels: the order of the values is that of the exact ones.
    proposed, exact = (training.propose(quadratic(noise), num_proposals=20)(KEY, START, TASK) for noise in (1e3, 0.0))
    assert proposed.index == exact.index and abs(proposed.value) > 10
    np.testing.assert_allclose(np.diff(proposed.values), np.diff(exact.values), rtol=1e-9)


def test_draws_are_normal_around_the_start():
    spread = jnp.array([0.1, 3.0])
    _, candidates, _ = candidates_of(quadratic(), start=jnp.array([5.0, -5.0]), num_proposals=2000, spread=spread)
    draws = np.array([x for x, _ in candidates if (x != [5.0, -5.0]).any()])
    assert draws.shape == (1999, 2)
    np.testing.assert_allclose(draws.mean(0), [5, -5], atol=4 * 3 / 2000**0.5)
    np.testing.assert_allclose(draws.std(0), spread, rtol=0.07)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1


@pytest.mark.parametrize("rounds", [1, 3])
def test_without_spread_the_start_wins(rounds):
    proposed = jax.jit(training.propose(quadratic(), num_proposals=5, spread=0.0, rounds=rounds))(KEY, START, TASK)
    np.testing.assert_allclose(proposed.values, np.full(5 * rounds, 5.0), rtol=1e-12)
    np.testing.assert_allclose(proposed.hyperparams, START, atol=1e-12)
    one = training.propose(quadratic(), num_proposals=1)(KEY, START, TASK)
    assert one.index == 0 and one.values.shape == (1,) and (one.hyperparams == START).all()


def test_the_second_round_draws_by_the_moments_of_the_better_half():
    bad = lambda x: x[0] > 0.4
    options = {"num_proposals": 16, "rounds": 2, "spread": np.array([1.0, 0.5])}
    proposed, candidates, _ = candidates_of(quadratic(bad=bad), **options)
    assert 1 <= np.isnan(proposed.values[:16]).sum() <= 8
    finite = [x for x, _ in candidates[:16] if not bad(x)]
    best = np.array(sorted(finite, key=lambda x: ((x - TASK.valid) ** 2).sum())[:8])
    weights = np.log(8.5) - np.log(np.arange(1, 9))
    weights /= weights.sum()
    mean = weights @ best
    spread = np.sqrt((options["spread"] ** 2 + weights @ (best - mean) ** 2) / 2)
    # If no value is finite, the draws of the second round are those of the first normal.
    none, unmoved, _ = candidates_of(quadratic(bad=lambda x: True), **options)
    assert len({tuple(x) for x, _ in unmoved}) == 31  # new draws in each round; the center is in both
    noise = np.array([x for x, _ in unmoved[16:]]) / options["spread"]
    np.testing.assert_allclose([x for x, _ in candidates[16:]], mean + spread * noise, rtol=1e-10)
    assert none.index == 0 and np.isnan(none.value) and (none.hyperparams == START).all()


@pytest.mark.once
def test_values_that_are_not_finite_are_never_the_best():
    propose = jax.jit(training.propose(quadratic(bad=lambda x: x[0] > 0.0), num_proposals=30, rounds=2))
    proposed = propose(KEY, START, TASK)
    assert 5 < np.isnan(proposed.values).sum() < 40
    assert proposed.hyperparams[0] <= 0 and proposed.value == np.nanmin(proposed.values)
    # With one finite value, the mean of the next round is its candidate.
    only_start = training.propose(quadratic(bad=lambda x: (x != 0).any()), num_proposals=5, rounds=3)
    only_start = only_start(KEY, START, TASK)
    assert only_start.index == 0 and np.isfinite(only_start.values).nonzero()[0].tolist() == [0, 5, 10]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("name", ["tasks", "seeds"])
@pytest.mark.once
def test_a_mean_without_the_tasks_or_seeds_that_diverge_is_not_the_best(name, rounds):
    """Task i, or a seed, has F = (λ − i)². Below 0, the mean is smaller because the worst of them diverge."""

    def estimate(hyperparams, task, state):
        f = (hyperparams - task) ** 2 + 5 * state
        diverges = (hyperparams < 0) & ((task > 1.5) | (state > 0))
        return base.Estimate(jnp.where(diverges, jnp.nan, f), hyperparams, jnp.array(True), {}), state

    init = lambda key, hyperparams, task: jax.random.bernoulli(key) * (name == "seeds")
    rule = base.Estimator(init, estimate, kind="exact")
    rule = hypergrad.over_tasks(rule) if name == "tasks" else hypergrad.over_seeds(rule, 8)
    task = jnp.array([0.0, 1.0, 2.0, jnp.nan]) if name == "tasks" else 1.0  # one task is never finite
    proposed = jax.jit(training.propose(rule, num_proposals=40, rounds=rounds))(KEY, 0.1, task)
    assert proposed.hyperparams >= 0 and proposed.value > jnp.nanmin(proposed.values)
    assert abs(proposed.hyperparams - 1) < 0.2
    tuned = training.fine_tune(rule, num_steps=2, optimizer=optax.sgd(2.0))(KEY, 0.1, task)  # 0.1, −0.1, 0.1
    assert tuned.step == 0 and tuned.value > tuned.values[1]


def test_tasks_and_seeds_that_diverge_are_counted_together():
    """Below 0, a task diverges for all seeds; above, for some. The mean below 0 is smaller."""

    def estimate(hyperparams, task, state):
        diverges = (task > 1.5) & ((hyperparams < 0) | state)
        return base.Estimate(
            jnp.where(diverges, jnp.nan, (hyperparams - task) ** 2), hyperparams, jnp.array(True), {}
        ), state

    init = lambda key, hyperparams, task: jax.random.bernoulli(key, 0.6)
    rule = hypergrad.over_tasks(hypergrad.over_seeds(base.Estimator(init, estimate, kind="exact"), 8))
    proposed = training.propose(rule, num_proposals=40)(KEY, -0.2, jnp.array([0.0, 1.0, 2.0]))
    assert proposed.hyperparams >= 0 and proposed.value > jnp.nanmin(proposed.values)


@pytest.mark.once
def test_later_rounds_come_closer_than_as_many_draws_of_one_round():
    keys = jax.random.split(KEY, 40)
    start = jnp.zeros(8)
    task = TASK._replace(valid=jnp.ones(8))
    many, one = (
        jax.jit(jax.vmap(training.propose(quadratic(), **options), (0, None, None)))(keys, start, task).value.mean()
        for options in ({"rounds": 5}, {"num_proposals": 50})
    )
    assert many < 0.7 * one < 0.7 * 8


START_IN_SPACE = {"penalty": jnp.array([0.1, 0.5, 1.0, 2.0])}


@pytest.mark.once
def test_with_its_space_it_takes_and_returns_natural_units():
    start, task = START_IN_SPACE, problems.DISTANCE_TASKS[0]
    coordinates = spaces.to_unconstrained(problems.SPACE, start)
    spread = {"penalty": jnp.array([0.0, 0.1, 0.2, 0.5])}
    propose = jax.jit(training.propose(problems.DISTANCE, spread=spaces.Unconstrained(spread)))
    expected = propose(KEY, coordinates, task)
    propose = jax.jit(training.propose(problems.DISTANCE, spread=spread, space=problems.SPACE))
    for one_start in (start, coordinates):  # λ, or a prediction
        proposed = propose(KEY, one_start, task)
        np.testing.assert_allclose(proposed.values, expected.values, rtol=1e-12)
        penalty = 0.3 * np.exp(expected.hyperparams.coordinates["penalty"])  # λ = default · exp(z)
        np.testing.assert_allclose(proposed.hyperparams["penalty"], penalty, rtol=1e-12)
    assert proposed.index > 0
    np.testing.assert_allclose(proposed.hyperparams["penalty"][0], 0.1, rtol=1e-12)  # no spread in this coordinate
    assert (proposed.hyperparams["penalty"][1:] != start["penalty"][1:]).all()
    assert proposed.value < expected.values[0]


def test_fixed_leaves_have_no_spread():
    space = {"a": spaces.positive(1.0), "b": spaces.fixed(0.5)}
    loss = lambda z, task, key: (spaces.to_constrained(space, z)["a"] - 3.0) ** 2
    for spread in (0.5, {"a": 0.5, "b": None}):
        propose = training.propose(hypergrad.direct(loss), space=space, spread=spread)
        proposed = propose(KEY, {"a": 1.0, "b": 0.5}, TASK)
        assert proposed.hyperparams["b"] == 0.5 and proposed.hyperparams["a"] > 1.2


@pytest.mark.once
def test_over_tasks_and_in_chunks():
    estimator, start, tasks = problems.DISTANCE, START_IN_SPACE, problems.DISTANCE_TASKS
    starts = {"penalty": jnp.stack([start["penalty"] * scale for scale in (1.0, 1.5, 0.5)])}
    keys = jax.random.split(KEY, 3)
    batches = [
        jax.jit(jax.vmap(training.propose(estimator, num_proposals=7, rounds=2, space=problems.SPACE, chunk=chunk)))(
            keys, starts, problems.stack(tasks)
        )
        for chunk in (None, 1, 3, 100)
    ]
    for batch in batches[1:]:
        chex.assert_trees_all_close(batch, batches[0], rtol=1e-10)
    one = jax.jit(training.propose(estimator, num_proposals=7, rounds=2, space=problems.SPACE))
    singles = [one(keys[i], {"penalty": starts["penalty"][i]}, tasks[i]) for i in range(3)]
    chex.assert_trees_all_close(batches[0], problems.stack(singles), rtol=1e-8)


@pytest.mark.once
def test_with_one_estimator_over_tasks_it_chooses_one_lambda():
    estimator, start, tasks = problems.DISTANCE, START_IN_SPACE, problems.stack(problems.DISTANCE_TASKS)
    propose = training.propose(hypergrad.over_tasks(estimator), spread=0.2, space=problems.SPACE)
    proposed = jax.jit(propose)(KEY, start, tasks)
    assert proposed.index > 0
    z = spaces.to_unconstrained(problems.SPACE, proposed.hyperparams)
    one = lambda task: estimator.estimate(z, task, KEY)[0].value  # it uses no key
    np.testing.assert_allclose(proposed.value, jax.vmap(one)(tasks).mean(), rtol=1e-10)


@pytest.mark.once
def test_the_value_is_that_of_a_run_with_the_shared_key():
    """For a problem with a random start, random batches and noise in the loss."""
    estimator = hypergrad.unrolled(problems.NOISY, num_steps=2)
    keys = []

    def init(key, hyperparams, task):
        jax.debug.callback(lambda key: keys.append(tuple(np.ravel(key))), bits(key))
        return estimator.init(key, hyperparams, task)

    recorded = estimator._replace(init=init)
    proposed = jax.jit(training.propose(recorded, spread=0.1))(KEY, 0.7, problems.NOISY_TASK)
    jax.effects_barrier()
    assert len(set(keys)) == 1
    run_key = jax.random.wrap_key_data(np.array(keys[0], np.uint32))
    expected = jax.jit(estimator.estimate)(proposed.hyperparams, problems.NOISY_TASK, run_key)[0].value
    np.testing.assert_allclose(proposed.value, expected, rtol=1e-10)
    assert len(set(proposed.values.tolist())) == 10


def test_float32_stays_float32():
    with jax.enable_x64(False):
        task = base.Task(np.zeros(1, np.float32), np.ones(2, np.float32))
        proposed = jax.jit(training.propose(quadratic(), rounds=2))(KEY, np.zeros(2, np.float32), task)
        assert [leaf.dtype.name for leaf in proposed] == ["float32", "float32", "int32", "float32"]

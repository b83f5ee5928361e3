"""The actor-critic and its hypergradients, the accounting of steps, the searches and the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import script
from experiments.rl import actor_critic, environments, scores, searches
from experiments.rl.actor_critic import FAMILIES, OTHER_START, REFERENCE, SPACE, START, Sizes
from metaopt import hypergrad, inner, spaces

pytestmark = pytest.mark.once  # an experiment
SIZES = Sizes(num_actors=3, length=12, hidden=5)


def z_of(**hyperparams):
    return jax.tree.map(lambda x: x[0], searches.coordinates([hyperparams]))


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_advantages_are_sums_of_errors(trace):
    key = jax.random.key(0)
    reward, values = jax.random.normal(key, (6, 2)), jax.random.normal(jax.random.fold_in(key, 1), (7, 2))
    discount = 0.9 * jnp.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1.0]])
    result = np.asarray(actor_critic.advantages(reward, discount, values, trace))
    for t in range(6):
        expected, weight = 0.0, 1.0
        for s in range(t, 6):
            expected += weight * (reward[s] + discount[s] * values[s + 1] - values[s])
            weight = weight * discount[s] * trace
        np.testing.assert_allclose(result[t], expected, rtol=1e-12)
    if trace == 1:  # the return up to the end of the episode, or of the rollout
        returns = reward[0] + discount[0] * (reward[1] + discount[1] * (reward[2] + discount[2] * reward[3]))
        np.testing.assert_allclose(result[0, 0] + values[0, 0], returns[0], rtol=1e-12)


def test_the_policy_gradient_is_that_of_the_formula():
    family, params = FAMILIES["Catch"], actor_critic.initial_params(jax.random.key(0), 50, 3, 5)
    actors = actor_critic.start(family.environment, jax.random.key(1), family.physics, 3)
    rollout = actor_critic.policy_rollout(family.environment, params, jax.random.key(2), actors, family.physics, 30)[1]
    hyperparams = {**REFERENCE, "value": 0.0, "entropy": 0.0}
    grads = jax.grad(actor_critic.actor_critic_loss)(params, hyperparams, rollout)
    logits, values = jax.vmap(jax.vmap(lambda x: actor_critic.apply(params, x)))(rollout.observation)
    last = jax.vmap(lambda x: actor_critic.apply(params, x)[1])(rollout.last)
    discount = (1 - 1 / REFERENCE["horizon"]) * rollout.discount
    advantage = actor_critic.advantages(rollout.reward, discount, jnp.concatenate([values, last[None]]), 0.95)
    weight = (advantage - advantage.mean()) / advantage.std()
    error = jax.nn.one_hot(rollout.action, 3) - jax.nn.softmax(logits)
    np.testing.assert_allclose(grads["policy_b"], -(weight[..., None] * error).mean((0, 1)), rtol=1e-4, atol=1e-7)
    assert not np.any(grads["value_w"])


def test_the_divergence_is_weighted_by_the_old_policy():
    params = {**actor_critic.initial_params(jax.random.key(0), 2, 3, 4), "policy_w": jnp.zeros((4, 3))}
    old, new = jnp.array([0.5, -1.0, 0.2]), jnp.array([-0.3, 0.4, 1.0])
    value = actor_critic.divergence({**params, "policy_b": old}, {**params, "policy_b": new}, jnp.ones((5, 2, 2)))
    p, q = jax.nn.softmax(old), jax.nn.softmax(new)
    np.testing.assert_allclose(value, (p * jnp.log(p / q)).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["Catch", "CartPole"])
def test_hypergradients_equal_differences_of_the_update_times_the_outer_gradient(name):
    """dF/dλ = (∂θ'/∂λ)ᵀ ∇f(θ'), where the rollout of the update does not depend on λ."""
    family = FAMILIES[name]
    problem, task = actor_critic.make_problem(family, SIZES), actor_critic.make_task(family)
    loop, z = problem.loop, z_of(rate=3e-2, horizon=10.0)
    estimator = hypergrad.truncated(problem, num_steps=8, truncation_length=1)
    state = estimator.init(jax.random.key(3), z, task)
    estimate = jax.jit(estimator.estimate)
    for _ in range(3):  # Adam's first step does not depend on the size of the gradient
        _, state = estimate(z, task, state)
    out, _ = estimate(z, task, state)
    after = jax.jit(lambda z: inner.step(loop, state.inner, z, task.train))
    new = after(z)
    _, rollout = actor_critic.policy_rollout(
        family.environment, new.params, loop.context(new).key, new.model_state.actors, family.physics, SIZES.length
    )
    outer_loss = lambda params: (
        actor_critic.actor_critic_loss(params, REFERENCE, rollout, family.scale)
        + actor_critic.divergence(state.inner.params, params, rollout.observation)
    )
    outer_grads = jax.grad(outer_loss)(new.params)
    leaves, structure = jax.tree.flatten(z)
    for i, slope in enumerate(jax.tree.leaves(out.hypergrad)):
        moved = [structure.unflatten([x + e * (i == j) for j, x in enumerate(leaves)]) for e in (1e-5, -1e-5)]
        ahead, behind = (after(z).params for z in moved)
        differences = jax.tree.map(lambda a, b, g: ((a - b) / 2e-5 * g).sum(), ahead, behind, outer_grads)
        expected = sum(jax.tree.leaves(differences))
        assert abs(expected) > 1e-8
        np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=1e-10)


def test_the_outer_rollout_is_the_rollout_of_the_next_step():
    """So the outer loss takes no further steps of the environments."""
    family = FAMILIES["maze"]
    problem, task, z = actor_critic.make_problem(family, SIZES), actor_critic.make_task(family), z_of()
    estimator = hypergrad.truncated(problem, num_steps=8, truncation_length=1)
    estimate, state = jax.jit(estimator.estimate), estimator.init(jax.random.key(0), z, task)
    for _ in range(4):
        out, state = estimate(z, task, state)
        context = problem.loop.context(state.inner)
        actors, rollout = actor_critic.policy_rollout(
            family.environment,
            state.inner.params,
            context.key,
            context.model_state.actors,
            family.physics,
            SIZES.length,
        )
        assert out.value == pytest.approx(-float(rollout.reward.mean()))
        _, later = estimate(z, task, state)
        jax.tree.map(np.testing.assert_array_equal, actors, later.inner.model_state.actors)


def test_training_learns_with_good_values_only():
    family, sizes, num_updates = FAMILIES["Catch"], Sizes(8, 16, 16), 150
    problem = actor_critic.make_problem(family, sizes)
    trainer = searches.trainer(problem, family.physics, num_updates, 2)
    z = searches.coordinates([{**REFERENCE, "rate": 1e-2}, START])
    returns = searches.final(trainer.train(searches.run_keys([0, 1]), z, num_updates))
    assert returns[0] > 0.3 > 0 > returns[1]


def test_a_trainer_in_chunks_equals_one_that_runs_all():
    family = FAMILIES["CartPole"]
    problem, z = actor_critic.make_problem(family, SIZES), searches.coordinates([START, {**START, "rate": 0.01}, START])
    keys = searches.run_keys([0, 1, 2])
    whole, parts = (searches.trainer(problem, family.physics, 6, chunk) for chunk in (3, 2))
    first = whole.train(keys, z, 6)
    np.testing.assert_allclose(parts.train(keys, z, 6), first)
    states, curves = parts.advance(parts.start(keys, z), z, 4)
    _, later = parts.advance(states, z, 2)
    np.testing.assert_allclose(np.concatenate([curves, later], 1), first)
    assert first.shape == (3, 6, 2) and np.all(np.diff(first[..., 1]) >= 0)


def test_mean_returns_are_of_episodes_that_end_in_the_part():
    curve = np.array([[0, 0], [3, 1], [3, 1], [13, 3]], float)
    assert searches.mean_returns(curve, 0.5, 1.0) == 5 and searches.mean_returns(curve, 0.0, 0.5) == 3
    assert searches.mean_returns(curve, 0.5, 0.75) == 3  # no episode ended: all before
    assert np.isnan(searches.mean_returns(curve, 0.0, 0.25))


def test_the_worst_quarter_copies_the_best_and_moves():
    states = searches.inner._loop.LoopState(jnp.arange(8.0), (), None, searches.run_keys(range(8)), jnp.zeros(8))
    returns = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 6.0, 7.0]])
    z = spaces.Unconstrained({"a": jnp.arange(8.0)})
    new, moved = searches._exploit(states, z, returns, np.random.default_rng(0))
    np.testing.assert_array_equal(new.params, [0, 1, 2, 0, 7, 5, 6, 7])
    difference = np.asarray(moved.coordinates["a"] - new.params)
    np.testing.assert_array_equal(difference != 0, [0, 0, 0, 1, 1, 0, 0, 0])
    assert len(set(map(str, jax.random.key_data(new.key).tolist()))) == 8


def test_the_interquartile_mean_and_its_interval():
    assert scores.interquartile_mean(np.array([9.0, 1, 2, 3, 4, 5, 6, 700])) == pytest.approx(4.5)
    values = np.random.default_rng(0).normal(size=(3, 200))
    middle, low, high = scores.interval(values)
    assert low < middle < high and high - low == pytest.approx(2 * 1.96 * 1.09 / 600**0.5, rel=0.2)
    shifted = values + np.array([[0.0], [5.0], [10.0]])  # strata: the differences between families add nothing
    assert scores.interval(shifted)[2] - scores.interval(shifted)[1] < 0.5


def test_runs_without_a_finite_score_count_as_the_worst():
    """NaN is last in a sorted array, so it would count as the best score."""
    values = np.array([np.nan, 0.9, 0.8, 0.9, np.nan, 0.9, np.inf, -np.inf])
    assert scores.interquartile_mean(values) == pytest.approx(
        scores.interquartile_mean(np.array([0, 0.9, 0.8, 0.9] * 2) * [1, 1, 1, 1, 1, 1, 0, 0])
    )
    assert scores.interquartile_mean(np.full(4, np.nan)) == scores.WORST
    failed, good = np.full((2, 8), 0.9), np.full((2, 8), 0.9)
    failed[:, :3] = np.nan
    middle, low, high = scores.interval(failed)
    assert np.isfinite([middle, low, high]).all() and low < middle < 0.9 == pytest.approx(scores.interval(good)[0])
    # The score of a family at its lowest return is the worst one.
    assert all(family.score(family.low) == scores.WORST for family in FAMILIES.values())


def test_only_hyperparameters_with_an_outer_rate_are_tuned():
    family = FAMILIES["CartPole"]
    problem, num = actor_critic.make_problem(family, SIZES), 2
    estimator = hypergrad.truncated(problem, num_steps=8, truncation_length=1)
    tune = searches.tuned(estimator, 8, num)
    keys, z = searches.run_keys([0, 1]), searches.coordinates([{**START, "rate": 0.01}] * num)
    tasks = script.repeated(actor_critic.make_task(family), num)
    _, paths = tune(keys, z, searches.outer_rates([0.1] * num, ("rate", "value")), tasks)
    for name, path in paths.items():
        moves = np.abs(np.diff(path, axis=1)).max(1)
        assert (moves > 0).all() if name in ("rate", "value") else (moves == 0).all(), name
    # The first steps of Adam have the size of its rate, in unconstrained coordinates.
    _, slow = tune(keys, z, searches.outer_rates([0.01] * num), tasks)
    _, fast = tune(keys, z, searches.outer_rates([0.02] * num), tasks)
    to_z = lambda path: np.asarray(SPACE["horizon"].to_unconstrained(jnp.asarray(path["horizon"], float)))
    start = np.asarray(z.coordinates["horizon"])
    np.testing.assert_allclose(np.abs(to_z(slow)[:, 0] - start), 0.01, rtol=1e-2)
    np.testing.assert_allclose(np.abs(to_z(fast)[:, 0] - start), 0.02, rtol=1e-2)


def test_spaces_contain_all_values_that_are_used():
    for hp in (START, OTHER_START, {**START, **REFERENCE}):
        assert all(leaf.contains(jnp.asarray(hp[name])) for name, leaf in SPACE.items())
    assert environments.maze().params.walls.sum() == 5

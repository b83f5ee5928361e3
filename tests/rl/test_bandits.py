"""Gittins indices against published ones, and the players."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rl import bandits, environments

pytestmark = pytest.mark.once  # an experiment


def test_indices_equal_the_published_ones():
    """Gittins, Multi-armed Bandit Allocation Indices, 1989: discount 0.9, uniform prior."""
    indices = bandits.gittins_indices(0.9, 3, 300)
    np.testing.assert_allclose([indices[0, 0], indices[1, 0], indices[0, 1]], [0.7029, 0.8001, 0.5001], atol=2e-4)
    assert bandits.gittins_indices(0.99, 1, 1000)[0, 0] == pytest.approx(0.8699, abs=1e-3)


def test_an_arm_that_is_pulled_last_is_worth_its_mean():
    indices = bandits.gittins_indices(1e-6, 3, 10)
    np.testing.assert_allclose([indices[0, 0], indices[2, 0], indices[0, 2]], [0.5, 0.75, 0.25], atol=1e-3)


def test_players_count_and_choose():
    env, num_arms = environments.bandit(3), 3
    player = bandits.counting(num_arms, lambda key, wins, losses: wins - losses)
    observation = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0])  # arm 1 paid
    arm, memory = player.act(jax.random.key(0), player.memory, observation)
    assert arm == 1
    np.testing.assert_array_equal(memory, [[0, 1, 0], [0, 0, 0]])
    arm, memory = player.act(jax.random.key(0), memory, observation.at[3].set(0.0))
    np.testing.assert_array_equal(memory, [[0, 1, 0], [0, 1, 0]])
    first = {int(player.act(jax.random.key(i), player.memory, jnp.zeros(5))[0]) for i in range(20)}
    assert first == {0, 1, 2}  # ties, before the first pull
    indices = bandits.gittins_indices(0.99, 100, 300)
    rewards = {
        name: np.asarray(bandits.total_rewards(env, p, jax.random.key(1), 400))
        for name, p in bandits.players(num_arms, indices).items()
    }
    assert rewards["random"].mean() == pytest.approx(50, abs=2)
    assert rewards["Gittins index"].mean() > rewards["Thompson sampling"].mean() > rewards["random"].mean() + 10


@pytest.mark.parametrize("shared", [False, True])
def test_a_recurrent_unit_keeps_its_memory_where_its_gate_is_one(shared):
    weights = bandits.initial_weights(
        jax.random.key(0), environments.bandit(2), bandits.Settings(hidden=3, shared=shared)
    )
    memory = jnp.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]])[: 2 if shared else 1]
    observation = jnp.array([1.0, 0.0, 1.0, 0.5])  # arm 0 paid, half of the pulls
    closed = {**weights, "gates_b": jnp.array([50.0, 50, 50, 0, 0, 0])}
    np.testing.assert_allclose(bandits.recurrent(closed, memory, observation)[0], memory)
    opened = {**weights, "gates_b": jnp.array([-50.0, -50, -50, 50, 50, 50])}
    inputs = [[1, 1, 0.5], [0, 0, 0.5]] if shared else [observation]
    rows = [np.concatenate([x, memory.mean(0), own]) for x, own in zip(inputs, memory, strict=True)]
    np.testing.assert_allclose(
        bandits.recurrent(opened, memory, observation)[0], np.tanh(np.stack(rows) @ np.asarray(weights["new_w"]))
    )
    assert bandits.first_memory(weights, 2).shape == memory.shape


def test_units_that_share_weights_do_not_depend_on_the_order_of_the_arms():
    weights = bandits.initial_weights(
        jax.random.key(0), environments.bandit(3), bandits.Settings(hidden=4, shared=True)
    )
    order, memory = np.array([2, 0, 1]), jax.random.normal(jax.random.key(1), (3, 4))
    arm = jnp.array([0.0, 1.0, 0.0])
    see = lambda arm: jnp.concatenate([arm, jnp.array([1.0, 0.3])])
    first = bandits.recurrent(weights, memory, see(arm))
    other = bandits.recurrent(weights, memory[order], see(arm[order]))
    np.testing.assert_allclose(other[0], first[0][order], rtol=1e-6)
    np.testing.assert_allclose(other[1], first[1][order], rtol=1e-6)
    assert other[2] == pytest.approx(float(first[2])) and np.ptp(first[1]) > 1e-4


def test_the_regret_is_the_mean_reward_minus_that_of_the_best_arm():
    env, settings = environments.bandit(3), bandits.Settings(hidden=4, shared=True, batch=2000)
    weights = bandits.initial_weights(jax.random.key(0), env, settings)
    weights = {**weights, "policy_w": jnp.zeros((4, 1))}  # uniform
    episodes = jax.jit(lambda key: bandits.play(weights, env, key, settings))(jax.random.key(1))
    assert episodes.regret.max() <= 0 and episodes.regret.shape == (100, 2000)
    # The best of three uniform probabilities is 3/4 on average, and a random one 1/2.
    assert episodes.regret.mean() == pytest.approx(-0.25, abs=0.01)
    assert episodes.reward.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(episodes.taken, np.log(1 / 3), rtol=1e-5)
    np.testing.assert_allclose(episodes.entropy, np.log(3), rtol=1e-5)
    assert len(np.unique(np.round(np.asarray(episodes.regret)[:, 0], 5))) == 3  # one value for each arm


def test_the_network_learns_to_stay_with_the_better_arm():
    settings = bandits.Settings(num_updates=80, batch=32, hidden=8, rate=1e-2)
    env = environments.bandit(2)
    player = bandits.network_player(bandits.train(env, settings, jax.random.key(0)), 2)
    rewards = bandits.total_rewards(env, player, jax.random.key(1), 1000)
    assert rewards.mean() > 57  # random pulls earn 50, the better arm 67


def test_the_episodes_of_a_trial_have_one_task_and_the_observation_shows_what_happened():
    env = environments.maze()  # `reset` draws the position and the goal
    params = env.params._replace(max_steps=4)
    trial = bandits.trial(env)
    draws = np.stack([trial.reset(jax.random.key(i), params)[0] for i in range(6)])
    assert len(np.unique(draws, axis=0)) > 1 and not draws[:, -6:].any()
    first, state = trial.reset(jax.random.key(0), params)
    goal, num_ended = state.state.goal, 0
    for i in range(1, 13):
        observation, state, reward, terminated, truncated, _ = trial.step(jax.random.key(i), state, i % 4, params)
        ended = bool(terminated | truncated)
        np.testing.assert_array_equal(observation[-6:], [*np.eye(4)[i % 4], reward, ended])
        num_ended += ended
        assert state.state.goal == goal
        if ended:  # the same start
            np.testing.assert_array_equal(observation[:-6], first[:-6])
    assert num_ended >= 3  # an episode has four steps at most


def test_units_that_share_weights_take_bandits_only():
    with pytest.raises(ValueError, match="shared=False"):
        bandits.initial_weights(jax.random.key(0), bandits.trial(environments.maze()), bandits.Settings())


def test_a_single_unit_learns_a_task_that_its_first_episode_shows():
    """The goal is left or right of the start. An episode ends after one move, so the second move knows the goal."""

    def move(key, goal, action, params):
        return goal, jnp.where(action == goal, 1.0, -1.0), jnp.array(True), jnp.array(False)

    start = lambda key, params: jax.random.bernoulli(key).astype(jnp.int32)
    env = bandits.trial(environments.environment(start, move, lambda goal, params: jnp.zeros(1), (), 2))
    settings = bandits.Settings(num_updates=60, batch=32, hidden=8, rate=2e-2, shared=False, regret=False)
    weights = bandits.train(env, settings, jax.random.key(0))
    rewards = bandits.total_rewards(env, bandits.network_player(weights, 2), jax.random.key(1), 200)
    assert rewards.mean() > 50  # one policy for both goals earns 0, the best 99

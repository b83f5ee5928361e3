"""Gittins indices against published ones, and the players."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rl import bandits, environments


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


def test_a_recurrent_unit_keeps_its_memory_where_its_gate_is_one():
    weights = bandits.initial_weights(jax.random.key(0), 2, 3)
    memory, observation = jnp.array([0.3, -0.2, 0.5]), jnp.array([1.0, 0.0, 1.0, 0.5])
    closed = {**weights, "gates_b": jnp.array([50.0, 50, 50, 0, 0, 0])}
    np.testing.assert_allclose(bandits.recurrent(closed, memory, observation)[0], memory)
    opened = {**weights, "gates_b": jnp.array([-50.0, -50, -50, 50, 50, 50])}
    expected = np.tanh(np.concatenate([observation, memory]) @ weights["new_w"])
    np.testing.assert_allclose(bandits.recurrent(opened, memory, observation)[0], expected)


@pytest.mark.once
def test_the_network_learns_to_stay_with_the_better_arm():
    settings = bandits.Settings(num_updates=250, batch=32, hidden=16, rate=1e-2)
    player = bandits.network_player(bandits.train(2, settings, jax.random.key(0)))
    rewards = bandits.total_rewards(environments.bandit(2), player, jax.random.key(1), 1000)
    assert rewards.mean() > 57  # random pulls earn 50, the better arm 67

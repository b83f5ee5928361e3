"""RL² on Bernoulli bandits of 100 pulls, next to Thompson sampling and Gittins indices.

A recurrent network sees its last arm, the last reward and the share of pulls so far, and chooses the next arm. It
learns over bandits with uniform arms, and adapts to a new bandit only by its hidden state. Its weights are λ, and
`hypergrad.direct` gives the actor-critic gradient over a batch of episodes, centered for each pull (Duan et al., 2016,
https://arxiv.org/abs/1611.02779).

Gittins indices come from a dynamic program: the index of an arm is the reward of a sure arm that is worth as much.
They are optimal for an infinite sum with a discount, here 0.99, and only approximately for 100 pulls. All methods play
the same bandits. The settings were chosen with another key, by the rewards in training on five arms.

    python experiments/rl/bandits.py --full     # minutes; writes results/rl_bandits.md
    python experiments/rl/bandits.py --smoke    # seconds; prints only
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.rl import actor_critic, environments
from metaopt import hypergrad, training

DISCOUNT = 0.99
NUM_PULLS = 100


class Settings(NamedTuple):
    arms: tuple[int, ...] = (5, 10)
    num_updates: int = 1500
    batch: int = 64
    hidden: int = 32
    rate: float = 3e-3
    entropy: float = 0.05  # at the start; it falls to 0
    discount: float = 0.8  # of the network's returns; small, because the values of many later pulls are mostly noise
    num_episodes: int = 4000  # for the comparison
    horizon: int = 1000  # for the dynamic program


SMOKE = Settings((2,), 3, 4, 4, num_episodes=40, horizon=150)


# ---- players of a bandit ---------------------------------------------------------------------------------------------


class Player(NamedTuple):
    """A policy with a memory.

    Attributes:
      memory: the memory before the first pull.
      act: `(key, memory, observation) -> (arm, memory)`.
    """

    memory: Any
    act: Callable


def counting(num_arms: int, index: Callable) -> Player:
    """Plays an arm with the largest `index(key, successes [k], failures [k])`; ties are broken at random."""

    def act(key, memory, observation):
        arm, reward = observation[:num_arms], observation[num_arms]
        memory = memory + jnp.stack([arm * reward, arm * (1 - reward)])
        index_key, tie_key = jax.random.split(key)
        values = index(index_key, *memory)
        ties = jax.random.uniform(tie_key, (num_arms,))
        return jnp.argmax(jnp.where(values >= values.max() - 1e-9, ties, -1)), memory

    return Player(jnp.zeros((2, num_arms)), act)


def players(num_arms: int, indices: np.ndarray) -> dict[str, Player]:
    table = jnp.asarray(indices, float)
    mean = lambda key, wins, losses: (1 + wins) / (2 + wins + losses)
    return {
        "random": counting(num_arms, lambda key, wins, losses: jnp.zeros(num_arms)),
        "greedy": counting(num_arms, mean),
        "Thompson sampling": counting(num_arms, lambda key, wins, losses: jax.random.beta(key, 1 + wins, 1 + losses)),
        "Gittins index": counting(
            num_arms, lambda key, wins, losses: table[wins.astype(jnp.int32), losses.astype(jnp.int32)]
        ),
    }


def total_rewards(env: environments.Environment, player: Player, key: jax.Array, num_episodes: int) -> jax.Array:
    """Returns the sum of the rewards of each episode. The same key gives the same bandits to every player."""
    params = environments.BanditParams(max_steps=NUM_PULLS)

    def episode(key):
        reset_key, play_key = jax.random.split(key)

        def pull(carry, key):
            memory, observation, state = carry
            act_key, step_key = jax.random.split(key)
            arm, memory = player.act(act_key, memory, observation)
            observation, state, reward, _, _ = env.step(step_key, state, arm, params)
            return (memory, observation, state), reward

        start = (player.memory, *env.reset(reset_key, params))
        return jax.lax.scan(pull, start, jax.random.split(play_key, NUM_PULLS))[1].sum()

    return jax.jit(jax.vmap(episode))(jax.random.split(key, num_episodes))


def gittins_indices(discount: float, num_pulls: int, horizon: int, num_levels: int = 500) -> np.ndarray:
    """Returns the indices [num_pulls, num_pulls] of Bernoulli arms after s successes and f failures, from Beta(1, 1).

    The index is the sure reward λ at which pulling and stopping are equal (Gittins, 1979):

        V(s, f; λ) = max(λ / (1 − γ), p (1 + γ V(s + 1, f)) + (1 − p) γ V(s, f + 1)),    p = (1 + s) / (2 + s + f).

    At `horizon` pulls, V is max(λ, p) / (1 − γ). Between `num_levels` values of λ, it is interpolated.
    """
    levels = np.linspace(0, 1, num_levels)[None]
    stop = levels / (1 - discount)
    indices = np.full((num_pulls, num_pulls), np.nan)
    value = np.maximum(levels, _means(horizon)) / (1 - discount)
    for n in range(horizon - 1, -1, -1):
        p = _means(n)
        pull = p * (1 + discount * value[1:]) + (1 - p) * discount * value[:-1]
        if n < num_pulls:
            gain = pull - stop  # decreases in λ
            last = (gain > 0).sum(1) - 1
            rows = np.arange(n + 1)
            high, low = gain[rows, last], gain[rows, np.minimum(last + 1, num_levels - 1)]
            share = high / np.maximum(high - low, 1e-300)
            indices[rows, n - rows] = levels[0, last] + share / (num_levels - 1)
        value = np.maximum(stop, pull)
    return indices


def _means(n: int) -> np.ndarray:
    """The posterior means after n pulls with 0, ..., n successes, [n + 1, 1]."""
    return ((1 + np.arange(n + 1)) / (2 + n))[:, None]


# ---- RL² -------------------------------------------------------------------------------------------------------------


def initial_weights(key: jax.Array, num_arms: int, hidden: int) -> dict[str, jax.Array]:
    num_inputs, keys = num_arms + 2 + hidden, jax.random.split(key, 3)
    return {
        "gates_w": jax.random.normal(keys[0], (num_inputs, 2 * hidden)) / num_inputs**0.5,
        "gates_b": jnp.concatenate([jnp.ones(hidden), jnp.zeros(hidden)]),
        "new_w": jax.random.normal(keys[1], (num_inputs, hidden)) / num_inputs**0.5,
        "new_b": jnp.zeros(hidden),
        "policy_w": 0.01 * jax.random.normal(keys[2], (hidden, num_arms)),
        "policy_b": jnp.zeros(num_arms),
        "value_w": jnp.zeros(hidden),
        "value_b": jnp.zeros(()),
    }


def recurrent(weights, memory, observation):
    """One step of a gated recurrent unit. Returns its memory, logits and the predicted mean of later rewards."""
    both = jnp.concatenate([observation, memory])
    keep, reset = jnp.split(jax.nn.sigmoid(both @ weights["gates_w"] + weights["gates_b"]), 2)
    new = jnp.tanh(jnp.concatenate([observation, reset * memory]) @ weights["new_w"] + weights["new_b"])
    memory = keep * memory + (1 - keep) * new
    logits = memory @ weights["policy_w"] + weights["policy_b"]
    return memory, logits, memory @ weights["value_w"] + weights["value_b"]


def network_player(weights: dict[str, jax.Array]) -> Player:
    def act(key, memory, observation):
        memory, logits, _ = recurrent(weights, memory, observation)
        return jax.random.categorical(key, logits), memory

    return Player(jnp.zeros(weights["new_b"].shape), act)


def episode_losses(weights, env: environments.Environment, key: jax.Array, batch: int):
    """Returns log π of the pulled arms, predicted means, entropies and rewards, each [pulls, batch]."""
    params = environments.BanditParams(max_steps=NUM_PULLS)
    reset_key, play_key = jax.random.split(key)
    observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, batch), params)

    def pull(carry, key):
        memory, observation, state = carry
        act_key, step_key = jax.random.split(key)
        memory, logits, value = jax.vmap(recurrent, (None, 0, 0))(weights, memory, observation)
        log_policy = jax.nn.log_softmax(logits)
        arm = jax.random.categorical(act_key, jax.lax.stop_gradient(logits))
        keys = jax.random.split(step_key, batch)
        observation, state, reward, _, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, arm, params)
        taken = jnp.take_along_axis(log_policy, arm[:, None], axis=1)[:, 0]
        entropy = -(jnp.exp(log_policy) * log_policy).sum(-1)
        return (memory, observation, state), (taken, value, entropy, reward)

    start = (jnp.zeros((batch, *weights["new_b"].shape)), observation, state)
    return jax.lax.scan(pull, start, jax.random.split(play_key, NUM_PULLS))[1]


def train(num_arms: int, settings: Settings, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the trained weights."""
    env = environments.bandit(num_arms)
    start_key, learn_key = jax.random.split(key)

    def loss(hyperparams, step, key):
        taken, means, entropy, reward = episode_losses(hyperparams, env, key, settings.batch)
        values = means / (1 - settings.discount)
        constant = jax.lax.stop_gradient(jnp.concatenate([values, jnp.zeros_like(values[:1])]))
        advantage = actor_critic.advantages(reward, jnp.full_like(reward, settings.discount), constant, 1.0)
        errors = (1 - settings.discount) * (values - (advantage + constant[:-1]))  # of a mean reward
        centered = advantage - advantage.mean(1, keepdims=True)  # of each pull
        normalized = centered / (centered.std() + 1e-6)
        weight = settings.entropy * (1 - step / settings.num_updates)
        return 0.5 * (errors**2).mean() - (taken * normalized).mean() - weight * entropy.mean()

    rate = optax.cosine_decay_schedule(settings.rate, settings.num_updates)
    learner = training.learner(hypergrad.direct(loss), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))

    @jax.jit
    def run(weights):
        steps = jnp.arange(settings.num_updates, dtype=float)
        state = learner.init(learn_key, weights, steps[0])
        return jax.lax.scan(lambda state, step: (learner.step(state, step)[0], None), state, steps)[0].hyperparams

    return run(initial_weights(start_key, num_arms, settings.hidden))


# ---- the page --------------------------------------------------------------------------------------------------------


def results(num_arms: int, seed: int, settings: Settings, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {method: total rewards [num_episodes]}."""
    env, key = environments.bandit(num_arms), jax.random.key(1000 + seed)
    compared = players(num_arms, indices)
    compared["RL²"] = network_player(train(num_arms, settings, jax.random.key(seed)))
    return {name: np.asarray(total_rewards(env, p, key, settings.num_episodes)) for name, p in compared.items()}


def report(rewards: dict[int, list[dict[str, np.ndarray]]], settings: Settings) -> str:
    rows = []
    for name in next(iter(rewards.values()))[0]:
        row = [name]
        for runs in rewards.values():
            values = np.stack([run[name] for run in runs])
            differences = values - np.stack([run["Gittins index"] for run in runs])
            error = differences.mean(0).std(ddof=1) / values.shape[1] ** 0.5
            row += [f"{values.mean():.2f}", f"{differences.mean():+.2f} ± {1.96 * error:.2f}"]
            row.append(", ".join(f"{value:.2f}" for value in values.mean(1)))
        rows.append(row)
    header = ["method"]
    for num_arms in rewards:
        header += [f"{num_arms} arms", "minus Gittins [95 %]", "seeds"]
    return (
        f"Mean total reward of {NUM_PULLS} pulls over {settings.num_episodes} bandits per seed, the same for all "
        f"methods.\n\n{script.table(header, rows)}\n\nRL²: {settings.num_updates} updates of {settings.batch} "
        f"episodes, {settings.hidden} hidden units. Gittins: discount {DISCOUNT}, {settings.horizon} pulls."
    )


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--full", action="store_true", help="two seeds")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    args = parser.parse_args()
    settings, seeds = (SMOKE, 1) if args.smoke else (Settings(), 2 if args.full else args.seeds)
    folder = None if args.keep is None else script.work_folder(args.keep, Path(__file__).parent)
    indices = gittins_indices(DISCOUNT, NUM_PULLS, settings.horizon)
    print(f"index of Beta(1, 1): {indices[0, 0]:.4f}", flush=True)
    rewards: dict[int, list] = {}
    for num_arms in settings.arms:
        for seed in range(seeds):
            make = lambda num_arms=num_arms, seed=seed: results(num_arms, seed, settings, indices)
            run = script.kept(folder, f"bandit_{num_arms}_{seed}", make)
            rewards.setdefault(num_arms, []).append(run)
            print(num_arms, seed, {name: float(values.mean().round(2)) for name, values in run.items()}, flush=True)
    text = report(rewards, settings)
    script.publish(__file__, "RL² on Bernoulli bandits", text, args, name="rl_bandits")


if __name__ == "__main__":
    script.run(main)

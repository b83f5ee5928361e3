"""RL² on Bernoulli bandits of 100 pulls, next to Thompson sampling and Gittins indices.

A recurrent network sees its last arm, the last reward and the share of pulls so far, and chooses the next arm. It
learns over bandits with uniform arms, and adapts to a new bandit only by its hidden state. Its weights are λ, and
`hypergrad.direct` gives the actor-critic gradient over a batch of episodes, centered for each pull (Duan et al., 2016,
https://arxiv.org/abs/1611.02779). Each arm has a recurrent unit, and all units have the same weights. So the policy
does not depend on the order of the arms. In training, the loss has the regret p_arm − max p instead of the sampled
reward: its expected gradient is the same, and it has less noise. The simulator knows p; the policy never sees it.

Gittins indices come from a dynamic program: the index of an arm is the reward of a sure arm that is worth as much.
They are optimal for an infinite sum with a discount, here 0.99, and only approximately for 100 pulls. All methods play
the same bandits. The settings were chosen with other keys, on bandits with five arms (`--develop`): after 300 updates,
a network with one unit for all arms earns 50 to 54 of 100 pulls, and with a unit for each arm 74 to 75.

    python experiments/rl/bandits.py --full     # minutes; writes results/rl_bandits.md
    python experiments/rl/bandits.py --develop 300    # compares settings on other keys; prints only
    python experiments/rl/bandits.py --smoke    # seconds; prints only
"""

import time
from collections.abc import Callable, Sequence
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
DEVELOPMENT = 5000  # the first seed of the runs by which settings are chosen


class Settings(NamedTuple):
    arms: tuple[int, ...] = (5, 10)
    num_updates: int = 1000
    batch: int = 64
    hidden: int = 16
    rate: float = 3e-3
    entropy: float = 0.05  # at the start; it falls to 0
    discount: float = 0.99  # of the network's returns
    trace: float = 0.9  # λ of the returns
    regret: bool = True  # whether the loss sees the regret instead of the reward
    shared: bool = True  # whether each arm has a unit, and all of them have the same weights
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

    def episode(key):
        reset_key, play_key = jax.random.split(key)

        def pull(carry, key):
            memory, observation, state = carry
            act_key, step_key = jax.random.split(key)
            arm, memory = player.act(act_key, memory, observation)
            observation, state, reward, *_ = env.step(step_key, state, arm, env.params)
            return (memory, observation, state), reward

        start = (player.memory, *env.reset(reset_key, env.params))
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


class TrialState(NamedTuple):
    """The state of a trial: the environment's, and the key of its task."""

    state: Any
    task_key: jax.Array


def trial(env: environments.Environment) -> environments.Environment:
    """Returns an environment whose episodes all have one task, until it is reset.

    A task is what `env.reset` draws. After the end of an episode, the same key resets `env` to the same task and start.
    The observation is that of `env`, the last action (one-hot), the last reward, and 1 if an episode has ended.
    """

    def observe(observation, action, reward, ended):
        last = jnp.concatenate([jax.nn.one_hot(action, env.num_actions), jnp.stack([reward, ended])])
        return jnp.concatenate([observation.reshape(-1), last])

    def reset(key, params):
        observation, state = env.reset(key, params)
        return observe(observation, -1, jnp.zeros(()), jnp.zeros(())), TrialState(state, key)

    def step(key, state, action, params):
        new, first = env.step(key, state.state, action, params), env.reset(state.task_key, params)
        reward, terminated, truncated, info = new[2:]
        ended = terminated | truncated
        observation, own = jax.tree.map(lambda a, b: jnp.where(ended, a, b), first, new[:2])
        seen = observe(observation, action, reward, ended.astype(reward.dtype))
        return seen, TrialState(own, state.task_key), reward, terminated, truncated, info

    return environments.Environment(reset, step, env.params, env.num_actions)


def initial_weights(key: jax.Array, env: environments.Environment, settings: Settings) -> dict[str, jax.Array]:
    hidden, keys = settings.hidden, jax.random.split(key, 3)
    observation = jax.eval_shape(env.reset, key, env.params)[0]
    if settings.shared and observation.size != env.num_actions + 2:
        raise ValueError("Units that share weights need the observation of a bandit: pass `shared=False`.")
    num_inputs = (3 if settings.shared else observation.size) + 2 * hidden
    outputs = 1 if settings.shared else env.num_actions
    return {
        "gates_w": jax.random.normal(keys[0], (num_inputs, 2 * hidden)) / num_inputs**0.5,
        "gates_b": jnp.concatenate([jnp.ones(hidden), jnp.zeros(hidden)]),
        "new_w": jax.random.normal(keys[1], (num_inputs, hidden)) / num_inputs**0.5,
        "new_b": jnp.zeros(hidden),
        "policy_w": 0.01 * jax.random.normal(keys[2], (hidden, outputs)),
        "policy_b": jnp.zeros(outputs),
        "value_w": jnp.zeros(hidden),
        "value_b": jnp.zeros(()),
    }


def first_memory(weights: dict[str, jax.Array], num_arms: int) -> jax.Array:
    """Returns zeros [units, hidden]: one unit for each arm if they share weights, and else one unit."""
    hidden, outputs = weights["policy_w"].shape
    return jnp.zeros((num_arms if outputs == 1 else 1, hidden))


def recurrent(weights, memory, observation):
    """One step of gated recurrent units. Returns their memory, logits and the predicted mean of later rewards.

    A unit of an arm sees whether it was pulled, its reward, the share of pulls so far, and the mean of all memories.
    A single unit sees the whole observation.
    """
    num_units = len(memory)
    if weights["policy_w"].shape[1] == 1:
        arm, reward, share = observation[:num_units], observation[-2], observation[-1]
        inputs = jnp.stack([arm, arm * reward, jnp.full(num_units, share)], axis=1)
    else:
        inputs = observation[None]
    pooled = jnp.broadcast_to(memory.mean(0), memory.shape)
    both = jnp.concatenate([inputs, pooled, memory], axis=1)
    keep, reset = jnp.split(jax.nn.sigmoid(both @ weights["gates_w"] + weights["gates_b"][None]), 2, axis=1)
    new = jnp.tanh(
        jnp.concatenate([inputs, pooled, reset * memory], axis=1) @ weights["new_w"] + weights["new_b"][None]
    )
    memory = keep * memory + (1 - keep) * new
    logits = (memory @ weights["policy_w"] + weights["policy_b"][None]).reshape(-1)
    return memory, logits, memory.mean(0) @ weights["value_w"] + weights["value_b"]


def network_player(weights: dict[str, jax.Array], num_arms: int) -> Player:
    def act(key, memory, observation):
        memory, logits, _ = recurrent(weights, memory, observation)
        return jax.random.categorical(key, logits), memory

    return Player(first_memory(weights, num_arms), act)


class Episodes(NamedTuple):
    """Axes [pulls, batch].

    Attributes:
      taken: log π of the pulled arms.
      mean: predicted means of later rewards.
      entropy: of the policy.
      reward: the rewards.
      regret: the probability of the pulled arm minus that of the best one, if the loss needs it. The policy does not
        see it.
    """

    taken: jax.Array
    mean: jax.Array
    entropy: jax.Array
    reward: jax.Array
    regret: jax.Array | None


def play(weights, env: environments.Environment, key: jax.Array, settings: Settings) -> Episodes:
    """Plays a batch of bandits; the log-probabilities, means and entropies are differentiable."""
    batch = settings.batch
    reset_key, play_key = jax.random.split(key)
    observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, batch), env.params)

    def pull(carry, key):
        memory, observation, state = carry
        act_key, step_key = jax.random.split(key)
        memory, logits, value = jax.vmap(recurrent, (None, 0, 0))(weights, memory, observation)
        log_policy = jax.nn.log_softmax(logits)
        arm = jax.random.categorical(act_key, jax.lax.stop_gradient(logits))
        chosen = lambda table: jnp.take_along_axis(table, arm[:, None], axis=1)[:, 0]
        regret = chosen(state.probability) - state.probability.max(1) if settings.regret else None
        keys = jax.random.split(step_key, batch)
        observation, state, reward, *_ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, arm, env.params)
        entropy = -(jnp.exp(log_policy) * log_policy).sum(-1)
        return (memory, observation, state), Episodes(chosen(log_policy), value, entropy, reward, regret)

    memory = first_memory(weights, env.num_actions)
    start = (jnp.broadcast_to(memory, (batch, *memory.shape)), observation, state)
    return jax.lax.scan(pull, start, jax.random.split(play_key, NUM_PULLS))[1]


def rl2_loss(weights, env: environments.Environment, step: jax.Array, key: jax.Array, settings: Settings) -> jax.Array:
    """Returns the actor-critic loss of a batch of episodes at update `step`."""
    episodes = play(weights, env, key, settings)
    reward = episodes.regret if settings.regret else episodes.reward
    values = episodes.mean / (1 - settings.discount)
    constant = jax.lax.stop_gradient(jnp.concatenate([values, jnp.zeros_like(values[:1])]))
    discount = jnp.full_like(reward, settings.discount)
    advantage = actor_critic.advantages(reward, discount, constant, settings.trace)
    errors = (1 - settings.discount) * (values - (advantage + constant[:-1]))  # of a mean reward
    centered = advantage - advantage.mean(1, keepdims=True)  # of each pull
    normalized = centered / (centered.std() + 1e-6)
    weight = settings.entropy * (1 - step / settings.num_updates)
    return 0.5 * (errors**2).mean() - (episodes.taken * normalized).mean() - weight * episodes.entropy.mean()


def train(env: environments.Environment, settings: Settings, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the trained weights."""
    start_key, learn_key = jax.random.split(key)
    loss = lambda hyperparams, step, key: rl2_loss(hyperparams, env, step, key, settings)
    rate = optax.cosine_decay_schedule(settings.rate, settings.num_updates)
    learner = training.learner(hypergrad.direct(loss), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))

    @jax.jit
    def run(weights):
        steps = jnp.arange(settings.num_updates, dtype=float)
        state = learner.init(learn_key, weights, steps[0])
        return jax.lax.scan(lambda state, step: (learner.step(state, step)[0], None), state, steps)[0].hyperparams

    return run(initial_weights(start_key, env, settings))


ONE_UNIT = {"shared": False, "regret": False, "discount": 0.8, "trace": 1.0, "hidden": 32}
LARGE = {**ONE_UNIT, "shared": True}
VARIANTS = {
    "one unit": ONE_UNIT,
    "one unit, regret": {**ONE_UNIT, "regret": True},
    "one unit, regret, discount 0.95": {**ONE_UNIT, "regret": True, "discount": 0.95, "trace": 0.9},
    "one unit, regret, discount 0.99": {**ONE_UNIT, "regret": True, "discount": 0.99, "trace": 0.9},
    "one unit, regret, discount 0.99, trace 1": {**ONE_UNIT, "regret": True, "discount": 0.99},
    "32 numbers": LARGE,
    "32 numbers, regret": {**LARGE, "regret": True},
    "32 numbers, regret, discount 0.95": {**LARGE, "regret": True, "discount": 0.95, "trace": 0.9},
    "32 numbers, regret, discount 0.99": {"hidden": 32},
    "16 numbers, regret, discount 0.99": {},
    "16 numbers, reward, discount 0.99": {"regret": False},
    "16 numbers, regret, discount 0.95": {"discount": 0.95},
}


def develop(num_updates: int, names: Sequence[str], num_arms: int = 5) -> str:
    """Compares settings of RL² on other seeds."""
    rows, env = [], environments.bandit(num_arms)
    for name in names or VARIANTS:
        settings = Settings(num_updates=num_updates)._replace(**VARIANTS[name])
        weights = train(env, settings, jax.random.key(DEVELOPMENT))
        player = network_player(weights, num_arms)
        rewards = np.asarray(total_rewards(env, player, jax.random.key(DEVELOPMENT + 1), 2000))
        rows.append([name, f"{rewards.mean():.2f}", f"{1.96 * rewards.std() / len(rewards) ** 0.5:.2f}"])
        print(rows[-1], round(time.process_time()), flush=True)
    return script.table(["setting", "total reward", "± over bandits"], rows)


# ---- the page --------------------------------------------------------------------------------------------------------


def results(num_arms: int, seed: int, settings: Settings, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {method: total rewards [num_episodes]}."""
    env, key = environments.bandit(num_arms), jax.random.key(1000 + seed)
    compared = players(num_arms, indices)
    compared["RL²"] = network_player(train(env, settings, jax.random.key(seed)), num_arms)
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
        f"episodes, {settings.hidden} numbers for each arm, discount {settings.discount:g}, trace {settings.trace:g}, "
        f"rate {settings.rate:g}. Gittins: discount {DISCOUNT}, {settings.horizon} pulls."
    )


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--full", action="store_true", help="two seeds")
    parser.add_argument("--develop", type=int, default=0, metavar="UPDATES", help="compare settings on other seeds")
    parser.add_argument("--variants", nargs="*", default=[], choices=VARIANTS, help="only these settings")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    args = parser.parse_args()
    if args.develop:
        print(develop(args.develop, args.variants))
        return
    settings, seeds = (SMOKE, 1) if args.smoke else (Settings(), 2 if args.full else args.seeds)
    files = [Path(module.__file__) for module in (actor_critic, environments)]
    folder = None if args.keep is None or args.smoke else script.work_folder(args.keep, Path(__file__), *files)
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

"""An actor-critic as a problem of metaopt: its network, its rollouts, its loss and its hyperparameters.

One inner step is one update. The loss makes the rollout itself, since its data depend on θ: the states of the
environments are the model state, and the key of the context draws actions and transitions. Everything in a rollout is
held constant, and only log-probabilities, values and entropies have a derivative in θ:

    δ_t = r_t + γ c_t V(s_{t+1}) − V(s_t),    A_t = δ_t + γ λ c_t A_{t+1},    R_t = A_t + V(s_t),
    ℓ(θ) = mean [−Â_t log π(a_t|s_t; θ) + w_V ½ (V(s_t; θ) − R_t)² − w_H H(π(·|s_t; θ))],

where c_t is 0 at the end of an episode, Â has mean 0 and deviation 1, and V in δ and R is constant. The hyperparameters
are tuned through the update: the horizon 1 / (1 − γ), the trace λ, the weights w_V and w_H, and the rate of Adam.

The outer loss is the same function with the fixed `REFERENCE`, on a rollout with the new θ (Xu et al., NeurIPS 2018,
https://arxiv.org/abs/1805.09801), plus the KL divergence Σ_a π log(π / π') of the policy π before the update and the
new one π' (Zahavy et al., NeurIPS 2020, https://arxiv.org/abs/2002.12928). The divergence is a brake for the rate: a
policy that has become deterministic has no gradient. The rollout starts from the states and the key that the next inner
step will use. So it is the rollout of that step, and tuning takes no more steps of the environments than training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.rl import environments
from metaopt import base, inner, spaces

# Chosen as usual values for all environments, before the first run. The rate has no place in an outer loss.
REFERENCE = {"horizon": 50.0, "trace": 0.95, "entropy": 0.01, "value": 0.5}
OUTER = {**REFERENCE, "kl": 1.0}
# The bad start: a discount of 0.5, a short trace, 30 times the entropy weight and a tenth of the value weight. Its rate
# is at most a tenth of the usual rates of such small networks, which are 0.003 to 0.03.
START = {"rate": 3e-4, "horizon": 2.0, "trace": 0.5, "entropy": 0.3, "value": 0.05}
# Bad in the other direction: a rate of about 10 times the usual ones, hardly any entropy, too much weight on the value.
OTHER_START = {"rate": 0.1, "horizon": 300.0, "trace": 0.1, "entropy": 3e-4, "value": 5.0}
SPACE = {
    "rate": spaces.interval(1e-5, 0.3, log=True, default=START["rate"]),
    "horizon": spaces.interval(1.1, 400.0, log=True, default=START["horizon"]),
    "trace": spaces.interval(0.0, 1.0, default=START["trace"]),
    "entropy": spaces.interval(1e-4, 1.0, log=True, default=START["entropy"]),
    "value": spaces.interval(1e-2, 10.0, log=True, default=START["value"]),
}


class Family(NamedTuple):
    """An environment, and how its returns become scores.

    Attributes:
      environment: the environment.
      physics: its parameters.
      low: the return of score 0.
      high: the return of score 1, an upper bound.
      scale: the factor of rewards in training.
    """

    environment: environments.Environment
    physics: Any
    low: float
    high: float
    scale: float = 1.0

    def score(self, returns):
        return (returns - self.low) / (self.high - self.low)


FAMILIES = {
    "Catch": Family(environments.catch, environments.CatchParams(), -1.0, 1.0),
    "maze": Family(environments.maze(), environments.maze().params, -1.0, 1.0),
    "CartPole": Family(environments.cart_pole, environments.CartPoleParams(max_steps=200), 0.0, 200.0, 0.1),
    "Acrobot": Family(environments.acrobot, environments.AcrobotParams(), -500.0, 0.0, 0.1),
}


class Sizes(NamedTuple):
    num_actors: int = 8
    length: int = 16  # steps of a rollout
    hidden: int = 32


class Actors(NamedTuple):
    """The environments during training.

    Attributes:
      state: their states, with a leading axis of actors.
      observation: [num_actors, ...].
      running: [num_actors] the return of the current episode so far.
      finished: [2] the sum of the returns of all finished episodes, and the number of these episodes.
    """

    state: Any
    observation: jax.Array
    running: jax.Array
    finished: jax.Array


class Memory(NamedTuple):
    """The model state: the environments, and θ before the last update."""

    actors: Actors
    previous: dict[str, jax.Array]


class Rollout(NamedTuple):
    """Leading axes [length, num_actors]; `last` is the observation after the rollout, [num_actors, ...]."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    discount: jax.Array
    last: jax.Array


def initial_params(key: jax.Array, num_inputs: int, num_actions: int, hidden: int) -> dict[str, jax.Array]:
    """One hidden layer of tanh, shared by the policy and the value."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (num_inputs, hidden)) * (2 / num_inputs) ** 0.5,
        "b": jnp.zeros(hidden),
        "policy_w": 0.01 * jax.random.normal(second, (hidden, num_actions)),
        "policy_b": jnp.zeros(num_actions),
        "value_w": jnp.zeros(hidden),
        "value_b": jnp.zeros(()),
    }


def apply(params, observation):
    """Returns logits [num_actions] and the value [] of one observation."""
    hidden = jnp.tanh(observation @ params["w"] + params["b"])
    return hidden @ params["policy_w"] + params["policy_b"], hidden @ params["value_w"] + params["value_b"]


def start(env: environments.Environment, key: jax.Array, physics: Any, num_actors: int) -> Actors:
    """Returns the actors before the first step."""
    observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(key, num_actors), physics)
    return Actors(state, observation, jnp.zeros(num_actors), jnp.zeros(2))


def roll_out(
    env: environments.Environment, act: Callable, key: jax.Array, actors: Actors, physics: Any, length: int
) -> tuple[Actors, Rollout]:
    """Takes `length` steps in each environment. `act` is `(key, observation [num_actors, ...]) -> [num_actors]`."""

    def step(actors, key):
        act_key, key = jax.random.split(key)
        action = act(act_key, actors.observation)
        keys = jax.random.split(key, len(action))
        observation, state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
            keys, actors.state, action, physics
        )
        running = actors.running + reward
        done = terminated | truncated
        finished = actors.finished + jnp.stack([jnp.where(done, running, 0).sum(), done.sum()])
        new = Actors(state, observation, jnp.where(done, 0, running), finished)
        return new, (actors.observation, action, reward, info["discount"])

    actors, parts = jax.lax.scan(step, actors, jax.random.split(key, length))
    return actors, Rollout(*parts, actors.observation)


def policy_rollout(env, params, key, actors, physics, length: int) -> tuple[Actors, Rollout]:
    """A rollout of the policy with these parameters, without a derivative."""
    params, actors, physics = jax.lax.stop_gradient((params, actors, physics))

    def act(key, observation):
        return jax.random.categorical(key, jax.vmap(apply, (None, 0))(params, observation)[0])

    return roll_out(env, act, key, actors, physics, length)


def advantages(reward, discount, values, trace):
    """Returns A [T, n] by the recursion above, from `discount` γ c and `trace` λ, and values [T + 1, n]."""
    errors = reward + discount * values[1:] - values[:-1]

    def step(later, now):
        error, discount = now
        advantage = error + discount * trace * later
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(values[0]), (errors, discount), reverse=True)[1]


def actor_critic_loss(params, hyperparams, rollout: Rollout, scale: float = 1.0) -> jax.Array:
    """Returns ℓ of the module's docstring on one rollout; rewards are multiplied by `scale`."""
    logits, values = jax.vmap(jax.vmap(apply, (None, 0)), (None, 0))(params, rollout.observation)
    last = jax.vmap(apply, (None, 0))(params, rollout.last)[1]
    constant = jax.lax.stop_gradient(jnp.concatenate([values, last[None]]))
    discount = (1 - 1 / hyperparams["horizon"]) * rollout.discount
    advantage = advantages(scale * rollout.reward, discount, constant, hyperparams["trace"])
    errors = values - (advantage + constant[:-1])
    centered = advantage - advantage.mean()
    normalized = centered / jnp.sqrt((centered**2).mean() + 1e-6)
    log_policy = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_policy, rollout.action[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(log_policy) * log_policy).sum(-1).mean()
    value_loss = 0.5 * (errors**2).mean()
    return -(taken * normalized).mean() + hyperparams["value"] * value_loss - hyperparams["entropy"] * entropy


def divergence(old, new, observation) -> jax.Array:
    """Returns the mean over states of Σ_a π_old log(π_old / π_new); only the new policy has a derivative."""
    logits = lambda params: jax.vmap(jax.vmap(apply, (None, 0)), (None, 0))(params, observation)[0]
    old_log, new_log = jax.nn.log_softmax(jax.lax.stop_gradient(logits(old))), jax.nn.log_softmax(logits(new))
    return (jnp.exp(old_log) * (old_log - new_log)).sum(-1).mean()


def make_task(family: Family, reference: dict[str, Any] = OUTER) -> base.Task:
    """Returns the physics as the data of training, and the physics and `reference` as those of the outer loss."""
    physics, reference = jax.tree.map(jnp.asarray, (family.physics, reference))
    return base.Task(physics, (physics, reference))


def make_problem(family: Family, sizes: Sizes) -> base.Problem:
    """Returns the problem in unconstrained coordinates, for tasks of `make_task`.

    The value of the outer loss is the negative mean of the rewards of its rollout, or of survived steps if all rewards
    are equal. Its gradient is that of the actor-critic loss with the task's reference. So rules that only use values
    (`hypergrad.evolution`) follow the rewards.
    """
    env = family.environment

    def init(key, hyperparams, physics):
        params_key, actors_key = jax.random.split(key)
        actors = start(env, actors_key, physics, sizes.num_actors)
        num_inputs = actors.observation.shape[-1]
        params = initial_params(params_key, num_inputs, env.num_actions, sizes.hidden)
        return params, Memory(actors, params)

    def loss(params, hyperparams, physics, context):
        actors, rollout = policy_rollout(env, params, context.key, context.model_state.actors, physics, sizes.length)
        memory = jax.lax.stop_gradient(Memory(actors, params))
        return actor_critic_loss(params, hyperparams, rollout, family.scale), memory

    def outer_loss(params, hyperparams, batch, context):
        physics, reference = batch
        _, rollout = policy_rollout(env, params, context.key, context.model_state.actors, physics, sizes.length)
        surrogate = actor_critic_loss(params, reference, rollout, family.scale)
        surrogate += reference["kl"] * divergence(context.model_state.previous, params, rollout.observation)
        success = rollout.discount if env is environments.cart_pole else rollout.reward
        return surrogate - jax.lax.stop_gradient(surrogate + success.mean())

    optimizer = lambda hp: optax.adam(hp["rate"], eps=1e-5)
    loop = inner.loop(loss, optimizer, init=init, with_context=True)
    return spaces.constrain(inner.problem(loop, outer_loss, with_context=True), SPACE)

"""Environments as pure functions, in the protocol of gymnax 1.0.

    observation, state = reset(key, params)
    observation, state, reward, terminated, truncated, info = step(key, state, action, params)

`params` are numbers and arrays: the physics, the walls, the length of an episode. So they can differ between tasks, and
`jax.vmap` runs over keys, states, actions and params. An episode is terminated by success or failure, and truncated by
its limit of steps. Then `step` returns the first observation and state of the next one, with the reward of the step
that ended it. `info["discount"]` is 0 there, and else 1; in gymnax it stays 1 if the episode is truncated.

| environment | actions | observation | reward |
|---|---|---|---|
| `bandit(k)` | k arms | last arm (one-hot), last reward, share of the pulls | 1 with the arm's probability |
| `catch` | left, stay, right | the board, 10 × 5 | 1 or −1 in the last row |
| `maze()` | up, right, down, left | position and goal, both one-hot | 1 at the goal, −1 / `max_steps` each step |
| `cart_pole` | left, right | x, ẋ, θ, θ̇ | 1 each step |
| `acrobot` | torque −1, 0, 1 | cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂ | −1 each step, 0 at the end |

Sources: Osband et al., ICLR 2020, https://arxiv.org/abs/1908.03568 (Catch); Barto, Sutton & Anderson, 1983
(CartPole); Sutton & Barto, 1998 (Acrobot); Lange, 2022, https://github.com/RobertTLange/gymnax (protocol).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Environment(NamedTuple):
    """An environment.

    Attributes:
      reset: `(key, params) -> (observation, state)`.
      step: `(key, state, action, params) -> (observation, state, reward, terminated, truncated, info)`.
      params: the default parameters.
      num_actions: the number of actions.
    """

    reset: Callable
    step: Callable
    params: Any
    num_actions: int


def environment(start: Callable, move: Callable, observe: Callable, params: Any, num_actions: int) -> Environment:
    """Makes an environment that resets itself.

    The functions are `start(key, params) -> state`, `move(key, state, action, params) -> (state, reward, terminated,
    truncated)` and `observe(state, params) -> observation`.
    """

    def reset(key, params):
        state = start(key, params)
        return observe(state, params), state

    def step(key, state, action, params):
        move_key, reset_key = jax.random.split(key)
        moved, reward, terminated, truncated = move(move_key, state, action, params)
        done = terminated | truncated
        state = jax.tree.map(lambda new, old: jnp.where(done, new, old), start(reset_key, params), moved)
        reward = jnp.asarray(reward, jnp.result_type(float))
        return observe(state, params), state, reward, terminated, truncated, {"discount": 1 - done.astype(reward.dtype)}

    return Environment(reset, step, params, num_actions)


class BanditParams(NamedTuple):
    low: Any = 0.0  # the arms' probabilities are uniform between these two
    high: Any = 1.0
    max_steps: Any = 100


class BanditState(NamedTuple):
    probability: jax.Array  # [k]
    arm: jax.Array
    reward: jax.Array
    time: jax.Array


def bandit(num_arms: int) -> Environment:
    """Returns a bandit, whose arms are drawn again in every episode of `max_steps` pulls."""

    def start(key, params):
        probability = jax.random.uniform(key, (num_arms,), minval=params.low, maxval=params.high)
        return BanditState(probability, jnp.int32(-1), jnp.zeros((), probability.dtype), jnp.int32(0))

    def move(key, state, action, params):
        reward = jax.random.bernoulli(key, state.probability[action]).astype(state.reward.dtype)
        state = BanditState(state.probability, action.astype(jnp.int32), reward, state.time + 1)
        return state, reward, jnp.zeros((), bool), state.time >= params.max_steps

    def observe(state, params):
        share = state.time / jnp.asarray(params.max_steps, state.reward.dtype)
        return jnp.concatenate([jax.nn.one_hot(state.arm, num_arms), jnp.stack([state.reward, share])])

    return environment(start, move, observe, BanditParams(), num_arms)


ROWS, COLUMNS = 10, 5  # of Catch
WALLS = "..... .##.. ...#. .#.#. ....."  # of the maze, row by row


class CatchParams(NamedTuple):
    drift: Any = 0.0  # the probability that the ball moves to a random side in a step


class CatchState(NamedTuple):
    ball_x: jax.Array
    ball_y: jax.Array
    paddle_x: jax.Array


def _catch_start(key, params):
    return CatchState(jax.random.randint(key, (), 0, COLUMNS, jnp.int32), jnp.int32(0), jnp.int32(COLUMNS // 2))


def _catch_move(key, state, action, params):
    draw = jax.random.uniform(key)
    side = jnp.where(draw < params.drift / 2, -1, jnp.where(draw < params.drift, 1, 0))
    within = lambda x: jnp.clip(x, 0, COLUMNS - 1).astype(jnp.int32)
    state = CatchState(within(state.ball_x + side), state.ball_y + 1, within(state.paddle_x + action - 1))
    done = state.ball_y == ROWS - 1
    return state, jnp.where(done, jnp.where(state.ball_x == state.paddle_x, 1.0, -1.0), 0.0), done, jnp.zeros((), bool)


def _catch_observe(state, params):
    cells = jnp.arange(ROWS * COLUMNS)
    ball, paddle = state.ball_y * COLUMNS + state.ball_x, (ROWS - 1) * COLUMNS + state.paddle_x
    return ((cells == ball) | (cells == paddle)).astype(jnp.result_type(float))


catch = environment(_catch_start, _catch_move, _catch_observe, CatchParams(), 3)


class MazeParams(NamedTuple):
    walls: Any  # [size, size] bool; the other cells must be connected
    slip: Any = 0.0  # the probability of a random move
    max_steps: Any = 40


class MazeState(NamedTuple):
    position: jax.Array  # the number of the cell, row by row
    goal: jax.Array
    time: jax.Array


def read_walls(text: str) -> np.ndarray:
    """Returns a [size, size] bool array, in which "#" is a wall."""
    return np.array([[cell == "#" for cell in line] for line in text.split()])


def random_walls(key: jax.Array, size: int) -> jax.Array:
    """Draws the walls of a maze in which one path joins any two cells; `size` must be odd.

    Cells with even row and column are open. Each opens the way to its upper or its left neighbor.
    """
    row, column = jnp.meshgrid(jnp.arange(0, size, 2), jnp.arange(0, size, 2), indexing="ij")
    up = (jax.random.bernoulli(key, shape=row.shape) & (row > 0)) | (column == 0)
    walls = jnp.ones((size, size), bool).at[row, column].set(False)
    between = jnp.where(up, row - 1, row), jnp.where(up, column, column - 1)
    return walls.at[jnp.maximum(between[0], 0), jnp.maximum(between[1], 0)].set(False)


def maze(walls: str = WALLS) -> Environment:
    """Returns a maze, with a random start and a random goal in each episode. Walls and borders stop a move."""
    size = len(read_walls(walls))

    def observe(state, params):
        return jnp.concatenate([jax.nn.one_hot(state.position, size**2), jax.nn.one_hot(state.goal, size**2)])

    def start(key, params):
        first, second = jax.random.split(key)
        count = jnp.cumsum(~jnp.ravel(params.walls))  # of open cells so far
        start = jax.random.randint(first, (), 0, count[-1])
        goal = (start + jax.random.randint(second, (), 1, count[-1])) % count[-1]
        cell = lambda number: jnp.argmax(count > number).astype(jnp.int32)
        return MazeState(cell(start), cell(goal), jnp.int32(0))

    def move(key, state, action, params):
        draw = jax.random.uniform(key)
        slips, random_action = draw < params.slip, jnp.floor(4 * draw / jnp.maximum(params.slip, 1e-6))
        action = jnp.where(slips, random_action.astype(jnp.int32), action)
        row = jnp.clip(state.position // size + jnp.array([-1, 0, 1, 0])[action], 0, size - 1)
        column = jnp.clip(state.position % size + jnp.array([0, 1, 0, -1])[action], 0, size - 1)
        is_free = ~jnp.asarray(params.walls)[row, column]
        position = jnp.where(is_free, row * size + column, state.position).astype(jnp.int32)
        state = MazeState(position, state.goal, state.time + 1)
        reached = position == state.goal
        reward = reached - 1.0 / params.max_steps
        return state, reward, reached, state.time >= params.max_steps

    return environment(start, move, observe, MazeParams(read_walls(walls)), 4)


class CartPoleParams(NamedTuple):
    gravity: Any = 9.8
    cart_mass: Any = 1.0
    pole_mass: Any = 0.1
    length: Any = 0.5  # half of the pole
    force: Any = 10.0
    dt: Any = 0.02
    max_angle: Any = 12 * 2 * np.pi / 360
    max_x: Any = 2.4
    max_steps: Any = 500


class CartPoleState(NamedTuple):
    y: jax.Array  # x, ẋ, θ, θ̇
    time: jax.Array


def cart_pole_accelerations(y: jax.Array, force: jax.Array, params: CartPoleParams) -> tuple[jax.Array, jax.Array]:
    """Returns ẍ and θ̈ of a cart with a pole, whose angle is 0 if it stands upright."""
    sine, cosine, mass = jnp.sin(y[2]), jnp.cos(y[2]), params.cart_mass + params.pole_mass
    moment = params.pole_mass * params.length
    push = (force + moment * y[3] ** 2 * sine) / mass
    inertia = params.length * (4 / 3 - params.pole_mass * cosine**2 / mass)
    angular = (params.gravity * sine - cosine * push) / inertia
    return push - moment * angular * cosine / mass, angular


def _cart_pole_start(key, params):
    return CartPoleState(jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.int32(0))


def _cart_pole_move(key, state, action, params):
    linear, angular = cart_pole_accelerations(state.y, params.force * (2 * action - 1), params)
    y = state.y + params.dt * jnp.stack([state.y[1], linear, state.y[3], angular])  # Euler, as in the original
    state = CartPoleState(y, state.time + 1)
    failed = (jnp.abs(y[0]) > params.max_x) | (jnp.abs(y[2]) > params.max_angle)
    return state, 1.0, failed, state.time >= params.max_steps


cart_pole = environment(_cart_pole_start, _cart_pole_move, lambda state, params: state.y, CartPoleParams(), 2)


class AcrobotParams(NamedTuple):
    gravity: Any = 9.8
    mass_1: Any = 1.0
    mass_2: Any = 1.0
    length_1: Any = 1.0
    center_1: Any = 0.5  # of mass, from the joint
    center_2: Any = 0.5
    inertia: Any = 1.0  # of each link, around its center of mass
    torque: Any = 1.0
    dt: Any = 0.2
    max_speed_1: Any = 4 * np.pi
    max_speed_2: Any = 9 * np.pi
    max_steps: Any = 500


class AcrobotState(NamedTuple):
    y: jax.Array  # θ₁, θ₂, θ̇₁, θ̇₂
    time: jax.Array


def acrobot_slope(y: jax.Array, torque: jax.Array, params: AcrobotParams) -> jax.Array:
    """Returns dy/dt of two links that hang at y = 0, with a torque between them."""
    angle_1, angle_2, speed_1, speed_2 = y
    arm = params.mass_2 * params.length_1 * params.center_2
    own = params.mass_2 * params.center_2**2 + params.inertia
    shared = own + arm * jnp.cos(angle_2)
    whole = params.mass_1 * params.center_1**2 + params.mass_2 * params.length_1**2 + params.inertia
    whole = whole + own + 2 * arm * jnp.cos(angle_2)
    weight_2 = params.mass_2 * params.center_2 * params.gravity * jnp.sin(angle_1 + angle_2)
    weight_1 = (params.mass_1 * params.center_1 + params.mass_2 * params.length_1) * params.gravity * jnp.sin(angle_1)
    force_1 = weight_1 + weight_2 - arm * (speed_2**2 + 2 * speed_1 * speed_2) * jnp.sin(angle_2)
    force_2 = weight_2 + arm * speed_1**2 * jnp.sin(angle_2)
    second = (torque + shared / whole * force_1 - force_2) / (own - shared**2 / whole)
    return jnp.stack([speed_1, speed_2, -(shared * second + force_1) / whole, second])


def _acrobot_start(key, params):
    return AcrobotState(jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1), jnp.int32(0))


def _acrobot_move(key, state, action, params):
    slope = lambda y: acrobot_slope(y, params.torque * (action - 1), params)
    k1 = slope(state.y)  # one step of Runge and Kutta
    k2 = slope(state.y + params.dt / 2 * k1)
    k3 = slope(state.y + params.dt / 2 * k2)
    k4 = slope(state.y + params.dt * k3)
    y = state.y + params.dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    angles = (y[:2] + jnp.pi) % (2 * jnp.pi) - jnp.pi
    limits = jnp.stack([params.max_speed_1, params.max_speed_2])
    state = AcrobotState(jnp.concatenate([angles, jnp.clip(y[2:], -limits, limits)]).astype(y.dtype), state.time + 1)
    reached = -jnp.cos(angles[0]) - jnp.cos(angles.sum()) > 1
    return state, jnp.where(reached, 0.0, -1.0), reached, state.time >= params.max_steps


def _acrobot_observe(state, params):
    sine, cosine = jnp.sin(state.y[:2]), jnp.cos(state.y[:2])
    return jnp.stack([cosine[0], sine[0], cosine[1], sine[1], state.y[2], state.y[3]])


acrobot = environment(_acrobot_start, _acrobot_move, _acrobot_observe, AcrobotParams(), 3)

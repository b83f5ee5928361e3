"""The environments against equations of motion that are derived here from energies, and their rules of play."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from experiments.rl import environments

pytestmark = pytest.mark.once  # an experiment
CART_POLE = environments.CartPoleParams(9.1, 1.3, 0.4, 0.7, 8.0)
ACROBOT = environments.AcrobotParams(9.1, 1.2, 0.7, 0.9, 0.4, 0.6, 0.8, 1.5)


def cart_pole_energies(q, v, p):
    """Kinetic and potential energy, from the positions of the cart and of the middle of a uniform rod."""
    middle = lambda q: jnp.stack([q[0] + p.length * jnp.sin(q[1]), p.length * jnp.cos(q[1])])
    _, speed = jax.jvp(middle, (q,), (v,))
    rotation = p.pole_mass * p.length**2 / 3 * v[1] ** 2
    kinetic = (p.cart_mass * v[0] ** 2 + p.pole_mass * (speed**2).sum() + rotation) / 2
    return kinetic, p.pole_mass * p.gravity * middle(q)[1]


def acrobot_energies(q, v, p):
    along = lambda angle, length: length * jnp.stack([jnp.sin(angle), -jnp.cos(angle)])
    first = lambda q: along(q[0], p.center_1)
    second = lambda q: along(q[0], p.length_1) + along(q[0] + q[1], p.center_2)
    speeds = [(jax.jvp(center, (q,), (v,))[1] ** 2).sum() for center in (first, second)]
    rotation = p.inertia * (v[0] ** 2 + (v[0] + v[1]) ** 2)
    kinetic = (p.mass_1 * speeds[0] + p.mass_2 * speeds[1] + rotation) / 2
    return kinetic, p.gravity * (p.mass_1 * first(q)[1] + p.mass_2 * second(q)[1])


def accelerations(energies, q, v, force, p):
    """Solves the equations of Lagrange, M a + (∂²L/∂v∂q) v − ∂L/∂q = force."""

    def lagrangian(q, v):
        kinetic, potential = energies(q, v, p)
        return kinetic - potential

    mass = jax.hessian(lagrangian, 1)(q, v)
    mixed = jax.jacobian(jax.grad(lagrangian, 1))(q, v)
    return jnp.linalg.solve(mass, force + jax.grad(lagrangian)(q, v) - mixed @ v)


SYSTEMS = {
    "CartPole": (environments.cart_pole, CART_POLE, cart_pole_energies, lambda action: jnp.array([2 * action - 1, 0])),
    "Acrobot": (environments.acrobot, ACROBOT, acrobot_energies, lambda action: jnp.array([0, action - 1])),
}


def split(name, y):
    """Positions and velocities; CartPole's state has x, ẋ, θ, θ̇."""
    return (y[::2], y[1::2]) if name == "CartPole" else (y[:2], y[2:])


def slope(name, y, force):
    """dy/dt of the experiment's own equations."""
    if name == "CartPole":
        linear, angular = environments.cart_pole_accelerations(y, force[0], CART_POLE)
        return jnp.stack([y[1], linear, y[3], angular])
    return environments.acrobot_slope(y, force[1], ACROBOT)


def force_of(name, action):
    _, p, _, direction = SYSTEMS[name]
    return direction(action) * (p.force if name == "CartPole" else p.torque)


@pytest.mark.parametrize("name", SYSTEMS)
def test_accelerations_solve_the_equations_of_lagrange(name):
    _, p, energies, _ = SYSTEMS[name]
    for seed, action in itertools.product(range(5), (0, 1)):
        y, force = 2 * jax.random.normal(jax.random.key(seed), (4,)), force_of(name, action)
        q, v = split(name, y)
        own = split(name, slope(name, y, force))
        np.testing.assert_allclose(own[0], v, rtol=1e-12)
        np.testing.assert_allclose(own[1], accelerations(energies, q, v, force, p), rtol=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_energy_changes_by_the_work_of_the_force(name):
    _, p, energies, _ = SYSTEMS[name]
    y, force = jax.random.normal(jax.random.key(7), (4,)), force_of(name, 0)
    energy = lambda y: sum(energies(*split(name, y), p))
    _, power = jax.jvp(energy, (y,), (slope(name, y, force),))
    np.testing.assert_allclose(power, (force * split(name, y)[1]).sum(), rtol=1e-10)


def steps(env, p, y, action, num):
    state = (environments.CartPoleState if env is environments.cart_pole else environments.AcrobotState)(
        y, jnp.int32(0)
    )
    step = lambda state, _: (env.step(jax.random.key(0), state, action, p)[1], None)
    return jax.jit(lambda state: jax.lax.scan(step, state, length=num)[0].y)(state)


def exact(name, y, action, time):
    """An integration by SciPy to 1e-11."""
    _, p, energies, _ = SYSTEMS[name]
    force = force_of(name, action)

    @jax.jit
    def right(y):
        q, v = split(name, y)
        a = accelerations(energies, q, v, force, p)
        return jnp.stack([v[0], a[0], v[1], a[1]]) if name == "CartPole" else jnp.concatenate([v, a])

    solution = integrate.solve_ivp(lambda t, y: np.asarray(right(y)), (0, time), y, "DOP853", rtol=1e-11, atol=1e-11)
    return solution.y[:, -1]


@pytest.mark.parametrize(("name", "order"), [("CartPole", 1), ("Acrobot", 4)])
def test_steps_converge_to_an_independent_integration(name, order):
    env, p, _, _ = SYSTEMS[name]
    y, time = jnp.array([0.1, -0.05, 0.15, 0.2]), 0.2
    expected = exact(name, y, 0, time)
    errors = [
        np.abs(
            steps(env, p._replace(dt=time / num, max_angle=9.0) if order == 1 else p._replace(dt=time / num), y, 0, num)
            - expected
        ).max()
        for num in (20, 40)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert errors[1] < {1: 0.02, 4: 1e-7}[order]


def test_acrobot_keeps_its_energy_without_a_torque():
    p = ACROBOT._replace(dt=0.01)
    energy = lambda y: float(sum(acrobot_energies(y[:2], y[2:], p)))
    y = jnp.array([1.0, 0.5, 0.0, 0.0])
    later = steps(environments.acrobot, p, y, 1, 300)
    assert np.abs(later - y).max() > 0.3
    assert energy(later) == pytest.approx(energy(y), abs=1e-6)


def test_cart_pole_ends_outside_its_limits_and_after_the_last_step():
    env, p = environments.cart_pole, environments.cart_pole.params
    step = jax.jit(env.step)

    def done(y, time):
        state = environments.CartPoleState(jnp.array(y), jnp.int32(time))
        _, new, reward, terminated, truncated, info = step(jax.random.key(0), state, 1, p)
        done = terminated | truncated
        assert reward == 1 and info["discount"] == 1 - done and (new.time == 0) == done
        assert truncated == (time >= 499)
        return bool(done)

    assert not done([2.39, 0.0, 0.0, 0.0], 0) and done([2.39, 1.0, 0.0, 0.0], 0) and done([-2.41, 0.0, 0.0, 0.0], 0)
    assert not done([0.0, 0.0, 0.208, 0.0], 0) and done([0.0, 0.0, 0.208, 0.2], 0) and done([0.0, 0.0, -0.21, 0.0], 0)
    assert not done([0.0] * 4, 498) and done([0.0] * 4, 499)


def test_acrobot_ends_above_the_line():
    env, p = environments.acrobot, environments.acrobot.params

    def outcome(y, time):
        state = environments.AcrobotState(jnp.array(y), jnp.int32(time))
        _, _, reward, terminated, truncated, _ = jax.jit(env.step)(jax.random.key(0), state, 1, p)
        return float(reward), bool(terminated), bool(truncated)

    assert outcome([np.pi, 0.0, 0.0, 0.0], 0) == (0, True, False)  # upright
    assert outcome([np.pi / 2, 0.0, 0.0, 0.0], 0) == (-1, False, False)  # level
    assert outcome([0.0, 0.0, 0.0, 0.0], 498) == (-1, False, False)
    assert outcome([0.0, 0.0, 0.0, 0.0], 499) == (-1, False, True)
    spinning = environments.AcrobotState(jnp.array([3.1, 0.0, 12.0, -28.0]), jnp.int32(0))
    _, state, *_ = env.step(jax.random.key(0), spinning, 2, p._replace(length_1=0.1, max_speed_2=5.0))
    assert np.abs(state.y[:2]).max() <= np.pi and np.abs(state.y[3]) <= 5


def play(env, params, policy, key, num):
    """Observations, rewards and ends of `num` steps."""

    def step(carry, key):
        observation, state = carry
        action_key, key = jax.random.split(key)
        new = env.step(key, state, policy(action_key, observation, state), params)
        return new[:2], (observation, state, new[2], new[3] | new[4])

    keys = jax.random.split(key, num)
    return jax.jit(lambda: jax.lax.scan(step, env.reset(key, params), keys)[1])()


def test_catch_pays_in_the_last_row():
    env = environments.catch
    follow = lambda key, observation, state: jnp.sign(state.ball_x - state.paddle_x) + 1
    observations, _, rewards, done = play(env, env.params, follow, jax.random.key(0), 90)
    np.testing.assert_array_equal(done, np.arange(1, 91) % 9 == 0)
    np.testing.assert_array_equal(rewards, done)
    np.testing.assert_array_equal(observations[0].reshape(10, 5).sum(1), [1, *[0] * 8, 1])
    np.testing.assert_array_equal(observations[:, 45:].sum(1), 1)
    _, states, rewards, done = play(env, env.params, lambda *args: 1, jax.random.key(1), 900)
    np.testing.assert_array_equal(rewards[done], np.where(states.ball_x[done] == 2, 1, -1))
    _, states, _, _ = play(env, environments.CatchParams(drift=0.5), lambda *args: 1, jax.random.key(2), 900)
    assert 0.3 < np.mean(np.diff(states.ball_x) != 0) < 0.6


def neighbors(walls, cell):
    size = len(walls)
    row, column = divmod(cell, size)
    for action, (i, j) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
        r, c = row + i, column + j
        inside = 0 <= r < size and 0 <= c < size and not walls[r, c]
        yield action, r * size + c if inside else cell


def reachable(walls, cell):
    seen, border = {cell}, [cell]
    while border:
        border = [new for old in border for _, new in neighbors(walls, old) if new not in seen]
        seen |= set(border)
    return seen


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_maze(seed):
    env = environments.maze()
    walls = env.params.walls if seed is None else np.asarray(environments.random_walls(jax.random.key(seed), 5))
    free = set(np.flatnonzero(~walls.reshape(-1)))
    assert reachable(walls, min(free)) == free and len(free) == (20 if seed is None else 17)
    params = env.params._replace(walls=walls, max_steps=7)
    random = lambda key, observation, state: jax.random.randint(key, (), 0, 4)
    observations, states, rewards, done = play(env, params, random, jax.random.key(3), 2000)
    position, goal = np.asarray(states.position), np.asarray(states.goal)
    assert set(position) <= free and set(goal) == free and not np.any(position == goal)
    reached = np.asarray(done) & (np.asarray(rewards) > 0)
    np.testing.assert_allclose(rewards, reached - 1 / 7)
    np.testing.assert_array_equal(done, reached | (np.asarray(states.time) == 6))
    np.testing.assert_array_equal(observations.argmax(1), position)
    np.testing.assert_array_equal(observations[:, 25:].argmax(1), goal)
    moves = np.stack([position[:-1], position[1:]], 1)[~np.asarray(done[:-1])]
    assert all(new in {end for _, end in neighbors(walls, old)} for old, new in moves)


@pytest.mark.parametrize("slip", [0.0, 1.0])
def test_moves_in_the_maze(slip):
    env = environments.maze()
    params = env.params._replace(slip=slip)

    @jax.jit
    def ends(cell, action):
        state = environments.MazeState(cell, jnp.int32(99), jnp.int32(0))
        keys = jax.random.split(jax.random.key(0), 40)
        return jax.vmap(lambda key: env.step(key, state, action, params)[1].position)(keys)

    for cell in np.flatnonzero(~params.walls.reshape(-1)):
        around = dict(neighbors(params.walls, int(cell)))
        for action, expected in around.items():
            reached = set(np.asarray(ends(jnp.int32(cell), action)).tolist())
            assert reached == (set(around.values()) if slip else {expected})


def test_arms_of_the_bandit_pay_with_their_probability():
    env = environments.bandit(3)
    random = lambda key, observation, state: jax.random.randint(key, (), 0, 3)
    params = environments.BanditParams(0.2, 0.6, max_steps=50)
    observations, states, rewards, done = play(env, params, random, jax.random.key(0), 6000)
    np.testing.assert_array_equal(done, np.arange(1, 6001) % 50 == 0)
    assert np.unique(states.probability[:, 0]).size == 120
    assert 0.2 <= states.probability.min() < 0.21 and 0.59 < states.probability.max() < 0.6
    arms = np.asarray(states.arm[1:])[~np.asarray(done[:-1])]
    kept = ~np.asarray(done[:-1])
    paid = np.take_along_axis(np.asarray(states.probability[:-1])[kept], arms[:, None], 1)[:, 0]
    assert np.mean(np.asarray(rewards[:-1])[kept] - paid) == pytest.approx(0, abs=0.025)
    np.testing.assert_array_equal(observations[1:, :3].argmax(1)[kept], arms)
    np.testing.assert_array_equal(observations[1:, 3][kept], rewards[:-1][kept])
    np.testing.assert_allclose(observations[:, 4], np.arange(6000) % 50 / 50)
    assert not observations[::50, :4].any()


def test_physics_differ_under_vmap():
    env, masses = environments.cart_pole, jnp.array([0.5, 2.0])
    params = jax.tree.map(lambda x: jnp.full(2, x), env.params)._replace(cart_mass=masses)
    _, state = env.reset(jax.random.key(0), env.params)
    _, new, *_ = jax.vmap(env.step, (None, None, None, 0))(jax.random.key(1), state, 1, params)
    assert new.y[0, 1] > new.y[1, 1] > state.y[1]


def test_steps_equal_those_of_gymnax():
    """gymnax 1.0 with a supported JAX; another version may be a placeholder without environments."""
    gymnax = pytest.importorskip("gymnax")
    if not hasattr(gymnax, "make"):
        pytest.skip("this gymnax has no environments")
    names = {"CartPole-v1": environments.cart_pole, "Acrobot-v1": environments.acrobot}
    for name, env in names.items():
        other, params = gymnax.make(name)
        for seed in range(3):
            _, start = other.reset(jax.random.key(seed), params)
            fields = ("x", "x_dot", "theta", "theta_dot")
            if name == "Acrobot-v1":
                fields = ("joint_angle1", "joint_angle2", "velocity_1", "velocity_2")
            y = jnp.stack([getattr(start, field) for field in fields])
            kind = environments.CartPoleState if env is environments.cart_pole else environments.AcrobotState
            state = kind(y, jnp.int32(0))
            for action in (1, 0, 1, 1):
                key = jax.random.key(action)
                theirs, start, reward, *ends, _ = other.step(key, start, action, params)
                ours, state, own_reward, *own_ends, _ = env.step(key, state, action, env.params)
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
                assert reward == own_reward and ends == own_ends

"""The families of tasks: mazes with a hidden goal, and CartPoles with varied physics."""

import jax
import numpy as np
import pytest

from experiments.rl import families
from experiments.rl.actor_critic import FAMILIES
from metaopt import inner


def test_the_goal_is_hidden_and_paid():
    env = families.hidden_goal()
    step = jax.jit(env.step)

    def walk(goal, actions):
        params = env.params._replace(goal=goal)
        observation, state = env.reset(jax.random.key(0), params)
        seen, total = [np.asarray(observation)], 0.0
        for action in actions:
            observation, state, reward, done, info = step(jax.random.key(1), state, action, params)
            seen.append(np.asarray(observation))
            total += float(reward)
            assert info["discount"] == 1 - done and state.goal == goal
        return np.stack(seen), total, bool(done)

    path = [0, 0, 1]  # up, up, right: from row 3, column 3 to row 1, column 4
    seen, total, done = walk(11, path)
    assert done and total == pytest.approx(1 - 3 / 16) == families.bound(np.array([11]))
    other, total, done = walk(40, path)
    assert not done and total == pytest.approx(-3 / 16)
    np.testing.assert_array_equal(seen[:3], other[:3])  # the same observations, whatever the goal is
    rows = [[row, column] for row, column in zip(other[:, :7].argmax(1), other[:, 7:].argmax(1), strict=True)]
    assert rows == [[3, 3], [2, 3], [1, 3], [1, 4]]
    assert seen[3].argmax() == 3 and seen[3][7:].argmax() == 3  # the next episode starts in the center


def test_held_out_goals_are_no_training_goals():
    train, test = families.split_goals(3)
    assert len(train) == 36 and len(test) == 12 and families.CENTER not in train
    assert sorted([*train, *test, families.CENTER]) == list(range(49))


@pytest.mark.once
def test_a_step_of_adaptation_is_a_step_of_the_policy_gradient_and_its_rate_has_the_slope_of_the_product():
    """With one step, dF/dα = −⟨∇ℓ(θ), ∇f(θ − α ∇ℓ)⟩ for each leaf."""
    settings = families.SMOKE
    adaptation = families.adaptations(settings)["MAML"]
    start = families.actor_critic.initial_params(jax.random.key(0), 14, 4, settings.sizes.hidden)
    start = {**start, "policy_w": start["policy_w"] + 0.1}
    hyperparams, task = adaptation.hyperparams(start), jax.tree.map(lambda x: x[0], families.goal_tasks(np.array([11])))
    loop, outer_loss = adaptation.problem.loop, adaptation.problem.outer_loss
    state = jax.jit(loop.init)(jax.random.key(1), hyperparams, task.train)
    grads = jax.jit(
        jax.grad(lambda params: loop.loss(params, hyperparams, loop.batch(state, task.train), loop.context(state))[0])
    )(state.params)

    def after(hyperparams):
        new = inner.step(loop, state, hyperparams, task.train)
        return outer_loss(new.params, hyperparams, task.valid, loop.context(new)), new.params

    (_, params), slopes = jax.jit(jax.value_and_grad(after, has_aux=True))(hyperparams)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, start[name] - grads[name], rtol=1e-5, atol=1e-7)
    new = inner.step(loop, state, hyperparams, task.train)
    outer = jax.jit(jax.grad(lambda params: outer_loss(params, hyperparams, task.valid, loop.context(new))))(params)
    for name, slope in slopes["rate"].items():
        np.testing.assert_allclose(slope, -(grads[name] * outer[name]).sum(), rtol=1e-4, atol=1e-9)
    assert abs(slopes["rate"]["policy_b"]) > 1e-8


def test_physics_are_within_a_factor_of_two():
    task, usual = families.physics_tasks(jax.random.key(0), 200), FAMILIES["CartPole"].physics
    for name in ("cart_mass", "pole_mass", "length", "force"):
        factor = np.asarray(getattr(task.train, name)) / getattr(usual, name)
        assert 0.5 <= factor.min() < 0.52 and 1.95 < factor.max() <= 2.0
    assert np.ptp(task.train.gravity) == 0 and len(task.valid[1]["kl"]) == 200
    correlation = np.corrcoef(task.train.length, task.train.force)[0, 1]
    assert abs(correlation) < 0.3


def test_estimates_take_the_stated_number_of_training_runs():
    settings = families.SMOKE
    problem = families.actor_critic.make_problem(FAMILIES["CartPole"], settings.course_sizes)
    runs = {name: runs for name, (_, runs) in families.estimators(problem, settings._replace(course=200)).items()}
    assert runs["unrolled"] == settings.tasks == pytest.approx(200 * runs["truncated, 1 update"])
    assert runs["persistent_es"] == 8 * runs["truncated, 20 updates"] == pytest.approx(0.8 * settings.tasks)

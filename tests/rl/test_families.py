"""The families of tasks: mazes with a hidden goal, and CartPoles with varied physics."""

import sys

import jax
import numpy as np
import pytest

from experiments import script
from experiments.rl import families
from experiments.rl.actor_critic import FAMILIES
from metaopt import inner

pytestmark = pytest.mark.once  # an experiment


def test_the_goal_is_hidden_and_paid():
    env = families.hidden_goal()
    step = jax.jit(env.step)

    def walk(goal, actions):
        params = env.params._replace(goal=goal)
        observation, state = env.reset(jax.random.key(0), params)
        seen, total = [np.asarray(observation)], 0.0
        for action in actions:
            observation, state, reward, terminated, truncated, info = step(jax.random.key(1), state, action, params)
            seen.append(np.asarray(observation))
            total, done = total + float(reward), terminated | truncated
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


@pytest.mark.parametrize("name", ["unrolled", "truncated, 2 updates", "truncated, 1 update", "persistent_es"])
def test_estimates_take_the_stated_number_of_training_runs(name, monkeypatch):
    """Counts the rollouts of one task. The reverse pass makes those of the inner loss again: they count once."""
    settings, calls, policy_rollout = families.SMOKE._replace(course=20), [], families.actor_critic.policy_rollout

    def counted(env, params, key, *rest):
        loss = sys._getframe(1).f_code.co_name  # the inner or the outer loss
        jax.debug.callback(lambda data: calls.append((loss, *data.tolist())), jax.random.key_data(key))
        return policy_rollout(env, params, key, *rest)

    monkeypatch.setattr(families.actor_critic, "policy_rollout", counted)
    problem = families.actor_critic.make_problem(FAMILIES["CartPole"], settings.course_sizes)
    estimator, runs = families.estimators(problem, settings)[name]
    task = jax.tree.map(lambda x: x[0], families.physics_tasks(jax.random.key(0), 1))
    z = jax.tree.map(lambda x: x[0], families.searches.coordinates([families.START]))
    state = jax.jit(estimator.init)(jax.random.key(1), z, task)
    jax.block_until_ready(jax.jit(estimator.estimate)(z, task, state))
    jax.effects_barrier()
    assert {loss for loss, *_ in calls} == {"loss", "outer_loss"}
    made = calls if name == "persistent_es" else set(calls)  # no reverse pass; its pairs share keys
    assert len(made) == pytest.approx(runs * settings.course / settings.tasks)


def test_initialization_and_rates_have_their_own_outer_rates():
    """Adam moves λ by its rate at the first step, for each entry of λ by another one."""
    hyperparams = {"init": {"w": np.ones(2)}, "rate": {"w": np.ones(())}}
    optimizer = families.outer_optimizer(3e-3, 0.1, 10)
    updates, _ = optimizer.update(hyperparams, optimizer.init(hyperparams))
    np.testing.assert_allclose(updates["init"]["w"], -3e-3, rtol=1e-3)
    np.testing.assert_allclose(updates["rate"]["w"], -0.1, rtol=1e-3)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_picture_has_the_deviations_of_the_tables(num_seeds, tmp_path, monkeypatch):
    import matplotlib.container
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    of_mazes = [{name: rng.normal(size=2) for name in ("MAML", "shortest paths")} for _ in range(num_seeds)]
    of_courses = [{"unrolled": rng.uniform(size=7)} for _ in range(num_seeds)]
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    families.plot(of_mazes, of_courses, families.Settings(num_steps=1), tmp_path / "picture.png")
    monkeypatch.undo()
    plt.close(figures[0])
    left, right = figures[0].axes
    kind = matplotlib.container.ErrorbarContainer
    bars = [line for axes in (left, right) for drawn in axes.containers if isinstance(drawn, kind) for line in drawn[2]]
    lengths = [np.ptp(segment, axis=0).max() for line in bars for segment in line.get_segments()]
    columns = [*np.transpose([run["MAML"] for run in of_mazes]), [run["unrolled"][0] for run in of_courses]]
    deviations = [float(script.spread(column, 9).split(" ± ")[1]) for column in columns]
    np.testing.assert_allclose(lengths, 2 * np.array(deviations), atol=1e-8)

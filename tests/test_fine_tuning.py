"""The tasks, the penalties and the hypergradients of the experiment on fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.hyperparameters.fine_tuning import images, main, methods, network
from metaopt import hypergrad, inner, spaces

pytestmark = pytest.mark.once  # an experiment
SETTINGS = network.SMOKE._replace(num_steps=3, batch=4)


def source(num_classes=4, per_class=12):
    """Images whose first pixel is the number of the image."""
    x = np.random.default_rng(0).normal(size=(num_classes * per_class, 14, 14, 1)).astype(np.float32)
    x[:, 0, 0, 0] = np.arange(len(x))
    return images.Source(x, np.arange(len(x)) % num_classes)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float) if leaf.dtype.kind == "f" else leaf, tree)


def make_task(seed=0, shots=3):
    params = network.init_params(jax.random.key(1), SETTINGS)
    start = network.with_new_head(params)
    rng = np.random.default_rng(seed)
    task = images.draw_task(rng, source(), start, shots=shots, rows=12, num_classes=2, num_query=3)
    return in_float64(task)


def test_images_of_a_task_are_drawn_once():
    task = make_task()
    train, query = (np.asarray(part["x"])[:, 0, 0, 0].astype(int) for part in (task.train, task.valid))
    np.testing.assert_array_equal(task.train["mask"], [1] * 6 + [0] * 6)
    assert len(set(train[:6]) | set(query)) == 12 and not train[6:].any()
    for numbers, labels in ((train[:6], task.train["y"][:6]), (query, task.valid["y"])):
        classes = [set(numbers[np.asarray(labels) == label] % 4) for label in (0, 1)]
        assert [len(c) for c in classes] == [1, 1] and classes[0] != classes[1]
    assert main.judged_task(np.random.default_rng(0), source(), None, 2, SETTINGS).valid["y"].shape == (16,)


def test_no_judged_source_is_a_training_source():
    assert not set(images.JUDGED) & set(images.TRAINING)
    sources = {"omniglot": source(4, 13), "mnist": source(4, 20)}
    sources["omniglot"].x[:, 0, 0, 0] += 1000
    rng = np.random.default_rng(0)
    settings = SETTINGS._replace(shots=(3, 6))
    for shots in (3, 6):
        drawn = [methods.sample_training_task(rng, sources, None, shots, settings) for _ in range(8)]
        from_omniglot = [float(task.train["x"][0, 0, 0, 0]) >= 1000 for task in drawn]
        assert any(from_omniglot) == (shots == 3) and not all(from_omniglot)


def test_images_are_means_of_pixels_standardized_one_by_one():
    x = np.random.default_rng(0).uniform(0, 255, (3, 32, 32)).astype(np.float32)
    small = images.standardized(x)
    places = range(2, 30, 2)  # the center
    means = np.array([[[image[i : i + 2, j : j + 2].mean() for j in places] for i in places] for image in x])
    expected = (means - means.mean((1, 2), keepdims=True)) / (means.std((1, 2), keepdims=True) + 1)
    np.testing.assert_allclose(small[..., 0], expected, rtol=1e-4, atol=1e-5)
    assert images.standardized(x[:, :28, :28]).shape == (3, 14, 14, 1)


def test_a_linear_probe_trains_the_head_only():
    task, loop = make_task(), network.make_problem(SETTINGS).loop
    train = jax.jit(inner.run(loop, SETTINGS.num_steps))
    start = task.train["start"]

    def moved(hp):
        params = train(jax.random.key(0), hp, task.train).params
        return {n: max(float(jnp.abs(params[n][k] - start[n][k]).max()) for k in ("w", "b")) for n in network.LAYERS}

    probe = moved(methods.hyperparams(1e-2, 0.0, 0.0))
    assert probe.pop("head") > 1e-3 and not any(probe.values())
    assert min(moved(methods.hyperparams(1e-2, 1e-2, 0.0)).values()) > 1e-3


def test_the_penalty_is_the_squared_distance_from_the_start():
    task, problem = make_task(), network.make_problem(SETTINGS)
    batch = {name: task.train[name][:6] for name in ("x", "y")} | {"start": task.train["start"]}
    away = jax.tree.map(lambda leaf: leaf + 0.1, batch["start"])
    hp = {
        "rate": dict.fromkeys(network.LAYERS, 0.1),
        "strength": dict(zip(network.LAYERS, (1.0, 2, 3, 4), strict=True)),
    }
    state = problem.loop.init(jax.random.key(0), hp, task.train)
    loss = problem.loop.loss(away, hp, batch, problem.loop.context(state))[0]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(away[name])) for name in network.LAYERS]
    expected = network.cross_entropy(away, hp, batch) + np.dot(sizes, (1, 2, 3, 4)) * 0.01 / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_hypergradients_of_rates_and_strengths_equal_finite_differences():
    task, problem = make_task(), spaces.constrain(network.make_problem(SETTINGS), network.SPACE)
    z = spaces.to_unconstrained(network.SPACE, spaces.default(network.SPACE))
    leaves, structure = jax.tree.flatten(in_float64(z))
    key = jax.random.key(3)
    rule = hypergrad.unrolled(problem, num_steps=SETTINGS.num_steps, remat="step")
    estimate = jax.jit(rule.estimate)(structure.unflatten(leaves), task, key)[0]
    train = inner.run(problem.loop, SETTINGS.num_steps)
    train_key = jax.random.split(jax.random.split(key)[0])[0]

    @jax.jit
    def loss(leaves):
        return network.cross_entropy(train(train_key, structure.unflatten(leaves), task.train).params, None, task.valid)

    def moved(i, h):
        return loss([leaf + h * (i == j) for j, leaf in enumerate(leaves)])

    slopes = [(moved(i, 1e-5) - moved(i, -1e-5)) / 2e-5 for i in range(len(leaves))]
    np.testing.assert_allclose(jnp.stack(jax.tree.leaves(estimate.hypergrad)), slopes, rtol=1e-4, atol=1e-9)
    assert np.count_nonzero(np.abs(slopes) > 1e-7) >= 6

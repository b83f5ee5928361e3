"""The network for tables: predictions ignore padding, the loss is the documented one, λ has exact derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import automl, hypergrad, spaces, tasks
from metaopt.tasks import TaskShape


def _prepared(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = (x[:, 0] + 0.3 * rng.normal(size=rows) > 0).astype(np.int32) + (x[:, 1] > 1)
    table = tasks.Table("table", "family", x, y.astype(np.int32), np.zeros(3, bool))
    return tasks.prepare(table, valid_fraction=0.3, test_fraction=0.2)


def _float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, float) if np.issubdtype(np.asarray(x).dtype, np.floating) else x, tree)


@pytest.fixture(scope="module")
def network():
    return automl.tabular_network(num_steps=5, batch_size=8, num_members=2, num_hidden=4)


@pytest.fixture(scope="module")
def task():
    task = automl.tabular_task(_prepared())
    return task._replace(train=_float64(task.train), valid=_float64(task.valid))


def _log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_probabilities_are_the_mean_of_the_members_by_the_documented_formula(network, task):
    hp = {name: jnp.asarray(0.3 + 0.1 * k) for k, name in enumerate(network.space)}
    params = automl.train(network, jax.random.key(0), hp, task)
    p = {k: np.asarray(v) for k, v in params.items()}
    x = np.asarray(task.valid["x"])
    hinges = [float(hp["hinge_scale"]) * np.maximum(x - c, 0) for c in (-0.67, 0.0, 0.67)]
    additive = float(hp["linear_scale"]) * np.concatenate([x, *hinges], 1) @ p["linear"]
    probabilities = []
    for m in range(2):
        units = slice(4 * m, 4 * (m + 1))
        h = np.maximum(float(hp["hidden_scale"]) * x @ p["hidden"][:, units] + p["bias"][units], 0)
        logits = float(hp["output_scale"]) * h @ p["output"][m] + p["output_bias"][m] + additive
        probabilities.append(np.exp(_log_softmax(logits)))
    expected = np.mean(probabilities, 0)
    np.testing.assert_allclose(np.exp(network.log_probabilities(params, hp, task.valid)), expected, rtol=1e-9)
    value = network.problem.outer_loss(params, hp, task.valid, None)
    rows = np.arange(len(x))
    np.testing.assert_allclose(value, -np.log(expected[rows, np.asarray(task.valid["y"])]).mean(), rtol=1e-9)


def test_padding_changes_nothing(network, task):
    prepared = _prepared()
    own = tasks.shape_of(prepared)
    padded = automl.tabular_task(prepared, shape=TaskShape(own.train_rows + 5, own.valid_rows + 7, 6, 5))
    hp = spaces.default(network.space)
    params = automl.train(network, jax.random.key(1), hp, task)
    wide = {
        "hidden": jnp.pad(params["hidden"], ((0, 3), (0, 0))),
        "bias": params["bias"],
        "output": jnp.pad(params["output"], ((0, 0), (0, 0), (0, 2)), constant_values=3.0),
        "output_bias": jnp.pad(params["output_bias"], ((0, 0), (0, 2)), constant_values=9.0),
        "linear": jnp.pad(params["linear"].reshape(4, 3, 3), ((0, 0), (0, 3), (0, 2))).reshape(24, 5),
    }
    narrow_loss = network.problem.outer_loss(params, hp, task.valid, None)
    wide_loss = network.problem.outer_loss(wide, hp, _float64(padded.valid), None)
    np.testing.assert_allclose(wide_loss, narrow_loss, rtol=1e-6)
    log_p = network.log_probabilities(wide, hp, _float64(padded.valid))
    np.testing.assert_allclose(np.exp(log_p[:, :3]).sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(padded.train["share"][3:], 0)


def test_shares_are_those_of_the_training_rows():
    prepared = _prepared()
    task = automl.tabular_task(prepared, features=np.ones(2, np.float32))
    counts = np.bincount(prepared.train.y, minlength=prepared.num_classes)
    np.testing.assert_allclose(task.train["share"], counts / counts.sum(), rtol=1e-6)
    np.testing.assert_array_equal(task.valid["share"], task.train["share"])
    np.testing.assert_array_equal(task.features, 1)


def test_hypergradient_of_every_hyperparameter_equals_finite_differences(network, task):
    constrained = spaces.constrain(network.problem, network.space)
    estimator = hypergrad.unrolled(constrained, num_steps=network.num_steps)
    # Away from the kinks of ReLUs, and with every hyperparameter in use.
    hp = spaces.default(network.space) | {"rate": jnp.asarray(0.03), "label_smoothing": jnp.asarray(0.1)}
    z = spaces.to_unconstrained(network.space, hp)
    state = estimator.init(jax.random.key(3), z, task)
    estimate = jax.jit(lambda z: estimator.estimate(z, task, state)[0])
    gradient = estimate(z).hypergrad
    flat, unravel = jax.flatten_util.ravel_pytree(z)
    exact = jax.flatten_util.ravel_pytree(gradient)[0]
    assert (np.abs(exact) > 1e-9).all()
    for i in range(len(flat)):
        moved = [estimate(unravel(flat.at[i].add(sign * 1e-5))).value for sign in (1, -1)]
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-5, exact[i], rtol=2e-4, atol=1e-8)


def test_class_weights_are_in_the_inner_loss(network, task):
    """At a network of zeros all classes have probability 1/3, so that only the weights remain: their mean is 1."""
    hp = spaces.default(network.space) | {"class_weighting": jnp.asarray(1.0)}
    loop = network.problem.loop
    state = loop.init(jax.random.key(0), hp, task.train)
    zero = jax.tree.map(jnp.zeros_like, loop.params(state))
    share, y = np.asarray(task.train["share"]), np.asarray(task.train["y"])
    batch = {**task.train}
    loss, _ = loop.loss(zero, hp, batch, loop.context(state))
    weight = 1 / np.where(share > 0, share, 1) / (share * (1 / np.where(share > 0, share, 1))).sum()
    np.testing.assert_allclose(loss, weight[y].mean() * np.log(3), rtol=1e-6)


def test_training_depends_on_the_key_and_repeats(network, task):
    hp = spaces.default(network.space)
    first, again, other = (automl.train(network, jax.random.key(k), hp, task) for k in (0, 0, 1))
    np.testing.assert_array_equal(first["hidden"], again["hidden"])
    assert not np.allclose(first["hidden"], other["hidden"])


@pytest.mark.parametrize("name", ["num_steps", "batch_size", "num_members", "num_hidden"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=name):
        automl.tabular_network(**{name: 0})

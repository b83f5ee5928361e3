"""The network for tables: predictions ignore padding, the loss is the documented one, λ has exact derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import automl, hypergrad, inner, spaces, tasks
from metaopt.automl import _network_folds
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


def _padded(params, data):
    """Pads parameters to the columns and classes of `data`, with values that must not matter."""
    columns, classes = params["linear"].shape[0] // 4, params["linear"].shape[1]
    more = data["x"].shape[1] - columns, data["class_mask"].shape[0] - classes
    linear = params["linear"].reshape(4, columns, classes)
    return {
        "hidden": jnp.pad(params["hidden"], ((0, more[0]), (0, 0)), constant_values=2.0),
        "bias": params["bias"],
        "output": jnp.pad(params["output"], ((0, 0), (0, 0), (0, more[1])), constant_values=3.0),
        "output_bias": jnp.pad(params["output_bias"], ((0, 0), (0, more[1])), constant_values=9.0),
        "linear": jnp.pad(linear, ((0, 0), (0, more[0]), (0, more[1])), constant_values=2.0).reshape(
            -1, classes + more[1]
        ),
    }


def test_training_on_a_padded_task_gives_the_same_predictions(network, task):
    prepared = _prepared()
    own = prepared.shape
    padded = automl.tabular_task(prepared, shape=TaskShape(own.train_rows + 5, own.valid_rows + 7, 6, 5))
    padded = padded._replace(train=_float64(padded.train), valid=_float64(padded.valid))
    # The noise of the inputs is drawn with the padded shape. All else, such as class weights, is in use.
    hp = spaces.default(network.space) | {name: jnp.asarray(0.3) for name in ("class_weighting", "label_smoothing")}
    hp |= {"input_noise": jnp.asarray(0.0), "rate": jnp.asarray(0.05), "decay_output": jnp.asarray(1.0)}
    loop = network.problem.loop
    state = loop.init(jax.random.key(1), hp, task.train)
    wide = loop.init(jax.random.key(1), hp, padded.train)._replace(params=_padded(state.params, padded.train))
    start = network.problem.outer_loss(loop.params(state), hp, task.valid, None)
    step = jax.jit(lambda state, data: inner.step(loop, state, hp, data))
    for _ in range(network.num_steps):
        state, wide = step(state, task.train), step(wide, padded.train)
    value, wide_value = (
        network.problem.outer_loss(loop.params(s), hp, t.valid, None) for s, t in ((state, task), (wide, padded))
    )
    assert value < start - 0.01
    np.testing.assert_allclose(wide_value, value, rtol=1e-6)
    log_p, wide_log_p = (
        network.log_probabilities(loop.params(s), hp, t.valid) for s, t in ((state, task), (wide, padded))
    )
    np.testing.assert_allclose(np.exp(wide_log_p[: len(log_p), :3]), np.exp(log_p), rtol=1e-6)
    np.testing.assert_allclose(np.exp(wide_log_p[:, 3:]), 0, atol=1e-12)


def test_shares_in_the_loss_are_those_of_the_training_rows_of_a_new_split():
    """At a network of zeros, the mean of the documented class weights is the loss, up to log(3)."""
    network = automl.tabular_network(num_steps=5, batch_size=8, num_members=2, num_hidden=4)
    own = _prepared().shape
    shape = TaskShape(own.train_rows + 5, own.valid_rows + 7, 3, 3)
    task = automl.tabular_task(_prepared(), shape=shape, features=np.ones(2, np.float32))
    np.testing.assert_array_equal(task.features, 1)
    y = jnp.where(jnp.arange(len(task.train["y"])) < 9, 0, task.train["y"])  # shares that a new split changes
    task = tasks.resplit(jax.random.key(4), task._replace(train={**task.train, "y": y}))
    real = np.asarray(task.train["y"])[np.asarray(task.train["mask"]) > 0]
    share = np.bincount(real, minlength=3) / len(real)
    hp = spaces.default(network.space) | {"class_weighting": jnp.asarray(1.0)}
    loop = network.problem.loop
    state = loop.init(jax.random.key(0), hp, task.train)
    batch = loop.batch(state, task.train)
    np.testing.assert_allclose(batch["share"], share, rtol=1e-6)
    loss, _ = loop.loss(jax.tree.map(jnp.zeros_like, loop.params(state)), hp, batch, loop.context(state))
    weight = 1 / np.where(share > 0, share, 1) / (share > 0).sum()
    np.testing.assert_allclose(loss, weight[np.asarray(batch["y"])].mean() * np.log(3), rtol=1e-6)


@pytest.mark.once
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


def test_training_depends_on_the_key_and_repeats(network, task):
    hp = spaces.default(network.space)
    first, repeated, other = (automl.train(network, jax.random.key(k), hp, task) for k in (0, 0, 1))
    np.testing.assert_array_equal(first["hidden"], repeated["hidden"])
    assert not np.allclose(first["hidden"], other["hidden"])


def test_each_part_of_the_initialization_has_its_own_numbers(task):
    network = automl.tabular_network(num_steps=1, batch_size=8, num_members=8, num_hidden=64)
    loop = network.problem.loop
    params = loop.params(loop.init(jax.random.key(0), spaces.default(network.space), task.train))
    rows = [*params["hidden"], params["bias"], *params["output"].reshape(512, -1).T]
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(correlations).max() < 0.2  # of 512 numbers, the standard error is 0.044


def test_hypergradient_steps_lower_the_validation_loss_of_the_network_with_all_folds():
    folds = [_network_folds.FoldRows(*rows) for rows in zip(*_rows_of_folds(), strict=True)]
    train = [_joined([*folds[:i], *folds[i + 1 :]]) for i in range(3)]
    data = _network_folds.NetworkData(
        train, [rows.y for rows in train], folds, [rows.y for rows in folds], 2, [np.arange(2)] * 3, 0
    )
    space = automl.tabular_network().space
    poor = {"hidden_scale": 0.3, "linear_scale": 0.3}
    start = {name: np.float32(value * poor.get(name, 1)) for name, value in spaces.default(space).items()}
    losses = []
    for settings in ({"draw": 0}, {"num_refined": 2}):
        results = _network_folds.fit_folds(data, start, settings, None)
        p = [result.predicted[np.arange(30), rows.y] for result, rows in zip(results, folds, strict=True)]
        losses.append(-np.log(np.concatenate(p)).mean())
    assert losses[1] < 0.95 * losses[0]


def _rows_of_folds():
    """Rows of a noisy problem with two classes: x, y and weights of 3 folds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 30, 4)).astype(np.float32)
    y = (x[..., 0] - x[..., 1] * x[..., 2] + rng.normal(size=(3, 30)) > 0).astype(np.int32)
    return x, y, np.ones((3, 30))


def _joined(folds):
    return _network_folds.FoldRows(*(np.concatenate(part) for part in zip(*folds, strict=True)))

"""Heads that the support set makes, and iMAML, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import base, methods

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
WAYS, DIM, REAL = 3, 4, 2  # one of the three classes is padding


def side(num, num_padded):
    """An episode's side of two real classes, with padded rows at the end."""
    x = np.concatenate([RNG.normal(size=(num, DIM)), np.zeros((num_padded, DIM))])
    y = np.concatenate([np.arange(num) % REAL, np.zeros(num_padded)]).astype(np.int32)
    mask = np.concatenate([np.ones(num), np.zeros(num_padded)])
    return {"x": x, "y": y, "mask": mask, "class_mask": np.array([1.0, 1.0, 0.0])}


def features(params, x):
    return x @ params["map"]


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


META = {"map": RNG.normal(size=(DIM, DIM))}


def cross_entropy(logits, side):
    """By NumPy, among the real classes and rows."""
    real = side["mask"] > 0
    logits, y = logits[real, :REAL], side["y"][real]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]))


def estimate(a, task):
    hyperparams = to_jax(a.hyperparams(to_jax(META)))
    found = jax.jit(a.estimator.estimate)(hyperparams, to_jax(task), KEY)[0]
    return hyperparams, jax.device_get(found)


def test_prototypes_are_the_nearest_class_means():
    task = base.Task(side(6, 2), side(5, 1))
    x, y, mask = (task.train[name] for name in ("x", "y", "mask"))
    z, query = x @ META["map"], task.valid["x"] @ META["map"]
    means = np.stack([z[(y == c) & (mask > 0)].mean(0) for c in range(REAL)])
    distances = ((query[:, None] - means[None]) ** 2).sum(-1)
    hyperparams, found = estimate(methods.prototypical_networks(features), task)
    assert found.value == pytest.approx(cross_entropy(-distances, task.valid), rel=1e-10)
    assert abs(found.hypergrad["init"]["map"]).max() > 0.01
    # Proto-MAML starts there.
    a = methods.proto_maml(features, num_steps=2, rate=0.1)
    outputs = methods.adapted(a, hyperparams, methods.linear_head(features))(
        KEY, to_jax(task.train), to_jax(task.valid)
    )
    shared = outputs[0, :, :REAL] + distances  # |x|²: the same for all classes
    np.testing.assert_allclose(shared[:, 0], shared[:, 1], rtol=1e-10, atol=1e-12)
    losses = [cross_entropy(np.asarray(o), task.valid | {"y": task.valid["y"]}) for o in outputs]
    assert outputs.shape == (3, 6, WAYS) and losses[0] == pytest.approx(float(found.value), rel=1e-10)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("num", [3, 7])  # fewer and more rows than features
def test_the_ridge_head_is_numpys(num):
    task = base.Task(side(num, 1), side(5, 1))
    hyperparams, found = estimate(methods.ridge_head(features), task)

    def by_hand(log_ridge, scale, shift):
        x = (task.train["x"] @ META["map"])[:num]
        y = np.eye(WAYS)[task.train["y"]][:num]
        w = np.linalg.solve(x.T @ x + np.exp(log_ridge) * np.eye(DIM), x.T @ y)
        return cross_entropy(scale * (task.valid["x"] @ META["map"] @ w) + shift, task.valid)

    assert found.value == pytest.approx(by_hand(0.0, 1.0, 0.0), rel=1e-9)
    for name, at in {"log_ridge": (1, 0, 0), "scale": (0, 1, 0), "shift": (0, 0, 1)}.items():
        step = 1e-5 * np.array(at)
        ends = [by_hand(*(np.array([0.0, 1.0, 0.0]) + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(found.hypergrad[name], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_the_ridge_head_of_regression():
    train, valid = ({"x": RNG.normal(size=(n, DIM)), "y": RNG.normal(size=(n, 2)), "mask": np.ones(n)} for n in (6, 3))
    a = methods.ridge_head(features, loss=methods.mean_squared_error)
    _, found = estimate(a, base.Task(train, valid))
    x = train["x"] @ META["map"]
    w = np.linalg.solve(x.T @ x + np.eye(DIM), x.T @ train["y"])
    assert found.value == pytest.approx(((valid["x"] @ META["map"] @ w - valid["y"]) ** 2).mean(), rel=1e-10)


def test_imaml_is_the_implicit_derivative_in_closed_form():
    """g = |Xθ − y|²/2N:  θ* = (H + μI)⁻¹ (Xᵀy/N + μλ),  dF/dλ = μ (H + μI)⁻¹ ∇f(θ*)."""
    proximal, start = 0.7, RNG.normal(size=DIM)
    task = base.Task(*({"x": RNG.normal(size=(n, DIM)), "y": RNG.normal(size=n)} for n in (8, 6)))
    loss = lambda params, hyperparams, batch: ((batch["x"] @ params - batch["y"]) ** 2).mean() / 2
    a = methods.imaml(loss, proximal=proximal, num_steps=400, rate=0.2)
    hyperparams = a.hyperparams(jnp.asarray(start))
    state = a.estimator.init(KEY, hyperparams, to_jax(task))
    found = jax.jit(a.estimator.estimate)(hyperparams, to_jax(task), state)[0]
    (x, y), (xq, yq) = ((part["x"], part["y"]) for part in task[:2])
    regular = x.T @ x / len(y) + proximal * np.eye(DIM)
    theta = np.linalg.solve(regular, x.T @ y / len(y) + proximal * start)
    slope = xq.T @ (xq @ theta - yq) / len(yq)
    assert found.value == pytest.approx(((xq @ theta - yq) ** 2).mean() / 2, rel=1e-9)
    np.testing.assert_allclose(found.hypergrad["init"], proximal * np.linalg.solve(regular, slope), rtol=1e-7)

"""Heads that the support set makes, and iMAML, against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, evaluation, few_shot, hypergrad, inner, tasks, training

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
WAYS, DIM, REAL = 3, 4, 2  # one of the three classes is padding


def side(num, num_padded):
    """An episode's side of two real classes, with padded rows at the end."""
    x = np.concatenate([RNG.normal(size=(num, DIM)), np.zeros((num_padded, DIM))])
    y = np.concatenate([np.arange(num) % REAL, np.zeros(num_padded)]).astype(np.int32)
    mask = np.concatenate([np.ones(num), np.zeros(num_padded)])
    return {"x": x, "y": y, "mask": mask, "class_mask": np.array([1.0, 1.0, 0.0])}


def features(params, batch):
    return batch["x"] @ params["map"]


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


META = {"map": RNG.normal(size=(DIM, DIM))}


def cross_entropy(logits, side):
    """By NumPy, among the real classes and rows."""
    real = side["mask"] > 0
    logits, y = logits[real, :REAL], side["y"][real]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]))


def estimate(a, task, meta=META):
    hyperparams = to_jax(a.hyperparams(to_jax(meta)))
    out = jax.jit(a.estimator.estimate)(hyperparams, to_jax(task), KEY)[0]
    return hyperparams, jax.device_get(out)


@pytest.mark.once
def test_prototypes_are_the_nearest_class_means():
    task = base.Task(side(6, 2), side(5, 1))
    x, y, mask = (task.train[name] for name in ("x", "y", "mask"))
    z, query = x @ META["map"], task.valid["x"] @ META["map"]
    means = np.stack([z[(y == c) & (mask > 0)].mean(0) for c in range(REAL)])
    distances = ((query[:, None] - means[None]) ** 2).sum(-1)
    hyperparams, out = estimate(few_shot.prototypical_networks(features), task)
    assert out.value == pytest.approx(cross_entropy(-distances, task.valid), rel=1e-10)
    # Proto-MAML starts there.
    a = few_shot.proto_maml(features, num_steps=2, rate=0.1)
    outputs = few_shot.adapted(a, hyperparams, few_shot.linear_head(features))(
        KEY, to_jax(task.train), to_jax(task.valid)
    )
    shared = outputs[0, :, :REAL] + distances  # |x|²: the same for all classes
    np.testing.assert_allclose(shared[:, 0], shared[:, 1], rtol=1e-10, atol=1e-12)
    losses = [cross_entropy(np.asarray(o), task.valid | {"y": task.valid["y"]}) for o in outputs]
    assert outputs.shape == (3, 6, WAYS) and losses[0] == pytest.approx(float(out.value), rel=1e-10)


def with_ones(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


@pytest.mark.once
def test_labels_of_few_bits_are_classes_beside_more_than_those_bits_hold():
    """Class 3 had been class 259, too."""
    wide = side(6, 1) | {"class_mask": np.ones(260)}
    narrow = wide | {"y": wide["y"].astype(np.uint8)}
    values = [
        float(estimate(few_shot.prototypical_networks(features), base.Task(rows, rows))[1].value)
        for rows in (wide, narrow)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("num", [3, 7])  # fewer and more rows than features
@pytest.mark.once
def test_the_ridge_head_equals_one_in_numpy(num):
    task = base.Task(side(num, 1), side(5, 1))
    hyperparams, out = estimate(few_shot.ridge_head(features), task)

    def by_hand(log_ridge, scale, shift):
        x, query = (with_ones(side["x"] @ META["map"]) for side in (task.train, task.valid))
        y = np.eye(WAYS)[task.train["y"]][:num]
        w = np.linalg.solve(x[:num].T @ x[:num] + np.exp(log_ridge) * np.eye(DIM + 1), x[:num].T @ y)
        return cross_entropy(scale * (query @ w) + shift, task.valid)

    assert out.value == pytest.approx(by_hand(0.0, 1.0, 0.0), rel=1e-9)
    for name, direction in {"log_ridge": (1, 0, 0), "scale": (0, 1, 0), "shift": (0, 0, 1)}.items():
        step = 1e-5 * np.array(direction)
        ends = [by_hand(*(np.array([0.0, 1.0, 0.0]) + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(out.hypergrad[name], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_the_ridge_head_of_regression():
    train, valid = ({"x": RNG.normal(size=(n, DIM)), "y": RNG.normal(size=(n, 2)), "mask": np.ones(n)} for n in (6, 3))
    a = few_shot.ridge_head(features, loss=few_shot.mean_squared_error)
    _, out = estimate(a, base.Task(train, valid))
    x, query = (with_ones(side["x"] @ META["map"]) for side in (train, valid))
    w = np.linalg.solve(x.T @ x + np.eye(DIM + 1), x.T @ train["y"])
    assert out.value == pytest.approx(((query @ w - valid["y"]) ** 2).mean(), rel=1e-10)


@pytest.mark.parametrize("num", [3, 7])  # fewer and more rows than features
def test_the_ridge_head_weights_squares_by_a_mask_of_fractions(num):
    weights = np.array([0.25, 1.0, 0.0, 0.5, 2.0, 1.0, 0.75])[:num]
    rng = np.random.default_rng(num)
    valid = {"x": rng.normal(size=(3, DIM)), "y": rng.normal(size=(3, 2)), "mask": np.ones(3)}
    train = {"x": rng.normal(size=(num, DIM)), "y": rng.normal(size=(num, 2)), "mask": weights}
    a = few_shot.ridge_head(features, loss=few_shot.mean_squared_error)
    hyperparams, out = estimate(a, base.Task(train, valid))
    x, query = (with_ones(side["x"] @ META["map"]) for side in (train, valid))
    w = np.linalg.solve(x.T @ (weights[:, None] * x) + np.eye(DIM + 1), x.T @ (weights[:, None] * train["y"]))
    assert out.value == pytest.approx(((query @ w - valid["y"]) ** 2).mean(), rel=1e-10)
    loop = a.problem.loop
    total = lambda mask: loop.params(loop.init(KEY, hyperparams, to_jax(train) | {"mask": mask}))["head"]["w"].sum()
    slopes = jax.grad(total)(jnp.asarray(weights))
    for i in range(num):  # also at the weight 0
        shift = 1e-6 * np.eye(num)[i]
        np.testing.assert_allclose(slopes[i], (total(weights + shift) - total(weights - shift)) / 2e-6, rtol=1e-5)


@pytest.mark.once
def test_imaml_is_the_implicit_derivative_in_closed_form():
    """g = |Xθ − y|²/2N:  θ* = (H + μI)⁻¹ (Xᵀy/N + μλ),  dF/dλ = μ (H + μI)⁻¹ ∇f(θ*)."""
    proximal, start = 0.7, RNG.normal(size=DIM)
    task = base.Task(*({"x": RNG.normal(size=(n, DIM)), "y": RNG.normal(size=n)} for n in (8, 6)))
    loss = lambda params, hyperparams, batch: ((batch["x"] @ params - batch["y"]) ** 2).mean() / 2
    a = few_shot.imaml(loss, proximal=proximal, num_steps=400, rate=0.2)
    hyperparams = a.hyperparams(jnp.asarray(start))
    state = a.estimator.init(KEY, hyperparams, to_jax(task))
    out = jax.jit(a.estimator.estimate)(hyperparams, to_jax(task), state)[0]
    (x, y), (xq, yq) = ((part["x"], part["y"]) for part in task[:2])
    regular = x.T @ x / len(y) + proximal * np.eye(DIM)
    theta = np.linalg.solve(regular, x.T @ y / len(y) + proximal * start)
    slope = xq.T @ (xq @ theta - yq) / len(yq)
    assert out.value == pytest.approx(((xq @ theta - yq) ** 2).mean() / 2, rel=1e-9)
    np.testing.assert_allclose(out.hypergrad["init"], proximal * np.linalg.solve(regular, slope), rtol=1e-7)


def test_flags_of_a_pattern_are_kept():
    params = {"Head": jnp.array(1.0), "body": jnp.array(2.0)}
    a = few_shot.boil(lambda p, hp, batch: p["Head"] * p["body"], head=re.compile("head", re.IGNORECASE))
    state = a.problem.loop.init(KEY, a.hyperparams(params), None)
    assert a.problem.loop.params(state) == {"Head": None, "body": 2.0}


def test_cavia_with_a_context():
    """Where the loss is in its full form, so is the `init` that CAVIA makes."""
    loss = lambda params, hyperparams, batch, context: ((params["w"] + params["context"][0] - batch) ** 2).sum() / 2
    a = few_shot.cavia(loss, num_context=1, num_steps=1, rate=0.5, with_context=True)
    out = a.estimator.estimate(a.hyperparams({"w": jnp.array(1.0)}), base.Task(jnp.array(3.0), jnp.array(4.0)), KEY)
    assert float(out[0].value) == pytest.approx((1 + 0.5 * 2 - 4) ** 2 / 2)


@pytest.mark.slow
def test_pretraining_on_all_classes_is_a_baseline_for_labels_that_change():
    """Classes are directions in a plane; four other inputs are noise, which features must learn to leave out."""
    rng = np.random.default_rng(0)

    def source(angles, name):
        y = np.repeat(np.arange(len(angles)), 100)
        radius = rng.uniform(1, 3, len(y))
        x = np.stack([radius * np.cos(angles[y]), radius * np.sin(angles[y])], 1) + 0.05 * rng.normal(size=(len(y), 2))
        x = np.concatenate([x, 2 * rng.normal(size=(len(y), 4))], 1).astype(np.float32)
        return tasks.from_arrays(x, y, name=name)

    train, test = source(np.arange(6) * 0.5, "train"), source(np.arange(3) * 0.8 + 0.2, "test")
    net = lambda params, batch: jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
    head = few_shot.linear_head(net)
    before = few_shot.pretrained(lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch))
    keys = jax.random.split(KEY, 2)
    start = before.hyperparams(
        {
            "a": jax.random.normal(keys[0], (6, 16), jnp.float32) / 4,
            "b": jax.random.normal(keys[1], (16, 8), jnp.float32) / 4,
            "head": {"w": jnp.zeros((8, 6), jnp.float32), "b": jnp.zeros(6, jnp.float32)},
        }
    )
    result = training.fit(
        training.learner(before.estimator, optax.adam(0.02)),
        tasks.labelled_batches(train, 64),
        hyperparams=start,
        num_steps=150,
        key=KEY,
        steps_per_call=150,
    )
    assert result.history["value"][0] == pytest.approx(np.log(6)) and result.history["value"][-1] < 0.5
    tuned = few_shot.proto_maml(net, adapt="^head", num_steps=3)
    evaluated = few_shot.evaluate_episodes(
        {name: few_shot.adapted(tuned, hp, head) for name, hp in (("start", start), ("tuned", result.hyperparams))},
        tasks.episodes(test, num_ways=3, num_shots=1, num_query=5),
        KEY,
        num_episodes=100,
        chunk_size=100,
    )
    scores = {name: evaluation.mean_scores(evaluated)[name]["episodes"][0] for name in ("start", "tuned")}
    assert scores["tuned"] > 0.8 and scores["tuned"] > scores["start"] + 0.2


@pytest.mark.once
def test_a_batch_of_tasks_goes_through_over_tasks():
    batch = jax.tree.map(lambda x: jnp.stack([x] * 8), to_jax(base.Task(side(6, 2), side(7, 1))))  # as many as rows
    a = few_shot.maml(lambda params, hyperparams, batch: inner.cross_entropy(batch["x"] @ params["w"], batch))
    hyperparams = a.hyperparams({"w": jnp.zeros((DIM, WAYS))})
    whole = hypergrad.over_tasks(a.estimator)
    state = whole.init(KEY, hyperparams, batch)
    assert jax.eval_shape(whole.estimate, hyperparams, batch, state)[0].value.shape == ()
    # A mask of tokens does not make a batch, nor does one number.
    a = few_shot.maml(lambda params, hyperparams, batch: params["a"] * batch["mask"].sum() - batch["y"].mean())
    for shape in ((6, 4), ()):
        data = {"x": jnp.ones((6, 4)), "y": jnp.ones(6), "mask": jnp.ones(shape)}
        estimate, _ = jax.eval_shape(a.estimator.estimate, a.hyperparams({"a": 1.0}), base.Task(data, data), KEY)
        assert estimate.value.shape == ()


def test_learned_rates_of_integer_leaves_are_no_integers():
    start = few_shot.meta_sgd(lambda params, hyperparams, batch: params["a"], rate=0.3).hyperparams({"a": 1})
    assert float(start["rate"]["a"]) == pytest.approx(0.3)

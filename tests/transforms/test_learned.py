"""The learned optimizer: its derivatives, its symmetries, its files, and the one that is shipped."""

import functools
import importlib.resources
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import base, hypergrad, inner, training, transforms

KEY = jax.random.key(0)
WEIGHTS = jax.tree.map(lambda x: x.astype(jnp.float64), transforms.init_learned(KEY))
# Larger steps and faster decays than at initialization, so that the compared values are not almost zero.
WEIGHTS.layers["2"]["w"] *= 10
for i, layer in enumerate(WEIGHTS.layers.values()):  # no unit rests on its kink, as one does whose inputs are all off
    layer["b"] += jax.random.normal(jax.random.fold_in(KEY, i), layer["b"].shape)
WEIGHTS = WEIGHTS._replace(decays=jax.tree.map(lambda x: x - 2, WEIGHTS.decays))
SMALL = metaopt.load(Path(transforms.__file__).parent / "learned_small.npz")
PARAMS = {"w": np.random.default_rng(1).normal(size=(3, 4)), "b": np.random.default_rng(2).normal(size=4)}


def loss(params):
    """Its gradient is always zero in a row of the matrix and in an entry of the vector."""
    return jnp.sum(params["w"][:2] ** 2 * jnp.arange(1.0, 5.0)[None]) + jnp.sum(params["b"][1:] ** 4)


def moved(weights, slopes=None):
    """How far four steps get, weighed; `slopes` are added to the gradients."""
    optimizer = transforms.learned(weights)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params) if slopes is None else slopes
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, PARAMS)
    (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=4)
    return optax.tree.sum(jax.tree.map(lambda a, b: jnp.sin(5 * b) * (a - b), after, params))


@pytest.mark.once
def test_the_gradient_in_the_weights_is_that_of_finite_differences():
    flat, unravel = jax.flatten_util.ravel_pytree(WEIGHTS)
    function = lambda x: moved(unravel(x))
    reverse = jax.jit(jax.grad(function))(flat)
    chex.assert_tree_all_finite(reverse)
    directions = np.random.default_rng(3).normal(size=(2, flat.size))
    directions[0] *= np.arange(flat.size) < 7  # the decays are few among many
    forward = jax.jit(lambda x, d: jax.jvp(function, (x,), (d,)))
    for direction in directions:
        slope = forward(flat, direction)[1]
        np.testing.assert_allclose(slope, direction @ reverse, rtol=1e-9)
        values = [forward(flat + step * direction, direction)[0] for step in (2e-5, -2e-5)]
        np.testing.assert_allclose(slope, (values[0] - values[1]) / 4e-5, rtol=1e-5)


@pytest.mark.once
def test_without_a_gradient_derivatives_are_finite():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    derivatives = jax.jit(jax.value_and_grad(moved, argnums=(0, 1)))(WEIGHTS, zeros)
    chex.assert_tree_all_finite(derivatives)


@jax.jit
def one_update(params, grads):
    optimizer = transforms.learned(WEIGHTS)
    return optimizer.update(grads, optimizer.init(params), params)[0]


GRADS = jax.tree.map(lambda p: np.sin(3 * p) + 0.1, PARAMS)


@pytest.mark.once
def test_the_order_of_rows_columns_and_axes_does_not_matter():
    rows, columns = np.array([2, 0, 1]), np.array([1, 3, 0, 2])

    def permuted(tree):
        return {"w": tree["w"][rows][:, columns], "b": tree["b"][columns]}

    updates = one_update(PARAMS, GRADS)
    chex.assert_trees_all_close(one_update(permuted(PARAMS), permuted(GRADS)), permuted(updates), rtol=1e-12)
    # Beyond the two largest axes, along which squares are averaged, others are like more rows.
    deep = [np.stack([tree["w"], 2 * tree["w"]]) for tree in (PARAMS, GRADS)]
    first, turned = one_update(*deep), one_update(*[x.transpose(1, 0, 2)[rows] for x in deep])
    np.testing.assert_allclose(turned, first.transpose(1, 0, 2)[rows], rtol=1e-12)
    np.testing.assert_allclose(one_update(*[x[::-1] for x in deep]), first[::-1], rtol=1e-12)


def test_every_tensor_is_on_its_own_and_seen_relative_to_itself():
    updates = one_update(PARAMS, GRADS)
    chex.assert_trees_all_close(one_update(PARAMS["b"], GRADS["b"]), updates["b"], rtol=1e-12)
    scaled = lambda factor, tree: jax.tree.map(lambda x: factor * x, tree)
    chex.assert_trees_all_close(one_update(PARAMS, scaled(100.0, GRADS)), updates, rtol=1e-2)  # but for the ε
    chex.assert_trees_all_close(one_update(scaled(100.0, PARAMS), GRADS), updates, rtol=1e-6)


def in_numpy(weights, params, grads):
    """The updates of a matrix, as they are written down: an array of features for each entry, and a network."""
    weights = jax.tree.map(np.asarray, weights)
    beta = {
        name: 1 / (1 + np.exp(-np.log(np.array(start) / (1 - np.array(start))) - weights.decays[name]))[:, None, None]
        for name, start in {"momentum": [0.9, 0.99, 0.999], "second": [0.999], "factored": [0.9, 0.99, 0.999]}.items()
    }
    m, v, row, column = np.zeros((3, 3, 4)), np.zeros((1, 3, 4)), np.zeros((3, 3, 1)), np.zeros((3, 1, 4))
    root = lambda x: 1 / np.sqrt(x + 1e-10)
    for t, g in enumerate(grads):
        average = lambda name, old, new: beta[name] * old + (1 - beta[name]) * new
        m, v = average("momentum", m, g), average("second", v, g**2)
        row, column = (
            average("factored", old, (g**2).mean(axis, keepdims=True)) for old, axis in ((row, 1), (column, 0))
        )
        factored = root(row * column / row.mean(1, keepdims=True))
        parts = [g[None], params[None], m, v, m * root(v), root(v), g * factored, m * factored]
        parts += [row, root(row), column, root(column)]
        parts = [x * root((x**2).mean((1, 2), keepdims=True)) for x in parts]
        entries = np.concatenate([np.broadcast_to(x, (len(x), 3, 4)) for x in parts])
        times = np.tanh(t / np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]) - 1)
        x = np.concatenate([entries, np.broadcast_to(times[:, None, None], (11, 3, 4))])
        *hidden, last = [weights.layers[str(i)] for i in range(len(weights.layers))]
        for layer in hidden:
            x = np.maximum(np.einsum("ih,irc->hrc", layer["w"], x) + layer["b"][:, None, None], 0)
        direction, magnitude = np.einsum("ih,irc->hrc", last["w"], x) + last["b"][:, None, None]
    return -0.01 * direction * np.exp(0.1 * magnitude)


@pytest.mark.parametrize("weights", [WEIGHTS, SMALL])
def test_updates_equal_the_documented_network(weights):
    optimizer = transforms.learned(weights)
    grads = [np.random.default_rng(i).normal(size=(3, 4)) for i in (6, 7)]

    @jax.jit
    def two_steps():
        _, state = optimizer.update(jnp.asarray(grads[0]), optimizer.init(PARAMS["w"]), PARAMS["w"])
        return optimizer.update(jnp.asarray(grads[1]), state, PARAMS["w"])[0]

    np.testing.assert_allclose(two_steps(), in_numpy(weights, PARAMS["w"], grads), rtol=1e-5)


def test_the_momenta_are_averages_and_the_factors_those_of_squares():
    decays = {"momentum": jnp.array([0.0, 1.0, 0.0]), "second": jnp.array([0.5]), "factored": jnp.zeros(3)}
    optimizer = transforms.learned(WEIGHTS._replace(decays=decays))
    logits = np.log([9.0, 99.0, 999.0]) + np.array([0.0, 1.0, 0.0])
    beta = 1 / (1 + np.exp(-logits))
    g1, g2 = (np.random.default_rng(i).normal(size=(3, 4)) for i in (4, 5))
    state = optimizer.init(PARAMS["w"])
    update = jax.jit(optimizer.update)
    for g in (g1, g2):
        _, state = update(g, state, PARAMS["w"])
    np.testing.assert_allclose(state.momenta[1], (1 - beta[1]) * (beta[1] * g1 + g2), rtol=1e-9)
    rows = np.stack([(1 - b) * (b * (g1**2).mean(1) + (g2**2).mean(1)) for b in (0.9, 0.99, 0.999)])
    np.testing.assert_allclose(state.factored["row"][..., 0], rows, rtol=1e-6)
    assert state.factored["column"].shape == (3, 1, 4) and state.count == 2


@pytest.mark.once
def test_in_a_chain_and_below_float32():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), transforms.learned(WEIGHTS), optax.add_decayed_weights(-0.1)
    )
    state = jax.jit(optimizer.init)(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert after[1].momenta["w"].dtype == jnp.float32  # 0.999 of what is kept would be lost in bfloat16
    clipped = jax.tree.map(lambda p: p.astype(jnp.float64) / optax.tree.norm(params), params)
    exact = one_update(jax.tree.map(lambda p: p.astype(jnp.float64), params), clipped)
    decayed = jax.tree.map(lambda u, p: u - 0.1 * p.astype(jnp.float64), exact, params)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u.astype(jnp.float64), updates), decayed, atol=2e-2)


@pytest.mark.once
def test_files_come_back_to_the_bit(tmp_path):
    weights = transforms.init_learned(KEY, hidden=(8,))
    metaopt.save(tmp_path / "weights.npz", weights)
    loaded = metaopt.load(tmp_path / "weights.npz")
    chex.assert_trees_all_equal(loaded, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, weights)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    metaopt.save(tmp_path / "weights.npz", half)  # NumPy's files have no bfloat16
    loaded = metaopt.load(tmp_path / "weights.npz")
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]


def write_weights(path, header=None, **changes):
    """A file of fresh weights, with some entries changed (None: left out)."""
    metaopt.save(path, transforms.init_learned(KEY))
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if header is not None:
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays.update(changes)
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "weights.npz"
    load = functools.partial(metaopt.load, path)
    write_weights(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is not a file that `metaopt.save` wrote"):
        load()
    write_weights(path, {"format": "metaopt.learned", "version": 2})
    with pytest.raises(ValueError, match=r"version 2; this metaopt reads 'metaopt.learned' up to version 1"):
        load()
    for changes, match in {
        "layers/1/w": (np.zeros((5, 4)), r"has no weights.*\.layers\['1'\]\['w'\] should be .*\(4, 4\)"),
        "layers/2/b": (None, "has no weights of a learned optimizer"),
        "layers/0/w": (None, "has no weights of a learned optimizer"),
        "decays/second": (np.zeros(1, int), r"\.decays\['second'\] should be floating-point"),
        "decays/momentum": (np.array(["a", "b", "c"]), r"\.decays\['momentum'\] should be floating-point"),
        "more": (np.zeros(1), "does not describe a `LearnedWeights` as it should: .*'more'"),
    }.items():
        write_weights(path, **{changes: match[0]})
        with pytest.raises(ValueError, match=match[1]):
            load()
    with pytest.raises(FileNotFoundError):
        metaopt.load(tmp_path / "absent.npz")


@pytest.mark.once
def test_the_shipped_weights_train_better_than_fresh_ones_and_than_adam_by_default():
    file = importlib.resources.files("metaopt.transforms") / "learned_small.npz"
    assert len(file.read_bytes()) < 100_000
    x = jax.random.normal(jax.random.key(1), (64, 8))
    y = jnp.tanh(2 * x[:, 0] * x[:, 1] + x[:, 2])
    keys = jax.random.split(jax.random.key(2))
    params = {"in": jax.random.normal(keys[0], (8, 16)) / 2, "out": jax.random.normal(keys[1], (16,)) / 4}

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)

    def last(optimizer):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=100)
        return loss(after)

    optimizers = transforms.learned(), transforms.learned(transforms.init_learned(KEY)), optax.adam(1e-3)
    learned, fresh, adam = jax.jit(lambda: [last(o) for o in optimizers])()
    assert learned < 0.5 * adam and learned < 0.5 * fresh


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["persistent_es", "truncated"])
def test_its_weights_are_trained_by_evolution_strategies_or_gradients_of_windows(rule):
    # A family of quadratics, of other curvatures and minima in each task; judged on tasks that were not trained on.
    def draw(key, num):
        curvature, target = jax.random.split(key)
        data = {
            "curvature": jnp.exp(jax.random.normal(curvature, (num, 6))),
            "target": jax.random.normal(target, (num, 6)),
        }
        return base.Task(data, data)

    distance = lambda params, weights, batch: (batch["curvature"] * (params - batch["target"]) ** 2).mean()
    loop = inner.loop(distance, transforms.learned, init=lambda key, weights, data: jnp.zeros(6))
    problem = inner.problem(loop, distance)
    windows = {"num_steps": 20, "truncation_length": 5}
    if rule == "truncated":
        estimator = hypergrad.truncated(problem, **windows, outer="mean")
    else:
        estimator = hypergrad.persistent_es(problem, **windows, sigma=0.01, num_pairs=8)
    start = jax.tree.map(lambda x: x.astype(jnp.float64), transforms.init_learned(KEY))
    learner = training.learner(
        hypergrad.over_tasks(estimator, max_norm=1.0), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    )
    trained = training.fit(
        learner, lambda key: draw(key, 8), hyperparams=start, num_steps=120, key=KEY, progress=False
    ).hyperparams

    @jax.jit
    def judged(weights):
        run = hypergrad.unroll(loop, num_steps=20)
        one = lambda task: distance(loop.params(run(KEY, weights, task.train)), weights, task.valid)
        return jax.vmap(one)(draw(jax.random.key(5), 64)).mean()

    assert judged(trained) < 0.7 * judged(start)

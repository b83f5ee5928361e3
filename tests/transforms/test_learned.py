"""The learned optimizer: its derivatives, its symmetries, its files, and the one that is shipped."""

import functools
import importlib.resources
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import transforms

KEY = jax.random.key(0)
WEIGHTS = jax.tree.map(lambda x: x.astype(jnp.float64), transforms.init_learned(KEY))
# Larger steps than fresh weights take, so that what is compared is not all but zero.
WEIGHTS["layers"]["2"]["w"] *= 10
PARAMS = {
    "w": np.random.default_rng(1).normal(size=(3, 4)),
    "b": np.random.default_rng(2).normal(size=4),
    "scale": np.array(0.7),
}


def quadratic(params):
    """Its gradient is exactly zero in one entry, one row and one whole tensor."""
    w, b = params["w"], params["b"]
    return jnp.sum(w[:2] ** 2 * jnp.arange(1.0, 5.0)[None]) + jnp.sum(b[1:] ** 4)


def trained(weights, params=PARAMS, loss=quadratic, num_steps=3):
    optimizer = transforms.learned(weights)
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def outer(weights):
    params = trained(weights)
    return quadratic(params) + jnp.sum(params["w"][2] ** 2) + params["scale"] ** 2


def test_the_gradient_in_the_weights_is_that_of_finite_differences():
    outer_jit = jax.jit(outer)
    flat, unravel = jax.flatten_util.ravel_pytree(WEIGHTS)
    reverse = jax.jit(jax.grad(lambda x: outer(unravel(x))))(flat)
    chex.assert_tree_all_finite(reverse)
    directions = np.random.default_rng(3).normal(size=(3, flat.size))
    # The decays are few among many: a direction of their own.
    directions[0] *= np.arange(flat.size) < 7
    forward = jax.jit(jax.vmap(lambda d: jax.jvp(lambda x: outer(unravel(x)), (flat,), (d,))[1]))(directions)
    np.testing.assert_allclose(forward, directions @ reverse, rtol=1e-9)
    for direction, slope in zip(directions, forward, strict=True):
        values = [outer_jit(unravel(flat + step * direction)) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-6, rtol=2e-6)


def test_zero_gradients_have_finite_derivatives():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)

    def last(weights, params, grads):
        optimizer = transforms.learned(weights)
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
        return optax.tree.sum(updates)

    for params in (PARAMS, zeros):
        value, slopes = jax.jit(jax.value_and_grad(last, argnums=(0, 1, 2)))(WEIGHTS, params, zeros)
        chex.assert_tree_all_finite((value, slopes))


def one_update(params, grads):
    optimizer = transforms.learned(WEIGHTS)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_the_order_of_rows_columns_and_axes_does_not_matter():
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(3 * p["w"])) + jnp.sum(p["b"] ** 3) + p["scale"] ** 2)(PARAMS)
    updates = one_update(PARAMS, grads)
    rows, columns = np.array([2, 0, 1]), np.array([1, 3, 0, 2])

    def moved(tree):
        return {**tree, "w": tree["w"][rows][:, columns], "b": tree["b"][columns]}

    chex.assert_trees_all_close(one_update(moved(PARAMS), moved(grads)), moved(updates), rtol=1e-12)
    # The two axes of a factored matrix are the rows and the columns in their order; others are like entries.
    deep = lambda tree: jnp.stack([tree["w"], 2 * tree["w"]])
    first = one_update(deep(PARAMS), deep(grads))
    np.testing.assert_allclose(one_update(deep(PARAMS)[::-1], deep(grads)[::-1]), first[::-1], rtol=1e-12)


def test_every_tensor_is_on_its_own_and_the_loss_has_no_scale():
    grads = jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1, PARAMS)
    updates = one_update(PARAMS, grads)
    for name, value in PARAMS.items():
        chex.assert_trees_all_close(one_update(value, grads[name]), updates[name], rtol=1e-12)
    chex.assert_trees_all_close(one_update(PARAMS, jax.tree.map(lambda g: 100 * g, grads)), updates, rtol=1e-3)
    chex.assert_trees_all_close(
        one_update(jax.tree.map(lambda p: 100 * p, PARAMS), grads), updates, rtol=1e-6
    )  # parameters too are seen relative to their tensor


def test_the_momenta_are_averages_and_the_factors_those_of_squares():
    decays = {"momentum": jnp.array([0.0, 1.0, 0.0]), "second": jnp.array([0.5]), "factored": jnp.zeros(3)}
    optimizer = transforms.learned({**WEIGHTS, "decays": decays})
    logits = np.log([9.0, 99.0, 999.0]) + np.array([0.0, 1.0, 0.0])
    beta = 1 / (1 + np.exp(-logits))
    g1, g2 = (np.random.default_rng(i).normal(size=(3, 4)) for i in (4, 5))
    state = optimizer.init(PARAMS["w"])
    for g in (g1, g2):
        _, state = optimizer.update(g, state, PARAMS["w"])
    np.testing.assert_allclose(state.momenta[1], (1 - beta[1]) * (beta[1] * g1 + g2), rtol=1e-9)
    rows = np.stack([(1 - b) * (b * (g1**2).mean(1) + (g2**2).mean(1)) for b in (0.9, 0.99, 0.999)])
    np.testing.assert_allclose(state.factored["row"][..., 0], rows, rtol=1e-6)
    assert state.factored["column"].shape == (3, 1, 4) and state.count == 2


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
    exact = one_update(*[jax.tree.map(lambda p: p.astype(jnp.float64), params)] * 2)
    decayed = jax.tree.map(lambda u, p: u - 0.1 * p.astype(jnp.float64), exact, params)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u.astype(jnp.float64), updates), decayed, atol=1e-2)


def test_files_come_back_to_the_bit(tmp_path):
    weights = transforms.init_learned(KEY, hidden=(8,))
    transforms.save_learned(tmp_path / "weights.npz", weights)
    again = transforms.load_learned(tmp_path / "weights.npz")
    chex.assert_trees_all_equal(again, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, weights)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]


def written(path, header=None, **changes):
    """A file of fresh weights, with some entries changed (None: left out)."""
    transforms.save_learned(path, transforms.init_learned(KEY))
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if header is not None:
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays.update(changes)
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "weights.npz"
    load = functools.partial(transforms.load_learned, path)
    written(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="no learned optimizer that `save_learned` wrote"):
        load()
    written(path, {"format": "metaopt.learned", "version": 2})
    with pytest.raises(ValueError, match=r"version 2; this metaopt reads 'metaopt.learned' up to version 1"):
        load()
    written(path, {"format": "metaopt.predictor", "version": 1})
    with pytest.raises(ValueError, match="of format 'metaopt.predictor'"):
        load()
    for changes, match in {
        "layers/1/w": (np.zeros((5, 4)), r"holds no weights.*\['layers'\]\['1'\]\['w'\] should be .*\(4, 4\)"),
        "layers/2/b": (None, "holds no weights of a learned optimizer"),
        "layers/0/w": (None, "holds no weights of a learned optimizer"),
        "decays/second": (np.zeros(1, int), r"\['decays'\]\['second'\] should be floating-point"),
        "more": (np.zeros(1), "holds no weights of a learned optimizer"),
    }.items():
        written(path, **{changes: match[0]})
        with pytest.raises(ValueError, match=match[1]):
            load()
    with pytest.raises(FileNotFoundError):
        transforms.load_learned(tmp_path / "absent.npz")


def test_arguments_are_checked():
    for hidden in ((), (4, 0)):
        with pytest.raises(ValueError, match="`hidden` must be"):
            transforms.init_learned(KEY, hidden=hidden)
    with pytest.raises(ValueError, match=r"got 'large'"):
        transforms.learned("large")
    with pytest.raises(ValueError, match="`weights` must be meta-parameters"):
        transforms.learned({"w": jnp.zeros(2)})
    optimizer = transforms.learned(WEIGHTS)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    with pytest.raises(ValueError, match="`weights` must be"):
        transforms.save_learned("never.npz", {})


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

"""Flax and equinox modules at the door, against the same network written as a pure function."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metaopt import base, hypergrad, inner

KEY = jax.random.key(0)
D, H = 3, 4
DATA = {
    "x": jnp.asarray(np.random.default_rng(0).normal(size=(8, D)) + 1.0, jnp.float32),
    "y": jnp.asarray(np.random.default_rng(1).normal(size=(8, 1)), jnp.float32),
}
DROP = 0.5


class NnxNet(nnx.Module):
    def __init__(self, *, rngs, rate=DROP):
        self.first = nnx.Linear(D, H, rngs=rngs)
        self.norm = nnx.BatchNorm(H, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(H, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


class LinenNet(linen.Module):
    rate: float = DROP

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(H)(x)
        x = jnp.tanh(linen.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        return linen.Dense(1)(linen.Dropout(self.rate, deterministic=not train)(x))


def nnx_model(rate=DROP):
    return inner.from_nnx(lambda rngs: NnxNet(rngs=rngs, rate=rate))


def linen_model(rate=DROP):
    return inner.from_linen(LinenNet(rate), lambda data: data["x"])


MODELS = {"nnx": nnx_model, "linen": linen_model}


def parts(name, params, stats):
    """What the pure network needs, from either form."""
    if name == "nnx":
        first, norm, last, stats = params["first"], params["norm"], params["last"], stats["norm"]
    else:
        first, norm, last = params["Dense_0"], params["BatchNorm_0"], params["Dense_1"]
        stats = stats["batch_stats"]["BatchNorm_0"]
    return first, norm, last, stats


def pure(name, params, state, x, train):
    """The network without dropout, by hand; and the new statistics."""
    first, norm, last, stats = parts(name, params, state)
    h = x @ first["kernel"] + first["bias"][None]
    mean, var = stats["mean"], stats["var"]
    if train:
        mean, var = h.mean(0), h.var(0)
        stats = {"mean": 0.8 * stats["mean"] + 0.2 * mean, "var": 0.8 * stats["var"] + 0.2 * var}
    h = (h - mean[None]) / jnp.sqrt(var + 1e-5)[None] * norm["scale"][None] + norm["bias"][None]
    return jnp.tanh(h) @ last["kernel"] + last["bias"][None], stats


def make_loop(model):
    def loss(params, hyperparams, batch, context):
        predicted, state = model.apply(params, context, batch["x"], train=True)
        return ((predicted - batch["y"]) ** 2).mean(), state

    return inner.loop(loss, lambda hp: optax.sgd(hp["rate"], momentum=0.5), init=model.init, with_context=True)


LAM = {"rate": jnp.float32(0.03)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.once
def test_equals_the_pure_network(name):
    model = MODELS[name](rate=0.0)
    params, state = model.init(KEY, None, DATA)
    state = jax.tree.map(lambda x: x + 0.3 if x.dtype in (jnp.float32, jnp.float64) else x, state)
    context = base.Context(KEY, jnp.int32(0), state)
    for train in (False, True):
        output, after = model.apply(params, context, DATA["x"], train=train)
        expected, stats = pure(name, params, state, DATA["x"], train)
        chex.assert_trees_all_close(output, expected, rtol=1e-5, atol=1e-6)
        found = parts(name, params, after)[3]
        for key in ("mean", "var"):
            np.testing.assert_allclose(found[key], stats[key], rtol=1e-5, atol=1e-6)
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_new_at_every_step_and_off_in_evaluation(name):
    model = MODELS[name]()
    params, state = model.init(KEY, None, DATA)
    keys = jax.random.split(KEY, 2)

    def outputs(train):
        return [
            model.apply(params, base.Context(key, jnp.int32(0), state), DATA["x"], train=train)[0]
            for key in (keys[0], keys[1], keys[0])
        ]

    first, second, again = outputs(train=True)
    assert np.abs(first - second).max() > 1e-3
    chex.assert_trees_all_equal(first, again)
    first, second, _ = outputs(train=False)
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.once
def test_trains_within_scan_vmap_and_grad(name):
    model = MODELS[name]()
    loop = make_loop(model)
    start = loop.init(KEY, LAM, DATA)
    solve = hypergrad.unroll(loop, num_steps=3)

    def outer(lam, key):
        state = solve(key, lam, DATA)
        # `nnx.BatchNorm` stops the gradient of its running statistics: there the batch's are taken.
        predicted, after = model.apply(loop.params(state), loop.context(state), DATA["x"], train=name == "nnx")
        assert jax.tree.structure(after) == jax.tree.structure(state.model_state)
        return ((predicted - DATA["y"]) ** 2).mean(), state

    (value, state), grads = jax.jit(jax.value_and_grad(outer, has_aux=True))(LAM, KEY)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, start.params, state.params)
    assert sum(jax.tree.leaves(moved)) >= len(jax.tree.leaves(moved)) - 1  # the bias before the norm has no gradient
    before, after = (parts(name, s.params, s.model_state)[3] for s in (start, state))
    assert np.abs(before["mean"] - after["mean"]).max() > 1e-2
    eps = 1e-3  # Flax keeps its numbers in float32
    shifted = jax.jit(jax.vmap(lambda rate: outer({"rate": rate}, KEY)[0]))(LAM["rate"] + jnp.array([eps, -eps, 0.0]))
    np.testing.assert_allclose(shifted[2], value, rtol=1e-4)
    assert abs(grads["rate"]) > 1e-2
    np.testing.assert_allclose(grads["rate"], (shifted[0] - shifted[1]) / (2 * eps), rtol=3e-3)


@pytest.mark.parametrize("name", MODELS)
def test_init_is_random_and_batches(name):
    model = MODELS[name]()
    keys = jax.random.split(KEY, 2)
    params, _ = jax.jit(jax.vmap(lambda key: model.init(key, None, DATA)))(keys)
    kernel = parts(name, params, {"norm": None, "batch_stats": {"BatchNorm_0": None}})[0]["kernel"]
    assert kernel.shape == (2, D, H) and np.abs(kernel[0] - kernel[1]).max() > 1e-2
    one, _ = model.init(keys[0], None, DATA)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], params), one, rtol=1e-5, atol=1e-6)


def test_linen_modules_with_other_arguments():
    class Deterministic(linen.Module):
        @linen.compact
        def __call__(self, x, deterministic):
            return linen.Dropout(0.5)(linen.Dense(2)(x), deterministic=deterministic)

    model = inner.from_linen(Deterministic(), jnp.ones((1, D)), train_argument="deterministic")
    params, state = model.init(KEY, None, None)
    assert state == {}
    context = base.Context(KEY, jnp.int32(0), state)
    on, after = model.apply(params, context, jnp.ones((4, D)), train=True)
    off, _ = model.apply(params, context, jnp.ones((4, D)))
    assert after == {} and (on == 0).any() and not (off == 0).any()

    model = inner.from_linen(linen.Dense(2), (jnp.ones((1, D)),), train_argument=None)
    params, state = model.init(KEY, None, None)
    output, after = model.apply(params, base.Context(KEY, jnp.int32(0)), jnp.ones((4, D)), train=True)
    assert output.shape == (4, 2) and after == {}


def test_a_linen_module_without_the_train_argument():
    model = inner.from_linen(linen.Dense(2), jnp.ones((1, D)))
    message = r"takes no argument `train`: .*Give `train_argument` of `from_linen` .*, or None"
    with pytest.raises(ValueError, match=message):
        model.init(KEY, None, None)


@pytest.mark.once
def test_an_equinox_module_without_ceremony():
    eqx = pytest.importorskip("equinox")
    _, static = eqx.partition(eqx.nn.MLP(D, 1, 4, 1, key=KEY), eqx.is_array)

    def init(key, hyperparams, data):
        return eqx.partition(eqx.nn.MLP(D, 1, 4, 1, key=key), eqx.is_array)[0]

    def loss(params, hyperparams, batch):
        model = eqx.combine(params, static)
        return ((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2).mean()

    loop = inner.loop(loss, lambda hp: optax.adam(hp["rate"]), init=init, sampler=inner.minibatch(4))

    def outer(lam):
        return loss(loop.params(hypergrad.unroll(loop, num_steps=4)(KEY, lam, DATA)), lam, DATA)

    value, grads = jax.jit(jax.value_and_grad(outer))(LAM)
    assert value < loss(loop.params(loop.init(KEY, LAM, DATA)), LAM, DATA)
    assert np.isfinite(grads["rate"]) and grads["rate"] != 0

"""Flax and equinox modules, against the same network written as a pure function."""

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


class LinenNetOfTwoSwitches(linen.Module):
    @linen.compact
    def __call__(self, x, use_running_average, deterministic):
        x = linen.Dense(H)(x)
        x = jnp.tanh(linen.BatchNorm(use_running_average=use_running_average, momentum=0.8)(x))
        return linen.Dense(1)(linen.Dropout(DROP, deterministic=deterministic)(x))


def nnx_model(rate=DROP):
    return inner.from_nnx(lambda rngs: NnxNet(rngs=rngs, rate=rate))


def linen_model(rate=DROP):
    return inner.from_linen(LinenNet(rate), lambda data: data["x"])


MODELS = {"nnx": nnx_model, "linen": linen_model}
SWITCHES = ("use_running_average", "deterministic")
TWO_SWITCHES = {
    "nnx": nnx_model,
    "linen": lambda: inner.from_linen(LinenNetOfTwoSwitches(), lambda data: data["x"], train_argument=SWITCHES),
}


def parts(name, params, stats):
    """The layers' parameters and statistics, in the form that the pure network takes."""
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
def test_a_module_equals_the_pure_network(name):
    model = MODELS[name](rate=0.0)
    params, state = model.init(KEY, None, DATA)
    state = jax.tree.map(lambda x: x + 0.3 if x.dtype in (jnp.float32, jnp.float64) else x, state)
    context = base.Context(KEY, jnp.int32(0), state)
    for train in (False, True):
        output, after = model.apply(params, context, DATA["x"], train=train)
        expected, stats = pure(name, params, state, DATA["x"], train)
        chex.assert_trees_all_close(output, expected, rtol=1e-5, atol=1e-6)
        updated = parts(name, params, after)[3]
        for key in ("mean", "var"):
            np.testing.assert_allclose(updated[key], stats[key], rtol=1e-5, atol=1e-6)
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

    first, second, repeated = outputs(train=True)
    assert np.abs(first - second).max() > 1e-3
    chex.assert_trees_all_equal(first, repeated)
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
        predicted, after = model.apply(loop.params(state), loop.context(state), DATA["x"])
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


# ---- Hypergradients through running statistics -----------------------------------------------------------------------

GAIN, STEPS, RATE = 0.7, 6, 0.1


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


DATA64 = in_float64(DATA)


def exact_hypergradient(model, start):
    """dF/d(gain) by `hypergrad.unroll`: the inner loss sees the inputs times the gain, the outer loss evaluates."""

    def loss(params, gain, batch, context):
        predicted, state = model.apply(
            params, context, batch["x"] * gain, train=True, use_running_average=False, deterministic=True
        )
        return ((predicted - batch["y"]) ** 2).mean(), state

    loop = inner.loop(loss, lambda gain: optax.sgd(RATE), init=lambda key, gain, data: start, with_context=True)
    solve = hypergrad.unroll(loop, num_steps=STEPS)

    def outer(gain):
        state = solve(KEY, gain, DATA64)
        predicted, _ = model.apply(loop.params(state), loop.context(state), DATA64["x"])
        return ((predicted - DATA64["y"]) ** 2).mean()

    return jax.jit(jax.grad(outer))(jnp.float64(GAIN))


def central_difference(forward, start):
    """dF/d(gain) from a Python loop; `forward` is `(params, state, x, train) -> (outputs, state)`."""

    def loss(params, state, x, train):
        predicted, state = forward(params, state, x, train)
        return ((predicted - DATA64["y"]) ** 2).mean(), state

    gradient = jax.jit(jax.grad(lambda params, state, x: loss(params, state, x, True), has_aux=True))

    def outer(gain):
        params, state = start
        for _ in range(STEPS):
            grads, state = gradient(params, state, DATA64["x"] * gain)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return loss(params, state, DATA64["x"], False)[0]

    eps = 1e-5
    return (outer(GAIN + eps) - outer(GAIN - eps)) / (2 * eps)


@pytest.mark.parametrize("name", TWO_SWITCHES)
@pytest.mark.once
def test_the_hypergradient_through_running_statistics_is_that_of_finite_differences(name):
    model = TWO_SWITCHES[name]()
    start = in_float64(model.init(KEY, None, DATA))

    def forward(params, state, x, train):
        predicted, stats = pure(name, params, state, x, train)
        return predicted, {"norm": stats} if name == "nnx" else {"batch_stats": {"BatchNorm_0": stats}}

    expected = central_difference(forward, start)
    assert abs(expected) > 1e-2
    np.testing.assert_allclose(exact_hypergradient(model, start), expected, rtol=1e-6)


class Transformed(nnx.Module):
    """BatchNorm within `nnx.scan` and `nnx.remat`, and one layer that is called twice in a step."""

    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return nnx.BatchNorm(D, momentum=0.7, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(KEY, 2))
        self.shared = nnx.BatchNorm(D, momentum=0.6, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def stacked(layer, x):
            return jnp.sin(layer(x))

        x = self.shared(jnp.tanh(self.shared(x)))
        return self.last(stacked(self.layers, x))


def test_running_statistics_within_transforms_of_flax():
    model = inner.from_nnx(Transformed)
    start = in_float64(model.init(KEY, None, DATA))
    forward = lambda params, state, x, train: model.apply(
        params, base.Context(KEY, jnp.int32(0), state), x, train=train
    )
    expected = central_difference(forward, start)
    assert abs(expected) > 1e-2
    np.testing.assert_allclose(exact_hypergradient(model, start), expected, rtol=1e-6)


def stopped_mean(mean, x):
    return jax.lax.stop_gradient(0.9 * mean + 0.1 * x.mean(0))


class NnxCentered(nnx.Module):
    """A layer of a user's own, with a running mean; `update` has the stop."""

    def __init__(self, rngs, update=stopped_mean):
        self.first = nnx.Linear(D, H, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(H))
        self.use_running_average = False
        self.update = update

    def __call__(self, x):
        x = self.first(x)
        if self.use_running_average:
            return x - self.mean[...][None]
        self.mean[...] = self.update(self.mean[...], x)
        return x - x.mean(0)[None]


class LinenCentered(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(H)(x)
        mean = self.variable("averages", "mean", jnp.zeros, (H,))
        if not train:
            return x - mean.value[None]
        mean.value = stopped_mean(mean.value, x)
        return x - x.mean(0)[None]


class OwnCall(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(x)


class LinenSpectral(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.SpectralNorm(linen.Dense(H))(x, update_stats=train)


def in_a_loop(mean, x):
    """The stop is within a scan, a checkpoint and a branch."""

    def body(mean, row):
        update = jax.checkpoint(lambda mean: jax.lax.stop_gradient(0.9 * mean + 0.1 * row))
        return jax.lax.cond(row[0] > 0, update, lambda mean: jax.lax.stop_gradient(mean + row), mean), None

    return jax.lax.scan(body, mean, x)[0]


def in_a_call(mean, x):
    return 0.9 * mean + jax.jit(lambda x: 0.1 * jax.lax.stop_gradient(x.mean(0)))(x)


def straight_through(mean, x):
    rounded = x + jax.lax.stop_gradient(jnp.round(x) - x)
    return 0.9 * mean + 0.1 * jax.nn.softmax(rounded).mean(0)  # softmax subtracts a stopped maximum


def by_counts(mean, x):
    """How often each unit is the largest: a count, which has no derivative."""
    return 0.9 * mean + 0.1 * jax.nn.one_hot(x.argmax(-1), H).mean(0) + 0 * x.mean(0)


STOPPED = {
    "the same stop": (lambda **kw: inner.from_nnx(NnxCentered, **kw), r"\['mean'\].*\['first'\]\['kernel'\]"),
    "in a loop": (lambda **kw: inner.from_nnx(lambda rngs: NnxCentered(rngs, in_a_loop), **kw), r"\['mean'\]"),
    "of the input alone": (lambda **kw: inner.from_nnx(lambda rngs: NnxCentered(rngs, in_a_call), **kw), "inputs"),
    "a subclass of BatchNorm": (lambda **kw: inner.from_nnx(lambda rngs: OwnCall(D, rngs=rngs), **kw), r"\['var'\]"),
    "SpectralNorm of nnx": (
        lambda **kw: inner.from_nnx(lambda rngs: nnx.SpectralNorm(nnx.Linear(D, H, rngs=rngs), rngs=rngs), **kw),
        "batch_stats.*kernel",
    ),
    "a collection of linen": (lambda **kw: inner.from_linen(LinenCentered(), DATA["x"], **kw), "averages.*kernel"),
    "SpectralNorm of linen": (lambda **kw: inner.from_linen(LinenSpectral(), DATA["x"], **kw), "batch_stats.*kernel"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_state_is_rejected_when_traced(name):
    make, message = STOPPED[name]
    model = make()
    params, state = model.init(KEY, None, DATA)
    context = base.Context(KEY, jnp.int32(0), state)
    call = lambda model, params, train: model.apply(params, context, DATA["x"], train=train)
    with pytest.raises(ValueError, match=f"`stop_gradient` to its new model state .*{message}"):
        jax.eval_shape(lambda params: call(model, params, True), params)
    jax.eval_shape(lambda params: call(model, params, False), params)  # evaluation stores nothing
    jax.eval_shape(lambda params: call(make(allow_stopped_state=True), params, True), params)


@pytest.mark.parametrize("update", [straight_through, by_counts])
def test_stops_that_hide_no_path_are_accepted(update):
    model = inner.from_nnx(lambda rngs: NnxCentered(rngs, update))
    params, state = model.init(KEY, None, DATA)
    _, after = model.apply(params, base.Context(KEY, jnp.int32(0), state), DATA["x"], train=True)
    x = DATA["x"] @ params["first"]["kernel"] + params["first"]["bias"][None]
    np.testing.assert_allclose(after["mean"], update(state["mean"], x), rtol=1e-5)


# ---- Switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_SWITCHES)
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_batch_statistics_and_dropout_are_switched_apart(name, use_running_average, deterministic):
    model = TWO_SWITCHES[name]()
    params, state = model.init(KEY, None, DATA)
    context = base.Context(KEY, jnp.int32(0), state)
    expected, expected_stats = pure(name, params, state, DATA["x"], train=not use_running_average)
    for train in (False, True):
        switches = {"use_running_average": use_running_average, "deterministic": deterministic}
        # What `train` says by itself need not be said again.
        switches = {name: switch for name, switch in switches.items() if switch == train}
        output, after = model.apply(params, context, DATA["x"], train=train, **switches)
        stats = parts(name, params, after)[3]
        for key in ("mean", "var"):
            np.testing.assert_allclose(stats[key], expected_stats[key], rtol=1e-5, atol=1e-6)
        assert bool(np.abs(output - expected).max() < 1e-4) == deterministic


class NnxKeyword(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(DROP, deterministic=None, rngs=rngs)

    def __call__(self, x, *, deterministic):
        return self.dropout(x, deterministic=deterministic)


def test_an_nnx_module_with_a_keyword_gets_the_switch():
    model = inner.from_nnx(NnxKeyword)
    context = base.Context(KEY, jnp.int32(0), model.init(KEY, None, None)[1])
    assert (model.apply({}, context, jnp.ones((4, D)), train=True)[0] == 0).any()
    assert not (model.apply({}, context, jnp.ones((4, D)), train=True, deterministic=True)[0] == 0).any()


@pytest.mark.once
def test_an_equinox_module_needs_no_adapter():
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


class DrawsNumbers(nnx.Module):
    def __init__(self, rngs):
        self.rngs, self.own = rngs, nnx.Rngs(noise=1)

    def __call__(self, x):
        return [float(jax.random.uniform(key)) for key in (self.rngs(), self.rngs.noise(), self.own.noise())]


def test_random_streams_of_a_module_have_new_keys_in_each_step():
    model = inner.from_nnx(DrawsNumbers)
    params, state = model.init(KEY, None, DATA)
    contexts = [base.Context(jax.random.key(step), jnp.int32(step), state) for step in range(3)]
    calls = [model.apply(params, context, DATA["x"], train=True) for context in contexts]
    received = [number for (*numbers, _), _ in calls for number in numbers]
    assert len(set(received)) == 6  # from the key of the context, with one and the same state
    own = {numbers[-1] for numbers, _ in calls}
    (*_, next_of_own), _ = model.apply(params, contexts[0]._replace(model_state=calls[0][1]), DATA["x"], train=True)
    assert len(own) == 1 and next_of_own not in own  # the module made this stream: it continues with the state


def test_a_trained_model_goes_back_to_its_module():
    loop = make_loop(nnx_model())
    state = jax.jit(inner.run(loop, num_steps=3))(KEY, LAM, DATA)
    expected, after = nnx_model().apply(loop.params(state), loop.context(state), DATA["x"])
    chex.assert_trees_all_equal(after, loop.context(state).model_state)
    net = NnxNet(rngs=nnx.Rngs(1))
    nnx.update(net, loop.params(state))
    net.eval()
    assert not np.allclose(net(DATA["x"]), expected, atol=1e-3)  # the starting values of the running statistics
    nnx.update(net, loop.context(state).model_state)
    np.testing.assert_allclose(net(DATA["x"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_training_without_the_switch_to_training_is_warned_of(train, caplog):
    model = nnx_model()

    def loss(params, hp, batch, context):
        outputs, model_state = model.apply(params, context, batch["x"], train=train)
        return ((outputs - batch["y"]) ** 2).mean(), model_state

    loop = inner.loop(loss, lambda hp: optax.sgd(0.1), init=model.init, with_context=True)
    inner.run(loop, num_steps=2)(KEY, LAM, DATA)
    assert ["`train=True`" in message for message in caplog.messages] == [True] * (not train)


def test_a_rate_of_dropout_from_the_hyperparameters_is_explained():
    model = inner.from_nnx(lambda rngs: nnx.Linear(D, 1, rngs=rngs))

    def loss(params, hp, batch, context):
        x = nnx.Dropout(hp["rate"], rngs=nnx.Rngs(context.key))(batch["x"])
        outputs, model_state = model.apply(params, context, x, train=True)
        return (outputs**2).mean(), model_state

    loop = inner.loop(loss, lambda hp: optax.sgd(0.1), init=model.init, with_context=True)
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        jax.jit(inner.run(loop, num_steps=2))(KEY, {"rate": 0.1}, DATA)
    assert any("flax's dropout compares its rate with 0" in note for note in raised.value.__notes__)

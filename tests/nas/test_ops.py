"""Every op on every shape that it takes, and its arithmetic against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, nas

KEY = jax.random.key(0)
SETS = {
    "DARTS": nas.DARTS_OPS,
    "201": nas.NAS_BENCH_201_OPS,
    "101": nas.NAS_BENCH_101_OPS,
    "TransNAS": nas.TRANS_NAS_BENCH_101_OPS,
    "Macro": nas.NAS_BENCH_MACRO_OPS,
}
NEED_SPACE = {"stem", "residual", "attention", "stem_relu", "MB3_K3", "MB6_K5"}
KEEPS = {"norm_relu"}  # the shape: only between layers
ONE_AXIS = {"tokens", "transformer"}  # of positions, which they keep
OPS = sorted(
    {
        (name, set_name)
        for set_name, ops in SETS.items()
        for name in ops
        if set_name == "DARTS" or name not in nas.BLOCKS
    }
)


def apply(op, x, channels, stride):
    return op.apply(op.init(KEY, x.shape[1:], channels, stride), x, channels, stride)


@pytest.mark.parametrize(("name", "set_name"), OPS)
@pytest.mark.once
def test_shapes(name, set_name):
    op = SETS[set_name][name]
    # One channel, not square, odd; a sequence; a volume; rows of a table.
    for shape, channels, stride in itertools.product([(7, 4, 1), (9, 3), (4, 5, 3, 2), (6,)], (1, 3, 4), (1, 2)):
        if name in KEEPS and (channels != shape[-1] or stride > 1):
            continue
        if name in ONE_AXIS and (len(shape) != 2 or stride > 1):
            continue
        x = jax.ShapeDtypeStruct((2, *shape), jnp.float64)
        call = lambda x, channels=channels, stride=stride: apply(op, x, channels, stride)
        if len(shape) == 1 and (name in NEED_SPACE or "pool" in name or "3x3" in name or "5x5" in name):
            with pytest.raises(ValueError, match="spatial axes; got the shape"):
                jax.eval_shape(call, x)
            continue
        y = jax.eval_shape(call, x)
        assert y.shape == (2, *(-(-n // stride) for n in shape[:-1]), channels), (shape, channels, stride)


@pytest.mark.once
def test_your_own_op_on_sequences_one_channel_and_rectangular_images():
    def init(key, in_shape, channels, stride):
        return {"w": nas.uniform(key, (in_shape[-1], channels), in_shape[-1])}

    def gated(params, x, channels, stride):
        return jnp.tanh(nas.subsample(x, stride) @ params["w"])

    ops = {**nas.BLOCKS, "gated": nas.Op(init, gated)}
    cell = nas.complete_cell(2, ("skip_connect", "gated"))
    for shape in [(9, 2), (6, 1), (7, 4, 1), (5,)]:
        net = nas.Network({"cell": cell}, (nas.Layer("linear", 2), nas.Layer("cell", 4, 2)), 3)
        supernet = nas.supernet(net, shape, ops=ops)
        y = jax.eval_shape(lambda key, x, s=supernet: s.apply(s.init(key), None, x), KEY, jnp.zeros((2, *shape)))
        assert y.shape == (2, 3)
        if shape != (7, 4, 1):
            continue
        # A search on images of one channel that are not square.
        search = nas.darts(net, shape, ops=ops, order="first")
        rows = {"x": jax.random.normal(KEY, (4, *shape)), "y": jnp.array([0, 1, 2, 0])}
        task, alpha = base.Task(rows, rows), search.hyperparams(KEY)

        @jax.jit
        def estimate_and_slope(alpha, search=search, task=task):
            estimate, state = search.estimator.estimate(alpha, task, search.estimator.init(KEY, alpha, task))
            loop, g = search.problem.loop, estimate.hypergrad
            shifted_loss = lambda step: search.problem.outer_loss(
                loop.params(state.inner), optax.tree.add_scale(alpha, step, g), task.valid, loop.context(state.inner)
            )
            return g["cell"], (shifted_loss(1e-4) - shifted_loss(-1e-4)) / 2e-4

        g, slope = estimate_and_slope(alpha)
        assert g.shape == (3, 2) and (np.abs(g).sum(1) > 1e-6).all()
        np.testing.assert_allclose(slope, (g**2).sum(), rtol=1e-5)


def windows(x, size, stride, dilation):
    """For every position of the output, the rows and columns of x that the window sees, None for padding."""
    reach = dilation * (size // 2)
    for i, j in itertools.product(range(0, x.shape[1], stride), range(0, x.shape[2], stride)):
        places = [[(i - reach + dilation * a, j - reach + dilation * b) for b in range(size)] for a in range(size)]
        yield i // stride, j // stride, places


def inside(x, place):
    return 0 <= place[0] < x.shape[1] and 0 <= place[1] < x.shape[2]


X = np.random.default_rng(0).normal(size=(2, 5, 6, 2))


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_convolutions_are_sums_over_a_centered_window(stride, dilation, groups):
    w = np.random.default_rng(1).normal(size=(3, 3, 2 // groups, 4))
    expected = np.zeros((2, -(-5 // stride), -(-6 // stride), 4))
    for i, j, places in windows(X, 3, stride, dilation):
        for a, b in itertools.product(range(3), range(3)):
            if inside(X, places[a][b]):
                x = X[:, places[a][b][0], places[a][b][1]]
                for d in range(4):
                    channels = slice(None) if groups == 1 else slice(d // 2, d // 2 + 1)
                    expected[:, i, j, d] += x[:, channels] @ w[a, b, :, d]
    y = nas.convolve(jnp.asarray(X), jnp.asarray(w), stride=stride, dilation=dilation, groups=groups)
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.once
@pytest.mark.parametrize(("stride", "channels"), [(1, 2), (1, 3), (2, 2)])
def test_blocks_of_nas_bench_macro_by_hand(stride, channels):
    def normal(x):
        return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)

    for name, size, expansion in (("MB3_K3", 3, 3), ("MB6_K5", 5, 6)):
        op = nas.NAS_BENCH_MACRO_OPS[name]
        p = jax.tree.map(np.asarray, op.init(KEY, X.shape[1:], channels, stride))
        assert {n: w.shape for n, w in p.items()} == {
            "in": (2, 2 * expansion),
            "depthwise": (size, size, 1, 2 * expansion),
            "out": (2 * expansion, channels),
        }
        wide = np.maximum(normal(X @ p["in"]), 0)
        deep = np.zeros((2, -(-5 // stride), -(-6 // stride), 2 * expansion))
        for i, j, places in windows(X, size, stride, 1):
            for a, b in itertools.product(range(size), repeat=2):
                if inside(X, places[a][b]):
                    deep[:, i, j] += wide[:, *places[a][b]] * p["depthwise"][a, b, 0]
        expected = normal(np.maximum(normal(deep), 0) @ p["out"]) + (X if (stride, channels) == (1, 2) else 0)
        np.testing.assert_allclose(
            jax.jit(op.apply, static_argnums=(2, 3))(p, X, channels, stride), expected, atol=1e-9
        )
    op = nas.NAS_BENCH_MACRO_OPS["identity"]
    p = op.init(KEY, X.shape[1:], channels, stride)
    expected = normal(X[:, ::stride, ::stride] @ np.asarray(p["w"])) if p else X
    assert bool(p) == ((stride, channels) != (1, 2))
    np.testing.assert_allclose(op.apply(p, X, channels, stride), expected, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_does_not_count_padding(stride):
    average, maximum = np.zeros((2, 2, -(-5 // stride), -(-6 // stride), 2))
    for i, j, places in windows(X, 3, stride, 1):
        values = np.stack([X[:, a, b] for row in places for a, b in row if inside(X, (a, b))])
        average[:, i, j], maximum[:, i, j] = values.mean(0), values.max(0)
    x = jnp.asarray(X)
    np.testing.assert_allclose(apply(nas.NAS_BENCH_201_OPS["avg_pool_3x3"], x, 2, stride), average, atol=1e-12)
    np.testing.assert_allclose(apply(nas.NAS_BENCH_101_OPS["maxpool3x3"], x, 2, stride), maximum)
    # DARTS's are normalized.
    np.testing.assert_allclose(
        apply(nas.DARTS_OPS["avg_pool_3x3"], x, 2, stride), nas.normalized(jnp.asarray(average)), atol=1e-10
    )


def test_normalized():
    y = np.asarray(nas.normalized(jnp.asarray(X)))
    np.testing.assert_allclose(y, (X - X.mean((0, 1, 2))) / np.sqrt(X.var((0, 1, 2)) + 1e-5), atol=1e-12)
    assert (nas.normalized(jnp.zeros((2, 3))) == 0).all()


def test_skipping_with_a_stride_sees_every_second_position_in_two_halves():
    op = nas.DARTS_OPS["skip_connect"]
    params = op.init(KEY, (5, 6, 2), 3, 2)
    assert params["even"].shape == (2, 1) and params["odd"].shape == (2, 2)
    x = np.maximum(X, 0)
    odd = np.zeros((2, 3, 3, 2))
    odd[:, :2] = x[:, 1::2, 1::2]  # the last row is beyond the end
    halves = np.concatenate([x[:, ::2, ::2] @ params["even"], odd @ params["odd"]], -1)
    np.testing.assert_allclose(op.apply(params, jnp.asarray(X), 3, 2), nas.normalized(jnp.asarray(halves)), atol=1e-10)
    assert op.init(KEY, (5, 6, 2), 2, 1) == () and (op.apply((), jnp.asarray(X), 2, 1) == X).all()


@pytest.mark.once
def test_attention_is_a_mean_of_values():
    op, x = nas.BLOCKS["attention"], jnp.asarray(X[:, :, 0])  # [2, 5, 2]
    params = op.init(KEY, (5, 2), 3, 1)
    weights = np.exp((x @ params["q"]) @ (x @ params["k"]).transpose(0, 2, 1) / np.sqrt(3))
    weights /= weights.sum(-1, keepdims=True)
    expected = weights @ (x @ params["v"]) @ params["out"]
    np.testing.assert_allclose(op.apply(params, x, 3, 1), expected, atol=1e-12)
    np.testing.assert_allclose(op.apply(params, x, 3, 2), expected[:, ::2], atol=1e-12)


def test_initial_weights_are_uniform_and_unrelated():
    draws = np.stack([nas.uniform(jax.random.key(k), (200, 200), 4, number=n).ravel() for k in (0, 1) for n in (0, 1)])
    assert (abs(draws) <= 0.5).all()
    shares = np.stack([np.histogram(d, 20, (-0.5, 0.5))[0] for d in draws]) / draws.shape[1]
    assert (abs(shares - 0.05) < 4 * np.sqrt(0.05 * 0.95 / draws.shape[1])).all()
    related = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, 1), np.roll(draws, 200, 1)]))
    assert (abs(related - np.eye(12)) < 4.5 / np.sqrt(draws.shape[1])).all()

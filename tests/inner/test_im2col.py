"""Convolutions as matrix products: the same values and derivatives as XLA's own, in every form that they take."""

import itertools
import logging

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, inner

KEY = jax.random.key(0)

# Name: (x's shape, w's shape, parameters of `conv_general_dilated`).
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CONVOLUTIONS = {
    "same": ((2, 5, 6, 3), (3, 3, 3, 4), {"padding": "SAME", **NHWC}),
    "strides": ((2, 7, 6, 3), (3, 2, 3, 4), {"window_strides": (2, 3), "padding": "VALID", **NHWC}),
    "dilation, uneven and negative padding, batch last": (
        (8, 7, 2, 2),
        (3, 2, 2, 4),
        {
            "window_strides": (2, 1),
            "rhs_dilation": (2, 3),
            "padding": ((3, -1), (-1, 2)),
            "dimension_numbers": ("HWCN", "HWIO", "CHWN"),
        },
    ),
    "transposed": ((2, 4, 4, 2), (3, 3, 2, 4), {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 1)), **NHWC}),
    "one position": ((2, 5, 5, 3), (1, 1, 3, 4), {"window_strides": (2, 2), **NHWC}),
    "groups": ((2, 5, 5, 6), (3, 3, 3, 4), {"feature_group_count": 2, "padding": "SAME", **NHWC}),
    "depthwise": ((2, 5, 5, 3), (3, 3, 1, 6), {"feature_group_count": 3, "padding": "SAME", **NHWC}),
    "depthwise strides": (
        (2, 7, 8, 3),
        (3, 2, 1, 3),
        {
            "feature_group_count": 3,
            "window_strides": (2, 3),
            "rhs_dilation": (1, 2),
            "padding": ((2, 1), (1, -1)),
            **NHWC,
        },
    ),
    "depthwise transposed": (
        (2, 3, 4, 5),
        (3, 1, 3, 2),
        {
            "feature_group_count": 3,
            "lhs_dilation": (2, 3),
            "window_strides": (1, 2),
            "padding": ((1, 2), (2, 0)),
            "dimension_numbers": ("NCHW", "OIHW", "NHWC"),
        },
    ),
    "other layout": ((2, 3, 5, 6), (4, 3, 3, 2), {"dimension_numbers": ("NCHW", "OIHW", "NHWC"), "padding": "SAME"}),
    "one axis": ((2, 7, 3), (3, 3, 4), {"dimension_numbers": ("NWC", "WIO", "NWC"), "padding": "SAME"}),
    "three axes": ((1, 3, 4, 5, 2), (2, 2, 2, 2, 3), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
}


def convolution(name):
    x_shape, w_shape, options = CONVOLUTIONS[name]
    options = {"padding": "VALID", "window_strides": (1,) * (len(x_shape) - 2), **options}
    x, w = jax.random.normal(KEY, x_shape), jax.random.normal(jax.random.key(1), w_shape)
    return (lambda x, w: jax.lax.conv_general_dilated(x, w, **options)), x, w


def derivatives(fn, *args):
    """The value, the gradient, and a forward-over-reverse product, of a curved function of fn's output."""
    curved = lambda *args: jnp.sum(jnp.sin(fn(*args)))
    along = [jnp.cos(3 * x) for x in args]
    grad = jax.grad(curved, argnums=tuple(range(len(args))))
    return fn(*args), jax.jvp(grad, args, tuple(along))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.once
def test_a_convolution_and_its_derivatives(name):
    conv, x, w = convolution(name)
    rewritten = jax.jit(lambda x, w: derivatives(inner.im2col(conv), x, w)).trace(x, w)
    expected = jax.jit(lambda x, w: derivatives(conv, x, w))(x, w)
    chex.assert_trees_all_close(rewritten.lower().compile()(x, w), expected, rtol=1e-12, atol=1e-12)
    text = str(rewritten.jaxpr)
    assert ("cpu_depthwise" if name.startswith("depthwise") else "dot_general") in text
    assert "conv_general_dilated" not in text


POOLING = {
    "maximum": (jax.lax.max, -jnp.inf, (2, 2), (2, 2), "VALID"),
    "overlapping maximum": (jax.lax.max, -jnp.inf, (3, 3), (2, 1), "SAME"),
    "sum": (jax.lax.add, 0.0, (2, 3), (1, 2), "SAME"),
}


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.once
def test_pooling_and_its_derivatives(name):
    operation, start, window, strides, padding = POOLING[name]

    def pool(x):
        return jax.lax.reduce_window(x, start, operation, (1, *window, 1), (1, *strides, 1), padding)

    # Integers have ties.
    for x in (jax.random.normal(KEY, (2, 6, 5, 3)), jax.random.randint(KEY, (2, 6, 5, 3), 0, 3).astype(float)):
        chex.assert_trees_all_close(derivatives(inner.im2col(jax.jit(pool)), x), derivatives(pool, x), rtol=1e-12)
    bad = x.at[0, 1, 2, 0].set(jnp.nan)
    np.testing.assert_array_equal(inner.im2col(jax.jit(pool))(bad), pool(bad))
    assert "reduce_window" not in str(jax.make_jaxpr(inner.im2col(pool))(x))


CONV, X, W = convolution("same")


@jax.custom_vjp
def own_rule(x, w):
    return CONV(x, w)


own_rule.defvjp(lambda x, w: (CONV(x, w), (x, w)), lambda saved, g: saved)


def in_a_loop(x, w):
    body = lambda carry, scale: (carry, CONV(carry, scale * w).sum())
    x, ys = jax.lax.scan(body, x, jnp.arange(3.0))
    return x + ys.sum()


def in_a_while(x, w):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + CONV(c[1], w).mean()), (0, x))[1]


NESTED = {
    "jit": jax.jit(CONV),
    "scan": in_a_loop,
    "while": in_a_while,
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, CONV, lambda x, w: 2 * CONV(x, w), x, w),
    "checkpoint": jax.checkpoint(lambda x, w: jnp.tanh(CONV(x, w))),
}


@pytest.mark.parametrize("name", NESTED)
def test_convolutions_inside_other_things(name):
    fn = NESTED[name]
    both = lambda fn: (fn(X, W), jax.jvp(fn, (X, W), (X**2, W**2)))
    chex.assert_trees_all_close(jax.jit(lambda: both(inner.im2col(fn)))(), both(fn), rtol=1e-12, atol=1e-12)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(inner.im2col(fn))(X, W))


def test_convolutions_that_are_not_rewritten():
    assert "conv_general_dilated" in str(jax.make_jaxpr(inner.im2col(own_rule))(X, W))
    large = lambda x: jax.lax.conv(x, jnp.ones((1, 1, 129)), (1,), "SAME")
    assert "conv_general_dilated" in str(jax.make_jaxpr(inner.im2col(large))(jnp.ones((1, 1, 200))))


@pytest.mark.parametrize(("window", "rewritten"), [((8, 16), True), ((3, 43), False)])
def test_pooling_of_at_most_128_positions_is_rewritten(window, rewritten):
    pool = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1), "VALID")
    assert ("reduce_window" not in str(jax.make_jaxpr(inner.im2col(pool))(jnp.ones((8, 50))))) == rewritten


def test_numbers_in_branches_of_python_are_not_traced():
    fn = inner.im2col(lambda x, twice, name: 2 * x if twice and name == "yes" else x)
    assert float(jax.jit(lambda x: fn(x, True, "yes"))(1.5)) == 3.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_precision_is_kept(dtype):
    x, w = X.astype(dtype), W.astype(dtype)
    out = inner.im2col(CONV)(x, w)
    assert out.dtype == dtype and CONV(x, w).dtype == dtype
    np.testing.assert_allclose(out.astype(float), CONV(X, W), rtol=0, atol=30 * float(jnp.finfo(dtype).eps))


@pytest.mark.once
def test_narrow_types_are_summed_in_wide_ones():
    x, w = jax.random.normal(KEY, (2, 12, 12, 3)), jax.random.normal(jax.random.key(1), (9, 9, 1, 3))
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=3, **NHWC)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    exact = conv(x.astype(float), w.astype(float))
    error = jnp.abs(jax.jit(inner.im2col(conv))(x, w).astype(float) - exact)
    assert (error <= 2**-8 * jnp.abs(exact) + 1e-6).all()  # rounded once


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.once
def test_patches_of_over_256_mib_are_not_made(groups):
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups, **NHWC)
    x, w = normal(1, 171, 171, 128), normal(3, 3, 128 // groups, groups)
    smaller = jax.ShapeDtypeStruct((1, 171, 170, 128), float)
    assert 9 * smaller.size * 8 < 2**28 < 9 * x.size * 8  # bytes: each pixel is in nine patches
    num_products = lambda x: str(jax.make_jaxpr(inner.im2col(conv))(x, w)).count("dot_general")
    assert (num_products(smaller), num_products(x)) == (1, 9)
    curved = lambda fn: jax.value_and_grad(lambda x, w: jnp.sin(fn(x, w) / 32).sum(), argnums=(0, 1))
    fast, exact = (jax.jit(curved(fn))(x, w) for fn in (inner.im2col(conv), conv))
    chex.assert_trees_all_close(fast, exact, rtol=1e-9, atol=1e-9)


def normal(*shape):
    """Random numbers. JAX would take longer for millions of them."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its compiler keeps what is to be computed anew")
def test_patches_are_computed_again_in_the_backward_pass():
    def loss(kernels, x):
        for w in kernels:
            x = jnp.sin(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **NHWC))
        return x.sum()

    x, kernels = jnp.ones((8, 16, 16, 8)), [jnp.ones((3, 3, 8, 8))] * 6
    program = jax.jit(jax.grad(inner.im2col(loss))).lower(kernels, x).compile()
    patches = 9 * x.size * x.dtype.itemsize
    # Two layers' patches and their pieces, not six.
    assert program.memory_analysis().temp_size_in_bytes < 4.5 * patches


def test_contexts_at_trace_time_are_kept():
    def noisy(x, w):
        with jax.threefry_partitionable(False), jax.named_scope("first_layer"):
            return CONV(x, w) + jax.random.normal(KEY, (4,))[None, None, None]

    np.testing.assert_allclose(jax.jit(inner.im2col(noisy))(X, W), jax.jit(noisy)(X, W), rtol=1e-12)
    assert "first_layer" in jax.jit(inner.im2col(noisy)).lower(X, W).as_text(debug_info=True)


def test_losses_with_shard_map_and_with_branches_on_values():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x.sum(keepdims=True), "rows"), mesh=mesh, in_specs=rows, out_specs=rows
    )

    def loss(params, hyperparams, batch):
        scale = 2.0 if params > 0 else 1.0  # as Python reads it, outside jit
        return scale * params * total(batch)[0]

    loop = inner.loop(loss, lambda hp: optax.sgd(0.1), init=lambda key, hp, data: jnp.ones([]))
    state = inner.step(loop, loop.init(KEY, None, None), None, jnp.ones(3))
    assert float(state.params) == pytest.approx(1 - 0.1 * 2 * 3)


@pytest.mark.once
def test_kernels_of_their_own_for_every_task():
    x, w = (jnp.stack([a, 2 * a, a - 1]) for a in (X, W))
    batched = jax.vmap(lambda x, w: derivatives(inner.im2col(CONV), x, w))
    one_by_one = [derivatives(CONV, *pair) for pair in zip(x, w, strict=True)]
    chex.assert_trees_all_close(jax.jit(batched)(x, w), jax.tree.map(lambda *a: jnp.stack(a), *one_by_one), rtol=1e-10)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, param_dtype=float)(x))
        return nn.Dense(3, param_dtype=float)(nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


@pytest.mark.once
def test_training_uses_im2col_on_cpu_logs_it_once_and_keeps_the_hypergradient(caplog):
    net, start = Net(), Net().init(KEY, jnp.ones((1, 8, 8, 1)))
    x, y = jax.random.normal(KEY, (6, 8, 8, 1)), jnp.arange(6) % 3
    task = base.Task({"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]})

    def loss(params, hyperparams, batch):
        logits = net.apply(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    caplog.set_level(logging.INFO, "metaopt")
    estimates = {}
    for choice in (None, False):
        loop = inner.loop(loss, lambda hp: optax.adam(hp["rate"]), init=lambda key, hp, data: start, im2col=choice)
        estimator = hypergrad.unrolled(inner.problem(loop, loss, im2col=choice), num_steps=2, remat="step")
        run = lambda hp, e=estimator: e.estimate(hp, task, e.init(KEY, hp, task))[0]
        program = jax.jit(run).trace({"rate": jnp.array(1e-2)})
        text = str(program.jaxpr)
        for name in ("conv_general_dilated", "reduce_window_max", "select_and_scatter_add"):
            assert (name in text) == (choice is False)
        estimates[choice] = program.lower().compile()({"rate": jnp.array(1e-2)})
    chex.assert_trees_all_close(estimates[None], estimates[False], rtol=1e-8)
    inner_line, outer_line = [record.getMessage() for record in caplog.records if record.name == "metaopt"]
    assert inner_line.startswith("`inner.loop` computes") and outer_line.startswith("`inner.problem` computes")
    for line in (inner_line, outer_line):
        assert "[3, 8, 8, 1] * [3, 3, 1, 4]" in line and "`im2col=False`" in line and line.count(" * ") == 2


def test_a_convolution_with_rectangular_windows_equals_a_loop():
    """Against a loop in NumPy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(2, 3, 2, 3))
    expected = np.zeros((1, 2, 3, 3))
    for i, j in itertools.product(range(2), range(3)):
        expected[0, i, j] = np.einsum("hwc,hwcd->d", x[0, 2 * i : 2 * i + 2, j : j + 3], w)
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 1), "VALID", **NHWC)
    np.testing.assert_allclose(inner.im2col(conv)(jnp.asarray(x), jnp.asarray(w)), expected, rtol=1e-12)


FAST = ["strides", "transposed", "other layout"]


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@pytest.mark.slow
def test_float32_has_the_kernel_of_xla_in_every_derivative_and_batch():
    """One program for all forms: a value, a gradient and a product of the Hessian, under vmaps of each kind."""

    def cases_of(name, wrap):
        conv, x, w = convolution(name)
        both = lambda x, w: derivatives(wrap(conv), x, w)
        xs, ws = jnp.stack([x, 2 * x, x - 1]), jnp.stack([w, w / 2, w + 1])
        return {
            "both": (jax.vmap(jax.vmap(both, (0, None)), (None, 0)), (xs, ws)),
            "tasks of tasks": (jax.vmap(jax.vmap(both)), (xs[None], ws[None])),
        }

    for name in FAST:
        cases = {k: (lambda *a, fn=fn: fn(*as_float32(a)), a) for k, (fn, a) in cases_of(name, inner.im2col).items()}
        text = str(jax.make_jaxpr(cases["both"][0])(*cases["both"][1]))
        assert "cpu_convolution" in text and "conv_general_dilated" not in text
    run = lambda wrap, cast: {n: {k: fn(*cast(a)) for k, (fn, a) in cases_of(n, wrap).items()} for n in FAST}
    fast = jax.jit(lambda: run(inner.im2col, as_float32))()
    exact = jax.jit(lambda: run(lambda fn: fn, lambda a: a))()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fast))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(exact), strict=True):
        assert a.shape == b.shape and jnp.linalg.norm(a - b) < 2e-5 * jnp.linalg.norm(b)


def test_every_convolution_is_compiled_in_the_layout_that_has_a_kernel():
    """Second order, with one kernel per task, in the body of a loop: only NHWC and HWIO, without groups."""
    conv, x, w = convolution("other layout")
    x, w = as_float32((jnp.stack([x, x]), jnp.stack([w, w])))

    def step(w, _):
        value, along = jax.vmap(lambda x, w: derivatives(inner.im2col(conv), x, w))(x, w)
        return w - along[1][1], value.sum()

    text = jax.jit(lambda w: jax.lax.scan(step, w, length=3)).lower(w).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(lines) >= 2  # equal ones may be one function
    for line in lines:
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line and "feature_group_count = 1" in line


@pytest.mark.once
def test_depthwise_convolutions_of_tasks():
    """Each task has its own images, its own kernels, or both: values in one program, and the cost."""
    conv, x, w = convolution("depthwise strides")
    xs, ws = jnp.stack([x, 2 * x, x - 1]), jnp.stack([w, w / 2, w + 1])
    both = lambda wrap: lambda x, w: derivatives(wrap(conv), x, w)

    def values(wrap):
        return {
            "both": jax.vmap(both(wrap))(xs, ws),
            "images": jax.vmap(both(wrap), (0, None))(xs, w),
            "kernels": jax.vmap(both(wrap), (None, 0))(x, ws),
            "tasks of tasks": jax.vmap(jax.vmap(both(wrap), (0, None)), (None, 0))(xs, ws),
        }

    chex.assert_trees_all_close(
        jax.jit(lambda: values(inner.im2col))(), jax.jit(lambda: values(lambda fn: fn))(), rtol=1e-10
    )
    fast = inner.im2col(conv)
    products = 2 * conv(x, w).size * 3 * 2
    assert hypergrad.flops(fast, x, w, products_only=True) == products
    assert hypergrad.flops(jax.grad(lambda x, w: fast(x, w).sum(), (0, 1)), x, w, products_only=True) == 2 * products


@pytest.mark.once
def test_derivatives_of_strided_convolutions_are_products():
    """Neither images nor windows with holes in them: every convolution that is left is a strided one, as it came."""
    x, w = jax.random.normal(KEY, (2, 3, 7, 6, 8)), jax.random.normal(jax.random.key(1), (2, 3, 2, 8, 4))
    options = {"window_strides": (2, 3), "padding": ((1, 1), (0, -1)), **NHWC}
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, **options)
    both = lambda wrap: jax.vmap(lambda x, w: derivatives(wrap(conv), x, w))
    fast = jax.jit(both(inner.im2col)).lower(*as_float32((x, w)))
    lines = [line for line in fast.as_text().splitlines() if "stablehlo.convolution" in line]
    whole = "stride = [2, 3], pad = [[1, 1], [0, -1]], lhs_dilate = [1, 1], rhs_dilate = [1, 1]"
    assert lines and all(whole in line for line in lines)
    exact = jax.jit(both(lambda fn: fn))(x, w)
    for a, b in zip(jax.tree.leaves(fast.compile()(*as_float32((x, w)))), jax.tree.leaves(exact), strict=True):
        assert a.shape == b.shape and jnp.linalg.norm(a - b) < 2e-6 * jnp.linalg.norm(b)


@pytest.mark.once
def test_columns_of_the_cotangent_of_images_of_over_256_mib_are_not_made():
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", **NHWC)
    grad = lambda fn: jax.jit(jax.grad(lambda x, w: jnp.sum(fn(x, w) ** 2)))
    has_holes = lambda x: "lhs_dilate = [2, 2]" in grad(inner.im2col(conv)).lower(x, w).as_text()
    x, w = as_float32((jnp.tile(normal(1, 32, 514, 64), (1, 16, 1, 1)), normal(4, 4, 64, 1)))
    largest = jax.ShapeDtypeStruct((1, 512, 512, 64), jnp.float32)
    num_columns = 16 * (largest.size // 4)  # for each position of the window, a fourth of the pixels
    assert 4 * num_columns == 2**28  # bytes
    assert (has_holes(largest), has_holes(x)) == (False, True)
    fast, exact = (grad(fn)(x, w) for fn in (inner.im2col(conv), conv))
    assert jnp.linalg.norm(fast - exact) < 2e-6 * jnp.linalg.norm(exact)


def test_depthwise_convolutions_of_no_task():
    x, w = jnp.zeros((0, 2, 5, 5, 3)), jnp.ones((3, 3, 1, 3))
    numbers = ("NHWC", "HWIO", "NHWC")
    each = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3
    )
    loss = lambda x, w: jax.vmap(inner.im2col(each), (0, None))(x, w).sum()
    assert jax.vmap(inner.im2col(each), (0, None))(x, w).shape == x.shape
    grads = jax.grad(loss, (0, 1))(x, w)
    assert grads[0].shape == x.shape and not np.any(grads[1])

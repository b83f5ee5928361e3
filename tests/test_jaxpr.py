"""A traced function in two halves: the expensive part that stays the same, and the rest."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import _jaxpr

RNG = np.random.default_rng(0)
A, B, X = (jnp.asarray(RNG.normal(size=size)) for size in ((3, 4), (4, 2), (5, 3)))


def halves(function, *args, moving=0):
    """With the first `moving` arguments moving."""
    return _jaxpr.split(function, args, tuple(i < moving for i in range(len(args))))


def chained(x, w):
    """A loop around a product."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w @ w.T), None), x, length=3)[0]


@jax.custom_vjp
def doubled(x, w):
    return x @ w


doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (2 * g @ kept[1].T, kept[0].T @ g))


CASES = {  # (moving, x, a) -> outputs; shapes that are kept
    "nested calls": (lambda b, x, a: jax.jit(lambda b, x: jax.nn.relu(jax.jit(jnp.dot)(x, a)) @ b)(b, x), [(5, 4)]),
    "a loop": (lambda b, x, a: chained(x, a)[:, :2] @ b[:2], [(5, 2)]),
    "a branch": (lambda b, x, a: jax.lax.cond(x[0, 0] > 0, lambda: x @ a, lambda: -(x @ a)) @ b, [(5, 4)]),
    "a checkpoint": (lambda b, x, a: jax.checkpoint(lambda x: jnp.sin(x @ a))(x) @ b, [(5, 4)]),
    "a derivative of its own": (lambda b, x, a: doubled(x, a) @ b, [(5, 4)]),
    "what is an output, too": (
        lambda b, x, a: ((x @ a) @ b, x @ a, {"c": (x @ a).sum(), "d": 3.0}),
        [(5, 4), (5, 4), ()],
    ),
    "an argument handed back": (lambda b, x, a: (x, b, (x @ a) @ b), [(5, 4)]),
    "nothing dear": (lambda b, x, a: jnp.exp(x).sum() * b + jnp.ones(4)[:, None] * a.mean(), []),
    "all of it moves": (lambda b, x, a: (x @ (a @ b)) @ jnp.ones((2, 2)), []),
    "a convolution": (
        lambda b, x, a: jax.lax.conv(x[None, None], a[None, None], (1, 1), "SAME").sum() * b,
        [()],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.once
def test_the_halves_are_the_function(name):
    function, shapes = CASES[name]
    cut = halves(function, B, X, A, moving=1)
    assert [k.shape for k in cut.kept] == shapes

    @jax.jit
    def by_halves(b, x, a):
        kept = cut.once((jnp.full_like(b, jnp.nan), x, a))  # it does not look
        assert [(k.shape, k.dtype) for k in kept] == [(k.shape, k.dtype) for k in cut.kept]
        return cut.rest((b + 1, x, a), kept)

    whole = lambda b, x, a: function(b + 1, x, a)
    chex.assert_trees_all_close(by_halves(B, X, A), whole(B, X, A), rtol=1e-12)
    total = lambda f: jax.jit(jax.grad(lambda *args: sum(jnp.sum(y**2) for y in jax.tree.leaves(f(*args))), (0, 1, 2)))
    slopes = total(whole)(B, X, A)
    composed = lambda b, x, a: cut.rest((b + 1, x, a), cut.once((b, x, a)))
    chex.assert_trees_all_close(total(composed)(B, X, A), slopes, rtol=1e-12)
    assert all(abs(leaf).max() > 0 for leaf in slopes[:2])


def test_effects_stay_where_the_function_is_called():
    shapes = []

    def function(b, x):
        jax.debug.callback(lambda z: shapes.append(z.shape), x[0])
        jax.debug.callback(lambda z: shapes.append(z.shape), x @ A)  # expensive, and needed only here
        return (x @ A[:, :2]) @ b[:2]

    cut = halves(function, B, X, moving=1)
    kept = cut.once((B, X))
    jax.effects_barrier()
    assert shapes == [] and [k.shape for k in kept] == [(5, 4), (5, 2)]
    for _ in range(2):
        cut.rest((B, X), kept)
    jax.effects_barrier()
    assert sorted(shapes) == [(3,)] * 2 + [(5, 4)] * 2
    cheap = halves(lambda b: jax.debug.callback(lambda z: shapes.append(z.shape), b[0]), B)
    assert cheap.kept == []
    cheap.rest((B,), [])
    jax.effects_barrier()
    assert shapes[-1] == (2,)


def test_keys_and_integers_are_kept_as_they_are():
    def function(b, x, key):
        best = jnp.argmax(x @ A, axis=1).astype(jnp.int32)
        key = jax.random.fold_in(key, best[0])  # from the expensive part; the branch that draws from it changes
        return jax.lax.cond(b[0, 0] > 0, lambda: jax.random.normal(key, (4,)) @ b, lambda: b[0]), best

    args = (jnp.abs(B), X, jax.random.key(0))
    cut = halves(function, *args, moving=1)
    assert [k.dtype for k in cut.kept] == [args[2].dtype, jnp.int32]
    kept = cut.once(args)
    assert [k.dtype for k in kept] == [args[2].dtype, jnp.int32]
    jax.tree.map(np.testing.assert_array_equal, cut.rest(args, kept), function(*args))
    assert abs(function(*args)[0] - args[0][0]).max() > 0.1  # drawn


# ---- Values that replaced operations return and read ----------------------------------------------------------------


@jax.jit
def marked(x):
    return x + 100.0


def of_marked(program, x, replacements=None):
    """The program with `x - value` instead of `marked(x)`. The value is `given`, or by default the mean of x."""

    def shifted(value, x):
        value = x.mean() if value is None else value
        return x - value, value

    closed = jax.make_jaxpr(program)(x)
    replace = lambda equation: shifted if equation.params.get("name") == "marked" else None
    outputs, values = _jaxpr.exchange(closed.jaxpr, closed.consts, [x], replace, replacements)
    return outputs[0], values


def nested(x):
    x = jax.jit(lambda x: 2 * marked(x))(x)
    body = lambda x, w: (jax.checkpoint(lambda x: jnp.sin(marked(w * x)) + 1.5)(x), None)
    x, _ = jax.lax.scan(body, x, jnp.array([1.0, 2.0, 3.0]))
    branch = lambda x: marked(marked(x) ** 2)
    return marked(jax.lax.switch(jnp.int32(x[0] > -9), [lambda x: marked(x), branch], x) ** 2)


def by_hand(x):
    means = []

    def shifted(x):
        means.append(x.mean())
        return x - x.mean()

    x = 2 * shifted(x)
    for w in (1.0, 2.0, 3.0):
        x = np.sin(shifted(w * x)) + 1.5
    return shifted(shifted(shifted(x) ** 2) ** 2), means


def test_values_come_in_the_order_of_the_program_and_go_back_to_their_places():
    x, other = np.array([0.3, 1.0, 4.0]), np.array([2.0, -1.0, 0.5])
    (expected, means), run = by_hand(x), jax.jit(lambda x, replacements=None: of_marked(nested, x, replacements))
    outputs, values = run(x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)  # the first one is 0
    first, loop, untaken, *last = values
    np.testing.assert_allclose(loop, means[1:4], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([first, *last], [means[0], *means[4:]], rtol=1e-12)
    assert np.isnan(untaken)
    np.testing.assert_allclose(run(x, values)[0], expected, rtol=1e-12, atol=1e-12)
    # Given values count, and not those of the argument; also for many arguments at once, and derivatives.
    both = jax.vmap(lambda x: of_marked(nested, x, values)[0])(jnp.stack([x, other]))
    np.testing.assert_allclose(both[0], expected, rtol=1e-12, atol=1e-12)
    assert abs(both[1] - by_hand(other)[0]).max() > 1e-2
    slope = jax.grad(lambda x: of_marked(nested, x)[0][0])(x)
    numeric = [(by_hand(x + h)[0][0] - by_hand(x - h)[0][0]) / 2e-6 for h in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-7)


def test_a_value_inside_of_a_while_loop_cannot_be_exchanged():
    loop = lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: marked(x), x)
    with pytest.raises(ValueError, match="inside of 'while', in which it cannot be replaced"):
        of_marked(loop, np.ones(2))


# Programs in float32, evaluated in float64, against NumPy.


@jax.custom_jvp
def squared(x):
    return x * x


squared.defjvp(lambda x, t: (x[0] * x[0], 2 * x[0] * t[0]))

MATRIX = np.array([[2.0, 0.3], [0.3, 1.0]])
NARROW = {  # a program of a vector in float32, and its value in NumPy
    "casts": (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) / 3, lambda x: x / 3),
    "a captured array": (lambda x: x * jnp.float32(0.1), lambda x: x * np.float32(0.1).astype(float)),
    "a loop": (
        lambda x: jax.lax.scan(lambda c, a: (c / 3 + a, c), x, jnp.stack([x, x]))[0],
        lambda x: x * (1 / 9 + 4 / 3),
    ),
    "the stacked outputs of a loop": (
        lambda x: jax.lax.scan(lambda c, a: (c / 3, c * a + 1), x, jnp.stack([x, x, x]))[1][2],
        lambda x: x**2 / 9 + 1,
    ),
    "a while loop": (lambda x: jax.lax.while_loop(lambda c: c[0] > 0.15, lambda c: c / 3, x), lambda x: x / 3),
    "a branch": (lambda x: jax.lax.cond(x[0] > 0, lambda: x / 3, lambda: x), lambda x: x / 3),
    "a checkpoint": (
        jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x / 3))(x).sum()),
        lambda x: np.cos(x / 3) / 3,
    ),
    "a derivative of its own": (lambda x: squared(x / 3), lambda x: x * x / 9),
    "a linear solve": (
        lambda x: jax.scipy.sparse.linalg.cg(lambda v: jnp.asarray(MATRIX, x.dtype) @ v, x, tol=0.0, maxiter=9)[0],
        lambda x: np.linalg.solve(MATRIX.astype(np.float32).astype(float), x),
    ),
    "a root": (
        lambda x: jax.lax.custom_root(lambda u: 3 * u - x, x, lambda f, u: x / 3, lambda g, b: b / 3),
        lambda x: x / 3,
    ),
    "a search": (
        lambda x: x[jnp.searchsorted(jnp.array([0.5, 0.6], x.dtype), x)] + x[jnp.flatnonzero(x > 0.5, size=2)],
        lambda x: x + x[[1, 0]],
    ),
    "a scatter": (
        lambda x: jnp.zeros(2, x.dtype).at[jnp.array([1, 1])].add(x / 3),
        lambda x: np.array([0, x.sum() / 3]),
    ),
    "a convolution": (lambda x: jax.lax.conv(x[None, None], x[None, None, :1], (1,), "SAME")[0, 0], lambda x: x * x[0]),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_program_in_float32_runs_in_float64(name):
    function, expected = NARROW[name]
    with jax.enable_x64(False):
        x = jnp.array([0.3, 0.7])
        wide, narrow = _jaxpr.in_float64(function, x)
        own = function(x)
    out = jax.jit(wide)(x)
    assert narrow == set() and out.dtype == jnp.float64 and own.dtype == jnp.float32
    np.testing.assert_allclose(out, expected(np.asarray(x, float)), rtol=1e-13)
    np.testing.assert_allclose(own, out, rtol=1e-2 if name == "casts" else 1e-5)


def test_random_bits_and_integers_are_those_of_the_own_types():
    def draw(key, x):
        return jax.random.normal(key, x.shape) + x, jax.random.permutation(key, 5), jnp.arange(3) + x.astype(int)[0]

    with jax.enable_x64(False):
        args = (jax.random.key(3), jnp.ones(4))
        wide, narrow = _jaxpr.in_float64(draw, *args)
        own = draw(*args)
    out = jax.jit(wide)(*args)
    assert narrow == set() and [x.dtype for x in out] == [jnp.float64, own[1].dtype, own[2].dtype]
    chex.assert_trees_all_close(out, own, rtol=1e-6)


def test_checkpoint_policies_do_not_round_to_float32():
    def function(x):
        kept = lambda x: jax.ad_checkpoint.checkpoint_name(jnp.sin(x / 3), "kept")
        policy = jax.checkpoint_policies.save_only_these_names("kept")
        return jax.grad(lambda x: (jax.checkpoint(lambda x: kept(x) ** 2, policy=policy)(x)).sum())(x)

    x = np.array([0.3, 0.7], np.float32)
    out = jax.jit(_jaxpr.in_float64(function, x)[0])(x)
    third = x.astype(float) / 3
    np.testing.assert_allclose(out, 2 * np.sin(third) * np.cos(third) / 3, rtol=1e-14)


def test_operations_that_stay_narrow_are_named():
    def function(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jax.pure_callback(np.sin, shape, x) + bits, jnp.exp(x)

    x = np.array([0.3, 0.7], np.float32)
    wide, narrow = _jaxpr.in_float64(function, x)
    (sine, exponential) = jax.jit(wide)(x)
    assert sorted(name.split(",")[0] for name in narrow) == ["bitcast_convert_type", "pure_callback"]
    assert sine.dtype == exponential.dtype == jnp.float64
    np.testing.assert_allclose(exponential, np.exp(x.astype(float)), rtol=1e-14)


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_the_sources_of_a_loop_s_outputs(loop):
    """Values that move on by one place in each step: the first comes from all others, and nothing from the last one."""

    def scanned(constant, first, second, third, x):
        step = lambda carry, x: ((carry[1], carry[2], constant * carry[2], carry[3] + x), carry[0] + x)
        (first, second, third, total), ys = jax.lax.scan(step, (first, second, third, 0.0), jnp.stack([x, x]))
        return first, second, third, total, ys

    def repeated(constant, first, second, third, x):
        step = lambda carry: (carry[1], carry[2], constant * carry[2], carry[3] + x)
        return jax.lax.while_loop(lambda carry: carry[3] < 9.0, step, (first, second, third, 0.0))

    jaxpr = jax.make_jaxpr(scanned if loop == "scan" else repeated)(*map(jnp.float64, range(5))).jaxpr
    sources = ["".join(sorted(labels)) for labels in _jaxpr.dependencies(jaxpr, [frozenset(c) for c in "c123x"])]
    assert sources == (["123c", "23c", "3c", "x", "123cx"] if loop == "scan" else ["123cx", "23cx", "3cx", "x"])


def test_semi_public_jax_is_imported_in_one_place():
    """`jax.core`, `jax.extend`, `jax.interpreters` and `jax._src` may change in any release."""
    package = Path(_jaxpr.__file__).parent
    pattern = re.compile(
        r"^\s*(?:from|import) jax\.(?:core|extend|interpreters|_src)|\bjax\.(?:core|extend|_src)\.", re.M
    )
    others = [file for file in package.parent.rglob("*.py") if package not in file.parents]
    assert len(others) > 100
    assert [str(file) for file in others if pattern.search(file.read_text())] == []

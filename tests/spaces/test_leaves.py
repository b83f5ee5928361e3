"""One battery over every kind of leaf, in both float types, against formulas that metaopt did not compute."""

import functools
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from metaopt import spaces


class Row(NamedTuple):
    """A kind of leaf and what is known about it from NumPy and SciPy. All tests of this file run on each row.

    Attributes:
      leaf: an example.
      formula: λ from z.
      inverse: z from λ, derived by hand.
      law: the distribution of each entry of a sample; of arrays, with their shape. Of weights, that of one weight.
      zero: whether z is 0 at the default.
      outside: values that do not belong to the leaf. Every leaf refuses NaN.
    """

    leaf: spaces.Leaf
    formula: Callable
    inverse: Callable
    law: Any
    zero: bool
    outside: tuple[float, ...]


def log_odds(p):
    return np.log(p) - np.log1p(-p)


def weights(z):
    return scipy.special.softmax(z, axis=-1)


def logits(x):
    return np.log(x) - np.log(x).mean(-1, keepdims=True)


ROWS = {
    "real": Row(
        spaces.real(2.0, 3.0),
        formula=lambda z: 2 + 3 * z,
        inverse=lambda x: (x - 2) / 3,
        law=scipy.stats.norm(2, 3),
        zero=True,
        outside=(np.inf,),
    ),
    "real_array": Row(
        spaces.real([1.0, -2.0], 0.5, shape=(2,)),
        formula=lambda z: np.array([1.0, -2.0]) + 0.5 * z,
        inverse=lambda x: (x - np.array([1.0, -2.0])) / 0.5,
        law=scipy.stats.norm([1.0, -2.0], 0.5),
        zero=True,
        outside=(),
    ),
    "positive": Row(
        spaces.positive(0.1, 1.5),
        formula=lambda z: np.exp(np.log(0.1) + 1.5 * z),
        inverse=lambda x: np.log(x / 0.1) / 1.5,
        law=scipy.stats.lognorm(1.5, scale=0.1),
        zero=True,
        outside=(0.0, -1.0, np.inf),
    ),
    "positive_array": Row(
        spaces.positive([[1.0, 2.0, 3.0]], shape=(1, 3)),
        formula=lambda z: np.array([[1.0, 2.0, 3.0]]) * np.exp(z),
        inverse=lambda x: np.log(x / np.array([[1.0, 2.0, 3.0]])),
        law=scipy.stats.lognorm(1.0, scale=[[1.0, 2.0, 3.0]]),
        zero=True,
        outside=(),
    ),
    "interval": Row(
        spaces.interval(-1.0, 3.0),
        formula=lambda z: 1 + 2 * np.tanh(z / 2),
        inverse=lambda x: log_odds((x + 1) / 4),
        law=scipy.stats.uniform(-1, 4),
        zero=True,
        outside=(-1.001, 3.001, -np.inf),
    ),
    "interval_log": Row(
        spaces.interval(1e-5, 1e-1, log=True),
        formula=lambda z: 10 ** (-5 + 4 * scipy.special.expit(z)),
        inverse=lambda x: log_odds((np.log10(x) + 5) / 4),
        law=scipy.stats.loguniform(1e-5, 1e-1),
        zero=True,
        outside=(0.0, -1e-3, 0.99e-5, 0.1001),
    ),
    "interval_array": Row(
        spaces.interval(0.5, 0.75, default=[0.6, 0.7], shape=(2,)),
        formula=lambda z: 0.5 + 0.25 * scipy.special.expit(z),
        inverse=lambda x: log_odds((x - 0.5) / 0.25),
        law=scipy.stats.uniform(0.5, 0.25),
        zero=False,
        outside=(0.49, 0.76),
    ),
    "unit_interval": Row(
        spaces.interval(0, 1, default=0.9),
        formula=scipy.special.expit,
        inverse=log_odds,
        law=scipy.stats.uniform(0, 1),
        zero=False,
        outside=(-1e-3, 1.001),
    ),
    "integer": Row(
        spaces.integer(-2, 5),
        formula=lambda z: -2.5 + 8 * scipy.special.expit(z),
        inverse=lambda x: log_odds((x + 2.5) / 8),
        law=scipy.stats.uniform(-2.5, 8),
        zero=False,
        outside=(-2.6, 5.6),
    ),
    "integer_log": Row(
        spaces.integer(1, 64, log=True),
        formula=lambda z: 0.5 * 129 ** scipy.special.expit(z),
        inverse=lambda x: log_odds(np.log(x / 0.5) / np.log(129)),
        law=scipy.stats.loguniform(0.5, 64.5),
        zero=False,
        outside=(0.0, 0.49, 64.6),
    ),
    "simplex": Row(
        spaces.simplex(4),
        formula=weights,
        inverse=logits,
        law=scipy.stats.beta(1, 3),
        zero=True,
        outside=(0.0, 0.26, -0.25),
    ),
    "simplex_array": Row(
        spaces.simplex(3, default=[0.2, 0.3, 0.5], shape=(2,)),
        formula=weights,
        inverse=logits,
        law=scipy.stats.beta(1, 2),
        zero=False,
        outside=(),
    ),
    "choice": Row(
        spaces.choice(["sgd", 3, None, True], default=None),
        formula=weights,
        inverse=logits,
        law=scipy.stats.beta(1, 3),
        zero=False,
        outside=(0.0, 1.0),
    ),
}
LEAVES = {name: row.leaf for name, row in ROWS.items()}
BOUNDED = [name for name, leaf in LEAVES.items() if hasattr(leaf, "edges")]
SIMPLEX = [name for name, leaf in LEAVES.items() if leaf.value_shape != leaf.shape]  # weights: one more axis
ALL = pytest.mark.parametrize("name", LEAVES)


def to_constrained(leaf, z):
    """λ of one leaf from its array of coordinates."""
    return spaces.to_constrained(leaf, spaces.Unconstrained(z))


def to_unconstrained(leaf, value):
    """The array of coordinates of one leaf."""
    return spaces.to_unconstrained(leaf, value).coordinates


def coordinates(name, scale=1.5, dtype=float):
    return scale * jax.random.normal(jax.random.key(7), LEAVES[name].value_shape, dtype)


@functools.cache
def draws(x64=True):
    """4,000 samples of every leaf, from one program. The key of a leaf depends on its name, not on other rows."""

    def sample(key):
        own = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
        return {name: spaces.sample(own(name), leaf) for name, leaf in LEAVES.items()}

    with jax.enable_x64(x64):
        return jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(1), 4_000))


def samples(name):
    return draws()[name]


def each(function):
    """`function(leaf, value)` of every leaf, as a function of a dict of values: one program for all leaves."""
    return lambda values: {name: function(LEAVES[name], value) for name, value in values.items()}


@ALL
def test_to_constrained_is_the_formula(name):
    z = coordinates(name)
    chex.assert_trees_all_close(to_constrained(LEAVES[name], z), ROWS[name].formula(np.asarray(z)), rtol=1e-12)


@ALL
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_round_trips_both_ways_and_keeps_the_type(name, dtype):
    leaf, z = LEAVES[name], coordinates(name, dtype=dtype)
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-11
    value = to_constrained(leaf, z)
    returned = to_unconstrained(leaf, value)
    if name in SIMPLEX:
        z = z - z.mean(-1, keepdims=True)
    assert value.dtype == returned.dtype == dtype
    assert value.shape == returned.shape == leaf.value_shape
    chex.assert_trees_all_close(returned, z, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_close(to_constrained(leaf, returned), value, rtol=tolerance)
    assert np.ptp(np.append(np.asarray(z), 0.0)) > 0.1  # something to come back from


@ALL
def test_default_survives_the_round_trip_and_is_z_zero_where_promised(name):
    leaf = LEAVES[name]
    value = spaces.default(leaf)
    z = to_unconstrained(leaf, value)
    chex.assert_trees_all_close(to_constrained(leaf, z), value, rtol=1e-12)
    if ROWS[name].zero:
        chex.assert_trees_all_close(z, jnp.zeros(leaf.value_shape), atol=1e-12)


@ALL
def test_samples_follow_their_distribution(name):
    uniform = np.asarray(ROWS[name].law.cdf(np.asarray(samples(name)))).reshape(4_000, -1)
    assert scipy.stats.kstest(uniform[:, 0], scipy.stats.uniform().cdf).pvalue > 1e-3
    assert scipy.stats.kstest(uniform[:, -1], scipy.stats.uniform().cdf).pvalue > 1e-3


@ALL
def test_entries_of_a_sample_are_independent(name):
    draws = np.asarray(samples(name)).reshape(4_000, -1)
    ranks = scipy.stats.rankdata(draws, axis=0)
    if draws.shape[1] > 1:
        correlation = np.corrcoef(ranks[:, 0], ranks[:, -1])[0, 1]
        expected = -1 / 3 if name in ("simplex", "choice") else 0.0  # of Dirichlet(1), −1 / (num − 1)
        assert abs(correlation - expected) < 0.06


@ALL
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.once
def test_samples_and_defaults_lie_in_the_range_and_have_the_default_type(name, x64):
    leaf = LEAVES[name]
    with jax.enable_x64(x64):
        drawn, start = draws(x64)[name], spaces.default(leaf)
        assert drawn.dtype == start.dtype == (jnp.float64 if x64 else jnp.float32)
        drawn, start = np.asarray(drawn), np.asarray(start)
    assert drawn.shape == (4_000, *leaf.value_shape) and start.shape == leaf.value_shape
    for value in (drawn, start):
        assert np.all(np.isfinite(value))
        if name in BOUNDED:
            low, high = (value.dtype.type(edge) for edge in leaf.edges)
            assert low <= value.min() and value.max() <= high
        if name in SIMPLEX:
            assert value.min() >= 0
            np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-6)
        if name.startswith("positive"):
            assert value.min() > 0


@pytest.mark.parametrize("fn", [to_constrained, to_unconstrained, spaces.encode])
@pytest.mark.once
def test_derivatives_equal_finite_differences(fn):
    # Forward mode is compared leaf by leaf.
    points = {name: coordinates(name) for name in LEAVES}
    if fn is not to_constrained:
        points = each(to_constrained)(points)

    def moved(name, t):
        point = points[name]
        if fn is to_unconstrained and name in SIMPLEX:  # weights that sum to one
            return point * jnp.exp(t) / jnp.sum(point * jnp.exp(t), axis=-1, keepdims=True)
        return point + jnp.maximum(jnp.abs(point), 1e-3) * t

    directions = {name: jax.random.normal(jax.random.key(i), points[name].shape) for i, name in enumerate(points)}

    def derivatives(s):  # along one direction of each leaf, from s = 0
        function = lambda ts: each(fn)({name: moved(name, t) for name, t in ts.items()})
        along = lambda s: function(jax.tree.map(lambda t: s * t, directions))
        slope = lambda s: jax.jvp(along, (s,), (1.0,))[1]
        totals = lambda ts: sum(jnp.sum(jnp.sin(value)) for value in function(ts).values())
        reverse = lambda s: jax.grad(totals)(jax.tree.map(lambda t: s * t, directions))
        return along(s), slope(s), jax.jvp(slope, (s,), (1.0,))[1], reverse(s), jax.jvp(reverse, (s,), (1.0,))[1]

    eps = 1e-5
    results = jax.jit(jax.vmap(derivatives))(jnp.array([0.0, eps, -eps]))
    values, slopes, seconds, gradients, gradient_slopes = results
    difference = lambda tree: jax.tree.map(lambda x: (x[1] - x[2]) / (2 * eps), tree)
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    chex.assert_trees_all_close(first(slopes), difference(values), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(first(seconds), difference(slopes), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(first(gradient_slopes), difference(gradients), rtol=1e-4, atol=1e-6)
    for name, gradient in first(gradients).items():
        by_slope = np.sum(np.cos(values[name][0]) * slopes[name][0])
        np.testing.assert_allclose(np.sum(gradient * directions[name]), by_slope, rtol=1e-8, atol=1e-12)
        assert np.abs(slopes[name][0]).max() > 1e-6


@pytest.mark.once
def test_extreme_coordinates_are_finite_with_finite_derivatives_in_float32():
    extremes = jnp.array([-50.0, 50.0, -1e4, 1e4], jnp.float32)

    def values_and_derivatives(extreme):
        results = {}
        for name, leaf in LEAVES.items():
            z = jnp.zeros(leaf.value_shape, jnp.float32)
            z = z.at[..., 0].set(extreme) if z.ndim else z + extreme
            forth = lambda z, leaf=leaf: to_constrained(leaf, z)
            back = lambda z, leaf=leaf, forth=forth: to_unconstrained(leaf, forth(z))
            code = lambda z, leaf=leaf, forth=forth: spaces.encode(leaf, forth(z))
            forward = [jax.jvp(fn, (z,), (jnp.ones_like(z),)) for fn in (forth, back, code)]
            reverse = [jax.grad(lambda z, fn=fn: fn(z).sum())(z) for fn in (forth, back, code)]
            second = jax.hessian(lambda z, forth=forth: forth(z).sum())(z)
            results[name] = {"value": forth(z), "derivatives": (forward, reverse, second)}
        return results

    for name, result in jax.jit(jax.vmap(values_and_derivatives))(extremes).items():
        chex.assert_tree_all_finite(result)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}
        if name in BOUNDED:
            low, high = np.float32(LEAVES[name].edges)
            value = np.asarray(result["value"])
            assert low <= value.min() and value.max() <= high


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.once
def test_a_value_outside_the_range_raises_or_has_no_coordinate_if_it_is_traced(dtype):
    cases = [(row.leaf, value) for row in ROWS.values() for value in (*row.outside, np.nan)]
    cases = [(leaf, np.full(leaf.value_shape, value, dtype)) for leaf, value in cases]
    for leaf, value in cases:
        with pytest.raises(ValueError, match="^λ lies outside the space at `hyperparams`: it must be .*; got "):
            to_unconstrained(leaf, value)
        with pytest.raises(ValueError, match="^λ lies outside the space"):  # known while tracing
            jax.jit(lambda leaf=leaf, value=value: to_unconstrained(leaf, value))()
    values = [value for _, value in cases]
    convert = jax.jit(lambda values: [to_unconstrained(leaf, x) for (leaf, _), x in zip(cases, values, strict=True)])
    for value, z, tangent in zip(values, *jax.jvp(convert, (values,), (list(map(np.ones_like, values)),)), strict=True):
        assert np.isnan(z).all() and z.dtype == dtype and tangent.shape == value.shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.once
def test_any_finite_value_has_a_finite_encoding(dtype):
    def codes(leaf, values):
        def code(value):
            tangents = jax.jvp(lambda x: spaces.encode(leaf, x), (value,), (jnp.ones_like(value),))
            return tangents, jax.grad(lambda x: spaces.encode(leaf, x).sum())(value)

        return jax.vmap(code)(values)

    values = {}
    for name, leaf in LEAVES.items():
        extremes = [0.0, 1.0, -1.0, 1e6, float(jnp.finfo(dtype).tiny), *getattr(leaf, "edges", ())]
        values[name] = jnp.stack([jnp.full(leaf.value_shape, value, dtype) for value in extremes])
    chex.assert_tree_all_finite(jax.jit(each(codes))(values))


ROUNDED = {
    "high": (spaces.interval(1e-4, 1.0, log=True), 1.0),
    "high_rounded_up": (spaces.interval(1e-4, 0.1, log=True), 0.1),  # in float32, above 0.1
    "low_rounded_down": (spaces.interval(1e-4, 0.1, log=True), 1e-4),  # in float32, below 1e-4
    "few_ulps_above": (spaces.interval(-1.0, 3.0), 3.0 * (1 + 2e-7)),
    "negative_zero": (spaces.interval(0, 1), -1e-9),
    "edge_of_integers": (spaces.integer(1, 8), 8.5),
    "one_hot": (spaces.simplex(3), [0.0, 1.0, 0.0]),
    "sum_rounded": (spaces.simplex(3), [0.2, 0.3, 0.500001]),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_values_at_a_bound_in_float32_are_accepted_with_finite_coordinates(name):
    leaf, value = ROUNDED[name]
    assert np.isfinite(to_unconstrained(leaf, np.float32(value))).all()
    assert np.isfinite(jax.jit(lambda x: to_unconstrained(leaf, x))(np.float32(value))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("leaf", [spaces.interval(-1.0, 3.0), spaces.interval(1e-5, 1e-1, log=True)])
def test_a_value_at_a_bound_moves_inside_by_a_thousandth_of_the_range(leaf, dtype):
    for bound, expected in ((leaf.low, np.log(1e-3 / 0.999)), (leaf.high, np.log(0.999 / 1e-3))):
        z = to_unconstrained(leaf, dtype(bound))
        np.testing.assert_allclose(z, expected, rtol=1e-5)
        slope = jax.grad(lambda z, leaf=leaf: to_constrained(leaf, z))(z)
        span = leaf.high - leaf.low
        if leaf.log:
            span = np.log(leaf.high / leaf.low) * bound * np.exp(np.sign(z) * -1e-3 * np.log(leaf.high / leaf.low))
        np.testing.assert_allclose(slope, 1e-3 * 0.999 * span, rtol=1e-4)


def test_weights_of_zero_count_as_a_thousandth_of_a_uniform_weight():
    z = to_unconstrained(spaces.simplex(4), np.array([0.0, 0.5, 0.5, 0.0]))
    np.testing.assert_allclose(z, logits([2.5e-4, 0.5, 0.5, 2.5e-4]), rtol=1e-12)


def test_each_row_of_weights_is_inside_or_outside_as_a_whole():
    leaf = spaces.simplex(2, shape=(3,))
    values = jnp.array([[0.5, 0.5], [1.5, -0.5], [0.5, 0.6]])  # valid, negative, a sum above one
    np.testing.assert_array_equal(leaf.contains(values), [[True, True], [False, False], [False, False]])
    z = jax.jit(lambda values: to_unconstrained(leaf, values))(values)
    np.testing.assert_array_equal(z, [[0.0, 0.0], [np.nan, np.nan], [np.nan, np.nan]])


def test_values_inside_keep_their_coordinates_however_near_a_bound():
    for fraction in (1e-7, 1e-4, 0.5, 0.9999):
        z = to_unconstrained(spaces.interval(0.0, 1.0), fraction)
        np.testing.assert_allclose(z, np.log(fraction / (1 - fraction)), rtol=1e-12)
    value = np.array([1e-9, 1e-4, 1 - 1e-4 - 1e-9])
    np.testing.assert_allclose(np.diff(to_unconstrained(spaces.simplex(3), value)), np.diff(np.log(value)))


@ALL
def test_to_unconstrained_is_the_inverse_formula(name):
    value = ROWS[name].formula(np.asarray(coordinates(name)))
    expected = ROWS[name].inverse(value)
    chex.assert_trees_all_close(to_unconstrained(LEAVES[name], value), expected, rtol=1e-10, atol=1e-12)


@functools.cache
def codes_of_samples():
    return jax.jit(jax.vmap(each(spaces.encode)))(draws())


@ALL
def test_encoding_is_in_the_unit_interval_and_uniform_over_samples(name):
    leaf = LEAVES[name]
    codes = np.asarray(codes_of_samples()[name])
    assert codes.shape == (4_000, spaces.num_dims(leaf)) == (4_000, len(spaces.names(leaf)))
    assert 0 <= codes.min() and codes.max() <= 1
    law = ROWS[name].law if name in SIMPLEX else scipy.stats.uniform()
    assert scipy.stats.kstest(codes[:, -1], law.cdf).pvalue > 1e-3


@ALL
def test_encoding_is_the_cumulative_distribution(name):
    value = to_constrained(LEAVES[name], coordinates(name))
    expected = np.asarray(value) if name in SIMPLEX else ROWS[name].law.cdf(np.asarray(value))
    chex.assert_trees_all_close(spaces.encode(LEAVES[name], value), np.ravel(expected), rtol=1e-9)


@ALL
@pytest.mark.once
def test_discretized_values_are_valid(name):
    leaf, draws = LEAVES[name], samples(name)[:500]
    values = jax.vmap(lambda value: spaces.discretize(leaf, value))(draws)
    if name.startswith("integer"):
        assert values.dtype == jnp.int32
        assert set(np.unique(values)) <= set(range(leaf.low, leaf.high + 1))
        assert np.abs(np.asarray(values - draws)).max() <= 0.5
        edges = jnp.array([leaf.low - 0.5, leaf.high + 0.5, -1e9, 1e9])
        clipped = jax.vmap(lambda value: spaces.discretize(leaf, value))(edges)
        assert clipped.tolist() == [leaf.low, leaf.high, leaf.low, leaf.high]
        assert 0 < spaces.encode(leaf, jnp.int32(leaf.low))[0] < spaces.encode(leaf, jnp.int32(leaf.high))[0] < 1
    elif name in SIMPLEX:
        assert np.array_equal(np.asarray(values).argmax(-1), np.asarray(draws).argmax(-1))
        assert set(np.unique(values)) == {0.0, 1.0} and np.all(np.asarray(values).sum(-1) == 1)
    else:
        chex.assert_trees_all_equal(values, draws)


def test_every_integer_is_equally_probable():
    counts = np.bincount(
        np.asarray(jax.vmap(lambda x: spaces.discretize(LEAVES["integer"], x))(samples("integer"))) + 2
    )
    assert len(counts) == 8 and scipy.stats.chisquare(counts).pvalue > 0.01


@ALL
def test_at_bounds(name):
    leaf = LEAVES[name]

    def at_bounds(value):
        return np.asarray(spaces.at_bounds(leaf, value))

    middle = at_bounds(spaces.default(leaf))
    assert middle.shape == leaf.shape and middle.dtype == bool and not middle.any()
    extreme = jnp.full(leaf.value_shape, 100.0)
    if name in SIMPLEX:
        extreme = extreme.at[..., 1:].set(0.0)
    expected = name in SIMPLEX or name in BOUNDED
    assert np.all(at_bounds(to_constrained(leaf, extreme)) == expected)
    if name in BOUNDED:
        assert np.all(at_bounds(jnp.full(leaf.shape, leaf.low)))
        assert not np.any(at_bounds(to_constrained(leaf, jnp.full(leaf.shape, 0.5))))
        assert np.all(at_bounds(jnp.full(leaf.shape, leaf.high)))
        for place in (0.05, 0.95):
            span = leaf.high - leaf.low
            near = leaf.low * (leaf.high / leaf.low) ** place if leaf.log else leaf.low + place * span
            assert not np.any(at_bounds(jnp.full(leaf.shape, near)))
            assert np.all(spaces.at_bounds(leaf, jnp.full(leaf.shape, near), tol=0.06))
            assert not np.any(spaces.at_bounds(leaf, jnp.full(leaf.shape, near), tol=0.04))
    if name in SIMPLEX:
        near = jnp.full(leaf.value_shape, 0.05 / (leaf.num_weights - 1)).at[..., 0].set(0.95)
        assert np.all(spaces.at_bounds(leaf, near, tol=0.06)) and not np.any(spaces.at_bounds(leaf, near, tol=0.04))


@ALL
def test_json_round_trip(name):
    document = spaces.to_json({"a": [LEAVES[name], None]})
    assert document["version"] == 1
    assert json.loads(json.dumps(document)) == document
    assert spaces.from_json(json.loads(json.dumps(document))) == {"a": [LEAVES[name], None]}


@ALL
def test_leaves_are_hashable_compare_by_value_and_are_no_pytree_nodes(name):
    leaf = LEAVES[name]
    loaded = spaces.from_json(spaces.to_json(leaf))
    assert loaded is not leaf and hash(loaded) == hash(leaf) and loaded == leaf
    assert jax.tree.leaves(leaf) == [leaf]
    assert sum(leaf == other for other in LEAVES.values()) == 1


@pytest.mark.once
def test_vmap_and_jit_equal_one_at_a_time():
    keys = jax.random.split(jax.random.key(3), len(LEAVES))
    z = {n: jax.random.normal(key, (2, *LEAVES[n].value_shape)) for n, key in zip(LEAVES, keys, strict=True)}
    for fn in (to_constrained, lambda leaf, z: spaces.encode(leaf, to_constrained(leaf, z))):
        many = jax.jit(jax.vmap(each(fn)))(z)
        for i in range(2):
            one = each(fn)(jax.tree.map(lambda x, i=i: x[i], z))
            chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], many), one, rtol=1e-12)


@ALL
def test_a_wrong_shape_is_refused_while_tracing(name):
    leaf = LEAVES[name]
    wrong = jnp.zeros((7, *leaf.value_shape))
    for fn in (to_constrained, to_unconstrained, spaces.discretize, spaces.encode, spaces.at_bounds):
        with pytest.raises(ValueError, match=r"at `hyperparams`: expected .* got shape \(7,.*jax.vmap"):
            jax.jit(lambda value, fn=fn: fn(leaf, value))(wrong)


@ALL
def test_python_numbers_and_integers_become_the_default_float(name):
    leaf = LEAVES[name]
    integers = np.ones(leaf.value_shape, np.int32)
    fns = [to_constrained, spaces.encode]
    if name in ("real", "positive", "interval", "integer"):  # of which 1 is a value
        fns.append(to_unconstrained)
    for fn in fns:
        chex.assert_trees_all_equal(fn(leaf, integers), fn(leaf, jnp.asarray(integers, float)))
        assert fn(leaf, integers.tolist() if integers.ndim == 0 else integers).dtype == jnp.float64


def test_an_integer_s_default_is_an_integer_in_the_middle():
    assert float(spaces.default(spaces.integer(1, 9))) == 5
    assert float(spaces.default(spaces.integer(1, 64, log=True))) == 6  # √(0.5 · 64.5) = 5.68
    assert float(spaces.default(spaces.integer(1, 2, log=True))) == 1
    assert float(spaces.default(spaces.interval(1e-4, 1.0, log=True))) == pytest.approx(1e-2)


def test_fixed_keeps_its_type_and_cannot_be_changed_from_outside():
    array = np.array([1.0, 2.0], np.float32)
    leaf = spaces.fixed(array)
    array[0] = 5.0
    assert leaf == spaces.fixed(np.array([1.0, 2.0], np.float32)) != spaces.fixed(np.array([1.0, 2.0]))
    assert spaces.fixed(0.0) != spaces.fixed(0)
    assert hash(leaf) == hash(spaces.fixed(jnp.array([1.0, 2.0], jnp.float32)))
    assert spaces.default(leaf).dtype == jnp.float32 and spaces.default(leaf).tolist() == [1.0, 2.0]
    for value, dtype in ((3, jnp.int64), (0.5, jnp.float64), (True, bool), (jnp.bfloat16(0.5), jnp.bfloat16)):
        leaf = spaces.fixed(value)
        loaded = spaces.from_json(json.loads(json.dumps(spaces.to_json(leaf))))
        assert loaded == leaf and spaces.default(loaded).dtype == dtype
    with jax.enable_x64(False):
        assert spaces.default(spaces.fixed(0.5)).dtype == jnp.float32


@pytest.mark.once
def test_rounding_does_not_leave_the_range():
    # In float32, exp(log 1000) is above 1000.
    for high in (30.0, 100.0, 1000.0):
        value = to_constrained(spaces.interval(1e-6, high, log=True), jnp.float32(100.0))
        assert 0.999 * high < value <= np.float32(high)

"""Slices of F, predicted λ over a feature, and hypergradients show numbers that are computed in another way."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from metaopt import base, hypergrad, plots, spaces, training


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


# ---- Slices ---------------------------------------------------------------------------------------------------------


def rule(function, factor=1.0):
    """An estimator of F(λ) = function(λ) + noise that depends on the key only; its hypergradient has a factor."""

    def estimate(hyperparams, task, key):
        value, grads = jax.value_and_grad(function)(hyperparams)
        hypergrad = jax.tree.map(lambda g: factor * g, grads)
        return base.Estimate(value + jax.random.normal(key), hypergrad, jnp.array(True), {}), key

    return base.Estimator(lambda key, hyperparams, task: key, estimate, kind="exact")


def outer_loss(hyperparams):
    a, b = hyperparams["decay"]
    return 4 * a**2 + a * b + jnp.sin(hyperparams["rate"]) * b


POINT = {"decay": jnp.array([0.5, -2.0]), "rate": jnp.array(0.0)}
KEY = jax.random.key(3)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_slices_are_values_of_f_and_tangents_have_the_slope_of_the_hypergradient(factor):
    axes = plots.slices(rule(outer_loss, factor), POINT, None, key=KEY, num_points=5)
    assert [own.get_xlabel() for own in axes] == ["decay[0]", "decay[1]", "rate"]
    noise, steps = float(jax.random.normal(KEY)), np.array([-1, -0.5, 0, 0.5, 1])
    places = [0.5 + 0.25 * steps, -2 + steps, 0.5 * steps]  # ± radius · |entry|, and ± radius of the zero
    f = lambda a=0.5, b=-2.0, rate=0.0: 4 * a**2 + a * b + np.sin(rate) * b
    values = [f(a=places[0]), f(b=places[1]), f(rate=places[2])]
    slopes = [8 * 0.5 - 2, 0.5, -2]
    for own, x, y, slope in zip(axes, places, values, slopes, strict=True):
        curve, tangent, point = own.lines
        np.testing.assert_allclose(curve.get_xdata(), x)
        np.testing.assert_allclose(curve.get_ydata(), y + noise)
        np.testing.assert_allclose(tangent.get_xdata(), x)
        np.testing.assert_allclose(tangent.get_ydata(), -0.0 + noise + f() + factor * slope * (x - x[2]))
        np.testing.assert_allclose(point.get_xydata(), [[x[2], f() + noise]])
        assert own.get_ylim()[0] <= min(y + noise) and own.get_ylim()[1] >= max(y + noise)


def test_of_many_entries_those_with_the_largest_change_within_the_radius_have_slices():
    weights = jnp.array([1.0, -30.0, 2.0, 0.0, 10.0])
    point = jnp.array([100.0, 1.0, 1.0, 1.0, 1.0])  # changes: 50, 15, 1, 0, 5
    linear = rule(lambda x: weights @ x)
    assert [own.get_xlabel() for own in plots.slices(linear, point, None, max_slices=2)] == ["λ[0]", "λ[1]"]
    coordinates = spaces.Unconstrained({"a": point})  # these move by the radius itself
    moved = plots.slices(rule(lambda z: weights @ z.coordinates["a"]), coordinates, None, max_slices=2, radius=2.0)
    assert [own.get_xlabel().split("a")[-1] for own in moved] == ["[1]", "[4]"]
    np.testing.assert_allclose(moved[0].lines[0].get_xdata()[[0, -1]], [-1, 3])


def test_values_that_are_not_finite_are_gaps_and_a_wild_slope_does_not_flatten_the_curve():
    own = pyplot.subplots()[1]
    wild = rule(lambda x: jnp.where(x > 1.2, jnp.nan, x**2), factor=1e6)
    assert plots.slices(wild, jnp.array(1.0), None, num_points=3, axes=[own]) == [own]
    values = own.lines[0].get_ydata()
    assert np.isfinite(values[:2]).all() and np.isnan(values[2])
    low, high = own.get_ylim()
    assert low < values[0] < values[1] < high and high - low < 1
    (own,) = plots.slices(rule(lambda x: jnp.where(x > 1.4, 1e36, x**2)), jnp.array(1.0), None, num_points=11)
    assert own.get_ylim()[1] < 3 and own.lines[0].get_ydata()[-1] > 1e35  # a run that diverges
    (own,) = plots.slices(rule(lambda x: 0.0 * x), jnp.array(1.0), None, num_points=3)  # flat
    assert own.get_ylim()[0] < own.get_ylim()[1]


def test_slices_of_a_batch_are_of_the_mean_over_its_tasks():
    def estimate(x, task, state):
        value, grad = jax.value_and_grad(lambda x: (x - task.train) ** 2)(x)
        return base.Estimate(value, grad, jnp.array(True), {}), state

    batched = hypergrad.over_tasks(base.Estimator(lambda key, x, task: (), estimate, kind="exact"))
    batch = base.Task(jnp.array([0.0, 4.0]), jnp.zeros(2))
    (own,) = plots.slices(batched, jnp.array(1.0), batch, num_points=3)
    np.testing.assert_allclose(own.lines[0].get_ydata(), [(0.25 + 3.5**2) / 2, 5, (2.25 + 2.5**2) / 2])
    np.testing.assert_allclose(np.diff(own.lines[1].get_ydata()), -2 * 0.5)


# ---- λ over a feature -----------------------------------------------------------------------------------------------

FEATURES = np.array([[0.0, 7.0], [1.0, 8.0], [4.0, 30.0]])


def test_predictions_vary_one_feature_and_the_range_of_training_is_shaded():
    predict = lambda f: {"rate": np.exp(f[0]) * f[1], "decay": np.array([1.0, 2.0]) * f[1], "kind": "a"}
    axes = plots.hyperparameters_by_feature(predict, FEATURES, 0, num_points=4, margin=0.5, xlabel="rows")
    marks, *lines = axes.lines
    np.testing.assert_array_equal(marks.get_xdata(), [0, 1, 4])
    drawn = {line.get_label(): line.get_xydata() for line in lines}
    assert sorted(drawn) == ["decay[0]", "decay[1]", "rate"] and axes.get_yscale() == "log"
    x = np.array([-2.0, 2 / 3, 10 / 3, 6.0])  # from 0 ... 4 by half of it on both sides
    np.testing.assert_allclose(drawn["rate"], np.stack([x, 8 * np.exp(x)], 1))  # the median of 7, 8, 30 is 8
    np.testing.assert_allclose(drawn["decay[1]"][:, 1], 16)
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (0, 4) and axes.get_xlabel() == "rows"
    other = plots.hyperparameters_by_feature(predict, FEATURES, 1, num_points=2, margin=0.0)
    np.testing.assert_allclose(other.lines[3].get_xydata(), [[7, 7 * np.e], [30, 30 * np.e]])  # the median of 0, 1, 4


def test_unknown_features_of_training_tasks_are_left_out():
    features = np.array([[0.0, 7.0], [np.nan, 8.0], [4.0, np.nan], [1.0, 30.0], [np.inf, 8.0], *[[2.0, np.inf]] * 3])
    axes = plots.hyperparameters_by_feature(lambda f: {"a": f[0], "b": f[1]}, features, 0, num_points=2, margin=0.0)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[1:]}
    assert drawn == {"a": [[0, 0], [4, 4]], "b": [[0, 8], [4, 8]]}


def test_another_feature_may_be_unknown_for_all_tasks():
    features = np.array([[0.0, np.nan, 7.0], [4.0, np.nan, 9.0]])
    predict = lambda f: {"a": f[0] + f[2], "unknown": float(np.isnan(f[1]))}  # as `MetaOptimizer.predict` reads NaN
    axes = plots.hyperparameters_by_feature(predict, features, 0, num_points=2, margin=0.0)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in axes.lines[1:]}
    assert drawn == {"a": [8, 12], "unknown": [1, 1]}


def test_a_hyperparameter_that_some_predictions_lack_has_gaps():
    predict = lambda f: {"depth": 3} | ({"gamma": -1.0} if f[0] > 1 else {})
    axes = plots.hyperparameters_by_feature(predict, FEATURES, 0, num_points=2, margin=0.0)
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines[1:]}
    np.testing.assert_array_equal(drawn["gamma"], [np.nan, -1])
    np.testing.assert_array_equal(drawn["depth"], [3, 3])
    assert axes.get_yscale() == "linear"


# ---- Hypergradients ---------------------------------------------------------------------------------------------


def drawn_hypergradients(history, **options):
    axes = plots.hypergradients(history, **options)
    return axes, axes.lines[0].get_ydata(), axes.figure.axes[-1].lines[0].get_ydata()


def test_the_signal_to_noise_ratio_is_over_the_last_steps_that_have_a_variance():
    rng = np.random.default_rng(0)
    norm, variance, num = 3 + rng.uniform(size=12), rng.uniform(1, 9, size=12), rng.integers(2, 9, size=12)
    norm[4], num[7] = np.inf, 1  # a skipped step, and one with a single task
    history = {"hypergrad_norm": norm, "hypergrad_variance": variance, "num_finite": num}
    axes, drawn, ratio = drawn_hypergradients(history, window=3)
    np.testing.assert_array_equal(drawn, [*norm[:4], np.nan, *norm[5:]])
    assert axes.get_yscale() == "log" and np.isnan(ratio[:2]).all() and "3 steps" in axes.figure.axes[-1].get_ylabel()
    for t in range(2, 12):
        used = [s for s in (t - 2, t - 1, t) if s not in (4, 7)]
        noise = sum(variance[s] / num[s] for s in used)
        assert ratio[t] == pytest.approx(np.sqrt((sum(norm[s] ** 2 for s in used) - noise) / noise))


def test_without_signal_the_ratio_is_zero_and_without_tasks_there_is_none():
    history = {"hypergrad_norm": np.ones(3), "hypergrad_variance": np.full(3, 8.0), "num_finite": np.full(3, 4.0)}
    np.testing.assert_array_equal(drawn_hypergradients(history)[2], [np.nan, np.nan, 0])
    figure = plots.hypergradients({"hypergrad_norm": np.ones(3)}).figure
    assert len(figure.axes) == 1


def test_the_ratio_of_a_run_is_that_of_its_distribution_of_tasks():
    """F_i(λ) = ‖λ − c_i‖² / 2 with c_i of variance σ² in each of d entries: ratio ‖λ‖ / (σ √(d / B))."""

    def estimate(x, task, state):
        value, grad = jax.value_and_grad(lambda x: ((x - task.train) ** 2).sum() / 2)(x)
        return base.Estimate(value, grad, jnp.array(True), {}), state

    batched = hypergrad.over_tasks(base.Estimator(lambda key, x, task: (), estimate, kind="exact"))
    sample = lambda key: base.Task(2.0 * jax.random.normal(key, (5, 3)), jnp.zeros(5))
    result = training.fit(
        training.learner(batched, optax.sgd(0.0)),
        sample,
        hyperparams=jnp.array([0.6, 0.0, 0.8]),
        num_steps=4_000,
        steps_per_call=1_000,
        key=jax.random.key(0),
        progress=False,
    )
    ratio = drawn_hypergradients(result.history, window=4_000)[2][-1]
    assert ratio == pytest.approx(1 / (2 * np.sqrt(3 / 5)), rel=0.05)

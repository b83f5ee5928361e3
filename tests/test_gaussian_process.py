"""Gaussian-process hyperparameters: hypergradients next to closed forms; g sees neither order nor test rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.kernel_ridge import KernelRidge

from experiments.data.corpus.frames import make_frame
from experiments.hyperparameters.gaussian_process import features, learning, model, report, tables
from metaopt import hypergrad, spaces

pytestmark = pytest.mark.once  # an experiment
HP = {"lengthscale": jnp.array([0.4, 1.0, 2.5]), "signal": jnp.array(1.3), "noise": jnp.array(0.2)}


@pytest.fixture(scope="module")
def task():
    """20 training rows of 3 columns, without padding."""
    pool = tables.synthetic(1, 3, 40)
    pool = pool._replace(x=pool.x.astype(float), y=pool.y.astype(float))
    if pool.columns.sum() < 3:
        pool.x[:], pool.columns[:] = np.random.default_rng(0).normal(size=pool.x.shape), 1.0
    return tables.draw(pool, 0, jax.random.key(0), 20, (20, 15))


def arrays(task):
    return [np.asarray(a, float) for a in (task.train["x"], task.train["y"], task.valid["x"], task.valid["y"])]


def by_hand(x, y):
    """The slopes of log p(y | X) in ln ℓ, ln s and ln σ: ½ tr((αα' − K⁻¹) dK)."""
    squared = (x[:, None] - x[None]) ** 2 / (3 * np.asarray(HP["lengthscale"]) ** 2)
    signal = 1.3**2 * np.exp(-0.5 * squared.sum(-1))
    k = signal + (0.2**2 + model.LEAST_VARIANCE) * np.eye(len(x))
    inverse = np.linalg.inv(k)
    outer = np.outer(inverse @ y, inverse @ y) - inverse
    slope = lambda dk: 0.5 * np.trace(outer @ dk)
    lengths = np.array([slope(signal * squared[..., j]) for j in range(3)])
    return lengths, slope(2 * signal), slope(2 * 0.2**2 * np.eye(len(x)))


def test_hypergradients_equal_those_of_the_marginal_likelihood(task):
    x, y, *_ = arrays(task)
    lengths, signal, noise = by_hand(x, y)
    assert min(map(abs, (*lengths, signal, noise))) > 1e-2

    problem = model.problem(model.marginal_likelihood)
    estimator = hypergrad.implicit(problem, num_steps=1, solver=hypergrad.dense(), warm_start=False)
    estimate, _ = estimator.estimate(HP, task, estimator.init(jax.random.key(0), HP, task))
    direct = jax.grad(model.closed_form(model.marginal_likelihood))(spaces.to_unconstrained(model.space(3), HP), task)
    for slopes, unit in ((estimate.hypergrad, HP), (direct.coordinates, dict.fromkeys(HP, 1.0))):  # in ln λ
        np.testing.assert_allclose(-20 * slopes["lengthscale"] * unit["lengthscale"], lengths, rtol=1e-7)
        np.testing.assert_allclose(-20 * slopes["signal"] * unit["signal"], signal, rtol=1e-7)
        np.testing.assert_allclose(-20 * slopes["noise"] * unit["noise"], noise, rtol=1e-7)

    variance = 0.2**2 + model.LEAST_VARIANCE
    own = kernels.ConstantKernel(1.3**2) * kernels.RBF(3**0.5 * np.asarray(HP["lengthscale"]))
    own += kernels.WhiteKernel(variance)
    peer = GaussianProcessRegressor(own, alpha=0.0, optimizer=None).fit(x, y)
    value, slopes = peer.log_marginal_likelihood(own.theta, eval_gradient=True)
    np.testing.assert_allclose(-20 * estimate.value, value, rtol=1e-9)
    np.testing.assert_allclose(slopes, [signal / 2, *lengths, noise / (2 * 0.2**2 / variance)], rtol=1e-7)


def test_the_predictive_density_is_that_of_scikit_learn(task):
    x, y, new_x, new_y = arrays(task)
    own = kernels.ConstantKernel(1.3**2) * kernels.RBF(3**0.5 * np.asarray(HP["lengthscale"]))
    own += kernels.WhiteKernel(0.2**2 + model.LEAST_VARIANCE)
    mean, std = GaussianProcessRegressor(own, alpha=0.0, optimizer=None).fit(x, y).predict(new_x, return_std=True)
    expected = (0.5 * ((new_y - mean) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)).mean()
    alpha = model.solve(HP, task.train)
    np.testing.assert_allclose(model.predictive_density(alpha, HP, task), expected, rtol=1e-7)
    np.testing.assert_allclose(model.squared_error(alpha, HP, task), ((new_y - mean) ** 2).mean(), rtol=1e-7)


def test_the_leave_one_out_error_is_that_of_refits(task):
    x, y, *_ = arrays(task)
    scaled = x / (3**0.5 * np.asarray(HP["lengthscale"]))
    ridge = KernelRidge(alpha=(0.2**2 + model.LEAST_VARIANCE) / 1.3**2, kernel="rbf", gamma=0.5)
    errors = []
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        errors.append(y[i] - ridge.fit(scaled[others], y[others]).predict(scaled[i : i + 1])[0])
    own = model.leave_one_out(model.solve(HP, task.train), HP, task)
    np.testing.assert_allclose(own, np.mean(np.square(errors)), rtol=1e-7)


@pytest.mark.parametrize("outer", [model.leave_one_out, model.squared_error, model.predictive_density])
def test_hypergradients_equal_finite_differences(task, outer):
    start = spaces.to_unconstrained(model.space(3), HP)
    value = jax.jit(lambda z: model.closed_form(outer)(z, task))
    own, (leaves, structure) = jax.grad(value)(start).coordinates, jax.tree.flatten(start)
    problem = model.problem(outer)
    estimator = hypergrad.implicit(problem, num_steps=1, solver=hypergrad.dense(), warm_start=False)
    estimate, _ = estimator.estimate(HP, task, estimator.init(jax.random.key(0), HP, task))
    for i, name in enumerate(sorted(HP)):
        for j in np.ndindex(leaves[i].shape):
            moved = [
                structure.unflatten([*leaves[:i], leaves[i].at[j].add(h), *leaves[i + 1 :]]) for h in (1e-5, -1e-5)
            ]
            slope = (value(moved[0]) - value(moved[1])) / 2e-5
            assert abs(slope) > 1e-5
            np.testing.assert_allclose(own[name][j], slope, rtol=1e-5)
            np.testing.assert_allclose(estimate.hypergrad[name][j] * HP[name][j], slope, rtol=1e-5)


def small_pool():
    pool = tables.synthetic(4, 4, 60)
    pool.x[..., 1] = np.round(pool.x[..., 1])
    pool.columns[:] = 1.0
    pool.x[:] += np.random.default_rng(1).normal(size=pool.x.shape)
    return pool


def test_padding_changes_neither_features_nor_losses():
    pool, key = small_pool(), jax.random.key(1)
    tight = tables.described(tables.draw(pool, 1, key, 20, (20, 10)), True)
    wide = pool._replace(x=np.pad(pool.x, [(0, 0), (0, 0), (0, 3)]), columns=np.pad(pool.columns, [(0, 0), (0, 3)]))
    loose = tables.described(tables.draw(wide, 1, key, 20, (30, 10)), True)
    np.testing.assert_allclose(loose.features["table"], tight.features["table"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(loose.features["columns"][:4], tight.features["columns"], rtol=1e-6, atol=1e-9)
    hp = {"lengthscale": jnp.array([0.4, 1.0, 2.5, 1.0]), "signal": HP["signal"], "noise": HP["noise"]}
    hp_wide = {**hp, "lengthscale": jnp.pad(hp["lengthscale"], (0, 3), constant_values=0.1)}
    for outer in (model.marginal_likelihood, model.leave_one_out, model.squared_error, model.predictive_density):
        own = outer(model.solve(hp, tight.train), hp, tight)
        np.testing.assert_allclose(outer(model.solve(hp_wide, loose.train), hp_wide, loose), own, rtol=1e-9)


def test_g_follows_the_columns_and_sees_no_test_row():
    pool, order = small_pool(), np.array([2, 0, 3, 1])
    settings = learning.SMOKE._replace(width=4, steps=3)
    bank = learning.draw_bank(pool, settings)
    trained = learning.learn(bank, model.predictive_density, settings, 0)

    def coordinates(pool):
        task = tables.described(tables.draw(pool, 2, jax.random.key(3), 20, (20, 10)), True)
        return task, learning.coordinates_of(trained, task, settings).coordinates

    task, z = coordinates(pool)
    _, permuted = coordinates(pool._replace(x=pool.x[..., order]))
    np.testing.assert_allclose(permuted["lengthscale"], z["lengthscale"][order], rtol=1e-6)
    np.testing.assert_allclose([permuted["signal"], permuted["noise"]], [z["signal"], z["noise"]], rtol=1e-6)
    assert np.ptp(z["lengthscale"]) > 1e-4  # columns differ
    test_rows = ~np.isin(np.arange(60), rows_of(pool, 2, jax.random.key(3), 20))
    pool.x[2, test_rows], pool.y[2, test_rows] = -7.0, 9.0
    changed, moved = coordinates(pool)
    assert not np.allclose(changed.valid["y"], task.valid["y"])
    np.testing.assert_array_equal(moved["lengthscale"], z["lengthscale"])
    constant = learning.coordinates_of(trained, task, settings, constant=True).coordinates
    assert np.ptp(constant["lengthscale"]) == 0


def test_differences_to_g_and_to_one_hyperparameter_by_hand():
    losses = {"g": [1.0, 2.0], "one λ": [1.5, 2.5], "default": [3.0, 3.0]}
    run = {f"30/{name}": np.stack([own, np.zeros(2)], axis=1) for name, own in losses.items()} | {"one λ": np.ones(3)}
    lines = report.table([run], "Gaussian process", 30, 20, np.array(["a", "b"])).splitlines()
    cells = {name: rest for name, *rest in (line.strip("| ").split(" | ") for line in lines)}
    assert cells["one λ"][1].startswith("+0.500 [+0.500, +0.500]") and cells["one λ"][3] == "100%"
    assert cells["default"][4] == "+1.000 [+0.500, +1.500]" and cells["g"][4] == "-0.500 [-0.500, -0.500]"


def rows_of(pool, index, key, num):
    """The rows of the table that are training rows of the task."""
    return np.asarray(jnp.argsort(jax.random.uniform(key, pool.y[index].shape)))[:num]


def test_targets_of_the_corpus_are_not_among_the_columns():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100))
    frame = make_frame("p", "t", pd.DataFrame({"a": a, "b": b, "c": 3 * a + 1, "k": pd.Categorical(["u", "v"] * 50)}))
    made = tables.rotated(frame, 8, rng)
    assert len(made) == 3
    for x, y in made:
        correlations = [abs(np.corrcoef(column, y)[0, 1]) for column in x.T]
        assert max(correlations) < 0.5 and x.shape[1] >= 2


def test_rows_of_a_split_are_different():
    pool = small_pool()
    pool.y[0] = np.arange(60)
    task = tables.draw(pool, 0, jax.random.key(0), 20, (25, 15))
    used = np.concatenate([np.asarray(task.train["y"])[:20], np.asarray(task.valid["y"])])
    assert len(np.unique(np.round(used, 6))) == 35 and task.train["mask"].sum() == 20
    np.testing.assert_allclose(np.asarray(task.train["y"])[:20].std(), 1.0, rtol=1e-6)


def test_features_are_scaled_over_real_columns():
    described = {"columns": jnp.arange(12.0).reshape(2, 3, 2), "table": jnp.array([[1.0], [3.0]])}
    columns = jnp.array([[1.0, 0, 0], [1.0, 1, 0]])
    scaled = features.fit_scaling(described, columns)(described)
    real = np.asarray(scaled["columns"])[np.asarray(columns) > 0]
    np.testing.assert_allclose([real.mean(0), real.std(0)], [[0, 0], [1, 1]], atol=1e-3)
    np.testing.assert_allclose(scaled["table"].ravel(), [-1, 1], rtol=2e-3)

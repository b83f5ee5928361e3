"""The Gaussian process of the AutoML estimators against scikit-learn's."""

import numpy as np
import pytest
from sklearn import gaussian_process

import metaopt
from metaopt import automl
from metaopt.automl import _kinds

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3)).astype(np.float32)
Y = np.sin(2 * X[:, 0]) + 0.3 * X[:, 1] + 0.4 * X[:, 2] ** 2 + 0.1 * RNG.normal(size=120)


def _fold(x, y, weight):
    views = _kinds.Views(x, x, x)
    return _kinds.FoldData(views, y, weight, views, y, weight, np.zeros(3, bool), 0, 0, stops=True)


def test_it_is_scikit_learns_process_with_the_largest_marginal_likelihood():
    model, predicted, *_ = _kinds.fit_fold("gaussian_process", {}, _fold(X, Y, np.ones(120)))
    kernels = gaussian_process.kernels
    smooth = kernels.ConstantKernel() * kernels.Matern(np.full(3, 3**0.5), (1e-2, 1e4), nu=2.5)
    other = gaussian_process.GaussianProcessRegressor(smooth + kernels.WhiteKernel(0.1)).fit(X.astype(float), Y)
    np.testing.assert_allclose(predicted, other.predict(X.astype(float)), atol=2e-3)
    np.testing.assert_allclose(model["scales"], other.kernel_.k1.k2.length_scale, rtol=0.02)


def test_a_row_of_weight_three_is_three_rows():
    weight = np.where(np.arange(120) < 40, 3.0, 1.0)
    model, predicted, *_ = _kinds.fit_fold("gaussian_process", {}, _fold(X, Y, weight))
    kernels = gaussian_process.kernels
    kernel = kernels.Matern(model["scales"], nu=2.5)
    order = np.random.default_rng(0).permutation(120)
    np.testing.assert_array_equal(model["x"], X[order])
    # (K + σ² / w) c = y gives σ², in units of the amplitude; three equal rows with noise σ² then predict the same.
    one, noise = np.linalg.lstsq(
        np.stack([kernel(X[order]) @ model["coefficients"], model["coefficients"] / weight[order]], axis=1), Y[order]
    )[0]
    rows = np.repeat(np.arange(120), weight.astype(int))
    solved = np.linalg.solve(kernel(X[rows]) + noise * np.eye(len(rows)), Y[rows])
    assert one == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(kernel(X, X[rows]) @ solved, predicted, rtol=1e-6)


def test_a_saved_regressor_predicts_the_same_and_a_classifier_has_no_such_model(tmp_path):
    options = {"models": "gaussian_process", "preset": "instant", "n_jobs": 1, "verbose": False, "time_limit": None}
    model = automl.AutoRegressor(**options).fit(X, Y)
    assert model.score(X, Y) > 0.9
    metaopt.save(tmp_path / "model.npz", model)
    np.testing.assert_allclose(metaopt.load(tmp_path / "model.npz").predict(X), model.predict(X), rtol=1e-12)
    with pytest.raises(ValueError, match=r"`models` must be among network, linear, .*; got gaussian_process"):
        automl.AutoClassifier(**options).fit(X, Y > 0)

"""CatBoost as a member of the AutoML estimators, where it is installed."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl
from metaopt.automl import _kinds, _portfolio

INSTALLED = importlib.util.find_spec("catboost") is not None
OPTIONS = {"time_limit": None, "models": "catboost", "preset": "instant", "n_jobs": 1, "verbose": False}


def _table(num_rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Twelve levels without an order, some of them missing, and a number; the level decides about the target."""
    rng = np.random.default_rng(0)
    level, number = rng.integers(0, 12, num_rows), rng.normal(size=num_rows)
    text = np.array(["k", "c", "x", "a", "m", "z", "b", "q", "f", "e", "w", "d"])[level].astype(object)
    text[rng.random(num_rows) < 0.05] = None
    return pd.DataFrame({"text": text, "number": number}), 3.0 * (level % 3) + 0.1 * number


@pytest.mark.skipif(not INSTALLED, reason="catboost is not installed")
@pytest.mark.parametrize("num_classes", [0, 2, 3])
def test_categories_are_learned_and_a_saved_model_predicts_the_same(tmp_path, num_classes):
    frame, y = _table(700)
    if num_classes:
        y = np.minimum(np.round(y / 3).astype(int), num_classes - 1)
    kind = automl.AutoClassifier if num_classes else automl.AutoRegressor
    model = kind(**OPTIONS).fit(frame[:500], y[:500])
    assert model.score(frame[500:], y[500:]) > 0.9
    new = pd.DataFrame({"text": ["k", "never seen", None], "number": [0.0, 1.0, np.nan]})
    predicted = model.predict_proba(new) if num_classes else model.predict(new)
    assert predicted.shape == ((3, num_classes) if num_classes else (3,)) and np.isfinite(predicted).all()
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    np.testing.assert_allclose(loaded.predict_proba(new) if num_classes else loaded.predict(new), predicted, rtol=1e-12)


def test_the_portfolio_has_it_only_where_it_is_installed():
    names = [member.name for member in _portfolio.portfolio("regression", "balanced", None, 500)]
    assert ("catboost" in names) == INSTALLED


@pytest.mark.skipif(INSTALLED, reason="catboost is installed")
def test_the_error_without_it_names_the_extra():
    with pytest.raises(ImportError, match=r"metaopt-jax\[catboost\]"):
        automl.AutoClassifier(**OPTIONS).fit(np.eye(20), np.arange(20) % 2)


@pytest.mark.skipif(not INSTALLED, reason="catboost is not installed")
@pytest.mark.parametrize("num_classes", [0, 2, 3])
def test_the_arrays_predict_as_catboost_does(monkeypatch, num_classes):
    import catboost

    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 4))
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 3] = 2.0  # a constant column, which it ignores
    y = np.nan_to_num(x[:, 0]) + np.isnan(x[:, 1])
    y = np.digitize(y, [0.0, 1.0][: num_classes - 1]) if num_classes else y
    fitted = []
    fit = catboost.CatBoost.fit
    # `fit_fold` returns only arrays; the model of CatBoost is needed for the expected predictions.
    monkeypatch.setattr(
        catboost.CatBoost, "fit", lambda self, *args, **options: fitted.append(fit(self, *args, **options))
    )
    views = _kinds.Views(x, x, x.astype(np.float32))
    fold = _kinds.FoldData(views, y, np.ones(300), views, y, np.ones(300), np.zeros(4, bool), num_classes, 0, True)
    settings = {"num_rounds": 30, "patience": 5, "learning_rate": 0.3, "depth": 4, "min_data_in_leaf": 1}
    model, predicted, *_ = _kinds.fit_fold("catboost", settings, fold)
    kind = "Probability" if num_classes else "RawFormulaVal"
    np.testing.assert_allclose(predicted, fitted[0].predict(x, prediction_type=kind), rtol=1e-6, atol=1e-9)
    borders = np.unique(model["borders"][(model["columns"] == 0) & np.isfinite(model["borders"])])
    new = np.resize(x, (len(borders), 4))
    new[:, 0] = borders  # a value at a border is not above it
    views = _kinds.Views(new, new, new)
    expected = fitted[0].predict(new, prediction_type=kind)
    np.testing.assert_allclose(_kinds.predict("catboost", model, views, num_classes), expected, rtol=1e-6, atol=1e-9)

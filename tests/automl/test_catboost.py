"""CatBoost is a model if it is installed. It is not in the extra: most of these tests are skipped without it."""

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl
from metaopt.automl import _kinds, _portfolio, _schedule

QUICK = {"time_limit": None, "models": "catboost", "preset": "instant", "n_jobs": 1, "verbose": False}


def test_it_takes_part_if_it_is_installed(monkeypatch):
    monkeypatch.setattr(_portfolio, "_installed", lambda kind: kind != "xgboost")
    kinds = {member.kind for member in _portfolio.portfolio("regression", "balanced", None, 200)}
    assert "catboost" in kinds and "xgboost" not in kinds
    monkeypatch.setattr(_portfolio, "_installed", lambda kind: kind != "catboost")
    assert "catboost" not in {member.kind for member in _portfolio.portfolio("regression", "best", None, 200)}
    with pytest.raises(ImportError, match="pip install catboost"):
        _portfolio.portfolio("classification", "best", "catboost", 200)


def _table(num_rows=600):
    """Three classes that depend on a number and a category, with gaps in both."""
    rng = np.random.default_rng(0)
    level, x = rng.integers(0, 6, num_rows), rng.normal(size=num_rows)
    y = (x + np.array([-2, 2, -2, 2, -2, 2])[level] > 0) + (level == 5).astype(int)
    gap = rng.random(num_rows) < 0.05
    names = np.array(["a", "b", "c", "d", "e", "f"], object)[level]
    return pd.DataFrame({"x": np.where(gap, np.nan, x), "level": np.where(gap[::-1], None, names)}), y


@pytest.mark.parametrize("num_classes", [0, 2, 3])
def test_it_learns_categories_and_is_saved(num_classes, tmp_path, monkeypatch):
    pytest.importorskip("catboost")
    monkeypatch.setitem(_portfolio._STOP, "num_rounds", 60)
    x, y = _table()
    kind = automl.AutoClassifier if num_classes else automl.AutoRegressor
    model = kind(**QUICK).fit(x[:400], y[:400] if num_classes != 2 else y[:400] > 0)
    assert not model.ensemble_.failed
    assert model.score(x[400:], y[400:] if num_classes != 2 else y[400:] > 0) > 0.8
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    again = kind(**QUICK).fit(x[:400], y[:400] if num_classes != 2 else y[:400] > 0)
    np.testing.assert_array_equal(again.predict(x), model.predict(x))


def test_the_other_folds_choose_the_number_of_rounds():
    pytest.importorskip("catboost")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4))
    y = (x[:, 0] + rng.normal(size=400) > 0).astype(int)
    settings = {"num_rounds": 200, "patience": 20, "learning_rate": 0.1}
    folds = []
    for i in range(3):
        part = np.arange(i, 400, 3)
        views, valid = (_kinds.Views(rows, rows, rows) for rows in (np.delete(x, part, 0), x[part]))
        ones = np.ones(400 - len(part)), np.ones(len(part))
        numeric = np.zeros(4, bool)
        folds.append(
            _kinds.FoldData(views, np.delete(y, part), ones[0], valid, y[part], ones[1], numeric, 2, 0, stops=True)
        )
    models = [_kinds.fit_fold("catboost", settings, fold)[0] for fold in folds]
    best = [_kinds.KINDS["catboost"].best_rounds(model) for model in models]
    assert [model.tree_count_ for model in models] == [number + 20 for number in best] and min(best) > 0
    settled = [model.tree_count_ for model, _ in _kinds.settled("catboost", models, folds)]
    assert settled == [min(round((sum(best) - b) / 2), b + 20) for b in best]
    fixed = _kinds.fit_fold("catboost", settings, folds[0]._replace(stops=False))[0]
    assert fixed.tree_count_ == 150 and _kinds.KINDS["catboost"].best_rounds(fixed) == 0


def test_it_comes_back_from_a_worker(monkeypatch):
    pytest.importorskip("catboost")
    x, y = _table()
    one = automl.AutoClassifier(**QUICK).fit(x, y)
    monkeypatch.setattr(_schedule, "_SERIAL_SECONDS", 0)
    monkeypatch.setattr(_schedule, "_QUICK_SECONDS", 0)
    two = automl.AutoClassifier(**QUICK | {"n_jobs": 2}).fit(x, y)
    np.testing.assert_array_equal(one.predict_proba(x), two.predict_proba(x))

"""A model that was saved on Python 3.11 loads on any Python that metaopt supports, and predicts the same.

`python tests/automl/test_other_python.py` writes the files anew, on Python 3.11 with the extras `automl` and
`catboost`. It is necessary if the format of the files changes, or if a library cannot read its older formats.
"""

import pathlib
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl
from metaopt.automl import _ensemble, _estimators, _portfolio

FOLDER = pathlib.Path(__file__).parent / "saved"
KINDS = {
    "network",
    "linear",
    "extra_trees",
    "random_forest",
    "hist_gradient_boosting",
    "lightgbm",
    "xgboost",
    "catboost",
}


def _predict(model, frame):
    return model.predict_proba(frame) if hasattr(model, "predict_proba") else model.predict(frame)


@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_a_model_of_each_kind_from_python_3_11_predicts_the_same(problem):
    with np.load(FOLDER / f"{problem}_predictions.npz", allow_pickle=False) as file:
        frame = pd.DataFrame({"number": file["number"], "text": file["text"], "gaps": file["gaps"]})
        expected, version = file["predicted"], str(file["python"])
    assert version.startswith("3.11.")
    model = metaopt.load(FOLDER / f"{problem}.npz")
    kinds = KINDS | ({"gaussian_process"} if problem == "regression" else set())
    assert {member.member.kind for member in model.ensemble_.members if member.models and member.weight} == kinds
    np.testing.assert_allclose(_predict(model, frame), expected, rtol=1e-5, atol=1e-7)


def _small_portfolio(problem, preset, kinds, num_rows):
    """The first model of each kind, with three trees or rounds."""
    first = {member.kind: member for member in reversed(_portfolio.portfolio(problem, preset, kinds, num_rows))}
    sizes = {"extra_trees": "n_estimators", "random_forest": "n_estimators", "hist_gradient_boosting": "max_iter"}
    sizes |= dict.fromkeys(("lightgbm", "xgboost", "catboost"), "num_rounds")
    return [
        m._replace(settings={**m.settings, **({sizes[m.kind]: 3} if m.kind in sizes else {})}) for m in first.values()
    ]


def _write(problem):
    rng = np.random.default_rng(0)
    gaps = np.where(rng.random(60) < 0.2, np.nan, rng.normal(size=60))
    text = rng.choice(["a", "b", "c"], 60)
    frame = pd.DataFrame({"number": rng.normal(size=60), "text": text, "gaps": gaps})
    y = frame["number"] + (frame["text"] == "b") + frame["gaps"].fillna(0.5)
    if problem == "classification":
        kind, kinds, y = automl.AutoClassifier, KINDS, np.where(y > 0.5, "high", "low")
    else:
        kind, kinds = automl.AutoRegressor, KINDS | {"gaussian_process"}
    equal = lambda predictions, *args: np.full(len(predictions), 1 / len(predictions))
    with (
        mock.patch.object(_estimators, "portfolio", _small_portfolio),
        mock.patch.object(_ensemble, "greedy_weights", equal),
    ):
        model = kind(models=tuple(sorted(kinds)), preset="balanced", time_limit=None, n_jobs=1).fit(frame, y)
    new = pd.DataFrame({"number": rng.normal(size=9), "text": list("abcabcabz"), "gaps": [np.nan, *rng.normal(size=8)]})
    metaopt.save(FOLDER / f"{problem}.npz", model)
    columns = {name: new[name].to_numpy(str if name == "text" else float) for name in new}
    python = sys.version.split()[0]
    np.savez(FOLDER / f"{problem}_predictions.npz", predicted=_predict(model, new), python=python, **columns)


if __name__ == "__main__":
    for name in ("classification", "regression"):
        _write(name)

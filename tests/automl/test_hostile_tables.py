"""Malformed and odd tables: each gives a fitted model or a clear error.

METAOPT_HOSTILE_TABLES is the number of tables (60). METAOPT_HOSTILE_SECONDS fits all models within such a limit.
"""

import datetime
import decimal
import os
import re

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl

NUM_TABLES, FEW_TABLES = int(os.environ.get("METAOPT_HOSTILE_TABLES", "60")), 20
OPTIONS = {"models": ("linear",), "time_limit": 20, "n_jobs": 1, "verbose": False}
if "METAOPT_HOSTILE_SECONDS" in os.environ:
    OPTIONS |= {"models": None, "time_limit": float(os.environ["METAOPT_HOSTILE_SECONDS"]), "n_jobs": 2}

ODD = (None, np.nan, pd.NaT, "", "?", "none", "1,065", "31/12/2020", "ünï", "\0", 2**70, -(2**53) - 1, 1e300, -0.0)
ODD += (np.inf, True, 3, 0.1, "x" * 5000, b"bytes", decimal.Decimal("1.5"), datetime.date(2020, 1, 1), [1], {"a": 1})


def _column(rng, n):
    makers = (
        lambda: rng.normal(size=n),
        lambda: rng.normal(size=n) * 10.0 ** rng.integers(-300, 300),
        lambda: rng.integers(0, 3, n),
        lambda: rng.integers(-(2**62), 2**62, n),
        lambda: np.arange(n),
        lambda: np.zeros(n),
        lambda: np.full(n, np.nan),
        lambda: np.where(rng.random(n) < 0.9, np.nan, 1.0),
        lambda: rng.choice(["a", "b", "c"], n),
        lambda: [f"id{i}" for i in range(n)],
        lambda: pd.Categorical(rng.choice(["u", "v"], n), categories=["v", "u", "never"]),
        lambda: pd.date_range("1900-01-01", periods=n, freq="37D"),
        lambda: pd.array(rng.choice([1, 2, None], n), dtype="Int64"),
        lambda: rng.random(n) < 0.5,
        lambda: [ODD[i] for i in rng.integers(0, len(ODD), n)],
        lambda: [f"{x:,}" for x in rng.integers(0, 10**7, n)],
        lambda: pd.to_timedelta(rng.integers(0, 10**6, n), unit="s"),
    )
    values = makers[rng.integers(len(makers))]()
    if rng.random() < 0.2:  # some values of other types
        values = [ODD[rng.integers(len(ODD))] if rng.random() < 0.1 else value for value in list(values)]
    return pd.Series(values, dtype=object if isinstance(values, list) else None)


def _target(rng, n, is_class):
    makers = (
        lambda: rng.choice(["yes", "no"], n),
        lambda: rng.integers(0, 5, n),
        lambda: rng.choice([1.0, 2.0], n, p=[0.95, 0.05]),
        lambda: np.where(np.arange(n) == 0, "rare", "common"),
        lambda: [f"class {i // 2}" for i in range(n)],
        lambda: np.ones(n),
        lambda: rng.choice(["none", "NA", ""], n),
    )
    numbers = (
        lambda: rng.normal(size=n),
        lambda: rng.lognormal(0, 20, size=n),
        lambda: np.full(n, 7.0),
        lambda: rng.integers(0, 2, n) * 1e200,
        lambda: np.where(np.arange(n) == 0, np.nan, 1.0),
        lambda: np.where(np.arange(n) == 0, np.inf, rng.normal(size=n)),
    )
    chosen = makers if is_class else numbers
    return pd.Series(chosen[rng.integers(len(chosen))]())


def _table(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 5, 12, 40, 150], p=[0.04, 0.06, 0.1, 0.1, 0.2, 0.25, 0.25]))
    d = int(rng.choice([0, 1, 2, 5, 12], p=[0.04, 0.21, 0.25, 0.25, 0.25]))
    is_class = bool(rng.random() < 0.6)
    frame = pd.DataFrame({f"c{j}": _column(rng, n) for j in range(d)}, index=range(n))
    if rng.random() < 0.1 and d > 1:
        frame.columns = ["same"] * d
    if rng.random() < 0.1 and n > 1:
        frame = pd.concat([frame] * 2, ignore_index=True).iloc[:n]
    return frame, _target(rng, n, is_class), is_class


# Other errors would mean that a table is rejected that could be fitted.
REASONS = "has one class|at least 2 classes|contains NaN|n_samples = 1 row|0 feature|class.* has one row|unique column"


@pytest.mark.once
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seed", [pytest.param(k, marks=pytest.mark.slow) if k >= FEW_TABLES else k for k in range(NUM_TABLES)]
)
def test_a_table_gives_a_model_or_a_clear_error(seed, tmp_path):
    frame, y, is_class = _table(seed)
    kind = automl.AutoClassifier if is_class else automl.AutoRegressor
    model = kind(**OPTIONS)
    try:
        model.fit(frame, y)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert 15 < len(text) < 1000 and re.search(REASONS, text)
        return
    predict = lambda model, rows: model.predict_proba(rows) if is_class else model.predict(rows)
    predicted = predict(model, frame)
    assert len(predicted) == len(frame) and np.isfinite(predicted).all()
    # A row does not depend on the other rows, and so neither on their types in the frame.
    tolerance = 1e-5 if OPTIONS["models"] else 1e-4  # inputs of linear models and networks are float32
    close = {"rtol": tolerance, "atol": tolerance * np.abs(predicted).max()}
    np.testing.assert_allclose(predict(model, frame.iloc[::-1]), predicted[::-1], **close)
    np.testing.assert_allclose(predict(model, frame.iloc[[0]]), predicted[[0]], **close)
    if is_class:
        assert set(model.classes_) == set(y)
        np.testing.assert_array_equal(model.predict(frame), model.classes_[predicted.argmax(axis=1)])
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
    else:
        assert min(y) - 9 * np.ptp(y) <= predicted.min() and predicted.max() <= max(y) + 9 * np.ptp(y)
    # Every column is used, or the report says that it was dropped.
    encoder = model.encoder_
    dropped = model.report_.loc[model.report_["action"] == "dropped", "column"]
    assert {code.name for code in encoder.columns} | set(dropped) == set(encoder.input_names)
    assert not {code.name for code in encoder.columns} & set(dropped)
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(predict(loaded, frame), predicted)
    np.testing.assert_array_equal(loaded.predict(frame), model.predict(frame))
    assert loaded.predict(frame).dtype == model.predict(frame).dtype

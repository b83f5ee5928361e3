"""The estimators for tables with frames of polars: the same as with those of pandas."""

import datetime
import decimal

import numpy as np
import polars as pl
import pytest

import metaopt
from metaopt import automl

QUICK = {"time_limit": None, "models": ("linear", "lightgbm"), "n_jobs": 1, "verbose": False}
NUM_ROWS = 160
RNG = np.random.default_rng(0)
NUMBERS, WORDS = RNG.normal(size=NUM_ROWS), RNG.choice(["red", "green", "blue"], NUM_ROWS)
DAYS = RNG.integers(0, 300, NUM_ROWS).tolist()
GROUPS = pl.Series("customer", RNG.integers(0, 20, NUM_ROWS))
LABELS = pl.Series("sold", np.where(NUMBERS + (WORDS == "red") > 0, "yes", "no"))


@pytest.fixture(scope="module")
def frame():
    """Columns of ten types of polars, some of them with gaps."""
    shuffled = RNG.permutation(WORDS).tolist()
    return pl.DataFrame(
        {
            "number": [None if i % 9 == 0 else v for i, v in enumerate(NUMBERS.tolist())],
            "integer": pl.Series([None if i % 7 == 0 else int(10 * v) for i, v in enumerate(NUMBERS)]),
            "word": [None if i % 11 == 0 else v for i, v in enumerate(WORDS.tolist())],
            "category": pl.Series(shuffled, dtype=pl.Categorical),
            "enum": pl.Series(RNG.permutation(WORDS).tolist(), dtype=pl.Enum(["red", "green", "blue"])),
            "flag": pl.Series((NUMBERS > 0.3) ^ (RNG.random(NUM_ROWS) < 0.2)),
            "day": [datetime.date(2020, 1, 1) + datetime.timedelta(days=k) for k in DAYS],
            "hour": [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=7 * k) for k in DAYS[::-1]],
            "price": [decimal.Decimal(int(100 * v)) / 100 for v in RNG.normal(size=NUM_ROWS)],
            "empty": pl.Series([None] * NUM_ROWS),
        }
    )


@pytest.fixture(scope="module")
def same(frame):
    """The same rows as a frame of pandas. An `Enum` becomes text, since only pandas' order of categories is used."""
    return frame.with_columns(pl.col("enum").cast(pl.String)).to_pandas()


@pytest.fixture(scope="module")
def model(frame):
    return automl.AutoClassifier(**QUICK).fit(frame, LABELS)


def test_a_frame_of_polars_is_fitted_and_predicted_as_one_of_pandas(frame, same, model):
    other = automl.AutoClassifier(**QUICK).fit(same, LABELS.to_pandas())
    predicted = model.predict_proba(frame)
    np.testing.assert_array_equal(predicted, other.predict_proba(same))
    np.testing.assert_array_equal(predicted, model.predict_proba(same))
    np.testing.assert_array_equal(predicted, model.predict_proba(frame.lazy()))
    assert list(model.feature_names_in_) == frame.columns and list(model.classes_) == ["no", "yes"]
    assert list(model.report_["column"]) == list(other.report_["column"]) and "empty" in set(model.report_["column"])
    assert (model.predict(frame) == LABELS.to_numpy()).mean() > 0.9


def test_a_lazy_frame_is_fitted_as_its_rows(frame, model):
    lazy = automl.AutoClassifier(**QUICK).fit(frame.lazy(), LABELS)
    np.testing.assert_array_equal(lazy.predict_proba(frame), model.predict_proba(frame))


def test_a_saved_model_predicts_a_frame_of_polars(frame, model, tmp_path):
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    np.testing.assert_allclose(loaded.predict_proba(frame), model.predict_proba(frame), atol=1e-6)


def test_sets_scores_and_importances_of_a_frame_of_polars(frame, same, model):
    np.testing.assert_array_equal(model.predict_set(frame), model.predict_set(same))
    for X in (frame, frame.lazy()):
        assert model.evaluate(X, LABELS).equals(model.evaluate(same, LABELS.to_numpy()))
        importance, expected = (model.importance(x, LABELS, n_repeats=1) for x in (X, same))
        np.testing.assert_allclose(importance["mean"], expected["mean"])
        assert list(importance["column"]) == list(expected["column"])


@pytest.mark.parametrize(
    "values",
    [{"groups": GROUPS}, {"time": "day"}, {"groups": "category"}, {"sample_weight": pl.Series(RNG.random(NUM_ROWS))}],
    ids=lambda values: "-".join(map(str, values)),
)
def test_groups_times_and_weights_of_polars(frame, same, values):
    options = QUICK | {"models": ("linear",)}
    own = automl.AutoClassifier(**options).fit(frame, LABELS, **values)
    converted = {name: value if isinstance(value, str) else value.to_numpy() for name, value in values.items()}
    other = automl.AutoClassifier(**options).fit(same, LABELS.to_numpy(), **converted)
    plain = automl.AutoClassifier(**options).fit(frame, LABELS)
    assert own.score_ == other.score_ != plain.score_


def test_numbers_and_clusters_of_a_frame_of_polars(frame, same):
    columns, target = ["word", "flag", "hour"], pl.Series(NUMBERS)
    model = automl.AutoRegressor(**QUICK).fit(frame[columns], target)
    for predict in (model.predict, model.predict_interval):
        np.testing.assert_array_equal(predict(frame[columns]), predict(same[columns]))
    labels = [automl.AutoClusterer(random_state=0).fit(X[["number", "flag"]]).labels_ for X in (frame, same)]
    np.testing.assert_array_equal(*labels)


def test_wrong_frames_of_polars(frame, model):
    with pytest.raises(ValueError, match="now missing:\n- word"):
        model.predict(frame.drop("word"))
    with pytest.raises(ValueError, match="1 of 160 rows have no target"):
        automl.AutoClassifier(**QUICK).fit(frame, pl.Series([*LABELS[:3], None, *LABELS[4:]]))
    with pytest.raises(ValueError, match="customer.*has the columns number, integer"):
        automl.AutoClassifier(**QUICK).fit(frame, LABELS, groups="customer")

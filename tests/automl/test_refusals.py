"""What `automl` rejects before it trains."""

import re

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl, tasks

QUICK = {"time_limit": None, "models": ("linear",), "preset": "instant", "n_jobs": 1, "verbose": False}


def fit(options=None, **data):
    arguments = {"X": np.arange(8.0).reshape(4, 2), "y": [0, 1, 0, 1]} | data
    return automl.AutoClassifier(**QUICK | (options or {})).fit(**arguments)


def fit_numbers(y):
    return automl.AutoRegressor(**QUICK).fit(np.zeros((40, 1)), y)


def predict_frame_without_encoder():
    table = tasks.prepare(tasks.Table("t", "t", np.arange(40.0).reshape(20, 2), np.arange(20) % 2, np.zeros(2, bool)))
    model = automl.TabularModel({}, {}, None, table.columns, table.classes)
    model.predict({"b": [1.0], "a": [2.0]})


REFUSALS = [
    (predict_frame_without_encoder, "The model has no `encoder`, so it cannot encode the frame"),
    (lambda: fit({"preset": "large"}), "`preset` must be one of instant, balanced, best; got 'large'"),
    (lambda: fit({"eval_metric": "rmse"}), "`eval_metric` must be one of log_loss"),
    (lambda: fit({"models": ("svm",)}), "`models` must be among network, linear"),
    (lambda: fit({"time_limit": 0}), "`time_limit` must be positive or None; got 0"),
    (lambda: fit(groups=[1, 2]), "`groups` must have one value for each of the 4 rows"),
    (lambda: fit(groups=[[1, 2]]), r"`groups` must have one value for each of the 4 rows; got the shape \(1, 2\)"),
    (lambda: fit(groups="clinic"), "`groups` must have .* or be the name of a column of the frame X; got 'clinic'"),
    (lambda: fit(X=pd.DataFrame({"a": range(4)}), time="day"), "`time` must .*'day', and X has the columns a"),
    (lambda: fit(y="kind"), r"must be the values of the target, and not its name: `y = frame.pop\('kind'\)`"),
    (lambda: fit(y=["a", "b", "c", "d"]), "No row can be validated: each of the 4 classes has one row only"),
    (lambda: fit(y=["a"] * 4), "one class, 'a'"),
    (lambda: fit(y=["a", "b", None, "a"]), "1 of 4 rows have no target"),
    (lambda: fit(sample_weight=[0, 0, 0, 0]), "at least one non-zero"),
    (lambda: fit_numbers(pd.date_range("2020", periods=40)), "must be numbers; got datetime64"),
    (lambda: metaopt.save("never.npz", automl.AutoClassifier()), "not fitted"),
    (
        lambda: automl.predict_hyperparams(np.zeros((30, 2)), np.arange(29) % 2),
        "one label for each of the 30 rows; got 29",
    ),
    (
        lambda: automl.predict_hyperparams({"a": range(30), "y": np.arange(30) / 7}, "y"),
        "Unknown label type: continuous",
    ),
    (lambda: automl.predict_hyperparams([{"a": 1, "y": 0}], "z"), "the column 'z'; there are a, y"),
    (lambda: automl.shipped_predictor("ranking"), "`problem` must be one of classification, regression; got 'ranking'"),
    (lambda: automl.predict_hyperparams((np.zeros((30, 0)), np.arange(30) % 2, np.zeros(0, bool))), "column"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_of_one_row_each_are_reported(caplog):
    X = pd.DataFrame({"a": np.random.default_rng(0).normal(size=40)})
    for groups in (np.arange(40) // 2, np.arange(40)):
        automl.AutoRegressor(**QUICK).fit(X, X["a"], groups=groups)
    (message,) = caplog.messages
    assert message.startswith("`groups` has a different value in each row, so no rows stay together.")


def test_targets_in_another_order_than_the_rows_are_reported(caplog):
    rng = np.random.default_rng(0)
    X, labels = pd.DataFrame({"a": rng.normal(size=40)}), rng.permutation(40)
    y = 2 * X["a"]
    pairs = y.set_axis(pd.MultiIndex.from_product([range(8), range(5)]))  # as of `groupby` by two columns
    for other in (y, y.to_numpy()[labels], y.iloc[labels].reset_index(drop=True), y.set_axis(X.index + 1), pairs):
        automl.AutoRegressor(**QUICK).fit(X, other)
    assert caplog.messages == []
    model = automl.AutoRegressor(**QUICK).fit(X, y.iloc[labels], groups=pd.Series(labels % 9, labels))
    assert [message.split(". Row k")[0] for message in caplog.messages] == [
        f"The index of `{argument}` has the labels of X in another order" for argument in ("y", "groups")
    ]
    caplog.clear()
    assert automl.AutoRegressor(**QUICK).fit(X, y.iloc[labels].loc[X.index]).score_ > -0.7 > model.score_
    assert caplog.messages == []


def test_the_error_of_a_text_target_shows_how_amounts_become_numbers():
    with pytest.raises(ValueError, match="The target must be numbers") as error:
        fit_numbers(["1.234,50 €"] * 40)
    point, comma = re.findall("`(y.*?)`", str(error.value))
    for recipe, texts in ((point, ["$1,234.50", "-$3"]), (comma, ["1.234,50 €", "-3 €"])):
        assert eval(recipe, {"y": pd.Series(texts)}).tolist() == [1234.5, -3]


def test_a_table_without_a_usable_column_is_reported(caplog):
    X = pd.DataFrame({"size;color": [f"{i};red" for i in range(40)]})
    model = automl.AutoRegressor(**QUICK).fit(X, np.arange(40.0))
    assert len(set(model.predict(X))) == 1
    assert (
        "No column can be used as a feature, so all predictions are equal. The columns are 'size;color'" in caplog.text
    )


def test_messages_about_times_have_the_name_of_their_column(caplog):
    days = [f"{1 + i % 12:02d}/{1 + i // 12:02d}/2020" for i in range(48)]
    X = pd.DataFrame({"a": np.arange(48.0) ** 1.5, "Datum": days})
    automl.AutoRegressor(**QUICK).fit(X, X["a"], time="Datum")
    (message,) = [message for message in caplog.messages if "ambiguous" in message]
    assert message.startswith("the column 'Datum' is changed: it is text that holds dates, read as month-day-year")


@pytest.mark.parametrize(
    ("labels", "num_warnings"), [(["a", "b "], 0), (["a", "a "], 1), (["Yes", "yes"], 1), ([0, 1], 0)]
)
def test_labels_that_differ_only_in_spaces_or_capitals_are_warned_of(labels, num_warnings, caplog):
    fit(X=np.arange(40.0).reshape(20, 2), y=np.array(labels * 10))
    assert sum("differ only in spaces or capitals" in record.message for record in caplog.records) == num_warnings

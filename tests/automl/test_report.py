"""The column of groups that the report of a fit suggests."""

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets

import metaopt
from metaopt import automl, tasks
from metaopt.automl import _report

QUICK = {"time_limit": None, "models": "linear", "preset": "instant", "n_jobs": 1, "verbose": False}


def visits(num=30, size=4):
    """Patients with several visits: age and sex are those of the patient, and x differs between visits."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(num), size)
    traits = {"sex": rng.choice(["f", "m"], num)[patient], "age": rng.integers(20, 80, num)[patient]}
    return pd.DataFrame({"patient": 1000 + 7 * patient, **traits, "x": rng.normal(size=num * size)})


def income(frame, gaps=False):
    """Adds a number that each patient has alone, and texts as names."""
    own = np.random.default_rng(3).permutation(30)[(frame["patient"] - 1000) // 7] * 100 + 20_000
    own = own.astype(float)
    own[::9] = np.nan if gaps else own[::9]
    return frame.assign(income=own, patient=frame["patient"].map("p{}".format))


def with_a_trait_of_the_income(frame):
    frame = income(frame, gaps=True)
    changes = np.random.default_rng(5).normal(size=len(frame))
    return frame.assign(tax=frame["income"].mod(7.3).where(frame["income"].notna(), changes))


def nearly_constant(num, seed=0):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(num) < 0.02, 1.0, 0.0)
    return np.where(rng.random(num) < 0.15, np.nan, values)


def suspected(frame):
    encoder = tasks.fit_encoder(frame)
    return _report.suspected_groups(encoder.transform(frame), encoder)


def test_the_report_names_the_column_of_groups(tmp_path):
    frame = visits()
    model = automl.AutoRegressor(**QUICK).fit(frame, frame["x"] + frame["age"])
    metaopt.save(tmp_path / "model.npz", model)
    for each in (model, metaopt.load(tmp_path / "model.npz")):
        assert each.suspected_groups_ == ("patient",)
        column, action, reason = each.report_.iloc[-1]
        assert (column, action) == ("patient", "suspected") and "pass this column as `groups`" in reason
    assert model.fit(frame, frame["x"], groups="patient").suspected_groups_ == ()


def test_the_report_counts_the_rows_that_are_not_used_as_they_are(tmp_path):
    x, y = datasets.load_diabetes(return_X_y=True, as_frame=True)
    rows = [*range(60), *range(5)]
    x, y, weight = x.iloc[rows], y.iloc[rows], np.ones(65)
    weight[[20, 30, 40]] = 0
    left_out = ("left out", "3 of 65 rows because their weight is 0")
    together = ("kept together", "5 of 62 rows equal other rows, and are in the same part of each split as these")
    not_scored = "{} rows are only used to train models: they do not enter `score_` and the weights of the models"
    model = automl.AutoRegressor(**QUICK).fit(x, y, sample_weight=weight)
    metaopt.save(tmp_path / "model.npz", model)
    for each in (model, metaopt.load(tmp_path / "model.npz")):
        notes = each.report_[each.report_["column"] == ""]
        assert list(zip(notes["action"], notes["reason"], strict=True)) == [left_out, together]
    model.fit(x[:54], y[:54], time=np.arange(54))  # the first of nine windows is not validated
    ordered = ("ordered", "by 'time': the first row is of 0, the last one of 53")
    assert model.row_notes_ == [ordered, ("not scored", not_scored.format("6 of 54"))]
    assert model.fit(x[:60], y[:60]).row_notes_ == []


@pytest.mark.parametrize(("num", "size"), [(6_000, 4), (12, 2_000)])
def test_groups_are_found_in_a_sample_of_a_long_table(num, size):
    rng = np.random.default_rng(1)
    frame = visits(num, size).assign(height=np.repeat(rng.normal(size=num), size))
    assert suspected(frame) == ("patient",)
    assert suspected(frame.sample(frac=1.0, random_state=0)) == ("patient",)
    assert suspected(frame.assign(age=rng.permutation(frame["age"]), sex=rng.permutation(frame["sex"]))) == ()


@pytest.mark.parametrize("seed", [0, 3])
def test_half_of_all_groups_of_a_long_table_must_differ(seed):
    """40 groups have at most 24 different traits, and only 10 of them are drawn."""
    rng, group = np.random.default_rng(seed), np.repeat(np.arange(40), 1500)
    traits = {"a": rng.integers(0, 4, 40)[group], "b": rng.integers(0, 6, 40)[group]}
    frame = pd.DataFrame({"g": 1000 + 7 * group, **traits, "x": rng.normal(size=len(group))})
    assert len(frame[["a", "b"]].drop_duplicates()) < 20
    assert suspected(frame) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda frame: frame.assign(patient=frame["patient"].map("p{}".format)), ("patient",)),
        (
            lambda frame: frame.assign(day=pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(120), "D")),
            ("patient",),
        ),
        (lambda frame: frame.assign(age=frame["age"].where(frame.index != 7, 99)), ("patient",)),  # one error
        # Gaps of a trait do not count. A column with gaps, or of numbers, is not suggested in place of the names.
        (lambda frame: frame.assign(age=frame["age"].where(np.arange(120) % 7 > 0)), ("patient",)),
        (lambda frame: income(frame).iloc[:, ::-1], ("patient",)),
        (lambda frame: income(frame, gaps=True).iloc[:, ::-1], ("patient",)),
        (lambda frame: frame.assign(age=frame["age"].where(np.arange(120) % 7 == 0)), ()),  # hardly a pair is known
        (with_a_trait_of_the_income, ("patient",)),  # which has more traits, but gaps
        (lambda frame: frame.assign(age=nearly_constant(120), sex=nearly_constant(120, 1)), ()),
        (lambda frame: frame.assign(age=(frame["patient"] ** 2).where(frame["patient"] % 5 > 0)), ()),
        (lambda frame: frame.assign(patient=frame["patient"] + 0.5), ()),
        (lambda frame: frame.drop(columns="sex"), ()),  # one trait
        (lambda frame: frame.drop(columns="age").assign(old=frame["sex"] == "f", size="a" + frame["sex"]), ()),
        (lambda frame: frame.assign(age=frame["age"] + frame.index % 2), ()),  # it differs between visits
        (lambda frame: frame.assign(age=("a" + (frame["age"] // 4).astype(str))), ()),  # no trait is a number
        (lambda frame: frame.assign(patient=pd.Timestamp(0) + pd.to_timedelta(frame["patient"], "D")), ()),  # dates
        (lambda frame: frame.assign(age=frame["patient"] ** 2), ()),  # a function of the number
        (lambda frame: frame.iloc[:36], ()),  # nine patients
        (lambda frame: frame.iloc[::4], ()),  # one visit each
        (lambda frame: frame.assign(sex=np.where(frame["patient"] == 1070, "f", "m")), ()),  # nearly constant
        (lambda frame: frame.assign(age=(frame["age"] > 50) * 1.5), ()),  # many patients have equal traits
        (lambda frame: frame.join(pd.DataFrame(np.random.default_rng(1).normal(size=(120, 98)))), ()),
    ],
)
def test_groups_have_many_rows_and_traits(change, expected):
    assert suspected(change(visits())) == expected


def test_rare_patients_do_not_hide_the_others():
    frame = visits().assign(patient=lambda frame: frame["patient"].map("p{}".format))
    frame.loc[::12, "patient"] = [f"once {k}" for k in range(10)]
    assert suspected(frame) == ("patient",)


def test_ordinary_tables_have_no_groups():
    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer, datasets.load_diabetes)
    assert [suspected(load(as_frame=True).data) for load in (*loaders, datasets.load_digits)] == [()] * 5


def test_the_report_shows_how_dates_were_read():
    x, y = datasets.load_diabetes(return_X_y=True, as_frame=True)
    x = x[:54].assign(day=[f"{1 + k // 12:02}.{1 + k % 12:02}.2021" for k in range(54)])  # the day comes first
    model = automl.AutoRegressor(**QUICK).fit(x, y[:54], time="day")
    assert model.row_notes_[0] == ("ordered", "by 'day': the first row is of 01.01.2021, the last one of 04.12.2021")


def test_metrics_of_the_rows_of_fit_are_warned_of(tmp_path, caplog):
    x, y = datasets.load_diabetes(return_X_y=True, as_frame=True)
    model = automl.AutoRegressor(**QUICK).fit(x[:60], y[:60])
    metaopt.save(tmp_path / "model.npz", model)
    for each in (model, metaopt.load(tmp_path / "model.npz")):
        caplog.clear()
        each.evaluate(x[60:120], y[60:120])
        assert not caplog.messages
        each.evaluate(x[:60], y[:60])
        assert ["These are the rows of `fit`" in message for message in caplog.messages] == [True]

"""Labels of any type, and columns that give the target away."""

import numpy as np
import pytest

from metaopt import tasks

pd = pytest.importorskip("pandas")


@pytest.mark.parametrize(
    ("y", "classes", "codes"),
    [
        (["b", "a", None, "b"], ["a", "b"], [1, 0, -1, 1]),
        ([3, 1, 3], [1, 3], [1, 0, 1]),
        ([1.0, 2.0, np.nan], [1.0, 2.0], [0, 1, -1]),
        ([True, None, False], [False, True], [1, -1, 0]),
        ([1, "a", 2.0, True], ["1", "2", "True", "a"], [0, 3, 1, 2]),
        (["NA", "", "None"], ["", "NA", "None"], [1, 0, 2]),
        ([2**53, 2**53 + 1, 2.0], ["2", f"{2**53}", f"{2**53 + 1}"], [1, 2, 0]),  # a float64 array merges two of them
        (np.array(["x", "y"]), ["x", "y"], [0, 1]),
        (np.array(["x", "y"], object), ["x", "y"], [0, 1]),
        (np.array([1.0, np.nan, 0.0]), [0.0, 1.0], [1, -1, 0]),
        (pd.Series([2, None, 1], dtype="Int64"), [1, 2], [1, -1, 0]),
        (pd.Series(["b", None, "a"]), ["a", "b"], [1, -1, 0]),
        (pd.Series(pd.Categorical(["b", None, "a"], ["c", "b", "a"])), ["a", "b"], [1, -1, 0]),
    ],
)
def test_labels_are_numbered_in_their_order(y, classes, codes):
    labels = tasks.fit_labels(y)
    np.testing.assert_array_equal(labels.codes, codes)
    assert labels.classes.tolist() == classes and labels.classes.dtype.kind in "biufU"
    assert [type(label) for label in labels.classes.tolist()] == [type(label) for label in classes]
    assert labels.codes.dtype == np.int32


@pytest.mark.parametrize(
    ("y", "warns"),
    [
        (np.arange(84) % 21, False),
        (np.arange(83) % 21, True),
        (np.arange(30) % 20, False),
        ([f"{k}" for k in range(30)], False),
        (np.arange(30.0), True),
    ],
)
def test_a_quantity_as_classes_is_logged(y, warns, caplog):
    tasks.fit_labels(y)
    assert ("If it is a quantity, use regression" in caplog.text) == warns


@pytest.mark.parametrize(
    ("y", "named"),
    [
        (["Yes", "yes", "no"], "'Yes', 'yes'"),
        (["a  b", "a b ", "no"], "'a  b', 'a b '"),
        (["yes", "no", "yes!"], None),
        ([1, 2, 1], None),
    ],
)
def test_labels_that_differ_only_in_case_or_spaces_are_logged(y, named, caplog):
    assert len(tasks.fit_labels(y).classes) == len(set(y))
    assert [message.split(": ")[1].split(".")[0] for message in caplog.messages] == ([named] if named else [])


@pytest.mark.parametrize("num_classes", [2, 10, 0])
def test_columns_that_give_the_target_away(num_classes):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=600)
    y = np.digitize(hidden, np.quantile(hidden, np.arange(1, num_classes) / num_classes)) if num_classes else hidden
    columns = {
        "noise": rng.normal(size=600),
        "good": hidden + 0.3 * rng.normal(size=600),
        "copy": np.exp(-y.astype(float)),
        "gaps": np.where(rng.random(600) < 0.1, np.nan, hidden),
        "code": np.argsort(rng.permutation(30))[np.searchsorted(np.quantile(hidden, np.arange(1, 30) / 30), hidden)],
        "row": np.arange(600.0),
    }
    x, names = np.column_stack(list(columns.values())), list(columns)
    categorical = np.array([name == "code" for name in names])
    assert tasks.suspected_leaks(x, y, names, categorical) == ("copy", "code")
    assert tasks.suspected_leaks(x, y[rng.permutation(600)], names, categorical) == ()
    assert tasks.suspected_leaks(x[:49], y[:49], names, categorical) == ()
    assert tasks.suspected_leaks(x, np.zeros(600), names, categorical) == ()
    y = y[np.argsort(hidden, kind="stable")]  # if rows are sorted by the target, the row number predicts it
    assert ("row" in tasks.suspected_leaks(x, y, names, categorical)) == (num_classes < 10)  # 9 steps, in 600 rows


def test_unseen_and_missing_levels_have_the_best_constant():
    """A level that is new in each fold predicts nothing; a missing level is a level."""
    y = np.arange(300) % 2
    assert tasks.suspected_leaks(np.arange(300.0)[:, None], y, ["a"], np.array([True])) == ()
    x = np.where(y == 1, np.nan, 4.0)[:, None]
    assert tasks.suspected_leaks(x, y, ["a"], np.array([True])) == ("a",)
    assert tasks.suspected_leaks(x, y.astype(float), ["a"], np.array([True])) == ("a",)
    y = np.arange(600) % 11.0
    rare = np.flatnonzero(y == 5)[:2]  # two new levels, whose target is the mean
    x = y.copy()
    x[rare] = [100, 101]
    assert tasks.suspected_leaks(x[:, None], y, ["a"], np.array([True])) == ("a",)

"""`fit_columns` and `FittedColumns.transform`: the encoding of `prepare` for rows that come later."""

import numpy as np
import pytest

from metaopt import tasks


def mixed(rows=400, seed=0):
    """Two numeric columns (one with gaps), categories of 2, 4 and 30 levels (one with gaps), a constant, no values."""
    rng = np.random.default_rng(seed)
    skewed = np.exp(rng.normal(size=rows))
    skewed[rng.random(rows) < 0.1] = np.nan
    levels = [rng.integers(0, k, rows).astype(float) for k in (2, 4, 30)]
    levels[1][:7] = np.nan
    x = np.column_stack([rng.normal(size=rows), skewed, *levels, np.full(rows, 7.0), np.full(rows, np.nan)])
    return x, np.array([False, False, True, True, True, False, False])


@pytest.mark.parametrize("scaling", ["quantile", "standard"])
@pytest.mark.parametrize("max_features", [5, 128])
def test_prepare_encodes_by_the_statistics_of_its_training_rows(scaling, max_features):
    x, categorical = mixed()
    y = (np.arange(400) % 3).astype(np.int32)
    x = x.astype(np.float32)
    options = {"max_levels": 6, "scaling": scaling, "max_features": max_features}
    prepared = tasks.prepare(tasks.Table("t", "t", x, y, categorical), **options)
    train = prepared.train.index
    fitted = tasks.fit_columns(x[train], categorical, y=y[train], **options)
    for part in (prepared.train, prepared.valid, prepared.test):
        np.testing.assert_array_equal(fitted.transform(x[part.index]), part.x)
    assert prepared.num_features == min(max_features, 1 + 2 + 1 + 5 + 6)


def test_a_row_depends_on_itself_only_and_arrays_can_be_saved(tmp_path):
    x, categorical = mixed()
    fitted = tasks.fit_columns(x, categorical)
    encoded = fitted.transform(x)
    assert encoded.dtype == np.float32 and encoded.shape == (400, 1 + 2 + 1 + 5 + 10) and np.ptp(encoded, 0).min() > 0
    np.savez(tmp_path / "columns.npz", **fitted._asdict())
    with np.load(tmp_path / "columns.npz") as file:
        loaded = tasks.FittedColumns(**file)
    for row in (0, 3, 399):
        np.testing.assert_array_equal(loaded.transform(x[[row]]), encoded[[row]])


def test_new_levels_gaps_and_values_out_of_range():
    x, categorical = mixed()
    fitted = tasks.fit_columns(x, categorical)
    row = np.array([[1e30, np.nan, 9, 9, 99, 3, 5]])
    new = fitted.transform(row)[0]
    assert 1.5 < new[0] < 3 and abs(new[1]) < 0.1 and new[2] == 1  # the largest, the median, its mark
    np.testing.assert_array_equal(new[3:9], np.zeros(6))  # neither of 2, none of 4, not missing
    np.testing.assert_array_equal(new[9:], np.eye(10)[9])  # one of the others
    gaps = fitted.transform(np.full((1, 7), np.nan))[0]
    np.testing.assert_array_equal(gaps[3:], np.eye(16)[5])  # only the second category had gaps


@pytest.mark.parametrize("scaling", ["quantile", "standard"])
def test_huge_numbers_are_far_from_the_mean_in_training_and_new_rows(scaling):
    x = np.random.default_rng(0).normal(size=(50, 2))
    x[0, 1] = 1e300  # its square overflows
    fitted = tasks.fit_columns(x, np.zeros(2, bool), scaling=scaling)
    new = fitted.transform(np.array([[1e300, 0.0], [-np.inf, 0.0], [0.0, 0.0]]))
    assert new[0, 0] > 1.5 and new[1, 0] < -1.5 and abs(new[2, 0]) < 0.5
    encoded = fitted.transform(x)
    assert np.isfinite(encoded).all() and encoded[0, 1] == encoded[:, 1].max() > 1.5


def test_the_columns_that_tell_the_classes_apart_are_kept():
    x = np.random.default_rng(0).normal(size=(90, 6))
    y = np.arange(90) % 3 * 2  # classes 1 and 3 have no rows
    x[:, [1, 4]] += y[:, None]
    fitted = tasks.fit_columns(x, np.zeros(6, bool), y=y, max_features=2)
    np.testing.assert_array_equal(np.flatnonzero(fitted.kept), [1, 4])


def test_columns_that_do_not_vary_give_none():
    fitted = tasks.fit_columns(np.full((3, 2), np.nan), np.array([True, False]))
    assert fitted.transform(np.ones((4, 2))).shape == (4, 0)
    nothing = tasks.fit_columns(np.zeros((3, 0)), np.zeros(0, bool))
    assert nothing.transform(np.zeros((4, 0))).shape == (4, 0)

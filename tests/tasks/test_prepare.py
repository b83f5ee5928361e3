"""Splitting and encoding: stratified, deterministic, and fitted only on training rows."""

import logging

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from metaopt import tasks


def mixed(rows=400, seed=0):
    """Two numeric columns (one skewed, with gaps), categories of 2, 4 and 30 levels, a constant; three classes."""
    rng = np.random.default_rng(seed)
    y = rng.choice(3, rows, p=(0.6, 0.3, 0.1)).astype(np.int32)
    skewed = np.exp(rng.normal(size=rows) + y)
    skewed[rng.random(rows) < 0.1] = np.nan
    columns = [rng.normal(size=rows), skewed, *(rng.integers(0, k, rows) for k in (2, 4, 30)), np.full(rows, 7.0)]
    categorical = np.array([False, False, True, True, True, False])
    return tasks.Table("mixed", "mixed", np.stack(columns, 1).astype(np.float32), y, categorical)


def parts(prepared):
    return prepared.train, prepared.valid, prepared.test


def test_the_split_is_stratified_disjoint_and_deterministic():
    table = mixed()
    prepared = tasks.prepare(table, seed=5, valid_fraction=0.2, test_fraction=0.3)
    assert [len(p.y) for p in parts(prepared)] == [200, 80, 120]
    np.testing.assert_array_equal(np.sort(np.concatenate([p.index for p in parts(prepared)])), np.arange(400))
    for part, share in zip(parts(prepared), (0.5, 0.2, 0.3), strict=True):
        np.testing.assert_array_equal(part.y, table.y[part.index])
        assert np.abs(np.bincount(part.y) - share * np.bincount(table.y)).max() <= 2
        assert part.x.dtype == np.float32 and part.y.dtype == np.int32
        assert part.x.shape == (len(part.y), prepared.num_features) and part.raw.shape == (len(part.y), 6)
    repeated = tasks.prepare(table, seed=5, valid_fraction=0.2, test_fraction=0.3)
    for part, other in zip(parts(prepared), parts(repeated), strict=True):
        np.testing.assert_array_equal(part.x, other.x)
        np.testing.assert_array_equal(part.index, other.index)
    assert set(tasks.prepare(table, seed=6).test.index) != set(tasks.prepare(table, seed=7).test.index)


@pytest.mark.parametrize("scaling", ["quantile", "standard"])
def test_nothing_but_training_rows_is_fitted(scaling):
    table = mixed()
    before = tasks.prepare(table, scaling=scaling, max_features=20)
    x = table.x.copy()
    held = np.concatenate([before.valid.index, before.test.index])
    x[held, :2] = 1e6
    x[held, 2:5] = 99  # levels that training rows do not have
    after = tasks.prepare(table._replace(x=x), scaling=scaling, max_features=20)
    np.testing.assert_array_equal(before.train.x, after.train.x)
    np.testing.assert_array_equal(before.train.raw, after.train.raw)
    assert np.isfinite(after.test.x).all() and np.abs(after.test.x).max() <= 3


@pytest.mark.parametrize("scaling", ["quantile", "standard"])
def test_a_column_that_is_constant_on_the_training_rows_is_left_out_whatever_other_rows_hold(scaling):
    table = mixed()
    before = tasks.prepare(table, scaling=scaling)
    x = table.x.copy()
    x[np.concatenate([before.valid.index, before.test.index]), 5] = 8.0  # it was 7 in all rows
    after = tasks.prepare(table._replace(x=x), scaling=scaling)
    assert after.num_features == before.num_features
    for part, same in zip(parts(after), parts(before), strict=True):
        np.testing.assert_array_equal(part.x, same.x)


def test_encoding_column_by_column():
    table = mixed()
    prepared = tasks.prepare(table, max_levels=6)
    train, index = prepared.train.x, prepared.train.index
    # normal; skewed and its gaps; one for 2 levels; 4; 5 of 30 and the others; none for the constant.
    assert prepared.num_features == 1 + 2 + 1 + 4 + 6 == train.shape[1]
    raw = table.x[index]
    np.testing.assert_array_equal(train[:, 2], np.isnan(raw[:, 1]))
    np.testing.assert_array_equal(train[:, 3], 2 * raw[:, 2] - 1)
    np.testing.assert_array_equal(train[:, 4:8], raw[:, 3][:, None] == np.arange(4))
    np.testing.assert_array_equal(train[:, 8:].sum(1), np.ones(len(train)))
    levels, counts = np.unique(raw[:, 4], return_counts=True)
    assert train[:, 13].sum() == len(train) - np.sort(counts)[-5:].sum()
    assert np.isnan(raw[:, 1]).any()
    np.testing.assert_array_equal(
        prepared.train.raw[:, 1], np.where(np.isnan(raw[:, 1]), np.nanmedian(raw[:, 1]), raw[:, 1])
    )


def test_unknown_levels_and_gaps_that_training_rows_do_not_have():
    table = mixed()
    first = tasks.prepare(table, max_levels=6)
    x = table.x.copy()
    test_rows = first.test.index
    x[test_rows, 0], x[test_rows, 2], x[test_rows, 3], x[test_rows, 4] = np.nan, 5, 9, 77
    test = tasks.prepare(table._replace(x=x), max_levels=6).test.x
    np.testing.assert_array_equal(test[:, 3:8], np.zeros((len(test_rows), 5)))  # neither of 2, none of 4
    np.testing.assert_array_equal(test[:, 13], np.ones(len(test_rows)))  # the others of 30
    np.testing.assert_allclose(test[:, 0], test[0, 0])
    assert abs(test[0, 0]) < 0.1  # the median


def test_the_quantile_transform_makes_a_lognormal_column_normal():
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    table = tasks.Table(
        "t", "t", np.exp(3 * z)[:, None].astype(np.float32), np.arange(4000, dtype=np.int32) % 2, np.zeros(1, bool)
    )
    part = tasks.prepare(table).test
    expected = z[part.index] / np.sqrt(1 + (z[part.index] / 3) ** 2)
    inner = np.abs(z[part.index]) < 2
    np.testing.assert_allclose(part.x[inner, 0], expected[inner], atol=0.12)
    assert np.corrcoef(part.x[:, 0], expected)[0, 1] > 0.998
    standard = tasks.prepare(table, scaling="standard").test
    assert np.corrcoef(standard.x[:, 0], expected)[0, 1] < 0.8


def test_ties_take_their_mid_rank_and_order_is_kept():
    rng = np.random.default_rng(0)
    counts = rng.choice(3, 1000, p=(0.8, 0.1, 0.1)).astype(np.float32)
    table = tasks.Table("t", "t", counts[:, None], np.arange(1000, dtype=np.int32) % 2, np.zeros(1, bool))
    train = tasks.prepare(table).train
    value = {float(k): set(train.x[train.raw[:, 0] == k, 0].tolist()) for k in np.unique(train.raw)}
    assert all(len(v) == 1 for v in value.values())
    ordered = [next(iter(value[k])) for k in sorted(value)]
    assert ordered == sorted(ordered)
    raw = train.raw[:, 0]
    scores = norm.ppf((rankdata(raw) - 0.5) / len(raw))  # scipy's ranks of ties are their average
    scores = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(train.x[:, 0], scores / np.sqrt(1 + (scores / 3) ** 2), atol=0.05)


def test_feature_cap_keeps_the_informative_columns(caplog):
    rng = np.random.default_rng(0)
    y = np.arange(300, dtype=np.int32) % 3
    x = rng.normal(size=(300, 40))
    x[:, [3, 17]] += 3 * y[:, None]
    table = tasks.Table("wide", "wide", x.astype(np.float32), y, np.zeros(40, bool))
    with caplog.at_level(logging.INFO):
        prepared = tasks.prepare(table, max_features=2)
    everything = tasks.prepare(table)
    np.testing.assert_array_equal(prepared.train.x, everything.train.x[:, [3, 17]])
    assert "2 of 40 encoded columns" in caplog.text


def test_rare_classes_and_caps():
    y = np.array([0] * 300 + [1] * 100 + [2] * 2 + [4] * 1, np.int32)  # 3 is empty
    x = np.random.default_rng(0).normal(size=(403, 3)).astype(np.float32)
    table = tasks.Table("rare", "rare", x, y, np.zeros(3, bool))
    for seed in range(5):
        prepared = tasks.prepare(table, seed=seed)
        np.testing.assert_array_equal(prepared.classes, [0, 1, 2, 4])
        assert (np.bincount(prepared.train.y, minlength=4) > 0).all()
        small = tasks.prepare(table, seed=seed, max_rows=100)
        assert sum(len(p.y) for p in parts(small)) == pytest.approx(100, abs=2) and small.num_classes == 4
    few = tasks.prepare(table, max_classes=2)
    np.testing.assert_array_equal(few.classes, [0, 1])
    assert sum(len(p.y) for p in parts(few)) == 400


def test_dropped_classes_are_named_by_their_labels(caplog):
    frame = {"size": np.arange(60) % 7, "sold": ["no"] * 30 + ["yes"] * 26 + ["later"] * 3 + ["never"]}
    prepared = tasks.prepare(frame, "sold", max_classes=2)
    assert prepared.classes.tolist() == ["no", "yes"]
    (warning,) = caplog.messages
    assert warning.endswith("dropped: later, never")
    caplog.clear()
    codes = np.unique(frame["sold"], return_inverse=True)[1].astype(np.int32)
    x = np.asarray(frame["size"], np.float32)[:, None]
    tasks.prepare(tasks.Table("t", "t", x, codes, np.zeros(1, bool)), max_classes=2)
    (warning,) = caplog.messages
    assert warning.endswith("dropped: 0, 1")


def test_whole_numbers_that_float32_merges_are_reported(caplog):
    table = mixed()
    ids = table._replace(x=table.x.astype(np.float64))
    ids.x[:, 0] = 2**24 + np.random.default_rng(0).permutation(400)
    prepared = tasks.prepare(ids)
    assert "float32 merges 199 values of column 0 of `x`" in caplog.text  # of 400, 0, 2, ..., 400 remain
    assert len(np.unique(prepared.train.x[:, 0])) > 190  # the encoding is computed in float64


def test_no_test_rows_if_none_are_asked_for():
    assert len(tasks.prepare(mixed(rows=40), test_fraction=0.0).test.y) == 0


def shop(rows=60, seed=0):
    """A frame with texts, dates, gaps and rows without a label; the labels are texts."""
    rng = np.random.default_rng(seed)
    frame = {
        "size": [f"{value:,}" for value in rng.integers(500, 3000, rows)],
        "color": rng.choice(np.array(["blue", "red", None]), rows),
        "sold": rng.choice(np.array(["no", "yes", None]), rows, p=(0.5, 0.4, 0.1)),
        "day": [f"2024-{1 + k % 12:02}-{1 + k % 28:02}" for k in range(rows)],
    }
    return frame


def test_a_frame_is_encoded_as_its_parts_do_it():
    frame = shop()
    prepared = tasks.prepare(frame, "sold", seed=3)
    kept = np.array([label is not None for label in frame["sold"]])
    encoder = tasks.fit_encoder(frame, drop=["sold"])
    x, y = encoder.transform(frame)[kept], (frame["sold"][kept] == "yes").astype(np.int32)
    expected = tasks.prepare(tasks.Table("t", "t", x, y, encoder.categorical), seed=3)
    for part, other in zip(parts(prepared), parts(expected), strict=True):
        np.testing.assert_array_equal(part.x, other.x)
        np.testing.assert_array_equal(part.y, other.y)
        np.testing.assert_array_equal(part.index, np.flatnonzero(kept)[other.index])
        np.testing.assert_array_equal(prepared.classes[part.y], frame["sold"][part.index])
    assert prepared.encoder == encoder and expected.encoder is None
    inputs = {name: values for name, values in frame.items() if name != "sold"}
    apart = tasks.prepare(inputs, frame["sold"], seed=3)
    np.testing.assert_array_equal(apart.train.x, prepared.train.x)


def test_new_rows_are_encoded_as_those_of_the_table():
    frame, table = shop(), mixed()
    prepared = tasks.prepare(frame, "sold")
    new = {"day": frame["day"], "color": frame["color"], "size": frame["size"], "more": frame["day"]}
    for part in parts(prepared):
        np.testing.assert_array_equal(prepared.transform(new)[part.index], part.x)
    assert np.isfinite(prepared.transform({**new, "size": [1e300] * 60})).all()
    prepared = tasks.prepare(table, max_features=20, scaling="standard")
    for part in parts(prepared):
        np.testing.assert_array_equal(prepared.transform(table.x)[part.index], part.x)
    for rows in (new, pytest.importorskip("pandas").DataFrame(new)):
        with pytest.raises(ValueError, match="was not prepared from a frame"):
            prepared.transform(rows)

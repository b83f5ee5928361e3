"""Splits with weights, copies, groups and times; target encodings and rounds of boosting that follow them."""

import datetime

import numpy as np
import pandas as pd
import pytest

import metaopt
from metaopt import automl
from metaopt.automl import _arguments, _ensemble_fit, _inputs, _kinds, _rows

QUICK = {"time_limit": None, "models": "linear", "preset": "instant", "n_jobs": 1, "verbose": False}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(200, 5)), RNG.integers(0, 2, 200)


def _shared(rows, splits):
    """The number of validation rows that are equal to a training row."""
    key = [tuple(row) for row in np.column_stack([rows.x, rows.y])]
    return sum(key[i] in {key[j] for j in split.train} for split in splits for i in split.valid)


@pytest.mark.parametrize("weight", [np.full(200, 2.0), np.arange(200) % 4 + 1.0])
def test_a_weight_of_two_does_not_put_a_row_in_both_parts_of_a_split(weight):
    rows = _rows.sorted_rows(X, Y, weight)
    splits = _rows.split_rows(rows, 2, seed=0)
    assert len(rows.y) == weight.sum() and len(splits) == 8 and _shared(rows, splits) == 0
    # A weight is the same as equal rows, and without copies a row is one observation.
    index = np.repeat(np.arange(200), weight.astype(int))
    repeated = _rows.sorted_rows(X[index], Y[index], np.ones(len(index)))
    np.testing.assert_array_equal(repeated.x, rows.x)
    for (train, valid), other in zip(_rows.split_rows(repeated, 2, seed=0), splits, strict=True):
        np.testing.assert_array_equal(train, other.train)
        np.testing.assert_array_equal(valid, other.valid)


def test_categories_with_weights_are_kept_together_if_rows_hardly_repeat():
    x = np.array([[(i >> bit) & 1 for bit in range(8)] for i in range(256)], float)
    rows = _rows.sorted_rows(x, x[:, 0].astype(int), np.full(256, 3.0))
    assert _shared(rows, _rows.split_rows(rows, 2, seed=0)) == 0


def test_equal_rows_of_few_values_are_different_observations():
    """A table with two columns of two values: new rows are equal to old ones, and so are validation rows."""
    x = RNG.integers(0, 2, (200, 2)).astype(float)
    for y in ((x[:, 0] == x[:, 1]).astype(int), RNG.integers(0, 2, 200)):
        rows = _rows.sorted_rows(x, y, np.ones(200))
        assert _shared(rows, _rows.split_rows(rows, 2, seed=0)) == 200
    x = np.array([0.0] * 5 + [1.0] * 3 + [2.0] * 2)  # each value is a class
    rows = _rows.sorted_rows(x[:, None], x.astype(int), np.ones(10))
    assert _shared(rows, _rows.split_rows(rows, 3, seed=0)) == 10


def test_rows_of_one_weight_stay_together_also_where_equal_rows_do_not():
    x, y = RNG.integers(0, 2, (200, 2)).astype(float), RNG.integers(0, 2, 200)
    y[7] = 2  # its only row must not be in a validation part
    rows = _rows.sorted_rows(x, y, np.full(200, 3.0))
    assert (np.bincount(rows.copies)[1:] == 3).all() and len(np.unique(rows.copies)) == 200
    for train, valid in _rows.split_rows(rows, 3, seed=0):
        assert not set(rows.copies[train]) & set(rows.copies[valid]) and not (rows.y[valid] == 2).any()


def test_copies_of_the_only_row_of_a_class_stay_in_the_training_part():
    y = np.where(np.arange(200) == 7, 2, Y)
    rows = _rows.sorted_rows(X, y, np.where(np.arange(200) == 7, 3.0, 2.0))
    for train, valid in _rows.split_rows(rows, 3, seed=0):
        assert (rows.y[train] == 2).sum() == 3 and not (rows.y[valid] == 2).any()


def test_scores_with_equal_weights_are_not_better_than_without():
    """Random targets: boosted trees remember a copy in the training part."""
    options = QUICK | {"models": "lightgbm", "eval_metric": "accuracy"}
    plain, weighted = (
        automl.AutoClassifier(**options).fit(X[:100], Y[:100], sample_weight=weight).score_
        for weight in (None, np.full(100, 2.0))
    )
    assert weighted < plain + 0.05


def test_large_integer_weights_do_not_fill_the_memory():
    weight = RNG.integers(10**6, 5 * 10**6, 300).astype(float)
    index = _rows.repeated(weight)
    assert len(index) == 300
    count = np.bincount(index, minlength=300)
    assert np.abs(count - weight * 300 / weight.sum()).max() <= 1


def test_groups_of_few_rows_give_as_many_folds_as_the_largest_class_has_rows():
    model = automl.AutoClassifier(**QUICK).fit(X[:12], np.tile([0, 1], 6), groups=np.arange(12))
    assert len(model.ensemble_.inputs) == 6


def test_groups_may_have_mixed_types():
    mixed = np.array(["a", 1, 2.5, "b"] * 50, object)
    first = automl.AutoClassifier(**QUICK).fit(X, Y, groups=mixed)
    second = automl.AutoClassifier(**QUICK).fit(X, Y, groups=mixed.astype(str))
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    mixed[1::8] = 1.0  # equal to 1: the same group
    third = automl.AutoClassifier(**QUICK).fit(X, Y, groups=mixed)
    np.testing.assert_array_equal(first.predict_proba(X), third.predict_proba(X))


def test_codes_of_groups_do_not_depend_on_the_order_of_rows():
    groups = np.array(["1", 1.0, True, 2**2000, "a", 1, 0.5], object)
    codes = _arguments.group_codes(groups, 7)
    assert codes[1] == codes[2] == codes[5] and len(set(codes)) == 5
    np.testing.assert_array_equal(_arguments.group_codes(groups[::-1], 7)[::-1], codes)


def test_a_score_of_one_row_is_a_number():
    """R² of one row is undefined. Weights of NaN would be a prediction of NaN."""
    options = QUICK | {"eval_metric": "r2"}
    model = automl.AutoRegressor(**options).fit(X[:12], X[:12, 0], time=np.arange(12) == 11)
    assert model.leaderboard_["weight"].sum() == 1 and np.isfinite(model.predict(X)).all()


def test_a_group_without_earlier_rows_of_other_groups_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no row has earlier rows of other groups"):
        automl.AutoClassifier(**QUICK).fit(X, Y, groups=np.zeros(200), time=np.arange(200))


@pytest.mark.parametrize(
    "times",
    [
        ["8", "9", "10", "11"],
        ["28/11/2020", "29/11/2020", "01/12/2020", "02/01/2021"],
        pd.date_range("2020-11-28", periods=4, tz="Europe/Berlin"),
        [datetime.date(2020, 1, day) for day in (1, 2, 3, 4)],
        np.array([2**60, 2**60 + 1, 2**60 + 2, 2**60 + 3]),
        pd.to_timedelta([1, 2, 30, 400], unit="s"),
    ],
)
def test_times_are_in_order(times):
    np.testing.assert_array_equal(_arguments.times(times, 4), np.arange(4))


@pytest.mark.parametrize("times", [["today", "tomorrow", "9", "10"], [f"week {i}" for i in range(30)]])
def test_texts_that_are_no_times_are_rejected(times):
    with pytest.raises(ValueError, match="`time` must be numbers or dates"):
        _arguments.times(times, len(times))


def test_models_of_all_rows_predict_later_ones():
    """The target follows one column at first and another one later."""
    rng = np.random.default_rng(0)
    time, x = np.arange(450), rng.normal(size=(450, 3))
    angle = time / 100
    y = x[:, 0] * np.cos(angle) + x[:, 1] * np.sin(angle) + 0.1 * rng.normal(size=450)
    model = automl.AutoRegressor(**QUICK | {"models": ("linear", "lightgbm")}).fit(x[:400], y[:400], time=time[:400])
    (linear,) = [member.models for member in model.ensemble_.members if member.member.kind == "linear"]
    assert len(model.ensemble_.inputs) == 1 and len(linear) <= 1
    assert np.isnan(model.ensemble_.out_of_fold).mean() == pytest.approx(1 / 9, abs=0.01)
    own = _rows.sorted_rows(model.encoder_.transform(x[:400]), y[:400], np.ones(400), None, time[:400])
    medians = np.median(own.x, axis=0)
    np.testing.assert_allclose(model.ensemble_.inputs[0].medians, medians)


def test_without_weight_a_class_does_not_exist():
    y = np.where(np.arange(200) < 20, 2, Y)
    weight = (y < 2).astype(float)
    model = automl.AutoClassifier(**QUICK).fit(X, y, sample_weight=weight)
    assert list(model.classes_) == [0, 1]
    with pytest.raises(ValueError, match="one class, 0"):
        automl.AutoClassifier(**QUICK).fit(X, Y, sample_weight=(Y == 0).astype(float))


# --- target encodings ---

FLAGS = (np.ones(1, bool), np.ones(1, bool))


def test_target_encodings_of_copies_do_not_see_their_own_target():
    codes, y = np.repeat(np.arange(100.0), 3), RNG.normal(size=300)
    index = np.repeat(np.arange(300), 2)
    views = _inputs.fit_inputs(codes[index, None], y[index], *FLAGS, np.arange(600), 0, 0, index)[1]
    assert abs(np.corrcoef(views.trees[:, 0], y[index])[0, 1]) < 0.2
    (constant,) = np.unique(_inputs.fit_inputs(codes[:, None], y, *FLAGS, np.arange(300), 0, 0, np.zeros(300))[1].trees)
    assert constant == pytest.approx(y.mean())


def test_target_encodings_use_weights():
    codes, y = np.tile([0.0, 1.0], 100), np.tile([0.0, 1.0, 1.0, 0.0], 50)
    weight = np.where(y == 1, 3.0, 1.0)
    inputs, _ = _inputs.fit_inputs(codes[:, None], y, *FLAGS, _rows.repeated(weight), 0, seed=0)
    np.testing.assert_allclose(inputs.targets[0].default, 0.75)
    np.testing.assert_allclose(inputs.targets[0].values, 0.75, atol=0.02)


def test_target_encodings_in_a_fold_that_lacks_a_class():
    groups = np.repeat(np.arange(20), 10)
    y = np.where(groups == 3, 2, Y)
    frame = pd.DataFrame({"shop": [f"shop {i % 60}" for i in range(200)], "x": X[:, 0]})
    model = automl.AutoClassifier(**QUICK).fit(frame, y, groups=groups)
    assert model.encoder_.high_cardinality.any()
    assert np.isfinite(model.predict_proba(frame)).all()


def test_a_class_that_a_fold_lacks_has_probability_zero():
    full = _ensemble_fit._all_classes(np.array([[0.3, 0.7]]), np.array([0, 2]), 3)
    np.testing.assert_array_equal(full, [[0.3, 0, 0.7]])


# --- boosting ---


def _fold(x, y, valid_x, valid_y, stops=True):
    views = [_kinds.Views(part, part, part.astype(np.float32)) for part in (x, valid_x)]
    weights = np.ones(len(y)), np.ones(len(valid_y))
    return _kinds.FoldData(
        views[0], y, weights[0], views[1], valid_y, weights[1], np.zeros(x.shape[1], bool), 2, 0, stops=stops
    )


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("lightgbm", lambda model: model.current_iteration()),
        ("xgboost", lambda model: model.num_boosted_rounds()),
        ("catboost", lambda model: len(model["leaves"])),
    ],
)
def test_the_other_folds_choose_the_number_of_rounds(kind, rounds):
    x = RNG.normal(size=(400, 4))
    y = (x[:, 0] + RNG.normal(size=400) > 0).astype(int)
    settings = {"num_rounds": 200, "patience": 20, "learning_rate": 0.1}
    # The last fold has no validation rows, as the models of all rows have none.
    parts = [np.arange(i, 400, 3) for i in range(3)]
    folds = [_fold(np.delete(x, part, 0), np.delete(y, part), x[part], y[part]) for part in parts]
    folds.append(_fold(x, y, x[:0], y[:0]))
    models = [_kinds.fit_fold(kind, settings, fold)[0] for fold in folds]
    best = [_kinds.KINDS[kind].best_rounds(model) for model in models]
    assert rounds(models[-1]) == 200 and best[-1] == 0 and min(best[:3]) > 0
    assert [rounds(model) for model in models[:3]] == [number + 20 for number in best[:3]]
    settled = _kinds.settled(kind, models, folds)
    expected = [round((best[1] + best[2]) / 2), round((best[0] + best[2]) / 2), round((best[0] + best[1]) / 2)]
    expected.append(round(np.mean(best[:3])))
    most = [rounds(model) for model in models]
    assert [rounds(model) for model, _ in settled] == list(map(min, expected, most))
    for (model, predicted), fold in zip(settled, folds, strict=True):
        np.testing.assert_array_equal(predicted, _kinds.predict(kind, model, fold.valid_views, 2))
    # Validation rows whose classes are not known do not stop it.
    unknown = _kinds.fit_fold(kind, settings, folds[0]._replace(valid_weight=np.zeros(len(parts[0]))))[0]
    assert rounds(unknown) == 200 and _kinds.KINDS[kind].best_rounds(unknown) == 0
    # A single fold keeps its own number, and folds that did not stop early keep all rounds.
    assert rounds(_kinds.settled(kind, models[:1], folds[:1])[0][0]) == best[0]
    fixed = _kinds.fit_fold(kind, settings, folds[0]._replace(stops=False))[0]
    assert rounds(_kinds.settled(kind, [fixed], folds[:1])[0][0]) == 150


def test_boosting_of_random_targets_does_not_look_better_than_chance():
    """600 rows: each fold has 75 validation rows, which would choose rounds that suit them."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(600, 8)), rng.integers(0, 2, 600)
    model = automl.AutoClassifier(**QUICK | {"models": "xgboost"}).fit(x, y)
    assert model.leaderboard_["score"][0] < -np.log(2)


# --- conformal prediction with weights, and saved arguments ---


def test_weights_move_conformal_intervals():
    """Rows with larger errors have more weight: intervals for rows drawn by weight are longer."""
    rng = np.random.default_rng(0)
    x, is_wide = rng.normal(size=(600, 2)), rng.random(600) < 0.5
    y = x[:, 0] + np.where(is_wide, 2.0, 0.1) * rng.normal(size=600)
    weight = np.where(is_wide, 1.5, 0.25)
    model = automl.AutoRegressor(**QUICK).fit(x[:400], y[:400], sample_weight=weight[:400])
    ends = model.predict_interval(x[400:], coverage=0.8)
    inside = (ends[:, 0] <= y[400:]) & (y[400:] <= ends[:, 1])
    assert np.average(inside, weights=weight[400:]) == pytest.approx(0.8, abs=0.06)


def test_arguments_of_numpy_and_an_infinite_limit_can_be_saved(tmp_path):
    options = QUICK | {"n_jobs": np.int64(1), "time_limit": float("inf"), "random_state": np.int32(3)}
    model = automl.AutoClassifier(**options | {"models": ("linear", "lightgbm")}).fit(X, Y)
    assert len(model.leaderboard_) == 2  # without a limit, all models are fitted
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    assert loaded.get_params()["random_state"] == 3 and loaded.time_limit is None
    np.testing.assert_array_equal(loaded.predict_set(X), model.predict_set(X))
    one = automl.AutoClassifier(**QUICK).fit(X, Y)
    metaopt.save(tmp_path / "model.npz", one)
    assert metaopt.load(tmp_path / "model.npz").models == "linear"


def test_models_may_not_be_empty():
    with pytest.raises(ValueError, match="`models` must name at least one"):
        automl.AutoClassifier(**QUICK | {"models": ()}).fit(X, Y)

"""`score_interval`: closed forms, coverage of known scores with and without groups, and saved intervals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics

import metaopt
from metaopt import automl
from metaopt.automl import _rows, _score_error

QUICK = {"time_limit": None, "models": "linear", "preset": "instant", "n_jobs": 1, "verbose": False}


def _training_rows(y, groups=None, time=None, weight=None):
    weight = np.ones(len(y)) if weight is None else weight
    return _rows.TrainingRows(np.zeros((len(y), 1)), y, weight, np.arange(len(y)), groups, time)


def _absolute_errors(errors, groups=None, time=None, weight=None):
    """The score and its error if the model predicts 0: "mae" is the mean of |y|."""
    rows = _training_rows(errors, groups, time, weight)
    error = _score_error.score_error(rows, np.zeros(len(errors)), "mae", seed=0)
    return -float(np.average(np.abs(errors), weights=weight)), error


def test_equal_groups_give_the_t_interval_of_their_means():
    losses = np.random.default_rng(0).exponential(size=(5, 7))
    score, error = _absolute_errors(losses.reshape(-1), np.repeat(np.arange(5), 7))
    means = -losses.mean(axis=1)
    standard_error = means.std(ddof=1) / np.sqrt(5)
    assert error == pytest.approx((standard_error, 5, 5), rel=1e-12)
    expected = stats.t.interval(0.9, 4, means.mean(), standard_error)
    expected = expected[0], min(0.0, expected[1])
    assert _score_error.score_interval(score, error, "mae", 0.9, None) == pytest.approx(expected, rel=1e-12)
    # The difference to the mean of three new groups has the variance σ² (1/5 + 1/3).
    wide = np.array(_score_error.score_interval(score, error, "accuracy", 0.5, 3)) - score
    half = stats.t.ppf(0.75, 4) * means.std(ddof=1) * np.sqrt(1 / 5 + 1 / 3)
    assert wide[1] == pytest.approx(half, rel=1e-12)


def test_rows_count_by_their_weight_in_unequal_groups():
    rng = np.random.default_rng(1)
    losses, weight, groups = rng.exponential(size=40), rng.uniform(0.5, 2, 40), np.sort(rng.integers(0, 4, 40))
    score, error = _absolute_errors(losses, groups, weight=weight)
    share = np.array([weight[groups == k].sum() for k in range(4)]) / weight.sum()
    mean = -np.array([np.average(losses[groups == k], weights=weight[groups == k]) for k in range(4)])
    without = score - share * (mean - score) / (1 - share)
    assert error.standard_error == pytest.approx(np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize(("num", "num_new"), [(4, None), (6, 2), (120, None), (120, 20)])
def test_coverage_of_a_known_score_needs_groups(num, num_new):
    """Errors are b + e with b of a group: their mean absolute value is √(2/π) times their deviation.

    The losses of groups are skewed, so that a t interval of few groups has less than its nominal coverage of 0.9.
    """
    rng, inside = np.random.default_rng(2), {"groups": [], "rows": []}
    size, deviation = 5, np.hypot(1, 0.3)
    for _ in range(300):
        errors = rng.normal(size=(num + (num_new or 0), 1)) + 0.3 * rng.normal(size=(num + (num_new or 0), size))
        groups = np.repeat(np.arange(num), size)
        truth = -deviation * np.sqrt(2 / np.pi) if num_new is None else -np.abs(errors[num:]).mean()
        for name, unit, new in (("groups", groups, num_new), ("rows", None, num_new and num_new * size)):
            score, error = _absolute_errors(errors[:num].reshape(-1), unit)
            low, high = _score_error.score_interval(score, error, "mae", 0.9, new)
            inside[name].append(low <= truth <= high)
    assert 0.78 < np.mean(inside["groups"]) < 0.96
    assert np.mean(inside["rows"]) < 0.75


def test_many_groups_are_joined_and_times_are_cut_in_order():
    groups = np.arange(300) // 2
    block, num_blocks, num_units = _score_error._blocks(_training_rows(np.zeros(300), groups), np.arange(300), 0)
    assert (num_blocks, num_units) == (50, 150) and (np.bincount(block) == 6).all()
    np.testing.assert_array_equal(block[::2], block[1::2])
    assert (np.diff(block) < 0).any()  # at random, since the order of rows depends on their values
    rows = _training_rows(np.zeros(450), time=np.arange(450) // 2)
    block, num_blocks, num_units = _score_error._blocks(rows, np.arange(50, 450), 0)
    np.testing.assert_array_equal(block, np.repeat(np.arange(8), 50))
    assert num_blocks == num_units == 8
    rows = _training_rows(np.zeros(40), groups=np.arange(40) % 10, time=np.arange(40) // 10)
    assert _score_error._blocks(rows, np.arange(40), 0)[1:] == (4, 4)  # with both, the times count


def test_new_units_are_compared_with_units_and_not_with_blocks():
    error = _score_error.ScoreError(0.1, 50, 200)
    halves = [_score_error.score_interval(-9.0, error, "rmse", 0.95, m)[1] + 9 for m in (None, 200, 50)]
    t = stats.t.ppf(0.975, 49)
    np.testing.assert_allclose(halves, 0.1 * t * np.sqrt([1, 2, 5]), rtol=1e-12)


def test_only_validated_rows_count():
    errors, groups = np.random.default_rng(0).exponential(size=40), np.repeat(np.arange(8), 5)
    rows, is_validated = _training_rows(errors, groups), np.arange(40) >= 15
    predicted = np.where(is_validated, 0.0, np.nan)
    error = _score_error.score_error(rows, predicted, "rmse", seed=0)
    expected = _score_error.score_error(_training_rows(errors[15:], groups[15:]), np.zeros(25), "rmse", seed=0)
    assert error == expected and error.num_units == 5


@pytest.mark.parametrize(
    ("metric", "limits"),
    [
        ("log_loss", (-np.inf, 0)),
        ("rmse", (-np.inf, 0)),
        ("r2", (-np.inf, 1)),
        ("accuracy", (0, 1)),
        ("balanced_accuracy", (0, 1)),
        ("roc_auc", (0, 1)),
    ],
)
def test_an_interval_is_within_the_limits_of_the_metric(metric, limits):
    value, error = (-0.1 if limits[1] == 0 else 0.5), _score_error.ScoreError(9.0, 5, 5)
    low, high = _score_error.score_interval(value, error, metric, 0.95, None)
    assert high == limits[1] and (
        low == 0 if limits[0] == 0 else low == pytest.approx(value - 9 * stats.t.ppf(0.975, 4))
    )


def test_one_unit_has_no_interval():
    error = _absolute_errors(np.ones(4), time=np.zeros(4))[1]
    assert _score_error.score_interval(-1.0, error, "mae", 0.9, None) == (-np.inf, 0.0)
    assert _score_error.score_interval(0.7, error, "accuracy", 0.9, 5) == (0.0, 1.0)


def _grouped(rng, num_groups, size):
    """Columns that identify a group, and one that explains the target next to the group's effect."""
    groups = np.repeat(np.arange(num_groups), size)
    x = np.column_stack([rng.normal(size=(num_groups, 8))[groups], rng.normal(size=len(groups))])
    return x, x[:, 8] + rng.normal(size=num_groups)[groups] + 0.3 * rng.normal(size=len(groups)), groups


def test_with_groups_the_interval_contains_the_score_on_new_groups_and_without_it_does_not():
    inside = {"groups": 0, "random folds": 0}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, y, groups = _grouped(rng, 40, size=8)
        new_x, new_y, _ = _grouped(rng, 400, size=8)
        for name, units in (("groups", groups), ("random folds", None)):
            model = automl.AutoRegressor(**QUICK).fit(x, y, groups=units)
            low, high = model.score_interval(coverage=0.95)
            truth = -np.sqrt(np.mean((model.predict(new_x) - new_y) ** 2)) / model.scale_
            inside[name] += low <= truth <= high
    assert inside["groups"] >= 4 and inside["random folds"] == 0


def test_an_interval_is_saved_and_bad_arguments_are_rejected(tmp_path):
    rng = np.random.default_rng(0)
    x, y, groups = _grouped(rng, 6, size=12)
    options = QUICK | {"eval_metric": "balanced_accuracy"}
    model = automl.AutoClassifier(**options).fit(x, y > 0, groups=groups)
    metaopt.save(tmp_path / "model.npz", model)
    loaded = metaopt.load(tmp_path / "model.npz")
    assert loaded.score_error_ == model.score_error_ and loaded.score_error_.num_units == 6
    low, high = model.score_interval(coverage=0.5, num_new=2)
    assert loaded.score_interval(coverage=0.5, num_new=2) == (low, high)
    assert 0 <= low < model.score_ < high <= 1
    narrow = model.score_interval(coverage=0.5)
    assert low < narrow[0] and narrow[1] < high
    for arguments, message in (({"num_new": 0}, "`num_new` must be at least 1"), ({"coverage": 1.0}, "`coverage`")):
        with pytest.raises(ValueError, match=message):
            model.score_interval(**arguments)


@pytest.mark.parametrize("metric", ["accuracy", None])
def test_evaluate_computes_scikit_learns_metrics_and_the_t_interval_of_a_mean(metric):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = np.array(["no", "yes"])[(x[:, 0] + rng.normal(size=300) > 0).astype(int)]
    model = automl.AutoClassifier(**QUICK | {"eval_metric": metric}).fit(x[:150], y[:150])
    new, truth = x[150:180], y[150:180]
    table = model.evaluate(new, truth, coverage=0.9).set_index("metric")
    assert table.index[0] == (metric or "log_loss") and len(table) == 4
    probabilities, right = model.predict_proba(new), model.predict(new) == truth
    assert table["value"].to_dict() == pytest.approx(
        {
            "log_loss": metrics.log_loss(truth, probabilities),
            "accuracy": right.mean(),
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, model.predict(new)),
            "roc_auc": metrics.roc_auc_score(truth, probabilities[:, 1]),
        }
    )
    for name, losses in (
        ("accuracy", right),
        ("log_loss", -np.log(probabilities[range(30), model.classes_.searchsorted(truth)])),
    ):
        interval = stats.t.interval(0.9, 29, losses.mean(), stats.sem(losses))
        assert table.loc[name, ["lower", "upper"]].tolist() == pytest.approx(interval)
    with pytest.raises(ValueError, match="1 of 3 rows have a label that did not occur in `fit`, such as 'maybe'"):
        model.evaluate(new[:3], ["no", "maybe", "yes"])
    one_class = model.evaluate(new[truth == "yes"], truth[truth == "yes"]).set_index("metric")
    assert one_class.loc["roc_auc"].isna().all() and one_class.drop(index="roc_auc").notna().all(axis=None)


def test_evaluate_warns_of_targets_in_another_order(caplog):
    x = pd.DataFrame(np.random.default_rng(0).normal(size=(80, 2)), columns=["a", "b"])
    y = x["a"] > 0
    model = automl.AutoClassifier(**QUICK).fit(x, y)
    caplog.clear()
    model.evaluate(x, y)
    assert "These are the rows of `fit`" in caplog.text and "in another order" not in caplog.text
    model.evaluate(x, y.sample(frac=1, random_state=0))
    assert "in another order" in caplog.text


def test_evaluate_has_the_units_of_the_target_and_groups_make_its_intervals_longer():
    x, y, groups = _grouped(np.random.default_rng(0), 30, size=8)
    y = 100 * y + 7
    model = automl.AutoRegressor(**QUICK).fit(x[:120], y[:120], groups=groups[:120])
    new, truth = x[120:], y[120:]
    table = model.evaluate(new, truth).set_index("metric")
    error = model.predict(new) - truth
    expected = {"rmse": np.sqrt(np.mean(error**2)), "mae": np.abs(error).mean(), "r2": model.score(new, truth)}
    assert table["value"].to_dict() == pytest.approx(expected)
    assert (table["lower"] < table["value"]).all() and (table["value"] < table["upper"]).all()
    by_group = model.evaluate(new, truth, groups=groups[120:]).set_index("metric")
    assert by_group["value"].equals(table["value"])
    length = lambda frame: (frame["upper"] - frame["lower"])["mae"]
    assert length(by_group) > 1.5 * length(table)
    frame = pd.DataFrame(x).add_prefix("x").assign(who=groups)
    named = automl.AutoRegressor(**QUICK).fit(frame[:120], y[:120], groups="who")
    by_name = named.evaluate(frame[120:], truth, groups="who")
    pd.testing.assert_frame_equal(by_name, named.evaluate(frame[120:], truth, groups=groups[120:]))
    assert by_name.set_index("metric")["value"].to_dict() == pytest.approx(expected)
    one = model.evaluate(new[:1], truth[:1]).set_index("metric")
    assert one.loc["mae", ["lower", "upper"]].tolist() == [0, np.inf]

"""Weights, calibration and conformal thresholds, against direct computations."""

import math

import numpy as np
import pytest
from scipy import optimize
from sklearn import metrics

from metaopt.automl import _ensemble
from metaopt.automl._ensemble import Target

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 200)
P = RNG.dirichlet(np.ones(3), 200)
WEIGHT = RNG.uniform(0.5, 2, 200)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("log_loss", -metrics.log_loss(LABELS, P, sample_weight=WEIGHT)),
        ("accuracy", metrics.accuracy_score(LABELS, P.argmax(1), sample_weight=WEIGHT)),
        ("balanced_accuracy", metrics.balanced_accuracy_score(LABELS, P.argmax(1), sample_weight=WEIGHT)),
        ("roc_auc", metrics.roc_auc_score(LABELS, P, multi_class="ovr", sample_weight=WEIGHT)),
    ],
)
def test_scores_of_classes_are_scikit_learns(metric, expected):
    assert _ensemble.score(metric, P, Target(LABELS, WEIGHT)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("metric", "function", "sign"),
    [
        ("rmse", metrics.root_mean_squared_error, -1),
        ("mae", metrics.mean_absolute_error, -1),
        ("r2", metrics.r2_score, 1),
    ],
)
def test_scores_of_numbers_are_scikit_learns(metric, function, sign):
    y, predicted = RNG.normal(size=200), RNG.normal(size=200)
    expected = sign * function(y, predicted, sample_weight=WEIGHT)
    assert _ensemble.score(metric, predicted, Target(y, WEIGHT)) == pytest.approx(expected, rel=1e-9)


def test_greedy_weights_approach_the_least_squares_mixture():
    y = RNG.normal(size=2000)
    predictions = [y + sd * RNG.normal(size=2000) for sd in (1.0, 1.5, 3.0)]
    target = Target(y, np.ones(2000))
    weights = _ensemble.greedy_weights(predictions, target, "rmse", 10)
    loss = lambda w: np.mean((np.tensordot(w, predictions, 1) - y) ** 2)
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = optimize.minimize(loss, np.ones(3) / 3, bounds=[(0, 1)] * 3, constraints=simplex)
    assert weights.sum() == pytest.approx(1)
    assert loss(weights) < best.fun * 1.01


def test_greedy_weights_keep_to_the_number_of_members_and_prefer_few():
    y = RNG.normal(size=300)
    predictions = [y + RNG.normal(size=300) for _ in range(10)]
    target = Target(y, np.ones(300))
    assert (_ensemble.greedy_weights(predictions, target, "rmse", 3) > 0).sum() == 3
    same = [predictions[0]] * 4
    assert (_ensemble.greedy_weights(same, target, "rmse", 4) > 0).sum() == 1


def test_of_equal_prefixes_with_as_many_members_the_first_is_taken():
    sure, unsure = [0.9, 0.1], [0.4, 0.6]
    predictions = [
        np.array([sure, unsure]),
        np.array([unsure, sure]),
    ]  # each is right in one row, and their mean in both
    target = Target(np.zeros(2, int), np.ones(2))
    assert _ensemble.greedy_weights(predictions, target, "accuracy", 2).tolist() == [0.5, 0.5]


def test_greedy_selection_ends_when_the_time_is_over():
    y = RNG.normal(size=300)
    predictions = [y + RNG.normal(size=300) for _ in range(4)]
    weights = _ensemble.greedy_weights(predictions, Target(y, np.ones(300)), "rmse", 4, lambda: True)
    assert sorted(weights) == [0, 0, 0, 1]


@pytest.mark.parametrize(("num_rows", "most"), [(20, 4), (100, 4), (500, 10), (2500, 15), (10**6, 25)])
def test_small_tables_get_few_members(num_rows, most):
    assert abs(_ensemble.max_members(num_rows) - most) <= 0.5


def test_a_temperature_undoes_overconfidence():
    logits = RNG.normal(size=(20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > RNG.uniform(size=(20_000, 1))).argmax(1)
    target = Target(labels, np.ones(20_000))
    sharp = _ensemble.tempered(p, 1 / 2.5)
    assert _ensemble.fit_temperature(sharp, target) == pytest.approx(2.5, rel=0.05)
    assert _ensemble.fit_temperature(p, target) == pytest.approx(1.0, rel=0.05)
    clear = sharp.min(axis=1) > _ensemble.LOWEST
    np.testing.assert_allclose(_ensemble.tempered(sharp[clear], 2.5), p[clear], rtol=1e-9)


def test_conformal_thresholds_are_order_statistics():
    scores, weights = np.array([0.4, 0.1, 0.3, 0.2]), np.ones(4)
    assert _ensemble.conformal_threshold(scores, weights, 0.8) == 0.4  # ceil(5 · .8) = 4
    assert _ensemble.conformal_threshold(scores, weights, 0.5) == 0.3  # ceil(2.5) = 3
    assert _ensemble.conformal_threshold(scores, weights, 0.9) == math.inf  # five rows are needed
    for n in range(1, 40):
        for coverage in (0.1, 0.3, 0.5, 0.7, 0.9):
            rank = math.ceil(round((n + 1) * coverage, 9))
            expected = rank - 1.0 if rank <= n else math.inf
            assert _ensemble.conformal_threshold(np.arange(n), np.full(n, 0.3), coverage) == expected
    # The weights 1, 2, 3, 4 of 0.1 to 0.4, and 2.5 of a new row: 0.2 has a share of 3 / 12.5, and 0.3 one of 6 / 12.5.
    weight = np.array([4.0, 1.0, 3.0, 2.0])
    assert _ensemble.conformal_threshold(scores, weight, 0.24) == 0.2
    assert _ensemble.conformal_threshold(scores, weight, 0.25) == 0.3
    assert _ensemble.conformal_threshold(scores, weight, 0.81) == math.inf


def test_a_few_rows_that_are_all_right_do_not_make_probabilities_extreme():
    p = np.tile([0.7, 0.2, 0.1], (40, 1))
    target = Target(np.zeros(40, int), np.ones(40))
    assert 0.4 < _ensemble.fit_temperature(p, target) < 1
    extreme = _ensemble.smoothed(np.eye(3)[target.y], 40)
    np.testing.assert_allclose(extreme.sum(axis=1), 1)
    np.testing.assert_allclose(extreme[0], [1 - 2 / 123, 1 / 123, 1 / 123])  # ε / C = 1 / (3 · 41)

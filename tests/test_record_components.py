"""The first trial by components of regrets: closed forms against refits, and the rule against its definition."""

import numpy as np
import pytest

from experiments.blackbox.record_tables import components, report
from experiments.blackbox.record_tables.main import best_on_average
from experiments.blackbox.record_tables.tables import Records

pytestmark = pytest.mark.once  # an experiment


def test_predictions_without_a_family_are_those_of_a_fit_to_the_others():
    rng = np.random.default_rng(0)
    x, values, family = rng.normal(size=(12, 3)), rng.normal(size=(12, 2)), np.array(list("aabbbcdefghi"))
    gram = components.kernel(x, x, 1.0)
    predictions = components.left_out(gram, 0.5, values, family)
    for name in np.unique(family):
        rest, own = family != name, family == name
        fit = np.linalg.solve(gram[np.ix_(rest, rest)] + 0.5 * np.eye(rest.sum()), values[rest])
        np.testing.assert_allclose(predictions[own], gram[np.ix_(own, rest)] @ fit, rtol=1e-6, atol=1e-8)


def table(num_tasks=60, with_signal=True):
    """Two good configurations and a bad one. A feature says which one is best, and another says nothing."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (num_tasks, 2))
    sign = np.sign(x[:, 0]) if with_signal else rng.choice([-1.0, 1.0], num_tasks)
    regret = np.stack([0.4 - 0.4 * sign, 0.41 + 0.4 * sign, np.full(num_tasks, 1.0)], 1)
    fold = np.arange(num_tasks) % 5
    return Records("t", regret, x, np.arange(num_tasks), fold, [{"c": c} for c in range(3)])


@pytest.mark.parametrize("with_signal", [True, False])
def test_a_feature_that_tells_the_best_replaces_the_average_and_noise_does_not(with_signal):
    data = table(with_signal=with_signal)
    first = components.by_components(data)
    average = np.array([data.regret[t, best_on_average(data, t)[0]] for t in range(60)])
    if with_signal:
        assert first[1.0].mean() < 0.1 < 0.3 < average.mean()
    else:
        replaced = {num: np.mean(regrets != average) for num, regrets in first.items()}
        assert replaced[1.0] <= 0.25 and replaced[1.0] <= replaced[0.0]


def test_the_choice_is_the_largest_gain_above_its_deviations():
    data = table()
    expected = components.expect(data.regret, data.features, data.family, data.features[:9] + 0.05)
    for t in range(9):
        differences = []
        for c in range(3):
            direction = expected.directions[:, 0] - expected.directions[:, c]
            mean = expected.average[0] - expected.average[c] + expected.mean[t] @ direction
            of_average = np.var(expected.deviations[:, 0] - expected.deviations[:, c]) / 60
            differences.append((mean, np.sqrt(expected.variance[t] @ direction**2 + of_average)))
        for num in np.linspace(0, 40, 400):
            best = int(np.argmax([mean - num * deviation for mean, deviation in differences]))
            assert components.choose(expected, t, np.ones(3, bool), num) == best
        assert components.choose(expected, t, np.array([False, False, True]), 1.0) == 2


def test_a_failed_configuration_is_not_chosen_and_does_not_matter_elsewhere():
    data = table()
    data.error[:7, 1] = np.nan
    first = components.by_components(data)
    assert np.isfinite(first[0.0]).all() and np.isfinite(first[1.0]).all()


def test_the_outcomes_of_a_fold_do_not_change_its_own_choices():
    data = table()
    own = data.fold == 2
    other = data._replace(error=np.where(own[:, None], data.error[:, ::-1], data.error))
    chosen = [
        (case.regret[own] == first[own, None]).argmax(1)
        for case in (data, other)
        for first in [components.by_components(case)[0.0]]
    ]
    np.testing.assert_array_equal(chosen[0], chosen[1])


def test_first_trials_are_compared_over_families():
    data = table(10)._replace(family=np.array(list("aaaaabcdef")), fold=np.arange(10) % 5)
    reference, other = np.full(10, 0.5), np.array([0.4] * 5 + [0.5] * 5)
    lines = report.first_trials(data, {"a": reference, "b": other})
    assert lines[0].startswith("t, a: 0.5000, +0.0000 [+0.0000, +0.0000]") and "b: 0.4500, -0.0500 [-0." in lines[1]
    assert "other than the first method on 50% of the tasks" in lines[1]
    weights = report.family_weights(data.family)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 4])

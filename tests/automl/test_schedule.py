"""The order of the members of a portfolio, their expected seconds, and the splits of large tables."""

import concurrent.futures
from typing import Any

import numpy as np
import pytest

from metaopt.automl import _rows, _schedule, _workers
from metaopt.automl._portfolio import Member
from metaopt.automl._time_model import TimeModel


class Times:
    """Every fit takes the seconds of its settings."""

    def fit_seconds(self, kind, settings):
        return settings["seconds"]

    def network_seconds(self, settings, num_folds):
        return settings["seconds"] * num_folds

    def longest_seconds(self, kind, settings, num_folds, is_hurried):
        return 100.0 * settings["seconds"] + 600.0 * (not is_hurried)


@pytest.fixture
def run(monkeypatch):
    """A state with two folds on one worker, so a member takes twice the seconds of a fit."""
    monkeypatch.setattr(_workers, "can_start", lambda: False)  # starts no processes

    def make(limit, **seconds):
        kinds = {name: "network" if name.startswith("network") else "linear" for name in seconds}
        members = [Member(name, kinds[name], {"seconds": value}) for name, value in seconds.items()]
        folds: Any = [None, None]
        times: Any = Times()
        return _schedule._Run(members, _schedule.Work(folds, lambda _: (), times, _schedule.Clock(limit), 0.0, 1))

    return make


def order(run):
    """The names of the members in the order in which they begin, if no time passes."""
    names = []
    while (member := run.next_member()) is not None:
        names.append(member.name)
        run.parts[member.name] = {}
    return names


def test_a_quick_member_and_a_network_come_first_and_then_the_largest_gain_per_second(run):
    # gains per second: 1/1 / 20 = .05, 1/2 / 4 = .125, 1/5 / .4 = .5
    assert order(run(100, slow=10, middle=2, late=51, network=5, quick=0.2)) == ["quick", "network", "middle", "slow"]
    assert order(run(None, slow=10, middle=2, late=51)) == ["middle", "slow", "late"]
    assert order(run(None, first=4, second=3)) == ["first", "second"]  # 1/1 / 8 = .125, 1/2 / 6 = .083


def test_a_long_network_waits_for_its_turn(run):
    assert order(run(100, network=36, linear=2)) == ["linear", "network"]  # 72 s are above 70 % of the limit
    assert order(run(100, network=34, linear=2)) == ["network", "linear"]


def test_the_fastest_member_begins_if_none_fits_in_the_time(run, caplog):
    assert order(run(1, slow=10, faster=5)) == ["faster"]
    assert "the time limit is too short for any model; fitting faster anyway" in caplog.text


def test_finished_fits_correct_the_expected_seconds():
    times = TimeModel(1000, 10, 2)
    before = {kind: times.fit_seconds(kind, {}) for kind in ("linear", "lightgbm", "xgboost")}
    times.observe("linear", {}, 3 * before["linear"])
    assert all(np.isclose(times.fit_seconds(kind, {}), 3 * before[kind]) for kind in before)
    times.observe("lightgbm", {}, 12 * before["lightgbm"])
    assert np.isclose(times.fit_seconds("lightgbm", {}), 12 * before["lightgbm"])
    assert np.isclose(times.fit_seconds("xgboost", {}), 6 * before["xgboost"])  # the geometric mean of 3 and 12


def test_the_expected_seconds_of_linear_models_depend_on_their_columns():
    few, many = (TimeModel(1000, 10, 2, num_dense) for num_dense in (10, 110))
    assert few.fit_seconds("lightgbm", {}) == many.fit_seconds("lightgbm", {})
    assert many.fit_seconds("linear", {}) > 5 * few.fit_seconds("linear", {})


def test_when_a_fit_is_taken_to_hang():
    times, fresh = TimeModel(1000, 10, 2), TimeModel(1000, 10, 2)
    times.observe_network({}, 8, 0.01)
    times.observe("lightgbm", {}, 0.01)
    assert times.network_seconds({}, 8) < 0.1 * fresh.network_seconds({}, 8)
    # Faster fits do not shorten the wait: a new process compiles again.
    for kind, settings in (("network", {}), ("lightgbm", {}), ("linear", {})):
        assert times.longest_seconds(kind, settings, 8, True) == fresh.longest_seconds(kind, settings, 8, True)
    assert fresh.longest_seconds("network", {}, 8, True) > 250
    assert fresh.longest_seconds("linear", {}, 8, False) == fresh.longest_seconds("linear", {}, 8, True) + 600
    times.observe("linear", {}, 1000.0)
    assert times.longest_seconds("linear", {}, 8, True) > 20_000


@pytest.mark.parametrize(("limit", "results", "more"), [(60, 1, 0), (60, 0, 600), (None, 1, 600)])
def test_a_fit_has_more_time_without_a_limit_or_a_result(limit, results, more, run):
    state = run(limit, linear=1)
    future = concurrent.futures.Future()
    (_, member) = state.waiting["linear"]
    state.running[future], state.began[future] = (member, 0), 5.0
    state.results = dict.fromkeys(range(results))
    assert state.deadline(future) == 5 + 100 + more


@pytest.mark.parametrize("num_rows", [_rows.MAX_FOLD_ROWS, _rows.MAX_FOLD_ROWS + 1])
def test_a_large_table_has_one_split(num_rows):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_rows, 2)), rng.integers(0, 3, num_rows)
    splits = _rows.split_rows(_rows.sorted_rows(x, y, np.ones(num_rows)), 3, seed=0)
    assert len(splits) == (1 if num_rows > _rows.MAX_FOLD_ROWS else _rows.NUM_FOLDS)
    for train, valid in splits:
        assert abs(len(valid) - num_rows / 8) < 2
        np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(num_rows))

"""One episode a user: records in the order of time, gaps filled from other users, published baselines met."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import few_shot, tasks

KEY = jax.random.key(0)
USER = np.array(["b", "a", "b", "b", "a", "b", "a", "b"])
TIME = np.array([3.0, 1.0, 1.0, 2.0, 0.0, 5.0, 2.0, 4.0])
TABLE = tasks.from_user_records(np.stack([TIME, TIME**2], 1), 10 * TIME, USER, time=TIME)


def everybody(sample, num, key=0):
    batch = jax.jit(jax.vmap(sample, in_axes=(None, 0)))(jax.random.key(key), jnp.arange(num))
    return jax.tree.map(np.asarray, batch)


def test_the_first_records_are_the_support_and_what_follows_the_query():
    both = everybody(tasks.user_episodes(TABLE, num_support=2), 2)
    np.testing.assert_array_equal(both.support["y"], [[0, 10], [10, 20]])
    np.testing.assert_array_equal(both.query["y"], [[20, 0, 0], [30, 40, 50]])
    np.testing.assert_array_equal(both.query["mask"], [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(both.query["num_rows"], [1, 3])
    np.testing.assert_array_equal(both.query["x"][1], [[3, 9], [4, 16], [5, 25]])
    np.testing.assert_array_equal(both.meta["user"], [0, 1])
    one = everybody(tasks.user_episodes(TABLE, num_support=3, num_query=1, users=[1]), 1)
    np.testing.assert_array_equal(one.query["y"], [[40]])


@pytest.mark.once
def test_users_with_classes_go_with_heads_that_the_support_set_makes():
    table = TABLE._replace(y=(TIME > 1).astype(np.int32))
    sample = tasks.user_episodes(table, num_support=2)
    np.testing.assert_array_equal(everybody(sample, 2).support["class_mask"], np.ones((2, 2)))
    prototypes = few_shot.prototypical_networks(lambda params, batch: batch["x"])
    named = {"p": few_shot.adapted(prototypes, {"init": {}}, few_shot.linear_head(lambda params, batch: batch["x"]))}
    found = few_shot.evaluate_episodes(named, {"all": sample}, jax.random.key(0), each=2)
    # "b" adapts to rows 1 and 2, one of each class; 3, 4, 5 are nearer to 2. "a" adapts to 0 and 1, of one class.
    np.testing.assert_array_equal(found.scores["p"]["all"], [[0.0], [1.0]])


@pytest.mark.once
def test_windows_and_random_orders():
    sample = jax.jit(jax.vmap(tasks.user_episodes(TABLE, num_support=2, num_query=2, order="window")))
    batch = sample(jax.random.split(jax.random.key(0), 300))
    support, query, user = (np.asarray(v) for v in (batch.support["y"], batch.query["y"], batch.meta["user"]))
    assert (support[:, 1] - support[:, 0] == 10).all() and (query[:, 0] - support[:, 1] == 10).all()
    starts = np.bincount(support[user == 1, 0].astype(int) // 10)
    assert len(starts) == 4 and min(starts[1:]) > 20 and starts[0] == 0  # from 10, 20 or 30 on
    assert 100 < user.sum() < 200 and set(support[user == 0, 0].tolist()) == {0}
    table = TABLE._replace(time=None)
    batch = everybody(tasks.user_episodes(table, num_support=2, order="random"), 2, key=3)
    for i, expected in enumerate(([0, 10, 20], [10, 20, 30, 40, 50])):
        real = batch.query["y"][i][batch.query["mask"][i] > 0]
        assert sorted([*batch.support["y"][i], *real]) == expected


def test_standardized_by_the_others_and_gaps_marked():
    x = np.array([[1.0, 5.0], [3.0, np.nan], [5.0, 7.0], [100.0, np.nan]])
    table = tasks.from_user_records(x, [0, 1, 0, 1], [0, 0, 1, 2], feature_names=["p", "q"])
    done = tasks.standardize_users(table, [0, 1])
    assert done.feature_names == ("p", "q", "missing q") and done.y.dtype == np.int32
    np.testing.assert_allclose(done.x[:3].mean(0)[0], 0, atol=1e-6)
    scale = np.sqrt(8 / 3)
    np.testing.assert_allclose(done.x[:, 0], [-2 / scale, 0, 2 / scale, 97 / scale], rtol=1e-6)
    np.testing.assert_allclose(done.x[:, 1], [-1, 0, 1, 0])
    np.testing.assert_array_equal(done.x[:, 2], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.from_user_records(np.ones(3), [1, 2, 3], [0, 0, 0]), r"must be \[records, columns\]"),
        (lambda: tasks.from_user_records(np.ones((3, 1)), [1, 2], [0, 0, 0]), "`y` must have one entry"),
        (lambda: tasks.from_user_records(np.ones((2, 1)), [-1, 1], [0, 0]), r"must be 0..C-1.*got \[-1, 1\]"),
        (lambda: tasks.from_user_records(np.ones((2, 1)), [0, 2], [0, 0]), r"must be 0..C-1.*got \[0, 2\]"),
        (lambda: tasks.from_user_records(np.ones((2, 1)), [0, 2**62], [0, 0]), r"must be 0..C-1.*got \[0, 46116860"),
        (lambda: tasks.from_user_records(np.ones((3, 1)), [1, 2, 3], [0, 0, 0], feature_names="ab"), "1 names; got 2"),
        (lambda: tasks.user_episodes(TABLE, num_support=0), "`num_support` must be at least 1; got 0"),
        (lambda: tasks.user_episodes(TABLE, num_support=1.5), "`num_support` must be an integer of at least 1"),
        (lambda: tasks.user_episodes(TABLE, num_support=3), "User a has 3 records, but needs 3"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, order="past"), "must be one of 'time'"),
        (lambda: tasks.user_episodes(TABLE._replace(time=None), num_support=1), '`order` must be "random"'),
        (lambda: tasks.user_episodes(TABLE._replace(x=TABLE.x * np.nan), num_support=1), "`standardize_users`"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=[2]), r"integers in 0\.\.1, at least one; got \[2\]"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=[]), r"`users` must be indices .*; got \[\]"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=1), "`users` must be indices .*; got 1"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=np.array([False, True])), r"`np.flatnonzero\(mask\)`"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=[0, True]), r"got \[0, True\]"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=[1.7]), r"got \[1.7\]"),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=["1"]), r"got \['1'\].*`\[table.user_names.index"),
        *(
            (lambda user=user: tasks.user_episodes(TABLE, num_support=1)(KEY, user), rf"integer in 0\.\.1; got {user}")
            for user in (2, -1, 99, True, 1.0)
        ),
        (lambda: tasks.user_episodes(TABLE, num_support=1, users=[1])(KEY, 1), r"integer in 0\.\.0; got 1"),
        (
            lambda: tasks.from_user_records([["a"], ["b"]], [0.0, 1.0], [0, 0]),
            "`x` must be numbers; got <U1.*'b'.*text",
        ),
        (lambda: tasks.from_user_records(np.ones((2, 1)), ["a", "b"], [0, 0]), "`y` must be numbers.*np.unique"),
        (
            lambda: tasks.from_user_records(np.ones((2, 1)), [0.0, 1.0], [0, 0], time=["noon", "night"]),
            r"`time` must be numbers; got <U5, \['noon', 'night'\]: ISO 8601",
        ),
        (lambda: tasks.standardize_users(TABLE, np.array([True, True])), "`fit_on` must be indices"),
        (lambda: tasks.standardize_users(TABLE._replace(x=TABLE.x + np.inf), [0]), "`x` must be finite"),
        (lambda: tasks.user_episodes(TABLE._replace(y=TABLE.y * np.nan), num_support=1), "`y` must be finite"),
    ],
)
def test_what_is_no_user_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DATES = np.array(["2026-01-02", "NaT", "2026-01-01"], "datetime64[D]")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": [[0, 1], [np.nan, 1], [0, np.inf]]}, "got inf in row 2, column '1', of user 9"),
        ({"x": [[0, 1], [1e300, 1], [0, 1]]}, "`x` must be finite in float32, or NaN where missing; got inf in row 1"),
        ({"y": [1.0, np.nan, 2.0]}, "`y` must be finite in float32; got nan in row 1, of user 7"),
        ({"time": [0, 1, np.nan]}, "`time` must be finite in float64; got nan in row 2, of user 9"),
        ({"time": DATES}, "`time` must be finite in float64; got nan in row 1, of user 7"),
        ({"user": [0, 1, np.nan]}, "row 2 has none"),
        ({"user": ["a", np.nan, "b"]}, "row 1 has none"),
        ({"user": ["a", "b", None]}, "row 2 has none"),
    ],
)
def test_entries_that_say_nothing_are_refused(changed, message):
    records = {"x": [[0, 1], [np.nan, 1], [0, 1]], "y": [0.5, 1.0, 2.0], "user": [7, 7, 9]}
    records["time"] = np.where(np.isnat(DATES), DATES[0], DATES)
    assert tasks.from_user_records(**records).time.tolist() == [20455, 20455, 20454]  # days since 1970
    with pytest.raises(ValueError, match=message):
        tasks.from_user_records(**records | changed)


def test_large_names_of_users_stay_different_and_merged_values_are_reported(caplog):
    users = [2**63 + 1, 2**63, -1, 2**63]
    x = np.array([[2**24 + 1, 0], [2**24, 1], [2**24 + 2, 2], [7, 3]])
    table = tasks.from_user_records(x, np.zeros(4), users, feature_names=["id", "size"])
    assert table.user_names == ("-1", str(2**63), str(2**63 + 1))
    np.testing.assert_array_equal(table.user, [2, 1, 0, 1])
    assert "float32 merges 1 values of the column 'id'" in caplog.text and "'size'" not in caplog.text


def test_times_may_be_dates_of_any_kind():
    days = [datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 1)]
    for time in (days, [str(day) for day in days], ["2026-01-02", "2026-01-01"], [2.5, 1]):
        table = tasks.from_user_records([[0.0], [None]], [0.5, 1.0], [0, 0], time=time)
        assert table.time is not None and table.time.argsort().tolist() == [1, 0]
        np.testing.assert_array_equal(table.x, [[0], [np.nan]])
    with pytest.raises(ValueError, match="`time` must be finite"):
        tasks.from_user_records([[0.0], [1.0]], [0.5, 1.0], [0, 0], time=[days[0], None])


@pytest.mark.once
def test_places_of_users_are_integers_of_any_kind():
    sample = tasks.user_episodes(TABLE, num_support=2)
    for user in (1, np.int8(1), jnp.int32(1)):
        assert int(sample(KEY, user).meta["user"]) == 1
    for users in (range(1, 2), np.array([1], np.uint8), jnp.array([1]), {1}):
        assert everybody(tasks.user_episodes(TABLE, num_support=2, users=users), 1).meta["user"] == [1]

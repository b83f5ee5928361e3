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


def test_the_first_records_are_the_support_set_and_the_next_ones_the_query_set():
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
    evaluated = few_shot.evaluate_episodes(named, {"all": sample}, jax.random.key(0), each=2)
    # "b" adapts to rows 1 and 2, one of each class; 3, 4, 5 are nearer to 2. "a" adapts to 0 and 1, of one class.
    np.testing.assert_array_equal(evaluated.scores["p"]["all"], [[0.0], [1.0]])


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
    standardized = table.standardized([0, 1])
    assert standardized.feature_names == ("p", "q", "missing q") and standardized.y.dtype == np.int32
    np.testing.assert_allclose(standardized.x[:3].mean(0)[0], 0, atol=1e-6)
    scale = np.sqrt(8 / 3)
    np.testing.assert_allclose(standardized.x[:, 0], [-2 / scale, 0, 2 / scale, 97 / scale], rtol=1e-6)
    np.testing.assert_allclose(standardized.x[:, 1], [-1, 0, 1, 0])
    np.testing.assert_array_equal(standardized.x[:, 2], [0, 1, 0, 1])


def test_large_names_of_users_stay_different_and_merged_values_are_reported(caplog):
    users = [2**63 + 1, 2**63, -1, 2**63]
    x = np.array([[2**24 + 1, 0], [2**24, 1], [2**24 + 2, 2], [7, 3]])
    table = tasks.from_user_records(x, np.zeros(4), users, feature_names=["id", "size"])
    assert table.user_names == ("-1", str(2**63), str(2**63 + 1))
    np.testing.assert_array_equal(table.user, [2, 1, 0, 1])
    assert "float32 merges 1 values of the column 'id'" in caplog.text and "'size'" not in caplog.text


def test_times_may_be_dates_of_any_kind():
    table = tasks.from_user_records(
        [[0.0], [1.0]], [0.5, 1.0], [0, 0], time=np.array(["2026-01-02", "2026-01-01"], "M8[D]")
    )
    assert table.time.tolist() == [20455, 20454]  # days since 1970
    days = [datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 1)]
    for time in (days, [str(day) for day in days], ["2026-01-02", "2026-01-01"], [2.5, 1]):
        table = tasks.from_user_records([[0.0], [None]], [0.5, 1.0], [0, 0], time=time)
        assert table.time is not None and table.time.argsort().tolist() == [1, 0]
        np.testing.assert_array_equal(table.x, [[0], [np.nan]])


@pytest.mark.once
def test_places_of_users_are_integers_of_any_kind():
    sample = tasks.user_episodes(TABLE, num_support=2)
    for user in (1, np.int8(1), jnp.int32(1)):
        assert int(sample(KEY, user).meta["user"]) == 1
    for users in (range(1, 2), np.array([1], np.uint8), jnp.array([1]), {1}):
        assert everybody(tasks.user_episodes(TABLE, num_support=2, users=users), 1).meta["user"] == [1]

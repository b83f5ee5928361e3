"""Padding that changes nothing, buckets that cost little, batches, and rotating splits."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import base, tasks


def prepared(rows=90, columns=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = (np.arange(rows) % classes).astype(np.int32)
    x = (rng.normal(size=(rows, columns)) + y[:, None] * rng.normal(size=columns)).astype(np.float32)
    return tasks.prepare(tasks.Table(f"t{seed}", f"t{seed}", x, y, np.zeros(columns, bool)), seed=seed)


def padded(one, rows=(80, 40), num_features=7, num_classes=5, features=None):
    return tasks.to_task(one, rows=rows, num_features=num_features, num_classes=num_classes, features=features)


def masked_loss(params, data):
    w, b = params["w"] * data["feature_mask"][:, None], params["b"]
    logits = data["x"] @ w + b[None] + jnp.log(data["class_mask"])[None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), data["y"][:, None], axis=1)[:, 0]
    return jnp.sum(losses * data["mask"]) / jnp.sum(data["mask"])


RESPLIT = jax.jit(tasks.resplit)  # one program for all tests


@pytest.mark.once
def test_padding_changes_neither_loss_nor_gradient():
    one = prepared()
    shape = one.shape
    tight = padded(one, shape[:2], shape.features, shape.classes)
    loose = padded(one)
    assert loose.train["x"].shape == (80, 7) and tight.train["x"].shape == (54, 4)
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(7, 5)), "b": rng.normal(size=5)}
    small = {"w": params["w"][:4, :3], "b": params["b"][:3]}
    loss_and_grad = jax.jit(jax.value_and_grad(masked_loss))
    for part in ("train", "valid"):
        value, grads = loss_and_grad(params, getattr(loose, part))
        expected, expected_grads = loss_and_grad(small, getattr(tight, part))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        chex.assert_trees_all_close(
            {"w": grads["w"][:4, :3], "b": grads["b"][:3]}, expected_grads, rtol=1e-5, atol=1e-8
        )
        np.testing.assert_array_equal(grads["w"][4:], np.zeros((3, 5)))
        np.testing.assert_array_equal(grads["b"][3:], np.zeros(2))


def test_task_entries():
    one = prepared()
    task = padded(one, features=np.ones(3, np.float32))
    assert isinstance(task, base.Task) and task.features.shape == (3,)
    for part, rows, total in ((task.train, one.train, 80), (task.valid, one.valid, 40)):
        n = len(rows.y)
        np.testing.assert_array_equal(part["x"][:n, :4], rows.x)
        assert not part["x"][n:].any() and not part["x"][:, 4:].any()
        np.testing.assert_array_equal(part["y"], np.concatenate([rows.y, np.zeros(total - n)]))
        np.testing.assert_array_equal(part["mask"], np.arange(total) < n)
        np.testing.assert_array_equal(part["feature_mask"], [1, 1, 1, 1, 0, 0, 0])
        np.testing.assert_array_equal(part["class_mask"], [1, 1, 1, 0, 0])
        assert part["num_features"] == 4 and part["num_rows"] == n
        assert {k: v.dtype.name for k, v in part.items()} == {
            "x": "float32",
            "y": "int32",
            "mask": "float32",
            "feature_mask": "float32",
            "class_mask": "float32",
            "num_features": "float32",
            "num_rows": "int32",
        }


def cost(shape, width=64):
    return (shape[0] + shape[1]) * (shape[2] + width + shape[3])


def total_cost(shapes, buckets):
    return sum(cost(buckets.shapes[k]) for k in buckets.assignment)


def test_every_task_fits_its_bucket_and_more_buckets_cost_less():
    rng = np.random.default_rng(0)
    shapes = [tuple(int(v) for v in np.exp(rng.uniform(1, 7, 4))) for _ in range(40)]
    costs = []
    for most in (1, 2, 4, 6, 40):
        buckets = tasks.bucket(shapes, most)
        assert len(buckets.shapes) <= most and buckets.assignment.shape == (40,)
        for shape, k in zip(shapes, buckets.assignment, strict=True):
            assert all(np.array(shape) <= np.array(buckets.shapes[k]))
        for k, shape in enumerate(buckets.shapes):  # no bucket is larger than its largest table
            inside = np.array([s for s, j in zip(shapes, buckets.assignment, strict=True) if j == k])
            np.testing.assert_array_equal(inside.max(0), shape)
        own = [cost(s) for s in buckets.shapes]
        assert own == sorted(own)
        costs.append(total_cost(shapes, buckets))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 40 * cost(np.max(shapes, 0)) and costs[-1] == sum(map(cost, shapes))


@pytest.mark.parametrize("seed", range(6))
def test_buckets_are_near_the_optimum_by_enumeration(seed):
    rng = np.random.default_rng(seed)
    shapes = [tuple(int(v) for v in np.exp(rng.uniform(1, 6, 4))) for _ in range(7)]
    best = np.inf
    for labels in itertools.product(range(3), repeat=7):
        groups = [[s for s, k in zip(shapes, labels, strict=True) if k == j] for j in set(labels)]
        best = min(best, sum(len(g) * cost(np.max(g, 0)) for g in groups))
    total = total_cost(shapes, tasks.bucket(shapes, 3))
    assert best <= total <= 1.25 * best


def test_stack_and_unstack_are_inverse():
    some = [padded(prepared(rows=60 + 10 * i, seed=i), features={"f": np.float32(i)}) for i in range(3)]
    batch = tasks.stack(some)
    assert batch.train["x"].shape == (3, 80, 7) and batch.features["f"].shape == (3,)
    for one, other in zip(tasks.unstack(batch), some, strict=True):
        chex.assert_trees_all_equal(one, other)
        chex.assert_trees_all_equal_dtypes(one, other)


def rows_of(part):
    real = np.asarray(part["mask"]) > 0
    return np.concatenate([np.asarray(part["x"])[real], np.asarray(part["y"])[real, None]], axis=1)


@pytest.mark.once
def test_resplit_redraws_the_same_rows():
    task = padded(prepared(rows=97, classes=4), features=np.ones(2))
    new = RESPLIT(jax.random.key(0), task)
    before = np.concatenate([rows_of(task.train), rows_of(task.valid)])
    after = np.concatenate([rows_of(new.train), rows_of(new.valid)])
    assert not np.array_equal(rows_of(new.valid), rows_of(task.valid))
    np.testing.assert_array_equal(before[np.lexsort(before.T)], after[np.lexsort(after.T)])
    for part, old in ((new.train, task.train), (new.valid, task.valid)):
        for name in ("mask", "feature_mask", "class_mask", "num_features", "num_rows"):
            np.testing.assert_array_equal(part[name], old[name])
        padding = np.asarray(part["mask"]) == 0
        assert not np.asarray(part["x"])[padding].any() and not np.asarray(part["y"])[padding].any()
        chex.assert_trees_all_equal_shapes_and_dtypes(part, jax.tree.map(jnp.asarray, old))
    np.testing.assert_array_equal(new.features, task.features)
    other = RESPLIT(jax.random.key(1), task)
    assert not np.array_equal(rows_of(new.valid), rows_of(other.valid))
    chex.assert_trees_all_equal(tasks.resplit(jax.random.key(0), task), new)


def test_resplit_takes_real_rows_wherever_they_stand():
    """Their number follows the masks, also if only masks exclude rows."""
    task = padded(prepared(rows=97, classes=4))
    some = lambda part, masked_rows: {
        **part,
        "mask": np.where(np.isin(np.arange(len(part["mask"])), masked_rows), 0, part["mask"]),
    }
    fewer = task._replace(train=some(task.train, [0, 5, 9]), valid=some(task.valid, [1]))
    new = RESPLIT(jax.random.key(0), fewer)
    before, after = (np.concatenate([rows_of(t.train), rows_of(t.valid)]) for t in (fewer, new))
    np.testing.assert_array_equal(before[np.lexsort(before.T)], after[np.lexsort(after.T)])
    for part, old in ((new.train, fewer.train), (new.valid, fewer.valid)):
        num = int(old["mask"].sum())
        np.testing.assert_array_equal(part["mask"], np.arange(len(old["mask"])) < num)


@pytest.mark.once
def test_resplit_is_stratified_and_every_row_gets_its_turn():
    task = padded(prepared(rows=100, classes=4))
    total = np.bincount(rows_of(task.train)[:, -1].astype(int)) + np.bincount(rows_of(task.valid)[:, -1].astype(int))
    share = task.train["num_rows"] / (task.train["num_rows"] + task.valid["num_rows"])
    draws = jax.jit(jax.vmap(tasks.resplit, in_axes=(0, None)))(jax.random.split(jax.random.key(0), 300), task)
    num_draws: dict = {}
    for x, y, mask in zip(*(np.asarray(draws.valid[k]) for k in ("x", "y", "mask")), strict=True):
        counts = total - np.bincount(y[mask > 0], minlength=4)
        assert np.abs(counts - share * total).max() <= 1
        for row in x[mask > 0]:
            num_draws[row.tobytes()] = num_draws.get(row.tobytes(), 0) + 1
    assert len(num_draws) == total.sum()
    assert min(num_draws.values()) > 0.6 * 300 * (1 - share) and max(num_draws.values()) < 1.5 * 300 * (1 - share)


@pytest.mark.once
def test_resplit_of_a_batch_is_that_of_each_task():
    some = [padded(prepared(rows=60 + 20 * i, seed=i)) for i in range(3)]
    keys = jax.random.split(jax.random.key(2), 3)
    batch = jax.jit(jax.vmap(tasks.resplit))(keys, tasks.stack(some))
    for key, one, new in zip(keys, some, tasks.unstack(batch), strict=True):
        chex.assert_trees_all_equal(RESPLIT(key, one), new)

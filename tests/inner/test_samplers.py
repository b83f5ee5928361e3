"""Samplers: permutations, epochs, padding, tasks of different sizes in one program."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import _permutations, inner
from metaopt.inner import _samplers

KEY = jax.random.key(0)


def permutation(size, epoch=0, key=KEY):
    return _permutations.shuffled(key, jnp.full(size, epoch), jnp.arange(size), size)


@pytest.mark.once
def test_shuffled_is_a_permutation_for_every_size_and_epoch():
    padded = 40

    def entries(size, epoch):  # one program for every size
        return _permutations.shuffled(KEY, epoch, jnp.arange(padded) % size, size)

    sizes = jnp.arange(1, padded + 1)
    for epoch in (0, 1, 2**31 - 1):
        for size, row in zip(sizes, jax.jit(jax.vmap(entries, (0, None)))(sizes, jnp.int32(epoch)), strict=True):
            np.testing.assert_array_equal(np.sort(row[:size]), np.arange(size))
    for size in (1000, 65_537):
        np.testing.assert_array_equal(np.sort(permutation(size)), np.arange(size))


@pytest.mark.once
def test_shuffled_depends_on_key_and_epoch_alone():
    assert permutation(50).dtype == jnp.int32
    np.testing.assert_array_equal(permutation(50), permutation(50))
    assert np.mean(permutation(50) == permutation(50, epoch=1)) < 0.2
    assert np.mean(permutation(50) == permutation(50, key=jax.random.key(1))) < 0.2
    assert int(_permutations.shuffled(KEY, jnp.int32(3), jnp.int32(7), 50)) == int(permutation(50, epoch=3)[7])


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_shuffled_is_uniform():
    # Over 24,000 keys: all 24 orders of 4 entries, and where each of 10 goes. The bounds are the 99.99 % points.
    keys = jax.random.split(KEY, 24_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: permutation(4, key=key)))(keys))
    index = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    counts = np.bincount([index[tuple(order)] for order in orders.tolist()], minlength=24)
    assert chi_square(counts) < 58.6  # 23 degrees of freedom
    places = np.asarray(jax.jit(jax.vmap(lambda key: permutation(10, key=key)))(keys[:10_000]))
    table = np.stack([np.bincount(column, minlength=10) for column in places.T])
    assert chi_square(table) < 144.0  # 81 degrees of freedom
    # And over epochs of one key.
    epochs = jnp.arange(24_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda epoch: permutation(4, epoch)))(epochs))
    counts = np.bincount([index[tuple(order)] for order in orders.tolist()], minlength=24)
    assert chi_square(counts) < 58.6


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (5, 5), (3, 7), (1, 2)])
def test_minibatches_cover_each_row_once_an_epoch(size, batch_size):
    sample = jax.jit(inner.minibatch(batch_size))
    data = {"x": jnp.arange(size), "y": 10 * jnp.arange(size)}
    num_epochs = batch_size  # so that the steps divide evenly
    batches = [sample(KEY, jnp.int32(step), data) for step in range(size * num_epochs // batch_size)]
    for batch in batches:
        chex.assert_shape(batch["x"], (batch_size,))
        np.testing.assert_array_equal(batch["y"], 10 * batch["x"])
    rows = np.concatenate([batch["x"] for batch in batches]).reshape(num_epochs, size)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(size), (num_epochs, 1)))
    if size >= 10:
        assert len({tuple(row) for row in rows.tolist()}) == num_epochs  # reshuffled every epoch


def test_with_replacement_rows_are_independent_and_uniform():
    sample = inner.minibatch(20, replace=True)
    draws = jax.jit(jax.vmap(lambda step: sample(KEY, step, jnp.arange(10))))(jnp.arange(500))
    assert chi_square(np.bincount(np.ravel(draws), minlength=10)) < 33.7  # 9 degrees of freedom
    assert all(len(set(row)) < 20 for row in draws.tolist())


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("padding", ["num_rows", "mask", "callable"])
@pytest.mark.once
def test_padding_is_never_drawn_and_sizes_share_one_program(padding, replace):
    sizes, padded = jnp.array([3, 8, 5]), 8
    real = jnp.arange(padded)[None] < sizes[:, None]
    data = {"x": jnp.where(real, jnp.arange(padded)[None], -1)}
    count = None
    if padding == "num_rows":
        data["num_rows"] = sizes
    elif padding == "mask":
        data["mask"] = real.astype(float)
    else:
        count = lambda data: (data["x"] >= 0).sum()  # noqa: E731
    sample = chex.assert_max_traces(inner.minibatch(4, replace=replace, num_rows=count), n=1)
    chex.clear_trace_counter()
    draw = jax.jit(jax.vmap(jax.vmap(sample, (None, 0, None)), (None, None, 0)))
    batches = draw(KEY, jnp.arange(40), data)
    assert batches["x"].shape == (3, 40, 4)
    for size, rows in zip(sizes.tolist(), batches["x"], strict=True):
        assert set(np.ravel(rows).tolist()) == set(range(size))
    if padding == "num_rows":
        np.testing.assert_array_equal(batches["num_rows"][:, 0], sizes)


@pytest.mark.once
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_real_rows_are_drawn_wherever_they_stand(counted, replace):
    masks = jnp.array([[0, 1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]])
    data = {"x": jnp.tile(jnp.arange(8), (3, 1)), "mask": masks * 1.0}
    if counted:
        data["num_rows"] = masks.sum(1)
    draw = jax.jit(jax.vmap(jax.vmap(inner.minibatch(4, replace=replace), (None, 0, None)), (None, None, 0)))
    batches = draw(KEY, jnp.arange(42), data)
    assert (batches["mask"] == 1).all()
    for mask, rows in zip(masks, np.asarray(batches["x"]).reshape(3, -1), strict=True):
        real = np.flatnonzero(mask)
        assert set(rows.tolist()) == set(real.tolist())
        if not replace:  # each once an epoch
            np.testing.assert_array_equal(np.sort(rows.reshape(-1, len(real))), np.tile(real, (168 // len(real), 1)))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.once
def test_where_rows_stand_changes_no_batch(replace):
    """Nor does a mask of rows that come first: the batches are those of `num_rows` rows."""
    order, sample = np.array([6, 0, 2, 7, 3, 1, 4, 5]), inner.minibatch(3, replace=replace)
    first = {"x": jnp.arange(8.0), "mask": jnp.arange(8) < 5}
    place = np.sort(order.argsort()[:5])  # the real rows, in their order
    scattered = {"x": jnp.full(8, 7.0).at[place].set(jnp.arange(5.0)), "mask": jnp.zeros(8, bool).at[place].set(True)}
    assert not scattered["mask"][:5].all()
    for step in range(5):
        x, *others = (sample(KEY, step, d)["x"] for d in ({"x": jnp.arange(5.0)}, first, scattered))
        for other in (*others, sample(KEY, step, {"x": jnp.arange(8.0), "num_rows": 5})["x"]):
            np.testing.assert_array_equal(other, x)


@pytest.mark.once
def test_real_rows_by_masks_of_parts_of_rows_and_by_two_counts():
    """A row without a real part is padding; a mask in `shared` does not mask rows; a mask and a count are combined."""
    parts = {"x": jnp.arange(4), "mask": jnp.array([[0, 0], [1, 0], [0, 0], [1, 1]])}
    draws = jax.vmap(lambda step: inner.minibatch(2)(KEY, step, parts)["x"])(jnp.arange(9))
    assert set(np.ravel(draws).tolist()) == {1, 3} and _samplers.num_rows(parts) == 2
    whole = {"x": jnp.arange(4), "mask": None}  # is none
    assert _samplers.num_rows(whole) == 4 and jax.eval_shape(lambda: inner.minibatch(2)(KEY, 0, whole))["x"].shape == (
        2,
    )
    shared = {"x": jnp.arange(4), "mask": jnp.array([1.0, 0, 0])}
    draws = jax.vmap(lambda step: inner.minibatch(2, shared=("mask",))(KEY, step, shared)["x"])(jnp.arange(9))
    assert set(np.ravel(draws).tolist()) == {0, 1, 2, 3} and _samplers.num_rows(shared, ("mask",)) == 4
    mask = jnp.array([0, 1, 0, 1])
    for count, real in ((4, {1, 3}), (1, {1})):
        both = {"x": jnp.arange(4), "mask": mask, "num_rows": count}
        draws = jax.vmap(lambda step, both=both: inner.minibatch(2)(KEY, step, both)["x"])(jnp.arange(9))
        assert set(np.ravel(draws).tolist()) == real and _samplers.num_rows(both) == len(real)


def test_padding_changes_no_batch():
    data = {"x": jnp.arange(6.0), "num_rows": jnp.int32(6)}
    padded = {"x": jnp.pad(data["x"], (0, 4)), "num_rows": jnp.int32(6)}
    for step in range(4):
        chex.assert_trees_all_equal(*(inner.minibatch(4)(KEY, step, d) for d in (data, padded)))


def test_shared_entries_are_carried_whole():
    data = {"x": jnp.arange(6.0), "names": {"scale": jnp.arange(3.0)}, "width": jnp.array(2.0)}
    batch = inner.minibatch(2, shared=("names", "width"))(KEY, 0, data)
    chex.assert_trees_all_equal({**batch, "x": None}, {**data, "x": None})
    assert batch["x"].shape == (2,)
    assert _samplers.num_rows(data, ("names", "width")) == 6
    episode = {"y": jnp.arange(6), "class_mask": jnp.array([1.0, 1, 0])}  # has it by itself
    chex.assert_trees_all_equal(inner.minibatch(2)(KEY, 0, episode)["class_mask"], episode["class_mask"])
    own = {"y": jnp.arange(6), "class_mask": jnp.eye(6)}  # one for each row
    batch = inner.minibatch(2)(KEY, 0, own)
    chex.assert_trees_all_equal(batch["class_mask"], own["class_mask"][batch["y"]])


def test_data_of_any_structure():
    x, y = jnp.arange(12.0).reshape(6, 2), jnp.arange(6)
    for data in ((x, y), [x, {"y": y}], {"x": x, "nested": (y, None)}):
        batch = inner.minibatch(3)(KEY, 0, data)
        assert jax.tree.structure(batch) == jax.tree.structure(data)
        assert [leaf.shape[0] for leaf in jax.tree.leaves(batch)] == [3, 3]
    assert inner.minibatch(3)(KEY, 0, y).shape == (3,)
    assert inner.minibatch(3)(KEY, 0, np.arange(6)).shape == (3,)  # NumPy arrays too


def test_full_batch_is_the_data():
    data = {"x": jnp.arange(3.0)}
    assert _samplers.full_batch()(KEY, 5, data) is data

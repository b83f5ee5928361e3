"""Puts tasks of different sizes into one batch: padding, masks, and a few common shapes.

A compiled program has one shape, but tables have many. Each task is padded with zeros to the shape of its bucket, and
masks mark the real entries. A loss that uses the masks has the same value and gradient as without padding:

    ℓ(θ) = Σ_i mask_i loss(y_i, network_θ(x_i) + log class_mask) / Σ_i mask_i.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, base
from metaopt.tasks._prepare import PreparedTable, Rows, TaskShape


class Buckets(NamedTuple):
    """The bucket of each task, and the padded shape that the tasks of a bucket share.

    Attributes:
      assignment: [T] int32, the bucket of each task.
      shapes: the padded shape of each bucket.
    """

    assignment: np.ndarray
    shapes: tuple[TaskShape, ...]


def to_task(
    prepared: PreparedTable,
    *,
    rows: tuple[int, int],
    num_features: int,
    num_classes: int,
    features: Any = None,
) -> base.Task:
    """Pads a prepared table to a given shape.

    `train` (support) and `valid` (query) are dicts of NumPy arrays. Let N be the rows, D the columns and C the classes
    after padding: "x" [N, D] float32, "y" [N] int32, "mask" [N] float32 (1 for a real row, 0 for padding),
    "feature_mask" [D] float32, "class_mask" [C] float32, "num_features" [] float32, "num_rows" [] int32. Padding
    consists of zeros, at the end.

    Args:
      prepared: the table to pad; its test rows are not part of the task.
      rows: the number of rows of `train` and of `valid`, after padding.
      num_features: the number of columns after padding.
      num_classes: the number of classes after padding.
      features: meta-features, copied unchanged into the task.

    Returns:
      A `Task` of NumPy arrays.

    Raises:
      ValueError: if the table has no training row or no validation row, does not fit the shape, or has a NaN or
        infinite value.
    """
    shape = prepared.shape
    if 0 in (shape.train_rows, shape.valid_rows):
        raise ValueError(
            f"task {prepared.name} needs at least one row to train on and one to validate on, since a mean over only "
            f"padding is NaN; it has {shape}. Remove it, or split it differently (`prepare(..., valid_fraction=...)`)."
        )

    def pad(part: Rows, num_rows: int):
        x = np.zeros((num_rows, num_features), np.float32)
        x[: len(part.x), : part.x.shape[1]] = part.x
        y = np.zeros(num_rows, np.int32)
        y[: len(part.y)] = part.y

        def ones(real, total):
            return (np.arange(total) < real).astype(np.float32)

        return {
            "x": x,
            "y": y,
            "mask": ones(len(part.y), num_rows),
            "feature_mask": ones(prepared.num_features, num_features),
            "class_mask": ones(prepared.num_classes, num_classes),
            "num_features": np.float32(prepared.num_features),
            "num_rows": np.int32(len(part.y)),
        }

    task = base.Task(pad(prepared.train, rows[0]), pad(prepared.valid, rows[1]), features)
    _check_values(task, prepared.name)
    return task


def bucket(shapes: Sequence[TaskShape], max_buckets: int = 6, *, width: int = 64) -> Buckets:
    """Chooses a few padded shapes for many tasks, so that little computation is spent on padding.

    The cost of a task is the cost of one forward pass, after padding, of a network with `width` hidden units:
    (train_rows + valid_rows) (features + width + classes). At first, every different shape has its own bucket. The two
    buckets whose merger adds the least cost are merged, until few enough are left. Then every task moves to the
    cheapest bucket that it fits, and buckets shrink to their tasks, until nothing changes. Neither phase is guaranteed
    to find the optimum.

    Args:
      shapes: one per task; plain tuples are allowed.
      max_buckets: at least 1; each bucket costs one compilation.
      width: the width of the hidden layers in the networks that will be trained on the tasks.

    Returns:
      A NamedTuple: `assignment` [T] int32, the bucket of every task; and `shapes`, the padded `TaskShape` of every
        bucket, smallest cost first.
    """

    real, inverse, counts = np.unique(np.array(shapes, np.int64), axis=0, return_inverse=True, return_counts=True)
    merged = _merge(real, counts, max_buckets, width)
    cheapest_bucket, padded = _reassign(real, merged, width)
    order = np.argsort(_cost(padded, width), kind="stable")
    new_number = np.argsort(order)
    assignment = new_number[cheapest_bucket][inverse.reshape(-1)].astype(np.int32)
    return Buckets(assignment, tuple(TaskShape(*map(int, padded[k])) for k in order))


def _cost(shapes: np.ndarray, width: int) -> np.ndarray:
    """[...] the costs of tasks of `shapes` [..., 4], as `bucket` defines them."""
    rows, columns = shapes[..., 0] + shapes[..., 1], shapes[..., 2] + width + shapes[..., 3]
    return rows * columns.astype(float)


def _merge(real: np.ndarray, counts: np.ndarray, max_buckets: int, width: int) -> np.ndarray:
    """Merges buckets until `max_buckets` are left, always the two whose merger adds the least cost.

    Args:
      real: [S, 4] the different shapes of the tasks. At first, each is a bucket.
      counts: [S] the number of tasks of each shape.
      max_buckets: see `bucket`.
      width: see `bucket`.

    Returns:
      The shapes of the remaining buckets.
    """
    merged, sizes = real.copy(), counts.astype(float)
    while len(merged) > max_buckets:
        merged_shape = np.maximum(merged[:, None], merged[None])  # of each pair of buckets
        cost_now = sizes * _cost(merged, width)
        cost_of_pair = (sizes[:, None] + sizes[None]) * _cost(merged_shape, width)
        added_cost = cost_of_pair - cost_now[:, None] - cost_now[None]
        added_cost[np.tril_indices(len(merged))] = np.inf
        i, j = np.unravel_index(np.argmin(added_cost), added_cost.shape)  # i < j
        merged[i], sizes[i] = merged_shape[i, j], sizes[i] + sizes[j]
        merged, sizes = np.delete(merged, j, axis=0), np.delete(sizes, j)
    return merged


def _reassign(real: np.ndarray, merged: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves each shape to the cheapest bucket that it fits, and shrinks the buckets, until nothing changes.

    Returns:
      The bucket [S] of each shape in `real` [S, 4], and the shapes of the buckets. Buckets without tasks are removed.
    """
    while True:
        fits = (real[:, None] <= merged[None]).all(axis=-1)
        cheapest_bucket = np.argmin(np.where(fits, _cost(merged, width)[None], np.inf), axis=1)
        used_buckets, cheapest_bucket = np.unique(cheapest_bucket, return_inverse=True)
        shrunk = np.stack([real[cheapest_bucket == k].max(axis=0) for k in range(len(used_buckets))])
        if shrunk.shape == merged.shape and (shrunk == merged).all():
            return cheapest_bucket, merged
        merged = shrunk


def stack(tasks: Sequence[base.Task], names: Sequence[str] | None = None) -> base.Task:
    """Stacks tasks into a batch: every leaf gets one more leading axis.

    The function reads the values of the leaves, so it does not work under `jit`.

    Args:
      tasks: the tasks, all with the same structure, and with the same shape of each leaf.
      names: the names of the tasks, for error messages; None numbers them.

    Returns:
      A `Task` of JAX arrays [T, ...].

    Raises:
      ValueError: if structures or shapes differ.
      ValueError: if a leaf has a NaN or infinite value, or a label is not a class that "class_mask" allows.
    """
    task_names = [f"task {i}" for i in range(len(tasks))] if names is None else [f"task {name}" for name in names]
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tasks[0])
    paths = ["task" + jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
    rows = []
    for name, task in zip(task_names, tasks, strict=True):
        leaves, other = jax.tree.flatten(task)
        if other != structure:
            raise ValueError(
                f"{name} and {task_names[0]} differ in structure, {other} and {structure}; tasks of a batch must have "
                "the same entries (`features` of all of them, or of none)."
            )
        leaves = [np.asarray(leaf) for leaf in leaves]
        for path, leaf, first in zip(paths, leaves, rows[0] if rows else leaves, strict=True):
            _check_leaf(path, leaf, name)
            if leaf.dtype != first.dtype:  # NumPy would promote bytes of images and scaled images to one type
                raise ValueError(
                    f"{path} is {leaf.dtype} in {name} and {first.dtype} in {task_names[0]}: use one type."
                )
            if leaf.shape != first.shape:
                raise ValueError(
                    f"{path} is {leaf.shape} in {name} and {first.shape} in {task_names[0]}: pad both to the same "
                    "shape."
                )
        _checks.check_task_labels(name, task)
        rows.append(leaves)
    return jax.tree.unflatten(structure, [jnp.asarray(np.stack(leaf)) for leaf in zip(*rows, strict=True)])


def unstack(tasks: base.Task) -> list[base.Task]:
    """Returns the tasks of a batch, one by one.

    Args:
      tasks: a batch, as `stack` returns it.

    Returns:
      The T tasks.
    """
    leaves, structure = jax.tree.flatten(tasks)
    return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]


def resplit(key: jax.Array, task: base.Task) -> base.Task:
    """Draws new training and validation rows from both parts together. Each part keeps its number of real rows.

    With a new split in each step, λ does not adapt to one choice of validation rows. The function is pure and works
    under `jit` and `vmap`; in reverse mode, gradients pass to the rows. The split is stratified: rows are ranked at
    random within their class. The rows with the lowest rank / (rows of the class) become training rows. So each class
    has its share of the training rows, rounded up where possible. If there are at least as many training rows as
    classes, every class has a training row.

    Args:
      key: consumed.
      task: one task, as `to_task` returns it; for a batch, use `vmap` over keys and tasks. All entries except x, y and
        mask stay unchanged.

    Returns:
      The task with other rows in its parts; padding stays at the end.
    """
    train, valid = task.train, task.valid

    def join(name):
        return jnp.concatenate([train[name], valid[name]])

    real, y = join("mask") > 0, join("y")
    total = y.shape[0]
    tie_key, order_key = jax.random.split(key)
    label = jnp.where(real, y, jnp.iinfo(y.dtype).max)
    ordered = jnp.lexsort((jax.random.uniform(tie_key, (total,)), label))
    grouped = label[ordered]
    start = jnp.searchsorted(grouped, grouped, side="left")
    count = jnp.searchsorted(grouped, grouped, side="right") - start
    share = (jnp.arange(total) - start) / count
    shuffle = jax.random.uniform(order_key, (total,))[ordered]
    padding = ~real[ordered]
    chosen = ordered[jnp.lexsort((shuffle, share, padding))]

    def num_real(part: Mapping[str, jax.Array]) -> jax.Array:
        return (part["mask"] > 0).sum()

    def take(part: Mapping[str, jax.Array], offset) -> dict[str, jax.Array]:
        size = part["y"].shape[0]
        inside = jnp.arange(size) < num_real(part)
        index = chosen[jnp.minimum(offset + jnp.arange(size), total - 1)]
        x, y = join("x")[index], join("y")[index]
        mask = inside.astype(part["mask"].dtype)
        rows = {"x": jnp.where(inside[:, None], x, 0), "y": jnp.where(inside, y, 0), "mask": mask}
        return {**part, **rows}

    return task._replace(train=take(train, 0), valid=take(valid, num_real(train)))


def _check_values(task: base.Task, name: str) -> None:
    """Raises ValueError if a padded task has a non-finite value, or a label that is not a class."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(task)[0]:
        _check_leaf("task" + jax.tree_util.keystr(path), np.asarray(leaf), f"task {name}")
    _checks.check_task_labels(f"task {name}", task)


def _check_leaf(path: str, leaf: np.ndarray, name: str) -> None:
    if np.issubdtype(leaf.dtype, np.floating) and not _checks.is_finite(leaf).all():
        raise ValueError(
            f"{path} of {name} has NaN or infinite values in {jax.dtypes.canonicalize_dtype(leaf.dtype)}. Fill gaps in "
            "the rows with `tasks.prepare`; scale meta-features with `FeatureScaling.transform`."
        )

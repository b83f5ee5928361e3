"""Features and rows of a new task, and the parts of a surrogate that depend on them."""

import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import base, tasks
from metaopt.blackbox import _surrogates
from metaopt.blackbox._datasets import dataset_features, is_dataset, kind_of

ROWS = ("x", "y", "mask", "feature_mask", "class_mask")  # the arrays of a labeled table that an embedding reads


_KIND_TEXT = {"table": "a table", "images": "images", None: "no tables or images"}  # kinds of data in messages


class NewTask(NamedTuple):
    """The parts of a surrogate that depend on the features of a new task.

    Attributes:
      weights: [S + E] prior weights of the earlier tasks and of the deep kernels.
      deep: `DeepKernel`s with the task's features, or None.
      transformers: a `Transformer` with the task's features, or None.
    """

    weights: jax.Array
    deep: Any
    transformers: Any


def new_task_of(surrogate: _surrogates.Surrogate, new_task: Any, reads: str | None = None) -> NewTask:
    """Specializes a surrogate to a task, and warns if the task's features do not match those of the training.

    Warnings point at the line that calls the public function. This requires that the public function runs within
    `_meta_search.in_precision`, and calls this function directly.

    Args:
      surrogate: the model of the earlier tasks.
      new_task: a `base.Task`, features [F], a `tasks.Table`, a pair (x, y), or None.
      reads: "table" or "images" if the features of earlier tasks are those of their data (`dataset_features`).

    Returns:
      A `NewTask`.

    Raises:
      ValueError: if the features have another shape than those of the training.
      ValueError: if `new_task` is a table or images, and training did not have such data.
      KeyError: if the rows lack an array.
    """
    if is_dataset(new_task) and reads == kind_of(new_task):
        new_task = dataset_features(new_task)
    elif is_dataset(new_task) and not isinstance(new_task, tasks.Table):
        raise ValueError(
            f"The new task is {_KIND_TEXT[kind_of(new_task)]} and its labels, but training had {_KIND_TEXT[reads]}. "
            "Pass the data of earlier tasks to `train_meta_optimizer(datasets=)`, as pairs (x, y) and not as dicts."
        )
    features, stacklevel = features_of(new_task), 4
    num_features = len(surrogate.sorted_features)
    if features is not None and num_features and np.shape(features) != (num_features,):
        raise ValueError(f"A new task must have features of shape [{num_features}]; got shape {np.shape(features)}.")
    if features is not None and not num_features:
        warnings.warn(
            "The new task's features are ignored, because training had no features. Pass the features of the "
            "earlier tasks to `train_meta_optimizer(features=)`, or pass None for the new task.",
            stacklevel=stacklevel,
        )
    if features is None and num_features and isinstance(new_task, base.Task):
        warnings.warn(
            f"The new task has no `features`, but training used [{num_features}] of each task; they count as "
            "unknown here. Pass them with `tasks.to_task(..., features=)`, or pass None if nothing is known.",
            stacklevel=stacklevel,
        )
    rows = new_task.train if isinstance(new_task, base.Task) else None
    if rows is not None and surrogate.embedding is not None:
        rows = {name: np.asarray(rows[name]) for name in ROWS}  # JAX arrays would keep the caller's precision
    specialized = _surrogates.at_task(surrogate, features, rows)
    weights = _surrogates.task_weights(surrogate, features, rows)
    return NewTask(weights, specialized.deep, specialized.transformers)


def features_of(new_task: Any) -> np.ndarray | None:
    """[F] features of a new task, or None if nothing is known about it.

    Args:
      new_task: a `base.Task`, features, or None.

    Raises:
      ValueError: if `new_task` is anything else, such as a `tasks.Table`.
    """
    features = new_task.features if isinstance(new_task, base.Task) else new_task
    if features is None:
        return None
    try:
        array = np.asarray(features, float)
    except (TypeError, ValueError):
        array = np.zeros(())
    if array.ndim != 1:
        advice = ""
        if isinstance(new_task, (tasks.Table, tasks.PreparedTable)):
            advice = (
                " A table's features are `scaling.transform(tasks.metafeatures(table), clip=3.0)`, scaled "
                "as those of earlier tasks (`tasks.fit_scaling`). If g reads rows, pass a Task, "
                "`tasks.to_task(tasks.prepare(table), ...)` with the sizes of the training tasks. With "
                "`train_meta_optimizer(datasets=)` of Tables, a Table is enough."
            )
        elif array.ndim > 1:  # also a frame of numbers
            advice = " If g was trained with `datasets` of tables or images, pass labels too: `g.predict(x, y)`."
        elif hasattr(features, "columns"):
            advice = (
                " If g was trained with `datasets` of Tables, make a `tasks.Table` of this frame, too: "
                "`tasks.fit_encoder` encodes its columns, and `tasks.fit_labels` its labels."
            )
        raise ValueError(
            "`new_task` must be a `base.Task` with `features`, those features as an array of numbers [F], or None; got "
            f"{f'shape {np.shape(features)}' if array.ndim else type(features).__name__}.{advice}"
        )
    return array

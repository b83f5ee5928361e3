"""Reads the mask and checks the labels of a batch of rows, which is a dict with inputs "x", labels "y" and masks."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks


def row_mask(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Returns the mask of a batch's rows, [N], in the form that `Supernet.apply` takes.

    Args:
      batch: a dict with "x" [N, ...].

    Returns:
      The entry "mask", [N]. None if the batch has no mask, or if its mask has the shape [N, ...] and marks parts of
      rows, such as positions. A loss may use such a mask to exclude these parts.

    Raises:
      ValueError: if the batch is not a dict with "x", or if "mask" is neither [N] nor [N, ...] with several parts per
        row. For example, [N, 1] is invalid.
    """
    if not isinstance(batch, Mapping) or "x" not in batch:
        got = f"a dict of {[*batch]}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'A batch of rows must be a dict with the inputs as "x" [N, ...]; got {got}. The default loss also reads '
            'labels as "y" [N]. For arrays x and y, use '
            '`base.Task({"x": x, "y": y}, {"x": x_valid, "y": y_valid})`.'
        )
    mask, rows = batch.get("mask"), np.shape(batch["x"])[:1]
    if mask is None or np.shape(mask) == rows:
        return mask
    if np.shape(mask)[:1] != rows or math.prod(np.shape(mask)[1:]) <= 1:
        raise ValueError(
            f'"mask" must be [N] = {rows}, 1 for a real row of "x" and 0 for padding; got shape {np.shape(mask)}. Use '
            "`mask[:, 0]` for a column [N, 1]."
        )
    return None


def one_hot(batch: Mapping[str, Any], dtype: Any) -> jax.Array:
    """Returns the classes as vectors, [N, C], with zeros in padded rows.

    Args:
      batch: {"y" [N], "mask" [N], "class_mask" [C]}.
      dtype: of the result.
    """
    y = jnp.asarray(batch["y"], jnp.int32)  # in 8 bits, class 256 would be the same as class 0
    return jax.nn.one_hot(y, len(batch["class_mask"]), dtype=dtype) * batch["mask"][:, None]


def check_labels(batch: Any, num_outputs: int, shape: tuple[int, ...] | None = None, *, name: str = '"y"') -> None:
    """Raises ValueError if labels of real rows are not classes. For traced labels it checks only type and shape.

    Args:
      batch: a dict with "y", and optionally "x", "mask" and "class_mask". A value that is not a mapping, or has no "y",
        passes.
      num_outputs: C.
      shape: the required shape of the labels, [N, positions...]; None does not check it.
      name: the name of the labels in the error messages.

    Raises:
      ValueError: if labels are not integers (or booleans), do not match the rows of "x" in number, or have another
        shape.
      ValueError: if "class_mask" is not [C].
      ValueError: if a label is below 0 or above C - 1, or is a class that "class_mask" leaves out.
    """
    if not isinstance(batch, Mapping) or batch.get("y") is None:
        return
    _check_form(batch, num_outputs, shape, name)
    y, mask = batch["y"], batch.get("mask")
    if mask is not None and np.shape(mask) not in (np.shape(y), np.shape(y)[:1]):
        mask = None  # a mask of something other than rows
    name = f"The labels {name} of a network with {num_outputs} outputs (classes)"
    _checks.check_labels(name, y, num_outputs, mask=mask, class_mask=batch.get("class_mask"))


def _check_form(batch: Mapping[str, Any], num_outputs: int, shape: tuple[int, ...] | None, name: str) -> None:
    """Raises ValueError if the shape or type of "y" [*shape] or the shape of "class_mask" is wrong.

    Traced arrays are checked, too.
    """
    y, x, classes = (batch.get(name) for name in ("y", "x", "class_mask"))
    dtype, y_shape = getattr(y, "dtype", None) or np.asarray(y).dtype, np.shape(y)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_)):
        raise ValueError(
            f"The labels {name} must be integers in 0..{num_outputs - 1}, or booleans; got {dtype}. Number the "
            "classes (`np.unique(y, return_inverse=True)[1]`), or pass your own `loss` if the targets are not classes."
        )
    x_shape = getattr(x, "shape", None)  # with another loss, x may be a tree
    if x_shape is not None and x_shape[:1] != y_shape[:1]:
        counts = " and ".join(str(shape[0]) if shape else "no rows" for shape in (x_shape, y_shape))
        raise ValueError(f'"x" and "y" must have the same number of rows; got {counts}.')
    if shape is not None and y_shape != shape:
        raise ValueError(
            f"The labels {name} must have the shape {shape}, the outputs' shape {(*shape, num_outputs)} without the "
            f"last axis; got {y_shape}. Use `y[:, 0]` for a column of labels [N, 1], `y.argmax(-1)` for one-hot rows "
            "[N, C], and `hypergrad.over_tasks` for a batch of tasks."
        )
    if classes is not None and np.shape(classes) != (num_outputs,):
        raise ValueError(
            f'"class_mask" must be [C] = ({num_outputs},), one entry for each output of the network, 1 for '
            f"a class of the task and 0 for another; got shape {np.shape(classes)}. For episodes of several numbers of "
            "classes, use a head that the support set makes (`few_shot.proto_maml`, `few_shot.ridge_head`), and "
            "`hypergrad.over_tasks` for a batch of tasks."
        )

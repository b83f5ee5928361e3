"""Samplers: which rows of the data a step sees, as a pure function of a key and the step's number."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from metaopt import base
from metaopt.base import shuffled


class Sampler(Protocol):
    def __call__(self, key: jax.Array, step: jax.Array, data: base.Data) -> base.Batch:
        """The batch of step number `step`; `key` is the same for all steps of one training."""
        ...


def full_batch() -> Sampler:
    """Every step sees all of the data.

    Returns:
      A `Sampler`.
    """
    return lambda key, step, data: data


def num_rows(data: base.Data, shared: Sequence[str] = ()) -> int | jax.Array:
    """The number of real rows N: of `data["mask"]` those above 0, else `data["num_rows"]`, else the leading axis.

    Real are the rows that "mask" [N] says, wherever they stand (of a mask of parts of rows [N, ...], those with a part
    that is real), and of them the first "num_rows", where there is such a number. Without a mask real rows come first,
    and padding follows them.

    Args:
      data: a tree of arrays with the rows as their leading axis.
      shared: entries of a dict of data that have no axis of rows; a "mask" among them is none of rows.

    Returns:
      An int, or [] where it is an array in the data.

    Raises:
      ValueError: a leaf has another leading axis than the rest; `shared` names what is not there.
    """
    rows = _split(data, shared)[0]
    padded, real = _check_rows(rows), _real(rows)
    counted = isinstance(data, dict) and "num_rows" in data
    if real is None:
        return data["num_rows"] if counted else padded
    return jnp.minimum(data["num_rows"], real.sum()) if counted else real.sum()


def _real(rows: base.Data) -> jax.Array | None:
    """[N] bool, which rows are no padding, where a mask says it."""
    if not isinstance(rows, dict) or rows.get("mask") is None:
        return None
    mask = jnp.asarray(rows["mask"]) > 0
    return mask.any(tuple(range(1, mask.ndim)))


def _split(data: base.Data, shared: Sequence[str]) -> tuple[base.Data, dict[str, Any]]:
    """What has an axis of rows, and what every batch carries whole."""
    if isinstance(shared, str):
        raise ValueError(f"`shared` must be a sequence of names, such as ({shared!r},); got the string {shared!r}.")
    if not isinstance(data, dict):
        if shared:
            raise ValueError(f"`shared` names entries of a dict; got data of type {type(data).__name__}.")
        return data, {}
    missing = sorted(set(shared) - set(data))
    if missing:
        raise ValueError(f"`shared` names {', '.join(missing)}, and the data have {', '.join(map(str, data))}.")
    whole = {*shared, "num_rows"} & set(data)
    if "class_mask" in data and jnp.ndim(data["class_mask"]) == 1:  # as episodes have it: [C], and not one for each row
        whole.add("class_mask")
    return {k: v for k, v in data.items() if k not in whole}, {k: data[k] for k in whole}


def _check_rows(rows: base.Data) -> int:
    """The length of the leading axis, padding included; an index beyond another leaf's rows would not raise."""
    shapes = {jax.tree_util.keystr(p) or "itself": jnp.shape(v) for p, v in jax.tree_util.tree_leaves_with_path(rows)}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        raise ValueError(
            f"Every leaf of the data must have the rows as its leading axis, at least one; got shapes {shapes}. Name "
            "the entries that all batches share: `minibatch(..., shared=(name, ...))`."
        )
    return lengths.pop()[0]


_num_rows = num_rows  # `minibatch` has an argument of that name


def minibatch(
    batch_size: int,
    *,
    replace: bool = False,
    shared: Sequence[str] = (),
    num_rows: Callable[[base.Data], Any] | None = None,
) -> Sampler:
    """Minibatches of B real rows: without replacement (each row once an epoch, reshuffled every epoch), or with.

    Padding by "mask" is not drawn, wherever it stands.

    Args:
      batch_size: B, at least 1. May exceed the number of rows: a batch then spans epochs.
      replace: draw rows independently.
      shared: entries of a dict of data that have no axis of rows and that every batch carries whole, besides
        "num_rows" and a "class_mask" [C], which all do.
      num_rows: `data -> N`: the first N rows are real, whatever a mask says; by default those are that
        `inner.num_rows` counts. May differ between tasks: all share one compiled program.

    Returns:
      A `Sampler`; batches look like the data with B in the place of the axis of rows.

    Raises:
      ValueError: `batch_size` is below 1; at trace time, leaves of the data disagree on the number of rows, or `shared`
        names what is not there.
    """
    base.check_integer("batch_size", batch_size, 1)
    count = num_rows or functools.partial(_num_rows, shared=shared)

    def sample(key, step, data):
        rows, whole = _split(data, shared)
        _check_rows(rows)
        size = count(data)
        if replace:
            index = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, size)
        else:
            place = jnp.asarray(step, jnp.int32) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
            index = shuffled(key, place // size, place % size, size)
        real = _real(rows) if num_rows is None else None
        if real is not None:  # which rows they are, wherever they stand
            index = jnp.flatnonzero(real, size=len(real))[index]
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], rows)
        return {**batch, **whole} if isinstance(data, dict) else batch

    return sample

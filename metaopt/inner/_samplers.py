"""Samplers: they select the rows of the data for a step, as pure functions of a key and the step's number."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from metaopt import _checks, base
from metaopt._permutations import shuffled


class Sampler(Protocol):
    """Selects the rows of each inner step: `(key, step, data) -> batch`, pure; `key` is the same for a whole run."""

    def __call__(self, key: jax.Array, step: jax.Array, data: base.Data) -> base.Batch:
        """Returns the batch of step number `step`. `key` is the same for all steps of one training run."""
        ...


def full_batch() -> Sampler:
    """Returns a sampler that gives all of the data to every step.

    Returns:
      A `Sampler`.
    """
    return lambda key, step, data: data


def num_rows(data: base.Data, shared: Sequence[str] = ()) -> int | jax.Array:
    """Returns the number of real rows N, without padding.

    A "mask" [N] marks real rows by entries above 0; they may be anywhere. A mask of parts of rows, [N, ...], marks a
    row as real if one of its parts is real. Without a mask, the first `data["num_rows"]` rows are real. Without such a
    number, all rows are real. With both, N is the smaller of "num_rows" and the number of marked rows.

    Args:
      data: a tree of arrays with the rows as their leading axis.
      shared: entries of a dict of data without an axis of rows. A "mask" among them does not mark rows.

    Returns:
      An int, or an array of shape [] if N depends on an array in the data.

    Raises:
      ValueError: if the leading axes of the leaves differ, or `shared` names an entry that the data do not have.
    """
    rows = _split_rows(data, shared)[0]
    padded, real = _check_rows(rows), _real(rows)
    counted = isinstance(data, dict) and "num_rows" in data
    if real is None:
        return data["num_rows"] if counted else padded
    return jnp.minimum(data["num_rows"], real.sum()) if counted else real.sum()


def _real(rows: base.Data) -> jax.Array | None:
    """[N] bool, whether each row is real according to the mask; None without a mask."""
    if not isinstance(rows, dict) or rows.get("mask") is None:
        return None
    mask = jnp.asarray(rows["mask"]) > 0
    return mask.any(tuple(range(1, mask.ndim)))


def _split_rows(data: base.Data, shared: Sequence[str]) -> tuple[base.Data, dict[str, Any]]:
    """The entries that have an axis of rows, and the entries that every batch carries whole."""
    missing = sorted(set(shared) - set(data if isinstance(data, dict) else ()))
    if missing:
        entries = ", ".join(map(str, data)) if isinstance(data, dict) else f"no names ({type(data).__name__})"
        raise ValueError(
            f"`shared` names entries that the data do not have: {', '.join(missing)}. The data have {entries}."
        )
    if not isinstance(data, dict):
        return data, {}
    whole = {*shared, "num_rows"} & set(data)
    if "class_mask" in data and jnp.ndim(data["class_mask"]) == 1:  # [C], as in episodes, not one per row
        whole.add("class_mask")
    return {k: v for k, v in data.items() if k not in whole}, {k: data[k] for k in whole}


def _check_rows(rows: base.Data) -> int:
    """Returns the length of the leading axis, padding included. Raises ValueError if it is 0 or differs between leaves.

    JAX does not raise for an index beyond the end of a shorter leaf.
    """
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
    """Returns a sampler of minibatches of B real rows.

    Without replacement, each row occurs once per epoch, in a new order in every epoch. Rows that "mask" marks as
    padding are not drawn, wherever they are.

    Args:
      batch_size: B, at least 1. May exceed the number of rows: a batch then spans epochs.
      replace: whether to draw rows independently, with replacement.
      shared: the entries of a dict of data that have no axis of rows. Every batch gets them whole. It also gets
        "num_rows" and a "class_mask" [C] whole, if the data have them.
      num_rows: `data -> N`: the first N rows are real, and masks are ignored. By default, positive entries of "mask"
        mark the real rows. With a mask [N, ...] of parts of rows, a row is real if one of its parts is real. Without a
        mask, the first `data["num_rows"]` rows are real, or all. N may differ between tasks, which share one compiled
        program.

    Returns:
      A `Sampler`. Batches look like the data, with B instead of the length of the axis of rows.

    Raises:
      ValueError: if `batch_size < 1`.
      ValueError: at trace time, if leaves of the data disagree on the number of rows, or `shared` names an entry that
        the data do not have.
    """
    _checks.check_integer("batch_size", batch_size, 1)
    count = num_rows or functools.partial(_num_rows, shared=shared)

    def sample(key, step, data):
        rows, shared_entries = _split_rows(data, shared)
        _check_rows(rows)
        size = count(data)
        if replace:
            index = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, size)
        else:
            position = jnp.asarray(step, jnp.int32) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
            index = shuffled(key, position // size, position % size, size)
        real = _real(rows) if num_rows is None else None
        if real is not None:  # the marked rows may be anywhere
            index = jnp.flatnonzero(real, size=len(real))[index]
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], rows)
        return {**batch, **shared_entries} if isinstance(data, dict) else batch

    return sample

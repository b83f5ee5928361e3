"""Which space a program converts coordinates by, so that a run with another space is noticed.

Coordinates of two spaces of one structure look alike, and each space gives another λ for them. `fit` and `fine_tune`
convert λ by their `space`. While they trace a step, `recording` notes by which spaces the problem converts; `check`
compares them.
"""

import contextlib
import contextvars
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_log = logging.getLogger("metaopt")
_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)
# Step -> the spaces that it converts by. JAX traces a step only once, so a second run of it records nothing.
_RECORDS: weakref.WeakKeyDictionary[Callable, list] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def recording(step: Callable) -> Iterator[None]:
    """Records the spaces by which coordinates are converted meanwhile, as those of `step`; the innermost one counts.

    Args:
      step: the function that is traced or called.

    Returns:
      A context manager.
    """
    record: list = []
    try:
        with _noting(record):
            yield
    finally:
        known = _RECORDS.setdefault(step, [])
        known.extend(space for space in record if not _is_in(space, known))


@contextlib.contextmanager
def _noting(record: list) -> Iterator[None]:
    """Puts the spaces that are noted meanwhile into a list."""
    token = _RECORD.set(record)
    try:
        yield
    finally:
        _RECORD.reset(token)


def note(space: Any) -> None:
    """Notes that coordinates are converted by this space."""
    record = _RECORD.get()
    if record is not None and not _is_in(space, record):
        record.append(space)


def _is_in(space: Any, record: list) -> bool:
    return any(space is other for other in record)


def traced_once(function: Callable) -> Callable:
    """Returns the function such that JAX traces it once for its shapes, also if several programs contain it.

    Without this, tracing a long training run takes seconds for each of them. The programs are the same. Each call
    notes the spaces that its trace has noted. As with `jax.jit`, the trace keeps the values that the function had read
    from outside its arguments, also outside `jit`.

    Args:
      function: of arrays and trees of arrays.

    Returns:
      The function.
    """
    noted: list = []

    @functools.partial(jax.jit, inline=True)
    def traced(*args):
        with _noting(noted):  # a name of this module: cloudpickle copies what else the function reads
            return function(*args)

    def call(*args):
        results = traced(*args)
        for space in noted:
            note(space)
        return results

    return call


def check(step: Callable, space: Any) -> None:
    """Compares the spaces of a step with the space of a run.

    A step that converts nothing gives a warning in the log and no error, since it may call a function that was compiled
    before.

    Args:
      step: as for `recording`.
      space: a tree of leaves, or None for a run without a space.

    Raises:
      ValueError: if the step converts coordinates of this structure, but only by another formula.
    """
    if space is None or step not in _RECORDS:
        return
    if not _RECORDS[step]:
        _log.warning(
            "`space` is given, but nothing in the estimator converts unconstrained coordinates to λ: its loss takes "
            "them as they are. Build the estimator from `spaces.constrain(problem, space)`, or omit `space`."
        )
        return
    structure = jax.tree.structure(space)
    alike = [other for other in _RECORDS[step] if jax.tree.structure(other) == structure]
    differences = [pair for other in alike if (pair := _difference(space, other))]
    if alike and len(differences) == len(alike):
        own, others = differences[0]
        raise ValueError(
            f"`space` and the problem's space differ, so λ of the result would be wrong: {own} and {others}. Pass the "
            "space of `spaces.constrain(problem, space)`."
        )


def _difference(space: Any, other: Any) -> tuple[Any, Any] | None:
    """The first two leaves that convert by different formulas, or None."""
    pairs = zip(jax.tree.leaves(space), jax.tree.leaves(other), strict=True)
    return next(((a, b) for a, b in pairs if _formula(a) != _formula(b)), None)


def _formula(leaf: Any) -> tuple:
    """All that λ(z) of a leaf depends on: not labels and conditions, and the default only if it is the center."""
    if leaf.kind == "fixed":
        return (leaf,)
    names = ("kind", "value_shape", "low", "high", "log", "scale")
    fields = [(name, getattr(leaf, name)) for name in names if hasattr(leaf, name)]
    if hasattr(leaf, "scale"):
        fields.append(("default", np.broadcast_to(leaf.default, leaf.shape).tolist()))
    return tuple(map(repr, fields))

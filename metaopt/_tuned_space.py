"""Records which spaces a program uses to convert coordinates, so that a run with another space raises an error.

If two spaces have the same structure, their coordinates look alike, but each space maps them to another λ. `fit` and
`fine_tune` convert λ with their argument `space`. While they trace a step, `recording` records the spaces with which
the problem converts coordinates. `check` compares these spaces with the argument.
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
# Step -> the spaces that it converts with. JAX traces a step only once, so a second run of the step records nothing.
_RECORDS: weakref.WeakKeyDictionary[Callable, list] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def recording(step: Callable) -> Iterator[None]:
    """Records the spaces that convert coordinates while the body runs, as the spaces of `step`.

    If several of these contexts are nested, only the innermost one records.

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
    """While the body runs, `note` adds spaces to the list `record`."""
    token = _RECORD.set(record)
    try:
        yield
    finally:
        _RECORD.reset(token)


def note(space: Any) -> None:
    """Notes that this space converts coordinates."""
    record = _RECORD.get()
    if record is not None and not _is_in(space, record):
        record.append(space)


def _is_in(space: Any, record: list) -> bool:
    return any(space is other for other in record)


def traced_once(function: Callable) -> Callable:
    """Returns a function that JAX traces only once for arguments of the same shapes, even if several programs call it.

    Without this wrapper, tracing a long training run takes seconds for each program. The wrapper does not change the
    programs. Each call notes the spaces that the trace noted. As with `jax.jit`, later calls use the values that the
    function read from outside its arguments at the first trace. This also holds for calls outside `jit`.

    Args:
      function: of arrays and trees of arrays.

    Returns:
      The function.
    """
    noted: list = []

    @functools.partial(jax.jit, inline=True)
    def traced(*args):
        # cloudpickle refers to `_noting` by its name. It would copy a ContextVar used here, which cannot be pickled.
        with _noting(noted):
            return function(*args)

    def call(*args):
        results = traced(*args)
        for space in noted:
            note(space)
        return results

    return call


def check(step: Callable, space: Any) -> None:
    """Compares the spaces of a step with the space of a run.

    If the step converts no coordinates, this function only logs a warning. The step may call a function that JAX traced
    before, and the conversions in that function are not recorded again.

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
            "`space` is given, but nothing in the estimator converts unconstrained coordinates to λ: the loss "
            "receives the coordinates z instead of λ. Build the estimator from `spaces.constrain(problem, space)`, or "
            "omit `space`."
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
    """Returns the fields of a leaf on which λ(z) depends.

    Labels and conditions are not included. The default is included only if it is λ(0), as in `real` and `positive`.
    """
    if leaf.kind == "fixed":
        return (leaf,)
    names = ("kind", "value_shape", "low", "high", "log", "scale")
    fields = [(name, getattr(leaf, name)) for name in names if hasattr(leaf, name)]
    if hasattr(leaf, "scale"):
        fields.append(("default", np.broadcast_to(leaf.default, leaf.shape).tolist()))
    return tuple(map(repr, fields))

"""The space whose coordinates a program tunes, so that a problem in other coordinates is noticed while it is traced.

Coordinates of two spaces of one structure look alike, and each space gives another λ for them. `converting` says which
space λ will be converted by after the program; `spaces.constrain` reports which one the problem uses.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax


class _Tuned:
    """The space, and whether the program has converted coordinates since."""

    def __init__(self, space):
        self.space, self.is_used = space, False


_TUNED: contextvars.ContextVar[_Tuned | None] = contextvars.ContextVar("tuned space", default=None)


def converting(space: Any, function: Callable) -> Callable:
    """Wraps a function of coordinates of `space`: tracing it raises if the problem inside has other coordinates.

    Args:
      space: a tree of leaves; None returns the function itself.
      function: a function to be traced, with `problem`s in coordinates of the space.

    Returns:
      A function with the same results.

    Raises:
      ValueError: while it is traced, if a problem is constrained by another space, or if nothing inside converts
        coordinates to λ.
    """
    if space is None:
        return function

    def checked(*args):
        with _tuning(_Tuned(space)) as tuned:
            results = function(*args)
        if not tuned.is_used:
            raise ValueError(
                "`space` is given, but nothing in the estimator converts unconstrained coordinates to λ: its loss uses "
                "them as they are. Build the estimator from `spaces.constrain(problem, space)`, or omit `space`."
            )
        return results

    return checked


@contextlib.contextmanager
def _tuning(tuned: _Tuned) -> Iterator[_Tuned]:
    token = _TUNED.set(tuned)
    try:
        yield tuned
    finally:
        _TUNED.reset(token)


def used() -> None:
    """Notes that coordinates are converted to λ."""
    if tuned := _TUNED.get():
        tuned.is_used = True


def check(space: Any) -> None:
    """Raises ValueError if a problem is constrained by another space than the one that the program tunes.

    Args:
      space: the space of the problem.

    Raises:
      ValueError: if there is a tuned space, and the two differ.
    """
    tuned = _TUNED.get()
    if tuned is None or tuned.space is space:
        return
    if jax.tree.structure(tuned.space) != jax.tree.structure(space):
        return  # coordinates that do not fit the space are an error of their own
    pairs = zip(jax.tree.leaves(tuned.space), jax.tree.leaves(space), strict=True)
    if wrong := next(((a, b) for a, b in pairs if a != b), None):
        raise ValueError(
            f"`space` and the problem's space differ, so the result would be converted by another formula: {wrong[0]} "
            f"and {wrong[1]}. Pass the space of `spaces.constrain(problem, space)`."
        )

"""The functions that `fit` calls after each step."""

from collections.abc import Callable, Sequence
from typing import Any

CallbackFn = Callable[[int, dict[str, Any]], Any]  # step, metrics -> True to stop


def listed(callback: CallbackFn | Sequence[CallbackFn] | None) -> list[CallbackFn]:
    """The callbacks as a list. Raises ValueError if one of them is not a function, such as the name of a file."""
    given: Any = callback
    is_one = callable(callback) or isinstance(callback, str)
    callbacks: list[CallbackFn] = [given] if is_one else list(given or ())
    for one in callbacks:
        if not callable(one):
            raise ValueError(
                f"`callback` must be a function `(step, metrics) -> stop`, or a list of such functions; got {one!r}. "
                "To write the metrics to a file, pass `training.log_to(file)`."
            )
    return callbacks


def call_all(callbacks: Sequence[CallbackFn], last_step: int, several_metrics: list[dict[str, Any]]) -> bool:
    """Calls the callbacks for every step that a program took. Returns whether one asked to stop.

    The first error is raised after the last step, because a resumed run continues after all of the steps.
    """
    errors, ended = [], False
    for i, metrics in enumerate(several_metrics):
        for one in callbacks:
            try:
                ended |= bool(one(last_step - len(several_metrics) + 1 + i, metrics))
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return ended

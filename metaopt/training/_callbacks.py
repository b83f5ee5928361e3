"""The functions that `fit` calls after each step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

CallbackFn = Callable[[int, dict[str, Any]], Any]  # step, metrics -> True to stop


def listed(callback: CallbackFn | Sequence[CallbackFn] | None) -> list[CallbackFn]:
    """The callbacks as a list. Raises ValueError if one of them is not a function, such as the name of a file."""
    callbacks = _as_list(callback)
    for one in callbacks:
        if not callable(one):
            raise ValueError(
                f"`callback` must be a function `(step, metrics) -> stop`, or a list of such functions; got {one!r}. "
                "To write the metrics to a file, pass `training.log_to(file)`."
            )
    return callbacks


def _as_list(given: Any) -> list[Any]:
    if callable(given) or isinstance(given, str):
        return [given]
    if not given:  # also False, as in `callback=is_verbose and log`
        return []
    return list(given) if isinstance(given, Iterable) else [given]


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

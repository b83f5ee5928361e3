"""Whether the traced code sees the support set in an inner step, or the query set after the steps."""

import contextlib
import contextvars
from collections.abc import Iterator

_AFTER_STEPS = contextvars.ContextVar("_AFTER_STEPS", default=False)


def after_steps() -> bool:
    """Returns whether the traced code is f after inner steps, or a prediction; both see a query set.

    A network's arguments do not contain this information. A network that normalizes query sets by the support set calls
    this function, to raise an error if the support set is missing.
    """
    return _AFTER_STEPS.get()


@contextlib.contextmanager
def traced_after_steps(value: bool) -> Iterator[None]:
    """Sets the result of `after_steps` for the code that is traced inside the `with` block."""
    token = _AFTER_STEPS.set(value)
    try:
        yield
    finally:
        _AFTER_STEPS.reset(token)

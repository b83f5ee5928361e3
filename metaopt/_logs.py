"""Warnings of a log that a caller shows itself, or that would repeat others."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from typing import Any

_held: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("held", default=None)


class Log(logging.LoggerAdapter):
    """A logger whose messages do not reach the log within `hold_back`."""

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        held = _held.get()
        if held is None:
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        elif level >= logging.WARNING:
            held.append(msg % args if args else msg)


@contextlib.contextmanager
def hold_back() -> Iterator[list[str]]:
    """Collects the warnings of all `Log`s, whatever levels the loggers have. Other threads are not affected.

    Messages below a warning are dropped.

    Yields:
      The messages, in their order. The list grows while the body runs.
    """
    messages: list[str] = []
    token = _held.set(messages)
    try:
        yield messages
    finally:
        _held.reset(token)

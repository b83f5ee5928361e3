"""Messages of a log that a caller shows itself, or that would repeat others."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from typing import Any

_held: contextvars.ContextVar[tuple[list[str], int] | None] = contextvars.ContextVar("held", default=None)


class Log(logging.LoggerAdapter):
    """A logger whose messages do not reach the log within `hold_back`."""

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        held = _held.get()
        if held is None:
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        elif level >= held[1]:
            held[0].append(msg % args if args else msg)


@contextlib.contextmanager
def hold_back(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Collects the messages of all `Log`s, whatever levels the loggers have. Other threads are not affected.

    Args:
      level: the lowest level that is collected; other messages are dropped.

    Yields:
      The messages, in their order. The list grows while the body runs.
    """
    messages: list[str] = []
    token = _held.set((messages, level))
    try:
        yield messages
    finally:
        _held.reset(token)

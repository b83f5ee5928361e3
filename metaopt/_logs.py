"""Warnings of the log that a caller shows itself, or that would repeat others."""

import contextlib
import logging
from collections.abc import Iterator


class _Messages(logging.Handler):
    """Collects the messages of warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def hold_back(name: str) -> Iterator[list[str]]:
    """Collects the warnings of a logger and of those below it. They do not reach the loggers above it.

    Args:
      name: the name of the logger.

    Yields:
      The messages, in their order. The list grows while the body runs.
    """
    logger, handler = logging.getLogger(name), _Messages()
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # also if the caller's level is higher
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

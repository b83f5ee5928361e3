"""Ends of a run before its last step: by a signal, or because no hypergradient is finite."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _checks, base

_log = logging.getLogger(__name__)

MAX_NON_FINITE = 10  # consecutive steps after which a run stops


class Interrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) ended a run; `result` is the partial `FitResult`."""

    number = signal.SIGINT

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result

    def __reduce__(self):
        return type(self), (str(self),)  # pickles it without `result`, whose arrays may be on a device


class Terminated(SystemExit):
    """SIGTERM ended a run; the process exits with status 143, and `result` is the partial `FitResult`."""

    number = signal.SIGTERM

    def __init__(self, message: str, result: Any = None):
        super().__init__(128 + signal.SIGTERM)
        self.message = message
        self.result = result

    def __str__(self) -> str:
        return self.message

    def __reduce__(self):
        return type(self), (self.message,)


class NonFiniteError(FloatingPointError):
    """No hypergradient was finite in many consecutive steps; `result` is the partial `FitResult`."""

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result

    def __reduce__(self):
        return type(self), (str(self),)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of acting on them. A second SIGINT raises KeyboardInterrupt.

    Python handles signals only in the main thread: in other threads the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    process = os.getpid()

    def receive(number, frame):
        if os.getpid() != process:  # a fork: it has no run to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT:
            with contextlib.suppress(Exception):  # the signal may have arrived while `stderr` was written to
                print("\nThe run ends after the current step; Ctrl-C again ends it at once.", file=sys.stderr)

    former = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # background jobs of a shell ignore SIGINT
                former[number] = signal.signal(number, receive)
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def signal_error(number: int, message: str, result: Any) -> Interrupted | Terminated:
    """Returns the exception to raise for a signal that ended a run."""
    if number == signal.SIGINT:
        return Interrupted(message, result)
    _log.warning(message)  # Python prints no message for a SystemExit that has a status
    return Terminated(message, result)


def num_non_finite(values: Sequence[float], skipped: Sequence[float]) -> int:
    """Returns how many steps at the end of a history had no finite outer loss or no finite hypergradient."""
    num = 0
    for value, skip in zip(reversed(values), reversed(skipped), strict=False):
        if math.isfinite(value) and not skip:
            break
        num += 1
    return num


def likely_cause(tasks: base.PyTree) -> str:
    """Returns the likely causes, found in the tasks, of an infinite or NaN outer loss or hypergradient.

    If labels "y" do not start at 0, they are named first.
    """
    non_finite, integers, is_shifted = [], [], False
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.is_fully_addressable or not leaf.size:
            continue
        name, x = f"`tasks{jax.tree_util.keystr(path)}`", np.asarray(leaf)
        if jnp.issubdtype(x.dtype, jnp.inexact) and (num := int(np.sum(~np.isfinite(x)))):
            non_finite.append(f"{num} of {x.size} entries of {name}")
        if jnp.issubdtype(x.dtype, jnp.integer) and 0 < x.ndim < 3:  # not the pixels of images
            integers.append(f"{name} has integers from {x.min()} to {x.max()}")
            is_shifted |= jax.tree_util.keystr(path[-1:], simple=True) == "y" and x.min() != 0
    if non_finite:
        return f"The tasks have NaN or infinite values: {', '.join(non_finite[:3])}."
    divergence = (
        "an inner loop that diverges, for example at a rate that is too large, or a loss without a finite derivative, "
        "such as √x at 0, or Adam at a gradient of zero in an own loop without `transforms.differentiable` (print "
        "`hypergrad.diagnose`)"
    )
    if not integers:
        return f"The likely cause is {divergence}."
    labels = f"labels that are not among the classes 0..C-1 of the loss ({', '.join(integers[:3])})"
    first, second = (labels, divergence) if is_shifted else (divergence, labels)
    return f"The likely cause is {first}, or {second}. {_checks.LABELS_ADVICE}"

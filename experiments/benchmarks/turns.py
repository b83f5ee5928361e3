"""Timing in turns; no library is needed, so that every environment can use it."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def medians(
    calls: dict[Any, Callable],
    repetitions: int,
    seconds: float = float("inf"),
    clock: Callable = time.perf_counter,
    *,
    twice: bool = False,
) -> dict[Any, float]:
    """Median seconds of every call, in turns, so that a slow minute is shared by all; the first turn is dropped.

    `twice` calls each two times a turn and times the second: what a program with much memory leaves behind (caches, and
    pages that the system still takes back) is no part of the time of the next.

    A call returns when its work is done. After three turns no other begins once `seconds` are over. `clock` may be
    `time.process_time`, which other processes on the same cores disturb less.
    """
    taken = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(repetitions + 1):
        if turn > 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            if twice:
                call()
            start = clock()
            call()
            taken[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}

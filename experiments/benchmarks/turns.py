"""Timing in turns. It needs no library, so every environment can use it."""

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
    """Returns median seconds of every call, in turns, so that a slow minute affects all of them.

    The first turn is dropped.

    `twice` calls each function two times per turn and times the second call. So the next function's time does not
    include effects of a program with much memory (caches, and pages that the system is still taking back).

    A call must return when its work is done. After three turns, no other turn begins once `seconds` are over. `clock`
    may be `time.process_time`, which is less affected by other processes on the same cores.
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

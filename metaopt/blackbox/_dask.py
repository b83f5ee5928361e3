"""Works around faults of joblib 1.6 with Dask, so that each collection ends."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_EVERY = 1.0  # seconds between two looks at the number of workers


@contextlib.contextmanager
def repaired(backend: Any, deadline: float) -> Iterator[None]:
    """Repairs joblib's backend for Dask while this context is open. Other backends stay as they are.

    joblib calls its backend from several threads, and waits until the backend calls it back with a result. With Dask,
    joblib would wait forever in the following cases. Within this context, its call raises an error instead:

    - Dask gives up a trial.
    - The trial or its arguments cannot be sent to a worker, or an error occurs in the thread of Dask's client.
    - The cluster has had no worker for `wait_for_workers_timeout` seconds, or has none at the deadline. This timeout is
      an argument of joblib's backend, by default 10. If it is 0 or None, joblib raises an error if there is no
      worker when joblib starts. Later, only the deadline ends the wait.

    If the cluster had only one core left, joblib would run all trials in this process. Therefore the repaired backend
    reports at least two cores, if the cluster has any.

    Args:
      backend: a backend of joblib.
      deadline: of `time.monotonic`.
    """
    if type(backend).__name__ != "DaskDistributedBackend":
        yield
        return
    client, effective_n_jobs, limit = backend.client, backend.effective_n_jobs, backend.wait_for_workers_timeout
    waiting: set[Callable[[Any], None]] = set()

    def num_cores(n_jobs: int) -> int:
        num = effective_n_jobs(n_jobs)
        return max(num, 2) if num else 0  # joblib raises an error for 0

    def fail(error: BaseException) -> None:
        for callback in list(waiting):
            callback(error)

    replaced = {
        sending_method(backend): _reporting(getattr(backend, sending_method(backend)), waiting),
        "client": _Replaced(client, loop=_Replaced(client.loop, add_callback=_checked(client.loop, fail))),
        "effective_n_jobs": num_cores,
        "wait_for_workers_timeout": limit and min(limit, max(round(deadline - time.monotonic(), 1), 1.0)),
    }
    stop = threading.Event()
    watched = (client, limit, deadline, fail, stop)
    before = {name: vars(backend)[name] for name in replaced if name in vars(backend)}
    vars(backend).update(replaced)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        for name in replaced:
            del vars(backend)[name]
        vars(backend).update(before)


def sending_method(backend: Any) -> str:
    """The name of the method by which joblib sends a trial to a worker; it had another name in joblib 1.4."""
    return "submit" if hasattr(backend, "submit") else "apply_async"


class _Replaced:
    """An object with other values of some attributes."""

    def __init__(self, wrapped: Any, **attributes: Any):
        self._wrapped = wrapped
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _reporting(send: Callable[..., Any], waiting: set[Callable[[Any], None]]) -> Callable[..., Any]:
    """Wraps the method that sends a trial, so that errors of Dask's future reach joblib's callback.

    `waiting` holds the callbacks of the trials that have not ended.
    """

    def reporting(batch: Any, callback: Callable[[Any], None]) -> Any:
        def done(result: Any) -> None:
            waiting.discard(done)
            callback(result)

        waiting.add(done)
        future = send(batch, done)
        future.add_done_callback(lambda future: future.exception() and done(future.exception()))
        return future

    return reporting


def _checked(loop: Any, fail: Callable[[BaseException], None]) -> Callable[..., None]:
    """Wraps `add_callback` of the event loop of Dask's client, so that `fail` receives the errors of coroutines.

    The loop itself only logs these errors.
    """

    def add_callback(function: Callable[..., Any], *args: Any) -> None:
        async def checked() -> None:
            try:
                await function(*args)
            except Exception as error:
                fail(error)

        loop.add_callback(checked)

    return add_callback


def _watch(
    client: Any, limit: float | None, deadline: float, fail: Callable[[BaseException], None], stop: threading.Event
) -> None:
    """Reports an error if the cluster has no worker for too long."""
    seen = time.monotonic()
    while not stop.wait(_EVERY):
        now = time.monotonic()
        if _num_workers(client):
            seen = now
        elif now >= min(seen + (limit or float("inf")), deadline):
            fail(
                TimeoutError(
                    f"The Dask cluster has had no worker for {now - seen:.0f} s. Start workers, or let "
                    '`joblib.parallel_config(backend="dask", wait_for_workers_timeout=seconds)` wait longer for them.'
                )
            )


def _num_workers(client: Any) -> int:
    try:
        return len(client.ncores())
    except Exception:  # the scheduler cannot be reached, or the client is closed
        return 0

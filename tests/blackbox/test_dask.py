"""joblib's own backend for Dask, on a client that only claims to have workers. Dask need not be installed."""

import asyncio
import copy
import queue
import sys
import threading
import time
import types
from unittest import mock

import numpy as np
import pytest

from metaopt.blackbox import _dask

joblib = pytest.importorskip("joblib")
joblib_dask = pytest.importorskip("joblib._dask")


class Future:
    def __init__(self, status, result=None):
        self.status, self.result = status, result


PENDING = Future("pending")


class Client:
    """A client of Dask. `submit` returns a future, of which `Futures` gives the result, or raises an error."""

    def __init__(self, future=None, cores=(4,)):
        self.future, self.cores = future, list(cores)
        self.loop = types.SimpleNamespace(add_callback=self.run)

    def run(self, function, *args):
        threading.Thread(target=lambda: asyncio.run(function(*args)), daemon=True).start()

    def ncores(self):
        num = self.cores.pop(0) if len(self.cores) > 1 else self.cores[0]
        return {"worker": num} if num else {}

    async def scatter(self, *args, **kwargs):
        raise OSError("no valid workers")

    def submit(self, *args, **kwargs):
        if isinstance(self.future, Exception):
            raise self.future
        return copy.copy(self.future)


class Futures:
    """Those that have ended, like `as_completed` of Dask."""

    def __init__(self):
        self.futures, self.queue, self.lock = [], queue.Queue(), threading.Lock()

    def add(self, future):
        self.futures.append(future)

    async def __aiter__(self):
        while self.futures and self.futures[0].status != "pending":
            future = self.futures.pop(0)
            yield future, future.result


@pytest.fixture(autouse=True)
def _no_dask(monkeypatch):
    """The names that joblib imports from Dask, and short waits."""
    names = {"distributed": types, "as_completed": lambda *args, **kwargs: Futures(), "sizeof": sys.getsizeof}
    names |= {"funcname": str, "thread_state": None, "_TimeoutError": TimeoutError}
    for name, value in names.items():
        monkeypatch.setattr(joblib_dask, name, value, raising=False)
    # A hundredth of the seconds between two looks at the number of workers, so that tests need not wait for them.
    wait = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: wait(self, timeout and timeout / 100))


def backend_of(client, seconds=None):
    return joblib_dask.DaskDistributedBackend(client=client, wait_for_workers_timeout=seconds)


def calls(backend, argument=0, **kwargs):
    """joblib's results of two calls. joblib raises a TimeoutError without a message if it is not called back."""
    with joblib.parallel_config(backend=backend):
        return joblib.Parallel(n_jobs=2, batch_size=1, timeout=10, **kwargs)([joblib.delayed(id)(argument)] * 2)


def test_joblib_sends_trials_by_the_method_that_is_repaired(monkeypatch):
    backend = backend_of(Client(PENDING))
    method = _dask.sending_method(backend)
    assert method in vars(type(backend))

    def send(*args, **kwargs):
        raise RuntimeError("called")

    monkeypatch.setattr(backend, method, send, raising=False)
    with pytest.raises(RuntimeError, match="called"):
        calls(backend)


@pytest.mark.parametrize(
    ("client", "argument", "message"),
    [
        (Client(Future("error", (None, ValueError("the worker is gone"), None))), 0, "the worker is gone"),
        (Client(ValueError("cannot be pickled")), 0, "cannot be pickled"),
        (Client(PENDING), np.zeros(1000), "no valid workers"),
        (Client(PENDING, cores=(4, 4, 0)), 0, "The Dask cluster has had no worker for"),
    ],
)
def test_faults_of_dask_end_the_call(client, argument, message):
    backend = backend_of(client, seconds=0.1)
    of_dask = {name: getattr(backend, name) for name in ("client", "effective_n_jobs", _dask.sending_method(backend))}
    with pytest.raises(Exception, match=message), _dask.repaired(backend, float("inf")):
        calls(backend, argument)
    assert of_dask == {name: getattr(backend, name) for name in of_dask}


def test_without_a_limit_joblib_raises_its_error_if_there_is_no_worker_at_the_start():
    backend = backend_of(Client(PENDING, cores=(0,)), seconds=0)
    with pytest.raises(RuntimeError, match="no active worker"), _dask.repaired(backend, float("inf")):
        calls(backend)


def test_a_closed_client_counts_as_one_without_workers(monkeypatch):
    client = Client(PENDING)
    counts = iter([{"worker": 4}] * 2)
    monkeypatch.setattr(client, "ncores", lambda: next(counts, None) or [].ncores)  # AttributeError at the end
    backend = backend_of(client, seconds=0.1)
    with pytest.raises(TimeoutError, match="no worker"), _dask.repaired(backend, float("inf")):
        calls(backend)


def test_no_worker_at_the_deadline_ends_the_call():
    backend = backend_of(Client(PENDING, cores=(4, 4, 0)))  # it would wait for ever
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no worker"), _dask.repaired(backend, start + 0.3):
        calls(backend)
    assert time.monotonic() >= start + 0.3


def test_joblib_waits_for_a_first_worker_until_the_deadline():
    backend = backend_of(Client(cores=(0,)), seconds=3600)
    late = mock.Mock(result=mock.Mock(side_effect=TimeoutError))  # after `timeout` seconds, which the message has
    backend.client.submit = lambda *args, **kwargs: late
    with pytest.raises(TimeoutError, match=r"no worker after 1\.0 seconds"), _dask.repaired(backend, time.monotonic()):
        calls(backend)
    assert backend.wait_for_workers_timeout == 3600


def test_one_core_of_dask_has_the_trials_and_not_this_process():
    backend = backend_of(Client(Future("finished", ["from Dask"]), cores=(1,)))
    with _dask.repaired(backend, float("inf")):
        assert calls(backend) == ["from Dask"] * 2


def test_other_backends_stay_as_they_are():
    backend = joblib.parallel.get_active_backend(prefer="threads")[0]
    state = dict(vars(backend))
    with _dask.repaired(backend, float("inf")):
        assert vars(backend) == state

"""Collections on local clusters of Dask and Ray, and on loky's processes, of which workers are killed.

    pip install -e '.[test,dask,ray]'
    pytest -q -m "" tests/blackbox/test_clusters.py

Without these extras, the tests of the clusters skip.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import black_boxes
import jax
import numpy as np
import pytest

from metaopt import base, blackbox
from metaopt.blackbox import _workers

joblib = pytest.importorskip("joblib")

CLUSTERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dask", "ray")]
BACKENDS = [pytest.param("loky", marks=pytest.mark.once), *CLUSTERS]
# Of 8 kB: Dask keeps a copy in one worker's memory, and sends only its name with each trial.
TASKS = {"left": np.full(1000, -0.5), "right": np.full(1000, 0.5)}
KILLS_NOTHING = black_boxes.KillsWorkers("/", False, times=0)


@contextlib.contextmanager
def cluster(backend, allowed_failures=3):
    """Two workers, each a process on this machine. Dask sends a trial to other workers after this many failures."""
    if backend == "dask":
        distributed = pytest.importorskip("distributed")
        dask = pytest.importorskip("dask")
        failures = {"distributed.scheduler.allowed-failures": allowed_failures}
        with dask.config.set(failures), distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
            yield
    elif backend == "ray":
        ray = pytest.importorskip("ray")
        path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        options = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "runtime_env": path}
        pytest.importorskip("ray.util.joblib").register_ray()
        options["_system_config"] = {"worker_niceness": 0}  # by default its workers wait for all other processes
        ray.init(include_dashboard=False, log_to_driver=False, **options)
        try:
            yield
        finally:
            ray.shutdown()
    else:
        yield


def collect(objective=KILLS_NOTHING, *, on=TASKS, num_trials=4, **kwargs):
    kwargs = {"key": jax.random.key(3), "isolated": False} | kwargs
    return blackbox.collect(objective, black_boxes.SPACE, on, num_trials=num_trials, **kwargs)


def without_cost(records):
    return [repr(record._replace(cost=0.0)) for record in records]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("isolated", [False, True])
def test_a_killed_worker_loses_no_trial(backend, isolated, tmp_path):
    """All trials are there once, and equal those of a run in this process."""
    (kills := tmp_path / "kills").mkdir()
    store = tmp_path / "records.db"
    objective = black_boxes.KillsWorkers(kills, isolated)
    with cluster(backend):
        records = collect(objective, store=store, num_workers=2, backend=backend, isolated=isolated)
    assert len(list(kills.iterdir())) == 1
    assert without_cost(records) == without_cost(collect()) and len(records) == 8
    ended = blackbox.read_records(store, history=True, status="COMPLETE")
    assert sorted(without_cost(ended)) == sorted(without_cost(records))
    assert len(blackbox.read_records(store)) == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trial_that_always_kills_its_worker_ends_the_collection_and_the_next_call_continues(
    backend, tmp_path, caplog
):
    (kills := tmp_path / "kills").mkdir()
    store = tmp_path / "records.db"
    errors = {"loky": "TerminatedWorkerError", "dask": "KilledWorker", "ray": "ActorDiedError"}
    with cluster(backend, allowed_failures=0), joblib.parallel_config(backend=backend, n_jobs=2):
        objective = black_boxes.KillsWorkers(kills, False, times=1000)
        with pytest.raises(Exception) as caught:
            collect(objective, on={"left": TASKS["left"]}, store=store)
        assert type(caught.value).__name__ == errors[backend]
        assert caplog.text.count("A worker was lost") >= 2
        left = [record.trial for record in blackbox.read_records(store, status="COMPLETE")]
        assert left and 3 not in left
        assert [record.trial for record in blackbox.read_records(store, status="RUNNING")].count(3) == 1
        objective.times = 0
        records = collect(objective, store=store)
    assert without_cost(records) == without_cost(collect())
    assert len(blackbox.read_records(store, history=True, status="COMPLETE")) == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", CLUSTERS)
def test_trials_that_hang_or_crash_on_a_cluster_are_records(backend):
    bad = {name: name for name in ("good", "hang", "crash")}
    with cluster(backend):
        options = {"isolated": True, "time_limit": 2.0, "num_trials": 1, "backend": backend}
        records = collect(black_boxes.misbehave, on=bad, **options)
    assert [(record.status, record.reason) for record in records] == [
        ("COMPLETE", ""),
        ("FAIL", "time limit of 2 s"),
        ("FAIL", "signal SIGSEGV"),
    ]


class KilledWorker(Exception):
    """Has the name of Dask's error."""


def test_a_cluster_may_be_smaller_after_a_loss(monkeypatch):
    threading_backend = joblib.parallel.BACKENDS["threading"]
    cores, calls = [16], []

    class Shrinks(threading_backend):
        default_n_jobs = -1

        def effective_n_jobs(self, n_jobs):
            return cores[0]

        def configure(self, n_jobs=1, parallel=None, **kwargs):
            return super().configure(cores[0], parallel, **kwargs)

    def run(objective, task, trial, begins_before):
        calls.append(trial)
        if len(calls) == 60:
            cores[0] = 4
            raise KilledWorker
        time.sleep(0.01)
        return trial._replace(status="COMPLETE", outcome=0.0)

    monkeypatch.setitem(joblib.parallel.BACKENDS, "shrinks", Shrinks)
    runner = _workers.Runner(run, None, {"t": None}, None, "", None, float("inf"))
    with joblib.parallel_config(backend="shrinks"):
        records = list(_workers.run_all(runner, iter([base.Record("t", {}, trial=i) for i in range(200)])))
    assert sorted(record.trial for record in records) == list(range(200)) and cores == [4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [None, 40.0])
def test_dask_without_a_worker_ends_the_collection(budget, tmp_path):
    """The only worker is killed in trial 3, and no other one starts."""
    distributed = pytest.importorskip("distributed")
    (kills := tmp_path / "kills").mkdir()
    store = tmp_path / "records.db"
    scheduler = distributed.LocalCluster(n_workers=0, dashboard_address=None)
    waits = {"wait_for_workers_timeout": 300 if budget else 2}
    with scheduler, distributed.Client(scheduler) as client, joblib.parallel_config(backend="dask", **waits):
        if budget is None:
            with pytest.raises(TimeoutError, match="no worker after 2 seconds"):
                collect()
        command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler.scheduler_address]
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        worker = subprocess.Popen([*command, "--no-nanny", "--nthreads", "1"], env=os.environ | path)
        client.wait_for_workers(1, timeout=60)
        raises = contextlib.nullcontext() if budget else pytest.raises(TimeoutError, match="no worker")
        with raises:
            collect(black_boxes.KillsWorkers(kills, False), on={"left": TASKS["left"]}, store=store, budget=budget)
        assert worker.wait(timeout=60) == -signal.SIGKILL
    ended = [record.trial for record in blackbox.read_records(store, status="COMPLETE")]
    assert ended and 3 not in ended


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_extra_is_named(backend, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'`backend="{backend}"` needs {package}: install the extra "{backend}"'):
        collect(backend=backend)

"""Two processes with a part of the tasks each give the result of one; a run of which one was killed is continued."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small
from jax.experimental import multihost_utils

from metaopt import base, training
from metaopt.training import _checkpoints, _processes, _steps

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, [SCRIPT.parent, SCRIPT.parents[2], os.environ.get("PYTHONPATH", "")])),
    "JAX_PLATFORMS": "cpu",
}
NUM_STEPS = 20


def start(folder, processes, num_steps=NUM_STEPS, faulty=""):
    """Starts the processes with one folder, or with one for each."""
    folders = folder if isinstance(folder, list) else [folder] * processes
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, [process, processes, port, folders[process], num_steps, faulty])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV,
        )
        for process in range(processes)
    ]


def finish(processes) -> list[str]:
    """What each process has written on standard error."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return errors


def run(folder, processes, **options) -> list[dict[str, np.ndarray]]:
    """The results of all processes."""
    finish(start(folder, processes, **options))
    return results_in(folder, processes)


def results_in(folder, processes):
    return [dict(np.load(f"{folder}-{process}.npz")) for process in range(processes)]


def wait_for_step(process, step=None):
    """Waits until a process has printed this step, or any."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdecimal() and step in (None, int(line)):
            return
    raise AssertionError(process.stderr.read())


def assert_equal(results, expected, rtol):
    for result in results:
        for name in expected[0]:
            if name != "params":
                np.testing.assert_allclose(result[name], expected[0][name], rtol=rtol, err_msg=name)
    params = [np.concatenate([result["params"] for result in each]) for each in (results, expected)]
    np.testing.assert_allclose(*params, rtol=rtol)


@pytest.fixture(scope="module")
def unbroken_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two") / "run"


@pytest.fixture(scope="module")
def unbroken(unbroken_folder):
    return run(unbroken_folder, 2)


@pytest.mark.once
def test_two_processes_equal_one(tmp_path, unbroken):
    one = run(tmp_path / "run", 1)
    assert unbroken[0]["num_nonfinite"].any() and unbroken[0]["num_tasks"][0] == 8
    assert_equal(unbroken, one, rtol=1e-12)


@pytest.mark.once
def test_a_run_of_which_one_process_is_killed_continues_with_the_same_bits(tmp_path, unbroken):
    """`test_ten_kills_at_random_moments` kills either process first."""
    killed, other = start(tmp_path / "run", 2)
    wait_for_step(killed, 8)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    other.kill()  # a launcher ends the others, which would wait for the one that is gone
    other.communicate()
    steps = [int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()]
    assert steps and max(steps) < NUM_STEPS
    assert_equal(run(tmp_path / "run", 2), unbroken, rtol=0)


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    """Most kills come within steps and writes, and some before the first step."""
    rng = np.random.default_rng(0)
    folder, reached = tmp_path / "run", []
    for _ in range(10):
        processes = start(folder, 2, num_steps=100)
        if rng.uniform() < 0.8:
            for _ in range(rng.integers(1, 12)):
                wait_for_step(processes[0])
            time.sleep(rng.uniform(0.0, 0.1))
        else:
            time.sleep(rng.uniform(0.0, 10.0))
        for process in processes if rng.uniform() < 0.5 else processes[::-1]:
            process.kill()
            process.communicate()
        reached.append(max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0))
    print("the newest checkpoint after each kill:", reached)
    assert 0 < reached[-1] < 100
    expected = run(tmp_path / "unbroken", 2, num_steps=100)
    assert_equal(run(folder, 2, num_steps=100), expected, rtol=0)


@pytest.mark.once
def test_a_signal_to_one_process_ends_all_with_a_checkpoint_that_one_process_can_continue(tmp_path, unbroken):
    processes = start(tmp_path / "run", 2)
    wait_for_step(processes[0], 5)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert_equal(run(tmp_path / "run", 1), unbroken, rtol=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("faulty", ["sample_tasks", "evaluate", "callback"])
def test_an_error_in_one_process_ends_all(tmp_path, faulty):
    processes = start(tmp_path / "run", 2, faulty=faulty)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "ValueError: another process had an error" in errors[0]
    assert f"RuntimeError: {faulty} of process 1" in errors[1]


@pytest.mark.once
@pytest.mark.parametrize(("disk", "kept"), [("full disk", [3, 6]), ("full disk for five steps", [18, 20])])
def test_a_full_disk_of_one_process_loses_nothing(tmp_path, unbroken, disk, kept):
    """All processes skip the same checkpoints and go on, and a later run continues from the newest one."""
    errors = finish(start(tmp_path / "run", 2, faulty=disk))
    skipped = ["9", "12"] + ["15", "18", "20"] * (disk == "full disk")
    for process, reason in enumerate(
        ["ValueError: another process had an error", "OSError: [Errno 27] File too large"]
    ):
        assert re.findall(r"checkpoint of step (\d+) in \S+ was skipped by all", errors[process]) == skipped
        assert errors[process].count(reason) == len(skipped)
    assert_equal(results_in(tmp_path / "run", 2), unbroken, rtol=0)
    assert sorted(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == kept
    assert_equal(run(tmp_path / "run", 2), unbroken, rtol=0)


@pytest.fixture
def ended(tmp_path, unbroken_folder, unbroken):
    """The folder of a run that has ended, with checkpoints of steps 18 and 20."""
    return shutil.copytree(unbroken_folder, tmp_path / "run")


@pytest.mark.once
def test_all_processes_continue_from_a_checkpoint_that_all_can_read(ended, unbroken):
    errors = finish(start(ended, 2, faulty="unreadable"))
    reasons = ["ValueError: another process had an error", "OSError: read error of process 1"]
    for error, reason in zip(errors, reasons, strict=True):
        assert re.findall(r"checkpoint of step (\d+) .* moved aside \((.*)\)", error) == [("20", reason)]
    assert sorted(path.name for path in ended.iterdir() if path.name[0] != ".") == ["18", "20", "20.unreadable"]
    assert_equal(results_in(ended, 2), unbroken, rtol=0)


@pytest.mark.once
def test_all_processes_have_an_error_if_an_unreadable_checkpoint_cannot_be_moved(ended):
    processes = start(ended, 2, faulty="unmovable")
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "OSError: " in errors[0] and "20 cannot be renamed" in errors[0]
    assert re.search(r"moved aside \(ValueError: the checksum of .* does not match\)", errors[1])
    assert "\nValueError: another process had an error" in errors[1]


@pytest.mark.once
def test_processes_with_folders_of_their_own_are_refused(tmp_path):
    """Each folder exists, like folders of one name on the disks of two machines."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    processes = start(folders, 2)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "1 of process 1 is not the folder of the first process" in errors[1]
    assert "ValueError: another process had an error" in errors[0]
    assert not any(list(folder.iterdir()) for folder in folders)


def test_a_checkpoint_that_is_larger_than_the_space_of_the_disk_is_found_before_the_write(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    _checkpoints._check_space(str(tmp_path), 1000)
    with pytest.raises(OSError, match="The checkpoint has .* bytes, and the disk has"):
        _checkpoints._check_space(str(tmp_path), free)
    assert not list(tmp_path.iterdir())


class SplitArray(jax.Array):
    """An array of which another process has a part."""

    is_fully_addressable = is_fully_replicated = False


def test_tasks_of_new_shapes_are_compared_with_the_slots_of_all_processes(monkeypatch):
    mine, all_slots = SplitArray(), np.array([True, True, False, True])
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, tiled: all_slots if x is mine and tiled else x)
    state = types.SimpleNamespace(done=mine, tasks=jnp.ones(4))
    with pytest.raises(ValueError, match=r"slots \[2\] of 4 are not done"):
        _steps._check_all_done(state, jnp.ones(5))  # pyright: ignore[reportArgumentType]


def test_the_tasks_of_a_checkpoint_are_drawn_in_all_processes_or_in_none(monkeypatch):
    """Otherwise some processes would wait for the others, in the checksum of the tasks."""
    learner, key = training.learner(small.quadratic(), optax.sgd(0.1)), jax.random.key(0)
    steps = _steps.Steps(learner, lambda key: jnp.ones(2), (key, key), jnp.array(1.0), 1)
    assert steps.drawn_for(3).shape == (2,)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others_part = np.array([0, True])  # no signal, and an error
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, others_part]))
    with pytest.raises(ValueError, match="another process had an error"):
        steps.drawn_for(3)


def test_processes_exchange_as_often_if_only_some_can_read_the_labels(monkeypatch):
    """Otherwise those that check their labels would wait for the others."""
    exchanges = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: exchanges.append(x) or np.stack([x, x]))
    estimate = lambda hyperparams, task, state: (base.Estimate(hyperparams, hyperparams, jnp.array(True), {}), state)
    estimator = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
    learner, key = training.learner(estimator, optax.sgd(0.1)), jax.random.key(0)

    def num_exchanges(labels):
        exchanges.clear()
        steps = _steps.Steps(learner, lambda key: {"y": labels}, (key, key), jnp.array(1.0), 1)
        with training.report_progress(None, False) as report:
            steps.first(report)
        return len(exchanges)

    assert num_exchanges(np.array([0, 1])) == num_exchanges(np.array([0.5, 1.0])) > 0  # only integers are checked


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8", "bool", "complex64"])
def test_the_checksum_of_a_split_array_detects_changed_and_exchanged_entries(dtype):
    x = np.random.default_rng(0).permutation(24).reshape(4, 3, 2) // (12 if dtype == "bool" else 1)
    number = lambda x: _processes.checksum(jnp.asarray(x).astype(dtype))
    others = []
    for i in range(24):
        other = x.copy()
        other.flat[i] = 1 - other.flat[i] if dtype == "bool" else other.flat[i] + 1
        others.append(number(other))
    assert len({number(x), *others}) == 25
    assert number(x[::-1]) != number(x) and number(x[:, :, ::-1]) != number(x) and number(x) == number(x.copy())

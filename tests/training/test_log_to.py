"""`log_to`: what reaches the file and the tools, also in runs that are interrupted."""

import json
import logging
import re
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small

from metaopt import training

TASKS = np.array([1.0, 2.0, 6.0])
LEARNER = training.learner(small.quadratic(), optax.sgd(0.1))


def fit(target, folder=None, sample_tasks=lambda key: TASKS, callback=(), every=1):
    return training.fit(
        LEARNER,
        sample_tasks,
        hyperparams=7.0,
        num_steps=9,
        key=jax.random.key(0),
        evaluate=lambda key, hyperparams: hyperparams**2,
        eval_every=3,
        checkpoint_dir=folder,
        checkpoint_every=4,
        callback=[training.log_to(target, every=every), *callback],
        progress=False,
    )


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_the_history_and_the_evaluations(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    result = fit(path)
    assert [row["step"] for row in rows(path)] == list(range(1, 10))
    assert [row["value"] for row in rows(path)] == result.history["value"].tolist()
    evaluations = {row["step"]: row["evaluation"] for row in rows(path) if "evaluation" in row}
    assert evaluations == dict(zip((3, 6, 9), result.evaluations[1:].tolist(), strict=True))


@pytest.mark.parametrize(("step", "every"), [(2, 1), (3, 1), (5, 1), (6, 1), (8, 1), (5, 2), (6, 4)])
@pytest.mark.parametrize("end", ["error", "signal", "signal before the evaluation"])
def test_an_interrupted_run_ends_with_the_file_of_an_unbroken_one(tmp_path, end, step, every):
    draws = []

    def interrupt(number, metrics):
        if number == step and end != "signal before the evaluation":
            signal.raise_signal(signal.SIGTERM) if end == "signal" else 1 / 0

    def sample_tasks(key):
        draws.append(key)
        if len(draws) == step and end == "signal before the evaluation":
            signal.raise_signal(signal.SIGTERM)
        return TASKS

    path, unbroken = tmp_path / "run.jsonl", tmp_path / "unbroken.jsonl"
    fit(unbroken, every=every)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        fit(path, tmp_path / "run", sample_tasks=sample_tasks, callback=[interrupt], every=every)
    with path.open("a") as file:
        file.write('{"step": 7, "val')  # as a killed process leaves it
    fit(path, tmp_path / "run", every=every)
    assert path.read_bytes() == unbroken.read_bytes()


def test_steps_since_the_checkpoint_replace_their_earlier_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # a process that was killed after step 4, with a checkpoint of step 2
        callback = training.log_to(path)
        for step in steps:
            callback(step, {"value": float(step)})
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    training.log_to(path)(1, {"value": np.inf, "array": np.zeros(2)})
    assert path.read_text() == '{"step": 1, "value": null}\n'


def test_one_callback_serves_two_calls_of_fit(tmp_path):
    path = tmp_path / "run.jsonl"
    callback = training.log_to(path)
    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # a run that was interrupted in a notebook, and continued
        for step in steps:
            callback(step, {"value": float(step), "step": -1.0})
    assert rows(path) == [{"step": step, "value": float(step)} for step in (1, 2, 3, 4, 5)]


def test_numbers_of_any_kind_are_written(tmp_path):
    numbers = {"jax": jnp.float32(1.5), "numpy": np.float32(2), "int": 3, "bfloat16": jnp.bfloat16(0.5), "text": "a"}
    training.log_to(tmp_path / "run.jsonl")(1, numbers | {"none": None, "array": jnp.ones(1)})
    assert rows(tmp_path / "run.jsonl") == [{"step": 1, "jax": 1.5, "numpy": 2.0, "int": 3.0, "bfloat16": 0.5}]


def test_a_file_of_something_else_is_kept(tmp_path):
    path = tmp_path / "important.jsonl"
    for text in ('{"name": "data"}\n', '{"name": "data"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="important.jsonl exists, and is not a log of `fit`"):
            fit(path)
        assert path.read_text() == text


def test_a_full_disk_loses_no_line(tmp_path, caplog):
    path, limit = tmp_path / "run.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    callback = training.log_to(path)
    callback(1, {"value": 1.0})
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limit[1]))  # bytes of a file: less than two lines
        try:
            for step in (2, 3):
                callback(step, {"value": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(caplog.records) == 1 and "The run goes on" in caplog.text
    callback(4, {"value": 4.0})
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]


class Recorder:
    """Keeps the calls of one method, which has the signature of the tool's own."""

    def __init__(self, method):
        self.calls = []
        setattr(self, method, getattr(self, f"_{method}"))

    def _add_scalar(self, tag, scalar_value, global_step=None):
        self.calls.append((global_step, {tag: scalar_value}))

    def _log_metrics(self, metrics, step=None):
        self.calls.append((step, metrics))

    def _log(self, data, step=None, commit=None):
        self.calls.append((step, data))


def test_steps_that_every_divides_and_evaluations_are_written(tmp_path):
    path, tool, unused = tmp_path / "run.jsonl", Recorder("log"), tmp_path / "unused.jsonl"
    path.write_text('{"step": 1, "value": 0.5}\n')  # of an older run, which the new one replaces
    fit(unused, callback=[training.log_to(path, every=4), training.log_to(tool, every=2)])
    assert [row["step"] for row in rows(path)] == [3, 4, 6, 8, 9]
    assert [step for step, _ in tool.calls] == [2, 3, 4, 6, 8, 9]


def test_lines_of_an_older_run_go_before_the_first_line_of_a_new_one(tmp_path):
    path = tmp_path / "run.jsonl"
    for every, steps in ((1, range(1, 6)), (10, range(1, 5)), (10, range(4, 13))):  # the third continues the second
        callback = training.log_to(path, every=every)
        for step in steps:
            callback(step, {"value": float(step)})
    assert [row["step"] for row in rows(path)] == [10]


@pytest.mark.parametrize("method", ["add_scalar", "log_metrics", "log"])
def test_tools_receive_every_scalar_with_its_step(method):
    tool = Recorder(method)
    callback = training.log_to(tool)
    callback(1, {"value": 0.5, "norm": 2.0, "array": np.zeros(2)})
    callback(2, {"value": 0.25, "norm": 1.0})
    received = {1: {}, 2: {}}
    for step, metrics in tool.calls:
        received[step] |= metrics
    assert received == {1: {"value": 0.5, "norm": 2.0}, 2: {"value": 0.25, "norm": 1.0}}


def test_tensorboardx_writes_events(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    with tensorboardx.SummaryWriter(tmp_path / "runs") as writer:
        fit(writer)
    (events,) = (tmp_path / "runs").iterdir()
    assert b"hypergrad_norm" in events.read_bytes() and b"evaluation" in events.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("asynchronous", [False, True])
def test_mlflow_has_the_metrics_of_each_step(tmp_path, asynchronous):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs.db'}")
    mlflow.config.enable_async_logging(asynchronous)
    with mlflow.start_run() as run:
        result = fit(mlflow)
    history = lambda name: mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    values = {metric.step: metric.value for metric in history("value")}
    assert values == dict(zip(range(1, 10), result.history["value"].tolist(), strict=True))
    assert sorted(metric.step for metric in history("evaluation")) == [3, 6, 9]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_has_the_metrics_of_a_run_without_network(tmp_path):
    wandb = pytest.importorskip("wandb")
    with wandb.init(mode="offline", dir=tmp_path) as run:
        fit(run)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    steps = re.findall(rb"_step\x82\x01\x01(\d)", file.read_bytes())  # number of the field and length of the value
    assert {int(step) for step in steps} == set(range(1, 10)) and file.read_bytes().count(b"hypergrad_norm") >= 9

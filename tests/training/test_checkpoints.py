"""A run that was interrupted, anywhere and in any way, and continued, ends in the bits of one that was not."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import problems
import pytest
import small_estimators as small

from metaopt import base, hypergrad, inner, training
from metaopt.training import _checkpoints, _program

LEARNER = training.learner(small.carried(), optax.adam(0.1))
NUM_STEPS = 23


def evaluate(key, hyperparams):
    return (hyperparams["x"] - 1) ** 2 + jax.random.normal(key) / 10


def fit(checkpoint_dir=None, learner=LEARNER, sample_tasks=small.sample, **kwargs):
    defaults = {
        "hyperparams": {"x": 0.5},
        "num_steps": NUM_STEPS,
        "key": jax.random.key(0),
        "evaluate": evaluate,
        "eval_every": 4,
        "checkpoint_every": 5,
    }
    return training.fit(learner, sample_tasks, checkpoint_dir=checkpoint_dir, **(defaults | kwargs))


@pytest.fixture(scope="module")
def unbroken():
    return fit()


def same(a: training.FitResult, b: training.FitResult) -> bool:
    return small.bits(a) == small.bits(b) and jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.once
def test_several_steps_a_call_are_continued(tmp_path, unbroken):
    fit(tmp_path, num_steps=12, steps_per_call=3)
    continued = fit(tmp_path, steps_per_call=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        small.plain(continued[:-1]),
        small.plain(unbroken[:-1]),
    )


@pytest.mark.once
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_checkpoint_does_not_hold_tasks_that_can_be_drawn_again(tmp_path, steps_per_call):
    learner = training.learner(small.quadratic(), optax.sgd(0.1))
    arguments = {"hyperparams": 0.5, "evaluate": None, "checkpoint_every": 100, "steps_per_call": steps_per_call}
    fit(tmp_path, learner, lambda key: jax.random.normal(key, (2000,)), num_steps=6, **arguments)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2000 * 8
    fit(tmp_path, learner, lambda key: jax.random.normal(key, (2000,)), num_steps=7, **arguments)


class Interruption(Exception):
    pass


def interrupt_call(number, function):
    """`function`, which raises when it is called for the `number`-th time."""
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == number:
            raise Interruption
        return function(*args)

    return interrupted


def steps_in(directory) -> list[int]:
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


@pytest.mark.parametrize("function, number", [("sample_tasks", 3), ("evaluate", 3), ("callback", 9), ("callback", 20)])
@pytest.mark.once
def test_an_error_leaves_a_checkpoint_and_the_resumed_run_equals_the_unbroken_one(tmp_path, unbroken, function, number):
    functions = {"sample_tasks": small.sample, "evaluate": evaluate, "callback": lambda step, metrics: None}
    with pytest.raises(Interruption):
        fit(tmp_path, **functions | {function: interrupt_call(number, functions[function])})
    if function == "callback":
        assert steps_in(tmp_path)[-1] == number
    if function == "evaluate":
        assert steps_in(tmp_path)[-1] == 8
    assert same(fit(tmp_path, **functions), unbroken)
    assert len(steps_in(tmp_path)) <= 2


@pytest.mark.parametrize(
    ("failed", "function", "number", "newest"),
    [
        (5, "callback", 9, 9),  # the error would appear at the save of step 9
        (8, "evaluate", 3, 8),  # at the save of step 8 itself
        (12, "sample_tasks", 12, 12),  # step 12 is saved again
    ],
)
def test_a_write_that_failed_neither_hides_an_error_nor_loses_the_newest_state(
    tmp_path, unbroken, monkeypatch, caplog, failed, function, number, newest
):
    finalize = ocp.CheckpointManager._finalize

    def failing(self, step, *args):
        finalize(self, step, *args)
        if step == failed and "the disk is full" not in caplog.text:
            raise OSError("the disk is full")

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", failing)

    functions = {"sample_tasks": small.sample, "evaluate": evaluate, "callback": lambda step, metrics: None}
    options = {"checkpoint_every": 4 if function == "sample_tasks" else 5}
    with pytest.raises(Interruption):
        fit(tmp_path, **functions | {function: interrupt_call(number, functions[function])}, **options)
    assert steps_in(tmp_path)[-1] == newest and "could not be written" in caplog.text
    assert same(fit(tmp_path, **options), unbroken)


def test_a_finished_run_is_read_and_can_be_continued_to_more_steps(tmp_path, unbroken):
    fit(tmp_path, num_steps=11)
    continued = fit(tmp_path, num_steps=11, callback=interrupt_call(1, print))
    assert continued.state.step == 11
    assert same(fit(tmp_path), unbroken)
    with pytest.raises(ValueError, match="`num_steps` is 11, but .* has a run of 23 steps"):
        fit(tmp_path, num_steps=11)


def rewrite_json(directory, **changes):
    """Changes entries of a checkpoint's JSON, at any depth."""
    file = directory / "run" / "metadata"
    change = lambda entries: entries | {name: value for name, value in changes.items() if name in entries}
    content = json.loads(file.read_text(), object_hook=change)
    file.write_text(json.dumps(content))


def test_refuses_the_checkpoint_of_another_format(tmp_path):
    fit(tmp_path, num_steps=2)
    rewrite_json(tmp_path / "2", format=0)
    with pytest.raises(ValueError, match="holds a checkpoint of the format 0, of another version of metaopt"):
        fit(tmp_path)


def test_a_signal_leaves_a_checkpoint_and_the_resumed_run_equals_the_unbroken_one(tmp_path, unbroken):
    message = rf"after 7 of 23 steps\. The checkpoint in {tmp_path} has them: the same call continues"
    with pytest.raises(SystemExit, match=message):
        fit(tmp_path, callback=lambda step, metrics: step == 7 and signal.raise_signal(signal.SIGTERM))
    assert steps_in(tmp_path)[-1] == 7
    assert same(fit(tmp_path), unbroken)


@pytest.mark.once
def test_a_sampler_that_fails_for_good_still_leaves_a_checkpoint(tmp_path, unbroken):
    """With several steps a call, whose last tasks are to be drawn again: the carried ones are kept whole."""
    broken = []

    def sample_tasks(key):
        if broken and not isinstance(key, jax.core.Tracer):
            raise Interruption
        return small.sample(key)

    def callback(step, metrics):
        if step == 9:
            broken.append(True)
            raise Interruption

    with pytest.raises(Interruption):
        fit(tmp_path, sample_tasks=sample_tasks, callback=callback, steps_per_call=3)
    assert steps_in(tmp_path)[-1] == 10  # the call's last
    assert fit(tmp_path, steps_per_call=3).state.step == NUM_STEPS


def test_patience_and_the_best_hyperparams_survive_an_interruption(tmp_path):
    stop = {"num_steps": 50, "eval_every": 1, "patience": 6, "evaluate": lambda key, h: (h["x"] - 0.8) ** 2}
    unbroken = fit(**stop)
    assert unbroken.stopped == "patience" and 8 < unbroken.state.step < 30
    number = int(unbroken.state.step) - 2
    with pytest.raises(Interruption):
        fit(tmp_path, **stop, callback=interrupt_call(number, lambda *_: None))
    assert same(fit(tmp_path, **stop), unbroken)
    assert same(fit(tmp_path, **stop), unbroken)


@pytest.mark.once
def test_shapes_that_vary_survive_an_interruption(tmp_path):
    learner = training.learner(small.quadratic(), optax.adam(0.1))

    def sample_tasks(key):
        return small.sample(key, 2 + int(jax.random.randint(key, (), 0, 3)))

    several = {"learner": learner, "sample_tasks": sample_tasks, "hyperparams": 0.5, "evaluate": None}
    unbroken = fit(**several)
    for number in (6, 7, 8):
        with pytest.raises(Interruption):
            fit(tmp_path / str(number), **several, callback=interrupt_call(number, lambda *_: None))
        assert same(fit(tmp_path / str(number), **several), unbroken)


@pytest.mark.once
def test_every_kind_of_array_survives(tmp_path):
    estimator = small.quadratic()

    def init(key, hyperparams, task):
        rbg = jax.random.key(3, impl="rbg")
        num = len(task)
        return {
            "low": jnp.full(num, 0.1, jnp.bfloat16),
            "none": None,
            "empty": jnp.zeros((num, 0, 2)),
            "keys": jax.random.split(rbg, num),
            "counts": (jnp.arange(num, dtype=jnp.uint8), jnp.ones((num, 2), bool)),
        }

    def estimate(hyperparams, task, state):
        out, _ = estimator.estimate(hyperparams["a"], task, ())
        return out._replace(hypergrad={"a": out.hypergrad}), state

    learner = training.learner(estimator._replace(init=init, estimate=estimate), optax.sgd(0.1))
    arguments = {"learner": learner, "hyperparams": {"a": jnp.ones((), jnp.float32)}, "evaluate": None}
    first = fit(tmp_path, **arguments)
    continued = fit(tmp_path, **arguments)
    assert same(first, continued)
    types = lambda result: [(x.shape, x.dtype) for x in jax.tree.leaves(result.state)]  # noqa: E731
    assert types(first) == types(continued)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"key": jax.random.key(1)}, r"`key\[1\]` is 0 in the checkpoint and 1 in this run"),
        ({"hyperparams": {"x": 0.6}}, "`initial hyperparams` is 1 arrays of 1 entries"),
        ({"eval_every": 3}, "`eval_every` is 4 in the checkpoint and 3 in this run"),
        ({"evaluate": None}, "`eval_every` is 4 in the checkpoint and None in this run"),
        (
            {"sample_tasks": lambda key: small.sample(key, 5)},
            r"`tasks`, drawn for step 5, is .*\[4\] .* in the checkpoint and .*\[5\] .* in this run",
        ),
        ({"sample_tasks": lambda key: small.sample(key) + 1}, "`tasks`, drawn for step .*, is .* with checksum"),
        ({"settings": {"net": "deep"}}, r"`settings\['net'\]` is None in the checkpoint and deep in this run"),
        (
            {"learner": training.learner(small.carried(), optax.sgd(0.1))},
            "only the checkpoint has the array .*opt_state",
        ),
    ],
)
def test_refuses_the_checkpoint_of_another_run(tmp_path, other, message):
    fit(tmp_path, num_steps=6)
    with pytest.raises(ValueError, match=f"holds the checkpoint \\(step 6\\) of another run: .*{message}"):
        fit(tmp_path, **other)
    assert steps_in(tmp_path) == [5, 6]


# ---- Another program -------------------------------------------------------------------------------------------------


TARGET = np.ones(3)


def ridge(inner_steps=3, scale=None, optimizer=None, target=TARGET, stagger=1):
    """Each argument changes the program, but not the shapes of the state."""

    def outer_loss(params, hyperparams, batch):
        loss = ((params - target) ** 2).sum()
        return loss if scale is None else scale * loss

    train_loss = lambda params, hyperparams, batch: ((params - batch) ** 2).sum() + hyperparams * (params**2).sum()
    loop = inner.loop(train_loss, lambda hyperparams: optax.sgd(0.1), init=lambda key, hyperparams, data: jnp.zeros(3))
    estimator = hypergrad.over_tasks(hypergrad.unrolled(inner.problem(loop, outer_loss), num_steps=inner_steps))
    return training.learner(estimator, optax.adam(0.1) if optimizer is None else optimizer, stagger=stagger)


def fit_ridge(checkpoint_dir, changes=None, num_steps=3, **options):
    """Three steps, in the program that `changes` make."""
    sample_tasks = lambda key: base.Task(jax.random.normal(key, (2, 3)), jnp.zeros(2))
    arguments = {"hyperparams": 0.5, "num_steps": num_steps, "key": jax.random.key(0), "checkpoint_dir": checkpoint_dir}
    return training.fit(ridge(**changes or {}), sample_tasks, **arguments, **options)


@pytest.fixture(scope="module")
def ridge_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ridge")
    fit_ridge(directory, num_steps=2)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": optax.adam(0.01)},
            r"outer step differs: .* checkpoint has the number -0.1 .* run has .* -0.01 ",
        ),
        (
            {"optimizer": optax.adam(0.1, b1=0.5)},
            r"outer step .* checkpoint has .* 0.9 .* this run has .* 0.5 ",
        ),
        ({"optimizer": optax.adamax(0.1)}, "outer step .* this run has .*operation max "),
        ({"scale": 10.0}, r"outer step .* only this run has .*the number 10.0 \(float64\)"),
        ({"inner_steps": 4}, r"outer step .* checkpoint has a loop of 2 steps.* this run has .*a loop of 3 steps"),
        (
            {"target": np.array([1, 1, 2.0])},
            r"outer step .* checkpoint has the constant float64\[3\] \w+; only this run",
        ),
        ({"stagger": 2}, "initial state differs: only this run has "),
    ],
)
@pytest.mark.once
def test_refuses_another_program(ridge_dir, changes, message):
    with pytest.raises(ValueError, match=f"of another run: the program of the {message}.*allow_changed_program=True"):
        fit_ridge(ridge_dir, changes)
    assert steps_in(ridge_dir) == [2]


def test_refuses_another_rate_in_the_state_of_the_optimizer(tmp_path):
    """The checkpoint's rate would silently be used."""
    injected = lambda rate: {"optimizer": optax.inject_hyperparams(optax.sgd)(rate)}
    fit_ridge(tmp_path, injected(0.1))
    with pytest.raises(ValueError, match=r"initial state differs: .* checkpoint has the number 0.1 .* 0.2 \(float"):
        fit_ridge(tmp_path, injected(0.2))


@pytest.fixture
def ridge_copy(ridge_dir, tmp_path):
    return shutil.copytree(ridge_dir, tmp_path / "copy")


def test_a_changed_program_can_be_allowed(ridge_copy, caplog):
    changes = {"target": np.array([1, 1, 2.0])}
    result = fit_ridge(ridge_copy, changes, allow_changed_program=True)
    assert result.state.step == 3 and "changed after step 2: only the checkpoint has the constant" in caplog.text
    fit_ridge(ridge_copy, changes, num_steps=4)  # the newest checkpoint is of the changed program


@pytest.mark.parametrize(("name", "value"), [("version of JAX", "0.1"), ("platform", "tpu"), ("devices", 99)])
def test_another_environment_warns_and_compares_nothing(ridge_copy, name, value):
    rewrite_json(ridge_copy / "2", **{name: value})
    with pytest.warns(UserWarning, match=rf"was made with another {name} {value} \(now \S+\), so that its program"):
        assert fit_ridge(ridge_copy, {"target": np.zeros(3)}).state.step == 3


def described():
    """A program of loops, minibatches, dropout, batch statistics, branches and an implicit solve."""
    two = jax.tree.map(lambda x: jnp.stack([x, x]), problems.TASK)
    everything = hypergrad.over_tasks(hypergrad.unrolled(problems.EVERYTHING, num_steps=1))
    implicit = hypergrad.over_tasks(hypergrad.implicit(problems.RIDGE, num_steps=2))
    programs = []
    for estimator, hyperparams in ((everything, problems.EVERYTHING_LAM), (implicit, problems.LAM)):
        learner = training.learner(estimator, optax.adam(0.1))
        state = jax.eval_shape(learner.init, jax.random.key(0), hyperparams, two)
        programs.append(_program.describe(jax.jit(learner.step).trace(state, two).jaxpr))
    return programs


@pytest.mark.once
def test_a_program_has_the_same_digest_in_another_process():
    code = """
        import json, jax
        jax.config.update("jax_enable_x64", True)
        import test_checkpoints
        print(json.dumps(test_checkpoints.described()))
    """
    printed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**ENV, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert json.loads(printed.stdout) == described()


def test_names_order_and_unused_operations_do_not_change_a_digest():
    def first(x):
        a, b = jnp.sin(x), jnp.cos(x)
        return a * b

    def second(other_name):
        b = jnp.cos(other_name)
        jnp.tan(other_name)
        return jnp.sin(other_name) * b

    digest = lambda function, x: _program.describe(jax.jit(function).trace(x).jaxpr)["digest"]
    assert digest(first, jnp.ones(2)) == digest(second, jnp.zeros(2))
    others = [lambda x: jnp.cos(x) * jnp.cos(x), lambda x: jnp.cos(x) * jnp.sin(x), lambda x: first(x)[::-1]]
    assert digest(first, jnp.ones(2)) not in [digest(other, jnp.ones(2)) for other in others]
    assert digest(first, jnp.ones(2)) != digest(first, jnp.ones(3))


@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.once
def test_comparing_programs_takes_no_further_trace(tmp_path, steps_per_call):
    estimator, traces = small.quadratic(), []

    def estimate(hyperparams, task, state):
        traces.append(task.shape)
        return estimator.estimate(hyperparams, task, state)

    learner = training.learner(estimator._replace(estimate=estimate), optax.sgd(0.1))
    options = {"learner": learner, "hyperparams": 0.5, "evaluate": None, "steps_per_call": steps_per_call}
    fit(tmp_path, **options, num_steps=7, checkpoint_every=100)
    assert traces == [(4,)]
    fit(tmp_path, **options, num_steps=9)
    assert len(traces) == 1


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_one_run_at_a_time_in_a_folder(tmp_path):
    def second_run(step, metrics):
        with pytest.raises(ValueError, match="`checkpoint_dir` .* is in use by another run of this process"):
            fit(tmp_path)

    first = fit(tmp_path, num_steps=6, callback=second_run)
    assert first.state.step == 6 and steps_in(tmp_path) == [5, 6]
    assert fit(tmp_path, num_steps=7).state.step == 7


def never(*args):
    raise AssertionError


@pytest.mark.parametrize("folder", ["file", "file/folder", "/proc", "/proc/none"])
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="a folder that nobody can write to")
def test_a_folder_that_cannot_be_used_is_an_error_before_the_first_draw(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=folder):
        fit(tmp_path / folder, sample_tasks=never)
    assert (tmp_path / "file").read_text() == "mine"


# ---- Damage ----------------------------------------------------------------------------------------------------------


def damage_arrays(directory):
    for path in (directory / "arrays").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


def damage_json(directory):
    (directory / "run" / "metadata").write_text('{"settings": ')


def damage_by_mixing(directory):
    shutil.rmtree(directory / "arrays")
    shutil.copytree(directory.parent / "5" / "arrays", directory / "arrays")


# Where several reads fail, tensorstore tells the second one to an event loop that orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [damage_arrays, damage_json, damage_by_mixing, lambda d: shutil.rmtree(d / "run")])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, unbroken, damage):
    fit(tmp_path, num_steps=10)
    damage(tmp_path / "10")
    with pytest.warns(UserWarning, match="checkpoint of step 10 .* cannot be read and is moved aside"):
        resumed = fit(tmp_path)
    assert same(resumed, unbroken)
    assert steps_in(tmp_path) == [20, 23] and (tmp_path / "10.unreadable").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_thousand_damaged_checkpoints_of_one_step_have_names(tmp_path):
    fit(tmp_path, num_steps=10)
    damage_json(tmp_path / "10")
    for i in range(999):
        (tmp_path / f"10.unreadable{i or ''}").mkdir()
    with pytest.warns(UserWarning, match="checkpoint of step 10 .* cannot be read and is moved aside"):
        fit(tmp_path, num_steps=6)
    assert (tmp_path / "10.unreadable999" / "arrays").exists()


def test_a_checkpoint_is_written_from_a_copy():
    """The array is donated to the next step, while a thread writes."""
    x = jnp.arange(4.0)
    array, _ = _checkpoints._to_save(x)
    assert not np.shares_memory(array, np.asarray(x))
    np.testing.assert_array_equal(array, x)


def test_refuses_to_start_anew_where_no_checkpoint_can_be_read(tmp_path):
    fit(tmp_path, num_steps=10)
    for step in (5, 10):
        damage_json(tmp_path / str(step))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"No checkpoint .* can be read \(steps \[10, 5\]\)"),
    ):
        fit(tmp_path)
    assert steps_in(tmp_path) == [5, 10]


DISK = """
    import os, resource, sys, threading, time
    import jax
    jax.config.update("jax_enable_x64", True)
    import test_checkpoints as this

    def write_protect(protected):
        if sys.argv[2] == "read-only":
            os.chmod(folder, 0o500 if protected else 0o700)
        else:  # no file may get longer than 16 bytes
            most = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 if protected else most, most))

    def callback(step, metrics):
        if step in (9, end):
            while any("save" in thread.name for thread in threading.enumerate()):
                time.sleep(0.01)  # the last write ends
            write_protect(step == 9)

    unbroken = this.fit()
    for end, kept in ((13, [20, 23]), (None, [5])):
        folder, steps = f"{sys.argv[1]}/{end}", []
        assert this.same(this.fit(folder, callback=callback), unbroken)
        write_protect(False)
        assert this.steps_in(folder) == kept, this.steps_in(folder)
        assert this.same(this.fit(folder, callback=lambda step, metrics: steps.append(step)), unbroken)
        assert len(steps) == this.NUM_STEPS - kept[-1]
"""


@pytest.mark.parametrize("disk", ["full", "read-only"])
@pytest.mark.once
def test_a_disk_that_becomes_full_or_read_only_loses_nothing(tmp_path, disk):
    if disk == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    command = [sys.executable, "-c", textwrap.dedent(DISK), str(tmp_path), disk]
    process = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert process.returncode == 0, process.stderr[-4000:]
    failed = re.findall(r"checkpoint of step (\d+) in \S+ could not be written", process.stderr)
    assert sorted(failed) == ["10", "10", "15", "20", "23"]


RUN = """
    import sys, time
    import jax
    jax.config.update("jax_enable_x64", True)
    import test_checkpoints as this

    def callback(step, metrics):
        print(step, flush=True)
        time.sleep(0.01)

    this.fit(sys.argv[1], num_steps=2_000, checkpoint_every=1, callback=callback)
    print("goes on", flush=True)
"""
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, [*pathlib.Path(__file__).parents[:2], os.environ.get("PYTHONPATH", "")])),
    "JAX_PLATFORMS": "cpu",
}


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.once
def test_a_process_that_is_killed_can_be_continued(tmp_path, number):
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "8":
                break
        with pytest.raises(ValueError, match=f"is in use by a run of process {process.pid}: two runs would"):
            fit(tmp_path)
        process.send_signal(number)
        rest, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)
    last = steps_in(tmp_path)[-1]
    # The write of step 7 may have been going on. It began after that of step 6.
    assert 6 <= last < 2_000 and "goes on" not in rest
    if number == signal.SIGTERM:
        assert f"SIGTERM ended the run after {last} of 2000 steps. The checkpoint in {tmp_path} has them" in errors
    more = {"num_steps": last + 5, "checkpoint_every": 1}
    assert same(fit(tmp_path, **more), fit(**more))
    assert steps_in(tmp_path) == [last + 4, last + 5]

"""Parts of long runs: the best checkpoints, the start of non-finite steps, accumulation over steps, profiles."""

import contextlib
import gzip
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small

from metaopt import _locks, training


def fit(checkpoint_dir=None, num_steps=12, optimizer=None, estimator=None, **options):
    learner = training.learner(estimator or small.carried(), optax.adam(0.1) if optimizer is None else optimizer)
    arguments = {"sample_tasks": small.sample, "hyperparams": {"x": 0.5}, "key": jax.random.key(0), "progress": False}
    return training.fit(learner, num_steps=num_steps, checkpoint_dir=checkpoint_dir, **(arguments | options))


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.once
def test_the_checkpoints_with_the_smallest_losses_are_kept_next_to_the_newest(tmp_path):
    losses = {0: 0.0, 1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: np.nan, 6: 3.0, 7: 9.0, 8: 8.0, 9: 1.5, 10: 7.0, 11: 6.0}
    calls = iter(losses.values())
    options = {"evaluate": lambda key, hyperparams: next(calls), "eval_every": 1, "checkpoint_every": 100}
    fit(tmp_path, 7, keep_best=2, **options)
    assert steps_in(tmp_path) == [2, 4, 7]  # of step 6, an older newest one is removed
    fit(tmp_path, 11, keep_best=2, **options)
    assert steps_in(tmp_path) == [2, 9, 11]


@pytest.mark.once
def test_a_run_continues_from_one_of_the_best(tmp_path):
    options = {"evaluate": lambda key, hyperparams: (hyperparams["x"] - 0.8) ** 2, "eval_every": 1}
    unbroken = fit(tmp_path, keep_best=1, **options)
    best = int(np.nanargmin(unbroken.evaluations))
    assert 0 < best < 10 and best in steps_in(tmp_path)
    for step in steps_in(tmp_path):
        if step > best:
            shutil.rmtree(tmp_path / str(step))
    steps = []
    continued = fit(tmp_path, keep_best=1, callback=lambda step, metrics: steps.append(step), **options)
    assert steps[0] == best + 1 and small.bits(continued) == small.bits(unbroken)


def sample_some_nan(key):
    """A task is NaN in about every fourth batch."""
    tasks = small.sample(key)
    return jnp.where(tasks > 2.5, jnp.nan, tasks)


@pytest.mark.once
def test_the_start_of_a_step_with_a_nonfinite_task_is_kept_and_taken_again(tmp_path):
    options = {"sample_tasks": sample_some_nan}
    unbroken = fit(num_steps=30, **options)
    nonfinite = np.flatnonzero(unbroken.history["num_nonfinite"])
    assert 2 < len(nonfinite) < 20
    kept = fit(tmp_path, num_steps=30, keep_nonfinite=2, **options)
    assert small.bits(kept) == small.bits(unbroken)
    assert steps_in(tmp_path / "nonfinite") == nonfinite[:2].tolist()
    for step in nonfinite[:2]:
        again = []
        folder = tmp_path / "nonfinite" / str(step)
        result = fit(folder, num_steps=int(step) + 1, callback=lambda step, metrics: again.append(metrics), **options)  # noqa: B023
        assert len(again) == 1 and again[0]["num_nonfinite"] == unbroken.history["num_nonfinite"][step]
        assert again[0]["value"] == unbroken.history["value"][step]
        assert np.isnan(result.state.tasks).any()


@pytest.mark.once
def test_a_corrected_estimator_takes_a_kept_step_again(tmp_path):
    """A first replay writes no checkpoint, so that the corrected one does not continue after the step."""
    quadratic = small.batched(small.carried_single())
    corrected = quadratic._replace(
        init=lambda key, hyperparams, tasks: quadratic.init(key, hyperparams, jnp.nan_to_num(tasks)),
        estimate=lambda hyperparams, tasks, state: quadratic.estimate(hyperparams, jnp.nan_to_num(tasks), state),
    )
    options = {"sample_tasks": sample_some_nan}
    unbroken = fit(tmp_path, num_steps=20, keep_nonfinite=1, **options)
    step = int(np.flatnonzero(unbroken.history["num_nonfinite"])[0])
    folder = tmp_path / "nonfinite" / str(step)
    for _ in range(2):
        again = fit(folder, num_steps=step + 1, keep_nonfinite=1, **options)
        assert again.history["num_nonfinite"][step] == unbroken.history["num_nonfinite"][step]
    options |= {"estimator": corrected, "allow_changed_program": True}
    result = fit(folder, num_steps=step + 1, **options)
    assert result.state.step == step + 1 and result.history["num_nonfinite"][step] == 0
    assert steps_in(folder) == [step] and not (folder / "nonfinite").exists()
    shutil.copytree(folder, tmp_path / "corrected")  # an ordinary folder of checkpoints
    whole = fit(tmp_path / "corrected", num_steps=20, **options)
    assert steps_in(tmp_path / "corrected") == [step, 20]
    assert np.all(whole.history["num_nonfinite"] == 0)


@pytest.mark.once
def test_keeping_the_start_of_a_step_does_not_change_the_tasks_of_the_next(tmp_path):
    """The slots end together after 2 steps, and each draw has another shape. The second draw has a NaN."""
    quadratic = small.quadratic()

    def estimate(hyperparams, task, state):
        out, _ = quadratic.estimate(hyperparams, task, state)
        return out._replace(done=state >= 1), jnp.where(state >= 1, 0.0, state + 1)

    def sample_tasks(key):
        number = next(draws)
        return small.sample(key, 2 + number).at[0].set(jnp.nan if number == 1 else 1.0)

    learner, results = training.learner(quadratic._replace(estimate=estimate), optax.sgd(0.1)), []
    for options in ({}, {"checkpoint_dir": tmp_path, "keep_nonfinite": 1}):
        draws = iter([0, 1, 2, 3, 0] if not options else [0, 1, 0, 2, 3, 0])  # the first is drawn again, to save it
        arguments = {"hyperparams": 0.5, "num_steps": 6, "key": jax.random.key(0), "progress": False}
        results.append(training.fit(learner, sample_tasks, **arguments, **options))
    assert np.isnan(results[0].history["value"]).tolist() == [False, False, True, True, False, False]
    assert small.bits(results[0]) == small.bits(results[1])
    assert steps_in(tmp_path / "nonfinite") == [2]


@pytest.mark.once
@pytest.mark.parametrize("other", ["replayed", "another run", "in use"])
def test_a_folder_of_a_nonfinite_step_that_exists_does_not_end_the_run(tmp_path, caplog, other):
    options = {"sample_tasks": sample_some_nan, "checkpoint_every": 100}
    unbroken = fit(num_steps=20, **options)
    first = int(np.flatnonzero(unbroken.history["num_nonfinite"])[0])
    folder = tmp_path / "nonfinite" / str(first)
    if other == "another run":
        fit(folder, num_steps=1, key=jax.random.key(1))
    else:
        fit(tmp_path, num_steps=first + 1, keep_nonfinite=1, **options)
        shutil.rmtree(tmp_path / str(first + 1))  # as if it had been killed before
        fit(folder, num_steps=first + 1, **options)
        assert steps_in(folder) == [first]
    lock = _locks.exclusive(str(folder / ".lock")) if other == "in use" else contextlib.nullcontext()
    with lock:
        again = fit(tmp_path, num_steps=20, keep_nonfinite=1, **options)
    assert small.bits(again) == small.bits(unbroken)
    assert (f"`keep_nonfinite`: the state after {first} steps, from" in caplog.text) == (other != "replayed")


@pytest.mark.once
def test_a_loss_that_cannot_be_read_does_not_end_a_run_that_keeps_the_best(tmp_path):
    options = {"evaluate": lambda key, hyperparams: (hyperparams["x"] - 0.8) ** 2, "eval_every": 1, "keep_best": 2}
    unbroken = fit(**(options | {"keep_best": 0}))
    fit(tmp_path, 6, **options)
    without = steps_in(tmp_path)
    for step in without:
        (tmp_path / str(step) / "metrics" / "metrics").write_text('{"lo')
    with pytest.warns(UserWarning, match="The loss in .* cannot be read and is removed"):
        continued = fit(tmp_path, **options)
    assert small.bits(continued) == small.bits(unbroken)
    assert set(without) < set(steps_in(tmp_path))  # one of them may be the best


@pytest.mark.once
def test_optax_accumulates_over_steps():
    """Three steps of 4 tasks with MultiSteps move λ once, by the mean of their hypergradients."""
    quadratic = lambda optimizer: training.learner(small.quadratic(), optimizer)
    options = {"hyperparams": 0.5, "key": jax.random.key(0), "progress": False, "num_steps": 3}
    several = training.fit(quadratic(optax.MultiSteps(optax.sgd(0.1), 3)), small.sample, **options)
    sample_key = jax.random.split(jax.random.key(0), 3)[1]
    tasks = np.concatenate([small.sample(jax.random.fold_in(sample_key, step)) for step in range(3)])
    np.testing.assert_allclose(
        several.hyperparams, 0.5 - 0.1 * 2 * (0.5 - tasks.mean()), rtol=1e-8
    )  # optax divides in float32


@pytest.mark.once
def test_a_callback_profiles_some_steps(tmp_path):
    def profile(step, metrics):
        if step == 2:
            jax.profiler.start_trace(str(tmp_path), create_perfetto_trace=True)
        if step == 4:
            jax.profiler.stop_trace()

    fit(num_steps=6, callback=profile)
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    text = gzip.decompress(trace.read_bytes()).decode()
    assert text.count('"outer step"') >= 2

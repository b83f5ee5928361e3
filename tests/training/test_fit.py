"""The outer loop: its end, its reports, its errors, and its inputs, which it leaves unchanged."""

import contextlib
import copy
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_estimators as small
from jax.experimental import multihost_utils

from metaopt import base, hypergrad, spaces, training

KEY = jax.random.key(0)
QUADRATIC = training.learner(small.quadratic(), optax.sgd(0.1))
CARRIED = training.learner(small.carried(), optax.adam(0.1))
TASKS = np.array([1.0, 2.0, 6.0])  # F = (λ − 3)² + var; sgd(0.1) multiplies λ − 3 by 0.8


def fit(learner=QUADRATIC, sample_tasks=lambda key: TASKS, **kwargs):
    return training.fit(learner, sample_tasks, **{"hyperparams": 7.0, "num_steps": 5, "key": KEY} | kwargs)


def fit_carried(sample_tasks=small.sample, **kwargs):
    return fit(CARRIED, sample_tasks, hyperparams={"x": 0.5}, **kwargs)


def test_converges_to_the_closed_form_and_keeps_the_history():
    result = fit(num_steps=60)
    np.testing.assert_allclose(result.hyperparams, 3.0, atol=1e-5)
    errors = 4 * 0.8 ** np.arange(60)
    np.testing.assert_allclose(result.history["value"], errors**2 + TASKS.var(), rtol=1e-12)
    np.testing.assert_allclose(result.history["hypergrad_norm"], 2 * errors, rtol=1e-9)
    assert set(result.history) == {"value", "hypergrad_norm", "num_done", "skipped", "spread"}
    assert (result.stopped, result.state.step) == ("num_steps", 60)
    assert np.isnan(result.best_value) and result.best_hyperparams == result.hyperparams


@pytest.mark.once
def test_equals_the_learners_own_steps_and_draws_only_where_a_slot_is_done():
    drawn = []

    def sample_tasks(key):
        drawn.append(key)
        return small.sample(key, 2)

    result = fit_carried(sample_tasks, num_steps=12)
    init, step = map(jax.jit, CARRIED)
    init_key, sample_key, _ = jax.random.split(KEY, 3)
    keys = [jax.random.fold_in(sample_key, 0)]
    state = init(init_key, {"x": 0.5}, small.sample(keys[0], 2))
    for t in range(12):
        if state.done.any():
            keys.append(jax.random.fold_in(sample_key, t))
        state, _ = step(state, small.sample(keys[-1], 2))
    assert small.bits(result.state) == small.bits(state)
    assert small.bits(drawn) == small.bits(keys)
    assert 1 < len(keys) < 12


@pytest.mark.once
def test_several_steps_a_call_are_single_steps():
    kwargs = {"num_steps": 12, "evaluate": lambda key, h: (h["x"] - 1) ** 2, "eval_every": 7}
    reported = []
    one = fit_carried(**kwargs)
    several = fit_carried(
        **kwargs, steps_per_call=4, callback=lambda step, metrics: reported.append((step, metrics["value"]))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), small.plain(several[:-1]), small.plain(one[:-1])
    )
    np.testing.assert_allclose(reported, list(enumerate(one.history["value"], start=1)), rtol=1e-12)
    assert several.stopped == one.stopped and len(several.evaluations) == 2


@pytest.mark.once
def test_an_error_of_the_callback_loses_no_report_of_its_call():
    steps = []

    def callback(step, metrics):
        steps.append(step)
        if step in (3, 4):
            raise RuntimeError(f"full at {step}")

    with pytest.raises(RuntimeError, match="full at 3"):
        fit_carried(num_steps=12, steps_per_call=6, callback=callback)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_numbers_of_steps_may_be_floats():
    """As 1e3 is; a share of a step counts as a step."""
    result = fit(num_steps=6.5, steps_per_call=2, evaluate=lambda key, x: x, eval_every=3.0)
    assert result.state.step == 7 and result.evaluations.shape == (3,)
    np.testing.assert_array_equal(result.hyperparams, fit(num_steps=7).hyperparams)


def test_zero_steps_return_the_initial_hyperparams():
    result = fit(num_steps=0, evaluate=lambda key, x: (x - 3) ** 2)
    assert (result.hyperparams, result.best_hyperparams, result.best_value) == (7.0, 7.0, 16.0)
    assert (result.history, result.stopped) == ({}, "num_steps")


def test_the_callback_is_given_floats_after_every_step():
    calls = []
    result = fit(callback=lambda step, metrics: calls.append((step, metrics)))
    assert [step for step, _ in calls] == [1, 2, 3, 4, 5]
    for name, column in result.history.items():
        assert all(type(metrics[name]) is float for _, metrics in calls)
        np.testing.assert_array_equal(column, [metrics[name] for _, metrics in calls])


def test_a_callback_may_be_a_list_that_can_be_called():
    class Steps(list):
        def __call__(self, step, metrics):
            self.append(step)

    steps = Steps()
    fit(callback=steps)
    assert len(steps) > 1 and steps == list(range(1, len(steps) + 1))


def test_callbacks_may_be_an_iterator():
    steps = []
    fit(callback=iter([lambda step, metrics: steps.append(step)]))  # pyright: ignore[reportArgumentType]
    assert steps == [1, 2, 3, 4, 5]


def test_the_callback_ends_the_run(tmp_path):
    result = fit(num_steps=9, callback=lambda step, metrics: metrics["value"] < 9)  # 20.7, 14.9, 11.2, 8.9
    assert (result.stopped, result.state.step, len(result.history["value"])) == ("callback", 4, 4)
    np.testing.assert_array_equal(result.hyperparams, fit(num_steps=4).hyperparams)
    # After the call, where it takes several steps; what there is is kept.
    traced = lambda key: jnp.asarray(TASKS)
    result = fit(QUADRATIC, traced, num_steps=9, steps_per_call=3, callback=lambda step, metrics: step == 4)
    assert (result.stopped, result.state.step) == ("callback", 6)
    fit(num_steps=9, callback=lambda step, metrics: step == 2, checkpoint_dir=tmp_path)
    assert fit(num_steps=2, checkpoint_dir=tmp_path).stopped == "num_steps"


def test_metrics_that_are_no_scalars_reach_only_the_callback():
    estimator = small.quadratic()

    def estimate(*args):
        out, state = estimator.estimate(*args)
        return out._replace(metrics={"tasks": args[1]}), state

    reported = []
    learner = training.learner(estimator._replace(estimate=estimate), optax.sgd(0.1))
    result = fit(learner, num_steps=1, callback=lambda step, metrics: reported.append(metrics["tasks"]))
    np.testing.assert_array_equal(reported, [TASKS])
    assert "tasks" not in result.history


def test_stops_early_and_keeps_the_best_hyperparams():
    # λ falls from 7 to 3; the held-out optimum is at 5, passed between steps 3 (5.048) and 4 (4.638).
    keys = []

    def evaluate(key, x):
        keys.append(key)
        return (x - 5) ** 2

    result = fit(num_steps=50, evaluate=evaluate, eval_every=1, patience=4)
    path = 3 + 4 * 0.8 ** np.arange(8)
    np.testing.assert_allclose(result.evaluations, (path - 5) ** 2, rtol=1e-9)
    assert (result.stopped, result.state.step, len(result.history["value"])) == ("patience", 7, 7)
    np.testing.assert_allclose(result.best_hyperparams, path[3], rtol=1e-12)
    np.testing.assert_allclose(result.best_value, (path[3] - 5) ** 2, rtol=1e-9)
    assert len(set(b"".join(small.bits(key)) for key in keys)) == 1
    every_third = fit(num_steps=8, evaluate=evaluate, eval_every=3)
    np.testing.assert_allclose(every_third.evaluations, ((path - 5) ** 2)[[0, 3, 6]], rtol=1e-9)
    assert every_third.best_value == every_third.evaluations[1]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    losses = iter([np.nan, 2.0, np.nan, 3.0, np.nan])
    result = fit(num_steps=4, evaluate=lambda key, x: next(losses), eval_every=1)
    assert result.best_value == 2.0
    np.testing.assert_allclose(result.best_hyperparams, 3 + 4 * 0.8)
    result = fit(num_steps=4, evaluate=lambda key, x: np.nan, eval_every=1, patience=2)
    assert (result.stopped, result.best_hyperparams) == ("patience", 7.0) and np.isnan(result.best_value)


@pytest.mark.once
def test_leaves_the_arrays_of_the_caller_intact():
    lam, tasks = jnp.array(7.0), jnp.asarray(TASKS)
    numpy_tasks = np.ones(1024)
    estimator = small.quadratic()._replace(init=lambda key, hyperparams, task: hyperparams + jnp.zeros(task.shape))
    maml = estimator._replace(init=lambda key, hyperparams, task: (hyperparams * jnp.ones(task.shape), task))
    kept = []
    for learner in (training.learner(e, optax.adam(0.1)) for e in (estimator, maml)):
        for drawn in (tasks, numpy_tasks):
            result = fit(
                learner,
                lambda key, drawn=drawn: drawn,
                hyperparams=lam,
                evaluate=lambda key, x: kept.append(x) or x,
                eval_every=1,
            )
            assert result.best_hyperparams == min(kept[-6:])
    np.testing.assert_array_equal(lam, 7.0)
    np.testing.assert_array_equal(tasks, TASKS)
    np.testing.assert_array_equal(numpy_tasks, 1.0)
    np.testing.assert_array_equal(kept[0], 7.0)
    assert not KEY.is_deleted()


def test_runs_without_compilation_where_it_is_switched_off():
    is_traced = []
    estimator = small.quadratic()

    def estimate(*args):
        out, state = estimator.estimate(*args)
        is_traced.append(isinstance(out.value, jax.core.Tracer))
        return out, state

    learner = training.learner(estimator._replace(estimate=estimate), optax.sgd(0.1))
    with jax.disable_jit():
        result = fit(learner, num_steps=2)
    assert is_traced == [True, False, False]  # `init` asks for the types
    np.testing.assert_allclose(result.hyperparams, fit(num_steps=2).hyperparams, rtol=1e-12)


def test_compiles_once_for_each_shape_of_tasks():
    estimator, traces = small.quadratic(), []

    def estimate(hyperparams, task, state):
        traces.append(task.shape)
        return estimator.estimate(hyperparams, task, state)

    learner = training.learner(estimator._replace(estimate=estimate), optax.adam(0.1))
    sizes = []

    def sample_tasks(key):
        sizes.append(3 + len(sizes) % 2)
        return np.ones(sizes[-1])

    for _ in range(2):
        sizes.clear()
        result = fit(learner, sample_tasks, num_steps=9)
        assert result.state.step == 9 and sizes[:4] == [3, 4, 3, 4]
    assert sorted(traces) == [(3,), (4,)]


def test_a_useless_linear_solve_is_reported_after_the_warning_of_rest(caplog):
    def estimate(hyperparams, task, state):
        residual = jnp.where(state < 150, 0.0, 9.0)  # the solve fails from step 150 on
        metrics = {"inner_grad_norm": jnp.ones([]), "outer_grad_norm": jnp.ones([]), "adjoint_residual": residual}
        return base.Estimate(hyperparams, hyperparams, jnp.array(False), metrics), state + 1

    estimator = base.Estimator(lambda key, hyperparams, task: jnp.zeros([], jnp.int32), estimate, kind="biased")
    learner = training.learner(estimator, optax.sgd(0.1))
    training.fit(learner, lambda key: 1.0, hyperparams=3.0, num_steps=400, key=jax.random.key(0))
    first, second = (record.getMessage() for record in caplog.records)
    assert "steps 81 to 100: An implicit rule runs far" in first and "solve" not in first
    assert "steps 181 to 200: The linear solve of an implicit rule left a larger residual than no solve" in second


@pytest.mark.parametrize(("quotient", "is_reported"), [(1.09, False), (1.11, True)])
def test_a_linear_solve_that_is_worse_than_none_is_reported(caplog, quotient, is_reported):
    metrics = {"outer_grad_norm": jnp.array(2.0), "adjoint_residual": jnp.array(2.0 * quotient)}

    def estimate(hyperparams, task, state):
        return base.Estimate(hyperparams, hyperparams, jnp.array(True), metrics), state

    learner = training.learner(base.Estimator(lambda *_: (), estimate, kind="biased"), optax.sgd(0.1))
    fit(learner, num_steps=3)
    assert ("wrong sign or size. First increase the solver's `num_steps`" in caplog.text) == is_reported


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_an_exploded_hypergradient_is_reported_once(caplog, steps_per_call):
    def num_reports(value, norms):
        def estimate(hyperparams, task, state):
            norm = jnp.array(norms)[state]  # the state counts the estimates
            return base.Estimate(jnp.array(value), norm, jnp.array(False), {}), state + 1

        caplog.clear()
        rule = base.Estimator(lambda *_: jnp.zeros([], jnp.int32), estimate, kind="exact")
        options = {"num_steps": len(norms), "steps_per_call": steps_per_call}
        fit(training.learner(rule, optax.adam(0.1)), **options)
        return caplog.text.count("tune its logarithm")

    assert num_reports(1.0, [1.0, 2e6, 1.0, 3e6, 4e16, 1.0]) == 1
    assert "step 2: the hypergradient has the norm 2e+06 at an outer loss of 1. Usually training" in caplog.text
    assert num_reports(1.0, [1.0, 1.0, 1.0, 1.0, 1.0, -1e16]) == 1
    assert num_reports(1.0, [9e5] * 6) == 0
    assert num_reports(-100.0, [9e7] * 6) == 0
    assert num_reports(1.0, [np.inf, 1.0, 1.0]) == 0  # skipped: another warning reports it


def test_an_implicit_rule_far_from_a_stationary_point_is_reported_once(caplog):
    norms = {"far": (1.0, 2.0), "at rest": (0.1, 2.0), "another rule": (1.0, None)}

    def estimator(inner_norm, outer_norm):
        metrics = {"inner_grad_norm": jnp.array(inner_norm)}
        metrics |= {} if outer_norm is None else {"outer_grad_norm": jnp.array(outer_norm)}

        def estimate(hyperparams, task, state):
            return base.Estimate(hyperparams, hyperparams, jnp.array(False), metrics), state

        return base.Estimator(lambda key, hyperparams, task: jnp.zeros(1), estimate, kind="biased")

    for name, pair in norms.items():
        for num_steps in (3, 250):
            caplog.clear()
            rule = training.learner(estimator(*pair), optax.sgd(0.1))
            training.fit(rule, lambda key: 1.0, hyperparams=3.0, num_steps=num_steps, key=jax.random.key(0))
            times = caplog.text.count("far from a stationary point")
            assert times == (1 if name == "far" else 0), (name, num_steps)


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_an_entry_of_lambda_that_nothing_reads_is_reported_once(tmp_path, caplog, steps_per_call):
    def estimate(hyperparams, task, state):
        value, hypergrad = jax.value_and_grad(lambda hp: jnp.sum((hp["used"] - task) ** 2))(hyperparams)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), state

    rule = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
    start = {"used": jnp.ones(2), "layers": {"unread": jnp.zeros(2)}}

    def num_reports(optimizer, num_steps, hyperparams=start, **options):
        caplog.clear()
        options |= {"hyperparams": hyperparams, "num_steps": num_steps, "steps_per_call": steps_per_call}
        fit(training.learner(rule, optimizer), lambda key: jnp.array([1.0, 2.0]), **options)
        return caplog.text.count("initial values: layers.unread.")

    assert [num_reports(optax.adam(0.1), num_steps) for num_steps in (0, 1, 3, 10, 25)] == [0, 1, 1, 1, 1]
    assert num_reports(optax.MultiSteps(optax.sgd(0.1), 4), 25) == 1  # the other one moves in the fourth step
    assert num_reports(optax.sgd(0.1), 25, {"used": jnp.ones(2)}) == 0 and not caplog.text
    assert num_reports(optax.set_to_zero(), 25) == 0 and not caplog.text  # a control that keeps λ
    assert num_reports(optax.sgd(0.1), 12, checkpoint_dir=tmp_path) == 1
    assert num_reports(optax.sgd(0.1), 25, checkpoint_dir=tmp_path) == 0  # a continued run


def test_a_single_array_that_nothing_reads_is_called_hyperparams(caplog):
    def estimate(hyperparams, task, state):
        return base.Estimate(jnp.sum(task), jax.tree.map(jnp.zeros_like, hyperparams), jnp.array(True), {}), state

    rule = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
    for start in (jnp.ones(2), spaces.Unconstrained(jnp.ones(2))):
        caplog.clear()
        fit(training.learner(rule, optax.sgd(0.1)), hyperparams=start, num_steps=1)
        assert "initial values: hyperparams. " in caplog.text


def test_a_short_run_without_a_finite_hypergradient_says_so(caplog):
    result = fit(sample_tasks=lambda key: np.array([np.nan]), num_steps=2)
    assert result.hyperparams == 7.0 and "had no finite hypergradient and were skipped" in caplog.text
    caplog.clear()
    fit(num_steps=1)
    assert not caplog.text


@pytest.mark.parametrize("is_most", [False, True])
def test_a_run_that_skips_steps_says_so(is_most, caplog):
    draws = []

    def sample_tasks(key):
        draws.append(key)
        return TASKS if (len(draws) % 3 == 0) == is_most else TASKS * np.nan

    result = fit(sample_tasks=sample_tasks, num_steps=8)
    num = 6 if is_most else 2
    np.testing.assert_allclose(result.hyperparams, 3 + 4 * 0.8 ** (8 - num), rtol=1e-12)
    assert f"{num} of 8 steps had no finite hypergradient and were skipped" in caplog.text
    assert ("The tasks have NaN" in caplog.text) == is_most
    assert ('`history["skipped"]` marks them' in caplog.text) != is_most


def test_a_hypergradient_whose_norm_overflows_is_skipped():
    """Adam would divide by its square, which is infinite, and λ would stay without a word."""

    def estimate(hyperparams, task, state):
        return base.Estimate(1.0, jnp.full(2, 1e200), jnp.array(True), {}), state

    steep = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
    with pytest.raises(FloatingPointError, match="The last 10 steps.*diverges.* or a loss without a finite derivative"):
        fit(training.learner(steep, optax.adam(0.1)), hyperparams=np.ones(2), num_steps=20)


def test_recorded_values_of_lambda_are_in_the_history_and_survive_a_resume(tmp_path):
    record = lambda hyperparams: {"a": {"b": 2 * hyperparams}, "pair": jnp.array([hyperparams, 0.0])}
    learner = training.learner(small.quadratic(), optax.sgd(0.1), record=record)
    pairs = []
    fit(learner, num_steps=2, checkpoint_dir=tmp_path)
    result = fit(
        learner, num_steps=4, checkpoint_dir=tmp_path, callback=lambda step, metrics: pairs.append(metrics["pair"])
    )
    before_each_step = 3 + 4 * 0.8 ** np.arange(4)
    np.testing.assert_allclose(result.history["a.b"], 2 * before_each_step, rtol=1e-12)
    np.testing.assert_allclose(np.stack(pairs)[:, 0], before_each_step[2:], rtol=1e-12)
    scalar = training.learner(small.quadratic(), optax.sgd(0.1), record=lambda hyperparams: hyperparams)
    np.testing.assert_allclose(fit(scalar, num_steps=4).history["hyperparams"], before_each_step, rtol=1e-12)


def test_a_resumed_run_reports_the_values_of_its_last_step(tmp_path, capsys):
    fit(num_steps=3, checkpoint_dir=tmp_path)
    capsys.readouterr()
    fit(num_steps=3, checkpoint_dir=tmp_path, progress=True)
    lines = capsys.readouterr().err
    assert "step 3/3" in lines and "nan" not in lines


def fit_classifier(labels, **kwargs):
    """λ scales three logits; Optax's loss of a label that is not a class is NaN, but its gradient is finite."""

    def loss(hyperparams, task, key):
        logits = hyperparams * task["x"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, task["y"]).mean()

    task = {"pixels": np.ones((4, 2, 2), np.uint8), "x": np.ones((4, 3)), "y": np.array(labels)}
    return fit(training.learner(hypergrad.direct(loss), optax.sgd(0.1)), lambda key: task, **kwargs)


NON_FINITE = {
    "NaN in the tasks": (
        lambda **kwargs: fit(sample_tasks=lambda key: np.array([1, np.nan, np.inf]), **kwargs),
        "The tasks have NaN or infinite values: 2 of 3 entries of `tasks`",
    ),
    "a label that is not a class": (
        lambda **kwargs: fit_classifier([0, 1, 3, 2], **kwargs),
        r"labels that are not among the classes 0..C-1 of the loss \(`tasks\['y'\]` has integers from 0 to 3\)",
    ),
    "labels that do not start at 0": (
        lambda **kwargs: fit_classifier([1, 2, 3, 2], **kwargs),
        r"likely cause is labels .*from 1 to 3\), or an inner loop that diverges, .*: subtract the smallest label",
    ),
    "a derivative that explodes": (
        lambda **kwargs: fit(training.learner(divergent(), optax.sgd(0.1)), **kwargs),
        r"an inner loop that diverges, .*, or a loss without a finite derivative, .* \(print `hypergrad.diagnose`\).$",
    ),
}


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_init_sees_the_labels_of_the_first_task_once_in_each_run(steps_per_call):
    """Labels with "class_mask" are checked without `init`."""
    seen = []

    def init(key, hyperparams, task):
        seen.append(not isinstance(task["y"], jax.core.Tracer))
        return jnp.zeros(())

    def estimate(hyperparams, task, state):
        return base.Estimate(hyperparams**2, 2 * hyperparams, jnp.array(True), {}), state

    learner = training.learner(base.Estimator(init, estimate, kind="exact"), optax.sgd(0.1))
    labels = {"y": np.array([1, 2])}
    for task, num_seen in ((labels, 1), (labels, 1), ({**labels, "class_mask": np.ones(3)}, 0), ({"y": np.ones(2)}, 0)):
        seen.clear()
        fit(learner, lambda key, task=task: task, num_steps=4, steps_per_call=steps_per_call)
        assert sum(seen) == num_seen


def divergent():
    estimator = small.quadratic()

    def estimate(*args):
        out, state = estimator.estimate(*args)
        return out._replace(hypergrad=out.hypergrad * jnp.inf), state

    return estimator._replace(estimate=estimate)


@pytest.mark.parametrize(("run", "message"), NON_FINITE.values(), ids=NON_FINITE)
def test_ten_steps_that_are_not_finite_end_the_run(run, message):
    with pytest.raises(FloatingPointError, match=f"last 10 steps, up to step 10, had no .*{message}") as error:
        run(num_steps=100)
    result = error.value.result
    assert (result.stopped, result.state.step, len(result.history["value"])) == ("non-finite", 10, 10)


def fit_with_failures(failures, **kwargs):
    """The tasks of each of these steps are NaN."""
    steps = iter(range(1_000))
    return fit(sample_tasks=lambda key: TASKS * np.where(next(steps) in failures, np.nan, 1.0), **kwargs)


def test_fewer_steps_in_a_row_that_are_not_finite_do_not_end_the_run():
    assert fit_with_failures({*range(9), *range(10, 19)}, num_steps=25).stopped == "num_steps"
    with pytest.raises(FloatingPointError, match="last 10 steps, up to step 15, had no"):
        fit_with_failures(set(range(5, 99)), num_steps=25)


def test_a_run_that_is_not_finite_leaves_a_checkpoint(tmp_path):
    run = lambda: fit(sample_tasks=lambda key: TASKS * np.nan, num_steps=20, checkpoint_dir=tmp_path)
    for steps in (10, 11):  # it continues, in case the cause was outside of the program
        with pytest.raises(
            FloatingPointError, match=f"last {steps} steps, up to step {steps}, .*checkpoint of step {steps}"
        ):
            run()


def test_is_quiet_where_there_is_no_terminal(capfd):
    fit()
    fit(progress=False)
    assert capfd.readouterr() == ("", "")
    fit(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and f"step 5/5, value {16 * 0.8**8 + TASKS.var():.4g}, " in err


@pytest.fixture
def interruptible():
    """A job that a shell starts in the background ignores SIGINT, and `fit` respects that."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


def handlers():
    return [signal.getsignal(number) for number, _ in SIGNALS]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_a_signal_ends_the_run_after_the_step_and_raises(number, kind, capfd):
    former = handlers()
    with pytest.raises(kind, match=f"{number.name} ended the run after 2 of 5 steps. They are not in a ") as error:
        fit(callback=lambda step, metrics: step == 2 and signal.raise_signal(number))
    result = error.value.result
    assert (result.stopped, result.state.step, len(result.history["value"])) == ("interrupted", 2, 2)
    np.testing.assert_array_equal(result.hyperparams, fit(num_steps=2).hyperparams)
    assert handlers() == former
    if number == signal.SIGTERM:
        assert error.value.code == 143
    else:
        assert "Ctrl-C again ends it at once" in capfd.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_no_evaluation_runs_after_a_signal():
    evaluated, draws = [], []

    def sample_tasks(key):
        draws.append(key)
        if len(draws) == 2:  # before the second step
            signal.raise_signal(signal.SIGINT)
        return TASKS

    with pytest.raises(KeyboardInterrupt) as error:
        fit(sample_tasks=sample_tasks, evaluate=lambda key, x: evaluated.append(x) or x, eval_every=2)
    assert len(evaluated) == len(error.value.result.evaluations) == 1


def join(monkeypatch, others_part):
    """This process becomes the first of two. The other one sends `others_part(x)` whenever they exchange an array x."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, others_part(x)]))


@pytest.mark.usefixtures("interruptible")
def test_a_signal_counts_only_once_all_processes_know_of_it(monkeypatch):
    """Another process that does not know of it yet takes the next step and evaluates, and would wait for this one."""

    def events(signal_at=None):
        """The order of steps, evaluations and exchanges. The signal arrives while the processes exchange arrays."""
        order = []

        def others_part(x):
            shares_signal = x.dtype == int and signal.SIGTERM in x
            order.append("exchange of the signal" if shares_signal else "exchange")
            if len(order) == signal_at:
                signal.raise_signal(signal.SIGTERM)  # this exchange has begun, and is without it
            return np.zeros_like(x)

        def sample_tasks(key):
            order.append("step")
            return TASKS

        join(monkeypatch, others_part)
        ends = contextlib.nullcontext() if signal_at is None else pytest.raises(SystemExit, match="ended the run")
        with ends:
            fit(
                sample_tasks=sample_tasks,
                evaluate=lambda key, x: order.append("evaluation") or x,
                eval_every=1,
                num_steps=2,
            )
        return order

    without = events()
    assert without.count("step") == 2 and without.count("evaluation") == 3
    exchanges = np.flatnonzero(np.array(without) == "exchange")
    for i in exchanges[:-1]:
        order = events(signal_at=i + 1)
        assert order[: order.index("exchange of the signal")] == without[: order.index("exchange of the signal")]
    assert events(signal_at=exchanges[-1] + 1) == without  # after the last step, which the others end with too


def test_a_signal_at_another_process_ends_the_run_too(monkeypatch):
    draws = []

    def sample_tasks(key):
        draws.append(key)
        return TASKS

    def others_part(x):
        is_signal = len(draws) == 2 and x.dtype == int  # from the second step on; others exchange a loss
        return np.array([signal.SIGTERM, 0]) if is_signal else np.zeros_like(x)

    join(monkeypatch, others_part)
    with pytest.raises(SystemExit, match="SIGTERM ended the run after 2 of 5 steps") as error:
        fit(sample_tasks=sample_tasks, evaluate=lambda key, x: x, eval_every=1)
    assert len(error.value.result.evaluations) == 2


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "kind"), [*SIGNALS, (None, FloatingPointError)])
def test_the_exceptions_of_a_run_can_be_sent_to_another_process(number, kind):
    nan = np.array([np.nan])
    with pytest.raises(kind) as error:
        if number is None:
            fit(sample_tasks=lambda key: nan, num_steps=20)
        fit(callback=lambda step, metrics: signal.raise_signal(number))
    received = copy.copy(error.value)  # by the protocol of pickle
    assert type(received) is type(error.value) and str(received) == str(error.value) and received.result is None


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_run_dies_of_its_signal():
    def callback(step, metrics):
        if step == 1:
            ready, started = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(started, b"1")
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)  # a signal that arrives during the fork would be lost
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    assert fit(callback=callback).stopped == "num_steps"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_a_signal_in_the_last_step_raises_too(number, kind):
    with pytest.raises(kind, match="after 5 of 5 steps") as error:
        fit(callback=lambda step, metrics: step == 5 and signal.raise_signal(number))
    assert error.value.result.stopped == "num_steps"
    np.testing.assert_array_equal(error.value.result.hyperparams, fit().hyperparams)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "kind"), SIGNALS)
def test_a_signal_while_the_first_step_is_traced_takes_no_step(number, kind):
    def update(updates, state, params=None):
        signal.raise_signal(number)
        return updates, state

    learner = training.learner(small.quadratic(), optax.GradientTransformation(lambda params: (), update))
    with pytest.raises(kind, match="after 0 of 5 steps") as error:
        fit(learner)
    assert error.value.result.state.step == 0 and error.value.result.hyperparams == 7.0


@pytest.mark.usefixtures("interruptible")
def test_a_signal_in_a_run_inside_a_run_ends_both():
    def evaluate(key, hyperparams):
        return fit(callback=lambda step, metrics: signal.raise_signal(signal.SIGTERM)).hyperparams

    with pytest.raises(SystemExit, match="after 3 of 9 steps") as error:
        fit(num_steps=9, evaluate=lambda key, x: evaluate(key, x) if x < 7 else x, eval_every=3)
    assert error.value.result.state.step == 3 and handlers()[0] is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fit(callback=lambda step, metrics: signal.raise_signal(signal.SIGINT))
        assert result.stopped == "num_steps" and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_raises_and_restores_the_handlers():
    former = signal.getsignal(signal.SIGINT)

    def interrupt_twice(step, metrics):
        # Handled before it returns: two that are only sent may arrive as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(callback=interrupt_twice)
    assert signal.getsignal(signal.SIGINT) == former


def test_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit()))
    thread.start()
    thread.join()
    assert small.bits(results[0].state) == small.bits(fit().state)


# The data of the first tasks.

X = np.random.default_rng(0).normal(size=(30, 4))
Y = np.arange(30) % 3


def warnings_of_data(train, valid, caplog):
    learner = training.learner(hypergrad.direct(lambda hp, task, key: hp**2), optax.sgd(0.1))
    fit(learner, lambda key: base.Task(train, valid), num_steps=1, progress=False)
    return [message for message in caplog.messages if "validation data" in message]


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ({"x": X, "y": Y}, {"x": X + 1, "y": Y}, None),
        ({"x": X, "y": Y}, {"x": X.copy(), "y": Y}, "the validation data of the tasks are equal"),
        ((X, Y), (X, Y), "the validation data of the tasks are equal"),
        ({"x": X, "y": Y}, {"x": X, "y": 2 - Y}, None),  # other targets for the same rows
        ({"x": X}, {"x": X, "mask": np.ones(30)}, None),
        ({"a": 1.0}, {"a": 1.0}, None),  # a constant, and not rows
        (
            {"x": 255 * X, "y": Y},
            {"x": X[:25], "y": Y[:25]},
            "arrays `['x']` of the training and the validation data have different",
        ),
        ({"x": np.uint8(50 + Y)[:, None] + np.zeros((30, 4), np.uint8)}, {"x": X}, "have different units"),
        ({"x": X, "y": 100 * Y}, {"x": X[:25], "y": Y[:25]}, None),  # one axis: labels
        ({"x": X}, {"x": 0 * X}, None),
        ({"x": X}, {"x": 15 * X}, None),
    ],
)
def test_equal_data_and_different_units_are_warned_of(train, valid, message, caplog):
    messages = warnings_of_data(train, valid, caplog)
    assert [message in text for text in messages] == [True] * (message is not None)


@pytest.mark.parametrize(("rate", "expected"), [(50.0, ["a"]), (0.1, [])])
def test_entries_at_a_bound_after_the_last_step_are_named(rate, expected, caplog):
    space = {"a": spaces.interval(0.0, 1.0), "b": spaces.choice(["x", "y"])}
    loss = lambda z, task, key: (
        (spaces.to_constrained(space, z)["a"] - 0.9) ** 2 + spaces.to_constrained(space, z)["b"][0]
    )
    start = spaces.default(space) | {"b": jnp.array([0.001, 0.999])}  # a choice may end at one of its labels
    learner = training.learner(hypergrad.direct(loss), optax.sgd(rate))
    fit(learner, hyperparams=start, space=space, progress=False)
    messages = [record.message for record in caplog.records if "at a bound of their range" in record.message]
    assert [message.split("range: ")[1].split(".")[0] for message in messages] == expected

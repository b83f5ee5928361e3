"""The outer loop: draws tasks, takes steps and evaluates. It can be interrupted at any point and continued."""

import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _cache, _checks, base, spaces
from metaopt._progress import Report, report_progress
from metaopt.training import _advice, _checkpoints, _learner, _processes, _run, _stopping
from metaopt.training._callbacks import CallbackFn, call_all, listed
from metaopt.training._checkpoints import Checkpoints, Saved
from metaopt.training._learner import Learner, LearnerState
from metaopt.training._run import Run, is_among_best, owned
from metaopt.training._steps import SampleTasksFn, Steps

_log = logging.getLogger(__name__)

EvaluateFn = Callable[[jax.Array, base.HyperParams], jax.Array]  # key, λ -> [] loss


class FitResult(NamedTuple):
    """The result of an outer loop.

    Attributes:
      hyperparams: λ after the last step, in natural units if `fit` had `space`.
      state: the learner's state, from which you can take more steps. With `space`, its `hyperparams` are
        `spaces.Unconstrained`.
      history: name -> [steps] float64, the scalar metrics of every step; NaN if a step did not have the metric.
      evaluations: [1 + steps // eval_every] float64, the held-out losses at steps 0, eval_every, 2 eval_every ...;
        empty without `evaluate`.
      best_hyperparams: λ with the smallest held-out loss, in the units of `hyperparams`. Without `evaluate`, the last
        λ.
      best_value: that loss; NaN without `evaluate`, or if no loss was below infinity.
      stopped: the reason for the end of the run: "num_steps", "patience" or "callback". The partial result of an
        exception may also have "interrupted" or "non-finite".
    """

    hyperparams: base.HyperParams
    state: LearnerState
    history: dict[str, np.ndarray]
    evaluations: np.ndarray
    best_hyperparams: base.HyperParams
    best_value: float
    stopped: str


def fit(
    learner: Learner,
    sample_tasks: SampleTasksFn,
    *,
    hyperparams: base.HyperParams,
    num_steps: int,
    key: jax.Array,
    space: base.PyTree | None = None,
    evaluate: EvaluateFn | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    steps_per_call: int = 1,
    callback: CallbackFn | Sequence[CallbackFn] | None = None,
    progress: bool | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    keep_best: int = 0,
    keep_nonfinite: int = 0,
    settings: Mapping[str, Any] | None = None,
    allow_changed_program: bool = False,
    compilation_cache: str | os.PathLike[str] | None = None,
) -> FitResult:
    """Takes `num_steps` outer steps from `hyperparams`, or continues from the newest checkpoint.

    All random numbers follow from `key` and the number of the step. The tasks of step t are
    `sample_tasks(fold_in(k, t))`, and every evaluation is `evaluate(k', λ)`, with k and k' split from `key`. If a run
    was killed, the same call continues it. The result has the same bits as that of a run that was not killed, including
    history, best λ and patience. A run can also be continued to a larger `num_steps`.

    A checkpoint is rejected if the key, the initial λ, the tasks drawn last, `eval_every`, `settings` or the program of
    the outer step differ. The program is the result of JAX's tracing. A changed loss, number of inner steps, outer
    rate, optimizer or captured array changes it, and the error names the difference. Functions that run on the host
    (`evaluate`, `callback`, `jax.pure_callback`) are not part of it. Programs are compared only if the version of JAX,
    the platform and the number of devices are the same; otherwise there is a warning. The comparison takes about a
    tenth of the time of tracing. A checkpoint does not hold tasks that can be drawn again.

    The first SIGINT (Ctrl-C) or SIGTERM ends the run after the current step. If it arrives during the compilation of a
    step, that step is not taken. Then `fit` writes a checkpoint and raises an exception that carries the partial
    `FitResult` as its `result`. A second SIGINT raises `KeyboardInterrupt` at once, without a result. Signals are
    handled only in the main thread. If one of your functions raises an error, `fit` re-raises it; in a run of one
    process, it first writes a checkpoint. In a run of several processes, the other processes raise a `ValueError`.

    The step is compiled once for each shape of tasks (for all calls of `fit` with one learner), and its state is
    donated: memory holds one state, besides the tasks drawn last. The metrics are read at every step, in one transfer.

    `fit` logs a warning, at most once, if the norm of a hypergradient exceeds both 1e6 and 1e6 |F| (exploded, or λ is
    tiny). It logs another one if the linear solve of an implicit rule leaves a larger residual than no solve.

    Args:
      learner: see `learner`.
      sample_tasks: `(key) -> tasks`, on the host. It returns an array or a tree of arrays, of numpy or JAX, in the form
        that the estimator expects. It may depend only on the key. It is called before the first step and whenever a
        slot is done. Shapes may differ from one call to the next if all slots end together.
      hyperparams: the initial λ, in natural units if there is a `space`; it is not modified.
      num_steps: the total number of outer steps, including those of earlier, interrupted runs; at least 0.
      key: the source of all randomness.
      space: the space of λ, if the estimator was made for `spaces.constrain(problem, space)`. The initial λ is
        converted to unconstrained coordinates, in which the outer optimizer works. `evaluate` and the result have λ in
        natural units. An initial λ that is already `spaces.Unconstrained`, such as a predictor's, is not converted.
        `space` must be the space that the problem was constrained with. A tree of labels or masks for the outer
        optimizer must be wrapped in `spaces.Unconstrained`, too.
      evaluate: `(key, λ) -> []`, a loss on held-out tasks, smaller is better. Every call has the same key, so that
        every λ is judged on the same draws. Compile it yourself.
      eval_every: steps between evaluations; the first one judges the initial λ.
      patience: stop after this many consecutive evaluations without a new best; None never stops.
      steps_per_call: outer steps that are compiled into one program. Use it for steps of a millisecond, where calls,
        draws and metrics take as long as the steps. `sample_tasks` is then traced, and draws tasks of one shape. The
        steps of evaluations and checkpoints stay the same, and shorten a call if necessary. Signals wait for the end of
        a call. The results are those of single steps, up to rounding.
      callback: `(step, metrics) -> stop`, called after every step, counted from 1; or several of them, such as
        `log_to("run.jsonl")`. Scalar metrics are floats, others numpy arrays. After the steps of evaluations, they have
        the held-out loss as "evaluation". If a callback returns a true value, the run ends (with `steps_per_call`,
        after all steps of the program). If it raises an error, all callbacks are still called for the other steps of
        the same program, and then the run ends. After a resume, they are called again for the steps since the
        checkpoint.
      progress: None reports steps, evaluations and compilations on standard error. A terminal or notebook shows a bar.
        Elsewhere a line appears every 10 s, and for compilations that take 2 s or more. True also prints a line at the
        end of a short run. False reports nothing.
      checkpoint_dir: the folder for the newest two checkpoints, which is locked during the run; each run needs its own.
        None keeps no checkpoints.
      checkpoint_every: steps between checkpoints; the end of the run writes one, too. A thread writes it during the
        next steps, from a copy. If the run is killed meanwhile, the checkpoint before it remains. If a checkpoint
        cannot be written, for example because the disk is full, `fit` logs the error, goes on and keeps the earlier
        ones. Before each write, several processes agree on whether all of them can write. If the write then fails in
        one of them, the run ends.
      keep_best: the number of checkpoints to keep besides the newest two: those after the evaluations with the smallest
        losses. To continue from one of them, remove the folders of later steps.
      keep_nonfinite: the number of non-finite steps to keep. If the value or hypergradient of a task is not finite, the
        state before the step is written to the folder `checkpoint_dir`/nonfinite/STEP, where STEP counts the steps
        before it. The same call with that folder as `checkpoint_dir` takes the step again, with the same tasks and
        keys. It writes no checkpoint, so you can repeat it; a copy of the folder is an ordinary `checkpoint_dir`. Do
        not pass the callback `log_to` of the run: it would remove the log's lines of this step and of later ones. With
        `steps_per_call`, the state is that before the program. A resumed run starts to count such steps at 0 again.
        With `keep_nonfinite`, the state is not donated, so memory holds two of them.
      settings: further values that identify the run, as JSON values, such as the text of an architecture or a rate.
      allow_changed_program: whether to continue from a checkpoint although the program of the outer step differs.
      compilation_cache: the folder of JAX's persistent compilation cache during this call. A later process then reads a
        compiled program (of 1 s or more, `jax_persistent_cache_min_compile_time_secs`) instead of compiling it again.
        The setting belongs to the process: other threads that compile meanwhile use the folder, too. JAX executes the
        programs in it, so nobody else may have write access. None leaves JAX's own setting.

    Returns:
      A `FitResult`.

    Raises:
      KeyboardInterrupt: if SIGINT arrived. Its `result` is the partial `FitResult`.
      SystemExit: if SIGTERM arrived, with status 143 and a `result`.
      FloatingPointError: if 10 consecutive steps had no finite outer loss or hypergradient. It has a `result`.
      ValueError: if `learner` is not a `Learner`, `key` is not a random key, or `sample_tasks` or a callback is not a
        function.
      ValueError: if there is `patience` or `keep_best` and no `evaluate`, or `keep_best` or `keep_nonfinite` and no
        `checkpoint_dir`.
      ValueError: if `eval_every` or `checkpoint_every` is not a whole number of at least 1, `steps_per_call` is not an
        integer of at least 1, or `keep_best` or `keep_nonfinite` is not an integer of at least 0.
      ValueError: if λ has a leaf that is an integer or not finite, does not fit `space`, or lies outside it.
      ValueError: if the estimator works in unconstrained coordinates and `space` is missing, or the reverse; if
        `space` is not the problem's.
      ValueError: if the tasks are empty, have labels outside their classes, or change their shapes while some slots are
        not done.
      ValueError: if `checkpoint_dir` is in use, holds another run, or is not the same folder for all processes.
      OSError: if `checkpoint_dir` cannot be written to.

    Example:
      >>> import optax
      >>> from metaopt import training
      >>> def estimate(hyperparams, task, state):
      ...     value, hypergrad = jax.value_and_grad(lambda x: (x - task) ** 2)(hyperparams)
      ...     return base.Estimate(value, hypergrad, jnp.array(True), {}), state
      >>> quadratic = base.Estimator(
      ...     lambda key, hyperparams, task: (), estimate, kind="exact"
      ... )
      >>> result = fit(
      ...     training.learner(quadratic, optax.sgd(0.25)),
      ...     lambda key: 1.0,
      ...     hyperparams=3.0,
      ...     num_steps=2,
      ...     key=jax.random.key(0),
      ... )
      >>> print(result.hyperparams, result.history["value"], result.stopped)
      1.5 [4. 1.] num_steps
    """
    _check_options(key, evaluate, patience, checkpoint_dir, keep_best, keep_nonfinite)
    _check_periods(steps_per_call, eval_every=eval_every, checkpoint_every=checkpoint_every)
    hyperparams, evaluate = _initial(_to_coordinates(space, hyperparams)), _in_natural_units(space, evaluate)
    callbacks, (init_key, sample_key, eval_key) = listed(callback), jax.random.split(key, 3)
    steps = Steps(learner, sample_tasks, (init_key, sample_key), hyperparams, steps_per_call, space, not keep_nonfinite)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cache.compilation_cache(compilation_cache))
        received = stack.enter_context(_stopping.signals())
        checkpoints = saved = None
        if checkpoint_dir is not None:
            identity = _run.identity(key, hyperparams, None if evaluate is None else eval_every, settings)
            checkpoints = stack.enter_context(Checkpoints(checkpoint_dir, identity, keep_best))
            saved = checkpoints.restore()
        report = stack.enter_context(_progress(saved, hyperparams, num_steps, progress))
        run = _started(saved, steps, num_steps, allow_changed_program, report)
        if checkpoints is not None:
            steps.describe(run.state, report)  # a step that cannot be traced leaves no checkpoint
        periods = [eval_every] * (evaluate is not None) + [checkpoint_every] * (checkpoints is not None)
        first_step, metrics, warned, signal_number = run.step, [], frozenset(), 0
        try:
            while True:
                try:  # evaluate; report, even after an error; then save, so that a resumed run repeats neither
                    is_due = run.step == len(run.evaluations) * eval_every
                    if evaluate is not None and is_due and not _processes.agreed(received, False)[0]:
                        run = _evaluated(run, evaluate, eval_key, report)
                        metrics = _with_evaluation(metrics, run)
                finally:
                    ended, metrics = _processes.in_all(call_all, callbacks, run.step, metrics), []
                if run.step > 0 and (run.step % checkpoint_every == 0 or is_among_best(run, eval_every, keep_best)):
                    _save(checkpoints, run, steps, report, eval_every)
                signal_number, ended = _processes.agreed(received, ended)  # all processes must take equally many steps
                stopped = _why_stop(run, num_steps, patience, ended=ended, moved=run.step > first_step)
                if stopped or signal_number:
                    break
                num = min(steps_per_call, *(math.ceil(n - run.step % n) for n in [num_steps, *periods]))
                program, args, drawn = steps.next_call(run, num, report)
                if steps.compile(program, args, num, received, report):
                    continue  # a signal may have arrived meanwhile
                with jax.profiler.StepTraceAnnotation("outer step", step_num=run.step):
                    state, metrics = program(*args)
                    metrics = _each(jax.device_get(metrics), num)
                if keep_nonfinite and any(map(_is_nonfinite, metrics)):
                    keep_nonfinite -= 1
                    _save_nonfinite(checkpoints, run, steps, report, eval_every)
                run = _run.advanced(run, state, metrics, drawn)
                report(run.step, value=metrics[-1]["value"], norm=metrics[-1]["hypergrad_norm"])
                warned = _advice.logged(warned, run, num, num_steps, hyperparams)
        except (_stopping.Interrupted, _stopping.Terminated) as error:
            received.append(error.number)  # from a `fit` that `evaluate` or `callback` called
            stopped = ""
        except BaseException:
            _save_after_error(checkpoints, run, steps, report, eval_every)
            raise
        _save(checkpoints, run, steps, report, eval_every)
    result = _result(run, evaluate, space, stopped)
    _raise_if_ended_early(received[0] if received else signal_number, run, result, num_steps, checkpoints)
    return result


def _check_options(
    key: jax.Array,
    evaluate: EvaluateFn | None,
    patience: int | None,
    folder: Any,
    keep_best: int,
    keep_nonfinite: int,
) -> None:
    _checks.checked_key(key)
    if evaluate is None and (patience is not None or keep_best):
        name = "keep_best" if patience is None else "patience"
        raise ValueError(f"`{name}` needs evaluations: pass `evaluate` too, or omit `{name}`.")
    _checks.check_integer("keep_best", keep_best, 0)
    _checks.check_integer("keep_nonfinite", keep_nonfinite, 0)
    if (keep_best or keep_nonfinite) and folder is None:
        raise ValueError("`keep_best` and `keep_nonfinite` are numbers of checkpoints: pass `checkpoint_dir` too.")


def _check_periods(steps_per_call: int, **periods: float) -> None:
    _checks.check_integer("steps_per_call", steps_per_call, 1)
    for name, num in periods.items():
        if num < 1 or num % 1:  # with 2.5, no evaluation would follow the first one
            raise ValueError(f"`{name}` must be a whole number of at least 1; got {num}.")


def _raise_if_ended_early(
    signal_number: int, run: Run, result: FitResult, num_steps: int, checkpoints: Checkpoints | None
) -> None:
    """Raises the exception for a signal or for steps that are not finite. Logs a warning if steps were skipped."""
    if signal_number:
        message = _ended(signal_number, run, num_steps, checkpoints)
        raise _stopping.signal_error(signal_number, message, result)
    if result.stopped == "non-finite":
        raise _stopping.NonFiniteError(_no_finite_steps(run, checkpoints), result)
    skipped = np.sum(run.history.get("skipped", [0.0]))
    if skipped:
        _log.warning(
            f"{skipped:.0f} of {run.step} steps had no finite hypergradient and were skipped. "
            + (
                _stopping.likely_cause(run.state.tasks)
                if skipped > run.step / 2
                else '`history["skipped"]` marks them.'
            )
        )


def _started(saved: Saved | None, steps: Steps, num_steps: int, allow_changed_program: bool, report: Report) -> Run:
    """Returns the run before its first step, or the run of a checkpoint, after all comparisons."""
    if saved is None:
        run = steps.first(report)
        _advice.log_of_tasks(run.state.tasks)
        return run
    if saved.step > num_steps:
        raise ValueError(
            f"`num_steps` is {num_steps}, but {saved.directory} has a run of {saved.step} steps. Increase `num_steps` "
            "to at least as many, or use another directory for this run."
        )
    # The tasks drawn last have the same shapes as the carried tasks.
    with report.during("drawing tasks"):
        tasks = steps.draw(saved.extra["drawn"])
    run = _run.resumed(saved, steps.traced_init(tasks, report).out_info, steps.start[1], tasks)
    _run.check_program(saved, steps.describe(run.state, report), allow_changed=allow_changed_program)
    if run.step:
        report(run.step, value=run.history["value"][-1], norm=run.history["hypergrad_norm"][-1])
    return run


def _save(checkpoints: Checkpoints | None, run: Run, steps: Steps, report: Report, eval_every: int) -> None:
    """Writes a checkpoint of a run, unless this step already has one."""
    if checkpoints is None or checkpoints.is_kept or run.step == checkpoints.newest:
        return
    if not _intact(run.state):  # an error inside the compiled step: the state was donated to it
        return
    tasks = None
    with contextlib.suppress(Exception):  # an error of the sampler has ended the run
        tasks = steps.drawn_for(run.drawn)
    _run.save(checkpoints, run, tasks, steps.describe(run.state, report), _run.newest_loss(run, eval_every))


def _save_after_error(checkpoints: Checkpoints | None, run: Run, steps: Steps, report: Report, eval_every: int) -> None:
    """Writes the last checkpoint of a run that ends by an error. An error of this write is logged."""
    if checkpoints is None or jax.process_count() > 1:
        return  # other processes may be in a step, and would not write their part
    try:
        checkpoints.settle()
        _save(checkpoints, run, steps, report, eval_every)
        checkpoints.settle()
    except Exception:
        _log.exception(f"The checkpoint of step {run.step} could not be written.")


def _save_nonfinite(checkpoints: Checkpoints | None, run: Run, steps: Steps, report: Report, eval_every: int) -> None:
    """Writes the state before a step into a separate folder, from which `fit` can take this step again."""
    assert checkpoints is not None
    if checkpoints.is_kept:
        return
    try:
        with checkpoints.inside(os.path.join(_checkpoints.NONFINITE, str(run.step))) as start:
            if start.restore() is None:  # a run that continues may have written it before
                _save(start, run, steps, report, eval_every)
    except (ValueError, OSError) as error:  # the folder is in use or holds another run, or the disk is full
        _log.warning(
            f"`keep_nonfinite`: the state after {run.step} steps, from which a non-finite step can be repeated, could "
            f"not be saved: {error}"
        )


def _is_nonfinite(metrics: dict[str, Any]) -> bool:
    """Whether a task of this step had no finite outer loss or hypergradient."""
    return bool(metrics["skipped"] or not math.isfinite(metrics["value"]) or metrics.get("num_nonfinite", 0) > 0)


def _initial(hyperparams: base.HyperParams) -> base.HyperParams:
    """Returns a copy of λ as arrays. Raises ValueError if it is not finite."""
    hyperparams = owned(_learner.check_hyperparams(hyperparams))
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"The initial `hyperparams{jax.tree_util.keystr(path)}` is not finite: {leaf}.")
    return hyperparams


def _progress(
    saved: Saved | None, hyperparams: base.HyperParams, num_steps: int, show: bool | None
) -> contextlib.AbstractContextManager:
    show = False if jax.process_index() > 0 else show
    start = 0 if saved is None else saved.step
    tuned = any(leaf.size for leaf in jax.tree.leaves(hyperparams))  # `nas.train_loop` has an empty λ
    text = "value {value:.4g}, hypergrad norm {norm:.3g}" if tuned else "value {value:.4g}"
    return report_progress(num_steps, show, text, start=start, value=math.nan, norm=math.nan)


def _result(run: Run, evaluate: EvaluateFn | None, space: base.PyTree | None, stopped: str) -> FitResult:
    best = _best(run.evaluations)
    hyperparams = _to_natural_units(space, _processes.local(run.state.hyperparams))
    _advice.log_bounds(space, hyperparams, run)
    return FitResult(
        hyperparams=hyperparams,
        state=run.state,
        history=_run.columns(run),
        evaluations=np.array(run.evaluations, np.float64),
        best_hyperparams=hyperparams if evaluate is None else _to_natural_units(space, run.best_hyperparams),
        best_value=math.nan if best is None else run.evaluations[best],
        stopped=stopped or "interrupted",
    )


def _ended(signal_number: int, run: Run, num_steps: int, checkpoints: Checkpoints | None) -> str:
    """The message of the exception for a signal."""
    reason = ", since `checkpoint_dir` is None" if checkpoints is None else ""
    kept = f"They are not in a checkpoint{reason}; `result` of this exception has them."
    if checkpoints is not None and checkpoints.newest == run.step:
        kept = f"The checkpoint in {checkpoints.directory} has them: the same call continues from there."
    return f"{signal.Signals(signal_number).name} ended the run after {run.step} of {num_steps} steps. {kept}"


def _no_finite_steps(run: Run, checkpoints: Checkpoints | None) -> str:
    """The message of the exception for steps that are not finite."""
    kept = ""
    if checkpoints is not None and checkpoints.newest == run.step:
        kept = f" The checkpoint of step {run.step} is in {checkpoints.directory}."
    return (
        f"The last {_num_non_finite(run)} steps, up to step {run.step}, had no finite outer loss or hypergradient. "
        f"{_stopping.likely_cause(run.state.tasks)}{kept}"
    )


def _to_coordinates(space: base.PyTree | None, hyperparams: base.HyperParams) -> base.HyperParams:
    """The initial λ of the learner: unconstrained coordinates if there is a space."""
    if space is None or isinstance(hyperparams, spaces.Unconstrained):
        return hyperparams
    return spaces.to_unconstrained(space, hyperparams)


def _to_natural_units(space: base.PyTree | None, hyperparams: base.HyperParams) -> base.HyperParams:
    """The λ for the caller: the inverse of `_to_coordinates`."""
    return hyperparams if space is None else spaces.to_constrained(space, hyperparams)


def _in_natural_units(space: base.PyTree | None, evaluate: EvaluateFn | None) -> EvaluateFn | None:
    """`evaluate` as a function of the learner's λ."""
    if space is None or evaluate is None:
        return evaluate
    return lambda key, coordinates: evaluate(key, spaces.to_constrained(space, coordinates))


def _each(metrics: dict[str, np.ndarray], num: int) -> list[dict[str, Any]]:
    """The metrics of each step of a call: scalars as floats, others as arrays."""
    each = [metrics] if num == 1 else [{name: x[i] for name, x in metrics.items()} for i in range(num)]
    return [{name: float(x) if x.ndim == 0 else x for name, x in one.items()} for one in each]


def _with_evaluation(metrics: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """The metrics of the last steps, with the newest held-out loss in those of the last step.

    If an earlier call of `fit` ended before this evaluation, it has reported the last step already. The step is then
    reported again, with the evaluation.
    """
    if run.step and not metrics:
        metrics = [{name: column[-1] for name, column in run.history.items() if len(column) == run.step}]
    return [*metrics[:-1], *({**last, "evaluation": run.evaluations[-1]} for last in metrics[-1:])]


def _intact(tree: base.PyTree) -> bool:
    return not any(x.is_deleted() for x in jax.tree.leaves(tree))


def _why_stop(run: Run, num_steps: int, patience: int | None, *, ended: bool, moved: bool) -> str:
    """Returns the reason why the run ends here; "" if it continues.

    Args:
      run: the run after its last step.
      num_steps: the number of steps of the whole run.
      patience: evaluations without a new best.
      ended: whether the callback ended it.
      moved: whether this call of `fit` took a step. A run that continues after non-finite steps gets another chance.
    """
    if moved and not ended and _num_non_finite(run) >= _stopping.MAX_NON_FINITE:
        return "non-finite"
    if patience is not None and len(run.evaluations) - 1 - (_best(run.evaluations) or 0) >= patience:
        return "patience"
    if run.step >= num_steps:
        return "num_steps"
    return "callback" if ended else ""


def _num_non_finite(run: Run) -> int:
    return _stopping.num_non_finite(run.history.get("value", []), run.history.get("skipped", []))


def _best(losses: list[float]) -> int | None:
    """The index of the first smallest loss that is below infinity."""
    best = min(losses, key=lambda loss: math.inf if math.isnan(loss) else loss, default=math.inf)
    return losses.index(best) if best < math.inf else None


def _evaluated(run: Run, evaluate: EvaluateFn, key: jax.Array, report: Report) -> Run:
    with report.during("evaluating"):
        hyperparams = _processes.local(run.state.hyperparams)
        loss = _processes.in_all(lambda: float(evaluate(key, owned(hyperparams))))
        loss = _processes.of_first(loss)  # all must stop, and write the best checkpoint, at the same step
    evaluations = [*run.evaluations, loss]
    is_best = _best(evaluations) == len(evaluations) - 1
    best_hyperparams = owned(hyperparams) if is_best else run.best_hyperparams
    return run._replace(evaluations=evaluations, best_hyperparams=best_hyperparams)

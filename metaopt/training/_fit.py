"""The outer loop: draws tasks, steps, judges, stops, and can be interrupted at any point and continued."""

import contextlib
import functools
import json
import logging
import math
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import base, hypergrad
from metaopt.progress import progress_bar
from metaopt.training import _learner
from metaopt.training._checkpoints import Checkpoints, Saved, checksum
from metaopt.training._learner import Learner, LearnerState

_log = logging.getLogger(__name__)

SampleTasksFn = Callable[[jax.Array], base.PyTree]  # key -> tasks
EvaluateFn = Callable[[jax.Array, base.HyperParams], jax.Array]  # key, λ -> [] loss
CallbackFn = Callable[[int, dict[str, Any]], Any]  # step, metrics -> True to stop


class FitResult(NamedTuple):
    """What came of an outer loop.

    Attributes:
      hyperparams: λ after the last step.
      state: the learner's, to go on from.
      history: name -> [steps] float64, the scalar metrics of every step; NaN where a step had no such metric.
      evaluations: [1 + steps // eval_every] float64, the held-out losses at steps 0, eval_every, 2 eval_every ...;
        empty without `evaluate`.
      best_hyperparams: λ with the smallest held-out loss; the last λ, without `evaluate`.
      best_value: that loss; NaN without `evaluate`, or where no loss was below infinity.
      stopped: why: "num_steps", "patience", "callback" or "signal".
    """

    hyperparams: base.HyperParams
    state: LearnerState
    history: dict[str, np.ndarray]
    evaluations: np.ndarray
    best_hyperparams: base.HyperParams
    best_value: float
    stopped: str


class _Run(NamedTuple):
    """All that the loop knows between two steps; with it, a continued run is the unbroken one."""

    state: LearnerState
    best_hyperparams: base.HyperParams
    history: dict[str, list[float]]
    evaluations: list[float]
    step: int  # `state.step`, on the host
    drawn: int  # the step that tasks were last drawn for


def fit(
    learner: Learner,
    sample_tasks: SampleTasksFn,
    *,
    hyperparams: base.HyperParams,
    num_steps: int,
    key: jax.Array,
    evaluate: EvaluateFn | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    steps_per_call: int = 1,
    callback: CallbackFn | None = None,
    progress: bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    settings: Mapping[str, Any] | None = None,
    handle_signals: bool = True,
) -> FitResult:
    """Takes `num_steps` outer steps from `hyperparams`, or continues where a checkpoint left off.

    Everything random follows from `key` and the step alone: the tasks drawn for step t are
    `sample_tasks(fold_in(k, t))`, and every evaluation is `evaluate(k', λ)`, with k and k' split from `key`. So a run
    that was killed and is started again with the same arguments ends in the same bits as one that was not, history,
    best λ and patience included; it may also be continued to a larger `num_steps`. A checkpoint is refused where the
    key, the initial λ, the tasks drawn last, `eval_every` or `settings` differ. What functions compute cannot be
    compared: a changed loss, network or optimizer is noticed where it changes an array's shape or name, or where
    `settings` names it. Tasks that a draw gives again (a data set that all steps share) are not in the checkpoint.

    The first SIGINT or SIGTERM ends the run after the current step: a checkpoint is left, and what there is comes
    back with `stopped="signal"`. A second SIGINT raises `KeyboardInterrupt`. An error in one of the functions
    given passes through, and leaves a checkpoint too. (Signals are handled in the main thread only.)

    The step is compiled once for each shape of tasks (of one learner, for all calls of `fit`), and the state that it
    is given is donated: memory holds one state, beside the tasks drawn last. The metrics are read at every step, in one
    transfer.

    Args:
      learner: see `learner`.
      sample_tasks: `(key) -> tasks`, on the host, without a memory of its own: an array or tree of arrays, of numpy
        or JAX, as the estimator wants them. It is called before the first step and where a slot is done.
        Shapes may differ from one call to the next, if all slots end together.
      hyperparams: the initial λ; kept intact.
      num_steps: outer steps in all, those of earlier, interrupted runs included; at least 0.
      key: what everything random follows from.
      evaluate: `(key, λ) -> []`, a loss on held-out tasks, smaller is better; called with the same key each time, so
        that every λ is judged on the same draws. Compile it yourself.
      eval_every: steps between evaluations; the first judges the initial λ.
      patience: stop after so many evaluations in a row without a new best; None never does.
      steps_per_call: outer steps that are compiled into one program; for steps of a millisecond, where calls, draws and
        metrics take as long as they do. `sample_tasks` is then traced, and draws tasks of one shape. Evaluations and
        checkpoints keep their places, and cut a call short; signals wait for its end. The results are those of single
        steps, to rounding.
      callback: `(step, metrics) -> stop`, after every step, counted from 1; metrics are floats, and numpy arrays
        where they are no scalars. Where it returns something true the run ends (after the call, with `steps_per_call`).
        An error that it raises ends the run, once it was called for the other steps of the same call. After a resume,
        steps since the checkpoint are reported again.
      progress: draw a progress bar; None draws one in a terminal or notebook only.
      checkpoint_dir: where the newest two checkpoints are kept, one directory for each run; None keeps none.
      checkpoint_every: steps between checkpoints; the end of the run leaves one too.
      settings: what else says which run this is, as JSON has it, such as the text of an architecture or a rate.
      handle_signals: False leaves SIGINT and SIGTERM as they are (`KeyboardInterrupt`, the end of the process): for a
        training within a function whose caller would take what is trained by half for the whole.

    Returns:
      A `FitResult`.

    Raises:
      ValueError: an argument is out of range; λ has an integer leaf, or one that is not finite; the tasks are empty;
        tasks of other shapes were drawn while some slots were not done; `checkpoint_dir` holds another run; `settings`
        is not made of what JSON has.

    Example:
      >>> import optax
      >>> from metaopt import training
      >>> def estimate(hyperparams, task, state):
      ...     value, hypergrad = jax.value_and_grad(lambda x: (x - task) ** 2)(hyperparams)
      ...     return base.Estimate(value, hypergrad, jnp.array(True), {}), state
      >>> quadratic = base.Estimator(lambda key, hyperparams, task: (), estimate, kind="exact")
      >>> result = fit(
      ...     training.learner(quadratic, optax.sgd(0.25)), lambda key: 1.0,
      ...     hyperparams=3.0, num_steps=2, key=jax.random.key(0),
      ... )
      >>> print(result.hyperparams, result.history["value"], result.stopped)
      1.5 [4. 1.] num_steps
    """
    _check_arguments(num_steps, evaluate, eval_every, patience, steps_per_call, checkpoint_every)
    if not isinstance(learner, _learner.Learner):
        raise ValueError(f"`learner` must be made by `training.learner`; got {type(learner).__name__}.")
    hyperparams = _owned(_learner.check_hyperparams(hyperparams))
    for path, leaf in jax.tree_util.tree_leaves_with_path(hyperparams):
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"The initial `hyperparams{jax.tree_util.keystr(path)}` is not finite: {leaf}.")
    init_key, sample_key, eval_key = jax.random.split(key, 3)
    init, step = jax.jit(learner.init), jax.jit(learner.step, donate_argnums=0)

    def draw(at: Any, sample_tasks: SampleTasksFn = sample_tasks) -> base.PyTree:
        return _learner.check_tasks(sample_tasks(jax.random.fold_in(sample_key, at)))

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
    def several(state, start, num, sample_tasks):
        # Slots that are not done ignore what is drawn for them.
        def body(state, at):
            with _explained(steps_per_call):
                tasks = draw(at, sample_tasks)
            return learner.step(state, tasks)

        return jax.lax.scan(body, state, start + jnp.arange(num))

    # An argument of the program: the data that it holds, if it says which (`tasks.episodes`), are no constants in it.
    sampler = sample_tasks if isinstance(sample_tasks, Partial) else Partial(sample_tasks)

    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_signals()) if handle_signals else []
        checkpoints = saved = None
        if checkpoint_dir is not None:
            every = None if evaluate is None else eval_every
            checkpoints = Checkpoints(checkpoint_dir, _settings(key, hyperparams, every, settings))
            stack.callback(checkpoints.close)
            saved = checkpoints.restore()
        if saved is None:
            tasks = draw(0)
            state = _owned(init(init_key, hyperparams, tasks))
            run = _Run(state, hyperparams, {}, [], step=0, drawn=0)
        else:
            if saved.step > num_steps:
                raise ValueError(
                    f"`num_steps` is {num_steps}, and {checkpoint_dir} holds a run of {saved.step} steps; ask for at "
                    "least as many, or give this run a directory of its own."
                )
            # The same draw again has the carried tasks' shapes, and goes where none is done.
            tasks = draw(saved.extra["drawn"])
            run = _resumed(saved, jax.eval_shape(init, init_key, hyperparams, tasks), hyperparams, tasks)
        saved_step = None if saved is None else saved.step
        held = run.drawn  # the step that `tasks` are of
        text, unknown = "value {task.fields[value]:.4g}  hypergrad norm {task.fields[norm]:.3g}", math.nan
        bar = progress_bar(num_steps, progress, text, start=run.step, value=unknown, norm=unknown)
        show = stack.enter_context(bar)
        any_done = bool(_learner.num_true(run.state.done))
        ended = False  # by the callback
        warned = False  # of an implicit rule far from rest

        def last_drawn(run: _Run) -> base.PyTree:
            """The tasks of step `run.drawn`; None where the sampler fails, whose error has ended the run."""
            with contextlib.suppress(Exception):
                return tasks if held == run.drawn else draw(run.drawn)
            return None

        try:
            while True:
                if evaluate is not None and run.step == len(run.evaluations) * eval_every:
                    run = _evaluated(run, evaluate, eval_key)
                if checkpoints and run.step > 0 and run.step % checkpoint_every == 0 and run.step != saved_step:
                    _save(checkpoints, run, last_drawn(run))
                    saved_step = run.step
                stopped = _why_stop(run, num_steps, patience, signals) or ("callback" if ended else "")
                if stopped:
                    break
                stops = [num_steps, *([eval_every] if evaluate else []), *([checkpoint_every] if checkpoints else [])]
                num = min(steps_per_call, *(every - run.step % every for every in stops))
                state, drawn = run.state, run.drawn
                if num > 1:
                    state, metrics = several(state, run.step, num, sampler)
                    drawn = run.step + num - 1  # inside the program
                else:
                    if any_done:
                        tasks = draw(run.step)
                        held = drawn = run.step
                        if not _learner.same_types(tasks, state.tasks):
                            _check_all_done(state, tasks)
                            state = _owned(_learner.restart(init, state, tasks))
                    state, metrics = step(state, tasks)
                several_metrics = _each(jax.device_get(metrics), num)
                for i, metrics in enumerate(several_metrics):
                    _record(run.history, run.step + i, metrics)
                any_done = several_metrics[-1]["num_done"] > 0
                run = run._replace(state=state, step=run.step + num, drawn=drawn)
                show(run.step, value=several_metrics[-1]["value"], norm=several_metrics[-1]["hypergrad_norm"])
                warned = warned or _warned_of_rest(run, num, num_steps)
                if callback is not None:
                    ended |= _report(callback, run.step - num + 1, several_metrics)
        finally:
            # An error inside the step itself leaves nothing to save: the state was donated.
            if checkpoints and run.step != saved_step and _intact(run.state):
                _save(checkpoints, run, last_drawn(run))

    if run.step and np.all(run.history.get("skipped", [0.0])):
        _log.warning(
            "no step had a finite hypergradient, and λ is where it started: look for NaN in the tasks (`tasks.stack` "
            "refuses them), for labels outside of 0..W-1 and for a diverging inner loop (`hypergrad.diagnose`)"
        )
    best = _best(run.evaluations)
    return FitResult(
        hyperparams=run.state.hyperparams,
        state=run.state,
        history=_columns(run),
        evaluations=np.array(run.evaluations, np.float64),
        best_hyperparams=run.state.hyperparams if evaluate is None else run.best_hyperparams,
        best_value=math.nan if best is None else run.evaluations[best],
        stopped=stopped,
    )


def _check_arguments(num_steps, evaluate, eval_every, patience, steps_per_call, checkpoint_every):
    base.check_integer("num_steps", num_steps, 0)
    counts = {"eval_every": eval_every, "steps_per_call": steps_per_call, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        base.check_integer(name, value, 1)
    base.check_integer("patience", patience, 1, optional=True)
    if patience is not None and evaluate is None:
        raise ValueError("`patience` counts evaluations, and there are none: give `evaluate`, or no `patience`.")


def _each(metrics: dict[str, np.ndarray], num: int) -> list[dict[str, Any]]:
    """The metrics of each step of a call: floats, and arrays where they are no scalars."""
    each = [metrics] if num == 1 else [{name: x[i] for name, x in metrics.items()} for i in range(num)]
    return [{name: float(x) if x.ndim == 0 else x for name, x in one.items()} for one in each]


def _report(callback: CallbackFn, start: int, several_metrics: list[dict[str, Any]]) -> bool:
    """Whether a callback said stop, of every step; then raises the first error: a resumed run goes on after them."""
    errors, ended = [], False
    for i, metrics in enumerate(several_metrics):
        try:
            ended |= bool(callback(start + i, metrics))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return ended


def _warned_of_rest(run: _Run, num: int, num_steps: int) -> bool:
    """Whether it has just logged that an implicit rule runs far from rest: looks every 100 steps, and at the end."""
    if run.step // 100 == (run.step - num) // 100 and run.step < num_steps:
        return False
    recent = {name: float(np.mean(column[-20:])) for name, column in run.history.items()}
    message = hypergrad.rest_warning(recent)
    if message:
        _log.warning("steps %d to %d: %s", max(run.step - 19, 1), run.step, message)
    return bool(message)


@contextlib.contextmanager
def _explained(steps_per_call: int) -> Iterator[None]:
    """Says what several steps a call ask of `sample_tasks`, where they cannot be traced."""
    try:
        yield
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"With `steps_per_call={steps_per_call}`, `sample_tasks` is traced, and that failed (the error above says "
            "where): it must be made of JAX operations. Take `steps_per_call=1` for a sampler that runs on the host "
            "(NumPy, files, buckets)."
        ) from error


def _check_all_done(state: LearnerState, tasks: base.PyTree) -> None:
    done = np.concatenate([np.atleast_1d(x).ravel() for x in jax.tree.leaves(jax.device_get(state.done))])
    if not done.all():
        drawn, carried = ([x.shape for x in jax.tree.leaves(tree)] for tree in (tasks, state.tasks))
        raise ValueError(
            f"`sample_tasks` returned tasks of shapes {drawn} where {carried} are carried, and "
            f"slots {np.flatnonzero(~done).tolist()} of {done.size} are not done: their tasks and the inner training "
            "carried for them would be lost. Pad every draw to the same shapes, or let all horizons end together."
        )


def _owned(tree: base.PyTree) -> base.PyTree:
    """A copy that shares no buffer with the caller, nor between leaves: it can be donated."""
    return jax.tree.map(jnp.copy, tree)


def _intact(tree: base.PyTree) -> bool:
    return not any(x.is_deleted() for x in jax.tree.leaves(tree))


def _why_stop(run: _Run, num_steps: int, patience: int | None, signals: list[int]) -> str:
    if patience is not None and len(run.evaluations) - 1 - (_best(run.evaluations) or 0) >= patience:
        return "patience"
    if run.step >= num_steps:
        return "num_steps"
    return "signal" if signals else ""


def _best(losses: list[float]) -> int | None:
    """The index of the first smallest loss that is below infinity."""
    best = min(losses, key=lambda loss: math.inf if math.isnan(loss) else loss, default=math.inf)
    return losses.index(best) if best < math.inf else None


def _evaluated(run: _Run, evaluate: EvaluateFn, key: jax.Array) -> _Run:
    loss = evaluate(key, _owned(run.state.hyperparams))
    if jnp.shape(loss) != ():
        raise ValueError(f"`evaluate` must return a scalar; got shape {jnp.shape(loss)}.")
    evaluations = [*run.evaluations, float(loss)]
    is_best = _best(evaluations) == len(evaluations) - 1
    best_hyperparams = _owned(run.state.hyperparams) if is_best else run.best_hyperparams
    return run._replace(evaluations=evaluations, best_hyperparams=best_hyperparams)


def _record(history: dict[str, list[float]], step: int, metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if np.ndim(value) == 0:
            column = history.setdefault(name, [])
            column.extend([math.nan] * (step - len(column)))
            column.append(float(value))


def _columns(run: _Run) -> dict[str, np.ndarray]:
    columns = {}
    for name, column in run.history.items():
        columns[name] = np.full(run.step, math.nan)
        columns[name][: len(column)] = column
    return columns


def _settings(
    key: jax.Array, hyperparams: base.HyperParams, eval_every: int | None, own: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a run's bits depend on and can be compared."""
    try:
        named = json.loads(json.dumps(dict(own or {}), allow_nan=False))  # tuples are lists there
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`settings` must map names to what JSON has: numbers, texts, lists of them ({error})."
        ) from error
    leaves = [np.asarray(x) for x in jax.tree.leaves(hyperparams)]
    total = 0
    for leaf in leaves:
        total = zlib.crc32(leaf.tobytes(), total)
    return {
        "key": _plain(key).tolist(),
        "initial hyperparams": f"{len(leaves)} arrays of {sum(x.size for x in leaves)} entries, checksum {total}",
        "eval_every": eval_every,
        **{f"settings[{name!r}]": value for name, value in named.items()},
    }


def _plain(leaf: jax.Array) -> np.ndarray:
    """A leaf on the host, a key as its data."""
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def _described(tasks: base.PyTree) -> dict[str, str]:
    """What can be compared of tasks, by name: types, shapes, and checksums."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        name = f"tasks{jax.tree_util.keystr(path)}"
        described[name] = f"{leaf.dtype}{list(leaf.shape)} with checksum {checksum(_plain(leaf))}"
    return described


def _save(checkpoints: Checkpoints, run: _Run, tasks: base.PyTree) -> None:
    """Writes a checkpoint, without the tasks where those of step `run.drawn`, which are given, are what is carried."""
    lists = {"history": _columns(run), "evaluations": np.array(run.evaluations, np.float64)}
    described = None if tasks is None else _described(tasks)
    again = described == _described(run.state.tasks)
    extra = {"drawn": run.drawn, "metrics": list(run.history), "num_evaluations": len(run.evaluations)}
    extra |= {"tasks": described, "tasks again": again}
    state = run.state._replace(tasks=()) if again else run.state
    checkpoints.save(run.step, (state, run.best_hyperparams, lists), extra)


def _resumed(saved: Saved, state: LearnerState, hyperparams: base.HyperParams, tasks: base.PyTree) -> _Run:
    """The run of a checkpoint; `tasks` are those of the step that it drew last, and must be what they were."""
    here = _described(tasks)
    there = here if saved.extra["tasks"] is None else saved.extra["tasks"]
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            raise ValueError(
                saved.refusal(
                    f"`{name}`, drawn for step {saved.extra['drawn']}, is {there.get(name, 'missing')} in the "
                    f"checkpoint and {here.get(name, 'missing')} in this run (other data, another sampler, or the last "
                    "bits of another device or version of JAX)"
                )
            )
    history = {name: np.empty(saved.step) for name in saved.extra["metrics"]}
    lists = {"history": history, "evaluations": np.empty(saved.extra["num_evaluations"])}
    again = saved.extra["tasks again"]
    state, best_hyperparams, lists = saved.tree((state._replace(tasks=()) if again else state, hyperparams, lists))
    if again:
        state = state._replace(tasks=_owned(tasks))
    history = {name: column.tolist() for name, column in lists["history"].items()}
    evaluations = lists["evaluations"].tolist()
    return _Run(state, best_hyperparams, history, evaluations, saved.step, saved.extra["drawn"])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the list of SIGINT and SIGTERM received; a second SIGINT raises KeyboardInterrupt."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    former = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored on purpose: a job in the background
                former[number] = signal.signal(number, receive)
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""The state of the outer loop between two steps, and its form in a checkpoint."""

import json
import logging
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.training import _processes, _program
from metaopt.training._checkpoints import Checkpoints, Saved, checksum
from metaopt.training._learner import LearnerState

_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run between two steps. A run that continues from its checkpoint equals the run that never stopped."""

    state: LearnerState
    best_hyperparams: base.HyperParams
    history: dict[str, list[float]]
    evaluations: list[float]
    step: int  # `state.step`, on the host
    drawn: int  # the step for which tasks were drawn last
    any_done: bool  # whether the next step needs new tasks


def owned(tree: base.PyTree) -> base.PyTree:
    """Returns a copy that can be donated: its leaves share no buffer with one another or with the caller's arrays."""
    return jax.tree.map(jnp.copy, tree)


def columns(run: Run) -> dict[str, np.ndarray]:
    """Returns the history as arrays [steps], with NaN if a step did not have the metric."""
    arrays = {}
    for name, column in run.history.items():
        arrays[name] = np.full(run.step, math.nan)
        arrays[name][: len(column)] = column
    return arrays


def newest_loss(run: Run, eval_every: int) -> float:
    """The held-out loss of this step; infinite if it has none."""
    evaluated = run.evaluations and run.step == (len(run.evaluations) - 1) * eval_every
    return run.evaluations[-1] if evaluated and not math.isnan(run.evaluations[-1]) else math.inf


def is_among_best(run: Run, eval_every: int, num: int) -> bool:
    """Whether this step was evaluated, and its loss is among the `num` smallest; the initial λ does not count."""
    loss = newest_loss(run, eval_every)
    return loss < math.inf and loss in sorted(run.evaluations[1:], key=lambda x: (math.isnan(x), x))[:num]


def advanced(run: Run, state: LearnerState, metrics: Sequence[dict[str, Any]], drawn: int) -> Run:
    """Returns the run after a call, with the metrics of its steps added to the history."""
    for i, of_step in enumerate(metrics):
        _record(run.history, run.step + i, of_step)
    any_done = metrics[-1]["num_done"] > 0
    return run._replace(state=state, step=run.step + len(metrics), drawn=drawn, any_done=any_done)


def _record(history: dict[str, list[float]], step: int, metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if np.ndim(value) == 0:
            column = history.setdefault(name, [])
            column.extend([math.nan] * (step - len(column)))
            column.append(float(value))


def identity(
    key: jax.Array, hyperparams: base.HyperParams, eval_every: int | None, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the arguments that a continued run must repeat, in a form that can be compared."""
    named = json.loads(json.dumps(dict(settings or {}), allow_nan=False))  # turns tuples into lists
    leaves = [np.asarray(x) for x in jax.tree.leaves(hyperparams)]
    total = 0
    for leaf in leaves:
        total = zlib.crc32(leaf.tobytes(), total)
    return {
        "key": np.asarray(_data(key)).tolist(),
        "initial hyperparams": f"{len(leaves)} arrays of {sum(x.size for x in leaves)} entries, checksum {total}",
        "eval_every": eval_every,
        **{f"settings[{name!r}]": value for name, value in named.items()},
    }


def save(
    checkpoints: Checkpoints, run: Run, tasks: base.PyTree, program: dict[str, Any], loss: float = math.inf
) -> None:
    """Writes a checkpoint.

    Args:
      checkpoints: the folder to write to.
      run: the run to save.
      tasks: the tasks drawn for step `run.drawn`, or None if they cannot be drawn again. If the run carries exactly
        these tasks, the checkpoint does not hold them.
      program: the description of the compiled programs.
      loss: the held-out loss of this step.
    """
    lists = {"history": columns(run), "evaluations": np.array(run.evaluations, np.float64)}
    described = None if tasks is None else _described(tasks)
    tasks_are_redrawn = described == _described(run.state.tasks)
    extra = {"drawn": run.drawn, "metrics": list(run.history), "num_evaluations": len(run.evaluations)}
    extra |= {"tasks": described, "tasks again": tasks_are_redrawn, "program": program}
    state = run.state._replace(tasks=()) if tasks_are_redrawn else run.state
    checkpoints.save(run.step, (state, run.best_hyperparams, lists), extra, loss)


def resumed(saved: Saved, state: LearnerState, hyperparams: base.HyperParams, tasks: base.PyTree) -> Run:
    """Returns the run of a checkpoint.

    Args:
      saved: the checkpoint.
      state: shapes and types of the learner's state.
      hyperparams: the initial λ.
      tasks: drawn for step `saved.extra["drawn"]`; they must equal the tasks that the saved run drew.

    Raises:
      ValueError: if the tasks, or shapes or types of the state, differ from those in the checkpoint.
    """
    stored = saved.extra["tasks"]
    own = _described(tasks, stored)
    stored = own if stored is None else stored
    for name in {**stored, **own}:
        if own.get(name) != stored.get(name):
            raise ValueError(
                saved.refusal(
                    f"`{name}`, drawn for step {saved.extra['drawn']}, is {stored.get(name, 'missing')} in the "
                    f"checkpoint and {own.get(name, 'missing')} in this run (other data, another sampler, or the last "
                    "bits of another device or version of JAX)"
                )
            )
    history = {name: np.empty(saved.step) for name in saved.extra["metrics"]}
    lists = {"history": history, "evaluations": np.empty(saved.extra["num_evaluations"])}
    tasks_are_redrawn = saved.extra["tasks again"]
    state = state._replace(tasks=()) if tasks_are_redrawn else state
    state, best_hyperparams, lists = saved.tree((state, hyperparams, lists))
    if tasks_are_redrawn:
        state = state._replace(tasks=owned(tasks))
    history = {name: column.tolist() for name, column in lists["history"].items()}
    evaluations = lists["evaluations"].tolist()
    any_done = any(bool(jnp.any(x)) for x in jax.tree.leaves(state.done))
    return Run(state, best_hyperparams, history, evaluations, saved.step, saved.extra["drawn"], any_done)


def check_program(saved: Saved, program: dict[str, Any], *, allow_changed: bool) -> None:
    """Compares the programs of a checkpoint with those of this run.

    Raises:
      ValueError: if they differ and `allow_changed` is false.
    """
    stored = saved.extra["program"]
    changed = [
        f"{name} {stored['environment'].get(name, 'unknown')} (now {value})"
        for name, value in program["environment"].items()
        if stored["environment"].get(name) != value
    ]
    if changed:
        warnings.warn(
            f"The checkpoint in {saved.directory} was made with another {' and '.join(changed)}, so that its program "
            "cannot be compared with that of this run. Results may differ in their last bits.",
            stacklevel=3,
        )
        return
    parts = {"outer step": "step", "initial state": "init"}
    texts = {name: _program.differences(stored[part], program[part]) for name, part in parts.items()}
    if not any(texts.values()):
        return
    program_name, difference = next((name, text) for name, text in texts.items() if text)
    if allow_changed:
        _log.warning(f"The program of the {program_name} changed after step {saved.step}: {difference}.")
        return
    raise ValueError(
        saved.refusal(f"the program of the {program_name} differs: {difference}")
        + " `allow_changed_program=True` continues with the changed program."
    )


_SPLIT = " of its parts"


def _described(tasks: base.PyTree, others: dict[str, str] | None = None) -> dict[str, str]:
    """Types, shapes and checksums of tasks, by name. The kinds of checksum are those of `others`."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        name = f"tasks{jax.tree_util.keystr(path)}"
        data = _data(leaf)
        is_split = _processes.is_split(data)
        if others[name].endswith(_SPLIT) if others and name in others else is_split:
            number = f"{_processes.checksum(jnp.asarray(data))}{_SPLIT}"
        else:
            number = checksum(_processes.whole(data))
        described[name] = f"{leaf.dtype}{list(leaf.shape)} with checksum {number}"
    return described


def _data(leaf: jax.Array) -> jax.Array:
    """An array; for a key, its data."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

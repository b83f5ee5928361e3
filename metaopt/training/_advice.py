"""Warnings of `fit` about runs whose result may not be what the caller expects."""

import logging

import jax
import numpy as np

from metaopt import _checks, base, spaces
from metaopt.training import _processes
from metaopt.training._run import Run

_log = logging.getLogger(__name__)
_NUM_FIRST = 10  # steps after which each leaf of λ is expected to have moved
_LARGE = 20  # entries of an array that are compared between training and validation data
_OTHER_UNITS = 20.0  # ratio of the means of two such arrays
_EXPLODED = 1e6  # limit of ‖dF/dλ‖ / max(1, |F|), for λ of size about 1


def logged(warned: frozenset[str], run: Run, num: int, num_steps: int, hyperparams: base.HyperParams) -> frozenset[str]:
    """Logs the warnings that are due after a program of `num` steps, each at most once in a run of `fit`.

    Args:
      warned: which of these warnings were logged before: "rest", "solve" (of implicit rules), "exploded".
      run: the run after these steps.
      num: the number of steps that the program took.
      num_steps: the number of steps of the whole run.
      hyperparams: the initial λ.

    Returns:
      `warned` with those of these warnings that have been logged now.
    """
    first = min(_NUM_FIRST, num_steps)
    if run.step - num < first <= run.step:
        _log_unmoved(run, hyperparams)
    return warned | _logged_implicit(warned, run, num, num_steps) | _logged_exploded(warned, run, num)


def log_of_tasks(tasks: base.PyTree) -> None:
    """Logs a warning if training and validation data are equal, or have arrays of very different scales.

    Args:
      tasks: the first tasks of a run. Only those of type `base.Task` are checked.
    """
    if not isinstance(tasks, base.Task):
        return
    train, valid = map(_numbers, (tasks.train, tasks.valid))
    shared = train.keys() & valid.keys()
    large = [name for name in shared if train[name].size >= _LARGE]
    if large and len(shared) == len(train) == len(valid) and all(np.array_equal(train[x], valid[x]) for x in shared):
        _log.warning(
            "The training data and the validation data of the tasks are equal, so λ is tuned for the loss on the "
            "training data. Such a loss does not show the benefit of a weight decay, of noise or of dropout. "
            "Split the rows."
        )
    for name in sorted(shared):
        pair = train[name], valid[name]
        sizes = [float(np.abs(x, dtype=np.float32).mean()) if x.ndim > 1 and x.size >= _LARGE else 0.0 for x in pair]
        if 0 < _OTHER_UNITS * min(sizes) < max(sizes) < np.inf:
            _log.warning(
                f"The arrays `{name}` of the training and the validation data have different units: the means of their "
                f"absolute values are {sizes[0]:.3g} and {sizes[1]:.3g}. Scale both in the same way, such as pixels "
                "from 0 to 1."
            )


def log_bounds(space: base.PyTree | None, hyperparams: base.HyperParams, run: Run) -> None:
    """Logs the numbers of λ that are at a bound of their range after a run.

    Args:
      space: the space of λ; without it, nothing is logged.
      hyperparams: λ after the run, in natural units.
      run: the run. Without a finite step, nothing is logged.
    """
    if space is None or not run.step or sum(run.history["skipped"]) == run.step:
        return
    reached = jax.tree_util.tree_leaves_with_path(spaces.at_bounds(space, hyperparams))
    pairs = zip(reached, jax.tree.leaves(space), strict=True)
    # A choice is expected to end at one of its labels.
    paths = [path for (path, at), leaf in pairs if hasattr(leaf, "low") and np.any(at)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams" for path in paths]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _log.warning(
            f"After the last step, these entries of λ are at a bound of their range: {', '.join(names[:5])}{more}. "
            "Either the best value is outside, or the rate of the outer optimizer is so large that λ has jumped to the "
            "bound. Widen the range, or use a smaller rate."
        )


def _numbers(data: base.Data) -> dict[str, np.ndarray]:
    """The arrays of real numbers by the names of their paths, of those that this process holds."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(data)]
    is_real = lambda x: any(np.issubdtype(x.dtype, kind) for kind in (np.floating, np.integer))
    held = [(name, x) for name, x in leaves if getattr(x, "is_fully_addressable", True) and is_real(x)]
    return {name: np.asarray(x) for name, x in held}


def _log_unmoved(run: Run, hyperparams: base.HyperParams) -> None:
    """Logs the leaves of λ that no step has changed. A step with a non-finite hypergradient changes none."""
    if not run.step or sum(run.history["skipped"]) == run.step:
        return
    # Without this, an array that is the whole λ would be called "coordinates".
    hyperparams = hyperparams.coordinates if isinstance(hyperparams, spaces.Unconstrained) else hyperparams
    leaves = jax.tree_util.tree_leaves_with_path(hyperparams)
    pairs = zip(leaves, jax.tree.leaves(_processes.local(run.state.hyperparams)), strict=True)
    unmoved = [path for (path, start), leaf in pairs if start.size and np.array_equal(start, leaf)]
    if len(unmoved) == len(leaves) and max(run.history["hypergrad_norm"]) > 0:
        return  # the outer optimizer moves nothing, as in a control
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams" for path in unmoved]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _log.warning(
            f"After {run.step} steps, these entries of λ still have their initial values: "
            f"{', '.join(names[:5])}{more}. Either their hypergradient was zero, for example because no loss, "
            "optimizer or initialization uses them, or the outer optimizer did not move them. The threshold of "
            "`optax.clip_by_global_norm` has no derivative while it does not clip: use `transforms.learnable_clip`. "
            "`hypergrad.check` names the entries on which the outer loss does not depend."
        )


def _logged_implicit(warned: frozenset[str], run: Run, num: int, num_steps: int) -> frozenset[str]:
    """Logs a warning if an implicit rule runs far from rest, and one if its solve is useless, each at most once.

    It checks every 100 steps, and at the end.

    Returns:
      The names of the warnings that are due, logged now or before.
    """
    if run.step // 100 == (run.step - num) // 100 and run.step < num_steps:
        return frozenset()
    with np.errstate(over="ignore"):  # a diverging loss
        recent = {name: float(np.mean(column[-20:])) for name, column in run.history.items()}
    texts = _checks.warnings_of_implicit_rules(recent)
    for name in texts.keys() - warned:
        _log.warning("steps %d to %d: %s", max(run.step - 19, 1), run.step, texts[name])
    return frozenset(texts)


def _logged_exploded(warned: frozenset[str], run: Run, num: int) -> frozenset[str]:
    """Logs a warning, once, if the norm of a finite hypergradient exceeds 1e6 and a million times the outer loss.

    An outer optimizer such as Adam divides by the norm, so λ moves as usual, and nothing else shows the explosion. The
    limit is for λ of size about 1: the hypergradient of a much smaller λ may exceed it and be exact.

    Returns:
      {"exploded"} if the warning has been logged now.
    """
    columns = (run.history[name][run.step - num : run.step] for name in ("value", "hypergrad_norm", "skipped"))
    for i, (value, norm, skipped) in enumerate(zip(*columns, strict=True)):
        if "exploded" not in warned and not skipped and norm > _EXPLODED * max(1.0, abs(value)):
            _log.warning(
                f"step {run.step - num + 1 + i}: the hypergradient has the norm {norm:.3g} at an outer loss of "
                f"{value:.3g}. Usually training amplifies each change of λ, and such a hypergradient is noise: "
                "`hypergrad.diagnose` reports this growth. Then use a smaller learning rate, fewer inner steps, "
                "`hypergrad.truncated`, or `hypergrad.persistent_es`, whose F is the mean of the outer loss over all "
                "steps. If only a few steps explode, clip by `hypergrad.over_tasks(..., max_norm=1.0)`. If λ itself is "
                "tiny, such as a rate of 1e-8, the norm only shows its unit: tune its logarithm."
            )
            return frozenset({"exploded"})
    return frozenset()

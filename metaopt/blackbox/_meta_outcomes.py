"""Predicted outcomes of a new task's configurations: means and quantiles."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from metaopt.blackbox._new_task import new_task_of
from metaopt.blackbox._new_trials import (
    MAX_TRIALS,
    as_configurations,
    as_outcomes,
    best_and_latest,
    from_the_best,
    padded,
)
from metaopt.blackbox._programs import Learned, impute_failed, shown_trials


class Outcomes(NamedTuple):
    """Predicted outcomes of P configurations.

    They are in the units of the task. If no trial has an outcome, they are normalized: 0 is the task's best and 1 its
    worst.

    Attributes:
      mean: [P] means.
      quantiles: [P, L] quantiles at L levels.
    """

    mean: np.ndarray
    quantiles: np.ndarray


class OutcomesFn(Protocol):
    def __call__(
        self,
        configurations: Sequence[Mapping[str, Any]],
        new_task: Any = None,
        *,
        tried: Sequence[Mapping[str, Any]] = (),
        outcomes: Sequence[float] | np.ndarray = (),
        levels: Sequence[float] = (0.1, 0.5, 0.9),
    ) -> Outcomes:
        """Returns means and quantiles of outcomes of configurations, given tried ones and assuming no failure.

        An outcome of NaN means that the trial failed. A failed trial is treated as censored: its expected outcome is
        at least as bad as the worst observed one, or as 1 without an observed one. This also makes the predictions of
        similar configurations worse.

        Configurations are dicts or the rows of a data frame. A gap in a data frame is a missing value, or None if None
        is a label. Missing values are at their defaults. Names and values that the space does not have raise
        `ValueError`."""
        ...


def predict_outcomes(
    learned: Learned,
    configurations: Sequence[Mapping[str, Any]],
    new_task: Any = None,
    *,
    tried: Sequence[Mapping[str, Any]] = (),
    outcomes: Sequence[float] | np.ndarray = (),
    levels: Sequence[float] = (0.1, 0.5, 0.9),
) -> Outcomes:
    """`MetaOptimizer.outcomes` of a learned optimizer."""
    domain = learned.domain
    configurations = as_configurations("configurations", configurations, domain.space)
    tried = as_configurations("tried", tried, domain.space)
    y, low, trials, failed = as_outcomes(outcomes, len(tried)), 0.0, None, None
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"`levels` must lie in (0, 1); got {tuple(levels)}.")
    if not len(configurations):
        return Outcomes(np.zeros(0), np.zeros((0, len(levels))))
    task = new_task_of(learned.model.surrogate, new_task, learned.reads)
    x = np.stack([domain.encode(c, True) for c in configurations])
    tried_x = np.stack([domain.encode(c, True) for c in tried]) if len(tried) else np.zeros((0, x.shape[1]))
    if has_outcome := bool(np.isfinite(y).any()):
        y, low = from_the_best(y, learned.model.widest)  # float32 has few digits
    rows = best_and_latest(y, MAX_TRIALS)
    tried_x, y = tried_x[rows], y[rows]
    shown = shown_trials(learned, tried_x, y)
    if has_outcome:
        trials = padded(tried_x, impute_failed(learned, task, tried_x, y))
    elif len(y):
        failed_x, _, mask = padded(tried_x, np.zeros(len(y)))
        failed = failed_x, mask
    levels_ = jnp.asarray(levels, jnp.result_type(float))
    mean, quantiles = learned.programs.mean_and_quantiles(task, jnp.asarray(x), trials, failed, shown, levels_)
    return Outcomes(np.asarray(mean, float) + low, np.asarray(quantiles, float) + low)

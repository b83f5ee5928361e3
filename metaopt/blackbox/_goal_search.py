"""Chooses configurations by several outcomes: expected hypervolume improvement, times the probability of feasibility.

Each objective and each constraint has its own surrogate, and they are independent. While no trial is feasible, the
score is the probability of feasibility.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _pareto
from metaopt.blackbox import _domain, _posterior
from metaopt.blackbox._goals import Goals, best_first, spread
from metaopt.blackbox._hypervolume import Front, hypervolume_improvement, make_front, max_points, reference_point
from metaopt.blackbox._new_task import NewTask
from metaopt.blackbox._new_trials import MAX_TRIALS, EndedTrials, as_outcomes, best_and_latest, from_the_best, padded
from metaopt.blackbox._predictions import Model, Trials, specialized
from metaopt.blackbox._programs import Learned, impute_failed


class GoalSearch(NamedTuple):
    """The models of several outcomes.

    Attributes:
      goals: the names of M objectives and C constraints.
      outcomes: the learned models of each, in the order of `goals.names`; all have the same configurations.
      suggest_z: (key, tasks, trials) -> z.
      candidates_score: (tasks, trials, functions) -> [P].
    """

    goals: Goals
    outcomes: tuple[Learned, ...]
    suggest_z: Callable
    candidates_score: Callable


class GoalTrials(NamedTuple):
    """The trials of a new task; each outcome is its distance from the smallest one of the same name.

    Attributes:
      ended: (x, y, mask) of each outcome; also of running trials, which count with their expected outcomes.
      bounds: [C] the bounds of the constraints.
      front: the front of the feasible trials; None while no trial is feasible.
    """

    ended: tuple[Trials, ...]
    bounds: jax.Array
    front: Front | None


def make_goal_search(goals: Goals, outcomes: tuple[Learned, ...]) -> GoalSearch:
    """Returns the `GoalSearch` of the models of all outcomes."""
    models, domain = tuple(learned.model for learned in outcomes), outcomes[0].domain
    return GoalSearch(
        goals,
        outcomes,
        jax.jit(functools.partial(_suggest_z, models, domain)),
        jax.jit(functools.partial(_candidates_score, models, domain)),
    )


def goal_score(
    models: Sequence[Model], tasks: Sequence[NewTask], trials: GoalTrials, functions: Sequence[Any]
) -> Callable[[jax.Array], jax.Array]:
    """Returns the score of encoded configurations: [P, D] -> [P], larger is better."""
    num = len(models) - len(trials.bounds)
    conditioned_models = [
        _posterior.condition(specialized(model, task), task.weights, ended)
        for model, task, ended in zip(models, tasks, trials.ended, strict=True)
    ]

    def score(x):
        mixtures = [
            _posterior.posterior_at(model.surrogate, conditioned_model, x, functions=functions_at_x)
            for model, conditioned_model, functions_at_x in zip(models, conditioned_models, functions, strict=True)
        ]
        total = jnp.ones(len(x)) if trials.front is None else hypervolume_improvement(mixtures[:num], trials.front)
        for mixture, bound in zip(mixtures[num:], trials.bounds, strict=True):
            below = jax.scipy.special.ndtr((bound - mixture.mean) / mixture.std)
            total *= below @ jnp.exp(mixture.log_weights)
        return total

    return score


def _suggest_z(models, domain: _domain.Domain, key, tasks, trials: GoalTrials) -> jax.Array:
    return _domain.maximize(domain, key, goal_score(models, tasks, trials, [None] * len(models)))


def _candidates_score(models, domain: _domain.Domain, tasks, trials: GoalTrials, functions) -> jax.Array:
    return goal_score(models, tasks, trials, functions)(jnp.asarray(domain.encoded))


def as_goal_outcomes(outcomes: Any, num: int, goals: Goals) -> np.ndarray:
    """[N, M + C] outcomes of N configurations; a trial whose row is NaN has failed, and one NaN is an unknown outcome.

    Args:
      outcomes: dicts by name, or an array with a column for each of `goals.names`.
      num: N, the number of configurations.
      goals: the objectives and constraints.

    Raises:
      ValueError: if an array has another shape, a dict lacks a name, or an outcome is not a number.
    """
    rows = list(outcomes)
    for i, row in enumerate(rows):
        if isinstance(row, Mapping):
            if lacking := [name for name in goals.names if name not in row]:
                raise ValueError(
                    f"`outcomes[{i}]` lacks {', '.join(map(repr, lacking))}; it has {', '.join(map(repr, row))}. Give "
                    "NaN for an unknown outcome."
                )
            rows[i] = [row[name] for name in goals.names]
    y = np.asarray(rows, float).reshape(0, len(goals.names)) if not rows else np.asarray(rows, float)
    if y.shape != (num, len(goals.names)):
        raise ValueError(
            f"`outcomes` must have the outcomes {', '.join(map(repr, goals.names))} for each of {num} configurations, "
            f"as dicts or as an array [{num}, {len(goals.names)}]; got shape {y.shape}."
        )
    return np.stack([as_outcomes(column, num) for column in y.T], axis=1)


def goal_trials(
    search: GoalSearch, tasks: Sequence[NewTask], ended: EndedTrials, running: Mapping[int, np.ndarray]
) -> GoalTrials:
    """Selects the trials that the score reads, and finds their front.

    Args:
      search: the models of all outcomes.
      tasks: the new task, for each model.
      ended: the ended trials; at least one has all `outcomes`.
      running: encoded configurations [D] of the running trials, by number.
    """
    bounds = np.array(list(search.goals.constraints.values()))
    num = len(search.outcomes) - len(bounds)
    rows = _rows(ended, num, bounds)
    x, outcomes, given_up = np.stack([ended.x(i) for i in rows]), ended.outcomes[rows], ended.given_up[rows]
    running_x = np.reshape(list(running.values()), (len(running), x.shape[1]))
    failed = np.isnan(outcomes).all(1)
    can_be_best = _feasible(outcomes, num, bounds) & ~given_up

    trials, shifted, smallest = [], [], []
    for k, learned in enumerate(search.outcomes):
        bound = bounds[k - num] if k >= num else None
        y, low = _clip(outcomes[:, k], learned.model.widest, can_be_best, bound)
        is_used = np.isfinite(outcomes[:, k]) | failed
        imputed = impute_failed(learned, tasks[k], x[is_used], y[is_used])
        observed, expected = _with_expected(learned, tasks[k], x[is_used], imputed, running_x)
        trials.append(observed)
        shifted.append(np.concatenate([y, expected]))
        smallest.append(low)
    shifted, bounds = np.stack(shifted, axis=1), bounds - smallest[num:]
    may_count = np.concatenate([~given_up, np.ones(len(running), bool)])
    front = _front(search, shifted, _feasible(shifted, num, bounds) & may_count)
    return GoalTrials(tuple(trials), jnp.asarray(bounds, jnp.result_type(float)), front)


def _clip(y: np.ndarray, widest: float, can_be_best: np.ndarray, bound: float | None) -> tuple[np.ndarray, float]:
    """Returns [N] distances from the smallest outcome, clipped, and the smallest outcome; `bound` is of a constraint.

    Clipping must change neither the front nor the side of a bound on which a trial lies. So the limit is at least the
    largest objective of a trial that can be best, and twice the distance of a bound from the smallest outcome.
    """
    clipped, smallest = from_the_best(y, widest)
    distances = y - smallest
    keep_up_to = distances[can_be_best].max(initial=0.0) if bound is None else 2 * (bound - smallest)
    return np.minimum(distances, max(np.nanmax(clipped), keep_up_to, 0.0)), smallest


def _with_expected(
    learned: Learned, task: NewTask, x: np.ndarray, y: np.ndarray, running_x: np.ndarray
) -> tuple[Trials, np.ndarray]:
    """Returns the ended and the running trials, padded, and the expected outcomes [R] that the running ones get."""
    num, ended = len(running_x), padded(x, y)
    if not num:
        return ended, np.zeros(0)
    expected = learned.programs.mean_after_trials(task, ended, padded(running_x, np.zeros(num))[0])
    expected = np.asarray(expected)[:num]
    return padded(np.concatenate([x, running_x]), np.concatenate([y, expected])), expected


def _feasible(outcomes: np.ndarray, num_objectives: int, bounds: np.ndarray) -> np.ndarray:
    return np.isfinite(outcomes).all(1) & (outcomes[:, num_objectives:] <= bounds).all(1)


def _rows(ended: EndedTrials, num_objectives: int, bounds: np.ndarray) -> np.ndarray:
    """The trials to read: the best ones by fronts, the latest failures, and the latest ones."""
    y = ended.outcomes
    if len(y) <= MAX_TRIALS:
        return np.arange(len(y))
    position = np.where(np.isnan(y).all(1), np.nan, float(len(y)))
    order = best_first(y[:, :num_objectives], y[:, num_objectives:] - bounds)
    position[order] = np.arange(len(order))
    return best_and_latest(position, MAX_TRIALS)


def _front(search: GoalSearch, outcomes: np.ndarray, can_be_best: np.ndarray) -> Front | None:
    """The front of the feasible trials, padded to 16, 64, 256, ... points, so that JAX compiles few programs."""
    if not can_be_best.any():
        return None
    num = len(search.outcomes) - len(search.goals.constraints)
    objectives = outcomes[can_be_best, :num]
    front = objectives[spread(_pareto.pareto_front(objectives), objectives)][: max_points(num)]
    scales = np.array([learned.model.typical_scale for learned in search.outcomes[:num]])
    reference = reference_point(front, objectives, scales)
    size = 16
    while size < len(front):
        size *= 4
    size = min(size, max_points(num))
    return make_front(np.concatenate([front, np.tile(reference, (size - len(front), 1))]), reference)

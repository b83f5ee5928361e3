"""The compiled functions of a learned optimizer, and everything else that its methods share.

The model is a constant of each program, so that XLA can fold it. One program serves all tasks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _domain, _posterior, _predictions, _scores
from metaopt.blackbox._domain import Domain
from metaopt.blackbox._new_task import NewTask
from metaopt.blackbox._new_trials import padded, shown_to_transformers
from metaopt.blackbox._predictions import Model


class Programs(NamedTuple):
    """Compiled functions; `task` is a `NewTask`, z are the coordinates of the best configuration of the space.

    Attributes:
      predict_z: (key, task) -> z, by the score of `predict`.
      predict_z_after_failures: (key, task, failed, shown) -> z.
      suggest_z: (acquisition, key, task, trials) -> z.
      prediction_score: (task, x) -> [P].
      mean_score: (task, x) -> [P].
      candidates_after_failures: (task, failed, shown) -> [P] scores of the candidates.
      candidates_by_acquisition: (acquisition, key, task, trials, functions, cost_functions) -> [P].
      possible_outcomes: (task, x) -> [P, K] outcomes and [K] weights.
      mean_after_trials: (task, trials, x) -> [P].
      mean_of_failed: (task, trials, x, worst) -> [P].
      mean_and_quantiles: (task, x, trials, failed, shown, levels) -> [P] and [P, L].
    """

    predict_z: Callable
    predict_z_after_failures: Callable
    suggest_z: Callable
    prediction_score: Callable
    mean_score: Callable
    candidates_after_failures: Callable
    candidates_by_acquisition: Callable
    possible_outcomes: Callable
    mean_after_trials: Callable
    mean_of_failed: Callable
    mean_and_quantiles: Callable


class Learned(NamedTuple):
    """Everything that the methods of a `MetaOptimizer` share.

    Attributes:
      model: the learned models.
      domain: the configurations to choose from.
      programs: compiled functions of the two.
      functions: [P, 1 + S] the functions of earlier tasks at the candidates; None without candidates.
      cost_functions: the same of the cost's surrogate, or None.
      reads: "table" or "images" if a new task may be given as such data and its labels; otherwise None.
      goals: the models of several outcomes (`_goal_search.GoalSearch`), or None.
    """

    model: Model
    domain: Domain
    programs: Programs
    functions: jax.Array | None
    cost_functions: jax.Array | None
    reads: str | None = None
    goals: Any = None


def make_learned(model: Model, domain: Domain, reads: str | None = None) -> Learned:
    """Returns the `Learned` of a model and a domain."""

    def bind(function, *args, **options):
        return jax.jit(functools.partial(function, model, *args), **options)

    programs = Programs(
        predict_z=bind(_predict_z, domain),
        predict_z_after_failures=bind(_predict_z_after_failures, domain),
        suggest_z=bind(_suggest_z, domain, static_argnums=0),
        prediction_score=bind(_scores.prediction_score),
        mean_score=bind(_scores.mean_score),
        candidates_after_failures=bind(_candidates_after_failures, domain),
        candidates_by_acquisition=bind(_candidates_by_acquisition, domain, static_argnums=0),
        possible_outcomes=bind(_predictions.possible_outcomes),
        mean_after_trials=bind(_predictions.mean_after_trials),
        mean_of_failed=bind(_predictions.mean_of_failed),
        mean_and_quantiles=bind(_predictions.mean_and_quantiles),
    )
    functions_at = jax.jit(_posterior.functions_at)

    def at_candidates(surrogate):
        return None if domain.encoded is None or surrogate is None else functions_at(surrogate, domain.encoded)

    functions, cost_functions = at_candidates(model.surrogate), at_candidates(model.cost_surrogate)
    return Learned(model, domain, programs, functions, cost_functions, reads)


def _predict_z(model: Model, domain: Domain, key: jax.Array, task: NewTask) -> jax.Array:
    return _domain.maximize(domain, key, lambda x: _scores.prediction_score(model, task, x))


def _predict_z_after_failures(model: Model, domain: Domain, key, task: NewTask, failed, shown) -> jax.Array:
    return _domain.maximize(domain, key, lambda x: _scores.score_after_failures(model, task, failed, shown, x))


def _suggest_z(model: Model, domain: Domain, acquisition: str, key, task: NewTask, trials) -> jax.Array:
    # `maximize` uses the numbers below NUM_RANDOM.
    score_key = jax.random.fold_in(key, _domain.NUM_RANDOM)
    return _domain.maximize(domain, key, _scores.acquisition_score(model, acquisition, score_key, task, trials))


def _candidates_after_failures(model: Model, domain: Domain, task: NewTask, failed, shown) -> jax.Array:
    return _scores.score_after_failures(model, task, failed, shown, jnp.asarray(domain.encoded))


def _candidates_by_acquisition(model: Model, domain: Domain, acquisition: str, key, task: NewTask, trials, *functions):
    score = _scores.acquisition_score(model, acquisition, key, task, trials, *functions)
    return score(jnp.asarray(domain.encoded))


def impute_failed(learned: Learned, task: NewTask, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Replaces NaN, the outcome of failed trials, by an expected outcome.

    A failed trial is treated as censored: its outcome is at least as bad as the worst observed one. We impute the
    expected value above that bound.

    Args:
      learned: the learned optimizer.
      task: the new task.
      x: [N, D] encoded trials.
      y: [N] outcomes, at least one finite.

    Returns:
      [N] finite outcomes.
    """
    failed = np.isnan(y)
    if not failed.any():
        return y
    worst = np.nanmax(y)
    at_failed, *_ = padded(x[failed], np.full(failed.sum(), worst))
    expected = learned.programs.mean_of_failed(task, padded(x[~failed], y[~failed]), at_failed, worst)
    y = y.copy()
    y[failed] = np.asarray(expected)[: failed.sum()]
    return y


def shown_trials(learned: Learned, x: np.ndarray, y: np.ndarray) -> _predictions.Shown:
    """(x, y, mask) of the trials that transformers read, or None without transformers; y is NaN if a trial failed."""
    if not learned.model.transformer_share:
        return None
    return shown_to_transformers(x, y, learned.model.surrogate.max_shown)

"""Chooses configurations for a new task: one without trials, a portfolio, and the next one given trials."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _domain
from metaopt.blackbox._earlier_trials import candidate_key
from metaopt.blackbox._goal_search import goal_trials
from metaopt.blackbox._new_task import NewTask, new_task_of
from metaopt.blackbox._new_trials import (
    MAX_TRIALS,
    EndedTrials,
    best_and_latest,
    farthest,
    from_the_best,
    padded,
)
from metaopt.blackbox._programs import Learned, impute_failed, shown_trials
from metaopt.blackbox._scores import ACQUISITIONS, TrialArrays

_RANDOM_EVERY = 4  # trials, in a search without candidates
_FARTHEST_EVERY = 8  # trials, in a search with candidates
_MAX_COSTS = 64  # trials whose costs are used
_PLAN = 8  # number of configurations that the plan for trials before the first outcome grows by


def best_configuration(learned: Learned, task: NewTask) -> dict[str, Any]:
    """The configuration with the best score of `predict`."""
    domain, programs = learned.domain, learned.programs
    if domain.encoded is not None:
        return dict(domain.candidates[int(jnp.argmax(programs.prediction_score(task, jnp.asarray(domain.encoded))))])
    return _domain.to_configuration(domain, programs.predict_z(jax.random.key(0), task))


def complementary(learned: Learned, task: NewTask, num: int) -> list[dict[str, Any]]:
    """A greedy portfolio of at most `num` configurations.

    Each one minimizes the expected best outcome of itself and those before it.
    """
    domain, chosen = learned.domain, [best_configuration(learned, task)]
    pool = domain.candidates
    if not pool:
        zs = domain.sample(jax.random.split(jax.random.key(1), _domain.NUM_RANDOM))
        drawn = [_domain.to_configuration(domain, z) for z in zs]
        pool = list({candidate_key(c): c for c in [chosen[0], *drawn]}.values())
    x = jnp.asarray(np.stack([domain.encode(c) for c in pool]))
    curves, weights = map(np.asarray, learned.programs.possible_outcomes(task, x))
    taken = {pool.index(chosen[0])}
    best = curves[pool.index(chosen[0])]
    while len(chosen) < min(num, len(pool)):
        expected = np.minimum(curves, best[None]) @ weights + 1e-4 * (curves @ weights)
        expected[list(taken)] = np.inf
        row = int(expected.argmin())
        taken.add(row)
        chosen.append(dict(pool[row]))
        best = np.minimum(best, curves[row])
    return chosen


class TaskSearch(NamedTuple):
    """A search on one task.

    Attributes:
      task: the new task.
      acquisition: one of `ACQUISITIONS`.
      plan: num -> at least `num` configurations to try before the first outcome, as far as there are that many.
      tasks: the new task for the model of each of several outcomes; empty if there is one outcome.
    """

    task: NewTask
    acquisition: str
    plan: Callable[[int], list[dict[str, Any]]]
    tasks: tuple[NewTask, ...] = ()


def make_search(learned: Learned, task: NewTask, acquisition: str, new_task: Any = None) -> TaskSearch:
    """Returns a `TaskSearch`; `task` was made of `new_task`.

    Raises:
      ValueError: if the acquisition function is unknown, or needs costs and none were learned.
      ValueError: if there are several outcomes, and the acquisition function is not "ei".
    """
    if acquisition not in ACQUISITIONS:
        raise ValueError(f"`acquisition` must be one of {', '.join(map(repr, ACQUISITIONS))}; got {acquisition!r}.")
    if acquisition == "ei_per_cost" and learned.model.cost_surrogate is None:
        raise ValueError("'ei_per_cost' needs `train_meta_optimizer(..., costs=True)`, and records with costs.")
    tasks = ()
    if learned.goals is not None:
        if acquisition != "ei":
            raise ValueError(
                f"`acquisition` must be 'ei' with `objectives` or `constraints`: the expected improvement of the "
                f"hypervolume, times the probability of feasibility; got {acquisition!r}."
            )
        others = [outcome.model.surrogate for outcome in learned.goals.outcomes[1:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first surrogate has given the same warnings
            tasks = (task, *(new_task_of(surrogate, new_task, learned.reads) for surrogate in others))
    planned: list[dict[str, Any]] = []  # a cache: a longer portfolio begins with the shorter one

    def plan(num):
        if len(planned) < num:
            planned[:] = complementary(learned, task, num + _PLAN - 1)
        return planned

    return TaskSearch(task, acquisition, plan, tasks)


def next_configuration(
    learned: Learned,
    search: TaskSearch,
    key: jax.Array,
    ended: EndedTrials,
    running: dict[int, np.ndarray],
    num_asked: int,
) -> dict[str, Any]:
    """Chooses the configuration of the next trial.

    Args:
      learned: the learned optimizer.
      search: the task and the acquisition function.
      key: the key for samples.
      ended: the ended trials.
      running: encoded configurations [D] of the running trials, by number.
      num_asked: the number of trials so far, which determines whether the next one is exploratory.

    Returns:
      A configuration.
    """
    domain, goals = learned.domain, learned.goals
    has_outcome = np.isfinite(ended.y) if goals is None else np.isfinite(ended.outcomes).all(1)
    if not has_outcome.any():
        return _before_outcomes(learned, search, key, ended, running)
    # Sometimes try a configuration that the surrogate may underrate.
    if domain.encoded is None:
        if num_asked % _RANDOM_EVERY == _RANDOM_EVERY - 1:
            return _domain.to_configuration(domain, domain.sample(key[None])[0])
        if goals is not None:
            z = goals.suggest_z(key, search.tasks, goal_trials(goals, search.tasks, ended, running))
        else:
            trials = _trial_arrays(learned, search, ended, running)
            z = learned.programs.suggest_z(search.acquisition, key, search.task, trials)
        return _domain.to_configuration(domain, z)
    tried = _names(ended, running)
    untried = np.array([name not in tried for name in domain.names])
    if untried.any() and num_asked % _FARTHEST_EVERY == _FARTHEST_EVERY - 1:
        tried_x = np.frombuffer(b"".join(tried), domain.encoded.dtype).reshape(len(tried), -1)
        rows = np.flatnonzero(untried)
        return dict(domain.candidates[rows[farthest(domain.encoded[untried], tried_x)]])
    if goals is not None:
        functions = [outcome.functions for outcome in goals.outcomes]
        trials = goal_trials(goals, search.tasks, ended, running)
        score = np.array(goals.candidates_score(search.tasks, trials, functions))
    else:
        trials = _trial_arrays(learned, search, ended, running)
        args = search.acquisition, key, search.task, trials, learned.functions, learned.cost_functions
        score = np.array(learned.programs.candidates_by_acquisition(*args))
    score[~untried] = -np.inf
    if not np.isfinite(score).any():  # all candidates were tried
        score = np.asarray(learned.programs.mean_score(search.task, jnp.asarray(domain.encoded)))
    return dict(domain.candidates[int(score.argmax())])


def _names(ended: EndedTrials, running: dict[int, np.ndarray]) -> set[bytes]:
    """The distinct configurations of ended and running trials."""
    return ended.names() | {x.tobytes() for x in running.values()}


def _before_outcomes(learned, search, key, ended, running) -> dict[str, Any]:
    """Chooses the next configuration before the first outcome.

    It is the next one of the plan. If trials have failed, it is the one with the best expected outcome, where
    configurations similar to failed or running trials are expected to be bad.
    """
    domain, programs = learned.domain, learned.programs
    tried = _names(ended, running)
    if num := len(ended.y):
        latest = np.stack([ended.x(i) for i in range(max(num - MAX_TRIALS, 0), num)])
        x = np.concatenate([latest, *([x] for x in running.values())])[-MAX_TRIALS:]
        at_failed, _, mask = padded(x, np.zeros(len(x)))
        failed, shown = (at_failed, mask), shown_trials(learned, latest, np.full(len(latest), np.nan))
        if domain.encoded is None:
            return _domain.to_configuration(domain, programs.predict_z_after_failures(key, search.task, failed, shown))
        score = np.array(programs.candidates_after_failures(search.task, failed, shown))
        score[[name in tried for name in domain.names]] = -np.inf
        if np.isfinite(score).any():
            return dict(domain.candidates[int(score.argmax())])
    plan = search.plan(len(tried) + 1)
    return next((c for c in plan if domain.encode(c).tobytes() not in tried), plan[-1])


def _trial_arrays(learned, search, ended, running) -> TrialArrays:
    """Selects the trials that the acquisition function reads, and puts their outcomes on one scale."""
    y, has_outcome = ended.y, np.isfinite(ended.y)
    if (finished := has_outcome & ~ended.given_up).any():
        y = np.where(ended.given_up, np.maximum(y, y[finished].min()), y)
    y = from_the_best(y, learned.model.widest)[0]
    rows = best_and_latest(y, MAX_TRIALS)
    x, y = np.stack([ended.x(i) for i in rows]), y[rows]
    imputed = impute_failed(learned, search.task, x, y)
    trials = TrialArrays(padded(x, imputed), None, shown_trials(learned, x, y), None)
    if running:
        trials = _with_running(learned, search, trials, (x, y, imputed), np.stack(list(running.values())))
    if search.acquisition == "ei_per_cost":
        of_cost = rows[np.isfinite(ended.log_cost[rows])][-_MAX_COSTS:]
        if len(of_cost):
            costs = padded(np.stack([ended.x(i) for i in of_cost]), ended.log_cost[of_cost])
            trials = trials._replace(costs=costs)
    return trials


def _with_running(learned, search, trials: TrialArrays, of_ended, running_x) -> TrialArrays:
    """Adds running trials; transformers, "ucb" and "thompson" assume that they give the expected outcome."""
    x, y, imputed = of_ended
    padded_x, _, mask = padded(running_x, np.zeros(len(running_x)))
    trials, as_ended = trials._replace(running=(padded_x, mask)), search.acquisition in ("ucb", "thompson")
    if not learned.model.transformer_share and not as_ended:
        return trials
    expected = np.asarray(learned.programs.mean_after_trials(search.task, trials.ended, padded_x))[: len(running_x)]
    every_x = np.concatenate([x, running_x])
    trials = trials._replace(shown=shown_trials(learned, every_x, np.concatenate([y, expected])))
    if as_ended:
        trials = trials._replace(ended=padded(every_x, np.concatenate([imputed, expected])), running=None)
    return trials

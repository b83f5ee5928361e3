"""Scores of configurations on a new task, as traced functions; larger is better."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt.blackbox import _acquisition, _posterior, _surrogates, _transformer
from metaopt.blackbox._new_task import NewTask
from metaopt.blackbox._predictions import (
    Model,
    Shown,
    Trials,
    mean_of,
    possible_outcomes,
    specialized,
    transformer_mean,
)

# Expected improvement, expected improvement per predicted cost, a confidence bound, Thompson sampling.
ACQUISITIONS = ("ei", "ei_per_cost", "ucb", "thompson")
ScoreFn = Callable[[jax.Array], jax.Array]  # encoded configurations [P, D] -> scores [P]


class TrialArrays(NamedTuple):
    """The trials of a new task, padded.

    Attributes:
      ended: (x, y, mask) of trials, where failures have an imputed outcome.
      running: (x, mask) of running trials, or None; also None if `ended` contains them.
      shown: (x, y, mask) of the trials that transformers read; y is NaN if a trial failed. None without transformers.
      costs: (x, log cost, mask) of trials with a known cost, or None.
    """

    ended: Trials
    running: tuple[jax.Array, jax.Array] | None
    shown: Shown
    costs: Trials | None


def mean_score(model: Model, task: NewTask, x: jax.Array) -> jax.Array:
    """−m(x), the expected normalized outcome before the first trial."""
    outcomes, weights = possible_outcomes(model, task, x)
    return -(outcomes @ weights)


def prediction_score(model: Model, task: NewTask, x: jax.Array) -> jax.Array:
    """The score of `predict`: −(w m(x) + (1 − w) √v (1 − k(x, default))), where m is the expected outcome."""
    score = model.weight * mean_score(model, task, x)
    if model.default is None:
        return score
    kernel = model.surrogate.kernel
    near = _surrogates.kernel_matrix(kernel, x, jnp.asarray(model.default, x.dtype)[None])[:, 0]
    return score - (1 - model.weight) * jnp.exp(kernel.log_amplitude / 2) * (1 - near)


def score_after_failures(
    model: Model, task: NewTask, failed: tuple[jax.Array, jax.Array], shown: Shown, x: jax.Array
) -> jax.Array:
    """Minus the expected outcome if all trials so far failed."""
    score = -_posterior.expected_after_failures(specialized(model, task), task.weights, failed, x)
    share = model.transformer_share
    return (1 - share) * score - share * transformer_mean(task, shown, x) if share else score


def acquisition_score(
    model: Model,
    acquisition: str,
    key: jax.Array,
    task: NewTask,
    trials: TrialArrays,
    functions: jax.Array | None = None,
    cost_functions: jax.Array | None = None,
) -> ScoreFn:
    """Returns the acquisition function given the trials of a task.

    Args:
      model: the learned model.
      acquisition: one of `ACQUISITIONS`.
      key: the key for samples.
      task: the new task.
      trials: its trials; at least one has an outcome.
      functions: [P, 1 + S] `functions_at` of the outcome's surrogate at the scored configurations, if these are always
        the same; otherwise None.
      cost_functions: the same of the cost's surrogate.

    Returns:
      A function from encoded configurations to scores.
    """
    by_mixture = _mixture_score(model, acquisition, key, task, trials, functions, cost_functions)
    share = model.transformer_share
    if not share:
        return by_mixture
    coin_key, level_key = jax.random.split(jax.random.fold_in(key, 2))
    by_transformers = _transformer_score(model, acquisition, level_key, task, trials, cost_functions)

    def score(x):
        if acquisition == "thompson":
            return jnp.where(jax.random.uniform(coin_key) < share, by_transformers(x), by_mixture(x))
        return share * by_transformers(x) + ((1 - share) * by_mixture(x) if share < 1 else 0.0)

    return score


def _mixture_score(model, acquisition, key, task, trials, functions, cost_functions) -> ScoreFn:
    """The acquisition function under the mixture of Gaussian processes."""
    _, y, mask = trials.ended
    best = jnp.where(mask > 0, y, jnp.inf).min()
    conditioned = _posterior.condition(specialized(model, task), task.weights, trials.ended)
    log_cost = _log_cost(model, acquisition, trials, cost_functions)

    def score(x):
        if acquisition in ("ei", "ei_per_cost") and trials.running is not None:
            gain = _acquisition.batch_expected_improvement(
                model.surrogate, conditioned, trials.running, x, best, key, functions=functions
            )
            return gain * jnp.exp(-log_cost(x))
        mixture = _posterior.posterior_at(model.surrogate, conditioned, x, functions=functions)
        if acquisition == "ucb":
            return _acquisition.lower_confidence_bound(mixture)
        if acquisition == "thompson":
            return _acquisition.thompson_sample(key, mixture, independent=model.is_finite)
        return _acquisition.expected_improvement(mixture, best) * jnp.exp(-log_cost(x))

    return score


def _transformer_score(model, acquisition, level_key, task, trials, cost_functions) -> ScoreFn:
    """The acquisition function under the transformers."""
    _, y, mask = trials.ended
    read = _transformer.read_trials(task.transformers, trials.shown, model.typical_scale)
    log_cost = _log_cost(model, acquisition, trials, cost_functions)

    def score(x):
        binned = _transformer.predict_binned(task.transformers, read, x)
        if acquisition == "ucb":
            mean, std = _transformer.binned_moments(binned, jnp.where(mask > 0, y, -jnp.inf).max())
            return std - mean
        if acquisition == "thompson":  # without candidates one level for all x, so that the score is smooth in x
            level = jax.random.uniform(level_key, (len(x),) if model.is_finite else (), x.dtype)
            return -_transformer.binned_quantile(binned, level)
        # The improvement is on the smallest outcome that the transformer reads. It reads running trials with their
        # expected outcomes, so that repeating them gains nothing.
        return _transformer.binned_improvement(binned, read.low[0]) * jnp.exp(-log_cost(x))

    return score


def _log_cost(model: Model, acquisition: str, trials: TrialArrays, functions: jax.Array | None) -> ScoreFn:
    """Returns x -> [P] log costs, up to a constant that depends on the machine and on the task's size."""
    learned = model.cost_surrogate
    if acquisition != "ei_per_cost" or learned is None:
        return lambda x: jnp.zeros(len(x))
    weights = jnp.full(len(learned.curves), 1 / len(learned.curves))
    if trials.costs is None:
        weights *= jnp.exp(learned.log_scales)
        return lambda x: _surrogates.expected_outcomes(learned, x) @ weights
    conditioned = _posterior.condition(learned, weights, trials.costs)
    return lambda x: mean_of(_posterior.posterior_at(learned, conditioned, x, functions=functions))

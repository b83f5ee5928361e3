"""Predicted outcomes of a new task's configurations, by Gaussian processes and transformers, as traced functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox import _acquisition, _posterior, _surrogates, _transformer
from metaopt.blackbox._domain import Domain
from metaopt.blackbox._new_task import NewTask

_DEFAULT_TASKS = 7.0  # weight of the prior in favor of the default, as a number of earlier tasks
Trials = tuple[jax.Array, jax.Array, jax.Array]  # x [N, D], y [N], mask [N]
Shown = Any  # the Trials that transformers read; None without transformers


class Model(NamedTuple):
    """The learned models of earlier tasks, and numbers that all predictions need.

    Attributes:
      surrogate: the model of outcomes.
      cost_surrogate: the model of the logarithm of costs, or None.
      default: [D] the encoded default of the space; None if the candidates do not hold it.
      weight: w of `Evidence`.
      transformer_share: the share of transformers in predictions; 0 without transformers.
      typical_scale: the median scale of earlier tasks.
      widest: the largest distance from the best outcome; larger outcomes are clipped to it (`from_the_best`).
      is_finite: whether the configurations to choose from are a finite set.
    """

    surrogate: _surrogates.Surrogate
    cost_surrogate: _surrogates.Surrogate | None
    default: np.ndarray | None
    weight: float
    transformer_share: float
    typical_scale: float
    widest: float
    is_finite: bool


def make_model(
    surrogate: _surrogates.Surrogate,
    cost_surrogate: _surrogates.Surrogate | None,
    domain: Domain,
    effective_tasks: float,
) -> Model:
    """Returns the `Model` of surrogates; `effective_tasks` is E of `Evidence`."""
    return Model(
        surrogate,
        cost_surrogate,
        domain.default if domain.holds_default else None,
        effective_tasks / (effective_tasks + _DEFAULT_TASKS) if domain.holds_default else 1.0,
        0.0 if surrogate.transformers is None else float(surrogate.transformer_share),
        float(np.exp(np.median(surrogate.log_scales))),
        2 * float(np.exp(np.max(surrogate.log_scales))),
        domain.encoded is not None,
    )


def specialized(model: Model, task: NewTask) -> _surrogates.Surrogate:
    """The surrogate whose deep kernels and transformers have the task's features."""
    return model.surrogate._replace(deep=task.deep, transformers=task.transformers)


def possible_outcomes(model: Model, task: NewTask, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[P, K] normalized outcomes that are possible before the first trial, and [K] their weights."""
    outcomes, share = _surrogates.expected_outcomes(specialized(model, task), x), model.transformer_share
    if not share:
        return outcomes, task.weights
    no_trials = jnp.zeros((0, x.shape[1]), x.dtype), jnp.zeros(0, x.dtype), jnp.zeros(0, x.dtype)
    outcomes = jnp.concatenate([outcomes, transformer_mean(task, no_trials, x)[:, None]], axis=1)
    return outcomes, jnp.append((1 - share) * task.weights, share)


def transformer_mean(task: NewTask, shown: Shown, x: jax.Array) -> jax.Array:
    """[P] normalized outcomes that transformers expect if no trial has an outcome; a failure counts as 1, the worst."""
    read = _transformer.read_trials(task.transformers, shown)
    return _transformer.binned_moments(_transformer.predict_binned(task.transformers, read, x), 1.0)[0]


def mean_after_trials(model: Model, task: NewTask, trials: Trials, x: jax.Array) -> jax.Array:
    """[P] outcomes that Gaussian processes expect, given trials with an outcome."""
    return mean_of(_posterior.posterior(specialized(model, task), task.weights, trials, x))


def mean_of_failed(model: Model, task: NewTask, trials: Trials, x: jax.Array, worst: jax.Array) -> jax.Array:
    """[P] expected outcomes of failed trials at x, which are censored at the worst outcome."""
    return _acquisition.censored_mean(_posterior.posterior(specialized(model, task), task.weights, trials, x), worst)


def mean_of(mixture: _posterior.Mixture) -> jax.Array:
    """[P] means of a mixture."""
    return mixture.mean @ jnp.exp(mixture.log_weights)


def mean_and_quantiles(
    model: Model,
    task: NewTask,
    x: jax.Array,
    trials: Trials | None,
    failed: tuple[jax.Array, jax.Array] | None,
    shown: Shown,
    levels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Means and quantiles of outcomes, assuming no failure.

    Args:
      model: the learned model.
      task: the new task.
      x: [P, D].
      trials: the trials, where failures have an imputed outcome; None if no trial has an outcome.
      failed: (x [N, D], mask [N]) of failed trials if no trial has an outcome; otherwise None.
      shown: the trials that transformers read; None without transformers.
      levels: [L] in (0, 1).

    Returns:
      [P] means, and [P, L] quantiles by bisection of the distribution function.
    """
    surrogate, share = specialized(model, task), model.transformer_share
    mixture = _mixture(surrogate, task.weights, trials, failed, x)
    mean, low, high = mean_of(mixture), mixture.mean - 8 * mixture.std, mixture.mean + 8 * mixture.std
    low, high = low.min(1), high.max(1)
    binned = None
    if share:
        read = _transformer.read_trials(task.transformers, shown, 1.0 if trials is None else model.typical_scale)
        binned = _transformer.predict_binned(task.transformers, read, x)
        total = jnp.maximum(binned.probs.sum(1, keepdims=True), 1e-30)  # 0 if failure is certain up to rounding
        binned = binned._replace(probs=binned.probs / total, failure=0 * binned.failure)
        mean = share * _transformer.binned_moments(binned, 0.0)[0] + (1 - share) * mean
        low, high = jnp.minimum(low, binned.edges[0]), jnp.maximum(high, binned.edges[-1])

    def below(y):
        by_mixture = jax.scipy.special.ndtr((y[:, None] - mixture.mean) / mixture.std) @ jnp.exp(mixture.log_weights)
        if binned is None:
            return by_mixture
        return share * _transformer.binned_below(binned, y) + (1 - share) * by_mixture

    def quantile(level):
        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            is_below = below(middle) < level
            return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

        left, right = jax.lax.fori_loop(0, 40, halve, (low, high))
        return (left + right) / 2

    return mean, jax.vmap(quantile, out_axes=1)(levels)


def _mixture(surrogate, weights, trials, failed, x) -> _posterior.Mixture:
    if trials is not None:
        return _posterior.posterior(surrogate, weights, trials, x)
    mean = _surrogates.expected_outcomes(surrogate, x)
    if failed is not None:
        after = _posterior.expected_after_failures(surrogate, weights, failed, x)
        mean += (after - mean @ weights)[:, None]
    return _posterior.Mixture(jnp.log(weights), mean, jnp.full(mean.shape, 1e-3))

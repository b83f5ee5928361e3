"""Predicted outcomes of a new task's configurations: means and quantiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt.blackbox import _posterior, _surrogates, _transformer
from metaopt.blackbox._new_trials import (
    MAX_TRIALS,
    as_configurations,
    as_outcomes,
    best_and_latest,
    from_the_best,
    padded,
    shown_to_transformers,
)


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


def outcomes_fn(
    surrogate: _surrogates.Surrogate,
    space: base.PyTree,
    encode: Callable[..., np.ndarray],
    seen_from: Callable,
    with_failed: Callable[..., np.ndarray],
    widest: float,
) -> OutcomesFn:
    """Returns the function `MetaOptimizer.outcomes`.

    Args:
      surrogate: the learned surrogate.
      space: the search space of λ.
      encode: (configuration, strict) -> [D].
      seen_from: new task -> (weights of earlier tasks, networks of the task: deep kernels and transformers).
      with_failed: (result of `seen_from`, x [N, D], y [N], failed [N] bool) -> y with expected outcomes of failed
        trials.
      widest: largest distance from the best outcome; larger outcomes are clipped to it. If half of all trials are
        farther away, the limit grows (`from_the_best`).

    Returns:
      An `OutcomesFn`.
    """
    at = lambda networks: surrogate._replace(deep=networks[0], transformers=networks[1])
    share = 0.0 if surrogate.transformers is None else float(surrogate.transformer_share)
    typical_scale = float(np.exp(np.median(surrogate.log_scales)))

    @jax.jit
    def believed(task, x, trials, failed, shown, levels):
        """Returns the mean and the quantiles, by bisection of the distribution function."""
        weights, networks = task
        if trials is None:
            mean = _surrogates.expected_outcomes(at(networks), x)
            if failed is not None:
                after = _posterior.expected_after_failures(at(networks), weights, failed, x)
                mean += (after - mean @ weights)[:, None]
            mixture = _posterior.Mixture(jnp.log(weights), mean, jnp.full(mean.shape, 1e-3))
        else:
            mixture = _posterior.posterior(at(networks), weights, trials, x)
        mean, low, high = mean_of(mixture), mixture.mean - 8 * mixture.std, mixture.mean + 8 * mixture.std
        low, high = low.min(1), high.max(1)
        if share:
            read = _transformer.read_trials(networks[1], shown, 1.0 if trials is None else typical_scale)
            binned = _transformer.predict_binned(networks[1], read, x)
            total = jnp.maximum(binned.probs.sum(1, keepdims=True), 1e-30)  # 0 if failure is certain up to rounding
            binned = binned._replace(probs=binned.probs / total, failure=0 * binned.failure)
            mean = share * _transformer.binned_moments(binned, 0.0)[0] + (1 - share) * mean
            low, high = jnp.minimum(low, binned.edges[0]), jnp.maximum(high, binned.edges[-1])

        def below(y):
            found = jax.scipy.special.ndtr((y[:, None] - mixture.mean) / mixture.std) @ jnp.exp(mixture.log_weights)
            return share * _transformer.binned_below(binned, y) + (1 - share) * found if share else found

        def quantile(level):
            def halve(_, between):
                low, high = between
                middle = (low + high) / 2
                left = below(middle) < level
                return jnp.where(left, middle, low), jnp.where(left, high, middle)

            return sum(jax.lax.fori_loop(0, 40, halve, (low, high))) / 2

        return mean, jax.vmap(quantile, out_axes=1)(levels)

    def outcomes_at(
        configurations: Sequence[Mapping[str, Any]],
        new_task: Any = None,
        *,
        tried: Sequence[Mapping[str, Any]] = (),
        outcomes: Sequence[float] | np.ndarray = (),
        levels: Sequence[float] = (0.1, 0.5, 0.9),
    ) -> Outcomes:
        configurations = as_configurations("configurations", configurations, space)
        tried = as_configurations("tried", tried, space)
        y, low, trials, failures = as_outcomes(outcomes, len(tried)), 0.0, None, None
        if not all(0 < level < 1 for level in levels):
            raise ValueError(f"`levels` must lie in (0, 1); got {tuple(levels)}.")
        if not len(configurations):
            return Outcomes(np.zeros(0), np.zeros((0, len(levels))))
        task, x = seen_from(new_task), np.stack([encode(c, True) for c in configurations])
        at_tried = np.stack([encode(c, True) for c in tried]) if len(tried) else np.zeros((0, x.shape[1]))
        if ended := bool(np.isfinite(y).any()):
            y, low = from_the_best(y, widest)  # float32 has few digits
        keep = best_and_latest(y, MAX_TRIALS)
        at_tried, y = at_tried[keep], y[keep]
        shown = shown_to_transformers(at_tried, y, surrogate.max_shown) if share else None
        failed = np.isnan(y)
        if ended:
            known = with_failed(task, at_tried, np.where(failed, np.nanmax(y), y), failed) if failed.any() else y
            trials = padded(at_tried, known)
        elif len(y):
            at_failed, _, mask = padded(at_tried, np.zeros(len(y)))
            failures = at_failed, mask
        levels_ = jnp.asarray(levels, jnp.result_type(float))
        mean, quantiles = believed(task, jnp.asarray(x), trials, failures, shown, levels_)
        return Outcomes(np.asarray(mean, float) + low, np.asarray(quantiles, float) + low)

    return outcomes_at


def mean_of(mixture: _posterior.Mixture) -> jax.Array:
    """[P] means of a mixture."""
    return mixture.mean @ jnp.exp(mixture.log_weights)

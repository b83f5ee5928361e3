"""What is believed of a new task's configurations: means and quantiles of their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, predictors
from metaopt.methods._new_trials import (
    MAX_TRIALS,
    as_configurations,
    as_outcomes,
    best_and_latest,
    from_the_best,
    padded,
    shown_to_transformers,
)


class Outcomes(NamedTuple):
    """What to expect of P configurations: in the units of the task, or without an outcome normalized, 0 the task's best
    and 1 its worst.

    Attributes:
      mean: [P].
      quantiles: [P, L].
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
        """What to expect of configurations, given what was tried (NaN: it failed): mean and quantiles, should they not
        fail. What failed is expected to have given what is no better than the worst outcome, or than 1 where there is
        none, and so is what is like it.

        Configurations are dicts, or the rows of a data frame, whose gaps are what is lacking, or None where that is a
        label. Names and values that the space does not have are refused (`ValueError`); what is lacking is at its
        default."""
        ...


def outcomes_fn(
    surrogate: predictors.Surrogate,
    space: base.PyTree,
    encode: Callable[..., np.ndarray],
    seen_from: Callable,
    with_failed: Callable[..., np.ndarray],
    widest: float,
) -> OutcomesFn:
    """`MetaOptimizer.outcomes`.

    Args:
      surrogate: what was learned.
      space: of λ.
      encode: (configuration, strict) -> [D].
      seen_from: new task -> the weights of earlier ones, and the networks of the task (deep kernels, transformers).
      with_failed: (those, x [N, D], y [N], which failed [N]) -> y, with what is expected of those that failed.
      widest: how far from the best one outcomes are looked at.
    """
    at = lambda networks: surrogate._replace(deep=networks[0], transformers=networks[1])
    share = 0.0 if surrogate.transformers is None else float(surrogate.transformer_share)
    typical_scale = float(np.exp(np.median(surrogate.log_scales)))

    @jax.jit
    def believed(task, x, trials, failed, shown, levels):
        """Mean and quantiles, by bisection of the distribution function."""
        weights, networks = task
        if trials is None:
            mean = predictors.expected_outcomes(at(networks), x)
            if failed is not None:
                after = predictors.expected_after_failures(at(networks), weights, failed, x)
                mean += (after - mean @ weights)[:, None]
            mixture = predictors.Mixture(jnp.log(weights), mean, jnp.full(mean.shape, 1e-3))
        else:
            mixture = predictors.posterior(at(networks), weights, trials, x)
        mean, low, high = mean_of(mixture), mixture.mean - 8 * mixture.std, mixture.mean + 8 * mixture.std
        low, high = low.min(1), high.max(1)
        if share:
            read = predictors.read_trials(networks[1], shown, 1.0 if trials is None else typical_scale)
            binned = predictors.predict_binned(networks[1], read, x)
            total = jnp.maximum(binned.probs.sum(1, keepdims=True), 1e-30)  # 0 where failure is certain to rounding
            binned = binned._replace(probs=binned.probs / total, failure=0 * binned.failure)
            mean = share * predictors.binned_moments(binned, 0.0)[0] + (1 - share) * mean
            low, high = jnp.minimum(low, binned.edges[0]), jnp.maximum(high, binned.edges[-1])

        def below(y):
            found = jax.scipy.special.ndtr((y[:, None] - mixture.mean) / mixture.std) @ jnp.exp(mixture.log_weights)
            return share * predictors.binned_below(binned, y) + (1 - share) * found if share else found

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


def mean_of(mixture: predictors.Mixture) -> jax.Array:
    """[P] of a mixture."""
    return mixture.mean @ jnp.exp(mixture.log_weights)

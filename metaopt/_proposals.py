"""Draws candidates around a predicted λ, and evaluates their outer losses; for `training` and `predictors`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base
from metaopt._jaxpr import Tracer


class Normal(NamedTuple):
    """A prediction with a spread: λ ~ N(center, spread²), independent in each coordinate.

    Attributes:
      center: the predicted λ, in the coordinates of the estimator (`spaces.Unconstrained` from a predictor).
      spread: the standard deviation of each coordinate, like `center`.
    """

    center: base.HyperParams
    spread: base.HyperParams


def center_of(prediction: base.HyperParams) -> base.HyperParams:
    """The prediction without its spread: the center of a `Normal`, and any other prediction unchanged."""
    return prediction.center if isinstance(prediction, Normal) else prediction


def check_no_spread(name: str, hyperparams: base.HyperParams) -> None:
    """Raises ValueError if a prediction with a spread is passed where one λ is expected.

    Args:
      name: the argument in the error message.
      hyperparams: λ, in any coordinates.

    Raises:
      ValueError: if it is a `Normal`.
    """
    if isinstance(hyperparams, Normal):
        raise ValueError(
            f"{name} must be one λ, and this is a prediction with a spread: pass its `.center`, or use "
            "`predictors.TrainedPredictor.predict`, which returns λ."
        )


def check_spread(spread: base.PyTree) -> None:
    """Raises ValueError if a number of `spread` that is not traced is negative, infinite or NaN.

    Without this check, NaN in `spread` would give every candidate except the center the outer loss NaN. The center
    would then be the best, without an error.

    Args:
      spread: a number or an array, or a tree of them; None has no numbers.

    Raises:
      ValueError: if such a number is invalid.
    """
    for leaf in jax.tree.leaves(spread):
        if not isinstance(leaf, Tracer):
            values = np.asarray(leaf, float)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(f"`spread` must be finite and at least 0; got {leaf!r}.")


def spread_like(center: base.HyperParams, spread: base.PyTree) -> base.HyperParams:
    """The spread of every entry of `center`.

    Args:
      center: λ in the estimator's coordinates.
      spread: one array for all leaves, or a tree like `center` of scalars or arrays.

    Returns:
      Arrays like the leaves of `center`.

    Raises:
      ValueError: from JAX, if a leaf of `spread` cannot be broadcast to that of `center`, or the trees differ.
    """
    if jax.tree.structure(spread) == jax.tree.structure(0):
        spread = jax.tree.map(lambda _: spread, center)
    return jax.tree.map(lambda x, s: jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape), center, spread)


def noise(key: jax.Array, center: base.HyperParams, num_proposals: int) -> base.HyperParams:
    """ε of K candidates, like `center` with a leading axis [K]: zero for the first, standard normal for the others."""
    leaves, structure = jax.tree.flatten(center)
    keys = jax.random.split(key, len(leaves))

    def draws(key, x):
        normal = jax.random.normal(key, (num_proposals - 1, *x.shape), x.dtype)
        return jnp.concatenate([jnp.zeros((1, *x.shape), x.dtype), normal])

    return structure.unflatten([draws(k, x) for k, x in zip(keys, leaves, strict=True)])


def candidates(normal: Normal, noise: base.HyperParams) -> base.HyperParams:
    """center + spread · ε for all K candidates; the first is the center itself, whatever the spread."""
    shifted = lambda x, s, e: (x[None] + s[None] * e).at[0].set(x)
    return jax.tree.map(shifted, normal.center, normal.spread, noise)


def num_excluded(metrics: Mapping[str, Any]) -> jax.Array:
    """Returns the number of non-finite runs that the mean of an estimate excludes, plus a constant of the estimator.

    A run has one task and one seed.

    Args:
      metrics: the metrics of an estimate. Its estimator may be wrapped by `hypergrad.over_tasks`,
        `hypergrad.over_seeds` or both.

    Returns:
      A scalar. Only the difference of two such numbers, for two λ, has a meaning.
    """
    # If both wrappers are nested, the inner one's metric is a mean over the finite entries of the outer one. The
    # product is therefore the number of finite runs.
    finite = metrics.get("num_finite", 1.0) * metrics.get("num_finite_seeds", 1.0)
    return -jnp.round(jnp.asarray(finite, float))


def value_and_excluded(estimate: base.Estimate) -> tuple[jax.Array, jax.Array]:
    """F and `num_excluded` of an estimate, as `ranked` takes them."""
    return estimate.value, num_excluded(estimate.metrics)


def values(
    estimator: base.Estimator,
    key: jax.Array,
    candidates: base.HyperParams,
    task: base.Task,
    chunk: int | None,
    *,
    read_fn: Callable[[base.Estimate], Any] = value_and_excluded,
) -> Any:
    """F of every candidate, from a fresh start with one key.

    The candidates run in loops, which JAX compiles even outside `jit`. Only the values leave the loops, so the compiler
    removes the computation of the hypergradients.

    Args:
      estimator: the estimator of F.
      key: the key of every start: all candidates have the same initialization and the same order of the data.
      candidates: leaves [K, ...].
      task: the task of all candidates.
      chunk: the number of candidates that run at once; None runs all.
      read_fn: selects the parts of an estimate to return.

    Returns:
      The result of `read_fn` with a leading axis [K]; by default F and the excluded tasks and seeds, for `ranked`.
    """
    num_candidates = len(jax.tree.leaves(candidates)[0])
    chunk = num_candidates if chunk is None else min(chunk, num_candidates)

    def value(hyperparams):
        return read_fn(estimator.estimate(hyperparams, task, estimator.init(key, hyperparams, task))[0])

    # `lax.map` would run the remaining ones outside the loop.
    num_in_full_chunks = num_candidates - num_candidates % chunk
    full, remaining = slice(0, num_in_full_chunks), slice(num_in_full_chunks, num_candidates)
    parts = [
        jax.lax.map(value, jax.tree.map(lambda x, rows=rows: x[rows], candidates), batch_size=size)
        for rows, size in ((full, chunk), (remaining, num_candidates - num_in_full_chunks))
        if size
    ]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def ranked(values: jax.Array, excluded: jax.Array) -> jax.Array:
    """Returns the values, with ∞ in place of those that must not be ranked best.

    A value becomes ∞ if it is not finite, or if it is a mean that excludes more tasks or seeds than another finite
    value. Such a mean may be small only because the hardest tasks diverge.

    Args:
      values: [K] outer losses.
      excluded: [K] from `num_excluded`.

    Returns:
      [K].
    """
    finite = jnp.isfinite(values)
    fewest = jnp.min(jnp.where(finite, excluded, jnp.inf))
    return jnp.where(finite & (excluded <= fewest), values, jnp.inf)

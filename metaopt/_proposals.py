"""Draws around a predicted λ, and their outer losses under one key; `training` and `predictors` share them."""

import operator
from collections.abc import Callable
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

    With NaN, no candidate has an outer loss, and the start is the best.

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


def values(
    estimator: base.Estimator,
    key: jax.Array,
    candidates: base.HyperParams,
    task: base.Task,
    chunk: int | None,
    *,
    read: Callable[[base.Estimate], Any] = operator.attrgetter("value"),
) -> Any:
    """F of every candidate, from a fresh start with one key.

    The candidates run in loops, which JAX compiles also outside `jit`. Only the values leave them, so the compiler
    omits the hypergradients.

    Args:
      estimator: the estimator of F.
      key: the key of every start: all candidates have the same initialization and the same order of the data.
      candidates: leaves [K, ...].
      task: the task of all.
      chunk: the number of candidates that run at once; None runs all.
      read: the parts of an estimate to return.

    Returns:
      [K] outer losses; or what `read` returns, with a leading axis [K].
    """
    num = len(jax.tree.leaves(candidates)[0])
    chunk = num if chunk is None else min(chunk, num)

    def value(hyperparams):
        return read(estimator.estimate(hyperparams, task, estimator.init(key, hyperparams, task))[0])

    whole = num - num % chunk  # `lax.map` would run the others outside the loop
    parts = [
        jax.lax.map(value, jax.tree.map(lambda x, rows=rows: x[rows], candidates), batch_size=size)
        for rows, size in ((slice(0, whole), chunk), (slice(whole, num), num - whole))
        if size
    ]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def ranked(values: jax.Array) -> jax.Array:
    """The values, with ∞ in place of those that are not finite, so that these are never the smallest."""
    return jnp.where(jnp.isfinite(values), values, jnp.inf)

"""Draws around a predicted λ, and their outer losses under one key; `training` and `predictors` share them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import base


class Normal(NamedTuple):
    """A prediction with a spread: λ ~ N(center, spread²), independent in each coordinate.

    Attributes:
      center: the predicted λ, in the coordinates of the estimator (`spaces.Unconstrained` from a predictor).
      spread: the standard deviation of each coordinate, like `center`.
    """

    center: base.HyperParams
    spread: base.HyperParams


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
    estimator: base.Estimator, key: jax.Array, candidates: base.HyperParams, task: base.Task, chunk: int | None
) -> jax.Array:
    """F of every candidate, from a fresh start with one key.

    Only the values are used, so the compiler omits the hypergradients.

    Args:
      estimator: of F.
      key: of every start: all candidates have the same initialization and the same order of the data.
      candidates: leaves [K, ...].
      task: the task of all.
      chunk: the number of candidates that run at once; None runs all.

    Returns:
      [K] outer losses.
    """

    def value(hyperparams):
        return estimator.estimate(hyperparams, task, estimator.init(key, hyperparams, task))[0].value

    return jax.vmap(value)(candidates) if chunk is None else jax.lax.map(value, candidates, batch_size=chunk)


def ranked(values: jax.Array) -> jax.Array:
    """The values, with ∞ in place of those that are not finite, so that these are never the smallest."""
    return jnp.where(jnp.isfinite(values), values, jnp.inf)

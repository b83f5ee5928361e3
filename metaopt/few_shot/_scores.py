"""Scores of a method's outputs on the real query examples of an episode."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def accuracy(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The share of real query examples whose class has the largest output among the classes of the episode.

    An example with a NaN among its outputs counts as wrong, so a diverging method is scored and not left out.

    Args:
      outputs: [Q, W], such as logits.
      query: the query set, a dict with "y", "mask" and "class_mask", as in episodes.

    Returns:
      [], in [0, 1].

    Raises:
      KeyError: if the query set has no "class_mask", as in regression.
      ValueError: if outputs have another shape.
    """
    whole = (*query["y"].shape, *query["class_mask"].shape)
    if outputs.shape != whole:  # [W] and [Q, 1] would broadcast
        raise ValueError(
            f"The method's outputs must be [Q, W] = {whole}, one for each query example and class, after each step; "
            f"got {outputs.shape}."
        )
    among = jnp.where(query["class_mask"][None] > 0, outputs, -jnp.inf)
    right = (jnp.argmax(among, axis=-1) == query["y"]) & ~jnp.isnan(among).any(axis=-1)
    return (right * query["mask"]).sum() / query["mask"].sum()


def mean_squared_error(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The mean squared error over the real query examples.

    Args:
      outputs: shaped like `query["y"]`.
      query: with "y" and "mask".

    Returns:
      [], in squared units of y.
    """
    return _masked_mean((_like(outputs, query["y"]) - query["y"]) ** 2, query["mask"])


def mean_absolute_error(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The mean absolute error over the real query examples.

    Args:
      outputs: shaped like `query["y"]`.
      query: with "y" and "mask".

    Returns:
      [], in units of y.
    """
    return _masked_mean(abs(_like(outputs, query["y"]) - query["y"]), query["mask"])


def _like(outputs: jax.Array, y: jax.Array) -> jax.Array:
    if outputs.shape != y.shape:  # [Q, 1] and [Q] would broadcast
        raise ValueError(
            f"The method's outputs must have the shape of the labels, {y.shape}, after each step; got {outputs.shape}."
        )
    return jnp.asarray(outputs, jnp.result_type(outputs, y, float))  # a difference of unsigned integers would wrap


def _masked_mean(errors: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask.reshape(-1, *[1] * (errors.ndim - 1)) * jnp.ones_like(errors)
    return jnp.where(mask > 0, errors, 0).sum() / mask.sum()


HIGHER_IS_BETTER: dict[Callable, bool] = {accuracy: True, mean_squared_error: False, mean_absolute_error: False}

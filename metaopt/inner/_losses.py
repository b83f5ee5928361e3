"""Losses and scores that leave out padding rows and reject labels that are not classes.

The "mask" [N] of a batch is 1 for a real row and 0 for padding, which may be anywhere. Its "class_mask" [C] is 1 for a
real class and 0 otherwise. `tasks.to_task` writes both:

    L = Σ_n mask_n ℓ(y_n, f(x)_n + log class_mask) / Σ_n mask_n
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from metaopt import _batches


def cross_entropy(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy over the real rows of a batch, among its real classes.

    This is the default loss of architecture searches, and the loss of few-shot methods on one episode.

    Args:
      outputs: [N, C] logits, or [N, positions..., C] for a network with an output at each position.
      batch: a dict with labels "y" [N, positions...], integers in 0..C-1 (or booleans). With padding it also has
        "mask", shaped [N] or like y. If a task lacks some of the C classes, it also has "class_mask" [C].

    Returns:
      [], in nats. In a traced program, the loss and its gradient are NaN if the label of a real row is below 0 or above
      C - 1, or if no row is real.

    Raises:
      ValueError: if the labels are not integers, or if "y", "mask" or "class_mask" has another shape.
      ValueError: if labels that are not traced are not in 0..C-1.
    """
    num = outputs.shape[-1]
    _batches.check_labels(batch, num, outputs.shape[:-1])
    y = jnp.asarray(batch["y"])
    y = y.astype(jnp.int32) if y.dtype.itemsize < 4 else y  # `uint8 >= 256` would be `>= 0`
    if batch.get("class_mask") is not None:
        real = jnp.asarray(batch["class_mask"]).reshape((1,) * (outputs.ndim - 1) + (num,)) > 0
        outputs = jnp.where(real, outputs, -1e9)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, y)
    wrong = (y < 0) | (y >= num)
    if batch.get("mask") is None:
        return _nan_where(wrong, losses).mean()
    mask = jnp.asarray(batch["mask"], losses.dtype)
    if mask.shape not in (losses.shape, losses.shape[:1]):
        raise ValueError(
            f'"mask" must be [N], 1 for a real row and 0 for padding, or have the shape of the labels, {losses.shape}; '
            f"got shape {mask.shape}. Use `hypergrad.over_tasks` for a batch of tasks, and another name for a mask of "
            "anything else."
        )
    mask = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (losses.ndim - mask.ndim)), losses.shape)
    losses = _nan_where(wrong & (mask > 0), losses)
    wide = jnp.promote_types(losses.dtype, jnp.float32)  # float16 ends at 65,504
    total, count = (x.sum(dtype=wide) for x in (jnp.where(mask > 0, losses * mask, 0), mask))
    return (total / count).astype(losses.dtype)


def _nan_where(wrong: jax.Array, losses: jax.Array) -> jax.Array:
    """Sets the losses of invalid labels, and their gradients, to NaN.

    Otherwise the loss from optax would be the loss of another class, or NaN with a gradient that is not NaN.
    """
    return losses * jnp.where(wrong, jnp.nan, jnp.ones_like(losses))

"""Parts of the standard retraining recipe: crops, flips and cutout of batches, and an auxiliary head.

Batches are [N, spatial..., C] with any number of spatial axes: images or sequences. Every example has its own random
draws, which depend only on the key.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt.nas import _ops


def cutout(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes an augmentation that sets a square of side `size` to zero. Its center is random in the image.

    Parts of the square beyond the border are cut off. Zero should be the mean of the inputs, so standardize them.

    Args:
      size: side of the square, in positions; DARTS uses 16 on images of 32. An odd size counts as one less, as in the
        published code.

    Returns:
      `(key, x) -> x`, for x [N, spatial..., C].

    Source: DeVries & Taylor, 2017, https://arxiv.org/abs/1708.04552
    """

    def apply(key, x):
        spatial = _spatial(x)
        inside = jnp.ones((len(x), *[1] * (x.ndim - 1)), bool)
        for axis, length in enumerate(spatial, 1):
            center = jax.random.randint(jax.random.fold_in(key, axis), (len(x), 1), 0, length)
            position = jnp.arange(length)[None]
            near = (position >= center - size // 2) & (position < center + size // 2)
            inside = inside & near.reshape(len(x), *(length if a == axis else 1 for a in range(1, x.ndim)))
        return jnp.where(inside, jnp.zeros((), x.dtype), x)

    return apply


def crop_and_flip(padding: int = 4, *, flip: bool = True) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes an augmentation that shifts every example by up to `padding` along every axis, and flips half of them.

    Args:
      padding: the largest shift, at least 0; zeros fill the border. The published recipe uses 4 on images of 32.
      flip: whether to flip left and right, along the last spatial axis. Set it to False for digits, sequences and other
        data that have a direction.

    Returns:
      `(key, x) -> x`, for x [N, spatial..., C].
    """

    def apply(key, x):
        spatial = _spatial(x)
        around = [(0, 0), *[(padding, padding)] * len(spatial), (0, 0)]
        starts = jax.random.randint(jax.random.fold_in(key, 0), (len(x), len(spatial)), 0, 2 * padding + 1)
        take = lambda one, start: jax.lax.dynamic_slice(one, (*start, 0), x.shape[1:])
        moved = jax.vmap(take)(jnp.pad(x, around), starts)
        if not flip:
            return moved
        flips = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (len(x), *[1] * (x.ndim - 1)))
        return jnp.where(flips, jnp.flip(moved, -2), moved)

    return apply


def _spatial(x: jax.Array) -> tuple[int, ...]:
    if x.ndim < 3:
        raise ValueError(f"Crops, flips and cutout need a spatial axis: [N, spatial..., C]; got the shape {x.shape}.")
    return x.shape[1:-1]


def auxiliary_head(num_outputs: int, *, widths: tuple[int, int] = (128, 768)) -> _ops.Op:
    """A classifier on the features of a layer inside the network. Training adds its loss (DARTS).

    Its layers are ReLU, the averages of two windows along every spatial axis, a 1×1 convolution, normalization and
    ReLU. Then come one convolution over all remaining positions, normalization, ReLU and a linear layer. A window
    covers five eighths of an axis. On 8 × 8 positions this is the published head, whose windows have five positions and
    a stride of three.

    Args:
      num_outputs: number of classes.
      widths: channels of the two convolutions.

    Returns:
      An `Op` that ignores `channels` and the stride: `apply` returns [N, num_outputs].

    Source: Liu, Simonyan & Yang, ICLR 2019, https://arxiv.org/abs/1806.09055
    """

    def init(key, in_shape, channels, stride):
        places = 1
        for length in in_shape[:-1]:
            places *= min(length, 2)
        first, second = widths
        return {
            "near": _ops.uniform(key, (in_shape[-1], first), in_shape[-1]),
            "whole": _ops.uniform(key, (places * first, second), places * first, number=1),
            "w": _ops.uniform(key, (second, num_outputs), second, number=2),
            "b": jnp.zeros(num_outputs),
        }

    def apply(params, x, channels, stride):
        x = jax.nn.relu(x)
        for axis in range(1, x.ndim - 1):
            length = x.shape[axis]
            window = max(1, 5 * length // 8)
            ends = [slice(0, window), slice(length - window, length)][: min(length, 2)]
            parts = [jax.lax.slice_in_dim(x, end.start, end.stop, axis=axis) for end in ends]
            x = jnp.concatenate([part.mean(axis, keepdims=True) for part in parts], axis)
        x = jax.nn.relu(_ops.normalized(x @ params["near"]))
        x = jax.nn.relu(_ops.normalized(x.reshape(len(x), -1) @ params["whole"]))
        return x @ params["w"] + params["b"][None]

    return _ops.Op(init, apply)

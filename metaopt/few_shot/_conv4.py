"""The network of the few-shot literature, with an explicit choice of the statistics that normalize it.

Statistics of a batch make the features of an example depend on the other examples. Statistics of the query set reveal
something about its labels (all classes are present, in equal shares). The result is then *transductive*:
`evaluate_episodes` detects and reports it. A transductive network cannot predict for one example.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt.few_shot._phase import after_steps

NORMALIZATIONS = ("batch", "support", "tasknorm", "group", "layer", "none")
_GROUPS = 8
_EPSILON = 1e-5


class ConvNet(NamedTuple):
    """A network as plain functions over a pytree.

    Attributes:
      init: `(key) -> params`, without a head.
      features: `(params, batch) -> [N, D]`, for a batch with "x" [N, H, W] or [N, H, W, C] and "mask" [N].
    """

    init: Callable[[jax.Array], dict[str, Any]]
    features: Callable[[Mapping[str, Any], Mapping[str, jax.Array]], jax.Array]


def conv4(
    *,
    normalization: str = "batch",
    num_filters: int = 64,
    num_blocks: int = 4,
    num_channels: int = 1,
    num_steps: int | None = None,
    downsampling: str = "pool",
) -> ConvNet:
    """Makes a network of blocks: a 3 × 3 convolution, a normalization, ReLU and 2 × 2 max-pooling.

        x ← pool(relu((x * w − μ) / √(σ² + ε) ∘ scale + shift))

    μ and σ² are the mean and the variance over all positions, and over these examples and filters:

    | normalization | examples | filters | inductive | |
    |---|---|---|---|---|
    | "batch" | all of the batch: for a query set, the query set | each | no | used by MAML's published results |
    | "support" | all of the support set, for both sets | each | yes | |
    | "tasknorm" | the support set, mixed with the example itself | each | yes | Bronskill et al., ICML 2020 |
    | "group" | the example itself | each of 8 groups of filters | yes | Wu & He, ECCV 2018 |
    | "layer" | the example itself | all | yes | |
    | "none" | no normalization, only a shift | | yes | |

    TaskNorm uses the moments of the mixture of both, with weights α and 1 − α. Here α = sigmoid(a |support| + b), and
    each block learns a and b. Padded rows do not enter the statistics of a set. With images of 28 × 28,
    D = `num_filters`.

    **With "batch"**, the default, a prediction depends on all rows of its batch. Single query images, or images of one
    class, get other outputs than in a whole query set. This reproduces published results. To predict for single images,
    choose another normalization.

    "support" and "tasknorm" need the support set when they see the query set. `adaptation(keep_support=True)` puts it
    into `params["support"]`, and the methods that take `features` do so themselves. Without it, the statistics are
    those of the batch, which is correct in the inner loss and in pre-training. In f and in `adapted`, a missing support
    set raises a ValueError, because the method would be transductive.

    `features` cannot raise this error if they are jitted or called directly, or if the loss is under `jax.jit` or
    `jax.checkpoint`. In this case put the rows to normalize by into the parameters yourself:
    `network.features({**params, "support": {"x": ..., "mask": ...}}, batch)`.

    Args:
      normalization: one of the names in the table.
      num_filters: filters of each block; a multiple of 8 for "group".
      num_blocks: number of blocks, usually 4; each halves height and width.
      num_channels: C, the channels of the images.
      num_steps: T, if scale and shift have a value for each inner step (MAML++), as their leading axis. Then use
        `adaptation(leaves_per_step="scale|shift", adapt="^(?!.*(scale|shift))")`. The statistics are still those of the
        table, computed again at each step: nothing is carried from step to step or from task to task.
      downsampling: "pool" or "stride". "stride" uses convolutions of stride 2 instead of max-pooling, and the mean over
        positions at the end, as Finn et al. (ICML 2017) do for Omniglot. D = `num_filters`, for a fraction of the
        operations.

    Returns:
      A `ConvNet`. `features` are [N, D]: the flattened output of the last block, or with "stride" its mean over
      positions. All leaves are floating-point numbers; the network is differentiable in any mode.

    Raises:
      KeyError: if `downsampling` is unknown.
      ValueError: if `normalization` is unknown. At trace time, if the images are too small for
        `num_blocks`, or if the support set is needed and was not kept.

    Source: Vinyals et al., NIPS 2016, https://arxiv.org/abs/1606.04080; TaskNorm: https://arxiv.org/abs/2003.03284

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import few_shot
    >>> network = few_shot.conv4(num_filters=16, normalization="group")
    >>> batch = {"x": jnp.ones((3, 28, 28)), "mask": jnp.ones(3)}
    >>> network.features(network.init(jax.random.key(0)), batch).shape
    (3, 16)
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"`normalization` must be one of {', '.join(map(repr, NORMALIZATIONS))}; got {normalization!r}."
        )
    strided = {"pool": False, "stride": True}[downsampling]
    layout = _Layout(normalization, num_filters, num_blocks, num_channels, num_steps, strided)
    return ConvNet(lambda key: _init(layout, key), lambda params, batch: _features(layout, params, batch))


class _Layout(NamedTuple):
    """The arguments of `conv4`."""

    normalization: str
    num_filters: int
    num_blocks: int
    num_channels: int
    num_steps: int | None
    strided: bool


def _init(layout: _Layout, key: jax.Array) -> dict[str, Any]:
    params = {}
    num_filters, lead = layout.num_filters, () if layout.num_steps is None else (layout.num_steps,)
    for i, block_key in enumerate(jax.random.split(key, layout.num_blocks)):
        depth = layout.num_channels if i == 0 else num_filters
        w = jax.random.normal(block_key, (3, 3, depth, num_filters), jnp.float32) * (2 / (9 * depth)) ** 0.5
        block = {"w": w, "shift": jnp.zeros((*lead, num_filters), jnp.float32)}
        if layout.normalization != "none":
            block["scale"] = jnp.ones((*lead, num_filters), jnp.float32)
        if layout.normalization == "tasknorm":
            block["mix"] = jnp.zeros(2, jnp.float32)  # a, b
        params[f"block{i}"] = block
    return params


def _features(layout: _Layout, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    dtype = params["block0"]["w"].dtype
    x, mask = (batch[name].astype(dtype) for name in ("x", "mask"))
    support = _support(layout, params)
    if support is not None:  # both sets, normalized by the statistics of the support set
        x = jnp.concatenate([support["x"].astype(dtype), x])
        mask = jnp.append(support["mask"].astype(dtype), 0 * mask)
    x = x.reshape(*x.shape[:3], layout.num_channels)  # [N, H, W] has one channel
    if not layout.strided and min(x.shape[1:3]) < 2**layout.num_blocks:
        raise ValueError(
            f"Images of {x.shape[1:3]} are too small for {layout.num_blocks} blocks, each of which halves them."
        )
    for i in range(layout.num_blocks):
        x = _apply_block(layout, params[f"block{i}"], x, mask)
    x = x.mean((1, 2)) if layout.strided else x.reshape(len(x), -1)
    return x if support is None else x[len(support["x"]) :]


def _support(layout: _Layout, params: Mapping[str, Any]) -> Mapping[str, jax.Array] | None:
    """The support set that normalizes, if there is one. Raises ValueError if it is missing for a query set."""
    if layout.normalization not in ("support", "tasknorm"):
        return None
    support = params.get("support")
    if support is None and after_steps():
        raise ValueError(
            f'`conv4(normalization="{layout.normalization}")` normalizes a query set by the support set, which is '
            "missing; by its own statistics the method would be transductive. Pass `keep_support=True` to the method, "
            'or use `normalization="batch"` for statistics of the query set.'
        )
    return support


def _apply_block(layout: _Layout, block: Mapping[str, jax.Array], x: jax.Array, mask: jax.Array) -> jax.Array:
    strides, padding = ((2, 2) if layout.strided else (1, 1)), ((1, 1), (1, 1))
    x = jax.lax.conv_general_dilated(x, block["w"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    shift, scale = block["shift"].reshape(1, 1, 1, -1), jnp.ones((1, 1, 1, 1), x.dtype)
    if layout.normalization != "none":
        mean, variance = _moments(layout, x, mask, block)
        scale = jax.lax.rsqrt(variance + _EPSILON) * block["scale"].reshape(1, 1, 1, -1)
        shift = shift - mean * scale
    if layout.strided:
        return jax.nn.relu(x * scale + shift)
    # max(relu(x scale + shift)) = relu(max(x scale) + shift). The right side is cheaper: it applies the shift and the
    # ReLU after the maximum, to a quarter of the entries.
    sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
    x = jax.lax.reduce_window(x * sign, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.nn.relu(x * (sign * scale) + shift)


def _moments(
    layout: _Layout, x: jax.Array, mask: jax.Array, block: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance that normalize x [N, H, W, C], which broadcast against it."""
    if layout.normalization in ("group", "layer"):
        groups = _GROUPS if layout.normalization == "group" else 1
        parts = x.reshape(*x.shape[:3], groups, -1)
        repeated = lambda m: jnp.repeat(m, layout.num_filters // groups, axis=1)[:, None, None]  # of [N, groups]
        return repeated(parts.mean((1, 2, 4))), repeated(parts.var((1, 2, 4)))
    weights = (mask / mask.sum())[:, None, None, None]
    # The mean over the pixels of each example comes first: the number of all pixels may overflow float16.
    mean_of = lambda x: (weights * x.mean((1, 2), keepdims=True)).sum(0, keepdims=True)
    mean = mean_of(x)
    variance = mean_of((x - mean) ** 2)
    if layout.normalization != "tasknorm":
        return mean, variance
    own_mean, own_variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)  # of each example
    alpha = jax.nn.sigmoid(block["mix"][0] * mask.sum() + block["mix"][1])
    both = alpha * mean + (1 - alpha) * own_mean
    return both, alpha * (variance + (mean - both) ** 2) + (1 - alpha) * (own_variance + (own_mean - both) ** 2)

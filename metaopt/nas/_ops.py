"""Operations on the edges of a cell, as plain functions of parameters, and dictionaries of them by name.

Arrays are [N, spatial..., C]: images [N, H, W, C], sequences [N, L, C], rows of a table [N, C]. A shape called
`in_shape` has no N. With a stride s, every op returns ⌈n / s⌉ positions along every spatial axis.

In search and training, normalization uses the mean and variance of each channel over the batch and all positions. It
has no scale and shift, and no moving averages: weights that many networks share have no single average. So an output
depends on the whole batch. To predict, a trained network normalizes by statistics of training rows instead, which are
computed once (`Supernet.statistics`, `nas.trained_network`). Padding rows are left out if `Supernet.apply` gets
their mask, as it does in searches. Masks and statistics affect only `nas.normalized`. If your own op computes over the
batch in another way, they do not change it.

A set of ops is a dict from names to `Op`s. Each named space has its own set, because the same name differs between
spaces: DARTS's `avg_pool_3x3` is normalized, NAS-Bench-201's is not. Add your own op with `{**nas.BLOCKS, "mine":
nas.Op(...)}`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metaopt import _permutations, base


class Op(NamedTuple):
    """One operation. This example searches with a new op on your own data (one-channel images that are not square):

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import base, nas
    >>> init = lambda key, in_shape, channels, stride: {
    ...     "w": nas.uniform(key, (in_shape[-1], channels), in_shape[-1])
    ... }
    >>> gated = nas.Op(
    ...     init,
    ...     lambda params, x, channels, stride: jnp.tanh(
    ...         nas.subsample(x, stride) @ params["w"]
    ...     ),
    ... )
    >>> cell = nas.complete_cell(2, ("none", "skip_connect", "gated"))
    >>> network = nas.Network(
    ...     {"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4, 2)), num_outputs=3
    ... )
    >>> rows = {"x": jnp.ones((6, 7, 4, 1)), "y": jnp.arange(6) % 3}
    >>> search = nas.darts(
    ...     network, rows["x"].shape[1:], ops={**nas.BLOCKS, "gated": gated}, order="first"
    ... )
    >>> jax.eval_shape(search.supernet.init, jax.random.key(0))["head"]["w"].shape
    (4, 3)

    Attributes:
      init: `(key, in_shape, channels, stride) -> params`, any tree of floating-point arrays, or `()`. It also runs at
        build time, when `supernet` checks shapes. So raise a ValueError here for inputs that the op cannot take.
      apply: `(params, x, channels, stride) -> y`, from x [N, *in_shape] to [N, spatial..., channels].
    """

    init: Callable[[jax.Array, tuple[int, ...], int, int], base.PyTree]
    apply: Callable[[base.PyTree, jax.Array, int, int], jax.Array]


def normalized(x: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    """(x − mean) / √(var + ε), for each channel over the batch and all positions; a channel of zeros stays zero.

    In a supernet, `apply(..., mask=)` takes the moments over the real rows, and `apply(..., statistics=)` uses the
    given moments. For one row without positions the result is 0 for any x; supernets reject such a batch.

    Args:
      x: [N, spatial..., C].
      epsilon: ε.

    Returns:
      An array like x.
    """
    return _normalize_channels(x, epsilon)


@jax.jit
def _normalize_channels(x, epsilon):
    axes = tuple(range(x.ndim - 1))
    centered = x - x.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(axes, keepdims=True) + epsilon)


# `_normalize_channels` is jitted, so each use is a separate call in the jaxpr. `synflow`, masks and statistics find the
# calls by this name. The operands of a call are x and ε.
NORMALIZATION = "_normalize_channels"


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, *, number: int = 0) -> jax.Array:
    """U(−1/√fan_in, 1/√fan_in), the initialization in the published code of all these spaces.

    It hashes the position and the key in a few operations. A supernet draws hundreds of arrays, and the compiler takes
    half a second for each draw of `jax.random`. The numbers are good enough for an initialization, and for nothing
    else.

    Args:
      key: a PRNG key.
      shape: shape of the weights.
      fan_in: number of inputs that each output sums.
      number: index of the draw from this key, so that an op need not split it.

    Returns:
      [*shape], in the default floating-point type.
    """
    words = jax.random.key_data(key).ravel().astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = _permutations.mix_bits(
        _permutations.mix_bits(position + words[0]) ^ (words[-1] + jnp.uint32(0x9E3779B9 * number % 2**32))
    )
    unit = (bits >> 8).astype(jnp.zeros(0).dtype) / 2**24  # in [0, 1)
    return (2 * unit - 1) / math.sqrt(max(fan_in, 1))


def convolve(x: jax.Array, w: jax.Array, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> jax.Array:
    """A convolution over all spatial axes, padded so that position 0 of y is centered at position 0 of x.

    Args:
      x: [N, spatial..., C].
      w: [window..., C / groups, D], with odd window sizes.
      stride: stride along every axis.
      dilation: dilation along every axis.
      groups: number of groups of channels; C for a depthwise convolution.

    Returns:
      [N, ⌈spatial / stride⌉..., D].
    """
    axes = "DHW"[5 - w.ndim :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    padding = [(dilation * (size // 2), dilation * (size // 2)) for size in w.shape[:-2]]
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride,) * len(axes),
        padding,
        rhs_dilation=(dilation,) * len(axes),
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def subsample(x: jax.Array, stride: int, offset: int = 0) -> jax.Array:
    """Every `stride`-th position along every spatial axis, starting at `offset`; zeros beyond the end.

    Args:
      x: [N, spatial..., C].
      stride: at least 1.
      offset: below `stride`.

    Returns:
      [N, ⌈spatial / stride⌉..., C].
    """
    for axis in range(1, x.ndim - 1):
        if stride > 1:
            length = -(-x.shape[axis] // stride)
            missing = max(0, offset + (length - 1) * stride + 1 - x.shape[axis])
            x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
            x = jax.lax.slice_in_dim(x, offset, offset + (length - 1) * stride + 1, stride, axis)
    return x


def _need_space(in_shape: tuple[int, ...], op_name: str) -> int:
    """Returns the number of spatial axes; raises ValueError unless it is 1, 2 or 3."""
    if not 2 <= len(in_shape) <= 4:
        raise ValueError(
            f"{op_name} needs one to three spatial axes; got the shape {in_shape} of one input. Rows of a table take "
            "the ops 'linear', 'mlp', 'skip_connect' and 'none'."
        )
    return len(in_shape) - 1


def _linear(key: jax.Array, in_shape: tuple[int, ...], channels: int, number: int = 0) -> jax.Array:
    """The weights [C, channels] of a 1×1 convolution, which is a matrix product."""
    return uniform(key, (in_shape[-1], channels), in_shape[-1], number=number)


# ---- Zero and skip ops ----------------------------------------------------------------------------------------------


def _zero_apply(params, x, channels, stride):
    shape = [-(-n // stride) for n in x.shape[1:-1]]
    return jnp.zeros((x.shape[0], *shape, channels), x.dtype)


def _skip_init(key, in_shape, channels, stride):
    """Two projections to half of the channels each, if the op drops positions; one if only the channels differ."""
    if stride == 1 or len(in_shape) == 1:
        return () if in_shape[-1] == channels else {"w": _linear(key, in_shape, channels)}
    half = channels // 2
    return {"even": _linear(key, in_shape, half), "odd": _linear(key, in_shape, channels - half, 1)}


def _skip_apply(params, x, channels, stride):
    if not params:
        return x
    x = jax.nn.relu(x)
    if "w" in params:
        return normalized(x @ params["w"])
    halves = [subsample(x, stride) @ params["even"], subsample(x, stride, 1) @ params["odd"]]
    return normalized(jnp.concatenate(halves, -1))


# ---- Pooling --------------------------------------------------------------------------------------------------------


def _pool(kind: str, norm: bool) -> Op:
    """Pooling over 3 positions along every axis; the average leaves out padding."""

    def init(key, in_shape, channels, stride):
        _need_space(in_shape, f"'{kind}_pool_3x3'")
        return () if in_shape[-1] == channels else {"w": _linear(key, in_shape, channels)}

    def pool(x, stride, start, combine):
        spatial = x.ndim - 2
        window, strides = (1, *[3] * spatial, 1), (1, *[stride] * spatial, 1)
        return jax.lax.reduce_window(x, start, combine, window, strides, [(0, 0), *[(1, 1)] * spatial, (0, 0)])

    def apply(params, x, channels, stride):
        if params:  # the channels differ
            x = normalized(jax.nn.relu(x) @ params["w"])
        if kind == "max":
            y = pool(x, stride, -jnp.inf, jax.lax.max)
        else:
            counts = pool(jnp.ones((1, *x.shape[1:-1], 1), x.dtype), stride, 0.0, jax.lax.add)
            y = pool(x, stride, 0.0, jax.lax.add) / counts
        return normalized(y) if norm else y

    return Op(init, apply)


# ---- Convolutions ---------------------------------------------------------------------------------------------------


def _separable(size: int, *, dilation: int = 1, times: int = 1) -> Op:
    """ReLU, depthwise, pointwise and normalization, repeated `times` times; only the first has the stride."""

    def init(key, in_shape, channels, stride):
        spatial = _need_space(in_shape, f"A separable convolution of size {size}")
        window, params = (size,) * spatial, []
        for i in range(times):
            depth = in_shape[-1]  # the last repetition changes the channels
            out = channels if i == times - 1 else depth
            depthwise = uniform(key, (*window, 1, depth), size**spatial, number=2 * i)
            params.append({"depthwise": depthwise, "pointwise": uniform(key, (depth, out), depth, number=2 * i + 1)})
        return params

    def apply(params, x, channels, stride):
        for i, p in enumerate(params):
            s = stride if i == 0 else 1
            x = convolve(jax.nn.relu(x), p["depthwise"], stride=s, dilation=dilation, groups=x.shape[-1])
            x = normalized(x @ p["pointwise"])
        return x

    return Op(init, apply)


def convolution(size: int, *, order: str = "relu_conv_norm", dilation: int = 1) -> Op:
    """A convolution with ReLU and normalization, in the given order.

    Args:
      size: size of the window along every spatial axis, odd. 1 is a matrix product, which also takes rows of a table.
      order: "relu_conv_norm", "conv_norm_relu" or "conv_norm".
      dilation: dilation along every axis.

    Returns:
      An `Op`.

    Raises:
      KeyError: if `order` is unknown.
      ValueError: at build time, if `size > 1` and the inputs are rows of a table.
    """
    orders = {"relu_conv_norm": (True, False), "conv_norm_relu": (False, True), "conv_norm": (False, False)}
    begins_with_relu, ends_with_relu = orders[order]

    def init(key, in_shape, channels, stride):
        if size == 1:
            return {"w": _linear(key, in_shape, channels)}
        spatial = _need_space(in_shape, f"A convolution of size {size}")
        return {"w": uniform(key, (*(size,) * spatial, in_shape[-1], channels), size**spatial * in_shape[-1])}

    def apply(params, x, channels, stride):
        x = jax.nn.relu(x) if begins_with_relu else x
        if size == 1:
            y = subsample(x, stride) @ params["w"]
        else:
            y = convolve(x, params["w"], stride=stride, dilation=dilation)
        y = normalized(y)
        return jax.nn.relu(y) if ends_with_relu else y

    return Op(init, apply)


def _residual_init(key, in_shape, channels, stride):
    """NAS-Bench-201's block between stages: two convolutions, added to an average over the stride and a projection."""
    out_shape = (*(-(-n // stride) for n in in_shape[:-1]), channels)
    window = (3,) * _need_space(in_shape, "'residual'")
    fans = [3 ** len(window) * shape[-1] for shape in (in_shape, out_shape)]
    params = {
        "a": {"w": uniform(key, (*window, in_shape[-1], channels), fans[0])},
        "b": {"w": uniform(key, (*window, channels, channels), fans[1], number=1)},
    }
    plain = stride == 1 and in_shape[-1] == channels
    return params if plain else {**params, "w": _linear(key, in_shape, channels, 2)}


def _residual_apply(params, x, channels, stride):
    conv, shortcut = convolution(3), x
    y = conv.apply(params["b"], conv.apply(params["a"], x, channels, stride), channels, 1)
    if stride > 1:
        window = (1, *[stride] * (x.ndim - 2), 1)
        padding = [(0, -n % size) for n, size in zip(x.shape, window, strict=True)]
        pool = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, padding)
        shortcut = pool(x) / pool(jnp.ones((1, *x.shape[1:-1], 1), x.dtype))
    return y + (shortcut @ params["w"] if "w" in params else shortcut)


def _inverted_residual(size: int, expansion: int) -> Op:
    """Pointwise to `expansion` times the channels, depthwise, pointwise; added to the input if shapes are kept."""

    def init(key, in_shape, channels, stride):
        spatial, width = _need_space(in_shape, f"An inverted residual of size {size}"), expansion * in_shape[-1]
        depthwise = uniform(key, (*(size,) * spatial, 1, width), size**spatial, number=1)
        return {
            "in": _linear(key, in_shape, width),
            "depthwise": depthwise,
            "out": uniform(key, (width, channels), width, number=2),
        }

    def apply(params, x, channels, stride):
        y = jax.nn.relu(normalized(x @ params["in"]))
        y = convolve(y, params["depthwise"], stride=stride, groups=y.shape[-1])
        y = normalized(jax.nn.relu(normalized(y)) @ params["out"])
        return y + x if stride == 1 and x.shape[-1] == channels else y

    return Op(init, apply)


def _identity_init(key, in_shape, channels, stride):
    return () if stride == 1 and in_shape[-1] == channels else {"w": _linear(key, in_shape, channels)}


def _identity_apply(params, x, channels, stride):
    return normalized(subsample(x, stride) @ params["w"]) if params else x


# ---- Rows of tables and sequences -----------------------------------------------------------------------------------


def _mlp_init(key, in_shape, channels, stride):
    width = 2 * channels
    return {"in": _linear(key, in_shape, width), "out": uniform(key, (width, channels), width, number=1)}


def _mlp_apply(params, x, channels, stride):
    return jax.nn.gelu(normalized(subsample(x, stride) @ params["in"])) @ params["out"]


def _attention_init(key, in_shape, channels, stride):
    _need_space(in_shape, "'attention'")
    params = {name: _linear(key, in_shape, channels, i) for i, name in enumerate("qkv")}
    return {**params, "out": uniform(key, (channels, channels), channels, number=3)}


def _attention_apply(params, x, channels, stride):
    """One head; every position attends to all positions along all spatial axes."""
    queries = subsample(x, stride)
    flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = flat(queries) @ params["q"], flat(x) @ params["k"], flat(x) @ params["v"]
    weights = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", q, k) / math.sqrt(channels), -1)
    return (weights @ v @ params["out"]).reshape(*queries.shape[:-1], channels)


def _tokens_init(key, in_shape, channels, stride):
    """Each position (a column of a table, or a step of a sequence) has its own projection and bias."""
    if len(in_shape) != 2:
        raise ValueError(f"'tokens' needs inputs of the shape (length, width); got {tuple(in_shape)}.")
    length, width = in_shape
    w = uniform(key, (length, width, channels), width)
    return {"w": w, "b": uniform(key, (length, channels), width, number=1)}


def _tokens_apply(params, x, channels, stride):
    return jnp.einsum("npc,pcd->npd", x, params["w"]) + params["b"][None]


def _block_init(key, in_shape, channels, stride):
    """Attention, then an MLP, with layer norms and residual connections; first a projection if channels differ."""
    attention = _attention_init(key, (*in_shape[:-1], channels), channels, 1)
    params: dict[str, base.PyTree] = {"attention": attention}
    numbers = {"up": (channels, 2 * channels), "down": (2 * channels, channels), "enter": (in_shape[-1], channels)}
    for number, (name, shape) in enumerate(numbers.items(), 4):
        if name != "enter" or in_shape[-1] != channels:
            params[name] = uniform(key, shape, shape[0], number=number)
    return params


def _block_apply(params, x, channels, stride):
    x = x @ params["enter"] if "enter" in params else x
    x = x + _attention_apply(params["attention"], _layer_norm(x), channels, 1)
    return x + jax.nn.gelu(_layer_norm(x) @ params["up"]) @ params["down"]


def _layer_norm(x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


def _none(key, in_shape, channels, stride):
    return ()


_ZERO = Op(_none, _zero_apply)
_SKIP = Op(_skip_init, _skip_apply)


def _maxima_init(key, in_shape, channels, stride):
    _need_space(in_shape, "'maxpool2x2'")
    return () if in_shape[-1] == channels else {"w": _linear(key, in_shape, channels)}


def _maxima_apply(params, x, channels, stride):
    return _maxima(normalized(jax.nn.relu(x) @ params["w"]) if params else x, stride)


def _maxima(x: jax.Array, stride: int) -> jax.Array:
    """The maxima of windows that are as long as the stride and do not overlap."""
    window = (1, *[stride] * (x.ndim - 2), 1)
    padding = [(0, -n % size) for n, size in zip(x.shape, window, strict=True)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, padding)


# Ops around cells, and ops for sequences and rows of tables. With "tokens" (a feature tokenizer, Gorishniy et al.,
# NeurIPS 2021, https://arxiv.org/abs/2106.11959), columns of a table are positions. "transformer" is attention and an
# MLP.
BLOCKS: dict[str, Op] = {
    "none": _ZERO,
    "skip_connect": _SKIP,
    "stem": convolution(3, order="conv_norm"),
    "linear": convolution(1, order="conv_norm"),
    "residual": Op(_residual_init, _residual_apply),
    "norm_relu": Op(_none, lambda params, x, channels, stride: jax.nn.relu(normalized(x))),
    "mlp": Op(_mlp_init, _mlp_apply),
    "attention": Op(_attention_init, _attention_apply),
    "tokens": Op(_tokens_init, _tokens_apply),
    "transformer": Op(_block_init, _block_apply),
}

DARTS_OPS: dict[str, Op] = {
    **BLOCKS,
    "max_pool_3x3": _pool("max", norm=True),
    "avg_pool_3x3": _pool("avg", norm=True),
    "sep_conv_3x3": _separable(3, times=2),
    "sep_conv_5x5": _separable(5, times=2),
    "dil_conv_3x3": _separable(3, dilation=2),
    "dil_conv_5x5": _separable(5, dilation=2),
}

NAS_BENCH_201_OPS: dict[str, Op] = {
    **BLOCKS,
    "nor_conv_1x1": convolution(1),
    "nor_conv_3x3": convolution(3),
    "avg_pool_3x3": _pool("avg", norm=False),
}

TRANS_NAS_BENCH_101_OPS: dict[str, Op] = {**BLOCKS, "conv1x1": convolution(1), "conv3x3": convolution(3)}

NAS_BENCH_MACRO_OPS: dict[str, Op] = {
    **BLOCKS,
    "stem_relu": convolution(3, order="conv_norm_relu"),
    "last_relu": convolution(1, order="conv_norm_relu"),
    "identity": Op(_identity_init, _identity_apply),
    "MB3_K3": _inverted_residual(3, 3),
    "MB6_K5": _inverted_residual(5, 6),
}

NAS_BENCH_101_OPS: dict[str, Op] = {
    **BLOCKS,
    "conv3x3-bn-relu": convolution(3, order="conv_norm_relu"),
    "conv1x1-bn-relu": convolution(1, order="conv_norm_relu"),
    "maxpool3x3": _pool("max", norm=False),
    "maxpool2x2": Op(_maxima_init, _maxima_apply),
    "downsample": Op(
        lambda key, in_shape, channels, stride: {"w": _linear(key, in_shape, channels)},
        lambda params, x, channels, stride: jax.nn.relu(normalized(_maxima(x, stride) @ params["w"])),
    ),
}

"""Convolutions as matrix products, and pooling as elementwise operations, for training inside a loop on CPU.

XLA's fast CPU kernels need one layout. XLA converts the convolutions of a backward pass into this layout only in the
entry computation of a program. In the body of a loop they run a hundred times slower, and training is a loop. Kernels
that differ between tasks become grouped convolutions under `vmap`, which lack a fast kernel on CPU, too. Slices,
pads and matrix products are fast everywhere, batched or not, and so are all their derivatives.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _jaxpr
from metaopt._jaxpr import Tracer
from metaopt.inner._cpu import _convolution as fast
from metaopt.inner._cpu import _depthwise
from metaopt.inner._cpu._depthwise import Window, length, total

# A kernel with more positions is left to XLA if it needs slices: each position adds work for the compiler.
_MOST_POSITIONS = 128


def im2col(fn: Callable, *, only_on_cpu: bool = False) -> Callable:
    """Returns `fn` with convolutions computed as matrix products, and pooling as maxima and sums of slices.

        y[n, p, d] = Σ_{k, c} x[n, s p + r k − pad, c] w[k, c, d] = (patches of x) · (w as a matrix)

    with patches [N·P, K·C] (K kernel positions, stride s, dilation r). Values agree up to rounding. A maximum over
    equal entries passes its gradient to the first one, as before. Works under jit and vmap; differentiates in any mode
    and order.

    - float32, without groups: XLA's own kernel makes the patches, piece by piece in the cache. The convolution keeps
      the one layout that has this kernel, also in all derivatives. If each task has its own kernel (`vmap` over
      kernels), it computes one task after the other.
    - Other convolutions: slices make the patches, and kernels per task become batched matrix products. The patches
      take K times the input's memory. If they would take over 256 MiB, they are not made at all. The backward pass
      recomputes the patches instead of keeping them. JAX 0.12 does so on CPU, but JAX 0.10 ignores the request.
    - Depthwise convolutions are sums of products with slices, and so are their derivatives.

    `inner.loop` and `inner.problem` apply this function automatically if the default backend is a CPU. On one core,
    training with three small convolutions in a scan then takes a hundredth of the time
    (`experiments/benchmarks/rules.py`). Outside of loops, XLA's own convolutions are as fast, and need less memory.

    Args:
      fn: any JAX function. These convolutions in it are not changed: those inside a function with its own derivative
        (`jax.custom_vjp`), those with `batch_group_count`, and those of integers or complex numbers. Kernels with over
        128 positions are not changed either if they are grouped or not in float32. A function that cannot be traced
        (because Python branches on a value) is not changed at all.
      only_on_cpu: if true, convolutions are changed only if the default backend is a CPU when the function is called.
        If false, a GPU also computes kernels of several tasks one after the other.

    Returns:
      A function of the same positional arguments, with the same result.

    Source: Chellapilla, Puri & Simard, High performance convolutional neural networks for document processing, 2006.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import inner
    >>> conv = jax.jit(
    ...     lambda x, w: jax.lax.conv(x, w, window_strides=(2, 2), padding="SAME")
    ... )
    >>> x, w = jnp.ones((1, 2, 5, 5)), jnp.ones((4, 2, 3, 3))
    >>> products = jax.jit(inner.im2col(conv))
    >>> bool(jnp.allclose(products(x, w), conv(x, w)))
    True
    >>> "conv_general_dilated" in str(jax.make_jaxpr(products)(x, w))
    False
    """

    return rewrite(fn, only_on_cpu=only_on_cpu)


def rewrite(fn: Callable, *, only_on_cpu: bool, log: Callable[[list[str]], None] | None = None) -> Callable:
    """`im2col`, which also calls `log` with the rewritten convolutions ("[8, 5, 5, 2] * [3, 3, 2, 4]") of a program."""

    def rewritten(*args):
        if only_on_cpu and jax.default_backend() != "cpu":
            return fn(*args)
        leaves, structure = jax.tree.flatten(args)
        # Leaves that are not traced keep their value: Python may branch on them.
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tracer)]

        def flat(operands):
            filled = dict(zip(traced, operands, strict=True))
            return fn(*structure.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

        operands = [leaves[i] for i in traced]
        closed = shape = None
        with contextlib.suppress(Exception):  # a branch on a value, or an error of `fn` itself
            closed, shape = jax.make_jaxpr(flat, return_shape=True)(operands)
        if closed is None:
            return fn(*args)  # raises that error again
        convolutions: dict[str, None] = {}
        replace = functools.partial(_replacement, convolutions=convolutions)
        outputs = _jaxpr.evaluate(closed.jaxpr, closed.consts, operands, replace)
        if log is not None:
            log(list(convolutions))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


def _replacement(equation: Any, convolutions: dict[str, None]) -> Callable | None:
    """`_by_slices`, which adds the shapes of a convolution to `convolutions` when it is replaced."""
    form = _by_slices(equation)
    if form is None or equation.primitive.name != "conv_general_dilated":
        return form

    def recorded(*operands):
        images, kernels = (list(v.aval.shape) for v in equation.invars)
        convolutions[f"{images} * {kernels}"] = None
        return form(*operands)

    return recorded


def _by_slices(equation: Any) -> Callable | None:
    """The replacement of the equation, if it is a convolution or pooling that can be written by slices; else None."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and _has_kernel(equation):
        return functools.partial(fast.convolution, **params)
    if name == "conv_general_dilated" and _is_plain_convolution(equation):
        form = functools.partial(_convolution, **params)
        return form if _is_depthwise(equation.invars[1].aval, **params) else jax.checkpoint(form)
    if name in ("reduce_window_max", "reduce_window_sum") and _is_plain_pooling(equation):
        return functools.partial(_pooling, maximum=name == "reduce_window_max", **params)
    return None


def _slices(x: jax.Array, axis: int, window: Window, fill: float) -> list[jax.Array]:
    """The slice of x that each position of the window reads along one axis."""
    if window == (1, 1, (0, 0), 1, 1):
        return [x]
    span = (length(x.shape[axis], window) - 1) * window.stride + 1
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (*window.padding, window.base_dilation - 1)
    x = jax.lax.pad(x, jnp.asarray(fill, x.dtype), padding)
    starts = [window.dilation * i for i in range(window.size)]
    return [jax.lax.slice_in_dim(x, start, start + span, window.stride, axis) for start in starts]


def _positions(x: jax.Array, windows: list[Window]) -> list[jax.Array]:
    """The slice of x that each position of the whole window reads, in row-major order; spatial axes begin at 1."""
    slices = [x]
    for axis, window in enumerate(windows, 1):
        slices = [s for x in slices for s in _slices(x, axis, window, 0.0)]
    return slices


def _has_kernel(equation: Any) -> bool:
    """Whether XLA has a fast CPU kernel for the convolution and for all its derivatives."""
    params, (x, w) = equation.params, (v.aval for v in equation.invars)
    window = [w.shape[i] for i in params["dimension_numbers"].rhs_spec[2:]]
    return (
        params["batch_group_count"] == params["feature_group_count"] == 1
        and x.dtype == w.dtype == equation.outvars[0].aval.dtype == jnp.float32
        and len(window) in (1, 2, 3)
        and math.prod(window) > 1  # one position is already a matrix product
        and equation.outvars[0].aval.size > 0
    )


def _is_plain_convolution(equation: Any) -> bool:
    params, (x, w) = equation.params, (v.aval for v in equation.invars)
    positions = math.prod(w.shape[i] for i in params["dimension_numbers"].rhs_spec[2:])
    return (
        params["batch_group_count"] == 1
        and 0 < positions <= _MOST_POSITIONS
        and equation.outvars[0].aval.size > 0
        and all(jnp.issubdtype(a.dtype, jnp.floating) for a in (x, w))
    )


def _convolution(
    x: jax.Array,
    w: jax.Array,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    precision: Any,
    preferred_element_type: Any,
    **_: Any,
) -> jax.Array:
    """A convolution, with the parameters of its primitive."""
    lhs, rhs, out = dimension_numbers
    groups, depth, features = feature_group_count, w.shape[rhs[1]], w.shape[rhs[0]]
    dtype = jnp.result_type(x, w) if preferred_element_type is None else preferred_element_type
    wide = jnp.promote_types(dtype, jnp.float32)  # the type of sums over products
    x = x.transpose(lhs[0], *lhs[2:], lhs[1])  # [N, spatial..., C]
    w = w.transpose(*rhs[2:], rhs[1], rhs[0])  # [window..., C / G, D]
    sizes = w.shape[:-2]
    windows = [Window(*axis) for axis in zip(sizes, window_strides, padding, lhs_dilation, rhs_dilation, strict=True)]
    spatial = [length(n, window) for n, window in zip(x.shape[1:-1], windows, strict=True)]
    rows = x.shape[0] * math.prod(spatial)
    product = functools.partial(jnp.einsum, precision=precision)
    if groups > 1 == depth:  # each channel has its own D / G outputs
        x = x if features == groups else jnp.repeat(x, features // groups, -1)
        common = jnp.promote_types(jnp.result_type(x, w), dtype)
        y = _depthwise.convolution(x.astype(common), w.reshape(*sizes, features).astype(common), tuple(windows))
    elif rows * math.prod(sizes) * depth * groups * x.dtype.itemsize > fast.LARGE:
        kernels = w.reshape(-1, depth, groups, features // groups)
        slices = (s.reshape(rows, groups, depth) for s in _positions(x, windows))
        y = total(
            product("ngc,cgd->ngd", *pair, preferred_element_type=wide) for pair in zip(slices, kernels, strict=True)
        )
    else:
        x = x.reshape(*x.shape[:-1], groups, depth)
        x = jnp.concatenate(_positions(x, windows), -1)
        if groups == 1:
            patches, matrix = x.reshape(rows, -1), w.reshape(-1, features)
            y = product("nk,kd->nd", patches, matrix, preferred_element_type=preferred_element_type)
        else:
            patches, matrix = x.reshape(rows, groups, -1), w.reshape(-1, groups, features // groups)
            y = product("ngk,kgd->ngd", patches, matrix, preferred_element_type=preferred_element_type)
    y = y.astype(dtype).reshape(x.shape[0], *spatial, features)
    return y.transpose(fast.from_rows(out))


def _is_depthwise(w: Any, dimension_numbers: Any, feature_group_count: int, **_: Any) -> bool:
    """Whether each channel has its own outputs."""
    return feature_group_count > 1 and w.shape[dimension_numbers.rhs_spec[1]] == 1


def _is_plain_pooling(equation: Any) -> bool:
    dtype, window = equation.invars[0].aval.dtype, equation.params["window_dimensions"]
    return len(equation.invars) == 1 and jnp.issubdtype(dtype, jnp.floating) and math.prod(window) <= _MOST_POSITIONS


def _pooling(
    x: jax.Array,
    *,
    maximum: bool,
    window_dimensions: Any,
    window_strides: Any,
    padding: Any,
    base_dilation: Any,
    window_dilation: Any,
    **_: Any,
) -> jax.Array:
    """Max- or sum-pooling, with the parameters of its primitive."""

    def fold(a, b):
        # Of equal entries the first one wins; a NaN stays.
        return jnp.where((a >= b) | jnp.isnan(a), a, b) if maximum else a + b

    windows = [
        Window(*window)
        for window in zip(window_dimensions, window_strides, padding, base_dilation, window_dilation, strict=True)
    ]
    dtype = x.dtype
    if not maximum:
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
    if all(window == (window.size, window.size, (0, 0), 1, 1) for window in windows):
        x = _tiles(x, [window.size for window in windows], fold)
    else:
        # The last axis comes first, so that the first of equal entries is the first in row-major order.
        for axis, window in reversed(list(enumerate(windows))):
            x = functools.reduce(fold, _slices(x, axis, window, -jnp.inf if maximum else 0.0))
    return x.astype(dtype)


def _tiles(x: jax.Array, sizes: list[int], fold: Callable) -> jax.Array:
    """Pooling with windows that do not overlap.

    The positions of a window become a new axis. Slices of this axis are cheap forward and backward.
    """
    x = x[tuple(slice(n // size * size) for n, size in zip(x.shape, sizes, strict=True))]
    x = x.reshape([part for n, size in zip(x.shape, sizes, strict=True) for part in (n // size, size)])

    def pooled(x, axis):
        if axis == len(sizes):
            return x
        position = lambda i: pooled(jax.lax.index_in_dim(x, i, axis + 1, keepdims=False), axis + 1)
        return functools.reduce(fold, [position(i) for i in range(sizes[axis])])

    return pooled(x, 0)

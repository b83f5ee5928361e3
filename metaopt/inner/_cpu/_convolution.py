"""A convolution for CPU that stays in the one layout of XLA's fast kernels, including its derivatives and batches.

The kernels (Eigen's: they pack patches into the cache piece by piece, and multiply them) take images [N, ..., C] and
windows of weights [..., C, D]. XLA converts other layouts into this one only in the entry computation of a program. In
the body of a loop, the backward pass therefore runs as plain loops, a hundred times slower. Windows that differ between
tasks become groups, for which XLA lacks a fast kernel, too.

This primitive is compiled in that layout everywhere. If both images and windows have a leading axis of tasks, it
computes one task after the other. The derivatives of a strided convolution are an exception: they are convolutions with
dilated images or a dilated window, and become matrix products with slices. On conv4 with strides, this saves a twelfth
of the time of an outer step of MAML, or an eighth in a scan. Compilation takes 3 s longer.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _jaxpr

LARGE = 2**28  # bytes: the largest array of patches, or of their cotangents, that is made at once


def convolution(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    """Convolves x with w, without groups. `params` are those of the primitive of `jax.lax.conv_general_dilated`."""
    return _convolution_p.bind(x, w, num_tasks=None, **params)


def _plain(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    return jax.lax.conv_general_dilated_p.bind(x, w, **params)


def _rebound(fn: Callable) -> Callable:
    """Returns `fn`, a transformation of `_plain`, with every convolution in it replaced by this primitive."""

    def replace(equation):
        if equation.primitive is not jax.lax.conv_general_dilated_p:
            return None
        return functools.partial(convolution, **equation.params)

    def rebound(*args):
        closed = jax.make_jaxpr(fn)(*args)
        return _jaxpr.evaluate(closed.jaxpr, closed.consts, args, replace)[0]

    return rebound


def _lowered(x: jax.Array, w: jax.Array, *, num_tasks: int | None, **params: Any) -> jax.Array:
    whole = _abstract(*(jax.typeof(a) for a in (x, w)), num_tasks=num_tasks, **params).shape
    shape = whole if num_tasks is None else whole[1:]

    def one(x, w):
        lhs, rhs, out = params["dimension_numbers"]
        x = x.transpose(lhs[0], *lhs[2:], lhs[1])  # [N, spatial..., C]
        w = w.transpose(*rhs[2:], rhs[1], rhs[0])  # [window..., C, D]
        spatial = [shape[i] for i in out[2:]]
        if _spreads(x, w, spatial, params):
            return _spread(x, w, spatial, params).transpose(from_rows(out))
        if _gathers(x, w, spatial, params):
            return _gathered(x, w, spatial, params).transpose(from_rows(out))
        last = x.ndim - 1
        layout = ((0, last, *range(1, last)), (last, last - 1, *range(last - 1)), (0, last, *range(1, last)))
        y = _plain(x, w, **{**params, "dimension_numbers": jax.lax.ConvDimensionNumbers(*layout)})
        return y.transpose(from_rows(out))

    return one(x, w) if num_tasks is None else jax.lax.map(lambda pair: one(*pair), (x, w))


def _spreads(x: jax.Array, w: jax.Array, spatial: Sequence[int], params: Any) -> bool:
    """Whether this is the cotangent of the images of a strided convolution, or similar: each input has few outputs."""
    dilation, window = params["lhs_dilation"], w.shape[:-2]
    return (
        max(dilation) > 1
        and max(*params["window_strides"], *params["rhs_dilation"]) == 1
        and math.prod(window) <= 4 * math.prod(dilation)
        and math.prod(window) * w.shape[-1] * math.prod(x.shape[:-1]) * x.dtype.itemsize <= LARGE  # the columns
    )


def _spread(x: jax.Array, w: jax.Array, spatial: Sequence[int], params: Any) -> jax.Array:
    """y[n, r q + pad − k, d] = Σ_{q, k, c} x[n, q, c] w[k, c, d]: one product, whose columns are padded and added."""
    window, features = w.shape[:-2], w.shape[-1]
    matrix = jnp.moveaxis(w, -2, 0).reshape(w.shape[-2], -1)
    columns = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, precision=params["precision"])
    columns = columns.reshape(*x.shape[:-1], -1, features)

    def placed(number, position):
        padding = [(0, 0, 0)]
        for axis, k in enumerate(position):
            low, dilation = params["padding"][axis][0] - k, params["lhs_dilation"][axis]
            padding.append((low, spatial[axis] - low - (x.shape[1 + axis] - 1) * dilation - 1, dilation - 1))
        return jax.lax.pad(columns[..., number, :], jnp.zeros([], columns.dtype), [*padding, (0, 0, 0)])

    return functools.reduce(jnp.add, (placed(*each) for each in enumerate(np.ndindex(*window))))


def _gathers(x: jax.Array, w: jax.Array, spatial: Sequence[int], params: Any) -> bool:
    """Whether this is the cotangent of the window of a strided convolution, or similar: few outputs of many inputs."""
    return (
        max(params["rhs_dilation"]) > 1
        and max(*params["window_strides"], *params["lhs_dilation"]) == 1
        and math.prod(spatial) <= 9
        and x.shape[0] >= 8
    )


def _gathered(x: jax.Array, w: jax.Array, spatial: Sequence[int], params: Any) -> jax.Array:
    """y[c, k, d] = Σ_{n, q} x[c, k + s q − pad, n] w[q, n, d]: one product for each output place k."""
    last = x.ndim - 1
    x = x.transpose(last, *range(1, last), 0)  # [N, spatial..., C], as in the forward pass
    w = w.transpose(last - 1, *range(last - 1), last)
    padding = [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros([], x.dtype), padding)
    rows, strides = w.reshape(-1, w.shape[-1]), (1, *params["rhs_dilation"], 1)

    def output(place):
        ends = [k + s * (q - 1) + 1 for k, s, q in zip(place, params["rhs_dilation"], w.shape[1:-1], strict=True)]
        patches = jax.lax.slice(x, (0, *place, 0), (len(x), *ends, x.shape[-1]), strides)
        return jnp.dot(patches.reshape(-1, x.shape[-1]).T, rows, precision=params["precision"])

    y = jnp.stack([output(place) for place in np.ndindex(*spatial)], axis=1)
    return y.reshape(x.shape[-1], *spatial, w.shape[-1])


def from_rows(out: Sequence[int]) -> list[int]:
    """The permutation of [N, spatial..., D] to the layout `out`, the positions of N, of D and of the spatial axes."""
    permutation = [0] * len(out)
    for place, axis in zip(out, (0, len(out) - 1, *range(1, len(out) - 1)), strict=True):
        permutation[place] = axis
    return permutation


def _abstract(x: Any, w: Any, *, num_tasks: int | None, **params: Any) -> Any:
    if num_tasks is None:
        return jax.lax.conv_general_dilated_p.abstract_eval(x, w, **params)[0]
    one = jax.lax.conv_general_dilated_p.abstract_eval(*(a.update(shape=a.shape[1:]) for a in (x, w)), **params)[0]
    return one.update(shape=(num_tasks, *one.shape))


def _by_task(fn: Callable, num_tasks: int | None) -> Callable:
    return fn if num_tasks is None else jax.vmap(fn)


def _transpose(which: int, g: jax.Array, x: Any, w: Any, *, num_tasks: int | None, **params: Any) -> jax.Array:
    """Maps the cotangent of y to that of x (0) or of w (1)."""
    operand, other = (x, w) if which == 0 else (w, x)
    shape = operand.aval.shape if num_tasks is None else operand.aval.shape[1:]
    like = jax.ShapeDtypeStruct(shape, operand.aval.dtype)

    def pullback(g, other):
        linear = lambda operand: _plain(*((operand, other) if which == 0 else (other, operand)), **params)
        return jax.linear_transpose(linear, like)(g)[0]

    return _by_task(_rebound(pullback), num_tasks)(g, other)


def _batch(args: Any, dims: Any, *, num_tasks: int | None, **params: Any) -> tuple[jax.Array, int]:
    mapped = [isinstance(dim, int) for dim in dims]
    x, w = (
        jnp.moveaxis(arg, dim, 0) if is_mapped else arg for arg, dim, is_mapped in zip(args, dims, mapped, strict=True)
    )
    if all(mapped):
        size = len(x)
        if num_tasks is not None:  # nested batches of tasks
            x, w = (a.reshape(-1, *a.shape[2:]) for a in (x, w))
        y = _convolution_p.bind(x, w, num_tasks=size * (num_tasks or 1), **params)
        return (y if num_tasks is None else y.reshape(size, num_tasks, *y.shape[1:])), 0
    # Like JAX, we turn the new axis into more images or more outputs.
    in_axes = tuple(0 if is_mapped else None for is_mapped in mapped)
    fn = _rebound(jax.vmap(functools.partial(_plain, **params), in_axes))
    if num_tasks is None:
        return fn(x, w), 0
    x, w = (a.swapaxes(0, 1) if is_mapped else a for a, is_mapped in zip((x, w), mapped, strict=True))
    return jax.vmap(fn)(x, w), 1


_convolution_p = _jaxpr.bilinear_primitive(
    "cpu_convolution",
    _lowered,
    abstract=_abstract,
    transposes=(functools.partial(_transpose, 0), functools.partial(_transpose, 1)),
    batch=_batch,
)

"""Depthwise convolutions as sums of slices, for CPU: one primitive for the convolution and all of its derivatives.

    Σ_{n, q, k, c} x[n, s q + r k − pad, c] w[k, c] y[n, q, c]

is linear in x, w and y (stride s, dilation r). Its derivative by y is the convolution. Its derivative by x is the
cotangent of the images, and its derivative by w is the cotangent of the kernel. The derivatives of these three, in any
mode and order, are again one of the three. Each of the first two is one sum over the kernel's K positions. The third is
a loop over the positions, so the compiler sees one body instead of K. Without the primitive, the derivatives of the K
slices are K pads, and the compiler has to generate K reductions.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _jaxpr


class Window(NamedTuple):
    """A window along one axis."""

    size: int
    stride: int
    padding: tuple[int, int]
    base_dilation: int
    dilation: int


def length(size: int, window: Window) -> int:
    """The number of places that the window takes along an axis."""
    padded = (size - 1) * window.base_dilation + 1 + sum(window.padding)
    return (padded - window.dilation * (window.size - 1) - 1) // window.stride + 1


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of the terms."""
    return functools.reduce(jnp.add, terms)


_OPERANDS = {"y": "xw", "x": "wy", "w": "xy"}  # result -> its two operands


def convolution(x: jax.Array, w: jax.Array, windows: tuple[Window, ...]) -> jax.Array:
    """y[n, q, c] = Σ_k x[n, s q + r k − pad, c] w[k, c], of one type: x [N, spatial..., C], w [window..., C]."""
    return _bind("y", {"x": x[None], "w": w[None]}, windows, x.shape[1:-1])[0]


def _bind(
    result: str, arrays: dict[str, jax.Array], windows: tuple[Window, ...], spatial: tuple[int, ...]
) -> jax.Array:
    """Binds the primitive to arrays with a leading axis of tasks; `spatial` is the spatial shape of x."""
    return _depthwise_p.bind(
        *(arrays[name] for name in _OPERANDS[result]), result=result, windows=windows, spatial=spatial
    )


def _lowered(
    a: jax.Array, b: jax.Array, *, result: str, windows: tuple[Window, ...], spatial: tuple[int, ...]
) -> jax.Array:
    def one(pair):
        wide = jnp.promote_types(a.dtype, jnp.float32)
        outputs = {"y": _outputs, "x": _images, "w": _kernel}[result](
            *(part.astype(wide) for part in pair), windows, spatial
        )
        return outputs.astype(a.dtype)

    return one((a[0], b[0]))[None] if len(a) == 1 else jax.lax.map(one, (a, b))


def _outputs(x: jax.Array, w: jax.Array, windows: tuple[Window, ...], _: Any) -> jax.Array:
    places, steps = _places(windows), [window.stride for window in windows]
    ends = [(length(n, window) - 1) * window.stride + 1 for n, window in zip(x.shape[1:-1], windows, strict=True)]
    x, kernels = _padded(x, windows), w.reshape(-1, *[1] * len(windows), 1, w.shape[-1])

    def patches(place):
        stop = [start + end for start, end in zip(place, ends, strict=True)]
        return jax.lax.slice(x, (0, *place, 0), (len(x), *stop, x.shape[-1]), (1, *steps, 1))

    return total(patches(place) * kernel for place, kernel in zip(places, kernels, strict=True))


def _images(w: jax.Array, y: jax.Array, windows: tuple[Window, ...], spatial: tuple[int, ...]) -> jax.Array:
    """The convolution of y with the reversed kernel, with base dilation and stride exchanged."""
    # Along one axis, position k of the window at y[q] reads x[p] if b p = s q + r k − pad (base dilation b). With the
    # reversed position j = K − 1 − k, this is s q = b p + r j − low, low = r (K − 1) − pad. So the cotangent of x[p]
    # reads the dilated y, padded by `low` entries, at b p + r j. Since x has n entries, the largest of these indices is
    # b (n − 1) + r (K − 1). It must be the last index of the padded y, which determines `high`.

    def reversed_window(window, n, places):
        reach = window.dilation * (window.size - 1)
        low, span = reach - window.padding[0], (n - 1) * window.base_dilation + 1
        high = span + reach - low - ((places - 1) * window.stride + 1)
        return Window(window.size, window.base_dilation, (low, high), window.stride, window.dilation)

    reversed_windows = tuple(map(reversed_window, windows, spatial, y.shape[1:-1]))
    return _outputs(y, jnp.flip(w, range(len(windows))), reversed_windows, None)


def _kernel(x: jax.Array, y: jax.Array, windows: tuple[Window, ...], _: Any) -> jax.Array:
    ends = [(n - 1) * window.stride + 1 for n, window in zip(y.shape[1:-1], windows, strict=True)]
    strided = (slice(None), *(slice(None, None, window.stride) for window in windows))
    x = _padded(x, windows)

    def entry(place):
        start = (0, *place, 0)
        patches = jax.lax.dynamic_slice(x, start, (len(x), *ends, x.shape[-1]))[strided]
        return (patches * y).sum(range(y.ndim - 1))

    return jax.lax.map(entry, jnp.asarray(_places(windows))).reshape(*(window.size for window in windows), -1)


def _places(windows: tuple[Window, ...]) -> np.ndarray:
    """[K, axes]: the first index that each position of the kernel reads, in row-major order."""
    return np.array([[w.dilation * i for i, w in zip(k, windows, strict=True)] for k in np.ndindex(*_sizes(windows))])


def _sizes(windows: tuple[Window, ...]) -> tuple[int, ...]:
    return tuple(window.size for window in windows)


def _padded(x: jax.Array, windows: tuple[Window, ...]) -> jax.Array:
    padding = [(0, 0, 0), *((*window.padding, window.base_dilation - 1) for window in windows), (0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros([], x.dtype), padding)


def _abstract(a: Any, b: Any, *, result: str, windows: tuple[Window, ...], spatial: tuple[int, ...]) -> Any:
    if result == "w":
        return a.update(shape=(a.shape[0], *_sizes(windows), a.shape[-1]))
    images = a if result == "y" else b
    places = map(length, spatial, windows) if result == "y" else spatial
    return images.update(shape=(*images.shape[:2], *places, images.shape[-1]))


def _transpose(which: int, g: jax.Array, a: Any, b: Any, *, result: str, **params: Any) -> jax.Array:
    """Maps the cotangent of the result to that of the first (0) or the second operand (1)."""
    names = _OPERANDS[result]
    return _bind(names[which], {result: g, names[1 - which]: (b, a)[which]}, **params)


def _batch(args: Any, dims: Any, **params: Any) -> tuple[jax.Array, int]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if isinstance(dim, int))

    def batched(arg, dim):
        return jnp.moveaxis(arg, dim, 0) if isinstance(dim, int) else jnp.broadcast_to(arg, (size, *arg.shape))

    a, b = map(batched, args, dims)
    number = size * a.shape[1]  # the number of tasks; -1 would fail for zero tasks
    y = _depthwise_p.bind(*(part.reshape(number, *part.shape[2:]) for part in (a, b)), **params)
    return y.reshape(a.shape[:2] + y.shape[1:]), 0


_depthwise_p = _jaxpr.bilinear_primitive(
    "cpu_depthwise",
    _lowered,
    abstract=_abstract,
    transposes=(functools.partial(_transpose, 0), functools.partial(_transpose, 1)),
    batch=_batch,
)

"""Convolutions as matrix products, and pooling as elementwise operations, for training inside a loop on CPU.

XLA brings the convolutions of a backward pass into the layout that its CPU kernels know in a program's entry
computation alone, not in the body of a loop, where they run a hundred times slower; and training is a loop. Kernels
that differ between tasks become grouped convolutions under `vmap`, which have no fast kernel on CPU either. Slices,
pads and matrix products are fast everywhere, batched or not, and so are all their derivatives.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

# A kernel of more positions is left to XLA: every position is a slice, which the compiler has to deal with.
_MOST_POSITIONS = 128
_NAMES = ("conv_general_dilated", "reduce_window_max", "reduce_window_sum")


def im2col(fn: Callable) -> Callable:
    """`fn`, with its convolutions as matrix products and its pooling as maxima and sums of slices.

        y[n, p, d] = Σ_{k, c} x[n, s p + r k − pad, c] w[k, c, d] = (patches x) · (w as a matrix)

    with patches [N·P, K·C] made by K slices (K kernel positions, stride s, dilation r). Values agree to rounding; at
    ties a maximum passes its gradient to the first place, as before. Depthwise convolutions are sums of products with
    slices. Works under jit, vmap (kernels per task become batched matrix products), and differentiates in any mode and
    order. Patches are K times the input in memory; they are recomputed in the backward pass, not kept for it.

    `inner.loop` and `inner.problem` apply it by themselves where the default backend is a CPU. On two cores, training
    with three small convolutions in a scan became a hundred times faster.

    Args:
      fn: any JAX function of arrays. Convolutions inside functions with a derivative of their own (`jax.custom_vjp`),
        of kernels of over 128 positions, with `batch_group_count`, or in other than real floating-point numbers are
        left as they are.

    Returns:
      A function of the same positional arguments, with the same result.

    Source: Chellapilla, Puri & Simard, High performance convolutional neural networks for document processing, 2006.

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import inner
    >>> conv = lambda x, w: jax.lax.conv(x, w, window_strides=(2, 2), padding="SAME")
    >>> x, w = jnp.ones((1, 2, 5, 5)), jnp.ones((4, 2, 3, 3))
    >>> bool(jnp.allclose(inner.im2col(conv)(x, w), conv(x, w)))
    True
    >>> "conv" in str(jax.make_jaxpr(inner.im2col(conv))(x, w))
    False
    """

    def rewritten(*args):
        leaves, structure = jax.tree.flatten(args)
        # What is not traced (a number that Python decides by) stays what it is.
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tracer)]

        def flat(operands):
            filled = dict(zip(traced, operands, strict=True))
            return fn(*structure.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

        operands = [leaves[i] for i in traced]
        closed, shape = jax.make_jaxpr(flat, return_shape=True)(operands)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed.jaxpr, closed.consts, operands))

    return rewritten


def _jaxprs(params: dict[str, Any]):
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(leaf, "jaxpr", leaf)  # of a closed one
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr


def _has_windows(equation: Any) -> bool:
    if equation.primitive.name in _NAMES:
        return True
    return any(_has_windows(e) for jaxpr in _jaxprs(equation.params) for e in jaxpr.eqns)


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list:
    """Evaluates a jaxpr with windows as slices; what holds none is bound as it is."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def closed(inner: Any) -> Callable:
        return lambda *operands: _evaluate(inner.jaxpr, inner.consts, operands)

    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        name, params = equation.primitive.name, equation.params
        if not _has_windows(equation):
            outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
        elif name == "conv_general_dilated" and _is_plain_convolution(equation):
            outputs = jax.checkpoint(lambda x, w, p=params: _convolution(x, w, **p), prevent_cse=False)(*operands)
        elif name in ("reduce_window_max", "reduce_window_sum") and _is_plain_pooling(equation):
            outputs = _pooling(*operands, maximum=name.endswith("max"), **params)
        elif name in ("pjit", "jit", "closed_call"):
            outputs = closed(params.get("jaxpr", params.get("call_jaxpr")))(*operands)
        elif name in ("checkpoint", "remat", "remat2"):
            inner = lambda *operands, p=params: _evaluate(p["jaxpr"], (), operands)
            outputs = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)
        elif name == "cond":
            index, *rest = operands
            outputs = jax.lax.switch(index, [closed(b) for b in params["branches"]], *rest)
        elif name == "scan":
            outputs = equation.primitive.bind(*operands, **{**params, "jaxpr": _retrace(params["jaxpr"])})
        elif name == "while":
            retraced = {k: _retrace(params[k]) for k in ("cond_jaxpr", "body_jaxpr")}
            outputs = equation.primitive.bind(*operands, **{**params, **retraced})
        else:
            outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
        if not isinstance(outputs, (list, tuple)):
            outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


def _retrace(closed: Any) -> Any:
    """The jaxpr of a loop's body with windows as slices; the loop keeps its own layout of operands."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in closed.in_avals]
    return jax.make_jaxpr(lambda *operands: _evaluate(closed.jaxpr, closed.consts, operands))(*shapes)


def _slices(x: jax.Array, window: Any, strides: Any, padding: Any, base: Any, dilation: Any, fill: Any) -> list:
    """What each position of the window sees, x [N, spatial..., C] -> K arrays [N, out..., C], in row-major order."""
    low_high_interior = [(0, 0, 0), *((lo, hi, b - 1) for (lo, hi), b in zip(padding, base, strict=True)), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.asarray(fill, x.dtype), low_high_interior)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:-1], window, strides, dilation, strict=True)
    ]
    out = []
    for position in itertools.product(*map(range, window)):
        start = [d * i for d, i in zip(dilation, position, strict=True)]
        stop = [a + s * (n - 1) + 1 for a, s, n in zip(start, strides, sizes, strict=True)]
        limits = (x.shape[0], *stop, x.shape[-1])
        out.append(jax.lax.slice(x, (0, *start, 0), limits, (1, *strides, 1)))
    return out


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
    """A convolution by its primitive's parameters."""
    lhs, rhs, out = dimension_numbers
    x = x.transpose(lhs[0], *lhs[2:], lhs[1])  # [N, spatial..., C]
    w = w.transpose(*rhs[2:], rhs[1], rhs[0])  # [window..., C / groups, D]
    *window, depth, features = w.shape
    groups = feature_group_count
    slices = _slices(x, window, window_strides, padding, lhs_dilation, rhs_dilation, 0)
    w = w.reshape(-1, depth, features)
    dtype = jnp.result_type(x, w) if preferred_element_type is None else preferred_element_type
    if depth == 1 and groups > 1:  # depthwise: each channel has its own `features / groups` outputs
        w = w.reshape(-1, groups, features // groups)
        terms = [
            s.astype(dtype)[..., None] * w[k].reshape(*[1] * (x.ndim - 1), *w.shape[1:]) for k, s in enumerate(slices)
        ]
        y = sum(terms[1:], terms[0]).astype(dtype)
    elif groups > 1:
        patches = jnp.stack([s.reshape(*s.shape[:-1], groups, depth) for s in slices], -2)  # [N, out..., G, K, C / G]
        w = w.reshape(-1, depth, groups, features // groups)
        y = jnp.einsum(
            "...gkc,kcgd->...gd", patches, w, precision=precision, preferred_element_type=preferred_element_type
        )
    else:
        patches = jnp.concatenate(slices, -1)
        y = jnp.dot(
            patches.reshape(-1, patches.shape[-1]),
            w.reshape(-1, features),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    y = y.reshape(*slices[0].shape[:-1], features)
    order = [0, y.ndim - 1, *range(1, y.ndim - 1)]  # as (N, D, spatial...), which `out` counts in
    y = y.transpose(order)
    back = [0] * y.ndim
    for i, place in enumerate(out):
        back[place] = i
    return y.transpose(back)


def _is_plain_pooling(equation: Any) -> bool:
    dtype = equation.invars[0].aval.dtype
    window = equation.params["window_dimensions"]
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
    """Max- or sum-pooling by its primitive's parameters."""
    # With axes of size one at both ends, every axis of x is a spatial one.
    fill = -jnp.inf if maximum else 0
    slices = _slices(
        x[None, ..., None], window_dimensions, window_strides, padding, base_dilation, window_dilation, fill
    )
    out = slices[0]
    for s in slices[1:]:
        # Of equal ones the first; a NaN stays.
        out = jnp.where((out >= s) | jnp.isnan(out), out, s) if maximum else out + s
    return out[0, ..., 0]

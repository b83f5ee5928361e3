"""Differentiating through any optax transform without NaN.

Adaptive optimizers divide by a root of a running mean of squares, u = m / (√v + ε). Where a parameter's gradient has
always been exactly zero (a dead ReLU, an embedding row that no example used) v = 0, the chain rule meets
(d√v/dv)·(dv/dg) = ∞ · 0, and one such entry turns the whole hypergradient into NaN. The update itself is well defined
there; only its derivative has to be said. `differentiable` traces the transform's `update` and evaluates the same
operations with the derivative of √, 1/√, powers and quotients defined as zero at their singularity. No value changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

# An exact zero whose slope is steeper than this is what an ε in a denominator makes of an entry without a gradient.
_STEEP = 1e3


def _zero_safe(operation: Callable, derivatives: Callable) -> Callable:
    """`operation` with partial derivatives given by `derivatives(*primals, **params)`, one per primal, or None."""

    def bind(*primals, **params):
        function = jax.custom_jvp(functools.partial(operation, **params))

        @function.defjvp
        def jvp(primals, tangents):
            partials = derivatives(*primals, **params)
            terms = [d * t for d, t in zip(partials, tangents, strict=True) if d is not None]
            return function(*primals), functools.reduce(jnp.add, terms)

        return function(*primals)

    return bind


def _guarded(bad: jax.Array, x: jax.Array, derivative: Callable) -> jax.Array:
    """`derivative(x)`, and 0 where `bad`; evaluated at 1 there, so that its own derivative is finite too."""
    return jnp.where(bad, 0, derivative(jnp.where(bad, 1, x)))


def _sqrt(x, **_):
    return (_guarded(x <= 0, x, lambda x: 0.5 / jnp.sqrt(x)),)


def _rsqrt(x, **_):
    return (_guarded(x <= 0, x, lambda x: -0.5 * jax.lax.rsqrt(x) / x),)


def _cbrt(x, **_):
    return (_guarded(x == 0, x, lambda x: jnp.cbrt(x) / (3 * x)),)


def _integer_pow(x, *, y, **_):
    if y >= 1:
        return (y * jax.lax.integer_pow(x, y - 1),)
    return (_guarded(x == 0, x, lambda x: y * jax.lax.integer_pow(x, y - 1)),)


def _pow(x, y, **_):
    exponent = y.astype(x.dtype)
    singular = (x == 0) & (exponent < 1)
    by_base = jnp.where(singular, 0, exponent * jnp.power(jnp.where(singular, 1, x), exponent - 1))
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return (by_base, None)
    return (by_base, _guarded(x <= 0, x, lambda x: jnp.log(x) * jnp.power(x, exponent)))


def _div(x, y, *, drop, **_):
    bad = (y == 0) | ~jnp.isfinite(x) | ~jnp.isfinite(y)  # a branch that `where` leaves out may hold anything
    if drop:
        bad |= (x == 0) & (jnp.abs(y) <= 1 / _STEEP)
    safe = jnp.where(bad, 1, y)
    x = jnp.where(bad, 0, x)
    return (jnp.where(bad, 0, 1 / safe), -(x / safe) / safe)


def _mul(x, y, *, drop, **_):
    bad_x = ~jnp.isfinite(y)  # 0 · (1/√0): the partial derivative itself is infinite
    bad_y = ~jnp.isfinite(x)
    if drop:
        bad_x |= (x == 0) & (jnp.abs(y) >= _STEEP)
        bad_y |= (y == 0) & (jnp.abs(x) >= _STEEP)
    return (jnp.where(bad_x, 0, y), jnp.where(bad_y, 0, x))


_DERIVATIVES: dict[str, Callable] = {
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "div": _div,
    "mul": _mul,
}


def _evaluate(jaxpr: Any, consts: Any, args: Any, drop: bool) -> list:
    """Evaluates a jaxpr, with the primitives of `_DERIVATIVES` in their zero-safe form."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def closed(inner: Any) -> Callable:
        return lambda *operands: _evaluate(inner.jaxpr, inner.consts, operands, drop)

    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        name, params = equation.primitive.name, equation.params
        floating = all(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in operands[:1])
        if name in _DERIVATIVES and floating:
            derivatives = _DERIVATIVES[name]
            if name in ("div", "mul"):
                derivatives = functools.partial(derivatives, drop=drop)
            outputs = _zero_safe(equation.primitive.bind, derivatives)(*map(jnp.asarray, operands), **params)
        elif name in ("pjit", "jit", "closed_call"):  # nested calls of jnp functions
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            outputs = closed(inner)(*operands)
        elif name == "cond":
            index, *rest = operands
            outputs = jax.lax.switch(index, [closed(b) for b in params["branches"]], *rest)
        elif name == "scan":
            outputs = _evaluate_scan(closed(params["jaxpr"]), operands, params)
        elif name == "while":
            outputs = _evaluate_while(closed, operands, params)
        else:
            outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
        if not isinstance(outputs, (list, tuple)):
            outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


def _evaluate_scan(body: Callable, operands: list, params: dict) -> list:
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry, xs = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )

    def step(carry, x):
        out = body(*consts, *carry, *x)
        return out[:num_carry], out[num_carry:]

    carry, ys = jax.lax.scan(
        step,
        list(carry),
        list(xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _evaluate_while(closed: Callable, operands: list, params: dict) -> list:
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = (
        operands[:num_cond],
        operands[num_cond : num_cond + num_body],
        operands[num_cond + num_body :],
    )
    cond, body = closed(params["cond_jaxpr"]), closed(params["body_jaxpr"])
    return list(jax.lax.while_loop(lambda c: cond(*cond_consts, *c)[0], lambda c: body(*body_consts, *c), list(carry)))


def differentiable(
    optimizer: optax.GradientTransformation, *, zero: str = "drop"
) -> optax.GradientTransformationExtraArgs:
    """Any optax transform, with the same values and a derivative that is finite at zero gradients.

    The derivatives of √x, 1/√x, x^p (p < 1) and 1/x at x = 0 are defined as 0; everything else is the chain rule. At an
    entry whose gradient has always been exactly zero, the first step of Adam has u = g / (|g| + ε), and so

        zero="exact":  ∂u/∂g = 1/ε      the true derivative: 1e8, which overflows float32 in a few steps;
        zero="drop":   ∂u/∂g = 0        an exact zero times, or over, a slope of 1e3 or more passes nothing on.

    Where no perturbation of λ moves such a gradient off zero (a dead unit), both are exact; they differ where it would.

    Reverse, forward, nested and batched differentiation work, and cost what they cost without it. A `while_loop` inside
    the transform (a line search) remains forward-differentiable only, as everywhere in JAX.

    Args:
      optimizer: any `optax.GradientTransformation`.
      zero: "drop" or "exact".

    Returns:
      A transform with the same state and the same values under jit.

    Raises:
      ValueError: `zero` is neither "drop" nor "exact".

    >>> import jax, optax, metaopt
    >>> def trained(rate, optimizer):
    ...     params = jax.numpy.array([1.0, 0.0])  # the second entry's gradient is zero
    ...     grads = params**3
    ...     updates, _ = optimizer(rate).update(grads, optimizer(rate).init(params), params)
    ...     return (params + updates)[0] + jax.grad(lambda p: (p**2).sum())(params + updates)[1]
    >>> safe = lambda rate: metaopt.transforms.differentiable(optax.adam(rate))
    >>> print(f"{jax.grad(trained)(0.1, safe):.3f}")
    -1.000
    """
    if zero not in ("drop", "exact"):
        raise ValueError(f'`zero` must be "drop" or "exact"; got {zero!r}.')
    inner = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra_args):
        # Callables (`value_fn`) and other options are not traced.
        def is_array(v):
            return all(isinstance(leaf, (jax.Array, float, int, complex)) for leaf in jax.tree.leaves(v))

        arrays = {name: v for name, v in extra_args.items() if is_array(v)}
        options = {name: v for name, v in extra_args.items() if name not in arrays}

        def flat_update(updates, state, params, arrays):
            return inner.update(updates, state, params, **arrays, **options)

        operands = (updates, state, params, arrays)
        closed, shapes = jax.make_jaxpr(flat_update, return_shape=True)(*operands)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(operands), zero == "drop")
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return optax.GradientTransformationExtraArgs(inner.init, update)

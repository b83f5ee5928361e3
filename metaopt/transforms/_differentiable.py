"""Differentiates through any optax transform without NaN.

Adaptive optimizers divide by a root of a running mean of squares, u = m / (√v + ε). If a parameter's gradient has
always been exactly zero (a dead ReLU, an embedding row that no example used), v = 0. The chain rule then meets
(d√v/dv)·(dv/dg) = ∞ · 0, and one such entry turns the whole hypergradient into NaN. The update itself is well defined
there; only its derivative needs a definition. `differentiable` traces the transform's `update` and evaluates the same
operations, but defines the derivative of √, 1/√, powers and quotients as zero at their singularity. No value changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _jaxpr
from metaopt._jaxpr import Literal, SymbolicZero

# If 0 / y has a slope 1/|y| above this limit, we assume that y is the ε of an optimizer, at an entry without a
# gradient.
_STEEP = 1e3


def _zero_safe(operation: Callable, singular: Callable, rule: Callable, drop: bool) -> Callable:
    """Returns `operation` with the derivative `rule(operands, tangents, output)`, or zero where `singular` is true.

    At a singular point the output is a constant. The rule is then evaluated at operands of one with tangents of zero,
    so the derivatives of the rule itself are finite, too. This also holds within a scan that is differentiated in
    reverse, which does not keep the rule. (A power between 1 and 2 has an infinite second derivative at zero. This is
    unchanged.) The rule gets None for a tangent that is known to be zero.
    """
    function = jax.custom_jvp(operation)

    def jvp(primals, tangents):
        bad = singular(*primals, drop=drop)
        operands = [jnp.where(bad, jnp.ones_like(x), x) for x in primals]
        output = function(*operands)
        is_zero = [isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0 for t in tangents]
        nonzero = [None if zero else jnp.where(bad, 0, t) for zero, t in zip(is_zero, tangents, strict=True)]
        constant = operation(*map(jax.lax.stop_gradient, primals))
        tangent = jnp.zeros_like(output) if all(is_zero) else rule(operands, nonzero, output)
        return jnp.where(bad, constant, output), tangent

    function.defjvp(jvp, symbolic_zeros=True)
    return function


def _sum(*terms: Any) -> Any:
    """The sum of the terms that are not None; at least one must not be None."""
    return functools.reduce(jnp.add, [term for term in terms if term is not None])


def _sqrt(operands, tangents, out):
    return tangents[0] * (0.5 / out)


def _rsqrt(operands, tangents, out):
    return tangents[0] * (-0.5 * out / operands[0])


def _cbrt(operands, tangents, out):
    return tangents[0] * (out / (3 * operands[0]))


def _integer_pow(operands, tangents, out, *, exponent):
    return tangents[0] * (exponent * out / operands[0])


def _pow(operands, tangents, out):
    x, exponent = operands[0], operands[1].astype(operands[0].dtype)
    x_tangent, y_tangent = tangents
    x_tangent = None if x_tangent is None else x_tangent * exponent * jnp.power(x, exponent - 1)
    has_logarithm = x != 0 if jnp.iscomplexobj(x) else x > 0
    y_tangent = None if y_tangent is None else y_tangent * out * jnp.log(jnp.where(has_logarithm, x, 1))
    return _sum(x_tangent, y_tangent)


def _div(operands, tangents, out):
    x_tangent, y_tangent = tangents
    return _sum(x_tangent, None if y_tangent is None else -out * y_tangent) / operands[1]


def _mul(operands, tangents, out):
    (x, y), (x_tangent, y_tangent) = operands, tangents
    return _sum(None if x_tangent is None else x_tangent * y, None if y_tangent is None else x * y_tangent)


def _size(x):
    return jnp.abs(x) if jnp.iscomplexobj(x) else x


def _singular_pow(x, y, *, drop):
    # 0 to a negative power, or an overflow.
    size = jnp.abs(x)
    return ~jnp.isfinite(jnp.power(size, jnp.real(y).astype(size.dtype) - 1))


def _singular_div(x, y, *, drop):
    # The derivative divides by y². The branch that `where` does not select may hold any value.
    size = jnp.abs(y)
    bad = ~((size >= jnp.finfo(y.dtype).tiny ** 0.5) & jnp.isfinite(y) & jnp.isfinite(x))
    return bad | ((x == 0) & (size <= 1 / _STEEP)) if drop else bad


# Operations with infinite derivatives: the test for a singularity, `(*operands, drop) -> bool`, and their rule.
# For complex operands the test uses the size, since the root of a negative number has a derivative there.
_RULES: dict[str, tuple[Callable, Callable]] = {
    "sqrt": (lambda x, *, drop: _size(x) <= 0, _sqrt),
    "rsqrt": (lambda x, *, drop: _size(x) <= jnp.finfo(x.dtype).tiny ** (2 / 3), _rsqrt),  # below, x^(-3/2) overflows
    "cbrt": (lambda x, *, drop: x == 0, _cbrt),
    "pow": (_singular_pow, _pow),
    "div": (_singular_div, _div),
    # A product is singular only if an operand is not finite, as in 0 · (1/√0). A steep product keeps its derivative,
    # unlike a quotient: the operand that is exactly zero may be λ itself, such as a rate or a momentum.
    "mul": (lambda x, y, *, drop: ~(jnp.isfinite(x) & jnp.isfinite(y)), _mul),
}


def _rule_of(equation: Any) -> tuple[Callable, Callable]:
    """The test for a singularity of an operation, and its derivative rule."""
    if equation.primitive.name != "integer_pow":
        return _RULES[equation.primitive.name]
    exponent = equation.params["y"]  # negative here; x^(exponent − 1) overflows below the bound
    bound = lambda x, *, drop: jnp.abs(x) <= jnp.finfo(x.dtype).tiny ** (1 / (1 - exponent))
    return bound, functools.partial(_integer_pow, exponent=exponent)


def _needs_no_rule(equation: Any) -> bool:
    """Whether the derivative is finite and not steep for all operands, as for a product with a small constant."""
    name, invars = equation.primitive.name, equation.invars
    if not jnp.issubdtype(invars[0].aval.dtype, jnp.inexact):
        return True
    if name == "integer_pow":
        return equation.params["y"] >= 0
    constants = [float(abs(v.val)) if isinstance(v, Literal) and np.ndim(v.val) == 0 else None for v in invars]
    if name == "mul":
        return any(c is not None and np.isfinite(c) for c in constants)
    return name == "div" and constants[1] is not None and constants[1] > 1 / _STEEP


def _zero_safe_form(equation: Any, drop: bool) -> Callable | None:
    """The function that replaces the equation, or None if its derivative needs no rule."""
    if (equation.primitive.name not in _RULES and equation.primitive.name != "integer_pow") or _needs_no_rule(equation):
        return None
    function = _zero_safe(functools.partial(equation.primitive.bind, **equation.params), *_rule_of(equation), drop)
    return lambda *operands: function(*map(jnp.asarray, operands))


def differentiable(
    optimizer: optax.GradientTransformation, *, zero: str = "drop"
) -> optax.GradientTransformationExtraArgs:
    """Wraps any optax transform: its values stay the same, and its derivative becomes finite at zero gradients.

    The derivatives of √x, 1/√x, x^p (p < 1) and 1/x at x = 0 are defined as 0. Everything else follows the chain rule.
    At an entry whose gradient has always been exactly zero, the first step of Adam is u = g / (|g| + ε), and so

        zero="exact":  ∂u/∂g = 1/ε      the true derivative: 1e8, which overflows float32 in a few steps;
        zero="drop":   ∂u/∂g = 0        the derivative of a quotient 0 / y is defined as 0 if |y| is at most 1e-3.

    If the gradient stays zero for all λ nearby (a dead unit), both settings give the exact hypergradient. Otherwise
    they differ.

    In float16 the smallest normal number is 6e-5. There, quotients by less than .008 count as singular too, and so do
    1/√x for x below .0015 and √x below .039. The derivative then lacks that term, and is wrong if the gradient is not
    zero. float32 and bfloat16 have enough range to avoid this.

    Complex parameters are differentiated with JAX's conventions. The tests for a singularity then use the absolute
    value of an operand.

    Reverse, forward, nested and batched differentiation work. A `while_loop` inside the transform (a line search) can
    only be differentiated in forward mode, as always in JAX.

    **Cost.** Without differentiation, the compiled program has the same operations as without the wrapper. Derivatives
    cost more, by an amount for each parameter and step that does not depend on the batch. Compared with the derivative
    without the wrapper, in reverse mode through Adam on a CPU (XLA's `cost_analysis`):

    - A network of 4,000 parameters on 128 rows: 1.09 times the operations, and 1.4 times the memory traffic (forward
      mode: 1.07 and 1.3).
    - A loss that costs nothing next to Adam: 3.3 and 1.6 times, and 1.8 times the time. Expect the most here.

    Args:
      optimizer: any `optax.GradientTransformation`.
      zero: "drop" or "exact".

    Returns:
      A transform with the same state and the same values under jit. The outputs of `update` have the types that they
        have under jit, even if optax keeps a Python bool in its state.

    Raises:
      ValueError: if `zero` is neither "drop" nor "exact".

    >>> import jax, optax, metaopt
    >>> def trained(rate, optimizer):
    ...     params = jax.numpy.array([1.0, 0.0])  # the second entry's gradient is zero
    ...     grads = params**3
    ...     updates, _ = optimizer(rate).update(grads, optimizer(rate).init(params), params)
    ...     return (params + updates)[0] + jax.grad(lambda p: (p**2).sum())(
    ...         params + updates
    ...     )[1]
    >>> safe = lambda rate: metaopt.transforms.differentiable(optax.adam(rate))
    >>> print(f"{jax.grad(trained)(0.1, safe):.3f}")
    -1.000
    """
    if zero not in ("drop", "exact"):
        raise ValueError(f'`zero` must be "drop" or "exact"; got {zero!r}.')
    inner = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra_args):
        # Callables (`value_fn`) and other options, such as Python numbers and booleans, are not traced.
        def is_array(v):
            return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(v))

        arrays = {name: v for name, v in extra_args.items() if is_array(v)}
        options = {name: v for name, v in extra_args.items() if name not in arrays}

        def flat_update(updates, state, params, arrays):
            return inner.update(updates, state, params, **arrays, **options)

        operands = (updates, state, params, arrays)
        closed, shapes = jax.make_jaxpr(flat_update, return_shape=True)(*operands)
        replace = functools.partial(_zero_safe_form, drop=zero == "drop")
        outputs = _jaxpr.evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(operands), replace)
        return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(x) for x in outputs])

    return optax.GradientTransformationExtraArgs(inner.init, update)

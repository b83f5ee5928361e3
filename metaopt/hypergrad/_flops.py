"""Counts the floating-point operations of a program."""

import math
from collections.abc import Callable
from typing import Any

import jax

from metaopt import _jaxpr


def flops(function: Callable, *args: Any, products_only: bool = False) -> float:
    """Floating-point operations of one call, counted in the program's jaxpr with the lengths of its scans.

    Matrix products and convolutions count two operations per multiply-add. Every other operation counts one per entry
    of its result, and a reduction counts one per entry of its operand. Operations on which no output depends are not
    counted. (XLA's own `cost_analysis` counts the body of a scan once, for any length.) The length of a `while_loop` is
    not in the program, so its body is counted once. For a `cond`, the most expensive branch counts.

    Args:
      function: any traceable function.
      *args: the arguments of the call; only their shapes matter.
      products_only: counts only matrix products and convolutions, as is common for architectures. (There, a
        multiply-add often counts as one operation.)

    Returns:
      The number of operations.

    >>> import jax.numpy as jnp
    >>> from metaopt import hypergrad
    >>> print(hypergrad.flops(lambda a, b: a @ b, jnp.zeros((2, 3)), jnp.zeros((3, 4))))
    48.0
    """
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, products_only)


def of_jaxpr(jaxpr: Any, products_only: bool = False) -> float:
    """Operations of a program that is already traced."""
    live, _ = _jaxpr.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(live, products_only)


def _size(variable: Any) -> float:
    return float(math.prod(getattr(variable.aval, "shape", ())))


def _count(jaxpr: Any, products_only: bool) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params, outputs = equation.primitive.name, equation.params, sum(map(_size, equation.outvars))
        # A linear solve runs only its jaxpr `solve`. Its other jaxprs, the products and the transposed solve, serve
        # derivatives.
        is_solve = name == "custom_linear_solve"
        inner_jaxprs = [params["jaxprs"].solve.jaxpr] if is_solve else list(_jaxpr.inner_jaxprs(equation))
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * outputs * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        elif name in ("conv_general_dilated", "cpu_convolution"):
            kernel = equation.invars[1].aval.shape
            if params.get("num_tasks") is not None:  # `outputs` already includes the axis of tasks
                kernel = kernel[1:]
            total += 2 * outputs * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
        elif name == "cpu_depthwise":
            y = equation.outvars[0] if params["result"] == "y" else equation.invars[1]
            total += 2 * _size(y) * math.prod(window.size for window in params["windows"])
        elif inner_jaxprs:
            counts = [_count(part, products_only) for part in inner_jaxprs]
            total += (
                params["length"] * sum(counts) if name == "scan" else max(counts) if name == "cond" else sum(counts)
            )
        elif products_only:
            continue
        elif name.startswith(("reduce_", "cum", "arg")):
            total += sum(map(_size, equation.invars))
        else:
            total += outputs
    return total

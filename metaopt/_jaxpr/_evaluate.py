"""Evaluates jaxprs with operations replaced."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from metaopt._jaxpr import _walk


def evaluate(jaxpr: Any, consts: Sequence, args: Sequence, replace: Callable[[Any], Callable | None]) -> list:
    """Returns the outputs of a jaxpr, with operations replaced.

    Operations inside nested calls, checkpoints, branches and loops are replaced, too. Functions that define their own
    derivative (`jax.custom_jvp`, `jax.custom_vjp`) stay as they are. An operation also stays as it is if neither it nor
    any operation inside of it is replaced.

    Args:
      jaxpr: the jaxpr of `jax.make_jaxpr`, without its constants.
      consts: its constants.
      args: its arguments.
      replace: `(equation) -> None`, or a function of the operands that replaces the operation. If the operation has
        several outputs, the function may return them as a list.

    Returns:
      The outputs, flat. An output that is a constant or an argument is returned as it is, possibly a Python scalar.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def closed(inner: Any) -> Callable:
        return lambda *operands: evaluate(inner.jaxpr, inner.consts, operands, replace)

    def retraced(inner: Any) -> Any:
        # A loop with the new body takes the same operands in the same order.
        return jax.make_jaxpr(closed(inner))(*inner.in_avals)

    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        primitive, name, params = equation.primitive, equation.primitive.name, equation.params
        with _walk.traced_context(equation):
            replacement = replace(equation)
            if replacement is not None:
                outputs = replacement(*operands)
            elif not _walk.contains(equation, replace):
                outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
            elif name in _walk.CALLS:
                outputs = closed(_walk.called_jaxpr(equation))(*operands)
            elif name in _walk.CHECKPOINTS:
                inner = lambda *operands, jaxpr=params["jaxpr"]: evaluate(jaxpr, (), operands, replace)
                outputs = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)
            elif name == "cond":
                index, *rest = operands
                outputs = jax.lax.switch(index, [closed(branch) for branch in params["branches"]], *rest)
            elif name == "scan":
                body = retraced(params["jaxpr"])
                if any(isinstance(const, Tracer) for const in body.consts):
                    run = closed(params["jaxpr"])
                    outputs, _ = run_scan(
                        equation, operands, lambda _, *operands, run=run: (run(*operands), None), None
                    )
                else:
                    outputs = primitive.bind(*operands, **{**params, "jaxpr": body})
            elif name == "while":
                bodies = {which: retraced(params[which]) for which in ("cond_jaxpr", "body_jaxpr")}
                if any(isinstance(const, Tracer) for body in bodies.values() for const in body.consts):
                    outputs = run_while(params, operands, *(closed(params[which]) for which in bodies))
                else:
                    outputs = primitive.bind(*operands, **{**params, **bodies})
            else:
                outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
        many = isinstance(outputs, list) or (primitive.multiple_results and replacement is None)
        values.update(zip(equation.outvars, outputs if many else [outputs], strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


# A replacement may use traced values from outside. The equation of a loop cannot hold them, so we build a new loop.


def run_scan(equation: Any, operands: Sequence, run: Callable, values: Any) -> tuple[list, Any]:
    """Runs a scan with another body, which also reads and returns values in each step.

    The body is `run(values of the step, *operands) -> (outputs, values)`. Returns the outputs of the scan, and the
    values of all steps, stacked.
    """
    params, body = equation.params, equation.params["jaxpr"]
    # Carries and constants have the same shapes as in the body; scanned inputs and outputs have one more axis.
    num_ys = sum(v.aval.ndim > a.ndim for v, a in zip(equation.outvars, body.out_avals, strict=True))
    num_xs = sum(v.aval.ndim > a.ndim for v, a in zip(equation.invars, body.in_avals, strict=True))
    num_carry, end = len(equation.outvars) - num_ys, len(operands) - num_xs
    fixed, carry, xs = operands[: end - num_carry], operands[end - num_carry : end], operands[end:]

    def step(carry, scanned):
        x, step_values = scanned
        outputs, new_values = run(step_values, *fixed, *carry, *x)
        return outputs[:num_carry], (outputs[num_carry:], new_values)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, new_values) = jax.lax.scan(step, list(carry), (list(xs), values), **options)
    return [*carry, *ys], new_values


def run_while(params: Any, operands: Sequence, goes_on: Callable, run: Callable) -> list:
    num_cond_consts = params["cond_nconsts"]
    end_of_consts = num_cond_consts + params["body_nconsts"]
    condition = lambda carry: goes_on(*operands[:num_cond_consts], *carry)[0]
    body = lambda carry: run(*operands[num_cond_consts:end_of_consts], *carry)
    return jax.lax.while_loop(condition, body, list(operands[end_of_consts:]))


def exchange(
    jaxpr: Any, consts: Sequence, args: Sequence, replace: Callable[[Any], Callable | None], stored: list | None = None
) -> tuple[list, list]:
    """Evaluates a jaxpr with operations replaced, at any depth. Each replacement also reads a value and returns one.

    The values form one flat list in program order. A value inside of a scan has the steps of the scan as its leading
    axis. The list has the values of all branches of a condition, one branch after the other. Values of a branch that is
    not taken are NaN.

    Args:
      jaxpr: the jaxpr of `jax.make_jaxpr`, without its constants.
      consts: its constants.
      args: its arguments.
      replace: `(equation) -> None`, or a function `(value, *operands) -> (output, value)` that replaces the operation.
        The operation must have one result. The value is a tree of floating-point arrays.
      stored: the values to read, as this function returns them; with None each replaced operation gets None.

    Returns:
      The outputs, flat, and the list of values.

    Raises:
      ValueError: if a replaced operation is inside of an operation other than a call, a checkpoint, a branch or a scan.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    returned, num_used = [], 0
    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        num = _num_replaced(equation, replace)
        own_values = None if stored is None else stored[num_used : num_used + num]
        num_used += num
        with _walk.traced_context(equation):
            if num:
                outputs, new_values = _exchange_inside(equation, operands, replace, own_values)
                returned += new_values
            else:
                outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
                outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars], returned


def _num_replaced(equation: Any, replace: Callable) -> int:
    if replace(equation) is not None:
        return 1
    return sum(replace(inner) is not None for inner in _walk.equations_inside(equation))


def _exchange_inside(equation: Any, operands: list, replace: Callable, stored: list | None) -> tuple[list, list]:
    """The outputs and the values of one equation that is replaced, or that contains replaced equations."""
    name, params, replacement = equation.primitive.name, equation.params, replace(equation)
    if replacement is not None:
        output, value = replacement(None if stored is None else stored[0], *operands)
        return [output], [value]
    closed = lambda inner: lambda stored, *operands: exchange(inner.jaxpr, inner.consts, operands, replace, stored)
    if name in _walk.CALLS:
        return closed(_walk.called_jaxpr(equation))(stored, *operands)
    if name in _walk.CHECKPOINTS:
        inner = lambda stored, *operands: exchange(params["jaxpr"], (), operands, replace, stored)
        return jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(stored, *operands)
    if name == "scan":
        return run_scan(equation, operands, closed(params["jaxpr"]), stored)
    if name == "cond":
        return _exchange_branches(operands, params["branches"], closed, replace, stored)
    raise ValueError(f"The operation is inside of {name!r}, in which it cannot be replaced.")


def _exchange_branches(
    operands: list, branches: Sequence, closed: Callable, replace: Callable, stored: list | None
) -> tuple[list, list]:
    # All branches of a `switch` must return the same structure and shapes, so each one also returns NaN for the values
    # of the others. For example, if the branches have 2 replaced operations and 1, the first branch returns
    # [[a, b], [NaN]] and the second [[NaN, NaN], [c]].
    index, *rest = operands
    nums = [sum(replace(e) is not None for e in _walk.equations(branch.jaxpr)) for branch in branches]
    ends = list(itertools.accumulate(nums))
    own_values = [None if stored is None else stored[end - num : end] for num, end in zip(nums, ends, strict=True)]
    runs = [lambda *rest, i=i: closed(branches[i])(own_values[i], *rest) for i in range(len(branches))]
    shapes = [jax.eval_shape(lambda *rest, run=run: run(*rest)[1], *rest) for run in runs]
    padding = lambda tree: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), tree)

    def padded(*rest, i):
        outputs, values = runs[i](*rest)
        return outputs, [values if j == i else padding(shapes[j]) for j in range(len(branches))]

    outputs, values = jax.lax.switch(index, [functools.partial(padded, i=i) for i in range(len(branches))], *rest)
    return outputs, [value for branch_values in values for value in branch_values]

"""Splits a function in two: the expensive parts that do not depend on its moving arguments, and the rest.

An argument moves if the function is called with many values of it. The first half is computed once, and the rest for
each of these values.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from metaopt._jaxpr import _walk

_EXPENSIVE = ("dot_general", "ragged_dot_general", "conv_general_dilated", "cpu_convolution", "cpu_depthwise")


class Halves(NamedTuple):
    """A function split in two: `function(*args) = rest(args, once(args))`.

    Attributes:
      once: `(args) -> kept`, a list of arrays.
      rest: `(args, kept) -> outputs`.
      kept: shapes and types of the result of `once`; empty if the split gains nothing.
    """

    once: Callable[[Any], list]
    rest: Callable[[Any, Sequence], Any]
    kept: list[jax.ShapeDtypeStruct]


def split(function: Callable, args: Any, moves: Any) -> Halves:
    """Splits a function: one half has the expensive parts that do not depend on its moving arguments.

    Matrix products and convolutions are expensive. So is an operation that contains one, and everything computed from
    such results, regardless of its size. Operations before the first expensive one are cheap, and the other half
    repeats them. Nested calls are split, too. Loops, branches, checkpoints and functions that define their own
    derivative stay whole, in one half. Operations with an effect (`jax.debug.print`) are in the other half. Both halves
    can be differentiated as the function can.

    Args:
      function: any function that can be traced.
      args: its positional arguments, or their shapes and types; trees of arrays.
      moves: structured like `args`, one bool per leaf: whether the leaf moves (has many values).

    Returns:
      `Halves`, for arguments of these shapes.
    """
    # A new function object, since JAX would return the cached trace of an earlier call of the same object.
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    inputs = [object() for _ in closed.jaxpr.invars]
    constants: dict[Any, Any] = {}
    steps: list[_Step] = []
    outputs = _flattened(closed, inputs, constants, steps)
    moving = {value_id for value_id, moved in zip(inputs, jax.tree.leaves(moves), strict=True) if moved}
    expensive, operands_of_moving = _fixed_and_expensive(steps, moving)
    kept = [value_id for value_id in dict.fromkeys([*operands_of_moving, *outputs]) if value_id in expensive]

    def run(steps, args, kept_values=()):
        values = constants | dict(zip(inputs, jax.tree.leaves(args), strict=True))
        return _run(steps, values | dict(zip(kept, kept_values, strict=False)))

    def once(args):
        values = run(_needed(steps, kept, set(), effects=False), args)
        return [values[value_id] for value_id in kept]

    def rest(args, kept_values):
        values = run(_needed(steps, outputs, set(kept), effects=True), args, kept_values)
        return jax.tree.unflatten(jax.tree.structure(shape), [values[value_id] for value_id in outputs])

    types = [expensive[value_id] for value_id in kept]
    return Halves(once, rest, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in types])


class _Step(NamedTuple):
    """One operation of a program. Its operands and results are value ids: objects that represent values."""

    equation: Any
    operands: list
    results: list


def _flattened(closed: Any, inputs: list, constants: dict[Any, Any], steps: list[_Step]) -> list:
    """Adds all operations to `steps`, also those of nested calls, and their constants. Returns the outputs' ids."""
    value_ids = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        value_ids[variable] = object()
        constants[value_ids[variable]] = value

    def id_of(v):
        if not isinstance(v, core.Literal):
            return value_ids[v]
        literal = object()
        constants[literal] = v.val
        return literal

    for equation in closed.jaxpr.eqns:
        operands = [id_of(v) for v in equation.invars]
        if equation.primitive.name in _walk.CALLS:
            results = _flattened(_walk.called_jaxpr(equation), operands, constants, steps)
        else:
            results = [object() for _ in equation.outvars]
            steps.append(_Step(equation, operands, results))
        value_ids.update(zip(equation.outvars, results, strict=True))
    return [id_of(v) for v in closed.jaxpr.outvars]


def _fixed_and_expensive(steps: list[_Step], moving: set) -> tuple[dict[Any, Any], list]:
    """The shapes and types of all values that are expensive and do not move, and the operands of steps that move."""
    moving, expensive, operands_of_moving = set(moving), {}, []
    for equation, operands, results in steps:
        if equation.effects or not moving.isdisjoint(operands):
            moving.update(results)
            operands_of_moving += operands
        elif any(value_id in expensive for value_id in operands) or _is_expensive(equation):
            expensive.update((value_id, v.aval) for value_id, v in zip(results, equation.outvars, strict=True))
    return expensive, operands_of_moving


def _needed(steps: list[_Step], value_ids: Iterable, available: set, *, effects: bool) -> list[_Step]:
    """The steps that compute `value_ids` from the available ones; with `effects`, also all steps with an effect."""
    missing, needed = set(value_ids) - available, []
    for step in reversed(steps):
        if step.equation.effects and effects or not missing.isdisjoint(step.results):
            missing |= set(step.operands) - available
            needed.append(step)
    return needed[::-1]


def _run(steps: list[_Step], values: dict[Any, Any]) -> dict[Any, Any]:
    """The values by id, with the results of the steps."""
    for equation, operands, results in steps:
        primitive, params = equation.primitive, equation.params
        with _walk.traced_context(equation):
            outputs = primitive.bind(*(values[value_id] for value_id in operands), **primitive.get_bind_params(params))
        values.update(zip(results, outputs if primitive.multiple_results else [outputs], strict=True))
    return values


def _is_expensive(equation: Any) -> bool:
    named = lambda equation: equation.primitive.name in _EXPENSIVE
    return named(equation) or _walk.contains(equation, named)

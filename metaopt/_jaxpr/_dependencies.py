"""Which inputs of a program each of its outputs depends on."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core


def dependencies(
    jaxpr: Any, sources: Sequence[frozenset], rule: Callable[[Any, list[frozenset]], list[frozenset]] | None = None
) -> list[frozenset]:
    """Returns the sources of each output of a jaxpr, by propagation through its operations.

    The propagation enters calls, branches and loops. An output of any other operation has the sources of all operands.

    Args:
      jaxpr: a jaxpr without its constants, which have no sources.
      sources: the sources of each input, sets of any labels.
      rule: `(equation, sources of the operands) -> sources of the outputs`, by default `sources_through`.

    Returns:
      The sources of each output.
    """
    values: dict[Any, frozenset] = dict(zip(jaxpr.invars, sources, strict=True))
    read = lambda v: frozenset() if isinstance(v, core.Literal) else values.get(v, frozenset())
    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        outputs = rule(equation, operands) if rule else sources_through(equation, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def sources_through(equation: Any, operands: list[frozenset], rule: Callable | None = None) -> list[frozenset]:
    """Returns the sources of the outputs of one operation, also of a call, a branch or a loop.

    Args:
      equation: the operation.
      operands: the sources of its operands.
      rule: as for `dependencies`.

    Returns:
      The sources of each output.
    """
    name, params = equation.primitive.name, equation.params
    inside = lambda inner, sources: dependencies(getattr(inner, "jaxpr", inner), sources, rule)
    if name == "cond":
        index, *rest = operands
        branches = [inside(branch, rest) for branch in params["branches"]]
        return [index.union(*outputs) for outputs in zip(*branches, strict=True)]
    if name == "while":
        return _through_while(equation, operands, inside)
    if name == "scan":
        return _through_scan(equation, operands, inside)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    is_call = (
        isinstance(inner, core.Jaxpr)
        and len(inner.invars) == len(operands)
        and len(inner.outvars) == len(equation.outvars)
    )
    return inside(inner, operands) if is_call else [frozenset().union(*operands)] * len(equation.outvars)


def _through_scan(equation: Any, operands: list[frozenset], inside: Callable) -> list[frozenset]:
    # Constants and carry have the shapes of the body's arguments; scanned arrays have one more axis.
    body, has_axis = equation.params["jaxpr"], lambda v, aval: v.aval.ndim > aval.ndim
    num_carry = len(equation.outvars) - sum(map(has_axis, equation.outvars, body.out_avals))
    start = len(operands) - sum(map(has_axis, equation.invars, body.in_avals)) - num_carry
    consts, carry, xs = operands[:start], operands[start : start + num_carry], operands[start + num_carry :]
    step = lambda carry: inside(body, [*consts, *carry, *xs])
    carry = until_fixed(lambda carry: step(carry)[:num_carry], carry)
    return [*carry, *step(carry)[num_carry:]]


def _through_while(equation: Any, operands: list[frozenset], inside: Callable) -> list[frozenset]:
    params = equation.params
    num_condition, num_body = params["cond_nconsts"], params["body_nconsts"]
    condition_consts, operands = operands[:num_condition], operands[num_condition:]
    body_consts, carry = operands[:num_body], operands[num_body:]

    def step(carry):
        (condition_sources,) = inside(params["cond_jaxpr"], [*condition_consts, *carry])
        return [condition_sources | sources for sources in inside(params["body_jaxpr"], [*body_consts, *carry])]

    return until_fixed(step, carry)


def until_fixed(step: Callable[[list[frozenset]], list[frozenset]], carry: list[frozenset]) -> list[frozenset]:
    """Returns the sources of a carry after any number of steps, by iteration to a fixed point.

    Args:
      step: the sources after one step, from those before it.
      carry: the sources before the first step.

    Returns:
      The sources of each part of the carry.
    """
    while (after := [old | new for old, new in zip(carry, step(carry), strict=True)]) != carry:
        carry = after
    return carry

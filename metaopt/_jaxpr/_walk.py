"""Finds the operations of a jaxpr, at any depth."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

CALLS = ("pjit", "jit", "closed_call")  # nested calls, for example of jnp functions
CHECKPOINTS = ("checkpoint", "remat", "remat2")
OPAQUE = "call_hi_primitive"  # a function of JAX that is one operation, since JAX 0.12.1, such as `lax.custom_root`


def equations(jaxpr: Any) -> Iterator[Any]:
    """Returns the operations of a jaxpr; each one is followed by the operations inside of it.

    Args:
      jaxpr: a `jax.core.Jaxpr`.

    Returns:
      An iterator over equations.
    """
    for equation in jaxpr.eqns:
        yield equation
        yield from equations_inside(equation)


def equations_inside(equation: Any) -> Iterator[Any]:
    """Returns the operations inside of an operation, for example in the body of a loop.

    Args:
      equation: an equation of a `jax.core.Jaxpr`.

    Returns:
      An iterator over equations.
    """
    for jaxpr in inner_jaxprs(equation):
        yield from equations(jaxpr)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Returns the jaxprs in an operation: the body of a loop, the branches of a condition, the function of a call.

    Args:
      equation: an equation of a `jax.core.Jaxpr`.

    Returns:
      An iterator over jaxprs, without their constants.
    """
    if equation.primitive.name == OPAQUE:
        yield expanded(equation).jaxpr
        return
    for value in equation.params.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(leaf, "jaxpr", leaf)  # a closed jaxpr holds an open one
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr


def contains(equation: Any, wanted: Callable[[Any], Any]) -> bool:
    """Whether `wanted` is true for any operation inside of the equation."""
    return any(map(wanted, equations_inside(equation)))


def called_jaxpr(equation: Any) -> Any:
    """The closed jaxpr of a nested call."""
    return equation.params.get("jaxpr", equation.params.get("call_jaxpr"))


def expanded(equation: Any) -> Any:
    """The closed jaxpr of the function that an opaque operation computes."""
    function = equation.params["_prim"]
    flat = lambda *args: jax.tree.leaves(function.expand(*jax.tree.unflatten(function.in_tree, args)))
    return jax.make_jaxpr(flat)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars))


@contextlib.contextmanager
def traced_context(equation: Any) -> Iterator[None]:
    """The context in which the equation was traced: settings, metadata, name scopes."""
    scope = str(equation.source_info.name_stack)
    with equation.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
        yield

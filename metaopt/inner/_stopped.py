"""`jax.lax.stop_gradient` in traced functions: removes it from a layer, or locates it in a model.

If a value that is stored for the next step has a stopped gradient, no first derivative changes, because the inner
gradient never reaches the stored value. But a hypergradient changes, because it differentiates through all steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metaopt import _jaxpr, _trees

_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def without_stops(function: Callable) -> Callable:
    """Returns `function` with every `stop_gradient` removed: the same values, and the derivatives of all operations.

    Args:
      function: any function of arrays and static values that JAX can trace. Functions inside of it that define their
        own derivative (`jax.custom_jvp`, `jax.custom_vjp`) keep that derivative.

    Returns:
      A function of the same positional arguments.
    """

    def call(*args):
        arrays, static = _trees.split(args, _is_array)
        join = lambda arrays: _trees.merge(arrays, static)
        closed, shape = jax.make_jaxpr(lambda arrays: function(*join(arrays)), return_shape=True)(arrays)
        outputs = _jaxpr.evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arrays), _identity_for_stop)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return call


def _identity_for_stop(equation: Any) -> Callable | None:
    return (lambda x: x) if equation.primitive.name == "stop_gradient" else None


def stopped_paths(function: Callable, args: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the pairs of an output and an argument between which every differentiable path has a `stop_gradient`.

    An output that also depends on the argument without a stop is not listed. Examples are a straight-through estimator
    and the maximum that a softmax subtracts. Paths through integers and booleans do not count, because they have no
    derivative.

    Args:
      function: `(args) -> outputs`, trees of arrays.
      args: the argument of `function`: a dict of trees by name. Leaves that are not arrays are static.

    Returns:
      Paths of the output and of the argument, such as `[("['mean']", "['params']['kernel']")]`.
    """
    arrays, static = _trees.split(args, _is_array)
    closed, shape = jax.make_jaxpr(lambda arrays: function(_trees.merge(arrays, static)), return_shape=True)(arrays)
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    sources = [frozenset([jax.tree_util.keystr(path)] if _trees.is_inexact(array) else ()) for path, array in leaves]
    with_stops = _jaxpr.dependencies(closed.jaxpr, sources, functools.partial(_rule, cross_stops=False))
    without = _jaxpr.dependencies(closed.jaxpr, sources, functools.partial(_rule, cross_stops=True))
    outputs = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shape)]
    return [
        (output, source)
        for output, reachable, differentiable in zip(outputs, without, with_stops, strict=True)
        for source in sorted(reachable - differentiable)
    ]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


def _rule(equation: Any, operands: list[frozenset], *, cross_stops: bool) -> list[frozenset]:
    """The rule for `_jaxpr.dependencies`: only floating-point values pass sources on."""
    name = equation.primitive.name
    if name == "stop_gradient" and not cross_stops:
        outputs = [frozenset()] * len(equation.outvars)
    elif name in _CUSTOM:  # the derivative may be that of another function
        outputs = [frozenset().union(*operands)] * len(equation.outvars)
    else:
        outputs = _jaxpr.sources_through(equation, operands, functools.partial(_rule, cross_stops=cross_stops))
    return [
        sources if _trees.is_inexact(v.aval) else frozenset()
        for v, sources in zip(equation.outvars, outputs, strict=True)
    ]

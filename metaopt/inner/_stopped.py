"""`jax.lax.stop_gradient` in traced functions: removes it from a layer, or locates it in a model.

If a value that is stored for the next step has a stopped gradient, no first derivative changes, because the inner
gradient never reaches the stored value. But a hypergradient changes, because it differentiates through all steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from metaopt import _jaxpr

_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def _split_arrays(tree: Any) -> tuple[dict[int, Any], Callable[[dict[int, Any]], Any]]:
    """The arrays of a tree by leaf index, and a function that puts arrays back between the other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))}
    return arrays, lambda arrays: structure.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])


def without_stops(function: Callable) -> Callable:
    """Returns `function` with every `stop_gradient` removed: the same values, and the derivatives of all operations.

    Args:
      function: any function of arrays and static values that JAX can trace. Functions inside of it that define their
        own derivative (`jax.custom_jvp`, `jax.custom_vjp`) keep that derivative.

    Returns:
      A function of the same positional arguments.
    """

    def call(*args):
        arrays, join = _split_arrays(args)
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
      args: the argument, by name; leaves that are not arrays are static.

    Returns:
      Paths of the output and of the argument, such as `[("['mean']", "['params']['kernel']")]`.
    """
    arrays, join = _split_arrays(args)
    closed, shape = jax.make_jaxpr(lambda arrays: function(join(arrays)), return_shape=True)(arrays)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    sources = [frozenset([paths[i]] if _is_float(array) else ()) for i, array in arrays.items()]
    with_stops = _dependencies(closed.jaxpr, sources, cross_stops=False)
    without = _dependencies(closed.jaxpr, sources, cross_stops=True)
    outputs = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shape)]
    return [
        (output, source)
        for output, reachable, differentiable in zip(outputs, without, with_stops, strict=True)
        for source in sorted(reachable - differentiable)
    ]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _dependencies(jaxpr: Any, sources: Sequence[frozenset], *, cross_stops: bool) -> list[frozenset]:
    """For each output of a jaxpr, the union of the sources of the inputs on which it depends by real operations."""
    values: dict[Any, frozenset] = dict(zip(jaxpr.invars, sources, strict=True))
    read = lambda v: frozenset() if isinstance(v, core.Literal) else values.get(v, frozenset())
    for equation in jaxpr.eqns:
        if equation.primitive.name == "stop_gradient" and not cross_stops:
            continue
        outputs = _through(equation, [read(v) for v in equation.invars], cross_stops)
        values.update((v, output) for v, output in zip(equation.outvars, outputs, strict=True) if _is_float(v.aval))
    return [read(v) for v in jaxpr.outvars]


def _through(equation: Any, inputs: list[frozenset], cross_stops: bool) -> list[frozenset]:
    """The dependencies of the outputs of one operation, also through calls, checkpoints, branches and loops."""
    name, params = equation.primitive.name, equation.params
    inside = lambda inner, inputs: _dependencies(getattr(inner, "jaxpr", inner), inputs, cross_stops=cross_stops)
    if name == "cond":
        branches = [inside(branch, inputs[1:]) for branch in params["branches"]]
        return [frozenset().union(*outputs) for outputs in zip(*branches, strict=True)]
    if name == "while":
        start = params["cond_nconsts"]
        return _loop(lambda inputs: inside(params["body_jaxpr"], inputs), inputs[start:], params["body_nconsts"], None)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name == "scan":
        # Constants and carries have the same shapes as in the body; scanned inputs and outputs have one more axis.
        scanned = [v.aval.ndim > aval.ndim for v, aval in zip(equation.invars, inner.in_avals, strict=True)]
        stacked = [v.aval.ndim > aval.ndim for v, aval in zip(equation.outvars, inner.out_avals, strict=True)]
        num_carry = stacked.count(False)
        return _loop(lambda inputs: inside(inner, inputs), inputs, scanned.count(False) - num_carry, num_carry)
    if inner is None or name in _CUSTOM or len(getattr(inner, "jaxpr", inner).invars) != len(inputs):
        return [frozenset().union(*inputs)] * len(equation.outvars)
    return inside(inner, inputs)


def _loop(body: Callable, inputs: list[frozenset], num_consts: int, num_carry: int | None) -> list[frozenset]:
    """The dependencies of a loop's outputs: the body repeated until its carry depends on nothing new."""
    end = None if num_carry is None else num_consts + num_carry
    consts, carry, xs = inputs[:num_consts], inputs[num_consts:end], [] if end is None else inputs[end:]
    while True:
        outputs = body([*consts, *carry, *xs])
        new = [a | b for a, b in zip(carry, outputs[: len(carry)], strict=True)]
        if new == carry:
            return [*carry, *outputs[len(carry) :]]
        carry = new

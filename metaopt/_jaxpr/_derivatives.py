"""Which leaves a function uses, and derivatives that must not be taken."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval

from metaopt._trees import is_inexact


def used_leaves(function: Callable, hyperparams: Any, *args: Any) -> list[bool]:
    """Returns which leaves of λ `function(hyperparams, *args)` depends on, by dead-code elimination of its jaxpr.

    Args:
      function: any traceable function.
      hyperparams: λ.
      *args: its further arguments.

    Returns:
      One bool for each leaf of λ.
    """
    closed = jax.make_jaxpr(function)(hyperparams, *args)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return list(used[: len(jax.tree.leaves(hyperparams))])


def _raise(*operands: Any, message: str, **_: Any) -> Any:
    raise ValueError(message)


# The identity on a tangent. It raises as soon as its value, or the cotangent of its operand, is needed.
_refused = core.Primitive("refused_derivative")
_refused.def_impl(_raise)
_refused.def_abstract_eval(lambda tangent, *, message: tangent)
ad.deflinear2(_refused, _raise)
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _raise)


def refuse_derivative(outputs: Any, inputs: Any, message: str) -> Any:
    """Returns `outputs`, but raises if their derivative is requested.

    It raises for a derivative with respect to any value on which `inputs` or `outputs` depend.

    Use it instead of `jax.lax.stop_gradient` if the true derivative is not zero. Reverse mode raises at trace time,
    and only if a cotangent arrives here. Outputs that end in metrics, in auxiliary outputs or in a `stop_gradient`
    therefore stay usable within a differentiated function. Forward mode raises whenever the inputs have a tangent: at
    trace time, and under `jit` when the program is lowered. Works under jit, vmap, scan and checkpoint. Costs nothing
    at run time.

    Args:
      outputs: any tree of arrays; leaves without a derivative (integers, keys) stay as they are.
      inputs: the trees of arrays on which the outputs depend.
      message: the message of the `ValueError`.

    Returns:
      `outputs`.
    """
    leaves, structure = jax.tree.flatten(outputs)
    indices = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    moves = [leaf for leaf in jax.tree.leaves(inputs) if is_inexact(leaf)]

    @jax.custom_jvp
    def identity(outputs, inputs):
        return outputs

    def rule(primals, tangents):
        moving = [t for t in jax.tree.leaves(tangents) if type(t) is not SymbolicZero]
        if not moving:
            return primals[0], tangents[0]
        total = jnp.stack([jnp.real(t).astype(jnp.float32).sum() for t in moving]).sum()
        refused = lambda x: _refused.bind(jnp.broadcast_to(total.astype(x.dtype), x.shape), message=message)
        return primals[0], [refused(x) for x in primals[0]]

    identity.defjvp(rule, symbolic_zeros=True)
    for index, leaf in zip(indices, identity([leaves[i] for i in indices], moves), strict=True):
        leaves[index] = leaf
    return structure.unflatten(leaves)

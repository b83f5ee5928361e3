"""Makes new JAX primitives."""

from collections.abc import Callable
from typing import Any

from jax.extend import core
from jax.interpreters import ad, batching, mlir


def bilinear_primitive(
    name: str, lowered: Callable, *, abstract: Callable, transposes: tuple[Callable, Callable], batch: Callable
) -> Any:
    """Makes a primitive with two operands and one result that is linear in each operand.

    Args:
      name: its name in jaxprs.
      lowered: `(x, y, **params) -> result`: its computation, by JAX operations.
      abstract: `(x, y, **params) -> shape and type of the result`, all three abstract values of JAX.
      transposes: two functions `(cotangent, x, y, **params) -> cotangent`, of the first and of the second operand.
      batch: `(operands, axes, **params) -> (result, axis)`: its rule for `jax.vmap`.

    Returns:
      A primitive; `primitive.bind(x, y, **params)` applies it.
    """
    primitive = core.Primitive(name)
    primitive.def_impl(lowered)
    primitive.def_abstract_eval(abstract)
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))
    return primitive

"""Rewrites programs so that they compute in float64."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from metaopt._jaxpr import _walk
from metaopt._jaxpr._evaluate import evaluate, run_scan, run_while

# Operations whose implementation has fixed types: foreign code, kernels, and programs for several devices.
_FIXED = ("pure_callback", "io_callback", "debug_callback", "debug_print", "ffi_call", "pallas_call", "shard_map")
# Opaque operations that read the bits of a number, and the same functions for any type.
_OF_BITS = {"Frexp": jnp.frexp, "Ldexp": jnp.ldexp}
_INLINED = (*_walk.CALLS, "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call")


def in_float64(function: Callable, *args: Any) -> tuple[Callable, set[str]]:
    """Returns the same program with every narrower floating-point type replaced by float64 (complex by complex128).

    The function is traced in its own types, so integers and random bits stay the same. Casts between floating-point
    types disappear, and so do operations on which no output depends. The result can only be evaluated: differentiate
    the function before, not after.

    Args:
      function: any traceable function, such as an estimator's `estimate`.
      *args: its arguments, or their shapes and types; pytrees.

    Returns:
      A pair `(wide, narrow)`. `wide` is called like `function`, within `jax.enable_x64(True)`. `narrow` is filled when
      `wide` is traced; it names the operations that stay in their own type (callbacks, foreign kernels).

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import _jaxpr
    >>> third = lambda x: x.astype(jnp.float32) / 3
    >>> wide, narrow = _jaxpr.in_float64(third, 1.0)
    >>> with jax.enable_x64(True):
    ...     print(wide(1.0), narrow)
    0.3333333333333333 set()
    """
    # A new function object, since JAX would return the cached trace of an earlier call of the same object.
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    closed = closed.replace(jaxpr=live)
    narrow: set[str] = set()

    def replace(equation: Any) -> Callable:
        avals = [v.aval for v in equation.invars]
        return lambda *operands: _wide_outputs(equation, list(map(_widened, operands, avals)), wide_jaxpr, narrow)

    def wide_jaxpr(inner: Any) -> Callable:
        jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        avals = [v.aval for v in jaxpr.outvars]
        return lambda *operands: list(map(_widened, evaluate(jaxpr, consts, operands, replace), avals))

    def wide(*args):
        leaves = map(_widened, jax.tree.leaves(args), [v.aval for v in closed.jaxpr.invars])
        return jax.tree.unflatten(jax.tree.structure(shape), wide_jaxpr(closed)(*leaves))

    return wide, narrow


def _wide_type(dtype: Any) -> Any:
    """float64 or complex128 for a floating-point or complex type; any other type is returned as it is."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    return np.dtype(np.complex128) if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def _is_narrow(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and _wide_type(dtype) != dtype


def _widened(x: Any, aval: Any) -> Any:
    """A value of the traced program, in the wide type."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    return jnp.asarray(x, _wide_type(dtype))


def _wide_outputs(equation: Any, operands: list, wide_jaxpr: Callable, narrow: set[str]) -> Any:
    """The outputs of one operation on wide operands; control flow and nested calls become wide inside."""
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        return wide_jaxpr(_walk.called_jaxpr(equation))(*operands)
    if name == _walk.OPAQUE:
        of_bits = _OF_BITS.get(type(params["_prim"]).__name__)
        return jax.tree.leaves(of_bits(*operands)) if of_bits else wide_jaxpr(_walk.expanded(equation))(*operands)
    if name == "cond":
        index, *rest = operands
        return jax.lax.switch(index, [wide_jaxpr(branch) for branch in params["branches"]], *rest)
    if name == "scan":
        body = wide_jaxpr(params["jaxpr"])
        return run_scan(equation, operands, lambda _, *operands: (body(*operands), None), None)[0]
    if name == "while":
        return run_while(params, operands, wide_jaxpr(params["cond_jaxpr"]), wide_jaxpr(params["body_jaxpr"]))
    if name == "custom_linear_solve":
        lengths = params["const_lengths"]
        first = lengths.matvec + lengths.vecmat
        consts, rhs = operands[first : first + lengths.solve], operands[sum(lengths) :]
        return wide_jaxpr(params["jaxprs"].solve)(*consts, *rhs)
    if name == "reduce_precision" and params["mantissa_bits"] >= jnp.finfo(equation.invars[0].aval.dtype).nmant:
        return operands[0]  # `jax.checkpoint` rounds a value to the type that it already has
    return _wide_bind(equation, operands, wide_jaxpr, narrow)


def _wide_bind(equation: Any, operands: list, wide_jaxpr: Callable, narrow: set[str]) -> Any:
    """The outputs of one plain operation: wide if its code allows it, else computed in its own type."""
    primitive, params = equation.primitive, equation.params
    from_bits = primitive.name == "bitcast_convert_type"
    types = [_wide_type(v.aval.dtype) if hasattr(v.aval, "dtype") else None for v in equation.outvars]

    def bind(operands, params):
        outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
        return list(outputs) if primitive.multiple_results else [outputs]

    outputs = None
    if not from_bits and not equation.effects and primitive.name not in _FIXED:
        with contextlib.suppress(TypeError, ValueError, NotImplementedError):
            outputs = bind(operands, {k: _wide_param(p, wide_jaxpr) for k, p in params.items()})
    if outputs is None or any(t is not None and x.dtype != t for x, t in zip(outputs, types, strict=True)):
        own = [x.astype(v.aval.dtype) if _is_narrow(v) else x for x, v in zip(operands, equation.invars, strict=True)]
        outputs = [_widened(x, v.aval) for x, v in zip(bind(own, params), equation.outvars, strict=True)]
        # Random bits become numbers by a bit cast from integers, which loses nothing.
        if any(map(_is_narrow, equation.outvars if not from_bits else equation.invars)):
            narrow.add(f"{primitive.name}, which returns {', '.join(v.aval.str_short() for v in equation.outvars)}")
    return outputs if primitive.multiple_results else outputs[0]


def _wide_param(value: Any, wide_jaxpr: Callable) -> Any:
    """A parameter of an operation: types become wide, and so do programs, such as the sum in a scatter."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _wide_type(value)
    jaxpr = getattr(value, "jaxpr", value)
    if not isinstance(jaxpr, core.Jaxpr):
        return value
    avals: list[Any] = [v.aval for v in jaxpr.invars]
    inputs = [jax.ShapeDtypeStruct(a.shape, _wide_type(a.dtype)) for a in avals]
    closed = jax.make_jaxpr(wide_jaxpr(value))(*inputs)
    return closed if isinstance(value, type(closed)) else closed.jaxpr

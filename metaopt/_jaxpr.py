"""Traced functions: evaluates them with operations replaced, splits them in two, and finds their dependencies."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval

_CALLS = ("pjit", "jit", "closed_call")  # nested calls, for example of jnp functions
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
_DEAR = ("dot_general", "ragged_dot_general", "conv_general_dilated", "cpu_convolution", "cpu_depthwise")


def evaluate(jaxpr: Any, consts: Sequence, args: Sequence, replace: Callable[[Any], Callable | None]) -> list:
    """Returns the outputs of a jaxpr, with operations replaced.

    Operations inside nested calls, checkpoints, branches and loops are replaced, too. Functions that define their own
    derivative (`jax.custom_jvp`, `jax.custom_vjp`) stay as they are. So does every operation without a replacement
    inside.

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
        # The loop keeps its layout of operands.
        return jax.make_jaxpr(closed(inner))(*inner.in_avals)

    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        primitive, name, params = equation.primitive, equation.primitive.name, equation.params
        with _context(equation):
            replacement = replace(equation)
            if replacement is not None:
                outputs = replacement(*operands)
            elif not _holds(equation, replace):
                outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
            elif name in _CALLS:
                outputs = closed(params.get("jaxpr", params.get("call_jaxpr")))(*operands)
            elif name in _CHECKPOINTS:
                inner = lambda *operands, jaxpr=params["jaxpr"]: evaluate(jaxpr, (), operands, replace)
                outputs = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)
            elif name == "cond":
                index, *rest = operands
                outputs = jax.lax.switch(index, [closed(branch) for branch in params["branches"]], *rest)
            elif name == "scan":
                body = retraced(params["jaxpr"])
                if any(isinstance(const, Tracer) for const in body.consts):
                    run = closed(params["jaxpr"])
                    outputs, _ = _scan(equation, operands, lambda _, *operands, run=run: (run(*operands), None), None)
                else:
                    outputs = primitive.bind(*operands, **{**params, "jaxpr": body})
            elif name == "while":
                bodies = {which: retraced(params[which]) for which in ("cond_jaxpr", "body_jaxpr")}
                if any(isinstance(const, Tracer) for body in bodies.values() for const in body.consts):
                    outputs = _while(params, operands, *(closed(params[which]) for which in bodies))
                else:
                    outputs = primitive.bind(*operands, **{**params, **bodies})
            else:
                outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
        many = isinstance(outputs, list) or (primitive.multiple_results and replacement is None)
        values.update(zip(equation.outvars, outputs if many else [outputs], strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


# A replacement may use traced values from outside. The equation of a loop cannot hold them, so we build a new loop.


def _scan(equation: Any, operands: Sequence, run: Callable, given: Any) -> tuple[list, Any]:
    """Outputs and stacked values of a scan with the body `run(values of the step, *operands) -> (outputs, values)`."""
    params, body = equation.params, equation.params["jaxpr"]
    # Carries and constants have the same shapes as in the body; scanned inputs and outputs have one more axis.
    num_ys = sum(v.aval.ndim > a.ndim for v, a in zip(equation.outvars, body.out_avals, strict=True))
    num_xs = sum(v.aval.ndim > a.ndim for v, a in zip(equation.invars, body.in_avals, strict=True))
    num_carry, end = len(equation.outvars) - num_ys, len(operands) - num_xs
    fixed, carry, xs = operands[: end - num_carry], operands[end - num_carry : end], operands[end:]

    def step(carry, scanned):
        x, given = scanned
        outputs, values = run(given, *fixed, *carry, *x)
        return outputs[:num_carry], (outputs[num_carry:], values)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, values) = jax.lax.scan(step, list(carry), (list(xs), given), **options)
    return [*carry, *ys], values


def _while(params: Any, operands: Sequence, goes_on: Callable, run: Callable) -> list:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    condition = lambda carry: goes_on(*operands[:first], *carry)[0]
    return jax.lax.while_loop(condition, lambda carry: run(*operands[first:last], *carry), list(operands[last:]))


def exchange(
    jaxpr: Any, consts: Sequence, args: Sequence, replace: Callable[[Any], Callable | None], given: list | None = None
) -> tuple[list, list]:
    """Evaluates a jaxpr whose replaced operations also read and return a value, at any depth.

    The values form one flat list in program order. A value inside of a scan has the steps of the scan as its leading
    axis. Values of branches follow one another; those of a branch that is not taken are NaN.

    Args:
      jaxpr: the jaxpr of `jax.make_jaxpr`, without its constants.
      consts: its constants.
      args: its arguments.
      replace: `(equation) -> None`, or a function `(value, *operands) -> (output, value)` that replaces the operation.
        The operation must have one result. The value is a tree of floating-point arrays.
      given: the values to read, as this function returns them; with None each replaced operation gets None.

    Returns:
      The outputs, flat, and the list of values.

    Raises:
      ValueError: if a replaced operation is inside of an operation other than a call, a checkpoint, a branch or a scan.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    returned, used = [], 0
    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        num = _num_replaced(equation, replace)
        own = None if given is None else given[used : used + num]
        used += num
        with _context(equation):
            if num:
                outputs, new = _exchange_inside(equation, operands, replace, own)
                returned += new
            else:
                outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
                outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars], returned


def _num_replaced(equation: Any, replace: Callable) -> int:
    if replace(equation) is not None:
        return 1
    return sum(replace(inner) is not None for inner in equations_inside(equation))


def _exchange_inside(equation: Any, operands: list, replace: Callable, given: list | None) -> tuple[list, list]:
    """The outputs and the values of one equation that is replaced, or that contains replaced equations."""
    name, params, replacement = equation.primitive.name, equation.params, replace(equation)
    if replacement is not None:
        output, value = replacement(None if given is None else given[0], *operands)
        return [output], [value]
    closed = lambda inner: lambda given, *operands: exchange(inner.jaxpr, inner.consts, operands, replace, given)
    if name in _CALLS:
        return closed(params.get("jaxpr", params.get("call_jaxpr")))(given, *operands)
    if name in _CHECKPOINTS:
        inner = lambda given, *operands: exchange(params["jaxpr"], (), operands, replace, given)
        return jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(given, *operands)
    if name == "scan":
        return _scan(equation, operands, closed(params["jaxpr"]), given)
    if name == "cond":
        return _exchange_branches(operands, params["branches"], closed, replace, given)
    raise ValueError(f"The operation is inside of {name!r}, in which it cannot be replaced.")


def _exchange_branches(
    operands: list, branches: Sequence, closed: Callable, replace: Callable, given: list | None
) -> tuple[list, list]:
    index, *rest = operands
    nums = [sum(replace(e) is not None for e in equations(branch.jaxpr)) for branch in branches]
    ends = list(itertools.accumulate(nums))
    own = [None if given is None else given[end - num : end] for num, end in zip(nums, ends, strict=True)]
    runs = [lambda *rest, i=i: closed(branches[i])(own[i], *rest) for i in range(len(branches))]
    shapes = [jax.eval_shape(lambda *rest, run=run: run(*rest)[1], *rest) for run in runs]
    missing = lambda tree: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), tree)

    def padded(*rest, i):
        outputs, values = runs[i](*rest)
        return outputs, [values if j == i else missing(shapes[j]) for j in range(len(branches))]

    outputs, values = jax.lax.switch(index, [functools.partial(padded, i=i) for i in range(len(branches))], *rest)
    return outputs, [value for of_branch in values for value in of_branch]


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
    such results, regardless of its size. Operations before the first of them are cheap, and the other half repeats
    them. Nested calls are split, too. Loops, branches, checkpoints and functions that define their own derivative stay
    whole, in one half. Operations with an effect (`jax.debug.print`) are in the other half. Both halves can be
    differentiated as the function can.

    Args:
      function: any function that can be traced.
      args: its positional arguments, or their shapes and types; trees of arrays.
      moves: structured like `args`, one bool per leaf: whether the leaf moves (has many values).

    Returns:
      `Halves`, for arguments of these shapes.
    """
    # A new function, since JAX would return the trace of an earlier call.
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    inputs = [object() for _ in closed.jaxpr.invars]
    known: dict[Any, Any] = {}
    equations: list[tuple[Any, list, list]] = []
    outputs = _flattened(closed, inputs, known, equations)

    moving = {place for place, moved in zip(inputs, jax.tree.leaves(moves), strict=True) if moved}
    dear: dict[Any, Any] = {}  # place -> its shape and type
    wanted = []
    for equation, ins, outs in equations:
        if equation.effects or not moving.isdisjoint(ins):
            moving.update(outs)
            wanted += ins
        elif any(i in dear for i in ins) or _is_dear(equation):
            dear.update((place, v.aval) for place, v in zip(outs, equation.outvars, strict=True))
    kept = [place for place in dict.fromkeys([*wanted, *outputs]) if place in dear]

    def needed(places, given, *, effects):
        places, found = set(places) - set(given), []
        for step in reversed(equations):
            if step[0].effects and effects or not places.isdisjoint(step[2]):
                places |= set(step[1]) - set(given)
                found.append(step)
        return found[::-1]

    def run(steps, args, given=()):
        values = known | dict(zip(inputs, jax.tree.leaves(args), strict=True)) | dict(zip(kept, given, strict=False))
        for equation, ins, outs in steps:
            primitive, operands = equation.primitive, [values[i] for i in ins]
            with _context(equation):
                found = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
            values.update(zip(outs, found if primitive.multiple_results else [found], strict=True))
        return values

    def once(args):
        values = run(needed(kept, (), effects=False), args)
        return [values[place] for place in kept]

    def rest(args, given):
        values = run(needed(outputs, kept, effects=True), args, given)
        return jax.tree.unflatten(jax.tree.structure(shape), [values[place] for place in outputs])

    return Halves(once, rest, [jax.ShapeDtypeStruct(dear[place].shape, dear[place].dtype) for place in kept])


def _flattened(closed: Any, inputs: list, known: dict[Any, Any], equations: list) -> list:
    """Adds all equations, also of nested calls, with places of operands and results. Returns the outputs' places."""
    constants = [object() for _ in closed.consts]
    known.update(zip(constants, closed.consts, strict=True))
    places = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*constants, *inputs], strict=True))

    def place(v):
        if not isinstance(v, core.Literal):
            return places[v]
        literal = object()
        known[literal] = v.val
        return literal

    for equation in closed.jaxpr.eqns:
        ins, params = [place(v) for v in equation.invars], equation.params
        if equation.primitive.name in _CALLS:
            outs = _flattened(params.get("jaxpr", params.get("call_jaxpr")), ins, known, equations)
        else:
            outs = [object() for _ in equation.outvars]
            equations.append((equation, ins, outs))
        places.update(zip(equation.outvars, outs, strict=True))
    return [place(v) for v in closed.jaxpr.outvars]


def _is_dear(equation: Any) -> bool:
    named = lambda equation: equation.primitive.name in _DEAR
    return named(equation) or _holds(equation, named)


# Operations whose code fixes its types: foreign code, kernels, and programs for several devices.
_FIXED = ("pure_callback", "io_callback", "debug_callback", "debug_print", "ffi_call", "pallas_call", "shard_map")
_INLINED = (*_CALLS, "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call")


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
    # A new function, since JAX would return the trace of an earlier call.
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
        return wide_jaxpr(params.get("jaxpr", params.get("call_jaxpr")))(*operands)
    if name == "cond":
        index, *rest = operands
        return jax.lax.switch(index, [wide_jaxpr(branch) for branch in params["branches"]], *rest)
    if name == "scan":
        body = wide_jaxpr(params["jaxpr"])
        return _scan(equation, operands, lambda _, *operands: (body(*operands), None), None)[0]
    if name == "while":
        return _while(params, operands, wide_jaxpr(params["cond_jaxpr"]), wide_jaxpr(params["body_jaxpr"]))
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

    It raises for a derivative with respect to anything that moves `inputs` or `outputs`.

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
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    moves = [leaf for leaf in jax.tree.leaves(inputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

    @jax.custom_jvp
    def identity(outputs, inputs):
        return outputs

    def rule(primals, tangents):
        moving = [t for t in jax.tree.leaves(tangents) if type(t) is not SymbolicZero]
        if not moving:
            return primals[0], tangents[0]
        total = jnp.stack([jnp.real(t).astype(jnp.float32).sum() for t in moving]).sum()
        of_leaf = lambda x: _refused.bind(jnp.broadcast_to(total.astype(x.dtype), x.shape), message=message)
        return primals[0], [of_leaf(x) for x in primals[0]]

    identity.defjvp(rule, symbolic_zeros=True)
    for place, leaf in zip(places, identity([leaves[i] for i in places], moves), strict=True):
        leaves[place] = leaf
    return structure.unflatten(leaves)


@contextlib.contextmanager
def _context(equation: Any) -> Iterator[None]:
    """The context in which the equation was traced: settings, metadata, name scopes."""
    scope = str(equation.source_info.name_stack)
    with equation.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
        yield


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
    for value in equation.params.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(leaf, "jaxpr", leaf)  # a closed jaxpr holds an open one
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr


def _holds(equation: Any, wanted: Callable[[Any], Any]) -> bool:
    """Whether `wanted` holds for any operation inside of the equation."""
    return any(map(wanted, equations_inside(equation)))

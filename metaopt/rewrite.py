"""Traced functions: evaluate them with some of their operations replaced, cut them in two, find what they depend on."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core
from jax.interpreters import partial_eval

_CALLS = ("pjit", "jit", "closed_call")  # nested calls, of jnp functions among others
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
_DEAR = ("dot_general", "ragged_dot_general", "conv_general_dilated", "cpu_convolution", "cpu_depthwise")


def evaluate(jaxpr: Any, consts: Sequence, args: Sequence, replace: Callable[[Any], Callable | None]) -> list:
    """The outputs of a jaxpr, with operations replaced.

    Looks into nested calls, checkpoints, branches and loops. Functions with a derivative of their own
    (`jax.custom_jvp`, `jax.custom_vjp`) are left as they are, as is everything that holds nothing to be replaced.

    Args:
      jaxpr: of `jax.make_jaxpr`, with its constants apart.
      consts: its constants.
      args: what it is evaluated at.
      replace: `(equation) -> None`, or a function of its operands that takes its place.

    Returns:
      The outputs, flat. One that is a constant or an argument is handed back as it is, a Python scalar perhaps.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def closed(inner: Any) -> Callable:
        return lambda *operands: evaluate(inner.jaxpr, inner.consts, operands, replace)

    def retraced(inner: Any) -> Any:
        # The loop keeps its own layout of operands.
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
        many = primitive.multiple_results and replacement is None
        values.update(zip(equation.outvars, outputs if many else [outputs], strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


# A replacement may hold traced values of its own, which an equation of a loop cannot: the loop is then made anew.


def _scan(equation: Any, operands: Sequence, run: Callable, given: Any) -> tuple[list, Any]:
    """Outputs and stacked values of a scan whose body is `run(given of the step, *operands) -> (outputs, values)`."""
    params, body = equation.params, equation.params["jaxpr"]
    # Carries and constants are as the body has them; what is scanned has one more axis.
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
    """Evaluates a jaxpr whose replaced operations also read and return a value, wherever they are.

    The values form one flat list in program order. A value inside of a scan has the steps of the scan as its leading
    axis. Values of branches follow one another; those of a branch that is not taken are NaN.

    Args:
      jaxpr: of `jax.make_jaxpr`, with its constants apart.
      consts: its constants.
      args: its arguments.
      replace: `(equation) -> None`, or a function `(value, *operands) -> (output, value)` that takes its place. The
        output is that of an operation with one result; the value a tree of floating-point arrays.
      given: the values to read, as this function returns them; with None each replaced operation gets None.

    Returns:
      The outputs, flat, and the list of values.

    Raises:
      ValueError: a replaced operation is inside of something else than a call, a checkpoint, a branch or a scan.
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
    """The outputs of one equation that is replaced, or holds equations that are, and their values."""
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
    """A function in two: `function(*args) = rest(args, once(args))`.

    Attributes:
      once: `(args) -> kept`, a list of arrays.
      rest: `(args, kept) -> outputs`.
      kept: shapes and types of what `once` returns; empty where there is nothing to be gained.
    """

    once: Callable[[Any], list]
    rest: Callable[[Any, Sequence], Any]
    kept: list[jax.ShapeDtypeStruct]


def split(function: Callable, args: Any, moves: Any) -> Halves:
    """What of a function is dear and the same for all values of its moving arguments, apart from the rest.

    Dear are matrix products and convolutions, whatever holds one inside, and what is computed from them, however wide
    it is; what comes before the first of them is cheap, and is done again by the rest. Nested calls are looked into;
    loops, branches, checkpoints and functions with a derivative of their own go to one side as a whole, and what has an
    effect (`jax.debug.print`) goes to the rest. Both halves can be differentiated as the function can.

    Args:
      function: any that can be traced.
      args: its positional arguments, or what they look like; trees of arrays.
      moves: like `args`, a bool for each leaf: whether it moves.

    Returns:
      `Halves`, for arguments of these shapes.
    """
    # A new function: of one that was traced before, JAX has what it computed then.
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    inputs = [object() for _ in closed.jaxpr.invars]
    known: dict[Any, Any] = {}
    equations: list[tuple[Any, list, list]] = []
    outputs = _flattened(closed, inputs, known, equations)

    moving = {place for place, moved in zip(inputs, jax.tree.leaves(moves), strict=True) if moved}
    dear: dict[Any, Any] = {}  # place -> what it looks like
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
    """Adds all equations, those of nested calls among them, with the places of operands and results; the outputs'."""
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


def used_leaves(function: Callable, hyperparams: Any, *args: Any) -> list[bool]:
    """Which leaves of λ `function(hyperparams, *args)` depends on, by dead-code elimination of its jaxpr.

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


@contextlib.contextmanager
def _context(equation: Any) -> Iterator[None]:
    """What the equation was traced under: settings, metadata, name scopes."""
    scope = str(equation.source_info.name_stack)
    with equation.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
        yield


def equations(jaxpr: Any) -> Iterator[Any]:
    """The operations of a jaxpr, each followed by those inside of it.

    Args:
      jaxpr: a `jax.core.Jaxpr`.

    Returns:
      An iterator over equations.
    """
    for equation in jaxpr.eqns:
        yield equation
        yield from equations_inside(equation)


def equations_inside(equation: Any) -> Iterator[Any]:
    """The operations inside of one, of a loop's body, say.

    Args:
      equation: an equation of a `jax.core.Jaxpr`.

    Returns:
      An iterator over equations.
    """
    for jaxpr in inner_jaxprs(equation):
        yield from equations(jaxpr)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an operation holds: the body of a loop, the branches of a condition, what a call computes.

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
    """Whether anything inside is wanted."""
    return any(map(wanted, equations_inside(equation)))

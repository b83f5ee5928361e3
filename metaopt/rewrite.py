"""Traced functions: evaluated with some of their operations replaced, wherever they are; cut in two; asked what they
depend on."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval

_CALLS = ("pjit", "jit", "closed_call")  # nested calls, of jnp functions among others
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
            elif name in ("checkpoint", "remat", "remat2"):
                inner = lambda *operands, jaxpr=params["jaxpr"]: evaluate(jaxpr, (), operands, replace)
                outputs = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)
            elif name == "cond":
                index, *rest = operands
                outputs = jax.lax.switch(index, [closed(branch) for branch in params["branches"]], *rest)
            elif name == "scan":
                body = retraced(params["jaxpr"])
                if any(isinstance(const, Tracer) for const in body.consts):
                    outputs = _scan(equation, operands, closed(params["jaxpr"]))
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


def _scan(equation: Any, operands: Sequence, run: Callable) -> list:
    params, body = equation.params, equation.params["jaxpr"]
    # Carries and constants are as the body has them; what is scanned has one more axis.
    num_ys = sum(v.aval.ndim > a.ndim for v, a in zip(equation.outvars, body.out_avals, strict=True))
    num_xs = sum(v.aval.ndim > a.ndim for v, a in zip(equation.invars, body.in_avals, strict=True))
    num_carry, end = len(equation.outvars) - num_ys, len(operands) - num_xs
    fixed, carry, xs = operands[: end - num_carry], operands[end - num_carry : end], operands[end:]

    def step(carry, x):
        outputs = run(*fixed, *carry, *x)
        return outputs[:num_carry], outputs[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(step, list(carry), list(xs), **options)
    return [*carry, *ys]


def _while(params: Any, operands: Sequence, goes_on: Callable, run: Callable) -> list:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    condition = lambda carry: goes_on(*operands[:first], *carry)[0]
    return jax.lax.while_loop(condition, lambda carry: run(*operands[first:last], *carry), list(operands[last:]))


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


def _raise(*operands: Any, message: str, **_: Any) -> Any:
    raise ValueError(message)


# The identity on a tangent. It raises as soon as someone needs its value, or the cotangent of its operand.
_refused = core.Primitive("refused_derivative")
_refused.def_impl(_raise)
_refused.def_abstract_eval(lambda tangent, *, message: tangent)
ad.deflinear2(_refused, _raise)
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _raise)


def refuse_derivative(outputs: Any, inputs: Any, message: str) -> Any:
    """`outputs`; raises if someone asks for their derivative with regard to anything that moves `inputs` or them.

    Use it instead of `jax.lax.stop_gradient` where the true derivative is not zero. Reverse mode raises at trace time,
    and only if a cotangent arrives here: outputs that end in metrics, in auxiliary outputs or in a `stop_gradient` stay
    usable within a differentiated function. Forward mode raises whenever the inputs have a tangent: at trace time, and
    under `jit` when the program is lowered. Works under jit, vmap, scan and checkpoint. Costs nothing at run time.

    Args:
      outputs: any tree of arrays; leaves without a derivative (integers, keys) stay as they are.
      inputs: the trees of arrays that the outputs depend on.
      message: of the `ValueError`.

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
      equation: of a `jax.core.Jaxpr`.

    Returns:
      An iterator over equations.
    """
    for value in equation.params.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(leaf, "jaxpr", leaf)  # of a closed one
            if isinstance(jaxpr, core.Jaxpr):
                yield from equations(jaxpr)


def _holds(equation: Any, wanted: Callable[[Any], Any]) -> bool:
    """Whether anything inside is wanted."""
    return any(map(wanted, equations_inside(equation)))

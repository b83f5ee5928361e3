"""Traced functions: evaluated with some of their operations replaced, wherever they are; asked what they depend on."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


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
            elif name in ("pjit", "jit", "closed_call"):  # nested calls of jnp functions
                outputs = closed(params.get("jaxpr", params.get("call_jaxpr")))(*operands)
            elif name in ("checkpoint", "remat", "remat2"):
                inner = lambda *operands, jaxpr=params["jaxpr"]: evaluate(jaxpr, (), operands, replace)
                outputs = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)
            elif name == "cond":
                index, *rest = operands
                outputs = jax.lax.switch(index, [closed(branch) for branch in params["branches"]], *rest)
            elif name == "scan":
                outputs = primitive.bind(*operands, **{**params, "jaxpr": retraced(params["jaxpr"])})
            elif name == "while":
                bodies = {which: retraced(params[which]) for which in ("cond_jaxpr", "body_jaxpr")}
                outputs = primitive.bind(*operands, **{**params, **bodies})
            else:
                outputs = primitive.bind(*operands, **primitive.get_bind_params(params))
        many = primitive.multiple_results and replacement is None
        values.update(zip(equation.outvars, outputs if many else [outputs], strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


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


def _holds(equation: Any, replace: Callable[[Any], Callable | None]) -> bool:
    """Whether anything inside is to be replaced."""
    for value in equation.params.values():
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(leaf, "jaxpr", leaf)  # of a closed one
            if isinstance(jaxpr, core.Jaxpr) and any(replace(e) or _holds(e, replace) for e in jaxpr.eqns):
                return True
    return False

"""One implicit solve of K products, and the mixed product of example weights."""

import argparse
from collections.abc import Callable

import cases
import jax
import jax.numpy as jnp
from rules_programs import train_by_hand
from rules_rows import TOLERANCE, Row, number, peers
from timing import compiled, relative_error, temporary_mib
from turns import medians

from metaopt import base, hypergrad, inner

IMPLICIT = """\
## One implicit solve: K products with the Hessian of the MLP

λ is the penalty of each layer, and the penalty is so large that the Hessian is positive. One step of Adam, then K steps
of conjugate gradients, the mixed product and the outer gradient. "operations" count the body of the solver's loop once.

"""
WEIGHTS = """\
## Example weights: the mixed product, in forward passes of the MLP

(∂²ℓ/∂λ∂θ)ᵀ v with a weight for each of the batch's examples; the bar is 3.2.

"""
GRADIENT, FORWARD = "gradient of the inner loss", "forward pass of the examples' losses"
CURVATURE = 1.0  # the penalty, so that conjugate gradients have a minimum


def solve_by_hand(case: cases.Case, num_products: int) -> Callable:
    """Returns (λ, task) -> (F, dF/dλ): a step of Adam, then conjugate gradients, linearized once."""

    def program(hyperparams, task):
        order = task.train["order"]
        params = train_by_hand(case, hyperparams, task, order[:1], "none")
        batch = jax.tree.map(lambda x: x[order[1]], task.train["rows"])

        def gradient(params, decay):
            return jax.grad(lambda p: case.loss(p, batch) + cases.penalty(p, decay))(params)

        value, slope = jax.value_and_grad(case.loss)(params, task.valid)
        _, product = jax.linearize(lambda p: gradient(p, hyperparams["decay"]), params)
        v, _ = jax.scipy.sparse.linalg.cg(product, slope, tol=0, maxiter=num_products)
        _, mixed = jax.vjp(lambda decay: gradient(params, decay), hyperparams["decay"])
        return value, {"decay": jax.tree.map(jnp.negative, mixed(v)[0])}

    return program


def solve(case: cases.Case, num_products: int) -> Callable:
    """Does the same by metaopt."""
    rate = case.hyperparams["rate"]
    problem = base.reparametrized(cases.problem_of(case), lambda hp, step: {"rate": rate, **hp})
    # The first product is for the initial guess.
    solver = hypergrad.cg(num_steps=num_products, tol=0)
    estimator = hypergrad.implicit(problem, num_steps=1, solver=solver, warm_start=False)

    def program(hyperparams, task):
        hyperparams = {"decay": hyperparams["decay"]}
        state = estimator.init(jax.random.key(0), hyperparams, task)
        result, _ = estimator.estimate(hyperparams, task, state)
        return result.value, result.hypergrad

    return program


def implicit_rows(case: cases.Case, num_products: int, options: argparse.Namespace) -> tuple[list[list[str]], list]:
    """Returns the printed rows of one number of products, and the rows that disagree."""
    case = case._replace(hyperparams={**case.hyperparams, "decay": dict.fromkeys(case.params, CURVATURE)})
    hyperparams, task = jax.tree.map(jnp.asarray, case.hyperparams), cases.task_of(case, 2)

    def gradient(hyperparams, task):
        batch = jax.tree.map(lambda x: x[task.train["order"][0]], task.train["rows"])
        return jax.grad(lambda p: case.loss(p, batch) + cases.penalty(p, hyperparams["decay"]))(task.train["params"])

    functions = {
        GRADIENT: gradient,
        "by hand: cg": solve_by_hand(case, num_products),
        "implicit, cg": solve(case, num_products),
    }
    return side_by_side(
        str(num_products),
        functions,
        (hyperparams, task),
        options,
        lambda expected: peers(case, 2, options, expected, num_products)[0] if options.peers else [],
    )


def weights_rows(case: cases.Case, options: argparse.Namespace) -> tuple[list[list[str]], list]:
    """Measures the mixed product (∂²ℓ/∂λ∂θ)ᵀ v, in forward passes. λ is a weight for each example."""

    def losses(params, batch):
        return jax.vmap(lambda row: case.loss(params, jax.tree.map(lambda x: x[None], row)))(batch)

    weighted = inner.weighted(losses, lambda hyperparams, batch: jax.nn.sigmoid(hyperparams))
    batch = jax.tree.map(lambda x: jnp.asarray(x[: case.batch_size]), case.train)
    params = jax.tree.map(jnp.asarray, case.params)
    along = jax.tree.map(lambda x: jnp.cos(3 * x), params)
    hyperparams = jnp.linspace(-1.0, 1.0, case.batch_size)

    def by_metaopt(hyperparams, params):
        gradient = lambda hyperparams: jax.grad(weighted)(params, hyperparams, batch)
        return None, jax.vjp(gradient, hyperparams)[1](along)[0]

    def by_hand(hyperparams, params):
        slopes = jax.jvp(lambda params: losses(params, batch), (params,), (along,))[1]
        return None, slopes * jax.grad(lambda hp: jax.nn.sigmoid(hp).sum())(hyperparams) / case.batch_size

    functions = {
        FORWARD: lambda hyperparams, params: losses(params, batch),
        "gradient": lambda hyperparams, params: jax.grad(weighted)(params, hyperparams, batch),
        "by hand: forward mode": by_hand,
        "mixed product, `inner.weighted`": by_metaopt,
    }
    return side_by_side("", functions, (hyperparams, params), options)


def side_by_side(
    label: str,
    functions: dict[str, Callable],
    arguments: tuple,
    options: argparse.Namespace,
    others: Callable | None = None,
) -> tuple[list[list[str]], list]:
    """Compares functions.

    Times are relative to the first function. The results of the others must agree with those of the function whose name
    begins with "by hand".
    """
    unit, hand = next(iter(functions)), next(name for name in functions if name.startswith("by hand"))
    programs = {name: compiled(function, *arguments)[0] for name, function in functions.items()}
    calls = {n: lambda p=p: jax.block_until_ready(p(*arguments)) for n, p in programs.items()}
    seconds = medians(calls, options.repetitions, options.seconds, options.clock)
    operations = {name: hypergrad.flops(function, *arguments) for name, function in functions.items()}
    expected = jax.device_get(calls[hand]())[1]
    rows = []
    for name in functions:
        result = jax.device_get(calls[name]()) if name not in (unit, "gradient") else None
        rows.append(
            Row(
                name,
                1e3 * seconds[name],
                unit,
                operations=operations[name] / operations[unit],
                by_hand=hand if result is not None and name != hand else None,
                mib=temporary_mib(programs[name]),
                error=None if result is None else relative_error(result[1], expected),
            )
        )
    rows += others(expected) if others else []
    printed = []
    for row in rows:
        ratio = row.ms / (1e3 * seconds[unit])
        against_hand = row.ms / (1e3 * seconds[hand]) if row.by_hand or row.operations is None else float("nan")
        printed.append(
            [
                label,
                row.name + (f" ({row.reason})" if row.reason else ""),
                number(row.ms, 2),
                number(ratio, 2),
                number(row.operations, 2),
                number(against_hand, 2),
                number(row.mib, 2),
                "" if row.error is None else f"{row.error:.0e}",
            ]
        )
    return printed, [f"{label} {row.name}: {row.error:.1e}" for row in rows if row.error and not row.error <= TOLERANCE]

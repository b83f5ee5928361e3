"""What every hypergradient rule costs, beside plain training, hand-written JAX and other libraries.

Three models with Adam (`cases.py`), over numbers of inner steps T; λ is the learning rate and an L2 penalty for each
layer. Of every rule: time over that of plain training; the floor that counting forward passes gives; time over that of
a scan written by hand, with the same checkpoints; temporary memory as the compiler states it; and how far the
hypergradient is from that of the hand-written scan. The run fails where that is more than 1e-3.

    python experiments/benchmarks/rules.py                 # writes experiments/results/rules.md
    python experiments/benchmarks/rules.py --peers PYTHON  # other libraries too: install_peers.sh makes that PYTHON
    python experiments/benchmarks/rules.py --smoke         # seconds; prints only

`taskset -c 0 python ...` keeps all of them, XLA and torch, on one thread.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from timing import circumstances, compiled, num_cores, table, temporary_mib
from turns import medians

from metaopt import base, hypergrad, inner

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "rules.md"
TOLERANCE = 1e-3  # of hypergradients, in float32
# Exact reverse mode by counting forward passes, in units of plain training: nothing recomputed, one level, two.
FLOORS = {"none": 2.75, "step": 3.7, "sqrt": 4.7}
PLAIN, LAYERWISE = "plain training", "each layer recomputed"
FULL = [
    (cases.mlp(), (1, 4, 64, 1024)),
    (cases.conv(), (1, 4, 64, 256)),
    (cases.transformer(), (1, 4)),
    (cases.transformer(layers=2, width=64, batch_size=8), (16, 64)),
]
SMOKE = [(cases.mlp(width=8, batch_size=8), (4,))]
INTRO = """\
Adam, float32, {threads} thread(s) for every program; medians of {repetitions} calls in turns, or fewer, at least 3, \
where they take long. λ: the learning rate and an L2 penalty for each layer. At these sizes matrix products dominate; \
with 64 rows a step elementwise work and memory traffic do, and all ratios to plain training are larger.

- "/ plain": time over plain training, of the same library and with the same recomputation within the loss.
- "floor": forward passes counted, in units of plain training, and whether the time is within 15 % of it.
- "/ by hand": time over the hand-written scan with the same checkpoints. "/ metaopt": time over "mixed, step".
- "MiB": temporary memory; of torch, the most that its allocator held above the start. "/ naive": over "reverse, none".
- "error": the largest relative error of a leaf of the hypergradient against "by hand: step"; {agree} below {tol:g}."""
HEADER = ["T", "rule", "ms", "/ plain", "floor", "/ by hand", "/ metaopt", "MiB", "/ naive", "error", "compile s"]


class Rule(NamedTuple):
    make: Callable  # (problem, num_steps=T) -> Estimator
    floor: float  # time over plain training
    by_hand: str | None = None  # checkpoints of the hand-written scan that it is compared with
    few: bool = False  # λ is the rate and one penalty for all layers
    layerwise: bool = False  # the loss recomputes its layers


def forward(problem: base.Problem, *, num_steps: int) -> base.Estimator:
    """Forward mode through `unroll`, with one tangent for every number in λ."""
    solve = hypergrad.unroll(problem.loop, num_steps=num_steps)

    def estimate(hyperparams, task, key):
        flat, unravel = ravel_pytree(hyperparams)

        def objective(flat):
            hyperparams = unravel(flat)
            state = solve(key, hyperparams, task.train)
            context = problem.loop.context(state)
            return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, context)

        along = jax.vmap(lambda tangent: jax.jvp(objective, (flat,), (tangent,)), out_axes=(None, 0))
        value, slopes = along(jnp.eye(flat.size))
        return base.Estimate(value, unravel(slopes), jnp.array(True), {}), key

    return base.Estimator(lambda key, hyperparams, task: key, estimate, kind="exact")


def unrolled(remat: str, grad: Callable, **kwargs) -> Rule:
    return Rule(partial(hypergrad.unrolled, remat=remat, grad=grad), FLOORS[remat], remat, **kwargs)


RULES = {
    **{f"reverse, {remat}": unrolled(remat, jax.grad) for remat in FLOORS},
    **{f"mixed, {remat}": unrolled(remat, hypergrad.mixed_grad) for remat in FLOORS},
    f"mixed, step, {LAYERWISE}": unrolled("step", hypergrad.mixed_grad, layerwise=True),
    "forward, two λ": Rule(forward, floor=1 + 1.75 * 2, few=True),
}
NAIVE, RECOMMENDED = "reverse, none", "mixed, step"  # as the report's text says
SMOKE_PROGRAMS = (PLAIN, "by hand: step", NAIVE, RECOMMENDED, "forward, two λ")


def by_hand(case: cases.Case, num_steps: int, remat: str) -> Callable:
    """(λ, task) -> F(λ): Adam in a scan, as one writes it without metaopt, with a square root that is safe at zero."""

    def objective(hyperparams, task):
        def loss(params, batch):
            return case.loss(params, batch) + cases.penalty(params, hyperparams["decay"])

        def step(carry, rows):
            params, mu, nu, count = carry
            grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], task.train["rows"]))
            count = count + 1
            mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
            nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g**2, nu, grads)

            def move(param, m, n):
                n = n / (1 - 0.999**count)
                root = jnp.where(n > 0, jnp.sqrt(jnp.where(n > 0, n, 1)), 0)
                return param - hyperparams["rate"] * (m / (1 - 0.9**count)) / (root + cases.EPS)

            return (jax.tree.map(move, params, mu, nu), mu, nu, count), None

        order, body = task.train["order"], step
        if remat != "none":
            body = jax.checkpoint(step, prevent_cse=False)
        if remat == "sqrt":
            checkpointed_step, root = body, round(num_steps**0.5)
            order = order.reshape(root, root, -1)
            body = jax.checkpoint(lambda carry, rows: jax.lax.scan(checkpointed_step, carry, rows), prevent_cse=False)
        params = task.train["params"]
        zeros = jax.tree.map(jnp.zeros_like, params)
        (params, *_), _ = jax.lax.scan(body, (params, zeros, zeros, jnp.zeros([])), order)
        return case.loss(params, task.valid)

    return objective


def plain(problem: base.Problem, num_steps: int) -> Callable:
    """(λ, task) -> F(λ), by metaopt without derivatives."""
    train = inner.run(problem.loop, num_steps)

    def program(hyperparams, task):
        state = train(jax.random.key(0), hyperparams, task.train)
        return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, problem.loop.context(state))

    return program


def estimate(rule: Rule, case: cases.Case, num_steps: int) -> Callable:
    """(λ, task) -> (F, dF/dλ), by a rule."""
    estimator = rule.make(cases.problem_of(case, rule.layerwise), num_steps=num_steps)

    def program(hyperparams, task):
        if rule.few:
            hyperparams = jax.tree.map(jnp.asarray, cases.FEW)  # the same point
        state = estimator.init(jax.random.key(0), hyperparams, task)
        found, _ = estimator.estimate(hyperparams, task, state)
        return found.value, found.hypergrad

    return program


def error(found: dict, expected: dict) -> float:
    """The largest relative error of a leaf of the hypergradient."""
    if not isinstance(found["decay"], dict):  # one penalty for all: the sum of theirs
        expected = {**expected, "decay": sum(np.sum(leaf) for leaf in expected["decay"].values())}
    relative = jax.tree.map(lambda a, b: np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b), found, expected)
    return float(np.max(jax.tree.leaves(relative)))  # NaN where there is one


class Row(NamedTuple):
    name: str
    ms: float = float("nan")
    against: str = PLAIN  # whose time it is compared with
    floor: float | None = None
    by_hand: str | None = None
    mib: float = float("nan")
    error: float | None = None
    compile_seconds: float = float("nan")
    reason: str = ""  # why there are no numbers


def ours(case: cases.Case, num_steps: int, options: argparse.Namespace) -> tuple[list[Row], dict]:
    """Rows of metaopt and of hand-written JAX, and the hypergradient by the latter."""
    hands = [remat for remat in FLOORS if remat != "sqrt" or round(num_steps**0.5) ** 2 == num_steps]
    rules = {name: rule for name, rule in RULES.items() if case.layerwise or not rule.layerwise}
    functions = {PLAIN: plain(cases.problem_of(case), num_steps)}
    if case.layerwise:
        functions[f"{PLAIN}, {LAYERWISE}"] = plain(cases.problem_of(case, layerwise=True), num_steps)
    functions[f"by hand: {PLAIN}"] = by_hand(case, num_steps, "none")
    functions |= {f"by hand: {remat}": jax.value_and_grad(by_hand(case, num_steps, remat)) for remat in hands}
    functions |= {name: estimate(rule, case, num_steps) for name, rule in rules.items()}
    if options.smoke:
        functions = {name: functions[name] for name in SMOKE_PROGRAMS}

    hyperparams, task = jax.tree.map(jnp.asarray, case.hyperparams), cases.task_of(case, num_steps)
    programs = {name: compiled(function, hyperparams, task) for name, function in functions.items()}
    mib = {name: temporary_mib(program) for name, (program, _) in programs.items()}
    fits = {name: program for name, (program, _) in programs.items() if mib[name] <= options.mib}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(hyperparams, task))
        for name, program in fits.items()
    }
    seconds = medians(calls, options.repetitions, options.seconds)
    found = {name: jax.device_get(call()) for name, call in calls.items()}
    expected = found["by hand: step"][1]

    rows = []
    for name, (_, compile_seconds) in programs.items():
        rule = rules.get(name)
        is_hypergradient = name in found and isinstance(found[name], tuple)
        rows.append(
            Row(
                name,
                1e3 * seconds[name] if name in seconds else float("nan"),
                f"{PLAIN}, {LAYERWISE}" if LAYERWISE in name else PLAIN,
                rule.floor if rule else None,
                f"by hand: {rule.by_hand}" if rule and not rule.layerwise else None,
                mib[name],
                error(found[name][1], expected) if is_hypergradient else None,
                compile_seconds,
                "" if name in fits else f"not run: above {options.mib} MiB",
            )
        )
    return rows, expected


def peers(case: cases.Case, num_steps: int, options: argparse.Namespace, expected: dict) -> tuple[list[Row], str]:
    """Rows of other libraries, from their own environment, and its versions."""
    task = cases.task_of(case, num_steps)
    trees = {"params": case.params, "train": case.train, "valid": case.valid, "decay": case.hyperparams["decay"]}
    arrays = {f"{tree}/{name}": leaf for tree, leaves in trees.items() for name, leaf in leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        np.savez(file, order=task.train["order"], rate=case.hyperparams["rate"], eps=cases.EPS, **arrays)
        command = [options.peers, str(HERE / "peers.py"), case.name.rstrip("0123456789"), str(file)]
        command += [str(num_cores()), str(options.repetitions), str(options.seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        return [Row("other libraries", reason=f"failed, exit {done.returncode}: {last_line}")], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for row in answer["rows"]:
        found = row.pop("hypergrad", None)
        found = jax.tree.map(np.asarray, found, is_leaf=lambda x: isinstance(x, list))
        rows.append(Row(**row, error=error(found, expected) if found else None))
    return rows, answer["versions"]


def lines(num_steps: int, rows: list[Row]) -> list[list[str]]:
    """What is printed of the rows of one T."""
    ms, mib = {row.name: row.ms for row in rows}, {row.name: row.mib for row in rows}

    def number(value, digits):
        return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"

    printed = []
    for row in rows:
        ratio = row.ms / ms.get(row.against, float("nan"))
        floor = "" if row.floor is None else f"{row.floor:g}"
        if floor and ratio == ratio:
            floor += " reached" if ratio <= 1.15 * row.floor else " no"
        printed.append(
            [
                str(num_steps),
                row.name + (f" ({row.reason})" if row.reason else ""),
                number(row.ms, 1),
                number(ratio, 2),
                floor,
                number(row.ms / ms[row.by_hand], 2) if row.by_hand in ms else "",
                "" if row.name in RULES or row.error is None else number(row.ms / ms[RECOMMENDED], 2),
                number(row.mib, 2),
                number(row.mib / mib[NAIVE], 3),
                "" if row.error is None else f"{row.error:.0e}",
                number(row.compile_seconds, 1),
            ]
        )
    return printed


def report(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Runs everything; the report in Markdown, and which rows disagree with the hand-written scan."""
    parts, wrong, versions = [], [], ""
    for case, steps in SMOKE if options.smoke else FULL:
        if options.problems and case.name not in options.problems:
            continue
        printed = []
        for num_steps in options.num_steps or steps:
            rows, expected = ours(case, num_steps, options)
            if options.peers and num_steps <= options.peer_steps:
                others, versions = peers(case, num_steps, options, expected)
                rows += others
            printed += lines(num_steps, rows)
            print(table(HEADER, printed[-len(rows) :]), file=sys.stderr)  # to look at meanwhile
            # A NaN is no agreement.
            off = [row for row in rows if row.error is not None and not row.error <= TOLERANCE]
            wrong += [f"{case.name}, T={num_steps}, {row.name}: {row.error:.1e}" for row in off]
        parts.append(f"## {case.text[0].upper()}{case.text[1:]}\n\n{table(HEADER, printed)}")
    intro = INTRO.format(
        threads=num_cores(), repetitions=options.repetitions, agree="all" if not wrong else "NOT all", tol=TOLERANCE
    )
    end = circumstances(f"python experiments/benchmarks/rules.py{options.flags}")
    return "\n\n".join([intro, *parts, end + (f" Peers: {versions}." if versions else "")]), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument(
        "--problems", nargs="+", help=f"some of {', '.join(case.name for case, _ in FULL)}; prints only"
    )
    parser.add_argument("--num-steps", nargs="+", type=int, help="T instead of the usual ones; prints only")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment that install_peers.sh made")
    parser.add_argument("--peer-steps", type=int, default=256, help="the largest T for other libraries")
    parser.add_argument("--repetitions", type=int, default=9, help="of every measurement, where seconds allow")
    parser.add_argument("--seconds", type=float, default=60, help="after which no fourth turn begins, for each T")
    parser.add_argument("--mib", type=int, default=8192, help="programs with more temporary memory are not run")
    options = parser.parse_args()
    if options.smoke:
        options.repetitions = 1
    # The interpreter's place is its own business.
    options.flags = " --peers PYTHON" if options.peers else ""
    text, wrong = report(options)
    print(text)
    if not (options.smoke or options.problems or options.num_steps):
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(f"# What every rule costs\n\n{text}\n")
    if wrong:
        sys.exit("\n".join(["Hypergradients disagree:", *wrong]))


if __name__ == "__main__":
    main()

"""The cost of every hypergradient rule, compared with plain training, hand-written JAX and other libraries.

There are three models with Adam (`cases.py`), for several numbers of inner steps T. λ is the learning rate and an L2
penalty for each layer. The report has for every rule:

- the time divided by that of plain training, and its floor from counting forward passes;
- the operations divided by those of plain training;
- the time divided by that of a scan written by hand, with the same checkpoints;
- the temporary memory, as stated by the compiler;
- the error of the hypergradient against that of the hand-written scan.

The run fails if an error is above 1e-3. Two further tables, for the MLP, have the costs of an implicit solve of K
products, and of the mixed product of example weights.

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
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
from timing import circumstances, compiled, num_cores, table, temporary_mib
from turns import medians

from experiments import pages
from metaopt import base, hypergrad, inner

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "rules.md"
TOLERANCE = 1e-3  # of hypergradients, in float32
# Floors of exact reverse mode by counting forward passes, in units of plain training: without recomputation, one level,
# two levels.
FLOORS = {"none": 2.75, "step": 3.7, "sqrt": 4.7}
LONG = 256  # from this T on, conv nets and transformers run fewer rules
PLAIN, LAYERWISE = "plain training", "each layer recomputed"
FULL = [
    (cases.mlp(), (1, 4, 64)),
    (cases.mlp(rate=1e-5), (1024,)),  # at the usual rate, float32 training is chaotic at this T
    (cases.conv(), (1, 4, 64)),
    (cases.transformer(), (1, 4)),
    (cases.transformer(layers=2, width=64, batch_size=8), (16, 64)),
    # Smaller batches, which take less time, and small rates.
    (cases.conv(batch_size=16, rate=1e-6)._replace(name="conv-long"), (256, 1024)),
    (cases.transformer(2, 64, batch_size=2, rate=1e-5)._replace(name="transformer-long"), (256, 1024)),
]
SMOKE = [(cases.mlp(width=8, batch_size=8), (4,))]
INTRO = """\
Adam, float32, {threads} thread(s) for every program; medians of {repetitions} calls in turns, or fewer, at least 3, \
where they take long. λ: the learning rate and an L2 penalty for each layer. At these sizes matrix products dominate; \
with 64 rows a step elementwise work and memory traffic do, and all ratios to plain training are larger.

- "/ plain": time over plain training, of the same library and with the same recomputation within the loss.
- "floor": forward passes counted, in units of plain training, and whether the time is within 15 % of it.
- "operations": floating-point operations of the program (`hypergrad.flops`), over those of plain training.
- "/ by hand": time over the hand-written scan with the same checkpoints ("grads": with those of "step"). "/ metaopt": \
time over "mixed, step".
- "MiB": temporary memory; of torch, the most that its allocator held above the start. "/ naive": over "reverse, none".
- "error": the largest relative error of a leaf of the hypergradient against "by hand: step"; {agree} of metaopt and \
of JAX are below {tol:g}. Of the MLP and the conv net at T = 64, torch.func, higher and hypertorch are off by 2e-2: in \
float64 all agree to 1e-15. They take Adam's 1 − β^t in Python's float64, which optax and TorchOpt take in float32 \
(6e-5 apart at t = 1), and behind ReLUs dF/dλ jumps: in float64, a relative change of 1e-7 in the initial weights \
changes it by 1.4e-2, and one of 1e-8 by 5e-9. Taken in float32 too, torch.func agrees to 6e-7.
- From T = {long} on, conv nets and transformers are run by fewer rules, and the hand-written conv net by \
`inner.im2col(loss)`: XLA's own convolutions would take hours."""
HEADER = [
    "T",
    "rule",
    "ms",
    "/ plain",
    "floor",
    "operations",
    "/ by hand",
    "/ metaopt",
    "MiB",
    "/ naive",
    "error",
    "compile s",
]


IMPLICIT = """\
## One implicit solve: K products with the Hessian of the MLP

λ is the penalty of each layer, and the penalty is so large that the Hessian is positive. One step of Adam, then K steps
of conjugate gradients, the mixed product and the outer gradient. "operations" count the body of the solver's loop once.

"""
WEIGHTS = """\
## Example weights: the mixed product, in forward passes of the MLP

(∂²g/∂λ∂θ)ᵀ v with a weight for each of the batch's examples; the bar is 3.2.

"""
PUBLISHED = """\
## hypertorch's published examples

Its four examples with its own T, K, rates and sizes (`published.py` says where not): one outer step, which is T \
inner steps from the start and the hypergradient. "error": between the two hypergradients, of the worst leaf. The \
systems of the last two are so badly conditioned, iMAML's indefinite, that K steps in float32 amplify rounding; in \
float64 the two libraries agree to 4e-7 (iMAML, one task, width 16) and 3e-10. iMAML's row of conjugate gradients \
takes JAX's, which go on through negative curvature as hypertorch's do; `hypergrad.cg` stops there.

"""


class Rule(NamedTuple):
    make: Callable  # (problem, num_steps=T) -> Estimator
    floor: float  # time divided by plain training
    by_hand: str | None = None  # checkpoints of the hand-written scan in the comparison
    few: bool = False  # λ is the rate and one penalty for all layers
    layerwise: bool = False  # the loss recomputes its layers


def unrolled(remat: str, grad: Callable, **kwargs) -> Rule:
    return Rule(partial(hypergrad.unrolled, remat=remat, grad=grad), FLOORS[remat], remat, **kwargs)


RULES = {
    **{f"reverse, {remat}": unrolled(remat, jax.grad) for remat in FLOORS},
    **{f"mixed, {remat}": unrolled(remat, hypergrad.mixed_grad) for remat in FLOORS},
    "mixed, grads": Rule(partial(hypergrad.unrolled, remat="grads"), FLOORS["step"], "step"),
    f"mixed, step, {LAYERWISE}": unrolled("step", hypergrad.mixed_grad, layerwise=True),
    "forward, two λ": Rule(partial(hypergrad.forward, chunk=1), floor=1 + 1.75 * 2, few=True),
}
NAIVE, RECOMMENDED = "reverse, none", "mixed, step"  # the report's text names these
LONG_PROGRAMS = (
    *(PLAIN, f"by hand: {PLAIN}", "by hand: step", "by hand: sqrt"),
    *("reverse, step", "mixed, step", "mixed, grads", "mixed, sqrt"),
)
SMOKE_PROGRAMS = (PLAIN, "by hand: step", NAIVE, RECOMMENDED, "forward, two λ")


def train_by_hand(case: cases.Case, hyperparams: dict, task: base.Task, order: jax.Array, remat: str) -> dict:
    """Runs Adam in a scan, written without metaopt, with a square root that is safe at zero."""

    def step(carry, rows):
        params, mu, nu, count = carry
        batch = jax.tree.map(lambda x: x[rows], task.train["rows"])
        grads = jax.grad(lambda p: case.loss(p, batch) + cases.penalty(p, hyperparams["decay"]))(params)
        count = count + 1
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
        nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g**2, nu, grads)

        def move(param, m, n):
            n = n / (1 - 0.999**count)
            root = jnp.where(n > 0, jnp.sqrt(jnp.where(n > 0, n, 1)), 0)
            return param - hyperparams["rate"] * (m / (1 - 0.9**count)) / (root + cases.EPS)

        return (jax.tree.map(move, params, mu, nu), mu, nu, count), None

    body = step if remat == "none" else jax.checkpoint(step, prevent_cse=False)
    if remat == "sqrt":
        checkpointed_step, root = body, round(len(order) ** 0.5)
        order = order.reshape(root, root, -1)
        body = jax.checkpoint(lambda carry, rows: jax.lax.scan(checkpointed_step, carry, rows), prevent_cse=False)
    params = task.train["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(body, (params, zeros, zeros, jnp.zeros([])), order)[0][0]


def by_hand(case: cases.Case, remat: str) -> Callable:
    """Returns (λ, task) -> F(λ)."""

    def objective(hyperparams, task):
        return case.loss(train_by_hand(case, hyperparams, task, task.train["order"], remat), task.valid)

    return objective


def plain(problem: base.Problem, num_steps: int) -> Callable:
    """Returns (λ, task) -> F(λ), by metaopt without derivatives."""
    train = inner.run(problem.loop, num_steps)

    def program(hyperparams, task):
        state = train(jax.random.key(0), hyperparams, task.train)
        return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, problem.loop.context(state))

    return program


def estimate(rule: Rule, case: cases.Case, num_steps: int) -> Callable:
    """Returns (λ, task) -> (F, dF/dλ), by a rule."""
    estimator = rule.make(cases.problem_of(case, rule.layerwise), num_steps=num_steps)

    def program(hyperparams, task):
        if rule.few:
            # The same point.
            hyperparams = {"rate": hyperparams["rate"], "decay": jnp.asarray(cases.FEW["decay"])}
        state = estimator.init(jax.random.key(0), hyperparams, task)
        found, _ = estimator.estimate(hyperparams, task, state)
        return found.value, found.hypergrad

    return program


def error(found: dict, expected: dict) -> float:
    """Returns `relative_error`, also if λ has only one penalty."""
    if not isinstance(found["decay"], dict):  # one penalty for all: the sum of the others
        expected = {**expected, "decay": sum(np.sum(leaf) for leaf in expected["decay"].values())}
    return relative_error(found, expected)


def relative_error(found: base.PyTree, expected: base.PyTree) -> float:
    """Returns the largest relative error of a leaf of the hypergradient."""
    relative = jax.tree.map(lambda a, b: np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b), found, expected)
    return float(np.max(jax.tree.leaves(relative)))  # NaN if there is one


class Row(NamedTuple):
    name: str
    ms: float = float("nan")
    against: str = PLAIN  # name of the row whose time it is compared with
    floor: float | None = None
    operations: float | None = None
    by_hand: str | None = None
    mib: float = float("nan")
    error: float | None = None
    compile_seconds: float = float("nan")
    reason: str = ""  # the reason for missing numbers


def ours(case: cases.Case, num_steps: int, options: argparse.Namespace) -> tuple[list[Row], dict]:
    """Returns rows of metaopt and of hand-written JAX, and the latter's hypergradient."""
    hands = [remat for remat in FLOORS if remat != "sqrt" or round(num_steps**0.5) ** 2 == num_steps]
    rules = {name: rule for name, rule in RULES.items() if case.layerwise or not rule.layerwise}
    functions = {PLAIN: plain(cases.problem_of(case), num_steps)}
    hand = case
    if num_steps >= LONG:  # hours with XLA's own convolutions
        hand = case._replace(loss=inner.im2col(case.loss))
    if case.layerwise:
        functions[f"{PLAIN}, {LAYERWISE}"] = plain(cases.problem_of(case, layerwise=True), num_steps)
    functions[f"by hand: {PLAIN}"] = by_hand(hand, "none")
    functions |= {f"by hand: {remat}": jax.value_and_grad(by_hand(hand, remat)) for remat in hands}
    functions |= {name: estimate(rule, case, num_steps) for name, rule in rules.items()}
    if options.smoke or (num_steps >= LONG and case.name != "mlp"):
        functions = {name: functions[name] for name in (SMOKE_PROGRAMS if options.smoke else LONG_PROGRAMS)}

    hyperparams, task = jax.tree.map(jnp.asarray, case.hyperparams), cases.task_of(case, num_steps)
    programs = {name: compiled(function, hyperparams, task) for name, function in functions.items()}
    mib = {name: temporary_mib(program) for name, (program, _) in programs.items()}
    fits = {name: program for name, (program, _) in programs.items() if mib[name] <= options.mib}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(hyperparams, task))
        for name, program in fits.items()
    }
    seconds = medians(calls, options.repetitions, options.seconds, options.clock)
    found = {name: jax.device_get(call()) for name, call in calls.items()}
    expected = found["by hand: step"][1]

    operations = {name: hypergrad.flops(function, hyperparams, task) for name, function in functions.items()}
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
                operations[name] / operations[PLAIN],
                f"by hand: {rule.by_hand}" if rule and not rule.layerwise else None,
                mib[name],
                error(found[name][1], expected) if is_hypergradient else None,
                compile_seconds,
                "" if name in fits else f"not run: above {options.mib} MiB",
            )
        )
    return rows, expected


def peers(
    case: cases.Case, num_steps: int, options: argparse.Namespace, expected: dict, num_products: int = 0
) -> tuple[list[Row], str]:
    """Returns rows of other libraries, from their own environment, and its versions."""
    task = cases.task_of(case, num_steps)
    trees = {"params": case.params, "train": case.train, "valid": case.valid, "decay": case.hyperparams["decay"]}
    arrays = {f"{tree}/{name}": leaf for tree, leaves in trees.items() for name, leaf in leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        np.savez(file, order=task.train["order"], rate=case.hyperparams["rate"], eps=cases.EPS, **arrays)
        command = [options.peers, str(HERE / "peers.py"), case.name.rstrip("0123456789"), str(file)]
        command += [str(num_cores()), str(options.repetitions), str(options.seconds), str(num_products)]
        command += [options.clock.__name__]
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


# ---- One solve of K products, and the mixed product of example weights ---------------------------------------------

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
        found, _ = estimator.estimate(hyperparams, task, state)
        return found.value, found.hypergrad

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

    The first one is the unit, and the others must agree with the name that begins with "by hand".
    """
    unit, hand = next(iter(functions)), next(name for name in functions if name.startswith("by hand"))
    programs = {name: compiled(function, *arguments)[0] for name, function in functions.items()}
    calls = {n: lambda p=p: jax.block_until_ready(p(*arguments)) for n, p in programs.items()}
    seconds = medians(calls, options.repetitions, options.seconds, options.clock)
    operations = {name: hypergrad.flops(function, *arguments) for name, function in functions.items()}
    expected = jax.device_get(calls[hand]())[1]
    rows = []
    for name in functions:
        found = jax.device_get(calls[name]()) if name not in (unit, "gradient") else None
        rows.append(
            Row(
                name,
                1e3 * seconds[name],
                unit,
                operations=operations[name] / operations[unit],
                by_hand=hand if found is not None and name != hand else None,
                mib=temporary_mib(programs[name]),
                error=None if found is None else relative_error(found[1], expected),
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


def published_rows(options: argparse.Namespace) -> tuple[str, list]:
    """Returns the table of hypertorch's examples, and the rows that disagree.

    The table also reports the first example's run to its end.
    """
    printed, wrong, end = [], [], ""
    for name, (make, file) in published.SETTINGS.items():
        if options.smoke and not options.problems and name != "logistic":
            continue
        if file and not published.data_file(file).is_file():
            printed.append([f"{name} (METAOPT_DATA names no folder with {file})", *[""] * 8])
            continue
        setting, num_outer = make(options.smoke), 3 if options.smoke else published.NUM_OUTER
        arguments = jax.tree.map(jnp.asarray, (setting.hyperparams, setting.task))
        programs = {r: compiled(published.program(rule), *arguments) for r, rule in setting.rules.items()}
        calls = {r: lambda p=p, a=arguments: jax.block_until_ready(p(*a)) for r, (p, _) in programs.items()}
        seconds = medians(calls, options.repetitions, options.seconds, options.clock)
        theirs, found, reason = {}, {}, ""
        if options.peers:
            theirs, found, reason = hypertorch(name, setting, num_outer, options)
        for rule, (program, _) in programs.items():
            off, ms, other = None, 1e3 * seconds[rule], theirs.get("ms", {}).get(rule, float("nan"))
            if found:
                hypergradient = jax.device_get(calls[rule]()[1])
                hypergradient = hypergradient if isinstance(hypergradient, dict) else {"log_penalty": hypergradient}
                off = relative_error(hypergradient, {leaf: found[f"{rule}/hp_{leaf}"] for leaf in hypergradient})
                wrong += [f"{name}, {rule}: {off:.1e}"] if not (off <= TOLERANCE or name in published.ROUGH) else []
            steps = [str(setting.steps[count]) for count in "TK"]
            printed.append(
                [setting.text, *steps, rule + reason, number(ms, 2), number(other, 2), number(other / ms, 1)]
            )
            printed[-1] += [number(temporary_mib(program), 2), "" if off is None else f"{off:.0e}"]
        if name == "logistic":
            run, compile_seconds = compiled(published.run_to_the_end(setting, num_outer), *arguments)
            begin = options.clock()
            value = float(run(*arguments)[-1])
            end = f"The logistic regression to its end, {num_outer:,} outer steps by the first rule: metaopt "
            end += f"{options.clock() - begin:.2f} s and {compile_seconds:.1f} s to compile, validation loss "
            end += f"{value:.6f}"
            end += f"; hypertorch {theirs['seconds']:.1f} s, {theirs['value']:.6f}." if theirs else "."
    header = ["example", "T", "K", "rule", "metaopt ms", "hypertorch ms", "/ metaopt", "MiB", "error"]
    return f"{PUBLISHED}{table(header, printed)}\n\n{end}", wrong


def hypertorch(
    name: str, setting: published.Setting, num_outer: int, options: argparse.Namespace
) -> tuple[dict, dict[str, np.ndarray], str]:
    """Returns the times and hypergradients of hypertorch, and the reason if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.npz"
        saved: dict = {**setting.steps, **setting.arrays}
        np.savez(file, **saved)
        command = [options.peers, str(HERE / "published_peers.py"), name, str(file), str(num_cores())]
        done = subprocess.run(
            [*command, str(options.repetitions), str(options.seconds), str(num_outer), options.clock.__name__],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or [""])[-1]
            return {}, {}, f" (hypertorch failed, exit {done.returncode}: {last_line})"
        return json.loads(done.stdout.splitlines()[-1]), dict(np.load(f"{file}.found.npz")), ""


def number(value, digits):
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def lines(num_steps: int, rows: list[Row]) -> list[list[str]]:
    """Returns the printed rows of one T."""
    ms, mib = {row.name: row.ms for row in rows}, {row.name: row.mib for row in rows}

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
                number(row.operations, 2),
                number(row.ms / ms[row.by_hand], 2) if row.by_hand in ms else "",
                "" if row.name in RULES or row.error is None else number(row.ms / ms[RECOMMENDED], 2),
                number(row.mib, 2),
                number(row.mib / mib.get(NAIVE, float("nan")), 3),
                "" if row.error is None else f"{row.error:.0e}",
                number(row.compile_seconds, 1),
            ]
        )
    return printed


def report(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Runs everything. Returns the report in Markdown, and the rows that disagree with the hand-written scan."""
    parts, wrong, versions = [], [], ""
    for case, steps in SMOKE if options.smoke else FULL:
        if options.problems and case.name not in options.problems:
            continue
        printed = []
        for num_steps in options.num_steps or steps:
            rows, expected = ours(case, num_steps, options)
            # A NaN counts as a disagreement.
            off = [row for row in rows if row.error is not None and not row.error <= TOLERANCE]
            wrong += [f"{case.name}, T={num_steps}, {row.name}: {row.error:.1e}" for row in off]
            if options.peers and num_steps <= options.peer_steps:
                others, versions = peers(case, num_steps, options, expected)
                rows += others
            printed += lines(num_steps, rows)
            print(table(HEADER, printed[-len(rows) :]), file=sys.stderr)  # shows progress
        parts.append(f"## {case.text[0].upper()}{case.text[1:]}\n\n{table(HEADER, printed)}")
    if not (options.problems or options.num_steps):
        case = SMOKE[0][0] if options.smoke else FULL[0][0]
        header = ["ms", "/ {}", "operations", "/ by hand", "MiB", "error"]
        printed = []
        for num_products in (3,) if options.smoke else (5, 20):
            more, off = implicit_rows(case, num_products, options)
            printed, wrong = printed + more, wrong + off
        parts.append(IMPLICIT + table(["K", "rule", *(h.format("gradient") for h in header)], printed))
        printed, off = weights_rows(case, options)
        wrong += off
        parts.append(WEIGHTS + table(["", "rule", *(h.format("forward") for h in header)], printed))
    if not (options.problems or options.num_steps) or "published" in (options.problems or ()):
        part, off = published_rows(options)
        parts, wrong = [*parts, part], wrong + off
    intro = INTRO.format(
        threads=num_cores(),
        repetitions=options.repetitions,
        agree="all" if not wrong else "NOT all",
        tol=TOLERANCE,
        long=LONG,
    )
    end = circumstances(f"python experiments/benchmarks/rules.py{options.flags}")
    return "\n\n".join([intro, *parts, end + (f" Peers: {versions}." if versions else "")]), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition; writes no result")
    parser.add_argument(
        "--problems", nargs="+", help=f"some of {', '.join(case.name for case, _ in FULL)}, published; prints only"
    )
    parser.add_argument("--num-steps", nargs="+", type=int, help="T instead of the usual ones; prints only")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment that install_peers.sh made")
    parser.add_argument("--peer-steps", type=int, default=256, help="the largest T for other libraries")
    parser.add_argument("--repetitions", type=int, default=9, help="of every measurement, where seconds allow")
    parser.add_argument("--seconds", type=float, default=60, help="after which no fourth turn begins, for each T")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where others share its core")
    parser.add_argument("--mib", type=int, default=8192, help="programs with more temporary memory are not run")
    options = parser.parse_args()
    if options.smoke:
        options.repetitions = 1
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    # The path of the interpreter is not published.
    options.flags = (" --peers PYTHON" if options.peers else "") + (" --cpu-time" if options.cpu_time else "")
    text, wrong = report(options)
    print(text)
    if not (options.smoke or options.problems or options.num_steps):
        pages.write(RESULT, "What every rule costs", f"{text}\n")
    if wrong:
        sys.exit("\n".join(["Hypergradients disagree:", *wrong]))


if __name__ == "__main__":
    main()

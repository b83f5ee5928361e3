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
import sys
import time

import cases
import jax
import jax.numpy as jnp
from rules_programs import (
    FLOORS,
    LAYERWISE,
    LONG,
    LONG_PROGRAMS,
    NAIVE,
    PLAIN,
    RECOMMENDED,
    RULES,
    SMOKE_PROGRAMS,
    by_hand,
    estimate,
    plain,
)
from rules_published import published_rows
from rules_rows import HERE, TOLERANCE, Row, error, number, peers
from rules_solves import IMPLICIT, WEIGHTS, implicit_rows, weights_rows
from timing import circumstances, compiled, num_cores, temporary_mib
from turns import medians

from experiments import pages, script
from metaopt import hypergrad, inner

RESULT = HERE.parent / "results" / "rules.md"
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

- "/ plain": time divided by that of plain training by the same library, which recomputes as much within its loss.
- "floor": forward passes counted, in units of plain training, and whether the time is within 15 % of it.
- "operations": floating-point operations of the program (`hypergrad.flops`), over those of plain training.
- "/ by hand": time over the hand-written scan with the same checkpoints ("grads": with those of "step"). "/ metaopt": \
time over "mixed, step".
- "MiB": temporary memory; for torch, the most that its allocator held above the start. "/ naive": over "reverse, none".
- "error": the largest relative error of a leaf of the hypergradient against "by hand: step"; {agree} of metaopt and \
of JAX are below {tol:g}. On the MLP and the conv net at T = 64, torch.func, higher and hypertorch differ by 2e-2 in \
float32, and all agree to 1e-15 in float64. There are two reasons. They compute Adam's 1 − β^t in Python's float64, \
but optax and TorchOpt in float32, which differs by 6e-5 at t = 1. And dF/dλ jumps because of ReLUs: in float64, a \
relative change of 1e-7 in the initial weights changes it by 1.4e-2, and one of 1e-8 by 5e-9. With 1 − β^t in \
float32, torch.func agrees to 6e-7.
- From T = {long} on, fewer rules run conv nets and transformers. The hand-written conv net uses `inner.im2col(loss)` \
there, since XLA's own convolutions would take hours."""
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
    results = {name: jax.device_get(call()) for name, call in calls.items()}
    expected = results["by hand: step"][1]

    operations = {name: hypergrad.flops(function, hyperparams, task) for name, function in functions.items()}
    rows = []
    for name, (_, compile_seconds) in programs.items():
        rule = rules.get(name)
        is_hypergradient = name in results and isinstance(results[name], tuple)
        rows.append(
            Row(
                name,
                1e3 * seconds[name] if name in seconds else float("nan"),
                f"{PLAIN}, {LAYERWISE}" if LAYERWISE in name else PLAIN,
                rule.floor if rule else None,
                operations[name] / operations[PLAIN],
                f"by hand: {rule.by_hand}" if rule and not rule.layerwise else None,
                mib[name],
                error(results[name][1], expected) if is_hypergradient else None,
                compile_seconds,
                "" if name in fits else f"not run: above {options.mib} MiB",
            )
        )
    return rows, expected


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
            print(script.table(HEADER, printed[-len(rows) :]), file=sys.stderr)  # shows progress
        parts.append(f"## {case.text[0].upper()}{case.text[1:]}\n\n{script.table(HEADER, printed)}")
    if not (options.problems or options.num_steps):
        case = SMOKE[0][0] if options.smoke else FULL[0][0]
        header = ["ms", "/ {}", "operations", "/ by hand", "MiB", "error"]
        printed = []
        for num_products in (3,) if options.smoke else (5, 20):
            more, off = implicit_rows(case, num_products, options)
            printed, wrong = printed + more, wrong + off
        parts.append(IMPLICIT + script.table(["K", "rule", *(h.format("gradient") for h in header)], printed))
        printed, off = weights_rows(case, options)
        wrong += off
        parts.append(WEIGHTS + script.table(["", "rule", *(h.format("forward") for h in header)], printed))
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
        pages.write(RESULT, "The cost of every rule", f"{text}\n")
    if wrong:
        sys.exit("\n".join(["Hypergradients disagree:", *wrong]))


if __name__ == "__main__":
    script.run(main)

"""The cost of a step of architecture search, compared with a plain step of the supernet's weights.

The first supernet is NAS-Bench-201's (C = 8, N = 1, 16x16 images, 16 per batch). The second is that of DARTS (8 cells,
C = 16, 32x32 images, 64 per batch), for which only seconds of compilation and memory are measured. The programs take
turns. Times are medians of processor seconds, divided by those of a plain step. Memory is the figure of the compiler,
without noise.

    python experiments/benchmarks/architecture.py            # minutes; writes experiments/results/architecture.md
    python experiments/benchmarks/architecture.py --smoke    # seconds, small networks without convolutions; prints only
    python experiments/benchmarks/architecture.py --only cost large    # other parts of the result stay as they are
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import circumstances, temporary_mib
from turns import medians

from experiments import pages, script
from metaopt import base, hypergrad, inner, nas

RESULT = Path(__file__).resolve().parents[2] / "experiments" / "results" / "architecture.md"
KEY = jax.random.key(0)
TASKS = 16


class Case(NamedTuple):
    """A search space, and the task of its search."""

    network: nas.Network
    shape: tuple[int, ...]
    ops: dict[str, nas.Op]
    batch: int
    keep: int | None

    def task(self) -> base.Task:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(4 * self.batch, *self.shape)), jnp.float32)
        rows = {"x": x, "y": jnp.asarray(rng.integers(10, size=len(x)))}
        return base.Task(rows, rows)

    def search(self, method: Callable, **options) -> nas.Search:
        rows = inner.minibatch(self.batch)
        options = {
            "ops": self.ops,
            "keep": self.keep,
            "sampler": rows,
            "outer_batch": lambda key, task: rows(key, jnp.array(0), task.valid),
            **options,
        }
        return method(self.network, self.shape, **options)


def small_case(smoke: bool) -> Case:
    if smoke:
        return table_case(1)
    network = nas.nas_bench_201_space(channels=8, cells_per_stage=1)
    return Case(network, (16, 16, 3), nas.NAS_BENCH_201_OPS, 16, None)


def large_case(smoke: bool) -> Case:
    return table_case(2) if smoke else Case(nas.darts_space(), (32, 32, 3), nas.DARTS_OPS, 64, 2)


def table_case(num_cells: int) -> Case:
    cell = nas.complete_cell(2, ("none", "skip_connect", "mlp"), preprocess=False)
    layers = (nas.Layer("linear", 16), *[nas.Layer("cell", 16)] * num_cells)
    return Case(nas.Network({"cell": cell}, layers, 10), (8,), nas.BLOCKS, 32, 2)


class Program(NamedTuple):
    """One estimate of a search, compiled, with its state."""

    call: Callable[[], None]
    mib: float
    seconds: float  # processor seconds, to trace and compile
    flops: float


def compiled(function: Callable, *args) -> Program:
    start = time.process_time()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.process_time() - start
    call = lambda: jax.block_until_ready(program(*args))
    return Program(call, temporary_mib(program), seconds, hypergrad.flops(function, *args))


def estimate(search: nas.Search, task: base.Task) -> Program:
    alpha = search.hyperparams(KEY)
    state = jax.jit(search.estimator.init)(KEY, alpha, task)
    return compiled(search.estimator.estimate, alpha, task, state)


def plain(search: nas.Search, task: base.Task) -> Program:
    loop, alpha = search.problem.loop, search.hyperparams(KEY)
    state = jax.jit(loop.init)(KEY, alpha, task.train)
    return compiled(lambda state, alpha: inner.step(loop, state, alpha, task.train), state, alpha)


def cost(smoke: bool, repetitions: int) -> list[list[str]]:
    """Returns rows: the time and the operations of an estimate divided by those of a plain step."""
    case = small_case(smoke)
    task = case.task()
    program_of = lambda method, **options: estimate(case.search(method, **options), task)
    first = case.search(nas.darts, order="first")
    lengths = (2,) if smoke else (4, 16)
    programs = {
        "plain": plain(first, task),
        "first": estimate(first, task),
        "second": program_of(nas.darts, order="second"),
        "forward": program_of(nas.darts, order="second", difference="forward"),
        "exact": program_of(nas.darts, order="exact"),
        "gdas": program_of(nas.gdas, num_steps=100),
        "partial": program_of(nas.pc_darts, partial=4),
    }
    unrolled = [(num, remat) for num in lengths for remat in ("none", "step", "sqrt")]
    for num, remat in unrolled:
        programs[f"unrolled {num} {remat}"] = program_of(nas.unrolled_darts, num_steps=num, remat=remat)
    # Twice per turn: after a larger program, the first call of a small one is slower, which would make the others look
    # better.
    calls = {name: p.call for name, p in programs.items()}
    seconds = medians(calls, repetitions, clock=time.process_time, twice=True)
    one = seconds["plain"]

    def told(name, what, share=1, bar=None):
        operations = programs[name].flops / programs["plain"].flops / share
        p = programs[name]
        return [*row(what, seconds[name] / one / share, bar, p), f"{operations:.2f}", f"{p.mib:.0f}"]

    named = lambda remat: f'`remat="{remat}"`' + (" (the default)" if remat == "step" else "")
    rows = [
        [
            "a plain step of the weights, ms",
            f"{1e3 * one:.3g}",
            "",
            f"{programs['plain'].seconds:.0f}",
            "",
            f"{programs['plain'].mib:.0f}",
        ],
        told("first", "DARTS, first order"),
        told("second", "DARTS, second order by central differences (the default)", bar=4.4),
        told("forward", "DARTS, second order by forward differences", bar=4.4),
        told("exact", "DARTS, second order by differentiation", bar=4.4),
        *(
            told(f"unrolled {num} {remat}", f"unrolled over {num}, {named(remat)}, an inner step", num, 3.2)
            for num, remat in unrolled
        ),
        told("gdas", "GDAS, one op an edge (a step of weights and one of α)"),
        told("partial", "PC-DARTS, K = 4 (a step of weights and one of α)"),
    ]
    single = nas.uniform_path()
    path = case.search(nas.darts, order="first", relaxation=single, decode=nas.softmax(), single_path=True)
    dense, sampled = programs["plain"], plain(path, task)
    calls = {"dense": dense.call, "one": sampled.call}
    pair = medians(calls, repetitions, clock=time.process_time, twice=True)
    ratio = pair["one"] / pair["dense"]
    last = row("single path, a step of the weights, over a plain one", ratio, None, sampled)
    # Only the most expensive op on an edge counts.
    return [*rows, [*last, f"{sampled.flops / dense.flops:.2f}", f"{sampled.mib:.0f}"]]


def many(smoke: bool, repetitions: int) -> list[list[str]]:
    """Returns rows: the time of an estimate for many tasks, several at the same time, divided by the time for one."""
    case = small_case(smoke)
    task, first = case.task(), case.search(nas.darts, order="first")
    tasks = jax.tree.map(lambda leaf: jnp.stack([leaf] * TASKS), task)
    programs: dict[int | str, Program] = {0: estimate(first, task)}
    for chunk in (1, 4, TASKS):
        over = hypergrad.over_tasks(first.estimator, task_chunk=chunk)
        programs[chunk] = estimate(first._replace(estimator=over), tasks)
    shared = base.Predictor(first.hyperparams, lambda alpha, task: alpha, {})  # h that does not depend on the task
    meta = nas.meta_architecture_search(first, shared)
    programs["chosen"] = estimate(first._replace(estimator=meta.over_tasks(), hyperparams=meta.hyperparams), tasks)
    # One task is called several times in a row: after a larger program, its first call is slower.
    calls: dict[int | str, Callable] = {chunk: p.call for chunk, p in programs.items() if chunk}
    calls[0] = lambda: [programs[0].call() for _ in range(TASKS)]
    seconds = medians(calls, repetitions, clock=time.process_time)
    seconds[0] /= TASKS
    names: dict[int | str, str] = {TASKS: "all at once", "chosen": "as `MetaArchitecture.over_tasks` chooses"}
    what = lambda chunk: names.get(chunk, f"{chunk} at once, `task_chunk={chunk}`")
    return [
        ["one task, ms", f"{1e3 * seconds[0]:.3g}", "", f"{programs[0].seconds:.0f}"],
        *(
            row(f"{TASKS} tasks, {what(chunk)}", seconds[chunk] / seconds[0], float(TASKS), programs[chunk])
            for chunk in programs
            if chunk
        ),
    ]


def memory(smoke: bool) -> list[list[str]]:
    """Returns rows: the peak of an implicit estimate after few and after many inner steps, and of a single path."""
    case = small_case(smoke)
    task, solver = case.task(), hypergrad.neumann(num_steps=3, rate=0.025)
    few, many = (estimate(case.search(nas.implicit_darts, num_steps=num, solver=solver), task) for num in (4, 64))
    dense = plain(case.search(nas.darts, order="first"), task)
    path = case.search(nas.darts, order="first", relaxation=nas.uniform_path(), decode=nas.softmax(), single_path=True)
    one = plain(path, task)
    return [
        row("implicit, the peak after 64 inner steps over that after 4", many.mib / few.mib, 1.01, many),
        row("single path, the peak over that of a plain step", one.mib / dense.mib, None, one),
    ]


def large(smoke: bool) -> list[list[str]]:
    """Returns rows: the compiler's seconds for the DARTS supernet, and the peak with partial channels."""
    case = large_case(smoke)
    task = case.task()
    step = plain(case.search(nas.darts, order="first"), task)
    dense = estimate(case.search(nas.darts, order="first"), task)
    partial = estimate(case.search(nas.pc_darts, partial=4), task)
    return [
        row("seconds to compile a plain step", step.seconds, 60.0, step),
        row("seconds to compile DARTS, first order", dense.seconds, None, dense),
        ["the peak of a plain step, MiB", f"{step.mib:.0f}", "", f"{step.seconds:.0f}"],
        row("partial channels, K = 4, the peak over the dense one", partial.mib / dense.mib, 0.4, partial),
        ["the peak of DARTS, first order, MiB", f"{dense.mib:.0f}", "", f"{dense.seconds:.0f}"],
    ]


def row(what: str, value: float, bar: float | None, program: Program) -> list[str]:
    verdict = "" if bar is None else f"{bar:g} {'reached' if value <= bar else 'missed'}"
    return [what, f"{value:.2f}", verdict, f"{program.seconds:.0f}"]


TITLES = {
    "cost": "Times over a plain step of the supernet of NAS-Bench-201 (C = 8, N = 1, 16x16, 16 a batch)",
    "tasks": "Times of one program for many tasks over those for one (the same supernet, first order)",
    "memory": "Memory of the same supernet",
    "large": "The supernet of DARTS (8 cells, C = 16, 32x32, 64 a batch)",
}

# These texts contain no measured number. All measurements are in the tables, so a new run replaces them.
ABOUT = (
    "- An alternation is one step of the weights and one step of α. Its cost cannot be below its number of "
    "operations. DARTS's central difference has more operations than a forward difference, because it takes one more "
    "gradient.\n"
    "- Seconds are processor seconds, so other processes do not count.\n"
    "- In the first part, each turn calls each program twice, and the second call is timed. If the first call were "
    "timed, after a larger program, a plain step would be slower and the ratios would be too small.\n"
    "- Compilation includes tracing and lowering.\n"
    "- Operations are counted in the traced program. If the compiler merges two equal operations, both still "
    "count.\n"
    "- Above 32 MiB of temporaries, the C library maps memory again at every call. There, times are further above "
    "the operations."
)

PARTS: dict[str, Callable[[bool, int], list[list[str]]]] = {
    "cost": cost,
    "tasks": many,
    "memory": lambda smoke, _: memory(smoke),
    "large": lambda smoke, _: large(smoke),
}


def load() -> float:
    """Returns the number of processes that wanted a core in the last minute, on the whole machine.

    It is 0 if the system does not report it.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def part(name: str, smoke: bool, repetitions: int, before: float) -> str:
    """Returns one part of the result: its table, and how it was made. `before` is the load before the run."""
    begin, begin_wall = time.process_time(), time.perf_counter()
    header = ["", "", "at most", "compiled in, s", *(["in operations", "the peak, MiB"] if name == "cost" else [])]
    rows = script.table(header, PARTS[name](smoke, repetitions))
    how_made = circumstances(" ".join(["python experiments/benchmarks/architecture.py", *sys.argv[1:]]))
    how_made += (
        f" The run took {time.process_time() - begin:.0f} processor seconds in "
        f"{time.perf_counter() - begin_wall:.0f} s; "
        f"{'other' if before >= 0.5 else 'no other'} work ran when it began (a load of {before:.1f} on "
        f"{os.cpu_count()} cores)."
    )
    return f"## {TITLES[name]}\n\n{rows}\n\n{how_made}"


def sections(text: str) -> dict[str, str]:
    """Returns the parts of an earlier result, by name."""
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    return {name: f"## {parts[title].rstrip()}" for name, title in TITLES.items() if title in parts}


def page(earlier: dict[str, str], parts: dict[str, str]) -> str:
    """Returns the result without its title: the new parts, and the parts of earlier runs, which it names."""
    whole = {**earlier, **parts}
    names = [f'"{TITLES[name]}"' for name in TITLES if name in earlier and name not in parts]
    note = f"Of an earlier run, maybe of earlier code: {'; '.join(names)}. " if names else ""
    text = "\n\n".join(whole[name] for name in TITLES if name in whole)
    return f"{note}{ABOUT}\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small networks; writes no result")
    parser.add_argument("--only", nargs="+", choices=tuple(TITLES), default=tuple(TITLES))
    parser.add_argument("--repetitions", type=int, default=10, help="timed turns")
    options = parser.parse_args()
    repetitions = 2 if options.smoke else options.repetitions
    parts, before = {}, load()
    for name in options.only:
        parts[name] = part(name, options.smoke, repetitions, before)
        print(parts[name], flush=True)
    if not options.smoke:
        earlier = sections(RESULT.read_text()) if RESULT.is_file() else {}
        pages.write(RESULT, "The cost of a step of architecture search", page(earlier, parts))


if __name__ == "__main__":
    script.run(main)

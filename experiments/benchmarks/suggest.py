"""The cost of a suggestion after ten, a thousand, ten thousand trials: a learned g's searcher, and Optuna's TPE.

g is trained on 100 earlier tasks with 50 trials each of a random forest's seven parameters, at up to 512 reference
configurations. (The outcomes are made up, since only the cost is measured.) Without candidates, a suggestion is a
gradient ascent over the relaxed space from 8 starts. With candidates, it evaluates 1,000 configurations. Except under
Optuna, the timed suggestions are neither random nor the configuration that is farthest from all earlier trials.

"running" is the number of trials that have been asked for and have not ended; expected improvement accounts for them.
Most rows use g's searcher, which receives each trial once. The rows of `suggest(X, y)` get all trials again at every
call. In the rows "under Optuna", g is the sampler of a study (`blackbox.optuna_sampler`).

    python experiments/benchmarks/suggest.py           # writes experiments/results/suggest.md
    python experiments/benchmarks/suggest.py --smoke   # seconds; prints only
    python experiments/benchmarks/suggest.py --candidates 11000   # of so large a set, the farthest too; prints only

`OPENBLAS_NUM_THREADS=1 taskset -c 0 python ...` keeps everything on one thread. On a busy machine, threads that wait
for one another take most of the time.
"""

import argparse
import os
import resource
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
from timing import circumstances, num_cores

from experiments import pages, script
from metaopt import base, blackbox, spaces

RESULT = Path(__file__).resolve().parent.parent / "results" / "suggest.md"
HEADER = ["sampler", "acquisition", "running", "trials", "ms a suggestion", "slowest", "CPU-ms", "MiB of state"]


def loss(configuration) -> float:
    return float(np.log(configuration["max_depth"]) + abs(np.log(configuration["n_estimators"]) - 4))


def learn(space, drawn, num_tasks: int, num_trials: int):
    """Trains four g on made-up tasks: without candidates, with them, and both again with deep kernels."""
    rng, records = np.random.default_rng(0), []
    for t in range(num_tasks):
        for i in range(num_trials):
            c = drawn[(t * num_trials + i) % len(drawn)]
            y = loss(c) * (1 + t % 3) + rng.normal() / 10
            records.append(base.Record(f"t{t}", c, y, cost=float(c["n_estimators"]) * (1 + t % 5)))
    kwargs = {"space": space, "num_steps": 5, "costs": True}
    return [
        blackbox.train_meta_optimizer(records, candidates=candidates, deep_kernels=deep, **kwargs)
        for deep in (0, 2)
        for candidates in (None, drawn)
    ]


def ours(g, acquisition: str, drawn, num: int, running: int, repetitions: int) -> list[str]:
    """Times suggestions by the acquisition.

    With a finite set, every eighth trial is the configuration that is farthest from all earlier ones. The first such
    trial comes after seven others. The acquisition "farthest" times these suggestions.
    """
    far = acquisition == "farthest"
    searcher, rng = g.searcher(acquisition="ei" if far else acquisition), np.random.default_rng(0)
    num_asked = 4 * num + 7 * far
    records = [
        base.Record("", c, loss(c) + rng.normal() / 100, cost=1.0 + i % 3, trial=i, seed=i // len(drawn))
        for i, c in ((i, drawn[i % len(drawn)]) for i in range(num))
    ]
    state = searcher.tell(searcher.init(jax.random.key(0), None), records[:1_000])  # g keeps its encoded configurations
    state = state._replace(tried={})
    tracemalloc.start()
    state = searcher.tell(state, records)._replace(num_asked=num_asked)
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    _, state = searcher.ask(state, running)
    times = []
    for i in range(repetitions + 3):  # the first ones include compilation
        begin, cpu = time.perf_counter(), time.process_time()
        searcher.ask(state._replace(num_asked=num_asked, key=jax.random.key(i)), 1)
        times.append((1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu)))
    return row(times[3:]) + [f"{held:.1f}"]


def stateless(g, drawn, num: int, repetitions: int) -> tuple[list[str], float]:
    """Times `suggest(X, y)`.

    Also returns CPU-ms of the first call on configurations that are new to g, without compilation.
    """
    tried, y = [drawn[i % len(drawn)] for i in range(num)], np.random.default_rng(0).normal(size=num)
    y = [loss(c) + e / 100 for c, e in zip(tried, y, strict=True)]
    others = [c | {"max_depth": 1 + c["max_depth"] % 64} for c in tried]
    g.suggest(others, y)  # compiles
    times = []
    for i in range(repetitions + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        g.suggest(tried, y, key=jax.random.key(i))
        times.append((1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu)))
    return [*row(times[1:]), ""], times[0][1]


def under_optuna(make_sampler, space, drawn, num: int, repetitions: int, *, num_first: int = 0) -> list[str]:
    """Times suggestions of a study with `num` trials.

    The first `num_first` suggestions compile and read all trials, so they do not count.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = spaces.to_optuna(space)
    study = optuna.create_study(sampler=make_sampler(optuna))
    add = lambda c: optuna.trial.create_trial(params=c, distributions=distributions, value=loss(c))
    study.add_trials([add(drawn[i % len(drawn)]) for i in range(num)])
    times = []
    for _ in range(repetitions + num_first):
        begin, cpu = time.perf_counter(), time.process_time()
        trial = study.ask(distributions)
        times.append((1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu)))
        study.tell(trial, loss(trial.params))
    return [*row(times[num_first:]), ""]


def row(times) -> list[str]:
    wall, cpu = np.array(times).T
    return [f"{np.median(wall):.1f}", f"{wall.max():.1f}", f"{np.median(cpu):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a suggestion costs.")
    parser.add_argument("--smoke", action="store_true", help="small sizes; writes no result")
    parser.add_argument("--candidates", type=int, metavar="N", help="only a finite set of N; writes no result")
    options = parser.parse_args()
    space = blackbox.sklearn_model("random_forest_classifier").space
    searcher = blackbox.random_search()
    asked, _ = searcher.ask(
        searcher.init(jax.random.key(0), space), options.candidates or (20 if options.smoke else 1_000)
    )
    drawn = [record.configuration for record in asked]
    free, finite, free_deep, finite_deep = learn(space, drawn, *((3, 5) if options.smoke else (100, 50)))
    repetitions, nums = (1, [10]) if options.smoke else (15, [10, 1_000, 10_000])
    rows = []
    cases = [("candidates", finite, "ei", 0), ("gradient", free, "ei", 0)]
    if options.candidates:
        for num in nums:
            for acquisition in ("ei", "farthest") if num < len(drawn) else ("ei",):  # needs untried candidates
                measured = ours(finite, acquisition, drawn, num, 0, repetitions)
                print(f"| {' | '.join([acquisition, str(num), *measured])} |", flush=True)
        return
    if not options.smoke:
        cases += [("gradient", free, name, 0) for name in ("ei_per_cost", "ucb")]
        cases += [
            ("candidates", finite, "ei_per_cost", 0),
            ("candidates", finite, "ei", 4),
            ("gradient", free, "ei", 4),
        ]
    cases += [("candidates, deep kernels", finite_deep, "ei", 0), ("gradient, deep kernels", free_deep, "ei", 0)]
    for name, g, acquisition, running in cases:
        for num in nums:
            measured = ours(g, acquisition, drawn, num, running, repetitions)
            rows.append([f"metaopt, {name}", acquisition, str(running), str(num), *measured])
            print(f"| {name} | {acquisition} | {running} | {num} | {measured}", flush=True)
    others = [c | {"n_estimators": 20 + k} for k in range(-(-nums[-1] // len(drawn))) for c in drawn]  # all different
    firsts = []
    for name, g, candidates in (("candidates", finite, drawn), ("gradient", free, others)):
        for num in nums:
            measured, first = stateless(g, candidates, num, repetitions)
            rows.append([f"metaopt, {name}, suggest(X, y)", "ei", "0", str(num), *measured])
            print(f"| {name}, suggest | {num} | {measured} | {first}", flush=True)
        firsts.append(f"{first:.0f}")
    for name, g in (("candidates", finite), ("gradient", free)):
        for num in nums:
            sampler = lambda optuna, g=g: blackbox.optuna_sampler(g, seed=0)
            measured = under_optuna(sampler, space, drawn, num, repetitions, num_first=3)
            rows.append([f"metaopt, {name}, under Optuna", "ei", "0", str(num), *measured])
            print(f"| {name}, under Optuna | {num} | {measured}", flush=True)
    for num in nums:
        sampler = lambda optuna: optuna.samplers.TPESampler(seed=0)
        rows.append(["Optuna TPE", "", "0", str(num), *under_optuna(sampler, space, drawn, num, min(repetitions, 5))])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    ours_at_most = [[float(r[i]) for r in rows if r[0] != "Optuna TPE" and r[3] == str(nums[-1])] for i in (4, 6)]
    wall, cpu = (f"{max(values):.0f}" for values in ours_at_most)
    text = (
        f"The table shows the median and the slowest of {repetitions} suggestions (TPE: {min(repetitions, 5)}), on "
        f"{num_cores()} core(s).\n\n"
        "- **Compilation** is not included. It takes seconds for each padded number of trials that the searcher looks "
        "at, of which there are at most three (16, 64, 256 trials).\n"
        "- **Size.** The number of trials that the searcher looks at does not grow with the number of all trials. The "
        "state grows only by the reported trials.\n"
        f"- **Memory.** The whole process, all rows together, took at most {most:.0f} MiB.\n"
        f"- **Bar:** 50 ms after 10,000 trials. The largest medians of metaopt there are {wall} ms, and {cpu} CPU-ms "
        "(other processes do not lengthen CPU time).\n"
        "- **Running** trials were asked for and have not ended. **Under Optuna**, g is the sampler of a study.\n"
        f"- **The first `suggest(X, y)`** of {nums[-1]} trials takes {firsts[1]} CPU-ms if g has seen none of the "
        f"configurations and all of them differ. With candidates, which g knows, it takes {firsts[0]} CPU-ms. Other "
        "configurations would be encoded in that call, all of them, once.\n\n"
    )
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    command = f"OPENBLAS_NUM_THREADS={threads} " if threads else ""
    command += "python experiments/benchmarks/suggest.py" + (" --smoke" if options.smoke else "")
    text += (
        script.table(HEADER, rows) + "\n\n" + circumstances(command).partition(" Memory")[0]
    )  # its sentence on memory is about compiled programs
    print(text)
    if not options.smoke:
        pages.write(RESULT, "The cost of a suggestion", f"{text}\n")


if __name__ == "__main__":
    script.run(main)

"""Runs every searcher with every seed that is not finished, and writes the result."""

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import script
from experiments.architecture import nas_bench_201
from experiments.architecture.nas_bench_201.config import FULL, QUICK, SMOKE
from experiments.architecture.nas_bench_201.report import plot, report
from experiments.architecture.nas_bench_201.searches import images, run_one_shot, run_search, searches
from experiments.architecture.nas_bench_201.tables import run_scores
from experiments.data import benchmarks


def main() -> None:
    parser = script.parser(nas_bench_201.__doc__, num_seeds=4)
    parser.add_argument("--full", action="store_true", help="the benchmark's own scale: hours on a GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the searchers")
    parser.add_argument("--report", action="store_true", help="of the runs that are there")
    options = parser.parse_args()
    config = SMOKE if options.smoke else FULL if options.full else QUICK
    options.seeds = 1 if options.smoke else options.seeds
    name = "nas_bench_201_full" if options.full else "nas_bench_201"
    path = script.data_file(Path(__file__).parent, "cifar10_sub32.npz")
    script.data_file(Path(__file__).parent, "nasbench201.npz")
    table = benchmarks.nas_bench_201_table(path.parent)
    row_of_encoding = {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}
    row_of = lambda weights: row_of_encoding[tuple(np.asarray(weights).argmax(-1).tolist())]
    task, valid = images(path, config)

    searchers = searches(config)
    jobs: dict[str, Callable[[int], dict]] = {"scores": lambda seed: run_scores(task, table, config, seed)}
    for job, (search, optimizer, steps_each) in searchers.items():
        folder = lambda seed, job=job: options.out / f"{name}_runs" / f"{job}-{seed}"
        one = functools.partial(run_search, search, optimizer, steps_each, task, valid, config)
        jobs[job] = lambda seed, one=one, folder=folder: one(seed, folder(seed), row_of)
    jobs["single-path one-shot"] = lambda seed: run_one_shot(task, valid, config, seed, row_of)
    if options.smoke:
        options.only = options.only or ["scores", "DARTS, first order", "single-path one-shot"]
    unknown = set(options.only or ()) - set(jobs)
    if unknown:
        sys.exit(f"There is no searcher {', '.join(sorted(unknown))} among {', '.join(jobs)}.")

    kept = options.out / f"{name}.json"
    runs: dict[str, dict[str, dict]] = {job: {} for job in jobs}
    if kept.exists() and not options.smoke:
        saved = json.loads(kept.read_text())
        if saved["config"] != list(config):
            sys.exit(f"{kept} holds runs of other sizes: {saved['config']}; these are {list(config)}. Move it away.")
        runs.update(saved["runs"])
    for seed in range(0 if options.report else options.seeds):
        for job in options.only or jobs:
            if str(seed) in runs[job]:
                continue
            started = time.process_time()
            run = jobs[job](seed)
            runs[job][str(seed)] = {**run, "seconds": round(time.process_time() - started, 1)}
            print(f"{job}, seed {seed}: {runs[job][str(seed)]['seconds']} s", run.get("row", ""), flush=True)
            shutil.rmtree(options.out / f"{name}_runs" / f"{job}-{seed}", ignore_errors=True)
            if not options.smoke:
                options.out.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps({"config": list(config), "runs": runs}))
    runs = {job: dict(sorted(seeds.items(), key=lambda item: int(item[0]))) for job, seeds in runs.items() if seeds}
    with np.load(path.parent / "nasbench201.npz") as data:
        text = report(runs, table, data, config, options)
    script.publish(
        Path(__file__).parent,
        "NAS-Bench-201 from supernets",
        text,
        options,
        name=name,
        picture="Skips, accuracies and eigenvalues over the searches",
    )
    if not options.smoke:
        plot(runs, table, options.out / f"{name}.png")

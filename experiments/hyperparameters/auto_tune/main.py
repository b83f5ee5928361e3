"""The four steps in order, the baselines, and the result."""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import pages, script
from experiments.hyperparameters import auto_tune
from experiments.hyperparameters.auto_tune.baselines import TreeOptions, baselines, earlier_baselines, trees
from experiments.hyperparameters.auto_tune.config import PRESETS, Config
from experiments.hyperparameters.auto_tune.learning import FineTuning, Learned, Learning, learn_folds
from experiments.hyperparameters.auto_tune.report import COMMITTED, finish
from experiments.hyperparameters.auto_tune.trials import Trials, train_and_validate
from experiments.hyperparameters.auto_tune.units import Collection, collect, select_units, stack_buckets
from metaopt import hypergrad, spaces

REFERENCE = "g(t'), no trial"


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    """Returns the arguments, the preset's name, and the configuration."""
    parser = argparse.ArgumentParser(
        "auto_tune", description=auto_tune.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="a few tables and steps")
    preset.add_argument("--full", action="store_true", help="all folds and seeds")
    parser.add_argument("--csv", metavar="FOLDER", help="your own tables: one CSV file each")
    parser.add_argument("--target", metavar="COLUMN", help="the column to predict in them")
    parser.add_argument("--packaged", action="store_true", help="leave METAOPT_DATA out")
    parser.add_argument("--out", metavar="FOLDER", default="results_local", help="where results go")
    parser.add_argument("--merge", metavar="JSON", nargs="+", help="make one table of runs over different folds")
    parser.add_argument("--resume", action="store_true", help="keep checkpoints in --out, and continue from them")
    parser.add_argument(
        "--baselines",
        metavar="JSON",
        help="take the scores of trials and trees from an earlier run with the same seed, which g has no part in",
    )
    parser.add_argument("--no-trees", action="store_true", help="leave forests and boosting out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", choices=range(5), help="which fifths to hold out, in turn")
    for field in dataclasses.fields(Config):
        if field.type in (int, float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type)
    args = parser.parse_args(argv)
    if bool(args.csv) != bool(args.target):
        parser.error("--csv and --target go together: the folder of tables, and the column to predict")
    name = "full" if args.full else "smoke" if args.smoke else "default"
    changed = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name, None) is not None
    }
    if args.folds:
        changed["folds"] = tuple(args.folds)
    return args, name, dataclasses.replace(PRESETS[name], **changed)


class Log:
    """Prints the time of each step, and keeps the seconds of some parts by name."""

    def __init__(self):
        self.begin, self.console = time.perf_counter(), Console()
        self.seconds: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        self.console.print(f"[{self.total():6.1f} s] {text}", highlight=False, markup=False)

    def total(self) -> float:
        return time.perf_counter() - self.begin


def main(argv=None) -> list[dict]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.merge:
        return finish([json.loads(Path(p).read_text()) for p in args.merge], out)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log = Log()
    collection = collect(args, config, log)
    learning = Learning(config)
    # Buckets are formed once, over all units, so that every fold runs the same programs.
    buckets = stack_buckets(collection.units, learning.no_features(collection), collection.rows(), config)
    held_out = select_units(buckets, np.flatnonzero(np.isin(collection.fold, config.folds)))
    trials = Trials(learning.problem, learning.scores, held_out, config)
    tuning = {n: FineTuning(learning, n, held_out) for n in config.fine_tune_steps}
    # On a second core, trees train and the programs of steps 3 and 4 compile while λ and g are learned.
    with ThreadPoolExecutor(max_workers=2) as pool:
        compiled = pool.submit(compile_programs, trials, tuning, learning)
        ensembles = None
        if not args.no_trees and not args.baselines:
            ensembles = pool.submit(trees, collection.units, trials.units, TreeOptions(config.tree_trials))
        learned = learn_folds(
            learning, collection, buckets, args.seed, out, f"{name}_fold" if args.resume else None, log
        )
        log.seconds["compile trials"] = compiled.result()
        if ensembles is not None:
            ensembles.result()  # ends here, so that nothing else runs while the methods are timed
        scores, costs, more = compare(args, collection, learning, learned, trials, tuning, ensembles, log)
    details = describe_run(sys.argv[1:] if argv is None else argv, args, name, collection, learned, trials, log)
    details |= more | {"scores": {label: values.tolist() for label, values in scores.items()}, "costs": costs}
    rows = finish([details], out)
    if name != "full" and COMMITTED.exists():
        print("For comparison, the committed table of the full run, which this run did not compute:\n")
        page = COMMITTED.read_text()
        print(page.removeprefix(pages.head(page)).lstrip())
    return rows


def compile_programs(trials: Trials, tuning: dict[int, FineTuning], learning: Learning) -> float:
    """Compiles the programs of trials and of fine-tuning. Returns the seconds for those of trials."""
    defaults = script.repeated(learning.default, len(trials.units))
    seconds = trials.compile(defaults)
    for tune in tuning.values():
        tune.compile(defaults)
    return seconds


def compare(
    args,
    collection: Collection,
    learning: Learning,
    learned: Learned,
    trials: Trials,
    tuning: dict[int, FineTuning],
    ensembles: Future | None,
    log: Log,
) -> tuple[dict[str, np.ndarray], dict[str, tuple], dict[str, Any]]:
    """Runs steps 3 and 4 and the baselines on the units of the held-out folds.

    Returns:
      test loss and error [units, 2] by method; (training runs, seconds) by method; and further fields of the result.
    """
    config = learning.config
    num = len(trials.units)
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(args.seed), 10_000), 16))
    # 3. Prediction.
    predicted = held_out_rows(learned.by_ensemble, collection, trials)
    one_for_all = stacked([learned.one_for_all[fold] for fold in collection.fold[trials.units]])
    scores, costs = {}, {}
    for label, hyperparams, extra in (
        ("defaults", script.repeated(learning.default, num), 0.0),
        ("one global λ", one_for_all, 0.0),
        (REFERENCE, predicted, log.seconds["metafeatures"]),
    ):
        start = time.perf_counter()
        scores[label] = trials(next(keys), hyperparams)[:, 1:]
        costs[label] = (1.0, (time.perf_counter() - start) / num + extra)
    one_member = None
    if config.num_predictors > 1:
        by_member = held_out_rows(learned.by_member, collection, trials)
        one_member = trials(next(keys), by_member)[:, 1].mean()
    log("predicted λ for held-out tables and trained with it")

    # 4. Fine-tuning.
    ratio = hypergradient_cost(learning, trials)
    for num_steps, tune in tuning.items():
        tune_key, run_key = jax.random.split(next(keys))
        tuned, seconds = tune(tune_key, predicted)
        start = time.perf_counter()
        label = f"g(t') + {num_steps} hypergradient steps"
        scores[label] = trials(run_key, tuned)[:, 1:]
        seconds = (seconds + time.perf_counter() - start) / num + log.seconds["metafeatures"]
        costs[label] = (num_steps * ratio + 2, seconds)
        log(f"fine-tuned by {num_steps} steps; one hypergradient costs {ratio:.2f} plain training runs")

    source, others = alternatives(args, keys, collection, learning, trials, scores["defaults"], ensembles, log)
    for label, (values, cost) in others:
        scores[label], costs[label] = values, cost
    encoded = jax.vmap(lambda hyperparams: spaces.encode(learning.space, hyperparams))(predicted)
    names = spaces.names(learning.space)
    return (
        scores,
        costs,
        {
            "hypergradient_cost": ratio,
            "one_member": one_member,
            "baselines": source,
            "trees_while_learning": ensembles is not None or (source or {}).get("trees_while_learning", False),
            "predicted": dict(zip(names, np.asarray(encoded).T.tolist(), strict=True)),
        },
    )


def held_out_rows(by_fold: dict[int, Any], collection: Collection, trials: Trials):
    """Returns λ of the units of the trials, each from the g that did not learn from its fold."""
    return stacked([jax.tree.map(lambda x, u=u: x[u], by_fold[collection.fold[u]]) for u in trials.units])


def stacked(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def hypergradient_cost(learning: Learning, trials: Trials) -> float:
    """Returns the cost of a hypergradient, in operations of plain training with its validation."""
    task = jax.tree.map(lambda x: x[0], trials.buckets[0].task)
    estimator, default = learning.estimator, learning.default
    plain = hypergrad.flops(lambda hp: train_and_validate(learning.problem, learning.config, hp, task), default)
    with_gradient = hypergrad.flops(
        lambda z: estimator.estimate(z, task, estimator.init(jax.random.key(0), z, task))[0].hypergrad,
        spaces.to_unconstrained(learning.space, default),
    )
    return with_gradient / plain


def alternatives(
    args,
    keys: Iterator[jax.Array],
    collection: Collection,
    learning: Learning,
    trials: Trials,
    defaults: np.ndarray,
    ensembles: Future | None,
    log: Log,
):
    """Returns the source of earlier results, or None, and the baselines: run here, or from these earlier results."""
    if not args.baselines:
        return None, baselines(keys, trials, learning.space, learning.config, ensembles, log)
    earlier = json.loads(Path(args.baselines).read_text())
    source = earlier.get("baselines") or {f: earlier[f] for f in ("command", "seconds", "num_cores")}
    source = {"trees_while_learning": earlier.get("trees_while_learning", False)} | source
    return source, earlier_baselines(earlier, defaults, collection.tables, collection.units, trials.units)


def describe_run(
    argv: list[str], args, name: str, collection: Collection, learned: Learned, trials: Trials, log: Log
) -> dict[str, Any]:
    """Returns how the result was made, and the tables that it is about."""
    config, units = trials.config, [collection.units[u] for u in trials.units]
    larger = os.environ.get("METAOPT_DATA") and not args.csv and not args.packaged
    command = f"python {script.place(Path(__file__).parent)} " + " ".join(argv)
    return {
        "command": ("METAOPT_DATA=... " if larger else "") + command,
        "preset": name,
        "num_seeds": config.num_seeds,
        "training_run": f"{config.num_steps} steps of {config.batch_size} rows",
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seconds": log.total(),
        "seconds_of": log.seconds,
        "reference": REFERENCE,
        "tables": [collection.tables[unit.table].name for unit in units],
        "families": [collection.tables[unit.table].family for unit in units],
        "seeds": [unit.seed for unit in units],
        "histories": {str(fold): [h.tolist() for h in pair] for fold, pair in learned.histories.items()},
    }

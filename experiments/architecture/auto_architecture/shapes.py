"""All folds of one shape of tasks."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architecture.auto_architecture.config import Config
from experiments.architecture.auto_architecture.darts import Darts
from experiments.architecture.auto_architecture.folds import run_darts, run_fold, run_records
from experiments.architecture.auto_architecture.image_table_tasks import (
    NUM_CLASSES,
    Unit,
    image_units,
    stack_units,
    table_units,
)
from experiments.architecture.auto_architecture.kept import Kept
from experiments.architecture.auto_architecture.prepared import Prepared, assign_folds
from experiments.architecture.auto_architecture.searcher import Meta, gradient_features, with_features
from experiments.architecture.auto_architecture.training import Shape, in_chunks


def processor_seconds(shape: Shape, meta: Meta, units: list[Unit], batch, test, codes, gradients: float):
    """Returns costs of parts of the work on one task: mean processor seconds over tasks, without compilation.

    The inputs of h are mostly computed by NumPy, whose operations are not counted. They are statistics of the training
    rows, and gradients at random weights.
    """
    key, some = jax.random.key(0), min(8, len(units))
    keys = jax.random.split(key, some)
    few = jax.tree.map(lambda x: x[:some], with_features(shape, batch, np.zeros((len(units), meta.num_features))))
    learned, rate = meta.hyperparams(key), jnp.float32(shape.config.rates[0])
    train = lambda code: shape.train(key, shape.one_hot(np.repeat(code[None], len(units), 0)), batch, test)[1]
    return {
        "training run": float(np.mean([train(code) for code in codes])),
        "look": float(np.mean([u.seconds for u in units])),
        "gradients": gradients,
        "fine-tuning": in_chunks(meta.fine_tune, (rate, learned), (keys, few), 4)[1],
    }


def outcomes_of(shape: Shape, codes: np.ndarray, key: jax.Array, batch, test) -> np.ndarray:
    """Returns [networks, tasks, 3] outcomes of networks, each trained on every task."""
    outcomes = []
    for i, code in enumerate(codes):
        weights = shape.one_hot(np.repeat(code[None], len(test["y"]), 0))
        outcomes.append(shape.train(jax.random.fold_in(key, i), weights, batch, test)[0])
    return np.stack(outcomes)


def losses_of_records(shape: Shape, codes: np.ndarray, key: jax.Array, batch, test) -> np.ndarray:
    """Returns [records, tasks] validation losses of networks [records, tasks, edges], clipped at the loss of chance."""
    keys = jax.random.split(jax.random.fold_in(key, 1_000_000), max(len(codes), 1))
    runs = [shape.train(k, shape.one_hot(c), batch, test) for k, c in zip(keys, codes, strict=False)]
    return np.minimum([outcomes[:, 0] for outcomes, _ in runs], np.log(NUM_CLASSES))


def run_shape(name: str, config: Config, use_folder: bool, seed: int, say: Callable, kept: Kept) -> None:
    """Runs the four steps and the comparison on tasks of one shape, fold by fold."""
    # 1. The meta-training set.
    units = {"images": image_units, "tables": table_units}[name](config.max_tasks, use_folder, seed)
    fold = assign_folds(units, min(config.num_folds, len({u.family for u in units})), seed)
    shape = Shape(name, config)
    batch, test = stack_units(units, config.smoothing)
    key = jax.random.fold_in(jax.random.key(seed), len(name))
    features_key, train_key, fold_key = jax.random.split(key, 3)
    gradients, gradient_seconds = gradient_features(shape, features_key, batch)
    say(
        f"{name}: {len(units)} tasks of {len({u.family for u in units})} families, {np.prod(shape.sizes())} "
        "architectures"
    )

    # Random networks on all tasks, for random search on each task and for the best fixed architecture.
    rng = np.random.default_rng((seed, 1))
    num = max(config.trained, *config.trials)
    codes = np.stack([rng.integers(0, size, num) for size in shape.sizes()], 1)

    train_random = lambda: {"outcomes": outcomes_of(shape, codes[: config.trained], train_key, batch, test).tolist()}
    leaves = jax.tree.leaves((batch._replace(features=None), test))
    data = functools.reduce(lambda total, leaf: zlib.crc32(np.ascontiguousarray(leaf), total), leaves, 0)
    random = kept.get(f"{name}, random networks", data, train_random)
    say(f"{name}: {config.trained} random networks on each task")
    # Each task gets its own networks: the few that all tasks share are not enough to estimate the value of an op.
    record_codes = np.stack([rng.integers(0, size, (config.records, len(units))) for size in shape.sizes()], -1)

    train_records = lambda: {"losses": losses_of_records(shape, record_codes, train_key, batch, test).tolist()}
    losses = np.zeros((0, len(units)))
    if config.records:
        records = kept.get(f"{name}, records", data, train_records)
        losses = np.array(records["losses"])
        say(f"{name}: {config.records} random networks more on each task, as records")
    meta = Meta(shape, len(units[0].features) + gradients.shape[1])

    def measure() -> dict[str, Any]:
        by_clock = processor_seconds(shape, meta, units, batch, test, codes[:4], gradient_seconds)
        tuning = {"fine-tuning": shape.tuning_alone()}
        return {"operations": shape.in_runs(batch, codes[:8], tuning), "seconds": by_clock}

    costs = kept.get(f"{name}, costs", data, measure)["seconds"]
    say(f"{name}: processor seconds a task, " + ", ".join(f"{part} {x:.4f}" for part, x in costs.items()))
    darts = Darts(shape)
    measure_darts = lambda: darts.costs(batch, codes[:8], jnp.float32(config.darts_rates[0]))
    kept.get(f"{name}, costs of DARTS", data, measure_darts)
    prepared = Prepared(
        shape,
        meta,
        units,
        fold,
        batch,
        test,
        gradients,
        codes,
        np.array(random["outcomes"]),
    )
    for f in config.folds:
        if f in fold:
            run = lambda f=f: run_fold(prepared, f, jax.random.fold_in(fold_key, f), seed, say)
            part = kept.get(f"{name}, fold {f}", data, run)
            if config.records:
                run = lambda f=f, part=part: run_records(
                    prepared, f, part, record_codes, losses, jax.random.fold_in(fold_key, f), seed
                )
                kept.get(f"{name}, records, fold {f}", data, run)
            for order in config.darts_orders:
                run = lambda f=f, order=order: run_darts(
                    prepared, darts, order, f, jax.random.fold_in(fold_key, f), seed, say
                )
                kept.get(f"{name}, DARTS, {order} order, fold {f}", data, run)

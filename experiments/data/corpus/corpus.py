"""Puts the corpus together, and lists its tasks."""

import collections
import csv
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.corpus.families import (
    Excluded,
    excluded_families,
    join_frames,
    table_columns,
)
from experiments.data.corpus.frames import Frame, numeric_columns
from experiments.data.corpus.targets import choose_targets, columns_of, make_task
from metaopt import tasks
from metaopt.training import report_progress

MAX_PER_FAMILY = 4  # tasks with rotated targets
_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """Tasks to learn from.

    Attributes:
      tables: those with a natural target first, and then those with a rotated one.
      rotated: [len(tables)] bool.
    """

    tables: list[tasks.Table]
    rotated: np.ndarray


def build(frames: Sequence[Frame], natural: Sequence[tasks.Table], excluded: Excluded, seed: int = 7) -> Corpus:
    """Builds the corpus.

    Args:
      frames: tables whose targets are rotated, by `read_frames`.
      natural: tables with their own target, such as those of the data folder. Simulated families are dropped.
      excluded: tables for judging. They are dropped with their whole families.
      seed: of targets, cuts and samples.
    """
    rng = np.random.default_rng(seed)
    families = join_frames(frames, natural)
    dropped = excluded_families(
        [*families, *(table.family for table in natural)],
        [
            *(excluded.has_name(f.item) or excluded.has_columns(numeric_columns(f)) for f in frames),
            *(
                excluded.has_name(t.name) or excluded.has_name(t.family) or excluded.has_columns(table_columns(t))
                for t in natural
            ),
        ],
    )
    kept = [t for t in natural if t.family not in dropped | tasks.SYNTHETIC_FAMILIES]
    rotated = []
    with report_progress(len(frames), None, "targets", unit="table") as report:
        for i, (frame, family) in enumerate(zip(frames, families, strict=True)):
            columns = {} if family in dropped else columns_of(frame, rng)
            if len(columns) >= 3:
                for target in choose_targets(columns, rng):
                    rotated.append(make_task(frame, family, columns, target, rng))
            report(i + 1)
    rotated = _few_per_family([table for table in rotated if table is not None], rng)
    _log.info("%d frames; %d families are kept for judging", len(frames), len(dropped))
    return Corpus([*kept, *rotated], np.arange(len(kept) + len(rotated)) >= len(kept))


def _few_per_family(tables: list[tasks.Table], rng: np.random.Generator) -> list[tasks.Table]:
    """Returns at most `MAX_PER_FAMILY` tables of each family, drawn at random."""
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for i in rng.permutation(len(tables)):
        counts[tables[i].family] += 1
        if counts[tables[i].family] <= MAX_PER_FAMILY:
            kept.append(tables[i])
    return kept


def row_hash(table: tasks.Table) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the sorted rows, with their classes."""
    rows = np.column_stack([np.nan_to_num(table.x.astype("<f8"), nan=-1e300), table.y.astype("<f8")])
    rows = rows[np.lexsort(rows.T[::-1])]
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16]


def write_list(corpus: Corpus, path: Path) -> None:
    """Writes one row per task: its name, family, source, sizes, and the hash of its rows."""
    header = ["name", "family", "source", "target", "rows", "columns", "classes", "row_hash"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for table, rotated in zip(corpus.tables, corpus.rotated, strict=True):
            kind = "rotated" if rotated else "natural"
            writer.writerow(
                [table.name, table.family, table.source, kind, *table.x.shape, table.num_classes, row_hash(table)]
            )

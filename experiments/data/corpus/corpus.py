"""Puts the corpus together, and lists its tasks."""

import collections
import csv
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.corpus.families import Excluded, excluded_families, join_frames, table_keys
from experiments.data.corpus.frames import Frame
from experiments.data.corpus.rules import rule_tables
from experiments.data.corpus.targets import (
    choose_many_classes,
    choose_numbers,
    choose_targets,
    columns_of,
    make_task,
)
from metaopt import tasks
from metaopt.training import report_progress

MAX_PER_FAMILY = 4  # tasks with rotated targets
_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """Tasks to learn from.

    Attributes:
      tables: those with a natural target first, then those with a rotated one, and then simulated rules.
      kinds: "natural", "rotated" or "rule" for each table.
    """

    tables: list[tasks.Table]
    kinds: list[str]


def build(
    frames: Sequence[Frame],
    natural: Sequence[tasks.Table],
    excluded: Excluded,
    seed: int = 7,
    per_family: int = MAX_PER_FAMILY,
    many_per_family: int = 0,
    num_rules: int = 0,
    numbers: bool = False,
) -> Corpus:
    """Builds the corpus.

    Args:
      frames: tables whose targets are rotated, by `read_frames`.
      natural: tables with their own target, such as those of the data folder. Simulated families are dropped.
      excluded: tables for judging. They are dropped with their whole families.
      seed: of targets, cuts and samples. The tasks of a frame depend on no other frame, except through the limits per
        family.
      per_family: the most tasks of a family with rotated targets. A smaller number gives some of the same tasks.
      many_per_family: the most tasks of a family with 13 to 32 classes.
      num_rules: the number of simulated tables with rules.
      numbers: whether targets are numeric columns, cut into intervals as `automl.AutoRegressor` does. `natural` only
        joins families then.
    """
    families, own_families = join_frames(frames, natural)
    dropped = excluded_families(
        [*families, *own_families],
        [
            *(excluded.has_name(f.item) or excluded.has_columns(f.keys) for f in frames),
            *(
                excluded.has_name(t.name) or excluded.has_name(t.family) or excluded.has_columns(table_keys(t))
                for t in natural
            ),
        ],
    )
    kept = [
        table._replace(family=family)
        for table, family in zip(natural, own_families, strict=True)
        if not numbers and family not in dropped and table.family not in tasks.SYNTHETIC_FAMILIES
    ]
    rotated, many = [], []
    with report_progress(len(frames), None, "targets", unit="table") as report:
        for i, (frame, family) in enumerate(zip(frames, families, strict=True)):
            rng = _rng(seed, frame.package, frame.item)
            columns = {} if family in dropped else columns_of(frame, rng)
            if len(columns) >= 3:
                chosen = choose_numbers(columns, rng) if numbers else choose_targets(columns, rng)
                for tables, targets in ((rotated, chosen), (many, choose_many_classes(columns))):
                    made = (make_task(frame, family, columns, target, rng) for target in targets)
                    tables.extend(table for table in made if table is not None)
            report(i + 1)
    rng = _rng(seed, "limits")
    rotated = _few_per_family(rotated, per_family, rng) + _few_per_family(many, many_per_family, rng)
    samples = excluded_families(families, (excluded.has_rows(f.keys) for f in frames))
    rotated = [table for table in rotated if table.family not in samples]
    rules = rule_tables(num_rules, seed)
    _log.info("%d frames; %d families are kept for judging", len(frames), len(dropped))
    kinds = ["natural"] * len(kept) + ["rotated"] * len(rotated) + ["rule"] * len(rules)
    return Corpus([*kept, *rotated, *rules], kinds)


def _rng(seed: int, *names: str) -> np.random.Generator:
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def _few_per_family(tables: list[tasks.Table], most: int, rng: np.random.Generator) -> list[tasks.Table]:
    """Returns at most `most` tables of each family, drawn at random."""
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for i in rng.permutation(len(tables)):
        counts[tables[i].family] += 1
        if counts[tables[i].family] <= most:
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
        for table, kind in zip(corpus.tables, corpus.kinds, strict=True):
            writer.writerow(
                [table.name, table.family, table.source, kind, *table.x.shape, table.num_classes, row_hash(table)]
            )

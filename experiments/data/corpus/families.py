"""Families of tables: which tables come from one source, and which are kept for judging."""

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data._folder import Folder, data_file
from experiments.data.corpus.frames import Frame, numeric_columns
from metaopt import tasks

MIN_DISTINCT = 15  # values of a column that identifies its table
MIN_STEM = 4  # letters of a name that identifies its source


def plain(name: str) -> str:
    """Returns the name in lower case, with letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def stem(name: str) -> str:
    """Returns the letters of the name. Parts of one source often differ only by a number."""
    return re.sub(r"[^a-z]", "", name.lower())


def fingerprint(values: np.ndarray) -> str | None:
    """Returns a hash of the sorted values of a column, or None if it has too few different values.

    It is the first 16 hexadecimal digits of the SHA-256 of the float64 values, rounded to four decimals.
    """
    values = np.sort(values[np.isfinite(values)])
    if len(np.unique(values)) < MIN_DISTINCT:
        return None
    return hashlib.sha256(np.round(values, 4).astype("<f8").tobytes()).hexdigest()[:16]


class Excluded(NamedTuple):
    """Tables that no corpus may hold, and tables like them.

    Attributes:
      name_hashes: of the plain names of tables; the first 16 digits of SHA-256.
      stems: of the names of tables and families. A table whose stem contains one of them, or is part of one, is
        excluded.
      fingerprints: of numeric columns.
      decimals: sets of values of columns of decimal fractions. A column with much the same set is excluded.
    """

    name_hashes: frozenset[str] = frozenset()
    stems: frozenset[str] = frozenset()
    fingerprints: frozenset[str] = frozenset()
    decimals: tuple[frozenset[float], ...] = ()

    def has_name(self, name: str) -> bool:
        """Whether a table or a family of this name is excluded."""
        if hashlib.sha256(plain(name).encode()).hexdigest()[:16] in self.name_hashes:
            return True
        own = stem(name)
        long = [s for s in self.stems if len(s) >= MIN_STEM]
        return own in self.stems or len(own) >= MIN_STEM and any(s in own or own in s for s in long)

    def has_columns(self, columns: Sequence[np.ndarray]) -> bool:
        """Whether a table with one of these columns is excluded."""
        if any(fingerprint(values) in self.fingerprints for values in columns):
            return True
        sets = [s for values in columns if (s := _decimals(values))]
        return any(_are_similar(a, b) for a in sets for b in self.decimals)


def reserved(path: Folder = None) -> Excluded:
    """Returns the tables of `reserved.json`, which are kept for a later judgment.

    Args:
      path: the data folder; by default, the environment variable METAOPT_DATA.
    """
    lists = json.loads(data_file("reserved.json", path).read_text())
    return Excluded(frozenset(lists["name_hashes"]), frozenset(), frozenset(lists["column_hashes"]))


def exclude(tables: Sequence[tasks.Table], also: Excluded) -> Excluded:
    """Returns `also` and these tables: their names, families and numeric columns."""
    columns = [values for table in tables for values in table_columns(table)]
    return Excluded(
        also.name_hashes,
        also.stems | {stem(name) for table in tables for name in (table.name, table.family)},
        also.fingerprints | {f for values in columns if (f := fingerprint(values))},
        (*also.decimals, *(s for values in columns if (s := _decimals(values)))),
    )


def table_columns(table: tasks.Table) -> list[np.ndarray]:
    """Returns the values that are present in each numeric column."""
    numeric = table.x[:, ~table.categorical].astype(np.float64)
    return [values[np.isfinite(values)] for values in numeric.T]


def _are_similar(a: frozenset[float], b: frozenset[float]) -> bool:
    """Whether more than half of all values are in both sets."""
    return len(a) < 2 * len(b) and len(b) < 2 * len(a) and len(a & b) > 0.5 * len(a | b)


def _decimals(values: np.ndarray) -> frozenset[float] | None:
    """Returns the different values of a column of decimal fractions. None for other columns."""
    distinct = np.unique(values)
    if len(distinct) < 40 or (values % 1 != 0).mean() <= 0.5:
        return None
    return frozenset(np.round(distinct, 4).tolist())


class _Sets:
    """Disjoint sets of 0 … n − 1, joined by shared keys."""

    def __init__(self, num: int):
        self.parents, self.first = list(range(num)), {}

    def root(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = i = self.parents[self.parents[i]]
        return i

    def join(self, i: int, key: Hashable) -> None:
        """Joins i to the first member with the same key."""
        self.parents[self.root(i)] = self.root(self.first.setdefault(key, i))


def join_frames(frames: Sequence[Frame], tables: Sequence[tasks.Table] = ()) -> list[str]:
    """Returns the family of each frame.

    Two tables are of one family if the stems of their names are equal, if they share a column of at least 40 different
    values that does not just count, or if most of their column names are equal. A family with one of `tables` has the
    name of that table's family.
    """
    sets = _Sets(len(frames) + len(tables))
    for i, frame in enumerate(frames):
        sets.join(i, stem(frame.item) or frame.item)
        for values in numeric_columns(frame):
            if len(np.unique(values)) >= 40 and not _counts(values):
                sets.join(i, fingerprint(values))
    for i, table in enumerate(tables, len(frames)):
        for key in (stem(table.name), stem(table.family), *map(fingerprint, table_columns(table))):
            if key:
                sets.join(i, key)
    names = [frozenset(plain(str(c)) for c in frame.data.columns) - {"rownames"} for frame in frames]
    for i, own in enumerate(names):
        for j in range(i):
            if len(own & names[j]) >= max(4, 0.6 * len(own | names[j])):
                sets.join(i, ("columns", sets.root(j)))
                sets.join(j, ("columns", sets.root(j)))
    named = {sets.root(i): table.family for i, table in enumerate(tables, len(frames))}
    first = {}
    for i, frame in enumerate(frames):
        first.setdefault(sets.root(i), f"{frame.package}:{frame.item}")
    return [named.get(sets.root(i), first[sets.root(i)]) for i in range(len(frames))]


def _counts(values: np.ndarray) -> bool:
    """Whether the column of whole numbers never falls, as years, times and row numbers do."""
    return bool((np.diff(values) >= 0).all() and (values % 1 == 0).all())


def excluded_families(families: Iterable[str], is_excluded: Iterable[bool]) -> set[str]:
    """Returns the families with an excluded member."""
    return {family for family, excluded in zip(families, is_excluded, strict=True) if excluded}

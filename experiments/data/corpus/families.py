"""Families of tables: which tables come from one source, and which are kept for judging."""

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data._folder import Folder, data_file
from experiments.data.corpus.columns import ColumnKey, identify
from experiments.data.corpus.frames import Frame
from metaopt import tasks

MIN_STEM = 4  # letters of a name that identifies its source


def plain(name: str) -> str:
    """Returns the name in lower case, with letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def stem(name: str) -> str:
    """Returns the letters of the name. Parts of one source often differ only by a number."""
    return re.sub(r"[^a-z]", "", name.lower())


def is_in_share(name: str, share: float) -> bool:
    """Whether a name is in a random but fixed share of all names. The hash of the name decides."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 < 10_000 * share


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

    def has_columns(self, keys: Sequence[ColumnKey]) -> bool:
        """Whether a table with one of these columns is excluded."""
        if any(key.fingerprints & self.fingerprints for key in keys):
            return True
        sets = [key.decimals for key in keys if key.decimals]
        return any(_are_similar(a, b) for a in sets for b in self.decimals)

    def has_rows(self, keys: Sequence[ColumnKey]) -> bool:
        """Whether a table seems to be a sample of the rows of an excluded one: at least two of its columns do."""
        sets = [key.decimals for key in keys if key.decimals]
        return sum(any(_is_sample(a, b) for b in self.decimals) for a in sets) >= 2


def reserved(path: Folder = None) -> Excluded:
    """Returns the tables of `reserved.json`, which are kept for a later judgment.

    Args:
      path: the data folder; by default, the environment variable METAOPT_DATA.
    """
    lists = json.loads(data_file("reserved.json", path).read_text())
    return Excluded(frozenset(lists["name_hashes"]), frozenset(), frozenset(lists["column_hashes"]))


def exclude(tables: Sequence[tasks.Table], also: Excluded) -> Excluded:
    """Returns `also` and these tables: their names, families and numeric columns."""
    keys = [key for table in tables for key in table_keys(table)]
    return Excluded(
        also.name_hashes,
        also.stems | {stem(name) for table in tables for name in (table.name, table.family)},
        also.fingerprints.union(*(key.fingerprints for key in keys)),
        (*also.decimals, *(key.decimals for key in keys if key.decimals)),
    )


def table_keys(table: tasks.Table) -> list[ColumnKey]:
    """Returns the key of each numeric column."""
    return [identify(values) for values in table.x[:, ~table.categorical].T]


def _are_similar(a: frozenset[float], b: frozenset[float]) -> bool:
    """Whether more than half of all values are in both sets."""
    return len(a) < 2 * len(b) and len(b) < 2 * len(a) and len(a & b) > 0.5 * len(a | b)


def _is_sample(a: frozenset[float], b: frozenset[float]) -> bool:
    """Whether most of a's values are in the larger set b, and most of them leave b if they are shifted a little."""
    if not len(b) > len(a) or len(a & b) <= 0.9 * len(a):
        return False
    values = np.array(sorted(b))
    places = next((d for d in range(4) if np.abs(np.round(values, d) - values).max() < 1e-6), 4)
    near = [np.round(np.array(sorted(a)) + shift * 10.0**-places, 4).tolist() for shift in (-3, -2, -1, 1, 2, 3)]
    return max(len(b.intersection(numbers)) for numbers in near) < 0.5 * len(a)


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


def join_frames(frames: Sequence[Frame], tables: Sequence[tasks.Table] = ()) -> tuple[list[str], list[str]]:
    """Returns the family of each frame, and that of each table.

    Two of them are of one family if the stems of their names are equal, or if most of their column names are equal.
    They are also of one family if they share a column of at least 40 different values that is not a mere count.
    Families of `tables` that share a source are joined. If some of `tables` are in a family, the first of them names
    it.
    """
    sets = _Sets(len(frames) + len(tables))
    for i, frame in enumerate(frames):
        sets.join(i, stem(frame.item) or frame.item)
    for i, table in enumerate(tables, len(frames)):
        for key in (stem(table.name), stem(table.family), ("family", table.family)):
            if key:
                sets.join(i, key)
    for i, keys in enumerate([*(frame.keys for frame in frames), *map(table_keys, tables)]):
        for column in keys:
            if column.joins:
                for key in sorted(column.fingerprints):
                    sets.join(i, key)
    _join_by_column_names(sets, frames)
    names = {}
    for i, table in enumerate(tables, len(frames)):
        names.setdefault(sets.root(i), table.family)
    for i, frame in enumerate(frames):
        names.setdefault(sets.root(i), f"{frame.package}:{frame.item}")
    families = [names[sets.root(i)] for i in range(len(frames) + len(tables))]
    return families[: len(frames)], families[len(frames) :]


def _join_by_column_names(sets: _Sets, frames: Sequence[Frame]) -> None:
    names = [frozenset(plain(str(c)) for c in frame.data.columns) - {"rownames"} for frame in frames]
    for i, own in enumerate(names):
        for j in range(i):
            if len(own & names[j]) >= max(4, 0.6 * len(own | names[j])):
                sets.join(i, ("columns", sets.root(j)))
                sets.join(j, ("columns", sets.root(j)))


def excluded_families(families: Iterable[str], is_excluded: Iterable[bool]) -> set[str]:
    """Returns the families with an excluded member."""
    return {family for family, excluded in zip(families, is_excluded, strict=True) if excluded}

"""Finds tables that hold the same rows, even if rows or columns are in another order, or columns are renamed.

A row is hashed from its values without the class. Rows with few, frequent values coincide by chance. Therefore the
columns of one table are shuffled one by one, and the number of common rows before and after is compared.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaopt.tasks._columns import looks_like_id

_MIN_ROWS, _MIN_SHARE = 5, 0.1  # minimal number of shared rows, also as a share of the smaller table's different rows
_MIN_RATIO = 4  # common rows / common rows after shuffling
_MIN_VALUES = 10  # different values of a numeric column; with fewer, columns may be equal by chance


def pairs_with_shared_rows(tables: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    """Finds tables that hold the same rows.

    Two rows are the same if they have the same values, in any order of the columns. It is enough if this is true of the
    numeric columns, because the codes of the others change if a level is missing.

    Two tables with equally many rows also hold the same rows if their columns hold the same values, in any order of the
    rows. It is enough that numeric columns with at least 10 different values match, if they are at least half of the
    columns of the narrower table. This finds copies with an additional column.

    Args:
      tables: any number of pairs (`x`, `categorical`), the arrays of a `Table`.

    Returns:
      Positions (i, j) with i < j, sorted.
    """
    if len(tables) < 2:
        return []
    inputs = [_informative(*table) for table in tables]
    pairs = set()
    for kind in ("ordered", "unordered", "numeric"):
        hashes = [np.unique(_row_hashes(x, categorical, kind)) for x, categorical in inputs]
        for (i, j), num_shared in _count_shared(hashes).items():
            small, large = (i, j) if len(hashes[i]) <= len(hashes[j]) else (j, i)
            if (i, j) not in pairs and num_shared >= max(_MIN_ROWS, _MIN_SHARE * len(hashes[small])):
                x, categorical = inputs[small]
                shuffled = np.random.default_rng(0).permuted(x, axis=0)
                by_chance = np.isin(np.unique(_row_hashes(shuffled, categorical, kind)), hashes[large]).sum()
                if num_shared > _MIN_RATIO * by_chance:
                    pairs.add((i, j))
    num_rows = collections.Counter(len(x) for x, _ in inputs)
    columns = [_columns(x, categorical) if num_rows[len(x)] > 1 else None for x, categorical in inputs]
    for (i, a), (j, b) in itertools.combinations(enumerate(columns), 2):
        if a is not None and b is not None and len(inputs[i][0]) == len(inputs[j][0]) and _share_columns(a, b):
            pairs.add((i, j))
    return sorted(pairs)


def _informative(x: np.ndarray, categorical: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns x [n, d] float32 and categorical [d], without columns that look like ids if other columns remain."""
    with np.errstate(over="ignore"):  # `prepare` rejects such values
        x = np.asarray(x).astype(np.float32) + np.float32(0)  # no -0.0
    x[np.isnan(x)] = np.nan  # one bit pattern
    categorical = np.asarray(categorical, bool)
    kept = np.array([is_category or not _is_id(v) for is_category, v in zip(categorical, x.T, strict=True)], bool)
    return (x[:, kept], categorical[kept]) if kept.any() else (x, categorical)


def _is_id(column: np.ndarray) -> bool:
    finite = column[np.isfinite(column)]
    return not (finite % 1).any() and looks_like_id(finite.tolist())


def _row_hashes(x: np.ndarray, categorical: np.ndarray, kind: str) -> np.ndarray:
    """Returns [n] uint64, sums over hashed values; "ordered" also hashes the column of a value."""
    cells = x.view(np.uint32).astype(np.uint64)
    if kind == "ordered":
        cells += np.arange(x.shape[1], dtype=np.uint64) << np.uint64(32)
    if kind == "numeric":
        if not categorical.any() or categorical.all():  # the same as "unordered", or no column
            return np.zeros(0, np.uint64)
        cells = cells[:, ~categorical]
    return _mixed(cells).sum(axis=1, dtype=np.uint64)


def _mixed(cells: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection of uint64 that looks random."""
    cells = cells + np.uint64(0x9E3779B97F4A7C15)
    cells = (cells ^ (cells >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    cells = (cells ^ (cells >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return cells ^ (cells >> np.uint64(31))


def _count_shared(hashes: list[np.ndarray]) -> collections.Counter[tuple[int, int]]:
    """Counts the hashes that each pair of tables shares; pairs that share none are omitted."""
    owners = np.repeat(np.arange(len(hashes)), [len(values) for values in hashes])
    values, place, counts = np.unique(np.concatenate(hashes), return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[place] > 1)
    repeated = repeated[np.argsort(place[repeated], kind="stable")]  # the owners of one hash stay sorted
    ends = np.cumsum(counts[counts > 1])
    pairs: collections.Counter[tuple[int, int]] = collections.Counter()
    for group in np.split(owners[repeated], ends[:-1]):
        pairs.update(itertools.combinations(group.tolist(), 2))
    return pairs


class _Columns(NamedTuple):
    """Hashes of columns that do not depend on the order of the rows. `d` columns.

    Attributes:
      hashes: [d] uint64; of the values of a numeric column, and of the counts of the levels of a categorical one.
      distinctive: [d] bool; the numeric columns with many different values.
    """

    hashes: np.ndarray
    distinctive: np.ndarray


def _columns(x: np.ndarray, categorical: np.ndarray) -> _Columns:
    hashes, distinctive = [], []
    for column, is_categorical in zip(x.T, categorical, strict=True):
        values, counts = np.unique(column, return_counts=True)
        cells = counts if is_categorical else np.ascontiguousarray(column).view(np.uint32)
        hashes.append(_mixed(cells.astype(np.uint64)).sum(dtype=np.uint64))
        distinctive.append(not is_categorical and len(values) >= _MIN_VALUES)
    return _Columns(np.array(hashes, np.uint64), np.array(distinctive, bool))


def _share_columns(a: _Columns, b: _Columns) -> bool:
    common = np.intersect1d(a.hashes[a.distinctive], b.hashes[b.distinctive])
    same = len(a.hashes) == len(b.hashes) and (np.sort(a.hashes) == np.sort(b.hashes)).all()
    return bool(same or 2 * len(common) >= max(1, min(len(a.hashes), len(b.hashes))))

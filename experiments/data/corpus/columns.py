"""Identifies a numeric column by its values, so that copies of it in other tables can be recognized."""

import hashlib
from typing import NamedTuple

import numpy as np

MIN_DISTINCT = 15  # values of a column that identifies its table
MIN_SHARED = 40  # values of a column that is compared with others
MAX_DECIMALS = 20_000  # more than any table for judging has


class ColumnKey(NamedTuple):
    """Identifies a numeric column.

    Attributes:
      fingerprints: hashes of its values, and of its values in float32. Empty if there are too few different values.
      decimals: its different values, if most are decimal fractions; else None.
      joins: whether two tables with this column count as tables of one source. If so, the column has many different
        values, and is not a mere count such as a row number.
    """

    fingerprints: frozenset[str] = frozenset()
    decimals: frozenset[float] | None = None
    joins: bool = False


def identify(values: np.ndarray) -> ColumnKey:
    """Returns the key of a column. Missing values are ignored."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < MIN_DISTINCT:
        return ColumnKey()
    short = shortest_decimals(distinct)
    prints = frozenset(fingerprint(np.repeat(v, counts)) for v in (distinct, short))
    decimals = frozenset(np.round(short, 4).tolist())
    if not (MIN_SHARED <= len(decimals) <= MAX_DECIMALS and (values % 1 != 0).mean() > 0.5):
        decimals = None
    return ColumnKey(prints, decimals, len(distinct) >= MIN_SHARED and not _counts(values))


def fingerprint(values: np.ndarray) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the sorted float64 values, rounded to four decimals."""
    return hashlib.sha256(np.round(np.sort(values), 4).astype("<f8").tobytes()).hexdigest()[:16]


def shortest_decimals(values: np.ndarray) -> np.ndarray:
    """Returns, for each value, the shortest decimal fraction with the same float32.

    This recovers numbers that were rounded to float32: 12345.1 from 12345.099609375. It works for numbers of at most
    seven digits.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return single.astype("U32").astype(np.float64)


def _counts(values: np.ndarray) -> bool:
    """Whether the column of whole numbers never falls, as years, times and row numbers do."""
    return bool((np.diff(values) >= 0).all() and (values % 1 == 0).all())

"""Turns a table into arrays for training a network: splits the rows, then encodes them by their training statistics.

Nothing is fitted on validation or test rows. Medians, quantiles, levels and the choice of columns come only from
training rows. The same rows are also kept unencoded, for learners that prefer this (`Rows.raw`, for forests).
"""

import functools
import logging
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from metaopt.tasks._columns import merged_values
from metaopt.tasks._tables import Table

_log = logging.getLogger(__name__)

SCALINGS = ("quantile", "standard")


class Rows(NamedTuple):
    """Some rows of a table. `D` encoded columns, `d` original ones.

    Attributes:
      x: [n, D] float32, encoded.
      y: [n] int32 in 0..C-1.
      raw: [n, d] float32: original numbers, with medians in the gaps; categories as codes, with -1 in the gaps.
      index: [n] int64, the position of each row in the table.
    """

    x: np.ndarray
    y: np.ndarray
    raw: np.ndarray
    index: np.ndarray


class PreparedTable(NamedTuple):
    """A table that is split and encoded.

    Attributes:
      name: of the table.
      family: of the table.
      train: the rows for the inner loss.
      valid: the rows for the outer loss.
      test: the rows that only the experiment uses.
      num_features: D.
      num_classes: C.
      classes: [C] int32, the number of each class in the original table.
      categorical: [d] bool, of the columns of `raw`.
    """

    name: str
    family: str
    train: Rows
    valid: Rows
    test: Rows
    num_features: int
    num_classes: int
    classes: np.ndarray
    categorical: np.ndarray


def prepare(
    table: Table,
    *,
    seed: int = 0,
    valid_fraction: float = 0.2,
    test_fraction: float = 0.2,
    max_rows: int = 5000,
    max_classes: int | None = None,
    max_features: int = 128,
    max_levels: int = 10,
    scaling: str = "quantile",
) -> PreparedTable:
    """Splits a table into training, validation and test rows, and encodes it.

    The split is stratified: every class has its share in each part, to within a row, and at least one training row. A
    numeric column becomes one column. Gaps are filled with the training median. Then, depending on `scaling`,

    * "quantile": Φ⁻¹(u), where u is the mid-rank of x among (at most 200) quantiles of the training rows. This turns
      any continuous variable into a normal one. Then the column gets zero mean and unit variance;
    * "standard": zero mean and unit variance.

    Finally, x / √(1 + (x / 3)²) clips the values softly to (-3, 3). If training rows have gaps, a second column marks
    them. A categorical column is encoded by its number of levels. Two levels give one column of ∓1 (0 for neither). Up
    to `max_levels` levels give one column per level (all zeros for none of them). More levels give columns for the
    `max_levels` - 1 most frequent ones and one column for the others. Columns that are constant on the training rows
    are dropped.

    Args:
      table: the table to prepare.
      seed: of the split and of the subsampling; equal seeds give equal arrays.
      valid_fraction: share of the rows, in (0, 1).
      test_fraction: share of the rows, in [0, 1).
      max_rows: a larger table is subsampled, stratified by class.
      max_classes: if there are more, the rows of the rarest classes are dropped; None keeps all.
      max_features: if the encoding gives more columns, only those with the largest F statistic stay. It is computed on
        training rows by a one-way analysis of variance between the classes.
      max_levels: at least 2.
      scaling: "quantile" or "standard".

    Returns:
      A `PreparedTable`, with its rows in random order.

    Raises:
      ValueError: if an argument is out of range, or the arrays of the table do not fit together.
      ValueError: if `x` is not real, or not finite in float32, or `y` is not classes as integers from 0.
      ValueError: if float32 merges the codes of a categorical column.
      ValueError: if fewer than 2 classes, no varying column, or no validation or test row remains.

    Source: quantile transform, Gorishniy et al., NeurIPS 2021, https://arxiv.org/abs/2106.11959; soft clipping,
    Holzmüller et al., NeurIPS 2024, https://arxiv.org/abs/2407.04491
    """
    if not 0 < valid_fraction < 1 or not 0 <= test_fraction < 1 or valid_fraction + test_fraction >= 1:
        raise ValueError(
            "`valid_fraction` and `test_fraction` must leave rows to train on; "
            f"got {valid_fraction} and {test_fraction}."
        )
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {SCALINGS}; got {scaling!r}.")
    sizes = {"max_rows": (max_rows, 3), "max_features": (max_features, 1), "max_levels": (max_levels, 2)}
    for name, (value, least) in (sizes | {"max_classes": (2 if max_classes is None else max_classes, 2)}).items():
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    table, raw = _checked(table)
    rng = np.random.default_rng(seed)
    index = _usable_rows(table, max_rows, max_classes, rng)
    train, valid, test = _split(table.y, index, (valid_fraction, test_fraction), rng)
    classes = np.unique(table.y[train])
    if len(classes) < 2:
        raise ValueError(f"table {table.name} has fewer than 2 classes.")
    lost = np.setdiff1d(np.unique(table.y), classes)
    if len(lost):
        _log.warning("table %s: classes %s have no training row and are dropped", table.name, lost.tolist())
        valid, test = (rows[np.isin(table.y[rows], classes)] for rows in (valid, test))
    for name, fraction, rows in (("valid", valid_fraction, valid), ("test", test_fraction, test)):
        if fraction > 0 and not len(rows):
            raise ValueError(
                f"table {table.name}: `{name}_fraction` {fraction} of {len(index)} rows leaves no {name} row, because "
                "each class keeps a row to train on. Take a larger fraction or a larger table."
            )
    used = np.concatenate([train, valid, test])
    x = _encode(table, train, used, max_levels, scaling)
    x = _best_columns(table.name, x, np.searchsorted(classes, table.y[train]), len(classes), max_features)
    raw = _filled(table, raw, train)
    parts = zip(np.split(x, np.cumsum([len(train), len(valid)])), (train, valid, test), strict=True)
    rows = [Rows(part, np.searchsorted(classes, table.y[i]).astype(np.int32), raw[i], i) for part, i in parts]
    return PreparedTable(
        name=table.name,
        family=table.family,
        train=rows[0],
        valid=rows[1],
        test=rows[2],
        num_features=x.shape[1],
        num_classes=len(classes),
        classes=classes.astype(np.int32),
        categorical=table.categorical,
    )


def encode(x: np.ndarray, y: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    """Encodes all rows of a table as `prepare` does by default: [n, D] float32, D = 0 if no column varies."""
    rows = np.arange(len(y))
    encoded = _encode(Table("", "", x, y, categorical), rows, rows, 10, "quantile")
    if not encoded.shape[1]:
        return encoded.astype(np.float32)
    return _best_columns("", encoded, y, int(y.max()) + 1, 128)


def _usable_rows(table: Table, max_rows: int, max_classes: int | None, rng) -> np.ndarray:
    """Returns the rows of the most frequent classes, at most `max_rows` of them."""
    index = np.arange(len(table.y))
    labels, counts = np.unique(table.y, return_counts=True)
    if max_classes is not None and len(labels) > max_classes:
        frequent = labels[np.argsort(-counts, kind="stable")[:max_classes]]
        index = index[np.isin(table.y, frequent)]
        _log.warning("table %s: only its %d most frequent classes are kept", table.name, max_classes)
    if len(index) > max_rows:
        index = _split(table.y, index, (1.0 - max_rows / len(index),), rng)[0]
    return index


def _encode(table: Table, train: np.ndarray, used: np.ndarray, max_levels: int, scaling: str) -> np.ndarray:
    """Returns [len(used), D] encoded columns without those that are constant on `train`, the first rows of `used`."""
    blocks = []
    for column, is_categorical in zip(table.x.T.astype(np.float64), table.categorical, strict=True):
        if is_categorical:
            blocks.append(_encode_levels(column[train], column[used], max_levels))
        else:
            blocks.append(_encode_numbers(column[train], column[used], scaling))
    x = np.concatenate(blocks, axis=1) if blocks else np.zeros((len(used), 0))
    return x[:, np.ptp(x[: len(train)], axis=0) > 0]


def _best_columns(name: str, x: np.ndarray, y: np.ndarray, num_classes: int, max_features: int) -> np.ndarray:
    """Returns the columns with the largest F statistic on the training rows, whose classes are y, as float32."""
    if not x.shape[1]:
        raise ValueError(f"table {name} has no column that varies over its training rows.")
    if x.shape[1] > max_features:
        _log.info("table %s: %d of %d encoded columns are kept", name, max_features, x.shape[1])
        statistic = _f_statistic(x[: len(y)], y, num_classes)
        x = x[:, np.sort(np.argsort(-statistic, kind="stable")[:max_features])]
    return x.astype(np.float32)


def _filled(table: Table, raw: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Fills the gaps of `raw`: with the median of the training rows, and with -1 in categorical columns."""
    for j, is_categorical in enumerate(table.categorical):
        seen = table.x[train, j].astype(np.float64)
        seen = seen[~np.isnan(seen)]
        raw[np.isnan(raw[:, j]), j] = -1 if is_categorical else np.median(seen) if len(seen) else 0.0
    return raw


def _checked(table: Table) -> tuple[Table, np.ndarray]:
    """Returns the table as arrays, and its `x` in float32. Raises ValueError if a shape, type or value is wrong."""
    x, y, categorical = np.asarray(table.x), np.asarray(table.y), np.asarray(table.categorical, bool)
    if x.ndim != 2 or y.shape != x.shape[:1] or categorical.shape != x.shape[1:]:
        raise ValueError(
            f"table {table.name}: `x` must be [rows, columns], `y` [rows] and `categorical` [columns]; got "
            f"{x.shape}, {y.shape} and {categorical.shape}."
        )
    if x.dtype.kind not in "biuf":
        raise ValueError(
            f"table {table.name}: `x` must be real numbers, NaN where missing; got {x.dtype}. Number the values "
            "of text columns, and split complex columns into two."
        )
    highest = np.iinfo(np.int32).max
    if y.dtype.kind not in "iu" or np.min(y, initial=0) < 0 or np.max(y, initial=0) > highest:
        raise ValueError(
            f"table {table.name}: `y` must be classes as integers from 0 on; got {y.dtype}, such as "
            f"{y[:3].tolist()}. `np.unique(y, return_inverse=True)[1]` makes them so."
        )
    with np.errstate(over="ignore"):  # checked below
        narrow = x.astype(np.float32)
    if np.isinf(narrow).any():
        row, column = np.argwhere(np.isinf(narrow))[0]
        raise ValueError(
            f"table {table.name} has infinite values in float32: column {column} of `x` has {x[row, column]} in row "
            f"{row}. Rescale it, or write missing values as NaN."
        )
    for j, num_lost in merged_values(x).items():
        if categorical[j]:
            raise ValueError(
                f"table {table.name}: float32 merges {num_lost} of the codes in the categorical column {j} of `x`. "
                "Number the levels 0, 1, 2 ... with `np.unique(column, return_inverse=True)[1]`."
            )
        _log.warning(
            "table %s: float32 merges %d values of column %d of `x`; remove the column if it is an id, otherwise "
            "subtract its smallest value",
            table.name,
            num_lost,
            j,
        )
    return table._replace(x=x, y=y, categorical=categorical), narrow


def _split(y: np.ndarray, index: np.ndarray, fractions: tuple[float, ...], rng) -> list[np.ndarray]:
    """Returns the rest, then one part per fraction, in random order. Each class of `index` keeps a row in the rest.

    Counts are rounded after summing them over the classes in random order, so that the sizes of the parts are also
    right.
    """
    classes = rng.permutation(np.unique(y[index]))
    members = [rng.permutation(index[y[index] == c]) for c in classes]
    sizes = np.array([len(m) for m in members])
    ends = np.round(np.cumsum(sizes)[:, None] * np.array(fractions)).astype(int)
    wanted = np.diff(ends, axis=0, prepend=0)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for member, take in zip(members, wanted, strict=True):
        for k in reversed(range(len(take))):
            take[k] -= max(0, min(take[k], take.sum() - (len(member) - 1)))
        pieces = np.split(member, np.cumsum(take))
        for k, piece in enumerate([pieces[-1], *pieces[:-1]]):
            parts[k].append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def _encode_numbers(train: np.ndarray, column: np.ndarray, scaling: str) -> np.ndarray:
    missing = np.isnan(train)
    seen = train[~missing]
    if not len(seen):
        return np.zeros((len(column), 0))

    def fill(x):
        return np.where(np.isnan(x), np.median(seen), x)

    if scaling == "quantile":
        levels = np.linspace(0.0, 1.0, min(200, len(seen)))
        quantiles = np.quantile(seen, levels)

        def transform(x):
            return _normal_scores(fill(x), quantiles, levels)
    else:
        transform = fill
    fitted = transform(train)
    scale = fitted.std()
    scaled = (transform(column) - fitted.mean()) / (scale if scale > 1e-12 * np.abs(fitted).max() else 1.0)
    encoded = [scaled / np.sqrt(1.0 + (scaled / 3.0) ** 2)]
    if missing.any():
        encoded.append(np.isnan(column))
    return np.stack(encoded, axis=1).astype(np.float64)


def _normal_scores(x: np.ndarray, quantiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Φ⁻¹ of the mid-rank: for repeated values, halfway between the ranks of the first and of the last one."""
    first = np.searchsorted(quantiles, x, side="left")
    last = np.searchsorted(quantiles, x, side="right") - 1
    tied = last >= first
    between = np.interp(x, quantiles, levels)
    top = len(levels) - 1
    rank = np.where(tied, (levels[np.minimum(first, top)] + levels[np.clip(last, 0, top)]) / 2, between)
    edge = 0.5 / len(levels)
    return np.interp(np.clip(rank, edge, 1.0 - edge), *_normal_table())


@functools.cache
def _normal_table() -> tuple[np.ndarray, np.ndarray]:
    """u and Φ⁻¹(u), on a grid fine enough to interpolate."""
    u = np.linspace(0.0, 1.0, 4001)[1:-1]
    return u, np.array([NormalDist().inv_cdf(v) for v in u])


def _encode_levels(train: np.ndarray, column: np.ndarray, max_levels: int) -> np.ndarray:
    levels, counts = np.unique(train[~np.isnan(train)], return_counts=True)
    missing = [np.isnan(column)] if np.isnan(train).any() else []
    if len(levels) == 2:
        return np.stack([1.0 * (column == levels[1]) - (column == levels[0]), *missing], axis=1)
    others = []
    if len(levels) > max_levels:
        levels = np.sort(levels[np.argsort(-counts, kind="stable")[: max_levels - 1]])
        others = [~np.isin(column, levels) & ~np.isnan(column)]
    encoded = [column == level for level in levels] + others + missing
    return np.stack(encoded, axis=1).astype(np.float64) if encoded else np.zeros((len(column), 0))


def _f_statistic(x: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """[D] variance between the class means over variance within the classes, up to a constant."""
    onehot = np.eye(num_classes)[y]
    counts = onehot.sum(axis=0)
    means = onehot.T @ x / counts[:, None]
    between = counts @ (means - x.mean(axis=0)) ** 2
    within = ((x - means[y]) ** 2).sum(axis=0)
    return between / np.maximum(within, 1e-9 * (between + 1e-30))

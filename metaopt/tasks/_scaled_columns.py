"""Encodes columns as inputs of a network: normal scores of numbers, one column for each level of a category.

The statistics come from the rows that `fit_columns` gets. `FittedColumns.transform` encodes these rows or new ones.
"""

import functools
import logging
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_log = logging.getLogger(__name__)

SCALINGS = ("quantile", "standard")
LARGEST = 1e15  # larger numbers would overflow in squares


class FittedColumns(NamedTuple):
    """The statistics of `d` columns. All fields are arrays, so that `numpy.savez` can save `_asdict()`.

    Attributes:
      categorical: [d] bool.
      has_gaps: [d] bool, whether values are missing; if so, a column marks them.
      has_others: [d] bool, whether one column marks all rare levels together ("others").
      fill: [d] float64, the median of a numeric column; NaN if the column is categorical or has no values.
      mean: [d] float64, of the transformed column.
      scale: [d] float64, the divisor of the transformed column.
      num_knots: [d] int64.
      knots: [sum of `num_knots`] float64, the quantiles of each numeric column and the levels of each categorical one.
      kept: [D0] bool, which of the encoded columns are in the result, D of them.
    """

    categorical: np.ndarray
    has_gaps: np.ndarray
    has_others: np.ndarray
    fill: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    num_knots: np.ndarray
    knots: np.ndarray
    kept: np.ndarray

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Encodes rows by the statistics of the rows that `fit_columns` got.

        An unseen level is marked in the column of rare levels. Without this column, it has zeros in all columns of its
        category. Gaps in a numeric column become the median.

        Args:
          x: [n, d], the columns of `fit_columns` in the same order.

        Returns:
          [n, D] float32. The encoding of a row does not depend on the other rows. Numbers beyond ±10¹⁵ count as ±10¹⁵.

        Raises:
          ValueError: if `x` has another number of columns.
        """
        columns = _bounded(x)
        if columns.ndim != 2 or len(columns) != len(self.categorical):
            raise ValueError(f"`x` must be [rows, {len(self.categorical)}]; got shape {np.shape(x)}.")
        return _encoded(self, columns)[:, self.kept].astype(np.float32)


def fit_columns(
    x: np.ndarray,
    categorical: np.ndarray,
    *,
    y: np.ndarray | None = None,
    max_features: int | None = None,
    max_levels: int = 10,
    scaling: str = "quantile",
) -> FittedColumns:
    """Computes the statistics by which `FittedColumns.transform` encodes rows.

    A numeric column becomes one column. Gaps are filled with the median. Then, depending on `scaling`,

    - "quantile": Φ⁻¹(u), where u is the mid-rank of x among (at most 200) quantiles of the column. This turns any
      continuous variable into a normal one. Then the column gets zero mean and unit variance;
    - "standard": zero mean and unit variance.

    Finally, x / √(1 + (x / 3)²) clips the values softly to (-3, 3). If the rows have gaps, a second column marks them.
    The encoding of a categorical column depends on its number of levels. Two levels give one column of ∓1 (0 for gaps
    and unseen levels). Up to `max_levels` levels give one column per level (all zeros for gaps and unseen levels). More
    levels give columns for the `max_levels` - 1 most frequent ones and one column for the others. Constant encoded
    columns are dropped.

    Args:
      x: [n, d] real numbers, NaN where missing, finite otherwise; a categorical column holds codes.
      categorical: [d] bool.
      y: [n] classes, needed for `max_features` only.
      max_features: if the encoding has more columns, only those with the largest F statistic stay, by a one-way
        analysis of variance between the classes. None keeps all.
      max_levels: at least 2.
      scaling: "quantile" or "standard".

    Returns:
      `FittedColumns`. They may have D = 0 columns.

    Raises:
      ValueError: if `scaling` is unknown, `max_levels < 2`, or `max_features` has no `y`.

    Source: quantile transform, Gorishniy et al., NeurIPS 2021, https://arxiv.org/abs/2106.11959; soft clipping,
    Holzmüller et al., NeurIPS 2024, https://arxiv.org/abs/2407.04491
    """
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {SCALINGS}; got {scaling!r}.")
    if max_levels < 2:
        raise ValueError(f"`max_levels` must be at least 2; got {max_levels}.")
    if max_features is not None and y is None:
        raise ValueError("`max_features` chooses columns by classes: pass them as `y`.")
    columns = _bounded(x)
    categorical = np.asarray(categorical, bool)
    parts = [
        _fit_levels(column, max_levels) if is_categorical else _fit_numbers(column, scaling)
        for column, is_categorical in zip(columns, categorical, strict=True)
    ]
    fitted = FittedColumns(
        categorical=categorical,
        has_gaps=np.isnan(columns).any(axis=1),
        has_others=np.array([part.has_others for part in parts], bool),
        fill=np.array([part.fill for part in parts], np.float64),
        mean=np.array([part.mean for part in parts], np.float64),
        scale=np.array([part.scale for part in parts], np.float64),
        num_knots=np.array([len(part.knots) for part in parts], np.int64),
        knots=np.concatenate([np.zeros(0), *(part.knots for part in parts)]),
        kept=np.zeros(0, bool),
    )
    encoded = _encoded(fitted, columns)
    kept = np.ptp(encoded, axis=0) > 0 if encoded.shape[1] else np.zeros(0, bool)
    if y is not None and max_features is not None and kept.sum() > max_features:
        labels = np.unique(y, return_inverse=True)[1].reshape(-1)  # a class may have no rows
        statistic = _f_statistic(encoded[:, kept], labels, int(labels.max()) + 1)
        best = np.flatnonzero(kept)[np.argsort(-statistic, kind="stable")[:max_features]]
        _log.info("%d of %d encoded columns are kept", max_features, kept.sum())
        kept = np.isin(np.arange(len(kept)), best)
    return fitted._replace(kept=kept)


def _bounded(x: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(x).astype(np.float64).T, -LARGEST, LARGEST)


class _Statistics(NamedTuple):
    knots: np.ndarray
    fill: float = np.nan
    mean: float = 0.0
    scale: float = 1.0
    has_others: bool = False


def _fit_numbers(column: np.ndarray, scaling: str) -> _Statistics:
    seen = column[~np.isnan(column)]
    if not len(seen):
        return _Statistics(np.zeros(0))
    knots = np.quantile(seen, np.linspace(0.0, 1.0, min(200, len(seen)))) if scaling == "quantile" else np.zeros(0)
    fill = np.median(seen)
    transformed = _transformed(column, fill, knots)
    scale = transformed.std()
    scale = scale if scale > 1e-12 * np.abs(transformed).max() else 1.0
    return _Statistics(knots, fill, transformed.mean(), scale)


def _fit_levels(column: np.ndarray, max_levels: int) -> _Statistics:
    levels, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    if len(levels) <= max_levels:
        return _Statistics(levels)
    return _Statistics(np.sort(levels[np.argsort(-counts, kind="stable")[: max_levels - 1]]), has_others=True)


def _encoded(fitted: FittedColumns, columns: np.ndarray) -> np.ndarray:
    """Returns [n, D0] float64 for [d, n] columns, with the encoded columns that are constant."""
    knots = np.split(fitted.knots, np.cumsum(fitted.num_knots)[:-1])
    blocks: list[np.ndarray] = []
    for j, column in enumerate(columns):
        missing = np.isnan(column)
        if fitted.categorical[j]:
            blocks += _encoded_levels(column, missing, knots[j], fitted.has_others[j])
        elif not np.isnan(fitted.fill[j]):
            scaled = (_transformed(column, fitted.fill[j], knots[j]) - fitted.mean[j]) / fitted.scale[j]
            blocks.append(scaled / np.sqrt(1.0 + (scaled / 3.0) ** 2))
        if fitted.has_gaps[j] and (fitted.categorical[j] or not np.isnan(fitted.fill[j])):
            blocks.append(missing)
    return np.stack(blocks, axis=1).astype(np.float64) if blocks else np.zeros((columns.shape[1], 0))


def _encoded_levels(column: np.ndarray, missing: np.ndarray, levels: np.ndarray, has_others: bool) -> list[np.ndarray]:
    if len(levels) == 2 and not has_others:
        return [1.0 * (column == levels[1]) - (column == levels[0])]
    others = [~np.isin(column, levels) & ~missing] if has_others else []
    return [column == level for level in levels] + others


def _transformed(column: np.ndarray, fill: float, knots: np.ndarray) -> np.ndarray:
    filled = np.where(np.isnan(column), fill, column)
    return _normal_scores(filled, knots, np.linspace(0.0, 1.0, len(knots))) if len(knots) else filled


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


def _f_statistic(x: np.ndarray, y: np.ndarray, num_classes: int) -> np.ndarray:
    """[D] variance between the class means over variance within the classes, up to a constant."""
    onehot = np.eye(num_classes)[y]
    counts = onehot.sum(axis=0)
    means = onehot.T @ x / counts[:, None]
    between = counts @ (means - x.mean(axis=0)) ** 2
    within = ((x - means[y]) ** 2).sum(axis=0)
    return between / np.maximum(within, 1e-9 * (between + 1e-30))

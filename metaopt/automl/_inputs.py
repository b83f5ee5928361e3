"""The inputs of the models of one fold: statistics of its training rows, applied to any rows."""

from typing import Any, NamedTuple

import numpy as np

from metaopt.automl._kinds import Views
from metaopt.tasks import FittedColumns, fit_columns

MAX_DENSE = 128  # columns of the inputs of networks and linear models
_MAX_INTERVALS = 10  # into which a numeric target is cut


class TargetTable(NamedTuple):
    """Target encodings of one column.

    Attributes:
      column: its position in x.
      levels: [L] the codes of the levels.
      values: [L, T] their smoothed target means: T = 1 for numbers and 2 classes, else the number of classes.
      default: [T] the target means of all rows, for unseen levels and gaps.
    """

    column: int
    levels: np.ndarray
    values: np.ndarray
    default: np.ndarray


class Inputs(NamedTuple):
    """Fitted inputs of one fold.

    Attributes:
      targets: one table for each categorical column of many levels.
      kept: [k] the columns of x that trees read.
      medians: [k + T] of the columns for trees, which replace gaps where a model needs it.
      fitted: quantiles and levels of the dense columns.
    """

    targets: tuple[TargetTable, ...]
    kept: np.ndarray
    medians: np.ndarray
    fitted: FittedColumns


def fit_inputs(
    x: np.ndarray,
    y: np.ndarray,
    categorical: np.ndarray,
    high_cardinality: np.ndarray,
    repeats: np.ndarray,
    num_classes: int,
    seed: int,
    units: np.ndarray | None = None,
) -> tuple[Inputs, Views]:
    """Fits the inputs on training rows.

    Args:
      x: [n, d] numbers with NaN in gaps, and codes of categories.
      y: [n] classes or numbers.
      categorical: [d] bool.
      high_cardinality: [d] bool, categorical columns that get target encodings.
      repeats: positions of rows, each repeated about as often as its weight says.
      num_classes: C, or 0 for regression.
      seed: the seed of the folds of the target encoding.
      units: [n] rows with the same number, such as a group or copies of a row, are in one fold of the target encoding.

    Returns:
      The fitted inputs, and the views of the training rows. Target encodings in these views are out of fold: a row's
      own target does not enter. So they differ from `apply_inputs` for the same rows.
    """
    tables, encoded = [], [np.zeros((len(x), 0))]
    units = np.arange(len(x)) if units is None else units
    has_one_class = num_classes and len(np.unique(y[repeats])) == 1  # nothing to encode
    for column in np.flatnonzero(high_cardinality & (not has_one_class)):
        table, values = _fit_target_table(x[:, column], int(column), y, repeats, units, num_classes, seed)
        tables.append(table)
        encoded.append(values)
    targets = np.concatenate(encoded, axis=1)
    kept = np.setdiff1d(np.arange(x.shape[1]), [table.column for table in tables])
    wide = np.concatenate([x, targets], axis=1)
    fitted = fit_columns(
        wide[repeats],
        np.concatenate([categorical, np.zeros(targets.shape[1], bool)]),
        y=(y if num_classes else intervals(y))[repeats],
        max_features=MAX_DENSE,
    )
    dense = fitted.transform(wide)
    trees = np.concatenate([x[:, kept], targets], axis=1)
    medians = np.array([np.median(c[~np.isnan(c)]) if not np.isnan(c).all() else 0.0 for c in trees.T])
    inputs = Inputs(tuple(tables), kept, medians, fitted)
    return inputs, _views(inputs, trees, dense)


def apply_inputs(inputs: Inputs, x: np.ndarray) -> Views:
    """Returns the views of any rows x [n, d]."""
    targets = [np.zeros((len(x), 0)), *(_look_up(table, x[:, table.column]) for table in inputs.targets)]
    encoded = np.concatenate(targets, axis=1)
    dense = inputs.fitted.transform(np.concatenate([x, encoded], axis=1))
    return _views(inputs, np.concatenate([x[:, inputs.kept], encoded], axis=1), dense)


def intervals(y: np.ndarray) -> np.ndarray:
    """[n] int64: the interval of each number; at most ten, of about equal frequency, with about 20 rows or more."""
    num = int(np.clip(len(y) // 20, 2, _MAX_INTERVALS))
    edges = np.unique(np.quantile(y, np.linspace(0, 1, num + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, y, side="right"), return_inverse=True)[1]


def _views(inputs: Inputs, trees: np.ndarray, dense: np.ndarray) -> Views:
    filled = np.where(np.isnan(trees), inputs.medians[None], trees)
    placeholder = np.zeros((len(trees), 1))  # libraries reject tables without columns
    return Views(*(part if part.shape[1] else placeholder.astype(part.dtype) for part in (trees, filled, dense)))


def _fit_target_table(
    codes: np.ndarray, column: int, y: np.ndarray, repeats: np.ndarray, units: np.ndarray, num_classes: int, seed: int
) -> tuple[TargetTable, np.ndarray]:
    from sklearn import model_selection
    from sklearn.preprocessing import TargetEncoder

    num_present = len(np.unique(y[repeats]))
    kind = "continuous" if not num_classes else "binary" if num_present == 2 else "multiclass"
    filled = np.where(np.isnan(codes), -1.0, codes)[:, None]

    def fit(rows):
        return _target_table(TargetEncoder(target_type=kind).fit(filled[rows], y[rows]), column)

    table = fit(repeats)
    values = np.tile(table.default, (len(y), 1))
    distinct, place = np.unique(units, return_inverse=True)
    if len(distinct) < 2:
        return table, values
    folds = model_selection.KFold(min(5, len(distinct)), shuffle=True, random_state=seed)
    for _, held_out in folds.split(distinct):
        part = np.isin(place, held_out)
        train = repeats[~part[repeats]]
        # If the training rows lacked a class, the encoder would have other columns. Then the rows keep the default.
        if len(train) and (not num_classes or len(np.unique(y[train])) == num_present):
            values[part] = _look_up(fit(train), codes[part])
    return table, values


def _target_table(encoder: Any, column: int) -> TargetTable:
    values = np.stack(encoder.encodings_, axis=1)
    return TargetTable(
        column, np.asarray(encoder.categories_[0], np.float64), values, np.atleast_1d(encoder.target_mean_)
    )


def _look_up(table: TargetTable, codes: np.ndarray) -> np.ndarray:
    filled = np.where(np.isnan(codes), -1.0, codes)
    position = np.clip(np.searchsorted(table.levels, filled), 0, len(table.levels) - 1)
    is_level = table.levels[position] == filled
    return np.where(is_level[:, None], table.values[position], table.default[None])

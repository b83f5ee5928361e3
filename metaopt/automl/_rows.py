"""Training rows in an order that depends on their values only, and splits of them for out-of-fold predictions."""

import warnings
from typing import Any, NamedTuple

import numpy as np

NUM_FOLDS = 8
MAX_FOLD_ROWS = 20_000  # larger tables get one split
_MAX_REPEATS = 10  # integer weights become repeated rows if the table grows by no more than this factor


class TrainingRows(NamedTuple):
    """Rows of a table.

    Attributes:
      x: [n, d] float64: numbers with NaN in gaps, and codes of categories.
      y: [n] classes 0..C-1 as int64, or numbers as float64.
      weight: [n] float64, positive.
      copies: [n] int64; rows with the same number are copies of one observation.
      groups: [n] int64, or None.
      time: [n] float64, or None. With it, rows are in order of time.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    copies: np.ndarray
    groups: np.ndarray | None = None
    time: np.ndarray | None = None


class Split(NamedTuple):
    """Positions of rows: a model is fitted on `train` and predicts `valid`."""

    train: np.ndarray
    valid: np.ndarray


def sorted_rows(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    groups: np.ndarray | None = None,
    time: np.ndarray | None = None,
) -> TrainingRows:
    """Sorts rows by their values, so that the result of `fit` does not depend on the order of the rows.

    Integer weights become repeated rows with weight 1, unless the table would grow more than tenfold. Repeated rows
    have the same number in `copies`. Equal rows also have the same number, if `_are_copies`: then a weight of 2 gives
    the same result as two equal rows.

    Args:
      x: [n, d].
      y: [n].
      weight: [n], positive.
      groups: [n] integers, or None.
      time: [n], or None.

    Returns:
      A `TrainingRows`.
    """
    if np.array_equal(weight, np.round(weight)) and weight.sum() <= _MAX_REPEATS * len(weight):
        index = np.repeat(np.arange(len(weight)), weight.astype(int))
        weight = np.ones(len(weight))
    else:
        index = np.arange(len(weight))
    observations = np.unique(_bytes(x, y[:, None]), return_inverse=True)[1].reshape(-1)
    equal_rows_are_copies = _are_copies(x, observations, len(index))
    optional = [part for part in (groups, time) if part is not None]
    key = _bytes(x, y[:, None], weight[:, None], *(part[:, None] for part in optional))
    index = index[np.argsort(key[index], kind="stable")]
    if time is not None:
        index = index[np.argsort(time[index], kind="stable")]
    # The repetitions of a row follow each other.
    copies = observations[index] if equal_rows_are_copies else np.cumsum(np.diff(index, prepend=-1) != 0)
    parts = (None if part is None else part[index] for part in (groups, time))
    return TrainingRows(x[index], y[index], weight[index], copies, *parts)


def _bytes(*parts: np.ndarray) -> np.ndarray:
    """[n] the bytes of the numbers of each row; equal numbers have equal bytes."""
    key = np.ascontiguousarray(np.concatenate(parts, axis=1, dtype=np.float64))
    key[np.isnan(key)] = np.nan  # one bit pattern
    key += 0.0  # -0 becomes 0
    return key.view(np.dtype((np.void, key.dtype.itemsize * key.shape[1])))[:, 0]


def _are_copies(x: np.ndarray, observations: np.ndarray, num_rows: int) -> bool:
    """Whether equal rows are copies of one observation, which must not be in both parts of a split.

    They are if rows hardly repeat (apart from repetitions by weights). They also are if a column has many different
    values (more than there are folds), and rows with equal x have equal y. Otherwise equal rows are different
    observations, which are equal because their columns have few values.
    """
    if not x.shape[1]:
        return False
    num_x, num_observations = len(np.unique(_bytes(x))), len(np.unique(observations))
    if num_x >= 0.9 * len(x):
        return True
    num_values = max(len(np.unique(column)) for column in x.T)
    agree = num_observations <= 1.1 * num_x
    return agree and num_values >= max(NUM_FOLDS + 1, 0.5 * num_x) and num_rows <= _MAX_REPEATS * num_observations


def repeated(weight: np.ndarray) -> np.ndarray:
    """Positions of rows, each repeated about as often as its weight says, in order.

    Small integer weights give exact counts. Other weights are scaled to a sum of n and rounded cumulatively.
    """
    if not np.array_equal(weight, np.round(weight)) or weight.sum() > _MAX_REPEATS * len(weight):
        weight = weight * (len(weight) / weight.sum())
    counts = np.diff(np.round(np.cumsum(weight)).astype(int), prepend=0)
    return np.repeat(np.arange(len(weight)), counts)


def split_rows(rows: TrainingRows, num_classes: int, seed: int) -> list[Split]:
    """Splits rows for out-of-fold predictions.

    - By default 8 folds, stratified by class, with copies of a row in one fold. More than 20,000 rows give one split,
      with an eighth for validation.
    - With groups, a group is in one fold.
    - With time, validation rows are later than training rows. The different times are cut into 9 windows of equal
      length (fewer if there are fewer times). The rows of each window but the first are validated by a model of all
      earlier rows. The rows of the first window are never validated. If rows also have groups, training rows whose
      group occurs in the validation window are left out.

    A class with one row (or copies of one) stays in the training part.

    Args:
      rows: the rows, from `sorted_rows`.
      num_classes: C, or 0 for regression.
      seed: the seed of the folds.

    Returns:
      One `Split` per fold.

    Raises:
      ValueError: if there are fewer than 2 rows, groups or times, or if all classes have one row.
    """
    parts = next(part for part in (rows.time, rows.groups, rows.copies) if part is not None)
    num_parts = len(np.unique(parts))
    if num_parts < 2:
        unit = "one time" if rows.time is not None else "one group" if rows.groups is not None else "n_samples = 1 row"
        raise ValueError(f"The table has {unit}: at least two are needed to estimate a score.")
    if rows.time is not None:
        splits = _windows(rows, min(NUM_FOLDS, num_parts - 1))
    else:
        splits = _folds(rows, num_classes, min(NUM_FOLDS, num_parts), seed)
    if len(rows.y) > MAX_FOLD_ROWS:
        splits = splits[-1:]
    if num_classes and rows.time is None and rows.groups is None:
        first = np.unique(rows.copies, return_index=True)[1]
        only_rows_of_class = np.flatnonzero(np.bincount(rows.y[first], minlength=num_classes)[rows.y] == 1)
        splits = [
            Split(np.union1d(split.train, only_rows_of_class), np.setdiff1d(split.valid, only_rows_of_class))
            for split in splits
        ]
    splits = [split for split in splits if len(split.train) and len(split.valid)]
    if not splits:
        reason = "every class has one row only" if rows.groups is None else "no row has earlier rows of other groups"
        raise ValueError(f"No row can be validated: {reason}.")
    return splits


def _windows(rows: TrainingRows, num: int) -> list[Split]:
    assert rows.time is not None
    _, time_rank = np.unique(rows.time, return_inverse=True)
    window = time_rank * (num + 1) // (time_rank.max() + 1)
    splits = []
    for w in range(1, num + 1):
        train, valid = np.flatnonzero(window < w), np.flatnonzero(window == w)
        if rows.groups is not None:
            train = train[~np.isin(rows.groups[train], rows.groups[valid])]
        splits.append(Split(train, valid))
    return splits


def _folds(rows: TrainingRows, num_classes: int, num: int, seed: int) -> list[Split]:
    from sklearn import model_selection

    options: dict[str, Any] = {"n_splits": num, "shuffle": True, "random_state": seed}
    first, place = np.unique(rows.copies, return_index=True, return_inverse=True)[1:]
    if rows.groups is not None:  # repetitions of a row have the same group, so that groups keep them together
        first = place = np.arange(len(rows.y))
    y, groups = rows.y[first], None if rows.groups is None else rows.groups[first]
    by_class = num_classes and np.bincount(y).max() >= 2
    if by_class:  # more folds than rows in the largest class raise
        options["n_splits"] = min(num, int(np.bincount(y).max()))
    if groups is None:
        kind = model_selection.StratifiedKFold if by_class else model_selection.KFold
    else:
        kind = model_selection.StratifiedGroupKFold if by_class else model_selection.GroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with fewer rows than folds
        parts = [part for _, part in kind(**options).split(y, y, groups)]
    inside = [np.isin(place, part) for part in parts]
    return [Split(np.flatnonzero(~valid), np.flatnonzero(valid)) for valid in inside]

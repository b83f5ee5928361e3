"""Labels of any type as classes 0..C-1, and columns that reveal a target."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import _extras
from metaopt.tasks._frames import ALWAYS_MISSING, as_text, objects, positions, read_frame

_log = logging.getLogger(__name__)
_MOST_CLASSES = 20  # a target with more different numbers, and few rows for each, is probably a quantity


class Labels(NamedTuple):
    """The result of `fit_labels`, which describes the fields."""

    classes: np.ndarray
    codes: np.ndarray


def fit_labels(y: Any, *, column: str | int | None = None) -> Labels:
    """Numbers the labels of a classification target.

    Logs a warning if the labels are more than 20 different numbers, with fewer than four rows each in the mean. Also if
    two texts differ only in case or spaces, such as "yes" and "Yes ".

    Args:
      y: [n] texts, whole numbers (also as floats), booleans, or categories of pandas; None, NaN or pandas.NA where
        missing. Mixed types are compared as texts. All texts are classes, "" and "NA" too. With `column`, a frame of
        any type that `fit_encoder` takes.
      column: the name or the position of the column of the frame that has the labels.

    Returns:
      A `NamedTuple` of two arrays; `classes[codes]` are the labels where none is missing.

      - `classes`: [C] the different labels, sorted; texts, whole numbers, or booleans.
      - `codes`: [n] int32 in 0..C-1, the place of each label in `classes`; -1 where the label is missing.

    Raises:
      ValueError: if `y` is not one-dimensional, has numbers that are not whole, or fewer than 2 classes.
      ValueError: with `column`, if `fit_encoder` rejects the frame, or there is no such column.

    >>> fit_labels(["no", "yes", None, "no"])
    Labels(classes=array(['no', 'yes'], dtype='<U3'), codes=array([ 0,  1, -1,  0], dtype=int32))
    """
    if column is not None:
        table = read_frame(y)
        y = table.columns[positions("column", [column], table).pop()]
    values = _as_array(y)
    if values.ndim != 1:
        raise ValueError(f"`y` must be one-dimensional; got shape {values.shape}.")
    missing = np.array([_is_missing(value) for value in values], bool) if values.dtype.kind == "O" else values != values
    present = values[~missing]
    if present.dtype.kind == "O" and len(present):
        present = _one_type(present.tolist())
    if present.dtype.kind not in "biufOUS":
        raise ValueError(f"Unknown label type: {present.dtype}. Classes are texts, whole numbers or booleans.")
    if present.dtype.kind == "f" and (np.isinf(present).any() or (present != np.round(present)).any()):
        raise ValueError(
            "Unknown label type: continuous. Classes are texts, whole numbers or booleans; a target with other numbers "
            "is regression."
        )
    classes, places = np.unique(present, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"`y` must have at least 2 classes; got {len(classes)} class: {classes.tolist()}.")
    if present.dtype.kind in "iuf" and len(classes) > _MOST_CLASSES and 4 * len(classes) > len(present):
        _log.warning(
            "The target has %d different numbers in %d rows, and each of them counts as a class. If it is a quantity, "
            "use regression, such as `automl.AutoRegressor`.",
            len(classes),
            len(present),
        )
    if present.dtype.kind == "U":
        _warn_of_similar(classes)
    codes = np.full(len(values), -1, np.int32)
    codes[~missing] = places
    return Labels(classes, codes)


def _warn_of_similar(classes: np.ndarray) -> None:
    """Logs a warning if two texts differ only in upper and lower case, or in spaces."""
    similar: dict[str, list[str]] = {}
    for label in classes.tolist():
        similar.setdefault(" ".join(label.split()).casefold(), []).append(label)
    if pairs := [labels for labels in similar.values() if len(labels) > 1]:
        _log.warning(
            "These labels differ only in case or spaces, and count as different classes: %s. If they mean the same, "
            "change the target.",
            "; ".join(", ".join(map(repr, labels)) for labels in pairs[:5]),
        )


def suspected_leaks(
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    categorical: np.ndarray,
    *,
    max_rows: int = 2000,
    seed: int = 0,
) -> tuple[str, ...]:
    """Finds columns that predict the target almost perfectly without any other column.

    Numbers get a decision tree of 64 leaves (or two for each class), and categories a table of their levels, each with
    3 folds. The error is the share of wrong classes, or the squared error of the ranks of a numeric target, on held-out
    rows. A column is suspected if its error is at most 2 % (for ranks .5 %) of the error of the best constant. With
    fewer than 50 rows nothing is suspected.

    Args:
      x: [n, d], the result of `TableEncoder.transform`.
      y: [n] classes as integers, or a numeric target as floats.
      names: [d], the names of the columns.
      categorical: [d] bool.
      max_rows: the largest number of rows to use; of a larger table, random rows are used.
      seed: the seed of the rows and the folds.

    Returns:
      The names of suspected columns. Such a column need not be a leak: some problems are easy.

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    tree = _extras.require("sklearn.tree", "automl", "suspected_leaks")
    rows = np.random.default_rng(seed).permutation(len(y))[:max_rows]
    x, y = np.asarray(x)[rows], np.asarray(y)[rows]
    is_class = y.dtype.kind in "iub"
    y = np.unique(y, return_inverse=True)[1].reshape(-1)
    if len(y) < 50 or not y.any():
        return ()
    kind = tree.DecisionTreeClassifier if is_class else tree.DecisionTreeRegressor
    most = (0.02 if is_class else 0.005) * _error(y, _constant(y, is_class), is_class)
    num_leaves = max(64, 2 * int(y.max())) if is_class else 64
    suspected = []
    for column, name, is_categorical in zip(x.T, names, categorical, strict=True):
        predictions = np.zeros(len(y))
        for fold in range(3):
            test = np.arange(len(y)) % 3 == fold
            if is_categorical:
                predictions[test] = _level_predictions(column, y, ~test, is_class)[test]
            else:
                fitted = kind(max_leaf_nodes=num_leaves, min_samples_leaf=2, random_state=0).fit(
                    column[~test, None], y[~test]
                )
                predictions[test] = fitted.predict(column[test, None])
        if _error(y, predictions, is_class) <= most:
            suspected.append(name)
    return tuple(suspected)


def _error(y: np.ndarray, predictions: np.ndarray | float, is_class: bool) -> float:
    return float(np.mean(y != predictions if is_class else (y - predictions) ** 2))


def _constant(y: np.ndarray, is_class: bool) -> float:
    return float(np.bincount(y).argmax() if is_class else y.mean())


def _level_predictions(column: np.ndarray, y: np.ndarray, train: np.ndarray, is_class: bool) -> np.ndarray:
    """[n] the most frequent class, or the mean target, of the training rows with the same level as the row."""
    levels = np.unique(np.where(np.isnan(column), -1.0, column), return_inverse=True)[1].reshape(-1)
    counts = np.bincount(levels[train], minlength=levels.max() + 1)
    if is_class:
        table = np.zeros((len(counts), y.max() + 1))
        np.add.at(table, (levels[train], y[train]), 1.0)
        values = table.argmax(axis=1).astype(np.float64)
    else:
        values = np.bincount(levels[train], y[train], len(counts)) / np.maximum(counts, 1)
    return np.where(counts > 0, values, _constant(y[train], is_class))[levels]


def _as_array(y: Any) -> np.ndarray:
    """Labels as an array: of objects for lists and for pandas' own types, so that nothing is converted to text."""
    if isinstance(y, list | tuple):
        return objects(y)
    if hasattr(y, "iloc") and not isinstance(y.dtype, np.dtype):
        return y.to_numpy(dtype=object)
    return np.asarray(y)


def _is_missing(value: Any) -> bool:
    if type(value).__name__ in ALWAYS_MISSING:
        return True
    return isinstance(value, float | np.floating) and math.isnan(value)


def _one_type(labels: list) -> np.ndarray:
    """An array of booleans, numbers or texts."""
    if all(isinstance(label, bool | np.bool_) for label in labels):
        return np.array(labels, bool)
    is_number = lambda label: isinstance(label, int | float | np.integer | np.floating) and not isinstance(label, bool)
    if all(map(is_number, labels)):
        numbers = np.array(labels)
        as_python = (int(label) if isinstance(label, np.integer) else label for label in labels)
        if all(label == number for label, number in zip(as_python, numbers.tolist(), strict=True)):
            return numbers  # otherwise float64 would merge whole numbers above 2^53
    if all(isinstance(label, str) for label in labels):
        return np.array(labels, str)
    plain = str | bool | np.bool_ | int | float | np.integer | np.floating
    other = next((type(label).__name__ for label in labels if not isinstance(label, plain)), None)
    if other is None:
        return np.array([as_text(label) for label in labels], str)
    raise ValueError(f"Unknown label type: {other}. Classes are texts, whole numbers or booleans.")

"""The arguments of `fit` and `predict`: rows, targets, groups and times."""

import logging
import numbers
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.validation import _get_feature_names, column_or_1d

from metaopt import tasks

_log = logging.getLogger(__name__)


def without_named_columns(X, groups, time=None) -> tuple[Any, Any, Any]:
    """Replaces `groups` and `time` by the values of columns of X, if they are names. X loses these columns.

    Args:
      X: rows.
      groups: values, the name of a column of X, or None.
      time: the same.

    Returns:
      X without the columns, and the values of `groups` and `time`.

    Raises:
      ValueError: if X has no such column.
    """
    names = {argument: name for argument, name in (("groups", groups), ("time", time)) if isinstance(name, str)}
    columns = list(X.columns) if hasattr(X, "iloc") or hasattr(X, "get_column") else []  # of pandas or polars
    for argument, name in names.items():
        if name not in columns:
            raise ValueError(
                f"`{argument}` must have one value for each row, or be the name of a column of the frame X; got "
                f"{name!r}, and X has {'the columns ' + ', '.join(map(str, columns)) if columns else 'no names'}."
            )
    if not names:
        return X, groups, time
    values = {argument: X[name] for argument, name in names.items()}
    dropped = list(dict.fromkeys(names.values()))
    rest = X.drop(columns=dropped) if hasattr(X, "iloc") else X.drop(dropped)
    return rest, values.get("groups", groups), values.get("time", time)


def warn_of_other_order(X, **values) -> None:
    """Logs a warning for values whose index has the labels of X in another order, since rows match by position.

    Args:
      X: rows.
      **values: argument -> values for the rows. Only those of pandas have an index.
    """
    index = getattr(X, "index", None)
    if not isinstance(index, pd.Index) or not index.is_unique:
        return
    for argument, value in values.items():
        other = getattr(value, "index", None)
        if not isinstance(other, pd.Index) or len(other) != len(index) or other.equals(index):
            continue
        if other.is_unique and set(other) == set(index):  # `isin` of a MultiIndex raises for other labels
            _log.warning(
                "The index of `%s` has the labels of X in another order. Row k of X is used with value k of `%s`, "
                "whatever their labels. If the labels are right, pass `%s.loc[X.index]`.",
                *(argument,) * 3,
            )


def target(y, num_rows: int) -> np.ndarray:
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    if isinstance(y, str):
        raise ValueError(f"`y` must be the values of the target, and not its name: `y = frame.pop({y!r})`.")
    y = column_or_1d(y, warn=True)
    if len(y) != num_rows:
        raise ValueError(f"Found input variables with inconsistent numbers of samples: [{num_rows}, {len(y)}]")
    missing = pd.isna(y)
    if missing.any():
        raise ValueError(f"Input y contains NaN: {missing.sum()} of {len(y)} rows have no target. Drop these rows.")
    return y


def _one_per_row(values, num_rows: int, name: str) -> np.ndarray:
    shape = np.shape(values)
    if len(shape) != 1 and shape[1:] != (1,):
        raise ValueError(f"`{name}` must have one value for each of the {num_rows} rows; got the shape {shape}.")
    values = column_or_1d(values)
    num_missing = int(pd.isna(values).sum())
    if len(values) != num_rows or num_missing:
        raise ValueError(
            f"`{name}` must have one value for each of the {num_rows} rows, without missing values; got {len(values)} "
            f"values, {num_missing} of them missing."
        )
    return values


def log_similar_labels(classes: np.ndarray) -> None:
    """Logs a warning if two labels are texts that differ only in spaces at their ends or in capitals."""
    first: dict[str, str] = {}
    for label in filter(lambda label: isinstance(label, str), classes.tolist()):
        other = first.setdefault(label.strip().casefold(), label)
        if other != label:
            _log.warning(
                f"The labels {other!r} and {label!r} of the target differ only in spaces or capitals, and count as two "
                "classes. If they mean the same, make them equal: `y = y.str.strip()`."
            )
            return


def group_codes(values, num_rows: int) -> np.ndarray:
    values = _one_per_row(values, num_rows, "groups")
    if values.dtype != object:
        return np.unique(values, return_inverse=True)[1]
    codes, groups = pd.factorize(values)  # by equality: values of different types cannot be sorted
    rank = np.empty(len(groups), int)
    rank[sorted(range(len(groups)), key=lambda i: _group_order(groups[i]))] = np.arange(len(groups))
    return rank[codes]


def _group_order(group: Any) -> tuple[str, bool]:
    """A key to sort groups by, which does not depend on the order of the rows. Equal numbers have equal keys."""
    if isinstance(group, numbers.Integral):
        return str(int(group)), True
    return (f"{float(group):.17g}", True) if isinstance(group, numbers.Real) else (str(group), False)


def times(values, num_rows: int) -> np.ndarray:
    """Times as ranks: only their order is used. Texts are read as numbers or dates, since "10" < "9" as texts."""
    name = str(getattr(values, "name", None) or "time")
    values = _one_per_row(values, num_rows, "time")
    if values.dtype.kind in "OSTU" and (values != values[0]).any():
        encoder = tasks.fit_encoder({name: values}, keep=(name,))
        is_read = [code.kind for code in encoder.columns] in (["number"], ["time"])
        values = encoder.transform({name: values})[:, 0] if is_read else np.full(num_rows, np.nan)
        if np.isnan(values).any():
            raise ValueError("`time` must be numbers or dates; some of its values cannot be read as such.")
    return np.unique(values, return_inverse=True)[1].astype(np.float64)


def has_needed_columns(X, fitted_names: np.ndarray | None, encoder: tasks.TableEncoder) -> bool:
    """Whether X has all columns that the encoder reads, by their names and in the order of `fit`.

    Other columns, and columns that `fit` dropped, do not matter. If the result is False, the caller lets scikit-learn
    check X and raise the error.

    Args:
      X: rows.
      fitted_names: `feature_names_in_`, or None.
      encoder: the encoder of the columns.

    Raises:
      ValueError: if the columns have another order, as scikit-learn's contract demands.
    """
    names = _get_feature_names(X)
    if fitted_names is None or names is None or len(set(fitted_names)) < len(fitted_names):
        return False
    fitted = set(fitted_names)
    shared = [name for name in names if name in fitted]
    if not {encoder.input_names[code.source] for code in encoder.columns} <= set(shared):
        return False
    if shared != [name for name in fitted_names if name in set(shared)]:
        raise ValueError(
            "The feature names should match those that were passed during fit.\n"
            "Feature names must be in the same order as they were in fit.\n"
            "`X[[name for name in model.feature_names_in_ if name in X.columns]]` has this order."
        )
    return True

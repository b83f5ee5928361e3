"""Classification tables."""

import numpy as np

from metaopt import tasks

from ._folder import Folder, read_arrays, read_rows


def from_data_folder(path: Folder = None) -> list[tasks.Table]:
    """Reads the tables of `tabular_classification.npz` and its index.

    Missing values are NaN in numeric columns. In categorical columns, a missing value is a separate category.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      The tables, in the order of the index.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
      ValueError: if the arrays of a table do not fit one another, or are not finite.
    """
    data = read_arrays("tabular_classification.npz", path)
    return [_table(row, data) for row in read_rows("tabular_classification_index.csv", path)]


def regression_tables(path: Folder = None) -> list[tasks.Table]:
    """Reads the tables of `tabular_regression.npz` and its index. Their `y` are numbers as float64, and not classes.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      The tables, in the order of the index.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
    """
    data, tables = read_arrays("tabular_regression.npz", path), []
    for row in read_rows("tabular_regression_index.csv", path):
        name = row["name"]
        x, y, categorical = (data[f"{part}__{name}"] for part in ("X", "y", "cat"))
        x, y, categorical = x.astype(np.float32), y.astype(np.float64), categorical.astype(bool)
        origin = f"{row['origin']}; {row['licence_short']}"
        tables.append(tasks.Table(name, row["family"], x, y, categorical, None, origin))
    return tables


def _table(row: dict[str, str], data) -> tasks.Table:
    """Returns the table of a row of the index."""
    name = row["name"]
    x, y, categorical = (data[f"{part}__{name}"] for part in ("X", "y", "cat"))
    if (y.shape, categorical.shape) != (x.shape[:1], x.shape[1:]):
        raise ValueError(f"table {name}: X {x.shape}, y {y.shape} and cat {categorical.shape} do not fit.")
    if np.isinf(x).any() or not np.isfinite(y).all():
        raise ValueError(f"table {name}: its values must be finite, or NaN in X.")
    x, y, categorical = x.astype(np.float32), y.astype(np.int32), categorical.astype(bool)
    if f"miss__{name}" in data:
        missing = np.unpackbits(data[f"miss__{name}"], axis=1)[:, : x.shape[1]].astype(bool)
        x[missing & ~categorical] = np.nan
    class_names = tuple(row["class_names"].split("|"))
    named = class_names if len(class_names) == int(row["classes"]) else None
    return tasks.Table(name, row["family"], x, y, categorical, named, f"{row['origin']}; {row['licence_short']}")

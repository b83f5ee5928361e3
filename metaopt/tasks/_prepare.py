"""Turns a table into arrays for training a network: splits the rows, then encodes them by their training statistics.

Nothing is fitted on validation or test rows. Medians, quantiles, levels and the choice of columns come only from
training rows. The same rows are also kept unencoded, for learners that prefer this (`Rows.raw`, for forests).
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from metaopt.tasks._columns import merged_values
from metaopt.tasks._encoder import TableEncoder
from metaopt.tasks._labeled_frame import encoded, labeled_frame
from metaopt.tasks._scaled_columns import FittedColumns, fit_columns
from metaopt.tasks._tables import Table

_log = logging.getLogger(__name__)


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


class TaskShape(NamedTuple):
    """The size of a task, or the size that it is padded to.

    Attributes:
      train_rows: the number of training rows.
      valid_rows: the number of validation rows.
      features: D, the number of encoded columns.
      classes: C.
    """

    train_rows: int
    valid_rows: int
    features: int
    classes: int


class PreparedTable(NamedTuple):
    """A table that is split and encoded.

    Attributes:
      name: the name of the table.
      family: the family of the table.
      train: the rows for the inner loss: `x` [n, D] float32, encoded; `y` [n] int32 in 0..C-1; `raw` [n, d], the
        original numbers and codes; and `index` [n], their positions in the table.
      valid: the rows for the outer loss, likewise.
      test: the rows for the final evaluation, likewise. They are not part of a task.
      num_features: D.
      num_classes: C.
      classes: [C] int32, the number of each class in the original table; for a frame, its label.
      categorical: [d] bool, which columns of `raw` hold codes.
      columns: how the columns of `raw` become encoded ones.
      encoder: the encoder of the columns of a frame, or None.
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
    columns: FittedColumns
    encoder: TableEncoder | None = None

    def transform(self, rows: Any) -> np.ndarray:
        """Encodes new rows in the same way as the rows of the table.

        Args:
          rows: a frame, if `prepare` got one; otherwise [n, d] numbers, with NaN in gaps.

        Returns:
          [n, D] float32.

        Raises:
          ValueError: if a column is missing, or `rows` has another number of columns.
          ValueError: if `rows` is a frame, and `prepare` got none: the table does not know the names of its columns.
        """
        if self.encoder is None and (isinstance(rows, Mapping) or hasattr(rows, "columns")):
            raise ValueError(
                f"The table {self.name!r} was not prepared from a frame, so it cannot encode the frame `rows`. Use "
                "`tasks.prepare(frame, target)`, for example with `frame = pandas.read_csv(file)`."
            )
        return self.columns.transform(rows if self.encoder is None else encoded(self.encoder, rows))

    @property
    def shape(self) -> TaskShape:
        """The smallest shape that the table fits into: training rows, validation rows, features and classes."""
        return TaskShape(len(self.train.y), len(self.valid.y), self.num_features, self.num_classes)


def prepare(
    table: Any,
    target: Any = None,
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

    The split is stratified: the share of each class is the same in all parts, to within a row, and each class has at
    least one training row. `fit_columns` describes the encoding. Its statistics come from the training rows. For a
    frame, `fit_encoder` first turns the columns into numbers. It reads all rows, but not the target.

    Args:
      table: a `Table`. With `target`, a frame of any type that `fit_encoder` takes.
      target: the name or the position of a column of the frame, which is not used as a feature, or one label per row
        of the frame. Rows without a label are dropped.
      seed: the seed of the split and of the subsampling; equal seeds give equal arrays.
      valid_fraction: the share of validation rows, in (0, 1).
      test_fraction: the share of test rows, in [0, 1).
      max_rows: a larger table is subsampled, stratified by class.
      max_classes: if there are more, the rows of the rarest classes are dropped; None keeps all.
      max_features: if the encoding gives more columns, only those with the largest F statistic stay. It is computed on
        training rows by a one-way analysis of variance between the classes.
      max_levels: as for `fit_columns`, at least 2.
      scaling: "quantile" or "standard", as for `fit_columns`.

    Returns:
      A `PreparedTable`, with its rows in random order.

    Raises:
      ValueError: if a fraction is out of range, or the arrays of the table do not fit together.
      ValueError: if `x` is not real, or not finite in float32, or `y` is not classes as integers from 0.
      ValueError: if float32 merges the codes of a categorical column.
      ValueError: if fewer than 2 classes, no varying column, or no validation or test row remains.
      ValueError: if `fit_encoder` rejects the frame, or `fit_labels` the target.
      ValueError: if the number of labels is not the number of rows of the frame.

    >>> frame = {
    ...     "size": [1.5, 2.5, 3.5, 4.5] * 5,
    ...     "color": ["red", "blue"] * 10,
    ...     "sold": ["no", "yes"] * 10,
    ... }
    >>> prepared = prepare(frame, "sold", test_fraction=0.0)
    >>> prepared.classes[prepared.train.y[:2]].tolist() == [
    ...     frame["sold"][i] for i in prepared.train.index[:2]
    ... ]
    True
    >>> prepared.transform({"size": [2.0], "color": ["red"]}).shape
    (1, 2)
    """
    if not 0 < valid_fraction < 1 or not 0 <= test_fraction < 1 or valid_fraction + test_fraction >= 1:
        raise ValueError(
            "`valid_fraction` and `test_fraction` must leave rows to train on; "
            f"got {valid_fraction} and {test_fraction}."
        )
    frame = None if target is None else labeled_frame(table, target)
    if frame is not None:
        names = tuple(map(str, frame.classes))
        table = Table("frame", "frame", frame.x, frame.y, frame.encoder.categorical, class_names=names)
    table, raw = _checked(table)
    rng = np.random.default_rng(seed)
    train, valid, test = _parts(table, max_rows, max_classes, (valid_fraction, test_fraction), rng)
    classes = np.unique(table.y[train])
    used = np.concatenate([train, valid, test])
    fitted = fit_columns(
        table.x[train],
        table.categorical,
        y=np.searchsorted(classes, table.y[train]),
        max_features=max_features,
        max_levels=max_levels,
        scaling=scaling,
    )
    if not fitted.kept.any():
        raise ValueError(f"table {table.name} has no column that varies over its training rows.")
    x = fitted.transform(table.x[used])
    raw = _filled(table, raw, train)
    parts = zip(np.split(x, np.cumsum([len(train), len(valid)])), (train, valid, test), strict=True)
    place = np.arange(len(table.y)) if frame is None else frame.index
    rows = [Rows(part, np.searchsorted(classes, table.y[i]).astype(np.int32), raw[i], place[i]) for part, i in parts]
    return PreparedTable(
        name=table.name,
        family=table.family,
        train=rows[0],
        valid=rows[1],
        test=rows[2],
        num_features=x.shape[1],
        num_classes=len(classes),
        classes=classes.astype(np.int32) if frame is None else frame.classes[classes],
        categorical=table.categorical,
        columns=fitted,
        encoder=None if frame is None else frame.encoder,
    )


def encode(x: np.ndarray, y: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    """Encodes all rows of a table as `prepare` does by default: [n, D] float32, D = 0 if no column varies."""
    return fit_columns(x, categorical, y=y, max_features=128).transform(x)


def _parts(
    table: Table, max_rows: int, max_classes: int | None, fractions: tuple[float, float], rng
) -> list[np.ndarray]:
    """Returns the training, validation and test rows. Raises ValueError if they lack classes, or a part has no rows."""
    index = _usable_rows(table, max_rows, max_classes, rng)
    parts = _split(table.y, index, fractions, rng)
    if len(np.unique(table.y[parts[0]])) < 2:
        raise ValueError(f"table {table.name} has fewer than 2 classes.")
    for name, fraction, rows in zip(("valid", "test"), fractions, parts[1:], strict=True):
        if fraction > 0 and not len(rows):
            raise ValueError(
                f"table {table.name}: `{name}_fraction` {fraction} of {len(index)} rows leaves no {name} row, because "
                "each class keeps a row to train on. Take a larger fraction or a larger table."
            )
    return parts


def _usable_rows(table: Table, max_rows: int, max_classes: int | None, rng) -> np.ndarray:
    """Returns the rows of the most frequent classes, at most `max_rows` of them."""
    index = np.arange(len(table.y))
    labels, counts = np.unique(table.y, return_counts=True)
    if max_classes is not None and len(labels) > max_classes:
        frequent = labels[np.argsort(-counts, kind="stable")[:max_classes]]
        index = index[np.isin(table.y, frequent)]
        lost = np.setdiff1d(labels, frequent)
        names = [str(c) if table.class_names is None else table.class_names[c] for c in lost]
        _log.warning(
            "table %s: `max_classes` keeps the %d most frequent classes. The rows of these classes are dropped: %s",
            table.name,
            max_classes,
            ", ".join(names),
        )
    if len(index) > max_rows:
        index = _split(table.y, index, (1.0 - max_rows / len(index),), rng)[0]
    return index


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
            f"{y[:3].tolist()}. `np.unique(y, return_inverse=True)[1]` converts them."
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
    """Splits `index` at random: returns the remaining rows first, then one part per fraction, each in random order.

    Each class of `index` has at least one of the remaining rows. The counts of the classes are differences of rounded
    cumulative sums over the classes, in random order. So the size of each part is right, too, and not only the share of
    each class.
    """
    classes = rng.permutation(np.unique(y[index]))
    members = [rng.permutation(index[y[index] == c]) for c in classes]
    sizes = np.array([len(m) for m in members])
    ends = np.round(np.cumsum(sizes)[:, None] * np.array(fractions)).astype(int)
    counts_of_classes = np.diff(ends, axis=0, prepend=0)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for member, counts in zip(members, counts_of_classes, strict=True):
        for k in reversed(range(len(counts))):
            counts[k] -= max(0, min(counts[k], counts.sum() - (len(member) - 1)))
        pieces = np.split(member, np.cumsum(counts))
        for k, piece in enumerate([pieces[-1], *pieces[:-1]]):
            parts[k].append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]

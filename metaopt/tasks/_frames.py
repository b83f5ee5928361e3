"""Reads data frames of several libraries, arrays, lists and dicts as columns of numbers, times or texts."""

import contextlib
import datetime
import decimal
import enum
import fractions
import math
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt.tasks._columns import MISSING

_MICROSECONDS = 86_400_000_000  # of a day
_RESHAPE = (
    "Reshape your data either using array.reshape(-1, 1) if your data has a single feature or array.reshape(1, -1) if "
    "it contains a single sample."
)
ALWAYS_MISSING = {"NoneType", "NAType", "NaTType"}  # pandas' types by name, so that pandas need not be imported

_DURATIONS = (datetime.timedelta, np.timedelta64, datetime.time)
_NUMBERS = (bool, np.bool_, int, np.integer, float, np.floating, decimal.Decimal, fractions.Fraction, *_DURATIONS)
_TIMES = (datetime.date, np.datetime64)  # includes datetime.datetime and pandas.Timestamp
_PLAIN = (str, bytes, enum.Enum, uuid.UUID, *_NUMBERS, *_TIMES)


class RawColumn(NamedTuple):
    """A column before its encoding. `n` rows.

    Attributes:
      kind: "number", "boolean", "time", "text", "category" or "unreadable".
      values: numbers and booleans as an array of numbers with NaN where missing (whole numbers may be integers); times
        as datetime64[us] with NaT; texts and categories as an array of objects, str or None; others as they came.
      levels: the order of the categories if the frame has one.
      reason: why the column is unreadable.
      unit: "days" if the numbers were durations, "hours" if they were times of day, otherwise "".
    """

    kind: str
    values: Any
    levels: tuple[str, ...] = ()
    reason: str = ""
    unit: str = ""

    @property
    def is_missing(self) -> np.ndarray:
        """[n] bool, of a column that is readable."""
        if self.kind == "time":
            return np.isnat(self.values)
        if self.kind in ("number", "boolean"):
            is_float = self.values.dtype.kind == "f"
            return np.isnan(self.values) if is_float else np.zeros(len(self.values), bool)
        return np.equal(self.values, None).astype(bool)


class Frame(NamedTuple):
    """A table before its encoding.

    Attributes:
      names: [d] texts, unique.
      named: whether the names come from the frame. Other names are "0", "1", ...
      numbered: whether the names were whole numbers, as the default names of pandas are.
      columns: [d] columns of n rows, as Series of pandas or arrays, for `read_values`.
      num_rows: n.
    """

    names: tuple[str, ...]
    named: bool
    numbered: bool
    columns: tuple[Any, ...]
    num_rows: int


def read_frame(frame: Any) -> Frame:
    """Reads a table of any supported type.

    Args:
      frame: a DataFrame of pandas or polars, another frame with `to_pandas`, a table of Arrow, a 2-d array, a list of
        rows, a list of dicts, or a dict of columns.

    Returns:
      The `Frame`.

    Raises:
      TypeError: if `frame` is sparse or no table.
      ValueError: if it is not two-dimensional, is empty, has complex numbers, or rows or columns of different lengths.
    """
    names, columns, num_rows = _split_columns(frame)
    for size, what in ((num_rows, "sample(s)"), (len(columns), "feature(s)")):
        if size == 0:
            shape = (num_rows, len(columns))
            raise ValueError(f"Found array with 0 {what} (shape={shape}) while a minimum of 1 is required.")
    if names is None:
        return Frame(tuple(map(str, range(len(columns)))), False, False, tuple(columns), num_rows)
    numbered = all(isinstance(name, int | np.integer) for name in names)
    return Frame(unique_names(map(str, names)), True, numbered, tuple(columns), num_rows)


def positions(argument: str, chosen: Iterable[str | int], table: Frame) -> set[int]:
    """Finds columns.

    Args:
      argument: the name of the user's argument, for the message.
      chosen: names or numbers of columns, or one of them.
      table: the table that has the columns.

    Returns:
      The positions of the columns.

    Raises:
      ValueError: if there is no such column.
    """
    chosen = [chosen] if isinstance(chosen, str | int | np.integer) else list(chosen)
    indices = set()
    for column in chosen:
        if table.named and str(column) in table.names:
            indices.add(table.names.index(str(column)))
        elif isinstance(column, int | np.integer) and -len(table.names) <= column < len(table.names):
            indices.add(int(column) % len(table.names))
        else:
            raise ValueError(f"`{argument}` names the column {column!r}; there are {', '.join(table.names)}.")
    return indices


def unique_names(names: Iterable[str]) -> tuple[str, ...]:
    """Appends "_2", "_3", ... to names that occurred before.

    Args:
      names: any texts.

    Returns:
      Different texts in the same order.
    """
    unique: dict[str, None] = {}
    for name in names:
        number, plain = 2, name
        while name in unique:
            name, number = f"{plain}_{number}", number + 1
        unique[name] = None
    return tuple(unique)


def as_text(value: Any) -> str:
    """Returns the text by which a value of a category is known: whole numbers have no decimal point.

    Args:
      value: a number, a text or another plain value.

    Returns:
      The text; 3, 3.0 and "3" have the same.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    is_duration = isinstance(value, _DURATIONS)  # np.timedelta64 is a kind of np.integer
    if isinstance(value, int | np.integer) and not is_duration and abs(int(value)) < 2**64:
        return str(int(value))
    if isinstance(value, _NUMBERS):
        number = _number(value)
        return str(int(number)) if number.is_integer() else repr(number)
    if isinstance(value, _TIMES) or type(value).__name__ == "Period":
        return str(_time(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def objects(values: Iterable) -> np.ndarray:
    """Makes a one-dimensional array of objects, also if these are sequences.

    Args:
      values: any values.

    Returns:
      [n] of objects.
    """
    values = list(values)
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def read_values(values: Any) -> RawColumn:
    """Reads one column.

    Args:
      values: a Series of pandas, or a one-dimensional array.

    Returns:
      The column.

    Raises:
      ValueError: if values are complex.
    """
    if hasattr(values, "iloc"):
        return _read_series(values)
    kind = values.dtype.kind
    if kind == "b":
        return RawColumn("boolean", values.astype(np.float64))
    if kind in "iu":
        return RawColumn("number", values)
    if kind == "f":
        with np.errstate(over="ignore"):
            return RawColumn("number", values.astype(np.float64))
    if kind == "M":
        return RawColumn("time", values.astype("datetime64[us]"))
    if kind == "m":
        return RawColumn("number", _days(values), unit="days")
    if kind == "c":
        raise ValueError(f"Complex data not supported\n{values}\n")
    return _read_objects(values.astype(object))


# --- frames ---


def _split_columns(frame: Any) -> tuple[list | None, list, int]:
    """Returns the names, or None, the columns as Series or arrays, and the number of rows."""
    if hasattr(frame, "tocsr") or hasattr(frame, "todense"):
        raise TypeError(
            "Sparse data was passed, but dense data is required. Use '.toarray()' to convert to a dense numpy array."
        )
    library = type(frame).__module__.partition(".")[0]
    if library == "polars" and hasattr(frame, "collect"):  # a lazy frame
        frame = frame.collect()
    if hasattr(frame, "iloc") and hasattr(frame, "columns"):
        return list(frame.columns), [frame.iloc[:, j] for j in range(frame.shape[1])], len(frame)
    if hasattr(frame, "to_pydict"):  # Arrow's
        frame = frame.to_pydict()
    elif library == "polars" and hasattr(frame, "columns"):
        frame = frame.to_dict(as_series=False)
    elif hasattr(frame, "to_pandas") and hasattr(frame, "columns"):
        return _split_columns(frame.to_pandas())
    if isinstance(frame, Mapping):
        return _columns_of_dict(frame)
    if isinstance(frame, str | bytes) or frame is None:
        raise TypeError(
            f"A table is a data frame, a 2-d array, a list of rows or a dict of columns; got {frame!r:.60}."
        )
    if isinstance(frame, Sequence) and len(frame) and all(isinstance(row, Mapping) for row in frame):
        names = dict.fromkeys(name for row in frame for name in row)
        return list(names), [objects([row.get(name) for row in frame]) for name in names], len(frame)
    if isinstance(frame, Sequence) and len(frame) and not hasattr(frame, "__array__"):
        return _columns_of_rows(frame)
    return _columns_of_array(frame)


def _columns_of_array(frame: Any) -> tuple[list | None, list, int]:
    if isinstance(frame, np.ma.MaskedArray):
        floating = frame.dtype.kind == "f"
        frame = np.ma.filled(frame if floating else frame.astype(object), np.nan if floating else None)
    array = np.asarray(frame)
    if array.dtype.names is not None and array.ndim == 1:
        return list(array.dtype.names), [array[name] for name in array.dtype.names], len(array)
    if array.ndim < 2:
        shape = f"{array.ndim}D array" if array.ndim else "scalar array"
        raise ValueError(f"Expected 2D array, got {shape} instead:\narray={array}.\n{_RESHAPE}")
    if array.ndim > 2:
        raise ValueError(f"Found array with dim {array.ndim}, while dim <= 2 is required.")
    return None, [array[:, j] for j in range(array.shape[1])], len(array)


def _columns_of_rows(rows: Sequence) -> tuple[None, list, int]:
    rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    if not all(isinstance(row, Sequence) and not isinstance(row, str | bytes) for row in rows):
        raise ValueError(f"Expected 2D array, got 1D array instead:\narray={rows!r:.60}.\n{_RESHAPE}")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"All rows must have the same number of values; got {min(lengths)} to {max(lengths)}.")
    return None, [objects(column) for column in zip(*rows, strict=True)], len(rows)


def _columns_of_dict(frame: Mapping) -> tuple[list, list, int]:
    columns = []
    for name, values in frame.items():
        if type(values).__module__.partition(".")[0] == "pandas" and not hasattr(values, "iloc"):
            values = sys.modules["pandas"].Series(values)  # an index or an array
        if not hasattr(values, "iloc"):
            is_array = hasattr(values, "__array__") or hasattr(values, "dtype")
            values = np.asarray(values) if is_array else objects(values) if not isinstance(values, str) else values
        if getattr(values, "ndim", 0) != 1:
            raise ValueError(f"The column {name!r} must be one-dimensional; got {values!r:.60}.")
        columns.append(values)
    lengths = {len(values) for values in columns}
    if len(lengths) > 1:
        raise ValueError(f"All columns must have the same number of rows; got {min(lengths)} to {max(lengths)}.")
    return list(frame), columns, max(lengths, default=0)


# --- columns ---


def _read_series(series: Any) -> RawColumn:
    pandas = sys.modules["pandas"]
    dtype, types = series.dtype, pandas.api.types
    if isinstance(dtype, np.dtype):
        return read_values(series.to_numpy())
    if isinstance(dtype, pandas.CategoricalDtype):
        texts = [as_text(level) for level in dtype.categories]
        texts = [None if text in MISSING else text for text in texts]
        values = objects([*texts, None])[series.cat.codes.to_numpy()]  # the code of a gap is -1
        return RawColumn("category", values, tuple(filter(None, texts)) if dtype.ordered else ())
    if isinstance(dtype, pandas.SparseDtype):
        return read_values(series.sparse.to_dense())
    if isinstance(dtype, pandas.PeriodDtype):
        return read_values(series.dt.to_timestamp())
    if isinstance(dtype, pandas.DatetimeTZDtype):
        return read_values(series.dt.tz_convert("UTC").dt.tz_localize(None))
    if types.is_bool_dtype(dtype):
        return RawColumn("boolean", series.to_numpy(dtype=np.float64, na_value=np.nan))
    if types.is_integer_dtype(dtype) and not series.isna().any():
        return RawColumn("number", series.to_numpy(dtype=dtype.kind + "8"))
    if types.is_integer_dtype(dtype):
        return _integers_with_gaps(series.to_numpy(dtype=object, na_value=None))
    if types.is_float_dtype(dtype):
        return RawColumn("number", series.to_numpy(dtype=np.float64, na_value=np.nan))
    return _read_objects(series.to_numpy(dtype=object))


def _read_objects(values: np.ndarray) -> RawColumn:
    """Reads values by their types: a column is numeric if all values are, otherwise text if all are plain values."""
    types = set(map(type, values))
    always_missing = {type_ for type_ in types if type_.__name__ in ALWAYS_MISSING}
    types -= always_missing
    if any(issubclass(type_, complex | np.complexfloating) for type_ in types):
        raise ValueError(f"Complex data not supported\n{values}\n")
    if always_missing:
        values = objects(None if type(value) in always_missing else value for value in values)
    if types and all(issubclass(type_, bool | np.bool_) for type_ in types):
        return RawColumn("boolean", _numbers(values).astype(np.float64))
    durations = [type_ for type_ in types if issubclass(type_, _DURATIONS)]
    if durations and all(issubclass(type_, _NUMBERS) for type_ in types):
        units = {"hours" if issubclass(type_, datetime.time) else "days" for type_ in durations}
        unit = units.pop() if len(units) == 1 else ""
        return RawColumn("number", np.array([_number(value) for value in values], np.float64), unit=unit)
    if always_missing and types and all(issubclass(type_, int | np.integer) for type_ in types):
        return _integers_with_gaps(values)
    if all(issubclass(type_, _NUMBERS) for type_ in types):
        return RawColumn("number", _numbers(values))
    is_time = lambda type_: issubclass(type_, _TIMES) or type_.__name__ == "Period"
    if all(issubclass(type_, float | np.floating) or is_time(type_) for type_ in types) and not any(
        isinstance(value, float | np.floating) and not math.isnan(value) for value in values
    ):
        return RawColumn("time", np.array([_time(value) for value in values], "datetime64[us]"))
    for type_ in types:
        if not issubclass(type_, _PLAIN) and type_.__name__ not in ("Period", "Interval"):
            return RawColumn("unreadable", values, reason=f"has values of type {type_.__name__}")
    return RawColumn("text", _mapped(values, _level))


def _integers_with_gaps(values: np.ndarray) -> RawColumn:
    """Reads whole numbers and None: as texts, which stay exact, if float64 could merge the numbers."""
    if any(value is not None and abs(int(value)) > 2**53 for value in values):
        return RawColumn("text", _mapped(values, _level))
    return RawColumn("number", _numbers(values))


def _mapped(values: np.ndarray, function: Callable[[Any], Any]) -> np.ndarray:
    """Applies a function to each value. Equal texts share one call."""
    results: dict[str, Any] = {}
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        if type(value) is not str:
            array[i] = function(value)
            continue
        if value not in results:
            results[value] = function(value)
        array[i] = results[value]
    return array


def _level(value: Any) -> str | None:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    text = as_text(value).strip()
    return None if text in MISSING or text == "NaT" else text


def _numbers(values: np.ndarray) -> np.ndarray:
    types = set(map(type, values))
    with contextlib.suppress(OverflowError):
        if types and all(issubclass(type_, int | np.integer) for type_ in types):
            return values.astype(np.int64)  # exact above 2^53, too
    try:
        return np.where(np.equal(values, None), np.nan, values).astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([_number(value) for value in values], np.float64)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, datetime.time):
        return value.hour + value.minute / 60 + value.second / 3600
    if isinstance(value, np.timedelta64 | datetime.timedelta):
        return float(_days(np.array([value], "timedelta64[us]"))[0])
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # a signaling NaN of `decimal`
        return math.nan


def _time(value: Any) -> np.datetime64:
    if isinstance(value, datetime.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(datetime.UTC)
        return np.datetime64(value.replace(tzinfo=None), "us")
    if value is None or isinstance(value, float | np.floating):
        return np.datetime64("NaT", "us")
    if type(value).__name__ == "Period":  # pandas'
        value = value.to_timestamp().to_datetime64()
    return np.datetime64(value, "us")


def _days(durations: np.ndarray) -> np.ndarray:
    """[n] timedelta64 -> float64, in days."""
    durations = durations.astype("timedelta64[us]")
    return np.where(np.isnat(durations), np.nan, durations.astype(np.int64) / _MICROSECONDS)

"""Converts records to data frames and back. pandas writes such frames as Parquet, CSV and other formats."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metaopt import _extras
from metaopt.base import Record
from metaopt.blackbox._records import as_python

if TYPE_CHECKING:
    import pandas

_JSON = ("configuration", "outcomes")  # columns of dicts


def as_pandas(frame: Any) -> Any:
    """Returns a pandas DataFrame, converted if necessary with `to_pandas`, which polars and pyarrow tables have."""
    return frame.to_pandas() if hasattr(frame, "to_pandas") else frame


def records_to_frame(records: Sequence[Record], *, wide: bool = False) -> "pandas.DataFrame":
    """Converts records to a data frame, one row per record; `frame.to_parquet(file)` writes it.

    Args:
      records: the records, any number of them.
      wide: whether to add a column for each parameter, and for each of several outcomes, for people to read.
        `records_from_frame` does not need these columns. Parquet rejects columns that mix labels and numbers.

    Returns:
      A frame with a column for each field of a record. "configuration" is JSON, because a column does not
      keep whether a number is an integer, and whether None is a value or a gap. "outcomes" is JSON, or None.

    Raises:
      ImportError: if pandas is not installed.
    """
    pd = _extras.require("pandas", "records", "`records_to_frame`")
    frame = pd.DataFrame([record._asdict() for record in records], columns=list(Record._fields))
    as_json = lambda value: None if value is None else json.dumps(value, default=as_python)
    columns: Any = {name: [as_json(getattr(record, name)) for record in records] for name in _JSON}
    texts = frame.assign(**{name: pd.Series(column, frame.index, object) for name, column in columns.items()})
    if wide:
        for name in _JSON:
            entries = pd.DataFrame([getattr(record, name) or {} for record in records], index=frame.index)
            texts = texts.join(entries.add_prefix(f"{name}."))
    return texts


def records_from_frame(frame: "pandas.DataFrame") -> list[Record]:
    """Reads records from a data frame that `records_to_frame` made, or that `pandas.read_parquet` read.

    Args:
      frame: has the columns "task" and "configuration" (JSON, or dicts), and any of the other fields. Missing entries
        (NaN, None, NA) become NaN in numeric fields, "" in "reason", and None in "outcomes". A frame of polars, or any
        object with `to_pandas`, is converted first. A CSV file cannot distinguish a name from a number or a gap ("007",
        "1e5", "NA"). So pandas needs these arguments:

            texts, gaps = {"task": str, "reason": str}, {"outcome": "", "cost": ""}
            pandas.read_csv(file, dtype=texts, na_values=gaps, keep_default_na=False)

        Before pandas 3, add `float_precision="round_trip"`. Otherwise the last digits of numbers may differ.

    Returns:
      The records, in order.

    Raises:
      TypeError: if a required column is missing.
      ValueError: if a task or reason is not text, or if a configuration or outcomes are neither a dict nor JSON of a
        dict. The message has the row number, from 0.
    """
    frame = as_pandas(frame)
    columns = [name for name in Record._fields if name in frame.columns]
    rows = zip(*(_values(frame[name]) for name in columns), strict=True)
    records = []
    for number, row in enumerate(rows):
        record = Record(**dict(zip(columns, row, strict=True)))
        reason = "" if record.reason != record.reason else record.reason  # NaN
        for name, text in (("task", record.task), ("reason", reason)):
            if not isinstance(text, str):
                raise ValueError(
                    f"The column {name!r} must contain strings; got {text!r} in row {number}. If it comes from a CSV "
                    "file, pandas may have changed it: the docstring of `records_from_frame` shows how to read one."
                )
        outcomes = record.outcomes
        is_gap = outcomes is None or outcomes == "" or outcomes != outcomes
        outcomes = None if is_gap else _as_dict("outcomes", outcomes, number)
        configuration = _as_dict("configuration", record.configuration, number)
        records.append(record._replace(configuration=configuration, reason=reason, outcomes=outcomes))
    return records


def _as_dict(name: str, value: Any, number: int) -> dict[str, Any]:
    """Returns the dict of an entry, which is a dict or JSON."""
    parsed = value
    if not isinstance(value, dict):
        try:
            parsed = json.loads(value)
        except (TypeError, ValueError):
            parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(
            f'The column "{name}" must hold dicts, or JSON of dicts; got {value!r} in row {number}. '
            "`records_to_frame` makes such frames."
        )
    return parsed


def _values(column: Any) -> list[Any]:
    """Returns plain values. Gaps of any kind become NaN. Outcomes, fidelities and costs become floats, even if all are
    whole.
    """
    if column.name in ("outcome", "fidelity", "cost") and column.dtype.kind in "iuf":
        return column.to_numpy(float, na_value=math.nan).tolist()
    return column.astype(object).where(column.notna(), math.nan).tolist()

"""Records as data frames, and so as Parquet, CSV or what else pandas writes."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metaopt.base import Record, as_pandas
from metaopt.tasks._records import as_python

if TYPE_CHECKING:
    import pandas

_EXTRA = 'install it with `pip install "metaopt-jax[records]"`.'


def records_to_frame(records: Sequence[Record], *, wide: bool = False) -> "pandas.DataFrame":
    """Records as a data frame, a row each; `frame.to_parquet(file)` writes it.

    Args:
      records: any number.
      wide: one more column for each parameter, for looking at; `records_from_frame` does not need them, and Parquet
        does not take columns in which labels and numbers are mixed.

    Returns:
      A column for each field of a record. "configuration" is JSON, which keeps what a column cannot: whether a number
      is an integer, and whether None is a value or a gap.

    Raises:
      ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"`records_to_frame` needs pandas; {_EXTRA}") from error
    frame = pd.DataFrame([record._asdict() for record in records], columns=list(Record._fields))
    texts = frame.assign(configuration=[json.dumps(record.configuration, default=as_python) for record in records])
    if wide:
        parameters = pd.DataFrame([record.configuration for record in records], index=frame.index)
        texts = texts.join(parameters.add_prefix("configuration."))
    return texts


def records_from_frame(frame: "pandas.DataFrame") -> list[Record]:
    """The records of a data frame that `records_to_frame` made, or `pandas.read_parquet` read.

    Args:
      frame: with "task" and "configuration" (JSON, or dicts), and with as many other fields as there are. What is
        missing (NaN, None, NA) is NaN where it is a number, and "" where it is a reason. A frame of polars, or what
        else has a `to_pandas`, is converted.
        CSV cannot tell a name from a number, or from nothing ("007", "1e5", "NA"), so that pandas must be told:

            texts, gaps = {"task": str, "reason": str}, {"outcome": "", "cost": ""}
            pandas.read_csv(file, dtype=texts, na_values=gaps, keep_default_na=False)

    Returns:
      The records, in order.

    Raises:
      ValueError: if it is not a data frame, or a required column is missing, or a task or reason is not text, or a
        configuration is neither JSON of a dict nor a dict; the message names the row, from 0.
    """
    frame = as_pandas("frame", frame)
    if missing := {"task", "configuration"} - set(frame.columns):
        raise ValueError(f"The frame has no column {sorted(missing)}; `records_to_frame` makes such frames.")
    columns = [name for name in Record._fields if name in frame.columns]
    rows = zip(*(_values(frame[name]) for name in columns), strict=True)
    records = []
    for number, row in enumerate(rows):
        record = Record(**dict(zip(columns, row, strict=True)))
        reason = "" if record.reason != record.reason else record.reason  # NaN
        for name, text in (("task", record.task), ("reason", reason)):
            if not isinstance(text, str):
                raise ValueError(
                    f"The column {name!r} must hold texts; got {text!r} in row {number}, which may have been another "
                    "text in a CSV file: the docstring of `records_from_frame` says how pandas reads one."
                )
        configuration = record.configuration
        if not isinstance(configuration, dict):
            try:
                configuration = json.loads(configuration)
            except (TypeError, ValueError):
                configuration = None
        if not isinstance(configuration, dict):
            raise ValueError(
                f'The column "configuration" must hold dicts, or JSON of dicts; got {record.configuration!r} in row '
                f"{number}. `records_to_frame` makes such frames."
            )
        records.append(record._replace(configuration=configuration, reason=reason))
    return records


def _values(column: Any) -> list[Any]:
    """As plain values; gaps of any kind are NaN, and numbers of a measure are floats, though they may all be whole."""
    if column.name in ("outcome", "fidelity", "cost") and column.dtype.kind in "iuf":
        return column.to_numpy(float, na_value=math.nan).tolist()
    return column.astype(object).where(column.notna(), math.nan).tolist()

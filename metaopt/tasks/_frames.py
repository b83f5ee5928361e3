"""Records as data frames, and so as Parquet, CSV or what else pandas writes."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metaopt.base import Record

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
    texts = frame.assign(configuration=[json.dumps(record.configuration) for record in records])
    if wide:
        parameters = pd.DataFrame([record.configuration for record in records], index=frame.index)
        texts = texts.join(parameters.add_prefix("configuration."))
    return texts


def records_from_frame(frame: "pandas.DataFrame") -> list[Record]:
    """The records of a data frame that `records_to_frame` made, or `pandas.read_parquet` read.

    Args:
      frame: with "task" and "configuration" (JSON), and with as many other fields as there are. CSV, which cannot tell
        a name from a number, and "" from nothing, does no harm: a task's name is a string again, a missing reason "".

    Returns:
      The records, in order.

    Raises:
      ValueError: a column that is needed is missing.
    """
    if missing := {"task", "configuration"} - set(frame.columns):
        raise ValueError(f"The frame has no column {sorted(missing)}; `records_to_frame` makes such frames.")
    columns = [name for name in Record._fields if name in frame.columns]
    rows = zip(*(frame[name].tolist() for name in columns), strict=True)
    text = lambda value: value if isinstance(value, str) else ""
    return [
        record._replace(
            task=str(record.task),
            configuration=json.loads(record.configuration),  # pyright: ignore[reportArgumentType]
            reason=text(record.reason),
        )
        for record in (Record(**dict(zip(columns, row, strict=True))) for row in rows)
    ]

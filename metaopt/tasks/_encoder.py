"""An encoder of tables with column names: data frames, arrays, lists or dicts become numbers and codes.

`fit_encoder` chooses how each column is encoded, without a target. `TableEncoder.transform` encodes the same or new
rows. Unlike `prepare`, it reads any types of values, and keeps missing values as NaN.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import _files, _logs, _saving
from metaopt.tasks._amounts import is_sign, readings
from metaopt.tasks._column_codes import KINDS, MIN_ROWS, PARTS, READINGS, ColumnCode, Fit, apply_code, fit_column
from metaopt.tasks._columns import FLOAT32_MAX
from metaopt.tasks._frames import Frame, as_text, positions, read_frame, read_values, unique_names

_log = _logs.Log(logging.getLogger(__name__))

ACTIONS = ("dropped", "changed")
_MOSTLY_MISSING = 0.9  # a column with a larger share of gaps in `fit_encoder` may be empty in new rows
_SURPRISING = 1e-3
_FAR = 20  # a value that is so many times the largest of `fit_encoder` probably has another unit or decimal mark
_FEW_OUTSIDE = 9  # up to this many numbers outside the range of `fit_encoder`, there is no warning


class ColumnNote(NamedTuple):
    """What happened to a column.

    Attributes:
      column: its name.
      action: "dropped" or "changed". A column that only looks unusual is "changed", too.
      reason: completes "the column ...".
    """

    column: str
    action: str
    reason: str


class TableEncoder(NamedTuple):
    """A fitted encoder of data frames, made of plain values. `metaopt.save` writes it; `state` returns it as JSON
    values.

    Attributes:
      input_names: the names of the frame's columns; "0", "1", ... if it had no names.
      named: whether the names come from the frame.
      numbered: whether the frame's own names were whole numbers, such as the default names of pandas.
      columns: for each column that is kept, how its values become numbers.
      notes: for each column that was dropped or changed, its name `column`, the `action` ("dropped" or "changed") and
        the `reason`.
      max_levels: columns with more levels are in `high_cardinality`.
    """

    input_names: tuple[str, ...]
    named: bool
    numbered: bool
    columns: tuple[ColumnCode, ...]
    notes: tuple[ColumnNote, ...]
    max_levels: int

    @property
    def names(self) -> tuple[str, ...]:
        """[d] the names of the columns of `transform`; a time has several, such as "sold.days" and "sold.month"."""
        return unique_names(
            f"{code.name}.{part}" if part else code.name for code in self.columns for part in code.parts or ("",)
        )

    @property
    def categorical(self) -> np.ndarray:
        """[d] bool, which columns of `transform` hold codes."""
        return np.array([len(levels) > 0 for levels in self.levels], bool)

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """[d] the levels of each column in the order of its codes; () for numbers."""
        return tuple(code.levels for code in self.columns for _ in code.parts or ("",))

    @property
    def high_cardinality(self) -> np.ndarray:
        """[d] bool, which columns have more than `max_levels` levels."""
        return np.array([len(levels) > self.max_levels for levels in self.levels], bool)

    def transform(self, frame: Any) -> np.ndarray:
        """Encodes rows.

        If the frame and the encoder have names, columns are matched by name: their order does not matter, and other
        columns are ignored. Otherwise, they are matched by position. The result for a row does not depend on the other
        rows. Values that cannot be read (such as a word among numbers) count as missing, and the log reports them. The
        log also warns if more than a tenth of the values of a category, and at least 5, are unseen levels. If unseen
        levels become "(other)", it warns only if no value is a level. Each message shows one of the values.

        One more warning names the columns that are empty in all n rows, if this is surprising: the share p of gaps in
        the rows of `fit_encoder` is at most .9, and max(p, ½)ⁿ < .001. So there must be 10 rows, or more if p > ½. The
        minimum ½ is there because the rows of a small table may be alike.

        The last warning names a column of numbers if more than half of its known values, and at least 10, lie outside
        the range in the rows of `fit_encoder`, or if one value is more than 20 times as large as all of them. The unit
        or the decimal mark may have changed.

        Args:
          frame: a frame of any type that `fit_encoder` takes.

        Returns:
          [n, d] float64, NaN where missing. A categorical column holds the codes of its `levels`. An unseen level has
          the code of "(other)" if the column has this level; otherwise it is missing.

        Raises:
          TypeError: if `frame` is sparse or not a table.
          ValueError: if a column that is needed is missing, or the number of columns without names is wrong.
          ValueError: if it is not two-dimensional, is empty, or has complex numbers.
        """
        table = read_frame(frame)
        places = _places(self, table)
        blocks, empty = [], []
        for code in self.columns:
            raw = read_values(table.columns[places[code.source]])
            block, unread = apply_code(code, raw)
            is_large = unread.num > 0.1 * len(block) or (unread.num > 0 and code.kind == "category")
            if unread.num:
                level = logging.WARNING if is_large else logging.INFO
                message = "the column %r has %d of %d values that %s (such as %r)"
                _log.log(level, message, code.name, unread.num, len(block), unread.reason, as_text(unread.example)[:60])
            if not is_large and np.isnan(block).all() and _surprises(code.share_missing, len(block)):
                empty.append(code.name)
            if code.kind == "number" and not is_large:
                _warn_of_range(code, block[:, 0], raw.unit)
            blocks.append(block)
        if empty:
            columns = "column %s has" if len(empty) == 1 else "columns %s have"
            message = f"the {columns} no values in any of the %d rows, but had values in the rows of `fit`"
            _log.warning(message, ", ".join(map(repr, empty)), table.num_rows)
        return np.concatenate(blocks, axis=1) if blocks else np.zeros((table.num_rows, 0))

    def state(self) -> dict[str, Any]:
        """Returns the encoder as JSON values.

        Returns:
          A dict for `json.dumps` and `from_state`.
        """
        return {
            "input_names": list(self.input_names),
            "named": self.named,
            "numbered": self.numbered,
            "columns": [
                {**code._asdict(), "levels": list(code.levels), "parts": list(code.parts)} for code in self.columns
            ],
            "notes": [list(note) for note in self.notes],
            "max_levels": self.max_levels,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TableEncoder":
        """Makes the encoder from its state.

        Args:
          state: the result of `state`, possibly after `json.dumps` and `json.loads`.

        Returns:
          An equal encoder.

        Raises:
          ValueError: if the values do not fit each other.
        """
        columns = tuple(
            ColumnCode(**{**code, "levels": tuple(code["levels"]), "parts": tuple(code["parts"])})
            for code in state["columns"]
        )
        encoder = cls(
            tuple(state["input_names"]),
            state["named"],
            state["numbered"],
            columns,
            tuple(ColumnNote(*note) for note in state["notes"]),
            state["max_levels"],
        )
        _check_encoder(encoder)
        return encoder


def fit_encoder(
    frame: Any,
    *,
    max_levels: int = 30,
    drop: Sequence[str | int] = (),
    keep: Sequence[str | int] = (),
    decimal: str = ".",
) -> TableEncoder:
    """Fits an encoder that turns the columns of a table into numbers. It does not use a target.

    - Numbers stay. Booleans become 0 and 1. Durations become days.
    - Times become days since 1970 (in UTC), and month, weekday (Monday is 0) and hour if these vary.
      Times with a time zone are converted to UTC first, and times without one are not. So new rows should have a time
      zone if and only if these rows have one: midnight of Monday in Berlin is Sunday in UTC.
    - Texts become numbers or times if all of them can be read so: 3, 1e3, 1,065.50, 2020-12-31, 31/12/2020 10:00. Dates
      with the year first may be among dates in another order, also in new rows. Up to a tenth of the rows may have
      other words, such as "unknown", if there are 20 different numbers or more.
    - If all numbers of a text column are like 1,065, the comma separates thousands, and the log warns that it may be
      the decimal mark. If decimal commas occur, and no 1.065 without a comma, new values like 1.065 count as missing.
    - In numbers, parentheses are a minus, as in accounting: (1,200.50). If no value is a word, 1.2k and 3M become
      numbers, too. But a column stays text if all its values are like (2), or if it has 5k or 3M and none like 1.2k,
      because such values may be labels. The log warns of parentheses without a sign of a currency or percent, and of k
      and M next to numbers with decimals.
    - Amounts become numbers if all have the same sign before or after the number: $1,200, -€ 5, 1.234,50 €, EUR 5, $5k,
      12 %. The sign is one character of a currency, "US$", "A$", "C$", the code of a frequent currency in capitals with
      a blank next to it, or "%". 12 % becomes 12. All amounts of a column show which mark is the decimal one. If 1,234
      is all there is, the comma separates thousands. In 1.234, the point is the decimal mark, except in whole amounts
      like 950 € and 1.234 €, of a currency other than those with a comma between thousands ($, US$, A$, C$, £, ¥, ₹).
      For currencies the log warns of both. New values without the sign, or with another one, count as missing.
    - Other texts and pandas' categories become codes 0..L-1 in the order of the levels: pandas' order if it is ordered,
      otherwise numbers by value, then words. Levels with fewer than max(2, n / 5000) rows share the level "(other)".
    - These values are missing: None, NaN, NaT, pandas.NA, the texts that `from_csv_folder` lists, and numbers beyond
      float32. The text "None" is a level, but is missing among numbers.
    - If float32 would merge numbers, the smallest number is subtracted.

    These columns are dropped: constant columns; copies of an earlier column; ids, with a warning; and columns of lists,
    dicts or other objects. Ids are whole numbers in a small range that hardly repeat, larger ones with a name such as
    "user_id", and texts that never repeat. Copies and ids are only looked for in tables with at least 20 rows.

    Args:
      frame: a DataFrame of pandas or polars, a table of Arrow, a 2-d array of numbers or objects, a list of rows, a
        list of dicts, or a dict of columns.
      max_levels: categorical columns with more levels are marked in `high_cardinality`; the codes are the same.
      drop: names or positions of columns to drop.
      keep: names or positions of columns that are kept if they look like ids, unless they are texts.
      decimal: "." or ",". With ",", texts like 1,065 are 1.065 if all numbers of the column can be read so. Amounts are
        read as described above in any case.

    Returns:
      A `TableEncoder`. It may have no columns (d = 0). Its `notes` have every column that was dropped or changed.

    Raises:
      TypeError: if `frame` is sparse or not a table.
      ValueError: if it is not two-dimensional, is empty, or has complex numbers.
      ValueError: if `drop` or `keep` has an unknown column, or `decimal` is neither "." nor ",".

    >>> encoder = fit_encoder(
    ...     {"size": ["1,065", "870", None], "color": ["red", "blue", "red"]}
    ... )
    >>> encoder.names, encoder.levels[1]
    (('size', 'color'), ('red', '(other)'))
    >>> encoder.transform({"color": ["red", "green"], "size": [1.5, 2]})
    array([[1.5, 0. ],
           [2. , 1. ]])
    """
    if decimal not in (".", ","):
        raise ValueError(f'`decimal` is "." or ","; got {decimal!r}.')
    table = read_frame(frame)
    dropped, kept = (positions(name, chosen, table) for name, chosen in (("drop", drop), ("keep", keep)))
    codes: list[ColumnCode] = []
    notes: list[ColumnNote] = []
    first: dict[bytes, str] = {}  # hash of the values -> the first column that has them
    for j, name in enumerate(table.names):
        if j in dropped:
            notes.append(ColumnNote(name, "dropped", "is not used as a feature"))
            continue
        fit = fit_column(name, j, read_values(table.columns[j]), keep=j in kept, decimal=decimal)
        twin = _twin(fit, first, table.num_rows)
        if twin is not None:
            fit = fit._replace(code=None, drop=f"is a copy of the column {twin!r}")
        for reason in (fit.drop,) if fit.code is None else fit.changes:
            action = "changed" if fit.code is not None else "dropped"
            notes.append(ColumnNote(name, action, reason))
            level = logging.WARNING if reason in fit.warnings else logging.INFO
            _log.log(level, "the column %r is %s: it %s", name, action, reason)
        if fit.code is not None:
            share = float(np.isnan(fit.values).all(axis=1).mean())
            codes.append(_with_range(fit.code._replace(share_missing=share), fit.values))
    return TableEncoder(table.names, table.named, table.numbered, tuple(codes), tuple(notes), max_levels)


def _with_range(code: ColumnCode, values: np.ndarray) -> ColumnCode:
    known = values[~np.isnan(values)]
    if code.kind != "number" or not known.size:
        return code
    return code._replace(low=float(known.min()), high=float(known.max()))


def _warn_of_range(code: ColumnCode, values: np.ndarray, unit: str) -> None:
    """Warns if most values of a column of numbers lie outside the range in the rows of `fit_encoder`.

    The warning states the unit of durations and times of day, which may differ from that of `fit_encoder`.
    """
    largest = max(abs(code.low + code.offset), abs(code.high + code.offset))
    rounding = float(np.finfo(np.float32).eps) / 2 * largest
    outside = np.flatnonzero((values < code.low - rounding) | (values > code.high + rounding))  # a gap is neither
    far = np.flatnonzero(np.abs(values + code.offset) > _FAR * largest)
    num_known = int((~np.isnan(values)).sum())
    if len(far) or len(outside) > max(_FEW_OUTSIDE, num_known / 2):
        _log.warning(
            "the column %r has %d of %d values outside the range in the rows of `fit`, %.12g to %.12g%s "
            "(such as %.12g%s); has its unit or decimal mark changed?",
            code.name,
            len(outside),
            num_known,
            code.low + code.offset,
            code.high + code.offset,
            f" {code.unit}" if code.unit else "",
            values[[*far, *outside][0]] + code.offset,
            f" {unit}" if unit else "",
        )


def _surprises(share_missing: float, num_rows: int) -> bool:
    """Whether it is surprising that all of some new rows have a gap, for the share of gaps in the rows of `fit`.

    Rows of a small table may be alike, such as those of one customer. So a smaller share than ½ counts as ½.
    """
    return share_missing <= _MOSTLY_MISSING and max(share_missing, 0.5) ** num_rows < _SURPRISING


def _twin(fit: Fit, first: dict[bytes, str], num_rows: int) -> str | None:
    """Returns the name of an earlier column with equal values, or with equal categories under other names.

    Otherwise it adds this column to `first` and returns None.
    """
    if fit.code is None or num_rows < MIN_ROWS:
        return None
    values = fit.values + 0.0  # no negative zeros
    if fit.code.kind == "category":  # number the levels in the order of the rows
        _, start, index = np.unique(values, return_index=True, return_inverse=True)
        values = np.argsort(np.argsort(start))[index.reshape(-1)] + 0.0
    values = np.where(np.isnan(values), np.nan, values)
    kind = b"category" if fit.code.kind == "category" else b"number"
    digest = hashlib.blake2b(kind + values.tobytes(), digest_size=16).digest()
    twin = first.setdefault(digest, fit.code.name)
    return None if twin == fit.code.name else twin


def _places(encoder: TableEncoder, table: Frame) -> Mapping[int, int]:
    """The position in `table` of each column of `fit_encoder`'s frame that is needed."""
    by_name = {name: place for place, name in enumerate(table.names)}
    needed = {code.source: encoder.input_names[code.source] for code in encoder.columns}
    missing = [name for name in needed.values() if name not in by_name]
    num_columns, num_expected = len(table.names), len(encoder.input_names)
    numbers = encoder.numbered and table.numbered and num_columns == num_expected
    if encoder.named and table.named and not (missing and numbers):
        if missing:
            names = "".join(f"\n- {name}" for name in missing)
            raise ValueError(
                "The feature names should match those that were passed during fit.\n"
                f"Feature names seen at fit time, yet now missing:{names}\n"
            )
        return {source: by_name[name] for source, name in needed.items()}
    if num_columns != num_expected:
        raise ValueError(
            f"X has {num_columns} features, but TableEncoder is expecting {num_expected} features as input."
        )
    return {source: source for source in needed}


# --- files ---


def _check_encoder(encoder: TableEncoder) -> None:
    """Raises ValueError if a field has a wrong type or value."""
    is_text = lambda *values: all(isinstance(value, str) for value in values)
    is_whole = lambda *values: all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    holds = isinstance(encoder.named, bool) and isinstance(encoder.numbered, bool) and is_text(*encoder.input_names)
    holds = holds and len(set(encoder.input_names)) == len(encoder.input_names)
    holds = holds and is_whole(encoder.max_levels, *(code.source for code in encoder.columns))
    holds = holds and all(is_text(*note) and note.action in ACTIONS for note in encoder.notes)
    for code in encoder.columns:
        holds = holds and is_text(code.name, code.reading, code.sign, code.unit, *code.levels, *code.parts)
        holds = holds and 0 <= code.source < len(encoder.input_names) and code.kind in KINDS
        holds = holds and code.reading in ("", *READINGS) and set(code.parts) <= set(PARTS)
        is_amount = lambda code: code.kind == "number" and is_sign(code.sign) and code.reading in readings(code.sign)
        holds = holds and (not code.sign or is_amount(code))
        holds = holds and (code.kind == "time") == bool(code.parts) and (code.kind == "category") == bool(code.levels)
        holds = holds and isinstance(code.share_missing, float) and 0 <= code.share_missing <= 1
        holds = holds and isinstance(code.low, float) and isinstance(code.high, float) and code.low <= code.high
        is_number = (is_whole(code.offset) or isinstance(code.offset, float)) and abs(code.offset) <= FLOAT32_MAX
        holds = holds and is_number and len(set(code.levels)) == len(code.levels)
    if not holds:
        raise ValueError("the values of the encoder do not fit each other")


def _encode(encoder: TableEncoder) -> tuple[dict[str, Any], dict[str, Any]]:
    return encoder.state(), {}


def _decode(header: dict[str, Any], file: _files.Npz) -> TableEncoder:
    del file
    return TableEncoder.from_state(header)


_saving.register(_saving.Kind("table_encoder", TableEncoder, _encode, _decode))

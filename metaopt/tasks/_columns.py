"""Converts columns of text to float32: numbers, numbers with thousands separators, dates, or categories.

All values of a column must have the same type; otherwise the column is categorical. Whole numbers are compared as
Python integers, because float64 merges them above 2^53 and float32 above 2^24.
"""

import datetime
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple, TypeVar

import numpy as np

AMBIGUOUS = "the order of day and month is ambiguous"
_T = TypeVar("_T")

# Exact spellings. "None" is not one of them, because classes and levels have that name; "Na" is sodium.
MISSING = frozenset({"", "?", "NA", "na", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "null", "NULL", "<null>"})

FLOAT32_MAX = float(np.finfo(np.float32).max)
_MIN_PAIRS = 8  # a column without equal pairs is an id if chance would give at least this many
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_DAY = 86_400_000_000  # microseconds

# Numbers with thousands separators, by their decimal mark. "0,500" is not one of them.
_GROUPED = {
    ".": re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?"),
    ",": re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+(?:,\d*)?"),
}
_TIME = r"(?:[T ](\d{1,2}):(\d{2})(?::(\d{2})(?:\.(\d{1,6})\d*)?)?(?: ?(Z|[+-]\d{2}:?\d{2}))?)?"
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})" + _TIME)
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})" + _TIME)


class Column(NamedTuple):
    """A column of a table. `n` rows.

    Attributes:
      values: [n] float32; NaN where missing; the codes 0..L-1 of a categorical column.
      categorical: whether the values are codes.
      notes: changes, and remarks about unusual values, for the log. Each note completes "the column 'x' ...".
    """

    values: np.ndarray
    categorical: bool
    notes: tuple[str, ...]


class _Numbers(NamedTuple):
    """The numbers of a column: `values` / `unit`. Whole values are Python integers."""

    values: list[int | float]
    unit: int = 1
    notes: tuple[str, ...] = ()


def number(text: str) -> int | float | None:
    """Returns the number that a text represents: an exact integer if it is whole, otherwise a float.

    Args:
      text: such as "3", "3.0", "1e3" or "inf". "nan" and "1_000" are not numbers.

    Returns:
      The number, or None if the text is not a number.
    """
    try:
        value = float(text)
    except ValueError:
        return None
    if "_" in text or math.isnan(value):
        return None
    if not value.is_integer():  # includes infinity
        return value
    if abs(value) < 2**53:
        return int(value)
    exact = Decimal(text)
    return int(exact) if exact == int(exact) else value


def level_order(text: str) -> tuple[bool, int | float, str]:
    """The key that sorts levels: numbers first, by their values, then other texts."""
    value = number(text)
    return (value is None, 0 if value is None else value, text)


def read_column(name: str, texts: Sequence[str], lines: Sequence[int], *, decimal_comma: bool = False) -> Column:
    """Reads a column of a CSV file.

    Args:
      name: the name of the column, for messages.
      texts: [n] fields without surrounding blanks.
      lines: [n] line numbers of the fields, for messages.
      decimal_comma: whether "1,5" is a number. If so, "1,065" is 1.065; otherwise it is 1065.

    Returns:
      The `Column`.

    Raises:
      ValueError: if a number of a numeric column is beyond the range of float32.
    """
    present = [i for i, text in enumerate(texts) if text not in MISSING]
    rows = [i for i in present if texts[i].lower() != "none"]
    numbers = next(_readings([texts[i] for i in rows], decimal_comma), None)
    if numbers is None:
        words = [texts[i] for i in present]
        notes = _exceptions(words, [lines[i] for i in present])
        if _hardly_repeats(words) and len(set(words)) < len(texts):
            notes += ("looks like an id, since its text hardly repeats; remove it from the file if it is one",)
        return Column(code(words, present, len(texts)), True, notes)
    for i, value in zip(rows, numbers.values, strict=True):
        if abs(value) > FLOAT32_MAX * numbers.unit:
            raise ValueError(f"line {lines[i]}: {name!r} is {texts[i]}, beyond float32.")
    notes = numbers.notes
    if len(rows) < len(present):
        first = next(i for i in present if texts[i].lower() == "none")
        notes += (f"has {texts[first]!r} among numbers (line {lines[first]}), which counts as missing",)
    packed, exact, note = as_float32(numbers.values, numbers.unit)
    are_integers = numbers.unit == 1 and _are_whole(numbers.values)
    if not exact and are_integers and 2 * len(set(numbers.values)) <= len(rows):
        note = "has whole numbers that float32 cannot tell apart and that repeat, like ids; it is categorical"
        return Column(code(numbers.values, rows, len(texts)), True, (*notes, note))
    if are_integers and looks_like_id(numbers.values):
        notes += ("looks like an id, whose values hardly repeat; remove it from the file unless it is a measurement",)
    values = np.full(len(texts), np.nan, np.float32)
    values[rows] = packed
    return Column(values, False, notes + note)


def counts_rows(texts: Sequence[str]) -> bool:
    """Returns whether a column is k, k + 1, k + 2 ...

    Args:
      texts: all fields of the column.
    """
    start = number(texts[0]) if len(texts) > 1 else None
    return start is not None and all(number(text) == start + i for i, text in enumerate(texts))


def code(values: Sequence, rows: Sequence[int], num_rows: int) -> np.ndarray:
    """Numbers categories by their sorted levels.

    Args:
      values: [m] texts or numbers, compared exactly.
      rows: [m] the row of each value; every other row is missing.
      num_rows: n.

    Returns:
      [n] float32 in 0..L-1, NaN where missing.
    """
    index = {level: place for place, level in enumerate(sorted(set(values)))}
    codes = np.full(num_rows, np.nan, np.float32)
    codes[list(rows)] = [index[value] for value in values]
    return codes


def as_float32(values: Sequence[int | float], unit: int = 1) -> tuple[np.ndarray, bool, tuple[str, ...]]:
    """Converts finite numbers to float32. If this makes too many values equal, it first subtracts the smallest number.

    Whole numbers must all stay different. Among other numbers, up to a tenth of the values may become equal, because
    digits beyond the seventh are mostly noise.

    Args:
      values: integers, compared exactly, or floats.
      unit: the divisor of all values.

    Returns:
      The float32 numbers, whether enough of them are still different, and notes about changes.
    """
    if not len(values):
        return np.zeros(0, np.float32), True, ()
    num_values, lowest = len(set(values)), min(values)
    min_values = num_values if _are_whole(values) else 0.9 * num_values
    plain = np.array([value / unit for value in values]).astype(np.float32)
    num_left = len(np.unique(plain))
    if num_left >= min_values:
        return plain, True, ()
    shifted = np.array([(value - lowest) / unit for value in values]).astype(np.float32)
    if len(np.unique(shifted)) >= min_values:
        return shifted, True, ("has numbers that float32 cannot tell apart; the smallest is subtracted from all",)
    return plain, False, (f"has {num_values} different numbers, which float32 rounds to {num_left}",)


def merged_values(x: np.ndarray) -> dict[int, int]:
    """Counts the values that float32 merges, in columns with numbers above 2^24.

    Args:
      x: [n, d] numbers.

    Returns:
      Column -> the number of different values that are lost; only columns that lose some.
    """
    if x.dtype == np.float32:
        return {}
    large = np.flatnonzero((np.abs(x) > 2**24).any(axis=0))
    with np.errstate(over="ignore"):
        lost = {int(j): len(np.unique(x[:, j])) - len(np.unique(x[:, j].astype(np.float32))) for j in large}
    return {j: num for j, num in lost.items() if num}


def looks_like_id(values: Sequence[int | float]) -> bool:
    """Returns whether n numbers look like ids of the rows.

    They do if all are whole, at least 95 % of them are different, and one of these conditions holds:

    - they are dense: the largest is less than the smallest plus 2 n;
    - all are at least 10,000, and have the same number of digits;
    - the largest is above 2^24;
    - no number is repeated, although chance would repeat some. Of n independent numbers with R possible values, at
      least n (n − 1) / 2R pairs are equal on average. If no pair is equal where at least 8 are expected, the numbers
      are not counts (the chance is e⁻⁸).

    Sparser ids look like measurements, and are not recognized.

    Args:
      values: finite numbers. With fewer than 20, the result is False.
    """
    num, different = len(values), set(values)
    if not _hardly_repeats(values) or any(value != int(value) for value in different):
        return False
    low, high = int(min(different)), int(max(different))
    same_length = low >= 10_000 and len(str(low)) == len(str(high))
    never_repeats = len(different) == num and num * (num - 1) >= 2 * _MIN_PAIRS * (high - low + 1)
    return high - low < 2 * num or same_length or high > 2**24 or never_repeats


def _hardly_repeats(values: Sequence) -> bool:
    """Returns whether there are at least 20 values, and at least 95 % as many different ones."""
    return len(values) >= 20 and len(set(values)) >= 0.95 * len(values)


def _are_whole(values: Sequence[int | float]) -> bool:
    return all(isinstance(value, int) for value in values)


def _readings(texts: list[str], decimal_comma: bool) -> Iterator[_Numbers]:
    """Yields the ways to read all texts as numbers, the preferred one first."""
    if not texts:
        return
    if (values := _all_or_none(map(number, texts))) is not None:
        yield _Numbers(values)
    for mark in (",", ".") if decimal_comma else (".",):
        if (values := _all_or_none(number_with_separators(text, mark) for text in texts)) is not None:
            yield _Numbers(values, notes=_separator_notes(texts, mark))
    for pattern, orders in ((_YEAR_FIRST, ("ymd",)), (_YEAR_LAST, ("dmy", "mdy"))):
        if (matches := _all_or_none(map(pattern.fullmatch, texts))) is not None:
            yield from _dates(matches, orders)


def _all_or_none(values: Iterable[_T | None]) -> list[_T] | None:
    """Returns the values, or None if they include None."""
    kept = []
    for value in values:
        if value is None:
            return None
        kept.append(value)
    return kept


def number_with_separators(text: str, mark: str) -> int | float | None:
    """Reads a number with or without thousands separators.

    Args:
      text: such as "1,065.5".
      mark: the decimal mark, "." or ",".

    Returns:
      The number, or None if the text is not a number.
    """
    if _GROUPED[mark].fullmatch(text):
        text = text.replace("," if mark == "." else ".", "")
    return number(text.replace(mark, "."))


def _separator_notes(texts: list[str], mark: str) -> tuple[str, ...]:
    grouped = next((text for text in texts if _GROUPED[mark].fullmatch(text)), None)
    if grouped is not None:
        value = number_with_separators(grouped, mark)
        return (f"has thousands separators; they are removed, so that {grouped!r} is {value}",)
    marked = [text for text in texts if mark in text]
    if mark == "," and all(_GROUPED["."].fullmatch(text) for text in marked):
        value = number_with_separators(marked[0], mark)
        return (f"has decimal commas, since semicolons separate the fields, so that {marked[0]!r} is {value}",)
    return ()


def _dates(matches: list[re.Match], orders: tuple[str, ...]) -> Iterator[_Numbers]:
    """Yields days since 1970, for an order of day and month in which all dates exist."""
    days = {order: times for order in orders if (times := _microseconds(matches, order)) is not None}
    if not days:
        return
    named = {"ymd": "year-month-day", "dmy": "day-month-year", "mdy": "month-day-year"}
    order = next(iter(days))
    # If both orders are possible, the day is first if all dates have dots, and otherwise the month, as in pandas.
    if len(days) > 1 and any(match[2] != "." for match in matches):
        order = "mdy"
    note = f"has dates; they become days since 1970, and {matches[0][0]!r} is read as {named[order]}"
    if len(days) > 1 and order == "mdy" and days["dmy"] != days["mdy"]:
        note += f". {AMBIGUOUS[0].upper()}{AMBIGUOUS[1:]}: write year-month-day if the reading is wrong"
    yield _Numbers(days[order], _DAY, (note,))


def _microseconds(matches: list[re.Match], order: str) -> list[int | float] | None:
    """Microseconds since 1970; None if a date does not exist in this order, or if only some have a time zone."""
    times = _all_or_none(_time(match, order) for match in matches)
    if times is None or len({time.tzinfo is None for time in times}) > 1:
        return None
    return [_since_1970(time) for time in times]


def date_in_microseconds(text: str, order: str) -> int | None:
    """Reads one date.

    Args:
      text: a date, with or without a time of day.
      order: the order of year, month and day: "ymd", "dmy" or "mdy". A date with the year first is read in any case.

    Returns:
      Microseconds since 1970, in UTC if there is no time zone; None if the text is not a date in this order.
    """
    match = _YEAR_FIRST.fullmatch(text)
    if match is not None:
        order = "ymd"
    elif order != "ymd":
        match = _YEAR_LAST.fullmatch(text)
    time = None if match is None else _time(match, order)
    return None if time is None else _since_1970(time)


def have_dots(texts: Iterable[str]) -> bool:
    """Returns whether dates have the form "31.12.2020": at least one has the year last, and all that have it have dots.

    Args:
      texts: any texts.
    """
    matches = [match for text in texts if (match := _YEAR_LAST.fullmatch(text))]
    return bool(matches) and all(match[2] == "." for match in matches)


def _time(match: re.Match, order: str) -> datetime.datetime | None:
    date = dict(zip(order, match.group(1, 3, 4), strict=True))
    hour, minute, second, fraction, zone = match.group(5, 6, 7, 8, 9)
    text = f"{date['y']}-{date['m']:0>2}-{date['d']:0>2}T{hour or '':0>2}:{minute or '00'}:{second or '00'}"
    try:
        return datetime.datetime.fromisoformat(f"{text}.{fraction or '':0<6}{zone or ''}")
    except ValueError:
        return None


def _since_1970(time: datetime.datetime) -> int:
    return (time.replace(tzinfo=time.tzinfo or datetime.UTC) - _EPOCH) // datetime.timedelta(microseconds=1)


def _exceptions(texts: list[str], lines: list[int]) -> tuple[str, ...]:
    """Returns a note if the column is categorical because of a few of its values."""
    is_number = [number_with_separators(text, ".") is not None for text in texts]
    is_date = [bool(_YEAR_FIRST.fullmatch(text) or _YEAR_LAST.fullmatch(text)) for text in texts]
    for kind, follows in (("numbers", is_number), ("dates", is_date)):
        if 0.9 * len(texts) < sum(follows) < len(texts):
            first = follows.index(False)
            return (f"is categorical, since line {lines[first]} has {texts[first]!r} among {kind}",)
    if texts and all(is_date):
        return ("is categorical, since its dates do not exist, or have different orders of day, month and year",)
    return ()

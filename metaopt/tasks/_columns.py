"""Reads single texts as numbers or dates, and converts numbers and categories to float32.

Whole numbers are compared as Python integers, because float64 merges them above 2^53 and float32 above 2^24.
"""

import datetime
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np

AMBIGUOUS = "the order of day and month is ambiguous"

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


def as_float32(values: Sequence[int | float]) -> np.ndarray:
    """Converts finite numbers to float32. If this makes too many values equal, it first subtracts the smallest number.

    Whole numbers must all stay different. Among other numbers, up to a tenth of the values may become equal, because
    digits beyond the seventh are mostly noise. If the subtraction does not help, the numbers stay as they are.

    Args:
      values: integers, compared exactly, or floats.

    Returns:
      The float32 numbers.
    """
    plain = np.array(values, np.float64).astype(np.float32)
    if not len(values):
        return plain
    lowest, num_values = min(values), len(set(values))
    least = num_values if all(isinstance(value, int) for value in values) else 0.9 * num_values
    shifted = np.array([value - lowest for value in values], np.float64).astype(np.float32)
    helps = len(np.unique(plain)) < least <= len(np.unique(shifted))
    return shifted if helps else plain


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

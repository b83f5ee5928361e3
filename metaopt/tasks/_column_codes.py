"""The encoding of single columns: `fit_column` chooses a `ColumnCode`, and `apply_code` applies it to other rows."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from metaopt.tasks._amounts import (
    UNSURE,
    UNUSUAL,
    common_sign,
    describe,
    describe_unusual,
    likely_readings,
    look_like_labels,
    without_sign,
)
from metaopt.tasks._columns import (
    AMBIGUOUS,
    FLOAT32_MAX,
    have_dots,
    level_order,
    looks_like_id,
)
from metaopt.tasks._frames import RawColumn, as_text
from metaopt.tasks._readings import DESCRIPTIONS, FORMS, READINGS

OTHER = "(other)"
KINDS = ("number", "boolean", "time", "category")
PARTS = ("days", "month", "weekday", "hour")  # of a time
MIN_ROWS = 20  # with fewer, columns look like ids or are equal by chance
_MANY = 5  # fewer unseen values of a category are not reported
_DAY = 86_400_000_000  # microseconds
_SAMPLE_SIZE = 50  # different texts of a column on which a reading is tried first
_MERGED = "which float32 rounds to"
_ID_NAME = re.compile(r"(^|[^a-z])(id|uuid|guid|key|idx|index|number|nr)$|^id[^a-z]", re.IGNORECASE)
_CAMEL_ID = re.compile(r"[a-z](Id|ID)$")


class Unread(NamedTuple):
    """The values of a column that `apply_code` could not read as in `fit`.

    Attributes:
      num: how many.
      example: one of them; None if `num` is 0.
      reason: completes "values that ...".
    """

    num: int = 0
    example: Any = None
    reason: str = ""


class ColumnCode(NamedTuple):
    """How a column becomes numbers.

    Attributes:
      name: the name of the column.
      source: its position in the frame of `fit_encoder`.
      kind: one of `KINDS`.
      reading: the reading of texts, a key of `READINGS`; "" if the column was not text.
      offset: is subtracted from numbers, because float32 could not tell them apart.
      levels: the levels of a category, in the order of the codes.
      parts: the parts of a time, some of `PARTS`.
      sign: the sign or code of a currency or "%" that each text has next to its number; "" if there is none.
      share_missing: the share of the rows of `fit_encoder` whose value is missing; 1 if it is not known.
      low, high: the smallest and the largest number in the rows of `fit_encoder`.
      unit: "days" if the numbers were durations, "hours" if they were times of day, otherwise "".
    """

    name: str
    source: int
    kind: str
    reading: str = ""
    offset: int | float = 0
    levels: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    sign: str = ""
    share_missing: float = 1.0
    low: float = -FLOAT32_MAX
    high: float = FLOAT32_MAX
    unit: str = ""


class Fit(NamedTuple):
    """A fitted column.

    Attributes:
      code: the code, or None if the column is dropped.
      values: [n, k] float64, the encoded rows of `fit_column`.
      drop: why the column is dropped, or "".
      changes: how its values were changed, and remarks about unusual values that were not changed.
      warnings: those of `drop` and `changes` that the log reports as warnings.
    """

    code: ColumnCode | None
    values: np.ndarray
    drop: str = ""
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def fit_column(name: str, source: int, raw: RawColumn, *, keep: bool = False, decimal: str = ".") -> Fit:
    """Chooses the code of a column.

    Args:
      name: the name of the column.
      source: its position.
      raw: its values.
      keep: whether to keep numbers that look like ids.
      decimal: the decimal mark of a text that can be read with either mark.

    Returns:
      The fit.
    """
    if raw.kind == "unreadable":
        return _dropped(raw.reason, warns=True)
    reading, sign, changes = "", "", ()
    if raw.kind == "text":
        reading, sign, changes = _reading_of(raw.values, decimal)
    if raw.kind == "time" or reading in ("ymd", "mdy", "dmy"):
        return _fit_time(ColumnCode(name, source, "time", reading), raw, changes)
    if raw.kind == "category" or (raw.kind == "text" and not reading):
        return _fit_category(ColumnCode(name, source, "category"), raw)
    kind = "boolean" if raw.kind == "boolean" else "number"
    return _fit_number(ColumnCode(name, source, kind, reading, sign=sign, unit=raw.unit), raw, changes, keep)


def apply_code(code: ColumnCode, raw: RawColumn) -> tuple[np.ndarray, Unread]:
    """Encodes the values of a column.

    Args:
      code: the code, from `fit_column`.
      raw: values of the same or other rows.

    Returns:
      [n, k] float64 with NaN where missing; and an `Unread`, the values that could not be read and count as missing.
      For a category, it has the values that are not levels, if there are at least 5 of them and more than a tenth of
      all values. If these values become "(other)", it has them only if no value is a level.
    """
    form = FORMS[code.reading] if code.reading else "categories" if code.kind == "category" else f"{code.kind}s"
    form += f" next to the sign {code.sign!r}" if code.sign else ""
    if raw.kind == "unreadable":
        block = np.full((len(raw.values), max(1, len(code.parts))), np.nan)
        return block, _unread(raw, np.ones(len(raw.values), bool), f"are not {form}; they count as missing")
    if code.kind == "category":
        texts = _texts(raw)
        codes = {level: float(place) for place, level in enumerate(code.levels)}
        other = codes.get(OTHER, np.nan)
        unread = _unseen_levels(texts.tolist(), code.levels)
        return _lookup(texts, lambda text: codes.get(text, other))[:, None], unread
    is_missing = raw.is_missing
    if code.kind == "time":
        times = _times(code, raw)
        lost = np.isnat(times) & ~is_missing
        return _time_parts(times, code.parts), _unread(raw, lost, f"are not {form}; they count as missing")
    values = _numbers(code, raw)
    lost = np.isnan(values) & ~is_missing & (bool(code.sign) or raw.kind not in ("number", "boolean"))
    block = np.where(np.abs(values) > FLOAT32_MAX, np.nan, values)[:, None]
    return block, _unread(raw, lost, f"are not {form}; they count as missing")


def _unread(raw: RawColumn, lost: np.ndarray, reason: str) -> Unread:
    if not lost.any():
        return Unread()
    return Unread(int(lost.sum()), raw.values[np.flatnonzero(lost)[0]], reason)


def _unseen_levels(texts: list[str | None], levels: tuple[str, ...]) -> Unread:
    values, known = [text for text in texts if text is not None], set(levels)
    unseen = [text for text in values if text not in known]
    if len(unseen) < _MANY or len(unseen) <= 0.1 * len(values) or levels == (OTHER,):
        return Unread()
    if OTHER not in known:
        return Unread(len(unseen), unseen[0], "do not occur in the rows of `fit`; they count as missing")
    if len(unseen) < len(values):  # some may be rare levels of `fit`, whose names were not kept
        return Unread()
    return Unread(len(unseen), unseen[0], f"are not levels of the rows of `fit`; all of them count as {OTHER!r}")


# --- numbers ---


def _fit_number(code: ColumnCode, raw: RawColumn, changes: tuple[str, ...], keep: bool) -> Fit:
    values = _numbers(code, raw)
    is_large = np.abs(values) > FLOAT32_MAX
    if is_large.any():
        values = np.where(is_large, np.nan, values)
        changes += (f"has {is_large.sum()} values that are infinite or beyond float32, which count as missing",)
    present = values[~np.isnan(values)]
    if not len(present):
        return _dropped("has no values")
    present = _exact(code, raw, present)
    if present.min() == present.max() and len(present) == len(values):
        return _dropped("is constant")
    reason, surely = ("", False) if code.sign else _id_reason(code.name, present, len(values))
    if surely and not keep:
        return _dropped(reason, warns=True)
    doubts = (f"{reason}, but stays; drop it unless it is a measurement",) if reason else ()
    changes += doubts
    offset, notes = _offset(present)
    changes += notes
    if offset:
        code = code._replace(offset=offset)
        values, _ = apply_code(code, raw)
    return Fit(code, values.reshape(-1, 1), changes=changes, warnings=doubts + _warnings(changes))


def _numbers(code: ColumnCode, raw: RawColumn) -> np.ndarray:
    """[n] float64, NaN where missing or not a number."""
    # "True" is not a number among texts. A number without its sign may have another unit: 12 % may be 0.12.
    if raw.kind == "time" or (raw.kind == "boolean" and code.reading) or (raw.kind == "number" and code.sign):
        return np.full(len(raw.values), np.nan)
    if raw.kind in ("number", "boolean"):
        values = raw.values
        if values.dtype.kind in "iu" and isinstance(code.offset, int) and code.offset:
            return (values.astype(object) - code.offset).astype(np.float64)  # Python's integers are exact
        return values.astype(np.float64) - code.offset
    read = _reader(code.reading or "number", code.sign)
    words = {"true": 1.0, "false": 0.0} if code.kind == "boolean" else {}

    def value(text: str) -> float:
        result = words.get(text.lower(), read(text))
        if result is None:
            return np.nan
        try:
            return float(result - code.offset)  # whole numbers are Python's, and exact
        except OverflowError:
            return np.inf

    return _lookup(raw.values, value)


def _exact(code: ColumnCode, raw: RawColumn, present: np.ndarray) -> np.ndarray:
    """The numbers that are not missing.

    Columns of integers stay integers. If all numbers in texts are whole and one is at least 2^53, they become integers,
    because float64 could merge them.
    """
    if raw.kind == "number" and raw.values.dtype.kind in "iu":
        return raw.values
    if raw.kind != "text" or np.abs(present).max() < 2**53:
        return present
    read = _reader(code.reading or "number", code.sign)
    numbers = [value for text in raw.values if text is not None and (value := read(text)) is not None]
    whole = all(isinstance(value, int) and abs(value) < 2**63 for value in numbers)
    return np.array(numbers, np.int64) if whole else present


def _offset(values: np.ndarray) -> tuple[int | float, tuple[str, ...]]:
    """Returns the number to subtract before the conversion to float32, and notes.

    It is 0 if float32 keeps enough numbers different: all of them if all are whole, otherwise nine tenths, because
    digits beyond the seventh are mostly noise. Otherwise it is the smallest number, if its subtraction keeps more of
    them different, and else 0.
    """
    distinct = np.unique(values)
    is_exact = values.dtype.kind in "iu"
    is_whole = is_exact or bool((distinct == np.round(distinct)).all())
    least = (1.0 if is_whole else 0.9) * len(distinct)
    with np.errstate(over="ignore"):
        num_different = len(np.unique(distinct.astype(np.float32)))
    if num_different >= least:
        return 0, ()
    lowest, offset, notes = int(distinct[0]) if is_exact else float(distinct[0]), 0, ()
    shifted = (distinct.astype(object) if is_exact else distinct) - lowest
    with np.errstate(over="ignore"):
        num_shifted = len(np.unique(shifted.astype(np.float64).astype(np.float32)))
    if num_shifted > num_different:
        offset, num_different = lowest, num_shifted
        notes = (f"has numbers that float32 cannot tell apart; {offset} is subtracted from all",)
    if num_different < least:
        notes += (f"has {len(distinct)} different numbers, {_MERGED} {num_different}",)
    return offset, notes


def _id_reason(name: str, present: np.ndarray, num_rows: int) -> tuple[str, bool]:
    """Returns why numbers look like ids of the rows ("" if they do not), and whether it is certain that they are."""
    if num_rows < MIN_ROWS or len(present) < 0.95 * num_rows or (present != np.round(present)).any():
        return "", False
    if len(np.unique(present)) < 0.95 * len(present) or not looks_like_id(present.tolist()):
        return "", False
    if int(present.max()) - int(present.min()) < 2 * num_rows:
        return "numbers the rows: whole numbers in a small range that hardly repeat", True
    if _ID_NAME.search(name) or _CAMEL_ID.search(name):
        return "is an id by its name, and its whole numbers hardly repeat", True
    return "looks like an id, since its large whole numbers hardly repeat", False


# --- times ---


def _fit_time(code: ColumnCode, raw: RawColumn, changes: tuple[str, ...]) -> Fit:
    times = _times(code, raw)
    if np.isnat(times).all():
        return _dropped("has no values")
    values = _time_parts(times, PARTS)
    varies = np.array([len(np.unique(column[~np.isnan(column)])) > 1 for column in values.T])
    varies[0] |= np.isnat(times).any()
    if not varies.any():
        return _dropped("is constant")
    parts = tuple(part for part, is_used in zip(PARTS, varies, strict=True) if is_used)
    names = ", ".join("days since 1970" if part == "days" else part for part in parts)
    changes = (*changes, f"has times; they become {names}")
    return Fit(code._replace(parts=parts), values[:, varies], changes=changes, warnings=_warnings(changes))


def _times(code: ColumnCode, raw: RawColumn) -> np.ndarray:
    """[n] datetime64[us], NaT where missing or not a time."""
    if raw.kind == "time":
        return raw.values
    if raw.kind in ("number", "boolean"):
        return np.full(len(raw.values), np.datetime64("NaT", "us"))
    read = READINGS[code.reading or "ymd"]
    missing = np.iinfo(np.int64).min  # NaT
    return _lookup(raw.values, lambda text: missing if (time := read(text)) is None else time, missing, np.int64).view(
        "datetime64[us]"
    )


def _time_parts(times: np.ndarray, parts: tuple[str, ...]) -> np.ndarray:
    microseconds, missing = times.astype(np.int64), np.isnat(times)
    days = microseconds // _DAY
    values = {
        "days": days + (microseconds - days * _DAY) / _DAY,
        "month": times.astype("datetime64[M]").astype(np.int64) % 12 + 1.0,
        "weekday": (days + 3) % 7.0,  # Monday is 0; 1970 began on a Thursday
        "hour": (microseconds - days * _DAY) // (_DAY // 24) + 0.0,
    }
    return np.stack([np.where(missing, np.nan, values[part]) for part in parts], axis=1)


# --- categories ---


def _fit_category(code: ColumnCode, raw: RawColumn) -> Fit:
    counts = Counter(text for text in raw.values.tolist() if text is not None)
    num_rows, num_present = len(raw.values), sum(counts.values())
    if not counts:
        return _dropped("has no values")
    if len(counts) == 1 and num_present == num_rows:
        return _dropped("is constant")
    if len(counts) == num_present >= MIN_ROWS:
        return _dropped("looks like an id or free text, since no value repeats", warns=True)
    least = max(2, num_rows // 5000)
    order = [level for level in raw.levels if level in counts] or sorted(counts, key=level_order)
    levels = tuple(level for level in order if counts[level] >= least and level != OTHER)
    if not levels and num_present == num_rows:
        return _dropped("has no value that repeats enough", warns=True)
    num_rare = len(counts) - len(levels)
    levels += (OTHER,) if num_rare else ()
    code = code._replace(levels=levels)
    change = f"has {num_rare} levels with fewer than {least} rows, which become {OTHER!r}"
    return Fit(code, apply_code(code, raw)[0], changes=(change,) if num_rare else ())


def _texts(raw: RawColumn) -> np.ndarray:
    """[n] str or None."""
    if raw.kind in ("text", "category"):
        return raw.values
    values = raw.values.astype(bool).astype(object) if raw.kind == "boolean" else raw.values
    if raw.kind == "number":
        distinct, index = np.unique(values, return_inverse=True)
        texts = np.array([as_text(value) for value in distinct.tolist()], object)[index]
    else:
        texts = np.array([as_text(value) for value in values.tolist()], object)
    texts[raw.is_missing] = None
    return texts


# --- texts ---


def _reading_of(texts: np.ndarray, decimal: str) -> tuple[str, str, tuple[str, ...]]:
    """Returns how to read texts as numbers or times ("" for categories), the sign of amounts or "", and notes.

    All texts must be numbers or dates of one form, except "None". If they are amounts, all must have the same sign. Up
    to a tenth of the rows may have other words if there are at least 20 different numbers, and none of them ends with k
    or M.
    """
    counts = Counter(text for text in texts.tolist() if text is not None and text.lower() != "none")
    if not counts:
        return "", "", ()
    num_rows = sum(counts.values())
    sample = list(counts)[:_SAMPLE_SIZE]
    sign = common_sign(sample)
    best, most = "", 0
    plain = ("number", "only_comma", "decimal_comma", *READINGS) if decimal == "," else READINGS
    for reading in likely_readings(sign, counts) if sign else plain:
        read = _reader(reading, sign)
        # Reading all texts takes long, so a reading must first succeed for half of a sample.
        if sum(read(text) is not None for text in sample) < 0.5 * len(sample):
            continue
        num_read = sum(count for text, count in counts.items() if read(text) is not None)
        if reading == "multiples" and num_read < num_rows:
            continue
        # If both orders are possible, the day is first if all dates have dots, and otherwise the month.
        if num_read > most or (num_read == most and reading == "dmy" and have_dots(counts)):
            best, most = reading, num_read
        if most == num_rows and reading != "mdy":  # after "mdy", "dmy" may be the right reading of the same dates
            break
    if not best:
        return "", "", ()
    read = _reader(best, sign)
    words = [text for text in counts if read(text) is None]
    numbers = [text for text in counts if read(text) is not None]
    description = DESCRIPTIONS[best]
    if sign:
        description = describe(numbers, sign, read)
    elif look_like_labels(numbers, best):
        return "", "", ()
    else:
        description += describe_unusual(numbers, read)
        if (
            best == "thousands"
            and UNUSUAL not in description
            and all(READINGS["only_comma"](text) is not None for text in numbers)
        ):
            text = next(text for text in numbers if "," in text)
            description += f" ({text!r} is read as {read(text)}; {UNSURE})"
    is_ambiguous = best == "mdy" and _may_have_the_day_first(numbers)
    unsure = f"; {AMBIGUOUS}: write year-month-day if the reading is wrong" * is_ambiguous
    if not words:
        return best, sign, (description + unsure,)
    if most < 0.9 * num_rows or len(numbers) < 20:
        return "", "", ()
    change = f"{description}, except {num_rows - most} values such as {words[0]!r}, which count as missing"
    return best, sign, (change + unsure,)


def _reader(reading: str, sign: str) -> Callable[[str], int | float | None]:
    """The function of a reading. With a sign, it reads texts that have this sign."""
    read = READINGS[reading]
    if not sign:
        return read
    return lambda text: None if (rest := without_sign(text, sign)) is None else read(rest)


def _may_have_the_day_first(texts: Iterable[str]) -> bool:
    """Whether all dates also exist in the order day-month-year, and one of them is then another date."""
    differs = False
    for text in texts:
        day_first = READINGS["dmy"](text)
        if day_first is None:
            return False
        differs = differs or day_first != READINGS["mdy"](text)
    return differs


def _lookup(
    texts: np.ndarray, function: Callable[[str], Any], missing: Any = np.nan, dtype: Any = np.float64
) -> np.ndarray:
    """Applies a function once to each different text."""
    results = {text: function(text) for text in set(texts.tolist()) if text is not None}
    results[None] = missing
    return np.fromiter((results[text] for text in texts.tolist()), dtype, len(texts))


def _warnings(changes: tuple[str, ...]) -> tuple[str, ...]:
    """The changes that lose values, or that may misread dates or amounts."""
    marks = ("count as missing", _MERGED, AMBIGUOUS, UNSURE, UNUSUAL)
    return tuple(change for change in changes if any(mark in change for mark in marks))


def _dropped(reason: str, *, warns: bool = False) -> Fit:
    return Fit(None, np.zeros((0, 0)), drop=reason, warnings=(reason,) if warns else ())

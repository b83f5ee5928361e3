"""Amounts in texts: numbers with one sign of a currency or of percent, such as "€ 1,234.50" or "12 %"."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from metaopt.tasks._columns import number_with_separators

# The readings of what is left without the sign, the most likely first. "thousands" also reads numbers without a
# separator. Percentages rarely have thousands, so "12,345 %" is below 13.
_AMOUNTS = ("thousands", "decimal_comma")
_PERCENTAGES = ("number", "decimal_comma", "thousands")
UNSURE = "if this is wrong, remove separators of thousands, and write a point as the decimal mark"
_COMMA_GROUPS = "$£¥₹"  # their amounts have commas between thousands
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")  # "1,234" may be 1234 or 1.234
_POINT_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
_BELOW_1000 = re.compile(r"[+-]?\d{1,3}")
_HUNDREDS = re.compile(r"[+-]?[1-9]\d\d")


def is_sign(text: str) -> bool:
    """Returns whether a text is one sign of a currency, or "%".

    Args:
      text: any text.
    """
    return text == "%" or (len(text) == 1 and unicodedata.category(text) == "Sc")


def readings(sign: str) -> tuple[str, ...]:
    """Returns the readings of amounts with a sign, the most likely first.

    Args:
      sign: a sign.
    """
    return _PERCENTAGES if sign == "%" else _AMOUNTS


def likely_readings(sign: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Returns the readings of amounts with a sign, the most likely first for these texts.

    In whole amounts such as "950 €" and "1.250 €", points separate thousands: all amounts are groups of three digits
    after points, or below 1,000, and one of them has three digits without a point. If all amounts have a point, as
    prices of fuel ("1.459 €"), the point is the decimal mark. It always is for currencies whose amounts have commas
    between thousands, such as dollars.

    Args:
      sign: a sign.
      texts: the amounts. Texts without the sign, and texts that are not numbers, are ignored.
    """
    if sign == "%" or sign in _COMMA_GROUPS:
        return readings(sign)
    has_groups = has_hundreds = False
    for text in texts:
        number = without_sign(text, sign)
        if number is None:
            continue
        if _POINT_GROUPS.fullmatch(number):
            has_groups = True
        elif _BELOW_1000.fullmatch(number):
            has_hundreds = has_hundreds or _HUNDREDS.fullmatch(number) is not None
        elif any(number_with_separators(number, mark) is not None for mark in ".,"):
            return readings(sign)  # an amount such as "1234 €" or "2.5 €"
    return tuple(reversed(_AMOUNTS)) if has_groups and has_hundreds else readings(sign)


def common_sign(texts: Iterable[str]) -> str:
    """Returns the most frequent sign at the start or the end of texts, or "" if more texts have none.

    Args:
      texts: at least one, such as "€ 5", "-5 €" or "12%".
    """
    signs = (next(filter(is_sign, (text.lstrip("+-")[:1], text[-1:])), "") for text in texts)
    return Counter(signs).most_common(1)[0][0]


def without_sign(text: str, sign: str) -> str | None:
    """Returns the number of an amount as a text, or None if it does not have the sign exactly once.

    Args:
      text: such as "-€ 5".
      sign: such as "€".
    """
    sign = re.escape(sign)
    match = re.fullmatch(rf"([+-]?)(?:{sign}\s*(\S+)|(\S+)\s*{sign})", text)
    return None if match is None else match[1] + (match[2] or match[3]).strip()


def describe(texts: list[str], sign: str, reading: str) -> str:
    """Describes how amounts are read, for a note.

    Args:
      texts: the amounts, all of which have the sign.
      sign: the sign.
      reading: one of `readings(sign)`.

    Returns:
      The description. It has an example, and contains `UNSURE` if each mark may separate thousands or be the decimal
      mark, and the sign does not show which.
    """
    numbers = {text: without_sign(text, sign) or "" for text in texts}
    marked = [text for text, number in numbers.items() if "," in number or "." in number]
    example = marked[0] if marked else texts[0]
    value = number_with_separators(numbers[example], "," if reading == "decimal_comma" else ".")
    is_ambiguous = marked and all(_ONE_GROUP.fullmatch(numbers[text]) for text in marked)
    is_known = sign == "%" or (sign in _COMMA_GROUPS and "," in numbers[example])
    unsure = f"; {UNSURE}" if is_ambiguous and not is_known else ""
    return f"is text that holds numbers with the sign {sign!r} ({example!r} is read as {value}{unsure})"

"""Amounts in texts, such as "€ 1,234.50", "EUR 5", "12 %", "(1,200)" for -1200 in accounting, or "1.2k"."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from metaopt.tasks._columns import number_with_separators

# The readings of what is left without the sign, the most likely first. "thousands" also reads numbers without a
# separator. Percentages rarely have thousands, so "12,345 %" is below 13.
_AMOUNTS = ("thousands", "decimal_comma", "multiples")
_PERCENTAGES = ("number", "decimal_comma", "thousands")
UNSURE = "if this is wrong, remove separators of thousands, and write a point as the decimal mark"
UNUSUAL = "if this is wrong, write the numbers without parentheses, k and M"
_COMMA_GROUPS = ("$", "US$", "A$", "C$", "£", "¥", "₹")  # their amounts have commas between thousands
# Codes that are words or names, such as TRY, ALL, TOP and PHP, are left out: "PHP 8" is a version.
_CODES = frozenset("AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF INR JPY KRW MXN NOK NZD PLN SEK SGD USD ZAR".split())
MULTIPLES = {"k": "e3", "K": "e3", "M": "e6"}
_PARENTHESES = re.compile(r"([^()\d]*)\(([^()]+)\)([^()\d]*)")
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")  # "1,234" may be 1234 or 1.234
_POINT_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
_BELOW_1000 = re.compile(r"[+-]?\d{1,3}")
_HUNDREDS = re.compile(r"[+-]?[1-9]\d\d")


def is_sign(text: str) -> bool:
    """Returns whether a text is one sign or code of a currency, or "%".

    Args:
      text: any text.
    """
    is_listed = text == "%" or text in _COMMA_GROUPS or text in _CODES
    return is_listed or (len(text) == 1 and unicodedata.category(text) == "Sc")


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
    return ("decimal_comma", "thousands") if has_groups and has_hundreds else readings(sign)


def common_sign(texts: Iterable[str]) -> str:
    """Returns the most frequent sign at the start or the end of texts, or "" if more texts have none.

    Args:
      texts: at least one, such as "€ 5", "-5 €", "5 EUR" or "12%".
    """
    return Counter(map(_sign_of, texts)).most_common(1)[0][0]


def _sign_of(text: str) -> str:
    text = with_minus(text).lstrip("+-")
    ends = (end for length in (3, 2, 1) for end in (text[:length], text[-length:]))
    return next(filter(is_sign, ends), "")


def without_sign(text: str, sign: str) -> str | None:
    """Returns the number of an amount as a text, or None if it does not have the sign exactly once.

    A code needs a blank next to it, because "EUR6" and "USD-3" may be codes of products.

    Args:
      text: such as "-€ 5" or "5 EUR".
      sign: such as "€" or "EUR".
    """
    blank = r"\s+" if sign in _CODES else r"\s*"
    sign = re.escape(sign)
    match = re.fullmatch(rf"([+-]?)(?:{sign}{blank}(\S+)|(\S+){blank}{sign})", with_minus(text))
    return None if match is None else match[1] + (match[2] or match[3]).strip()


def with_minus(text: str) -> str:
    """Replaces the Unicode minus, and the parentheses of accounting, by "-".

    Args:
      text: any text. "€ (5)" and "(€ 5)" become "-€ 5", and "f(2)" also changes, but is no number then, either.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    match = _PARENTHESES.fullmatch(text) if "(" in text else None
    return text if match is None else f"-{match[1]}{match[2]}{match[3]}"


def number_with_multiple(text: str) -> int | float | None:
    """Reads a number, which may end with k or K for thousands, or M for millions.

    Args:
      text: such as "1.2k", "3M" or "1,065".

    Returns:
      The number, or None if the text is not a number.
    """
    if text[-1:] in MULTIPLES and text[-2:-1].isdigit():
        text = text[:-1] + MULTIPLES[text[-1]]
    return number_with_separators(text, ".")


def look_like_labels(texts: Collection[str], reading: str) -> bool:
    """Returns whether texts without a sign may be labels, although all of them can be read as numbers.

    "(1)" and "(2)" may be notes, and "3M" and "6M" sizes. They are amounts if another number has no parentheses, or if
    one has decimals, such as "1.2k".

    Args:
      texts: the texts.
      reading: how they can be read.
    """
    has_decimals = any(text[-1:] in MULTIPLES and "." in text for text in texts)
    return (reading == "multiples" and not has_decimals) or all(text.startswith("(") for text in texts)


def describe_unusual(texts: Collection[str], read: Callable[[str], int | float | None]) -> str:
    """Describes how numbers without a sign are read if some of them have parentheses, k or M, for a note.

    Args:
      texts: the numbers.
      read: the function that reads them.

    Returns:
      An example in parentheses, or "" if there is none. It contains `UNUSUAL` if the reading is doubtful: "(12)" may be
      an estimate, and "1.8M" next to "1.75" may be meters.
    """
    unusual = [text for text in texts if text[-1:] in (")", *MULTIPLES)]
    if not unusual:
        return ""
    in_parentheses = [text for text in unusual if text.endswith(")")]
    example = (in_parentheses or unusual)[0]
    is_unsure = in_parentheses or any("." in text for text in set(texts) - set(unusual))
    unsure = f"; {UNUSUAL}" if is_unsure else ""
    return f" ({example!r} is read as {read(example)}{unsure})"


def describe(texts: list[str], sign: str, read: Callable[[str], int | float | None]) -> str:
    """Describes how amounts are read, for a note.

    Args:
      texts: the amounts, all of which have the sign.
      sign: the sign.
      read: the function that reads the amounts.

    Returns:
      The description. It has an example, and contains `UNSURE` if each mark may separate thousands or be the decimal
      mark, and the sign does not show which.
    """
    numbers = {text: without_sign(text, sign) or "" for text in texts}
    marked = [text for text, number in numbers.items() if "," in number or "." in number]
    example = marked[0] if marked else texts[0]
    is_ambiguous = marked and all(_ONE_GROUP.fullmatch(numbers[text]) for text in marked)
    is_known = sign == "%" or (sign in _COMMA_GROUPS and "," in numbers[example])
    unsure = f"; {UNSURE}" if is_ambiguous and not is_known else ""
    return f"is text that holds numbers with the sign {sign!r} ({example!r} is read as {read(example)}{unsure})"

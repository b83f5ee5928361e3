"""The readings of texts as numbers or times, and their descriptions in notes and warnings."""

from collections.abc import Callable

from metaopt.tasks._amounts import number_with_multiple, with_minus
from metaopt.tasks._columns import date_in_microseconds, number, number_with_separators

# Functions that read a text as a number or a time, the preferred one first. `DESCRIPTIONS` describes them in notes.
READINGS: dict[str, Callable[[str], int | float | None]] = {
    "number": lambda text: number(with_minus(text)),
    "thousands": lambda text: number_with_separators(with_minus(text), "."),
    "only_comma": lambda text: None if "." in text and "," not in text else READINGS["decimal_comma"](text),
    "decimal_comma": lambda text: number_with_separators(with_minus(text), ","),
    "ymd": lambda text: date_in_microseconds(text, "ymd"),
    "mdy": lambda text: date_in_microseconds(text, "mdy"),
    "dmy": lambda text: date_in_microseconds(text, "dmy"),
    "multiples": lambda text: number_with_multiple(with_minus(text)),
}
DESCRIPTIONS = {
    "number": "is text that holds numbers",
    "thousands": "is text that holds numbers with thousands separators",
    "only_comma": "is text that holds numbers with decimal commas",
    "decimal_comma": "is text that holds numbers with decimal commas, some with points only, which separate thousands",
    "ymd": "is text that holds dates, read as year-month-day",
    "mdy": "is text that holds dates, read as month-day-year",
    "dmy": "is text that holds dates, read as day-month-year",
    "multiples": "is text that holds numbers, some with k for thousands or M for millions",
}

FORMS = {
    "number": "numbers",
    "thousands": "numbers, possibly with thousands separators",
    "only_comma": "numbers with decimal commas",
    "decimal_comma": "numbers with decimal commas",
    "ymd": "dates in the order year-month-day",
    "mdy": "dates in the order month-day-year",
    "dmy": "dates in the order day-month-year",
    "multiples": "numbers, possibly with k or M",
}

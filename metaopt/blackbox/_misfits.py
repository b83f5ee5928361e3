"""Records that a searcher receives and cannot use as they are, such as those of another space."""

import logging
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import base, spaces

_log = logging.getLogger(__name__)


def misfit(space: base.PyTree, configuration: Mapping[str, Any]) -> str:
    """States a value outside the space or an unknown name of a configuration, or returns "" if it has neither.

    It does not check the values of fixed leaves.
    """
    try:
        spaces.from_configuration(space, configuration)
    except ValueError as error:
        return str(error)  # without its note, whose advice does not apply to a record
    return ""


def wrong_fixed(name: str, value: Any, expected: Any) -> str:
    """States that the value of a fixed leaf is wrong in a configuration, or returns "" if it is right.

    A record's float may differ from that of the leaf by the rounding of float32, and a fixed value may be NaN. So `==`
    does not work for floats.
    """
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # of an array without axes
    is_number = isinstance(value, numbers.Number)  # not a string or None
    rtol = 1e-6 if isinstance(expected, float) else 0.0
    if is_number and np.isclose(value, expected, rtol=rtol, atol=0.0, equal_nan=True):
        return ""
    return f"The configuration's `{name}` must be {expected!r}; got {value!r}."


def log_misfits(reasons: Sequence[str], num_records: int, consequence: str) -> None:
    """Logs one warning if a call of `tell` received records that do not fit the searcher.

    Args:
      reasons: a text for each of these records.
      num_records: the number of all records of the call.
      consequence: what the searcher does with these records, as a sentence.
    """
    if reasons:
        _log.warning(
            "%d of %d records do not fit this searcher. %s The first: %s",
            len(reasons),
            num_records,
            consequence,
            reasons[0],
        )

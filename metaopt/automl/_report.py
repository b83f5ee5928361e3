"""The report of a fit: columns that were changed or dropped, and columns that may be leaks of the target."""

import logging
from typing import Any

import numpy as np
import pandas as pd

from metaopt import tasks
from metaopt.automl._schedule import Clock

_log = logging.getLogger(__name__)

_LEAK_BLOCK = 20  # columns between two looks at the clock
_MIN_GROUPS, _MOST_COLUMNS = 10, 100
_MOST_ROWS = 10_000  # in which the groups of a column are compared


def report_frame(encoder: tasks.TableEncoder, leaks: tuple[str, ...], groups: tuple[str, ...]) -> pd.DataFrame:
    """The notes of an encoder, and the columns that may be leaks or groups: column, action and reason."""
    leak = "predicts the target almost perfectly: is it known before the target is?"
    group = (
        "may name groups: rows with equal values are equal in other columns, too. If they belong together, such as "
        "visits of a patient, pass this column as `groups`"
    )
    suspected = [(name, "suspected", reason) for names, reason in ((leaks, leak), (groups, group)) for name in names]
    notes = [*encoder.notes, *suspected]
    return pd.DataFrame(notes, columns=["column", "action", "reason"])


def suspected_leaks(x: np.ndarray, y: np.ndarray, encoder: tasks.TableEncoder, clock: Clock) -> tuple[str, ...]:
    """Searches the columns in blocks, until a fifth of the time limit is over."""
    names, suspected = encoder.names, ()
    for start in range(0, len(names), _LEAK_BLOCK):
        if start and clock.left() < 0.8 * (clock.limit or 0):
            message = "the last %d columns were not searched for leaks, because the time limit is short"
            _log.info(message, len(names) - start)
            break
        block = slice(start, start + _LEAK_BLOCK)
        suspected += tasks.suspected_leaks(x[:, block], y, names[block], encoder.categorical[block])
    for name in suspected:
        _log.warning(
            "the column %r predicts the target almost perfectly. If it is not known when you predict, leave it out.",
            name,
        )
    return suspected


def suspected_groups(x: np.ndarray, encoder: tasks.TableEncoder) -> tuple[str, ...]:
    """Finds a column that may name groups of rows, such as patients with several visits.

    Its values are whole numbers or categories. There are at least 10 different ones, each has two rows on average, and
    four fifths have at least two. At least two other columns, the traits, are constant in the groups (in 98 % of pairs
    of rows in which both values are known, which are at least half of all pairs). One of them is a number, none has one
    value in 90 % of the rows, and none rises or falls with the name. At least half of the groups differ in their
    traits. Parts of dates count as neither. Tables with more than 100 columns are not searched.

    Tables with more than 10,000 rows are compared in a random sample of their groups. There, the pairs are random rows
    of a group. In smaller tables, they are neighbors in the table. So a trait that changes slowly within a group is
    only found in smaller tables.

    Args:
      x: [n, d], the result of `TableEncoder.transform`.
      encoder: the encoder.

    Returns:
      The name of the column with most traits, or () if there is none. Of several, one without gaps is preferred, since
      `fit` needs a group for each row, and then a category.
    """
    codes = [code for code in encoder.columns for _ in code.parts or ("",)]
    if len(codes) > _MOST_COLUMNS:
        return ()
    if len(x) > _MOST_ROWS:
        x = x[np.random.default_rng(0).permutation(len(x))]
    part = np.where(np.isnan(x[:_MOST_ROWS]), -1.0, x[:_MOST_ROWS])
    varied = [np.unique(column, return_counts=True)[1].max() <= 0.9 * len(part) for column in part.T]
    usable = [j for j, code in enumerate(codes) if code.kind != "time" and varied[j]]
    x, kinds = x[:, usable], [codes[j].kind for j in usable]
    ranks = [
        (_num_traits(x, i, codes[j], kinds), not np.isnan(x[:, i]).any(), kinds[i] != "number")
        for i, j in enumerate(usable)
    ]
    best = max(range(len(usable)), key=ranks.__getitem__, default=-1)
    return (encoder.names[usable[best]],) if best >= 0 and ranks[best][0] else ()


def _num_traits(x: np.ndarray, j: int, code: Any, kinds: list[str]) -> int:
    """The number of traits of the groups of column j, or 0 if it does not name groups."""
    known = x[:, j] >= 0  # a gap is NaN
    if code.levels[-1:] == ("(other)",):
        known &= x[:, j] < len(code.levels) - 1
    rows = np.flatnonzero(known)
    names = x[rows, j]
    if (names != names.round()).any():
        return 0
    values, sizes = np.unique(names, return_counts=True)
    is_name = _MIN_GROUPS <= len(values) <= len(names) / 2 and (sizes > 1).mean() >= 0.8
    if not is_name:
        return 0
    rows = rows[np.argsort(names, kind="stable")]
    starts = (np.cumsum(sizes) - sizes)[:_MOST_ROWS]
    compared = x[rows[_of_some_groups(sizes)]]
    steps = np.diff(compared, axis=0)[np.diff(compared[:, j]) == 0]
    both = ~np.isnan(steps)
    is_trait = (both.mean(axis=0) >= 0.5) & ((steps == 0).sum(axis=0) >= 0.98 * both.sum(axis=0))
    traits = [k for k in range(len(kinds)) if k != j and is_trait[k]]
    # The first value of each group, also of those that are not compared. If it is a gap, a known one, or −1.
    sorted_traits = x[rows][:, traits]
    value = sorted_traits[starts]
    value = np.where(np.isnan(value), np.fmax.reduceat(sorted_traits, starts, axis=0), value)
    value = np.where(np.isnan(value), -1.0, value)
    # A column that rises or falls with the name, such as its square, is computed from it.
    steps = np.diff(value, axis=0)
    falls_and_rises = (steps.min(axis=0, initial=0) < 0) & (steps.max(axis=0, initial=0) > 0)
    has_number = any(kinds[k] == "number" for k, used in zip(traits, falls_and_rises, strict=True) if used)
    value = value[:, falls_and_rises]
    num_different = len(np.unique(value, axis=0)) if value.size else 0
    return value.shape[1] if value.shape[1] > 1 and has_number and num_different >= len(value) / 2 else 0


def _of_some_groups(sizes: np.ndarray) -> np.ndarray:
    """Which rows, sorted by group, are compared: all if there are at most 10,000, else those of groups that we draw."""
    if sizes.sum() <= _MOST_ROWS:
        return np.ones(sizes.sum(), bool)
    taken = np.minimum(sizes, _MOST_ROWS // _MIN_GROUPS)
    order = np.random.default_rng(0).permutation(len(sizes))
    drawn = np.zeros(len(sizes), bool)
    drawn[order] = np.cumsum(taken[order]) <= _MOST_ROWS
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # in its group
    return place < np.repeat(np.where(drawn, taken, 0), sizes)

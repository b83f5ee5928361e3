"""The report of a fit: rows and columns that were changed or dropped, and columns that may be leaks of the target."""

import logging
from typing import Any

import numpy as np
import pandas as pd

from metaopt import tasks
from metaopt.automl._rows import TrainingRows
from metaopt.automl._schedule import Clock

_log = logging.getLogger(__name__)

_LEAK_BLOCK = 20  # columns between two looks at the clock
_MIN_GROUPS, _MOST_COLUMNS = 10, 100
_MOST_ROWS = 10_000  # in which the groups of a column are compared


def report_frame(
    encoder: tasks.TableEncoder, leaks: tuple[str, ...], groups: tuple[str, ...], rows: list[tuple[str, str]]
) -> pd.DataFrame:
    """The notes of an encoder and of rows, and the columns that may be leaks or groups: column, action and reason."""
    leak = "predicts the target almost perfectly: is it known before the target is?"
    group = (
        "may name groups: rows with the same value here also agree in other columns. If such rows belong together, "
        "such as visits of a patient, pass this column as `groups`"
    )
    suspected = [(name, "suspected", reason) for names, reason in ((leaks, leak), (groups, group)) for name in names]
    notes = [*encoder.notes, *suspected, *(("", action, reason) for action, reason in rows)]
    return pd.DataFrame(notes, columns=["column", "action", "reason"])


def notes_of_rows(
    weight: np.ndarray, rows: TrainingRows, out_of_fold: np.ndarray, time: Any = None, times: np.ndarray | None = None
) -> list[tuple[str, str]]:
    """What `fit` did with rows: action and reason, without a note for rows that are used as they are.

    Args:
      weight: [n] the weights of the rows that `fit` got.
      rows: the rows that were used, from `sorted_rows`.
      out_of_fold: [m] or [m, C] their out-of-fold predictions, NaN for rows without one.
      time: [n] the times that `fit` got, or None.
      times: [n] the same as ranks.

    Returns:
      A list of pairs.
    """
    num_used = np.count_nonzero(weight > 0)
    num_copies = 0 if rows.groups is not None or rows.time is not None else num_used - len(np.unique(rows.copies))
    num_trained = np.count_nonzero(np.isnan(out_of_fold.reshape(len(out_of_fold), -1)).any(axis=1))
    notes = (
        (len(weight) - num_used, "left out", "of {} rows because their weight is 0"),
        (num_copies, "kept together", "of {} rows equal other rows, and are in the same part of each split as these"),
        (
            num_trained,
            "not scored",
            "of {} rows are only used to train models: they do not enter `score_` and the weights of the models",
        ),
    )
    totals = (len(weight), num_used, len(rows.y))
    order = []
    if times is not None:
        values, name = np.asarray(time), getattr(time, "name", None) or "time"
        first, last = (str(values[place(times)]) for place in (np.argmin, np.argmax))
        order = [("ordered", f"by {str(name)!r}: the first row is of {first}, the last one of {last}")]
    return order + [
        (action, f"{num:,} {reason.format(f'{total:,}')}")
        for (num, action, reason), total in zip(notes, totals, strict=True)
        if num
    ]


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
    four fifths have at least two. At least two other columns, the traits, are constant in the groups: both values must
    be known in at least half of the pairs of rows, and equal in 98 % of these pairs. One of the traits is a number,
    none has one value in 90 % of its known rows, and none rises or falls with the name. At least half of the groups
    differ in their traits. Parts of dates count as neither. Tables with more than 100 columns are not searched.

    Tables with more than 10,000 rows are compared in a random sample of their groups. There, the pairs are random rows
    of a group. In smaller tables, they are neighbors in the table. So a trait that changes slowly within a group is
    only found in smaller tables.

    Args:
      x: [n, d], the result of `TableEncoder.transform`.
      encoder: the encoder.

    Returns:
      The name of the column with most traits, or () if there is none. Columns without gaps come first, since `fit`
      needs a group for each row. Of columns with equally many traits, a category comes before a number.
    """
    codes = [code for code in encoder.columns for _ in code.parts or ("",)]
    if len(codes) > _MOST_COLUMNS:
        return ()
    if len(x) > _MOST_ROWS:
        x = x[np.random.default_rng(0).permutation(len(x))]
    known = [column[~np.isnan(column)] for column in x[:_MOST_ROWS].T]
    varied = [bool(c.size) and np.unique(c, return_counts=True)[1].max() <= 0.9 * len(c) for c in known]
    usable = [j for j, code in enumerate(codes) if code.kind != "time" and varied[j]]
    x, kinds = x[:, usable], [codes[j].kind for j in usable]
    num_traits = [_num_traits(x, i, codes[j], kinds) for i, j in enumerate(usable)]
    found = [i for i, num in enumerate(num_traits) if num]
    if not found:
        return ()
    best = max(found, key=lambda i: (not np.isnan(x[:, i]).any(), num_traits[i], kinds[i] != "number"))
    return (encoder.names[usable[best]],)


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
    # The first value of each group, also of those that are not compared. If it is a gap, a known one.
    sorted_traits = x[rows[: starts[-1] + sizes[len(starts) - 1]]][:, traits]
    value = sorted_traits[starts]
    value = np.where(np.isnan(value), np.fmax.reduceat(sorted_traits, starts, axis=0), value)
    # A column that rises or falls with the name, such as its square, is computed from it.
    steps = [np.diff(column[~np.isnan(column)]) for column in value.T]
    used = [i for i, step in enumerate(steps) if step.min(initial=0) < 0 < step.max(initial=0)]
    has_number = any(kinds[traits[i]] == "number" for i in used)
    num_different = len(np.unique(np.nan_to_num(value[:, used], nan=-1.0), axis=0)) if used else 0
    return len(used) if len(used) > 1 and has_number and num_different >= len(value) / 2 else 0


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

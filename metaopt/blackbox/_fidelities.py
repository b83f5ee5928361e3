"""Comparisons of fidelities up to rounding."""

import math
from collections.abc import Sequence

from metaopt.base import Record


def is_full_budget(fidelity: float) -> bool:
    """Whether a fidelity is 1 up to rounding: three thirds, or 1 rounded to float32, are the full budget.

    Args:
      fidelity: a fidelity in (0, 1].

    Returns:
      Whether at most a millionth of the budget is missing. Such a difference is not visible in any outcome.
    """
    return fidelity >= 1 - 1e-6


def rung_of(fidelities: Sequence[float], record: Record, *, own: bool = False) -> int | None:
    """Returns the position of a record's fidelity among the fidelities of a searcher.

    Fidelities are compared up to rounding: float32 stores 1/3 with an error of 3e-8.

    Args:
      fidelities: fidelities in (0, 1].
      record: the record of a trial.
      own: whether the searcher requested the trial, so that its fidelity must be one of `fidelities`.

    Returns:
      The position of the nearest fidelity, if the two differ by at most a millionth of the larger one; else None.

    Raises:
      ValueError: if no fidelity is that near and `own` is true.
    """
    rung = min(range(len(fidelities)), key=lambda i: abs(fidelities[i] - record.fidelity))
    if math.isclose(fidelities[rung], record.fidelity, rel_tol=1e-6):
        return rung
    if own:
        raise ValueError(
            f"A trial's fidelity must be one of the searcher's, {[float(f) for f in fidelities]}, to six digits; got "
            f"{record.fidelity!r} for trial {record.trial}. Report a result at the fidelity that `ask` returned, as in "
            "`trial._replace(status=..., outcome=...)`."
        )
    return None

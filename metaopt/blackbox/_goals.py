"""The goals of a search with several outcomes: the outcomes that it minimizes, and the bounds of others."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metaopt import _pareto, base
from metaopt.blackbox import _fidelities


class Goals(NamedTuple):
    """Outcomes to minimize, and constraints on outcomes.

    Attributes:
      objectives: the names of M outcomes to minimize together; empty for the `outcome` of a record.
      constraints: name -> bound of C outcomes. A trial is feasible if each of them is at most its bound.
    """

    objectives: tuple[str, ...]
    constraints: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all outcomes: of the objectives, and then of the constraints."""
        return (*self.objectives, *self.constraints)


def make_goals(objectives: Sequence[str] | None, constraints: Mapping[str, float] | None) -> Goals | None:
    """Returns the `Goals` of a function's arguments, or None if there are neither objectives nor constraints.

    Raises:
      ValueError: if a name is given twice, or `objectives` are not one or more strings.
    """
    if objectives is None and not constraints:
        return None
    are_names = objectives is None or (len(objectives) > 0 and all(isinstance(name, str) for name in objectives))
    if isinstance(objectives, str) or not are_names:
        raise ValueError(f"`objectives` must be the names of one or more outcomes, as a tuple; got {objectives!r}.")
    bounds = {name: float(bound) for name, bound in (constraints or {}).items()}
    goals = Goals(tuple(objectives or ()), bounds)
    if len(set(goals.names)) < len(goals.names) or not all(np.isfinite(list(bounds.values()))):
        raise ValueError(
            "`objectives` and `constraints` must be different outcomes, with finite bounds; got "
            f"{goals.objectives} and {bounds}."
        )
    return goals


def named_outcomes(record: base.Record, names: Sequence[str]) -> dict[str, float]:
    """The outcomes of a record that have these names, NaN if unknown.

    Raises:
      ValueError: if the trial is complete and lacks one of the outcomes.
    """
    outcomes = record.outcomes or {}
    lacking = [name for name in names if name not in outcomes]
    if lacking and record.status == "COMPLETE":
        raise ValueError(
            f"A complete trial of task {record.task!r} lacks the outcomes {', '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, outcomes)) or 'no outcomes by name'}. Correct the names, let the objective return a "
            "dict with these outcomes, or leave out the trials that lack them."
        )
    return {name: float(outcomes.get(name, np.nan)) for name in names}


def goals_of_records(
    records: Sequence[base.Record], objectives: Sequence[str] | None, constraints: Mapping[str, float] | None
) -> Goals | None:
    """Returns the `Goals` of arguments; with constraints only, the objective is the first outcome of the records.

    Raises:
      ValueError: under the conditions of `make_goals`, or if there are constraints and no outcomes by name.
    """
    goals = make_goals(objectives, constraints)
    if goals is None or goals.objectives:
        return goals
    named = next((record.outcomes for record in records if record.outcomes), None)
    if named is None:
        raise ValueError(
            f"`constraints` are on the outcomes {', '.join(map(repr, goals.names))}, but the records have no outcomes "
            "by name. An objective that returns a dict gives outcomes names."
        )
    return make_goals([next(iter(named))], goals.constraints)


def records_of_outcome(records: Sequence[base.Record], name: str) -> list[base.Record]:
    """Returns records of a single outcome, NaN if unknown.

    Raises:
      ValueError: if a complete trial lacks the outcome.
    """
    return [record._replace(outcome=named_outcomes(record, [name])[name], outcomes=None) for record in records]


def values_of(records: Sequence[base.Record], goals: Goals) -> tuple[np.ndarray, np.ndarray]:
    """[N, M] objectives of records, and [N, C] outcomes minus their bounds; NaN if unknown or failed."""
    objectives, excess = [], []
    for record in records:
        outcomes = named_outcomes(record, goals.names)
        failed = record.status not in ("COMPLETE", "PRUNED")
        first = [outcomes[name] for name in goals.objectives] or [record.outcome]
        objectives.append([np.nan] * len(first) if failed else first)
        excess.append([outcomes[name] - bound for name, bound in goals.constraints.items()])
    shape = len(records), max(len(goals.objectives), 1)
    return np.reshape(objectives, shape), np.reshape(excess, (len(records), len(goals.constraints)))


def feasible_outcomes(records: Sequence[base.Record], goals: Goals) -> list[base.Record]:
    """Returns records whose outcome is NaN unless all constraints hold.

    Raises:
      ValueError: if a complete trial lacks one of the outcomes.
    """
    holds = (values_of(records, goals)[1] <= 0).all(1)
    return [r if hold else r._replace(outcome=np.nan) for r, hold in zip(records, holds, strict=True)]


def ranks(objectives: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Ranks trials by several objectives and constraints. Rank 0 is the best, and equally good trials share a rank.

    The rank of a feasible trial is the number of its front. Front 0 has the trials that no other trial dominates. Front
    1 has the trials that only trials of front 0 dominate, and so on. Infeasible trials come after all feasible ones, in
    the order of their violation. The violation is a sum over constraints: the excess above the bound, divided by the
    largest excess of a trial.

    Args:
      objectives: [N, M], smaller is better; NaN if unknown.
      excess: [N, C], at most 0 if a constraint holds; NaN if unknown.

    Returns:
      [N], NaN for trials with an unknown objective or excess.

    Source: Deb et al., NSGA-II, IEEE Transactions on Evolutionary Computation 6(2), 2002
    """
    known = np.isfinite(objectives).all(1) & ~np.isnan(excess).any(1)
    feasible = known & (excess <= 0).all(1)
    result = np.full(len(objectives), np.nan)
    left, front = np.flatnonzero(feasible), 0
    if objectives.shape[1] == 1:  # the same, without a loop
        values = np.unique(objectives[left, 0])
        result[left] = np.searchsorted(values, objectives[left, 0])
        left, front = left[:0], len(values)
    while len(left):
        first = left[_pareto.pareto_front(objectives[left])]
        result[first] = front
        left, front = np.setdiff1d(left, first), front + 1
    infeasible = known & ~feasible
    above = np.maximum(excess[infeasible], 0)
    worst = np.max(np.where(np.isfinite(above), above, 0), axis=0, initial=0)
    violation = (above / np.where(worst > 0, worst, 1)).sum(1)
    result[infeasible] = front + np.searchsorted(np.unique(violation), violation)
    return result


def best_first(objectives: np.ndarray, excess: np.ndarray) -> list[int]:
    """Orders trials from the best to the worst: by `ranks`, and within a rank so that the first few are spread out.

    Among trials of equal rank, the first one has the smallest first objective. Each next one has the largest distance
    from the nearest of those before it. The distance of two trials is a sum over objectives: the difference of their
    positions if trials are sorted by this objective.

    Args:
      objectives: [N, M], as for `ranks`.
      excess: [N, C].

    Returns:
      The indices of the trials whose objectives and excess are known.

    Source: Schmucker et al., Multi-objective asynchronous successive halving, 2021, https://arxiv.org/abs/2106.12639
    """
    rank = ranks(objectives, excess)
    order: list[int] = []
    for level in np.unique(rank[~np.isnan(rank)]):
        same = np.flatnonzero(rank == level)
        order += spread(same[np.lexsort(objectives[same].T[::-1])], objectives)
    return order


def spread(front: np.ndarray, objectives: np.ndarray) -> list[int]:
    """Orders a front, sorted by its first objective, so that each trial is the farthest from those before it."""
    ranks = np.argsort(np.argsort(objectives[front], axis=0, kind="stable"), axis=0, kind="stable")
    chosen, distance = [0], np.full(len(front), np.inf)
    while len(chosen) < len(front):
        distance = np.minimum(distance, np.abs(ranks - ranks[chosen[-1]]).sum(1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return [int(front[i]) for i in chosen]


def best_records(
    records: Sequence[base.Record],
    objectives: Sequence[str] | None = None,
    constraints: Mapping[str, float] | None = None,
) -> list[base.Record]:
    """Returns the best feasible trials: the Pareto front, or the best trial if there is one objective.

    Args:
      records: the records of one task; only complete trials at the full budget count.
      objectives: the names of outcomes to minimize together; None for the `outcome`, which is the first one.
      constraints: name -> bound of other outcomes. A trial is feasible if each of them is at most its bound.

    Returns:
      The records that no other feasible one dominates, sorted by the first objective; an empty list if no trial is
      feasible. A record dominates another one if it is at least as good in every objective and better in one. Equal
      ones are all included.

    Raises:
      ValueError: if a complete trial lacks one of the outcomes, a name is given twice, or the records are of several
        tasks.

    >>> from metaopt import base, blackbox
    >>> trials = [("a", 0.1, 9.0), ("b", 0.2, 3.0), ("c", 0.3, 4.0)]
    >>> records = [
    ...     base.Record("t", {"x": x}, e, outcomes={"error": e, "size": s})
    ...     for x, e, s in trials
    ... ]
    >>> [
    ...     record.configuration["x"]
    ...     for record in blackbox.best_records(records, ("error", "size"))
    ... ]
    ['a', 'b']
    >>> [
    ...     record.configuration["x"]
    ...     for record in blackbox.best_records(records, constraints={"size": 5.0})
    ... ]
    ['b']
    """
    goals = make_goals(objectives, constraints) or Goals((), {})
    records = list(records)
    if len(tasks := {record.task for record in records}) > 1:
        raise ValueError(
            "`records` must all be of one task, because outcomes of different tasks are not comparable; got the tasks "
            f"{sorted(tasks)}."
        )
    whole = [r for r in records if r.status == "COMPLETE" and _fidelities.is_full_budget(r.fidelity)]
    values, excess = values_of(whole, goals)
    feasible = np.flatnonzero(np.isfinite(values).all(1) & (excess <= 0).all(1))
    return [whole[feasible[i]] for i in _pareto.pareto_front(values[feasible])] if len(feasible) else []

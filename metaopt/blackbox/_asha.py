"""ASHA and asynchronous Hyperband around any searcher: only good trials get the full budget."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt import base
from metaopt.blackbox import _fidelities
from metaopt.blackbox._goals import Goals, best_first, make_goals, values_of
from metaopt.blackbox._random_search import random_search


class AshaState(NamedTuple):
    """State of the searcher, passed from one call to the next.

    Attributes:
      searcher: the state of the searcher that proposes configurations.
      trials: trial number -> (bracket, the record that `searcher` proposed).
      outcomes: trial number -> the outcomes at each rung that has a result; infinite if the trial failed or was pruned.
        The objectives come first, then the outcomes of the constraints minus their bounds.
      asked: (trial number, rung) of all trials that `ask` has returned.
      num_started: number of trials that have started.
    """

    searcher: Any
    trials: dict[int, tuple[int, base.Record]]
    outcomes: dict[int, dict[int, tuple[float, ...]]]
    asked: frozenset[tuple[int, int]]
    num_started: int


def asha(
    searcher: base.Searcher | None = None,
    *,
    reduction_factor: int = 3,
    num_rungs: int = 4,
    num_brackets: int = 1,
    objectives: Sequence[str] | None = None,
    constraints: Mapping[str, float] | None = None,
) -> base.Searcher:
    """Asynchronous successive halving: a trial continues to η times the budget if it is in the best 1/η of its rung.

    Configurations come from `searcher`. With random search this is ASHA. A searcher of `train_meta_optimizer`
    receives every outcome with its fidelity, and brings outcomes of several fidelities to one scale.

    A trial starts at fidelity η^(1 − K + b), where b is its bracket and K the number of rungs. One bracket is ASHA. K
    brackets are Hyperband, which also starts some trials at larger budgets, in case small budgets mislead. The share of
    trials that start in bracket b is that of Hyperband: proportional to η^s/(s + 1), s = K − 1 − b.

    The searcher never waits for a rung to fill, so that you can ask for any number of trials at any time.
    `blackbox.collect` asks for `batch_size` trials per task, and reports all their results before it asks again. The
    search depends on the order in which it receives outcomes, but not on the number of workers.

    Args:
      searcher: proposes configurations at the full budget, and accepts records of fidelities below 1. The default is
        `blackbox.random_search`. `tpe()` is another choice; it treats outcomes at lower fidelities like those of pruned
        trials.
      reduction_factor: η, at least 2.
      num_rungs: K, the number of fidelities, at least 2. By default, fidelities are 1/27, 1/9, 1/3 and 1.
      num_brackets: at least 1, at most K.
      objectives: the names of several outcomes that the objective returns. By default, the `outcome` decides, which is
        the first one. With several, a rung is sorted by fronts. The first front has the trials that no other trial of
        the rung dominates. The second has those that only trials of the first front dominate, and so on. A front is
        ordered so that its first trials are spread over it.
      constraints: name -> the largest feasible value of another outcome. Trials that are infeasible at a rung rank
        after all feasible ones, in the order of how much they exceed the bounds.

    Returns:
      A searcher. A trial has a record for each fidelity that it reached. An objective that resumes its own checkpoints
      (`blackbox.collect(resumes=True)`) pays only for the differences in budget.

    Raises:
      ValueError: if an argument is out of range.
      ValueError: (in `ask`) if `searcher` chooses fidelities itself, as `bohb` does.
      ValueError: (in `tell`) if a complete trial lacks one of the `objectives` or `constraints`.
      ValueError: (in `tell`) if a trial that the searcher asked for has a fidelity that is not one of the K. A trial is
        recognized by its number, configuration and seed.

    Source: Li et al., A system for massively parallel hyperparameter tuning, MLSys 2020,
    https://arxiv.org/abs/1810.05934 (Algorithm 2); brackets: Li et al., Hyperband, JMLR 2018,
    https://arxiv.org/abs/1603.06560

    >>> import jax
    >>> from metaopt import blackbox, spaces
    >>> searcher = blackbox.asha(reduction_factor=2, num_rungs=2)
    >>> state = searcher.init(jax.random.key(0), {"x": spaces.interval(0.0, 1.0)})
    >>> trials, state = searcher.ask(state, 2)
    >>> [trial.fidelity for trial in trials]
    [0.5, 0.5]
    >>> told = [
    ...     trial._replace(status="COMPLETE", outcome=trial.configuration["x"])
    ...     for trial in trials
    ... ]
    >>> (best,), state = searcher.ask(searcher.tell(state, told), 1)
    >>> best.fidelity, best.trial == min(told, key=lambda record: record.outcome).trial
    (1.0, True)
    """
    if reduction_factor < 2 or not 1 <= num_brackets <= num_rungs:
        raise ValueError(
            "`reduction_factor` must be at least 2, and `num_brackets` in 1..`num_rungs`; got "
            f"{reduction_factor}, {num_brackets} and {num_rungs}."
        )
    goals = make_goals(objectives, constraints) or Goals((), {})
    rungs = _Rungs(int(reduction_factor), num_rungs, num_brackets, goals)
    inner = random_search() if searcher is None else searcher
    return base.Searcher(
        init=lambda key, space: AshaState(inner.init(key, space), {}, {}, frozenset(), 0),
        ask=lambda state, num: _ask(rungs, inner, state, num),
        tell=lambda state, records: _tell(rungs, inner, state, records),
    )


class _Rungs(NamedTuple):
    factor: int  # η
    num: int  # K
    num_brackets: int
    goals: Goals

    @property
    def fidelities(self) -> list[float]:
        return [float(self.factor) ** (rung - self.num + 1) for rung in range(self.num)]


def _ask(rungs: _Rungs, inner: base.Searcher, state: AshaState, num: int) -> tuple[list[base.Record], AshaState]:
    asked = []
    for _ in range(num):
        promotion = _promotion(rungs, state)
        if promotion is None:
            new, searcher_state = inner.ask(state.searcher, 1)
            if not new:
                break
            bracket, trial = _next_bracket(rungs, state), new[0]
            if not _fidelities.is_full_budget(trial.fidelity):
                raise ValueError(
                    f"`searcher` proposed a trial at fidelity {trial.fidelity:g}. `asha` needs a searcher that "
                    "proposes only full budgets; use this one without `asha`."
                )
            promotion = trial.trial, bracket
            trials = {**state.trials, trial.trial: (bracket, trial)}
            state = state._replace(searcher=searcher_state, trials=trials, num_started=state.num_started + 1)
        number, rung = promotion
        asked.append(state.trials[number][1]._replace(fidelity=rungs.fidelities[rung]))
        state = state._replace(asked=state.asked | {promotion})
    return asked, state


def _promotion(rungs: _Rungs, state: AshaState) -> tuple[int, int] | None:
    """(trial, rung) of the trial to promote, at the highest possible rung, or None."""
    for rung in reversed(range(1, rungs.num)):
        for bracket in range(rungs.num_brackets):
            results = [
                (outcomes[rung - 1], number)
                for number, outcomes in state.outcomes.items()
                if rung - 1 in outcomes and state.trials[number][0] == bracket
            ]
            for number in _best(rungs.goals, sorted(results))[: len(results) // rungs.factor]:
                if (number, rung) not in state.asked:
                    return number, rung
    return None


def _best(goals: Goals, results: list[tuple[tuple[float, ...], int]]) -> list[int]:
    """The trials with finite outcomes from the best to the worst."""
    if not results:
        return []
    if len(results[0][0]) == 1:
        return [number for (outcome,), number in results if np.isfinite(outcome)]
    values, num = np.array([outcomes for outcomes, _ in results]), max(len(goals.objectives), 1)
    return [results[i][1] for i in best_first(values[:, :num], values[:, num:])]


def _next_bracket(rungs: _Rungs, state: AshaState) -> int:
    """The bracket that is furthest below its share of the started trials."""
    left = [rungs.num - 1 - bracket for bracket in range(rungs.num_brackets)]  # s
    share = np.array([rungs.factor**s / (s + 1) for s in left])
    share /= share.sum()
    num_begun = np.bincount([bracket for bracket, _ in state.trials.values()], minlength=rungs.num_brackets)
    return int(np.argmax(share * (state.num_started + 1) - num_begun))


def _tell(rungs: _Rungs, inner: base.Searcher, state: AshaState, records: Sequence[base.Record]) -> AshaState:
    outcomes = dict(state.outcomes)
    for record in records:
        bracket_and_trial = state.trials.get(record.trial)
        if bracket_and_trial is None or record.configuration != bracket_and_trial[1].configuration:
            continue  # a trial of another search: only `searcher` receives it
        # Another search may have the same configuration under the same number, such as the default, but with another
        # seed. Its fidelity need not be one of ours.
        is_ours = record.seed == bracket_and_trial[1].seed
        rung = _fidelities.rung_of(rungs.fidelities, record, own=is_ours)
        if rung is None:
            continue
        values, excess = values_of([record], rungs.goals)
        y = np.concatenate([values[0], excess[0]])
        y = np.where(record.status == "COMPLETE" and np.isfinite(y).all(), y, np.inf)
        outcomes[record.trial] = {**outcomes.get(record.trial, {}), rung: tuple(y.tolist())}
    return state._replace(searcher=inner.tell(state.searcher, records), outcomes=outcomes)

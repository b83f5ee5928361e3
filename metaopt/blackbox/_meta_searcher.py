"""The searcher of a learned optimizer: `init`, `ask` and `tell` over the trials of one task."""

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import base
from metaopt.blackbox import _random_search
from metaopt.blackbox._goals import Goals, named_outcomes
from metaopt.blackbox._new_trials import (
    EndedTrials,
    TriedConfiguration,
    at_full_budget,
    rounded_fidelity,
    tried_configuration,
)
from metaopt.blackbox._programs import Learned
from metaopt.blackbox._suggestions import TaskSearch, next_configuration


class MetaSearcherState(NamedTuple):
    """State of the searcher, passed from one call to the next.

    Attributes:
      key: the key of the search. The key of a trial is folded from it and the trial's number.
      num_asked: number of trials that were asked for.
      pending: encoded configurations [D] of trials without a result, by trial number.
      tried: the ended trials, by trial number, seed, encoded configuration, and repeat. A trial is unnumbered if its
        number and seed are both 0. Another outcome of an unnumbered trial at the same fidelity is a repeat. Another
        outcome of a numbered trial at the same fidelity replaces the former one, and its repeat is 0.
      first: configurations to try before others.
      repeats: for unnumbered trials, (bytes of the encoded configuration, fidelity) -> its number of outcomes, and
        (bytes, fidelity, outcome) -> the repeat of this outcome.
      others: with several outcomes, a state for each one but the first, of which only `tried` is used.
    """

    key: jax.Array
    num_asked: int
    pending: dict[int, np.ndarray]
    tried: dict[tuple[int, int, bytes, int], TriedConfiguration]
    first: tuple[dict[str, Any], ...]
    repeats: dict[tuple, int]
    others: "tuple[MetaSearcherState, ...]" = ()


def init(learned: Learned, first: tuple[dict[str, Any], ...], key: jax.Array, space: base.PyTree) -> MetaSearcherState:
    """Returns the state before the first trial; raises `ValueError` if `space` is not the learned optimizer's space."""
    if space is not None and space != learned.domain.space:
        raise ValueError(
            "`space` is not the space of this searcher (leaves, bounds or labels differ). Pass `MetaOptimizer.space`, "
            "or None."
        )
    return MetaSearcherState(key, 0, {}, {}, first, {})


def ask(
    learned: Learned, search: TaskSearch, state: MetaSearcherState, num: int
) -> tuple[list[base.Record], MetaSearcherState]:
    """Chooses `num` trials."""
    asked = []
    for _ in range(num):
        trial = state.num_asked
        seed_key, trial_key = jax.random.split(jax.random.fold_in(state.key, trial))
        configuration = state.first[0] if state.first else _choose(learned, search, trial_key, state)
        seed = int(jax.random.randint(seed_key, (), 0, 2**31 - 1))
        asked.append(base.Record("", configuration, seed=seed, status="WAITING", trial=trial))
        pending = {**state.pending, trial: learned.domain.encode(configuration)}
        state = state._replace(num_asked=trial + 1, pending=pending, first=state.first[1:])
    return asked, state


def _choose(learned: Learned, search: TaskSearch, key: jax.Array, state: MetaSearcherState) -> dict[str, Any]:
    tried = list(state.tried.values())
    outcomes = [at_full_budget(list(one.tried.values())) for one in (state, *state.others)]
    ended = EndedTrials(
        outcomes[0],
        np.array([trial.given_up for trial in tried], bool),
        np.array([trial.log_cost for trial in tried]),
        lambda i: tried[i].x,
        lambda: {name[2] for name in state.tried},
        np.stack(outcomes, axis=1),
    )
    return next_configuration(learned, search, key, ended, state.pending, state.num_asked)


def tell(learned: Learned, state: MetaSearcherState, records: list[base.Record]) -> MetaSearcherState:
    """Adds records of trials, including those of trials that other searches proposed."""
    if learned.goals is None:
        return _tell_one(learned, state, records)
    goals = learned.goals.goals
    first, *others = ([_with_outcome(record, goals, name) for record in records] for name in goals.names)
    before = state.others or tuple(init(learned, (), state.key, None) for _ in others)
    told = (_tell_one(learned, *pair) for pair in zip(before, others, strict=True))
    return _tell_one(learned, state, first)._replace(others=tuple(told))


def _with_outcome(record: base.Record, goals: Goals, name: str) -> base.Record:
    """A record of one of several outcomes."""
    if record.status not in ("COMPLETE", "PRUNED"):
        return record
    outcomes = named_outcomes(record, goals.names)
    if record.trial == record.seed == 0:  # all outcomes together distinguish the repeats of a configuration
        record = record._replace(seed=1 + zlib.crc32(repr(outcomes).encode()))
    return record._replace(outcome=outcomes[name])


def _tell_one(learned: Learned, state: MetaSearcherState, records: list[base.Record]) -> MetaSearcherState:
    pending, tried, repeats = dict(state.pending), dict(state.tried), dict(state.repeats)
    for record in records:
        if record.status == "WAITING":
            continue
        x = learned.domain.encode(record.configuration)
        if record.status == "RUNNING":  # in another search or process
            pending[record.trial] = x
            continue
        if record.trial in pending and np.array_equal(pending[record.trial], x):  # not another search's trial
            del pending[record.trial]
        outcome = float(record.outcome) if record.status in ("COMPLETE", "PRUNED") else np.nan
        level, numbered = rounded_fidelity(record.fidelity), record.trial != 0 or record.seed != 0
        repeat = 0 if numbered else _repeat_of(repeats, (x.tobytes(), level), outcome)
        name = record.trial, record.seed, x.tobytes(), repeat
        tried[name] = _with_record(tried.get(name, tried_configuration(x, {})), record, level, outcome)
    first = _random_search.untried(state.first, records, state.num_asked)
    return state._replace(pending=pending, tried=tried, first=first, repeats=repeats)


def _with_record(before: TriedConfiguration, record: base.Record, level: float, outcome: float) -> TriedConfiguration:
    """Adds a record at the rounded fidelity `level` to a trial.

    The outcome of a pruned trial counts. The cost of a pruned or failed trial does not, since the trial did not finish.
    With several fidelities only the first one gives the cost: later ones may have resumed from a checkpoint.
    """
    cost = before.log_costs.get(level, np.nan) if record.status == "COMPLETE" else np.nan
    if record.status == "COMPLETE" and 0 < record.cost < np.inf:
        cost = float(np.log(record.cost / record.fidelity))
    is_last = level >= max(before.outcomes, default=0.0)
    given_up = record.status == "PRUNED" if is_last else before.given_up
    outcomes, log_costs = {**before.outcomes, level: outcome}, {**before.log_costs, level: cost}
    return tried_configuration(before.x, outcomes, log_costs, given_up)


def _repeat_of(repeats: dict[tuple, int], name: tuple[bytes, float], outcome: float) -> int:
    """Returns the index of the repeat to which an outcome belongs; `name` is a configuration and its fidelity.

    A new finite outcome is added to `repeats`. A failure is not added, so that the next new outcome replaces it.
    """
    if not np.isfinite(outcome):
        return repeats.get(name, 0)
    if (*name, outcome) not in repeats:
        repeats[*name, outcome] = repeats.get(name, 0)
        repeats[name] = repeats.get(name, 0) + 1
    return repeats[*name, outcome]

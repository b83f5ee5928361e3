"""Searchers that use Optuna's samplers and pruners: TPE and BOHB."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _checks, _extras, base, spaces
from metaopt.blackbox import _fidelities, _misfits, _random_search
from metaopt.blackbox._goals import Goals, make_goals, values_of
from metaopt.blackbox._optuna_outcomes import CONSTRAINTS


class OptunaState(NamedTuple):
    """State of the searcher, passed from one call to the next.

    Attributes:
      study: Optuna's study. It changes in place, so that a state is valid for only one call of `ask` or `tell`.
      space: the search space.
      key: the key of the trials' seeds.
      trials: trial number -> Optuna's trial, for trials that were asked for and have not ended.
      num_asked: number of trials.
      survivors: (trial number, index of its next fidelity) of trials that were not pruned, in the order to run them.
      first: configurations to try before others.
    """

    study: Any
    space: base.PyTree
    key: jax.Array
    trials: dict[int, Any]
    num_asked: int
    survivors: list[tuple[int, int]]
    first: tuple[dict[str, Any], ...]


def tpe(
    *,
    first: Sequence[Mapping[str, Any]] | None = None,
    num_random: int = 10,
    objectives: Sequence[str] | None = None,
    constraints: Mapping[str, float] | None = None,
) -> base.Searcher:
    """Tree-structured Parzen estimators, by Optuna (extra `optuna`).

    The method estimates one density of the good configurations and one of the others. Both are joint over the
    parameters of one branch of a conditional space. The next configuration maximizes their ratio. Running trials count
    as bad ones, so that a batch spreads out.

    Args:
      first: configurations to try first, with missing values at their defaults. By default, the space's default. A
        configuration is skipped if `tell` has received a full-budget record of it from another search.
        `first=g.portfolio(3, new_task)` of a `MetaOptimizer` starts with configurations that were good on earlier
        tasks.
      num_random: number of random trials before the first model.
      objectives: the names of outcomes to minimize together, if the objective returns several. By default, the
        `outcome`, which is the first one. With several, "PRUNED" records and records at fidelities below 1 are ignored.
      constraints: name -> the largest feasible value of another outcome. Infeasible trials rank behind all feasible
        ones, including feasible ones that count like pruned trials. A trial is also infeasible if this outcome is
        unknown.

    Returns:
      A searcher for the spaces that `spaces.to_optuna` supports. `tell` also accepts records of trials that the
      searcher did not ask for. It learns from them, unless they failed or lie outside the space, and ignores names
      that the space does not have. One warning for each call counts such records, except for failed ones. "COMPLETE"
      records at the full budget rank first. Records at fidelities below 1 count like pruned trials in Optuna: they rank
      behind the complete ones, and larger fidelities rank higher. "PRUNED" records rank last, in the order of their
      outcomes, since they belong to an unknown fidelity below the requested one.

    Raises:
      ValueError: (in `tell`) if a complete trial lacks one of the `objectives` or `constraints`.
      ImportError: (when a search starts) if Optuna is not installed.

    Source: Bergstra et al., NeurIPS 2011, https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization;
    Optuna: Akiba et al., KDD 2019, https://arxiv.org/abs/1907.10902
    """
    goals = make_goals(objectives, constraints) or Goals((), {})
    return _searcher(_Budgets([1.0], lambda optuna: optuna.pruners.NopPruner(), goals), first, num_random)


def bohb(
    *,
    first: Sequence[Mapping[str, Any]] | None = None,
    num_random: int = 10,
    reduction_factor: int = 3,
    num_rungs: int = 4,
) -> base.Searcher:
    """BOHB: configurations from TPE, budgets from Hyperband, both by Optuna (extra `optuna`).

    A trial first runs at fidelity η^(1 − `num_rungs`), where η is the reduction factor. While Hyperband's brackets do
    not prune it, it continues at η times the fidelity, up to 1. So a trial has a record for each fidelity that it
    reached.

    As in Optuna, pruning is asynchronous: a trial is compared with the trials that reached the same fidelity before it.
    Every bracket has its own model. Trials of brackets that prune late also run at the low fidelities. An objective
    that resumes its own checkpoints (`blackbox.collect(resumes=True)`) pays nothing extra for these runs.

    Args:
      first: as for `tpe`. `first=g.portfolio(3, new_task)` of a `MetaOptimizer` starts with configurations that were
        good on earlier tasks.
      num_random: number of random trials of each bracket before its first model.
      reduction_factor: η, at least 2.
      num_rungs: number of fidelities, at least 2. By default, fidelities are 1/27, 1/9, 1/3 and 1.

    Returns:
      A searcher for the spaces that `spaces.to_optuna` supports. As for `tpe`, `tell` also accepts records of trials
      that the searcher did not ask for. Each of them, at any fidelity, enters the model of one bracket. They do not
      prune the searcher's own trials.

    Raises:
      ValueError: (in `tell`) if a trial that the searcher asked for has a fidelity that is not one of the searcher's. A
        trial is recognized by its number, configuration and seed.
      ImportError: (when a search starts) if Optuna is not installed.

    Source: Falkner, Klein & Hutter, ICML 2018, https://arxiv.org/abs/1807.01774
    """
    _checks.check_integer("reduction_factor", reduction_factor, 2)
    fidelities = [float(reduction_factor) ** (rung - num_rungs + 1) for rung in range(num_rungs)]
    steps = reduction_factor ** (num_rungs - 1)
    pruner = lambda optuna: optuna.pruners.HyperbandPruner(1, steps, reduction_factor)
    return _searcher(_Budgets(fidelities, pruner), first, num_random)


class _Budgets(NamedTuple):
    """The fidelities of a searcher, ascending, and how Optuna prunes."""

    fidelities: list[float]
    pruner_fn: Callable[[Any], Any]  # the module `optuna` -> a pruner
    goals: Goals = Goals((), {})

    @property
    def num_objectives(self) -> int:
        return max(len(self.goals.objectives), 1)

    @property
    def only_full(self) -> bool:
        return len(self.fidelities) == 1

    def step(self, record: base.Record) -> int:
        """The step in Optuna; only the order of steps counts.

        The step of a pruned trial is 0, since the fidelity that it reached is unknown.
        """
        budget = 1000 if self.only_full else round(1 / self.fidelities[0])
        return 0 if record.status == "PRUNED" else max(1, round(budget * record.fidelity))


def _searcher(budgets: _Budgets, first: Sequence[Mapping[str, Any]] | None, num_random: int) -> base.Searcher:
    return base.Searcher(
        init=lambda key, space: _init(budgets, first, num_random, key, space),
        ask=lambda state, num: _ask(budgets, state, num),
        tell=lambda state, records: _tell(budgets, state, records),
    )


def _init(budgets: _Budgets, first, num_random: int, key: jax.Array, space: base.PyTree) -> OptunaState:
    optuna = _extras.require("optuna", "optuna", "This searcher")
    seed_key, key = jax.random.split(key)
    seed = int(jax.random.randint(seed_key, (), 0, 2**31 - 1))
    spaces.to_optuna(space)  # raises an error if Optuna does not support the space
    options: dict[str, Any] = {"multivariate": True, "group": True, "constant_liar": True}
    if budgets.goals.constraints:
        options["constraints_func"] = lambda trial: trial.user_attrs[CONSTRAINTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)  # Optuna 5 prefers `trial.set_constraint`, which 4 does not have
        sampler = optuna.samplers.TPESampler(n_startup_trials=num_random, seed=seed, **options)
    # Optuna assigns a trial to a bracket by the study's name, among other things.
    kwargs: Any = {"study_name": "metaopt", "sampler": sampler, "pruner": budgets.pruner_fn(optuna)}
    kwargs["directions"] = ["minimize"] * budgets.num_objectives
    study = _extras.quietly(optuna, lambda: optuna.create_study(**kwargs))
    return OptunaState(study, space, key, {}, 0, [], tuple(_random_search.complete(space, first)))


def _ask(budgets: _Budgets, state: OptunaState, num: int) -> tuple[list[base.Record], OptunaState]:
    asked = []
    survivors, trials = list(state.survivors), dict(state.trials)
    num_asked, left = state.num_asked, state.first
    for _ in range(num):
        if survivors:
            number, rung = survivors.pop(0)
        else:
            number, rung = num_asked, 0
            if left:
                names = spaces.to_optuna(state.space)
                state.study.enqueue_trial({name: value for name, value in left[0].items() if name in names})
                left = left[1:]
            trials[number] = state.study.ask()
            num_asked += 1
        asked.append(
            base.Record(
                "",
                spaces.suggest(trials[number], state.space),
                fidelity=budgets.fidelities[rung],
                seed=_random_search.seed_of(state.key, number),
                status="WAITING",
                trial=number,
            )
        )
    return asked, state._replace(trials=trials, num_asked=num_asked, survivors=survivors, first=left)


def _tell(budgets: _Budgets, state: OptunaState, records: Sequence[base.Record]) -> OptunaState:
    survivors, trials = list(state.survivors), dict(state.trials)

    def is_own(record) -> bool:
        # Other searches also number their trials from 0, so we also compare the configuration.
        trial = trials.get(record.trial)
        return trial is not None and _same(record.configuration, spaces.suggest(trial, state.space))

    ended = [
        _without_lost(budgets.goals, record) for record in records if record.status in ("COMPLETE", "PRUNED", "FAIL")
    ]
    for record in ended:
        if not budgets.only_full and record.status != "FAIL" and is_own(record):  # raise before the study changes
            own = record.seed == _random_search.seed_of(state.key, record.trial)
            _fidelities.rung_of(budgets.fidelities, record, own=own)
    left = _random_search.untried(state.first, records, state.num_asked)
    misfits = []
    for record in ended:
        rung = _fidelities.rung_of(budgets.fidelities, record)
        if not is_own(record) or (rung is None and record.status != "FAIL" and not budgets.only_full):
            misfits += _add(budgets, state.study, state.space, record)
        elif _ends(budgets, state.study, trials[record.trial], record, rung):
            del trials[record.trial]
        else:
            assert rung is not None
            survivors.append((record.trial, rung + 1))
    consequence = "Records outside the space are not used, and names that the space does not have are ignored."
    _misfits.log_misfits(misfits, len(records), consequence)
    return state._replace(trials=trials, survivors=survivors, first=left)


def _without_lost(goals: Goals, record: base.Record) -> base.Record:
    """Optuna rejects NaN with a warning, and would take −∞ as the best outcome: such a trial has failed."""
    lost = record.status == "COMPLETE" and not all(np.isfinite(x).all() for x in values_of([record], goals))
    return record._replace(status="FAIL") if lost else record


def _outcomes(goals: Goals, record: base.Record) -> tuple[list[float], list[float]]:
    """The objectives of a record, and the outcomes of constraints minus their bounds; unknown ones are infinite."""
    values, excess = values_of([record], goals)
    return values[0].tolist(), np.nan_to_num(excess[0], nan=np.inf, posinf=np.inf, neginf=-np.inf).tolist()


def _ends(budgets: _Budgets, study: Any, trial: Any, record: base.Record, rung: int | None) -> bool:
    """Reports the record of a proposed trial to Optuna. Returns False if the trial continues at the next fidelity.

    `rung` is the position of the record's fidelity, or None if it is another one. The cases, of which the first counts:

    - the trial failed: it ends as failed;
    - `rung` is None: it ends as pruned;
    - it is complete below the last fidelity: Optuna's pruner decides whether it continues or ends as pruned;
    - it was pruned by the objective: it ends as pruned, with its outcome as an intermediate value;
    - it is complete at the last fidelity: it ends as complete.

    In a study of several objectives, Optuna accepts no intermediate value.
    """
    from optuna.trial import TrialState

    if record.status == "FAIL":
        study.tell(trial, state=TrialState.FAIL)
        return True
    (first, *others), excess = _outcomes(budgets.goals, record)
    if excess:
        trial.set_user_attr(CONSTRAINTS, excess)
    if rung is None:  # `asha` asked for a lower fidelity; the trial's next fidelity becomes another trial of the study
        if math.isfinite(first) and not others:
            trial.report(first, step=budgets.step(record))
        study.tell(trial, state=TrialState.PRUNED)
        return True
    if record.status == "COMPLETE" and rung + 1 < len(budgets.fidelities):
        trial.report(first, step=round(record.fidelity / budgets.fidelities[0]))
        if not trial.should_prune():
            return False
    elif record.status == "PRUNED" and not others:
        # A trial of BOHB has completed all lower budgets, so its rung is known.
        step = budgets.step(record) if budgets.only_full else round(record.fidelity / budgets.fidelities[0])
        trial.report(first, step=step)
    if record.status == "COMPLETE" and rung + 1 == len(budgets.fidelities):
        study.tell(trial, [first, *others])
    else:
        study.tell(trial, state=TrialState.PRUNED)
    return True


def _same(configuration, other) -> bool:
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b
    return configuration.keys() == other.keys() and all(close(configuration[n], other[n]) for n in other)


def _add(budgets: _Budgets, study, space, record: base.Record) -> list[str]:
    """Adds a trial that the searcher did not propose: of another search, or of this one at another fidelity.

    Returns:
      The value or name that does not fit the space, as one text, or an empty list. A record that failed is not checked.
    """
    import optuna

    (first, *others), excess = _outcomes(budgets.goals, record)
    whole = record.status == "COMPLETE" and _fidelities.is_full_budget(record.fidelity)
    if record.status == "FAIL" or not math.isfinite(first) or (others and not whole):
        return []
    reason = _misfits.misfit(space, record.configuration)
    distributions = spaces.to_optuna(space)
    searched = {name: value for name, value in record.configuration.items() if name in distributions}
    try:
        within = spaces.configuration(space, spaces.from_configuration(space, searched))
        for name in sorted(record.configuration.keys() & within.keys() - distributions.keys()):
            value = record.configuration[name]
            is_gap = value is None or (isinstance(value, float | np.floating) and math.isnan(value))  # in a data frame
            if not is_gap and (wrong := _misfits.wrong_fixed(name, value, within[name])):
                return [wrong]
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if whole else optuna.trial.TrialState.PRUNED,
            params={name: within.get(name, value) for name, value in searched.items()},
            distributions={name: distributions[name] for name in searched},
            values=[first, *others] if whole else None,
            intermediate_values=None if whole else {budgets.step(record): first},
            system_attrs={CONSTRAINTS: excess} if excess else None,
        )
    except ValueError as error:  # a number out of range, or an unknown label
        return [reason or str(error)]
    study.add_trial(trial)
    return [reason] if reason else []

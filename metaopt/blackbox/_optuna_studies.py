"""Optuna: converts records to studies and back, and offers a learned meta-optimizer as a sampler."""

import collections
import itertools
import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from metaopt import _checks, _extras, base, spaces
from metaopt.blackbox import _fidelities, _meta_search
from metaopt.blackbox._goals import Goals
from metaopt.blackbox._optuna_outcomes import (
    OURS,
    as_told_outcomes,
    goals_of,
    outcomes_of,
    signs_of,
    values_and_attributes,
    values_at_steps,
)

_FINEST = 10**9  # steps of the full budget that fit into 32 bits
_KEPT = ("task", "trial", "cost", "seed", "reason", "fidelity", "outcomes")


def to_optuna_study(
    records: Sequence[base.Record],
    space: base.PyTree,
    *,
    objectives: Sequence[str] | None = None,
    constraints: Mapping[str, float] | None = None,
    **kwargs: Any,
) -> Any:
    """Makes an Optuna study from the records of one task, for example for Optuna's dashboard and plots.

    The records of one trial (same number, seed and configuration) at several fidelities become its intermediate values.
    Their steps are thousandths of the full budget. If these do not separate all fidelities of each trial, the steps are
    ten thousandths and so on, down to billionths. Fidelities that differ by at most a millionth of the larger one count
    as equal (float32 stores 1/3 with an error of 3e-8). A second record of a trial at the same fidelity becomes another
    trial, because it may come from another study.

    Args:
      records: the records of one task.
      space: the space of their configurations.
      objectives: the names of the outcomes that are the study's objectives, if records have several. By default, all
        that are not constraints.
      constraints: name -> bound of other outcomes. The study's constraints are the outcomes minus their bounds.
      **kwargs: arguments of `optuna.create_study`, such as `study_name`, or `storage="sqlite:///study.db"` for the
        dashboard. `direction` is not allowed, since outcomes are minimized. With `load_if_exists=True`, the trials are
        added to an existing study of this name, without those that it already has: trials of the same number, seed,
        parameters, state and values. So you may pass all records again.

    Returns:
      A study whose trials have the records' parameters, values and states. Their user attributes hold the task, cost,
      seed, reason, fidelity and metaopt's trial number, as "metaopt:trial" and so on. A trial that never reached the
      full budget is pruned. A trial whose outcome is NaN has failed. In a study of several objectives, Optuna has no
      intermediate values. There, a user attribute "metaopt:outcomes at step 500" has the objectives at a step.

    Raises:
      ValueError: if the records are of several tasks, or a record is invalid (unknown status, fidelity outside (0, 1],
        or non-numeric outcome).
      ValueError: if a fidelity is less than a billionth of the full budget, or two fidelities of a trial are within a
        billionth.
      ValueError: (by Optuna) if a configuration does not fit the space.
      ValueError: if a direction is given, or a complete trial lacks one of the objectives or constraints.
      ValueError: if `load_if_exists=True` finds a study that maximizes an objective.
      ImportError: if Optuna is not installed.
    """
    import optuna

    records = list(records)
    for i, record in enumerate(records):
        _checks.check_record(record, f"`records[{i}]`")
    if len(names := {record.task for record in records}) > 1:
        raise ValueError(f"`records` must be of one task, because an Optuna study has one; got {sorted(names)}.")
    if directions := {"direction", "directions"} & set(kwargs):
        raise ValueError(f"`{directions.pop()}` is not allowed, because outcomes are always minimized.")
    distributions = spaces.to_optuna(space)
    levels = _levels(record.fidelity for record in records)
    trials = _by_trial(records, levels)
    num_steps = _num_steps(trials)
    goals = goals_of(records, objectives, constraints)
    if goals is not None and len(goals.objectives) > 1:
        kwargs["directions"] = ["minimize"] * len(goals.objectives)
    study = optuna.create_study(**kwargs)
    if min(signs_of(study)) < 0:
        raise ValueError(
            f"The existing study {study.study_name!r} maximizes an objective, but the outcomes of records are always "
            "minimized. Use another `study_name`."
        )
    identity = lambda trial: _identity(trial, num_objectives=len(study.directions))
    present = collections.Counter(map(identity, study.get_trials(deepcopy=False)))
    if goals is not None:
        _set_names(study, goals.objectives)
    step_of = lambda fidelity: round(num_steps * float(fidelity))
    for trial_records in trials:
        last = max(trial_records, key=lambda record: record.fidelity)
        state = optuna.trial.TrialState.PRUNED
        if last.status != "COMPLETE" or _fidelities.is_full_budget(last.fidelity):
            state = optuna.trial.TrialState[last.status]
        if goals is None:
            complete = [record for record in trial_records if record.outcome == record.outcome]
            steps = {step_of(record.fidelity): float(record.outcome) for record in complete}
            args: dict[str, Any] = {"values": [float(last.outcome)], "intermediate_values": steps, "user_attrs": {}}
        else:
            args = values_and_attributes(trial_records, goals, step_of)
        if last.status == "COMPLETE" and any(map(math.isnan, args["values"])):
            state = optuna.trial.TrialState.FAIL  # Optuna does not allow a complete trial without a value
        args["values"] = args["values"] if state == optuna.trial.TrialState.COMPLETE else None
        attributes = {name: getattr(last, name) for name in _KEPT}
        attributes = {n: v.item() if isinstance(v, np.generic) else v for n, v in attributes.items()}  # Optuna's JSON
        args["user_attrs"] |= {OURS + name: value for name, value in attributes.items() if value is not None}
        values = {}
        for name, value in last.configuration.items():
            if name not in distributions:
                continue
            value = value.item() if isinstance(value, np.generic) else value
            values[name] = next(iter(_fitting(value, distributions[name])), value)  # Optuna rejects other values
        trial = optuna.trial.create_trial(
            state=state,
            params=values,
            distributions={name: distributions[name] for name in values},
            **args,
        )
        if present[identity(trial)]:
            present[identity(trial)] -= 1
        else:
            study.add_trial(trial)
    return study


def _set_names(study: Any, names: Sequence[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental" in Optuna 4
        study.set_metric_names(list(names))


def _identity(trial: Any, num_objectives: int) -> str:
    """Equal for two trials of the same record, also if the record was made from one of them."""
    at_steps = values_at_steps(trial)
    last = at_steps[max(at_steps)][:num_objectives] if at_steps else []  # values of constraints may follow
    values = {"COMPLETE": trial.values, "PRUNED": last}.get(trial.state.name) or []
    number, seed = trial.user_attrs.get(OURS + "trial", trial.number), trial.user_attrs.get(OURS + "seed", 0)
    return repr((number, seed, trial.state.name, list(map(float, values)), sorted(trial.params.items())))


def _levels(fidelities: Iterable[float]) -> dict[float, float]:
    """Maps each fidelity to the largest one that it equals up to rounding."""
    levels, level = {}, math.inf
    for fidelity in sorted(set(fidelities), reverse=True):
        level = levels[fidelity] = level if math.isclose(fidelity, level, rel_tol=1e-6) else fidelity
    return levels


def _by_trial(records: Sequence[base.Record], levels: dict[float, float]) -> list[list[base.Record]]:
    """Returns the records of each trial, in the order of the first ones.

    A trial number does not identify a trial: every study, and every task's searcher, counts from 0.
    """
    trials: dict[tuple, list[base.Record]] = {}
    counts = collections.Counter()
    for record in records:
        items = sorted((name, type(value).__name__, repr(value)) for name, value in record.configuration.items())
        name = record.trial, record.seed, tuple(items)
        position = *name, levels[record.fidelity]
        trials.setdefault((*name, counts[position]), []).append(record)
        counts[position] += 1
    return list(trials.values())


def _num_steps(trials: Sequence[Sequence[base.Record]]) -> int:
    """Returns how many steps the full budget has, such that each trial's fidelities have different steps above 0."""
    num_steps = 1000
    while True:
        within = [(0.0, *sorted(float(record.fidelity) for record in trial_records)) for trial_records in trials]
        pairs = [pair for steps in within for pair in itertools.pairwise(steps)]
        near = [(a, b) for a, b in pairs if round(num_steps * a) == round(num_steps * b)]
        if not near:
            return num_steps
        if num_steps == _FINEST:
            low, high = near[0]
            subject = f"the fidelities {low!r} and {high!r}, within" if low else f"the fidelity {high!r}, less than"
            raise ValueError(
                f"A trial has {subject} a billionth of the full budget. A study's steps are integers, and Optuna "
                "cannot store such fine steps. Remove one of the records."
            )
        num_steps *= 10


def from_optuna_study(study: Any, *, task: str | None = None) -> list[base.Record]:
    """Returns the trials of an Optuna study as records, one for each trial.

    If the study has several objectives, or constraints, the records have `outcomes`. Their names are the study's metric
    names, or "0", "1" and so on. Constraints are named "constraint 0", or "constraint NAME". A constraint holds if its
    value is at most 0.

    Trials that `to_optuna_study` wrote keep their task, trial number, cost and seed.

    Args:
      study: an Optuna study. The outcomes of objectives that it maximizes are the negative values.
      task: the task's name; by default the name that `to_optuna_study` stored, or the study's name.

    Returns:
      A record for each trial. A pruned trial has its last intermediate value. Its fidelity is its last step divided by
      the largest step of the study, both counted from 1. Optuna does not know the number of steps of a whole trial. In
      a study of several objectives, intermediate values are those that `should_prune` or `to_optuna_study` has stored.

      Records with number 0 and seed 0 count as trials without a number. For numbered trials in your own records, count
      from 1, or give seeds. Several records with number 0 and the same nonzero seed are corrections of one trial, not
      repetitions.
    """
    sign = signs_of(study)[0]
    trials = study.get_trials()
    at_steps = [values_at_steps(trial) for trial in trials]
    # Steps start at 0 or at 1. If they start at 0, the value at step 0 was reported after one step.
    first = int(any(0 in values for values in at_steps))
    steps = max((max(values) for values in at_steps if values), default=0) + first
    records = []
    for trial, reported in zip(trials, at_steps, strict=True):
        values, fidelity = trial.values, 1.0
        if trial.state.name == "PRUNED" and reported:
            values = reported[max(reported)]
            fidelity = (max(reported) + first) / steps
        outcome = None if values is None else values[0]
        seconds = trial.duration.total_seconds() if trial.duration is not None else float("nan")
        stored_fields = {name: trial.user_attrs[OURS + name] for name in _KEPT if OURS + name in trial.user_attrs}
        if task is not None:
            stored_fields["task"] = task
        record = base.Record(
            task=study.study_name,
            configuration=dict(trial.params),
            outcome=float("nan") if outcome is None else sign * outcome,
            fidelity=fidelity,
            cost=seconds,
            status=trial.state.name,
            trial=trial.number,
            outcomes=outcomes_of(trial, study, values),
        )
        record = record._replace(**stored_fields)
        records.append(record._replace(outcome=next(iter((record.outcomes or {"": record.outcome}).values()))))
    return records


def optuna_sampler(
    meta_optimizer: _meta_search.MetaOptimizer,
    new_task: Any = None,
    *,
    acquisition: str = "ei",
    seed: int | None = None,
    independent_sampler: Any = None,
    constraints_func: Callable[[Any], Sequence[float]] | None = None,
) -> Any:
    """Returns an Optuna sampler that uses a meta-optimizer g; study, storage and dashboard remain Optuna's.

    The first trial is the prediction of `meta_optimizer.predict`. The following trials come from its searcher, which
    learns of all trials of the study, including those of other samplers. The sampler supports `study.enqueue_trial`,
    `directions`, pruners and `n_jobs`:

    - The parameters of `meta_optimizer.space` are drawn together; those whose conditions do not hold are omitted. An
      objective requests them as in `spaces.to_optuna`, or all in one line: `spaces.suggest(trial, space)`. It may
      request another range, scale or other labels (for example because labels were added). It then gets the drawn value
      if that value is allowed, or the nearest one if the parameter has a step, as integers have. Otherwise
      `independent_sampler` draws the value. This sampler also draws parameters that the space does not have.
    - While trials are running, in any thread or process, a draw maximizes the expected improvement that it adds to
      theirs.
    - A pruned trial counts with its last intermediate value. We correct this value by the mean difference between that
      step and the end in the trials that have both. A pruned trial without a value counts as failed. Steps of one trial
      that agree in six digits (possible beyond a million) count as one, with the last value.
    - A trial may end or fail before it has requested all of its parameters. The others then count with their drawn
      values if this sampler has drawn them, else with their defaults. A trial that has requested no parameter does not
      count, regardless of its end. A conditional parameter that is requested without its parent counts if the drawn
      parent makes it active.
    - With a finite set (`candidates`), a trial may use another label or number than the drawn one. It then counts with
      the value that it used. The drawn value is untried, and may be drawn again. Request the labels and numbers of the
      set to avoid this.
    - If g has `objectives`, the study must have as many directions, in the same order. If g has `constraints`, the
      sampler needs their values: from `constraints_func`, or from `trial.set_constraint(name, value)` of Optuna 5 with
      the same names. A value is the outcome minus its bound; the constraint holds if it is at most 0.
    - Optuna does not support `trial.report` in studies of several objectives; use `blackbox.should_prune`. The sampler
      learns from the values that it stores, as from intermediate values.
    - The draw for a trial depends on `seed`, its number, and the trials that have ended or are running when it begins.
      If an objective does not request all parameters, it also depends on which of these trials this sampler has drawn.
      In a distributed study, each process makes its own sampler; a sampler cannot be pickled.

    Args:
      meta_optimizer: made by `blackbox.train_meta_optimizer`. Its records may come from earlier studies
        (`from_optuna_study`), and its space from their trials (`spaces.from_optuna`).
      new_task: as for `meta_optimizer.predict`.
      acquisition: as for `meta_optimizer.searcher`.
      seed: the seed of everything random; by default, a fresh one.
      independent_sampler: draws parameters that the space does not have; by default `optuna.samplers.RandomSampler`.
      constraints_func: as for Optuna's samplers: `(frozen_trial) -> values`, in the order of
        `meta_optimizer.constraints`, called when a trial is complete or pruned. Optuna's `study.best_trials` uses them.

    Returns:
      An `optuna.samplers.BaseSampler`, for studies of one objective, or of as many as `meta_optimizer.objectives`.

    Raises:
      ValueError: if the space has a simplex, which Optuna does not have, or `acquisition` is unknown.
      ValueError: if `constraints_func` is given, and `meta_optimizer` has no `constraints`.
      ValueError: when a trial begins, if the study has another number of objectives, or trials have other constraints.
      ImportError: if Optuna is not installed.

    >>> import optuna
    >>> from metaopt import base, blackbox, spaces
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> space = {"depth": spaces.integer(1, 4)}
    >>> depths, tables = (1, 2, 3, 4), range(40)
    >>> earlier = [
    ...     base.Record(f"table {i}", {"depth": d}, (d - 3.0) ** 2)
    ...     for i in tables
    ...     for d in depths
    ... ]
    >>> g = blackbox.train_meta_searcher(earlier, space=space, num_steps=0)
    >>> study = optuna.create_study(sampler=blackbox.optuna_sampler(g, seed=0))
    >>> study.optimize(
    ...     lambda trial: abs(trial.suggest_int("depth", 1, 4) - 3.0), n_trials=1
    ... )
    >>> study.best_params
    {'depth': 3}
    """
    optuna = _extras.require("optuna", "optuna", "This sampler")
    spaces.to_optuna(meta_optimizer.space)  # raises if the space has no counterpart in Optuna
    searcher = meta_optimizer.searcher(new_task, acquisition=acquisition, first=())
    number = int.from_bytes(os.urandom(4)) if seed is None else seed
    key = jax.random.key(number % 2**32)
    independent = optuna.samplers.RandomSampler(number % 2**32) if independent_sampler is None else independent_sampler
    goals = Goals(meta_optimizer.objectives, dict(meta_optimizer.constraints))
    if constraints_func is not None and not goals.constraints:
        raise ValueError(
            "`constraints_func` needs a meta-optimizer that predicts constraints: give `train_meta_optimizer` their "
            "outcomes and bounds as `constraints`."
        )
    sampler = type("MetaSampler", (_MetaSampler, optuna.samplers.BaseSampler), {})
    return sampler(searcher, key, independent, goals, constraints_func)


class _StudyMemory:
    """The memory of a sampler for one study.

    Attributes:
      state: the state of the searcher.
      ended: the numbers of the trials that the searcher has learned of.
      drawn: the configurations drawn for running trials, by number.
    """

    def __init__(self, state: Any):
        self.state = state
        self.ended: set[int] = set()
        self.drawn: dict[int, dict[str, Any]] = {}


class _MetaSampler:
    """The sampler, without its base class of Optuna, which is imported when a sampler is made."""

    def __init__(self, searcher: base.Searcher, key: jax.Array, independent: Any, goals: Goals, constraints_func: Any):
        self._searcher, self._key, self._independent = searcher, key, independent
        self._goals, self._constraints_func = goals, constraints_func
        self._single = threading.Lock()
        # Keys are the storage and the number of a study, since Optuna may make a study object for every trial.
        self._studies: Any = weakref.WeakKeyDictionary()

    def _memory(self, study: Any) -> _StudyMemory:
        of_storage = self._studies.setdefault(study._storage, {})
        return of_storage.setdefault(study._study_id, _StudyMemory(self._searcher.init(self._key, None)))

    def _draw(self, study: Any, number: int) -> dict[str, Any]:
        """Returns the configuration of a trial, drawn after learning of all trials that have ended."""
        memory = self._memory(study)
        signs = signs_of(study)
        if len(signs) != (num := max(len(self._goals.objectives), 1)):
            raise ValueError(
                f"The study has {len(signs)} objectives, but the meta-optimizer was trained with {num}. Train it "
                "with as many `objectives` as the study has."
            )
        # One read: between two reads, a trial that ends would be among neither the ended nor the running trials.
        # We read from the storage, because with Hyperband's pruner `study.get_trials` returns only one bracket.
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        new = [trial for trial in trials if trial.state.is_finished() and trial.number not in memory.ended]
        drawn_of = lambda trial: memory.drawn.get(trial.number, {})
        records = [record for trial in new for record in _as_told(trial, signs, drawn_of(trial), self._goals)]
        memory.state = self._searcher.tell(memory.state, records)
        memory.ended |= {trial.number for trial in new}
        memory.drawn = {other: drawn for other, drawn in memory.drawn.items() if other not in memory.ended}
        others = [trial for trial in trials if trial.state.name == "RUNNING" and trial.number != number]
        # The drawn values hold until the trial reports its own, which may differ if the trial was enqueued.
        drawn = [(trial.number, memory.drawn.get(trial.number, {}) | trial.params) for trial in others]
        running = [base.Record("", c, trial=other, status="RUNNING") for other, c in drawn if c]
        state = self._searcher.tell(memory.state, running)._replace(num_asked=number)
        (record,), _ = self._searcher.ask(state, 1)
        memory.drawn[number] = record.configuration
        return record.configuration

    def reseed_rng(self):
        self._independent.reseed_rng()  # our randomness is folded from a trial's number

    def infer_relative_search_space(self, study, trial):
        return {}  # parameters are returned only when we know how the objective requests them

    def sample_relative(self, study, trial, search_space):
        with self._single:
            self._draw(study, trial.number)
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        with self._single:
            drawn = self._memory(study).drawn.get(trial.number) or self._draw(study, trial.number)
        if param_name in drawn and (
            allowed := _fitting(_on_step(drawn[param_name], param_distribution), param_distribution)
        ):
            return allowed[0]
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study, trial):
        self._independent.before_trial(study, trial)

    def after_trial(self, study, trial, state, values):
        if self._constraints_func is not None:
            from optuna.samplers import _base

            _base._process_constraints_after_trial(self._constraints_func, study, trial, state)
        self._independent.after_trial(study, trial, state, values)


def _on_step(value: Any, distribution: Any) -> Any:
    """The nearest value of a distribution with a step, if there is one within half a step; else the value itself.

    A value above `high` may have been in the range of the objective, because Optuna reduces `high` to the last step.
    """
    step = getattr(distribution, "step", None)
    if step is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if not distribution.low <= value <= distribution.high + step / 2:
        return value
    return min(distribution.low + round((value - distribution.low) / step) * step, distribution.high)


def _fitting(value: Any, distribution: Any) -> list[Any]:
    """Returns a list of the value that a distribution has for `value`, or [] if it does not allow the value.

    A float32 that rounding has moved past a bound, or off a step, is allowed.
    """
    if hasattr(distribution, "choices"):
        return [choice for choice in distribution.choices if choice == value][:1]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    near = min(max(value, distribution.low), distribution.high)
    steps = 0.0 if distribution.step is None else (near - distribution.low) / distribution.step
    if not math.isclose(near, value, rel_tol=1e-6) or not math.isclose(steps, round(steps), abs_tol=1e-6):
        return []
    return [round(near) if type(distribution).__name__ == "IntDistribution" else float(near)]


def _as_told(trial, signs: Sequence[float], drawn: dict[str, Any], goals: Goals) -> list[base.Record]:
    """Converts an Optuna trial to records for a searcher: its value, and its step values at fidelities below 1.

    A trial may fail or end before it has requested all drawn parameters. It then counts with its drawn values. With
    only the requested parameters, it would count as another configuration, and the drawn one would be drawn again and
    again.
    """
    if not trial.params:
        return []  # it requested nothing, so its outcome says nothing about any configuration
    record = base.Record("", drawn | trial.params, seed=1, trial=trial.number)  # trial 0 counts as numbered
    if goals.objectives:
        converted = as_told_outcomes(trial, signs, goals)
        return [told._replace(configuration=record.configuration, seed=1, trial=trial.number) for told in converted]
    (sign,) = signs
    # The fidelities are far below 1, the full budget. Fidelities are compared to six digits.
    records = [
        record._replace(outcome=sign * value, fidelity=(step + 1) / 1e15)
        for step, value in sorted(trial.intermediate_values.items())
        if step >= 0 and math.isfinite(value)
    ]
    if trial.state.name == "COMPLETE":
        seconds = trial.duration.total_seconds() if trial.duration is not None else math.nan
        records.append(record._replace(outcome=sign * trial.value, cost=seconds))
    elif trial.state.name == "FAIL" or not records:
        records = [record._replace(status="FAIL")]
    return records

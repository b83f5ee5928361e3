"""Optuna: records as its studies, for its dashboard and its plots, and back; and what was learned as its sampler."""

import collections
import itertools
import math
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from metaopt import base, methods, spaces

_OURS = "metaopt:"  # before the names of user attributes: a person's own may be called "cost" or "seed", too
_FINEST = 10**9  # steps of the full budget, as 32 bits hold
_KEPT = ("task", "trial", "cost", "seed", "reason", "fidelity")


def to_optuna_study(records: Sequence[base.Record], space: base.PyTree, **kwargs: Any) -> Any:
    """An Optuna study of the records of one task.

    Args:
      records: of one task. Those of one trial (one number, seed and configuration) at several fidelities become its
        intermediate values, at steps of thousandths of the full budget, or of as much finer parts (ten thousandths and
        so on, down to billionths) as tell all fidelities of each trial apart. Fidelities that differ by at most a
        millionth of the larger are the same but for rounding (float32 keeps 1/3 to 3e-8); a second record at the same
        fidelity is another trial, as of another study.
      space: that they come from.
      **kwargs: of `optuna.create_study`, such as `storage="sqlite:///study.db"`, for its dashboard, and `study_name`;
        not its `direction`, since outcomes are minimized.

    Returns:
      A study whose trials have the records' parameters, values and states, and task, cost, seed, reason and metaopt's
      trial number as user attributes, "metaopt:trial" and so on. A trial that never reached the full budget is pruned;
      one whose outcome is NaN has failed.

    Raises:
      ValueError: the records are of several tasks, one is no record (an unknown status, a fidelity out of (0, 1], an
        outcome that is no number), a fidelity is less than a billionth of the full budget, or two of a trial are
        within one, a configuration does not fit the space, or a direction is given.
      ImportError: Optuna is not installed.
    """
    import optuna

    records = list(records)
    for i, record in enumerate(records):
        base.check_record(record, f"`records[{i}]`")
    if len(names := {record.task for record in records}) > 1:
        raise ValueError(f"An Optuna study is of one task; got records of {sorted(names)}.")
    if given := {"direction", "directions"} & set(kwargs):
        raise ValueError(f"Outcomes are minimized, so that `{given.pop()}` cannot be given.")
    distributions = spaces.to_optuna(space)
    levels = _levels(record.fidelity for record in records)
    trials = _by_trial(records, levels)
    parts = _parts(trials)
    study = optuna.create_study(**kwargs)
    for several in trials:
        last = max(several, key=lambda record: record.fidelity)
        state = optuna.trial.TrialState.PRUNED
        if last.status != "COMPLETE" or base.is_full_budget(last.fidelity):
            state = optuna.trial.TrialState[last.status]
        if last.status == "COMPLETE" and math.isnan(last.outcome):
            state = optuna.trial.TrialState.FAIL  # Optuna has no trial that is complete without a value
        complete = [record for record in several if record.outcome == record.outcome]
        attributes = {name: getattr(last, name) for name in _KEPT}
        attributes = {n: v.item() if isinstance(v, np.generic) else v for n, v in attributes.items()}  # Optuna's JSON
        values = {}
        for name, value in last.configuration.items():
            if name not in distributions:
                continue
            value = value.item() if isinstance(value, np.generic) else value
            if not (found := _fitting(value, distributions[name])):
                raise ValueError(f"`{name}` of trial {last.trial} is {value!r}, and not of {distributions[name]}.")
            values[name] = found[0]
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=float(last.outcome) if state == optuna.trial.TrialState.COMPLETE else None,
                params=values,
                distributions={name: distributions[name] for name in values},
                intermediate_values={
                    round(parts * float(record.fidelity)): float(record.outcome) for record in complete
                },
                user_attrs={_OURS + name: value for name, value in attributes.items()},
            )
        )
    return study


def _levels(fidelities: Iterable[float]) -> dict[float, float]:
    """Of each fidelity, the largest that it equals but for rounding."""
    levels, level = {}, math.inf
    for fidelity in sorted(set(fidelities), reverse=True):
        level = levels[fidelity] = level if math.isclose(fidelity, level, rel_tol=1e-6) else fidelity
    return levels


def _by_trial(records: Sequence[base.Record], levels: dict[float, float]) -> list[list[base.Record]]:
    """The records of each trial, in the order of the first ones.

    A number alone is no trial: every study, and every task's searcher, counts from 0.
    """
    trials: dict[tuple, list[base.Record]] = {}
    counts = collections.Counter()
    for record in records:
        what = sorted((name, type(value).__name__, repr(value)) for name, value in record.configuration.items())
        name = record.trial, record.seed, tuple(what)
        at = *name, levels[record.fidelity]
        trials.setdefault((*name, counts[at]), []).append(record)
        counts[at] += 1
    return list(trials.values())


def _parts(trials: Sequence[Sequence[base.Record]]) -> int:
    """How many steps the full budget has, so that no two fidelities of a trial have the same one, and none has 0."""
    parts = 1000
    while True:
        within = [(0.0, *sorted(float(record.fidelity) for record in several)) for several in trials]
        near = [(a, b) for of in within for a, b in itertools.pairwise(of) if round(parts * a) == round(parts * b)]
        if not near:
            return parts
        if parts == _FINEST:
            low, high = near[0]
            what = f"the fidelities {low!r} and {high!r}, within" if low else f"the fidelity {high!r}, less than"
            raise ValueError(
                f"A trial has {what} a billionth of the full budget: a study's steps are whole numbers, and such fine "
                "ones do not fit into what Optuna stores. Leave one record out."
            )
        parts *= 10


def from_optuna_study(study: Any, *, task: str | None = None) -> list[base.Record]:
    """The trials of an Optuna study of one objective as records, the last value of each.

    What `to_optuna_study` wrote comes back under its task, trial number, cost and seed.

    Args:
      study: Optuna's; where it maximizes, outcomes are the negative values.
      task: a name; by default that of `to_optuna_study`, or the study's.

    Returns:
      A record for each trial. A pruned one has its last intermediate value and, as Optuna does not know how many steps
      a whole trial has, that step's part of the largest step of the study as fidelity. Records of number 0 and seed 0
      are taken for trials without a number: to correct that trial in records of one's own, count them from 1, or give
      seeds; several without numbers and with one seed are corrections of one trial, and no repeats.

    Raises:
      ValueError: the study has several objectives.
    """
    if len(study.directions) > 1:
        raise ValueError("Records have one outcome; the study has several objectives.")
    sign = -1.0 if study.direction.name == "MAXIMIZE" else 1.0
    trials = study.get_trials()
    # Steps are counted from 0 or from 1: what the first one reported was seen after one.
    first = int(any(0 in trial.intermediate_values for trial in trials))
    steps = max((trial.last_step for trial in trials if trial.last_step is not None), default=0) + first
    records = []
    for trial in trials:
        outcome, fidelity = trial.value, 1.0
        if trial.state.name == "PRUNED" and trial.last_step is not None:
            outcome = trial.intermediate_values[trial.last_step]
            fidelity = (trial.last_step + first) / steps
        seconds = trial.duration.total_seconds() if trial.duration is not None else float("nan")
        ours = {name: trial.user_attrs[_OURS + name] for name in _KEPT if _OURS + name in trial.user_attrs}
        if task is not None:
            ours["task"] = task
        record = base.Record(
            task=study.study_name,
            configuration=dict(trial.params),
            outcome=float("nan") if outcome is None else sign * outcome,
            fidelity=fidelity,
            cost=seconds,
            status=trial.state.name,
            trial=trial.number,
        )
        records.append(record._replace(**ours))
    return records


def optuna_sampler(
    meta_optimizer: methods.MetaOptimizer,
    new_task: Any = None,
    *,
    acquisition: str = "ei",
    seed: int | None = None,
    independent_sampler: Any = None,
) -> Any:
    """What was learned from earlier tasks as a sampler of Optuna: the study, its storage and its dashboard stay.

    The first trial is what `meta_optimizer.predict` says; the following ones are those of its searcher, given all
    trials of the study, whoever made them. It obeys `study.enqueue_trial`, `directions`, pruners and `n_jobs`:

    - The parameters of `meta_optimizer.space` are drawn together, those whose conditions do not hold are left out. An
      objective asks for them as in `spaces.to_optuna`, or, what it need not, in one line: `spaces.suggest(trial,
      space)`. Where it asks for another range, scale or other labels (some may have been added since), it is given what
      was drawn where that is among them. What is not, and names that the space does not have, are drawn by
      `independent_sampler`.
    - Trials that still run, in any thread or process, count by what they may add (`batch_expected_improvement`).
    - A pruned trial counts with its last intermediate value, moved by the mean difference between that step and the end
      in the trials that have both; one that has none counts as failed. Steps of one trial that are the same to six
      digits (there are some beyond a million) are one, with the last value.
    - A trial that ends or fails before it has asked for all of its parameters counts with those that it would have been
      given, as far as this sampler has drawn them for it, else at their defaults; one that has asked for none does not
      count, however it ended. A conditional parameter that it asks for without its parent counts where
      the parent that was drawn makes it active.
    - Of a finite set (`candidates`), a trial that takes a label or number of its own instead of what was drawn counts
      as what it took: what was drawn is then untried, and may be drawn again. Ask for the labels and
      numbers of the set.
    - What a trial draws depends on `seed`, its number, and the trials that have ended, or run, when it begins (where an
      objective does not ask for all, on which of them this sampler has drawn, too). Each process of a distributed study
      makes a sampler of its own: this one is not pickled.

    Args:
      meta_optimizer: by `methods.train_meta_optimizer`; its records may come from earlier studies
        (`from_optuna_study`), its space from their trials (`spaces.from_optuna`).
      new_task: as for `meta_optimizer.predict`.
      acquisition: as for `meta_optimizer.searcher`.
      seed: of everything random; by default, a fresh one.
      independent_sampler: for parameters that the space does not have; by default `optuna.samplers.RandomSampler`.

    Returns:
      An `optuna.samplers.BaseSampler`, for studies of one objective.

    Raises:
      ValueError: the space has a simplex, which Optuna does not have, or `acquisition` is unknown; when a trial
        begins, the study has several objectives.
      ImportError: Optuna is not installed.

    >>> import optuna
    >>> from metaopt import base, integrations, methods, spaces
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> space = {"depth": spaces.integer(1, 4)}
    >>> earlier = [base.Record("earlier", {"depth": d}, (d - 3.0) ** 2) for d in (1, 2, 3, 4)]
    >>> g = methods.train_meta_searcher(earlier, space=space, num_steps=0)
    >>> study = optuna.create_study(sampler=integrations.optuna_sampler(g, seed=0))
    >>> study.optimize(lambda trial: abs(trial.suggest_int("depth", 1, 4) - 3.0), n_trials=1)
    >>> study.best_params
    {'depth': 3}
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError('This sampler needs Optuna; install it with `pip install "metaopt-jax[optuna]"`.') from error
    spaces.to_optuna(meta_optimizer.space)  # raises where it cannot
    searcher = meta_optimizer.searcher(new_task, acquisition=acquisition, first=())
    number = int.from_bytes(os.urandom(4)) if seed is None else seed
    key = jax.random.key(number % 2**32)
    independent = optuna.samplers.RandomSampler(number % 2**32) if independent_sampler is None else independent_sampler
    running_state, single = optuna.trial.TrialState.RUNNING, threading.Lock()
    # By storage and number of a study: Optuna may make an object of it for every trial.
    studies: Any = weakref.WeakKeyDictionary()

    def known_of(study) -> _KnownOfStudy:
        of_storage = studies.setdefault(study._storage, {})
        return of_storage.setdefault(study._study_id, _KnownOfStudy(searcher.init(key, None), set(), {}))

    def draw(study, number: int) -> dict[str, Any]:
        """The configuration of a trial, after all that has ended."""
        known = known_of(study)
        sign = -1.0 if study.direction.name == "MAXIMIZE" else 1.0
        # In one read: a trial that ends between two would be neither among those that ended nor among those that run.
        # And from the storage: with a pruner of brackets, `study.get_trials` has those of one bracket alone.
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        new = [trial for trial in trials if trial.state.is_finished() and trial.number not in known.heard]
        told = [record for trial in new for record in _as_told(trial, sign, known.drawn.get(trial.number, {}))]
        known.state = searcher.tell(known.state, told)
        known.heard |= {trial.number for trial in new}
        known.drawn = {other: drawn for other, drawn in known.drawn.items() if other not in known.heard}
        others = [trial for trial in trials if trial.state == running_state and trial.number != number]
        # What a trial was given holds until it says what it took: it may have been enqueued.
        took = [(trial.number, known.drawn.get(trial.number, {}) | trial.params) for trial in others]
        running = [base.Record("", c, trial=other, status="RUNNING") for other, c in took if c]
        (record,), _ = searcher.ask(searcher.tell(known.state, running)._replace(num_asked=number), 1)
        known.drawn[number] = record.configuration
        return record.configuration

    class MetaSampler(optuna.samplers.BaseSampler):
        """`integrations.optuna_sampler`."""

        def reseed_rng(self):
            independent.reseed_rng()  # ours is folded from a trial's number

        def infer_relative_search_space(self, study, trial):
            if len(study.directions) > 1:
                raise ValueError("This sampler is for studies of one objective; use another for several.")
            return {}  # a parameter is given when it is known how the objective asks for it

        def sample_relative(self, study, trial, search_space):
            with single:
                draw(study, trial.number)
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            with single:
                drawn = known_of(study).drawn.get(trial.number) or draw(study, trial.number)
            if param_name in drawn and (found := _fitting(drawn[param_name], param_distribution)):
                return found[0]
            return independent.sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study, trial):
            independent.before_trial(study, trial)

        def after_trial(self, study, trial, state, values):
            independent.after_trial(study, trial, state, values)

    return MetaSampler()


class _KnownOfStudy:
    """What a sampler remembers of a study: a searcher's state, the numbers of the trials that it has heard of, and what
    running trials were given before they ask for it, by number."""

    def __init__(self, state: Any, heard: set[int], drawn: dict[int, dict[str, Any]]):
        self.state, self.heard, self.drawn = state, heard, drawn


def _fitting(value: Any, distribution: Any) -> list[Any]:
    """[the value as a distribution has it], or [] where it does not have it. Float32 may lie next to a bound."""
    if hasattr(distribution, "choices"):
        return [choice for choice in distribution.choices if choice == value][:1]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    near = min(max(value, distribution.low), distribution.high)
    steps = 0.0 if distribution.step is None else (near - distribution.low) / distribution.step
    if not math.isclose(near, value, rel_tol=1e-6) or not math.isclose(steps, round(steps), abs_tol=1e-6):
        return []
    return [round(near) if type(distribution).__name__ == "IntDistribution" else float(near)]


def _as_told(trial, sign: float, drawn: dict[str, Any]) -> list[base.Record]:
    """A trial of Optuna as a searcher hears of it: its value, and those of its steps, each at a fidelity below 1.

    One that failed may not have asked yet for all that was drawn, and one that ended may never do so. Either is what
    was drawn: by what it asked for alone it would be another one, and the same would be drawn again and again.
    """
    if not trial.params:
        return []  # it asked for nothing: whatever came of it says nothing of any configuration
    record = base.Record("", drawn | trial.params, seed=1, trial=trial.number)  # trial 0 is numbered, too
    told = [
        record._replace(outcome=sign * value, fidelity=(step + 1) / 1e15)  # far below 1, to six digits
        for step, value in sorted(trial.intermediate_values.items())
        if step >= 0 and math.isfinite(value)
    ]
    if trial.state.name == "COMPLETE":
        seconds = trial.duration.total_seconds() if trial.duration is not None else math.nan
        told.append(record._replace(outcome=sign * trial.value, cost=seconds))
    elif trial.state.name == "FAIL" or not told:
        told = [record._replace(status="FAIL")]
    return told

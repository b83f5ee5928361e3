"""Optuna: records as its studies, for its dashboard and its plots, and back; and what was learned as its sampler."""

import math
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import jax

from metaopt import base, methods, spaces

_OURS = "metaopt:"  # before the names of user attributes: a person's own may be called "cost" or "seed", too
_KEPT = ("task", "trial", "cost", "seed", "reason", "fidelity")


def to_optuna_study(records: Sequence[base.Record], space: base.PyTree, **kwargs: Any) -> Any:
    """An Optuna study of the records of one task.

    Args:
      records: of one task; those of one trial at several fidelities become its intermediate values, at steps of
        thousandths of the full budget.
      space: that they come from.
      **kwargs: of `optuna.create_study`, such as `storage="sqlite:///study.db"`, for its dashboard, and `study_name`.

    Returns:
      A study whose trials have the records' parameters, values and states, and task, cost, seed, reason and metaopt's
      trial number as user attributes, "metaopt:trial" and so on. A trial that never reached the full budget is pruned.

    Raises:
      ValueError: the records are of several tasks, or a configuration does not fit the space.
      ImportError: Optuna is not installed.
    """
    import optuna

    if len(names := {record.task for record in records}) > 1:
        raise ValueError(f"An Optuna study is of one task; got records of {sorted(names)}.")
    distributions = spaces.to_optuna(space)
    study = optuna.create_study(**kwargs)
    trials: dict[int, list[base.Record]] = {}
    for record in records:
        trials.setdefault(record.trial, []).append(record)
    for several in trials.values():
        last = max(several, key=lambda record: record.fidelity)
        state = optuna.trial.TrialState.PRUNED
        if last.status != "COMPLETE" or last.fidelity == 1.0:
            state = optuna.trial.TrialState[last.status]
        complete = [record for record in several if record.outcome == record.outcome]
        attributes = {name: getattr(last, name) for name in _KEPT}
        values = {name: value for name, value in last.configuration.items() if name in distributions}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=last.outcome if state == optuna.trial.TrialState.COMPLETE else None,
                params=values,
                distributions={name: distributions[name] for name in values},
                intermediate_values={round(1000 * record.fidelity): record.outcome for record in complete},
                user_attrs={_OURS + name: value for name, value in attributes.items()},
            )
        )
    return study


def from_optuna_study(study: Any, *, task: str | None = None) -> list[base.Record]:
    """The trials of an Optuna study of one objective as records, the last value of each.

    What `to_optuna_study` wrote comes back under its task, trial number, cost and seed.

    Args:
      study: Optuna's; where it maximizes, outcomes are the negative values.
      task: a name; by default that of `to_optuna_study`, or the study's.

    Returns:
      A record for each trial. A pruned one has its last intermediate value and, as Optuna does not know how many steps
      a whole trial has, that step's part of the largest step of the study as fidelity.

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
      objective asks for them with the distributions of `spaces.to_optuna`, or, what it need not, in one line:
      `spaces.suggest(trial, space)`. Names, ranges and labels that the space does not have are drawn by
      `independent_sampler`.
    - Trials that still run, in any thread or process, count by what they may add (`batch_expected_improvement`).
    - A pruned trial counts with its last intermediate value, moved by the mean difference between that step and the end
      in the trials that have both.
    - What a trial draws depends on `seed`, its number, and the trials that have ended, or run, when it begins. Each
      process of a distributed study makes a sampler of its own: this one is not pickled.

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
    space = meta_optimizer.space
    distributions = spaces.to_optuna(space)
    searcher = meta_optimizer.searcher(new_task, acquisition=acquisition, first=())
    number = int.from_bytes(os.urandom(4)) if seed is None else seed
    key = jax.random.key(number % 2**32)
    independent = optuna.samplers.RandomSampler(number % 2**32) if independent_sampler is None else independent_sampler
    states, single = optuna.trial.TrialState, threading.Lock()
    heard: Any = weakref.WeakKeyDictionary()  # by study: a searcher's state, and the trials that it has heard of
    drawn: Any = weakref.WeakKeyDictionary()  # by study: what running trials were given, before they ask for it

    def hear(study) -> Any:
        """The searcher's state after all that has ended."""
        state, known = heard.get(study) or (searcher.init(key, None), set())
        sign = -1.0 if study.direction.name == "MAXIMIZE" else 1.0
        ended = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.FAIL))
        new = [trial for trial in ended if trial.number not in known]
        state = searcher.tell(state, [record for trial in new for record in _as_told(trial, sign)])
        heard[study] = state, known | {trial.number for trial in new}
        return state

    class MetaSampler(optuna.samplers.BaseSampler):
        """`integrations.optuna_sampler`."""

        def reseed_rng(self):
            independent.reseed_rng()  # ours is folded from a trial's number

        def infer_relative_search_space(self, study, trial):
            if len(study.directions) > 1:
                raise ValueError("This sampler is for studies of one objective; use another for several.")
            return dict(distributions)

        def sample_relative(self, study, trial, search_space):
            with single:
                state = hear(study)
                others = [
                    t for t in study.get_trials(deepcopy=False, states=(states.RUNNING,)) if t.number != trial.number
                ]
                mine = {t.number: drawn.get(study, {}).get(t.number, {}) for t in others}
                # What a trial was given holds until it says what it took: it may have been enqueued.
                running = [
                    base.Record("", {**mine[t.number], **t.params}, trial=t.number, status="RUNNING") for t in others
                ]
                running = [record for record in running if record.configuration]
                state = searcher.tell(state, running)._replace(num_asked=trial.number)
                (record,), _ = searcher.ask(state, 1)
                drawn[study] = {**mine, trial.number: record.configuration}
            return {name: value for name, value in record.configuration.items() if name in search_space}

        def sample_independent(self, study, trial, param_name, param_distribution):
            return independent.sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study, trial):
            independent.before_trial(study, trial)

        def after_trial(self, study, trial, state, values):
            independent.after_trial(study, trial, state, values)

    return MetaSampler()


def _as_told(trial, sign: float) -> list[base.Record]:
    """A trial of Optuna as a searcher hears of it: its value, and those of its steps, each at a fidelity below 1."""
    if trial.state.name == "FAIL" and not trial.params:
        return []  # it failed before it asked for anything: nothing is known of any configuration
    record = base.Record("", dict(trial.params), trial=trial.number)
    told = [
        record._replace(outcome=sign * value, fidelity=1 - 1 / (step + 2))
        for step, value in trial.intermediate_values.items()
        if step >= 0 and math.isfinite(value)
    ]
    if trial.state.name == "COMPLETE":
        seconds = trial.duration.total_seconds() if trial.duration is not None else math.nan
        told.append(record._replace(outcome=sign * trial.value, cost=seconds))
    elif trial.state.name == "FAIL" or not told:
        told = [record._replace(status="FAIL")]
    return told

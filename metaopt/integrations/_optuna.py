"""Records as Optuna's studies, for its dashboard and its plots, and studies as records."""

from collections.abc import Sequence
from typing import Any

from metaopt import base, spaces


def to_optuna_study(records: Sequence[base.Record], space: base.PyTree, **kwargs: Any) -> Any:
    """An Optuna study of the records of one task.

    Args:
      records: of one task; those of one trial at several fidelities become its intermediate values, at steps of
        thousandths of the full budget.
      space: that they come from.
      **kwargs: of `optuna.create_study`, such as `storage="sqlite:///study.db"`, for its dashboard, and `study_name`.

    Returns:
      A study whose trials have the records' parameters, values and states, and cost, seed, reason and metaopt's trial
      number as user attributes. A trial that never reached the full budget is pruned.

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
    for number, several in trials.items():
        last = max(several, key=lambda record: record.fidelity)
        state = optuna.trial.TrialState.PRUNED
        if last.status != "COMPLETE" or last.fidelity == 1.0:
            state = optuna.trial.TrialState[last.status]
        complete = [record for record in several if record.outcome == record.outcome]
        attributes = {"trial": number, "cost": last.cost, "seed": last.seed, "reason": last.reason}
        values = {name: value for name, value in last.configuration.items() if name in distributions}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=last.outcome if state == optuna.trial.TrialState.COMPLETE else None,
                params=values,
                distributions={name: distributions[name] for name in values},
                intermediate_values={round(1000 * record.fidelity): record.outcome for record in complete},
                user_attrs={"task": last.task, **attributes},
            )
        )
    return study


def from_optuna_study(study: Any, *, task: str | None = None) -> list[base.Record]:
    """The trials of an Optuna study of one objective as records, the last value of each.

    Args:
      study: Optuna's; where it maximizes, outcomes are the negative values.
      task: a name; by default, the study's.

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
        attributes = trial.user_attrs
        records.append(
            base.Record(
                task=study.study_name if task is None else task,
                configuration=dict(trial.params),
                outcome=float("nan") if outcome is None else sign * outcome,
                fidelity=fidelity,
                cost=attributes.get("cost", seconds),
                seed=attributes.get("seed", 0),
                status=trial.state.name,
                trial=trial.number,
                reason=attributes.get("reason", ""),
            )
        )
    return records

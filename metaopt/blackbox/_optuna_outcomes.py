"""Several outcomes of Optuna's trials: objectives, constraints, and outcomes at steps.

Optuna 4 and 5 store constraints in the system attributes of a trial: "constraints" is a list, and "constraints:NAME"
one number. They keep intermediate values only in studies with one objective. So metaopt stores several outcomes at a
step in a user attribute of the trial.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import base
from metaopt.blackbox._goals import Goals, make_goals, named_outcomes

OURS = "metaopt:"  # prefix of our user attributes, because users may have their own "cost" or "seed"
_AT_STEP = OURS + "outcomes at step "
CONSTRAINTS = "constraints"


def at_step(step: int) -> str:
    """The user attribute with the outcomes at a step."""
    return f"{_AT_STEP}{step}"


def values_at_steps(trial: Any) -> dict[int, list[float]]:
    """step -> the values of the objectives that a trial has reported at this step."""
    steps = {int(name.removeprefix(_AT_STEP)): v for name, v in trial.user_attrs.items() if name.startswith(_AT_STEP)}
    return {step: [value] for step, value in trial.intermediate_values.items()} | steps


def constraints_of(trial: Any) -> dict[str, float]:
    """The values of a trial's constraints by name; a value of at most 0 is feasible. Unnamed ones are "0", "1", ..."""
    values = {str(i): float(c) for i, c in enumerate(trial.system_attrs.get(CONSTRAINTS) or ())}
    named = {name.partition(":")[2]: c for name, c in trial.system_attrs.items() if name.startswith(CONSTRAINTS + ":")}
    return values | {name: float(c) for name, c in named.items()}


def signs_of(study: Any) -> list[float]:
    """−1 for each objective that the study maximizes, and 1 for the others."""
    return [-1.0 if direction.name == "MAXIMIZE" else 1.0 for direction in study.directions]


def goals_of(
    records: Sequence[base.Record], objectives: Sequence[str] | None, constraints: Mapping[str, float] | None
) -> Goals | None:
    """The goals of a study of records: by default, all outcomes by name that are no constraints are objectives."""
    named = next((record.outcomes for record in records if record.outcomes), None)
    if objectives is None and named is not None:
        objectives = [name for name in named if name not in (constraints or {})]
    return make_goals(objectives, constraints)


def values_and_attributes(records: Sequence[base.Record], goals: Goals, step_of: Callable) -> dict[str, Any]:
    """The outcomes of one trial, at several fidelities, as arguments of `optuna.trial.create_trial`.

    Args:
      records: of one trial; the one with the largest fidelity is its end.
      goals: the objectives and constraints of the study.
      step_of: fidelity -> step.

    Returns:
      "values", "user_attrs", "system_attrs" and "intermediate_values". The values are finite if the trial is complete.
    """
    last = max(records, key=lambda record: record.fidelity)
    outcomes = [named_outcomes(record, goals) for record in records]
    at_steps = {
        step_of(r.fidelity): [y[name] for name in goals.objectives] for r, y in zip(records, outcomes, strict=True)
    }
    named = named_outcomes(last, goals)
    excess = [named[name] - bound for name, bound in goals.constraints.items()]
    one = len(goals.objectives) == 1
    return {
        "values": [named[name] for name in goals.objectives],
        "intermediate_values": {step: y for step, (y,) in at_steps.items() if y == y} if one else {},
        "user_attrs": {} if one else {at_step(step): y for step, y in at_steps.items() if not np.isnan(y).all()},
        "system_attrs": {CONSTRAINTS: excess} if excess and not np.isnan(excess).any() else {},
    }


def outcomes_of(trial: Any, study: Any, values: Sequence[float] | None) -> dict[str, float] | None:
    """The outcomes by name of a trial, or None if the study has one objective and the trial no constraint.

    Args:
      trial: an ended trial.
      study: its study, whose objectives may have names.
      values: of the objectives, as Optuna has them; None if unknown.

    Returns:
      Objectives, minimized, and then "constraint NAME", which should be at most 0.
    """
    signs, constraints = signs_of(study), constraints_of(trial)
    if values is None or len(values) != len(signs) or (len(signs) == 1 and not constraints):
        return None
    names = study.metric_names or [str(i) for i in range(len(signs))]
    objectives = {name: sign * value for name, sign, value in zip(names, signs, values, strict=True)}
    return objectives | {f"constraint {name}": value for name, value in constraints.items()}

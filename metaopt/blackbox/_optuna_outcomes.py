"""Several outcomes of Optuna's trials: objectives, constraints, and outcomes at steps.

Optuna 4 and 5 store constraints in the system attributes of a trial: "constraints" is a list, and "constraints:NAME"
one number. They keep intermediate values only in studies with one objective. So metaopt stores several outcomes at a
step in a user attribute of the trial.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import _checks, base
from metaopt.blackbox._goals import Goals, make_goals, named_outcomes, ranks

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


def should_prune(
    trial: Any,
    values: Sequence[float],
    step: int,
    *,
    constraints: Sequence[float] = (),
    reduction_factor: int = 3,
) -> bool:
    """Returns whether a trial of an Optuna study with several objectives should end early, by asynchronous halving.

    Optuna's `trial.report` and `trial.should_prune` raise an error in a study of several objectives. This function
    stores the values in a user attribute of the trial, and compares them with those of all trials of the study at the
    same step. The trial should end if at least 1/η of these trials, and at least one, are on an earlier front. The
    first front has the trials that no other one dominates. The second has those that only trials of the first front
    dominate, and so on. A trial on the first front is never pruned. Trials that are infeasible at this step rank after
    all feasible ones, in the order of how much their constraints exceed 0.

    It works with any sampler and storage of Optuna, in several threads or processes. The study's own pruner is not
    used, and the trial has no value in Optuna's plots of intermediate values.

    Args:
      trial: Optuna's trial.
      values: the values of the objectives, in the order of the study's directions.
      step: the progress of the trial, such as its number of epochs; report at a few steps, such as 1, 3, 9 and 27.
      constraints: values of constraints at this step; at most 0 is feasible. Optuna's `trial.set_constraint` and
        `constraints_func` have the values at the end of the trial.
      reduction_factor: η, at least 2.

    Returns:
      Whether the objective should `raise optuna.TrialPruned()`.

    Raises:
      ValueError: if `values` does not have one value for each of the study's objectives, `step` is not an integer of at
        least 0, or `reduction_factor` is below 2.

    Source: Schmucker et al., Multi-objective asynchronous successive halving, 2021, https://arxiv.org/abs/2106.12639

    >>> import optuna
    >>> from metaopt import blackbox
    >>> study = optuna.create_study(directions=["minimize", "minimize"])
    >>> [
    ...     blackbox.should_prune(study.ask(), values, step=1)
    ...     for values in ([3.0, 1.0], [1.0, 3.0], [4.0, 2.0])
    ... ]
    [False, False, True]
    """
    _checks.check_integer("step", step, 0)
    _checks.check_integer("reduction_factor", reduction_factor, 2)
    signs = signs_of(trial.study)
    if len(values) != len(signs):
        raise ValueError(f"`values` must be one number for each of {len(signs)} objectives; got {values!r}.")
    trial.set_user_attr(at_step(step), [float(value) for value in (*values, *constraints)])
    at_this_step = [other.user_attrs.get(at_step(step)) for other in trial.study.get_trials(deepcopy=False)]
    own_values = [*map(float, values), *map(float, constraints)]
    others = [y for y in at_this_step if y is not None and len(y) == len(own_values)]
    all_values = np.array([own_values, *others])
    rank = ranks(all_values[:, : len(signs)] * signs, all_values[:, len(signs) :])
    if np.isnan(rank[0]):
        return True
    return int((rank[1:] < rank[0]).sum()) >= max(1, -(-len(others) // reduction_factor))


def constraints_of(trial: Any) -> dict[str, float]:
    """The values of a trial's constraints by name; a value of at most 0 is feasible. Unnamed ones are "0", "1", ..."""
    values = {str(i): float(c) for i, c in enumerate(trial.system_attrs.get(CONSTRAINTS) or ())}
    named = {name.partition(":")[2]: c for name, c in trial.system_attrs.items() if name.startswith(CONSTRAINTS + ":")}
    return values | {name: float(c) for name, c in named.items()}


def as_told_outcomes(trial: Any, signs: Sequence[float], goals: Goals) -> list[base.Record]:
    """Converts an Optuna trial to records without a configuration: those of its steps, and the one of its end.

    Raises:
      ValueError: if a complete trial has another number of constraints than the goals, or their names differ.
    """
    num = len(signs)
    record, levels = base.Record("", {}), []

    def to_record(values, excess):
        bounds = goals.constraints.values()
        first = [sign * float(value) for sign, value in zip(signs, values, strict=True)]
        outcomes = [*first, *(bound + value for bound, value in zip(bounds, excess, strict=True))]
        return record._replace(outcome=first[0], outcomes=dict(zip(goals.names, outcomes, strict=True)))

    unknown = [np.nan] * len(goals.constraints)
    for step, values in sorted(values_at_steps(trial).items()):
        excess = values[num:] if len(values) == num + len(unknown) else unknown
        fidelity = (step + 1) / 1e15  # far below 1, the full budget; compared to six digits
        levels.append(to_record(values[:num], excess)._replace(fidelity=fidelity))
    if trial.state.name == "PRUNED" and levels:
        return [*levels[:-1], levels[-1]._replace(status="PRUNED")]
    if trial.state.name != "COMPLETE":
        return [record._replace(status="FAIL")]
    constraints = constraints_of(trial)
    numbers = [str(i) for i in range(len(unknown))]
    if set(constraints) not in (set(goals.constraints), set(numbers)):
        raise ValueError(
            f"Trial {trial.number} has the constraints {sorted(constraints)}; the meta-optimizer was trained with "
            f"{sorted(goals.constraints)}. Give `optuna_sampler` a `constraints_func` that returns them in this order, "
            "as outcome minus bound, or use `trial.set_constraint` with these names."
        )
    order = goals.constraints if set(constraints) == set(goals.constraints) else numbers
    return [*levels, to_record(trial.values, [constraints[name] for name in order])]


def signs_of(study: Any) -> list[float]:
    """−1 for each objective that the study maximizes, and 1 for the others."""
    return [-1.0 if direction.name == "MAXIMIZE" else 1.0 for direction in study.directions]


def goals_of(
    records: Sequence[base.Record], objectives: Sequence[str] | None, constraints: Mapping[str, float] | None
) -> Goals | None:
    """The goals of a study of records: by default, all outcomes by name that are not constraints are objectives."""
    named = next((record.outcomes for record in records if record.outcomes), None)
    if objectives is None and named is not None:
        objectives = [name for name in named if name not in (constraints or {})]
    return make_goals(objectives, constraints)


def values_and_attributes(records: Sequence[base.Record], goals: Goals, step_of: Callable) -> dict[str, Any]:
    """The outcomes of one trial, at several fidelities, as arguments of `optuna.trial.create_trial`.

    Args:
      records: the records of one trial; the one with the largest fidelity is its end.
      goals: the objectives and constraints of the study.
      step_of: fidelity -> step.

    Returns:
      "values", "user_attrs", "system_attrs" and "intermediate_values". A value is NaN if the outcome is not known.
    """
    last = max(records, key=lambda record: record.fidelity)
    outcomes = [named_outcomes(record, goals.names) for record in records]
    at_steps = {
        step_of(r.fidelity): [y[name] for name in goals.objectives] for r, y in zip(records, outcomes, strict=True)
    }
    named = named_outcomes(last, goals.names)
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
      values: the values of the objectives, as Optuna has them; None if unknown.

    Returns:
      Objectives, minimized, and then "constraint NAME", which should be at most 0.
    """
    signs, constraints = signs_of(study), constraints_of(trial)
    if values is None or len(values) < len(signs) or (len(signs) == 1 and not constraints):
        return None
    values = values[: len(signs)]  # `should_prune` also stores constraints
    names = study.metric_names or [str(i) for i in range(len(signs))]
    objectives = {name: sign * value for name, sign, value in zip(names, signs, values, strict=True)}
    return objectives | {f"constraint {name}": value for name, value in constraints.items()}

"""Converts the records of earlier tasks to the arrays that a surrogate learns from."""

import collections
import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from metaopt import _checks, base, spaces
from metaopt.blackbox import _fidelities, _frames, _surrogates


def as_records(records: Any, name: str = "records") -> list[base.Record]:
    """Returns records from a list, a generator or a data frame; raises `ValueError` for the first invalid record."""
    records = _frames.records_from_frame(records) if hasattr(records, "columns") else list(records)
    for i, record in enumerate(records):
        _checks.check_record(record, f"`{name}[{i}]`")
    return records


def candidate_key(configuration: Mapping[str, Any]) -> tuple:
    """A configuration as a key of a dict."""
    return tuple(sorted(configuration.items()))


def full_loss(record: base.Record) -> float | None:
    """A trial's outcome at the full budget: NaN if it failed or has no finite outcome, None if it is not known."""
    if record.status == "COMPLETE" and _fidelities.is_full_budget(record.fidelity):
        return float(record.outcome) if np.isfinite(record.outcome) else np.nan
    return np.nan if record.status == "FAIL" else None


def partial_fidelity(record: base.Record) -> float:
    """The fidelity of an outcome below the full budget; 0 if the record has none."""
    ended = record.status in ("COMPLETE", "PRUNED") and np.isfinite(record.outcome)
    return record.fidelity if ended and full_loss(record) is None else 0.0


def inferred_space(records: list[base.Record], candidates: Any) -> base.PyTree:
    """Infers the space of the records' configurations and the candidates; a warning states the space."""
    # The records of a table's tasks share a few configuration dicts. We process each dict only once.
    record_configurations = list({id(record.configuration): record.configuration for record in records}.values())
    all_configurations = [*record_configurations, *(candidates or ())]
    space = spaces.infer(all_configurations)
    distinct = {repr(sorted(c.items())): c for c in map(without_nan, all_configurations)}
    text = ",\n  ".join(f"{name!r}: {_as_code(leaf)}" for name, leaf in space.items())
    evidence = "".join(_evidence(name, leaf, list(distinct.values())) for name, leaf in space.items() if leaf.condition)
    warnings.warn(
        f"`space` is not given, so it was inferred from the records' configurations:\n  {text}.\nPass `space` with "
        f"your own ranges, defaults and conditions.{_gaps(space, record_configurations)}{evidence}",
        stacklevel=3,
    )
    return space


def _gaps(space: Mapping[str, Any], configurations: Sequence[Mapping[str, Any]]) -> str:
    """States how many configurations lack a parameter that is always active, so that its default is used; or ""."""
    default, counts = spaces.configuration(space, spaces.default(space)), []
    for name, leaf in space.items():
        nones = sum(stands_for_nothing(leaf, c, name) for c in configurations)
        num_known = sum(name in c and c[name] == c[name] for c in configurations)  # NaN is a gap of a data frame
        lacking = nones + len(configurations) - num_known
        if lacking and not leaf.condition:
            verb = "lacks" if lacking == 1 else "lack"
            none = f"{nones} {'has' if nones == 1 else 'have'} None; " * bool(nones)
            counts.append(f"{lacking} {verb} `{name}` ({none}its default {default[name]!r} is used)")
    return f" Of {len(configurations)} configurations, {'; '.join(counts)}." * bool(counts)


def without_nan(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without NaN values, with which data frames fill missing values."""
    return {name: value for name, value in configuration.items() if value == value}


def stands_for_nothing(leaf: spaces.Leaf, configuration: Mapping[str, Any], name: str) -> bool:
    """Whether the configuration has None where the space has a number, so that the default is used."""
    return configuration.get(name, name) is None and None not in _labels(leaf)


def _evidence(name: str, leaf: spaces.Leaf, different: list[dict[str, Any]]) -> str:
    """States how many configurations support a condition of `spaces.infer`; they are distinct and without gaps."""
    ((parent, values),) = leaf.condition
    having = sum(parent in c and name in c and not stands_for_nothing(leaf, c, name) for c in different)
    return (
        f" `{name}` was taken as active only if `{parent}` is {' or '.join(map(repr, values))}: {having} different "
        f"configurations have both parameters, and {sum(parent in c for c in different) - having} have `{parent}` "
        f"without `{name}`."
    )


def _labels(leaf: spaces.Leaf) -> tuple:
    return getattr(leaf, "labels", ())


def _as_code(leaf: spaces.Leaf) -> str:
    """The code that constructs a leaf of `spaces.infer`."""
    for parent, values in leaf.condition:
        return f"active_if({_as_code(dataclasses.replace(leaf, condition=()))}, {parent!r}, {list(values)})"
    if isinstance(leaf, (spaces.Integer, spaces.Interval)):
        return f"{leaf.kind}({leaf.low}, {leaf.high}{', log=True' if leaf.log else ''})"
    return f"choice({list(_labels(leaf))})" if _labels(leaf) else f"fixed({leaf.default_value()})"


def warn_of_foreign(space: base.PyTree, records: list[base.Record]) -> None:
    """Warns how many records have values that the space does not have."""
    # The records of a table's tasks share a few configuration dicts. We process each dict only once.
    shared = {id(record.configuration): record.configuration for record in records}
    foreign = {number: spaces.foreign(space, configuration) for number, configuration in shared.items()}
    foreign_values = [foreign[id(record.configuration)] for record in records]
    if num := sum(map(bool, foreign_values)):
        counts = collections.Counter(name for values in foreign_values for name in values)
        names = [name for name, _ in counts.most_common(3)]
        example = {name: next(values[name] for values in foreign_values if name in values) for name in names}
        examples = ", ".join(f"`{name}` in {counts[name]}, such as {value!r}" for name, value in example.items())
        warnings.warn(
            f"{num} of {len(foreign_values)} records have values that the space does not have ({examples}). An "
            "unknown label counts as equally near to all labels, a number outside the bounds as the nearest bound, and "
            "a string or boolean instead of a number as the default. If that is wrong, remove these records "
            "(`spaces.foreign` finds them), or widen the space.",
            stacklevel=3,
        )


def by_task(
    records: list[base.Record], encode, name: str = "records"
) -> tuple[list[str], list[_surrogates.TaskTrials]]:
    """Returns the names and the trials of the tasks whose outcomes differ; y is NaN if a trial failed.

    Raises:
      ValueError: if no record has an outcome at the full budget, or if no task has different outcomes.
    """
    pairs_of: dict[str, list[tuple[np.ndarray, float]]] = {}
    partial: dict[str, float] = {}  # task -> the largest fidelity with an outcome that is not at the full budget
    for record in records:
        if (y := full_loss(record)) is not None:
            pairs_of.setdefault(record.task, []).append((encode(record.configuration), y))
        elif fidelity := partial_fidelity(record):
            partial[record.task] = max(partial.get(record.task, 0.0), fidelity)
    pairs_of = {name: pairs for name, pairs in pairs_of.items() if np.isfinite([y for _, y in pairs]).any()}
    if not pairs_of:
        counts = collections.Counter(record.status for record in records)
        summary = ", ".join(f"{num} {status}" for status, num in counts.items())
        if partial:
            summary += f"; the largest fidelity with an outcome is {max(partial.values()):g}"
        raise ValueError(
            f'`{name}` must contain trials that are "COMPLETE" at fidelity 1, with an outcome; it has none '
            f"({summary or 'no record at all'})."
        )
    if tasks_without_outcome := [name for name in partial if name not in pairs_of]:
        warnings.warn(
            f"{len(tasks_without_outcome)} of {len({record.task for record in records})} tasks are ignored, "
            f"{first_names(tasks_without_outcome)}: they have no outcome of a complete trial at fidelity 1, the "
            "full budget. Give your largest budget the fidelity 1, or learn from whole curves "
            "(`train_curve_searcher`).",
            stacklevel=3,
        )
    # A failure and a success also count as different outcomes.
    pairs_of = {
        name: pairs for name, pairs in pairs_of.items() if len({y if np.isfinite(y) else None for _, y in pairs}) > 1
    }
    if not pairs_of:
        raise ValueError(
            f"`{name}` must contain a task with trials of different outcomes. Every task has only one trial, or the "
            "same outcome for all trials, so no configuration is known to be better."
        )
    return list(pairs_of), _stacked(pairs_of)


def features_by_task(names: list[str], features: Mapping[str, Any] | None) -> np.ndarray | None:
    """[T, F] features of tasks, NaN if unknown, or None without `features`.

    Warns if some tasks lack features and some features match no task: they may belong together under different names.

    Raises:
      ValueError: if `features` has none of the tasks, or has different lengths.
    """
    if features is None:
        return None
    check_task_names("features", features, names)
    lacking, others = [n for n in names if n not in features], [n for n in features if n not in names]
    if lacking and others:
        warnings.warn(
            f"`features` lacks {len(lacking)} of {len(names)} tasks, {first_names(lacking)}, "
            f"and has {len(others)} that are not in the records, {first_names(others)}. If these are the same tasks, "
            "use the records' names; otherwise remove the features of unknown tasks.",
            stacklevel=3,
        )
    rows = {name: np.asarray(features[name], float).ravel() for name in names if name in features}
    unknown = np.full_like(next(iter(rows.values())), np.nan)
    return np.stack([rows.get(name, unknown) for name in names])


def costs_by_task(records: list[base.Record], encode) -> list[_surrogates.TaskTrials]:
    """The logarithms of trials' costs at the full budget, for tasks in which costs differ.

    Raises:
      ValueError: if costs differ in none of the tasks.
    """
    pairs_of: dict[str, list[tuple[np.ndarray, float]]] = {}
    for record in records:
        # A trial that failed early was not cheap: the cost of the full trial is unknown.
        if record.status == "COMPLETE" and _fidelities.is_full_budget(record.fidelity) and 0 < record.cost < np.inf:
            pairs_of.setdefault(record.task, []).append((encode(record.configuration), np.log(record.cost)))
    pairs_of = {name: pairs for name, pairs in pairs_of.items() if len({y for _, y in pairs}) > 1}
    if not pairs_of:
        raise ValueError(
            "`costs=True` needs records with a `cost` in seconds, and at least one task whose costs differ."
        )
    return _stacked(pairs_of)


def _stacked(pairs_of) -> list[_surrogates.TaskTrials]:
    columns = [zip(*pairs, strict=True) for pairs in pairs_of.values()]
    return [_surrogates.TaskTrials(np.stack(x), np.array(y)) for x, y in columns]


def first_names(names) -> str:
    """The first few names, to show a mismatch in a message."""
    names = list(names)
    return ", ".join(repr(name) for name in names[:3]) + (" ..." if len(names) > 3 else "") if names else "none"


def check_task_names(argument: str, entries: Collection[str], names: Sequence[str]) -> None:
    """Raises ValueError if no task of the records, whose names are `names`, has an entry in the argument."""
    if not any(name in entries for name in names):
        raise ValueError(
            f"`{argument}` has none of the records' tasks, {first_names(names)}; its keys are {first_names(entries)}."
        )

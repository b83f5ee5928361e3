"""Trials as one array, and trials in the formats of HPO-B and OpenML.

Outcomes are losses: 1 − accuracy if a format has accuracies.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _files, spaces
from metaopt.base import PyTree, Record
from metaopt.blackbox._fidelities import is_full_budget
from metaopt.blackbox._frames import as_pandas
from metaopt.blackbox._records import as_python


class TrialTable(NamedTuple):
    """C configurations on T tasks at F fidelities.

    Attributes:
      tasks: T names.
      configurations: C plain configurations.
      outcomes: [T, C, F] float; NaN if missing.
      costs: [T, C, F] seconds; NaN if the cost is not known.
      fidelities: [F] in (0, 1], ascending.
      families: T names, shared by near-duplicates and parts of one source. For an evaluation, leave out whole families.
    """

    tasks: tuple[str, ...]
    configurations: tuple[dict[str, Any], ...]
    outcomes: np.ndarray
    costs: np.ndarray
    fidelities: np.ndarray
    families: tuple[str, ...]

    def records(self) -> list[Record]:
        """Converts the entries to records; the number of a trial is the number of its configuration.

        Returns:
          A record for every finite outcome, task by task.
        """
        records = []
        for t, c, f in np.argwhere(np.isfinite(self.outcomes)):
            outcome, cost, fidelity = (
                float(self.outcomes[t, c, f]),
                float(self.costs[t, c, f]),
                float(self.fidelities[f]),
            )
            records.append(Record(self.tasks[t], self.configurations[c], outcome, fidelity, cost, trial=int(c)))
        return records


def tabulate(records: Sequence[Record], *, families: Mapping[str, str] | None = None) -> TrialTable:
    """Converts records to a table: one row per task, one column per configuration; the mean over seeds.

    Args:
      records: only "COMPLETE" records with finite outcomes give outcomes. All others only add their task, configuration
        and fidelity. (The outcome of a pruned trial is not used, because the trial reached it somewhere below its
        fidelity.)
      families: the family of each task, by name; by default, each task is its own family.

    Returns:
      A table of the records' tasks and configurations, in the order in which they first occur; fidelities ascend.
      Fidelities that differ only by rounding, up to a relative millionth, are merged. A fidelity that lacks at most a
      millionth of the full budget counts as 1.

    >>> from metaopt import blackbox
    >>> from metaopt.base import Record
    >>> records = [
    ...     Record("a", {"x": 1}, 0.5),
    ...     Record("a", {"x": 2}, 0.25),
    ...     Record("b", {"x": 2}, 0.75),
    ... ]
    >>> table = blackbox.tabulate(records)
    >>> table.configurations, table.outcomes[:, :, 0].tolist()
    (({'x': 1}, {'x': 2}), [[0.5, 0.25], [nan, 0.75]])
    """
    keys = [json.dumps(record.configuration, sort_keys=True, default=as_python) for record in records]
    names, columns = _positions(record.task for record in records), _positions(keys)
    fidelities, at_fidelity = [], {}
    for fidelity in sorted({record.fidelity for record in records}):
        near = 1.0 if is_full_budget(fidelity) else fidelity
        if not fidelities or not math.isclose(near, fidelities[-1], rel_tol=1e-6):
            fidelities.append(near)
        at_fidelity[fidelity] = len(fidelities) - 1
    sums = np.zeros((3, len(names), len(columns), len(fidelities)))
    for key, record in zip(keys, records, strict=True):
        if record.status == "COMPLETE" and math.isfinite(record.outcome):
            entry = names[record.task], columns[key], at_fidelity[record.fidelity]
            sums[:, *entry] += record.outcome, record.cost, 1
    with np.errstate(invalid="ignore"):
        outcomes, costs = sums[:2] / sums[2]
    family = {} if families is None else families
    return TrialTable(
        tuple(names),
        tuple(json.loads(key) for key in columns),
        outcomes,
        costs,
        np.array(fidelities),
        tuple(family.get(name, name) for name in names),
    )


def from_hpob(file: str | os.PathLike[str], search_space: str) -> list[Record]:
    """Reads the trials of one search space of HPO-B, from its JSON (`meta-train-dataset.json` and so on).

    Args:
      file: the JSON: {search space: {data set: {"X": [[...]], "y": [[accuracy]]}}}, X in [0, 1].
      search_space: its number, such as "5860".

    Returns:
      A record for each row, in that order. The task is the number of the data set, the configuration is {"x0": ...,
      "x1": ...}, and the outcome is 1 − accuracy.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file has no such search space, or is not a file of HPO-B.

    Source: Pineda Arango et al., NeurIPS 2021, https://arxiv.org/abs/2106.06257
    """
    fault = "is not a file of HPO-B"
    with _files.reading(file, fault):
        content = _files.read_json(file)
        names = ", ".join(content)
    if search_space not in content:
        raise ValueError(f"{file} has no search space {search_space!r}; it has {names}.")
    with _files.reading(file, fault):
        return [
            Record(name, {f"x{i}": _real(value) for i, value in enumerate(x)}, 1.0 - _real(np.ravel(y)[0]), trial=trial)
            for name, rows in content[search_space].items()
            for trial, (x, y) in enumerate(zip(rows["X"], rows["y"], strict=True))
        ]


def to_hpob(
    file: str | os.PathLike[str], search_space: str, records: Sequence[Record], *, space: PyTree | None = None
) -> None:
    """Writes trials as HPO-B's JSON, for programs that read it; other search spaces in the file stay.

    Args:
      file: the JSON, created if it does not exist.
      search_space: its name in the file; its old content is replaced.
      records: only "COMPLETE" records at the full budget with finite outcomes are written, because HPO-B has no place
        for others. Outcomes are errors: y is 1 − outcome.
      space: the space of the configurations; X is their encoding (`spaces.encode`). By default, X has the parameters
        themselves, which must be numbers in [0, 1], in the order of the first configuration. `from_hpob` returns such
        records.

    Raises:
      ValueError: if no record is "COMPLETE" at the full budget.
      ValueError: without a `space`, if a configuration has other parameters than the first one, or values that are
        not numbers in [0, 1].
    """
    ended = [r for r in records if r.status == "COMPLETE" and is_full_budget(r.fidelity) and math.isfinite(r.outcome)]
    if not ended:
        raise ValueError('`records` must contain a trial that is "COMPLETE" at fidelity 1; it has none.')
    encoded = jax.jit(lambda hyperparams: spaces.encode(space, hyperparams))
    names, rows = list(ended[0].configuration), {}
    for record in ended:
        configuration = record.configuration
        if space is not None:
            x = np.asarray(encoded(spaces.from_configuration(space, configuration))).tolist()
        elif set(configuration) == set(names) and all(_is_fraction(configuration[name]) for name in names):
            x = [float(configuration[name]) for name in names]
        else:
            raise ValueError(
                f"HPO-B has numbers in [0, 1] for {names}; got {configuration}. Give the configurations' `space`."
            )
        trials = rows.setdefault(record.task, {"X": [], "y": []})
        trials["X"].append(x)
        trials["y"].append([1.0 - float(record.outcome)])
    content = {}
    if Path(file).is_file():
        with _files.reading(file, "is not a file of HPO-B"):
            content = dict(_files.read_json(file))
    with _files.replacing(file) as stream:
        stream.write(json.dumps(content | {search_space: rows}, allow_nan=False).encode())


def _real(value):
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueError(f"X and y must be numbers; got {value!r}")
    return value.item() if isinstance(value, np.number) else value


def _is_fraction(value) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(0 <= value <= 1)


def from_openml_evaluations(rows: Sequence[Mapping[str, Any]], *, higher_is_better: bool | None = None) -> list[Record]:
    """Converts OpenML's runs, as openml-python lists them, to records.

    Args:
      rows: `openml.evaluations.list_evaluations_setups(...)`, the data frame or its `to_dict("records")`. Each row has
        "data_name" (or "task_id"), "run_id", "value", and "parameters", whose values are JSON. "data_id" distinguishes
        data sets of the same name.
      higher_is_better: whether larger values are better. By default, values are measures such as accuracy, which are at
        most 1 and better if larger. Then values above 1 are rejected, and also rows whose "function" is an error, a
        cost or a time.

    Returns:
      A record per row. The task is the name of the data set. If rows have several data sets of that name, the task
      includes their number, as "iris (61)" and "iris (969)". Parameter names lose the name of their flow if the result
      is not ambiguous: `sklearn.svm.classes.SVC(16)_gamma` becomes `gamma`. The outcome is 1 − value, or the value
      itself if `higher_is_better` is False. Parameters whose values are not plain data are left out. A run without a
      value has status "FAIL".

    Raises:
      ValueError: if a value is not a number.
      ValueError: without `higher_is_better`, if a value is above 1 or an error.
      ValueError: if rows are of several functions, which are not comparable.
    """
    if hasattr(rows, "columns"):
        rows = as_pandas(rows).to_dict("records")
    if len(functions := {row["function"] for row in rows if isinstance(row.get("function"), str)}) > 1:
        raise ValueError(f"All rows must have values of one function; got {sorted(functions)}.")
    losses = [name for name in functions if _LOSS.search(name)]
    if losses and higher_is_better is None:
        raise ValueError(
            f"The values are of {losses[0]!r}, for which smaller is better. Pass `higher_is_better=False` to use "
            "them as outcomes."
        )
    versions: dict[str, set[int]] = {}  # each upload is a different data set, even with the same name
    for row in rows:
        if "data_name" in row and _is_given(row.get("data_id")):
            versions.setdefault(str(row["data_name"]), set()).add(int(row["data_id"]))
    records = []
    for row in rows:
        parameters = dict(row["parameters"] or {})
        short = {name: name.rpartition(")_")[2] for name in parameters}
        ambiguous = {name for name in short.values() if list(short.values()).count(name) > 1}
        configuration = {}
        for name, text in parameters.items():
            value = _parsed(text)
            if (
                value is None
                or isinstance(value, (bool, int, str))
                or isinstance(value, float)
                and math.isfinite(value)
            ):
                configuration[name if short[name] in ambiguous else short[name]] = value
        task = str(row["data_name"] if "data_name" in row else row["task_id"])
        if len(versions.get(task, ())) > 1 and _is_given(row.get("data_id")):
            task += f" ({int(row['data_id'])})"
        record = Record(task, configuration, trial=int(row["run_id"]))
        value = math.nan if row["value"] is None else float(row["value"])
        if value > 1 and higher_is_better is None:
            raise ValueError(
                f"Run {record.trial} has the value {value:g}. By default, values must be at most 1, and larger is "
                "better. Pass `higher_is_better=True` or `False`."
            )
        if math.isnan(value):
            records.append(record._replace(status="FAIL", reason="OpenML lists no value for this run"))
        else:
            records.append(record._replace(outcome=value if higher_is_better is False else 1.0 - value))
    return records


def to_openml_evaluations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Converts trials to rows like those of OpenML's runs, which `from_openml_evaluations` reads.

    `pandas.DataFrame(rows)` has the form that openml-python lists.

    Args:
      records: only "COMPLETE" records at the full budget with finite outcomes are used, because OpenML lists no others.
        Outcomes are errors.

    Returns:
      A row per record. "run_id" is the number of the trial, "data_name" the task, and "value" 1 − outcome. "parameters"
      has values as JSON under the names of the configuration, without a flow.
    """
    return [
        {
            "run_id": record.trial,
            "data_name": record.task,
            "value": 1.0 - record.outcome,
            "parameters": {n: json.dumps(value, default=as_python) for n, value in record.configuration.items()},
        }
        for record in records
        if record.status == "COMPLETE" and is_full_budget(record.fidelity) and math.isfinite(record.outcome)
    ]


# Parts of the names of OpenML's measures for which smaller values are better.
_LOSS = re.compile("error|loss|cost|time|hours|memory|brier|devia|variance|bias")


def _positions(values) -> dict[str, int]:
    """Returns the position of each value among the different ones, in the order in which they first occur."""
    return {value: index for index, value in enumerate(dict.fromkeys(values))}


def _is_given(value) -> bool:
    """Returns whether a value is neither None nor NaN; data frames fill gaps with these."""
    return value is not None and value == value


def _parsed(text):
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text

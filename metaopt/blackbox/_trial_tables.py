"""Trials as one array: many configurations on many tasks, and readers of published tables of trials.

The readers take the folder that METAOPT_DATA names. Outcomes are losses: 1 − accuracy if a table has accuracies.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
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
      families: T names, shared by near-duplicates and parts of one source; leave out whole families.
    """

    tasks: tuple[str, ...]
    configurations: tuple[dict[str, Any], ...]
    outcomes: np.ndarray
    costs: np.ndarray
    fidelities: np.ndarray
    families: tuple[str, ...]


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

    >>> from metaopt import Record, blackbox
    >>> table = blackbox.tabulate([Record("a", {"x": 1}, 0.5), Record("a", {"x": 2}, 0.25), Record("b", {"x": 2}, 0.75)])
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
            at = names[record.task], columns[key], at_fidelity[record.fidelity]
            sums[:, *at] += record.outcome, record.cost, 1
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


def table_records(table: TrialTable) -> list[Record]:
    """Converts the entries of a table to records; the number of a trial is the number of its configuration.

    Args:
      table: a table.

    Returns:
      A record for every finite outcome, task by task.
    """
    records = []
    for t, c, f in np.argwhere(np.isfinite(table.outcomes)):
        outcome, cost, fidelity = (
            float(table.outcomes[t, c, f]),
            float(table.costs[t, c, f]),
            float(table.fidelities[f]),
        )
        records.append(Record(table.tasks[t], table.configurations[c], outcome, fidelity, cost, trial=int(c)))
    return records


def from_pmlb_results(
    path: str | os.PathLike[str] | None = None, *, algorithms: Sequence[str] = ("RandomForestClassifier",)
) -> TrialTable:
    """scikit-learn's classifiers on 164 tables of PMLB: 1 − balanced accuracy.

    Random forests have all of their 56 configurations on 163 tables.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.
      algorithms: some of "RandomForestClassifier", "DecisionTreeClassifier", "GradientBoostingClassifier",
        "KNeighborsClassifier", "LogisticRegression", "SVC". If there are several, each configuration names its
        algorithm.

    Returns:
      A table with one fidelity.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
      ValueError: if an algorithm is unknown, or a file is damaged.
      ImportError: if pandas is not installed.

    Source: EpistasisLab, https://github.com/EpistasisLab/Aliro (GPL-3.0).
    """
    import pandas as pd

    file = _file(path, "pmlb_sklearn_results.parquet")
    with _files.reading(file, "is not this table of the data folder"):
        frame: Any = pd.read_parquet(file)
        frame = frame[frame["file"] == "kb_r6"]
        known = set(frame["algorithm"].astype(str))
    if unknown := set(algorithms) - known:
        raise ValueError(f"`algorithms` must be of {sorted(known)}; got {sorted(unknown)}.")
    families = _pmlb_families(_file(path, "pmlb_metafeatures.csv.gz"))
    with _files.reading(file, "is not this table of the data folder"):
        frame = frame[frame["algorithm"].isin(algorithms)]
        parameters = [column for column in frame.columns if column.startswith("hp_")]
        keys = frame["algorithm"].astype(str) + " " + frame["config_id"].astype(str)
        configurations = {}
        for key, row in zip(keys, frame[["algorithm", *parameters]].to_dict("records"), strict=True):
            if key not in configurations:
                values = {name[3:]: _plain(row[name]) for name in parameters if not pd.isna(row[name])}
                configurations[key] = values if len(algorithms) == 1 else {"algorithm": row["algorithm"], **values}
        names, columns = sorted(set(frame["dataset"].astype(str))), _positions(configurations)
        outcomes = np.full((len(names), len(columns), 1), np.nan)
        rows = [names.index(name) for name in frame["dataset"]]
        outcomes[rows, [columns[key] for key in keys], 0] = 1 - frame["bal_accuracy"]
        return _checked(
            tuple(names),
            tuple(configurations.values()),
            outcomes,
            np.full(outcomes.shape, np.nan),
            np.ones(1),
            tuple(families.get(name, name) for name in names),
        )


def _pmlb_families(file: Path) -> dict[str, str]:
    with _files.reading(file, "is not this table of the data folder"):
        lines = io.StringIO(_files.read_compressed(file).decode(), newline="")
        return {str(row["dataset"]): str(row["family"]) for row in csv.DictReader(lines)}


def from_oboe(path: str | os.PathLike[str] | None = None) -> TrialTable:
    """OBOE: 219 scikit-learn classifiers on 418 tables of OpenML, balanced error and seconds.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      A table with one fidelity; a configuration has its "algorithm".

    Raises:
      FileNotFoundError: if the folder or a file does not exist.

    Source: Yang et al., KDD 2019, https://arxiv.org/abs/1808.03233 (BSD-3-Clause).
    """
    with _open(path, "oboe_error_matrix.npz") as data:
        configs = [_files.parse_json(str(config)) for config in data["configs"]]
        return _checked(
            tuple(data["openml_id"].tolist()),
            tuple({"algorithm": config["algorithm"], **config["hyperparameters"]} for config in configs),
            data["error"][..., None].astype(np.float64),
            data["runtime"][..., None].astype(np.float64),
            np.ones(1),
            tuple(data["family"].tolist()),
        )


def from_taskset(path: str | os.PathLike[str] | None = None, *, split: str = "valid") -> TrialTable:
    """TaskSet: the losses of 12 text RNNs over training, by 1,000 configurations of Adam; NaN after divergence.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.
      split: "valid" or "test".

    Returns:
      A table with 50 fidelities, which are fractions of the training steps; the loss before training is left out. A
      configuration has eight parameters of the optimizer.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
      ValueError: if `split` is neither "valid" nor "test".

    Source: Metz et al., 2020, https://arxiv.org/abs/2002.11887 (Apache-2.0).
    """
    if split not in ("valid", "test"):
        raise ValueError(f'`split` must be "valid" or "test"; got {split!r}.')
    with _open(path, "taskset_rnn_curves.npz") as data:
        outcomes = data["curves"][:, :, data["splits"].tolist().index(split), 1:].astype(np.float64)
        names, parameters = tuple(data["tasks"].tolist()), data["hp_names"].tolist()
        configurations = tuple(dict(zip(parameters, row, strict=True)) for row in data["hp"].tolist())
        fidelities = np.arange(1, outcomes.shape[-1] + 1) / outcomes.shape[-1]
        return _checked(names, configurations, outcomes, np.full(outcomes.shape, np.nan), fidelities, names)


def from_lcdb(path: str | os.PathLike[str] | None = None, *, split: str = "valid") -> TrialTable:
    """LCDB: 20 learners with default parameters on 248 tables of OpenML, 1 − accuracy over the training set's size.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.
      split: "valid" or "test".

    Returns:
      A table with 28 fidelities, which are sizes as fractions of the largest one. Small tables do not reach the largest
      sizes and have NaN there. A configuration is the "learner".

    Raises:
      FileNotFoundError: if the folder or a file does not exist.
      ValueError: if `split` is neither "valid" nor "test".

    Source: Mohr et al., ECML 2022, https://github.com/fmohr/lcdb (MIT).
    """
    if split not in ("valid", "test"):
        raise ValueError(f'`split` must be "valid" or "test"; got {split!r}.')
    with _open(path, "lcdb_accuracy_curves.npz") as data:
        names = tuple(str(name) for name in data["openml_id"])
        return _checked(
            names,
            tuple({"learner": learner} for learner in data["learners"].tolist()),
            1.0 - data[split].astype(np.float64),
            data["traintime"].astype(np.float64),
            data["anchors"] / data["anchors"][-1],
            names,
        )


def from_hpobench_mlp(path: str | os.PathLike[str] | None = None) -> TrialTable:
    """HPOBench's grid of 30,000 multilayer perceptrons on 8 tables, 1 − accuracy (mean over 5 seeds) and seconds.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      A table with one fidelity.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.

    Source: Eggensperger et al., NeurIPS 2021, https://arxiv.org/abs/2109.06716 (Apache-2.0).
    """
    with _open(path, "hpobench_mlp_table.npz") as data:
        names, values = data["hp_names"].tolist(), _files.parse_json(str(data["hp_values"]))
        return _checked(
            tuple(data["datasets"].tolist()),
            tuple({n: values[n][i] for n, i in zip(names, row, strict=True)} for row in data["hp_index"].tolist()),
            1.0 - data["val_acc_mean"][..., None].astype(np.float64),
            data["train_time_mean"][..., None].astype(np.float64),
            np.ones(1),
            tuple(data["datasets"].tolist()),
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
      space: of the configurations; X is their encoding (`spaces.encode`). By default, X has the parameters themselves,
        which must be numbers in [0, 1], in the order of the first configuration. `from_hpob` returns such records.

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
        given = record.configuration
        if space is not None:
            x = np.asarray(encoded(spaces.from_configuration(space, given))).tolist()
        elif set(given) == set(names) and all(_is_fraction(given[name]) for name in names):
            x = [float(given[name]) for name in names]
        else:
            raise ValueError(f"HPO-B has numbers in [0, 1] for {names}; got {given}. Give the configurations' `space`.")
        of = rows.setdefault(record.task, {"X": [], "y": []})
        of["X"].append(x)
        of["y"].append([1.0 - float(record.outcome)])
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
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return known and bool(0 <= value <= 1)


class PublishedCurves(NamedTuple):
    """Published results of a benchmark: M methods on T tasks with R seeds, after each of N trials.

    Attributes:
      methods: M names.
      tasks: T names, "search space/data set".
      regret: [M, T, R, N] normalized regret of the best outcome so far: 0 at the task's best and 1 at its worst; NaN if
        it was not published.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    regret: np.ndarray


def from_hpob_curves(path: str | os.PathLike[str] | None = None) -> PublishedCurves:
    """HPO-B v3: 14 methods on the 86 test tasks, 5 seeds, after the 5 initial trials and each of 100 more.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      The curves. For "RF", 80 tasks lack values after 5 trials. Increases of the regret by rounding are removed, so
      that curves are monotone.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.

    Source: Pineda Arango et al., NeurIPS 2021, https://arxiv.org/abs/2106.06257 (MIT).
    """
    with _open(path, "hpob_baseline_curves.npz") as data:
        best = data["best_so_far"].astype(np.float64)
        names = tuple(f"{s}/{d}" for s, d in zip(data["search_space_id"], data["dataset_id"], strict=True))
        _files.check_finite("best_so_far", best, missing=True)
        best = np.maximum.accumulate(best, axis=-1)  # after a NaN, all values are NaN
        if best.ndim != 4 or best.shape[:2] != (len(data["methods"]), len(names)):
            raise ValueError(
                f"`best_so_far` has shape {best.shape} for {len(data['methods'])} methods and {len(names)} tasks"
            )
        return PublishedCurves(tuple(data["methods"].tolist()), names, 1.0 - best)


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
      includes their number, as "iris (61)" and "iris (969)". Parameter names lose their flow, which is
      `sklearn.svm.classes.SVC(16)_` in `sklearn.svm.classes.SVC(16)_gamma`, if the result is not ambiguous. The outcome
      is 1 − value, or the value itself if `higher_is_better` is False. Parameters whose values are not plain data are
      left out. A run without a value has status "FAIL".

    Raises:
      ValueError: if a value is not a number.
      ValueError: without `higher_is_better`, if a value is above 1 or an error.
      ValueError: if rows are of several functions, which are not comparable.
    """
    if hasattr(rows, "columns"):
        rows = as_pandas("rows", rows).to_dict("records")
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
        try:
            value = math.nan if row["value"] is None else float(row["value"])
        except (TypeError, ValueError):
            raise ValueError(f"The value of run {record.trial} must be a number; got {row['value']!r}.") from None
        if value > 1 and higher_is_better is None:
            raise ValueError(
                f"The value of run {record.trial} is {value:g}, and a measure that is better where it is larger is at "
                "most 1, as far as `from_openml_evaluations` can know; say `higher_is_better`, True or False."
            )
        if math.isnan(value):
            records.append(record._replace(status="FAIL", reason="OpenML has no value of it"))
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
_LOSS = re.compile("error|loss|cost|time|memory|brier|deviance|variance|bias")


def _file(path, name: str) -> Path:
    folder = os.environ.get("METAOPT_DATA") if path is None else path
    if not folder:
        raise FileNotFoundError("no data folder: set METAOPT_DATA to it, or pass `path`.")
    if not (Path(folder) / name).is_file():
        raise FileNotFoundError(f"the data folder {folder} has no {name}.")
    return Path(folder) / name


def _positions(values) -> dict[str, int]:
    """Returns the position of each value among the different ones, in the order in which they first occur."""
    return {value: index for index, value in enumerate(dict.fromkeys(values))}


@contextlib.contextmanager
def _open(path: str | os.PathLike[str] | None, name: str) -> Iterator[_files.Npz]:
    file = _file(path, name)
    with _files.reading(file, "is not this table of the data folder"), _files.open_npz(file) as data:
        yield data


def _checked(tasks, configurations, outcomes, costs, fidelities, families) -> TrialTable:
    """Makes a table whose arrays fit one another. Raises ValueError otherwise."""
    shape = len(tasks), len(configurations), len(fidelities)
    if outcomes.shape != shape or costs.shape != shape or np.ndim(fidelities) != 1 or len(families) != len(tasks):
        raise ValueError(f"its outcomes and costs must have shape {shape}; got {outcomes.shape} and {costs.shape}")
    if not (np.diff(fidelities, prepend=0) > 0).all() or fidelities[-1] != 1:
        raise ValueError(f"its fidelities must increase to 1; got {fidelities}")
    if np.isinf(outcomes).any() or np.isinf(costs).any() or not all(isinstance(name, str) for name in tasks):
        raise ValueError("its outcomes and costs must be finite or NaN, and its tasks texts")
    values = [value for configuration in configurations for value in configuration.values()]
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise ValueError("its configurations must be finite")
    return TrialTable(tasks, configurations, outcomes, costs, fidelities, families)


def _is_given(value) -> bool:
    """Returns whether a value is neither None nor NaN; data frames fill gaps with these."""
    return value is not None and value == value


def _parsed(text):
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _plain(value):
    """Converts a value of a data frame. Text may be a number, and 3.0 may mean 3, because the column has gaps."""
    if isinstance(value, str):
        return _parsed(value)
    return int(value) if float(value).is_integer() else float(f"{value:.7g}")  # the digits of the original float32

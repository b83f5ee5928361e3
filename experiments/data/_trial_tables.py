"""Published tables of trials: one array of many configurations on many tasks.

Outcomes are losses: 1 − accuracy if a table has accuracies.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt.blackbox import TrialTable

from ._folder import Folder, data_file, read_arrays, read_rows


def from_pmlb_results(path: Folder = None, *, algorithms: Sequence[str] = ("RandomForestClassifier",)) -> TrialTable:
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
      ValueError: if an algorithm is unknown.
      ImportError: if pandas is not installed.

    Source: EpistasisLab, https://github.com/EpistasisLab/Aliro (GPL-3.0).
    """
    import pandas as pd

    frame: Any = pd.read_parquet(data_file("pmlb_sklearn_results.parquet", path))
    frame = frame[frame["file"] == "kb_r6"]
    if unknown := set(algorithms) - set(frame["algorithm"].astype(str)):
        raise ValueError(f"`algorithms` has unknown names: {sorted(unknown)}.")
    families = {row["dataset"]: row["family"] for row in read_rows("pmlb_metafeatures.csv.gz", path)}
    frame = frame[frame["algorithm"].isin(algorithms)]
    parameters = [column for column in frame.columns if column.startswith("hp_")]
    keys = frame["algorithm"].astype(str) + " " + frame["config_id"].astype(str)
    configurations = {}
    for key, row in zip(keys, frame[["algorithm", *parameters]].to_dict("records"), strict=True):
        if key not in configurations:
            values = {name[3:]: _plain(row[name]) for name in parameters if not pd.isna(row[name])}
            configurations[key] = values if len(algorithms) == 1 else {"algorithm": row["algorithm"], **values}
    names, columns = sorted(set(frame["dataset"].astype(str))), {key: i for i, key in enumerate(configurations)}
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


def from_oboe(path: Folder = None) -> TrialTable:
    """OBOE: 219 scikit-learn classifiers on 418 tables of OpenML, balanced error and seconds.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      A table with one fidelity; a configuration has its "algorithm".

    Raises:
      FileNotFoundError: if the folder or a file does not exist.

    Source: Yang et al., KDD 2019, https://arxiv.org/abs/1808.03233 (BSD-3-Clause).
    """
    data = read_arrays("oboe_error_matrix.npz", path)
    configs = [json.loads(str(config)) for config in data["configs"]]
    return _checked(
        tuple(data["openml_id"].tolist()),
        tuple({"algorithm": config["algorithm"], **config["hyperparameters"]} for config in configs),
        data["error"][..., None].astype(np.float64),
        data["runtime"][..., None].astype(np.float64),
        np.ones(1),
        tuple(data["family"].tolist()),
    )


def from_taskset(path: Folder = None, *, split: str = "valid") -> TrialTable:
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
    data = read_arrays("taskset_rnn_curves.npz", path)
    outcomes = data["curves"][:, :, data["splits"].tolist().index(split), 1:].astype(np.float64)
    names, parameters = tuple(data["tasks"].tolist()), data["hp_names"].tolist()
    configurations = tuple(dict(zip(parameters, row, strict=True)) for row in data["hp"].tolist())
    fidelities = np.arange(1, outcomes.shape[-1] + 1) / outcomes.shape[-1]
    return _checked(names, configurations, outcomes, np.full(outcomes.shape, np.nan), fidelities, names)


def from_lcdb(path: Folder = None, *, split: str = "valid") -> TrialTable:
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
    data = read_arrays("lcdb_accuracy_curves.npz", path)
    names = tuple(str(name) for name in data["openml_id"])
    return _checked(
        names,
        tuple({"learner": learner} for learner in data["learners"].tolist()),
        1.0 - data[split].astype(np.float64),
        data["traintime"].astype(np.float64),
        data["anchors"] / data["anchors"][-1],
        names,
    )


def from_hpobench_mlp(path: Folder = None) -> TrialTable:
    """HPOBench's grid of 30,000 multilayer perceptrons on 8 tables, 1 − accuracy (mean over 5 seeds) and seconds.

    Args:
      path: the folder; by default, the environment variable METAOPT_DATA.

    Returns:
      A table with one fidelity.

    Raises:
      FileNotFoundError: if the folder or a file does not exist.

    Source: Eggensperger et al., NeurIPS 2021, https://arxiv.org/abs/2109.06716 (Apache-2.0).
    """
    data = read_arrays("hpobench_mlp_table.npz", path)
    names, values = data["hp_names"].tolist(), json.loads(str(data["hp_values"]))
    return _checked(
        tuple(data["datasets"].tolist()),
        tuple({n: values[n][i] for n, i in zip(names, row, strict=True)} for row in data["hp_index"].tolist()),
        1.0 - data["val_acc_mean"][..., None].astype(np.float64),
        data["train_time_mean"][..., None].astype(np.float64),
        np.ones(1),
        tuple(data["datasets"].tolist()),
    )


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


def from_hpob_curves(path: Folder = None) -> PublishedCurves:
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
    data = read_arrays("hpob_baseline_curves.npz", path)
    best = data["best_so_far"].astype(np.float64)
    names = tuple(f"{s}/{d}" for s, d in zip(data["search_space_id"], data["dataset_id"], strict=True))
    best = np.maximum.accumulate(best, axis=-1)  # after a NaN, all values are NaN
    if best.ndim != 4 or best.shape[:2] != (len(data["methods"]), len(names)):
        raise ValueError(
            f"`best_so_far` has shape {best.shape} for {len(data['methods'])} methods and {len(names)} tasks"
        )
    return PublishedCurves(tuple(data["methods"].tolist()), names, 1.0 - best)


def _checked(tasks, configurations, outcomes, costs, fidelities, families) -> TrialTable:
    """Makes a table. Raises ValueError if its arrays do not fit one another."""
    shape = len(tasks), len(configurations), len(fidelities)
    if outcomes.shape != shape or costs.shape != shape or len(families) != len(tasks):
        raise ValueError(f"outcomes and costs must have shape {shape}; got {outcomes.shape} and {costs.shape}.")
    if not (np.diff(fidelities, prepend=0) > 0).all() or fidelities[-1] != 1:
        raise ValueError(f"fidelities must increase to 1; got {fidelities}.")
    return TrialTable(tasks, configurations, outcomes, costs, fidelities, families)


def _plain(value):
    """Converts a value of a data frame. Text may be a number, and 3.0 may mean 3, because the column has gaps."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return int(value) if float(value).is_integer() else float(f"{value:.7g}")  # the digits of the original float32

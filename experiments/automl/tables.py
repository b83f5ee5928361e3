"""`AutoClassifier` and `AutoRegressor` against other methods, on families of tables that the shipped g has not seen.

Each table is split into 75 % for `fit` and 25 % for the test. The estimators get data frames and a time limit. The
families of `families.json` are for judging. We fixed them before the first run, and had made no choice on them. After
it, we added the Gaussian process for regression. `--development` takes other families, on which we made the choices.

    python experiments/automl/tables.py                  # an hour on two cores; writes results/automl_tables.md
    python experiments/automl/tables.py --smoke          # a minute; prints only
    python experiments/automl/tables.py --fifteen        # on 15 of the tables, for methods that take long
    python experiments/automl/tables.py --long           # on these 15, with 240 s
    python experiments/automl/tables.py --ablations      # the estimator without one of its parts, on these 15
    python experiments/automl/tables.py --instant        # `instant` below 2,000 rows, without the other presets

With `--keep FOLDER`, an interrupted run continues from its finished tables. `peers.py` describes how AutoGluon and
FLAML join the table. The environment variable METAOPT_DATA names the folder of the tables.
"""

import functools
import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pandas as pd
from sklearn import ensemble, linear_model, model_selection, pipeline, preprocessing

from experiments import script
from experiments.automl import pictures
from experiments.data import from_data_folder, regression_tables
from metaopt import _cache, automl, spaces, tasks
from metaopt.automl import _network_folds, _workers
from metaopt.training import report_progress

FAMILIES = Path(__file__).with_name("families.json")
LOWEST = 1e-4  # a probability in a log loss, for all methods
SIZES = {"under 500 rows": (0, 500), "500 to 2,000": (500, 2000), "above 2,000": (2000, 10**9)}
TREES = ("lightgbm", "extra_trees", "random_forest", "xgboost")
TREES += ("catboost",) if importlib.util.find_spec("catboost") else ()  # as in the estimators
INSTANT = {"metaopt instant, 30 s, cold": (30.0, False), "metaopt instant, 5 s, warm": (5.0, True)}
ABLATIONS = ("without g", "without the network", "without trees")  # each needs another fit; `_parts_removed` does not


class Split(NamedTuple):
    """A table with the positions of its training and test rows."""

    table: tasks.Table
    is_class: bool
    train: np.ndarray
    test: np.ndarray

    def frame(self) -> pd.DataFrame:
        """The columns. Categorical columns have pandas' categorical dtype."""
        x, categorical = self.table.x, self.table.categorical
        columns = {f"x{j}": pd.Categorical(x[:, j]) if categorical[j] else x[:, j] for j in range(x.shape[1])}
        return pd.DataFrame(columns)


def load(args) -> list[Split]:
    """One table of each family for judging; with --development, of other families that are not reserved."""
    families = json.loads(FAMILIES.read_text())
    part = "development" if args.development else "judging"
    chosen: dict[str, Split] = {}
    for is_class, tables in ((True, from_data_folder()), (False, regression_tables())):
        names = families[part]["classification" if is_class else "regression"]
        for table in tables:
            if table.family in names and table.family not in chosen:
                chosen[table.family] = _split(table, is_class, args.seed)
    splits = [chosen[family] for family in sorted(chosen)]
    if args.instant:
        splits = [splits[i] for i in _below_2000(splits)]
    if args.smoke:
        return splits[:: max(1, len(splits) // 2)][:2]
    if args.ablations or args.fifteen or args.long:  # evenly from the sorted families
        splits = [splits[i] for i in np.unique(np.linspace(0, len(splits) - 1, 15).round().astype(int))]
    return splits[: args.tables]


def _below_2000(splits: list[Split]) -> list[int]:
    return [i for i, split in enumerate(splits) if len(split.table.y) < 2000]


def _split(table: tasks.Table, is_class: bool, seed: int) -> Split:
    rows = np.arange(len(table.y))
    labels = None
    if is_class:  # a class with one row cannot be in both parts
        rows = rows[np.bincount(table.y)[table.y] > 1]
        labels = table.y[rows]
    train, test = model_selection.train_test_split(rows, test_size=0.25, random_state=seed, stratify=labels)
    return Split(table, is_class, train, test)


# --- methods: `(split, seed, args) -> (predictions, details)` ---


def auto(split: Split, seed: int, args, limit: float | None = None, **options: Any):
    """The estimator with a limit of seconds, by default that of `--time`."""
    limit = args.time if limit is None else limit
    kind = automl.AutoClassifier if split.is_class else automl.AutoRegressor
    model: Any = kind(time_limit=limit, random_state=seed, verbose=False, **options)
    frame, y = split.frame(), split.table.y
    start = time.perf_counter()
    model.fit(frame.iloc[split.train], y[split.train])
    fitted = time.perf_counter()
    test = frame.iloc[split.test]
    predicted = model.predict_proba(test) if split.is_class else model.predict(test)
    details = {
        "fit": fitted - start,
        "limit": limit,
        "predict": time.perf_counter() - fitted,
        "estimate": -model.score_ * (1 if split.is_class else model.scale_),
        "weights": {row.model: row.weight for row in model.leaderboard_.itertuples() if row.weight},
    }
    if args.ablations and not options:
        details["also"] = _parts_removed(model, test, split)
    return (_aligned(predicted, model.classes_, split) if split.is_class else predicted), details


def ablated(name: str, split: Split, seed: int, args):
    """The estimator without a part. Without g, the network has the default hyperparameters of its space."""
    others = ("linear",) if split.is_class else ("linear", "gaussian_process")
    models = {"without the network": (*others, *TREES), "without trees": ("network", *others)}.get(name)
    if name != "without g":
        return auto(split, seed, args, models=models)
    default = jax.device_get(spaces.default(automl.tabular_network().space))
    with mock.patch.object(_network_folds, "predicted_hyperparams", lambda *args: default):
        return auto(split, seed, args, models=models)


def _parts_removed(model: Any, test: pd.DataFrame, split: Split) -> dict[str, tuple[float, float]]:
    """Losses of the same fit without its ensemble (with its temperature), and without calibration."""
    whole, changed = model.ensemble_, {}
    best = whole.members[0]._replace(weight=1.0)
    variants = {"best model only": whole._replace(members=[best])}
    if split.is_class:
        variants["without calibration"] = whole._replace(temperature=1.0)
    for name, variant in variants.items():
        model.ensemble_ = variant
        predicted = (
            _aligned(model.predict_proba(test), model.classes_, split) if split.is_class else model.predict(test)
        )
        changed[name] = loss(predicted, split)
    model.ensemble_ = whole
    return changed


def plain(make: Callable[[Split, int, Any], Any]):
    """A method of scikit-learn on one-hot columns."""

    def method(split: Split, seed: int, args):
        start = time.perf_counter()
        frame = pd.get_dummies(split.frame()).astype(np.float32)
        x = frame.fillna(frame.iloc[split.train].median()).fillna(0.0).to_numpy()
        model, y = make(split, seed, args), split.table.y
        model.fit(x[split.train], y[split.train])
        fitted = time.perf_counter()
        predicted = model.predict_proba(x[split.test]) if split.is_class else model.predict(x[split.test])
        details = {"fit": fitted - start, "predict": time.perf_counter() - fitted}
        return (_aligned(predicted, model.classes_, split) if split.is_class else predicted), details

    return method


def forest(split: Split, seed: int, args):
    kind = ensemble.RandomForestClassifier if split.is_class else ensemble.RandomForestRegressor
    return kind(30 if args.smoke else 300, n_jobs=-1, random_state=seed)


def tuned_forest(split: Split, seed: int, args):
    space = {"max_features": [0.1, 0.2, 0.4, 0.7, 1.0, "sqrt"], "min_samples_leaf": [1, 2, 4, 8, 16]}
    scoring = "neg_log_loss" if split.is_class else "neg_mean_squared_error"
    return model_selection.RandomizedSearchCV(
        forest(split, seed, args).set_params(n_jobs=1),
        space,
        n_iter=2 if args.smoke else 12,
        scoring=scoring,
        cv=4,
        random_state=seed,
        n_jobs=1 if args.smoke else -1,
    )


def boosting(split: Split, seed: int, args):
    del args
    kind = ensemble.HistGradientBoostingClassifier if split.is_class else ensemble.HistGradientBoostingRegressor
    return kind(random_state=seed)


def linear(split: Split, seed: int, args):
    del seed, args
    model = linear_model.LogisticRegression(max_iter=1000) if split.is_class else linear_model.RidgeCV()
    return pipeline.make_pipeline(preprocessing.StandardScaler(), model)


def constant(split: Split, seed: int, args):
    """Class shares, or the mean."""
    y = split.table.y[split.train]
    if not split.is_class:
        return np.full(len(split.test), y.mean()), {}
    shares = np.bincount(y, minlength=int(split.table.y.max()) + 1) / len(y)
    return np.tile(shares, (len(split.test), 1)), {}


def instant(limit: float, is_warm: bool, split: Split, seed: int, args):
    """The preset `instant` in a new process. If `is_warm`, JAX has the compiled programs of an earlier fit."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # for the process of networks
    # A folder for each fit, since other tables may need some of the same programs.
    with tempfile.TemporaryDirectory() as folder, _cache.compilation_cache(folder):
        for seconds in (args.time, limit) if is_warm else (limit,):
            jax.clear_caches()  # clears those of this process; the folder keeps its programs
            _workers.stop("network")  # the next fit starts a new process
            result = auto(split, seed, args, seconds, preset="instant")
    return result


def instant_report(splits: list[Split], results: dict[str, list[dict]]) -> str:
    """The report against each of `INSTANT`, without the others, and a table of seconds."""
    parts, rows = [], []
    for name in INSTANT:
        others = {key: values for key, values in results.items() if key == name or key not in INSTANT}
        parts.append(f"**{name[8:]}** against the others\n\n{report(splits, others, name)}")
        seconds = [result["fit"] for result in results[name]]
        cells = (np.mean(seconds), np.median(seconds), max(seconds))
        num_late = sum(result["fit"] > result["limit"] for result in results[name])
        rows.append([name[8:], *(f"{value:.1f}" for value in cells), str(num_late)])
    header = [f"{len(splits)} tables", "mean seconds", "median", "largest", "tables above the limit"]
    return "\n\n".join([*parts, script.table(header, rows)])


def export(splits: list[Split], folder: Path) -> None:
    """Writes the tables for `peers.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, is_class, train, test in splits:
        arrays = {"x": table.x, "y": table.y, "categorical": table.categorical, "train": train, "test": test}
        np.savez_compressed(folder / f"{table.name}.npz", is_class=is_class, **arrays)


def peer(label: str, folder: Path):
    """Returns a method that reads the predictions of `peers.py`."""

    def method(split: Split, seed: int, args):
        result = json.loads((folder / f"{split.table.name}, {label}.json").read_text())
        predicted = np.array(result["predicted"])
        details = {"fit": result["fit"], "predict": result["predict"], "models": result["models"]}
        return (_aligned(predicted, np.array(result["classes"]), split) if split.is_class else predicted), details

    return method


def methods(args) -> dict[str, Callable]:
    chosen: dict[str, Callable] = {
        "class shares or mean": constant,
        "linear": plain(linear),
        "random forest": plain(forest),
        "random forest, tuned": plain(tuned_forest),
        "boosting": plain(boosting),
        "metaopt instant": lambda split, seed, args: auto(split, seed, args, preset="instant"),
        "metaopt": auto,
    }
    if args.ablations:
        chosen = {"metaopt": auto} | {f"metaopt {name}": functools.partial(ablated, name) for name in ABLATIONS}
    if args.instant:
        del chosen["metaopt"], chosen["metaopt instant"]
        chosen |= {name: functools.partial(instant, *options) for name, options in INSTANT.items()}
    if args.long:  # the others do not depend on a limit of seconds
        chosen = {name: chosen[name] for name in ("class shares or mean", "linear", "random forest", "metaopt")}
    if args.longer is not None:
        chosen[f"metaopt, {args.longer:g} s"] = functools.partial(auto, limit=args.longer)
    if args.peers is not None:
        labels = sorted({file.stem.split(", ", 1)[1] for file in args.peers.glob("*.json")})
        chosen |= {label: peer(label, args.peers) for label in labels}
    return chosen


def _aligned(probabilities: np.ndarray, classes: np.ndarray, split: Split) -> np.ndarray:
    full = np.zeros((len(probabilities), int(split.table.y.max()) + 1))
    full[:, classes] = probabilities
    return full


def loss(predicted: np.ndarray, split: Split) -> tuple[float, float]:
    """Test log loss and share of errors; or RMSE and mean absolute error in units of the target's deviation."""
    y = split.table.y[split.test]
    if split.is_class:
        p = np.maximum(predicted, LOWEST)
        p = p / p.sum(axis=1, keepdims=True)
        return float(-np.log(p[np.arange(len(y)), y]).mean()), float((p.argmax(axis=1) != y).mean())
    error = (predicted - y) / split.table.y[split.train].std()
    return float(np.sqrt((error**2).mean())), float(np.abs(error).mean())


# --- the page ---


def report(splits: list[Split], results: dict[str, list[dict]], reference: str = "metaopt") -> str:
    """Tables of all methods by problem and by size, with paired differences to a method, and ranks over all."""
    parts, ranks = [], []
    for is_class in (True, False):
        rows = [i for i, split in enumerate(splits) if split.is_class == is_class]
        if not rows:
            continue
        losses = {name: np.array([values[i]["loss"] for i in rows]) for name, values in results.items()}
        ranks.append(_ranks(np.stack(list(losses.values()))))
        mean_ranks = dict(zip(losses, ranks[-1].mean(axis=1), strict=True))
        sizes = np.array([len(splits[i].table.y) for i in rows])
        unit = "test log loss" if is_class else "test RMSE / deviation"
        inside = {name: (sizes >= low) & (sizes < high) for name, (low, high) in SIZES.items()}
        header = [f"{len(rows)} tables", unit, "mean rank", *(f"{n} ({m.sum()})" for n, m in inside.items())]
        header += ["s to fit", "s to predict", f"difference to {reference} [95 %]"]
        table = []
        for name, values in losses.items():
            seconds = [np.mean([results[name][i].get(part, 0.0) for i in rows]) for part in ("fit", "predict")]
            by_size = [f"{values[m].mean():.4f}" if m.any() else "" for m in inside.values()]
            difference = _interval(values - losses[reference])
            cells = [f"{values.mean():.4f}", f"{mean_ranks[name]:.2f}", *by_size]
            cells += [f"{seconds[0]:.1f}", f"{seconds[1]:.2f}"]
            table.append([name, *cells, difference])
        parts.append(("Classification" if is_class else "Regression") + "\n\n" + script.table(header, table))
    joined = dict(zip(results, np.concatenate(ranks, axis=1), strict=True))
    table = [
        [name, f"{rank.mean():.2f}", _interval(rank - joined[reference], digits=2)] for name, rank in joined.items()
    ]
    header = [f"all {len(splits)} tables", "mean rank", f"difference to {reference} [95 %]"]
    return "\n\n".join([*parts, "Ranks over both problems\n\n" + script.table(header, table)])


def by_table(splits: list[Split], results: dict[str, list[dict]]) -> str:
    """A table of the loss of each method on each table."""
    header = ["table", "rows", *results]
    rows = [
        [split.table.name, str(len(split.table.y)), *(f"{values[i]['loss']:.4f}" for values in results.values())]
        for i, split in enumerate(splits)
    ]
    return "Loss by table\n\n" + script.table(header, rows)


def weights(splits: list[Split], results: list[dict]) -> str:
    """A table of the mean weight of each kind of model in the ensembles."""
    rows = []
    for name, is_class in (("classification", True), ("regression", False)):
        fits = [r["weights"] for split, r in zip(splits, results, strict=True) if split.is_class == is_class]
        kinds = {model.split()[0] for fit in fits for model in fit}
        total = {kind: sum(w for fit in fits for model, w in fit.items() if model.split()[0] == kind) for kind in kinds}
        rows += [
            [name, kind, f"{total[kind] / len(fits):.2f}"]
            for kind in sorted(sorted(kinds), key=total.get, reverse=True)
        ]
    return script.table(["tables", "models", "mean weight"], rows)


def _ranks(losses: np.ndarray) -> np.ndarray:
    return np.array([pd.Series(column).rank().to_numpy() for column in losses.T]).T


def _interval(difference: np.ndarray, digits: int = 4) -> str:
    """The mean with its interval, and how often the difference is negative, which is better."""
    if not difference.any():
        return ""
    mean, lowest, highest = (f"{value:+.{digits}f}" for value in pictures.mean_and_bounds(difference))
    return f"{mean} [{lowest}, {highest}], better on {np.mean(difference < 0):.0%}"


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--development", action="store_true", help="other families than those for judging")
    parser.add_argument("--fifteen", action="store_true", help="only fifteen of the tables")
    parser.add_argument("--ablations", action="store_true", help="the estimator without one part, on the fifteen")
    parser.add_argument(
        "--long", action="store_true", help="the fifteen with 240 s, and a second report of those below 2,000 rows"
    )
    parser.add_argument("--instant", action="store_true", help="`instant` below 2,000 rows, without other presets")
    parser.add_argument("--time", type=float, default=60.0, help="seconds of each fit")
    parser.add_argument("--longer", type=float, default=None, help="add metaopt with this limit of seconds")
    parser.add_argument("--tables", type=int, default=None, help="only the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the models")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the results of finished tables")
    parser.add_argument("--export", type=Path, default=None, help="only write the tables to this folder")
    parser.add_argument("--peers", type=Path, default=None, help="folder of the predictions of `peers.py`")
    args = parser.parse_args()
    args.time = 5.0 if args.smoke else 240.0 if args.long else args.time
    splits, chosen = load(args), methods(args)
    if args.export is not None:
        export(splits, args.export)
        return
    results: dict[str, list[dict]] = {name: [] for name in chosen}
    with report_progress(len(splits) * len(chosen), None, "{table}, {method}", table="", method="") as progress:
        for number, split in enumerate(splits):
            for count, (name, method) in enumerate(chosen.items()):
                results[name].append(_once(split, name, method, args))
                progress(number * len(chosen) + count + 1, table=split.table.name, method=name)
    reference = "metaopt instant, 30 s, cold" if args.instant else "metaopt"
    for name in dict.fromkeys(also for result in results[reference] for also in result.get("also", ())):
        results[name] = [_also(result, name) for result in results[reference]]
    limited = [r for name, values in results.items() if name.startswith("metaopt") for r in values]
    late = [r["fit"] / r.get("limit", args.time) - 1 for r in limited]  # older kept results have no "limit"
    text = instant_report(splits, results) if args.instant else report(splits, results, reference)
    text += f"\n\nLargest overrun of the time limit: {max(late):+.0%}; seed {args.seed}."
    if args.long and (below := _below_2000(splits)):
        part = {name: [values[i] for i in below] for name, values in results.items()}
        text += f"\n\nTables with fewer than 2,000 rows\n\n{report([splits[i] for i in below], part, reference)}"
        text += f"\n\n{by_table(splits, results)}"
    if args.ablations:
        text += f"\n\n{weights(splits, results['metaopt'])}"
    families, name = "development families" if args.development else "new families", result_name(args)
    script.publish(__file__, f"AutoML on tables of {families}", text, args, name=name)
    if not args.smoke:
        path = args.out / f"{name}.png"
        if name.startswith("automl_tables"):
            pictures.plot(splits, results, path)
        else:
            pictures.plot_differences(splits, results, reference, path)


def result_name(args) -> str:
    """Returns the name of the page; development families have a separate one."""
    modes = ("ablations", "fifteen", "long", "instant")
    name = next((f"automl_{mode}" for mode in modes if getattr(args, mode)), "automl_tables")
    return name + ("_development" if args.development else "")


def _also(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The result without a part. Regression has no calibration to remove, so its result does not change."""
    value, second = result["also"].get(name, (result["loss"], result["second"]))
    return {**result, "loss": value, "second": second}


def _once(split: Split, name: str, method: Callable, args) -> dict[str, Any]:
    """The result of a method on a table, or the kept one. Smoke runs and results of `--peers` are not kept."""
    path, is_peer = None, args.peers is not None and (args.peers / f"{split.table.name}, {name}.json").is_file()
    if args.keep is not None and not args.smoke and not is_peer:
        folder = args.keep / "ablations" if args.ablations else args.keep  # their results have more entries
        path = folder / f"{split.table.name}, {name}, {args.time:g} s, seed {args.seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            return json.loads(path.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted, details = method(split, args.seed, args)
    value, second = loss(predicted, split)
    result = {"loss": value, "second": second, **details}
    if path is not None:
        path.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    script.run(main)

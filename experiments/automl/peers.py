"""AutoGluon, FLAML and CatBoost on the tables of `tables.py`, in a separate environment without metaopt.

    python experiments/automl/tables.py --export FOLDER     # with metaopt: the tables and their splits
    bash experiments/automl/install_peers.sh VENV           # once
    VENV/bin/python experiments/automl/peers.py FOLDER      # writes predictions to FOLDER; continues after a kill
    python experiments/automl/tables.py --peers FOLDER      # with metaopt: the table with these methods

Every method gets a data frame, whose categorical columns have pandas' categorical dtype, and predicts the test rows.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def frame(x: np.ndarray, categorical: np.ndarray) -> pd.DataFrame:
    """The columns as in `tables.py`. Categorical columns have pandas' categorical dtype."""
    return pd.DataFrame({f"x{j}": pd.Categorical(x[:, j]) if categorical[j] else x[:, j] for j in range(x.shape[1])})


def autogluon(train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame, is_class: bool, args) -> dict[str, Any]:
    """`TabularPredictor` with a preset; the names of the models that were fitted are part of the result."""
    from autogluon.tabular import TabularPredictor

    kind = "regression" if not is_class else "binary" if len(np.unique(y)) == 2 else "multiclass"
    metric = "log_loss" if is_class else "root_mean_squared_error"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        predictor = TabularPredictor("target", problem_type=kind, eval_metric=metric, path=folder, verbosity=0)
        predictor.fit(train.assign(target=y), presets=args.preset, time_limit=args.time, num_cpus=args.cores)
        fitted = time.perf_counter()
        if is_class:
            predicted, classes = predictor.predict_proba(test), list(predictor.class_labels)
            predicted = predicted[classes]
        else:
            predicted, classes = predictor.predict(test), None
        details = {"classes": classes, "fit": fitted - start, "predict": time.perf_counter() - fitted}
        return {"predicted": np.asarray(predicted).tolist(), "models": predictor.model_names(), **details}


def flaml(train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame, is_class: bool, args) -> dict[str, Any]:
    """`flaml.AutoML` with its default estimators."""
    from flaml import AutoML

    start = time.perf_counter()
    model = AutoML()
    kind, metric = ("classification", "log_loss") if is_class else ("regression", "rmse")
    options = {"task": kind, "metric": metric, "time_budget": args.time, "n_jobs": args.cores, "verbose": 0}
    model.fit(train, pd.Series(y), seed=args.seed, **options)
    fitted = time.perf_counter()
    predicted = model.predict_proba(test) if is_class else model.predict(test)
    details = {"classes": np.asarray(model.classes_).tolist() if is_class else None, "fit": fitted - start}
    details["predict"] = time.perf_counter() - fitted
    return {"predicted": np.asarray(predicted).tolist(), "models": [model.best_estimator], **details}


def catboost(train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame, is_class: bool, args) -> dict[str, Any]:
    """CatBoost with its defaults, without a time limit. It takes categories as texts."""
    from catboost import CatBoostClassifier, CatBoostRegressor

    categorical = [name for name in train if isinstance(train[name].dtype, pd.CategoricalDtype)]
    train, test = (
        part.assign(**{name: part[name].astype(object).map(str) for name in categorical}) for part in (train, test)
    )
    start = time.perf_counter()
    kind = CatBoostClassifier if is_class else CatBoostRegressor
    model = kind(cat_features=categorical, random_seed=args.seed, thread_count=args.cores, allow_writing_files=False)
    model.fit(train, y, verbose=False)
    fitted = time.perf_counter()
    predicted = model.predict_proba(test) if is_class else model.predict(test)
    details = {"classes": np.asarray(model.classes_).tolist() if is_class else None, "fit": fitted - start}
    details["predict"] = time.perf_counter() - fitted
    return {"predicted": np.asarray(predicted).tolist(), "models": ["catboost"], **details}


METHODS = {"autogluon": autogluon, "flaml": flaml, "catboost": catboost}


def label_of(name: str, args) -> str:
    """The name of a method in the table; the limit of seconds is part of it, if the method has one."""
    limited = {"autogluon": f"AutoGluon {args.preset}", "flaml": "FLAML"}
    return f"{limited[name]}, {args.time:g} s" if name in limited else "CatBoost defaults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `tables.py --export` wrote")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--preset", default="medium_quality", help="of AutoGluon")
    parser.add_argument("--time", type=float, default=60.0, help="seconds of each fit")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of FLAML and CatBoost; AutoGluon's is fixed")
    args = parser.parse_args()
    for path in sorted(args.folder.glob("*.npz")):
        with np.load(path) as arrays:  # numbers only: `allow_pickle` is off
            x, y, categorical = arrays["x"], arrays["y"], arrays["categorical"]
            train, test, is_class = arrays["train"], arrays["test"], bool(arrays["is_class"])
        columns = frame(x, categorical)
        for name in args.methods:
            label = label_of(name, args)
            result_file = args.folder / f"{path.stem}, {label}.json"
            if result_file.is_file():
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = METHODS[name](columns.iloc[train], y[train], columns.iloc[test], is_class, args)
            result_file.write_text(json.dumps(result))
            print(f"{path.stem}, {label}: {result['fit']:.1f} s, {', '.join(result['models'])}", flush=True)


if __name__ == "__main__":
    main()

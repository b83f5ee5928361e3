"""The alternatives: random search, TPE, random forests and gradient boosting."""

import time
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np

from experiments.hyperparameters.auto_tune.config import Config
from experiments.hyperparameters.auto_tune.trials import Trials
from experiments.hyperparameters.auto_tune.units import Unit, in_processes
from metaopt import spaces, tasks
from metaopt.training import report_progress


def random_search(key, trials: Trials, space, num: int, report) -> np.ndarray:
    """Returns [num, units, 3] outcomes of `num` independent samples from the space for every unit."""
    outcomes = []
    for i in range(num):
        sample_key, run_key = jax.random.split(jax.random.fold_in(key, i))
        keys = jax.random.split(sample_key, len(trials.units))
        outcomes.append(trials(run_key, jax.vmap(lambda k: spaces.sample(k, space))(keys)))
        report(i + 1)
    return np.stack(outcomes)


def tpe_search(key, trials: Trials, space, num: int, report) -> np.ndarray:
    """Returns the outcomes of Optuna's TPE in the same form, with one study per unit.

    All studies advance together, so that runs are batched.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        name: optuna.distributions.FloatDistribution(leaf.low, leaf.high, log=True) for name, leaf in space.items()
    }
    seeds = np.asarray(jax.random.randint(key, (len(trials.units),), 0, 2**31 - 1))
    studies = [optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(s))) for s in seeds]
    outcomes = []
    for i in range(num):
        asked = [study.ask(distributions) for study in studies]
        hyperparams = {name: jnp.asarray([t.params[name] for t in asked], jnp.float32) for name in space}
        outcome = trials(jax.random.fold_in(key, i), hyperparams)
        for study, trial, row in zip(studies, asked, outcome, strict=True):
            study.tell(trial, float(row[0]) if np.isfinite(row[0]) else 1e6)
        outcomes.append(outcome)
        report(i + 1)
    return np.stack(outcomes)


def incumbent(outcomes: np.ndarray, num: int) -> np.ndarray:
    """Returns [units, 2] test loss and error of the best of the first `num` trials by validation loss."""
    best = outcomes[:num, :, 0].argmin(0)
    return outcomes[best, np.arange(outcomes.shape[1]), 1:]


class TreeOptions(NamedTuple):
    """How tree ensembles are tuned and scored.

    Attributes:
      num_trials: of each kind of ensemble.
      least_probability: of a class; smaller ones are raised to it.
      smoothing: shares of the training classes' frequencies that are mixed into the probabilities. If there are
        several, one more forest is tuned with the best of them.
    """

    num_trials: int
    least_probability: float = 1e-6
    smoothing: tuple[float, ...] = (0.0,)


def _tree_unit(prepared: tasks.PreparedTable, seed: int, options: TreeOptions) -> dict[str, tuple]:
    """Returns test loss, error and seconds of tree ensembles on the same rows.

    Tuned ensembles are chosen on the validation rows.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    rng = np.random.default_rng(seed)
    classes = np.arange(prepared.num_classes)
    shares = np.bincount(prepared.train.y, minlength=len(classes)) / len(prepared.train.y)

    def fit(model, smoothing=0.0):
        start = time.perf_counter()
        if not hasattr(model, "classes_"):
            model.fit(prepared.train.raw, prepared.train.y)

        def score(part):
            p = np.zeros((len(part.y), len(classes)))
            p[:, model.classes_] = model.predict_proba(part.raw)
            p = np.maximum((1 - smoothing) * p + smoothing * shares, options.least_probability)
            p /= p.sum(1, keepdims=True)
            return -np.log(p[np.arange(len(part.y)), part.y]).mean(), float((p.argmax(1) != part.y).mean())

        valid, test = score(prepared.valid), score(prepared.test)
        return valid[0], *test, time.perf_counter() - start

    def forest(**options):
        return RandomForestClassifier(200, random_state=seed, **options)

    def boosting(**options):
        return HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **options)

    out = {"random forest, default": fit(forest())[1:]}
    tuned = {
        "random forest, tuned": [
            forest(
                min_samples_leaf=int(rng.choice([1, 2, 3, 5, 10])),
                max_features=float(rng.uniform(0.1, 0.9)),
                criterion=str(rng.choice(["gini", "entropy"])),
            )
            for _ in range(options.num_trials)
        ],
        "gradient boosting, tuned": [
            boosting(
                learning_rate=float(np.exp(rng.uniform(np.log(0.02), np.log(0.3)))),
                max_iter=int(rng.choice([30, 60, 100])) if len(classes) <= 10 else 30,
                max_leaf_nodes=int(rng.choice([4, 8, 16, 31])),
                l2_regularization=float(np.exp(rng.uniform(np.log(1e-3), np.log(10)))),
                min_samples_leaf=int(rng.choice([5, 10, 20])),
            )
            for _ in range(options.num_trials)
        ],
    }
    for name, models in tuned.items():
        fits = [fit(model) for model in models]
        best = min(fits)
        out[name] = (best[1], best[2], sum(f[3] for f in fits))
        if len(options.smoothing) > 1 and "forest" in name:
            smoothed = [fit(model, smoothing) for model in models for smoothing in options.smoothing]
            best = min(smoothed)
            out[f"{name} and smoothed"] = (best[1], best[2], sum(f[3] for f in fits + smoothed))
    return out


def trees(units: list[Unit], which: np.ndarray, options: TreeOptions) -> dict[str, np.ndarray]:
    """Returns name -> [units, 3]: test loss, test error, seconds."""
    # Largest first, so that no single process still runs a large one at the end.
    order = np.argsort([-len(units[u].prepared.train.y) * units[u].prepared.num_classes for u in which])
    work = (joblib.delayed(_tree_unit)(units[which[i]].prepared, units[which[i]].seed, options) for i in order)
    rows = in_processes(work, len(which), "forests and boosting")
    rows = [rows[i] for i in np.argsort(order)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def baselines(keys, trials: Trials, space, config: Config, ensembles: Future | None, log):
    """Yields the alternatives: (label, ([units, 2] test loss and error, (training runs, seconds))).

    `ensembles` is the result of `trees`, which may still be running.
    """
    most, num = max(config.trials), len(trials.units)
    for label, search in (("random search", random_search), ("Optuna TPE", tpe_search)):
        start = time.perf_counter()
        with report_progress(most, None, label, unit="trial") as report:
            outcomes = search(next(keys), trials, space, most, report)
        seconds = (time.perf_counter() - start) / num
        for t in config.trials:
            yield f"{label}, {t} trials", (incumbent(outcomes, t), (float(t), seconds * t / most))
        log(f"{label}: {most} trials on each of {num} held-out tasks")
    if ensembles is not None:
        for label, values in ensembles.result().items():
            yield label, (values[:, :2], (None, values[:, 2].mean()))
        log("forests and boosting")


def earlier_baselines(earlier: dict, defaults: np.ndarray, tables, units: list[Unit], order: np.ndarray):
    """Yields the same as `baselines`, from earlier results.

    Raises ValueError if a result is missing, or if the runs differ. They agree if training with the defaults has the
    same scores in both.
    """
    row_of = {pair: i for i, pair in enumerate(zip(earlier["tables"], earlier["seeds"], strict=True))}
    pairs = [(tables[units[u].table].name, units[u].seed) for u in order]
    missing = [pair for pair in pairs if pair not in row_of]
    if missing:
        raise ValueError(
            f"The baselines hold no result for {missing[0]} and {len(missing) - 1} more: run without --baselines."
        )
    rows = [row_of[pair] for pair in pairs]
    if not np.allclose(np.array(earlier["scores"]["defaults"])[rows], defaults, rtol=1e-3, atol=1e-4):
        raise ValueError(
            "Training with the defaults does not reproduce the scores in the baselines: the runs differ in their "
            "splits, seeds or training. Run without --baselines."
        )
    for label, values in earlier["scores"].items():
        if label.startswith(("random search", "Optuna", "random forest", "gradient boosting")):
            yield label, (np.array(values)[rows], tuple(earlier["costs"][label]))

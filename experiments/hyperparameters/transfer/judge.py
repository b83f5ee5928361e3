"""Compares g with searches, controls and trees on the families for judging."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np

import metaopt
from experiments.hyperparameters.auto_tune.baselines import TreeOptions, incumbent, random_search, tpe_search, trees
from experiments.hyperparameters.auto_tune.learning import FineTuning, Learning, predict
from experiments.hyperparameters.auto_tune.network import make_network, make_scores
from experiments.hyperparameters.auto_tune.trials import Trials
from experiments.hyperparameters.auto_tune.units import Unit, in_processes, make_units, stack_buckets
from experiments.hyperparameters.transfer.config import GROUPS, Config
from metaopt import spaces, tasks
from metaopt.training import report_progress

LEAST_PROBABILITY = 1e-4  # of the true class, for every method alike
SMOOTHING = (0.0, 0.02, 0.05, 0.1, 0.2)


class Judged(NamedTuple):
    """The tables to judge on.

    Attributes:
      tables: their tables.
      units: tables under several splits of their rows, in the order of `trials.units`.
      trials: trains on all units at once.
      tuning: a few hypergradient steps on all units.
      described: the meta-features of each unit.
    """

    tables: list[tasks.Table]
    units: list[Unit]
    trials: Trials
    tuning: FineTuning
    described: list[dict[str, float]]


class Outcome(NamedTuple):
    """[units, 2] test loss and error, and the cost on a new table in training runs, if it is known."""

    scores: np.ndarray
    runs: float | None


def set_up(config: Config, tables: list[tasks.Table]) -> Judged:
    """Splits, describes and stacks the tables."""
    run = dataclasses.replace(config.run, num_seeds=config.num_splits, max_buckets=len(config.widths))
    units = make_units(tables, run, 77)
    buckets = stack_buckets(units, np.zeros((len(units), 1), np.float32), np.arange(len(units)), run)
    network = make_network(run)
    trials = Trials(network.problem, make_scores(network, LEAST_PROBABILITY), buckets, run)
    learning = Learning(dataclasses.replace(run, fine_tune_rate=config.fine_tune_rate))
    units = [units[u] for u in trials.units]
    work = (joblib.delayed(tasks.metafeatures)(u.prepared, groups=GROUPS, seed=u.seed) for u in units)
    described = in_processes(work, len(units), "meta-features")
    return Judged(tables, units, trials, FineTuning(learning, config.fine_tune_steps, buckets), described)


def class_shares(units: list[Unit]) -> np.ndarray:
    """Returns [units, 2] test loss and error of the frequencies of the classes among the training rows."""
    rows = []
    for unit in units:
        train, test, num = unit.prepared.train.y, unit.prepared.test.y, unit.prepared.num_classes
        shares = np.maximum(np.bincount(train, minlength=num) / len(train), LEAST_PROBABILITY)
        rows.append((-np.log(shares[test]).mean(), (shares.argmax() != test).mean()))
    return np.array(rows)


def draws_around(key: jax.Array, space, hyperparams, num: int, spread: float) -> list[Any]:
    """Returns `num` λ for each unit: the given one, and draws around it in unconstrained coordinates."""
    coordinates = jax.vmap(lambda x: spaces.to_unconstrained(space, x))(hyperparams)
    leaves, treedef = jax.tree.flatten(coordinates)
    result = [hyperparams]
    for i in range(1, num):
        keys = jax.random.split(jax.random.fold_in(key, i), len(leaves))
        moved = [x + spread * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        result.append(jax.vmap(lambda z: spaces.to_constrained(space, z))(jax.tree.unflatten(treedef, moved)))
    return result


def judge(config: Config, tables: list[tasks.Table], folder: Path, seeds: list[int], with_trees: bool) -> Path:
    """Runs all methods and writes `judged.json`. Finished methods are kept, so that a killed run continues."""
    judged, space = set_up(config, tables), make_network(config.run).space
    kept = folder / "judged"
    kept.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(1234)

    def once(name: str, make: Callable[[], dict[str, Outcome]]) -> dict[str, Outcome]:
        path = kept / f"{name}.json"
        if not path.is_file():
            outcomes = {label: [outcome.scores.tolist(), outcome.runs] for label, outcome in make().items()}
            path.write_text(json.dumps(outcomes))
            print(f"{name}: done", flush=True)
        return {label: Outcome(np.array(s), runs) for label, (s, runs) in json.loads(path.read_text()).items()}

    num = len(judged.units)
    repeat = lambda x: jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (num, *jnp.shape(leaf))), x)
    start_methods = partial(_start_methods, config, judged, key)
    methods = {"class shares": Outcome(class_shares(judged.units), 0.0)}
    methods |= once("defaults", partial(start_methods, "defaults", repeat(spaces.default(space))))
    for label, search in (("random search", random_search), ("TPE", tpe_search)):
        methods |= once(label.split()[0], partial(_search, config, judged, key, label, search))
    if with_trees:
        options = TreeOptions(config.tree_trials, LEAST_PROBABILITY, SMOOTHING)
        methods |= once("trees", partial(_trees, judged, options))
    predicted = []
    for seed in seeds:
        trained = metaopt.load(folder / f"g_{seed}.npz")
        one = json.loads((folder / f"g_{seed}.json").read_text())["one_for_all"]
        one = repeat({name: jnp.float32(value) for name, value in one.items()})
        methods |= once(f"one_{seed}", partial(start_methods, "one λ for all", one, seed))
        features = np.stack([trained.scaled_features(d) for d in judged.described])
        predicted.append(predict(trained.predictor, space, trained.meta_params, features))
        methods |= once(f"g_{seed}", partial(start_methods, "g", predicted[-1], seed))
    if seeds:
        mean = _mean_prediction(space, predicted)
        methods |= once(f"g_mean_{len(seeds)}", partial(start_methods, f"g, mean of {len(seeds)}", mean))
    path = folder / "judged.json"
    details = {
        "tables": [judged.tables[u.table].name for u in judged.units],
        "families": [judged.tables[u.table].family for u in judged.units],
        "rows": [len(u.prepared.train.y) + len(u.prepared.valid.y) + len(u.prepared.test.y) for u in judged.units],
        "scores": {label: outcome.scores.tolist() for label, outcome in methods.items()},
        "runs": {label: outcome.runs for label, outcome in methods.items()},
    }
    path.write_text(json.dumps(details))
    return path


def _start_methods(config: Config, judged: Judged, key, name: str, start, seed: int | None = None):
    """Returns the start, the best of draws around it, and the start after a few hypergradient steps."""
    trials, space, suffix = judged.trials, make_network(config.run).space, "" if seed is None else f" (seed {seed})"
    run_key, draw_key, tune_key, last_key = jax.random.split(key, 4)
    candidates = draws_around(draw_key, space, start, config.proposals, config.spread)
    outcomes = np.stack([trials(run_key, candidate) for candidate in candidates])
    tuned, _ = judged.tuning(tune_key, start)
    # A hypergradient costs about four training runs; then one more run for the last value.
    runs = 1 + 4.3 * config.fine_tune_steps
    return {
        f"{name}{suffix}": Outcome(outcomes[0, :, 1:], 1.0),
        f"{name} + {config.proposals - 1} draws{suffix}": Outcome(
            incumbent(outcomes, config.proposals), float(config.proposals)
        ),
        f"{name} + {config.fine_tune_steps} steps{suffix}": Outcome(trials(last_key, tuned)[:, 1:], runs),
    }


def _mean_prediction(space, predicted: list[Any]):
    """Returns λ of the mean of the predictions, in unconstrained coordinates."""
    coordinates = [jax.vmap(lambda x: spaces.to_unconstrained(space, x))(p) for p in predicted]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *coordinates)
    return jax.vmap(lambda z: spaces.to_constrained(space, z))(mean)


def _search(config: Config, judged: Judged, key, label: str, search) -> dict[str, Outcome]:
    most = max(config.trials)
    with report_progress(most, None, label, unit="trial") as report:
        outcomes = search(jax.random.fold_in(key, 99), judged.trials, make_network(config.run).space, most, report)
    return {f"{label}, {t} trials": Outcome(incumbent(outcomes, t), float(t)) for t in config.trials}


def _trees(judged: Judged, options: TreeOptions) -> dict[str, Outcome]:
    values = trees(judged.units, np.arange(len(judged.units)), options)
    return {label: Outcome(rows[:, :2], None) for label, rows in values.items()}

"""Compares g with searches, controls and trees on the families for judging."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np

import metaopt
from experiments.data.corpus.corpus import row_hash
from experiments.hyperparameters.auto_tune.baselines import TreeOptions, incumbent, random_search, tpe_search, trees
from experiments.hyperparameters.auto_tune.learning import FineTuning, Learning, predict
from experiments.hyperparameters.auto_tune.network import make_network, make_scores
from experiments.hyperparameters.auto_tune.trials import Trials
from experiments.hyperparameters.auto_tune.units import Unit, in_processes, make_units, stack_buckets
from experiments.hyperparameters.transfer.config import GROUPS, Config
from metaopt import spaces, tasks
from metaopt.training import report_progress

LEAST_PROBABILITY = 1e-4  # lower bound for the true class, the same for every method
KEY = 1234  # all runs use it
SMOOTHING = (0.0, 0.02, 0.05, 0.1, 0.2)


class Judged(NamedTuple):
    """The tables to judge on.

    Attributes:
      tables: the tables, each once.
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
    run = dataclasses.replace(config.run, num_seeds=config.num_splits, max_buckets=config.judged_buckets)
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


class Finished:
    """Keeps the outcomes of finished methods, so that a killed run continues.

    Each result is in a separate file. The file's name has a digest of all that determines the result, so that a
    result for other tables, settings or λ is not used. The code is not part of it: delete the folder after a change of
    the code that changes results.
    """

    def __init__(self, folder: Path, *common: Any):
        """`common` determines all results: numbers, texts and arrays, in tuples and dicts."""
        self.folder, self.common, self.seconds = folder, common, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], dict[str, Outcome]], *own: Any) -> dict[str, Outcome]:
        """Returns the kept result, or that of `make`. `own` also determines this result."""
        path = self.folder / f"{name}_{digest(self.common, own)}.json"
        if not path.is_file():
            begin = time.process_time(), time.perf_counter()
            outcomes = {label: [outcome.scores.tolist(), outcome.runs] for label, outcome in make().items()}
            # If other processes did the work, only the wall-clock time includes it.
            seconds = max(time.process_time() - begin[0], time.perf_counter() - begin[1])
            path.write_text(json.dumps({"seconds": seconds, "outcomes": outcomes}))
            print(f"{name}: done", flush=True)
        saved = json.loads(path.read_text())
        self.seconds += saved["seconds"]
        return {label: Outcome(np.array(scores), runs) for label, (scores, runs) in saved["outcomes"].items()}


def digest(*values: Any) -> str:
    """Returns 12 hexadecimal digits of the SHA-256 of numbers, texts and arrays, in tuples and dicts."""
    leaves, structure = jax.tree.flatten(values)
    hashed = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        array = np.asarray(leaf)
        hashed.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()[:12]


def judge(config: Config, tables: list[tasks.Table], folder: Path, seeds: list[int], with_trees: bool) -> Path:
    """Runs all methods and writes `judged.json`. Finished methods are kept, so that a killed run continues."""
    judged, space = set_up(config, tables), make_network(config.run).space
    rows_of_tables = [(table.name, table.family, row_hash(table)) for table in tables]
    settings = dataclasses.asdict(config.run), config.num_splits, config.judged_buckets, LEAST_PROBABILITY, KEY
    once = Finished(folder / "judged", rows_of_tables, settings)
    methods = {"class shares": Outcome(class_shares(judged.units), 0.0)}
    methods |= _controls(config, judged, once, with_trees)
    of_start = partial(_start_outcomes, config, judged, once)
    predicted = []
    for seed in seeds:
        trained = metaopt.load(folder / f"g_{seed}.npz")
        one = json.loads((folder / f"g_{seed}.json").read_text())["one_for_all"]
        one = _repeat({name: jnp.float32(value) for name, value in one.items()}, len(judged.units))
        methods |= of_start(f"one_{seed}", "one λ for all", one, seed)
        features = np.stack([trained.scaled_features(d) for d in judged.described])
        predicted.append(predict(trained.predictor, space, trained.meta_params, features))
        methods |= of_start(f"g_{seed}", "g", predicted[-1], seed)
    if len(seeds) > 1:
        mean = _mean_prediction(space, predicted)
        methods |= of_start(f"g_mean_{len(seeds)}", f"g, mean of {len(seeds)}", mean)
    path = folder / "judged.json"
    details = {
        "tables": [judged.tables[u.table].name for u in judged.units],
        "families": [judged.tables[u.table].family for u in judged.units],
        "rows": [len(u.prepared.train.y) + len(u.prepared.valid.y) + len(u.prepared.test.y) for u in judged.units],
        "scores": {label: outcome.scores.tolist() for label, outcome in methods.items()},
        "runs": {label: outcome.runs for label, outcome in methods.items()},
        "seconds": once.seconds,
    }
    path.write_text(json.dumps(details))
    return path


def _controls(config: Config, judged: Judged, once: Finished, with_trees: bool) -> dict[str, Outcome]:
    """Returns the methods that use nothing learned: the default λ, searches and trees."""
    start = _repeat(spaces.default(make_network(config.run).space), len(judged.units))
    methods = _start_outcomes(config, judged, once, "defaults", "defaults", start)
    for label, search in (("random search", random_search), ("TPE", tpe_search)):
        make = partial(_search, config, judged, jax.random.key(KEY), label, search)
        methods |= once(label.split()[0], make, config.trials)
    if with_trees:
        options = TreeOptions(config.tree_trials, LEAST_PROBABILITY, SMOOTHING)
        methods |= once("trees", partial(_trees, judged, options), tuple(options))
    return methods


def _repeat(hyperparams, num: int):
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (num, *jnp.shape(x))), hyperparams)


def _start_outcomes(config: Config, judged: Judged, once: Finished, name: str, label: str, start, seed=None):
    """Returns the outcomes of `_start_methods`, kept for these λ.

    `start` has λ of all units. So a g that predicts other λ has other outcomes.
    """
    make = partial(_start_methods, config, judged, jax.random.key(KEY), label, start, seed)
    settings = config.proposals, config.spread, config.fine_tune_steps, config.fine_tune_rate
    return once(name, make, label, settings, start)


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

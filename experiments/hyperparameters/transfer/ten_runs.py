"""Compares uses of about ten training runs on development tasks: draws, steps, searches and averages of predictions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import joblib
import numpy as np

import metaopt
from experiments import script
from experiments.hyperparameters.auto_tune.baselines import tpe_search
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.auto_tune.units import Unit, in_processes, make_units, stack_buckets
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.combine import WEIGHTINGS, log_loss, mixture
from experiments.hyperparameters.transfer.compare import coordinates
from experiments.hyperparameters.transfer.config import FEATURES, GROUPS, Config
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.judge import digest, draws_around
from experiments.hyperparameters.transfer.natural import Natural, natural_development
from experiments.hyperparameters.transfer.report import family_means, interval
from experiments.hyperparameters.transfer.runs import Part, Probabilities, Recorded, hyperparams_of, make_steps
from metaopt import tasks

KEY, SPLIT_SEED = 4321, 91
NUM_SPLITS, NUM_TRIALS = 3, 50
NUM_NEIGHBORS = 10
RUNS_OF_STEP = 4.3  # a hypergradient costs about four training runs
SIZES = {"all": (0, np.inf), "below 500 rows": (0, 500), "500 rows and more": (500, np.inf)}


class Stage(NamedTuple):
    """Runs with one label each, and their probabilities in each part, with the runs as the leading axis."""

    labels: list[str]
    parts: list[Probabilities]


def natural_parts(config: Config, natural: Natural, folder: Path, num_splits: int = NUM_SPLITS) -> list[Part]:
    """Splits, describes and stacks the tables as `judge` does, with separate splits and keys."""
    run = dataclasses.replace(config.run, num_seeds=num_splits, max_buckets=config.judged_buckets)
    units = make_units(natural.tables, run, SPLIT_SEED)
    raw = _meta_features(units, folder)
    table = [natural.tables[u.table] for u in units]
    family, rows = np.array([t.family for t in table]), np.array([len(t.y) for t in table])
    kind = np.array([natural.kinds[u.table] for u in units])
    buckets = stack_buckets(units, np.zeros((len(units), 1), np.float32), np.arange(len(units)), run)
    return [
        Part(b.task._replace(features=None), b.test, raw[b.units], family[b.units], kind[b.units], rows[b.units])
        for b in buckets
    ]


def _meta_features(units: list[Unit], folder: Path) -> np.ndarray:
    """Returns [units, F] meta-features, kept in `folder`."""
    path = folder / f"natural_features_{digest([tuple(u.prepared.train) for u in units], list(FEATURES))}.npy"
    if not path.is_file():
        work = (joblib.delayed(tasks.metafeatures)(u.prepared, groups=GROUPS, seed=u.seed) for u in units)
        described = in_processes(work, len(units), "meta-features")
        np.save(path, np.array([[features[name] for name in FEATURES] for features in described]))
    return np.load(path)


def starts(config: Config, folder: Path, parts: list[Part], space) -> dict[str, np.ndarray]:
    """Returns [tasks, L] coordinates of single predictions: g, one λ for all, and points between them."""
    raw = np.concatenate([part.raw_features for part in parts])
    predicted = {label.split(": ")[1]: z for label, z in coordinates([folder], raw, space).items()}
    g, one = predicted.pop("mean of g"), predicted.pop("one λ for all")
    seeds = np.stack(list(predicted.values()))
    train = [part.task.train for part in parts]
    per_class = np.concatenate([np.asarray(t["mask"].sum(1) / t["class_mask"].sum(1)) for t in train])
    between = {
        "half of the way": 0.5,
        "shrunk by the spread of seeds": agreement(g - one, seeds),
        "shrunk by the distance of features": nearness(config, folder, raw)[:, None],
        "shrunk by rows per class": (per_class / (per_class + 20))[:, None],
    }
    between = {label: one + weight * (g - one) for label, weight in between.items()}
    return {"g": g, "one λ": one, **predicted, **between}


def agreement(difference: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Returns d² / (d² + s²) for the distance d from one λ, and the variance s² of a coordinate among the seeds."""
    return difference**2 / np.maximum(difference**2 + seeds.var(axis=0, ddof=1), 1e-12)


def nearness(config: Config, folder: Path, raw: np.ndarray) -> np.ndarray:
    """Returns [n] min(1, m / d), where d is the mean distance of a task to the ten nearest learning tasks.

    m is the median of this distance over the learning tasks themselves.
    """
    scaling = metaopt.load(folder / "g_0.npz").scaling
    learning = []
    for k in range(len(config.widths)):
        with np.load(folder / f"pool_{k}.npz", allow_pickle=False) as saved:
            family, features = saved["family"], saved["raw_features"]
        learning.append(features[[not is_development(f) for f in family]])
    scaled = lambda rows: np.clip(pool.scale_features(scaling, rows), -config.limit, config.limit)
    known, new = scaled(np.concatenate(learning)), scaled(raw)

    def distance(rows, first):
        d = np.sqrt(np.maximum((rows**2).sum(1)[:, None] + (known**2).sum(1)[None] - 2 * rows @ known.T, 0))
        return np.sort(d, axis=1)[:, first : first + NUM_NEIGHBORS].mean(1)

    return np.minimum(1, np.median(distance(known, 1)) / np.maximum(distance(new, 0), 1e-9))


def run_stages(config: Config, folder: Path, parts: list[Part]) -> Stage:
    """Runs everything, stage by stage. Finished stages are kept in `folder`."""
    network = make_network(config.run)
    recorded, space, root = Recorded(network, parts), network.space, jax.random.key(KEY)
    z = starts(config, folder, parts, space)
    run_key, draw_key, search_key = jax.random.split(root, 3)

    def plain():
        for label, row in z.items():
            recorded(run_key, hyperparams_of(space, row))
            yield label
        for label in ("g", "one λ"):
            own = hyperparams_of(space, z[label])
            for i, drawn in enumerate(draws_around(draw_key, space, own, config.proposals, config.spread)[1:], 1):
                own_key = jax.random.fold_in(run_key, 100 + i)
                for text, key, hyperparams in (
                    ("draw", run_key, drawn),
                    ("draw and key", own_key, drawn),
                    ("key", own_key, own),
                ):
                    recorded(key, hyperparams)
                    yield f"{label}, {text} {i}"

    def stepped():
        steps = make_steps(network, config.fine_tune_steps, config.fine_tune_rate)
        sizes = np.cumsum([len(part.family) for part in parts])[:-1]
        for label in ("g", "one λ"):
            rows = zip(np.split(z[label], sizes), parts, strict=True)
            visited = [steps(jax.random.fold_in(run_key, k), *own) for k, own in enumerate(rows)]
            for i, row in enumerate(np.concatenate(visited, axis=1), 1):
                recorded(run_key, hyperparams_of(space, row))
                yield f"{label}, step {i}"

    def searched():
        tpe_search(search_key, recorded, space, NUM_TRIALS, lambda count: None)
        yield from (f"TPE, trial {i}" for i in range(NUM_TRIALS))

    stages = {"plain": plain, "stepped": stepped, "searched": searched}
    mark = digest_of_runs(config, parts, z)
    kept = [
        _kept(folder / "ten_runs" / f"natural_{stage}_{mark}.npz", recorded, make) for stage, make in stages.items()
    ]
    joined = zip(*(stage.parts for stage in kept), strict=True)
    labels = [label for stage in kept for label in stage.labels]
    return Stage(labels, [Probabilities(*map(np.concatenate, zip(*runs, strict=True))) for runs in joined])


def digest_of_runs(config: Config, parts: list[Part], z: dict[str, np.ndarray]) -> str:
    """Returns a digest of all that determines the runs, except the code: rows, starts, keys and settings."""
    settings = config.proposals, config.spread, config.fine_tune_steps, config.fine_tune_rate, NUM_TRIALS, KEY
    return digest([(part.task, part.test) for part in parts], z, dataclasses.asdict(config.run), settings)


def _kept(path: Path, recorded: Recorded, make: Callable) -> Stage:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = list(make())
        arrays = {f"{part}_{k}": x for k, p in enumerate(recorded.take()) for part, x in p._asdict().items()}
        np.savez(path, labels=np.array(labels), **arrays)
        print(f"{path.stem}: done", flush=True)
    with np.load(path, allow_pickle=False) as saved:
        parts = [Probabilities(saved[f"valid_{k}"], saved[f"test_{k}"]) for k in range(len(recorded.parts))]
        return Stage(saved["labels"].tolist(), parts)


def candidates(labels: list[str]) -> dict[str, tuple[list[str], float]]:
    """Returns sets of runs: their labels, and the cost of the set in training runs."""
    draws = lambda start, num, text="draw": [start, *(f"{start}, {text} {i}" for i in range(1, num))]
    steps = lambda start, num: [start, *(f"{start}, step {i}" for i in range(1, num + 1))]
    sets = {label: ([label], 1.0) for label in labels if ", " not in label}
    seeds = [label for label in labels if label.startswith("g_")]
    sets["g and one λ"] = ["g", "one λ"], 2.0
    sets["g of each seed"] = seeds, float(len(seeds))
    for start in ("g", "one λ"):
        sets[f"{start}, 2 keys"] = draws(start, 2, "key"), 2.0
        sets[f"{start} + 2 draws"] = draws(start, 3), 3.0
        for text, name in (("draw", "9 draws"), ("draw and key", "9 draws with keys of their own"), ("key", "9 keys")):
            sets[f"{start} + {name}"] = draws(start, 10, text), 10.0
        sets[f"{start} + 1 step + 4 draws"] = [*steps(start, 1), *draws(start, 5)[1:]], 5 + RUNS_OF_STEP
        for num in (1, 2, 3):
            sets[f"{start} + {num} steps"] = steps(start, num), 1 + RUNS_OF_STEP * num
            sets[f"{start}, after {num} steps"] = steps(start, num)[-1:], 1 + RUNS_OF_STEP * num
    sets["g + one λ + 8 draws of g"] = [*draws("g", 9), "one λ"], 10.0
    near, half = ["g", *seeds], "half of the way"
    sets["g, g of each seed, half of the way"] = [*near, half], 2.0 + len(seeds)
    sets["g, g of each seed + draws"] = [*near, *draws("g", 10 - len(seeds))[1:]], 10.0
    sets["g, g of each seed, half of the way + draws"] = [*near, half, *draws("g", 9 - len(seeds))[1:]], 10.0
    between = [*near, half, "one λ"]
    sets["g, g of each seed, half of the way, one λ + draws"] = [*between, *draws("g", 8 - len(seeds))[1:]], 10.0
    sets["g + 4 draws, one λ + 4 draws"] = [*draws("g", 5), *draws("one λ", 5)], 10.0
    for num in (10, 20, NUM_TRIALS):
        sets[f"TPE, {num} trials"] = [f"TPE, trial {i}" for i in range(num)], float(num)
    return sets


def losses_of(parts: list[Part], runs: Stage) -> dict[tuple[str, str], np.ndarray]:
    """Returns (set, weighting) -> [tasks] losses on test rows. Sets of one run have the weighting "the best" only."""
    index = {label: i for i, label in enumerate(runs.labels)}
    result = {}
    for label, (members, _) in candidates(runs.labels).items():
        rows = [index[m] for m in members]
        for name, weigh in WEIGHTINGS.items() if len(rows) > 1 else [("the best", WEIGHTINGS["the best"])]:
            values = []
            for part, p in zip(parts, runs.parts, strict=True):
                weights = weigh(p.valid[rows], np.asarray(part.task.valid["mask"]))
                values.append(log_loss(mixture(weights, p.test[rows]), np.asarray(part.test["mask"])))
            result[label, name] = np.concatenate(values)
    return result


# References: (set of runs, how they are used). None means the same as in the row of the table.
REFERENCES = (
    ("g", "the best"),
    ("g + 9 draws", "the best"),
    (None, "the best"),
    ("one λ + 9 draws", None),
    ("TPE, 50 trials", None),
)


def table(parts: list[Part], losses: dict, costs: dict[str, float], groups: dict[str, np.ndarray]) -> str:
    """Returns mean losses over families, by group, and differences to `REFERENCES` on all tasks."""
    family = np.concatenate([part.family for part in parts])
    header = ["runs", "their use", "cost"]
    header += [f"{name} ({len(np.unique(family[rows]))} families)" for name, rows in groups.items()]
    header += [f"to {label or 'the same runs'}, {name or 'same use'}" for label, name in REFERENCES]
    lines = []
    for (label, use), values in losses.items():
        cells = [label, use, f"{costs[label]:.1f}"]
        cells += [f"{family_means(values[rows], family[rows]).mean():.4f}" for rows in groups.values()]
        for reference, own in REFERENCES:
            difference = family_means(values - losses[reference or label, own or use], family)
            low, high = interval(difference)
            cells.append(f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(cells)
    return script.table(header, lines)


def groups_of(parts: list[Part]) -> dict[str, np.ndarray]:
    """Returns [tasks] bool for each size class and kind."""
    rows, kind = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "kind"))
    sizes = {name: (rows >= low) & (rows < high) for name, (low, high) in SIZES.items()}
    kinds = {name: kind == name for name in np.unique(kind)} if len(np.unique(kind)) > 1 else {}
    return {name: inside for name, inside in (sizes | kinds).items() if inside.any()}


def compare_ten_runs(config: Config, folder: Path) -> None:
    """Prints the comparison on development tables with their own targets."""
    parts = natural_parts(config, natural_development(folder / "corpus.csv"), folder)
    runs = run_stages(config, folder, parts)
    costs = {label: cost for label, (_, cost) in candidates(runs.labels).items()}
    print(table(parts, losses_of(parts, runs), costs, groups_of(parts)))

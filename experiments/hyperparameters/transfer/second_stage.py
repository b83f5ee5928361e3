"""A second stage after g: a search that has learned from runs on other tables proposes the next runs on a new one.

Its records are training runs on tasks of the families to learn from, with λ drawn around the prediction of the shipped
g. `blackbox.train_meta_optimizer` learns from them. On a new table the first trial is the prediction of g. Each later
trial reads the validation losses of the earlier ones. Controls with as many runs are draws around g, and TPE whose
first trial is the prediction of g.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import script
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.config import Config
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.judge import digest
from experiments.hyperparameters.transfer.natural import natural_development
from experiments.hyperparameters.transfer.rates import shipped_starts, with_interval
from experiments.hyperparameters.transfer.report import family_means
from experiments.hyperparameters.transfer.runs import Part, Recorded, hyperparams_of
from experiments.hyperparameters.transfer.ten_runs import digest_of_runs, natural_parts
from metaopt import automl, base, blackbox

KEY, TASK_SEED, RECORD_SEED, DRAW_SEED = 2468, 0, 1, 2
SPREADS = (0.0, *[0.5] * 7, *[1.0] * 8)  # of the draws that are recorded on each task


def learning_parts(config: Config, folder: Path) -> list[Part]:
    """Returns one task of each family to learn from, at most `config.recorded_tasks`.

    Validation rows also serve as test rows.
    """
    pools, rng = pool.load_pools(config, folder), np.random.default_rng(TASK_SEED)
    family = np.concatenate([own.family for own in pools])
    number = np.concatenate([np.full(len(own.family), k) for k, own in enumerate(pools)])
    row = np.concatenate([np.arange(len(own.family)) for own in pools])
    order = rng.permutation([i for i, name in enumerate(family) if not is_development(name)])
    chosen = order[np.sort(np.unique(family[order], return_index=True)[1])][: config.recorded_tasks]
    parts = []
    for k, own in enumerate(pools):
        rows = np.sort(row[chosen[number[chosen] == k]])
        if len(rows):
            task = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], own.tasks)
            num_rows = (task.train["mask"].sum(1) + task.valid["mask"].sum(1)).astype(int)
            parts.append(Part(task, task.valid, own.raw_features[rows], own.family[rows], own.kind[rows], num_rows))
    return parts


def configurations(hyperparams: dict[str, Any]) -> list[dict[str, float]]:
    """Returns one configuration for each task. λ has a leading axis over tasks."""
    columns = {name: np.asarray(values, np.float64) for name, values in hyperparams.items()}
    return [dict(zip(columns, row, strict=True)) for row in np.stack(list(columns.values()), axis=1).tolist()]


def stacked(trials: Sequence[base.Record]) -> dict[str, np.ndarray]:
    """Returns λ of one trial for each task, with a leading axis over tasks."""
    return {
        name: np.array([trial.configuration[name] for trial in trials], np.float32) for name in trials[0].configuration
    }


def runs_around(network: automl.TabularNetwork, parts: list[Part], spreads: Sequence[float], seed: int):
    """Trains on every task with λ drawn around the prediction of g, once for each spread.

    Returns:
      "loss": [runs, tasks, 2] on validation and test rows; λ by name: [runs, tasks].
    """
    recorded, z = Recorded(network, parts), shipped_starts(parts, network.space)["g"]
    rng = np.random.default_rng(seed)
    losses, drawn = [], []
    for spread in spreads:
        drawn.append(hyperparams_of(network.space, z + spread * rng.normal(size=z.shape)))
        losses.append(recorded(jax.random.key(KEY), drawn[-1])[:, :2])
        recorded.take()  # the probabilities of the rows are not needed
    return {"loss": np.stack(losses), **{name: np.stack([hp[name] for hp in drawn]) for name in drawn[0]}}


def learned_search(network: automl.TabularNetwork, parts: list[Part], runs: dict) -> blackbox.MetaOptimizer:
    """Trains the search on the validation losses of the runs."""
    names = [str(i) for i in range(runs["loss"].shape[1])]
    records = [
        base.Record(name, configuration, outcome=float(loss))
        for losses, *rows in zip(runs["loss"][..., 0], *(runs[name] for name in network.space), strict=True)
        for name, configuration, loss in zip(
            names, configurations(dict(zip(network.space, rows, strict=True))), losses, strict=True
        )
    ]
    family = np.concatenate([part.family for part in parts])
    return blackbox.train_meta_optimizer(
        records,
        space=network.space,
        features=dict(zip(names, scaled_features(parts), strict=True)),
        families=dict(zip(names, family.tolist(), strict=True)),
        key=jax.random.key(KEY),
    )


def scaled_features(parts: list[Part]) -> np.ndarray:
    """Returns [tasks, F] meta-features, clipped at the limit of the shipped g."""
    shipped = automl.shipped_predictor()
    limit = shipped.predictor.config["member"]["limit"]
    raw = np.concatenate([part.raw_features for part in parts])
    return np.clip(pool.scale_features(shipped.scaling, raw), -limit, limit)


def search(network: automl.TabularNetwork, parts: list[Part], searchers: Sequence[base.Searcher], num: int) -> dict:
    """Runs one search on each task. Returns "loss": [num, tasks, 2] on validation and test rows."""
    recorded, losses = Recorded(network, parts), []
    keys = jax.random.split(jax.random.fold_in(jax.random.key(KEY), 1), len(searchers))
    states = [searcher.init(key, network.space) for searcher, key in zip(searchers, keys, strict=True)]
    for _ in range(num):
        asked = [searcher.ask(state, 1) for searcher, state in zip(searchers, states, strict=True)]
        trials, states = [trials[0] for trials, _ in asked], [state for _, state in asked]
        losses.append(recorded(jax.random.key(KEY), stacked(trials))[:, :2])
        recorded.take()
        states = [
            searcher.tell(state, [trial._replace(status="COMPLETE", outcome=float(loss))])
            for searcher, state, trial, loss in zip(searchers, states, trials, losses[-1][:, 0], strict=True)
        ]
    return {"loss": np.stack(losses)}


def best(losses: np.ndarray) -> np.ndarray:
    """Returns [tasks] test losses of the run with the lowest validation loss. `losses` is [runs, tasks, 2]."""
    chosen = losses[..., 0].argmin(0)
    return losses[chosen, np.arange(len(chosen)), 1]


def compare_second_stage(config: Config, folder: Path, num_splits: int) -> None:
    """Learns the search, and prints the comparison on development tables. Finished work is kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    network, num = make_network(config.run), config.proposals
    mark = lambda own, *more: digest(digest_of_runs(config, own, {}), shipped_starts(own, network.space)["g"], more)
    kept = lambda name, make: script.kept(folder / "second_stage", name, make)
    learning = learning_parts(config, folder)
    records = f"records_{mark(learning, SPREADS, RECORD_SEED)}"
    runs = kept(records, lambda: runs_around(network, learning, SPREADS, RECORD_SEED))
    parts = natural_parts(config, natural_development(script.RESULTS / "transfer_corpus.csv"), folder, num_splits)
    learned = learned_search(network, learning, runs)
    first = configurations(hyperparams_of(network.space, shipped_starts(parts, network.space)["g"]))
    features = scaled_features(parts)
    searchers = {
        "learned search": [learned.searcher(f, first=[c]) for f, c in zip(features, first, strict=True)],
        "TPE": [blackbox.tpe(first=[c]) for c in first],
    }
    spreads = 0.0, *[config.spread] * (num - 1)
    losses = {"draws": kept(f"draws_{mark(parts, DRAW_SEED)}", lambda: runs_around(network, parts, spreads, DRAW_SEED))}
    for label, own in searchers.items():
        name = f"{label.replace(' ', '_')}_{mark(parts, runs)}"
        losses[label] = kept(name, lambda own=own: search(network, parts, own, num))
    family = np.concatenate([part.family for part in parts])
    counts = [count for count in (1, 2, 3, 5, 10) if count <= num]
    lines = []
    for label, own in losses.items():
        cells = [label]
        for count in counts:
            values = best(own["loss"][:count])
            cells.append(f"{family_means(values, family).mean():.4f}")
        difference = best(own["loss"]) - best(losses["draws"]["loss"])
        lines.append([*cells, "" if label == "draws" else with_interval(family_means(difference, family))])
    header = ["after the prediction of g", *(f"{count} runs" for count in counts), "difference to draws"]
    print(f"{len(family)} tasks, {len(np.unique(family))} families; records of {runs['loss'].shape[1]} tasks\n")
    print(script.table(header, lines), flush=True)

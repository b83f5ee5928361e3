"""Rows that need no supernet: training-free scores, and searches in the table of validation accuracies."""

import jax
import numpy as np
from scipy.stats import rankdata

from experiments.architecture.nas_bench_201.config import Config
from experiments.architecture.nas_bench_201.searches import genotype_of
from metaopt import blackbox, nas, spaces

SCREENED = 100  # cells from which training-free scores choose


def run_scores(task, table, config: Config, seed: int) -> dict:
    """Computes our scores of random cells. The screened searches choose from the same cells."""
    network = nas.nas_bench_201_space(channels=config.channels, cells_per_stage=config.cells)
    score = nas.training_free_scores(network, (config.size, config.size, 3), ops=nas.NAS_BENCH_201_OPS)
    batch = jax.tree.map(lambda leaf: leaf[:64], task.train)
    rows = np.random.default_rng(seed).choice(len(table.encodings), config.num_scored, replace=False)
    scores_by_name: dict[str, list] = {"rows": rows.tolist()}
    for row in rows:
        for name, value in score(jax.random.key(seed), genotype_of(table.encodings[row]), batch).items():
            scores_by_name.setdefault(name, []).append(float(value) if np.isfinite(value) else None)
    return scores_by_name


def screened(values: dict[int, float]) -> int:
    """Returns the best of `SCREENED` random cells, each drawn once.

    It is the first trial of `nas.screened_random_search`.
    """
    return max(list(values)[:SCREENED], key=values.__getitem__)


def table_searches(table: nas.Benchmark, num_seeds: int, num: int) -> dict[str, np.ndarray]:
    """Returns name -> [seeds, tasks] test accuracies of the best of `num` cells, by each task's own validation."""
    rows_by_search: dict[str, np.ndarray] = {}
    space = {name: spaces.integer(0, 4) for name in table.dims}
    rows = {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}
    searchers = {
        f"random search, {num} cells": blackbox.random_search(first=()),
        f"regularized evolution, {num} cells": blackbox.regularized_evolution(population_size=10, sample_size=3),
    }
    for name, searcher in searchers.items():
        accuracies = np.zeros((num_seeds, len(table.tasks)))
        for seed in range(num_seeds):
            for t in range(len(table.tasks)):
                state, tried = searcher.init(jax.random.key(seed), space), []
                for _ in range(num):
                    (trial,), state = searcher.ask(state, 1)
                    row = rows[tuple(trial.configuration.values())]
                    outcome = float(table.valid[row, t, -1])
                    state = searcher.tell(state, [trial._replace(outcome=outcome, status="COMPLETE")])
                    tried.append((outcome, row))
                accuracies[seed, t] = 100 - table.test[min(tried)[1], t]
        rows_by_search[name] = accuracies
    ranks = np.stack([rankdata(table.valid[:, t, -1]) for t in range(len(table.tasks))], 1)
    others = [np.delete(ranks, t, 1).mean(1).argmin() for t in range(len(table.tasks))]
    rows_by_search["best of the other tasks"] = 100 - table.test[others, range(len(table.tasks))][None]
    rows_by_search["the cell 9930"] = 100 - table.test[[9930]]
    rows_by_search["a random cell"] = 100 - table.test.mean(0)[None]
    rows_by_search["the best cell of each task, by its test"] = 100 - table.test.min(0)[None]
    return rows_by_search

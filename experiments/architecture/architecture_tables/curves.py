"""Regret curves of searches in a table, which need no other task."""

import jax
import numpy as np
from scipy.stats import rankdata

from metaopt import blackbox, nas, spaces

MARKS = (1, 5, 20, 100)  # evaluations at which regrets are reported


def random_curve(losses: np.ndarray, rng: np.random.Generator, num: int) -> np.ndarray:
    """Returns [num] rows: the best by validation after each draw."""
    rows = rng.permutation(len(losses))[:num]
    return rows[[int(np.argmin(losses[rows[: i + 1]])) for i in range(num)]]


def evolution_curve(table: nas.Benchmark, losses: np.ndarray, seed: int, num: int, rows: dict) -> np.ndarray:
    space = {name: spaces.integer(0, n - 1) for name, n in zip(table.dims, table.num_choices, strict=True)}
    searcher = blackbox.regularized_evolution(population_size=10, sample_size=3)
    state, best, curve = searcher.init(jax.random.key(seed), space), -1, []
    for _ in range(num):
        (trial,), state = searcher.ask(state, 1)
        row = rows[tuple(trial.configuration.values())]
        state = searcher.tell(state, [trial._replace(outcome=float(losses[row]), status="COMPLETE")])
        best = row if best < 0 or losses[row] < losses[best] else best
        curve.append(best)
    return np.array(curve)


def regrets(table: nas.Benchmark, task: int, num_seeds: int, num: int) -> dict[str, np.ndarray]:
    """Returns method -> [seeds, evaluations] test loss minus the table's smallest."""
    losses, test = table.valid[:, task, -1], table.test[:, task]
    rows = {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}
    seeds = range(num_seeds)
    curves = {"random search": [random_curve(losses, np.random.default_rng(s), num) for s in seeds]}
    if len(rows) == np.prod(table.num_choices):  # otherwise, a change of one digit may leave the table
        curves["regularized evolution"] = [evolution_curve(table, losses, s, num, rows) for s in seeds]
    regret = {name: test[np.array(chosen)] - test.min() for name, chosen in curves.items()}
    others = [u for u in range(len(table.tasks)) if u != task]
    if others:
        ranks = np.stack([rankdata(table.valid[:, u, -1]) for u in others], 1).mean(1)
        regret["best of the other tasks"] = np.full((1, num), test[ranks.argmin()] - test.min())
    if table.name == "NAS-Bench-201":
        regret["the cell 9930"] = np.full((1, num), test[9930] - test.min())
    return regret

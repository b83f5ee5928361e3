"""h(t'): which architecture of a table each method chooses for a task that is left out."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from scipy.stats import rankdata

from experiments.architecture.architecture_tables.cells import (
    EDGE_OPS,
    cell_searcher,
    configurations,
    kept_by_alpha,
    task_features,
)
from metaopt import nas
from metaopt.nas.search import _score_prior

GRIDS = ((1e-3, 1e-2, 1e-1, 1.0, 10.0), (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0))  # of digits, of pairs
NUM_HALVES = 20  # random divisions of a table into two halves


def percentiles(losses: np.ndarray) -> np.ndarray:
    """Returns [A] 1 for the smallest loss, 0 for the largest; ties get their mean."""
    return 1 - (rankdata(losses) - 1) / (len(losses) - 1)


def best_by_validation(valid: np.ndarray) -> np.ndarray:
    """Returns the rows that share the smallest validation loss. Validation chooses one of them by chance."""
    return np.flatnonzero(valid == valid.min())


def choose_with_trials(prior: _score_prior.ScorePrior, losses: np.ndarray, num_trials: int) -> int:
    """Returns the chosen row after `num_trials` trials on the new task, each with the largest expected improvement."""
    tried: list[int] = []
    for _ in range(num_trials):
        tried.append(int(_score_prior.score_improvement(prior, tried, losses[tried]).argmax()))
    return int(_score_prior.score_posterior(prior, tried, losses[tried])[0].argmax())


def searched(searcher: nas.CellSearcher, table: nas.Benchmark, losses: np.ndarray, num_trials: int) -> int:
    """Returns the chosen row after the trials on the new task that `searcher` asks for."""
    rows = {tuple(c.values()): row for row, c in enumerate(configurations(table))}
    search = searcher.searcher()
    state = search.init(jax.random.key(0), None)
    for _ in range(num_trials):
        (trial,), state = search.ask(state, 1)
        loss = float(losses[rows[tuple(trial.configuration.values())]])
        state = search.tell(state, [trial._replace(outcome=loss, status="COMPLETE")])
    return rows[tuple(searcher.predict(trials=state.trials).values())]


def half(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of two random halves of a table.

    A whole table has a single best row, which owes much to chance. Many halves have many best rows.
    """
    rows = np.random.default_rng(seed).permutation(num)
    return rows[: num // 2], rows[num // 2 :]


class Kept:
    """Outcomes of left-out tasks, in a file, with their code. A run that is stopped continues from the file."""

    def __init__(self, path: Path | None, code: str, afresh: bool = False, any_code: bool = False):
        self.path, self.code = path, code
        self.tasks = json.loads(path.read_text()) if path is not None and path.exists() and not afresh else {}
        self.num_before = len(self.tasks)
        if self.num_other_code() and not any_code:
            sys.exit(f"{path} holds tasks by other code: give --afresh, or --any-code to take them as they are.")

    def num_other_code(self) -> int:
        """Returns the number of tasks whose outcomes are from other code."""
        return sum(outcome.get("code") != self.code for outcome in self.tasks.values())

    def add(self, name: str, outcome: dict) -> None:
        self.tasks[name] = {**outcome, "code": self.code}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")  # other processes may write there, too
            temporary.write_text(json.dumps(self.tasks))
            temporary.replace(self.path)


class Outcomes(NamedTuple):
    """The outcomes of leaving out each of T tasks of a table in turn, with K keys of training."""

    found: dict[str, np.ndarray]  # method -> [K, T] percentiles of its choices; [1, T] if the method has no key
    lost: dict[str, np.ndarray]  # the same for test losses, minus the mean of the best by validation of the whole table
    alone: np.ndarray  # [K, T, members] percentiles of single members of "h by cells"
    effects: dict[str, np.ndarray]  # h -> [K * T] encodings of the cells that mean effects of ops give
    ties: list[np.ndarray]  # [T] percentiles of all cells that are the best by validation of the whole table


def leave_one_out(
    table: nas.Benchmark, tasks: list[int], num_random: int, folder: Path, smoke: bool, kept: Kept, num_keys: int = 1
) -> Outcomes:
    """Leaves out every task with every key, and saves each outcome. All tasks of a key come before the next key."""
    numbers = range(1 if smoke else len(tasks))
    name = lambda t, seed: f"{table.name}, {table.tasks[tasks[t]]}, {num_random}" + (f", key {seed}" if seed else "")
    for seed in range(num_keys):
        left = [t for t in numbers if name(t, seed) not in kept.tasks]
        for t, outcome in left_out(table, tasks, left, num_random, folder, smoke, seed):
            kept.add(name(t, seed), outcome)
    valid, test = table.valid[:, tasks, -1], table.test[:, tasks]
    return gathered(
        [[kept.tasks[name(t, seed)] for t in numbers] for seed in range(num_keys)],
        [valid[:, t] for t in numbers],
        [test[:, t] for t in numbers],
    )


def gathered(outcomes: list[list[dict]], valid: list[np.ndarray], test: list[np.ndarray]) -> Outcomes:
    """Combines the outcomes of K keys × T tasks. The losses [A] of each task define its ties."""
    rows = [best_by_validation(losses) for losses in valid]
    ties = [percentiles(losses)[tied] for losses, tied in zip(test, rows, strict=True)]
    # Saved outcomes are relative to the first of the tied rows. The shift makes them relative to the mean of the ties.
    shift = np.array([losses[tied[0]] - losses[tied].mean() for losses, tied in zip(test, rows, strict=True)])

    def together(part):
        names = outcomes[0][0][part]
        return {
            n: np.array([[o[part][n] for o in by_task] for by_task in outcomes if n in by_task[0][part]]) for n in names
        }

    judged, lost = together("found"), {name: values + shift for name, values in together("lost").items()}
    judged["all by validation"] = np.array([[values.mean() for values in ties]])
    lost["all by validation"] = np.zeros((1, len(ties)))
    effects = {name: values.reshape(-1, values.shape[-1]) for name, values in together("effects").items()}
    alone = np.array([[o["alone"] for o in by_task] for by_task in outcomes])
    return Outcomes(judged, lost, alone, effects, ties)


def left_out(
    table: nas.Benchmark, tasks: list[int], left: list[int], num_random: int, folder: Path, smoke: bool, seed: int = 0
):
    """Yields each left-out task with its outcome, ready for JSON.

    Methods that do not depend on the key of training are only in the outcome of the first key.
    """
    if not left:
        return
    valid, test = table.valid[:, tasks, -1], table.test[:, tasks]
    ranks, judged = (np.stack([percentiles(x) for x in losses.T], 1) for losses in (valid, test))
    scores, test_scores = (np.stack([_score_prior.normal_scores(x) for x in y.T], 1) for y in (valid, test))
    blocks = list(zip(_score_prior.configuration_columns(configurations(table)), GRIDS, strict=True))
    graphs, features = [table.graph(row) for row in table.encodings], task_features(table, folder)
    draws = np.random.default_rng(0).integers(len(valid), size=(num_random, 100))
    halves = [rows for draw in range(NUM_HALVES) for rows in half(len(valid), draw)]
    for t in left:
        others = [u for u in range(len(tasks)) if u != t]
        order = np.argsort(-ranks[:, others].mean(1), kind="stable")
        best = lambda rows, t=t: rows[np.argmin(valid[rows, t])]
        prior = _score_prior.score_prior(blocks, scores[:, others], test_scores[:, others])
        searcher = cell_searcher(table, graphs, [tasks[u] for u in others], features, smoke, seed)
        cells, crossed = searcher.scores().mean(0), searcher.scores(features[table.tasks[tasks[t]]]).mean(0)
        both = searcher.posterior()[0]
        by_alpha = {"h by digits": prior.mean, "h by cells": cells, "h": both} if table.name in EDGE_OPS else {}
        effects = {
            name: kept_by_alpha(table, s) for name, s in by_alpha.items() if not (seed and name == "h by digits")
        }
        once = lambda rows: {} if seed else rows
        chosen = {
            **once(
                {
                    "best of the other tasks": order[0],
                    "best of the other tasks, 5 trials": best(order[:5]),
                    "best of the other tasks, 20 trials": best(order[:20]),
                    "h by digits, no trial": int(prior.mean.argmax()),
                }
            ),
            "h by cells, no trial": int(cells.argmax()),
            "h by cells, crossed, no trial": int(crossed.argmax()),
            "h, no trial": int(both.argmax()),
            **{f"mean effects of ops in {name}, no trial": row for name, row in effects.items()},
            **once({"h by digits, 5 trials": choose_with_trials(prior, valid[:, t], 5)}),
            "h, 5 trials": searched(searcher, table, valid[:, t], 5),
            **once({"h by digits, 20 trials": choose_with_trials(prior, valid[:, t], 20)}),
            "h, 20 trials": searched(searcher, table, valid[:, t], 20),
            **once({"all by validation": best(np.arange(len(valid)))}),
        }
        chosen_percentiles = {name: float(judged[row, t]) for name, row in chosen.items()}
        for k in () if seed else (5, 20, 100):
            chosen_percentiles[f"random, best of {k}"] = float(np.mean([judged[best(rows[:k]), t] for rows in draws]))
        by_half = lambda expected, t=t: float(np.mean([judged[rows[expected[rows].argmax()], t] for rows in halves]))
        chosen_percentiles["h, half of the table"] = by_half(both)
        if not seed:
            chosen_percentiles["best of the other tasks, half of the table"] = by_half(ranks[:, others].mean(1))
            chosen_percentiles["h by digits, half of the table"] = by_half(prior.mean)
        oracle = test[best(np.arange(len(valid))), t]
        yield (
            t,
            {
                "found": chosen_percentiles,
                "lost": {name: float(test[row, t] - oracle) for name, row in chosen.items()},
                "alone": [float(judged[member.argmax(), t]) for member in searcher.scores()],
                "effects": {name: table.encodings[row].tolist() for name, row in effects.items()},
            },
        )

"""Architectures from tables of earlier searches: h(t') for a new task, without a trial and with five.

The only knowledge is records of other tasks: architectures × tasks × losses. One task at a time is left out. Losses
become normal scores, since tasks have different metrics. With one-hot digits and pairs of digits as features, a task is
a vector of coefficients. The other tasks define its prior, and trials condition it (`CellSearcher.prior`):

    h(t'), no trial:   the largest expected score
    h(t'), k trials:   condition on the scores of the trials, next try the largest expected improvement, and
                       choose by the posterior mean.

Within a run, no choice depends on the task that is left out. Without a trial, nothing is known about this task, except
in "crossed", which reads its features. Only the order of trials is used, matched to their expected scores. (The form of
the model, u and d of `CellSearcher.prior`, was decided after a first run on these tables.)

This method is "h by digits".

"h by cells" is the `scores` of `nas.train_cell_searcher`: a transformer over the graphs of cells, trained on the
same records by a ranking loss. "Crossed" also reads features of the task. For TransNAS-Bench-101, they are the
correlations of training-free scores of 100 of its architectures on the task with their operations. For NAS-Bench-Graph,
they are the sizes of the graph. The sizes, steps and rate of the transformer were chosen on NAS-Bench-201, which is not
in the comparison.

"h" combines both, as in `nas.CellSearcher`: without trials, the mean of the two predictions, in units of normal
scores. With trials, it uses the same posterior, where the features are digits, pairs and the transformer's embedding of
a cell. This combination was selected from several by its results on the micro space. So these results are not a test of
a form chosen in advance. The other two spaces had no influence. (The transformer's embedding was learned from the same
scores that determine its variances. So h is more certain than it should be.)

"Mean effects of ops" is for the micro space, whose ops are on edges. It turns the predictions of h for all cells into
α: the value of an op is the mean over the cells that contain it (`nas.op_scores`). The report names the cell that this
α gives, with one op per edge. A search that begins at this α begins with this cell. The knowledge of h about
combinations of ops is lost.

The first baseline is the architecture of best mean rank on the other tasks (also the best by validation of the five
best such). The others are the best of random architectures, and the best by validation of the whole table, which is the
best choice that validation by itself allows. A choice is scored by its percentile of the test losses of its task (1:
the best).

The second part has regret curves of random search and regularized evolution. It also has the constant cell 9930, which
is nearly the best on every task of NAS-Bench-201. So this benchmark cannot show that a search depends on its task.

    python experiments/architecture_tables.py --afresh      ten minutes; writes results/architecture_tables.md and .png
    python experiments/architecture_tables.py --train-seeds 3 --afresh      the transformers trained with three keys
    python experiments/architecture_tables.py --any-code    minutes: the committed .json's tasks, by earlier code
    python experiments/architecture_tables.py --smoke       seconds; prints only

Tables are read from the folder that METAOPT_DATA names. The outcome of each task is saved in
results/architecture_tables.json and is not computed again. Outcomes of other code, including other versions of the
library, are only used with --any-code, and the result states how many there are. --afresh starts again from nothing.
The same command without it continues a run that was stopped.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import script
from data import benchmarks
from scipy.stats import rankdata

from metaopt import blackbox, nas, spaces
from metaopt.nas.search import _score_prior

MARKS = (1, 5, 20, 100)  # evaluations at which regrets are reported


# ---- h(t') ----------------------------------------------------------------------------------------------------------


def percentiles(losses: np.ndarray) -> np.ndarray:
    """Returns [A] 1 for the smallest loss, 0 for the largest; ties get their mean."""
    return 1 - (rankdata(losses) - 1) / (len(losses) - 1)


def best_by_validation(valid: np.ndarray) -> np.ndarray:
    """Returns the rows that share the smallest validation loss. Validation chooses one of them by chance."""
    return np.flatnonzero(valid == valid.min())


GRIDS = ((1e-3, 1e-2, 1e-1, 1.0, 10.0), (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0))  # of digits, of pairs


def choose_with_trials(prior: _score_prior.ScorePrior, losses: np.ndarray, num_trials: int) -> int:
    """Returns the chosen row after `num_trials` trials on the new task, each with the largest expected improvement."""
    tried: list[int] = []
    for _ in range(num_trials):
        tried.append(int(_score_prior.score_improvement(prior, tried, losses[tried]).argmax()))
    return int(_score_prior.score_posterior(prior, tried, losses[tried])[0].argmax())


# ---- By α ----------------------------------------------------------------------------------------------------------

EDGE_OPS = {"TransNAS-Bench-101, micro": ("none", "skip_connect", "conv1x1", "conv3x3")}  # cells with ops on edges


def kept_by_alpha(table: nas.Benchmark, scores: np.ndarray) -> int:
    """Returns the row of the cell that α gives. α is computed from the scores [A] of all rows.

    The value of an op is the mean over the cells that contain it.
    """
    cell = nas.complete_cell(3, EDGE_OPS[table.name])
    network = nas.Network({"cell": cell}, (nas.Layer("conv", 8), nas.Layer("cell", 8)), num_outputs=2)
    genotypes = [
        {"cell": tuple((*e[:2], e.ops[x]) for e, x in zip(cell.edges, row, strict=True) if e.ops[x] != "none")}
        for row in table.encodings
    ]
    alpha = nas.op_scores(network, genotypes, scores)
    weights = {kind: jax.nn.softmax(a, -1) for kind, a in alpha.items()}
    return genotypes.index(nas.derive_genotype(network, weights, keep=None))


# ---- The encoder of cells -------------------------------------------------------------------------------------------

PROBED = 100  # architectures whose training-free scores describe a task
PROBES = ("grasp", "fisher", "grad_norm", "plain", "nwot", "jacov", "snip")  # the scores that all tasks have
GRAPHS = {  # nodes, edges, features, classes
    "cora": (2_708, 5_278, 1_433, 7),
    "citeseer": (3_327, 4_552, 3_703, 6),
    "pubmed": (19_717, 44_324, 500, 3),
    "cs": (18_333, 81_894, 6_805, 15),
    "physics": (34_493, 247_962, 8_415, 5),
    "computers": (13_752, 245_861, 767, 10),
}


def task_features(table: nas.Benchmark, folder: Path) -> dict[str, np.ndarray]:
    """Returns knowledge about a task without training: sizes of a graph, or probes by training-free scores."""
    if table.name == "NAS-Bench-Graph":
        return {
            name: np.log([nodes, edges / nodes, width, classes])
            for name, (nodes, edges, width, classes) in GRAPHS.items()
        }
    space = table.name.split(", ")[1]
    with np.load(folder / "transnasbench101.npz") as data:
        scores, names = data[f"{space}_score_subset"], data["score_subset_names"].tolist()
    rows = np.flatnonzero(np.isfinite(scores).all((1, 2)))
    rows = np.random.default_rng(0).permutation(rows)[:PROBED]
    operations, columns = scores[rows, :, names.index("flops")], [names.index(name) for name in PROBES]
    rho = lambda a, b: float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    return {
        task: np.array([rho(scores[rows, t, c], operations[:, t]) for c in columns])
        for t, task in enumerate(table.tasks)
    }


def configurations(table: nas.Benchmark) -> list[dict]:
    return [dict(zip(table.dims, row, strict=True)) for row in table.encodings.tolist()]


def cell_searcher(table: nas.Benchmark, graphs: list, others: list[int], features, smoke: bool, seed: int):
    """Runs `nas.train_cell_searcher` on the records of the other tasks, with the key of `seed`."""
    cells, name = configurations(table), lambda c: tuple(c.values())
    at = {name(c): row for row, c in enumerate(cells)}

    names = [table.tasks[t] for t in others]
    sizes: dict[str, Any] = {"num_steps": 2, "num_members": 2, "width": 8} if smoke else {}
    return nas.train_cell_searcher(
        nas.benchmark_records(table, names),
        lambda c: graphs[at[name(c)]],
        features=features,
        tests=nas.benchmark_records(table, names, test=True),
        key=jax.random.key(seed),
        **sizes,
    )


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
    at = range(1 if smoke else len(tasks))
    name = lambda t, seed: f"{table.name}, {table.tasks[tasks[t]]}, {num_random}" + (f", key {seed}" if seed else "")
    for seed in range(num_keys):
        left = [t for t in at if name(t, seed) not in kept.tasks]
        for t, outcome in left_out(table, tasks, left, num_random, folder, smoke, seed):
            kept.add(name(t, seed), outcome)
    valid, test = table.valid[:, tasks, -1], table.test[:, tasks]
    return gathered(
        [[kept.tasks[name(t, seed)] for t in at] for seed in range(num_keys)],
        [valid[:, t] for t in at],
        [test[:, t] for t in at],
    )


def gathered(outcomes: list[list[dict]], valid: list[np.ndarray], test: list[np.ndarray]) -> Outcomes:
    """Combines the outcomes of K keys × T tasks. The losses [A] of each task define its ties."""
    rows = [best_by_validation(losses) for losses in valid]
    ties = [percentiles(losses)[tied] for losses, tied in zip(test, rows, strict=True)]
    # Saved outcomes are relative to the first of the ties.
    shift = np.array([losses[tied[0]] - losses[tied].mean() for losses, tied in zip(test, rows, strict=True)])

    def together(part):
        names = outcomes[0][0][part]
        return {n: np.array([[o[part][n] for o in of] for of in outcomes if n in of[0][part]]) for n in names}

    found, lost = together("found"), {name: values + shift for name, values in together("lost").items()}
    found["all by validation"] = np.array([[values.mean() for values in ties]])
    lost["all by validation"] = np.zeros((1, len(ties)))
    effects = {name: values.reshape(-1, values.shape[-1]) for name, values in together("effects").items()}
    alone = np.array([[o["alone"] for o in of] for of in outcomes])
    return Outcomes(found, lost, alone, effects, ties)


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
    graphs, features = [nas.benchmark_graph(table, row) for row in table.encodings], task_features(table, folder)
    draws = np.random.default_rng(0).integers(len(valid), size=(num_random, 100))
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
        found = {name: float(judged[row, t]) for name, row in chosen.items()}
        for k in () if seed else (5, 20, 100):
            found[f"random, best of {k}"] = float(np.mean([judged[best(rows[:k]), t] for rows in draws]))
        oracle = test[best(np.arange(len(valid))), t]
        yield (
            t,
            {
                "found": found,
                "lost": {name: float(test[row, t] - oracle) for name, row in chosen.items()},
                "alone": [float(judged[member.argmax(), t]) for member in searcher.scores()],
                "effects": {name: table.encodings[row].tolist() for name, row in effects.items()},
            },
        )


# ---- Regret curves --------------------------------------------------------------------------------------------------


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
    found = {name: test[np.array(chosen)] - test.min() for name, chosen in curves.items()}
    others = [u for u in range(len(table.tasks)) if u != task]
    if others:
        ranks = np.stack([rankdata(table.valid[:, u, -1]) for u in others], 1).mean(1)
        found["best of the other tasks"] = np.full((1, num), test[ranks.argmin()] - test.min())
    if table.name == "NAS-Bench-201":
        found["the cell 9930"] = np.full((1, num), test[9930] - test.min())
    return found


# ---- Report ---------------------------------------------------------------------------------------------------------

BARS = {  # stated before any run
    "TransNAS-Bench-101, micro": {"h, no trial": 0.88, "h, 5 trials": 0.975},
    "TransNAS-Bench-101, macro": {"h, no trial": 0.89, "h, 5 trials": 0.97},
    "NAS-Bench-Graph": {"h, no trial": 0.92, "h, 5 trials": 0.935},
}


def rows_of(name: str, found: dict[str, np.ndarray]) -> list[list[str]]:
    """Returns a row per method: its mean, the value of each task, its wins and its bar.

    The deviation is over keys, of the means over tasks.
    """
    rows = []
    for method, values in found.items():
        # The baseline with the same number of trials. Without such a baseline, the one without trials.
        rival = (
            "best of the other tasks" + method[method.rindex(",") :].replace(", no trial", "") if "," in method else ""
        )
        baseline = found.get(rival, found["best of the other tasks"])
        won = (values > baseline).sum(1)
        wins = f"{won.mean():.3g} of {values.shape[1]}" if method.startswith(("h", "mean")) else ""
        means, bar = values.mean(1), BARS[name].get(method)
        told = "" if bar is None else f"{bar} {'reached' if means.mean() >= bar else 'missed'}"
        if told and len(means) > 1:
            told = told.replace("missed", "missed; reached") + f" by {(means >= bar).sum()} of {len(means)} keys"
        mean = script.spread(means) if len(means) > 1 else f"{means[0]:.3f}"
        rows.append([method, mean, *(f"{v:.2f}" for v in values.mean(0)), wins, told])
    return rows


def about_ties(tasks: list[str], ties: list[np.ndarray]) -> list[str]:
    """Describes how much of validation's choice is chance, if several configurations are the best by validation."""
    told = [
        f"{task}: {len(values)} configurations, of percentiles {values.min():.3f} to {values.max():.3f}"
        for task, values in zip(tasks, ties, strict=False)
        if len(values) > 1
    ]
    if not told:
        return []
    low, mean, high = (np.mean([of(values) for values in ties]) for of in (np.min, np.mean, np.max))
    return [
        f'Several are the best by validation of the whole table ({"; ".join(told)}). "All by validation" is their '
        f"mean; by which of them is taken, its mean over tasks is {low:.3f} to {high:.3f} ({mean:.3f} on average).",
        "",
    ]


def report(tables: dict[str, tuple[list[str], Outcomes]], curves, num_seeds: int, num_keys: int = 1) -> str:
    lines = [
        "The form of the model was written with these tables in view: that an architecture has something of its own on "
        "every task, and on one (u and d of `CellSearcher.prior`), after a first run on them. What is left out of "
        "a run is a task, not the tables. The transformers of h and of h by cells were trained with "
        + (
            f"{num_keys} keys: their rows are means over them, with the standard deviation over keys of the mean over "
            "tasks."
            if num_keys > 1
            else "one key; how much hangs on it, the deviation over members says (`--train-seeds`)."
        ),
        "",
        '"h by digits" is a linear model of the digits of an architecture and of their pairs, "h by cells" a '
        'transformer over the graphs of cells, "h" both (`nas.train_cell_searcher`); all learn from the other '
        "tasks of the table. None of them, but crossed, knows anything of the task that is left out, beside the trials "
        "it is told. Crossed, the transformer is told features of it: of TransNAS-Bench-101 "
        f"{len(PROBES)} training-free scores of {PROBED} architectures ({', '.join(PROBES)}; how their ranks go with "
        "operations), of NAS-Bench-Graph the sizes of the graph.",
        "",
    ]
    for name, (tasks, (found, lost, alone, effects, ties)) in tables.items():
        header = ["", "mean", *tasks[: len(ties)], "better than the best of the others", "bar"]
        told = script.spread(alone.mean(1).ravel())  # one seed each
        lines += [f"## {name}: percentile of what is chosen", "", script.table(header, rows_of(name, found)), ""]
        lines += about_ties(tasks, ties)
        if name.endswith("micro"):
            lines += ["The form of h was chosen by what came of some of them here: its rows are no test of it.", ""]
        if effects:
            cells = np.unique(np.concatenate(list(effects.values())), axis=0).tolist()
            named = "; ".join(", ".join(EDGE_OPS[name][x] for x in cell) for cell in cells)
            lines += [f"What is left of mean effects of ops, on the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3: {named}.", ""]
            if len(cells) == 1:
                lines += [
                    'It is one cell, for every task that is left out and whatever h says. So the rows "mean effects" '
                    "measure the effects of single ops, and nothing of h: what makes a cell of this space good is how "
                    "its ops go together, which an op at a time cannot say.",
                    "",
                ]
        of = "the members of all keys" if num_keys > 1 else "members"
        lines += [f'Single members of "h by cells", mean over tasks and deviation of that over {of}: {told}.', ""]
        if name == "NAS-Bench-Graph":  # the other tables' tasks have their own units
            told = ", ".join(f"{method} {100 * values.mean():+.2f}" for method, values in lost.items())
            lines += [f"Test error less that of the best by validation of the whole table, in points: {told}.", ""]
    lines += ["## Regret curves", ""]
    rows = []
    for (name, task), found in curves.items():
        for method, values in found.items():
            told = []
            for mark in MARKS:
                if mark <= values.shape[1]:
                    at = values[:, mark - 1]
                    band = 1.96 * at.std(ddof=1) / np.sqrt(len(at)) if len(at) > 1 else 0.0
                    told.append(f"{at.mean():.3g} ± {band:.1g}" if len(at) > 1 else f"{at.mean():.3g}")
                else:
                    told.append("")
            rows.append([name, task, method, *told])
    lines.append(script.table(["table", "task", "", *(f"after {m}" for m in MARKS)], rows))
    lines += [
        "",
        "Percentiles are among the test losses of the task (of TransNAS-Bench-101, which has none, validation losses). "
        "Test regret in the units of the table, of the best by validation so far, mean and 95 % band over "
        f"{num_seeds} seeds, by the number of architectures that were trained: tables that say nothing of seconds are "
        "among them. Regularized evolution: population 10, samples of 3; not where the table lacks some of the digits' "
        "combinations, which it would ask for.",
    ]
    return "\n".join(lines)


def plot(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods_shown = list(dict.fromkeys(method for found in curves.values() for method in found))
    columns = 3
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, ((name, task), found) in zip(axes.flat, curves.items(), strict=False):
        for method, values in found.items():
            steps, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            color = f"C{methods_shown.index(method)}"
            (line,) = axis.plot(steps, mean, "--" if len(values) == 1 else "-", color=color, label=method)
            if len(values) > 1:
                band = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
                axis.fill_between(steps, mean - band, mean + band, color=line.get_color(), alpha=0.3)
        axis.set(title=f"{name}: {task}", xscale="log", xlabel="trained architectures", ylabel="test regret")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=200)
    parser.add_argument("--afresh", action="store_true", help="forget what is kept")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that the transformers are trained with")
    parser.add_argument("--any-code", action="store_true", help="take what is kept by whatever code made it")
    options = parser.parse_args()
    options.seeds = 2 if options.smoke else options.seeds
    num = 20 if options.smoke else max(MARKS)
    folder = script.data_file(__file__, "nasbench201.npz").parent
    micro = benchmarks.trans_nas_bench_101_table(folder)
    macro = benchmarks.trans_nas_bench_101_table(folder, space="macro")
    graph = benchmarks.nas_bench_graph_table(folder)
    file = None if options.smoke else options.out / "architecture_tables.json"
    tables, kept = {}, Kept(file, script.code(__file__), options.afresh, options.any_code)
    for table in [micro] if options.smoke else [micro, macro, graph]:
        # of NAS-Bench-Graph without proteins, where only a tenth of the architectures was trained
        tasks = list(range(6))
        tables[table.name] = (
            [table.tasks[t] for t in tasks],
            leave_one_out(table, tasks, options.seeds, folder, options.smoke, kept, options.train_seeds),
        )
    curves = {}
    whole = [benchmarks.nas_bench_201_table(folder), micro, macro, benchmarks.nas_bench_macro_table(folder), graph]
    for table in whole[:1] if options.smoke else whole:
        for task in range(1 if options.smoke else min(len(table.tasks), 6)):  # of NAS-Bench-Graph, the tasks above
            curves[table.name, table.tasks[task]] = regrets(table, task, options.seeds, num)
    text = report(tables, curves, options.seeds, options.train_seeds)
    if kept.num_before:
        text += (
            f" Of the tasks that were left out, {kept.num_before} of {len(kept.tasks)} are from earlier calls, "
            f"{kept.num_other_code()} by other code than the script's."
        )
    script.publish(__file__, "Architectures from tables", text, options, picture="Regret over trainings")
    if not options.smoke:
        plot(curves, options.out / "architecture_tables.png")


if __name__ == "__main__":
    sys.exit(script.run(main))

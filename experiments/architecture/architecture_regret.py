"""Regret against seconds of training: searches in NAS-Bench-201 and in a part of NAS-Bench-101, over 200 seeds.

A search sees only validation losses. For every training, it pays the time that the benchmark states. Its regret is the
test loss of the best by validation so far, minus the best of the table. In NAS-Bench-201, a training has 12 epochs, and
the regret uses the test error after 200. The part of NAS-Bench-101 has no test losses. Its trainings have 4, 12, 36 or
108 epochs. There, the regret uses the validation loss at 108 epochs. Random search and evolution also see this loss, so
their regret goes to zero in any case.

- Random search: cells without replacement, trained in full.
- Regularized evolution: population 20, samples of 5. The table of NAS-Bench-101 has a fourteenth of the space, so a
  child is one of the ten cells of the table that are most similar to its parent.
- Successive halving (NAS-Bench-101): 27 random cells at 4 epochs, the best third at 12, and so on, and then again. A
  training at more epochs starts from the beginning, as in the table.
- In every table of NAS-Bench-201, two choices without a trial: the constant cell 9930, and the best by validation on
  the other two tasks.

    python experiments/architecture/architecture_regret.py       minutes; writes results/architecture_regret.md and .png
    python experiments/architecture/architecture_regret.py --smoke  seconds; prints only

Tables are read from the folder that METAOPT_DATA names.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from scipy.stats import rankdata

from experiments import script
from experiments.data import benchmarks
from metaopt import blackbox, nas, spaces

MARKS = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the budget at which regrets are reported
Trials = Iterator[tuple[int, int]]  # (row, fidelity) of each training, in order


def random_search(table: nas.Benchmark, task: int, seed: int) -> Trials:
    for row in np.random.default_rng(seed).permutation(len(table.encodings)):
        yield int(row), -1


def evolution(table: nas.Benchmark, task: int, seed: int) -> Trials:
    """Uses the library's searcher if the table is complete. Otherwise, the most similar cells are the neighbors."""
    losses = table.valid[:, task, -1]
    if len(losses) == np.prod(table.num_choices, dtype=float):
        space = {name: spaces.integer(0, n - 1) for name, n in zip(table.dims, table.num_choices, strict=True)}
        searcher = blackbox.regularized_evolution(population_size=20, sample_size=5)
        state, rows = searcher.init(jax.random.key(seed), space), rows_of(table)
        while True:
            (trial,), state = searcher.ask(state, 1)
            row = rows[tuple(trial.configuration.values())]
            yield row, -1
            state = searcher.tell(state, [trial._replace(outcome=float(losses[row]), status="COMPLETE")])
    rng, population = np.random.default_rng(seed), []
    while True:
        if len(population) < 20:
            child = int(rng.integers(len(losses)))
        else:
            parent = min((population[i] for i in rng.integers(20, size=5)), key=lambda row: losses[row])
            apart = (table.encodings != table.encodings[parent]).sum(1)
            # Ties are broken at random, since NumPy's order of equal values depends on the processor.
            apart = apart + 1e3 * (apart == 0) + rng.random(len(apart))
            child = int(rng.choice(np.sort(np.argpartition(apart, 10)[:10])))
        yield child, -1
        population = [*population, child][-20:]


def successive_halving(table: nas.Benchmark, task: int, seed: int) -> Trials:
    rng, num = np.random.default_rng(seed), len(table.fidelities)
    while True:
        rows = rng.integers(len(table.encodings), size=3 ** (num - 1))
        for fidelity in range(num):
            for row in rows:
                yield int(row), fidelity
            rows = rows[np.argsort(table.valid[rows, task, fidelity], kind="stable")[: max(1, len(rows) // 3)]]


def rows_of(table: nas.Benchmark) -> dict[tuple, int]:
    return {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}


def curve(trials: Trials, table: nas.Benchmark, task: int, seconds: np.ndarray) -> np.ndarray:
    """Returns [seconds] test regret of the best cell so far.

    This is the cell with the smallest validation loss among those that were trained for the most epochs so far. The
    regret is NaN before the first training ends.
    """
    best, spent, next_second, chosen = (-1, np.inf, -1), 0.0, [], []
    num = len(table.fidelities)
    for row, fidelity in trials:
        fidelity %= num
        spent += table.cost[row, task, fidelity]
        if spent > seconds[-1]:
            break
        loss = table.valid[row, task, fidelity]
        if fidelity > best[0] or (fidelity == best[0] and loss < best[1]):
            best = (fidelity, loss, row)
        next_second.append(spent)
        chosen.append(table.test[best[2], task])
    values = np.array([np.nan, *chosen]) - table.test[:, task].min()
    return values[np.searchsorted(next_second, seconds, side="right")]


def run(table: nas.Benchmark, task: int, searches: dict[str, Callable], budget: float, num_seeds: int):
    """Returns (seconds [S], {search: [seeds, S]})."""
    seconds = np.geomspace(budget / 300, budget, 200)
    curves = {
        name: np.stack([curve(search(table, task, seed), table, task, seconds) for seed in range(num_seeds)])
        for name, search in searches.items()
    }
    if table.name == "NAS-Bench-201":
        others = [u for u in range(len(table.tasks)) if u != task]
        ranks = np.stack([rankdata(table.valid[:, u, -1]) for u in others], 1).mean(1)
        regret = table.test[:, task] - table.test[:, task].min()
        constant = {"best of the other tasks": ranks.argmin(), "the cell 9930": 9930}
        curves |= {name: np.full((1, len(seconds)), regret[row]) for name, row in constant.items()}
    return seconds, curves


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and half of the 95 % band over seeds. They are NaN if some seed has no finished training."""
    width = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])
    return values.mean(0), width


def report(results: dict, num_seeds: int, num_trainings: int) -> str:
    lines = []
    for (name, task), (seconds, curves) in results.items():
        rows = []
        for method, values in curves.items():
            mean, half = band(values)
            columns = [min(int(np.searchsorted(seconds, share * seconds[-1])), len(seconds) - 1) for share in MARKS]
            cells = (
                "" if np.isnan(mean[i]) else f"{mean[i]:.3g}" + (f" ± {half[i]:.1g}" if len(values) > 1 else "")
                for i in columns
            )
            rows.append([method, *cells])
        header = [f"{_regret(name)} after", *(f"{share * seconds[-1]:,.0f} s" for share in MARKS)]
        lines += [f"## {name}: {task}", "", script.table(header, rows), ""]
    lines.append(
        f"Mean and 95 % band over {num_seeds} seeds, in points of error (NAS-Bench-101: fractions); empty where not "
        "every seed has a finished training. Seconds are those of the benchmarks; the last are those of "
        f"{num_trainings} trainings of the mean cell."
    )
    return "\n".join(lines)


def _regret(name: str) -> str:
    return "validation regret (there is no test)" if "101" in name else "test regret"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, ((name, task), (seconds, curves)) in zip(axes.flat, results.items(), strict=True):
        for method, values in curves.items():
            mean, half = band(values)
            (line,) = axis.plot(seconds, mean, "--" if len(values) == 1 else "-", label=method)
            axis.fill_between(seconds, mean - half, mean + half, color=line.get_color(), alpha=0.3, linewidth=0)
        axis.set(
            title=f"{name}: {task}", xscale="log", yscale="log", xlabel="seconds of training", ylabel=_regret(name)
        )
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    options = script.parser(__doc__, num_seeds=200).parse_args()
    num_seeds, num_trainings = (2, 10) if options.smoke else (options.seeds, 100)
    folder = script.data_file(__file__, "nasbench201.npz").parent
    whole, part = benchmarks.nas_bench_201_table(folder), benchmarks.nas_bench_101_table(folder)
    plain = {"random search": random_search, "regularized evolution": evolution}
    results = {}
    for table, searches in ((whole, plain), (part, {**plain, "successive halving": successive_halving})):
        for task in range(1 if options.smoke else len(table.tasks)):
            budget = num_trainings * float(table.cost[:, task, -1].mean())
            results[table.name, table.tasks[task]] = run(table, task, searches, budget, num_seeds)
    title = "Regret against seconds of training"
    script.publish(__file__, title, report(results, num_seeds, num_trainings), options, picture=title)
    if not options.smoke:
        plot(results, options.out / "architecture_regret.png")


if __name__ == "__main__":
    script.run(main)

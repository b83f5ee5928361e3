"""Runs the tables one after the other, and writes the result."""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np

from experiments import script
from experiments.blackbox import record_tables
from experiments.blackbox.record_tables.baselines import (
    BASELINES,
    CURVES,
    by_extra_trees,
    by_family,
    read_baselines,
    run_baseline,
)
from experiments.blackbox.record_tables.components import by_components
from experiments.blackbox.record_tables.report import compare, first_trials, over_keys, plot
from experiments.blackbox.record_tables.runs import run
from experiments.blackbox.record_tables.searches import AT, NUM_DEEP, NUM_TRANSFORMERS, curve
from experiments.blackbox.record_tables.tables import Records, load_oboe, load_pmlb


def parse() -> argparse.Namespace:
    parser = script.parser(record_tables.__doc__, num_seeds=20)
    parser.add_argument(
        "--baselines", nargs="*", default=["TPE"], choices=list(BASELINES), help="what of them lacks is run"
    )
    parser.add_argument("--baseline-seeds", type=int, help="of these; --seeds by default")
    parser.add_argument("--plain-seeds", type=int, default=20, help="random starts of the process without other tasks")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that metaopt is trained with")
    parser.add_argument("--transformer-seeds", type=int, help="keys of transformers; --train-seeds by default")
    parser.add_argument("--ablate", action="store_true", help="also without features, and without adaptation")
    parser.add_argument("--extra-trees", action="store_true", help="print their regrets of a first trial, and no more")
    parser.add_argument("--components", action="store_true", help="the same for components of regrets")
    parser.add_argument(
        "--store", type=Path, help="a folder that keeps what this code learned, to go on with or to share"
    )
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tables", nargs="+", default=["forest", "six", "oboe"])
    parser.add_argument("--transformers", nargs="*", default=["forest"], help="tables on which they are trained, too")
    parser.add_argument("--reference", default="average-best")
    options = parser.parse_args()
    options.stride = 1
    if options.store is not None:
        options.store = script.work_folder(options.store, Path(__file__).parent)
    if options.smoke:
        options.seeds = options.plain_seeds = options.train_seeds = 1
        options.folds, options.tables, options.stride = [0], ["forest"], 4
    return options


LOAD = {
    "forest": lambda: load_pmlb("random forest", True),
    "six": lambda: load_pmlb("six algorithms", False),
    "oboe": load_oboe,
}


def curves_of_baselines(data: Records, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns the curves of TPE and SMAC3 on this table. Missing seeds are run, and kept next to the results."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "smoke.npz" if options.smoke else CURVES
        for baseline in ["TPE"] if options.smoke else options.baselines:
            if baseline == "SMAC" and importlib.util.find_spec("smac") is None:
                print('SMAC3 is not installed (`pip install "metaopt-jax[smac]"`), and is passed over.')
                continue
            number = 1 if options.smoke else options.baseline_seeds or options.seeds
            judged = np.flatnonzero(np.isin(data.fold, options.folds))[:: options.stride]
            run_baseline(baseline, data, number, file, judged)
        kept = read_baselines(file)
    return {key.partition("/")[2]: curves for key, curves in kept.items() if key.startswith(f"{data.name}/")}


def first_trials_of(data: Records) -> list[str]:
    """Returns lines about the best on average, and about components of regrets with both rules."""
    average = np.array([curve(data.regret[t], best_on_average(data, t))[0] for t in range(len(data.fold))])
    rules = {f"components, {num:g} deviations": regrets for num, regrets in by_components(data).items()}
    return first_trials(data, {"average-best": average, **rules})


def best_on_average(data: Records, t: int) -> np.ndarray:
    """Returns the configurations in the order of their mean regret on the tasks of other folds."""
    return np.nanmean(data.regret[data.fold != data.fold[t]], 0).argsort()


def main() -> None:
    options = parse()
    if options.extra_trees:
        for name in options.tables:
            means = [by_extra_trees(LOAD[name](), seed).mean() for seed in range(5)]
            print(f"{name}: mean regret of the first trial, of 5 seeds: {script.spread(means, 4)}")
        return
    if options.components:
        for name in options.tables:
            print("\n".join(first_trials_of(LOAD[name]())))
        return
    text, results, counts, families = [], {}, [], []
    for name in options.tables:
        data = LOAD[name]()
        baselines = curves_of_baselines(data, options)
        counts += [f"{b} on {data.name} {len(seeds)}" for b, seeds in baselines.items()]
        with_transformers = name in options.transformers
        result = run(data, options, baselines, with_transformers)
        curves, judged, seconds = result.curves, result.judged, result.seconds
        families.append(" ".join(f"{by_family(data)[:, num_trials - 1].mean():.4f}" for num_trials in AT))
        header, rows = compare(curves, data, judged, options.reference)
        results[data.name] = curves, judged
        text += [
            f"**{data.name}: {len(judged)} tasks of {len(np.unique(data.family[judged]))} families × "
            f"{data.error.shape[1]} configurations.** Training metaopt takes {seconds[0]:.0f} processor seconds a "
            f"fold, with {NUM_DEEP} deep kernels {seconds[1]:.0f}. A suggestion takes {seconds[3]:.0f} processor "
            "milliseconds (median)."
            + (
                f" With {NUM_TRANSFORMERS} transformers, training takes {seconds[2]:.0f} and a suggestion "
                f"{seconds[4]:.0f}."
                if with_transformers
                else ""
            ),
            "",
            script.table(header, rows),
            "",
            *([over_keys(result), ""] if options.train_seeds > 1 else []),
        ]
    text.append(
        "The tables show the mean normalized regret over tasks.\n\n"
        f"- **Brackets:** the difference to {options.reference}, its 95 % interval (bootstrap over families), and the "
        "p of Wilcoxon's signed-rank test with Holm's correction.\n"
        f"- **Seeds:** the figures of random methods are means over seeds: random search {options.seeds}, "
        f"{', '.join(counts)}, the Gaussian process without other tasks {options.plain_seeds}, the training of metaopt "
        f"{options.train_seeds}"
        + (f" (of transformers {options.transformer_seeds})" if options.transformer_seeds else "")
        + ". The fixed lists are deterministic.\n"
        "- **Folds:** a fifth of the families is held out at a time. If one family is held out at a time, there are "
        "more tasks to learn from, and some are close to the new one. On the tables in the order above, average-best "
        f"then has {'; '.join(families)}.\n"
        "- **BOHB** is not included: a table has one fidelity, at which BOHB equals TPE.\n"
        + ("" if any(count.startswith("SMAC") for count in counts) else "- SMAC3 (`--baselines SMAC`) was not run.\n")
        + "- The curves of baselines are saved next to the results. A run computes only the missing ones."
    )
    picture = "Mean normalized regret over trials"
    script.publish(Path(__file__).parent, "Records of earlier tasks", "\n".join(text), options, picture=picture)
    if not options.smoke:
        plot(results, options.out / "record_tables.png")

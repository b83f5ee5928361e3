"""Collects or reads the records, lets every method choose, and writes the result."""

import os
import tempfile
import time
from pathlib import Path

from experiments import script
from experiments.blackbox import auto_random_forest
from experiments.blackbox.auto_random_forest.choices import choose, table_rows
from experiments.blackbox.auto_random_forest.config import FULL, SMOKE, Config
from experiments.blackbox.auto_random_forest.optimizers import read_optimizers, run_optimizer
from experiments.blackbox.auto_random_forest.records import RECORDS, Records, collect, pack, unpack
from experiments.blackbox.auto_random_forest.report import beside_average, compare, over_keys, plot
from experiments.blackbox.auto_random_forest.tables import load
from experiments.hyperparameters.auto_tune.config import FEATURES


def main() -> None:
    parser = script.parser(auto_random_forest.__doc__, num_seeds=20)
    parser.add_argument("--collect", action="store_true", help="make the records anew, or go on with --store")
    parser.add_argument("--store", type=Path, default=Path("auto_random_forest.sqlite"), help="of trials as they end")
    parser.add_argument("--budget", type=float, help="seconds after which no trial of the collection starts")
    parser.add_argument("--packaged", action="store_true", help="collect only on tables of Python packages")
    parser.add_argument("--rows", action="store_true", help="also g of the tables' rows, which are read for it")
    parser.add_argument("--full", action="store_true", help="more rows, trees and configurations")
    parser.add_argument("--optimizers", nargs="*", default=[], choices=["TPE", "BOHB", "SMAC"], help="run these anew")
    parser.add_argument("--optimizer-seeds", type=int, help="of these; --seeds by default")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that g is trained with")
    parser.add_argument(
        "--work", type=Path, help="a folder that keeps what g of this code chose, to go on with or to share"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at a time")
    options = parser.parse_args()
    if options.work is not None:
        options.work = script.work_folder(options.work, Path(__file__).parent)
    config = SMOKE if options.smoke else FULL if options.full else Config()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, runs = RECORDS, RECORDS.with_name("auto_random_forest_optimizers.npz")
        splits = load(options, config) if options.smoke or options.collect or options.rows else []
        if options.smoke or options.collect:
            out = Path(folder) if options.smoke else options.out
            out.mkdir(parents=True, exist_ok=True)
            file, store = out / RECORDS.name, Path(folder) / "smoke.sqlite" if options.smoke else options.store
            collect(splits, config, store, options.workers, options.budget)
            pack(file, splits, config, store)
            runs = out / runs.name
        records = unpack(file, config)
        for name in ["TPE", "BOHB"] if options.smoke else options.optimizers:
            run_optimizer(name, records, config, 1 if options.smoke else options.optimizer_seeds or options.seeds, runs)
        optimizers = read_optimizers(runs, records, config)
    rows = table_rows(splits) if options.rows else None
    chosen, seconds = choose(records, config, options, optimizers, rows)
    counts = [n for n in config.trials if 1 < n <= 10]
    ours, reference = (f"{name}, {max(counts)} trials" for name in ("g(t') and its searcher", "random search"))
    header, rows, differences = compare(records, chosen, ours, reference)
    text = (
        f"{len(records.names)} tables of {len(set(records.families))} families, at most {config.max_rows} training "
        f"rows. The records have {len(records.configurations)} configurations ({config.num_folds}-fold "
        f"cross-validated log loss, forests of at most {config.max_trees} trees) and took {records.seconds.sum():.0f} "
        f"processor seconds. For each table, g is trained on the records of the other families ({seconds:.0f} "
        f"processor seconds for each of {config.num_splits} parts). It reads {len(FEATURES)} meta-features.\n\n"
    )
    text += script.table(header, rows)
    text += notes(records, chosen, ours, optimizers) + f"- The whole run took {time.perf_counter() - begin:.0f} s."
    page = "auto_random_forest_rows" if options.rows else "auto_random_forest"
    script.publish(
        Path(__file__).parent,
        "A random forest, from records of earlier tables",
        text,
        options,
        name=page,
        picture="Differences in test log loss",
    )
    if not options.smoke:
        plot(differences, options.out / f"{page}.png")


def notes(records: Records, chosen, ours: str, optimizers) -> str:
    """Returns a list that explains the table. `ours` is the method of the paired differences."""
    return (
        "\n\n"
        "- The figures are means over tables, of means over seeds.\n"
        "- Trials are cross-validations on the new table, looked up in the records. The chosen configuration is "
        "fitted to all training rows and scored on the test rows.\n"
        "- Probabilities are mixed with 1 % of the uniform distribution.\n"
        "- Regret is that of the cross-validated loss: 0 at a table's best configuration and 1 at its worst.\n"
        "- Brackets have the paired 95 % interval of a difference, from a bootstrap over families.\n"
        f"- p is from Wilcoxon's signed-rank test over tables against {ours!r}, with Holm's correction.\n"
        "- g, portfolio and random search choose among the configurations of the records.\n"
        + beside_average(records, chosen)
        + over_keys(records, chosen)
        + (
            "- The other optimizers draw from the whole space. The outcome of each of their configurations is that of "
            "the nearest untried one in the records. BOHB's trials are full budgets.\n"
            if optimizers
            else "- TPE and BOHB were not run on these records (`--optimizers`).\n"
        )
        + (
            ""
            if "SMAC" in optimizers
            else "- SMAC3 (`--optimizers SMAC`, seconds for each table and seed) was not run.\n"
        )
    )

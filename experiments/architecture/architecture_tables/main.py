"""Leaves out every task of every table, runs the searches, and writes the result."""

from pathlib import Path

from experiments import script
from experiments.architecture import architecture_tables
from experiments.architecture.architecture_tables.choices import Kept, leave_one_out
from experiments.architecture.architecture_tables.curves import MARKS, regrets
from experiments.architecture.architecture_tables.report import plot, report
from experiments.data import benchmarks


def main() -> None:
    parser = script.parser(architecture_tables.__doc__, num_seeds=200)
    parser.add_argument("--afresh", action="store_true", help="forget what is kept")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that the transformers are trained with")
    parser.add_argument("--any-code", action="store_true", help="take what is kept by whatever code made it")
    options = parser.parse_args()
    options.seeds = 2 if options.smoke else options.seeds
    num = 20 if options.smoke else max(MARKS)
    folder = script.data_file(Path(__file__).parent, "nasbench201.npz").parent
    micro = benchmarks.trans_nas_bench_101_table(folder)
    macro = benchmarks.trans_nas_bench_101_table(folder, space="macro")
    graph = benchmarks.nas_bench_graph_table(folder)
    file = None if options.smoke else options.out / "architecture_tables.json"
    tables, kept = {}, Kept(file, script.code(Path(__file__).parent), options.afresh, options.any_code)
    for table in [micro] if options.smoke else [micro, macro, graph]:
        # Without the seventh task of NAS-Bench-Graph, proteins, on which only 8 % of the architectures were trained.
        tasks = list(range(6))
        tables[table.name] = (
            [table.tasks[t] for t in tasks],
            leave_one_out(table, tasks, options.seeds, folder, options.smoke, kept, options.train_seeds),
        )
    curves = {}
    whole = [benchmarks.nas_bench_201_table(folder), micro, macro, benchmarks.nas_bench_macro_table(folder), graph]
    for table in whole[:1] if options.smoke else whole:
        for task in range(1 if options.smoke else min(len(table.tasks), 6)):  # without proteins, as above
            curves[table.name, table.tasks[task]] = regrets(table, task, options.seeds, num)
    text = report(tables, curves, options.seeds, options.train_seeds)
    if kept.num_before:
        text += (
            f"\n- {kept.num_before} of {len(kept.tasks)} held-out tasks are from earlier calls, "
            f"{kept.num_other_code()} by other code than the script's."
        )
    script.publish(Path(__file__).parent, "Architectures from tables", text, options, picture="Regret over trainings")
    if not options.smoke:
        plot(curves, options.out / "architecture_tables.png")

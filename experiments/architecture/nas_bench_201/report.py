"""The table of results, the correlations of supernets with the table, and the picture."""

from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from experiments import script
from experiments.architecture.nas_bench_201 import stopping
from experiments.architecture.nas_bench_201.config import FULL, LATE, Config
from experiments.architecture.nas_bench_201.searches import PRIMITIVES, SKIP
from experiments.architecture.nas_bench_201.tables import SCREENED, screened, table_searches
from metaopt import nas


def outcomes(runs: dict, table, data, num_seeds: int) -> dict[str, list[int]]:
    """Returns name -> the resulting rows, one per seed, for all methods that use no outcome of the table."""
    cells: dict[str, list[int]] = {}
    skips = lambda row: int((table.encodings[row] == SKIP).sum())
    for name, seeds in runs.items():
        if name == "scores":
            flops = data["flops_params_M_cifar10"][:, 0]
            for run in seeds.values():
                columns = {s: run[s] for s in nas.SCORES}
                columns["FLOPs"] = flops[run["rows"]].tolist()
                for column, values in columns.items():
                    scores = {r: -np.inf if v is None else v for r, v in zip(run["rows"], values, strict=True)}
                    cells.setdefault(f"best of {SCREENED} by {column}", []).append(screened(scores))
            continue
        cells[name] = [run["row"] for run in seeds.values()]
        if name == "DARTS, first order":
            for run in seeds.values():
                curvatures = [np.nan if c is None else c for c in run["curvatures"]]
                stops = {
                    "RobustDARTS": stopping.by_sharpness(curvatures, **LATE),
                    "DARTS, stopped at two skips": stopping.by_skips([skips(r) for r in run["rows"]], max_skips=1),
                }
                for stop, epoch in stops.items():
                    cells.setdefault(stop, []).append(run["row"] if epoch is None else run["rows"][epoch])
    return cells


def report(runs: dict, table, data, config: Config, options) -> str:
    by_method, count = (
        outcomes(runs, table, data, options.seeds),
        lambda row, op: int((table.encodings[row] == op).sum()),
    )
    header = ["", "seeds", *table.tasks, "CIFAR-10, by seed", "skips", "none", "seconds"]
    rows = []
    for name, cells in by_method.items():
        accuracies = 100 - table.test[cells]
        seconds = [run["seconds"] for run in runs.get(name, {}).values()]
        rows.append(
            [
                name,
                str(len(cells)),
                *(script.spread(accuracies[:, t], 2) for t in range(len(table.tasks))),
                " ".join(f"{a:.2f}" for a in accuracies[:, 0]),
                " ".join(str(count(row, SKIP)) for row in cells),
                " ".join(str(count(row, 0)) for row in cells),
                f"{np.mean(seconds):.0f}" if seconds else "",
            ]
        )
    looked_up = table_searches(table, 2 if options.smoke else 50, 5 if options.smoke else 100)
    for name, accuracies in looked_up.items():
        shown = [
            script.spread(accuracies[:, t], 2) if len(accuracies) > 1 else f"{accuracies[0, t]:.2f}" for t in range(3)
        ]
        rows.append([name, str(len(accuracies)), *shown, "", "", "", ""])
    lines = [
        "## Test accuracy of the cells that were found (%, after 200 epochs, from the table)",
        "",
        script.table(header, rows),
        "",
        "**Settings and columns.**\n\n"
        f"- Supernets: {config.size}x{config.size} images, C = {config.channels}, N = {config.cells}, batch "
        f"{config.batch}, {config.num_steps} steps of the weights (single-path one-shot: three times as many).\n"
        f"- The rate of α is multiplied by {FULL.num_steps / config.num_steps:.4g}, so that α can move as far as in "
        f"{FULL.num_steps:,} steps. iDARTS and unrolled DARTS take a quarter of the steps of α. Their rates are "
        "four times those of the others. PC-DARTS has twice the rate, after 30 % of the steps without a change of α.\n"
        "- Every estimate of unrolled DARTS trains new weights for T steps.\n"
        "- One-shot search uses 512 additional validation images for its choice.\n"
        "- Accuracies: mean ± standard deviation over seeds.\n"
        "- Skips and none: their number among six edges, by seed.\n"
        "- Seconds: processor seconds of a search, including compilation if its result was not cached.\n"
        "- Searches in the table use the validation accuracy of the task's own cells after 12 epochs. Evolution has "
        "a population of 10 and samples of 3. All other methods use only CIFAR-10 images, and their cell is looked "
        "up on all three tasks.\n"
        "- For each seed, the best of 100 by a score is among the same 100 random cells.\n"
        "- In the picture, skips and accuracies end with the cell of the search's end, which is one step of α after "
        "the last record.",
        "",
    ]
    lines += gaps(runs, table)
    if "scores" in runs:
        lines += correlations(runs["scores"], table, data)
    return "\n".join(lines)


def gaps(runs: dict, table) -> list[str]:
    """Describes the gap on CIFAR-10 between supernets and the networks of the table, which were trained separately."""
    retrained = lambda row: (float(1 - table.test[row, 0] / 100),)
    lines, scores = ["## The gap between supernet, discrete and retrained", ""], []
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            if "mixed" in run:
                each = run["inherited"], retrained(run["row"]), run["mixed"]
                scores.append(nas.ArchitectureScores(f"{name}, seed {seed}", *each))
    if len(scores) > 1:
        lines += [nas.search_report(scores).text, ""]
    searched = [run for seeds in runs.values() for run in seeds.values() if "weights" in run]
    if any("mixed" not in run for run in searched):
        lines += [
            "**Searches without a gap:**\n\n"
            f"- {sum('mixed' not in run for run in searched)} of {len(searched)} searches by gradient did not save "
            "the accuracies of the supernet, mixed and discrete. Unrolled DARTS has no supernet after an estimate.\n"
            "- Searches that stopped early share the search of DARTS up to that epoch, whose weights are not "
            "saved.\n"
            "- Single-path one-shot has no mixture.",
            "",
        ]
    one_shot = [run for run in runs.get("single-path one-shot", {}).values() if len(run["drawn"]) > 4]
    if one_shot:
        # Only ranks are compared. The likelihood exp(−loss) ranks the cells as the negative loss does.
        drawn_scores = lambda run: zip(run["drawn"], np.exp(-np.array(run["losses"])), strict=True)
        reports = [
            nas.search_report([nas.ArchitectureScores(str(r), float(p), retrained(r)) for r, p in drawn_scores(run)])
            for run in one_shot
        ]
        correlation = script.spread([r.correlation for r in reports], 2)
        intervals = ", ".join(f"{r.interval[0]:.2f} to {r.interval[1]:.2f}" for r in reports)
        lines += [
            "**Single-path one-shot:** the likelihood of 512 validation labels, with shared weights, against the "
            f"accuracy of the separately trained cell. Over {len(one_shot[0]['drawn'])} random cells a seed, "
            f"Spearman's rank correlation is {correlation} (95 % intervals {intervals}). 1 would be perfect.",
            "",
            op_correlations(one_shot, table),
            "",
        ]
    return lines


def op_correlations(one_shot: list[dict], table) -> str:
    """Describes the ops that the likelihood of one-shot cells prefers, compared with accuracy."""
    names = {
        "skip_connect": "skips",
        "avg_pool_3x3": "poolings",
        "nor_conv_1x1": "1x1 convolutions",
        "nor_conv_3x3": "3x3 convolutions",
    }
    rows = []
    for op, name in names.items():
        pairs = []
        for run in one_shot:
            nums = (table.encodings[run["drawn"]] == PRIMITIVES.index(op)).sum(-1)
            pair = (-np.array(run["losses"]), -table.test[run["drawn"], 0])
            pairs.append([float(np.asarray(spearmanr(nums, values))[0]) for values in pair])
        likelihood, accuracy = (f"{min(each):+.2f} to {max(each):+.2f}" for each in zip(*pairs, strict=True))
        rows.append([name, likelihood, accuracy])
    return (
        "Which ops the supernet prefers: the table has the rank correlation of an op's number in a cell with the "
        "likelihood, and with the accuracy. The ranges are from the lowest seed to the highest. If the two signs "
        "differ, shared weights misjudge the op."
        f"\n\n{script.table(['op', 'likelihood', 'accuracy'], rows)}"
    )


def correlations(seeds: dict, table, data) -> list[str]:
    """Returns Spearman's ρ of our scores with published ones, and of both with test accuracies."""
    names, published = data["proxy_names"].tolist(), data["proxy_scores"][0]
    theirs_of = {"jacob_cov": "jacov"}
    rows = []
    for name in nas.SCORES:
        columns = []
        for run in seeds.values():
            cell_rows = np.array(run["rows"])
            ours = np.array([-np.inf if v is None else v for v in run[name]])
            theirs = published[cell_rows, names.index(theirs_of.get(name, name))]
            both = np.isfinite(theirs) & (theirs > -1e7)
            rho = lambda a, b: float(np.asarray(spearmanr(a, b))[0])
            test = 100 - table.test[cell_rows]
            columns.append(
                [rho(ours[both], theirs[both]), *(rho(ours, test[:, t]) for t in range(3))]
                + [rho(ours[both], test[both, 0]), rho(theirs[both], test[both, 0]), both.sum()]
            )
        columns = np.array(columns)
        texts = [script.spread(columns[:, i], 2) for i in range(columns.shape[1] - 1)]
        rows.append([name, *texts, f"{columns[:, -1].mean():.0f}"])
    flops = np.array([[spearmanr(data["flops_params_M_cifar10"][r["rows"], 0], -table.test[r["rows"], t])[0]
                       for t in range(3)] for r in seeds.values()])  # fmt: skip
    rows.append(["FLOPs", "", *(script.spread(flops[:, t], 2) for t in range(3)), "", "", ""])
    header = ["ours", "with published", *(f"with {t}" for t in table.tasks), "where published: ours", "published", "n"]
    num = len(next(iter(seeds.values()))["rows"])
    return [
        "## Training-free scores: Spearman's rank correlation",
        "",
        script.table(header, rows),
        "",
        f"These are correlations over {num} random cells a seed, at one initialization and with 64 images. The "
        "published scores are from the table's collection, computed at the full scale on CIFAR-10. They are not "
        "known for all cells. The last columns compare both on the n cells with a published score, with CIFAR-10.",
    ]


def plot(runs: dict, table, path: Path) -> None:
    """Plots the argmax of α over time: the number of skips, and the accuracy of the cell.

    Cells are recorded before a step. The final cell, after the last step, is plotted next to the last record.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for name, seeds in runs.items():
        if not all("rows" in run and "weights" in run for run in seeds.values()):
            continue
        rows = np.array([[*run["rows"], run["row"]] for run in seeds.values()])
        time_ = np.arange(1, rows.shape[1]) / (rows.shape[1] - 1)
        axes[0].plot([*time_, 1], (table.encodings[rows] == SKIP).sum(-1).mean(0), label=name)
        axes[1].plot([*time_, 1], (100 - table.test[rows, 0]).mean(0), label=name)
        curvatures = [[np.nan if c is None else c for c in run["curvatures"]] for run in seeds.values()]
        if np.isfinite(curvatures).any():
            for seed, values in zip(seeds, curvatures, strict=True):
                axes[2].plot(time_, values, label=f"{name}, seed {seed}")
    axes[1].axhline(54.30, color="gray", linestyle=":", label="all skip")
    axes[0].set(
        xlabel="share of the search", ylabel="skips among six edges, mean over seeds", ylim=(-0.1, 7.6), yticks=range(7)
    )
    axes[1].set(xlabel="share of the search", ylabel="CIFAR-10 test accuracy (%), mean over seeds")
    axes[2].set(xlabel="share of the search", ylabel="dominant eigenvalue of the Hessian in α")
    axes[0].legend(fontsize=7, ncols=2, loc="upper right")
    axes[1].legend(*([handles[-1]] for handles in axes[1].get_legend_handles_labels()), fontsize=7, loc="lower right")
    axes[2].margins(y=0.3)
    axes[2].legend(fontsize=7, ncols=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

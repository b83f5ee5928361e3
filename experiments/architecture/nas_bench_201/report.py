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
                    "DARTS, stopped at two skips": stopping.by_skips([skips(r) for r in run["rows"]], most=1),
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
        f"Supernets: {config.size}x{config.size} images, C = {config.channels}, N = {config.cells}, batch "
        f"{config.batch}, {config.num_steps} steps of the weights (single-path one-shot: three times as many), the "
        "rate of α times "
        f"{FULL.num_steps / config.num_steps:.4g}, so that it can go as far as in {FULL.num_steps:,}; those of iDARTS "
        "and of unrolled DARTS, which take a quarter of the steps of α, are four times the others', those of PC-DARTS "
        "twice, after a rest of 30 %. Every estimate of unrolled DARTS trains new weights for T steps. One-shot "
        "search chooses by 512 validation images more. Mean ± standard "
        "deviation over seeds. Skips and none: of six edges, by seed. Seconds: of processor time for a search, "
        "with compilation where it was not kept. Searches in the table look at the validation accuracy of the "
        "task's own cells after 12 epochs, and evolution has a population of 10 and samples of 3; all others see "
        "CIFAR-10 images alone, and their cell is looked up on all three. The best of 100 by a score are of the same "
        "100 random cells a seed. Skips and accuracies in the picture end with the cell that was found, a step of α "
        "after the last one that was recorded.",
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
            f"Of {sum('mixed' not in run for run in searched)} of {len(searched)} searches by gradient the accuracies "
            "of the supernet, mixed and discrete, were not kept (unrolled DARTS has no supernet that outlives an "
            "estimate): their gap is not told. Searches that "
            "stopped early are the search of DARTS up to there, whose weights at that epoch are not kept, and "
            "single-path one-shot has no mixture: of these there is no gap either.",
            "",
        ]
    one_shot = [run for run in runs.get("single-path one-shot", {}).values() if len(run["drawn"]) > 4]
    if one_shot:
        # The likelihood has the same order as the loss, and only ranks are compared.
        drawn_scores = lambda run: zip(run["drawn"], np.exp(-np.array(run["losses"])), strict=True)
        reports = [
            nas.search_report([nas.ArchitectureScores(str(r), float(p), retrained(r)) for r, p in drawn_scores(run)])
            for run in one_shot
        ]
        lines += [
            "Single-path one-shot: Spearman's rank correlation of the likelihood of 512 validation labels, with shared "
            "weights, with the accuracy of the cell trained alone (1 would be perfect), over "
            f"{len(one_shot[0]['drawn'])} random cells a seed: {script.spread([r.correlation for r in reports], 2)} "
            f"(95 % intervals {', '.join(f'{r.interval[0]:.2f} to {r.interval[1]:.2f}' for r in reports)}). "
            + op_correlations(one_shot, table),
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
    texts = []
    for op, name in names.items():
        pairs = []
        for run in one_shot:
            nums = (table.encodings[run["drawn"]] == PRIMITIVES.index(op)).sum(-1)
            pair = (-np.array(run["losses"]), -table.test[run["drawn"], 0])
            pairs.append([float(np.asarray(spearmanr(nums, values))[0]) for values in pair])
        likelihood, accuracy = (f"{min(each):+.2f} to {max(each):+.2f}" for each in zip(*pairs, strict=True))
        texts.append(f"{name} {likelihood} ({accuracy})")
    return (
        "Which ops the supernet prefers: the rank correlation of its likelihood with the number of them in a cell, "
        f"from the lowest seed to the highest, and that of the accuracy in brackets: {'; '.join(texts)}. An op whose "
        "two signs differ is one that shared weights misjudge."
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
        f"Of {num} random cells a seed, at one initialization and 64 images. Published are those of "
        "the table's collection, computed at the full scale on CIFAR-10, where they are known: the last columns "
        "compare on those n cells alone, with CIFAR-10.",
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

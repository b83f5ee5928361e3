"""The table of results, the spread over keys, and the picture."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import script
from experiments.blackbox.record_tables.runs import Found
from experiments.blackbox.record_tables.searches import AT, LEARNED, NUM_TRIALS
from experiments.blackbox.record_tables.tables import Records


def over_keys(result: Found) -> str:
    """Returns a table: how much the mean regret over tasks varies from key to key of the training."""
    rows = []
    for name, curves in result.by_key.items():
        if len(curves) == 1:
            continue
        means = curves[:, result.judged][..., [num_trials - 1 for num_trials in AT]].mean(1)  # [keys, 3]
        rows.append([name, *(f"{std:.4f}" for std in means.std(0, ddof=1))])
    table = script.table(["method", *(f"after {num_trials}" for num_trials in AT)], rows)
    return f"The standard deviation of the mean regret from key to key of the training:\n\n{table}"


def family_weights(family: np.ndarray) -> np.ndarray:
    """Returns [4000, T] weights of tasks. Families are drawn with replacement: near-duplicates are one observation."""
    _, family = np.unique(family, return_inverse=True)
    num = family.max() + 1
    draws = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=4000)
    return draws[:, family] / draws[:, family].sum(1, keepdims=True)


def first_trials(data: Records, first: dict[str, np.ndarray]) -> list[str]:
    """Returns a line per method: its mean regret [T] of the first trial, and the difference to the first method."""
    weights, (reference, *_) = family_weights(data.family), first.values()
    lines = []
    for name, values in first.items():
        low, high = np.quantile(weights @ (values - reference), [0.025, 0.975])
        late = data.fold >= 3
        lines.append(
            f"{data.name}, {name}: {values.mean():.4f}, {(values - reference).mean():+.4f} [{low:+.4f}, {high:+.4f}]; "
            f"other than the first method on {np.mean(values != reference):.0%} of the tasks; folds 3 and 4 "
            f"{values[late].mean():.4f}"
        )
    return lines


def compare(curves: dict, data: Records, judged: np.ndarray, reference: str) -> tuple[list, list]:
    """Returns rows of the table: regret, mean rank, paired differences to the reference, and Holm's p.

    The differences have 95 % intervals.
    """
    from scipy import stats

    weights = family_weights(data.family[judged])
    names, rows, untouched = list(curves), [], data.fold[judged] >= 3
    wilcoxon: Any = stats.wilcoxon
    ranks, tests = {}, {}
    for num_trials in AT:
        values = np.stack([curves[name][judged, num_trials - 1] for name in names])
        ranks[num_trials] = stats.rankdata(values.round(9), axis=0).mean(1)
        p = {}
        for name in names:
            difference = curves[name][judged, num_trials - 1] - curves[reference][judged, num_trials - 1]
            if name != reference:
                p[name] = wilcoxon(difference, method="approx").pvalue if np.any(difference) else 1.0
        worst = 0.0
        for i, name in enumerate(sorted(p, key=lambda n: p[n])):  # Holm
            worst = max(worst, min(1.0, (len(p) - i) * p[name]))
            tests[num_trials, name] = worst
    for i, name in enumerate(names):
        row = [name]
        for num_trials in AT:
            values, others = curves[name][judged, num_trials - 1], curves[reference][judged, num_trials - 1]
            cell = f"{values.mean():.4f}"
            if name != reference:
                low, high = np.quantile(weights @ (values - others), [0.025, 0.975])
                p = tests[num_trials, name]
                cell += f" ({values.mean() - others.mean():+.4f} [{low:+.4f}, {high:+.4f}], p {p:.2g})"
            row.append(cell)
        row.append(" ".join(f"{ranks[num_trials][i]:.2f}" for num_trials in AT))
        if untouched.any():
            row.append(" ".join(f"{curves[name][judged[untouched], num_trials - 1].mean():.4f}" for num_trials in AT))
        rows.append(row)
    header = ["method", *(f"after {num_trials}" for num_trials in AT), f"mean rank after {', '.join(map(str, AT))}"]
    return header + (["regret in folds 3, 4"] if untouched.any() else []), rows


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(method for curves, _ in results.values() for method in curves))
    others = [method for method in names if method not in LEARNED]
    style = {method: (f"C{i}", "-", 2.5) for i, method in enumerate(m for m in names if m in LEARNED)}
    style |= {method: (f"C{i}", ("--", ":")[i // 10], 1.5) for i, method in enumerate(others)}
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axes, (name, (curves, judged)) in zip(panels[0], results.items(), strict=True):
        for method, values in curves.items():
            color, dashes, width = style[method]
            line = {"color": color, "ls": dashes, "lw": width, "label": method}
            axes.plot(range(1, NUM_TRIALS + 1), values[judged].mean(0), **line)
        axes.set(title=name, xlabel="trials on the new task", yscale="log", xticks=[1, 5, 10, 15, 20])
    panels[0][0].set_ylabel("mean normalized regret")
    figure.tight_layout()
    legend = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 2 * len(results), "fontsize": 8}
    figure.legend([legend[method] for method in names], names, **columns)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)

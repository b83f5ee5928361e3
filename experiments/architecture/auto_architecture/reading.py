"""Shows, in a sentence and in the picture, how h depends on the task."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.architecture.auto_architecture.results import A_STAR, IGNORANT, interval, report


def choices(result: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Returns names of the ops, and [tasks, ops] the mixing weight of each op, mean over the edges of its kind."""
    labels, columns = [], []
    for kind, w in result["weights"].items():
        labels += [f"{kind}: {op}" for op in result["ops"][kind]]
        columns += list(np.array(w).mean(1).T)
    return labels, np.array(columns).T


def within(x: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Returns [n, k] differences from the mean of the row's own fold [n]."""
    means = {f: x[folds == f].mean(0) for f in np.unique(folds)}
    return x - np.stack([means[f] for f in folds])


def correlation(x: np.ndarray, values: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Returns [a, b] correlations of x [n, a] with values [n, b] within folds [n].

    They are 0 if one of the two does not vary there. Every fold has a separate h, so a difference between folds does
    not show how h depends on the task.
    """
    x, values = within(x, folds), within(values, folds)
    scaled = lambda x: np.where(x.std(0) > 1e-6, x / np.maximum(x.std(0), 1e-6), 0.0)
    return scaled(x).T @ scaled(values) / len(x)


def read_folds(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns [tasks] the fold of each task, and whether the features in h are trusted in that fold."""
    folds = np.repeat(np.arange(len(result["sizes"])), result["sizes"])
    return folds, np.array(result["trust"])[folds] > 0


def what_h_reads(result: dict[str, Any]) -> str:
    """Describes how much h's choice depends on the task, and how much only on the fold, that is, on its h."""
    labels, x = choices(result)
    values, (folds, read) = np.array(result["values"]), read_folds(result)
    apart = 1 - within(x, folds).var(0) / np.maximum(x.var(0), 1e-12)
    apart = apart[x.std(0) > 1e-6]
    text = f"**{result['shape']}:**\n\n"
    if len(apart) and len(result["sizes"]) > 1:
        text += (
            f"- {np.median(apart):.0%} of the variance of mean mixing weights (median over ops; {apart.min():.0%} to "
            f"{apart.max():.0%}) lies between folds. Each fold has its own h.\n"
        )
    if not read.any():
        return text + "- No fold trusts the features that h reads, and a* is one architecture for all tasks of a fold."
    moved = within(x, folds)[read].std(0)
    correlations = correlation(x[read], values[read], folds[read])
    pooled = correlation(x, values, 0 * folds)
    strongest = np.abs(correlations).argmax(1)  # the strongest feature of every op
    most = np.argsort(-np.abs(correlations).max(1))[:3]
    texts = [
        f"{labels[i]} with {result['features'][j]} {correlations[i, j]:+.2f} (all folds pooled {pooled[i, j]:+.2f})"
        for i, j in zip(most, strongest[most], strict=True)
        if correlations[i, j] != 0
    ]
    own = result["architectures"]["a*"]
    others = sum(
        sum(folds == f) - max(own[i:][: sum(folds == f)].count(a) for a in own)
        for f in np.unique(folds[read])
        for i in [int(np.argmax(folds == f))]
    )
    difference = np.array(result["scores"][A_STAR]) - np.array(result["scores"][IGNORANT])
    groups = [np.flatnonzero(np.array(result["families"])[read] == f) for f in sorted(set(result["families"]))]
    (loss, error) = (interval(difference[read, c], [g for g in groups if len(g)]) for c in (0, 1))
    correlated = f"The strongest correlations with a feature: {'; '.join(texts)}." if texts else "No choice varies."
    return (
        text + f"- {len(np.unique(folds[read]))} of {len(result['sizes'])} folds trust the features that h reads "
        f"({read.sum()} tasks). The next figures are for these folds.\n"
        f"- A mean mixing weight varies from task to task by at most {moved.max():.3f} ({labels[moved.argmax()]}; "
        f"standard deviation).\n- a* differs from the fold's most frequent architecture on {others} tasks.\n"
        f"- {correlated}\n- Compared with h of the average task, the features change test log loss by "
        f"{difference[read, 0].mean():+.4f} [{loss[0]:+.4f}, {loss[1]:+.4f}] and errors by "
        f"{difference[read, 1].mean():+.2%} [{error[0]:+.2%}, {error[1]:+.2%}]."
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plots for each shape: differences with intervals, choices of h by family, and correlations with features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 3, figsize=(22, 6.5 * len(results)), squeeze=False, width_ratios=[1, 1.7, 1.1]
    )
    for (left, middle, right), result in zip(axes, results, strict=True):
        rows = report({k: np.array(x) for k, x in result["scores"].items()}, result["families"], A_STAR)
        order = np.arange(len(rows))[::-1]
        for y, (label, r) in zip(order, rows.items(), strict=True):
            color = "C3" if label.startswith("a*") else "C0"
            left.plot([r["low"], r["high"]], [y, y], color=color)
            left.plot(r["difference"], y, "o", color=color)
        left.axvline(0, color="0.6", linewidth=1)
        left.set_yticks(order, list(rows))
        left.set(title=f"{result['shape']}: test log loss against a*", xlabel="difference, 95 % over families")

        labels, x = choices(result)
        values, (folds, read) = np.array(result["values"]), read_folds(result)
        families = np.array(result["families"])
        names = [(f, family) for f in np.unique(folds) for family in sorted(set(families[folds == f]))]
        if len(names) > 12:  # too many names: shows single tasks, along the principal direction of their features
            direction = np.linalg.svd(within(values, folds), full_matrices=False)[2][0]
            order_of_tasks = np.lexsort((values @ direction, folds))
            shown = x[order_of_tasks].T
            strongest = result["features"][int(np.abs(direction).argmax())]
            middle.set_xlabel(f"held-out tasks, fold by fold along the features' main direction (mostly {strongest!r})")
            middle.set_xticks(
                range(len(order_of_tasks)), np.array(result["tasks"])[order_of_tasks], rotation=90, fontsize=6
            )
            ends = np.cumsum(result["sizes"])
        else:
            shown = np.stack([x[(folds == f) & (families == family)].mean(0) for f, family in names], 1)
            middle.set_xticks(range(len(names)), [family for _, family in names], rotation=35, ha="right")
            ends = np.cumsum([sum(g == f for g, _ in names) for f in np.unique(folds)])
        image = middle.imshow(shown, aspect="auto", cmap="Blues", vmin=0)
        for end in ends[:-1]:
            middle.axvline(end - 0.5, color="C3", linewidth=1)
        middle.set_yticks(range(len(labels)), labels)
        trusts = ", ".join(map(str, result["trust"]))
        middle.set_title(f"what h chose: mean mixing weight, by fold (trust in what is read {trusts})", fontsize=10)
        figure.colorbar(image, ax=middle, fraction=0.03)

        correlations = (
            correlation(x[read], values[read], folds[read]) if read.any() else np.zeros((len(labels), values.shape[1]))
        )
        image = right.imshow(correlations, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        right.set_yticks(range(len(labels)), labels)
        right.set_xticks(range(len(result["features"])), result["features"], rotation=50, ha="right")
        right.set_title(
            f"correlation of a choice with a feature within folds ({read.sum()} tasks, where h reads)", fontsize=10
        )
        figure.colorbar(image, ax=right, fraction=0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

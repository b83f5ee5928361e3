"""The table of results, its sentences, and the picture."""

from pathlib import Path

import numpy as np
from scipy import stats

from experiments.blackbox.auto_random_forest.records import Records


def interval(records: Records, difference: np.ndarray) -> np.ndarray:
    """Returns the 95 % interval of the mean of differences [T], by drawing families with replacement."""
    _, family = np.unique(records.families, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(
        family.max() + 1, np.full(family.max() + 1, 1 / (family.max() + 1)), size=4000
    )
    weights = draws[:, family] / draws[:, family].sum(1, keepdims=True)
    return np.quantile(weights @ difference, [0.025, 0.975])


def compare(records: Records, chosen, ours: str, reference: str) -> tuple[list[str], list[list[str]], dict]:
    """Returns rows of the table: means, ranks, differences, and tests.

    The intervals of differences are from drawing families with replacement.
    """
    names = list(chosen)
    mean = lambda values: np.array([[values[t, c].mean() for t, c in enumerate(chosen[n])] for n in names])
    losses, errors, regrets = mean(records.test_loss), mean(records.test_error), mean(records.regret)
    ranks, differences, rows = stats.rankdata(losses.round(9), axis=0).mean(1), {}, []
    gap = {n: losses[i] - losses[names.index(ours)] for i, n in enumerate(names) if n != ours}
    p = {n: stats.wilcoxon(d, method="approx").pvalue if np.any(d.round(9)) else 1.0 for n, d in gap.items()}
    holm, worst = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda n: p[n])):
        holm[name] = worst = max(worst, min(1.0, (len(p) - i) * p[name]))
    for i, name in enumerate(names):
        row = [name, f"{len(chosen[name][0])}", f"{losses[i].mean():.4f}", f"{errors[i].mean():.4f}"]
        row += [f"{regrets[i].mean():.4f}", f"{ranks[i]:.2f}"]
        for other in (reference, ours):
            difference = losses[i] - losses[names.index(other)]
            low, high = interval(records, difference)
            differences[name, other] = difference.mean(), low, high
            row.append("" if name == other else f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
        low, high = interval(records, regrets[i] - regrets[names.index(ours)])
        row.append("" if name == ours else f"[{low:+.4f}, {high:+.4f}]")
        better = np.sign((losses[names.index(ours)] - losses[i]).round(9))
        row += ["", ""] if name == ours else [f"{(better > 0).sum()} / {(better < 0).sum()}", f"{holm[name]:.2g}"]
        rows.append(row)
    header = ["method", "seeds", "test log loss", "test error", "regret", "mean rank of test log loss"]
    header += [f"log loss minus that of {other}" for other in (reference, ours)]
    header += [f"95 % interval of regret minus that of {ours}"]
    return [*header, "better / worse than it", "p"], rows, differences


def beside_average(records: Records, chosen) -> str:
    """Compares g without a trial with the configuration that is best on average, which also needs no trial."""
    names, tables = ("g(t'), no trial", "best on average"), range(len(records.names))
    texts = []
    for what, values in (("log loss", records.test_loss), ("regret", records.regret)):
        ours, other = (np.array([values[t, chosen[name][t]].mean() for t in tables]) for name in names)
        low, high = interval(records, ours - other)
        texts.append(f"{(ours - other).mean():+.4f} [{low:+.4f}, {high:+.4f}] in {what}")
    return (
        "- The best on average and the portfolio use the mean regret over the other families' tables. Without a "
        f"trial, g minus the best on average: {' and '.join(texts)}.\n"
    )


def over_keys(records: Records, chosen) -> str:
    """Describes how the means of g over tables vary between the keys of its training."""
    learned = {name: np.array(numbers) for name, numbers in chosen.items() if name.startswith("g")}  # [T, keys]
    num_keys = next(iter(learned.values())).shape[1]
    if num_keys == 1:
        return "- There is one key of g's training, and of its searcher (`--train-seeds`).\n"
    tables, parts = np.arange(len(records.names))[:, None], []
    for name, numbers in learned.items():
        means = records.test_loss[tables, numbers].mean(0)
        parts.append(f"  - {name} {means.min():.4f} to {means.max():.4f} (standard deviation {means.std(ddof=1):.4f})")
    return (
        f"- g is trained with {num_keys} keys, which also draw for its searcher. Its figures are means over the keys. "
        "The mean test log loss over tables varies between keys:\n" + "".join(f"{part}\n" for part in parts)
    )


def plot(differences: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reference = next(reference for _, reference in differences)
    shown = {name: values for (name, r), values in differences.items() if r == reference and name != reference}
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(shown) + 1))
    for i, (name, (mean, low, high)) in enumerate(shown.items()):
        axes.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], fmt="o", color="C1" if name[:2] == "g(" else "C0")
    axes.axvline(0, color="gray", lw=1)
    axes.set(yticks=-np.arange(len(shown)), yticklabels=list(shown), xlabel=f"test log loss minus that of {reference}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The tables and the picture of the result."""

from pathlib import Path

import numpy as np

from experiments import script

LABELS = {"Gaussian process": ("log density", 0, -1.0), "kernel ridge": ("squared error", 1, 1.0)}


def by_family(values: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Returns [families, ...], means over the tables of each family."""
    return np.stack([values[family == name].mean(0) for name in np.unique(family)])


def interval(difference: np.ndarray, num: int = 4000) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over families."""
    drawn = np.random.default_rng(0).integers(len(difference), size=(num, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def compared(gap: np.ndarray) -> str:
    """Returns the mean and its interval, or nothing for a method and itself."""
    low, high = interval(gap)
    return f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]" if gap.any() else ""


def values_of(runs: list[dict], name: str, size: int, family: np.ndarray) -> dict[str, np.ndarray]:
    """Returns method -> [seeds, families], the score of the model `name`."""
    _, place, sign = LABELS[name]
    names = [key.partition("/")[2] for key in runs[0] if key.startswith(f"{size}/")]
    score = lambda run, method: sign * by_family(run[f"{size}/{method}"][:, place], family)
    return {method: np.stack([score(run, method) for run in runs]) for method in names}


def table(runs: list[dict], name: str, size: int, few: int, family: np.ndarray) -> str:
    """One row for each method: mean, and the differences of g and of one λ to it with intervals over families."""
    label, _, sign = LABELS[name]
    values = values_of(runs, name, size, family)
    rows = []
    for method, own in values.items():
        gap = (values["g"] - own).mean(0)
        better = np.mean(-sign * gap > 0)
        wins = "" if method == "g" else f"{better:.0%}"
        median = "" if method == "g" else f"{np.median(gap):+.3f}"
        one = compared((values["one λ"] - own).mean(0))
        rows.append([method, script.spread(own.mean(1)), compared(gap), median, wins, one])
    header = [f"{name}, {size} rows", f"{label}, ± over seeds", "g − it [95 %]", "median", "g better on"]
    header.append("one λ − it [95 %]")
    return script.table(header, rows)


def report(results, family, sizes, few, settings, pool) -> str:
    parts = [table(runs, name, size, few, family) for name, runs in results.items() for size in sizes]
    name, runs = next(iter(results.items()))
    values = values_of(runs, name, sizes[0], family)
    shown = [m for m in values if m in ("default", "one λ", "g") or m.endswith((f"{few} steps", "L-BFGS", "200 steps"))]
    rows = [[one, *(f"{values[m][:, i].mean():.3f}" for m in shown)] for i, one in enumerate(np.unique(family))]
    parts.append(f"Each family, {LABELS[name][0]} with {sizes[0]} rows:")
    parts.append(script.table(["family", *shown], rows))
    parts.append(
        f"Scores of the standardized target: means over test rows, then tables, then {len(np.unique(family))} "
        f"families. Intervals over families (4,000 bootstraps). Seeds: {len(runs)}. g has {settings.hidden} units, and "
        f"was learned in {settings.steps} steps of {settings.tasks} tasks from {len(pool.y)} tables of "
        f"{len(set(pool.family))} families, of at most {settings.train} training rows and {settings.width} columns. "
        f"Each step of Adam costs a gradient of the marginal likelihood; the features of g cost three."
    )
    parts.append("One λ of each seed (length scale in units of √D, signal, noise):")
    cells = lambda own: ["; ".join(", ".join(f"{value:.2f}" for value in run["one λ"]) for run in own)]
    parts.append(script.table(["model", "one λ"], [[model, *cells(own)] for model, own in results.items()]))
    return "\n\n".join(parts)


def plot(results, family, size: int, few: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (name, runs) in zip(all_axes[0], results.items(), strict=True):
        label = LABELS[name][0]
        values = {method: v.mean(0) for method, v in values_of(runs, name, size, family).items()}
        own = values["g"]
        for color, other in zip(("C1", "0.6"), (f"default + {few} steps", "one λ"), strict=True):
            axis.plot(values[other], own, "o", color=color, alpha=0.8, label=other)
        low, high = (f(np.concatenate([own, *values.values()])) for f in (np.min, np.max))
        axis.plot([low, high], [low, high], color="0.8", linewidth=1)
        axis.set(title=name, xlabel=f"{label} of a control", ylabel=f"{label} of g")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)

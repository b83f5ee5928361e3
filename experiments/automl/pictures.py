"""Pictures of losses on many tables, for `tables.py` and `network_parts.py`.

`splits` is a sequence of objects with an attribute `is_class`. `results[method][i]` is a dict with the "loss" of a
method on split i.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot(splits: Sequence[Any], results: dict[str, list[dict]], path: Path) -> None:
    """Each table is a point: the loss of metaopt and that of another method; metaopt is better above the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    others = [name for name in results if name == "random forest, tuned" or name.startswith("AutoGluon")]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for axis, is_class in zip(axes, (True, False), strict=True):
        rows = [i for i, split in enumerate(splits) if split.is_class == is_class]
        losses = {name: np.array([results[name][i]["loss"] for i in rows]) for name in ("metaopt", *others)}
        ends = [min(map(np.min, losses.values())) / 1.2, max(map(np.max, losses.values())) * 1.2] if rows else [0.1, 1]
        axis.plot(ends, ends, color="0.6", linewidth=1)
        for k, name in enumerate(others):
            axis.plot(losses["metaopt"], losses[name], "ox"[k % 2], color=f"C{k}", markersize=5, label=name)
        kind = "log loss" if is_class else "RMSE / deviation"
        axis.set(
            xscale="log", yscale="log", xlabel=f"test {kind} of metaopt", ylabel=f"test {kind} of the other method"
        )
        axis.set_title(f"{len(rows)} tables of {'classification' if is_class else 'regression'}", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_differences(splits: Sequence[Any], results: dict[str, list[dict]], reference: str, path: Path) -> None:
    """Each method is a point with an interval: its mean loss minus that of the reference. Larger is worse."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    others = [name for name in results if name not in (reference, "class shares or mean")]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 1.2 + 0.25 * len(others)), layout="constrained", sharey=True)
    for axis, is_class in zip(axes, (True, False), strict=True):
        rows = [i for i, split in enumerate(splits) if split.is_class == is_class]
        losses = {name: np.array([results[name][i]["loss"] for i in rows]) for name in (reference, *others)}
        for number, name in enumerate(others if rows else ()):
            mean, low, high = mean_and_bounds(losses[name] - losses[reference])
            axis.errorbar(mean, number, xerr=[[mean - low], [high - mean]], fmt="o", color=f"C{number}", markersize=5)
        axis.axvline(0, color="0.6", linewidth=1)
        kind = "log loss" if is_class else "RMSE / deviation"
        axis.set(xlabel=f"test {kind}\nminus that of {reference}", yticks=range(len(others)), yticklabels=others)
        axis.set_title(f"{len(rows)} tables of {'classification' if is_class else 'regression'}", fontsize=10)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def mean_and_bounds(values: np.ndarray, num: int = 4000) -> tuple[float, float, float]:
    """The mean and the ends of its 95 % bootstrap interval over families, each of which has one table."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(num, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)

"""Axes, line styles and labels that several plots share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaopt import _extras
from metaopt.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes(axes: "Axes | None", height: float = 3.2, width: float = 5.5) -> "Axes":
    return pyplot().subplots(figsize=(width, height), layout="constrained")[1] if axes is None else axes


def pyplot() -> Any:
    return _extras.require("matplotlib.pyplot", "examples", "A plot")


def rows_of_means(
    names: Sequence[str],
    means: Sequence[float],
    widths: Sequence[float],
    *,
    axes: "Axes | None",
    xlabel: str,
    highlight: Sequence[str] = (),
) -> "Axes":
    """Draws one row per name, the first at the top; a row with a non-finite mean has no point."""
    axes = new_axes(axes, height=0.8 + 0.35 * len(names))
    for row, (name, mean, width) in enumerate(zip(names, means, widths, strict=True)):
        color = "C1" if name in highlight else "C0"
        if not np.isfinite(mean):
            place = axes.get_yaxis_transform()  # x in axes coordinates, from the left
            axes.text(0.02, row, "diverges", transform=place, va="center", color=color)
            continue
        axes.errorbar(mean, row, xerr=width if np.isfinite(width) else None, fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(xlabel)
    return axes


def line_style(number: int, marker: str = "") -> dict[str, Any]:
    """The color, line style and marker of a line. After ten lines, colors repeat, with other styles and markers."""
    colors = pyplot().rcParams["axes.prop_cycle"].by_key().get("color", ["k"])  # ten, unless the user changed them
    again, place = divmod(number, len(colors))
    markers, styles = (marker, "s", "^", "D", "v", "P", "X"), ("-", "-.", ":")  # level lines are dashed: "--"
    return {
        "color": f"C{place}",
        "linestyle": styles[again % len(styles)],
        "marker": markers[again % len(markers)],
    }


def label_of(evaluation: Evaluation, method: str) -> str:
    return f"{method}, transductive" if evaluation.transductive[method] else method

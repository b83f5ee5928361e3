"""Axes, line styles and labels that several plots share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _extras
from metaopt.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH_LEGEND = 6.8  # inches, the width of a figure with a legend at the right


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
        mark = "D" if name in highlight else "o"
        axes.errorbar(mean, row, xerr=width if np.isfinite(width) else None, fmt=mark, color=color, capsize=3)
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(xlabel)
    return axes


def line_style(number: int, marker: str = "") -> dict[str, Any]:
    """The color, line style and marker of a line.

    Neighboring lines differ by more than the color. The first 70 lines all look different. Without `marker`, the first
    ten lines have no markers.
    """
    markers, styles = (marker, "s", "^", "D", "v", "P", "X"), ("-", "-.", ":")  # level lines are dashed: "--"
    return {
        "color": f"C{number % 10}",
        "linestyle": styles[number % len(styles)],
        "marker": markers[(number if marker else number // 10) % len(markers)],
    }


def legend_at_right(axes: "Axes") -> "Axes":
    """Adds a legend next to the axes: within them it covers lines."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)
    return axes


def entries(tree: Any, num_leading: int = 0) -> list[tuple[str, np.ndarray]]:
    """The entries of λ with their names, such as "decay[0]". Leaves that are labels or booleans are omitted.

    Args:
      tree: λ, or a configuration, by path.
      num_leading: the number of leading axes that every leaf has besides its own; entries keep them.

    Returns:
      The entries, in the order of `ravel_pytree`.
    """
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, np.number):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "λ"
        for index in np.ndindex(leaf.shape[num_leading:]):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            named.append((name + suffix, leaf[(*[slice(None)] * min(num_leading, leaf.ndim), *index)]))
    return named


def label_of(evaluation: Evaluation, method: str) -> str:
    return f"{method}, transductive" if evaluation.transductive[method] else method

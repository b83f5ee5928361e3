"""Architectures: cells as graphs, and Pareto fronts, also of trials."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metaopt import nas
from metaopt.plots._axes import WITH_LEGEND, legend_at_right, line_style, new_axes, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto(
    points: Mapping[str, Any],
    *,
    axes: "Axes | None" = None,
    xlabel: str = "cost",
    ylabel: str = "loss",
    log: bool = False,
) -> "Axes":
    """Plots trials or architectures by two objectives, smaller is better, and the Pareto front of each set.

    Args:
      points: name of a set -> [n, 2], such as costs and errors. For records with several outcomes, this is
        `[(r.outcomes["size"], r.outcomes["error"]) for r in records if r.status == "COMPLETE"]`, of one task. Leave
        out trials that violate a constraint, since they would be on the front.
      axes: the axes to draw on; None makes a figure.
      xlabel: the first objective.
      ylabel: the second objective.
      log: whether the axis of the first objective is logarithmic.

    Returns:
      The axes: for each set its points, and its front as steps.

    Raises:
      ValueError: if a set is not [n, 2].
      ImportError: if matplotlib is not installed.
    """
    sets = {name: np.asarray(values, float) for name, values in points.items()}
    for name, values in sets.items():
        if values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(f"Every set of `points` must be [n, 2]; {name!r} has the shape {values.shape}.")
    axes = new_axes(axes, width=WITH_LEGEND)
    for i, (name, values) in enumerate(sets.items()):
        front, look = values[nas.pareto_front(values)], line_style(i, marker="o")
        axes.scatter(values[:, 0], values[:, 1], s=10, color=look["color"], marker=look["marker"], alpha=0.6)
        axes.plot(front[:, 0], front[:, 1], drawstyle="steps-post", markersize=5, **look, label=name)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return legend_at_right(axes)


def cell(
    edges: Sequence[tuple[int, int, str]] | nas.Graph,
    *,
    num_inputs: int = 1,
    output: Sequence[int] = (),
    axes: "Axes | None" = None,
    title: str = "",
) -> "Axes":
    """Draws a cell as a graph: its nodes in a row in the order of computation, and every edge as an arc with its op.

    Args:
      edges: (source, target, op) of one kind of cell in a genotype; or a `nas.Graph`, whose ops are on the nodes.
      num_inputs: the number of inputs in a genotype, 1 or 2.
      output: the nodes whose channels are the output in a genotype; by default the last one.
      axes: the axes to draw on; None makes a figure that is wide enough for the names.
      title: the title of the axes.

    Returns:
      The axes. Arcs over the same place have different heights, so that no name covers another. Inputs are squares, and
      arcs to the output are dashed.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    drawing = _of_graph(edges) if isinstance(edges, nas.Graph) else _of_edges(edges, num_inputs, tuple(output))
    heights = _arc_heights([(s, t) for s, t, _ in drawing.arcs])
    low, high = min([*heights, 0]), max([*heights, 0])
    if axes is None:
        axes = new_axes(None, height=0.9 + 0.42 * (high - low), width=max(4.0, 1.25 * len(drawing.names)))
    for arc, height in zip(drawing.arcs, heights, strict=True):
        _draw_arc(axes, arc, height, dashed=arc[:2] in drawing.dashed)
    for node, name in enumerate(drawing.names):
        is_input = node < drawing.num_inputs
        box = {"boxstyle": "square" if is_input else "round", "facecolor": "C1" if is_input else "white"}
        axes.text(node, 0, name, ha="center", va="center", fontsize=8, bbox={**box, "edgecolor": "0.3"}, zorder=3)
    axes.set_xlim(-0.6, len(drawing.names) - 0.4)
    axes.set_ylim(low - 0.6, high + 0.6)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return axes


class _Drawing(NamedTuple):
    """A cell as nodes in a row and arcs between them.

    Attributes:
      names: the names of the nodes, in order.
      num_inputs: how many of the first nodes are inputs.
      arcs: (source, target, op), "" for an arc without a name.
      dashed: (source, target) of the arcs to the output.
    """

    names: list[str]
    num_inputs: int
    arcs: list[tuple[int, int, str]]
    dashed: set[tuple[int, int]]


def _of_graph(graph: nas.Graph) -> _Drawing:
    size = len(graph.ops)
    arcs = [(s, t, "") for s in range(size) for t in range(size) if graph.matrix[s][t]]
    return _Drawing([op.removesuffix("-bn-relu") for op in graph.ops], 1, arcs, set())


def _of_edges(edges: Sequence[tuple[int, int, str]], num_inputs: int, output: tuple[int, ...]) -> _Drawing:
    arcs = [(int(s), int(t), str(op)) for s, t, op in edges]
    output = output or (max((t for _, t, _ in arcs), default=num_inputs),)
    last = max([*output, *(t for _, t, _ in arcs)]) + 1
    names = ["input"] if num_inputs == 1 else ["input k−2", "input k−1"]
    names = [*names, *(f"{node}" for node in range(num_inputs, last)), "output"]
    arcs += [(node, last, "") for node in sorted(output)]
    return _Drawing(names, num_inputs, arcs, {(node, last) for node in output})


def _draw_arc(axes: "Axes", arc: tuple[int, int, str], height: int, *, dashed: bool) -> None:
    """Draws an arc that rises at its source, stays level and falls at its target, with its name on the level part."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    s, t, op = arc
    bend = min(0.45, (t - s) / 2)
    points = [(s, 0), (s, height), (s + bend, height), (t - bend, height), (t, height), (t, 0)]
    codes = [Path.MOVETO, *[Path.CURVE3] * 2, Path.LINETO, *[Path.CURVE3] * 2]
    style, color = ("--", "0.6") if dashed else ("-", "C0")
    axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=color, linestyle=style, zorder=1))
    side = 1 if height > 0 else -1
    arrow = {"arrowstyle": "-|>", "color": color, "shrinkB": 0}
    axes.annotate("", (t, 0.12 * side), (t, 0.32 * side), arrowprops=arrow)
    if op:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text((s + t) / 2, height, op, ha="center", va="center", fontsize=8, bbox=box, zorder=2)


def genotype(network: nas.Network, genotype: nas.Genotype) -> list["Axes"]:
    """Draws all kinds of cells of a genotype, one above the other.

    Args:
      network: the supernet's spec, which has the number of inputs and the outputs of each cell.
      genotype: the genotype, from `nas.derive_genotype` or a search.

    Returns:
      The axes, one for each kind of cell; `axes[0].figure.savefig` writes the picture.

    Raises:
      ValueError: if the genotype is not in the network.
      ImportError: if matplotlib is not installed.
    """
    nas.discrete(network, genotype)  # raises if the genotype is not in the network
    wide = max(max(t for _, t, _ in edges) if edges else 1 for edges in genotype.values()) + 2
    figure, rows = pyplot().subplots(
        len(genotype), 1, figsize=(1.25 * wide, 3.0 * len(genotype)), layout="constrained", squeeze=False
    )
    for axes, (kind, edges) in zip(rows[:, 0], genotype.items(), strict=True):
        spec = network.cells[kind]
        cell(edges, num_inputs=spec.num_inputs, output=spec.output, axes=axes, title=kind)
    return list(rows[:, 0])


def _arc_heights(spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each arc, the lowest level without an overlapping arc; positive above the row, negative below it."""
    taken: dict[int, list[tuple[int, int]]] = {}
    heights = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], spans[i])):
        s, t = spans[i]
        level = 1
        while True:
            free = [h for h in (level, -level) if all(t <= a or b <= s for a, b in taken.get(h, []))]
            if free:
                break
            level += 1
        heights[i] = free[0]
        taken.setdefault(free[0], []).append((s, t))
    return heights

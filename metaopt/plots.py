"""Plots of learning curves, λ over the outer steps, comparisons of methods, episodes, cells and Pareto fronts.

They need the extra `examples`.

Every function draws on the given axes or makes a new figure, and returns the axes. Use matplotlib for everything else.
Matplotlib is imported when a function is called.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from metaopt import base, nas
from metaopt.evaluation import Evaluation, average_ranks, by_number, mean_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve(history: Mapping[str, Any], *, axes: "Axes | None" = None, label: str | None = None) -> "Axes":
    """Plots the outer loss F over the outer steps.

    Args:
      history: the history of a `training.FitResult`, or any mapping whose "value" is [T].
      axes: the axes to draw on; None makes a figure.
      label: the label of the line.

    Returns:
      The axes. Steps with a non-finite loss are gaps.

    Raises:
      ValueError: if `history` has no "value", or it is not [T].
      ImportError: if matplotlib is not installed.
    """
    values = np.asarray(history["value"], float) if "value" in history else None
    if values is None or values.ndim != 1:
        found = f"{list(history)}" if values is None else f"shape {values.shape}"
        raise ValueError(f'`history` must have "value", the outer loss of every step, as one axis; got {found}.')
    axes = _axes(axes)
    axes.plot(np.arange(len(values)), np.where(np.isfinite(values), values, np.nan), label=label)
    axes.set_xlabel("outer step")
    axes.set_ylabel("outer loss F(λ)")
    return axes


def hyperparameter_trace(
    trace: Sequence[base.HyperParams] | base.HyperParams, *, log: bool = True, axes: "Axes | None" = None
) -> "Axes":
    """Plots λ over the outer steps, with one line per entry, named by its path.

    Args:
      trace: a list of T values of λ, for example collected by a callback of `training.fit`; or one λ whose leaves have
        a leading axis of T, as a scan stacks them.
      log: whether to use a logarithmic axis if every entry is positive.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes, with a legend if there are at most 12 lines.

    Raises:
      ValueError: if there is nothing to draw, or the leaves disagree on T.
      ImportError: if matplotlib is not installed.
    """
    if isinstance(trace, list):
        if not trace:
            raise ValueError("`trace` must hold at least one λ; it is empty.")
        trace = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trace)
    lines: list[tuple[str, np.ndarray]] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(trace):
        leaf = np.asarray(leaf, float)
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "λ"
        for index in np.ndindex(leaf.shape[1:]):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            lines.append((name + suffix, leaf[(slice(None), *index)] if leaf.ndim else leaf))
    if len({line.shape for _, line in lines}) != 1 or () in {line.shape for _, line in lines}:
        shapes = {name: line.shape for name, line in lines}
        raise ValueError(f"Every leaf of `trace` must have the outer steps as its leading axis; got {shapes}.")
    axes = _axes(axes)
    for name, line in lines:
        axes.plot(np.arange(len(line)), line, label=name)
    if log and all((line > 0).all() for _, line in lines):
        axes.set_yscale("log")
    if len(lines) <= 12:
        axes.legend(fontsize="small")
    axes.set_xlabel("outer step")
    axes.set_ylabel("λ")
    return axes


def comparison(
    scores: Mapping[str, Any],
    *,
    errors: Mapping[str, Any] | None = None,
    axes: "Axes | None" = None,
    xlabel: str = "mean over tasks",
    highlight: Sequence[str] = (),
) -> "Axes":
    """Draws a dot plot with one row per method, showing its mean and an interval.

    Args:
      scores: method -> [tasks]. The plot shows the mean and the normal 95 % interval ±1.96 s/√n. Or method -> a mean,
        together with `errors`. The first method is at the top.
      errors: method -> the half-width of its interval, if you computed the interval in another way (paired, clustered).
      axes: the axes to draw on; None makes a figure.
      xlabel: the name of the scores.
      highlight: methods to draw in another color.

    Returns:
      The axes. Non-finite scores do not enter the mean.

    Raises:
      ValueError: if `scores` is empty, a method has no finite score, or `errors` or `highlight` name other methods.
      ImportError: if matplotlib is not installed.
    """
    if not scores:
        raise ValueError("`scores` must hold at least one method; it is empty.")
    unknown = sorted((set(errors or {}) | set(highlight)) - set(scores))
    if unknown:
        raise ValueError(
            f"`errors` and `highlight` must name methods of `scores`; {unknown} are not in {list(scores)}."
        )
    means, widths = [], []
    for name, values in scores.items():
        values = np.atleast_1d(np.asarray(values, float))
        values = values[np.isfinite(values)]
        if not len(values):
            raise ValueError(f"`scores` must have a finite score for every method; {name!r} has none.")
        means.append(values.mean())
        width = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        widths.append(float((errors or {}).get(name, width)))
    return _rows(list(scores), means, widths, axes=axes, xlabel=xlabel, highlight=highlight)


def _rows(
    names: Sequence[str],
    means: Sequence[float],
    widths: Sequence[float],
    *,
    axes: "Axes | None",
    xlabel: str,
    highlight: Sequence[str] = (),
) -> "Axes":
    """Draws one row per name, the first at the top; a row with a non-finite mean has no point."""
    axes = _axes(axes, height=0.8 + 0.35 * len(names))
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


def adaptation_curves(
    evaluation: Evaluation, *, source: str | None = None, axes: "Axes | None" = None, ylabel: str = "score"
) -> "Axes":
    """Plots the mean score over the adaptation steps, with one line per method and its 95 % interval.

    Args:
      evaluation: the result of `few_shot.evaluate_episodes`.
      source: the source of the episodes; None: the episodes of all sources.
      axes: the axes to draw on; None makes a figure.
      ylabel: the name of the scores.

    Returns:
      The axes, with a legend that marks transductive methods. A method without steps is a dashed level line. Steps with
      a non-finite score are gaps. From the eleventh method on, lines have other markers and styles.

    Raises:
      ValueError: if `source` is unknown.
      ImportError: if matplotlib is not installed.
    """
    if source is not None and source not in evaluation.sources:
        raise ValueError(f"`source` must be one of {', '.join(map(repr, evaluation.sources))}; got {source!r}.")
    axes = _axes(axes)
    longest = max(scores.shape[1] for of in evaluation.scores.values() for scores in of.values())
    for number, (method, of) in enumerate(evaluation.scores.items()):
        scores = np.concatenate(list(of.values()) if source is None else [of[source]])
        scores = np.where(np.isfinite(scores).all(axis=0), scores, np.nan).astype(float)
        mean, half = scores.mean(axis=0), np.full(scores.shape[1], np.nan)
        if len(scores) > 1:
            half = 1.96 * scores.std(axis=0, ddof=1) / np.sqrt(len(scores))
        steps, look = np.arange(len(mean)), _look(number)
        if len(mean) == 1 < longest:
            steps, mean, half = np.array([0, longest - 1]), np.repeat(mean, 2), np.repeat(half, 2)
            look["linestyle"] = "--"
        axes.plot(steps, mean, **look, label=_label(evaluation, method))
        axes.fill_between(steps, mean - half, mean + half, color=look["color"], alpha=0.2, linewidth=0)
    axes.legend(fontsize="small", handlelength=3)
    axes.set_xlabel("adaptation steps")
    axes.set_ylabel(ylabel)
    return axes


def _look(number: int, marker: str = "") -> dict[str, Any]:
    """The color, line style and marker of a line. After ten lines, colors repeat, with other styles and markers."""
    colors = _pyplot().rcParams["axes.prop_cycle"].by_key().get("color", ["k"])  # ten, unless the user changed them
    again, place = divmod(number, len(colors))
    markers, styles = (marker, "s", "^", "D", "v", "P", "X"), ("-", "-.", ":")  # level lines are dashed: "--"
    return {
        "color": f"C{place}",
        "linestyle": styles[again % len(styles)],
        "marker": markers[again % len(markers)],
    }


def scores_by_number(
    evaluation: Evaluation,
    of: str,
    edges: Sequence[float],
    *,
    step: int = -1,
    axes: "Axes | None" = None,
    ylabel: str = "score",
) -> "Axes":
    """Plots the mean score against the number of ways or shots, with one line per method and 95 % intervals.

    Args:
      evaluation: the result of `few_shot.evaluate_episodes`.
      of: "ways" or "shots".
      edges: the edges of the bins, as for `evaluation.by_number`.
      step: the number of adaptation steps after which the scores are taken; −1: after the last step.
      axes: the axes to draw on; None makes a figure.
      ylabel: the name of the scores.

    Returns:
      The axes, with a legend that marks transductive methods. A non-finite mean is not drawn.

    Raises:
      ValueError: if `of` or `edges` is out of range, or no episode is within `edges`.
      ImportError: if matplotlib is not installed.
    """
    binned = by_number(evaluation, of, edges, step=step)
    if not all(binned.values()):
        raise ValueError(
            f"`edges` must enclose the {of} of at least one episode; no episode lies within {list(edges)}."
        )
    axes = _axes(axes)
    for place, (method, bins) in enumerate(binned.items()):
        number, _, mean, half = np.array(bins).T
        mean = np.where(np.isfinite(mean), mean, np.nan)
        look = _look(place, marker="o")
        axes.errorbar(number, mean, yerr=half, **look, capsize=3, label=_label(evaluation, method))
    axes.legend(fontsize="small", handlelength=3)
    axes.set_xlabel(of if of == "ways" else "shots (support examples for each way)")
    axes.set_ylabel(ylabel)
    return axes


def leaderboard(
    evaluation: Evaluation, *, source: str | None = None, step: int = -1, axes: "Axes | None" = None
) -> "Axes":
    """Draws a dot plot of mean scores with 95 % intervals, best average rank first.

    Inductive methods come first. Transductive methods follow below them, and are labeled "transductive".

    Args:
      evaluation: the result of `few_shot.evaluate_episodes`.
      source: the source of the scores; None: the mean over the sources.
      step: the number of adaptation steps after which the scores are taken; −1: after the last step.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes. A method with a non-finite mean has a row without a point, with the text "diverges".

    Raises:
      ValueError: if `source` is unknown.
      ImportError: if matplotlib is not installed.
    """
    if source is not None and source not in evaluation.sources:
        raise ValueError(f"`source` must be one of {', '.join(map(repr, evaluation.sources))}; got {source!r}.")
    table = mean_scores(evaluation, step=step)
    labels, means, halves = [], [], []
    for method in average_ranks(evaluation, step=step):
        pairs = np.array([pair for name, pair in table[method].items() if source in (None, name)])
        finite = np.isfinite(pairs[:, 0]).all()
        labels.append(_label(evaluation, method))
        means.append(pairs[:, 0].mean() if finite else np.nan)
        halves.append(np.sqrt((pairs[:, 1] ** 2).sum()) / len(pairs))
    return _rows(labels, means, halves, axes=axes, xlabel=source or "mean over sources")


def _label(evaluation: Evaluation, method: str) -> str:
    return f"{method}, transductive" if evaluation.transductive[method] else method


def pareto_front(
    points: Mapping[str, Any],
    *,
    axes: "Axes | None" = None,
    xlabel: str = "cost",
    ylabel: str = "loss",
    log: bool = False,
) -> "Axes":
    """Plots architectures by two objectives, smaller is better, and the Pareto front of each set.

    Args:
      points: name of a set -> [n, 2], such as costs and errors.
      axes: the axes to draw on; None makes a figure.
      xlabel: the first objective.
      ylabel: the second objective.
      log: whether the axis of the first objective is logarithmic.

    Returns:
      The axes: for each set its points, and its front as steps.

    Raises:
      ValueError: if `points` is empty, or a set is not [n, 2].
      ImportError: if matplotlib is not installed.
    """
    if not points:
        raise ValueError("`points` must hold at least one set; it is empty.")
    sets = {name: np.asarray(values, float) for name, values in points.items()}
    for name, values in sets.items():
        if values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(f"Every set of `points` must be [n, 2]; {name!r} has the shape {values.shape}.")
    axes = _axes(axes)
    for i, (name, values) in enumerate(sets.items()):
        front = values[nas.pareto_front(values)]
        axes.scatter(values[:, 0], values[:, 1], s=10, color=f"C{i}", alpha=0.6)
        axes.plot(front[:, 0], front[:, 1], drawstyle="steps-post", color=f"C{i}", label=name)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(fontsize="small")
    return axes


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
      ValueError: if an edge does not go from a node to a later one, or goes to an input.
      ImportError: if matplotlib is not installed.
    """
    if isinstance(edges, nas.Graph):
        size = len(edges.ops)
        names, inputs = [op.removesuffix("-bn-relu") for op in edges.ops], 1
        arcs = [(s, t, "") for s in range(size) for t in range(size) if edges.matrix[s][t]]
        dashed = set()
    else:
        inputs = num_inputs
        given = [(int(s), int(t), str(op)) for s, t, op in edges]
        output = tuple(output) or (max((t for _, t, _ in given), default=inputs),)
        last = max([*output, *(t for _, t, _ in given)]) + 1
        names = ["input"] if inputs == 1 else ["input k−2", "input k−1"]
        names = [*names, *(f"{node}" for node in range(inputs, last)), "output"]
        arcs = [*given, *((node, last, "") for node in sorted(output))]
        dashed = {(node, last) for node in output}
    wrong = [(s, t) for s, t, _ in arcs if not 0 <= s < t or t < inputs]
    if wrong:
        raise ValueError(
            f"An edge must go from a node to a later one that is not an input; got {wrong[0][0]} -> {wrong[0][1]}."
        )
    heights = _arc_heights([(s, t) for s, t, _ in arcs])
    if axes is None:
        high = max(heights, default=0) - min([*heights, 0])
        axes = _axes(None, height=0.9 + 0.42 * high, width=max(4.0, 1.25 * len(names)))
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for (s, t, op), height in zip(arcs, heights, strict=True):
        # Up within a third of a place, level, and down again; the name is on the level part.
        bend = min(0.45, (t - s) / 2)
        points = [(s, 0), (s, height), (s + bend, height), (t - bend, height), (t, height), (t, 0)]
        codes = [Path.MOVETO, *[Path.CURVE3] * 2, Path.LINETO, *[Path.CURVE3] * 2]
        style = "--" if (s, t) in dashed else "-"
        color = "0.6" if (s, t) in dashed else "C0"
        axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=color, linestyle=style, zorder=1))
        side = 1 if height > 0 else -1
        axes.annotate(
            "", (t, 0.12 * side), (t, 0.32 * side), arrowprops={"arrowstyle": "-|>", "color": color, "shrinkB": 0}
        )
        if op:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text((s + t) / 2, height, op, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
    for node, name in enumerate(names):
        shape = {"boxstyle": "square" if node < inputs else "round", "facecolor": "C1" if node < inputs else "white"}
        axes.text(node, 0, name, ha="center", va="center", fontsize=8, bbox={**shape, "edgecolor": "0.3"}, zorder=3)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(min([*heights, 0]) - 0.6, max([*heights, 0]) + 0.6)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return axes


def genotype(network: nas.Network, found: nas.Genotype) -> list["Axes"]:
    """Draws all kinds of cells of a genotype, one above the other.

    Args:
      network: the supernet's spec, which has the number of inputs and the outputs of each cell.
      found: a genotype, from `nas.derive_genotype` or a search.

    Returns:
      The axes, one for each kind of cell; `axes[0].figure.savefig` writes the picture.

    Raises:
      ValueError: if the genotype is not in the network.
      ImportError: if matplotlib is not installed.
    """
    nas.discrete(network, found)  # raises if the genotype is not in the network
    pyplot = _pyplot()
    wide = max(max(t for _, t, _ in edges) if edges else 1 for edges in found.values()) + 2
    figure, rows = pyplot.subplots(
        len(found), 1, figsize=(1.25 * wide, 3.0 * len(found)), layout="constrained", squeeze=False
    )
    for axes, (kind, edges) in zip(rows[:, 0], found.items(), strict=True):
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


def critical_difference(
    scores: Mapping[str, Any], *, alpha: float = 0.05, highlight: Sequence[str] = (), axes: "Axes | None" = None
) -> "Axes":
    """Draws a rank diagram: methods on the line of mean ranks, best at the left. Bars join indistinguishable methods.

    Methods are ranked on each task (ties share a rank). Friedman's test decides whether the methods differ at all. If
    it does not reject, one bar joins all of them. Otherwise Wilcoxon's signed-rank test compares all pairs, with Holm's
    correction over the pairs. A bar then joins each longest run of neighbors in which no pair differs. With two
    methods, only Wilcoxon's test is used.

    Args:
      scores: method -> [T], smaller is better, on the same T tasks: one number per task, such as the mean over seeds.
        Seeds of one task are not independent tasks.
      alpha: the level of the tests.
      highlight: methods to draw in another color.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes.

    Raises:
      ValueError: if there are fewer than two methods or tasks, a score is not finite, or the numbers of tasks differ.
      ValueError: if `alpha` is not between 0 and 1, or `highlight` names other methods.
      ImportError: if matplotlib is not installed.

    Source: Demšar, JMLR 2006, https://jmlr.org/papers/v7/demsar06a.html. Pairs are compared by Wilcoxon's test instead
    of Nemenyi's, whose result for two methods depends on the others: Benavoli, Corani & Mangili, JMLR 2016.
    """
    names = list(scores)
    values = [np.asarray(value, float) for value in scores.values()]
    if len(names) < 2 or len({v.shape for v in values}) != 1 or values[0].ndim != 1 or len(values[0]) < 2:
        found = {name: v.shape for name, v in zip(names, values, strict=True)}
        raise ValueError(f"`scores` must have two methods or more, each [T] on the same T > 1 tasks; got {found}.")
    if not np.isfinite(values).all():
        raise ValueError("`scores` must be finite: leave out the tasks that a method has not.")
    if not 0 < alpha < 1:
        raise ValueError(f"`alpha` must lie between 0 and 1; got {alpha}.")
    if unknown := sorted(set(highlight) - set(names)):
        raise ValueError(f"`highlight` must name methods of `scores`; {unknown} are not in {names}.")
    ranks, cliques = _cliques(np.stack(values), alpha)
    order = np.argsort(ranks, kind="stable")
    axes = _axes(axes, height=1.2 + 0.16 * len(names) + 0.12 * len(cliques))
    low, high = int(np.floor(ranks.min())), int(np.ceil(ranks.max()))
    axes.plot([low, high], [0, 0], color="k", lw=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, 0.15], color="k", lw=1)
        axes.text(tick, 0.25, str(tick), ha="center", va="bottom", fontsize="small")
    for i, clique in enumerate(cliques):
        y = -0.35 - 0.3 * i
        axes.plot([ranks[clique].min() - 0.03, ranks[clique].max() + 0.03], [y, y], color="k", lw=3)
    below = -0.35 - 0.3 * len(cliques)
    half, margin = (len(names) + 1) // 2, 0.15 * (high - low)
    for i, method in enumerate(order):
        left = i < half
        y = below - 0.5 * (i if left else len(names) - 1 - i) - 0.3
        x = low - margin if left else high + margin
        color = "C1" if names[method] in highlight else "C0"
        at = float(ranks[method])
        axes.plot([at, at, x], [0, y, y], color=color, lw=1)
        text = f"{names[method]} {ranks[method]:.2f} " if left else f" {ranks[method]:.2f} {names[method]}"
        axes.text(x, y, text, ha="right" if left else "left", va="center", fontsize="small", color=color)
    axes.set_xlim(low - 4 * margin - 0.5, high + 4 * margin + 0.5)
    axes.set_axis_off()
    axes.set_title("mean rank", fontsize="small")
    return axes


def _cliques(values: np.ndarray, alpha: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean ranks [M], and sets of methods in which no pair differs, from values [M, T]."""
    from scipy import stats

    num = len(values)
    ranks = stats.rankdata(values, axis=0).mean(1)
    order = np.argsort(ranks, kind="stable")
    if num > 2 and stats.friedmanchisquare(*values).pvalue >= alpha:
        return ranks, [order]
    pairs = [(i, j) for i in range(num) for j in range(i)]
    difference = {pair: values[pair[0]] - values[pair[1]] for pair in pairs}
    p_value = lambda d: float(np.asarray(stats.wilcoxon(d, method="approx"))[1]) if np.any(d) else 1.0
    p = {pair: p_value(d) for pair, d in difference.items()}
    same, rejecting = np.ones((num, num), bool), True
    for k, (i, j) in enumerate(sorted(pairs, key=lambda pair: p[pair])):
        rejecting = rejecting and p[i, j] <= alpha / (len(pairs) - k)  # Holm: stop at the first p above its level
        same[i, j] = same[j, i] = not rejecting
    cliques, reached = [], 0
    for start in range(num):
        end = start + 1
        while end < num and same[np.ix_(order[start : end + 1], order[start : end + 1])].all():
            end += 1
        if end > reached and end - start > 1:
            cliques.append(order[start:end])
        reached = max(reached, end)
    return ranks, cliques


def _axes(axes: "Axes | None", height: float = 3.2, width: float = 5.5) -> "Axes":
    return _pyplot().subplots(figsize=(width, height), layout="constrained")[1] if axes is None else axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('plots need matplotlib; install it with `pip install "metaopt-jax[examples]"`.') from error
    return pyplot

"""Comparisons of methods: means with intervals, rankings, and critical differences of ranks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaopt.evaluation import Evaluation, average_ranks, mean_scores
from metaopt.plots._axes import label_of, new_axes, rows_of_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
      highlight: methods to draw in another color, as diamonds.

    Returns:
      The axes. Non-finite scores do not enter the mean. A method without a finite score has the text "diverges".

    Raises:
      ValueError: if `errors` or `highlight` name other methods, or the scores of a method are not [tasks].
      ImportError: if matplotlib is not installed.
    """
    unknown = sorted((set(errors or {}) | set(highlight)) - set(scores))
    if unknown:
        raise ValueError(
            f"`errors` and `highlight` must name methods of `scores`; {unknown} are not in {list(scores)}."
        )
    means, widths = [], []
    for name, values in scores.items():
        values = np.atleast_1d(np.asarray(values, float))
        if values.ndim > 1:  # seeds of one task are not tasks
            raise ValueError(
                f"The scores of {name!r} must be [tasks], one number for each task, such as the mean over seeds: the "
                f"interval is over tasks. Got the shape {values.shape}."
            )
        values = values[np.isfinite(values)]
        means.append(values.mean() if len(values) else np.nan)
        width = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        widths.append(float((errors or {}).get(name, width)))
    return rows_of_means(list(scores), means, widths, axes=axes, xlabel=xlabel, highlight=highlight)


def ranking(evaluation: Evaluation, *, source: str | None = None, step: int = -1, axes: "Axes | None" = None) -> "Axes":
    """Draws a dot plot of mean scores with 95 % intervals, best average rank (over the sources that it shows) first.

    Inductive methods come first. Transductive methods follow below them, and are labeled "transductive".

    Args:
      evaluation: the result of `few_shot.evaluate_episodes`.
      source: the source of the scores; None: the mean over the sources.
      step: the number of adaptation steps after which the scores are taken; −1: after the last step.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes. A method with a non-finite mean has a row without a point, with the text "diverges".

    Raises:
      KeyError: if `source` is unknown.
      ImportError: if matplotlib is not installed.
    """
    if source is not None:  # means and ranks of this source only: the ranks of all sources may have another order
        evaluation = evaluation._replace(num_ways={source: evaluation.num_ways[source]})
    table = mean_scores(evaluation, step=step)
    labels, means, halves = [], [], []
    for method in average_ranks(evaluation, step=step):
        pairs = np.array(list(table[method].values()))
        finite = np.isfinite(pairs[:, 0]).all()
        labels.append(label_of(evaluation, method))
        means.append(pairs[:, 0].mean() if finite else np.nan)
        halves.append(np.sqrt((pairs[:, 1] ** 2).sum()) / len(pairs))
    return rows_of_means(labels, means, halves, axes=axes, xlabel=source or "mean over sources")


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
      highlight: methods to draw in another color and bold.
      axes: the axes to draw on; None makes a figure that is wide enough for the names.

    Returns:
      The axes.

    Raises:
      ValueError: if there are fewer than two methods or tasks, a score is not finite, or the numbers of tasks differ.
      ImportError: if matplotlib is not installed.

    Source: Demšar, JMLR 2006, https://jmlr.org/papers/v7/demsar06a.html. Pairs are compared by Wilcoxon's test instead
    of Nemenyi's, whose result for two methods depends on the others: Benavoli, Corani & Mangili, JMLR 2016.
    """
    names = list(scores)
    values = [np.asarray(value, float) for value in scores.values()]
    if len(names) < 2 or len({v.shape for v in values}) != 1 or values[0].ndim != 1 or len(values[0]) < 2:
        shapes = {name: v.shape for name, v in zip(names, values, strict=True)}
        raise ValueError(f"`scores` must have two methods or more, each [T] on the same T > 1 tasks; got {shapes}.")
    if not np.isfinite(values).all():
        raise ValueError("`scores` must be finite: leave out tasks for which a method has no finite score.")
    unknown = sorted({*highlight} - {*names})
    if not 0 < alpha < 1 or unknown:
        raise ValueError(
            f"`alpha` must be in (0, 1), and `highlight` must name methods of `scores`; got {alpha} and {unknown}."
        )
    ranks, cliques = _cliques(np.stack(values), alpha)
    order = np.argsort(ranks, kind="stable")
    low = int(np.floor(ranks.min()))
    high = max(int(np.ceil(ranks.max())), low + 1)  # ranks may all be equal
    text_width = 0.6 + 0.075 * max(map(len, names))  # inches, of a name and its rank
    width = max(5.5, 2 * text_width + 0.3 * (high - low) + 0.5)
    axes = new_axes(axes, height=1.4 + 0.16 * len(names) + 0.12 * len(cliques), width=width)
    # From left to right: names (`text_width`), a margin, the line of ranks, a margin, names. x is in ranks. The space
    # between the names is 85 % line and two margins of 7.5 %. It has at least 30 % of the axes.
    between = max(_width(axes) - 2 * text_width, 0.3 * _width(axes))  # inches
    unit = (high - low) / (0.85 * between)  # ranks per inch
    margin = 0.075 * between * unit  # ranks
    # From top to bottom: tick labels, the line of ranks at y = 0, one bar for each clique, names.
    axes.plot([low, high], [0, 0], color="k", lw=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, 0.15], color="k", lw=1)
        axes.text(tick, 0.25, str(tick), ha="center", va="bottom", fontsize="small")
    for i, clique in enumerate(cliques):
        y = -0.35 - 0.3 * i
        axes.plot([ranks[clique].min() - 0.03, ranks[clique].max() + 0.03], [y, y], color="k", lw=3)
    below = -0.35 - 0.3 * len(cliques)
    # The better half of the methods is at the left, the best one at the top. The others are at the right, the worst one
    # at the top. So the lines from the names to the ranks do not cross.
    half = (len(names) + 1) // 2
    for i, method in enumerate(order):
        left = i < half
        y = below - 0.5 * (i if left else len(names) - 1 - i) - 0.3
        x = low - margin if left else high + margin
        color = "C1" if names[method] in highlight else "C0"
        rank = float(ranks[method])
        axes.plot([rank, rank, x], [0, y, y], color=color, lw=1)
        text = f"{names[method]} {ranks[method]:.2f} " if left else f" {ranks[method]:.2f} {names[method]}"
        side, weight = "right" if left else "left", "bold" if names[method] in highlight else "normal"
        axes.text(x, y, text, ha=side, va="center", fontsize="small", color=color, weight=weight)
    axes.set_xlim(low - margin - text_width * unit, high + margin + text_width * unit)
    axes.set_ylim(top=0.7)
    axes.set_axis_off()
    axes.set_title("mean rank", fontsize="small")
    return axes


def _width(axes: "Axes") -> float:
    """The width of the axes in inches, before a constrained layout."""
    return axes.get_position().width * axes.figure.bbox.width / axes.figure.get_dpi()


def _cliques(values: np.ndarray, alpha: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean ranks [M], and sets of methods in which no pair differs, from values [M, T]."""
    from scipy import stats

    num = len(values)
    ranks = stats.rankdata(values, axis=0).mean(1)
    order = np.argsort(ranks, kind="stable")
    all_equal = (values == values[0]).all()  # then the statistic is 0/0
    if all_equal or (num > 2 and stats.friedmanchisquare(*values).pvalue >= alpha):
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

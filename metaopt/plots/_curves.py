"""Curves over steps: losses, λ and the scores of adaptation; and scores by the number of ways or shots."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from metaopt import base
from metaopt.evaluation import Evaluation, by_number
from metaopt.plots._axes import WITH_LEGEND, entries, label_of, legend_at_right, line_style, new_axes

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
      ImportError: if matplotlib is not installed.
    """
    values = np.asarray(history["value"], float)
    axes = new_axes(axes)
    axes.plot(np.arange(len(values)), np.where(np.isfinite(values), values, np.nan), label=label)
    axes.set_xlabel("outer step")
    axes.set_ylabel("outer loss F(λ)")
    return axes


def hyperparameter_trace(
    trace: list[base.HyperParams] | base.HyperParams, *, log: bool = True, axes: "Axes | None" = None
) -> "Axes":
    """Plots λ over the outer steps, with one line per entry, named by its path.

    Args:
      trace: a list of T values of λ; or one λ whose leaves have a leading axis of T, as a scan stacks them. The
        history of `training.fit` has only single numbers, such as `{"rate": result.history["rate"]}` after
        `training.learner(record=...)`. Recorded arrays reach only callbacks: collect them there, as in the example.
      log: whether to use a logarithmic axis if every entry is positive.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes, with a legend at their right if there are at most 12 lines. If you make the figure yourself, give it
      `layout="constrained"`, which leaves room for the legend.

    Raises:
      ValueError: if the trace is empty, or the leaves disagree on T.
      ImportError: if matplotlib is not installed.

    Example:
      >>> from metaopt import plots
      >>> trace = []
      >>> # for `training.fit`
      >>> callback = lambda step, metrics: trace.append({"decay": metrics["decay"]})
      >>> # `fit` calls it, with the arrays of `record`
      >>> callback(1, {"decay": np.array([0.1, 0.2])})
      >>> callback(2, {"decay": np.array([0.2, 0.4])})
      >>> [line.get_label() for line in plots.hyperparameter_trace(trace).lines]
      ['decay[0]', 'decay[1]']
    """
    if isinstance(trace, list) and trace:
        trace = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trace)
    lines = entries(trace, num_leading=1)
    if not lines:
        raise ValueError(
            "`trace` is empty: it has no numbers. The history of `training.fit` does not have recorded arrays. Collect "
            "them by a callback: `fit(callback=lambda step, metrics: trace.append(metrics[NAME]))`, where NAME is the "
            "path of an array in the tree of `training.learner(record=...)`."
        )
    if len({line.shape for _, line in lines}) != 1 or () in {line.shape for _, line in lines}:
        shapes = {name: line.shape for name, line in lines}
        raise ValueError(f"Every leaf of `trace` must have the outer steps as its leading axis; got {shapes}.")
    axes = new_axes(axes, width=WITH_LEGEND)
    for number, (name, line) in enumerate(lines):
        axes.plot(np.arange(len(line)), line.astype(float), **line_style(number), label=name)
    if log and all((line > 0).all() for _, line in lines):
        axes.set_yscale("log")
    if len(lines) <= 12:
        legend_at_right(axes)
    axes.set_xlabel("outer step")
    axes.set_ylabel("λ")
    return axes


def hypergradients(history: Mapping[str, Any], *, window: int = 20, axes: "Axes | None" = None) -> "Axes":
    """Plots the norm of the hypergradient over the outer steps, and its signal-to-noise ratio over tasks.

    Step t has the mean hypergradient h_t over B_t finite tasks, and the trace of the covariance over these tasks, v_t.
    The noise of the mean is v_t / B_t, so the expected ‖h_t‖² is the squared norm of the expected hypergradient plus
    v_t / B_t. The signal-to-noise ratio of a window of steps is therefore

        √( max(0, Σ_t (‖h_t‖² − v_t / B_t)) / Σ_t (v_t / B_t) ).

    It is 1 if signal and noise are equal. Far below 1, a step is mostly noise: take more tasks for each step, or a
    smaller outer rate, which averages over steps. The tasks of a batch are assumed to be independent draws.

    Args:
      history: the history of a `training.FitResult`, or a mapping whose "hypergrad_norm" is [T]. The estimator wrapper
        `hypergrad.over_tasks` adds "hypergrad_variance" and "num_finite". Without them, or with one task for each step,
        there is no ratio.
      window: the number of steps in the window of the ratio, which ends with step t. A run of fewer steps is one
        window.
      axes: the axes to draw on; None makes a figure.

    Returns:
      The axes of the norm, which is logarithmic. The axis of the ratio is at the right, in `axes.figure.axes[-1]`.
      Skipped steps are gaps of the norm, and do not enter the ratio.

    Raises:
      ImportError: if matplotlib is not installed.

    Example:
      >>> from metaopt import plots
      >>> # 25 = 21 + 20 / 5
      >>> history = {
      ...     "hypergrad_norm": [5.0],
      ...     "hypergrad_variance": [20.0],
      ...     "num_finite": [5],
      ... }
      >>> ratio = plots.hypergradients(history).figure.axes[-1].lines[0].get_ydata()
      >>> print((ratio**2).round(2))  # 21 / 4
      [5.25]
    """
    norm = np.asarray(history["hypergrad_norm"], float)
    norm = np.where(np.isfinite(norm), norm, np.nan)
    axes = new_axes(axes)
    axes.plot(np.arange(len(norm)), norm, color="C0")
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("outer step")
    axes.set_ylabel("norm of dF/dλ", color="C0")
    if "hypergrad_variance" in history and "num_finite" in history:
        variance, num_tasks = (np.asarray(history[name], float) for name in ("hypergrad_variance", "num_finite"))
        ratio = _signal_to_noise(norm, variance, num_tasks, window)
        right = axes.twinx()
        right.plot(np.arange(len(ratio)), ratio, color="C1", linestyle="--")
        right.axhline(1.0, color="C1", linestyle=":", linewidth=1)
        right.set_ylim(bottom=0.0)
        right.set_ylabel(f"signal-to-noise of {min(window, len(norm))} steps (dashed)", color="C1")
    return axes


def _signal_to_noise(norm: np.ndarray, variance: np.ndarray, num_tasks: np.ndarray, window: int) -> np.ndarray:
    """[T] the ratio of the window that ends at each step; NaN before the first whole window."""
    with np.errstate(invalid="ignore", divide="ignore"):
        noise = np.where(num_tasks > 1, variance / num_tasks, np.nan)
        signal = norm**2 - noise
        use = np.isfinite(signal)
        window = min(window, len(norm))
        signal, noise = (
            np.convolve(np.where(use, values, 0.0), np.ones(window))[: len(norm)] for values in (signal, noise)
        )
        ratio = np.sqrt(np.maximum(signal, 0.0) / noise)
    return np.where((np.arange(len(norm)) >= window - 1) & np.isfinite(ratio), ratio, np.nan)


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
      KeyError: if `source` is unknown.
      ImportError: if matplotlib is not installed.
    """
    axes = new_axes(axes)
    longest = max(scores.shape[1] for by_source in evaluation.scores.values() for scores in by_source.values())
    for number, (method, by_source) in enumerate(evaluation.scores.items()):
        scores = np.concatenate(list(by_source.values()) if source is None else [by_source[source]])
        scores = np.where(np.isfinite(scores).all(axis=0), scores, np.nan).astype(float)
        mean, half = scores.mean(axis=0), np.full(scores.shape[1], np.nan)
        if len(scores) > 1:
            half = 1.96 * scores.std(axis=0, ddof=1) / np.sqrt(len(scores))
        steps, look = np.arange(len(mean)), line_style(number)
        if len(mean) == 1 < longest:
            steps, mean, half = np.array([0, longest - 1]), np.repeat(mean, 2), np.repeat(half, 2)
            look["linestyle"] = "--"
        axes.plot(steps, mean, **look, label=label_of(evaluation, method))
        axes.fill_between(steps, mean - half, mean + half, color=look["color"], alpha=0.2, linewidth=0)
    axes.legend(fontsize="small", handlelength=3)
    axes.set_xlabel("adaptation steps")
    axes.set_ylabel(ylabel)
    return axes


def scores_by_number(
    evaluation: Evaluation,
    count: str,
    edges: Sequence[float],
    *,
    step: int = -1,
    axes: "Axes | None" = None,
    ylabel: str = "score",
) -> "Axes":
    """Plots the mean score against the number of ways or shots, with one line per method and 95 % intervals.

    Args:
      evaluation: the result of `few_shot.evaluate_episodes`.
      count: "ways" or "shots".
      edges: the edges of the bins, as for `evaluation.by_number`.
      step: the number of adaptation steps after which the scores are taken; −1: after the last step.
      axes: the axes to draw on; None makes a figure.
      ylabel: the name of the scores.

    Returns:
      The axes, with a legend that marks transductive methods. A non-finite mean is not drawn.

    Raises:
      KeyError: if `count` is not "ways" or "shots".
      ValueError: if no episode is within `edges`.
      ImportError: if matplotlib is not installed.
    """
    binned = by_number(evaluation, count, edges, step=step)
    if not all(binned.values()):
        raise ValueError(
            f"`edges` must enclose the {count} of at least one episode; no episode lies within {list(edges)}."
        )
    axes = new_axes(axes, width=WITH_LEGEND)
    for place, (method, bins) in enumerate(binned.items()):
        number, _, mean, half = np.array(bins).T
        mean = np.where(np.isfinite(mean), mean, np.nan)
        look = line_style(place, marker="o")
        axes.errorbar(number, mean, yerr=half, **look, capsize=3, label=label_of(evaluation, method))
    axes.set_xlabel(count if count == "ways" else "shots (support examples for each way)")
    axes.set_ylabel(ylabel)
    return legend_at_right(axes)

"""λ: slices of the outer loss through a point, and predicted λ over the features of tasks."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metaopt import base, spaces
from metaopt.plots._axes import WITH_LEGEND, entries, legend_at_right, line_style, new_axes, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def slices(
    estimator: base.Estimator,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    key: jax.Array | None = None,
    radius: float = 0.5,
    num_points: int = 21,
    max_slices: int = 8,
    axes: "Sequence[Axes] | None" = None,
) -> list["Axes"]:
    """Plots F along each entry of λ through a point, with the slope of the hypergradient as a dashed tangent.

    If the rule is right, the tangent touches the curve at the point. A tangent that crosses the curve shows a bias or a
    fault, and `hypergrad.check` measures it. A curve with many jumps shows that F is chaotic: there an exact
    hypergradient is of no use. F(λ) is the value of the first estimate, with one key for all λ. So rules of whole
    training runs (`hypergrad.unrolled`) have slices of the whole run, and others of their first estimate.

    Args:
      estimator: the rule, for one task or, after `hypergrad.over_tasks`, for a batch.
      hyperparams: λ, the point, in the form that the problem takes.
      task: the task or the batch.
      key: the PRNG key; fixed by default.
      radius: entries move by ± radius · |entry|. Zeros, and unconstrained coordinates (`spaces.Unconstrained`), move by
        ± radius.
      num_points: the number of points of each slice. Each point is one evaluation of F, one after the other.
      max_slices: the largest number of slices. If λ has more entries, those with the largest change of F to first order
        within the radius are drawn.
      axes: one for each slice; None makes a figure.

    Returns:
      The axes, one for each slice. Values that are not finite are gaps. Values whose distance from F(λ) is more than 20
      times the median one, such as those of runs that diverge, are outside of the axes.

    Raises:
      ValueError: if the number of `axes` is not that of the slices.
      ImportError: if matplotlib is not installed.
    """
    key = jax.random.key(0) if key is None else key
    point, unravel = ravel_pytree(hyperparams)

    def estimate(flat):
        hyperparams = unravel(flat)
        return estimator.estimate(hyperparams, task, estimator.init(key, hyperparams, task))[0]

    at_point = jax.jit(estimate)(point)
    slopes = np.asarray(ravel_pytree(at_point.hypergrad)[0], float)
    is_relative = np.asarray(point != 0) & (not isinstance(hyperparams, spaces.Unconstrained))
    radii = radius * np.where(is_relative, np.abs(point), 1.0)
    largest = np.argsort(-np.nan_to_num(np.abs(slopes) * radii, posinf=np.inf), kind="stable")[:max_slices]
    chosen = np.sort(largest)
    offsets = radii[chosen, None] * np.linspace(-1.0, 1.0, num_points)  # [S, P]
    places = np.repeat(chosen, num_points)
    value_at = lambda place, offset: estimate(point.at[place].add(offset)).value
    values = jax.jit(lambda *args: jax.lax.map(lambda pair: value_at(*pair), args))(
        jnp.asarray(places), jnp.asarray(offsets.ravel(), point.dtype)
    )
    values = np.asarray(values, float).reshape(offsets.shape)
    names = [name for name, _ in entries(hyperparams)]
    axes = _grid(len(chosen)) if axes is None else list(axes)
    if len(axes) != len(chosen):
        raise ValueError(f"`axes` must be one for each of {len(chosen)} slices; got {len(axes)}.")
    for own, i, offset, value in zip(axes, chosen, offsets, values, strict=True):
        _draw_slice(own, float(point[i]), float(at_point.value), float(slopes[i]), offset, value)
        own.set_xlabel(names[i])
    axes[0].set_ylabel("outer loss F(λ)")
    axes[0].legend(fontsize="small")
    return axes


def _grid(num: int) -> list["Axes"]:
    """`num` axes, one for each slice, in rows of at most four."""
    num_columns = min(num, 4)
    num_rows = math.ceil(num / num_columns)
    size = (max(3.6, 2.8 * num_columns), 2.8 * num_rows)
    figure, grid = pyplot().subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for unused in grid.ravel()[num:]:
        figure.delaxes(unused)
    return list(grid.ravel()[:num])


def _draw_slice(axes: "Axes", x: float, value: float, slope: float, offsets: np.ndarray, values: np.ndarray) -> None:
    values = np.where(np.isfinite(values), values, np.nan)
    axes.plot(x + offsets, values, color="C0", label="F")
    axes.plot(x + offsets, value + slope * offsets, color="C1", linestyle="--", label="slope dF/dλ")
    axes.plot([x], [value], color="k", marker="o", linestyle="none", markersize=4, label="λ")
    # The limits follow the values near F(λ). A steep tangent and the F of diverging runs extend beyond them.
    distances = np.abs(values - value)
    near = values[distances <= 20 * np.nanmedian(distances)] if np.isfinite(values).any() else values[:0]
    if len(near) and np.ptp(near) > 0:
        margin = 0.05 * np.ptp(near)
        axes.set_ylim(near.min() - margin, near.max() + margin)


def hyperparameters_by_feature(
    predict: Callable[[np.ndarray], Any],
    features: Any,
    feature: int,
    *,
    margin: float = 0.25,
    num_points: int = 50,
    log: bool = True,
    axes: "Axes | None" = None,
    xlabel: str = "",
) -> "Axes":
    """Plots the predicted λ against one feature of a task, and shades the range of the training tasks.

    The other features stay at their medians over the training tasks. Beyond the shaded range, the prediction
    extrapolates. Marks at the bottom are the training tasks.

    Args:
      predict: `features [d] -> λ` in natural units, or a configuration. It may be `MetaOptimizer.predict`. For a
        `predictors.TrainedPredictor` it is `lambda f: trained.predict(base.Task(None, None, f))`.
      features: [n, d], the features of the training tasks, NaN or infinite if unknown.
      feature: the index of the feature, from 0.
      margin: how far the axis extends beyond the range on each side, as a part of the range.
      num_points: the number of predictions.
      log: whether to use a logarithmic axis if every entry of λ is positive.
      axes: the axes to draw on; None makes a figure.
      xlabel: the name of the feature.

    Returns:
      The axes, with one line for each entry of λ. Entries that are labels or booleans are not drawn. An entry that some
      predictions do not have, such as a conditional one, has gaps there.

    Raises:
      ValueError: if `features` is not [n, d], or no training task has a finite value of the feature.
      ValueError: if every prediction is NaN, for example because another feature has no finite value.
      ImportError: if matplotlib is not installed.
    """
    features = np.asarray(features, float)
    if features.ndim != 2:
        raise ValueError(f"`features` must be [n, d], one row for each training task; got shape {features.shape}.")
    features = np.where(np.isfinite(features), features, np.nan)
    known = features[np.isfinite(features[:, feature]), feature]
    if not len(known):
        raise ValueError(f"`features` has no finite value in column {feature}, so its range is unknown.")
    low, high = known.min(), known.max()
    grid = np.linspace(low - margin * (high - low), high + margin * (high - low), num_points)
    unknown = np.isnan(features).all(axis=0)
    medians = np.where(unknown, np.nan, np.nanmedian(np.where(unknown, 0.0, features), axis=0))
    points = np.tile(medians, (num_points, 1))
    points[:, feature] = grid
    predicted = [dict(entries(predict(point))) for point in points]
    lines = {
        name: np.array([float(each.get(name, math.nan)) for each in predicted]) for each in predicted for name in each
    }
    if lines and not any(np.isfinite(line).any() for line in lines.values()):
        columns = np.flatnonzero(unknown).tolist()
        cause = f" Columns {columns} of `features` have no finite value." if columns else ""
        raise ValueError(f"`predict` returned no finite number for any point.{cause}")
    axes = new_axes(axes, width=WITH_LEGEND)
    axes.axvspan(low, high, color="0.9", label="range of training tasks", zorder=0)
    axes.plot(
        known, np.zeros(len(known)), transform=axes.get_xaxis_transform(), color="0.3", marker="|", linestyle="none"
    )
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(grid, line, **line_style(number), label=name)
    if log and all((line[np.isfinite(line)] > 0).all() for line in lines.values()):
        axes.set_yscale("log")
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel(xlabel or f"feature {feature}")
    axes.set_ylabel("predicted λ")
    return legend_at_right(axes)

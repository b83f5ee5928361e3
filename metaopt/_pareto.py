"""Fronts of points with several objectives, and their hypervolume. Smaller objectives are better."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pareto_front(points: Any) -> np.ndarray:
    """Returns the indices of the points that no other point dominates. Smaller objectives are better.

    A point dominates another one if it is at least as good in every objective and better in one.

    Args:
      points: [n, k] of k objectives. A row with NaN is never part of the front.

    Returns:
      [m] indices, sorted by the first objective. Equal points are all included.

    Raises:
      ValueError: if `points` has another shape.
    """
    points = _points(points)
    order = np.lexsort(points.T[::-1])
    front: list[int] = []
    for i in order:
        better = points[front]
        dominated = ((better <= points[i]).all(1) & (better < points[i]).any(1)).any()
        if not dominated and not np.isnan(points[i]).any():
            front.append(int(i))
    return np.array(front, int)


def hypervolume(points: Any, reference: Sequence[float]) -> float:
    """Returns the volume that points dominate, up to a reference point. Smaller objectives are better.

    The result is exact. It is computed in slices along the last objective, in time of order nᵏ for k objectives.

    Args:
      points: [n, k]. Points that are not below the reference in every objective add nothing.
      reference: [k], the worst value of each objective.

    Returns:
      The volume.

    Raises:
      ValueError: if the shapes do not fit.

    Source: the measure of Zitzler & Thiele, IEEE Transactions on Evolutionary Computation 3(4), 1999
    """
    points, limit = _points(points), np.asarray(reference, float)
    if limit.shape != points.shape[1:]:
        raise ValueError(f"`reference` must have an entry for each of {points.shape[1]} objectives; got {reference}.")
    inside = points[(points < limit[None]).all(1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(limit[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    heights = np.diff([*inside[:, -1], limit[-1]])
    slices = [hypervolume(inside[: i + 1, :-1], list(limit[:-1])) if h > 0 else 0.0 for i, h in enumerate(heights)]
    return float(heights @ slices)


def _points(points: Any) -> np.ndarray:
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] < 1:
        raise ValueError(f"`points` must be [n, k], a row for each of n points; got the shape {points.shape}.")
    return points

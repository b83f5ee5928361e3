"""Expected improvement of the hypervolume of a front, in closed form for any number of independent objectives.

The hypervolume that one more outcome y adds to a front is an integral over the region that the front does not dominate.
Let r be the reference point: objectives above it do not count. Let a be a point in the space of the first M − 1
objectives, and consider the points p of the front with p ≤ a in these objectives. Let s(a) be the smallest last
objective of these p. If there is no such p, s(a) is the last objective of r. Then

    HVI(y) = ∫_{y ≤ a ≤ r} max(s(a) − y_M, 0) da.

s is constant on the cells [l, u] of the grid of the front's coordinates. If the objectives are independent, then

    E[HVI(y)] = Σ_cells Π_{m<M} (E[max(u_m − y_m, 0)] − E[max(l_m − y_m, 0)]) · E[max(s − y_M, 0)].

Each factor is an expected improvement, in closed form for a mixture of Gaussians. One objective gives the expected
improvement itself. n points take (n + 1)^(M − 1) cells.

Source: Emmerich, Deutz & Klinkenberg, CEC 2011 (the closed form); Yang et al., Journal of Global Optimization 75, 2019,
  https://arxiv.org/abs/1904.12672 (sums over cells).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.blackbox._acquisition import expected_improvement
from metaopt.blackbox._posterior import Mixture

_MAX_CELLS = 2**14


class Front(NamedTuple):
    """The cells of a front of n points with M objectives.

    Attributes:
      levels: [M, n + 1] the coordinates of the points in ascending order, and then the reference's.
      ceiling: [n + 1, ...] with M − 1 axes: the index of s in the last row of `levels`.
    """

    levels: jax.Array
    ceiling: jax.Array


def max_points(num_objectives: int) -> int:
    """The largest number of points whose cells do not take too much memory: 16383, 127, 24, 10 for M = 2, 3, 4, 5."""
    return _MAX_CELLS if num_objectives == 1 else int(_MAX_CELLS ** (1 / (num_objectives - 1)) + 1e-9) - 1


def make_front(points: np.ndarray, reference: np.ndarray) -> Front:
    """Returns the cells of a front.

    Args:
      points: [n, M]. Points that are not below the reference, such as the reference itself as padding, add nothing.
      reference: [M], the largest objectives that count.
    """
    points = np.where((points < reference).all(1)[:, None], points, reference)
    num, num_objectives = points.shape
    levels = np.concatenate([np.sort(points, axis=0), reference[None]]).T
    lower = np.concatenate([np.full((num_objectives, 1), -np.inf), levels[:, :-1]], axis=1)
    ceiling = np.full((num + 1,) * (num_objectives - 1), num)
    order = np.argsort(points[:, -1], kind="stable")
    for level in reversed(range(num)):  # a smaller last objective overwrites larger ones
        first = [int(np.searchsorted(lower[m], points[order[level], m])) for m in range(num_objectives - 1)]
        ceiling[tuple(slice(start, None) for start in first)] = level
    return Front(jnp.asarray(levels, jnp.result_type(float)), jnp.asarray(ceiling))


def hypervolume_improvement(mixtures: Sequence[Mixture], front: Front) -> jax.Array:
    """The expected hypervolume that one more outcome adds to the front.

    Args:
      mixtures: the predictions of M independent objectives at P configurations.
      front: the front of M objectives.

    Returns:
      [P], larger is better; differentiable in the predictions.
    """
    gains = [
        jax.vmap(expected_improvement, in_axes=(None, 0))(mixture, levels)
        for mixture, levels in zip(mixtures, front.levels, strict=True)
    ]  # M times [n + 1, P]
    total = gains[-1][front.ceiling]
    for gain in gains[:-1]:
        width = jnp.diff(gain, axis=0, prepend=0.0)
        total = (width.reshape(len(width), *(1,) * (total.ndim - 2), -1) * total).sum(0)
    return total


def reference_point(front: np.ndarray, others: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The reference point: the worst objectives of a front, plus a tenth of the front's range.

    It is at least the front's best objectives plus half of a range: that of all trials, or the typical one on earlier
    tasks if that is larger. Otherwise a search that begins with similar trials would stay near them.

    Args:
      front: [n, M].
      others: [N, M] all feasible trials.
      scales: [M] the typical range of outcomes on earlier tasks.

    Returns:
      [M].
    """
    best, worst = front.min(0), front.max(0)
    return np.maximum(worst + 0.1 * (worst - best), best + 0.5 * np.maximum(others.max(0) - best, scales))

"""Slopes of a function of one variable by finite differences, with an estimate of the error of the differences."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Smaller steps avoid a kink next to λ; larger steps raise the differences above rounding errors.
_SMALLER, _LARGER = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), (1e1, 1e2, 1e3)


class Slope(NamedTuple):
    """The slope of φ at 0, from values of φ at a few distances.

    Attributes:
      value: the slope.
      uncertainty: how far `value` may be from the true slope; infinite if a value of φ is not finite.
      rounding: the part of `uncertainty` that comes from rounding in φ.
      step: h, the largest distance.
      left: the slope between −h/4 and 0.
      right: the slope between 0 and h/4.
      kinked: whether the slope jumps between −h/4 and h/4.
    """

    value: float
    uncertainty: float
    rounding: float
    step: float
    left: float
    right: float
    kinked: bool


def at_step(function: Callable[[float], float], center: float, step: float, noise: float) -> Slope:
    """The slope at 0 from the distances h, h/2 and h/4.

    Central differences D(h) = [φ(h) − φ(−h)] / 2h give R(h) = (4 D(h/2) − D(h)) / 3, whose error is O(h⁴). One-sided
    differences give the jump J(h) = [φ(h) + φ(−h) − 2 φ(0)] / h, the slope on the right minus that on the left. If φ is
    smooth, J halves with h; if φ has a kink, J does not. The slope is R(h/2), and its uncertainty is

        max(|R(h/2) − R(h)|, |J(h) − 2 J(h/2)|, |J(h/2) − 2 J(h/4)|) + noise · max|φ| / h.

    Args:
      function: φ.
      center: φ(0).
      step: h, positive.
      noise: the relative rounding error of one value of φ.

    Returns:
      A `Slope`.
    """
    distances = step * np.array([1.0, 0.5, 0.25])
    up, down = (np.array([function(sign * t) for t in distances]) for sign in (1.0, -1.0))
    if not np.isfinite([*up, *down, center]).all():
        return Slope(np.nan, np.inf, 0.0, step, np.nan, np.nan, False)
    central, jumps = (up - down) / (2 * distances), (up + down - 2 * center) / distances
    first, refined = (4 * central[1:] - central[:-1]) / 3
    rounding = noise * max(np.abs([*up, *down, center])) / step
    error = max(abs(refined - first), *np.abs(jumps[:-1] - 2 * jumps[1:]))
    kinked = abs(jumps[2]) > max(0.75 * abs(jumps[0]), 100 * rounding)
    left, right = (center - down[2]) / distances[2], (up[2] - center) / distances[2]
    return Slope(
        float(refined), float(error + rounding), float(rounding), step, float(left), float(right), bool(kinked)
    )


def at_best_step(
    function: Callable[[float], float], center: float, step: float, noise: float, expected: float, rtol: float
) -> tuple[Slope, list[Slope]]:
    """The slope at 0, at the step that gives the best estimate: `step` first, then smaller and larger steps.

    A slope is precise if its uncertainty is below a tenth of `rtol`. The search ends when a precise slope equals
    `expected` to `rtol`, or when two precise slopes at different steps agree. So a wrong `expected` is compared at two
    or more steps.

    Args:
      function: φ.
      center: φ(0).
      step: the first step.
      noise: the relative rounding error of one value of φ.
      expected: the slope that the caller expects.
      rtol: the required relative accuracy.

    Returns:
      The best `Slope`, and the slopes at all steps of the search.
    """
    slopes: list[Slope] = []
    precise: list[Slope] = []
    factors = [1.0]
    while factors:
        slope = at_step(function, center, factors.pop(0) * step, noise)
        if not slopes:
            large_first = slope.rounding > slope.uncertainty / 2
            factors = [*_LARGER, *_SMALLER] if large_first else [*_SMALLER, *_LARGER]
        slopes.append(slope)
        size, gap = max(abs(slope.value), abs(expected)), abs(slope.value - expected)
        if slope.uncertainty <= 0.1 * rtol * size or (expected == 0 and slope.value == 0):
            if gap <= rtol * size + slope.uncertainty:
                return slope, slopes
            if any(_agree(slope, other) for other in precise):
                return min(precise + [slope], key=lambda s: s.step), slopes
            precise.append(slope)
    # If steps disagree, something lies between them, such as a kink. The smallest step is closest to the slope at 0.
    return min(precise, key=lambda s: s.step) if precise else min(slopes, key=lambda s: s.uncertainty), slopes


def change_by_jumps(function: Callable[[float], float], center: float, radius: float, slope: Slope, noise: float):
    """The part of φ(r) − φ(−r) that comes from jumps of φ between −r and r.

    It is φ(r) − φ(−r) − ∫ φ' dt. The integral is a Gauss–Legendre quadrature. φ' comes from differences at a distance
    that is so small that few of them contain a jump.

    Args:
      function: φ.
      center: φ(0).
      radius: r, positive.
      slope: the slope at 0.
      noise: the relative rounding error of one value of φ.

    Returns:
      The part, and the largest of the integral, |φ(r) − φ(0)| and |φ(−r) − φ(0)|. The part is 0 if there is no jump, or
      if φ is not finite somewhere.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    distance = min(slope.step, 1e-7 * radius)
    slopes = [(function(t + distance) - function(t - distance)) / (2 * distance) for t in radius * nodes]
    integral = radius * float(weights @ np.array(slopes))
    up, down = function(radius) - center, function(-radius) - center
    jump_change, size = up - down - integral, max(abs(integral), abs(up), abs(down))
    if not np.isfinite(jump_change) or not _jumps(lambda t: function(t) - slope.value * t, center, radius, noise):
        return 0.0, size
    return jump_change, size


def _jumps(function: Callable[[float], float], center: float, radius: float, noise: float) -> bool:
    """Whether φ jumps between −r and r.

    Bisection keeps the half with the larger change. After 20 halvings, a continuous φ changes by about 2^-20 of the
    first change, and a jump remains as it is.
    """
    for end in (radius, -radius):
        ends, values = [0.0, end], [center, function(end)]
        change = abs(values[1] - values[0])
        for _ in range(20):
            middle = sum(ends) / 2
            value = function(middle)
            replaced = int(abs(value - values[0]) > abs(values[1] - value))  # 1: the half near 0 has the larger change
            ends[replaced], values[replaced] = middle, value
        if abs(values[1] - values[0]) > max(1e-4 * change, 1e3 * noise * abs(center)):
            return True
    return False


def noise(slopes: list[Slope]) -> float:
    """The noise of φ, or 0 if the uncertainty has another cause.

    Noise in φ adds an uncertainty of noise/h at each step h, so the product of uncertainty and step is constant.
    """
    smallest = sorted(slopes, key=lambda s: s.step)[:3]
    products = [s.uncertainty * s.step for s in smallest]
    constant = len(smallest) == 3 and np.isfinite(products).all() and max(products) < 10 * min(products)
    # The differences of jumps in `at_step` multiply the standard deviation of φ by 8 to 17.
    return float(np.median(products)) / 10 if constant else 0.0


def _agree(a: Slope, b: Slope) -> bool:
    return abs(a.value - b.value) <= a.uncertainty + b.uncertainty

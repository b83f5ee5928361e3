"""The factories of leaves: they check the arguments, which users write, and make the leaves."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from metaopt import _checks
from metaopt.spaces._leaves import (
    Choice,
    Fixed,
    Integer,
    Interval,
    Leaf,
    Numbers,
    Positive,
    Real,
    Simplex,
    is_integer,
)

_FLOAT32_EPS = float(np.finfo(np.float32).eps)


def real(default: Any = 0.0, scale: float = 1.0, *, shape: Sequence[int] = ()) -> Real:
    """Makes a leaf for any real number: λ = default + scale·z, with z ~ N(0, 1).

    Args:
      default: λ at z = 0; a number, or an array of `shape`.
      scale: λ per unit of z, positive: a typical difference between two plausible values.
      shape: the shape of λ.

    Returns:
      A leaf with normal samples, encoded as their cumulative distribution Φ(z).

    Raises:
      ValueError: if an argument is not finite, `scale` is not positive, or `default` does not fit `shape`.
    """
    shape = _shape(shape)
    return Real(default=_numbers("default", default, shape), scale=_scale(scale), shape=shape)


def positive(default: Any = 1.0, scale: float = 1.0, *, shape: Sequence[int] = ()) -> Positive:
    """Makes a leaf for a positive number in log coordinates: λ = default·exp(scale·z), with z ~ N(0, 1).

    λ is clipped to the floating-point type's smallest and largest normal number, each to the power 0.9 (7e-35 and 5e34
    in float32). The gradient is zero beyond these limits. So neither λ nor a derivative overflows.

    Args:
      default: λ at z = 0, between 1e-30 and 1e30; a number, or an array of `shape`.
      scale: natural-log units of λ per unit of z, positive.
      shape: the shape of λ.

    Returns:
      A leaf with log-normal samples, encoded as their cumulative distribution Φ(z).

    Raises:
      ValueError: if `default` is out of range or does not fit `shape`, or `scale` is not positive and finite.
    """
    shape = _shape(shape)
    values = _numbers("default", default, shape)
    if np.min(values) < 1e-30 or np.max(values) > 1e30:
        raise ValueError(f"`default` must be positive, between 1e-30 and 1e30; got {default}.")
    return Positive(default=values, scale=_scale(scale), shape=shape)


def interval(low: float, high: float, *, log: bool = False, default: Any = None, shape: Sequence[int] = ()) -> Interval:
    """Makes a leaf for a number between two bounds: λ = low + (high − low)·σ(z), or the same for log λ.

    z = 0 is the middle. In floating point, λ reaches the bounds (beyond |z| = 17 in float32), where the gradient in z
    is zero. `to_unconstrained` therefore moves a value at a bound inside, by 0.001 of the (log) range, where |z| = 6.9.

    Args:
      low: lower bound; positive if `log` is true.
      high: upper bound, above `low`.
      log: whether the sigmoid, the samples and the encoding act on log λ.
      default: a number or an array of `shape`, inside the bounds. By default the middle, or with `log` the geometric
        middle.
      shape: the shape of λ.

    Returns:
      A leaf whose samples are uniform in λ, or in log λ.

    Raises:
      ValueError: if the bounds are not finite and ordered, or `low` is not positive with `log`.
      ValueError: if `default` lies at a bound or outside, or does not fit `shape`.
    """
    shape, low, high = _shape(shape), _number("low", low), _number("high", high)
    _check_bounds(low, high, log)
    if default is None:
        default = math.exp((math.log(low) + math.log(high)) / 2) if log else low + (high - low) / 2
    values = _numbers("default", default, shape)
    inside = np.maximum(values, low)
    with np.errstate(all="ignore"):  # near the limits of float64, the fraction is infinite or NaN
        fraction = np.log(inside / low) / math.log(high / low) if log else (inside - low) / (high - low)
    if not (np.min(fraction) >= _FLOAT32_EPS and np.max(fraction) <= 1 - _FLOAT32_EPS):
        raise ValueError(
            f"`default` must lie inside ({low}, {high}), by at least {_FLOAT32_EPS:.1g} of the range, since z is "
            f"infinite at a bound; got {default}."
        )
    return Interval(low=low, high=high, log=bool(log), default=values, shape=shape)


def integer(low: int, high: int, *, log: bool = False, default: Any = None, shape: Sequence[int] = ()) -> Integer:
    """Makes a leaf for an integer from `low` to `high`, both included.

    The integer is relaxed to a real number in [low − ½, high + ½], as by `interval`. Differentiable code gets the
    relaxed, floating-point value. Code that needs a count calls `discretize`, which rounds, clips and returns int32.
    Every integer n covers [n − ½, n + ½] of the relaxed range, also if `log` is true.

    Args:
      low: smallest value; at least 1 if `log` is true.
      high: largest value, above `low`.
      log: whether the sigmoid, the samples and the encoding act on log λ.
      default: an integer or an array of integers of `shape`, from `low` to `high`. By default the (geometric) middle of
        the relaxed range, rounded.
      shape: the shape of λ.

    Returns:
      A leaf whose samples are uniform in the relaxed λ, or in its logarithm.

    Raises:
      ValueError: if the bounds are not ordered integers within ±2²⁴ (beyond which float32 skips integers), or `low` is
        below 1 with `log`.
      ValueError: if `default` is not an integer between the bounds, or does not fit `shape`.
    """
    shape = _shape(shape)
    for name, bound in (("low", low), ("high", high)):
        if _number(name, bound) % 1 or abs(bound) > 2**24:
            raise ValueError(f"`{name}` must be an integer within ±2**24, which float32 holds exactly; got {bound}.")
    low, high = int(low), int(high)
    _check_bounds(low, high, log)
    if default is None:
        middle = math.sqrt((low - 0.5) * (high + 0.5)) if log else (low + high) / 2
        default = min(max(round(middle), low), high)
    values = _numbers("default", default, shape)
    if np.any(np.asarray(values) % 1) or np.min(values) < low or np.max(values) > high:
        raise ValueError(f"`default` must be an integer from {low} to {high}; got {default}.")
    return Integer(low=low, high=high, log=bool(log), default=values, shape=shape)


def simplex(num: int, *, default: Any = None, shape: Sequence[int] = ()) -> Simplex:
    """Makes a leaf for `num` nonnegative weights that sum to one over the last axis: λ = softmax(z).

    z has one coordinate more than λ has degrees of freedom. `to_unconstrained` returns the centered logarithms, which
    sum to zero. A weight of zero has no logarithm and counts as 0.001 of a uniform weight, so a one-hot λ has finite z.

    Args:
      num: number of weights, at least 2.
      default: positive weights that sum to one, of shape [num] or [*shape, num]; uniform by default.
      shape: leading axes of λ: how many independent simplexes.

    Returns:
      A leaf of values [*shape, num]. Its samples are Dirichlet(1), uniform on the simplex. Its encoding is its `num`
      weights; each of them is Beta(1, num − 1), not uniform. `discretize` returns the one-hot of the largest weight.
      `at_bounds`, [*shape], is true if one weight has all the mass.

    Raises:
      ValueError: if `num < 2`, or `default` does not fit, is not positive or does not sum to one.
    """
    shape = _shape(shape)
    _checks.check_integer("num", num, 2)
    num = int(num)
    weights = _finite("default", np.full(num, 1 / num) if default is None else default, (num,), (*shape, num))
    if np.min(weights) < _FLOAT32_EPS or np.max(np.abs(np.sum(weights, axis=-1) - 1)) > 1e-5:
        raise ValueError(
            f"`default` must be positive, by at least {_FLOAT32_EPS:.1g}, and must sum to one on the last axis; got "
            f"{default}."
        )
    return Simplex(num=num, default=_tuples(weights.tolist()), shape=shape)


def choice(labels: Sequence[Any], *, default: Any = None, shape: Sequence[int] = ()) -> Choice:
    """Makes a leaf for one of several labels, relaxed to weights as by `simplex`: λ = softmax(z), one weight per label.

    Differentiable code reads λ, the weights of a mixture. Code that needs the label itself gets it from
    `configuration`. `discretize` returns the one-hot of the largest weight.

    Args:
      labels: at least two different strings, numbers, booleans or None. A single label must be a string or None; for a
        single value of another type, use `fixed`.
      default: one of the labels. By default the first label; if None is a label, then None. In the default λ, it has
        twice the weight of each other label.
      shape: how many independent choices among the same labels.

    Returns:
      A leaf of values [*shape, number of labels]. Its samples are Dirichlet(1): every label is equally probable.

      In a configuration, a value equals a label only if both have the same type. The reason is that 1, 1.0 and True may
      have different meanings (scikit-learn's `max_features`). If all labels are numbers or None, however, 1 and 1.0 are
      equal, as in a data frame's column with gaps. Such a column turns None into NaN. NaN therefore stands for None if
      None is a label.

    Raises:
      ValueError: if `labels` is empty or a single number, or a label has another type.
      ValueError: if two labels are equal (1, 1.0 and True are equal), or `default` is not a label.

    >>> import jax
    >>> from metaopt import spaces
    >>> space = {"criterion": spaces.choice(["gini", "entropy"], default="entropy")}
    >>> spaces.configuration(space, spaces.default(space))
    {'criterion': 'entropy'}
    """
    plain = isinstance(labels, Sequence) and not isinstance(labels, str)
    if not plain or not all(x is None or (isinstance(x, (str, int, float)) and x == x) for x in labels):
        raise ValueError(f"`labels` must be a list of strings, numbers, booleans or None; got {labels!r}.")
    labels = tuple(labels)
    one_text = len(labels) == 1 and not isinstance(labels[0], (int, float))
    if len(set(labels)) < len(labels) or (len(labels) < 2 and not one_text):
        raise ValueError(
            f"`labels` must have at least two entries, all different; got {labels}. For one value, use `fixed`."
        )
    if default is None and None not in labels:
        default = next(iter(labels))
    if default not in labels:
        raise ValueError(f"`default` must be one of {labels}; got {default!r}.")
    return Choice(labels=labels, default=labels[labels.index(default)], shape=_shape(shape))


def active_if(leaf: Leaf, name: str, values: Sequence[Any]) -> Leaf:
    """Makes a leaf that matters only for some values of another quantity, such as an SVM's γ for the kernel RBF.

    The leaf stays in λ, in its coordinates and in the encoding, so that shapes do not depend on values. `configuration`
    omits it while it is not active, and `active` returns whether it is. If applied twice, both conditions must hold. A
    quantity that depends on an inactive one is inactive.

    Args:
      leaf: a leaf.
      name: the other quantity, by its path as in `names` (`"svm.kernel"`). It is a `choice` or an `integer` without
        shape.
      values: some of its labels or integers.

    Returns:
      A leaf.

    Raises:
      ValueError: if `values` is not a list or is empty. Functions that use conditions raise later if there is no such
        quantity or value.

    >>> from metaopt import spaces
    >>> space = {
    ...     "kernel": spaces.choice(["linear", "rbf"]),
    ...     "gamma": spaces.active_if(
    ...         spaces.interval(1e-3, 1e3, log=True), "kernel", ["rbf"]
    ...     ),
    ... }
    >>> spaces.configuration(space, spaces.default(space))
    {'kernel': 'linear'}
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"`values` must be a list of at least one value; got {values!r}.")
    return dataclasses.replace(leaf, condition=(*leaf.condition, (name, tuple(values))))


def fixed(value: Any) -> Fixed:
    """Makes a quantity that is not tuned: λ is `value`, and its unconstrained coordinate is None, an empty subtree.

    An optimizer, a perturbation or a gradient in unconstrained coordinates has no entry for it. One space can therefore
    tune some quantities and hold the others. Replacing a leaf by `fixed` does not change the samples of other leaves.

    Args:
      value: a number or an array of floating-point numbers, integers or booleans. Its type is kept; a Python number
        has JAX's default type.

    Returns:
      A leaf without dimensions.

    Raises:
      ValueError: if `value` is not an array of numbers, or is traced.
    """
    array = _array("value", value)
    array.flags.writeable = False
    return Fixed(value=array, shape=array.shape)


def _check_bounds(low: float, high: float, log: bool) -> None:
    if not low < high or (log and low <= 0):
        raise ValueError(
            f"`high` must be above `low`, and `low` positive if `log` is true; got low={low}, high={high}, log={log}. "
            "For one value, use `fixed`."
        )


def _array(name: str, value: Any) -> np.ndarray:
    """Returns a copy of `value`, which must be an array of real numbers or booleans."""
    try:
        array = np.array(value)
    except (TypeError, ValueError):  # a tracer, a ragged list
        array = np.array(None)
    real_number = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not (real_number or array.dtype == bool):
        raise ValueError(
            f"`{name}` must be a concrete number or array of real numbers, not a traced value; got {value!r}."
        )
    return array


def _finite(name: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """Returns finite numbers of one of the shapes, in float64."""
    array = _array(name, value).astype(np.float64)
    if array.shape not in shapes or not np.all(np.isfinite(array)):
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"`{name}` must be finite, of shape {expected}; got {value}.")
    return array


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> Numbers:
    return _tuples(_finite(name, value, (), shape).tolist())


def _number(name: str, value: Any) -> float:
    return float(_finite(name, value, ()))


def _scale(value: Any) -> float:
    scale = _number("scale", value)
    _checks.check_positive("scale", scale)
    return scale


def _shape(value) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(is_integer(size) and size >= 1 for size in value):
        raise ValueError(f"`shape` must be a tuple of integers of at least 1; got {value!r}.")
    return tuple(int(size) for size in value)


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

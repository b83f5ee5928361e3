"""The kinds of leaves: a bijection, a distribution and a coordinate in [0, 1] for one tuned quantity.

The classes hold plain Python numbers. A leaf is therefore hashable, compares by value and is written to JSON as it is.
The factories below the classes check the arguments and make the leaves.
"""

import abc
import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One number for all entries, or one number per entry as nested tuples.
Numbers = float | tuple

_FLOAT32_EPS = float(np.finfo(np.float32).eps)
_MARGIN = 1e-3  # fraction of the range by which a value at a bound moves inside, where its coordinate is finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf(abc.ABC):
    """One quantity of a space; made by `real`, `positive`, `interval`, `integer`, `simplex`, `choice` or `fixed`.

    It is not a pytree node: `jax.tree.map` over a space sees whole leaves. The methods take arrays of `value_shape`.

    Attributes:
      shape: the shape of the quantity; the values of a simplex have one more axis.
      condition: pairs (name, values) of other quantities. The leaf matters only if all of them hold (`active_if`).
    """

    shape: tuple[int, ...] = ()
    condition: tuple[tuple[str, tuple], ...] = ()

    @property
    def kind(self) -> str:
        """The name of the factory, as `to_json` writes it."""
        return type(self).__name__.lower()

    @property
    def tuned(self) -> bool:
        """Whether the leaf has unconstrained coordinates."""
        return True

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of λ, and of z."""
        return self.shape

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the leaf's plain values in a configuration: one value for each index."""
        return self.value_shape

    def to_plain(self, value: np.ndarray) -> Any:
        """The plain Python value of one entry of λ; for float32's 0.1 it is 0.1, not 0.10000000149011612."""
        return float(np.format_float_scientific(value)) if isinstance(value, np.floating) else value.item()

    def from_plain(self, value: Any, strict: bool) -> Any:
        """One entry of λ from its plain value. Raises ValueError if the value is invalid."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError("a finite number")
        return value

    @abc.abstractmethod
    def default_value(self) -> jax.Array:
        """λ at the start of a search."""

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> jax.Array:
        """One random λ."""

    @abc.abstractmethod
    def to_constrained(self, z: jax.Array) -> jax.Array:
        """λ from unconstrained coordinates."""

    @abc.abstractmethod
    def to_unconstrained(self, value: jax.Array) -> jax.Array:
        """Unconstrained coordinates from λ; finite for every finite λ, even if `contains` is false."""

    @property
    def range(self) -> str:
        """The range of λ as text, for error messages."""
        return "finite"

    def contains(self, value: jax.Array) -> jax.Array:
        """[*value_shape] bool, whether λ is in the range of the leaf, up to a few rounding errors."""
        return jnp.isfinite(value)

    @abc.abstractmethod
    def encode(self, value: jax.Array) -> jax.Array:
        """λ in [0, 1], in the coordinate in which `sample` is uniform."""

    def discretize(self, value: jax.Array) -> jax.Array:
        """The value for code without a gradient."""
        return value

    def at_bounds(self, value: jax.Array, tol: float) -> jax.Array:
        """[*shape] bool, whether the distance of λ from a bound is at most `tol` of the range."""
        return jnp.zeros(self.shape, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gaussian(Leaf):
    """Unbounded leaves, whose z is standard normal."""

    default: Numbers
    scale: float

    def default_value(self):
        return jnp.broadcast_to(jnp.asarray(self.default, _default_float()), self.shape)

    def sample(self, key):
        return self.to_constrained(jax.random.normal(key, self.shape, _default_float()))

    def encode(self, value):
        return jax.scipy.special.ndtr(self.to_unconstrained(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real(_Gaussian):
    """Any real number; made by `real`."""

    def to_constrained(self, z):
        return jnp.asarray(self.default, z.dtype) + self.scale * z

    def to_unconstrained(self, value):
        return (value - jnp.asarray(self.default, value.dtype)) / self.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positive(_Gaussian):
    """A positive number in log coordinates; made by `positive`."""

    def to_constrained(self, z):
        low, high = _log_limits(z.dtype)
        log_default = np.log(self.default)
        exponent = jnp.clip(
            self.scale * z, jnp.asarray(low - log_default, z.dtype), jnp.asarray(high - log_default, z.dtype)
        )
        return jnp.asarray(self.default, z.dtype) * jnp.exp(exponent)

    def to_unconstrained(self, value):
        low, high = _log_limits(value.dtype)
        log_value = jnp.log(jnp.clip(value, math.exp(low), math.exp(high)))
        return (log_value - jnp.asarray(np.log(self.default), value.dtype)) / self.scale

    @property
    def range(self):
        return "positive (float32 has 7e-35 to 5e34)"

    def contains(self, value):
        # At its limits λ is the exponential of a large number, which has few correct digits.
        low, high = (
            limit + margin for limit, margin in zip(_log_limits(value.dtype), (-_MARGIN, _MARGIN), strict=True)
        )
        return (value >= math.exp(low)) & (value <= math.exp(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bounded(Leaf):
    """Leaves between two edges, linear or logarithmic, through a sigmoid."""

    low: float
    high: float
    log: bool
    default: Numbers

    @property
    def edges(self) -> tuple[float, float]:
        """The lower and the upper edge of the range of λ."""
        return self.low, self.high

    def default_value(self):
        return jnp.broadcast_to(jnp.asarray(self.default, _default_float()), self.shape)

    def to_plain(self, value):
        return min(max(super().to_plain(value), self.low), self.high)  # float32's nearest to a bound may be beyond it

    def from_plain(self, value, strict):
        value = super().from_plain(value, strict)
        rounding = 0.0 if _is_integer(value) else 1e-6  # the rounding of float32
        if not strict:
            return value
        inside = min(max(value, self.low), self.high)
        if not math.isclose(value, inside, rel_tol=rounding):
            raise ValueError(f"between {self.low} and {self.high}")
        return inside

    def sample(self, key):
        above = jax.random.uniform(key, self.shape, _default_float())
        return self._between(above, 1.0 - above)

    def to_constrained(self, z):
        return self._between(jax.nn.sigmoid(z), jax.nn.sigmoid(-z))

    def to_unconstrained(self, value):
        eps = float(jnp.finfo(value.dtype).eps)
        fraction = _fraction(value, *self.edges, self.log)
        fraction = jnp.where(fraction < eps, _MARGIN, jnp.where(fraction > 1.0 - eps, 1.0 - _MARGIN, fraction))
        return jax.scipy.special.logit(fraction)

    @property
    def range(self):
        low, high = self.edges
        return f"between {low} and {high}"

    def contains(self, value):
        low, high = self.edges
        scales = (low, high) if self.log else (max(abs(low), abs(high)),) * 2  # λ is a weighted sum of both edges
        rounding = 4 * float(jnp.finfo(value.dtype).eps)
        return (value >= low - rounding * scales[0]) & (value <= high + rounding * scales[1])

    def encode(self, value):
        return _fraction(value, *self.edges, self.log)

    def at_bounds(self, value, tol):
        # The fraction of [low, high], not of the edges: a rounded integer at its bound is half a unit inside its edge.
        fraction = _fraction(value, self.low, self.high, self.log)
        return (fraction <= tol) | (fraction >= 1.0 - tol)

    def _between(self, above, below):
        """λ at the fraction `above` of the way from the lower to the upper edge.

        `below` is 1 − `above`, computed without cancellation.
        """
        low, high = self.edges
        if self.log:
            value = jnp.exp(above * math.log(high) + below * math.log(low))
        else:
            value = above * high + below * low
        return jnp.clip(value, low, high)  # rounding may leave the range by an ulp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval(_Bounded):
    """A number between two bounds; made by `interval` or `unit_interval`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer(_Bounded):
    """An integer between two bounds, relaxed to a real; made by `integer`."""

    low: int
    high: int

    @property
    def edges(self):
        return self.low - 0.5, self.high + 0.5

    def discretize(self, value):
        return jnp.clip(jnp.round(value), self.low, self.high).astype(jnp.int32)

    def to_plain(self, value):
        return int(np.clip(np.round(value), self.low, self.high))

    def from_plain(self, value, strict):
        value = super().from_plain(value, False)
        if not strict:
            return value
        whole = round(value)
        if abs(value - whole) > min(1e-6 * max(abs(value), 1.0), 0.1):  # float32 rounding; 0.1 excludes halves
            raise ValueError("an integer (round it, or tune an `interval`)")
        return super().from_plain(whole, True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights(Leaf):
    """Leaves of nonnegative weights that sum to one over the last axis, through a softmax."""

    @property
    @abc.abstractmethod
    def num_weights(self) -> int:
        """The length of the last axis."""

    @property
    def value_shape(self):
        return (*self.shape, self.num_weights)

    def sample(self, key):
        # Normalized independent exponentials have the distribution Dirichlet(1).
        weights = jax.random.exponential(key, self.value_shape, _default_float())
        weights += float(jnp.finfo(weights.dtype).tiny)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)

    def to_constrained(self, z):
        return jax.nn.softmax(z, axis=-1)

    def to_unconstrained(self, value):
        smallest = float(jnp.finfo(value.dtype).eps) / self.num_weights
        logits = jnp.log(jnp.where(value < smallest, _MARGIN / self.num_weights, value))
        return logits - jnp.mean(logits, axis=-1, keepdims=True)

    @property
    def range(self):
        return f"{self.num_weights} nonnegative weights that sum to one"

    def contains(self, value):
        rounding = max(1e-5, self.num_weights * float(jnp.finfo(value.dtype).eps))
        sums_to_one = jnp.abs(jnp.sum(value, axis=-1, keepdims=True) - 1.0) <= rounding
        return jnp.broadcast_to(sums_to_one & jnp.all(value >= -rounding, axis=-1, keepdims=True), value.shape)

    def encode(self, value):
        return jnp.clip(value, 0.0, 1.0)

    def discretize(self, value):
        return jax.nn.one_hot(jnp.argmax(value, axis=-1), self.num_weights, dtype=value.dtype)

    def at_bounds(self, value, tol):
        return (jnp.max(value, axis=-1) >= 1.0 - tol) & (self.num_weights > 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simplex(_Weights):
    """Nonnegative weights that sum to one; made by `simplex`."""

    num: int
    default: tuple

    @property
    def num_weights(self):
        return self.num

    def default_value(self):
        return jnp.asarray(np.broadcast_to(self.default, self.value_shape), _default_float())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(_Weights):
    """One of several labels, relaxed to one weight per label; made by `choice`."""

    labels: tuple
    default: Any

    @property
    def num_weights(self):
        return len(self.labels)

    @property
    def plain_shape(self):
        return self.shape

    def default_value(self):
        # The default has twice the weight of each other label: `discretize` returns it, and z is finite.
        weights = np.ones(len(self.labels))
        weights[self.labels.index(self.default)] = 2
        return jnp.asarray(np.broadcast_to(weights / weights.sum(), self.value_shape), _default_float())

    def to_plain(self, value):
        return self.labels[int(np.argmax(value))]

    def from_plain(self, value, strict):
        # For scikit-learn, `max_features=1` is one feature, and 1.0 is all of them. If some labels are texts, types
        # must therefore agree. If not, they need not: next to None a data frame has no integers.
        by_value = {type(label) for label in self.labels} <= {int, float, type(None)}
        alike = by_value and isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
        kind = str if isinstance(value, str) else type(value.item() if isinstance(value, np.generic) else value)
        for same in (operator.eq, _is_near):
            for place, label in enumerate(self.labels):
                if (alike or kind is type(label)) and same(value, label):
                    return np.eye(len(self.labels))[place]
        if strict:
            raise ValueError(f"one of {self.labels}")
        return np.full(len(self.labels), 1 / len(self.labels))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fixed(Leaf):
    """A value that is not tuned; made by `fixed`.

    Attributes:
      value: a read-only array. Fixed leaves are compared by its content and type.
    """

    value: np.ndarray

    def __eq__(self, other):
        return isinstance(other, Fixed) and self._content == other._content

    def __hash__(self):
        return hash(self._content)

    @property
    def _content(self):
        return self.shape, self.value.dtype.name, self.value.tobytes(), self.condition

    @property
    def tuned(self):
        return False

    def default_value(self):
        return jnp.asarray(self.value)

    def sample(self, key):
        return self.default_value()

    def to_constrained(self, z):
        return self.default_value()

    def to_unconstrained(self, value):
        raise TypeError("A fixed leaf has no unconstrained coordinates.")

    @property
    def range(self):
        return f"the value that the space fixes, {self.value.tolist()}"

    def contains(self, value):
        floating = [x.dtype for x in (value, self.value) if jnp.issubdtype(x.dtype, jnp.floating)]
        rounding = 4 * max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)
        return jnp.isclose(jnp.asarray(value), jnp.asarray(self.value), rtol=rounding, atol=0.0, equal_nan=True)

    def encode(self, value):
        raise TypeError("A fixed leaf has no dimension of the encoding.")

    def discretize(self, value):
        return self.default_value()


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
    in float32). The gradient is zero beyond these limits. Thus neither λ nor a derivative overflows.

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
    numbers_ = _numbers("default", default, shape)
    if np.min(numbers_) < 1e-30 or np.max(numbers_) > 1e30:
        raise ValueError(f"`default` must be positive, between 1e-30 and 1e30; got {default}.")
    return Positive(default=numbers_, scale=_scale(scale), shape=shape)


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
    if not low < high:
        raise ValueError(f"`high` must be above `low`; got low={low}, high={high}. For one value, use `fixed`.")
    if log and low <= 0:
        raise ValueError(f"`low` must be positive where `log` is true; got {low}.")
    if default is None:
        default = math.exp((math.log(low) + math.log(high)) / 2) if log else low + (high - low) / 2
    numbers_ = _numbers("default", default, shape)
    inside = np.maximum(numbers_, low)
    with np.errstate(all="ignore"):  # near the limits of float64, the fraction is infinite or NaN
        fraction = np.log(inside / low) / math.log(high / low) if log else (inside - low) / (high - low)
    if not (np.min(fraction) >= _FLOAT32_EPS and np.max(fraction) <= 1 - _FLOAT32_EPS):
        raise ValueError(
            f"`default` must lie inside ({low}, {high}), by at least {_FLOAT32_EPS:.1g} of the range, since z is "
            f"infinite at a bound; got {default}."
        )
    return Interval(low=low, high=high, log=bool(log), default=numbers_, shape=shape)


def unit_interval(default: Any = 0.5, *, shape: Sequence[int] = ()) -> Interval:
    """Makes a leaf for a number between 0 and 1, such as a dropout rate or a momentum: `interval(0, 1)`.

    Args:
      default: a number or an array of `shape`, strictly between 0 and 1.
      shape: the shape of λ.

    Returns:
      A leaf λ = σ(z) whose samples are uniform.

    Raises:
      ValueError: if `default` lies at a bound or outside, or does not fit `shape`.
    """
    return interval(0.0, 1.0, default=default, shape=shape)


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
    if not low < high:
        raise ValueError(f"`high` must be above `low`; got low={low}, high={high}. For one value, use `fixed`.")
    if log and low < 1:
        raise ValueError(f"`low` must be at least 1 where `log` is true; got {low}.")
    if default is None:
        middle = math.sqrt((low - 0.5) * (high + 0.5)) if log else (low + high) / 2
        default = min(max(round(middle), low), high)
    numbers_ = _numbers("default", default, shape)
    if np.any(np.asarray(numbers_) % 1) or np.min(numbers_) < low or np.max(numbers_) > high:
        raise ValueError(f"`default` must be an integer from {low} to {high}; got {default}.")
    return Integer(low=low, high=high, log=bool(log), default=numbers_, shape=shape)


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
    if not _is_integer(num) or num < 2:
        raise ValueError(f"`num` must be an integer of at least 2; got {num}.")
    num = int(num)
    weights = _array("default", np.full(num, 1 / num) if default is None else default).astype(np.float64)
    if weights.shape not in ((num,), (*shape, num)):
        raise ValueError(
            f"`default` must have shape {(num,)} or {(*shape, num)}, for `num` and `shape`; got shape {weights.shape}."
        )
    if not np.min(weights) >= _FLOAT32_EPS:
        raise ValueError(f"`default` must be positive, by at least {_FLOAT32_EPS:.1g}; got {default}.")
    if np.max(np.abs(np.sum(weights, axis=-1) - 1)) > 1e-5:
        raise ValueError(f"`default` must sum to one on the last axis; got {default}.")
    return Simplex(num=num, default=_tuples(weights.tolist()), shape=shape)


def choice(labels: Sequence[Any], *, default: Any = None, shape: Sequence[int] = ()) -> Choice:
    """Makes a leaf for one of several labels, relaxed to weights as by `simplex`: λ = softmax(z), one weight per label.

    Differentiable code gets the weights (of a mixture). Code that needs the label itself gets it from `configuration`.
    `discretize` returns the one-hot of the largest weight.

    Args:
      labels: at least two different strings, numbers, booleans or None. A single label must be a string or None; for a
        single value of another type, use `fixed`.
      default: one of the labels; by default the first, or None if it is a label. It has twice the weight of each other
        label.
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
        raise ValueError(f"`labels` must be at least two that differ; got {labels}. For one value, use `fixed`.")
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
    ...     "gamma": spaces.active_if(spaces.interval(1e-3, 1e3, log=True), "kernel", ["rbf"]),
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


def _default_float():
    """float32, or float64 under `jax_enable_x64`."""
    return jnp.result_type(float)


def _log_limits(dtype) -> tuple[float, float]:
    """The natural logarithms of the limits of a positive leaf, within which neither 1/λ nor λ·scale overflows."""
    info = jnp.finfo(dtype)
    return 0.9 * math.log(float(info.tiny)), 0.9 * math.log(float(info.max))


def _fraction(value, low: float, high: float, log: bool):
    """The position of `value` between `low` and `high`, in [0, 1]."""
    value = jnp.clip(value, low, high)
    if log:
        fraction = (jnp.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    else:
        fraction = (value - low) / (high - low)
    return jnp.clip(fraction, 0.0, 1.0)  # the bounds themselves are rounded to the type of `value`


def _is_near(value, label) -> bool:
    """Whether `value` equals a float label up to the rounding of float32."""
    return isinstance(label, float) and math.isclose(value, label, rel_tol=1e-6)


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _array(name: str, value) -> np.ndarray:
    """Returns a copy of `value`, which must be an array of real numbers or booleans."""
    try:
        array = np.array(value)
    except (TypeError, ValueError):  # a tracer, a ragged list
        array = np.array(None)
    real_number = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not (real_number or array.dtype == bool):
        raise ValueError(f"`{name}` must be a number or an array of real numbers, known before tracing; got {value!r}.")
    return array


def _numbers(name: str, value, shape: tuple[int, ...]) -> Numbers:
    array = _array(name, value).astype(np.float64)
    if array.shape not in ((), shape):
        raise ValueError(f"`{name}` must be a number or have `shape` {shape}; got shape {array.shape}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must be finite; got {value}.")
    return _tuples(array.tolist())


def _number(name: str, value) -> float:
    array = _array(name, value).astype(np.float64)
    if array.shape != () or not np.isfinite(array):
        raise ValueError(f"`{name}` must be a finite number; got {value}.")
    return float(array)


def _scale(value) -> float:
    scale = _number("scale", value)
    if scale <= 0:
        raise ValueError(f"`scale` must be positive; got {value}.")
    return scale


def _shape(value) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(_is_integer(size) and size >= 1 for size in value):
        raise ValueError(f"`shape` must be a tuple of integers of at least 1; got {value!r}.")
    return tuple(int(size) for size in value)


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

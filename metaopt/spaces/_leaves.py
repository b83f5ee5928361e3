"""The kinds of leaves: a bijection, a distribution and a coordinate in [0, 1] for one tuned quantity.

The classes hold plain Python numbers. A leaf is therefore hashable, compares by value and is written to JSON as it is.
The factories in `_factories.py` check the arguments and make the leaves.
"""

import abc
import dataclasses
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One number for all entries, or one number per entry as nested tuples.
Numbers = float | tuple

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
    condition: tuple[tuple[str, tuple[Any, ...]], ...] = ()

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
        """One entry of λ from its plain value. Raises ValueError if the value is invalid; see `from_configuration`."""
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
        return min(max(super().to_plain(value), self.low), self.high)  # a bound rounded to float32 may be outside

    def from_plain(self, value, strict):
        value = super().from_plain(value, strict)
        rounding = 0.0 if is_integer(value) else 1e-6  # the rounding of float32
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
    """A number between two bounds; made by `interval`."""


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
        # For scikit-learn, `max_features=1` is one feature, and 1.0 is all of them. So the types of value and label
        # must agree. If all labels are numbers or None, 1 and 1.0 are equal, since a data frame turns integers next to
        # None into floats.
        by_value = {type(label) for label in self.labels} <= {int, float, type(None)}
        compare_as_numbers = by_value and isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
        kind = str if isinstance(value, str) else type(value.item() if isinstance(value, np.generic) else value)
        for equal_fn in (operator.eq, _is_near):
            for label_index, label in enumerate(self.labels):
                if (compare_as_numbers or kind is type(label)) and equal_fn(value, label):
                    return np.eye(len(self.labels))[label_index]
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
        return jnp.zeros((0,))

    @property
    def range(self):
        return f"the value that the space fixes, {self.value.tolist()}"

    def contains(self, value):
        floating = [x.dtype for x in (value, self.value) if jnp.issubdtype(x.dtype, jnp.floating)]
        rounding = 4 * max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)
        return jnp.isclose(jnp.asarray(value), jnp.asarray(self.value), rtol=rounding, atol=0.0, equal_nan=True)

    def encode(self, value):
        return jnp.zeros((0,))

    def discretize(self, value):
        return self.default_value()


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


def is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)

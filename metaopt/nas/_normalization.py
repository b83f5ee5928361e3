"""The statistics by which `nas.normalized` normalizes in a traced network.

    y = (x − mean) / √(variance + ε)

The mean and variance of each channel are over one of these sets of rows:

- all rows and positions of the batch: in search and training, if no mask is given;
- the real rows of the batch: if some rows are padding (`over_real_rows`);
- training rows, computed once (`statistics_of`, `at_statistics`). The output of a row then does not depend on the other
  rows, so a network predicts the same for one row as for a thousand.

The calls of `nas.normalized` are found by their name in the traced function, so ops need no arguments for this.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import _jaxpr, base
from metaopt.nas._ops import NORMALIZATION


class Statistics(NamedTuple):
    """Moments that one normalization uses. Inside a scan over layers or edges, the steps of the scan are leading axes.

    Attributes:
      mean: [..., C].
      variance: [..., C], not negative. NaN in a branch that did not run.
    """

    mean: jax.Array
    variance: jax.Array


def over_real_rows(fn: Callable[[jax.Array], base.PyTree], x: jax.Array, mask: jax.Array | None) -> base.PyTree:
    """`fn(x)`, where every `normalized` takes its mean and variance over the real rows, and gives 0 in other rows.

    Calls are found by their name in the traced function, also inside loops and branches. If an op computes over the
    batch in another way, padding affects it.

    Args:
      fn: a function of arrays whose first axis is rows.
      x: [N, ...].
      mask: [N], 1 for a real row, 0 for padding; it may be traced. If None, all rows are real: `fn(x)`.

    Returns:
      The result of `fn`.

    Raises:
      ValueError: if `mask` is not [N], or if an array with another first axis is normalized.
      ValueError: if a normalization is inside a function with a custom derivative.
    """
    if mask is None:
        return fn(x)
    real = _real_rows(x, mask)
    closed, structure = _traced(fn, x)

    def masked(x, epsilon):
        return _normalize(x, epsilon, real, None)[0]

    replace = lambda equation: masked if _normalizes(equation) else None
    return jax.tree.unflatten(structure, _jaxpr.evaluate(closed.jaxpr, closed.consts, [x], replace))


def statistics_of(
    fn: Callable[[jax.Array], base.PyTree], x: jax.Array, mask: jax.Array | None = None
) -> list[Statistics]:
    """The statistics of every `normalized` in `fn`, when each takes its moments over the real rows of x.

    Args:
      fn: a function of arrays whose first axis is rows.
      x: [N, ...], all rows as one batch.
      mask: [N], as for `over_real_rows`.

    Returns:
      The statistics in the order in which `fn` normalizes.

    Raises:
      ValueError: if a normalization is inside a `while` loop, or as for `over_real_rows`.
    """
    real = _real_rows(x, jnp.ones(len(x)) if mask is None else mask)

    def collect(_, x, epsilon):
        return _normalize(x, epsilon, real, None)

    closed, _ = _traced(fn, x)
    replace = lambda equation: collect if _normalizes(equation) else None
    return _jaxpr.exchange(closed.jaxpr, closed.consts, [x], replace)[1]


def at_statistics(
    fn: Callable[[jax.Array], base.PyTree], x: jax.Array, statistics: Sequence[Statistics]
) -> base.PyTree:
    """`fn(x)`, where every `normalized` uses the statistics that `statistics_of` returned, so rows are independent.

    Args:
      fn: a function of arrays whose first axis is rows.
      x: [N, ...], any number of rows.
      statistics: statistics of the same function.

    Returns:
      The result of `fn`.

    Raises:
      ValueError: if `fn` has another number of normalizations than `statistics`, or as for `statistics_of`.
    """
    closed, structure = _traced(fn, x)
    num = sum(map(_normalizes, _jaxpr.equations(closed.jaxpr)))
    if num != len(statistics):
        raise ValueError(
            f"`statistics` must have an entry for each of the {num} normalizations of the network; got "
            f"{len(statistics)}. Compute them with the same network: `supernet.statistics(params, weights, x)`."
        )

    def use(statistics, x, epsilon):
        return _normalize(x, epsilon, None, statistics)

    replace = lambda equation: use if _normalizes(equation) else None
    outputs, _ = _jaxpr.exchange(closed.jaxpr, closed.consts, [x], replace, list(statistics))
    return jax.tree.unflatten(structure, outputs)


def check_one_row(fn: Callable[[jax.Array], base.PyTree], x: jax.Array) -> None:
    """Raises ValueError if x is one row and `fn` normalizes it without positions: the result would always be 0."""
    if x.shape[:1] != (1,):
        return
    for equation in _jaxpr.equations(jax.make_jaxpr(fn)(x).jaxpr):
        if _normalizes(equation) and math.prod((shape := equation.invars[0].aval.shape)[:-1]) == 1:
            raise ValueError(
                f"The batch has one row, and an op normalizes it without positions, in the shape {shape}, by the batch:"
                " the mean is the row itself, so all rows would give the same outputs. To predict, normalize by "
                "training rows: `nas.trained_network`, or `apply(..., statistics=supernet.statistics(...))`. To "
                "train, use batches of several rows."
            )


def _normalize(
    x: jax.Array, epsilon: jax.Array, real: jax.Array | None, statistics: Statistics | None
) -> tuple[jax.Array, Statistics]:
    """Normalizes x by `statistics`. Without them, it uses the moments of the real rows, and other rows become 0."""
    wide = lambda moment: moment.reshape((1,) * (x.ndim - 1) + (-1,))
    if statistics is not None:
        centered = x - wide(statistics.mean)
    else:
        assert real is not None
        axes, inside = tuple(range(x.ndim - 1)), real.reshape(-1, *[1] * (x.ndim - 1))
        num = real.sum().astype(x.dtype) * math.prod(x.shape[1:-1])
        mean = jnp.where(inside, x, 0).sum(axes) / num
        centered = jnp.where(inside, x - wide(mean), 0)
        statistics = Statistics(mean, (centered**2).sum(axes) / num)
    return centered * jax.lax.rsqrt(wide(statistics.variance) + epsilon), statistics


def _real_rows(x: jax.Array, mask: jax.Array) -> jax.Array:
    if jnp.shape(mask) != x.shape[:1]:
        raise ValueError(f"`mask` must be [N] = {x.shape[:1]}, a number for each row of x; got {jnp.shape(mask)}.")
    return jnp.asarray(mask) > 0


def _traced(fn: Callable[[jax.Array], base.PyTree], x: jax.Array) -> tuple[Any, Any]:
    """The jaxpr of `fn` and the structure of its outputs; raises ValueError if a normalization cannot be replaced."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(x)
    for equation in _jaxpr.equations(closed.jaxpr):
        if equation.primitive.name.startswith("custom_") and any(map(_normalizes, _jaxpr.equations_inside(equation))):
            raise ValueError(
                "An op normalizes inside a function with a custom derivative (`jax.custom_vjp`), where neither masks "
                "of rows nor statistics of training rows can be used. Normalize outside that function."
            )
    return closed, jax.tree.structure(shape)


def _normalizes(equation: Any) -> bool:
    return equation.params.get("name") == NORMALIZATION

"""What `nas.normalized` normalizes by in a traced network: the batch, its real rows, or statistics that are given.

    y = (x − mean) / √(variance + ε),  mean and variance of each channel over

- the rows and positions of the batch: in search and training, where no mask is given;
- the real rows of the batch: where rows are padding (`over_real_rows`);
- training rows, computed once (`statistics_of`, `at_statistics`): then the output of a row does not depend on the
  other rows, and a network predicts for one row as it does for a thousand.

The calls of `nas.normalized` are found by their name in the traced function, so ops need no arguments for this.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import base, rewrite
from metaopt.nas._ops import NORMALIZATION


class Statistics(NamedTuple):
    """Moments that one normalization uses. Those of a scan over layers or edges have its steps as leading axes.

    Attributes:
      mean: [..., C].
      variance: [..., C], not negative. NaN in a branch that did not run.
    """

    mean: jax.Array
    variance: jax.Array


def over_real_rows(fn: Callable[[jax.Array], base.PyTree], x: jax.Array, mask: jax.Array | None) -> base.PyTree:
    """`fn(x)`, where every `normalized` takes its mean and variance over the real rows, and gives 0 in the others.

    Calls are found by their name in the traced function, also inside of loops and branches. If an op computes something
    over the batch in another way, padding counts there.

    Args:
      fn: of arrays with the rows as their first axis.
      x: [N, ...].
      mask: [N], 1 for a real row, 0 for padding; it may be traced. With None all rows are real: `fn(x)`.

    Returns:
      The result of `fn`.

    Raises:
      ValueError: if `mask` is not [N], an array with another first axis is normalized, or a normalization is inside of
        a function with a derivative of its own.
    """
    if mask is None:
        return fn(x)
    real = _real_rows(x, mask)
    closed, structure = _traced(fn, x)

    def masked(x, epsilon):
        return _normalize(x, epsilon, real, None)[0]

    replace = lambda equation: masked if _normalizes(equation) else None
    return jax.tree.unflatten(structure, rewrite.evaluate(closed.jaxpr, closed.consts, [x], replace))


def statistics_of(
    fn: Callable[[jax.Array], base.PyTree], x: jax.Array, mask: jax.Array | None = None
) -> list[Statistics]:
    """The statistics of every `normalized` of `fn`, where each is normalized by the rows x.

    Args:
      fn: of arrays with the rows as their first axis.
      x: [N, ...], all rows as one batch.
      mask: [N], as for `over_real_rows`.

    Returns:
      The statistics in the order in which `fn` normalizes.

    Raises:
      ValueError: as for `over_real_rows`; or a normalization is inside of a `while` loop.
    """
    real = _real_rows(x, jnp.ones(len(x)) if mask is None else mask)

    def collect(_, x, epsilon):
        return _normalize(x, epsilon, real, None)

    closed, _ = _traced(fn, x)
    replace = lambda equation: collect if _normalizes(equation) else None
    return rewrite.exchange(closed.jaxpr, closed.consts, [x], replace)[1]


def at_statistics(
    fn: Callable[[jax.Array], base.PyTree], x: jax.Array, statistics: Sequence[Statistics]
) -> base.PyTree:
    """`fn(x)`, where every `normalized` uses the statistics that `statistics_of` returned: rows are independent.

    Args:
      fn: of arrays with the rows as their first axis.
      x: [N, ...], any number of rows.
      statistics: of the same function.

    Returns:
      The result of `fn`.

    Raises:
      ValueError: if `fn` normalizes another number of times, or as for `statistics_of`.
    """
    closed, structure = _traced(fn, x)
    num = sum(map(_normalizes, rewrite.equations(closed.jaxpr)))
    if num != len(statistics):
        raise ValueError(
            f"`statistics` must have an entry for each of the {num} normalizations of the network; got "
            f"{len(statistics)}. Compute them with the same network: `supernet.statistics(params, weights, x)`."
        )

    def use(statistics, x, epsilon):
        return _normalize(x, epsilon, None, statistics)

    replace = lambda equation: use if _normalizes(equation) else None
    outputs, _ = rewrite.exchange(closed.jaxpr, closed.consts, [x], replace, list(statistics))
    return jax.tree.unflatten(structure, outputs)


def check_one_row(fn: Callable[[jax.Array], base.PyTree], x: jax.Array) -> None:
    """Raises ValueError if `fn` normalizes one row [1, ...] without positions by itself: the result is always 0."""
    for equation in rewrite.equations(jax.make_jaxpr(fn)(x).jaxpr):
        if _normalizes(equation) and math.prod((shape := equation.invars[0].aval.shape)[:-1]) == 1:
            raise ValueError(
                f"The batch has one row, and an op normalizes it without positions, in the shape {shape}, by the batch:"
                " the mean is the row itself, so all rows would give the same outputs. To predict, normalize by "
                "training rows: `methods.trained_network`, or `apply(..., statistics=supernet.statistics(...))`. To "
                "train, use batches of several rows."
            )


def _normalize(
    x: jax.Array, epsilon: jax.Array, real: jax.Array | None, statistics: Statistics | None
) -> tuple[jax.Array, Statistics]:
    """`nas.normalized` by `statistics`, or else by the rows [N] that are real, with zeros in the others."""
    wide = lambda moment: moment.reshape((1,) * (x.ndim - 1) + (-1,))
    if statistics is not None:
        centered = x - wide(statistics.mean)
    else:
        assert real is not None
        if x.shape[0] != real.shape[0]:
            raise ValueError(
                f"The batch has {real.shape[0]} rows, and an op normalizes an array of the shape {x.shape}, whose "
                "first axis is another one: let the op keep the rows as its first axis, or leave padding out of the "
                "batch (`inner.minibatch` draws real rows only)."
            )
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
    """The jaxpr of `fn`, whose normalizations can all be replaced, and the structure of its outputs."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(x)
    for equation in rewrite.equations(closed.jaxpr):
        if equation.primitive.name.startswith("custom_") and any(map(_normalizes, rewrite.equations_inside(equation))):
            raise ValueError(
                "An op normalizes inside of a function with a derivative of its own (`jax.custom_vjp`), which neither "
                "masks of rows nor statistics of training rows reach. Normalize outside of that function."
            )
    return closed, jax.tree.structure(shape)


def _normalizes(equation: Any) -> bool:
    return equation.params.get("name") == NORMALIZATION

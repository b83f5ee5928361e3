"""Schedules that can be learned: `step -> value`, differentiable in every number that they are made of.

They are optax schedules: `optax.adam(transforms.wsd_schedule(hp["peak"], ...))`. Lengths are in steps and need not be
whole numbers; each derivative is that of the piecewise smooth function that a schedule is, so that a length has one
wherever no step falls on a kink.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def knot_schedule(
    values: jax.typing.ArrayLike,
    *,
    num_steps: int | None = None,
    knots: jax.typing.ArrayLike | None = None,
    monotone: str | None = None,
) -> optax.Schedule:
    """Values at knots, with straight lines between and constant beyond.

        monotone=None:          v_k = values_k
        monotone="increasing":  v_k = Σ_{j≤k} values_j
        monotone="decreasing":  v_k = Σ_{j≥k} values_j

    With nonnegative `values` (`spaces.positive(shape=(K,))`), the sums are monotone and nonnegative whatever they are.

    Args:
      values: [K].
      num_steps: for K knots at equal distances, the first at step 0 and the last at step `num_steps`, as in the other
        schedules: the first that training of `num_steps` steps does not take.
      knots: in the place of `num_steps`: [K], the steps that the values belong to, increasing.
      monotone: None, "increasing" or "decreasing".

    Returns:
      A schedule, differentiable in `values` and `knots`.

    Raises:
      ValueError: `values` is no vector, there are both `num_steps` and `knots` or neither, the knots are not as many
        as the values, or `monotone` is something else.

    >>> import jax.numpy as jnp
    >>> from metaopt import transforms
    >>> schedule = transforms.knot_schedule(jnp.array([0.0, 1.0, 0.5]), num_steps=4)
    >>> [round(float(schedule(step)), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5, 0.5]
    """
    if len(np.shape(values)) != 1 or np.shape(values)[0] < 1:
        raise ValueError(f"`values` must be a vector of at least one value; got shape {np.shape(values)}.")
    if (num_steps is None) == (knots is None):
        raise ValueError("`knot_schedule` needs either `num_steps` or `knots`.")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    if knots is not None and np.shape(knots) != np.shape(values):
        raise ValueError(f"`knots` must be as many as `values`; got shapes {np.shape(knots)} and {np.shape(values)}.")
    # Half precision has no room for steps.
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    at = jnp.asarray(np.linspace(0, num_steps, len(values)) if num_steps is not None else knots, values.dtype)
    if monotone == "increasing":
        values = jnp.cumsum(values)
    elif monotone == "decreasing":
        values = jnp.cumsum(values[::-1])[::-1]
    elif monotone is not None:
        raise ValueError(f'`monotone` must be None, "increasing" or "decreasing"; got {monotone!r}.')
    return lambda step: jnp.interp(jnp.asarray(step, values.dtype), at, values)


def polynomial_schedule(
    init_value: jax.Array | float,
    end_value: jax.Array | float,
    *,
    num_steps: jax.Array | float,
    power: jax.Array | float = 1.0,
    begin_step: jax.Array | float = 0,
) -> optax.Schedule:
    """v(t) = end + (init − end) (1 − s)^power, where s rises from 0 to 1 over the `num_steps` after `begin_step`.

    The values of `optax.polynomial_schedule`, with a derivative in all five that stays finite at the end, where 1 − s
    is zero; it is zero there for what moves s.

    Args:
      init_value: before and at `begin_step`.
      end_value: after.
      num_steps: the length of the decay.
      power: positive; 1 is a straight line.
      begin_step: the last step at `init_value`.

    Returns:
      A schedule.
    """

    def schedule(step):
        left = 1 - _ramp(step, begin_step, _wide(begin_step) + num_steps)
        return end_value + (init_value - end_value) * _power(left, power)

    return schedule


def cosine_schedule(
    peak_value: jax.Array | float,
    *,
    num_steps: jax.Array | float,
    warmup_steps: jax.Array | float = 0,
    init_value: jax.Array | float = 0.0,
    end_value: jax.Array | float = 0.0,
) -> optax.Schedule:
    """A straight line from `init_value` to `peak_value`, then half a cosine down to `end_value`.

    The values of `optax.warmup_cosine_decay_schedule`.

    Args:
      peak_value: at step `warmup_steps`.
      num_steps: when `end_value` is reached, warmup included.
      warmup_steps: the length of the straight line; 0 for none.
      init_value: at step 0 of a warmup.
      end_value: after `num_steps`.

    Returns:
      A schedule, differentiable in all five.
    """

    def schedule(step):
        done = _ramp(step, warmup_steps, num_steps)
        decayed = end_value + (peak_value - end_value) * (1 + jnp.cos(jnp.pi * done)) / 2
        return _warmed_up(step, warmup_steps, init_value, peak_value, decayed)

    return schedule


# From 1 to 0 as s goes from 0 to 1.
_DECAYS: dict[str, Callable] = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: (1 + jnp.cos(jnp.pi * s)) / 2,
    "sqrt": lambda s: 1 - _power(s, 0.5),
}


def wsd_schedule(
    peak_value: jax.Array | float,
    *,
    num_steps: jax.Array | float,
    warmup_steps: jax.Array | float = 0,
    decay_steps: jax.Array | float = 0,
    init_value: jax.Array | float = 0.0,
    end_value: jax.Array | float = 0.0,
    decay: str = "linear",
) -> optax.Schedule:
    """Warmup, stable, decay: a straight line up to `peak_value`, constant, and down to `end_value` at the end.

    Args:
      peak_value: the constant.
      num_steps: when `end_value` is reached, all three phases included.
      warmup_steps: the length of the first phase; 0 for none.
      decay_steps: the length of the last; 0 for none.
      init_value: at step 0 of a warmup.
      end_value: after `num_steps`.
      decay: "linear", "cosine", or "sqrt" for peak · (1 − √s), which falls fast at first.

    Returns:
      A schedule, differentiable in all six numbers.

    Raises:
      ValueError: `decay` is something else, or warmup and decay together are longer than `num_steps`, where neither is
        traced; traced ones are used as they are, and the value jumps where the warmup ends.

    Source: Hu et al., COLM 2024, https://arxiv.org/abs/2404.06395; "sqrt": Hägele et al., NeurIPS 2024,
    https://arxiv.org/abs/2405.18392
    """
    if decay not in _DECAYS:
        raise ValueError(f"`decay` must be one of {sorted(_DECAYS)}; got {decay!r}.")
    lengths = (warmup_steps, decay_steps, num_steps)
    if not any(isinstance(x, Tracer) for x in lengths):
        warmup, last, total = (np.asarray(x, float) for x in lengths)
        if np.any(warmup + last > total * (1 + 1e-6)):  # shares of the whole are rounded
            raise ValueError(
                f"`warmup_steps` and `decay_steps` must fit into `num_steps`; got {warmup} + {last} of {total}."
            )

    def schedule(step):
        left = _DECAYS[decay](_ramp(step, _wide(num_steps) - decay_steps, num_steps))
        decayed = end_value + (peak_value - end_value) * left
        return _warmed_up(step, warmup_steps, init_value, peak_value, decayed)

    return schedule


def _warmed_up(step, warmup_steps, init_value, peak_value, later):
    warming = init_value + (peak_value - init_value) * _ramp(step, 0, warmup_steps)
    return jnp.where(step < _wide(warmup_steps), warming, later)


def _ramp(step, start, end):
    """From 0 at `start` to 1 at `end`, constant beyond; a jump where they are equal."""
    start, end = _wide(start), _wide(end)
    length = end - start
    rising = length > 0
    s = (step - start) / jnp.where(rising, length, 1)
    # The bounds first: `clip` halves the derivative at a bound, where the side that moves is the inner one.
    return jnp.where(rising, jnp.where(s <= 0, 0.0, jnp.where(s >= 1, 1.0, s)), jnp.where(step >= start, 1.0, 0.0))


def _wide(x):
    """Half precision has no room for steps: float32."""
    return jnp.asarray(x, jnp.float32) if jnp.result_type(x) in (jnp.bfloat16, jnp.float16) else x


def _power(x, exponent):
    """x^p for x ≥ 0 and p > 0, with zero as its derivative at 0, where it may be infinite."""
    return jnp.where(x > 0, jnp.power(jnp.where(x > 0, x, 1), exponent), 0)

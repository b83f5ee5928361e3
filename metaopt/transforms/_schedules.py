"""Schedules that can be learned: `step -> value`, differentiable in every number that defines them.

They are optax schedules: `optax.adam(transforms.wsd_schedule(hp["peak"], ...))`. Lengths are in steps and need not be
whole numbers. As a function of its lengths, a schedule is piecewise smooth. A length has a derivative unless a step
falls exactly on a kink.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt._jaxpr import Tracer


def knot_schedule(
    values: jax.typing.ArrayLike,
    *,
    num_steps: int | None = None,
    knots: jax.typing.ArrayLike | None = None,
    monotone: str | None = None,
) -> optax.Schedule:
    """Values at knots, connected by straight lines, and constant before the first and after the last knot.

        monotone=None:          v_k = values_k
        monotone="increasing":  v_k = Σ_{j≤k} values_j
        monotone="decreasing":  v_k = Σ_{j≥k} values_j

    If `values` are nonnegative (`spaces.positive(shape=(K,))`), the sums are always monotone and nonnegative.

    Args:
      values: [K].
      num_steps: places K knots at equal distances, the first at step 0 and the last at step `num_steps`. Steps count
        from 0, so the last step of a training run of `num_steps` steps is `num_steps` − 1. The other schedules count in
        the same way.
      knots: replaces `num_steps`: [K], the steps that the values belong to, increasing. The order of traced knots is
        not checked.
      monotone: None, "increasing" or "decreasing".

    Returns:
      A schedule, differentiable in `values` and `knots`.

    Raises:
      KeyError: if `monotone` is another value.
      ValueError: if both `num_steps` and `knots` are given or neither is, `num_steps < 1`, or knots decrease.

    >>> import jax.numpy as jnp
    >>> from metaopt import transforms
    >>> schedule = transforms.knot_schedule(jnp.array([0.0, 1.0, 0.5]), num_steps=4)
    >>> [round(float(schedule(step)), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5, 0.5]
    """
    if (num_steps is None) == (knots is None):
        raise ValueError("`knot_schedule` needs either `num_steps` or `knots`.")
    if num_steps is not None and num_steps < 1:  # the knots would not increase
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    steps = [] if knots is None else jax.tree.leaves(knots)
    if not any(isinstance(x, Tracer) for x in steps) and np.any(np.diff(np.ravel(np.asarray(steps, float))) < 0):
        raise ValueError(f"`knots` must be steps in increasing order, each with the value at its place; got {knots}.")
    # Half precision cannot represent step numbers.
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    positions = jnp.asarray(np.linspace(0, num_steps, len(values)) if num_steps is not None else knots, values.dtype)
    sums = {"increasing": jnp.cumsum, "decreasing": lambda values: jnp.cumsum(values[::-1])[::-1]}
    values = values if monotone is None else sums[monotone](values)
    return lambda step: jnp.interp(jnp.asarray(step, values.dtype), positions, values)


def polynomial_schedule(
    init_value: jax.Array | float,
    end_value: jax.Array | float,
    *,
    num_steps: jax.Array | float,
    power: jax.Array | float = 1.0,
    begin_step: jax.Array | float = 0,
) -> optax.Schedule:
    """v(t) = end + (init − end) (1 − s)^power, where s rises from 0 to 1 over the `num_steps` after `begin_step`.

    The values are those of `optax.polynomial_schedule`. The derivatives in all five arguments stay finite at the end,
    where 1 − s is zero: there the derivative in the arguments that move s is zero.

    Args:
      init_value: the value until `begin_step`, inclusive.
      end_value: the value after the decay.
      num_steps: the length of the decay.
      power: positive; 1 is a straight line.
      begin_step: the last step at `init_value`.

    Returns:
      A schedule.
    """

    init_value, end_value = _wide(init_value), _wide(end_value)

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

    The values are those of `optax.warmup_cosine_decay_schedule`.

    Args:
      peak_value: the value at step `warmup_steps`.
      num_steps: the step at which `end_value` is reached, warmup included.
      warmup_steps: the length of the straight line; 0 for no warmup.
      init_value: the value at step 0 of a warmup.
      end_value: the value after `num_steps`.

    Returns:
      A schedule, differentiable in all five numbers. At a whole number of `warmup_steps`, the peak is exactly at one
        step. The loss after training then has a kink at this length, and the derivative is the one-sided one toward
        shorter warmups. To tune the warmup, start between two whole numbers, such as 20.5.

    Raises:
      ValueError: if the warmup is longer than `num_steps` and neither is traced.
    """
    _check_lengths(warmup_steps, 0, num_steps)
    init_value, peak_value, end_value = map(_wide, (init_value, peak_value, end_value))

    def schedule(step):
        done = _ramp(step, warmup_steps, num_steps)
        decayed = end_value + (peak_value - end_value) * (1 + jnp.cos(jnp.pi * done)) / 2
        return _warmed_up(step, warmup_steps, init_value, peak_value, decayed)

    return schedule


# They fall from 1 to 0 as s rises from 0 to 1.
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
      peak_value: the value of the constant phase.
      num_steps: the step at which `end_value` is reached, all three phases included.
      warmup_steps: the length of the first phase; 0 for no warmup.
      decay_steps: the length of the last phase; 0 for no decay.
      init_value: the value at step 0 of a warmup.
      end_value: the value after `num_steps`.
      decay: "linear", "cosine", or "sqrt" for peak · (1 − √s), which falls fast at first.

    Returns:
      A schedule, differentiable in all six numbers.

    Raises:
      KeyError: if `decay` is another value.
      ValueError: if warmup and decay together are longer than `num_steps` and none of the three is traced. Traced
        lengths are not checked: if they are too long, the value jumps where the warmup ends.

    Source: Hu et al., COLM 2024, https://arxiv.org/abs/2404.06395; "sqrt": Hägele et al., NeurIPS 2024,
      https://arxiv.org/abs/2405.18392
    """
    shape = _DECAYS[decay]
    _check_lengths(warmup_steps, decay_steps, num_steps)
    init_value, peak_value, end_value = map(_wide, (init_value, peak_value, end_value))

    def schedule(step):
        left = shape(_ramp(step, _wide(num_steps) - decay_steps, num_steps))
        decayed = end_value + (peak_value - end_value) * left
        return _warmed_up(step, warmup_steps, init_value, peak_value, decayed)

    return schedule


def _check_lengths(*lengths):
    """Raises ValueError if the first two lengths, warmup and decay, do not fit into the third.

    It checks nothing if a length is traced.
    """
    if any(isinstance(x, Tracer) for x in lengths):
        return
    warmup, decay, total = (np.asarray(x, float) for x in lengths)
    if np.any(warmup + decay > total * (1 + 1e-6)):  # lengths computed as shares of the whole are rounded
        names = "`warmup_steps` and `decay_steps`" if np.any(decay) else "`warmup_steps`"
        got = f"{warmup} + {decay}" if np.any(decay) else str(warmup)
        raise ValueError(f"{names} must fit into `num_steps`; got {got} of {total}.")


def _warmed_up(step, warmup_steps, init_value, peak_value, later):
    warming = init_value + (peak_value - init_value) * _ramp(step, 0, warmup_steps)
    return jnp.where(step < _wide(warmup_steps), warming, later)


def _ramp(step, start, end):
    """Rises from 0 at `start` to 1 at `end`, constant outside; a jump if they are equal."""
    start, end = _wide(start), _wide(end)
    length = end - start
    rising = length > 0
    s = 1.0 * (step - start) / jnp.where(rising, length, 1)  # an int32 step / int would be float32, even with x64
    # Not `clip`, which halves the derivative at a bound; here it is zero there.
    return jnp.where(rising, jnp.where(s <= 0, 0.0, jnp.where(s >= 1, 1.0, s)), jnp.where(step >= start, 1.0, 0.0))


def _wide(x):
    """Converts half precision to float32, because it cannot represent step numbers."""
    return jnp.asarray(x, jnp.float32) if jnp.result_type(x) in (jnp.bfloat16, jnp.float16) else x


def _power(x, exponent):
    """x^p for x ≥ 0 and p > 0; at 0 its derivative, which may be infinite, is defined as zero."""
    return jnp.where(x > 0, jnp.power(jnp.where(x > 0, x, 1), exponent), 0)

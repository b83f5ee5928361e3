"""Schedules that can be learned: optax's values where optax has them, derivatives against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import hypergrad, inner, transforms

STEPS = jnp.arange(12)


@pytest.mark.once
def test_the_values_are_those_of_optax():
    # (ours, optax's), at whole steps and beyond the end
    pairs = [
        (
            transforms.cosine_schedule(0.3, num_steps=10, warmup_steps=4, init_value=0.1, end_value=0.05),
            optax.warmup_cosine_decay_schedule(0.1, 0.3, 4, 10, 0.05),
        ),
        (transforms.cosine_schedule(0.3, num_steps=10), optax.cosine_decay_schedule(0.3, 10)),
        (
            transforms.polynomial_schedule(0.3, 0.1, power=2.0, num_steps=6, begin_step=3),
            optax.polynomial_schedule(0.3, 0.1, 2.0, 6, 3),
        ),
        (
            transforms.wsd_schedule(0.3, num_steps=10, warmup_steps=3, decay_steps=4, init_value=0.1, end_value=0.05),
            optax.join_schedules(
                [optax.linear_schedule(0.1, 0.3, 3), optax.constant_schedule(0.3), optax.linear_schedule(0.3, 0.05, 4)],
                [3, 6],
            ),
        ),
        (
            transforms.knot_schedule(jnp.array([1.0, 2.0, 0.5]), knots=jnp.array([0.0, 4.0, 10.0])),
            lambda step: np.interp(step, [0, 4, 10], [1.0, 2.0, 0.5]),
        ),
    ]
    for ours, theirs in pairs:
        expected = [float(theirs(step)) for step in STEPS]
        np.testing.assert_allclose(jax.vmap(ours)(STEPS), expected, rtol=1e-6)  # optax's in float32


def test_python_numbers_and_a_step_of_32_bits_give_float64():
    step = jnp.int32(3)  # optax counts in int32
    for schedule, expected in (
        (transforms.cosine_schedule(0.1, num_steps=10), 0.05 * (1 + np.cos(0.3 * np.pi))),
        (transforms.polynomial_schedule(0.1, 0.0, num_steps=10), 0.07),
        (transforms.wsd_schedule(0.1, num_steps=10, warmup_steps=7), 0.3 / 7),
    ):
        value = schedule(step)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected, rtol=1e-14)


def test_all_schedules_end_at_the_same_step():
    for schedule in (
        transforms.knot_schedule([1.0, 0.5, 0.0], num_steps=8),
        transforms.polynomial_schedule(1.0, 0.0, num_steps=8),
        transforms.cosine_schedule(1.0, num_steps=8),
        transforms.wsd_schedule(1.0, num_steps=8, decay_steps=4),
    ):
        assert schedule(7) > 0.03 and schedule(8) == schedule(9) == 0


def test_the_phases_of_wsd():
    for decay, middle in {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - 0.5**0.5}.items():
        schedule = transforms.wsd_schedule(2.0, num_steps=10, warmup_steps=2, decay_steps=4, decay=decay)
        expected = [0, 1, 2, 2, 2, 2, 2]
        np.testing.assert_allclose([schedule(t) for t in range(7)], expected, rtol=1e-12)
        np.testing.assert_allclose([schedule(t) for t in (8, 10, 20)], [2 * middle, 0, 0], rtol=1e-12, atol=1e-12)
    jump = transforms.wsd_schedule(2.0, num_steps=3)  # neither warmup nor decay
    np.testing.assert_array_equal([jump(t) for t in (0, 2, 3)], [2, 2, 0])


def test_monotone_knots():
    values = jnp.array([0.1, 0.4, 0.2])
    rising = transforms.knot_schedule(values, num_steps=4, monotone="increasing")
    falling = transforms.knot_schedule(values, num_steps=4, monotone="decreasing")
    np.testing.assert_allclose(jax.vmap(rising)(jnp.arange(5)), [0.1, 0.3, 0.5, 0.6, 0.7], rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(falling)(jnp.arange(5)), [0.7, 0.65, 0.6, 0.4, 0.2], rtol=1e-12)


# At a λ where no step falls on a kink.
LENGTHS = {"warmup_steps": 2.5, "num_steps": 9.5}
ENDS = {"init_value": 0.1, "end_value": 0.05}
FAMILIES = {
    "cosine": (transforms.cosine_schedule, {"peak_value": 0.3, **LENGTHS, **ENDS}),
    "wsd": (transforms.wsd_schedule, {"peak_value": 0.3, "decay_steps": 3.2, **LENGTHS, **ENDS}),
    "wsd_sqrt": (partial(transforms.wsd_schedule, decay="sqrt"), {"peak_value": 0.3, "decay_steps": 3.2, **LENGTHS}),
    "wsd_cosine": (
        partial(transforms.wsd_schedule, decay="cosine"),
        {"peak_value": 0.3, "decay_steps": 3.2, **LENGTHS},
    ),
    "polynomial": (transforms.polynomial_schedule, {**ENDS, "power": 0.7, "num_steps": 6.4, "begin_step": 1.5}),
    "knots": (
        partial(transforms.knot_schedule, monotone="decreasing"),
        {"values": [0.3, 0.1, 0.2], "knots": [0.5, 4.5, 9.5]},
    ),
}


def values_at(family, numbers):
    """λ as a vector, and the schedule's values as a function of it."""
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, numbers, is_leaf=lambda x: type(x) is list))
    return flat, lambda flat: jax.vmap(family(**unravel(flat)))(STEPS)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.once
def test_derivatives_in_every_number(name):
    point, schedule = values_at(*FAMILIES[name])
    values = jax.jit(jax.vmap(schedule))
    steps = 1e-6 * jnp.eye(len(point))
    expected = ((values(point[None] + steps) - values(point[None] - steps)) / 2e-6).T
    np.testing.assert_allclose(jax.jit(jax.jacrev(schedule))(point), expected, rtol=1e-6, atol=1e-9)
    assert np.all(np.abs(expected).max(axis=0) > 1e-3)


@pytest.mark.once
def test_derivatives_are_finite_on_the_kinks():
    whole = {"peak_value": 0.3, "warmup_steps": 2.0, "num_steps": 9.0}
    for family, numbers in (
        (FAMILIES["wsd_sqrt"][0], {**whole, "decay_steps": 3.0}),
        (FAMILIES["wsd_sqrt"][0], {**whole, "warmup_steps": 0.0, "decay_steps": 0.0}),
        (FAMILIES["cosine"][0], {**whole, "warmup_steps": 0.0}),
        (FAMILIES["polynomial"][0], {**ENDS, "power": 0.5, "num_steps": 6.0, "begin_step": 1.0}),
    ):
        point, schedule = values_at(family, numbers)
        assert np.all(np.isfinite(jax.jacrev(schedule)(point)))


@pytest.mark.once
def test_a_schedule_is_learned_through_training():
    loop = inner.loop(
        lambda params, hp, data: jnp.cos(2 * params).sum(),
        lambda hp: optax.adam(transforms.knot_schedule(hp["rates"], num_steps=4, monotone="decreasing")),
        init=lambda key, hp, data: jnp.array([0.3, -0.7]),
    )
    solve = hypergrad.unroll(loop, num_steps=4)
    outer = lambda rates: jnp.sum(solve(jax.random.key(0), {"rates": rates}, None).params ** 2)
    point = jnp.array([0.05, 0.03, 0.1])
    values = jax.jit(jax.vmap(outer))
    expected = (values(point[None] + 1e-6 * jnp.eye(3)) - values(point[None] - 1e-6 * jnp.eye(3))) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(point), expected, rtol=1e-6)


@pytest.mark.once
def test_whole_numbers_and_half_precision():
    # Knots at 0, 1.5 and 3, whatever the values' type.
    np.testing.assert_allclose(transforms.knot_schedule([0, 6, 0], num_steps=3)(1), 4.0)
    for dtype in (jnp.bfloat16, jnp.float16):  # neither holds the step 999, nor 70,000
        peak, length = jnp.array(0.5, dtype), jnp.array(1024, dtype)
        knots = transforms.knot_schedule(jnp.array([0, 1], dtype), num_steps=70_000)
        np.testing.assert_allclose(knots(jnp.array(69_999)), 69_999 / 70_000, rtol=1e-6)
        for schedule, exact in (
            (transforms.cosine_schedule(peak, num_steps=length), 0.25 * (1 + np.cos(np.pi * 999 / 1024))),
            (transforms.polynomial_schedule(peak, 0.0, num_steps=length), 0.5 * (1 - 999 / 1024)),
            (transforms.cosine_schedule(peak, num_steps=2048, warmup_steps=length), 0.5 * 999 / 1024),
            (transforms.wsd_schedule(peak, num_steps=length, decay_steps=length), 0.5 * (1 - 999 / 1024)),
            (transforms.cosine_schedule(peak, num_steps=1024), 0.25 * (1 + np.cos(np.pi * 999 / 1024))),
            (transforms.polynomial_schedule(peak, 0.0, num_steps=1024), 0.5 * (1 - 999 / 1024)),
            (transforms.wsd_schedule(peak, num_steps=1024, decay_steps=1024), 0.5 * (1 - 999 / 1024)),
        ):
            np.testing.assert_allclose(schedule(jnp.array(999)), exact, rtol=1e-5)


def test_lengths_that_fit_up_to_rounding_or_are_not_known():
    transforms.wsd_schedule(0.1, num_steps=3.0, warmup_steps=0.1 * 3, decay_steps=0.9 * 3)
    jax.jit(lambda n: transforms.wsd_schedule(0.1, num_steps=n, warmup_steps=4)(0))(3)
    assert transforms.wsd_schedule(0.1, num_steps=0, end_value=0.02)(0) == 0.02  # three phases of no steps

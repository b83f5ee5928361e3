"""Schedules that can be learned: optax's values where optax has them, derivatives against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import hypergrad, inner, transforms

STEPS = jnp.arange(12)


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
    rising = transforms.knot_schedule(values, num_steps=5, monotone="increasing")
    falling = transforms.knot_schedule(values, num_steps=5, monotone="decreasing")
    np.testing.assert_allclose(jax.vmap(rising)(jnp.arange(5)), [0.1, 0.3, 0.5, 0.6, 0.7], rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(falling)(jnp.arange(5)), [0.7, 0.65, 0.6, 0.4, 0.2], rtol=1e-12)


# λ -> schedule, at a λ where no step falls on a kink; None where a length is zero and stays so.
FAMILIES = {
    "cosine": (lambda p: transforms.cosine_schedule(p[0], warmup_steps=p[1], num_steps=p[2], init_value=p[3], end_value=p[4]), [0.3, 2.5, 9.5, 0.1, 0.05]),
    "wsd": (lambda p: transforms.wsd_schedule(p[0], warmup_steps=p[1], num_steps=p[2], decay_steps=p[3], init_value=p[4], end_value=p[5]), [0.3, 2.5, 9.5, 3.2, 0.1, 0.05]),
    "wsd_sqrt": (lambda p: transforms.wsd_schedule(p[0], warmup_steps=p[1], num_steps=p[2], decay_steps=p[3], decay="sqrt"), [0.3, 2.5, 9.5, 3.2]),
    "wsd_cosine": (lambda p: transforms.wsd_schedule(p[0], num_steps=p[1], decay_steps=p[2], decay="cosine"), [0.3, 9.5, 3.2]),
    "polynomial": (lambda p: transforms.polynomial_schedule(p[0], p[1], power=p[2], num_steps=p[3], begin_step=p[4]), [0.3, 0.1, 0.7, 6.4, 1.5]),
    "knots": (lambda p: transforms.knot_schedule(p[:3], knots=p[3:], monotone="decreasing"), [0.3, 0.1, 0.2, 0.5, 4.5, 9.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_in_every_number(name):
    family, at = FAMILIES[name]
    at = jnp.array(at)
    values = jax.jit(jax.vmap(lambda p: jax.vmap(family(p))(STEPS)))
    steps = 1e-6 * jnp.eye(len(at))
    expected = ((values(at[None] + steps) - values(at[None] - steps)) / 2e-6).T
    found = jax.jit(jax.jacrev(lambda p: jax.vmap(family(p))(STEPS)))(at)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert np.all(np.abs(expected).max(axis=0) > 1e-3)


def test_derivatives_are_finite_on_the_kinks():
    for family, at in (
        (FAMILIES["wsd_sqrt"][0], [0.3, 2.0, 9.0, 3.0]),
        (FAMILIES["wsd_sqrt"][0], [0.3, 0.0, 9.0, 0.0]),
        (FAMILIES["cosine"][0], [0.3, 0.0, 9.0, 0.0, 0.0]),
        (FAMILIES["polynomial"][0], [0.3, 0.0, 0.5, 6.0, 1.0]),
    ):
        assert np.all(np.isfinite(jax.jacrev(lambda p, f=family: jax.vmap(f(p))(STEPS))(jnp.array(at))))


def test_a_schedule_is_learned_through_training():
    loop = inner.loop(
        lambda params, hp, data: jnp.cos(2 * params).sum(),
        lambda hp: optax.adam(transforms.knot_schedule(hp["rates"], num_steps=4, monotone="decreasing")),
        init=lambda key, hp, data: jnp.array([0.3, -0.7]),
    )
    solve = hypergrad.unroll(loop, num_steps=4)
    outer = lambda rates: jnp.sum(solve(jax.random.key(0), {"rates": rates}, None).params ** 2)
    at = jnp.array([0.05, 0.03, 0.1])
    values = jax.jit(jax.vmap(outer))
    expected = (values(at[None] + 1e-6 * jnp.eye(3)) - values(at[None] - 1e-6 * jnp.eye(3))) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(at), expected, rtol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`values` must be a vector"):
        transforms.knot_schedule(0.1, num_steps=3)
    with pytest.raises(ValueError, match="either `num_steps` or `knots`"):
        transforms.knot_schedule([0.1, 0.2])
    with pytest.raises(ValueError, match="`num_steps` must be at least 1; got 0"):
        transforms.knot_schedule([0.1, 0.2], num_steps=0)
    with pytest.raises(ValueError, match="`knots` must be as many"):
        transforms.knot_schedule([0.1, 0.2], knots=[1.0])
    with pytest.raises(ValueError, match="`monotone` must be None"):
        transforms.knot_schedule([0.1, 0.2], num_steps=3, monotone="up")
    with pytest.raises(ValueError, match="`decay` must be one of"):
        transforms.wsd_schedule(0.1, num_steps=3, decay="exponential")

"""Momenta at several decays: optax's where there is one, the sum of optax's where there are more."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import transforms

GRADS = [{"a": jnp.array([0.5, -1.0]) * t, "b": jnp.array(0.3) + t} for t in range(4)]


def accumulate(transform, grads=GRADS):
    state = transform.init(grads[0])
    for g in grads:
        updates, state = transform.update(g, state)
    return updates, state


@pytest.mark.parametrize("average", [False, True])
def test_the_sum_of_the_momenta_of_optax(average):
    decays, weights = jnp.array([0.0, 0.9, 0.99]), jnp.array([0.5, 0.3, 0.2])
    one = lambda beta: optax.ema(beta, debias=False) if average else optax.trace(beta)
    members = [accumulate(one(float(beta)))[0] for beta in decays]
    expected = jax.tree.map(lambda *ms: sum(w * m for w, m in zip(weights, ms, strict=True)), *members)
    updates, state = accumulate(transforms.learnable_accumulation(decays, weights, average=average))
    chex.assert_trees_all_close(updates, expected, rtol=1e-12)
    chex.assert_trees_all_equal_shapes(state.momenta, {"a": jnp.zeros((3, 2)), "b": jnp.zeros(3)})
    mean = accumulate(transforms.learnable_accumulation(decays, average=average))[0]
    chex.assert_trees_all_close(mean, jax.tree.map(lambda *ms: sum(ms) / 3, *members), rtol=1e-12)


@pytest.mark.once
def test_derivatives():
    def value(decays, weights):
        updates, _ = accumulate(transforms.learnable_accumulation(decays, weights))
        return jnp.sum(jnp.sin(updates["a"])) + updates["b"]

    jax.test_util.check_grads(jax.jit(value), (jnp.array([0.0, 0.9]), jnp.array([0.4, 0.6])), order=2, rtol=1e-5)


def test_decays_near_one_are_not_rounded_in_bfloat16():
    grads = [jnp.ones(2, jnp.bfloat16)] + [jnp.zeros(2, jnp.bfloat16)] * 40
    updates, state = accumulate(transforms.learnable_accumulation(jnp.array([0.98], jnp.float32)), grads)
    assert updates.dtype == state.momenta.dtype == jnp.bfloat16
    assert np.all(np.asarray(updates, np.float32) < 0.6)  # 0.98⁴⁰ is 0.45


def test_momenta_of_half_precision_gradients_in_float32():
    decays, grads = jnp.array([0.999], jnp.float32), [jnp.ones(2, jnp.bfloat16)] + [jnp.zeros(2, jnp.bfloat16)] * 700
    for dtype, expected in ((None, 1.0), (jnp.float32, 0.999**700)):  # bfloat16 rounds .999 m to m
        transform = transforms.learnable_accumulation(decays, accumulator_dtype=dtype)
        start = transform.init(grads[0])
        state, updates = jax.lax.scan(lambda s, g, t=transform: t.update(g, s)[::-1], start, jnp.stack(grads))
        assert updates.dtype == state.momenta.dtype == (dtype or jnp.bfloat16)
        np.testing.assert_allclose(updates[-1].astype(float), expected, rtol=1e-2)


def test_mixed_precision_as_optax_has_it():
    params, grads = jnp.ones(2, jnp.float32), jnp.array([0.1, -0.3], jnp.bfloat16)
    trace, ours = optax.trace(0.9), transforms.learnable_accumulation(jnp.array([0.9], jnp.float32))
    expected, state, ours_state = None, trace.init(params), ours.init(params)
    for _ in range(2):
        expected, state = trace.update(grads, state)
        updates, ours_state = ours.update(grads, ours_state)
    assert updates.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(updates, expected, rtol=1e-7)


def test_whole_numbers_and_no_dot():
    transform = transforms.learnable_accumulation(np.array([0, 0]))
    state = transform.init(jnp.ones(2))
    np.testing.assert_allclose(transform.update(jnp.ones(2), state)[0], 1.0)
    # Accelerators round the operands of a dot.
    assert "dot_general" not in str(jax.make_jaxpr(transform.update)(jnp.ones(2), state))

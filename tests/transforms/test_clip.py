"""Clipping: optax's values, a norm with a derivative, and nothing infinite at zero."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import transforms

GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.5], [1.2]])}


def clip(grads, *args, **kwargs):
    return transforms.learnable_clip(*args, **kwargs).update(grads, optax.EmptyState())[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("max_norm", [0.7, 100.0])
def test_the_values_are_those_of_optax(max_norm, dtype):
    grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    expected = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]
    chex.assert_trees_all_equal(clip(grads, max_norm), expected)
    norms = jax.tree.map(jnp.linalg.norm, clip(grads, max_norm, scope="leaf"))
    chex.assert_trees_all_close(norms, jax.tree.map(lambda g: min(max_norm, jnp.linalg.norm(g)), grads), rtol=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 1e3])
def test_smooth_clipping_equals_its_formula(sharpness):
    norm = float(optax.tree.norm(GRADS))
    for c in (norm / 3, norm * 3, norm * 1e-30):
        length = float(optax.tree.norm(clip(GRADS, c, sharpness=sharpness)))
        p = sharpness
        expected = norm * c / (norm**p + c**p) ** (1 / p) if p < 10 else min(norm, c)
        np.testing.assert_allclose(length, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scope": "leaf"},
        {"sharpness": 2.0},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"sharpness": 0.5, "scope": "leaf"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.once
def test_derivatives(kwargs):
    def value(c, grads):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(clip(grads, c, **kwargs)))

    jax.test_util.check_grads(jax.jit(value), (1.1, GRADS), order=2, rtol=1e-5)
    # With dead leaves, and with nothing alive: finite, and nothing learned about c.
    gradient = jax.jit(jax.grad(value, argnums=(0, 1)))
    dead = optax.tree.zeros_like(GRADS)
    chex.assert_tree_all_finite(gradient(1.1, {**GRADS, "a": dead["a"]}))
    by_c, by_grads = gradient(1.1, dead)
    assert by_c == 0
    chex.assert_trees_all_close(by_grads, optax.tree.ones_like(GRADS), rtol=1e-12)


def test_the_sharpness_may_be_learned():
    length = jax.jit(lambda p: optax.tree.norm(clip(GRADS, 1.1, sharpness=p)))
    expected = (length(2 + 1e-5) - length(2 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(length))(2.0), expected, rtol=1e-6)
    assert abs(expected) > 1e-3


def test_half_precision_norms_do_not_underflow_or_overflow():
    for size in (1e-4, 300.0):  # squares are 1e-8 and 9e4, beyond float16
        grads = jnp.full(4, size, jnp.float16)
        clipped = clip(grads, jnp.float16(size))
        assert clipped.dtype == jnp.float16
        np.testing.assert_allclose(clipped, size / 2, rtol=1e-2)


def test_one_norm_for_each_parameter():
    each = transforms.per_parameter(functools.partial(transforms.learnable_clip, scope="leaf"))({"a": 0.5, "b": 0.1})
    norms = jax.tree.map(jnp.linalg.norm, each.update(GRADS, each.init(GRADS), GRADS)[0])
    chex.assert_trees_all_close(norms, {"a": 0.5, "b": 0.1}, rtol=1e-6)


def test_a_norm_that_is_an_array_may_be_used_within_jit():
    norm = jnp.array(1.0)
    clipped = jax.jit(lambda g: transforms.learnable_clip(norm).update(g, ())[0])(jnp.ones(2))
    chex.assert_trees_all_close(clipped, jnp.full(2, 0.5**0.5))

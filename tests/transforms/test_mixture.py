"""Mixtures: a one-hot one is its member to the bit, idle members leak nothing, derivatives are those of the sum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metaopt import transforms

PARAMS = {"a": jnp.array([0.5, -1.0, 0.0]), "b": jnp.array([[0.3, 0.8]])}


def broken(rate=0.1):
    """NaN in its update, and infinite in the derivative of its state."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * rate / jnp.zeros(()), updates), state * jnp.inf

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


def train(optimizer, num_steps=3, params=PARAMS):
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: -jnp.sin(3 * p), params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, _), updates = jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)
    return params, updates


MEMBERS = {"sgd": optax.sgd(0.1, 0.9), "adam": optax.adam(0.1), "sign": optax.sign_sgd(0.01), "broken": broken()}


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_hot_is_the_member_to_the_bit(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    run = jax.jit(lambda w: train(transforms.mixture(list(MEMBERS.values()), w), params=params))
    for k, name in enumerate(["sgd", "adam", "sign"]):
        expected = jax.jit(lambda name=name: train(MEMBERS[name], params=params))()
        mixed = run(jax.nn.one_hot(k, len(MEMBERS), dtype=dtype))
        chex.assert_trees_all_equal(mixed, expected)
        # Signs of zeros too.
        chex.assert_trees_all_equal(*jax.tree.map(jnp.signbit, (mixed, expected)))


def objective(hp):
    # `differentiable` around the whole mixture would hide its own treatment of NaN.
    adam = transforms.differentiable(optax.adam(0.1))
    members = [optax.sgd(hp["rate"], 0.9), adam, optax.sign_sgd(hp["sign"]), broken(hp["broken"])]
    optimizer = transforms.mixture(members, hp["weights"])
    params, _ = train(optimizer)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0]])
@pytest.mark.once
def test_derivatives(weights):
    hp = {"rate": jnp.array(0.1), "sign": jnp.array(0.01), "broken": jnp.array(0.3), "weights": jnp.array(weights)}
    reverse = jax.jit(jax.grad(objective))(hp)
    forward = jax.jit(jax.jacfwd(objective))(hp)
    chex.assert_tree_all_finite(reverse)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-9)
    # A broken member with weight 0 has no derivative. Other members with weight 0 have one.
    assert reverse["broken"] == 0 and reverse["weights"][3] == 0
    flat, unravel = jax.flatten_util.ravel_pytree({**hp, "weights": hp["weights"][:3]})
    full = lambda flat: (lambda t: {**t, "weights": jnp.append(t["weights"], 0.0)})(unravel(flat))
    values = jax.jit(jax.vmap(lambda flat: objective(full(flat))))
    steps = 1e-6 * jnp.eye(len(flat))
    expected = (values(flat[None] + steps) - values(flat[None] - steps)) / 2e-6
    grads = jax.flatten_util.ravel_pytree({**reverse, "weights": reverse["weights"][:3]})[0]
    np.testing.assert_allclose(grads, expected, rtol=1e-6, atol=1e-8)
    assert np.all(np.abs(reverse["weights"][:3]) > 1e-3)


def test_an_idle_member_that_is_switched_on_later_has_the_derivatives_of_its_state():
    def trained(rate, weights):
        def step(carry, w):
            optimizer = transforms.mixture([optax.sgd(rate, 0.9), optax.sgd(0.05)], w)
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        state = transforms.mixture([optax.sgd(rate, 0.9), optax.sgd(0.05)], weights[0]).init(PARAMS)
        params = jax.tree.map(lambda p: p * rate, PARAMS)
        return jnp.sum(jax.lax.scan(step, (params, state), weights)[0][0]["a"])

    weights = jnp.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    values = jax.jit(jax.value_and_grad(trained))
    expected = (values(0.5 + 1e-6, weights)[0] - values(0.5 - 1e-6, weights)[0]) / 2e-6
    np.testing.assert_allclose(values(0.5, weights)[1], expected, rtol=1e-7)


@pytest.mark.once
def test_mixed_second_derivatives_at_an_idle_member():
    cube = optax.GradientTransformation(lambda params: (), lambda u, state, params=None: (u**3, state))

    def update(weights, grad):
        optimizer = transforms.mixture([optax.sgd(0.1), cube], weights)
        return optimizer.update(grad, optimizer.init(grad), grad)[0]

    # d²/dw du of w₀ (−0.1 u) + w₁ u³ at w = (1, 0), in either order.
    by_grad = jax.jacfwd(jax.grad(update, argnums=1))(jnp.array([1.0, 0.0]), 2.0)
    by_weights = jax.jacfwd(jax.grad(update, argnums=0), argnums=1)(jnp.array([1.0, 0.0]), 2.0)
    np.testing.assert_allclose(by_grad, [-0.1, 12.0], rtol=1e-12)
    np.testing.assert_allclose(by_weights, [-0.1, 12.0], rtol=1e-12)


def test_updates_of_a_member_with_weight_that_are_not_finite_are_passed_on():
    params, _ = train(transforms.mixture([optax.sgd(0.1), broken()], jnp.array([1.0, 1e-9])), num_steps=1)
    assert not np.all(np.isfinite(params["a"]))


def test_a_mixture_of_its_own_in_each_parameter():
    weights = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0])}
    optimizer = transforms.mixture([optax.sgd(0.1), optax.sign_sgd(1.0)], weights)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["a"], -0.1 * PARAMS["a"])
    np.testing.assert_array_equal(updates["b"], -jnp.sign(PARAMS["b"]))


@pytest.mark.parametrize("make", [dict, nnx.State])
@pytest.mark.once
def test_a_tree_in_an_nnx_optimizer(make):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    kernel = model.kernel[...]
    weights = make({"kernel": jnp.array([1.0, 0.0]), "bias": [0.25, 0.75]})
    optimizer = nnx.Optimizer(model, transforms.mixture([optax.sgd(0.1), optax.sign_sgd(1.0)], weights), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: 2 * jnp.sum(model(jnp.ones((1, 2)))))(model))
    np.testing.assert_allclose(model.kernel[...], kernel - 0.2, rtol=1e-6)
    np.testing.assert_allclose(model.bias[...], [-0.25 * 0.2 - 0.75], rtol=1e-6)


@pytest.mark.parametrize("make", [list, tuple])
@pytest.mark.once
def test_lists_of_numbers_are_weights(make):
    members = [optax.sgd(0.1), optax.sign_sgd(1.0)]

    def updates(weights):
        optimizer = transforms.mixture(members, weights)
        return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)[0]

    one, two = make([0.25, 0.75]), make([1, 0])
    chex.assert_trees_all_equal(updates(one), updates(jnp.array([0.25, 0.75])))
    chex.assert_trees_all_equal(
        updates({"a": one, "b": two}), updates({"a": jnp.array([0.25, 0.75]), "b": jnp.array([1.0, 0.0])})
    )
    # Numbers that are traced, such as the leaves of a λ.
    by_list = jax.jacfwd(lambda w: updates(make([w[0], w[1]])))(jnp.array([0.25, 0.75]))
    chex.assert_trees_all_equal(by_list, jax.jacfwd(updates)(jnp.array([0.25, 0.75])))


def test_the_members_may_be_generated():
    members = (optax.sgd(rate) for rate in (0.1, 0.3))
    updates, _ = (mixed := transforms.mixture(members, jnp.array([0.5, 0.5]))).update(PARAMS, mixed.init(PARAMS))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.2 * g, PARAMS), rtol=1e-6)

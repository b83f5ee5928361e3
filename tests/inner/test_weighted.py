"""Weights on examples: the loss, the mixed product by hand, its cost, and its use."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, inner

B, D, H, LAYERS = 256, 16, 64, 8


def losses(params, batch):
    """[B] squared errors of a deep narrow network."""
    x = batch["x"]
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return ((x @ params[-1])[:, 0] - batch["y"]) ** 2


def weights(hyperparams, batch):
    """[B] from a network of the features."""
    return jax.nn.sigmoid(jnp.tanh(batch["x"] @ hyperparams["in"]) @ hyperparams["out"])


def network(seed):
    rng = np.random.default_rng(seed)
    sizes = [D, *[H] * LAYERS, 1]
    return [jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a)) for a, b in zip(sizes, sizes[1:], strict=False)]


_RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(_RNG.normal(size=(B, D))), "y": jnp.asarray(_RNG.normal(size=B))}
LAM = {"in": jnp.asarray(_RNG.normal(size=(D, 3))), "out": jnp.asarray(_RNG.normal(size=3))}
PARAMS, DIRECTION = network(1), network(2)


@pytest.mark.parametrize("normalize", ["count", "weights", "none"])
def test_the_loss_is_a_weighted_sum(normalize):
    total, w = (losses(PARAMS, BATCH) * weights(LAM, BATCH)).sum(), weights(LAM, BATCH)
    expected = total / {"count": B, "weights": w.sum(), "none": 1}[normalize]
    loss = inner.weighted(losses, weights, normalize=normalize)
    np.testing.assert_allclose(loss(PARAMS, LAM, BATCH), expected, rtol=1e-13)


@pytest.fixture(scope="module")
def products():
    """Compiled programs: forward pass of the losses, gradient, and mixed product without and with Hessian product."""
    inner_grad = jax.grad(inner.weighted(losses, weights))
    programs = {
        "forward": lambda params, lam, v: losses(params, BATCH),
        "gradient": lambda params, lam, v: inner_grad(params, lam, BATCH),
        "mixed": lambda params, lam, v: jax.vjp(lambda *args: inner_grad(*args, BATCH), params, lam)[1](v)[1],
        "both": lambda params, lam, v: jax.vjp(lambda *args: inner_grad(*args, BATCH), params, lam)[1](v),
    }
    return {name: jax.jit(f).lower(PARAMS, LAM, DIRECTION).compile() for name, f in programs.items()}


def test_the_mixed_product_is_the_jacobian_vector_product_of_the_losses(products):
    # 1/N (∂w/∂λ)ᵀ (∂ℓ/∂θ) v, the latter by finite differences.
    eps = 1e-5
    ahead, behind = (losses([w + s * eps * v for w, v in zip(PARAMS, DIRECTION, strict=True)], BATCH) for s in (1, -1))
    tangent = (ahead - behind) / (2 * eps)
    expected = jax.vjp(lambda lam: weights(lam, BATCH), LAM)[1](tangent / B)[0]
    assert optax.tree.norm(expected) > 1e-2
    chex.assert_trees_all_close(products["mixed"](PARAMS, LAM, DIRECTION), expected, rtol=1e-6, atol=1e-9)


def test_the_mixed_product_costs_three_forward_passes_and_less_memory_than_a_gradient(products):
    flops = {name: program.cost_analysis()["flops"] for name, program in products.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in products.items()}
    assert flops["mixed"] < 3.2 * flops["forward"] < 0.5 * flops["both"]
    assert memory["mixed"] < memory["gradient"] and memory["mixed"] < memory["both"] / 5


@pytest.mark.once
def test_cleans_data():
    # A line, and labels of which the first five are wrong: the hypergradient lowers exactly their weights.
    x = jnp.linspace(-1.0, 1.0, 20)
    truth = {"x": x, "y": 2 * x}
    train = {**truth, "y": truth["y"].at[:5].add(3.0), "index": jnp.arange(20)}
    loss = inner.weighted(
        lambda params, batch: (params[0] + params[1] * batch["x"] - batch["y"]) ** 2,
        lambda lam, batch: jax.nn.sigmoid(lam[batch["index"]]),
    )
    loop = inner.loop(loss, lambda lam: optax.sgd(0.3), init=lambda key, lam, data: jnp.zeros(2))
    problem = inner.problem(
        loop, lambda params, lam, batch: ((params[0] + params[1] * batch["x"] - batch["y"]) ** 2).mean()
    )
    estimator, lam = hypergrad.darts_fd(problem, commit=20), jnp.zeros(20)
    task = base.Task(train, truth)
    estimate, state = jax.jit(estimator.estimate)(lam, task, estimator.init(jax.random.key(0), lam, task))
    assert set(np.argsort(-estimate.hypergrad)[:5]) == set(range(5)) and (estimate.hypergrad[:5] > 0).all()
    lookahead, _ = hypergrad.lookahead(problem, commit=0).estimate(lam, task, state)
    np.testing.assert_allclose(estimate.hypergrad, lookahead.hypergrad, rtol=1e-9)  # a quadratic: no error in ε


def test_in_its_full_form():
    def with_noise(params, batch, context):
        return losses(params, batch) + jax.random.normal(context.key, (B,)), context.model_state + 1

    def late(lam, batch, context):
        return weights(lam, batch) * (context.step > 0)

    loop = inner.loop(
        inner.weighted(with_noise, late, with_context=True),
        lambda lam: optax.sgd(0.1),
        init=lambda key, lam, data: (PARAMS, jnp.zeros([])),
        with_context=True,
    )
    state = loop.init(jax.random.key(0), LAM, BATCH)
    evaluate = jax.jit(loop.loss)
    for step, num in ((0, 0.0), (1, 1.0)):
        context = loop.context(state)._replace(step=jnp.array(step))
        value, model_state = evaluate(PARAMS, LAM, BATCH, context)
        noise = jax.random.normal(context.key, (B,))
        np.testing.assert_allclose(
            value, num * (weights(LAM, BATCH) * (losses(PARAMS, BATCH) + noise)).mean(), rtol=1e-12
        )
        assert model_state == 1

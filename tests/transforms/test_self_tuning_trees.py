"""Self-tuning optimizers of other trees, around and within other transforms."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import transforms

MODES = ["forward", "reverse"]
PARAMS = {"w": np.array([0.5, -1.0]), "b": np.array([0.3])}


def adam(**kwargs):
    return transforms.self_tuning(lambda hp: optax.adam(hp["rate"]), {"rate": 1e-3}, optax.sgd(0.1), **kwargs)


def run(transform, grads, params, num_steps=3, **extra):
    state, update = transform.init(params), jax.jit(lambda *args: transform.update(*args, **extra))
    for _ in range(num_steps):
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.parametrize("kwargs", [{}, {"mode": "reverse"}, {"discount": 0.5}])
def test_integers_among_the_parameters_have_no_part(kwargs):
    # A table of indices has no derivative. Plain optax needs a mask for it, too.
    params = {"a": jnp.array([1.0, -2.0]), "index": jnp.arange(3)}
    grads = {"a": jnp.array([0.3, 0.1]), "index": jnp.zeros(3, int)}
    extra = {"grad_fn": lambda p: {"a": p["a"], "index": jnp.zeros(3, int)}} if "discount" in kwargs else {}
    mask = {"a": True, "index": False}
    whole = transforms.self_tuning(
        lambda hp: optax.masked(optax.adam(hp["rate"]), mask), {"rate": 1e-3}, optax.sgd(0.1), **kwargs
    )
    updates, state = run(whole, grads, params, **extra)
    alone_extra = {"grad_fn": lambda p: p} if "discount" in kwargs else {}
    expected, alone = run(adam(**kwargs), grads["a"], params["a"], **alone_extra)
    chex.assert_trees_all_close((updates["a"], state.hyperparams), (expected, alone.hyperparams), rtol=1e-12)
    np.testing.assert_array_equal(updates["index"], 0)
    assert state.hyperparams["rate"] > 1.1e-3


@pytest.mark.parametrize("mode", MODES)
def test_complex_parameters_are_pairs_of_real_ones(mode):
    # As optax has it, a gradient is the direction of ascent: ∂/∂x + i ∂/∂y.
    tuned = transforms.self_tuning(lambda hp: optax.sgd(hp), 0.1, optax.sgd(0.1), mode=mode)
    first, second = np.array([1.0 + 2.0j, -0.5j]), np.array([0.3 - 1.0j, 2.0])

    def both(first, second):
        state = tuned.init(first)
        _, state = tuned.update(first, state, first)
        return tuned.update(second, state, first)[1].hyperparams

    pairs = [np.stack([g.real, g.imag]) for g in (first, second)]
    signal, expected = jax.jit(both)(first, second), jax.jit(both)(*pairs)
    np.testing.assert_allclose(signal, expected, rtol=1e-12)
    assert abs(signal - 0.1) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.once
def test_derivatives_in_the_start(mode):
    # Before the first step u = 0, and ‖u‖ has no derivative there.
    def trained(rate):
        optimizer = transforms.self_tuning(lambda hp: optax.adam(hp), rate, optax.sgd(0.1), mode=mode)
        params = jnp.array([0.5, -1.0])
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(jnp.sin(params), state, params)
            params = params + updates
        return jnp.sum(jnp.cos(params))

    value = jax.jit(trained)
    expected = (value(0.01 + 1e-6) - value(0.01 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(trained))(0.01), expected, rtol=1e-6)
    assert abs(expected) > 1e-3


def test_the_weights_of_a_mixture_within_multi_steps():
    def factory(logits):
        return transforms.mixture([optax.sgd(0.1), optax.scale(0.1)], jax.nn.softmax(logits))

    tuned = transforms.self_tuning(factory, jnp.zeros(2), optax.sgd(1.0), rule="additive")
    params = jax.tree.map(jnp.asarray, PARAMS)
    _, state = run(optax.MultiSteps(tuned, 2), params, params, num_steps=8)
    logits = optax.tree.get(state, "hyperparams")
    assert logits[0] > 0.01 and logits[1] < -0.01  # down the gradient, and not up


@pytest.mark.once
def test_around_multi_steps_masked_and_within_lookahead():
    params = jax.tree.map(jnp.asarray, PARAMS)
    accumulated = transforms.self_tuning(
        lambda hp: optax.MultiSteps(optax.adam(hp), 2).gradient_transformation(), 1e-3, optax.sgd(0.1)
    )
    assert run(accumulated, params, params, num_steps=6)[1].hyperparams > 1.05e-3
    masked = optax.masked(adam(), {"w": True, "b": False})
    updates, state = run(masked, params, params)
    expected, alone = run(adam(), params["w"], params["w"])
    chex.assert_trees_all_close((updates["w"], optax.tree.get(state, "rate")), (expected, alone.hyperparams["rate"]))
    ahead = optax.lookahead(adam(), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    state = ahead.init(pair)
    for _ in range(3):
        updates, state = ahead.update(params, state, pair)
        pair = optax.apply_updates(pair, updates)
    assert optax.tree.get(state, "rate") > 1.1e-3


def test_values_of_masked_leaves_need_not_be_used():
    rates, params = {"w": 0.1, "b": 0.2}, jax.tree.map(jnp.asarray, PARAMS)
    masked = optax.masked(
        transforms.self_tuning(transforms.per_parameter(optax.sgd), rates, optax.sgd(0.1)), {"w": True, "b": False}
    )
    assert optax.tree.get(run(masked, params, params)[1], "hyperparams")["b"] == 0.2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["names"])
@dataclasses.dataclass
class Layer:
    w: jax.Array
    names: list  # static, and without a hash


@pytest.mark.once
def test_static_leaves_need_no_hash_and_a_gradient_may_be_a_number():
    params = Layer(jnp.array([0.5, -1.0]), ["a"])
    _, tuned_state = run(adam(), params, params)
    _, expected = run(adam(), params.w, params.w)
    assert tuned_state.hyperparams == expected.hyperparams
    state = adam().init(params)
    _, state = adam().update(params, state, params)
    np.testing.assert_allclose(state.hyperparams["rate"], 1e-3)
    for mode in MODES:
        _, tuned_state = run(adam(mode=mode, gap=1.0), 0.5, 0.5, valid_grad_fn=lambda params: 3.0)
        np.testing.assert_allclose(tuned_state.hyperparams["rate"], 1e-3 * np.exp(0.2), rtol=1e-5)


@pytest.mark.once
def test_a_cosine_for_each_hyperparameter():
    # g, u and λ ∂u/∂λ by hand: u = −rate (g + decay θ).
    def factory(hp):
        return optax.chain(optax.add_decayed_weights(hp["decay"]), optax.sgd(hp["rate"]))

    start = {"decay": 1e-6, "rate": 0.1}
    tuned = transforms.self_tuning(factory, start, optax.sgd(0.5), rule="cosine")
    params, first, second = (np.random.default_rng(i).normal(size=5) for i in range(3))
    _, state = tuned.update(first, tuned.init(params), params)
    _, state = jax.jit(tuned.update)(second, state, params)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    expected = {
        "decay": 1e-6 * np.exp(0.5 * cosine(second, params)),
        "rate": 0.1 * np.exp(0.5 * cosine(second, first + 1e-6 * params)),
    }
    chex.assert_trees_all_close(state.hyperparams, expected, rtol=1e-6)  # λ is in float32
    assert abs(expected["decay"] / 1e-6 - 1) > 0.05


@pytest.mark.parametrize("kwargs", [{}, {"mode": "reverse", "gap": 1.0}])
@pytest.mark.once
def test_a_validation_batch_is_the_gradient_of_its_loss(kwargs):
    # Of complex parameters the direction of ascent, of integers none.
    params = {"a": jnp.array([1.0, -2.0]), "z": jnp.array([0.3 + 0.4j]), "index": jnp.arange(2)}
    factory = lambda hp: optax.masked(optax.sgd(hp), {"a": True, "z": True, "index": False})

    def valid_loss(params, batch):
        return jnp.sum(batch["x"] * jnp.sin(params["a"][params["index"]])) + jnp.sum(jnp.abs(params["z"] - 1j) ** 2)

    def by_hand(params):
        return {
            "a": jnp.cos(params["a"]) * jnp.array([0.7, -1.0]),
            "z": 2 * (params["z"] - 1j),
            "index": jnp.zeros(2, int),
        }

    start = {"rate": 0.1} if kwargs else 0.1
    make = (lambda hp: factory(hp["rate"])) if kwargs else factory
    batch, grads = {"x": jnp.array([0.7, -1.0])}, {**params, "index": jnp.zeros(2, int)}
    tuned = transforms.self_tuning(make, start, optax.sgd(0.1), valid_loss_fn=valid_loss, **kwargs)
    _, state = run(tuned, grads, params, valid_batch=batch)
    _, expected = run(tuned, grads, params, valid_grad_fn=by_hand)
    chex.assert_trees_all_close(state.hyperparams, expected.hyperparams, rtol=1e-12)
    _, training = run(transforms.self_tuning(make, start, optax.sgd(0.1), **kwargs), grads, params)
    assert abs(jax.tree.leaves(state.hyperparams)[0] - jax.tree.leaves(training.hyperparams)[0]) > 1e-3
    for other, extra in (
        (adam(), {"valid_batch": batch}),
        (tuned, {"valid_batch": batch, "valid_grad_fn": by_hand}),
        (tuned, {}),  # and does not follow the training loss instead
    ):
        with pytest.raises(ValueError, match="its batch .* must be given together, and without `valid_grad_fn`"):
            other.update(grads, tuned.init(params), params, **extra)


@pytest.mark.once
def test_a_validation_batch_of_each_step_goes_through_a_chain_and_multi_steps():
    params, batches = jnp.array([0.5, -1.0]), jnp.array([[0.7, -1.0], [3.0, 0.2], [-1.0, 2.0], [0.4, 0.4]])

    def valid_loss(params, batch):
        return jnp.sum(batch * jnp.sin(params))

    def tuned_by(name, compose):
        tuned = compose(transforms.self_tuning(optax.adam, 1e-2, optax.sgd(0.1), valid_loss_fn=valid_loss))

        @jax.jit
        def step(params, state, batch):
            extra = {"valid_batch": batch} if name == "batch" else {"valid_grad_fn": lambda p: batch * jnp.cos(p)}
            updates, state = tuned.update(2 * params, state, params, **extra)
            return optax.apply_updates(params, updates), state

        carry = params, tuned.init(params)
        rates = []
        for batch in batches:
            carry = step(*carry, batch)
            rates.append(optax.tree.get(carry[1], "hyperparams"))
        return jnp.stack(rates)

    for compose in (lambda t: optax.chain(optax.clip(0.4), t), lambda t: optax.MultiSteps(t, 2)):
        traced = tuned_by("batch", compose)
        chex.assert_trees_all_close(traced, tuned_by("function", compose), rtol=1e-12)
        assert jnp.ptp(traced) > 1e-4, "each batch moves λ"


def quadratic(tuner, bound=None, rule="cosine", mode="forward", num_steps=100):
    """Trains ½‖θ‖² with decoupled decay, from a rate of 0.1. Returns the last ‖θ‖, and λ after each step."""
    tuned = transforms.self_tuning(
        lambda hp: optax.chain(optax.sgd(hp["rate"]), optax.add_decayed_weights(-hp["rate"] * hp["decay"])),
        {"rate": 0.1, "decay": 1e-2},
        tuner,
        rule=rule,
        mode=mode,
        projection_fn=bound,
    )

    def step(carry, _):
        params, state = carry
        updates, state = tuned.update(params, state, params)
        return (params + updates, state), state.hyperparams

    params = jnp.array([1.0, -2.0, 0.5])
    (params, _), lams = jax.jit(lambda: jax.lax.scan(step, (params, tuned.init(params)), length=num_steps))()
    return jnp.linalg.norm(params), lams


def at_most(limit):
    return lambda hp: {**hp, "decay": jnp.minimum(hp["decay"], limit / hp["rate"])}


@pytest.mark.parametrize("mode", MODES)
def test_a_projection_keeps_the_decay_from_running_away(mode):
    # With a decay whose steps are long, rate · decay passes 2, and each step throws θ further to the other side.
    rule = "cosine" if mode == "forward" else "normalized"
    tuner = optax.partition({"rate": optax.sgd(0.01), "decay": optax.sgd(20.0)}, {"rate": "rate", "decay": "decay"})
    loss, lams = quadratic(tuner, rule=rule, mode=mode, num_steps=60)
    assert not loss < 1e3  # infinite, or no number
    loss, bounded = quadratic(tuner, at_most(0.5), rule, mode, num_steps=60)
    assert loss < 1e-9
    np.testing.assert_allclose(jnp.max(bounded["rate"] * bounded["decay"]), 0.5, rtol=1e-6)
    # Where it changes nothing, it changes no bit.
    tuner = optax.sgd(0.01)
    chex.assert_trees_all_equal(quadratic(tuner, at_most(1.0), rule, mode, 30), quadratic(tuner, None, rule, mode, 30))


@pytest.mark.parametrize("mode", MODES)
def test_it_descends_and_is_projected_from_the_start_on(mode):
    # Baydin's rule for SGD with its rate in a box, by hand; the projection may answer in its own precision.
    low, high, rate, last = 0.1, 0.12, 0.02, None
    box = lambda rate: np.clip(rate, low, high)
    tuned = transforms.self_tuning(
        optax.sgd,
        rate,
        optax.sgd(0.01),
        rule="additive",
        mode=mode,
        projection_fn=lambda rate: jnp.clip(rate, low, high),
    )
    params, state, rates, expected = np.array([1.0, -0.5]), tuned.init(jnp.ones(2)), [], []
    rate, update = box(rate), jax.jit(tuned.update)
    np.testing.assert_allclose(state.hyperparams, low, rtol=1e-12)
    for curvature in (1.0, 1.0, 1.0, -1.0, 1.0, -1.0):
        grads = curvature * params
        if last is not None:
            rate = box(rate + 0.01 * grads @ last)
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates, -rate * grads, rtol=1e-12)
        params, last = params - rate * grads, grads
        rates.append(float(state.hyperparams))
        expected.append(float(rate))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert {low, high} < set(expected)  # at both ends, and between them


def test_training_in_float32_among_float64_is_differentiable():
    # Within float64 a λ in float32, of parameters in half precision and in none.
    def tuned(rate, params):
        optimizer = transforms.self_tuning(lambda hp: optax.sgd(hp), rate, optax.sgd(0.1))
        state = optimizer.init(params)
        for _ in range(2):
            _, state = optimizer.update(params, state, params)
        return state.hyperparams

    for params, expected in ((jnp.ones((2, 3), jnp.bfloat16), np.exp(0.1)), ({}, 1.0)):
        slope = jax.jit(jax.grad(tuned))(jnp.float32(0.1), params)
        np.testing.assert_allclose(slope, expected, rtol=1e-2)


def test_projected_values_are_copies():
    pair = lambda bound: transforms.self_tuning(
        lambda hp: optax.chain(optax.sgd(hp["a"]), optax.add_decayed_weights(hp["b"])),
        {"a": 0.3, "b": 0.2},
        optax.sgd(0.1),
        projection_fn=bound,
    )
    # One array for two leaves, which is the caller's own: a program may be given the state's buffers all the same.
    limit = jnp.array(0.1, float)
    tuned, params = pair(lambda hp: {"a": limit, "b": limit}), jnp.ones(2)
    state = tuned.init(params)
    assert len({x.unsafe_buffer_pointer() for x in (limit, *state.hyperparams.values())}) == 3
    _, state = jax.jit(tuned.update, donate_argnums=1)(params, state, params)
    assert state.hyperparams["a"] == state.hyperparams["b"] == limit


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "factory",
    [optax.optimistic_adam_v2, optax.optimistic_gradient_descent, optax.contrib.dog],
    ids=lambda f: f.__name__,
)
def test_a_state_that_holds_a_number_of_python(factory, mode):
    params = jnp.array([1.0, -2.0])
    _, state = run(transforms.self_tuning(factory, 1e-2, optax.sgd(0.1), mode=mode), params, params)
    assert state.hyperparams > 1.1e-2


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
def test_updates_are_as_precise_as_those_of_the_optimizer_alone(kinds, mode):
    grads, params = jnp.array([1e-3, 0.1, 0.1], kinds[0]), jnp.array([0.5, 2.0, 30.0], kinds[1])
    adamw = lambda rate: optax.adamw(rate, eps=1e-3, weight_decay=1e-4)
    tuned = transforms.self_tuning(adamw, 1e-3, optax.sgd(1e-9), mode=mode)
    updates, _ = tuned.update(grads, tuned.init(params), params)
    expected, _ = adamw(1e-3).update(grads, adamw(1e-3).init(params), params)
    assert updates.dtype == expected.dtype == jnp.promote_types(*kinds)
    np.testing.assert_allclose(updates, expected, rtol=1e-6 if expected.dtype == jnp.float32 else 2e-3)


def test_grad_fn_goes_to_the_optimizer_where_nothing_is_carried():
    def sam(rate):
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
        return optax.contrib.sam(optax.sgd(rate), ascent, opaque_mode=True)

    params, grad_fn = jnp.array([1.0, -2.0]), lambda params, _: params**3
    tuned = transforms.self_tuning(sam, 1e-2, optax.sgd(1e-9))
    updates, _ = tuned.update(params**3, tuned.init(params), params, grad_fn=grad_fn)
    expected, _ = sam(1e-2).update(params**3, sam(1e-2).init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert jnp.abs(expected + 1e-2 * params**3).max() > 1e-3, "the gradient ahead is another"


def adam_chain(rate):
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(rate))


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_the_plain_chain_becomes_the_inner_state(mode):
    def steps(optimizer, params, state, num_steps):
        for _ in range(num_steps):
            updates, state = optimizer.update(jnp.sin(params), state, params)
            params = params + updates
        return params, state

    plain, tuned = adam_chain(0.1), transforms.self_tuning(adam_chain, 0.1, optax.sgd(0.3), mode=mode)
    params, old = steps(plain, jnp.array([1.0, -2.0]), plain.init(jnp.zeros(2)), 3)
    state = tuned.init(params)._replace(inner=old)
    first, state = jax.jit(lambda: steps(tuned, params, state, 1))()
    expected = steps(plain, params, old, 1)
    chex.assert_trees_all_close((first, state.inner), expected, rtol=1e-12)
    assert state.hyperparams == 0.1 and steps(tuned, first, state, 1)[1].hyperparams > 0.1


def test_the_tail_of_a_chain_alone_needs_a_validation_loss():
    def rates(wrapped, **extra):
        def step(carry, _):
            params, state = carry
            updates, state = wrapped.update(jnp.array([1.0, 4.0]) * params, state, params, **extra)
            return (params + updates, state), optax.tree.get(state, "hyperparams")

        return jax.lax.scan(step, (jnp.array([1.0, -2.0]), wrapped.init(jnp.zeros(2))), length=60)[1]

    tail = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4),
        transforms.self_tuning(optax.scale_by_learning_rate, 1e-3, optax.sgd(0.3)),
    )
    whole = transforms.self_tuning(adam_chain, 1e-3, optax.sgd(0.3))
    valid = {"valid_grad_fn": lambda params: jnp.array([1.0, 4.0]) * (params - 0.1)}
    of_tail, of_whole = jax.jit(lambda: (rates(tail, **valid), rates(whole, **valid)))()
    np.testing.assert_allclose(of_tail, of_whole, rtol=1e-9)
    assert len(set(of_whole.tolist())) > 50
    of_tail, of_whole = jax.jit(lambda: (rates(tail), rates(whole)))()
    assert of_tail[-1] > 10 * of_whole.max()  # it follows Adam's output

"""Optimizers that tune themselves: hypergradient descent as it is written down, and as the estimators have it."""

import chex
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metaopt import base, hypergrad, inner, spaces, transforms

START = np.array([1.0, -0.5, 2.0])
CURVATURE = np.array([1.0, 3.0, 0.2])
TARGET = np.array([0.3, 0.2, -1.0])  # the minimum of the validation loss
RATE, BETA, NUM_STEPS = 0.05, 0.01, 6
MODES = ["forward", "reverse"]
# A tuner that keeps λ, and stores the hypergradient that it received.
SPY = optax.GradientTransformation(
    lambda hp: optax.tree.zeros_like(hp), lambda h, state, hp=None: (optax.tree.zeros_like(h), h)
)


def rate_sgd(tuner, rule, **kwargs):
    return transforms.self_tuning(lambda hp: optax.sgd(hp["rate"]), {"rate": RATE}, tuner, rule=rule, **kwargs)


def train(optimizer, num_steps=NUM_STEPS):
    """λ at each step on a quadratic, and the parameters at the end."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(CURVATURE * params, state, params)
        return (params + updates, state), state.hyperparams

    params = jnp.array(START)
    (params, _), lams = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps))()
    return lams, params


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["additive", "multiplicative", "normalized"])
def test_the_rate_of_sgd_is_hypergradient_descent(rule, mode):
    lams, _ = train(rate_sgd(optax.sgd(BETA), rule, mode=mode))
    theta, rate, last, expected = START, RATE, None, []
    for _ in range(NUM_STEPS):
        g = CURVATURE * theta
        if last is not None:
            h = -g @ last
            if rule == "multiplicative":
                rate = rate * np.exp(-BETA * rate * h)
            elif rule == "normalized":
                rate = rate * np.exp(-BETA * h / (np.linalg.norm(g) * np.linalg.norm(last)))
            else:
                rate = rate - BETA * h
        theta, last = theta - rate * g, g
        expected.append(rate)
    np.testing.assert_allclose(lams["rate"], expected, rtol=1e-10)
    assert len(set(expected)) == NUM_STEPS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["additive", "multiplicative", "normalized"])
def test_the_tuner_sees_what_it_moves(rule, mode):
    """λ with the additive rule, log λ with the others: its weight decay shrinks that."""
    decay = 3.0
    lams, _ = train(rate_sgd(optax.chain(optax.add_decayed_weights(decay), optax.sgd(BETA)), rule, mode=mode))
    theta, rate, last, expected = START, RATE, None, []
    for _ in range(NUM_STEPS):
        g = CURVATURE * theta
        h = 0.0 if last is None else -g @ last
        if rule == "normalized" and last is not None:
            h = h / (np.linalg.norm(g) * np.linalg.norm(last))
        if rule == "additive":
            rate = rate - BETA * (h + decay * rate)
        else:
            scale = rate if rule == "multiplicative" else 1.0
            rate = rate * np.exp(-BETA * (scale * h + decay * np.log(rate)))
        theta, last = theta - rate * g, g
        expected.append(rate)
    np.testing.assert_allclose(lams["rate"], expected, rtol=1e-10)


def stacked(values, top):
    """SGD whose rate is tuned by an SGD whose rate is tuned by one ...; on top a tuner of the last rate."""
    tuner = top
    for value in reversed(values):
        tuner = transforms.self_tuning(lambda hp: optax.sgd(hp), value, tuner, rule="additive")
    return tuner


def simulated(values, num_steps, nudge=0.0):
    """The validation loss after so many steps of the stack, in NumPy; the top rate of the last step nudged.

    Each level descends along its own hypergradient, and the signal of a level is minus the product of the last two
    signals of the one below: as for the rate of SGD.
    """
    rates, theta, last = list(values), START, None
    for t in range(num_steps):
        signals = [np.sin(CURVATURE * theta)]  # the gradient of Σ −cos(c θ)/c
        judged = np.cos(theta - TARGET)
        if last is not None:
            # What judges the last step, at each height: the derivative of the validation loss in the rate.
            h = -judged @ last[0]
            signals.append(h)
            for below in last[1:]:
                h = -h * below
                signals.append(h)
        if t == num_steps - 1:
            rates[-1] += nudge
        for k in reversed(range(len(rates) - 1)):
            if len(signals) > k + 1:
                rates[k] = rates[k] - rates[k + 1] * signals[k + 1]
        theta, last = theta - rates[0] * signals[0], signals
    return np.sin(theta - TARGET).sum(), rates


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("height", [1, 2, 3])
def test_stacks_of_any_height_see_the_derivative_of_the_loss(height, mode):
    values = [0.3, 0.2, 0.1][:height]
    optimizer = stacked(values, SPY)
    if mode == "reverse":
        optimizer = transforms.self_tuning(
            lambda hp: optax.sgd(hp), values[0], stacked(values[1:], SPY), rule="additive", mode="reverse"
        )
    params, state = jnp.array(START), optimizer.init(jnp.array(START))
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, valid_grad_fn=lambda p: jnp.cos(p - TARGET)))
    for t in range(6):
        updates, state = update(jnp.sin(CURVATURE * params), state, params)
        params = params + updates
        tuner, rates = state, []
        for _ in range(height):
            rates.append(float(tuner.hyperparams))
            tuner = tuner.tuner
        np.testing.assert_allclose(rates, simulated(values, t + 1)[1], rtol=1e-10)
        if t > 0:  # `tuner` is the hypergradient: the derivative of the loss at θ_t in the top rate of the step before
            ends = [simulated(values, t, sign * 1e-3)[0] for sign in (1, -1)]
            np.testing.assert_allclose(tuner, (ends[0] - ends[1]) / 2e-3, rtol=1e-5, atol=1e-11)
    assert abs(tuner) > 1e-6


LAM = {"rate": 0.1, "b1": 0.7, "decay": 0.2}


def adamw(hp):
    return optax.adamw(hp["rate"], b1=hp["b1"], weight_decay=hp["decay"])


def train_loss(params, hp=None, data=None):
    return -jnp.sum(jnp.cos(CURVATURE * params))


def valid_loss(params, hp=None, data=None):
    return jnp.sum(jnp.sin(params - TARGET))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("judge", ["train", "valid"])
@pytest.mark.once
def test_the_signal_of_adamw_is_that_of_the_estimator(judge, mode):
    lam = jax.tree.map(jnp.asarray, LAM)
    optimizer = transforms.self_tuning(adamw, lam, SPY, rule="additive", mode=mode)
    loop = inner.loop(train_loss, adamw, init=lambda key, hp, data: jnp.array(START))
    problem = inner.problem(loop, valid_loss)
    if judge == "train":
        estimator, extra = hypergrad.hypergradient_descent(problem), {}
    else:
        estimator, extra = (
            hypergrad.truncated(problem, num_steps=10, truncation_length=1),
            {"valid_grad_fn": jax.grad(valid_loss)},
        )
    task = base.Task(None, None)
    state = estimator.init(jax.random.key(0), lam, task)
    params = jnp.array(START)
    opt_state = optimizer.init(params)
    update = jax.jit(lambda *args: optimizer.update(*args, **extra))
    estimate = jax.jit(estimator.estimate)
    hypergradient = optax.tree.zeros_like(lam)  # before the first step there is nothing to judge
    for _ in range(4):
        updates, opt_state = update(jax.grad(train_loss)(params), opt_state, params)
        params = params + updates
        chex.assert_trees_all_close(opt_state.tuner, hypergradient, rtol=1e-9, atol=1e-12)  # the last step's
        out, state = estimate(lam, task, state)
        hypergradient = out.hypergrad


@pytest.mark.parametrize("mode", MODES)
def test_the_norm_that_divides_the_signal_of_many_hyperparameters(mode):
    plain, normalized = (
        transforms.self_tuning(adamw, LAM, SPY, rule=rule, mode=mode) for rule in ("multiplicative", "normalized")
    )
    grads = jnp.cos(jnp.array(START))

    @jax.jit
    def two_steps():
        first, state = plain.update(grads, plain.init(grads), grads)
        _, after = plain.update(jnp.sin(grads), state, grads)
        other = normalized.update(grads, normalized.init(grads), grads)[1]
        return first, state.last[0], after.tuner, normalized.update(jnp.sin(grads), other, grads)[1].tuner

    first, last, signal, updates = two_steps()
    # The longest of λ ∂u/∂λ, or u.
    length = np.linalg.norm(last, axis=1).max() if mode == "forward" else np.linalg.norm(first)
    expected = jax.tree.map(lambda h: h / (np.linalg.norm(np.sin(grads)) * length), signal)
    chex.assert_trees_all_close(updates, expected, rtol=1e-10, atol=1e-14)  # a first step of Adam has no b1
    assert abs(updates["rate"]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.once
def test_a_gap_counts_the_validation_loss_more_and_the_training_loss_less(mode):
    # The signal is linear in the gradient that judges: of f_valid + 0.5 (f_valid − f_train).
    lam, grads = jax.tree.map(jnp.asarray, LAM), jax.grad(train_loss)

    def signal(gap, valid_grad_fn):
        optimizer = transforms.self_tuning(adamw, lam, SPY, rule="additive", mode=mode, gap=gap)
        params, state = jnp.array(START), optimizer.init(jnp.array(START))
        for _ in range(3):
            updates, state = optimizer.update(grads(params), state, params, valid_grad_fn=valid_grad_fn)
            params = params + updates
        return state.tuner

    both = jax.grad(lambda params: 1.5 * valid_loss(params) - 0.5 * train_loss(params))
    signals, expected = jax.jit(lambda: (signal(0.5, jax.grad(valid_loss)), signal(0.0, both)))()
    chex.assert_trees_all_close(signals, expected, rtol=1e-10)
    alone, expected = jax.jit(lambda: (signal(0.5, None), signal(0.0, None)))()  # the training loss has no gap
    chex.assert_trees_all_equal(alone, expected)


def carried(factory, lam, discount, rule="additive", num_steps=5):
    """h_t of each step, from a tuner that keeps λ."""
    optimizer = transforms.self_tuning(factory, lam, SPY, rule=rule, discount=discount)

    def step(carry, _):
        params, state = carry
        grad_fn = jax.grad(train_loss)
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn, valid_grad_fn=jax.grad(valid_loss)
        )
        return (params + updates, state), state.tuner

    params = jnp.array(START)
    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps))()[1]


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_carried_without_a_discount_it_is_the_derivative_of_training(rule):
    def trained(flat, num_steps=4):  # plain optax
        hp = dict(zip(LAM, flat, strict=True))
        params, state = jnp.array(START), adamw(hp).init(jnp.array(START))
        for _ in range(num_steps):
            updates, state = adamw(hp).update(jax.grad(train_loss)(params), state, params)
            params = params + updates
        return valid_loss(params)

    numbers = jnp.array(list(LAM.values()))
    values = jax.jit(jax.vmap(trained))
    steps = 1e-6 * jnp.eye(3)
    expected = (values(numbers[None] + steps) - values(numbers[None] - steps)) / 2e-6
    if rule == "multiplicative":
        expected = expected * numbers
    derivatives = carried(adamw, LAM, 1.0, rule)
    np.testing.assert_allclose([derivatives[name][4] for name in LAM], expected, rtol=1e-6)
    assert np.all(np.abs(expected) > 1e-3)


def test_the_discount_forgets():
    theta, z, expected = START, np.zeros(3), []
    for _ in range(5):
        expected.append(z @ np.cos(theta - TARGET))
        g, hessian = CURVATURE * np.sin(CURVATURE * theta), CURVATURE**2 * np.cos(CURVATURE * theta)
        z = 0.6 * (1 - RATE * hessian) * z - g
        theta = theta - RATE * g
    np.testing.assert_allclose(carried(lambda hp: optax.sgd(hp), RATE, 0.6), expected, rtol=1e-10)


@pytest.mark.parametrize("start", [1e-4, 1.0])
def test_it_recovers_from_a_bad_rate(start):
    # 1e-4 does nothing in 100 steps; 1 is above 2/3, where gradient descent diverges.
    _, tuned = train(transforms.self_tuning(lambda hp: optax.sgd(hp), start, optax.sgd(0.1)), 100)
    plain = (1 - start * CURVATURE) ** 100 * START
    assert np.max(np.abs(tuned)) < 0.02 and np.max(np.abs(plain)) > 0.9


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_always_zero_does_no_harm(mode):
    # √v has an infinite derivative there, and v one of zero in its decay.
    optimizer = transforms.self_tuning(
        lambda hp: optax.adam(hp["rate"], b2=hp["b2"]), {"rate": 0.1, "b2": 0.9}, optax.sgd(0.1), mode=mode
    )
    grads = jnp.array([1.0, 0.0])
    state, update = optimizer.init(grads), jax.jit(optimizer.update)
    for _ in range(3):
        _, state = update(grads, state, grads)
    assert state.hyperparams["rate"] > 0.1 and state.hyperparams["b2"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-5, 200.0])
def test_half_precision_has_a_signal(size, mode):
    # The sums of squares are beyond float16: 4e-10 and 1.6e5.
    grads = jnp.full(4, size, jnp.float16)
    optimizer = transforms.self_tuning(lambda hp: optax.sgd(hp), 1e-2, optax.sgd(0.1), mode=mode)
    state, update = optimizer.init(grads), jax.jit(optimizer.update)
    for _ in range(2):
        _, state = update(grads, state, grads)
    np.testing.assert_allclose(state.hyperparams, 1e-2 * np.exp(0.1), rtol=2e-3)


def small(**kwargs):
    return transforms.self_tuning(lambda hp: optax.adam(hp["rate"]), {"rate": 1e-3}, optax.sgd(0.1), **kwargs)


PARAMS = {"w": np.array([0.5, -1.0]), "b": np.array([0.3])}


def square(params, target=1.0):
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(params))


COMPOSED = {
    "chain": lambda t: optax.chain(optax.identity(), t, optax.scale(1.0)),
    "apply_if_finite": lambda t: optax.apply_if_finite(t, 3),
    "MultiSteps": lambda t: optax.MultiSteps(t, 1),  # its `gradient_transformation()` drops them
    "inject_hyperparams": lambda t: optax.inject_hyperparams(
        lambda beta: transforms.self_tuning(lambda hp: optax.adam(hp["rate"]), {"rate": 1e-3}, optax.sgd(beta))
    )(beta=0.1),
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.once
def test_extra_arguments_come_through(name):
    def run(transform, **extra):
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = jax.jit(transform.init)(params)
        update = jax.jit(lambda *args: transform.update(*args, **extra))
        for _ in range(3):
            updates, state = update(jax.grad(square)(params), state, params)
            params = optax.apply_updates(params, updates)
        return optax.tree.get(state, "rate")  # as one reads it for a log

    repelled = jax.grad(lambda params: square(params, -5.0))
    expected, composed = run(small(), valid_grad_fn=repelled), COMPOSED[name](small())
    np.testing.assert_allclose(run(composed, valid_grad_fn=repelled), expected, rtol=1e-9)
    assert expected < 1e-3 < run(composed)


def test_in_multi_transform_it_tunes_its_group_and_around_it_all():
    labels = {"w": "tuned", "b": "fixed"}
    inside = optax.multi_transform({"tuned": small(), "fixed": optax.sgd(0.1)}, labels)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, alone, alone_state = inside.init(params), small(), small().init(params["w"])
    grads = jax.grad(square)(params)
    update, update_alone = jax.jit(inside.update), jax.jit(alone.update)
    for _ in range(3):
        _, state = update(grads, state, params)
        _, alone_state = update_alone(grads["w"], alone_state, params["w"])
    chex.assert_trees_all_close(optax.tree.get(state, "rate"), alone_state.hyperparams["rate"], rtol=1e-12)
    # Inside, some parameters are missing, so a validation loss cannot be evaluated.
    with pytest.raises(ValueError, match="sees only some of the parameters"):
        inside.update(grads, state, params, valid_grad_fn=jax.grad(square))
    around = transforms.self_tuning(
        lambda hp: optax.multi_transform({"tuned": optax.adam(hp["w"]), "fixed": optax.sgd(hp["b"])}, labels),
        {"w": 1e-3, "b": 1e-3},
        optax.sgd(0.1),
    )
    state, update = around.init(params), jax.jit(lambda *a: around.update(*a, valid_grad_fn=jax.grad(square)))
    for _ in range(3):
        _, state = update(grads, state, params)
    assert state.hyperparams["w"] > 1e-3 and state.hyperparams["b"] > 1e-3


def test_multi_steps_tunes_once_a_step():
    transform = optax.MultiSteps(small(), 2)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(4):
        _, state = update(jax.grad(square)(params), state, params)
    assert optax.tree.get(state, "inner_opt_state").count == 2


def test_apply_if_finite_skips_steps_that_are_not_finite():
    transform = optax.apply_if_finite(small(), 3)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, update = transform.init(params), jax.jit(transform.update)
    grads = jax.grad(square)(params)
    for g in (grads, optax.tree.scale(jnp.nan, grads), grads):
        updates, state = update(g, state, params)
    chex.assert_tree_all_finite((updates, state.inner_state))


@pytest.mark.parametrize("rule", ["normalized", "cosine", "multiplicative", "additive"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_validation_gradient_that_is_not_finite_leaves_everything_but_the_step_unchanged(rule, bad):
    factory = lambda hp: optax.adam(hp["rate"])
    transform = transforms.self_tuning(factory, {"rate": 1e-3}, optax.sgd(0.1, momentum=0.9), rule=rule)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, update = transform.init(params), jax.jit(transform.update, static_argnames="valid_grad_fn")
    grads = jax.grad(square)(params)
    for _ in range(3):
        _, state = update(grads, state, params, valid_grad_fn=jax.grad(square))
    one_bad = lambda params: {"w": jnp.array([bad, 1.0]), "b": jnp.ones(1)}
    updates, after = update(grads, state, params, valid_grad_fn=one_bad)
    chex.assert_trees_all_equal((after.hyperparams, after.tuner), (state.hyperparams, state.tuner))
    expected, _ = factory(state.hyperparams).update(grads, state.inner, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    _, later = update(grads, after, params, valid_grad_fn=jax.grad(square))
    chex.assert_tree_all_finite(later)
    assert later.hyperparams["rate"] != state.hyperparams["rate"]


@pytest.mark.once
def test_flax_holds_the_state():
    params = {"w": jnp.zeros(2)}
    optimizer = small()
    train_state = flax.training.train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(square)(s.params)))
    for _ in range(4):
        train_state = step(train_state)
    assert train_state.opt_state.hyperparams["rate"] > 1.2e-3

    @jax.jit
    def step_with_validation(ts):
        grads, fn = jax.grad(square)(ts.params), jax.grad(lambda params: square(params, -5.0))
        updates, opt_state = ts.tx.update(grads, ts.opt_state, ts.params, valid_grad_fn=fn)
        return ts.replace(step=ts.step + 1, params=optax.apply_updates(ts.params, updates), opt_state=opt_state)

    before = train_state.opt_state.hyperparams["rate"]
    assert step_with_validation(train_state).opt_state.hyperparams["rate"] < before
    with pytest.raises(TypeError):  # it takes the arguments for its fields
        train_state.apply_gradients(grads=train_state.params, valid_grad_fn=jax.grad(square))

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    loss = lambda m, target: jnp.sum((m(jnp.ones((1, 2))) - target) ** 2)
    graphdef, _ = nnx.split(model)

    def valid_grad_fn(params):
        return jax.grad(lambda params: loss(nnx.merge(graphdef, params), -9))(params)

    for _ in range(4):
        nnx_optimizer.update(model, nnx.grad(loss)(model, 9))
    before = nnx_optimizer.opt_state.hyperparams["rate"][...]
    assert before > 1.2e-3
    nnx_optimizer.update(model, nnx.grad(loss)(model, 9), valid_grad_fn=valid_grad_fn)
    assert nnx_optimizer.opt_state.hyperparams["rate"][...] < before


@pytest.mark.parametrize("mode", MODES)
def test_a_program_that_is_given_the_state_leaves_the_start(mode):
    lam = {"rate": jnp.array(1e-3, jnp.float64)}  # has the dtype in the state, so it is not converted
    optimizer = transforms.self_tuning(lambda hp: optax.adam(hp["rate"]), lam, optax.sgd(0.1), mode=mode)
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(jnp.ones(2))
    for _ in range(2):
        _, state = update(jnp.ones(2), state, jnp.ones(2))
    assert optimizer.init(jnp.ones(2)).hyperparams["rate"] == 1e-3 == lam["rate"]


@pytest.mark.parametrize("mode", MODES)
def test_training_that_tunes_itself_is_differentiable(mode):
    def trained(beta):
        _, params = train(rate_sgd(optax.sgd(beta), "normalized", mode=mode), 4)
        return jnp.sum(jnp.sin(params))

    value = jax.jit(trained)
    expected = (value(BETA + 1e-5) - value(BETA - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(trained))(BETA), expected, rtol=1e-6)
    assert abs(expected) > 1e-3


def test_it_may_be_made_in_a_jitted_function():
    def updates(beta):
        optimizer = transforms.self_tuning(lambda hp: optax.sgd(hp), 0.1, optax.sgd(beta))
        return optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))[0]

    np.testing.assert_allclose(jax.jit(updates)(0.1), -0.1, rtol=1e-6)


def test_a_factory_of_the_entries_of_lambda_is_explained():
    factory = lambda rate, decay: optax.adamw(rate, weight_decay=decay)
    with pytest.raises(TypeError) as error:
        transforms.self_tuning(factory, {"rate": 0.1, "decay": 0.1}, optax.sgd(0.1)).init(jnp.ones(2))
    assert any("`factory` must be a function of the whole of λ" in note for note in error.value.__notes__)


@pytest.mark.parametrize("mode", MODES)
def test_coordinates_of_a_space_descend_by_the_chain_rule_and_keep_the_bounds(mode):
    space = {"rate": spaces.interval(0.01, 0.09, default=0.05), "decay": spaces.fixed(0.0)}

    def factory(z):
        hp = spaces.to_constrained(space, z)
        return optax.chain(optax.add_decayed_weights(hp["decay"]), optax.sgd(hp["rate"]))

    z = spaces.to_unconstrained(space, spaces.default(space))
    optimizer = transforms.self_tuning(factory, z, optax.sgd(30.0), rule="additive", mode=mode)
    params, state = jnp.asarray(START), optimizer.init(jnp.asarray(START))
    coordinate, last = 0.0, np.zeros(3)
    for _ in range(NUM_STEPS):
        grad = CURVATURE * np.asarray(params)
        above = 1 / (1 + np.exp(-coordinate))
        coordinate += 30.0 * 0.08 * above * (1 - above) * grad @ last  # dF/drate = −g·g_last
        updates, state = optimizer.update(jnp.asarray(grad), state, params)
        params, last = params + updates, grad
        np.testing.assert_allclose(state.hyperparams.coordinates["rate"], coordinate, rtol=1e-6)
        np.testing.assert_allclose(updates, -(0.01 + 0.08 / (1 + np.exp(-coordinate))) * grad, rtol=1e-6)
    assert 0.08 < spaces.to_constrained(space, state.hyperparams)["rate"] < 0.09

"""The loop: steps, contexts, training runs, and errors if a loss, an optimizer or an init does not fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, transforms

KEY = jax.random.key(0)
DATA = problems.TASK.train
LAM = {"rate": jnp.array(0.1), "penalty": jnp.full(problems.NUM_FEATURES, 0.2)}


def numbers(state):
    """A state without typed keys, which cannot be compared."""
    return state._replace(key=jax.random.key_data(state.key))


def make(loss=problems.penalized, optimizer=lambda hp: optax.adam(hp["rate"]), init=problems.zeros, **options):
    return inner.loop(loss, optimizer, init=init, **options)


@pytest.mark.once
def test_steps_equal_a_plain_optax_loop():
    loop = make(sampler=inner.minibatch(6))
    state = loop.init(KEY, LAM, DATA)
    params = jnp.zeros(problems.NUM_FEATURES)
    optimizer = optax.adam(0.1)
    opt_state = optimizer.init(params)
    step = jax.jit(lambda state: inner.step(loop, state, LAM, DATA))
    for t in range(4):
        assert state.step == t and loop.context(state).step == t
        batch = loop.batch(state, DATA)
        grads = jax.grad(problems.penalized)(params, LAM, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state = step(state)
        chex.assert_trees_all_close((loop.params(state), state.opt_state), (params, opt_state), rtol=1e-12)


@pytest.mark.parametrize(("zero", "expected"), [("drop", 0.0), ("exact", -0.1 / 1e-8)])
def test_the_derivative_at_a_gradient_of_zero_is_the_chosen_one(zero, expected):
    # Adam's first step, u = -0.1 g / (|g| + 1e-8), at g = λ = 0; optax's own derivative is NaN.
    loop = make(
        lambda params, lam, data: lam * params, lambda lam: optax.adam(0.1), lambda *_: jnp.zeros(()), zero=zero
    )
    after = lambda lam: loop.params(inner.step(loop, loop.init(KEY, lam, None), lam, None))
    np.testing.assert_allclose(jax.jit(jax.grad(after))(0.0), expected, rtol=1e-6)


def test_context_has_fresh_keys_the_step_and_the_model_state():
    def loss(params, hyperparams, batch, context):
        assert isinstance(context, base.Context)
        noise = jax.random.normal(context.key)
        return params * noise, {"seen": context.model_state["seen"].at[context.step].set(noise)}

    def init(key, hyperparams, data):
        return jnp.array(0.0), {"seen": jnp.zeros(6)}

    loop = make(loss, lambda hp: optax.sgd(0.1), init, with_context=True)
    state = inner.run(loop, num_steps=6)(KEY, LAM, DATA)
    assert len(set(state.model_state["seen"].tolist())) == 6
    # θ is minus the sum of what the loss saw: the gradient was taken at the same key.
    np.testing.assert_allclose(state.params, -0.1 * state.model_state["seen"].sum(), rtol=1e-12)
    other = inner.run(loop, num_steps=6)(jax.random.key(1), LAM, DATA)
    assert not set(state.model_state["seen"].tolist()) & set(other.model_state["seen"].tolist())


def test_the_key_of_a_loss_is_never_that_of_the_rows():
    keys = lambda key, step, data: jax.random.key_data(key)
    loop = make(lambda *_: 0.0, lambda hp: optax.sgd(0.1), sampler=keys, with_context=True, init=lambda *_: (0.0, None))
    state, of_rows, of_losses = loop.init(KEY, LAM, DATA), set(), set()
    for step in range(6):
        state = state._replace(step=jnp.int32(step))
        of_rows.add(tuple(loop.batch(state, DATA).tolist()))
        of_losses.add(tuple(jax.random.key_data(loop.context(state).key).tolist()))
    assert len(of_losses) == 6 and not of_rows & of_losses


def test_the_key_of_init_is_not_the_key_of_the_run():
    keys = [KEY]

    def init(key, hyperparams, data):
        keys.append(key)
        return problems.zeros(key, hyperparams, data)

    keys.append(make(init=init).init(KEY, LAM, DATA).key)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


def test_a_full_loss_may_leave_the_model_state_out():
    loop = make(
        lambda params, hyperparams, batch, context: problems.penalized(params, hyperparams, batch),
        init=lambda key, hyperparams, data: (problems.zeros(key, hyperparams, data), {"count": jnp.array(3)}),
        with_context=True,
    )
    state = inner.step(loop, loop.init(KEY, LAM, DATA), LAM, DATA)
    assert state.model_state == {"count": 3}


@pytest.mark.parametrize(
    ("returned", "remedy"),
    [
        (lambda value, state: value, "(loss, model_state)"),
        (lambda value, state: (value, {**state}), "`train=True`"),  # as from a network that only evaluates
        (lambda value, state: (value, {"norm": {"mean": state["norm"]["mean"] + 1}}), None),
        (lambda value, state: (value, state), None),
    ],
)
def test_a_loss_that_omits_running_statistics_logs_one_warning(returned, remedy, caplog):
    def loss(params, hyperparams, batch, context):
        return returned(problems.penalized(params, hyperparams, batch), context.model_state)

    init = lambda key, hyperparams, data: (problems.zeros(key, hyperparams, data), {"norm": {"mean": jnp.zeros(2)}})
    loop = make(loss, init=init, with_context=True)
    state = loop.init(KEY, LAM, DATA)
    for _ in range(2):
        state = inner.step(loop, state, LAM, DATA)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == (remedy is not None)
    assert all("norm/mean" in message and remedy in message for message in messages)


def test_the_gradient_is_an_argument_of_the_step():
    loop = make(optimizer=lambda hp: optax.sgd(1.0))
    state = loop.init(KEY, LAM, DATA)

    def ones(function, has_aux):
        assert has_aux
        return lambda params, *args: (jnp.ones_like(params), function(params, *args)[1])

    after = inner.step(loop, state, LAM, DATA, grad=ones)
    chex.assert_trees_all_close(after.params, -jnp.ones(problems.NUM_FEATURES))


# Training runs.


@pytest.mark.once
def test_run_equals_unroll():
    loop, lam = problems.EVERYTHING_LOOP, problems.EVERYTHING_LAM
    traced = jax.jit(inner.run(loop))
    for num_steps in (0, 5):
        both = lambda lam, n=num_steps: (
            inner.run(loop, n)(KEY, lam, DATA),
            hypergrad.unroll(loop, num_steps=n)(KEY, lam, DATA),
        )
        trained, expected = jax.jit(both)(lam)
        chex.assert_trees_all_close(numbers(trained), numbers(expected), rtol=1e-12, atol=1e-14)
        state = traced(KEY, lam, DATA, jnp.int32(num_steps))
        chex.assert_trees_all_close(numbers(state), numbers(expected), rtol=1e-12, atol=1e-14)
        assert trained.step == num_steps


def test_run_traces_every_step():
    loop = make()
    state, trace = jax.jit(inner.run(loop, num_steps=4, trace_fn=lambda s: {"params": s.params, "step": s.step}))(
        KEY, LAM, DATA
    )
    np.testing.assert_array_equal(trace["step"], [1, 2, 3, 4])
    for t in (1, 4):
        expected = inner.run(loop, num_steps=t)(KEY, LAM, DATA).params
        chex.assert_trees_all_close(trace["params"][t - 1], expected, rtol=1e-12)
    chex.assert_trees_all_equal(trace["params"][-1], state.params)


def plain_sgd(hyperparams):
    return optax.sgd(hyperparams["rate"])


def mean_of_run(hyperparams, data=DATA):
    """A scalar of a short training run, where λ is the start too."""
    loop = make(optimizer=plain_sgd, init=lambda key, hyperparams, data: hyperparams["penalty"])
    return inner.run(loop, num_steps=2)(KEY, hyperparams, data).params.mean()


def mean_of_trace(hyperparams):
    return inner.run(make(optimizer=plain_sgd), num_steps=2, trace_fn=lambda s: s.params)(KEY, hyperparams, DATA)[
        1
    ].mean()


def mean_of_traced_length(hyperparams):
    return inner.run(make(optimizer=plain_sgd))(KEY, hyperparams, DATA, jnp.int32(2)).params.mean()


def mean_of_closures(hyperparams, init=lambda hp: jnp.ones(4), penalty=lambda hp: 0.1, look=lambda hp: 1.0):
    """λ enters through the closures of the functions, and not through their arguments."""
    loop = make(
        lambda params, _, batch: penalty(hyperparams) * (params**2).sum(),
        lambda _: optax.sgd(0.1),
        lambda key, _, data: init(hyperparams),
    )
    run = inner.run(loop, num_steps=2, trace_fn=lambda state: look(hyperparams) * state.params)
    return run(KEY, None, DATA)[1].mean()


def scanned(function):
    return lambda lam: jax.lax.scan(lambda lam, _: (lam, function(lam)), lam, length=2)[1].sum()


def batched(function):
    return lambda lam: jax.vmap(lambda scale: function(jax.tree.map(lambda x: scale * x, lam)))(jnp.ones(2)).sum()


TANGENT = jax.tree.map(jnp.ones_like, LAM)
DIFFERENTIATED = {
    # Reverse mode raises at trace time, so nothing is compiled here.
    "reverse": lambda: jax.eval_shape(jax.grad(mean_of_run), LAM),
    "reverse_data": lambda: jax.eval_shape(jax.grad(mean_of_run, argnums=1), LAM, DATA),
    "reverse_of_jit": lambda: jax.eval_shape(jax.grad(jax.jit(mean_of_run)), LAM),
    "reverse_of_vmap": lambda: jax.eval_shape(jax.grad(batched(mean_of_run)), LAM),
    "vmap_of_reverse": lambda: jax.eval_shape(jax.vmap(jax.grad(mean_of_run)), jax.tree.map(lambda x: x[None], LAM)),
    "reverse_of_scan": lambda: jax.eval_shape(jax.grad(scanned(mean_of_run)), LAM),
    "reverse_of_checkpoint": lambda: jax.eval_shape(jax.grad(jax.checkpoint(mean_of_run)), LAM),
    "second_order": lambda: jax.eval_shape(jax.hessian(mean_of_run), LAM),
    "trace": lambda: jax.eval_shape(jax.grad(mean_of_trace), LAM),
    "traced_length": lambda: jax.eval_shape(jax.grad(mean_of_traced_length), LAM),
    "closure_of_init": lambda: jax.grad(lambda x: mean_of_closures(x, init=lambda x: x * jnp.ones(4)))(1.0),
    "closure_of_loss": lambda: jax.grad(lambda x: mean_of_closures(x, penalty=lambda x: x))(1.0),
    "closure_of_trace_fn": lambda: jax.grad(lambda x: mean_of_closures(x, look=lambda x: x))(1.0),
    # Forward mode raises when it is evaluated, or when the program is lowered.
    "forward": lambda: jax.jvp(mean_of_run, (LAM,), (TANGENT,)),
    "forward_of_jit": lambda: jax.jit(lambda: jax.jvp(mean_of_run, (LAM,), (TANGENT,))).lower(),
    "forward_of_vmap": lambda: jax.jit(lambda: jax.jvp(batched(mean_of_run), (LAM,), (TANGENT,))).lower(),
    "forward_of_scan": lambda: jax.jit(lambda: jax.jvp(scanned(mean_of_run), (LAM,), (TANGENT,))).lower(),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_derivative_of_run_raises_and_names_unroll(name):
    with pytest.raises(ValueError, match=r"`inner\.run` cannot be differentiated.*Use `hypergrad\.unroll\(loop"):
        DIFFERENTIATED[name]()


stop = jax.lax.stop_gradient


def beside(lam):
    return (lam["rate"] ** 2).sum()


CONSTANT = {  # functions of λ with the slope of `beside`, in which `run` is a constant
    "arguments": lambda lam: beside(lam) + mean_of_run(stop(lam)),
    "result": lambda lam: beside(lam) + stop(mean_of_run(lam)),
    "result_of_jit": lambda lam: beside(lam) + stop(jax.jit(mean_of_run)(lam)),
    "result_in_vmap": batched(lambda lam: (beside(lam) + stop(mean_of_run(lam))) / 2),
    "result_in_scan": scanned(lambda lam: (beside(lam) + stop(mean_of_run(lam))) / 2),
    "result_of_scan": lambda lam: beside(lam) + stop(scanned(mean_of_run)(lam)),
    "comparison": lambda lam: jnp.where(mean_of_run(lam) < jnp.inf, beside(lam), jnp.nan),
    "other_arguments": lambda lam: beside(lam) + mean_of_run(LAM),
}


def test_run_is_a_constant_within_a_differentiated_function_on_request():
    slopes = jax.jit(lambda lam: {name: jax.grad(function)(lam) for name, function in CONSTANT.items()})(LAM)
    for slope in slopes.values():
        np.testing.assert_allclose(slope["rate"], 2 * LAM["rate"], rtol=1e-12)
        assert not slope["penalty"].any()


def test_run_may_end_in_an_auxiliary_output_of_a_differentiated_function():
    value_and_slope = jax.value_and_grad(lambda lam: (beside(lam), mean_of_run(lam)), has_aux=True)
    (_, trained), slope = value_and_slope(LAM)
    assert trained == mean_of_run(LAM)
    np.testing.assert_allclose(slope["rate"], 2 * LAM["rate"], rtol=1e-12)


@pytest.mark.parametrize("init", [problems.zeros, lambda key, lam, data: lam["penalty"]])
@pytest.mark.parametrize("closes_over", [False, True])
def test_run_does_not_store_its_steps_within_a_differentiated_function(init, closes_over):
    def function(lam):
        own = (lambda key, _, data: init(key, lam, data)) if closes_over else init
        return beside(lam) + stop(inner.run(make(init=own), 137)(KEY, LAM if closes_over else lam, DATA).params.sum())

    assert "137" in str(jax.make_jaxpr(function)(LAM))  # the length of the loop
    assert "[137" not in str(jax.make_jaxpr(jax.grad(function))(LAM))  # the shape of what a loop keeps


@pytest.mark.once
def test_run_over_a_batch_of_keys_and_hyperparams():
    loop = problems.EVERYTHING_LOOP
    train = inner.run(loop, num_steps=3)
    single, keys = jax.jit(train), jax.random.split(KEY, 3)
    lams = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), problems.EVERYTHING_LAM)
    batched = jax.jit(jax.vmap(train, (0, 0, None)))(keys, lams, DATA).params
    for i in range(3):
        one = single(keys[i], jax.tree.map(lambda x, i=i: x[i], lams), DATA).params
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], batched), one, rtol=1e-9, atol=1e-12)


# Dtypes.


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.once
def test_float32_training_stays_float32(x64):
    with jax.enable_x64(x64):
        data = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), DATA)
        lam = {"rate": np.float32(0.1), "penalty": np.full(problems.NUM_FEATURES, 0.2, np.float32)}
        loop = make(optimizer=lambda hp: optax.adamw(hp["rate"]), sampler=inner.minibatch(4))
        state = jax.eval_shape(lambda lam: inner.run(loop, num_steps=3)(KEY, lam, data)._replace(key=None), lam)
        floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {leaf.dtype for leaf in floating} == {np.dtype(np.float32)}

        def objective(lam):
            return hypergrad.unroll(loop, num_steps=3, remat="sqrt")(KEY, lam, data).params.sum()

        grads = jax.jit(jax.grad(objective))(lam)
        chex.assert_tree_all_finite(grads)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("x64", [False, True])
def test_weak_types_of_an_init_become_strong(x64):
    with jax.enable_x64(x64):
        loop = make(
            lambda params, hp, batch, context: ((params["w"] - 1) ** 2, {"count": context.model_state["count"] + 1}),
            lambda hp: optax.sgd(hp["rate"]),
            lambda key, hp, data: ({"w": 0.5}, {"count": 0.0}),  # Python numbers
            with_context=True,
        )
        state = loop.init(KEY, {"rate": 0.1}, None)
        assert not any(jnp.asarray(leaf).weak_type for leaf in jax.tree.leaves((state.params, state.model_state)))
        after = jax.jit(inner.run(loop, num_steps=2))(KEY, {"rate": 0.1}, jnp.zeros(1))
        assert after.params["w"].dtype == jnp.result_type(float)
        assert after.model_state["count"] == 2


def test_the_outer_loss_is_over_the_validation_data_unless_told_otherwise():
    loss = lambda params, hyperparams, batch: jnp.sum(batch)
    task = base.Task(train=1.0, valid=2.0)
    assert inner.problem(make(), loss).outer_batch(KEY, task) == 2.0
    assert inner.problem(make(), loss, outer_batch=lambda key, task: task.train).outer_batch(KEY, task) == 1.0


def test_a_learned_momentum_does_not_widen_a_narrow_state():
    """θ in bfloat16, λ in float32: the state keeps its precision, and λ its gradient."""

    def trained(momentum):
        loop = make(
            loss=lambda params, hp, batch: ((params - 1) ** 2).mean(),
            optimizer=lambda hp: optax.sgd(0.1, momentum=hp["momentum"]),
            init=lambda key, hp, data: jnp.zeros(2, jnp.bfloat16),
        )
        state = hypergrad.unroll(loop, num_steps=5)(KEY, {"momentum": momentum}, DATA)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} == {jnp.dtype(jnp.bfloat16)}
        return state.params.astype(jnp.float32).sum()

    value, slope = jax.jit(jax.value_and_grad(trained))(jnp.float32(0.5))
    assert 0 < value < 2.5 and 0.5 < slope < 5


def test_the_outer_loss_judges_the_average_of_a_schedule_free_optimizer():
    """z ← z − r ℓ'(y), x ← (1 − 1/t) x + z / t, y = 0.9 x + 0.1 z (Defazio et al., 2024), by hand for ℓ = y²/2 − y."""

    def by_hand(rate):
        x = y = z = 0.0
        for t in range(1, 6):
            z = z - rate * (y - 1)
            x = (1 - 1 / t) * x + z / t
            y = 0.9 * x + 0.1 * z
        return x, y

    loop = inner.loop(
        lambda params, rate, batch: params**2 / 2 - params,
        lambda rate: optax.chain(optax.identity(), optax.contrib.schedule_free_sgd(rate, b1=0.9)),
        init=lambda key, rate, data: jnp.zeros(()),
    )
    solve = hypergrad.unroll(loop, num_steps=5)
    state = solve(KEY, jnp.array(0.3), None)
    np.testing.assert_allclose((loop.params(state), loop.iterate(state)), by_hand(0.3), rtol=1e-12)
    estimator = hypergrad.unrolled(inner.problem(loop, lambda params, rate, batch: params), num_steps=5)
    task = base.Task((), ())
    estimate, _ = estimator.estimate(jnp.array(0.3), task, estimator.init(KEY, jnp.array(0.3), task))
    slope = (by_hand(0.3 + 1e-6)[0] - by_hand(0.3 - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose((estimate.value, estimate.hypergrad), (by_hand(0.3)[0], slope), rtol=1e-8)


def _schedule_free_loop(optimizer):
    return inner.loop(
        lambda params, hp, batch: sum(((leaf - 1) ** 2).sum() for leaf in jax.tree.leaves(params)) / 2,
        optimizer,
        init=lambda key, hp, data: {"a": jnp.zeros(()), "b": {"c": jnp.zeros(2), "d": jnp.zeros(3)}},
    )


def _free(rate):
    return optax.contrib.schedule_free_sgd(rate, b1=0.5)


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        (lambda hp: optax.partition({"x": _free(0.1), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}), (0.1, None, None)),
        (
            lambda hp: optax.partition({"x": _free(0.1), "y": _free(0.2)}, {"a": "x", "b": {"c": "y", "d": "x"}}),
            (0.1, 0.2, 0.1),
        ),
        (lambda hp: transforms.per_parameter(_free)({"a": 0.1, "b": {"c": 0.2, "d": 0.3}}), (0.1, 0.2, 0.3)),
        (lambda hp: optax.masked(_free(0.1), {"a": False, "b": {"c": True, "d": True}}), ("y", 0.1, 0.1)),
    ],
)
def test_parts_of_the_parameters_may_have_an_average(optimizer, rates):
    def average(rate):
        x = y = z = 0.0
        for t in range(1, 6):
            z = z - rate * (y - 1)
            x = (1 - 1 / t) * x + z / t
            y = (x + z) / 2
        return x

    loop = _schedule_free_loop(optimizer)
    state = hypergrad.unroll(loop, num_steps=5)(KEY, (), None)
    a, b = loop.params(state)["a"], loop.params(state)["b"]
    for leaf, trained, rate in zip((a, b["c"], b["d"]), jax.tree.leaves(state.params), rates, strict=True):
        expected = trained if rate == "y" else 1 - 0.9**5 if rate is None else average(rate)
        np.testing.assert_allclose(leaf, np.full(leaf.shape, expected), rtol=1e-12)


def test_an_average_of_flat_parameters_is_refused():
    loop = _schedule_free_loop(lambda hp: optax.flatten(_free(0.1)))
    with pytest.raises(ValueError, match="average is unknown"):
        loop.params(loop.init(KEY, (), None))


def test_averages_of_a_batch_of_states_have_their_own_weights():
    loop = _schedule_free_loop(lambda hp: optax.contrib.schedule_free_sgd(0.1, b1=hp))
    states = jax.vmap(lambda hp: hypergrad.unroll(loop, num_steps=4)(KEY, hp, None))(jnp.array([0.5, 0.9]))
    chex.assert_trees_all_close(loop.params(states), jax.vmap(loop.params)(states), rtol=1e-14)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda adam: adam,
        lambda adam: optax.chain(optax.identity(), adam),
        lambda adam: optax.MultiSteps(adam, 2),
        lambda adam: optax.contrib.schedule_free(adam, 0.1),
    ],
)
def test_injected_hyperparameters_are_those_of_the_current_lambda(wrap):
    """`optax.inject_hyperparams` keeps them in its state, where they would stay those of the first step."""
    plain, injected = (
        _schedule_free_loop(lambda hp, make=make: wrap(make(hp["rate"], b1=hp["b1"])))
        for make in (optax.adam, optax.inject_hyperparams(optax.adam))
    )
    start = {"rate": 0.1, "b1": 0.9}
    states = [loop.init(KEY, start, None) for loop in (plain, injected)]
    for rate, b1 in ((0.1, 0.9), (0.3, 0.5), (0.02, 0.8), (0.2, 0.7)):
        hp = {"rate": jnp.array(rate), "b1": jnp.array(b1)}
        states = [inner.step(loop, s, hp, None) for loop, s in zip((plain, injected), states, strict=True)]
        chex.assert_trees_all_close(*(state.params for state in states), rtol=1e-12)


def test_no_transform_may_follow_a_schedule_free_one():
    follows = {
        "chain": lambda hp: optax.chain(_free(0.1), optax.scale(0.5)),
        "nested": lambda hp: optax.chain(optax.identity(), optax.chain(_free(0.1), optax.scale(0.5))),
        "partition": lambda hp: optax.partition(
            {"x": optax.chain(_free(0.1), optax.scale(0.5)), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}
        ),
        "names": lambda hp: optax.named_chain(("free", _free(0.1)), ("half", optax.scale(0.5))),
    }
    for optimizer in follows.values():
        with pytest.raises(ValueError, match="must be the last transform"):
            _schedule_free_loop(optimizer).init(KEY, (), None)


@pytest.mark.parametrize("others", [optax.sgd(0.1), optax.set_to_zero()])
def test_a_transform_of_other_parameters_may_follow_a_schedule_free_one(others):
    masks = ({"a": True, "b": False}, {"a": False, "b": True})
    chain = optax.chain(optax.masked(_free(0.1), masks[0]), optax.masked(others, masks[1]))
    states = [
        hypergrad.unroll(_schedule_free_loop(optimizer), num_steps=3)(KEY, (), None)
        for optimizer in (lambda hp: chain, lambda hp: _free(0.1))
    ]
    averages = [_schedule_free_loop(lambda hp: chain).params(state)["a"] for state in states[:1]]
    expected = _schedule_free_loop(lambda hp: _free(0.1)).params(states[1])["a"]
    np.testing.assert_allclose(averages[0], expected, rtol=1e-12)


def test_the_average_uses_the_current_weight_of_a_carried_state():
    loop = _schedule_free_loop(lambda hp: optax.chain(optax.identity(), optax.contrib.schedule_free_sgd(0.1, b1=hp)))
    x = y = z = 0.0
    state = loop.init(KEY, 0.9, None)
    for t, b1 in enumerate((0.9, 0.9, 0.5, 0.7), 1):
        x = (y - (1 - b1) * z) / b1  # from y and z, as optax does
        z = z - 0.1 * (y - 1)
        x = (1 - 1 / t) * x + z / t
        y = b1 * x + (1 - b1) * z
        state = jax.jit(inner.step, static_argnums=0)(loop, state, jnp.array(b1), None)
        np.testing.assert_allclose((loop.params(state)["a"], loop.iterate(state)["a"]), (x, y), rtol=1e-12)

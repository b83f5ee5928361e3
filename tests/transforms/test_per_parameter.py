"""Hyperparameters by parameter: each group is updated as if it were the only one; an error if groups are coupled."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from metaopt import hypergrad, inner, transforms

PARAMS = {
    "encoder": {"kernel": jnp.array([[0.5, -1.0], [0.3, 0.8]]), "bias": jnp.array([0.1, -0.2])},
    "head": {"kernel": jnp.array([[1.1], [-0.6]])},
}
GRADS = jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1, PARAMS)
RATES = {"encoder": {"kernel": 0.1, "bias": 0.02}, "head": {"kernel": 0.3}}


def train(optimizer, params=PARAMS, num_steps=3):
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def every_other(step, updates=None, params=None, **extra_args):
    return step % 2 == 0


FACTORIES = {
    "sgd": (optax.sgd, {"momentum": 0.9}),
    "adam": (optax.adam, {"b1": 0.5, "b2": 0.9}),
    "adamw": (optax.adamw, {"weight_decay": 0.3}),
    "lamb": (optax.lamb, {"weight_decay": 0.3}),
    "adafactor": (optax.adafactor, {"weight_decay_rate": 0.1}),
    "muon": (contrib.muon, {"weight_decay": 0.1}),
    # Branches of a `cond`, one of them without the gradient.
    "novograd": (optax.novograd, {"weight_decay": 0.3}),
    "conditionally_transform": (
        lambda rate, b1: optax.conditionally_transform(optax.adam(rate, b1), every_other),
        {"b1": 0.5},
    ),
    "clip_by_leaf": (
        lambda rate, norm: optax.chain(transforms.learnable_clip(norm, scope="leaf"), optax.sgd(rate)),
        {"norm": 0.4},
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.once
def test_each_parameter_is_trained_as_if_alone(name):
    factory, others = FACTORIES[name]
    # One hyperparameter by parameter, the others shared or by a prefix.
    by_prefix = {key: {"encoder": value, "head": value / 2} for key, value in others.items()}

    @jax.jit
    def together(rates):
        return train(transforms.per_parameter(factory)(rates, **by_prefix))

    trained = together(RATES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        pick = lambda tree, path=path: functools.reduce(lambda t, k: t[k.key] if isinstance(t, dict) else t, path, tree)
        setting = {key: pick(value) for key, value in by_prefix.items()}
        alone = jax.jit(lambda p, pick=pick, setting=setting: train(factory(pick(RATES), **setting), p))
        np.testing.assert_allclose(leaf, alone(pick(PARAMS)), rtol=1e-12)


def test_one_value_for_all_is_the_factory_itself():
    expected, states = train(optax.adamw(0.1, weight_decay=0.2)), []
    for make in (transforms.per_parameter(optax.adamw), transforms.per_group(optax.adamw, patterns={"all": ""})):
        optimizer = make(0.1, weight_decay=0.2)
        chex.assert_trees_all_equal(train(optimizer), expected)
        states.append(optimizer.init(PARAMS))
    chex.assert_trees_all_equal_structs(*states, optax.adamw(0.1).init(PARAMS))


@pytest.mark.parametrize("make", ["parameter", "group"])
def test_other_values_are_the_same_program(make):
    traces = []

    @jax.jit
    def step(first, second):
        traces.append(0)
        if make == "parameter":
            adamw = transforms.per_parameter(optax.adamw)({"encoder": first, "head": second}, weight_decay=second)
        else:
            grouped = transforms.per_group(optax.adamw, patterns={"kernels": "kernel$", "rest": ""})
            adamw = grouped(first, weight_decay={"kernels": first, "rest": second})
        return adamw.update(GRADS, adamw.init(PARAMS), PARAMS)[0]["head"]["kernel"]

    assert not np.array_equal(step(0.1, 0.2), step(0.3, 0.4)) and len(traces) == 1


def test_parameters_with_the_same_values_share_a_call():
    calls = []

    def factory(learning_rate, momentum):
        calls.append(learning_rate)
        return optax.sgd(learning_rate, momentum)

    optimizer = transforms.per_parameter(factory)({"encoder": 0.1, "head": 0.2}, momentum=0.9)
    state = optimizer.init(PARAMS)
    assert calls == [0.1, 0.2] and list(state.inner_states) == ["encoder/bias", "head/kernel"]
    # 0.9 is one value, whatever tree it is not.
    assert len(jax.tree.leaves(state)) == 3


def test_values_of_any_kind():
    rates = {"encoder": optax.linear_schedule(0.1, 0.0, 2), "head": 0.2}
    optimizer = transforms.per_parameter(optax.sgd)(
        rates, momentum={"encoder": None, "head": 0.9}, nesterov={"encoder": False, "head": True}
    )
    encoder = train(optax.sgd(optax.linear_schedule(0.1, 0.0, 2)), PARAMS["encoder"])
    head = train(optax.sgd(0.2, 0.9, nesterov=True), PARAMS["head"])
    chex.assert_trees_all_close(train(optimizer), {"encoder": encoder, "head": head}, rtol=1e-12)


def test_one_hyperparameter_an_entry():
    rates = jax.tree.map(lambda p: 0.1 + jnp.abs(p), PARAMS)
    optimizer = transforms.per_parameter(optax.adamw)(rates, b1=jax.tree.map(lambda p: 0.5 + 0 * p, PARAMS))
    unit = optax.adamw(1.0, b1=0.5)
    updates, _ = unit.update(GRADS, unit.init(PARAMS), PARAMS)
    expected = jax.tree.map(jnp.multiply, updates, rates)
    chex.assert_trees_all_close(optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0], expected, rtol=1e-12)


def quadratic(params, hyperparams, batch):
    return sum((jnp.sum(jnp.cos(2 * leaf)) for leaf in jax.tree.leaves(params)), start=jnp.zeros(()))


@pytest.mark.parametrize("labels", ["parameter", "group"])
@pytest.mark.once
def test_hypergradients_of_trees(labels):
    groups = {"kernels": "kernel$", "rest": ""}
    if labels == "parameter":
        factory = transforms.per_parameter(optax.adamw)
        decays = {"encoder": 0.1, "head": 0.2}
    else:
        factory = transforms.per_group(optax.adamw, patterns=groups)
        decays = {"kernels": 0.1, "rest": 0.3}
    hp = jax.tree.map(
        jnp.asarray, {"lr": RATES if labels == "parameter" else {"kernels": 0.1, "rest": 0.2}, "wd": decays}
    )
    loop = inner.loop(
        quadratic, lambda hp: factory(learning_rate=hp["lr"], weight_decay=hp["wd"]), init=lambda key, hp, data: PARAMS
    )
    solve = hypergrad.unroll(loop, num_steps=3)

    def outer(hp):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(solve(jax.random.key(0), hp, None).params))

    flat, unravel = jax.flatten_util.ravel_pytree(hp)
    value = jax.jit(jax.vmap(lambda flat: outer(unravel(flat))))
    steps = 1e-6 * jnp.eye(len(flat))
    expected = (value(flat[None] + steps) - value(flat[None] - steps)) / 2e-6
    gradient = jax.jit(jax.grad(lambda flat: outer(unravel(flat))))(flat)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    assert np.all(np.abs(expected) > 1e-4)


def test_groups_by_patterns_labels_and_masks():
    by_pattern = transforms.per_group(optax.adamw, patterns={"kernels": "kernel$", "rest": ""})
    by_label = transforms.per_group(optax.adamw, labels={"encoder": {"kernel": "k", "bias": "b"}, "head": "k"})
    by_mask = transforms.per_group(optax.adamw, labels=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    results = [
        train(by_pattern(0.1, weight_decay={"kernels": 0.5, "rest": 0.0})),
        train(by_label(0.1, weight_decay={"k": 0.5, "b": 0.0})),
        train(by_mask(0.1, weight_decay={True: 0.5, False: 0.0})),
        train(optax.adamw(0.1, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))),
    ]
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-12)


def by_leaves(change):
    """A transform that replaces the list of the gradients, in order."""
    return lambda rate: optax.chain(
        optax.stateless(lambda u, _: jax.tree.structure(u).unflatten(change(*jax.tree.leaves(u)))), optax.sgd(rate)
    )


def delayed(num_steps):
    """The norm of an earlier step's gradients scales the update, only through the state."""
    return lambda rate: optax.GradientTransformation(
        lambda params: [jnp.ones(())] * num_steps,
        lambda u, state, params=None: (optax.tree.scale(rate * state[0], u), [*state[1:], optax.tree.norm(u)]),
    )


def in_two_rounds(first, second, third):
    """The mean of the first leaf scales the third leaf, through a carry of a loop of two rounds."""
    mean, _ = jax.lax.fori_loop(0, 2, lambda _, carry: (carry[1], first.mean()), (1.0, 1.0))
    return [first, second, third * mean]


def in_the_next_round(first, second, third):
    _, scales = jax.lax.scan(lambda before, _: (first.mean(), before), 1.0, None, 2)
    return [first, second, third * scales.sum()]


def its_own_loop(*leaves):
    return jax.lax.fori_loop(0, 3, lambda step, us: [u / (step + 2) for u in us], list(leaves))


def scanned(*leaves):
    return [u[0] for u in jax.lax.scan(lambda _, x: (0.0, [2 * u for u in x]), 0.0, [u[None] for u in leaves])[1]]


def until(condition, leaves):
    body = lambda carry: (carry[0] + 1, [leaf / 2 for leaf in carry[1]])
    return jax.lax.while_loop(condition, body, (0, list(leaves)))[1]


COUPLED = {
    "apply_if_finite": lambda rate: optax.apply_if_finite(optax.sgd(rate), 3),
    "clip_by_global_norm": lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(rate)),
    "conditionally_transform": lambda rate: optax.conditionally_transform(
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(rate)), every_other
    ),
    "flatten": lambda rate: optax.flatten(optax.sgd(rate)),
    "lbfgs": lambda rate: optax.lbfgs(rate, linesearch=None),
    "multi_steps": lambda rate: optax.MultiSteps(
        optax.sgd(rate), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "normalize_by_update_norm": lambda rate: optax.chain(optax.normalize_by_update_norm(), optax.sgd(rate)),
    "polyak_sgd": lambda rate: optax.polyak_sgd(scaling=rate),
    **{name: getattr(contrib, name) for name in ("dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy")},
    "differentially_private": lambda rate: optax.chain(
        contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0)), optax.sgd(rate)
    ),
    "mechanize": lambda rate: contrib.mechanize(optax.sgd(rate)),
    "normalize": lambda rate: optax.chain(contrib.normalize(), optax.sgd(rate)),
    "sam": lambda rate: optax.GradientTransformation(
        *contrib.sam(optax.sgd(rate), optax.chain(contrib.normalize(), optax.sgd(0.1)))
    ),
    "one_step_late": delayed(1),
    "three_steps_late": delayed(3),
    "scan": by_leaves(in_two_rounds),
    "scanned": by_leaves(in_the_next_round),
    "while": by_leaves(lambda *leaves: until(lambda carry: jnp.abs(carry[1][0]).max() > 0.1, leaves)),
}


def refused(factory):
    """Whether `update` says so for two groups; with one value for all, nothing is split."""

    def update(rates):
        optimizer = transforms.per_parameter(factory)(rates)
        by_example = factory is COUPLED["differentially_private"]
        grads = jax.tree.map(lambda g: g[None], GRADS) if by_example else GRADS
        return optimizer.update(grads, optimizer.init(PARAMS), PARAMS, value=jnp.ones(()))

    jax.eval_shape(update, 0.1)
    try:
        jax.eval_shape(update, {"encoder": 0.1, "head": 0.2})
    except ValueError as error:
        assert "Chain transforms that need all parameters outside" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", COUPLED)
def test_transforms_that_read_all_parameters_are_rejected(name):
    assert refused(COUPLED[name])


@jax.custom_vjp
def halved(leaves):
    return [leaf / 2 for leaf in leaves]


halved.defvjp(lambda leaves: (halved(leaves), None), lambda _, g: (halved(g),))
APART = {
    "fromage": optax.fromage,
    "conditionally_mask": lambda rate: optax.conditionally_mask(optax.adam(rate), every_other),
    "multi_steps": lambda rate: optax.MultiSteps(optax.adam(rate), 2).gradient_transformation(),
    "monitor": lambda rate: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.sgd(rate)),
    "differentiable": lambda rate: transforms.differentiable(optax.adam(rate)),
    "custom_vjp": by_leaves(lambda *leaves: halved(list(leaves))),
    "jit": by_leaves(jax.jit(lambda *leaves: [u / 2 for u in leaves])),
    "checkpoint": by_leaves(jax.checkpoint(lambda *leaves: [2 * u for u in leaves])),
    "scan": by_leaves(its_own_loop),
    "scanned": by_leaves(scanned),
    "while": by_leaves(lambda *leaves: until(lambda carry: carry[0] < 3, leaves)),
}


@pytest.mark.parametrize("name", APART)
def test_transforms_that_read_one_parameter_are_accepted(name):
    assert not refused(APART[name])


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1))])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def by_kind(make):
    return {"layers": {layer: {kind: make(kind) for kind in ("kernel", "bias")} for layer in (0, 1)}}


RATE = {"kernel": 0.1, "bias": 0.3}
NNX = {
    "group_by_pattern": lambda: transforms.per_group(
        optax.adam, patterns={"kernel": "0/kernel$|1/kernel$", "bias": ""}
    )(RATE),
    "group_by_label": lambda: transforms.per_group(optax.adam, labels=by_kind(str))(RATE),
    "group_by_function": lambda: transforms.per_group(
        optax.adam, labels=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )({True: 0.1, False: 0.3}),
    "parameter_dict": lambda: transforms.per_parameter(optax.adam)(by_kind(RATE.get)),
    "parameter_state": lambda: transforms.per_parameter(optax.adam)(nnx.State(by_kind(RATE.get))),
    "parameter_variables": lambda: transforms.per_parameter(optax.adam)(
        jax.tree.map(lambda p: 0.1 if p.ndim > 1 else 0.3, nnx.state(Net(), nnx.Param))
    ),
}


@pytest.mark.parametrize("name", NNX)
@pytest.mark.once
def test_in_an_nnx_optimizer(name):
    model, x = Net(), jnp.array([[0.3, -1.0], [0.5, 0.2]])
    optimizer = nnx.Optimizer(model, NNX[name](), wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    labels = by_kind(str)
    expected = optax.partition({kind: optax.adam(rate) for kind, rate in RATE.items()}, labels)
    state = expected.init(params)
    for _ in range(2):
        grads = nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model)
        updates, state = expected.update(nnx.to_pure_dict(grads), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads)
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-12)


def test_a_parameter_called_value_keeps_its_name():
    grouped = transforms.per_group(optax.sgd, patterns={"v": "^value$", "rest": ""})
    updates, _ = (sgd := grouped({"v": 1.0, "rest": 0.0})).update(
        p := {"value": jnp.ones(1), "w": jnp.ones(1)}, sgd.init(p), p
    )
    assert updates["value"] == -1 and updates["w"] == 0


def test_it_composes():
    adamw = transforms.per_parameter(optax.adamw)({"encoder": 0.1, "head": 0.2})
    chained = optax.chain(optax.clip_by_global_norm(0.1), adamw)
    masked = optax.masked(adamw, {"encoder": {"kernel": True, "bias": False}, "head": True})
    steps = optax.MultiSteps(adamw, every_k_schedule=2)
    for optimizer in (chained, masked, steps):
        chex.assert_tree_all_finite(jax.jit(lambda o=optimizer: train(o))())


def test_inject_hyperparams_finds_the_arguments():
    make = optax.inject_hyperparams(transforms.per_parameter(optax.adamw))
    optimizer = make(learning_rate={"encoder": 0.1, "head": 0.2}, weight_decay=0.3)
    state = optimizer.init(PARAMS)
    assert state.hyperparams["weight_decay"] == 0.3
    expected = transforms.per_parameter(optax.adamw)({"encoder": 0.1, "head": 0.2}, weight_decay=0.3)
    chex.assert_trees_all_close(
        optimizer.update(GRADS, state, PARAMS)[0], expected.update(GRADS, expected.init(PARAMS), PARAMS)[0], rtol=1e-12
    )

"""What transforms reject, with the message: arguments, λ that they do not use, and trees of another form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import base, hypergrad, inner, spaces, transforms

PARAMS = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 1))}}
PAIR = [optax.sgd(0.1), optax.adam(0.1)]
SGD = optax.sgd(0.1)
WEIGHTS = transforms.init_learned(jax.random.key(0))
VECTORS = {"w": jnp.array([0.5, -1.0]), "b": jnp.array([0.3])}
adam = functools.partial(transforms.self_tuning, lambda hp: optax.adam(hp["rate"]), {"rate": 1e-3}, SGD)
adam_of = lambda rate: transforms.self_tuning(optax.adam, rate, SGD)
RANGE = spaces.interval(1e-3, 1.0, log=True)
injected = functools.partial(
    transforms.self_tuning, lambda hp: optax.inject_hyperparams(optax.adam)(hp["rate"]), {"rate": 1e-3}, SGD
)
forgotten = functools.partial(
    transforms.self_tuning, lambda hp: optax.adamw(hp["rate"]), {"rate": 1e-3, "decay": 0.1}, SGD, mode="reverse"
)


def tuned_update(params, transform, *, with_params=True, **extra):
    """The first update, by gradients that are the parameters."""
    return transform.update(params, transform.init(params), params if with_params else None, **extra)


def update_of_one_of_a_pair():
    """A leaf of λ for two parameters, of which one is there, is needed."""
    pairs = {"w": {"in": jnp.ones(2), "out": jnp.ones(2)}, "b": jnp.ones(2)}
    tuned = transforms.self_tuning(lambda hp: optax.sgd(hp["b"]), {"w": 0.1, "b": 0.2}, SGD)
    return tuned_update(pairs, optax.masked(tuned, {"w": {"in": True, "out": False}, "b": True}))


def update_with_lookahead():
    ahead = transforms.self_tuning(lambda hp: optax.lookahead(optax.adam(hp), 2, 0.5), 0.1, SGD)
    pair = optax.LookaheadParams.init_synced(VECTORS)
    return ahead.update(VECTORS, ahead.init(pair), pair)


def update_by_a_schedule():
    scheduled = lambda peak: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, peak, 3, 10))
    optimizer = transforms.self_tuning(scheduled, 0.1, SGD)
    return jax.jit(optimizer.update)(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))


def init_of_two(projection_fn):
    two = lambda hp: optax.chain(optax.sgd(hp["a"]), optax.add_decayed_weights(hp["b"]))
    return transforms.self_tuning(two, {"a": 0.3, "b": 0.2}, SGD, projection_fn=projection_fn).init(jnp.ones(2))


REFUSED = [
    (lambda: transforms.differentiable(optax.sgd(0.1), zero="keep"), '`zero` must be "drop" or "exact"; got \'keep\''),
    (lambda: transforms.learnable_clip(np.ones(2)), r"`max_norm` must be one number; got shape \(2,\)"),
    *((lambda c=c: transforms.learnable_clip(c), "`max_norm` must be positive; got") for c in (0.0, -1.0, np.nan)),
    (lambda: transforms.learnable_clip(1.0, sharpness=-2.0), "`sharpness` must be positive, or None; got -2.0"),
    (lambda: transforms.learnable_accumulation(jnp.array([0.9]), jnp.ones(2)), "`weights` must have one entry"),
    (lambda: transforms.mixture(PAIR, jnp.ones(3)), "one weight for each of the 2 transforms"),
    (lambda: transforms.mixture(PAIR, {"a": 0.5}), r"leaf of shape \(\)"),
    (lambda: transforms.mixture(PAIR, [0.5, 0.5, 0.0]), r"leaf of shape \(3,\)"),
    (
        lambda: update(transforms.mixture([optax.sgd(0.1), optax.contrib.schedule_free_sgd(0.1)], [0.5, 0.5])),
        r"the schedule-free optimizers \[1\]\. .* Wrap the mixture instead",
    ),
    (lambda: update(transforms.mixture(PAIR, {"a": [0.5, 0.5]})), "pytree structure error"),  # JAX's error
    (lambda: transforms.per_parameter(optax.sgd)({"encoder": 0.1, "tail": 0.1}).init(PARAMS), "pytree structure error"),
    (
        lambda: transforms.per_parameter(optax.sgd)({"a/b": 0.1, "a": {"b": 0.2}}).init(
            {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
        ),
        "Two parameters have the same path",
    ),
    (lambda: transforms.per_group(optax.sgd), "either `patterns` or `labels`"),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"kernels": "kernel"})(0.1).init(PARAMS),
        "encoder/bias matches no pattern",
    ),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"all": "", "late": "head"})(0.1).init(PARAMS),
        r"The groups \['late'\] have no parameters: their patterns match none",
    ),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"a": "kernel", "b": ""})(learning_rate={"a": 0.1}).init(
            PARAMS
        ),
        "hyperparameter .* must be one value, or a dict with the groups",
    ),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"a": "kernel", "b": ""})({"a": 0.1}).init(PARAMS),
        "hyperparameter 'learning_rate' must be one value",
    ),
    (lambda: transforms.per_group(optax.sgd, labels={"encoder": "a"})(0.1).init(PARAMS), "pytree structure error"),
    (lambda: transforms.knot_schedule([0.1, 0.2]), "either `num_steps` or `knots`"),
    (lambda: transforms.knot_schedule([0.1, 0.2, 0.3], knots=[10, 0, 5]), "`knots` must be steps in increasing order"),
    (lambda: transforms.knot_schedule([0.1, 0.2], knots=jnp.array([5.0, 0.0])), "`knots` must be steps in increasing"),
    (
        lambda: transforms.cosine_schedule(0.1, num_steps=5, warmup_steps=10),
        r"`warmup_steps` must fit into `num_steps`; got 10.0 of 5.0",
    ),
    *(
        (lambda num=num: transforms.knot_schedule([0.1, 0.2], num_steps=num), "`num_steps` must be at least 1; got")
        for num in (0, -1)
    ),
    (
        lambda: tune(lambda hp: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, hp["peak"], 2, 8))),
        "`optimizer` needs the concrete value of a hyperparameter.*use `transforms.cosine_schedule`",
    ),
    (
        lambda: transforms.wsd_schedule(0.1, num_steps=6, warmup_steps=4, decay_steps=jnp.array(2.5)),
        r"must fit into `num_steps`; got 4.0 \+ 2.5 of 6.0",
    ),
    # Optimizers that tune themselves.
    (
        lambda: transforms.self_tuning(optax.sgd, 0.1, 0.3),
        r"`tuner` must be an optax transform, such as `optax.adam\(0.1\)`; got 0.3",
    ),
    (lambda: transforms.self_tuning(SGD, 0.1, SGD), "`factory` must be a function of λ"),
    (lambda: adam_of(RANGE), r"Instead of a space, pass `spaces.to_unconstrained\(space"),
    (lambda: adam_of(optax.constant_schedule(0.1)), "A schedule belongs into `factory`"),
    (lambda: adam_of(spaces.to_unconstrained(RANGE, 0.5)), 'may be negative, and .* pass `rule="additive"`'),
    (lambda: tuned_update(VECTORS, adam(), with_params=False), r"got None. Call `update\(grads, state, params\)`"),
    (
        lambda: tuned_update(VECTORS, adam(), valid_grad_fn=VECTORS),
        "`valid_grad_fn` must be a function `params -> gradient`.* got a dict",
    ),
    (
        lambda: transforms.self_tuning(lambda hp: optax.masked(optax.sgd(hp), {"a": True}), 0.1, SGD).init(PARAMS),
        "mask or labels must have their structure",
    ),
    (lambda: transforms.self_tuning(optax.sgd, 0.1, SGD, rule="exact"), "`rule` must be \"additive\".*got 'exact'"),
    (lambda: transforms.self_tuning(optax.sgd, 0.1, SGD, mode="both"), "`mode` must be \"forward\" or.*got .*'both'"),
    *(
        (
            lambda options=options: transforms.self_tuning(optax.sgd, 0.1, SGD, **options),
            r"`discount` must be in \[0, 1\]",
        )
        for options in ({"discount": 1.5}, {"discount": -0.1}, {"gap": -1.0})
    ),
    (lambda: transforms.self_tuning(optax.sgd, 0.1, SGD, discount=0.9, mode="reverse"), '`mode="reverse"` diff'),
    (lambda: transforms.self_tuning(optax.sgd, 0.1, SGD, rule="cosine", mode="reverse"), '`mode="reverse"` diff'),
    (
        lambda: transforms.self_tuning(optax.sgd, {"d": 0.0}, SGD),
        r"`hyperparams` must be .*positive.*got 0.0 at \['d'\]",
    ),
    (
        lambda: transforms.self_tuning(optax.sgd, {"d": "0.1"}, SGD),
        "`hyperparams` must be finite real numbers.*got '0.1'",
    ),
    *(
        (
            lambda value=value: transforms.self_tuning(optax.sgd, value, SGD, rule="additive"),
            "must be finite real numbers",
        )
        for value in (1j, np.inf, np.nan, np.array([0.1, -np.inf]))
    ),
    (
        lambda: tuned_update(jnp.ones(2), adam(discount=0.5)),
        "`discount` above 0 needs the gradient of the training loss as a function",
    ),
    (
        lambda: tuned_update(jnp.ones(2), adam(), with_params=False),
        "The parameters, .*, must be a tree like the gradients.*got None",
    ),
    (update_by_a_schedule, "`factory` needs the concrete value of a hyperparameter.*`transforms.cosine_schedule`"),
    (
        lambda: tuned_update(jnp.ones(2), injected()),
        r"\['rate'\] of λ do not change the updates.*`optax.inject_hyperparams` does",
    ),
    (lambda: tuned_update(jnp.ones(2), forgotten()), r"The leaves \['decay'\] of λ do not change"),
    (
        lambda: tuned_update(jnp.ones(2), transforms.self_tuning(lambda hp: optax.sgd(0.1), 0.1, optax.sgd(0.1))),
        "λ does not change the updates",
    ),
    (update_of_one_of_a_pair, r"The leaves \['w'\] of λ do not change.* Some parameters are masked out"),
    *(  # λ whose parameters are all masked out
        (
            lambda make=make: tuned_update(VECTORS, optax.masked(make(), {"w": True, "b": False})),
            "do not change the updates.* Some parameters are masked out here",
        )
        for make in (forgotten, injected)
    ),
    (
        lambda: adam(projection_fn=lambda hp: hp["rate"]).init(jnp.ones(2)),
        "The result of `projection_fn` must be a tree like λ.*; got",
    ),
    (
        lambda: adam(projection_fn=lambda hp: {"rate": jnp.ones(2)}).init(jnp.ones(2)),
        r"The result of `projection_fn` must be a tree like λ.*\[2\]",
    ),
    (lambda: init_of_two(lambda hp: {**hp, "b": 0.0}), "The results of `projection_fn` must be .*positive unless"),
    *(
        (lambda grad=grad: tuned_update(VECTORS, adam(), valid_grad_fn=grad), message)
        for grad, message in [
            (lambda p: (1.0, p), "The result of `valid_grad_fn` must be a tree like the gradients.*value_and_grad"),
            (
                lambda p: {**p, "w": jnp.ones(3)},
                r"The result of `valid_grad_fn` .*'w': .*\[2\]'.*; got .*'w': .*\[3\]'",
            ),
        ]
    ),
    *(
        (lambda grad=grad: tuned_update(VECTORS, adam(discount=0.5), grad_fn=grad), message)
        for grad, message in [
            (lambda p: (1.0, p), "The result of `grad_fn` must be a tree like the gradients"),
            (lambda p: {**p, "w": jnp.ones(3)}, r"The result of `grad_fn` .*; got .*'w': .*\[3\]'"),
            (lambda p: {**p, "w": jnp.ones(2, int)}, r"The result of `grad_fn` .*; got .*'w': 'int"),
            (lambda p: {**p, "w": 1j * p["w"]}, r"The result of `grad_fn` .*; got .*'w': 'complex"),
        ]
    ),
    (update_with_lookahead, "The parameters, .*, must be a tree like the gradients.*belong around"),
    # The learned optimizer.
    *(
        (lambda weights=weights: transforms.learned(weights), "`weights` must be meta-parameters")
        for weights in ({"w": jnp.zeros(2)}, WEIGHTS._replace(layers=[]), WEIGHTS._replace(layers={"0": {"w": 1.0}}))
    ),
    (lambda: tuned_update(VECTORS, transforms.learned(WEIGHTS), with_params=False), "needs the parameters"),
    (lambda: metaopt.save("never.npz", WEIGHTS._replace(decays={})), "`weights` must be"),
]


def update(transform):
    return transform.update(PARAMS, transform.init(PARAMS))


def tune(optimizer):
    """A hypergradient of λ = {"peak": ...} through two steps of an inner optimizer."""
    loss = lambda params, hyperparams, batch: ((params - batch) ** 2).sum()
    loop = inner.loop(loss, optimizer, init=lambda key, hyperparams, data: jnp.zeros(2))
    estimator = hypergrad.unrolled(inner.problem(loop, loss), num_steps=2)
    task = base.Task(jnp.ones(2), jnp.ones(2))
    return estimator.estimate({"peak": jnp.array(0.1)}, task, jax.random.key(0))


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: transforms.learnable_clip(1.0, scope="block"), "block"),
        (lambda: transforms.knot_schedule([0.1, 0.2], num_steps=3, monotone="up"), "up"),
    ],
)
def test_unknown_options_are_an_error_of_python(call, name):
    with pytest.raises(KeyError, match=name):
        call()


@pytest.mark.parametrize("name", ["val_grad_fn", "valid_grads_fn", "validbatch", "grads_fn"])
def test_misspelt_arguments_of_an_update(name):
    with pytest.raises(TypeError, match=f"no argument '{name}'. Did you mean"):
        tuned_update(VECTORS, adam(), **{name: lambda params: params})
    tuned_update(VECTORS, adam(), value=1.0, grad=VECTORS)  # optax's own extra arguments


def test_weights_that_do_not_come_with_the_library():
    with pytest.raises(FileNotFoundError, match="learned_large"):
        transforms.learned("large")

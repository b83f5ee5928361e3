"""What the factories of transforms reject, with the message. (`test_self_tuning` and `test_learned` have their own.)"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, inner, transforms

PARAMS = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 1))}}
PAIR = [optax.sgd(0.1), optax.adam(0.1)]
REFUSED = [
    (lambda: transforms.differentiable(optax.sgd(0.1), zero="keep"), '`zero` must be "drop" or "exact"; got \'keep\''),
    (lambda: transforms.learnable_clip(1.0, scope="block"), '`scope` must be "global" or "leaf"'),
    (lambda: transforms.learnable_clip(1.0, sharpness=0), "`sharpness` must be positive, or None; got 0"),
    (lambda: transforms.learnable_clip(-1.0), "`max_norm` must be positive; got -1"),
    (lambda: transforms.learnable_clip(np.ones(2)), r"`max_norm` must be one number; got shape \(2,\)"),
    (lambda: transforms.learnable_accumulation(jnp.array([0.9]), jnp.ones(2)), "`weights` must be one for each"),
    (lambda: transforms.mixture(PAIR, jnp.ones(3)), "one weight for each of the 2 transforms"),
    (lambda: transforms.mixture(PAIR, {"a": 0.5}), r"leaf of shape \(\)"),
    (lambda: transforms.mixture(PAIR, [0.5, 0.5, 0.0]), r"leaf of shape \(3,\)"),
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
        "encoder/bias fits no pattern",
    ),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"all": "", "late": "head"})(0.1).init(PARAMS),
        r"\['late'\] find no parameter",
    ),
    (
        lambda: transforms.per_group(optax.sgd, patterns={"a": "kernel", "b": ""})(learning_rate={"a": 0.1}).init(
            PARAMS
        ),
        "hyperparameter .* must be one value, or a dict with the groups",
    ),
    (lambda: transforms.per_group(optax.sgd, labels={"encoder": "a"})(0.1).init(PARAMS), "pytree structure error"),
    (lambda: transforms.knot_schedule([0.1, 0.2]), "either `num_steps` or `knots`"),
    (lambda: transforms.knot_schedule([0.1, 0.2], num_steps=0), "`num_steps` must be at least 1; got 0"),
    (lambda: transforms.knot_schedule([0.1, 0.2], num_steps=3, monotone="up"), "`monotone` must be None"),
    (
        lambda: tune(lambda hp: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, hp["peak"], 2, 8))),
        "`optimizer` needs the concrete value of a hyperparameter.*use `transforms.cosine_schedule`",
    ),
    (
        lambda: transforms.wsd_schedule(0.1, num_steps=6, warmup_steps=4, decay_steps=jnp.array(2.5)),
        r"must fit into `num_steps`; got 4.0 \+ 2.5 of 6.0",
    ),
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

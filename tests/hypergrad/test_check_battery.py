"""`hypergrad.check` passes correct gradients of many kinds of problems, and finds an error of 2 % in one leaf of each.

Every model below meets one or more of the settings below; single problems follow. All gradients are correct by
construction (JAX differentiates), so whatever `check` rejects is a mistake of `check`. The error of 2 % is a factor on
one leaf of the hypergradient. A biased rule only promises an uphill direction, so an error of 2 % breaks no promise:
biased rules are checked at their exact limit, as exact ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from metaopt import base, hypergrad, inner, spaces
from metaopt.hypergrad import _check

CLASSES, ROWS, STEPS = 3, 12, 2
ROUNDED_ZERO = 2.4e-7  # the coordinate of a log interval's default, rounded


def images(seed, num=ROWS):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(num, 5, 5, 1)),
        "y": rng.integers(CLASSES, size=num),
        "word": rng.integers(7, size=num),
    }


# Models: parameters and statistics to start from, and `apply(params, stats, batch, key) -> (logits, stats)`, which
# trains if it gets a key. Initial values are NumPy arrays, because random numbers take the compiler half of its time.


class Network(NamedTuple):
    params: Any
    stats: Any
    apply: Callable


def weights(*shape):
    size = np.prod(shape)
    return np.cos(np.arange(size) ** 2 + size).reshape(shape) * (2 / np.prod(shape[:-1])) ** 0.5


def two_layers(between, hidden=6, stats=None):
    """Dense, `between`, dense; `between(h, stats, key) -> (h, stats)`."""

    def apply(params, stats, batch, key):
        h, stats = between(batch["x"].reshape(len(batch["x"]), -1) @ params["in"], stats, key)
        return h @ params["out"], stats

    return Network({"in": weights(25, 6), "out": weights(hidden, CLASSES)}, stats, apply)


def batch_norm(h, stats, key):
    mean, var = (stats["mean"], stats["var"]) if key is None else (h.mean(0), h.var(0))
    new = {"mean": 0.7 * stats["mean"] + 0.3 * mean, "var": 0.7 * stats["var"] + 0.3 * var}
    return jax.nn.relu((h - mean[None]) / jnp.sqrt(var + 1e-2)[None]), stats if key is None else new


def dropout(h, stats, key):
    keep = 1.0 if key is None else jax.random.bernoulli(key, 0.7, h.shape) / 0.7
    return jnp.tanh(h) * keep, stats


def convolution():
    def apply(params, stats, batch, key):
        x, kernel = batch["x"].astype(params["kernel"].dtype), params["kernel"]
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = nn.max_pool(jax.nn.relu(h + params["bias"][None, None, None]), (2, 2), strides=(2, 2))
        return h.reshape(len(x), -1) @ params["out"], stats

    return Network({"kernel": weights(3, 3, 1, 2), "bias": np.zeros(2), "out": weights(8, CLASSES)}, None, apply)


def embedding():
    def apply(params, stats, batch, key):
        return jnp.sin(params["table"][batch["word"]]) @ params["out"], stats

    return Network({"table": weights(7, 4), "out": weights(4, CLASSES)}, None, apply)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, use_bias=False)(x.reshape(len(x), -1))
        return nn.Dense(CLASSES)(nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.7)(x)))


def linen():
    model = inner.from_linen(Linen(), images(0)["x"])
    params, stats = jax.tree.map(np.asarray, model.init(jax.random.key(0), None, None))

    def apply(params, stats, batch, key):
        context = base.Context(jax.random.key(0), jnp.zeros([], jnp.int32), stats)
        return model.apply(params, context, batch["x"], train=key is not None)

    return Network(params, stats, apply)


MODELS = {
    "linear": lambda: two_layers(lambda h, stats, key: (h, stats)),
    "relu": lambda: two_layers(lambda h, stats, key: (jax.nn.relu(h), stats)),
    "maxout": lambda: two_layers(lambda h, stats, key: (h.reshape(-1, 3, 2).max(-1), stats), hidden=3),
    "batch norm": lambda: two_layers(batch_norm, stats={"mean": np.zeros(6), "var": np.ones(6)}),
    "dropout": lambda: two_layers(dropout),
    "convolution": convolution,
    "embedding": embedding,
    "linen": linen,
}


# Settings: how the model trains, in which precision, by which estimator, and what λ is.


class Setting(NamedTuple):
    optimizer: Callable
    hyperparams: Any
    estimator: Callable = partial(hypergrad.unrolled, num_steps=STEPS, grad=jax.grad)  # the faster one to compile
    sampler: Any = None
    precision: str = "float64"  # "float32": everything; "captured": arrays and casts within the loss
    space: Any = None


def natural(hp):
    """λ in the units of the optimizer: logarithms of rate and decay."""
    return {"rate": jnp.exp(hp["rate"]), "decay": jnp.exp(hp["decay"]), **{k: hp[k] for k in ("classes", "shift")}}


LAM = {
    "rate": np.log(0.1),
    "decay": np.log(0.02),
    "classes": np.array([0.0, ROUNDED_ZERO, -ROUNDED_ZERO]),  # log weights of the classes
    "shift": np.array(ROUNDED_ZERO),  # added to the labels
}
SPACE = {
    "rate": spaces.interval(1e-2, 1.0, log=True),
    "decay": spaces.positive(0.02),
    "classes": spaces.real(0.0, shape=(CLASSES,)),
    "shift": spaces.interval(-0.5, 0.5),
}
SCALES = {**LAM, "rate": np.array(1e-3), "decay": np.array(1e-5), "classes": np.array([3e3, 1e3, 2e3])}


def adamw(hp):
    return optax.adamw(hp["rate"], weight_decay=hp["decay"])


def decayed_sgd(hp, momentum=None):
    return optax.chain(optax.add_decayed_weights(hp["decay"]), optax.sgd(hp["rate"], momentum=momentum))


def decayed_adam(hp):
    return optax.chain(optax.add_decayed_weights(hp["decay"]), optax.adam(hp["rate"]))


SETTINGS = {
    "sgd": Setting(
        lambda hp: decayed_sgd(natural(hp)), LAM, partial(hypergrad.unrolled, num_steps=STEPS, remat="step")
    ),
    "adam in float32": Setting(lambda hp: decayed_adam(natural(hp)), LAM, precision="float32"),
    "adamw with captured float32": Setting(lambda hp: adamw(natural(hp)), LAM, precision="captured"),
    "constrained": Setting(lambda hp: decayed_sgd(hp, momentum=0.5), None, space=SPACE, precision="float32"),
    "scales, minibatches": Setting(decayed_sgd, SCALES, sampler=inner.minibatch(8)),
}


def network_problem(model, setting):
    """Training `model` as `setting` says: weighted cross entropy, λ in the optimizer and in both losses."""
    network, dtype = MODELS[model](), jnp.float64 if setting.precision == "float64" else jnp.float32
    captured = np.linspace(0.5, 1.5, CLASSES, dtype=np.float32)

    def losses(params, hp, batch, stats, key):
        logits, stats = network.apply(params, stats, batch, key)
        if setting.precision == "captured":
            logits = (logits * captured[None]).astype(jnp.float32)
        target = optax.smooth_labels(jax.nn.one_hot(batch["y"], CLASSES, dtype=logits.dtype), 0.1)
        target = target + hp["shift"] * jnp.linspace(-1, 1, CLASSES)[None]
        return optax.softmax_cross_entropy(logits, target), stats

    def class_weights(hp):
        large = np.max(np.abs(setting.hyperparams["classes"])) > 1 if setting.hyperparams else False
        return hp["classes"] / 1e3 if large else jnp.exp(hp["classes"])

    def loss(params, hp, batch, context):
        rows, stats = losses(params, hp, batch, context.model_state, context.key)
        return (class_weights(hp)[batch["y"]] * rows).mean(), stats

    def outer_loss(params, hp, batch, context):
        return losses(params, hp, batch, context.model_state, None)[0].mean()

    def init(key, hp, data):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), (network.params, network.stats))

    loop = inner.loop(loss, setting.optimizer, init=init, sampler=setting.sampler, with_context=True)
    problem = inner.problem(loop, outer_loss, with_context=True)
    task, hyperparams = base.Task(images(0), images(1)), setting.hyperparams
    if setting.space is not None:
        problem = spaces.constrain(problem, setting.space)
        hyperparams = spaces.to_unconstrained(setting.space, spaces.default(setting.space))
    return setting.estimator(problem), hyperparams, task


# Every model meets every setting.
GRID = {
    f"{model}, {name}": (partial(network_problem, model, setting), setting.precision)
    for model in MODELS
    for name, setting in SETTINGS.items()
}


# Single problems: other rules, and functions that are hard for finite differences.


def exact(rule, **options):
    """A rule at its exact limit."""
    return rule(problems.RIDGE, **options)._replace(kind="exact"), problems.LAM, problems.TASK


def ridge(rule, **options):
    return rule(problems.RIDGE, **options), problems.LAM, problems.TASK


def function(fn, hyperparams):
    return hypergrad.direct(lambda hp, task, key: fn(hp)), hyperparams, problems.TASK


def conv_net_start():
    """MAML: λ is the start of a ConvNet, all in float32."""
    network = convolution()

    def loss(params, hp, batch):
        logits, _ = network.apply(params, None, batch, None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loop = inner.loop(loss, lambda hp: optax.sgd(0.5), init=lambda key, hp, data: hp)
    estimator = hypergrad.unrolled(inner.problem(loop, loss), num_steps=STEPS, grad=jax.grad)
    return estimator, network.params, base.Task(images(0), images(1))


def noisy_exact():
    """The exact hypergradient and a little noise of mean zero."""
    estimator = hypergrad.unrolled(problems.RIDGE, num_steps=STEPS)

    def estimate(hyperparams, task, state):
        out, state = estimator.estimate(hyperparams, task, state)
        factor = 1 + 0.01 * jax.random.normal(state)
        return out._replace(hypergrad=jax.tree.map(lambda g: g * factor, out.hypergrad)), state

    return base.Estimator(estimator.init, estimate, "unbiased"), problems.LAM, problems.TASK


def one_penalty():
    """Ridge regression with one penalty for all features: evolution strategies of one dimension."""
    loop = inner.loop(
        lambda params, hp, batch: problems.penalized(params, {"penalty": jnp.exp(hp[None])}, batch),
        lambda hp: optax.sgd(0.4),
        init=problems.zeros,
    )
    return inner.problem(loop, lambda params, hp, batch: problems.mean_squares(params, batch))


FEW_SAMPLES = {"num_samples": 8, "num_estimates": 1}
SINGLE = {
    "forward": partial(ridge, hypergrad.forward, num_steps=STEPS),
    "one window": partial(ridge, hypergrad.truncated, num_steps=STEPS, truncation_length=STEPS, outer="mean"),
    "checkpoints": partial(ridge, hypergrad.unrolled, num_steps=9, remat="sqrt"),
    "implicit at rest": partial(exact, hypergrad.implicit, num_steps=200),
    "warm implicit at rest": partial(exact, hypergrad.warm_implicit, num_steps=300, adjoint_rate=0.4),
    "one step ahead": partial(ridge, hypergrad.lookahead, num_steps=STEPS, commit=0),
    "MAML, dropout, statistics, minibatches": lambda: (
        hypergrad.unrolled(problems.EVERYTHING, num_steps=STEPS),
        problems.EVERYTHING_LAM,
        problems.TASK,
    ),
    "MAML of a ConvNet in float32": conv_net_start,
    "over tasks": lambda: (
        hypergrad.over_tasks(hypergrad.unrolled(problems.masked_problem(), num_steps=STEPS)),
        problems.LAM,
        problems.stack(map(problems.pad, problems.unpadded_tasks())),
    ),
    "evolution": lambda: (
        hypergrad.evolution(one_penalty(), num_steps=STEPS, sigma=0.1, num_pairs=30_000),
        jnp.array(-1.0),
        problems.TASK,
    ),
    "mixture with evolution": lambda: (
        hypergrad.mix_with_es(hypergrad.unrolled(problems.RIDGE, num_steps=STEPS), sigma=1e-3, num_pairs=4),
        problems.LAM,
        problems.TASK,
    ),
    "exact with noise": noisy_exact,
    "a kink within the first step": partial(function, lambda hp: jax.nn.relu(hp - 0.3).sum() + hp.sum(), 0.3 + 1e-6),
    "a domain that ends nearby": partial(function, lambda hp: jnp.sqrt(hp[0]) + hp[1], np.array([2e-5, 4.0])),
    "entries that cancel": partial(function, lambda hp: hp[0] * hp[1] - hp[2] ** 2, np.array([3.0, 2.0, 1.0])),
    "a small slope of a large value": partial(
        function, lambda hp: 1e4 + jnp.sin(hp).sum() * 1e-4, np.array([0.2, 0.4])
    ),
    "half precision": partial(
        function, lambda hp: jnp.sin(3 * hp).astype(jnp.bfloat16).astype(float).sum(), np.array([0.2, 0.4])
    ),
}
OPTIONS = {"evolution": FEW_SAMPLES, "mixture with evolution": FEW_SAMPLES, "exact with noise": FEW_SAMPLES}


def prepared(name):
    build, precision = GRID[name] if name in GRID else (SINGLE[name], "float32" if "float32" in name else "float64")
    with jax.enable_x64(precision != "float32"):
        estimator, hyperparams, task = build()
        dtype = np.float32 if precision == "float32" else np.float64
        cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return estimator, *jax.tree.map(lambda x: cast(jnp.asarray(x)), (hyperparams, task)), precision


def reports(name):
    """The check of a correct hypergradient, the check with one leaf 2 % too long, and that leaf's index."""
    estimator, hyperparams, task, precision = prepared(name)
    options = {"num_estimates": 20, "num_samples": 64, **OPTIONS.get(name, {})}
    with jax.enable_x64(precision != "float32"):
        point = _check.evaluated(estimator, hyperparams, task, epsilon=1e-4, rtol=1e-3, **options)
    # Both comparisons share the compiled programs and the hypergradient.
    right = _check.compared(estimator.kind, point, num_directions=1, radius=0.1)
    moving = [i for i, leaf in enumerate(right.leaves) if leaf.norm > 0]
    index = moving[len(name) % len(moving)]
    grads = [1.02 * leaf if i == index else leaf for i, leaf in enumerate(point.grads)]
    return right, _check.compared(estimator.kind, point._replace(grads=grads), num_directions=1, radius=0.1), index


@pytest.mark.parametrize("name", [*GRID, *SINGLE])
@pytest.mark.once
def test_a_correct_hypergradient_passes_and_an_error_of_two_percent_fails(name):
    right, wrong, index = reports(name)
    assert right.verdict == "passed", right
    assert {leaf.status for leaf in right.leaves} <= {"right", "zero"}
    assert wrong.verdict == "failed", wrong
    expected = ["wrong" if i == index else leaf.status for i, leaf in enumerate(right.leaves)]
    assert [leaf.status for leaf in wrong.leaves] == expected


def test_the_battery_is_large_enough():
    assert len(GRID) + len(SINGLE) >= 50

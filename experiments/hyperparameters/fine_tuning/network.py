"""The network, its pre-training, and the problem of fine-tuning it."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.hyperparameters.fine_tuning.images import NUM_CLASSES, Source
from metaopt import base, inner, spaces, transforms

LAYERS = ("conv1", "conv2", "dense", "head")
SPACE = {
    "rate": dict.fromkeys(LAYERS, spaces.interval(1e-5, 1e-1, log=True, default=3e-3)),
    "strength": dict.fromkeys(LAYERS, spaces.interval(1e-5, 10.0, log=True, default=1e-2)),
}


class Settings(NamedTuple):
    """Sizes, steps and rates."""

    channels: tuple[int, int] = (12, 24)
    width: int = 48
    pretraining_steps: int = 800
    pretraining_batch: int = 64
    shots: tuple[int, ...] = (5, 20, 100)
    num_classes: int = 8  # of a training task
    num_query: int = 8  # per class, of a training task
    num_steps: int = 40  # of every fine-tuning
    batch: int = 24
    outer_steps: int = 40
    outer_rate: float = 0.15
    grid_tasks: int = 6  # per number of images
    draws: int = 3  # of each judged task
    num_test: int = 100  # test images per class, at most


SMOKE = Settings((2, 2), 4, 4, 4, (2, 3), 2, 2, 3, 4, 2, 0.1, 1, 1, 4)


def init_params(key: jax.Array, settings: Settings):
    first, second = settings.channels
    shapes = {
        "conv1": (3, 3, 1, first),
        "conv2": (3, 3, first, second),
        "dense": (16 * second, settings.width),
        "head": (settings.width, NUM_CLASSES),
    }
    params = {}
    for name, shape in shapes.items():
        key, own = jax.random.split(key)
        scale = 0.0 if name == "head" else math.sqrt(2 / math.prod(shape[:-1]))
        params[name] = {"w": scale * jax.random.normal(own, shape), "b": jnp.zeros(shape[-1])}
    return params


def logits(params, x):
    """Returns [N, 10] from images [N, 14, 14, 1]."""
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, params[name]["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[name]["b"][None, None, None])
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"]["w"] + params["dense"]["b"][None])
    return x @ params["head"]["w"] + params["head"]["b"][None]


def cross_entropy(params, hyperparams, batch):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])
    return losses.mean()


def accuracy(params, batch):
    return (logits(params, batch["x"]).argmax(1) == batch["y"]).mean()


@functools.cache
def pretraining(settings: Settings):
    """Returns `(key, source) -> θ`."""
    schedule = optax.cosine_decay_schedule(3e-3, settings.pretraining_steps)
    loop = inner.loop(
        cross_entropy,
        lambda hp: optax.adam(schedule),
        init=lambda key, hp, data: init_params(key, settings),
        sampler=inner.minibatch(settings.pretraining_batch),
    )
    train = inner.run(loop, settings.pretraining_steps)
    return jax.jit(lambda key, source: train(key, {}, source).params)


def with_new_head(params):
    """Returns the parameters from which fine-tuning starts."""
    return params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}


def pretrained(key: jax.Array, source: Source, settings: Settings):
    """Returns parameters trained on a source."""
    return pretraining(settings)(key, {"x": jnp.asarray(source.x), "y": jnp.asarray(source.y)})


def make_problem(settings: Settings) -> base.Problem:
    """Returns fine-tuning from `data["start"]`, which all batches share."""

    def loss(params, hp, batch):
        distance = jax.tree.map(lambda p, s: jnp.sum((p - s) ** 2), params, batch["start"])
        penalty = sum(hp["strength"][name] / 2 * sum(jax.tree.leaves(distance[name])) for name in LAYERS)
        return cross_entropy(params, hp, batch) + penalty

    adam = transforms.per_group(optax.adam, patterns={name: name for name in LAYERS})
    loop = inner.loop(
        loss,
        lambda hp: adam(hp["rate"]),
        init=lambda key, hp, data: data["start"],
        sampler=inner.minibatch(settings.batch, shared=("start",)),
    )
    return inner.problem(loop, cross_entropy)

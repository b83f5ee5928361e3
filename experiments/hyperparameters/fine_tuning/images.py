"""Images of 14 × 14 pixels, and tasks with few of them per class."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import script
from experiments.data import from_image_sets
from metaopt import base

SIDE = 14
NUM_CLASSES = 10  # outputs of the head
JUDGED = {"signdigits": "hand signs", "quickdraw8": "drawings"}
TRAINING = ("mnist", "fashion_mnist", "spoken_digits", "omniglot")
LARGEST = {"omniglot": 5}  # images per class for training; it has 20 of each character


class Source(NamedTuple):
    """A labelled set of images: x [N, 14, 14, 1] float32, standardized one by one, and y [N]."""

    x: np.ndarray
    y: np.ndarray


def standardized(x: np.ndarray) -> np.ndarray:
    """Returns images [N, S, S] as [N, 14, 14, 1], by 2 × 2 means, each with mean 0 and deviation 1."""
    num, side, _ = x.shape
    x = x.reshape(num, side // 2, 2, side // 2, 2).mean((2, 4), dtype=np.float32)
    margin = (x.shape[1] - SIDE) // 2
    x = x[:, margin : margin + SIDE, margin : margin + SIDE]
    x = x - x.mean((1, 2), keepdims=True)
    return (x / (x.std((1, 2), keepdims=True) + 1.0))[..., None]


def read_source(name: str, largest: int = 10_000) -> Source:
    source = from_image_sets([name])[name]
    rows = np.random.default_rng(0).permutation(len(source.y))[:largest] if name != "omniglot" else slice(None)
    return Source(standardized(np.asarray(source.x)[rows]), np.asarray(source.y)[rows])


def read_cifar(part: str) -> Source:
    data = np.load(script.data_file(Path(__file__).parent, "cifar10_sub32.npz"), allow_pickle=False)
    return Source(standardized(data[f"x_{part}"].mean(3)), data[f"y_{part}"].astype(np.int32))


def draw_task(rng, source: Source, start, *, shots: int, rows: int, num_classes: int, num_query: int) -> base.Task:
    """Draws a task of some classes: `shots` images of each to train on, and others to judge.

    Args:
      rng: of numpy.
      source: the images.
      start: the parameters to fine-tune. All batches share them.
      shots: images per class for training.
      rows: the number of training rows after padding.
      num_classes: how many classes.
      num_query: images per class to judge by.

    Returns:
      A `Task`, whose features are a function of `shots`.
    """
    classes = rng.choice(np.unique(source.y), num_classes, replace=False)
    train, query = [], []
    for name in classes:
        chosen = rng.permutation(np.flatnonzero(source.y == name))[: shots + num_query]
        train.append(chosen[:shots]), query.append(chosen[shots:])
    x = np.zeros((rows, SIDE, SIDE, 1), np.float32)
    y, mask = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    num = shots * num_classes
    x[:num], y[:num], mask[:num] = source.x[np.concatenate(train)], np.repeat(np.arange(num_classes), shots), 1
    valid = {"x": source.x[np.concatenate(query)], "y": np.repeat(np.arange(num_classes), [len(q) for q in query])}
    features = np.array([np.log(shots / 20) / np.log(5)], np.float32)
    task = base.Task({"x": x, "y": y, "mask": mask, "start": start}, valid, features)
    return jax.tree.map(jnp.asarray, task)

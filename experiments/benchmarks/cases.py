"""The models of the benchmark of the rules: an MLP, a conv net and a transformer, with Adam.

λ is the learning rate and an L2 penalty for each layer. Initial weights and the rows of every step are inputs of the
programs. So the programs of all libraries do the same arithmetic.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, inner

# Adam's ε. With a smaller one, rounding errors of float32 grow in training, and no two programs agree after 64 steps.
EPS = 1e-4
FEW = {"rate": 1e-3, "decay": 1e-4}  # λ of all problems, with one penalty for all layers


class Case(NamedTuple):
    name: str
    text: str  # sizes, in words
    loss: Callable  # (params, batch) -> [], without penalties
    params: dict[str, np.ndarray]
    train: dict[str, np.ndarray]  # the first axis is rows
    valid: dict[str, np.ndarray]
    batch_size: int
    hyperparams: dict
    layerwise: Callable | None = None  # the same loss, with each layer recomputed in its reverse pass


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def penalty(params, decay):
    """Returns Σ decay·|w|².

    `decay` is a number for all leaves, a number per leaf, or a vector per leaf of stacked layers.
    """
    if not isinstance(decay, dict):
        decay = dict.fromkeys(params, decay)
    squares = {name: (w**2).sum(range(jnp.ndim(decay[name]), w.ndim)) for name, w in params.items()}
    return sum((decay[name] * square).sum() for name, square in squares.items())


def problem_of(case: Case, layerwise: bool = False) -> base.Problem:
    loss = case.layerwise if layerwise else case.loss
    loop = inner.loop(
        lambda params, hp, batch: loss(params, batch) + penalty(params, hp["decay"]),
        lambda hp: optax.adam(hp["rate"], eps=EPS),
        init=lambda key, hp, data: data["params"],
        sampler=lambda key, step, data: jax.tree.map(lambda x: x[data["order"][step]], data["rows"]),
    )
    return inner.problem(loop, lambda params, hp, batch: loss(params, batch))


def task_of(case: Case, num_steps: int) -> base.Task:
    num_rows = len(next(iter(case.train.values())))
    order = np.random.default_rng(1).integers(0, num_rows, (num_steps, case.batch_size), dtype=np.int32)
    task = base.Task({"params": case.params, "rows": case.train, "order": order}, case.valid)
    return jax.tree.map(jnp.asarray, task)


def _weights(shapes: dict[str, tuple[int, ...]], fan_in: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: (rng.normal(size=s) / np.sqrt(fan_in[n])).astype(np.float32) for n, s in shapes.items()}


def _digits(batch_size: int) -> tuple[dict, dict]:
    """Returns scikit-learn's 1,797 digits, scaled to [0, 1]. Validation has as many rows as a batch."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    chosen = np.random.default_rng(2).permutation(len(y))
    rows = {"x": (x[chosen] / 16).astype(np.float32), "y": y[chosen].astype(np.int32)}
    return {n: v[batch_size:] for n, v in rows.items()}, {n: v[:batch_size] for n, v in rows.items()}


def _at(rate: float) -> str:
    return f", at a rate of {rate:g}" if rate != FEW["rate"] else ""


def mlp(width: int = 256, batch_size: int = 256, rate: float = FEW["rate"]) -> Case:
    sizes = {"in": (64, width), "hidden": (width, width), "out": (width, 10)}

    def loss(params, batch):
        hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["in"]) @ params["hidden"])
        return cross_entropy(hidden @ params["out"], batch["y"])

    return Case(
        "mlp",
        f"MLP of 64, {width}, {width} and 10 units, {batch_size} of scikit-learn's digits a step" + _at(rate),
        loss,
        _weights(sizes, {name: shape[0] for name, shape in sizes.items()}),
        *_digits(batch_size),
        batch_size,
        {"rate": rate, "decay": dict.fromkeys(sizes, FEW["decay"])},
    )


def conv(width: int = 16, batch_size: int = 64, rate: float = FEW["rate"]) -> Case:
    """Three convolutions, the last two with stride 2; then the mean over pixels, and a linear layer."""
    channels = (1, width, 2 * width, 2 * width)
    sizes = {f"conv{i}": (3, 3, channels[i], channels[i + 1]) for i in range(3)} | {"out": (2 * width, 10)}

    def loss(params, batch):
        x = batch["x"]
        for i in range(3):
            dimensions = ("NHWC", "HWIO", "NHWC")
            stride = (1, 1) if i == 0 else (2, 2)
            x = jax.lax.conv_general_dilated(
                x, params[f"conv{i}"], stride, [(1, 1), (1, 1)], dimension_numbers=dimensions
            )
            x = jax.nn.relu(x)
        return cross_entropy(x.mean((1, 2)) @ params["out"], batch["y"])

    def enlarge(rows):  # 8 x 8 pixels to 16 x 16
        return {**rows, "x": rows["x"].reshape(-1, 8, 8, 1).repeat(2, 1).repeat(2, 2)}

    train, valid = _digits(batch_size)
    return Case(
        "conv",
        f"conv net with {width}, {2 * width} and {2 * width} channels, {batch_size} digits of 16 x 16 pixels a step"
        + _at(rate),
        loss,
        _weights(sizes, {name: int(np.prod(shape[:-1])) for name, shape in sizes.items()}),
        enlarge(train),
        enlarge(valid),
        batch_size,
        {"rate": rate, "decay": dict.fromkeys(sizes, FEW["decay"])},
    )


def transformer(
    layers: int = 8,
    width: int = 128,
    length: int = 64,
    batch_size: int = 16,
    rate: float = FEW["rate"],
    unroll: bool = False,
) -> Case:
    """A causal language model of made-up tokens. The layers are stacked and scanned over, or written out (`unroll`)."""
    heads, vocabulary = 4, 64
    stacked = {
        "qkv": (layers, width, 3 * width),
        "mix": (layers, width, width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
    }
    sizes = {"embed": (vocabulary, width), **stacked}
    fan_in = {name: shape[-2] for name, shape in stacked.items()} | {"embed": width}

    def normalize(x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def layer(x, w):
        b, s, d = x.shape
        q, k, v = jnp.split((normalize(x) @ w["qkv"]).reshape(b, s, heads, 3 * d // heads), 3, -1)
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / np.sqrt(d // heads)
        scores = jnp.where(np.tril(np.ones((s, s), bool)), scores, -1e9)
        seen = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), v).reshape(b, s, d)
        x = x + seen @ w["mix"]
        return x + jax.nn.gelu(normalize(x) @ w["up"]) @ w["down"], None

    def loss_with(layer):
        def loss(params, batch):
            x = params["embed"][batch["x"][:, :-1]]
            x, _ = jax.lax.scan(layer, x, {name: params[name] for name in stacked}, unroll=unroll)
            return cross_entropy(normalize(x) @ params["embed"].T, batch["x"][:, 1:])

        return loss

    rng = np.random.default_rng(3)
    train, valid = ({"x": rng.integers(0, vocabulary, (n, length + 1), dtype=np.int32)} for n in (256, batch_size))
    decay = {"embed": FEW["decay"]} | {name: np.full(layers, FEW["decay"], np.float32) for name in stacked}
    return Case(
        f"transformer{layers}",
        f"transformer of {layers} layers, width {width}, {batch_size} sequences of {length} tokens a step" + _at(rate),
        loss_with(layer),
        _weights(sizes, fan_in),
        train,
        valid,
        batch_size,
        {"rate": rate, "decay": decay},
        loss_with(jax.checkpoint(layer, prevent_cse=False)),
    )

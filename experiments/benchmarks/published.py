"""hypertorch's published examples with the same settings in metaopt, compared with hypertorch (`published_peers.py`).

https://github.com/prolearner/hypertorch, at 6241dfa, has four examples: `examples/logistic_regression.ipynb`, the
equilibrium network's notebook, `examples/iMAML.py`, and `experimental/l2reg_on_twentynews.py`. Here, each is one outer
step: T inner steps from the start, then K steps of the rule, which give the hypergradient. The first example is also
run to its end.

The last example reads 20 newsgroups, which would have to be downloaded. Here, it reads the SMS Spam Collection instead.
Its rate is 10, a tenth of the published one, since training on this text diverges at 100. Omniglot's tasks are drawn
with our own seed.
"""

import gzip
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, hypergrad, inner

NUM_OUTER = 1000  # outer steps of the logistic regression
IMAML_PRODUCTS = 5
ROUGH = ("imaml", "text")  # float32 is too rough to decide whether two libraries agree


class Setting(NamedTuple):
    """One example.

    Attributes:
      text: sizes, in words.
      arrays: its data and λ, which both libraries read; the keys of λ begin with "hp_".
      hyperparams: λ.
      task: training and validation data.
      rules: hypertorch's name -> estimator.
      steps: T and K.
    """

    text: str
    arrays: dict[str, np.ndarray]
    hyperparams: base.HyperParams
    task: base.Task
    rules: dict[str, base.Estimator]
    steps: dict[str, int]


def implicit(problem: base.Problem, num_steps: int, num_products: int, **options) -> base.Estimator:
    solver = hypergrad.cg(num_steps=num_products, tol=0.0)
    return hypergrad.implicit(problem, num_steps=num_steps, warm_start=False, **{"solver": solver, **options})


def cg_that_goes_on(matvec, b, initial, *, key):
    """JAX's conjugate gradients: like hypertorch's, and unlike ours, they continue through negative curvature."""
    return jax.scipy.sparse.linalg.cg(matvec, b, tol=0.0, maxiter=IMAML_PRODUCTS)[0], IMAML_PRODUCTS


def fixed_point(problem: base.Problem, num_steps: int, num_products: int) -> base.Estimator:
    return implicit(
        problem, num_steps, num_products, condition="step", solver=hypergrad.neumann(num_steps=num_products, rate=1.0)
    )


def logistic(smoke: bool) -> Setting:
    """Synthetic data, with a penalty for each feature."""
    from sklearn.model_selection import train_test_split

    rows, features, num_steps, num_last = (20, 3, 4, 2) if smoke else (1000, 20, 100, 10)
    rng = np.random.RandomState(1)
    oracle, x = rng.randn(features), rng.randn(rows, features)
    y = (x @ oracle + 0.1 * rng.randn(rows) > 0).astype(float)
    split = train_test_split(x, y, test_size=0.5, random_state=rng)
    names = ("x", "x_valid", "y", "y_valid")
    arrays = {name: np.asarray(part, np.float32) for name, part in zip(names, split, strict=True)}

    def log_loss(params, hp, batch):
        return optax.losses.sigmoid_binary_cross_entropy(batch["x"] @ params, batch["y"]).mean()

    loop = inner.loop(
        lambda params, hp, batch: log_loss(params, hp, batch) + (hp["penalty"] * params**2).sum() / 2,
        lambda hp: optax.sgd(0.1),
        init=lambda key, hp, data: jnp.zeros(features),
    )
    problem = inner.problem(loop, log_loss)
    rules = {
        "reverse, the last K steps": hypergrad.lookahead(problem, commit=num_steps - num_last, num_steps=num_last),
        "reverse, all T steps": hypergrad.unrolled(problem, num_steps=num_steps, remat="step"),
        "fixed_point": fixed_point(problem, num_steps, num_last),
        "CG": implicit(problem, num_steps, num_last),
    }
    return Setting(
        f"logistic regression, {features} penalties",
        {**arrays, "hp_penalty": np.ones(features, np.float32)},
        {"penalty": np.ones(features, np.float32)},
        base.Task(*({"x": arrays["x" + part], "y": arrays["y" + part]} for part in ("", "_valid"))),
        rules,
        {"T": num_steps, "K": num_last},
    )


def equilibrium(smoke: bool) -> Setting:
    """A network with an equilibrium state, z = tanh(z A + x B + c). λ is all of its weights, f its training loss."""
    rows, width, num_steps = (20, 4, 3) if smoke else (5000, 200, 20)
    images, labels = digits(rows)
    rng = np.random.default_rng(0)
    shapes = {"a": (width, width), "b": (images.shape[1], width), "c": (width,), "out": (width, 10)}
    weights = {name: (0.01 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    weights["out_bias"] = np.zeros(10, np.float32)

    # The inner steps move the state z, by a map that is not a gradient. So z is the model's state, not a parameter.
    def dynamics(params, hp, batch, context):
        return jnp.zeros([]), jnp.tanh(context.model_state @ hp["a"] + batch["x"] @ hp["b"] + hp["c"][None])

    loop = inner.loop(
        dynamics,
        lambda hp: optax.identity(),
        init=lambda key, hp, data: ({}, jnp.zeros((len(data["x"]), width))),
        with_context=True,
    )

    def outer_loss(params, hp, batch, context):
        logits = context.model_state @ hp["out"] + hp["out_bias"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    problem = inner.problem(loop, outer_loss, with_context=True)
    rules = {
        "reverse_unroll": hypergrad.unrolled(problem, num_steps=num_steps),
        "fixed_point": fixed_point(problem, num_steps, num_steps),
        "CG_normaleq": implicit(
            problem,
            num_steps,
            num_steps,
            condition="step",
            solver=hypergrad.cg(num_steps=num_steps, tol=0.0, normal=True),
        ),
    }
    data = {"x": images, "y": labels}
    return Setting(
        f"equilibrium network, {rows:,} MNIST images, width {width}",
        {**data, **{f"hp_{name}": weight for name, weight in weights.items()}},
        weights,
        base.Task(data, data),
        rules,
        {"T": num_steps, "K": num_steps},
    )


def digits(num: int) -> tuple[np.ndarray, np.ndarray]:
    saved = np.load(data_file("mnist.npz"))
    chosen = np.random.default_rng(0).permutation(len(saved["y_train"]))[:num]
    images = saved["x_train"][chosen].reshape(num, -1) / 255
    return images.astype(np.float32), saved["y_train"][chosen].astype(np.int32)


def imaml(smoke: bool) -> Setting:
    """Omniglot, 5 ways, 1 shot, 15 queries. λ is the start of each task's network, and the center of its penalty."""
    num_tasks, width, num_steps = (1, 2, 2) if smoke else (16, 64, 16)
    rng = np.random.default_rng(0)
    tasks, shapes = omniglot_tasks(rng, num_tasks), {"out": (width, 5), "out_bias": (5,)}
    for i, channels in enumerate((1, width, width, width)):
        shapes |= {
            f"conv{i}": (3, 3, channels, width),
            f"bias{i}": (width,),
            f"scale{i}": (width,),
            f"shift{i}": (width,),
        }
    # As in the example: He initialization for the kernels, ones and zeros for the rest.
    weights = {
        name: (rng.normal(size=s) * np.sqrt(2 / (9 * width)) if "conv" in name else np.full(s, float("scale" in name)))
        for name, s in shapes.items()
    }
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}

    def log_loss(params, hp, batch):
        x = batch["x"]
        for i in range(4):
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, params[f"conv{i}"], (1, 1), "SAME", dimension_numbers=layout)
            x = jax.nn.relu(x + params[f"bias{i}"][None, None, None])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params[f"scale{i}"][None, None, None]
            x = x + params[f"shift{i}"][None, None, None]
        logits = x.reshape(len(x), -1) @ params["out"] + params["out_bias"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def loss(params, hp, batch):
        apart = jax.tree.map(lambda p, h: ((p - h) ** 2).sum(), params, hp)
        return log_loss(params, hp, batch) + 0.5 * 2.0 * sum(jax.tree.leaves(apart))

    loop = inner.loop(loss, lambda hp: optax.sgd(0.1), init=lambda key, hp, data: hp)
    problem = inner.problem(loop, log_loss)
    rules = {
        "CG": implicit(problem, num_steps, IMAML_PRODUCTS, solver=cg_that_goes_on),
        "fixed_point": fixed_point(problem, num_steps, IMAML_PRODUCTS),
    }
    flat = {f"hp_{name}": weight for name, weight in weights.items()}
    return Setting(
        f"iMAML, {num_tasks} Omniglot tasks, 4 convolutions of {width}",
        {**{f"{part}_{n}": v for part, data in zip(("x", "q"), tasks, strict=True) for n, v in data.items()}, **flat},
        weights,
        base.Task(*tasks),
        {name: hypergrad.over_tasks(rule, task_chunk=1) for name, rule in rules.items()},
        {"T": num_steps, "K": IMAML_PRODUCTS},
    )


def omniglot_tasks(rng: np.random.Generator, num_tasks: int) -> tuple[dict, dict]:
    """Returns support and query sets of background characters, with a leading axis of tasks."""
    saved = np.load(data_file("omniglot.npz"))
    images, character = saved["images"], saved["character"]
    background = np.unique(character[saved["split"] == 0])
    support, query = [], []
    for _ in range(num_tasks):
        drawn = [rng.permutation(np.flatnonzero(character == c))[:16] for c in rng.choice(background, 5, replace=False)]
        support.append(images[[rows[:1] for rows in drawn]])
        query.append(images[[rows[1:] for rows in drawn]])

    def part(images):
        images = np.stack(images)  # [tasks, ways, shots, 28, 28]
        labels = np.broadcast_to(np.arange(5, dtype=np.int32)[:, None], images.shape[:3])
        scaled = (images / max(1, images.max())).astype(np.float32)
        return {"x": scaled.reshape(num_tasks, -1, 28, 28, 1), "y": labels.reshape(num_tasks, -1).copy()}

    return part(support), part(query)


def text(smoke: bool) -> Setting:
    """Two classes of text messages. λ is the logarithm of the penalty of each word."""
    features, num_steps, num_products = (50, 2, 2) if smoke else (5000, 10, 10)
    data = messages(features, 60 if smoke else None)

    def log_loss(params, hp, batch):
        products = batch["value"][:, None] * params[batch["column"]]
        logits = jax.ops.segment_sum(products, batch["row"], len(batch["y"]), indices_are_sorted=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loop = inner.loop(
        lambda params, hp, batch: log_loss(params, hp, batch) + (jnp.exp(hp)[:, None] * params**2).mean() / 2,
        lambda hp: optax.sgd(10.0, momentum=0.9),
        init=lambda key, hp, data: jnp.zeros((features, 2)),
    )
    log_penalty = np.zeros(features, np.float32)
    return Setting(
        f"a penalty for each of {features:,} words (SMS)",
        {**{f"{part}_{n}": v for part, rows in data.items() for n, v in rows.items()}, "hp_log_penalty": log_penalty},
        log_penalty,
        base.Task(data["x"], data["q"]),
        {"CG": implicit(inner.problem(loop, log_loss), num_steps, num_products)},
        {"T": num_steps, "K": num_products},
    )


def messages(num_features: int, num: int | None) -> dict[str, dict]:
    """Returns training ("x") and validation ("q") messages, half each.

    They are given by the nonzero entries of their TF-IDF features.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    with gzip.open(data_file("sms_spam.tsv.gz"), "rt", encoding="utf-8") as file:
        labels, texts = zip(*(line.rstrip("\n").split("\t", 1) for line in file), strict=True)
    order = np.random.default_rng(0).permutation(len(texts))[:num]
    x = TfidfVectorizer(max_features=num_features, ngram_range=(1, 2)).fit_transform([texts[i] for i in order])
    y = np.array([labels[i] == "spam" for i in order], np.int32)
    half, parts = len(y) // 2, {}
    for name, rows in (("x", slice(None, half)), ("q", slice(half, None))):
        entries = x[rows].tocoo()
        parts[name] = {
            "row": entries.row.astype(np.int32),
            "column": entries.col.astype(np.int32),
            "value": entries.data.astype(np.float32),
            "y": y[rows],
        }
    return parts


def data_file(name: str) -> Path:
    return Path(os.environ.get("METAOPT_DATA", "")) / name


# Example -> its factory, and the file that it needs.
SETTINGS = {
    "logistic": (logistic, None),
    "equilibrium": (equilibrium, "mnist.npz"),
    "imaml": (imaml, "omniglot.npz"),
    "text": (text, "sms_spam.tsv.gz"),
}


def program(rule: base.Estimator) -> Callable:
    """Returns (λ, task) -> (F, dF/dλ): one outer step from the start."""

    def estimate(hyperparams, task):
        result, _ = rule.estimate(hyperparams, task, rule.init(jax.random.key(0), hyperparams, task))
        return result.value, result.hypergrad

    return estimate


def run_to_the_end(setting: Setting, num_outer: int) -> Callable:
    """Returns (λ, task) -> the validation losses of the notebook's outer loop: reverse through the last K steps."""
    estimate, optimizer = program(setting.rules["reverse, the last K steps"]), optax.sgd(1.0, momentum=0.9)

    def run(hyperparams, task):
        def step(carry, _):
            hyperparams, state = carry
            value, hypergradient = estimate(hyperparams, task)
            updates, state = optimizer.update(hypergradient, state)
            hyperparams = jax.tree.map(partial(jnp.maximum, 1e-8), optax.apply_updates(hyperparams, updates))
            return (hyperparams, state), value

        return jax.lax.scan(step, (hyperparams, optimizer.init(hyperparams)), length=num_outer)[1]

    return run

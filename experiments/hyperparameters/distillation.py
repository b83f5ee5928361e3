"""Data distillation: ten synthetic images, one for each digit, that train a network in a few steps.

λ is the images themselves, and the rate of each of T steps of gradient descent on them. F(λ) is the loss of the trained
network on real images. `hypergrad.unrolled` differentiates it. The method is from Wang et al., 2018
(https://arxiv.org/abs/1811.10959). Learning training data by gradients through training is from Maclaurin, Duvenaud &
Adams, ICML 2015 (https://arxiv.org/abs/1502.03492).

* Fixed initialization: the images are learned for one network, whose first weights are known.
* Random initialization: the images are learned for new networks at every outer step (`hypergrad.over_seeds`), and
scored on networks that were not used for learning.
* Alternatives, trained the same way at the best constant rate of a grid: one real image of each digit, and the mean
image of each digit. Also all real images, trained as usual, which shows the capability of the network.

Iterates and rates are chosen on validation rows. The test rows are read once.

    python experiments/hyperparameters/distillation.py            # minutes; writes results/distillation.md and .png
    python experiments/hyperparameters/distillation.py --smoke    # seconds; prints only

Needs mnist.npz in the folder that the environment variable METAOPT_DATA names.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from metaopt import base, hypergrad, inner, spaces, training

PIXELS = 784
PUBLISHED = (
    ("fixed initialization, 10 images: Wang et al., LeNet", "93.8"),
    ("random initialization, 100 images: Wang et al., LeNet", "79.5 ± 8.1"),
)


def load(num_valid: int, num_test: int):
    """Returns training, validation and test rows of MNIST, all standardized by the same constants."""
    path = script.data_file(__file__, "mnist.npz")
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}

    def part(name, num=None):
        x = arrays[f"x_{name}"][:num].reshape(-1, PIXELS).astype(np.float32)
        return {"x": jnp.asarray((x / 255 - 0.1307) / 0.3081), "y": jnp.asarray(arrays[f"y_{name}"][:num], jnp.int32)}

    return part("train"), part("val", num_valid), part("test", num_test)


def logits(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


def mean_loss(params, rows):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, rows["x"]), rows["y"]).mean()


def accuracy(params, rows):
    return 100 * jnp.mean(logits(params, rows["x"]).argmax(1) == rows["y"])


def initialize(key, hidden: int):
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (PIXELS, hidden)) * PIXELS**-0.5,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, 10)) * hidden**-0.5,
        "b2": jnp.zeros(10),
    }


def make_problem(config, fixed: bool) -> base.Problem:
    """λ = {"images": [10, 784], "rates": [T]}. A task holds the labels, the first weights' key, and real rows."""

    def init(key, hyperparams, data):
        return initialize(data["key"] if fixed else key, config.hidden)

    def loss(params, hyperparams, data):
        return mean_loss(params, {"x": hyperparams["images"], "y": data["y"]})

    loop = inner.loop(loss, lambda hp: optax.sgd(hp["rates"]), init=init)
    problem = inner.problem(loop, lambda params, hyperparams, rows: mean_loss(params, rows))
    windows = {"images": 0, "rates": config.num_steps}  # one rate per step
    return inner.piecewise(problem, windows, num_steps=config.num_steps)


def space(config):
    return {
        "images": spaces.real(scale=1.0, shape=(10, PIXELS)),
        "rates": spaces.positive(0.02, shape=(config.num_steps,)),
    }


def make_judge(config, fixed: bool):
    """Returns `(λ, keys, first weights' key, rows) -> [n]`: the accuracy in % of a network trained with λ, per key."""
    train = inner.run(make_problem(config, fixed).loop, config.num_steps)

    @jax.jit
    def judge(hyperparams, keys, start_key, rows):
        data = {"y": jnp.arange(10), "key": start_key}
        return jax.lax.map(lambda key: accuracy(train(key, hyperparams, data).params, rows), keys)

    return judge


def distill(config, seed: int, fixed: bool, learner, judge, real, valid):
    """Returns the best λ by validation accuracy, and that accuracy."""
    start_key, image_key, fit_key, valid_key = jax.random.split(jax.random.key(seed), 4)
    data = {"y": jnp.arange(10), "key": start_key}
    sample = jax.jit(lambda key: inner.minibatch(config.outer_batch, replace=True)(key, 0, real))
    keys = jax.random.split(valid_key, 1 if fixed else config.num_networks)
    result = training.fit(
        learner,
        lambda key: base.Task(data, sample(key)),  # different real rows at every outer step
        hyperparams={**spaces.default(space(config)), "images": jax.random.normal(image_key, (10, PIXELS))},
        space=space(config),
        num_steps=config.outer_steps,
        key=fit_key,
        evaluate=lambda key, hyperparams: -judge(hyperparams, keys, start_key, valid).mean(),
        eval_every=max(1, config.outer_steps // 10),
    )
    return result.best_hyperparams, -result.best_value


def real_images(rows, seed: int) -> dict:
    """Returns one real image of each digit, and the mean of each digit."""
    x, y = np.asarray(rows["x"]), np.asarray(rows["y"])
    rng = np.random.default_rng(seed)
    return {
        "one real image a digit": np.stack([x[rng.choice(np.flatnonzero(y == digit))] for digit in range(10)]),
        "the mean image of each digit": np.stack([x[y == digit].mean(0) for digit in range(10)]),
    }


def train_on_everything(config):
    """Returns `(key, real rows) -> params`: Adam on minibatches of all real rows."""
    loop = inner.loop(
        lambda params, hyperparams, rows: mean_loss(params, rows),
        lambda hyperparams: optax.adam(2e-3),
        init=lambda key, hyperparams, data: initialize(key, config.hidden),
        sampler=inner.minibatch(100),
    )
    train = inner.run(loop, config.full_steps)
    return jax.jit(lambda key, rows: train(key, None, rows).params)


def run_seed(seed: int, config, programs, data, say):
    """Returns {name: test accuracies [n]}, and images by name."""
    learners, judges, everything = programs
    real, valid, test = data
    start_key = jax.random.split(jax.random.key(seed), 4)[0]
    test_keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), config.num_networks)
    results, images = {}, {}
    for fixed in (True, False):
        name = f"{'fixed' if fixed else 'random'} initialization"
        distilled, best = distill(config, seed, fixed, learners[fixed], judges[fixed], real, valid)
        keys = test_keys[:1] if fixed else test_keys
        results[f"{name}, 10 distilled images"] = judges[fixed](distilled, keys, start_key, test)
        images[name] = distilled["images"]
        say(f"{name}: validation accuracy {best:.2f} %")
        if fixed:
            results["images of the fixed one, from random ones"] = judges[False](distilled, test_keys, start_key, test)
    valid_keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2), config.num_networks)
    for name, chosen in real_images(real, seed).items():
        candidates = [
            {"images": jnp.asarray(chosen), "rates": jnp.full(config.num_steps, rate, jnp.float32)}
            for rate in np.geomspace(1e-3, 1, config.grid)
        ]
        best = max(candidates, key=lambda lam: float(judges[False](lam, valid_keys, start_key, valid).mean()))
        results[f"random initialization, {name}"] = judges[False](best, test_keys, start_key, test)
        images[name] = chosen
    results["all 50,000 images, trained as usual"] = accuracy(everything(test_keys[0], real), test)[None]
    return {name: np.asarray(x) for name, x in results.items()}, {n: np.asarray(x) for n, x in images.items()}


def plot(images: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(images), 10, figsize=(10, 1.15 * len(images)))
    for row, (name, ten) in zip(axes, images.items(), strict=True):
        for axis, image in zip(row, ten, strict=True):
            bound = np.quantile(np.abs(image), 0.99)
            axis.imshow(image.reshape(28, 28), cmap="gray", vmin=-bound, vmax=bound)
            axis.set(xticks=[], yticks=[])
        row[0].set_title(name, loc="left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    config = script.parser(__doc__).parse_args()
    small = config.smoke
    config.seeds = 1 if small else config.seeds
    config.hidden, config.num_steps, config.inits = (4, 2, 2) if small else (64, 10, 4)
    config.outer_steps, config.outer_batch = (2, 20) if small else (800, 256)
    config.num_networks, config.grid, config.full_steps = (2, 1, 2) if small else (20, 10, 3000)

    def say(text):
        print(f"[{time.process_time():5.0f} s] {text}", flush=True)

    data = load(*((100, 100) if small else (2000, 10000)))
    learners, judges = {}, {fixed: make_judge(config, fixed) for fixed in (True, False)}
    for fixed in (True, False):
        problem = spaces.constrain(make_problem(config, fixed), space(config))
        estimator = hypergrad.unrolled(problem, num_steps=config.num_steps)
        if not fixed:
            estimator = hypergrad.over_seeds(estimator, config.inits)
        decay = optax.cosine_decay_schedule(0.05, config.outer_steps)
        learners[fixed] = training.learner(estimator, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(decay)))
    programs = learners, judges, train_on_everything(config)
    runs = [run_seed(seed, config, programs, data, say) for seed in range(config.seeds)]

    rows = []
    for name in runs[0][0]:
        means = [results[name].mean() for results, _ in runs]
        within = np.mean([results[name].std() for results, _ in runs]) if len(runs[0][0][name]) > 1 else None
        deviation = np.std(means, ddof=1) if len(means) > 1 else 0
        rows.append([name, f"{np.mean(means):.1f} ± {deviation:.1f}", "" if within is None else f"{within:.1f}"])
    text = script.table(["trained on", "test accuracy, %", "standard deviation between networks"], rows)
    text += "\n\nPublished, on MNIST's 10,000 test rows (https://ssnl.github.io/dataset_distillation/):\n\n"
    text += script.table(["method", "test accuracy, %"], [list(row) for row in PUBLISHED])
    text += (
        "\n\n"
        f"- Network: {PIXELS}, {config.hidden} (tanh) and 10 units.\n"
        f"- Training: {config.num_steps} steps of gradient descent on the ten images at once, each step with its "
        "learned rate.\n"
        f"- Distillation: {config.outer_steps} outer steps of Adam, with {config.outer_batch} real rows each.\n"
        f"- Random initialization: {config.inits} networks a step, scored on {config.num_networks} others.\n"
        f"- ± is the standard deviation over {config.seeds} seeds.\n"
        "- Wang et al. use LeNet, and for random initialization 100 images. The networks differ, so the figures are "
        "not directly comparable."
    )
    script.publish(__file__, "Ten images instead of fifty thousand", text, config)
    if not small:
        plot(runs[0][1], config.out / "distillation.png")


if __name__ == "__main__":
    script.run(main)

"""Strengths of data augmentation, learned by gradient from clean validation images, against random search.

There are only 500 training images of digits, so a network learns more from random variations of them. An image x
becomes

    x' = A(x; s ∘ u),    u uniform in (−1, 1)^10, or normal for the noise, drawn at every step,    λ = s,

where A shifts, rotates, scales and shears (one bilinear resampling), changes contrast and brightness, adds noise, and
fades a soft square. Strengths multiply draws that do not depend on them, so the training loss is differentiable in λ.
F(λ) is the cross-entropy on 500 validation images, without augmentation. The rules are `unrolled` through the whole
training; `truncated` over windows and with 1 step (T1–T2), online; and `implicit` with three terms of the Neumann
series.

There are three baselines: training without augmentation, strengths set by hand, and random search at the cost of
`unrolled`. All are scored by newly trained networks: on the training images only, and on training and validation images
together. The second score shows the value of the validation images as training images, without λ. No choice depends on
test images (which were seen during development). Outer rates are guesses after a few trials on other rows, and were not
searched.

The task is the one of Mounsaveng et al., WACV 2021, https://arxiv.org/abs/2006.14699, at a small scale. They learn
affine transformations one step ahead. `implicit` is the rule of Lorraine et al., AISTATS 2020,
https://arxiv.org/abs/1911.02590.

    python experiments/hyperparameters/augmentation.py            # minutes; writes results/augmentation.md and .png
    python experiments/hyperparameters/augmentation.py --smoke    # seconds; prints only

Needs mnist.npz in the folder that the environment variable METAOPT_DATA names (with `--data`, fashion_mnist_sub.npz).

Main observations in the committed results: `unrolled` and windows of a quarter of the training beat random search at
the same cost in every mean. Their geometric strengths agree over seeds. One step ahead is short-sighted. Training on
twice as many images helps as much as learned strengths. With twice as many images, the strengths add little in so short
a training, except those of the online rules.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy import ndimage

from experiments import script
from experiments.hyperparameters import costs
from metaopt import base, hypergrad, inner, spaces, training

FILES = {"MNIST": "mnist.npz", "Fashion-MNIST": "fashion_mnist_sub.npz"}
SIDE = 14  # pixels; strengths are stated for the original images of 28
# name -> its range, the start of the rules, and a value set by hand. The start is weak: λ is near no augmentation.
STRENGTHS = {
    "shift": (0.03, 6.0, 0.3, 2.0),  # pixels
    "rotation": (0.5, 60.0, 3.0, 15.0),  # degrees
    "scale": (0.005, 0.6, 0.03, 0.15),  # log, each axis
    "shear": (0.005, 0.8, 0.03, 0.15),  # columns per row
    "contrast": (0.005, 1.0, 0.03, 0.1),  # log
    "brightness": (0.005, 0.6, 0.03, 0.1),  # as a share of the range of intensities
    "noise": (0.005, 0.6, 0.03, 0.05),  # as a share of the range of intensities
    "erase": (0.005, 0.99, 0.03, 0.3),  # how far a square fades; its side is a third of the image's
}
SPACE = {name: spaces.interval(low, high, log=True, default=start) for name, (low, high, start, _) in STRENGTHS.items()}
RANDOM = "random search"


def load(name: str, seed: int, num_rows: int) -> tuple[base.Task, dict]:
    """Returns a task of `num_rows` training images and the same number of validation images, and the test images."""
    path = script.data_file(__file__, FILES[name])

    def part(x, y):
        small = x.reshape(-1, SIDE, 28 // SIDE, SIDE, 28 // SIDE).mean((2, 4)) / 255
        return {"x": jnp.asarray(small, jnp.float32), "y": jnp.asarray(y, jnp.int32)}

    with np.load(path, allow_pickle=False) as data:
        x, y, test = data["x_train"], data["y_train"], part(data["x_test"], data["y_test"])
    rows = np.random.default_rng(seed).permutation(len(y))
    train, valid = rows[:num_rows], rows[num_rows : 2 * num_rows]
    return base.Task(part(x[train], y[train]), part(x[valid], y[valid])), test


def augment(key, strengths, image):
    """Augments one image [SIDE, SIDE] at random, differentiable in the strengths."""
    key, noise_key = jax.random.split(key)
    u = jax.random.uniform(key, (10,), minval=-1, maxval=1)
    axis = jnp.arange(SIDE) - (SIDE - 1) / 2
    pixels = strengths["shift"] * SIDE / 28
    y, x = jnp.meshgrid(axis + pixels * u[0], axis + pixels * u[1], indexing="ij")
    angle = jnp.deg2rad(strengths["rotation"] * u[2])
    y, x = jnp.cos(angle) * y - jnp.sin(angle) * x, jnp.sin(angle) * y + jnp.cos(angle) * x
    x = x + strengths["shear"] * u[3] * y
    y, x = y * jnp.exp(strengths["scale"] * u[4]), x * jnp.exp(strengths["scale"] * u[5])
    image = ndimage.map_coordinates(image, [y - axis[0], x - axis[0]], order=1)
    near = [jax.nn.sigmoid(2 * (SIDE / 6 - jnp.abs(axis - axis[-1] * center))) for center in u[6:8]]
    image *= 1 - strengths["erase"] * near[0][:, None] * near[1][None]
    image = image * jnp.exp(strengths["contrast"] * u[8]) + strengths["brightness"] * u[9]
    return image + strengths["noise"] * jax.random.normal(noise_key, image.shape)


def logits(params, images):
    x = (images.reshape(len(images), -1) - 0.2) / 0.3
    return jax.nn.relu(x @ params["in"] + params["bias"][None]) @ params["out"]


def clean_loss(params, strengths, rows):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, rows["x"]), rows["y"]).mean()


def error(params, rows):
    return 100 * jnp.mean(logits(params, rows["x"]).argmax(1) != rows["y"])


def make_problem(config) -> base.Problem:
    def init(key, strengths, data):
        keys, sizes = jax.random.split(key), (SIDE**2, config.hidden, 10)
        w = [jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(keys, (sizes[:2], sizes[1:]), strict=True)]
        return {"in": w[0], "bias": jnp.zeros(config.hidden), "out": w[1]}, None

    def loss(params, strengths, batch, context):
        if strengths is None:
            return clean_loss(params, None, batch)
        keys = jax.random.split(context.key, len(batch["x"]))
        images = jax.vmap(augment, (0, None, 0))(keys, strengths, batch["x"])
        return clean_loss(params, None, {"x": images, "y": batch["y"]})

    def optimizer(strengths):
        return optax.flatten(optax.adam(optax.linear_schedule(config.rate, 0.0, config.num_steps)))

    sampler = inner.minibatch(config.batch)
    loop = inner.loop(loss, optimizer, init=init, sampler=sampler, with_context=True)
    return inner.problem(loop, clean_loss)


def make_judge(config):
    """Returns `(keys, λ, data, rows) -> [2]`: loss and error on `rows` after training with λ, means over the keys."""
    train = inner.run(make_problem(config).loop, config.num_steps)

    @jax.jit
    def judge(keys, strengths, data, rows):
        def one(key):
            params = train(key, strengths, data).params
            return jnp.stack([clean_loss(params, None, rows), error(params, rows)])

        return jax.lax.map(one, keys).mean(0)

    return judge


def make_rules(config) -> dict:
    """Returns {name: (learner, outer steps in one training, trainings)}."""
    problem, steps = spaces.constrain(make_problem(config), SPACE), config.num_steps
    neumann = hypergrad.neumann(num_steps=3, rate=0.1)
    every = config.window
    plans = {
        "`unrolled`": (hypergrad.unrolled(problem, num_steps=steps, remat="step"), 1, config.runs, 0.4),
        f"`truncated`, {every} steps": (
            hypergrad.truncated(problem, num_steps=steps, truncation_length=every, remat="step"),
            steps // every,
            config.runs,
            0.3,
        ),
        "`truncated`, 1 step": (
            hypergrad.truncated(problem, num_steps=steps, truncation_length=1),
            steps,
            config.online_runs,
            0.02,
        ),
        "`implicit`, every 5 steps": (
            hypergrad.implicit(problem, num_steps=5, solver=neumann, horizon=steps),
            steps // 5,
            config.online_runs,
            0.05,
        ),
    }
    rules = {}
    for name, (estimator, times, runs, rate) in plans.items():
        schedule = optax.cosine_decay_schedule(rate, times * runs)
        rules[name] = training.learner(estimator, optax.adam(schedule, b2=0.9 if times < 10 else 0.99)), times, runs
    return rules


def run_seed(data: str, seed: int, config, judge, rules, say) -> tuple[dict, dict]:
    """Returns {name: scores} and {name: λ} of one seed.

    Scores are [validation loss, test error, test error if trained on all images, CPU s].
    """
    task, test = load(data, seed, config.num_rows)
    test = jax.tree.map(lambda x: x[: config.num_test], test)
    select_key, learn_key, search_key, test_key = jax.random.split(jax.random.key(seed), 4)
    chosen, seconds = {"no augmentation": None, "set by hand": {n: jnp.float32(s[3]) for n, s in STRENGTHS.items()}}, {}
    for name, (learner, times, runs) in rules.items():
        clock = [time.process_time()]  # seconds are counted after the first step, without compilation
        result = training.fit(
            learner,
            lambda key: task,
            hyperparams=spaces.default(SPACE),
            space=SPACE,
            num_steps=times * runs,
            key=learn_key,
            callback=lambda step, metrics, clock=clock: clock.append(time.process_time()),
        )
        chosen[name] = result.hyperparams
        seconds[name] = (clock[-1] - clock[1]) * times * runs / max(times * runs - 1, 1)
    before = time.process_time()
    candidates = [spaces.sample(key, SPACE) for key in jax.random.split(search_key, config.trials)]
    values = [float(judge(select_key[None], one, task.train, task.valid)[0]) for one in candidates]
    seconds[f"{RANDOM}, {config.trials} trials"] = time.process_time() - before
    for trials in (max(config.trials // 6, 1), config.trials):
        chosen[f"{RANDOM}, {trials} trials"] = candidates[int(np.argmin(values[:trials]))]
    keys = jax.random.split(test_key, config.repeats)
    everything = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.train, task.valid)
    results = {}
    for name, strengths in chosen.items():
        valid = judge(keys, strengths, task.train, task.valid)[0]
        errors = [judge(keys, strengths, rows, test)[1] for rows in (task.train, everything)]
        results[name] = [float(x) for x in (valid, *errors)] + [seconds.get(name, math.nan)]
        say(f"{data}, seed {seed}, {name}: {np.round(results[name], 3)}")
    return results, chosen


def plot(runs: dict, config, path: Path) -> None:
    """Plots the strengths from `unrolled` and random search, for each seed and data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 3.6), sharey=True)
    names = {"`unrolled`": "o", f"{RANDOM}, {config.trials} trials": "x"}
    for axis, (data, seeds) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        for i, (name, marker) in enumerate(names.items()):
            for seed, (_, chosen) in enumerate(seeds):
                values = [float(chosen[name][s]) / STRENGTHS[s][3] for s in STRENGTHS]
                places = np.arange(len(STRENGTHS)) + 0.25 * i
                axis.plot(places, values, marker, color=f"C{i}", label=None if seed else name.replace("`", ""))
        axis.axhline(1.0, color="0.7", linewidth=1)
        axis.set(yscale="log", title=data)
        axis.set_xticks(np.arange(len(STRENGTHS)) + 0.1, STRENGTHS, rotation=30)
    np.atleast_1d(axes)[0].set(ylabel="strength found / set by hand")
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables(data: str, runs: list) -> str:
    """Returns the tables of scores and of strengths."""
    rows, chosen = [], []
    for name in runs[0][0]:
        valid, test, again, seconds = np.array([results[name] for results, _ in runs]).T
        cost = "" if math.isnan(seconds[0]) else f"{np.median(seconds):.1f}"
        rows.append([name, script.spread(valid, 3), script.spread(test, 2), script.spread(again, 2), cost])
        if runs[0][1][name] is not None:
            chosen.append([name, *(f"{np.median([float(c[name][s]) for _, c in runs]):.2g}" for s in STRENGTHS)])
    header = ["strengths", "validation loss", "test error, %", "trained on validation images too, %", "CPU s"]
    return (
        f"## {data}\n\n{script.table(header, rows)}\n\nStrengths (medians over seeds):\n\n"
        f"{script.table(['strengths of ' + data, *STRENGTHS], chosen)}\n\n"
    )


def main() -> None:
    parser = script.parser(__doc__, num_seeds=5)
    parser.add_argument("--data", nargs="+", choices=FILES, default=["MNIST"], help="which images")
    config = parser.parse_args()
    small = config.smoke
    config.seeds, config.data = (1, ["MNIST"]) if small else (config.seeds, config.data)
    config.num_rows, config.num_test = (20, 50) if small else (500, 5000)
    config.hidden, config.num_steps, config.batch, config.rate = (4, 10, 5, 3e-3) if small else (64, 400, 32, 3e-3)
    config.window, config.runs, config.online_runs, config.repeats = (5, 2, 1, 1) if small else (100, 10, 3, 3)

    def say(text):
        print(f"[{time.process_time():5.0f} s] {text}", flush=True)

    judge, rules = make_judge(config), make_rules(config)
    cost = costs.unrolled_cost(
        make_problem(config), SPACE, load(config.data[0], 0, config.num_rows)[0], config.num_steps
    )
    config.trials = math.ceil(config.runs * cost)
    runs = {
        data: [run_seed(data, seed, config, judge, rules, say) for seed in range(config.seeds)] for data in config.data
    }
    text = "".join(tables(data, seeds) for data, seeds in runs.items())
    text += (
        f"- Mean ± standard deviation over {config.seeds} seeds.\n"
        f"- Images of 14 × 14: {config.num_rows} to train on, as many to validate, {config.num_test} to test.\n"
        f"- Training: {config.hidden} hidden units, Adam, {config.num_steps} steps of {config.batch} images. Every "
        f"figure is a mean of {config.repeats} trainings from other initializations.\n"
        f"- `unrolled` and `truncated` see {config.runs} trainings, `truncated` with 1 step and `implicit` "
        f"{config.online_runs}. An unrolled hypergradient costs {cost:.1f} trainings in operations, hence "
        f"{config.trials} random trials.\n"
        "- CPU seconds are those of learning λ, without compilation.\n"
        "\nPublished results are by Mounsaveng et al. (affine transformations, one step ahead as T1–T2; residual "
        "networks, CIFAR-10 and larger data) and Lorraine et al. (three terms of the Neumann series, CIFAR-10). "
        "There, λ are the weights of a network that augments, and all images train it. So their accuracies are for "
        "another task and are not shown here. The claim of Mounsaveng et al. can be compared: learned augmentation "
        "is as good as carefully chosen augmentation, or better."
    )
    script.publish(__file__, "Strengths of data augmentation", text, config)
    if not small:
        plot(runs, config, config.out / "augmentation.png")


if __name__ == "__main__":
    script.run(main)

"""Loss weights of a multi-task network, learned by gradient, against equal weights and a grid.

A network classifies spoken digits (spectrograms of 14 × 14), and has few labels to learn from. It shares its hidden
layer with four auxiliary tasks on the same rows. The first three are the speaker, whether the digit is odd, and the
spectrogram itself. The fourth is a control that cannot help: a random class for each row. The inner loss is

    ℓ = digit loss + Σ_i w_i (auxiliary loss i),    λ = (the learning rate, w_1, ..., w_4),

and F(λ) is only the digit loss on validation rows after training, differentiated by `hypergrad.unrolled`. There are
three baselines: without auxiliary tasks, with all weights 1, and with the best of a grid of one common weight. The
learning rate is tuned for each of them on the same validation rows. The test rows are read once.

    python experiments/hyperparameters/loss_weights.py            # minutes; writes results/loss_weights.md and .png
    python experiments/hyperparameters/loss_weights.py --smoke    # seconds; prints only

Needs spoken_digits.npz in the folder that the environment variable METAOPT_DATA names.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from metaopt import base, hypergrad, inner, spaces, training

AUXILIARY = ("speaker", "odd", "reconstruction", "random classes")
SPACE = {
    "rate": spaces.interval(1e-4, 3e-2, log=True, default=2e-3),
    "weights": {name: spaces.interval(1e-3, 10.0, log=True, default=0.1) for name in AUXILIARY},
}
GRID = "one weight, best of a grid"
NUM_CLASSES = {"digit": 10, "speaker": 6, "odd": 2, "random classes": 10}


def load(seed: int, config):
    """Returns a task of spoken digits with the targets of all auxiliary tasks, and the test rows.

    Each part contains all speakers.
    """
    path = script.data_file(__file__, "spoken_digits.npz")
    with np.load(path, allow_pickle=False) as data:
        images, digit, speaker = data["images"], data["label"], data["group"]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    train, valid = config.num_train, config.num_train + config.num_valid
    x = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)
    x = ((x - x[order[:train]].mean(0)) / x[order[:train]].std()).astype(np.float32)
    rows = {
        "x": x,
        "digit": digit.astype(np.int32),
        "speaker": speaker.astype(np.int32),
        "odd": (digit % 2).astype(np.int32),
        "reconstruction": x,
        "random classes": rng.integers(0, 10, len(images)).astype(np.int32),
    }
    part = lambda rows_of_part: {name: jnp.asarray(x[rows_of_part]) for name, x in rows.items()}
    return base.Task(part(order[:train]), part(order[train:valid])), part(order[valid : valid + config.num_test])


def hidden_units(params, x):
    return jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"][None])


def head(params, name, h):
    return h @ params[name]["w"] + params[name]["b"][None]


def digit_loss(params, hyperparams, rows):
    logits = head(params, "digit", hidden_units(params, rows["x"]))
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows["digit"]).mean()


def error(params, rows):
    return 100 * jnp.mean(head(params, "digit", hidden_units(params, rows["x"])).argmax(1) != rows["digit"])


def train_loss(params, hyperparams, rows):
    h = hidden_units(params, rows["x"])
    total = 0.0
    for name in ("digit", *AUXILIARY):
        predicted, target = head(params, name, h), rows[name]
        if name == "reconstruction":
            loss = ((predicted - target) ** 2).mean()
        else:
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(predicted, target).mean()
        total += loss if name == "digit" else hyperparams["weights"][name] * loss
    return total


def make_problem(config) -> base.Problem:
    def init(key, hyperparams, data):
        sizes = {"hidden": (196, config.hidden), "reconstruction": (config.hidden, 196)}
        sizes |= {name: (config.hidden, num) for name, num in NUM_CLASSES.items()}
        keys = jax.random.split(key, len(sizes))
        return {
            name: {"w": jax.random.normal(k, size) * (1.4 / size[0]) ** 0.5, "b": jnp.zeros(size[1])}
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def optimizer(hp):
        return optax.flatten(optax.adam(lambda step: hp["rate"] * (1 - step / config.num_steps)))

    loop = inner.loop(train_loss, optimizer, init=init, sampler=inner.minibatch(config.batch))
    return inner.problem(loop, digit_loss)


def make_judge(config):
    """Returns `(keys, a batch of λ, task, test) -> [n, 3]`: validation loss, test loss and error, per λ."""
    train = inner.run(make_problem(config).loop, config.num_steps)

    @jax.jit
    def judge(keys, hyperparams, task, test):
        def one(hyperparams):
            def trained(key):
                params = train(key, hyperparams, task.train).params
                losses = digit_loss(params, None, task.valid), digit_loss(params, None, test)
                return jnp.stack([*losses, error(params, test)])

            return jax.lax.map(trained, keys).mean(0)

        return jax.lax.map(one, hyperparams)

    return judge


def stack(candidates):
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x, jnp.float32) for x in xs]), *candidates)


def common(rate: float, weight: float) -> dict:
    return {"rate": rate, "weights": {name: weight for name in AUXILIARY}}


def run_seed(seed: int, config, judge, learner, say):
    """Returns {name: [validation loss, test loss, error]} and {name: λ} of one seed."""
    task, test = load(seed, config)
    select_key, learn_key, test_key = jax.random.split(jax.random.key(seed), 3)
    select_keys, test_keys = (jax.random.split(key, config.repeats) for key in (select_key, test_key))
    rates = np.geomspace(3e-4, 2e-2, config.grid_rates)
    chosen = {}
    plans = {"no auxiliary task": (0.0,), "all weights 1": (1.0,), GRID: config.grid_weights}
    for name, weights in plans.items():
        candidates = [common(rate, weight) for rate in rates for weight in weights]
        values = np.asarray(judge(select_keys, stack(candidates), task, task.valid))[:, 0]
        chosen[name] = candidates[int(np.argmin(np.nan_to_num(values, nan=np.inf)))]
        say(f"{name}: validation {values.min():.4f}")

    result = training.fit(
        learner,
        lambda key: task,
        hyperparams=spaces.default(SPACE),
        space=SPACE,
        num_steps=config.outer_steps,
        key=learn_key,
        evaluate=lambda key, hyperparams: judge(select_keys, stack([hyperparams]), task, task.valid)[0, 0],
        eval_every=5,
    )
    chosen["a weight a task, hypergradient"] = result.best_hyperparams
    say(f"hypergradient: validation {np.round(result.evaluations, 4)}")
    results = np.asarray(judge(test_keys, stack(list(chosen.values())), task, test))
    return dict(zip(chosen, results, strict=True)), chosen


def plot(runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for i, (_, chosen) in enumerate(runs):
        weights = chosen["a weight a task, hypergradient"]["weights"]
        axis.plot(AUXILIARY, [float(weights[name]) for name in AUXILIARY], "o", color=f"C{i}", label=f"seed {i}")
    axis.axhline(0.1, color="0.7", linewidth=1, label="the start")
    axis.set(yscale="log", ylabel="weight found by hypergradient")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    config = script.parser(__doc__).parse_args()
    small = config.smoke
    config.seeds = 1 if small else config.seeds
    config.num_train, config.num_valid, config.num_test = (50, 50, 50) if small else (200, 500, 2000)
    config.hidden, config.num_steps, config.batch, config.repeats = (4, 3, 10, 1) if small else (48, 150, 40, 3)
    config.grid_rates = 1 if small else 6
    config.grid_weights = (0.0, 0.1) if small else (0.0, *np.geomspace(0.003, 10, 11))
    config.outer_steps = 2 if small else 30

    def say(text):
        print(f"[{time.process_time():5.0f} s] {text}", flush=True)

    problem = spaces.constrain(make_problem(config), SPACE)
    # Two trainings per estimate: the hypergradient of one would follow its own noise.
    estimator = hypergrad.over_seeds(hypergrad.unrolled(problem, num_steps=config.num_steps, remat="step"), 2)
    # The norm is usually 0.06, and sometimes 40 times that, at rates where training is unstable.
    outer = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adam(optax.cosine_decay_schedule(0.2, config.outer_steps), b2=0.9)
    )
    judge, learner = make_judge(config), training.learner(estimator, outer)
    runs = [run_seed(seed, config, judge, learner, say) for seed in range(config.seeds)]
    names = list(runs[0][0])
    rows = []
    for name in names:
        values = np.array([results[name] for results, _ in runs])
        grid = np.array([results[GRID] for results, _ in runs])
        gap = "" if name == GRID else script.spread(values[:, 1] - grid[:, 1])
        rows.append(
            [name, script.spread(values[:, 0]), script.spread(values[:, 1]), gap, script.spread(values[:, 2], 2)]
        )
    text = script.table(["weights", "validation loss", "test loss", "test loss − the grid's", "test error, %"], rows)
    text += "\n\nThe chosen values (medians over seeds):\n\n"
    middle = lambda name, get: f"{np.median([float(get(chosen[name])) for _, chosen in runs]):.3g}"
    text += script.table(
        ["weights", "rate", *AUXILIARY],
        [
            [n, middle(n, lambda h: h["rate"]), *(middle(n, lambda h, a=a: h["weights"][a]) for a in AUXILIARY)]
            for n in names
        ],
    )
    text += (
        "\n\n"
        f"- Rows: {config.num_train} to train on, {config.num_valid} to validate, {config.num_test} to test, all "
        "speakers in each.\n"
        f"- The network has {config.hidden} hidden units. Training takes {config.num_steps} steps of Adam with "
        f"{config.batch} rows.\n"
        f"- Every choice and every figure is a mean of {config.repeats} trainings.\n"
        f"- The grid has {config.grid_rates} rates × {len(config.grid_weights)} weights. The hypergradient took "
        f"{config.outer_steps} outer steps of two trainings.\n"
        f"- Mean ± standard deviation over {config.seeds} seeds."
    )
    script.publish(__file__, "Loss weights of a multi-task network", text, config)
    if not small:
        plot(runs, config.out / "loss_weights.png")


if __name__ == "__main__":
    script.run(main)

"""Weight decay for each layer of a small transformer language model, learned by gradient, against one tuned decay.

A decoder of two layers reads characters of Shakespeare. There is little training text, so decay matters. λ is the peak
learning rate, and a decoupled decay (AdamW's) for each of six groups of weights. The groups are embeddings, attention
and MLP of both layers, and the output.

* `hypergrad.unrolled` differentiates the validation loss at the end of training through all steps, in mixed mode with
`remat="step"`.
* `hypergrad.truncated` tunes the same λ during training, and looks back over one window of steps at a time.
* A grid of one rate and one decay for all layers is the usual alternative. All three get the same compute: the
operations of the outer steps of the first one (`hypergrad.flops`).

Every choice is made on validation text. The chosen λ are trained again from new initializations, and the test text is
read once. Losses are in nats per character.

    python experiments/hyperparameters/layer_decay.py            # minutes; writes results/layer_decay.md and .png
    python experiments/hyperparameters/layer_decay.py --smoke    # seconds; prints only

Needs tiny_shakespeare.txt.gz in the folder that the environment variable METAOPT_DATA names.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.hyperparameters import costs, transformer
from metaopt import base, hypergrad, inner, spaces, training

GROUPS = ("embed", "attention 1", "mlp 1", "attention 2", "mlp 2", "output")
SPACE = {
    "rate": spaces.interval(1e-3, 1e-1, log=True, default=1e-2),
    "decay": {group: spaces.interval(1e-3, 10.0, log=True, default=1e-1) for group in GROUPS},
}
GRID = "one decay, best of a grid"


def load(seed: int, config):
    """Returns a task of rows of `context` + 1 characters, and the test rows.

    Training, validation and test text follow one another with gaps, at a place that depends on the seed.
    """
    _, codes = transformer.read_text(__file__)
    length, gap = config.context + 1, 10_000
    sizes = [config.num_train, config.num_valid, config.num_test]
    needed = sum(sizes) * length + len(sizes) * gap
    start = int(np.random.default_rng(seed).integers(len(codes) - needed))
    parts = []
    for size in sizes:
        parts.append(jnp.asarray(codes[start : start + size * length].reshape(size, length), jnp.int32))
        start += size * length + gap
    return base.Task(parts[0], parts[1]), parts[2]


def mean_loss(params, hyperparams, rows):
    """Returns the loss in nats per character."""
    return transformer.row_losses(params, rows).mean()


def make_problem(config) -> base.Problem:
    def init(key, hyperparams, data):
        return transformer.init_params(key, config.context, config.width)

    def optimizer(hp):
        def decay(updates, params):
            return {
                group: jax.tree.map(lambda u, p, d=hp["decay"][group]: u + d * p, updates[group], params[group])
                for group in updates
            }

        def rate(step):
            return hp["rate"] * (1 - step / config.num_steps)

        return optax.chain(
            optax.flatten(optax.scale_by_adam(b2=0.98)), optax.stateless(decay), optax.scale_by_learning_rate(rate)
        )

    loop = inner.loop(mean_loss, optimizer, init=init, sampler=inner.minibatch(config.batch))
    return inner.problem(loop, mean_loss)


def make_judge(config):
    """Returns `(keys, a batch of λ, task, test) -> [n, 2]`: validation and test loss of one training per key and λ."""
    train = inner.run(make_problem(config).loop, config.num_steps)

    @jax.jit
    def judge(keys, hyperparams, task, test):
        def one(args):
            params = train(*args, task.train).params
            return jnp.stack([mean_loss(params, None, rows) for rows in (task.valid, test)])

        return jax.lax.map(one, (keys, hyperparams))

    return judge


def make_learners(config) -> dict:
    """Returns {name: (learner, outer steps)}.

    Both take the same number of inner steps, but differ in the steps of λ.
    """
    problem, steps = spaces.constrain(make_problem(config), SPACE), config.num_steps
    windows = steps // config.window
    plans = {
        "unrolled": (hypergrad.unrolled(problem, num_steps=steps, remat="step"), 1),
        "truncated": (
            hypergrad.truncated(problem, num_steps=steps, truncation_length=config.window, remat="step"),
            windows,
        ),
    }
    learners = {}
    for name, (estimator, times) in plans.items():
        rate = optax.cosine_decay_schedule(config.outer_rate / times**0.5, config.outer_steps * times)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.9))
        learners[f"a decay a layer, {name}"] = training.learner(estimator, optimizer), config.outer_steps * times
    return learners


def run_seed(seed: int, config, judge, learners, say):
    """Returns {name: [validation, test loss]} and {name: λ} of one seed."""
    task, test = load(seed, config)
    select_key, learn_key, test_key = jax.random.split(jax.random.key(seed), 3)
    select_keys = jax.random.split(select_key, config.repeats)
    chosen = {"the start": spaces.default(SPACE)}

    def validate(hyperparams):
        """Returns the mean validation loss of a few trainings. Test rows are not used."""
        return judge(select_keys, script.repeated(hyperparams, config.repeats), task, task.valid)[:, 0].mean()

    for name, (learner, steps) in learners.items():
        result = training.fit(
            learner,
            lambda key: task,
            hyperparams=spaces.default(SPACE),
            space=SPACE,
            num_steps=steps,
            key=learn_key,
            evaluate=lambda key, hyperparams: validate(hyperparams),
            eval_every=max(1, steps // 5),
        )
        chosen[name] = result.best_hyperparams
        say(f"{name}: validation {np.round(result.evaluations, 4)}")

    fractions = np.linspace(0.05, 0.95, config.side)
    points = np.array([(a, b) for a in fractions for b in fractions], np.float32)
    of_log_range = lambda leaf, fraction: jnp.asarray(leaf.low * (leaf.high / leaf.low) ** fraction)
    decays = {group: of_log_range(leaf, points[:, 1]) for group, leaf in SPACE["decay"].items()}
    grid = {"rate": of_log_range(SPACE["rate"], points[:, 0]), "decay": decays}
    values = judge(jax.random.split(select_key, len(points)), grid, task, task.valid)[:, 0]
    # The best few are evaluated again: the best of many single trainings is partly luck.
    best = np.argsort(np.nan_to_num(np.asarray(values), nan=np.inf))[: config.finalists]
    finalists = [jax.tree.map(lambda x, i=i: x[i], grid) for i in best]
    chosen[GRID] = min(finalists, key=lambda hyperparams: float(validate(hyperparams)))
    say(f"grid: validation {float(validate(chosen[GRID])):.4f}")

    keys = jax.random.split(test_key, config.test_repeats)
    losses = {n: np.asarray(judge(keys, script.repeated(h, len(keys)), task, test)).mean(0) for n, h in chosen.items()}
    return losses, chosen


def plot(runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    for k, name in enumerate(runs[0][1]):
        for i, (_, hyperparams) in enumerate(runs):
            decays = [float(hyperparams[name]["decay"][group]) for group in GROUPS]
            axis.plot(GROUPS, decays, "o-", color=f"C{k}", alpha=0.7, label=None if i else name)
    axis.set(yscale="log", ylabel="weight decay (one line a seed)")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    config = script.parser(__doc__).parse_args()
    small = config.smoke
    config.seeds = 1 if small else config.seeds
    config.context, config.width, config.batch = (8, 4, 2) if small else (24, 16, 8)
    config.num_train, config.num_valid, config.num_test = (20, 10, 10) if small else (150, 150, 600)
    config.num_steps, config.window = (4, 2) if small else (120, 20)
    config.outer_steps, config.outer_rate = (1, 0.4) if small else (15, 0.6)
    config.repeats, config.finalists, config.test_repeats = (1, 1, 1) if small else (3, 3, 5)

    def say(text):
        print(f"[{time.process_time():5.0f} s] {text}", flush=True)

    judge, learners = make_judge(config), make_learners(config)
    config.cost = costs.unrolled_cost(make_problem(config), SPACE, load(0, config)[0], config.num_steps)
    config.side = math.ceil(math.sqrt(config.outer_steps * config.cost))  # the grid gets the compute of the outer steps
    runs = [run_seed(seed, config, judge, learners, say) for seed in range(config.seeds)]
    names = list(runs[0][0])
    rows = []
    for name in names:
        valid, test = ([losses[name][i] for losses, _ in runs] for i in (0, 1))
        reference = [losses[GRID][1] for losses, _ in runs]
        gap = "" if name == GRID else script.spread(np.subtract(test, reference), 4)
        rows.append([name, script.spread(valid, 4), script.spread(test, 4), gap])
    text = script.table(["λ", "validation loss", "test loss", "test loss − the grid's"], rows)
    text += "\n\nThe chosen values (medians over seeds):\n\n"
    middle = lambda name, get: f"{np.median([float(get(h[name])) for _, h in runs]):.3g}"
    chosen = [
        [n, middle(n, lambda h: h["rate"]), *(middle(n, lambda h, g=g: h["decay"][g]) for g in GROUPS)] for n in names
    ]
    text += script.table(["λ", "rate", *GROUPS], chosen)
    windows = config.num_steps // config.window
    text += (
        "\n\n"
        f"- An unrolled hypergradient costs {config.cost:.1f} training runs, in operations.\n"
        f"- The searches take {config.outer_steps} unrolled hypergradients, or {config.outer_steps * windows} "
        f"truncated ones over {config.window} steps. The grid has {config.side} rates × {config.side} decays.\n"
        f"- A run is {config.num_steps} steps of {config.batch} rows of {config.context} characters, of "
        f"{config.num_train} rows. The width is {config.width}.\n"
        f"- The test loss is a mean of {config.test_repeats} trainings.\n"
        f"- Mean ± standard deviation over {config.seeds} seeds."
    )
    script.publish(__file__, "A weight decay for each layer of a language model", text, config)
    if not small:
        plot(runs, config.out / "layer_decay.png")


if __name__ == "__main__":
    script.run(main)

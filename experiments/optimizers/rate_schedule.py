"""Learning-rate schedules learned by gradients through thousands of steps, against greedy rules and tuned schedules.

There is one rate for each of W windows of a whole training run. The windows use `inner.piecewise`, the sharing of
Micaelli & Storkey, NeurIPS 2021, https://arxiv.org/abs/2007.07869. The run trains a small network on MNIST by SGD with
momentum.

* F(λ) is the validation loss at the end of training. It is differentiated through all of its T steps, by forward mode
(`hypergrad.forward`: memory does not depend on T) and by reverse mode (`hypergrad.unrolled`, `remat="sqrt"`). Both are
exact: the script shows their difference and costs.
* Greedy rules tune one rate during training, and look only a few steps ahead: `hypergrad.truncated` with one step
(T1–T2), `hypergrad.lookahead` (five) and `hypergrad.hypergradient_descent` (the next training batch). Wu et al., ICLR
2018, https://arxiv.org/abs/1803.02021, show why their rates are too small: in the short term, it helps most to stop
the noise.
* The best of a grid of constant rates, and of cosine schedules by their peak.

Everything starts from one rate, a hundredth of the range's top. Outer rates, steps and grids are chosen on validation
rows. The resulting schedules are then trained again, from several new initializations, and the test rows are read once.

    python experiments/optimizers/rate_schedule.py            # minutes; writes results/rate_schedule.md and .png
    python experiments/optimizers/rate_schedule.py --smoke    # seconds; prints only

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

LOW, HIGH, START = 1e-3, 1.0, 1e-2
BATCH, HIDDEN = 50, 32


def load(seed: int, num_train: int, num_valid: int):
    """Returns a task of MNIST's training rows, at half the resolution, and the test rows."""
    path = script.data_file(__file__, "mnist.npz")
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}

    def part(images, labels):
        x = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196) / 255
        return {"x": jnp.asarray(x - 0.13, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}

    rows = np.random.default_rng(seed).permutation(len(arrays["y_train"]))[: num_train + num_valid]
    images, labels = arrays["x_train"][rows], arrays["y_train"][rows]
    task = base.Task(part(images[:num_train], labels[:num_train]), part(images[num_train:], labels[num_train:]))
    return task, part(arrays["x_test"], arrays["y_test"])


def logits(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


def mean_loss(params, hyperparams, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"]).mean()


def error(params, batch):
    return jnp.mean(logits(params, batch["x"]).argmax(1) != batch["y"])


def make_problem(outer_batch=None) -> base.Problem:
    """Returns a problem with a hidden layer of ReLU, and SGD with momentum.

    The outer loss is on all validation rows, or on the draws of `outer_batch`.
    """

    def init(key, hyperparams, data):
        first, second = jax.random.split(key)
        return {
            "w1": jax.random.normal(first, (196, HIDDEN)) * (2 / 196) ** 0.5,
            "b1": jnp.zeros(HIDDEN),
            "w2": jax.random.normal(second, (HIDDEN, 10)) * HIDDEN**-0.5,
            "b2": jnp.zeros(10),
        }

    loop = inner.loop(
        mean_loss, lambda hp: optax.sgd(hp["rate"], momentum=0.9), init=init, sampler=inner.minibatch(BATCH)
    )
    return inner.problem(loop, mean_loss, outer_batch=outer_batch)


def space(windows: tuple[int, ...] = ()):
    return {"rate": spaces.interval(LOW, HIGH, log=True, default=START, shape=windows)}


def start(space):
    return spaces.to_unconstrained(space, spaces.default(space))


def per_step(rates, num_steps: int):
    """Expands one rate per window to one rate per step."""
    rates = jnp.asarray(rates)
    return rates[jnp.arange(num_steps) * rates.shape[0] // num_steps]


def cosine(peak: float, num_steps: int):
    return peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.arange(num_steps) / num_steps))


def train_and_judge(config):
    """Returns `(keys, schedules [n, T], task, test) -> [n, 3]`: validation loss, test loss and error.

    They are means over the keys.
    """
    loop = inner.piecewise(make_problem(), config.num_steps, num_steps=config.num_steps).loop
    train = inner.run(loop, config.num_steps)

    @jax.jit
    def run(keys, schedules, task, test):
        def one(args):
            key, rates = args
            params = train(key, {"rate": rates}, task.train).params
            losses = mean_loss(params, None, task.valid), mean_loss(params, None, test), error(params, test)
            return jnp.stack(losses)

        return jax.lax.map(lambda rates: jax.lax.map(lambda key: one((key, rates)), keys).mean(0), schedules)

    return run


def schedule_learner(config, outer_rate: float):
    """Returns the non-greedy learner: a rate for each window, through the whole horizon."""
    steps, windows = config.num_steps, config.windows
    scheduled = spaces.constrain(inner.piecewise(make_problem(), windows, num_steps=steps), space((windows,)))
    if config.mode == "forward":
        estimator = hypergrad.forward(scheduled, num_steps=steps)
    else:
        estimator = hypergrad.unrolled(scheduled, num_steps=steps, remat="sqrt")
    # A schedule near divergence can have hypergradients of any size. Clipping limits the norm for Adam to 1.
    decay = optax.cosine_decay_schedule(outer_rate, config.outer_steps)
    return training.learner(estimator, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(decay, b2=0.9)))


GREEDY = {
    "T1–T2 (1 step ahead)": lambda problem, steps: hypergrad.truncated(problem, num_steps=steps, truncation_length=1),
    "lookahead (5 steps ahead)": lambda problem, steps: hypergrad.lookahead(problem, num_steps=5),
    "hypergradient descent": lambda problem, steps: hypergrad.hypergradient_descent(problem),
}


def greedy(config, name: str):
    """Returns `(key, outer rates [n], task) -> schedules [n, T]`: a rate that is tuned during one training."""
    few = lambda key, task: inner.minibatch(500, replace=True)(key, 0, task.valid)  # validation rows for one step
    problem, steps = spaces.constrain(make_problem(few), space()), config.num_steps
    estimator = GREEDY[name](problem, steps)

    @jax.jit
    def tune(key, outer_rates, task):
        def one(outer_rate):
            learner = training.learner(estimator, optax.adam(outer_rate))

            def step(state, _):
                rate = spaces.to_constrained(space(), state.hyperparams)["rate"]  # the rate of this training step
                return learner.step(state)[0], rate

            return jax.lax.scan(step, learner.init(key, start(space()), task), length=steps)[1]

        return jax.lax.map(one, outer_rates)

    return tune


def run_seed(seed: int, config, programs, say) -> tuple[dict, dict]:
    """Returns results and schedules of one seed."""
    judge, tuners, learners = programs
    task, test = load(seed, config.num_train, config.num_valid)
    select_key, learn_key, test_key = jax.random.split(jax.random.key(seed), 3)
    select_keys = jax.random.split(select_key, config.repeats)
    steps, schedules = config.num_steps, {}

    def pick(name: str, candidates, settings):
        """Keeps the candidate with the smallest validation loss. Test rows are not used."""
        values = np.nan_to_num(np.asarray(judge(select_keys, candidates, task, task.valid))[:, 0], nan=np.inf)
        best = int(np.argmin(values))
        schedules[name] = candidates[best]
        say(f"{name}: {settings[best]:.3g}, validation {values[best]:.4f}")

    grid = np.geomspace(LOW, HIGH, config.grid + 2)[1:-1]
    schedules["the start, constant"] = jnp.full(steps, START)
    for name, tune in tuners.items():
        pick(name, tune(learn_key, jnp.asarray(config.greedy_rates), task), config.greedy_rates)
    pick("best constant rate of a grid", jnp.stack([jnp.full(steps, rate) for rate in grid]), grid)
    pick("best cosine of a grid", jnp.stack([cosine(rate, steps) for rate in grid]), grid)

    windows, best = space((config.windows,)), {}
    for outer_rate, learner in learners.items():
        result = training.fit(
            learner,
            lambda key: task,
            hyperparams=spaces.default(windows),
            space=windows,
            num_steps=config.outer_steps,
            key=learn_key,
            evaluate=lambda key, hp: judge(select_keys, per_step(hp["rate"], steps)[None], task, task.valid)[0, 0],
            eval_every=5,
        )
        best[result.best_value] = per_step(result.best_hyperparams["rate"], steps)
        say(f"{config.windows} windows, outer rate {outer_rate}: validation {np.round(result.evaluations, 4)}")
    schedules[f"{config.windows} windows, whole horizon"] = best[min(best)]

    test_keys = jax.random.split(test_key, config.repeats)
    results = np.asarray(judge(test_keys, jnp.stack(list(schedules.values())), task, test))
    return dict(zip(schedules, results, strict=True)), {name: np.asarray(rates) for name, rates in schedules.items()}


def compare_modes(config) -> list[list[str]]:
    """Compares forward with reverse on one problem and key: the hypergradients' difference, time and memory."""
    task, _ = load(0, config.num_train, config.num_valid)
    windows, rows, gradients = config.windows, [], {}
    for steps in config.compare_steps:
        scheduled = spaces.constrain(inner.piecewise(make_problem(), windows, num_steps=steps), space((windows,)))
        z, key = start(space((windows,))), jax.random.key(0)

        def plain(z, key, scheduled=scheduled, steps=steps):
            params = inner.run(scheduled.loop, steps)(key, z, task.train).params
            return mean_loss(params, None, task.valid)

        estimators = {
            "forward": hypergrad.forward(scheduled, num_steps=steps),
            'reverse, `remat="sqrt"`': hypergrad.unrolled(scheduled, num_steps=steps, remat="sqrt"),
        }
        calls = {"plain training": jax.jit(plain).lower(z, key).compile()}
        for name, e in estimators.items():
            calls[name] = jax.jit(lambda z, key, e=e: e.estimate(z, task, key)[0].hypergrad).lower(z, key).compile()
        seconds = {}
        for name, call in calls.items():
            times = []
            for _ in range(2):
                begin = time.process_time()  # processor time, so that other programs on the machine do not count
                gradients[name] = jax.block_until_ready(call(z, key))
                times.append(time.process_time() - begin)
            seconds[name] = min(times)
        a, b = (np.asarray(gradients[name].coordinates["rate"]) for name in estimators)
        for name, call in calls.items():
            rows.append(
                [
                    str(steps),
                    name,
                    f"{seconds[name] / seconds['plain training']:.1f}",
                    f"{call.memory_analysis().temp_size_in_bytes / 2**20:.1f}",
                    "" if not name.startswith("reverse") else f"{np.linalg.norm(a - b) / np.linalg.norm(b):.1e}",
                ]
            )
    return rows


def plot(schedules: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for k, name in enumerate(schedules[0]):
        for i, one in enumerate(schedules):
            style = {"color": f"C{k}", "linewidth": 1.2 if i else 2, "alpha": 0.4 if i else 1}
            axis.plot(one[name], label=None if i else name, **style)
    axis.set(yscale="log", xlabel="step", ylabel="learning rate (one line a seed)")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--num-steps", type=int, default=1000, help="T")
    config = parser.parse_args()
    small = config.smoke
    config.num_train, config.num_valid = (500, 500) if small else (5000, 5000)
    config.num_steps, config.seeds = (20, 1) if small else (config.num_steps, config.seeds)
    config.windows, config.repeats, config.grid = (2, 1, 2) if small else (8, 3, 15)
    config.outer_rates, config.outer_steps = ((0.3,), 2) if small else ((0.2, 0.5), 40)
    config.greedy_rates = (0.01,) if small else (0.01, 0.03, 0.1, 0.3)
    config.mode = "forward" if small else "reverse"
    config.compare_steps = (20,) if small else (1000, 4000)

    def say(text):
        print(f"[{time.process_time():5.0f} s] {text}", flush=True)

    costs = compare_modes(config)
    say("forward and reverse compared")
    greedy_names = list(GREEDY)[:1] if small else GREEDY
    learners = {rate: schedule_learner(config, rate) for rate in config.outer_rates}
    programs = train_and_judge(config), {n: greedy(config, n) for n in greedy_names}, learners
    runs = [run_seed(seed, config, programs, say) for seed in range(config.seeds)]
    rows = []
    for name in runs[0][0]:
        values = np.array([results[name] for results, _ in runs])
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(3)
        cells = [f"{m:.4f} ± {s:.4f}" for m, s in zip(mean[:2], spread[:2], strict=True)]
        rows.append([name, *cells, f"{100 * mean[2]:.2f} ± {100 * spread[2]:.2f}"])
    text = script.table(["schedule", "validation loss", "test loss", "test error, %"], rows)
    text += "\n\nThe cost of a hypergradient of all windows, at the start:\n\n"
    text += script.table(
        ["T", "mode", "time / plain training", "temporary MiB", "relative difference of the two"], costs
    )
    text += (
        "\n\n"
        f"- Rows: {config.num_train} to train on, {config.num_valid} to validate, and MNIST's 10,000 test rows.\n"
        f"- Network: 196, {HIDDEN} and 10 units. Training: SGD with momentum 0.9, {BATCH} rows a step, T = "
        f"{config.num_steps}.\n"
        f"- The grids have {config.grid} rates, of {config.repeats} trainings each.\n"
        f"- Outer rates were chosen on validation rows: of {', '.join(map(str, config.greedy_rates))} for greedy "
        f"rules, and of {', '.join(map(str, config.outer_rates))} for the windows. Each choice for the windows took "
        f"{config.outer_steps} hypergradients.\n"
        "- Micaelli & Storkey report that schedules learned in this way beat greedy ones on CIFAR-10 over 10⁴ steps. "
        "Their networks are larger, so none of their figures is comparable with these.\n"
        f"- Mean ± standard deviation over {config.seeds} seeds."
    )
    script.publish(__file__, "Learning-rate schedules by long-horizon gradients", text, config)
    if not small:
        plot([schedules for _, schedules in runs], config.out / "rate_schedule.png")


if __name__ == "__main__":
    script.run(main)

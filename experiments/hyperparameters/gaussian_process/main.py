"""Learns g, judges it and the controls on tables of other families, and writes the result."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import script
from experiments.hyperparameters import gaussian_process
from experiments.hyperparameters.gaussian_process import learning, model, report, tables
from experiments.hyperparameters.gaussian_process.learning import Settings
from metaopt import base, spaces

MODELS = {"Gaussian process": model.GAUSSIAN_PROCESS, "kernel ridge": model.KERNEL_RIDGE}
SIZES = (100, 30)  # training rows; the first one was fixed as the one for the aim
ADAM_RATE = 0.1
DEVELOPMENT_TABLES = 60  # one of each family
JUDGED_ROWS, JUDGED_WIDTH = 600, 64
STEPS = 20, 200  # without --full, only the first number


def _default(task: base.Task):
    own = model.space(task.train["columns"].shape[0])
    return own, spaces.default(own)


def judged_tasks(pool: tables.Pool, num_train: int, seed: int, settings: Settings, num_test: int) -> base.Task:
    """Returns one split of each table, with features. A small table keeps a third of its rows for the test."""
    arrays = jax.tree.map(jnp.asarray, pool._replace(family=None))

    def one(index, key):
        num = jnp.minimum(num_train, arrays.rows[index] * 2 // 3)
        task = tables.draw(arrays, index, key, num, (num_train, num_test))
        return tables.described(task, settings.likelihood)

    keys = jax.random.split(jax.random.key(10_000 + seed), len(pool.rows))
    return jax.jit(jax.vmap(one))(jnp.arange(len(pool.rows)), keys)


def coordinates(tuned: Callable, batch: base.Task, g, one, settings: Settings, steps) -> dict[str, Any]:
    """Returns method -> λ in unconstrained coordinates, with an axis of tasks."""
    few, many = steps
    over = lambda fn: jax.jit(lambda *arguments: jax.lax.map(lambda each: fn(*each), arguments))
    default = lambda task: spaces.to_unconstrained(*_default(task))
    heuristic = lambda task: spaces.to_unconstrained(_default(task)[0], model.median_heuristic(task))
    starts = {
        "default": over(default)(batch),
        "median heuristic": over(heuristic)(batch),
        "one λ": over(lambda task: learning.coordinates_of(one, task, settings, constant=True))(batch),
        "g": over(lambda task: learning.coordinates_of(g, task, settings))(batch),
    }
    adam = model.adam(tuned)
    ascend = jax.jit(lambda num, *pairs: jax.lax.map(lambda pair: adam(ADAM_RATE, *pair, num), pairs))
    ascended = {
        f"{name} + {num} steps": ascend(num, starts[name], batch)
        for name, num in (("default", few), ("default", many), ("one λ", few), ("g", few))
        if num
    }
    lbfgs = {f"default + {few} of L-BFGS": over(model.lbfgs(tuned, few))(starts["default"], batch)}
    return starts | ascended | lbfgs


@jax.jit
def judge(coordinates, batch: base.Task) -> jax.Array:
    """Returns [T, 2]: negative log predictive density and squared error on the test rows."""

    def one(pair):
        z, task = pair
        hp = spaces.to_constrained(_default(task)[0], z)
        alpha = model.solve(hp, task.train)
        return jnp.stack([model.predictive_density(alpha, hp, task), model.squared_error(alpha, hp, task)])

    return jax.lax.map(one, (coordinates, batch))


def run_seed(
    name: str, seed: int, bank: base.Task, judged: tables.Pool, settings: Settings, sizes, steps, folder
) -> dict:
    """Returns "size/method" -> [T, 2] of one model and one seed, and "one λ" -> its length scale, signal and noise."""
    own = MODELS[name]
    start = time.perf_counter()
    g = learning.kept(folder, f"{name}-g-{seed}", bank, own.outer, settings, seed)
    one = learning.kept(folder, f"{name}-one-{seed}", bank, own.outer, settings, seed, constant=True)
    print(f"{name}, seed {seed}: g and one λ learned in {time.perf_counter() - start:.0f} s", flush=True)
    results = {}
    for num in sizes:
        batch = judged_tasks(judged, num, seed, settings, max(judged.x.shape[1] - num, 1))
        for method, z in coordinates(own.tuned, batch, g, one, settings, steps).items():
            results[f"{num}/{method}"] = np.asarray(judge(z, batch))
            if method == "one λ":
                hp = spaces.to_constrained(model.space(judged.x.shape[2]), jax.tree.map(lambda leaf: leaf[0], z))
                results["one λ"] = np.stack([hp["lengthscale"][0], hp["signal"], hp["noise"]])
        print(f"  {num} rows: judged after {time.perf_counter() - start:.0f} s", flush=True)
    return results


def draws(pool: tables.Pool, settings: Settings, folder: Path | None) -> base.Task:
    """Returns the tasks to learn from."""

    def flat():
        leaves = jax.tree_util.tree_leaves_with_path(learning.draw_bank(pool, settings))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}

    parts: dict[str, dict] = {"train": {}, "valid": {}, "features": {}}
    for path, leaf in script.kept(folder, "bank", flat).items():
        part, name = path.split("/")
        parts[part][name] = jnp.asarray(leaf)
    return base.Task(**parts)


def main() -> None:
    parser = script.parser(gaussian_process.__doc__)
    parser.add_argument("--full", action="store_true", help="all seeds, both models")
    parser.add_argument("--development", action="store_true", help="the development families, and not the judged ones")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    parser.add_argument("--only", choices=tuple(MODELS), help="one of the models")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    path = Path(__file__).parent
    small = options.smoke
    script.data_file(path, "tabular_regression.npz")
    settings = learning.SMOKE if small else Settings()
    sizes, steps = ((SIZES, STEPS) if options.full else (SIZES[:1], (STEPS[0], 0))) if not small else ((20,), (2, 3))
    seeds = options.seeds if options.full else 1
    folder = None if options.keep is None or small else script.work_folder(options.keep, path)
    if small:
        pool, judged = tables.synthetic(4, settings.width, 60), None
    else:
        pool = tables.Pool(**script.kept(folder, "corpus", lambda: tables.corpus(settings.width)._asdict()))
        pool, development = tables.divided(pool)
        judged = tables.part(development, np.arange(DEVELOPMENT_TABLES)) if options.development else None
    bank = draws(pool, settings, folder)
    results: dict[str, list[dict]] = {}
    for name in [options.only] if options.only else MODELS if options.full or small else list(MODELS)[:1]:
        for seed in range(seeds):
            own = judged or tables.judged_pool(seed, JUDGED_WIDTH, 40 if small else JUDGED_ROWS)
            make = functools.partial(run_seed, name, seed, bank, own, settings, sizes, steps, folder)
            part = f"{name}-{seed}-{options.development}-rows-{sizes}-steps-{steps}".replace(" ", "")
            results.setdefault(name, []).append(script.kept(folder, part, make))
            family = own.family
    text = report.report(results, family, sizes, steps[0], settings, pool)
    title, stem = "Hyperparameters of Gaussian processes", "gaussian_process"
    stem += "_development" if options.development else ""
    if not small:
        options.out.mkdir(parents=True, exist_ok=True)
        report.plot(results, family, sizes[0], steps[0], options.out / f"{stem}.png")
    script.publish(path, title, text, options, name=stem, picture="Test log likelihood of each family")

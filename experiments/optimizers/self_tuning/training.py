"""Trains with every tuner, and measures the time of a step."""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers.self_tuning.config import (
    DECAY_START,
    DECAYS,
    FREE,
    OF_ALL,
    OF_SOME,
    SIGNALS,
    STARTS,
    TRUE_STARTS,
    TUNER,
    TUNERS,
)
from experiments.optimizers.self_tuning.problems import Problem, images, table, take
from metaopt import transforms


def trainer(problem: Problem, make, config, signal: int = 0, read=lambda state, params: params):
    """Returns `(key, parts, plans) -> [n], {name: [n, steps]}`.

    The first result is the loss of the scoring rows after each plan. The second result is λ at each step.

    `make(plan)` is the optimizer. With `signal`, it follows the validation loss of that number of rows.
    """

    def mean_loss(params, rows):
        return problem.loss(params, rows).mean()

    def train(key, parts, plan):
        optimizer = make(plan)
        init_key, key = jax.random.split(key)
        params = problem.init(init_key, parts[0][0])

        def step(carry, key):
            params, state = carry
            train_key, valid_key = jax.random.split(key)
            extra = {}
            if signal:
                extra = {"valid_grad_fn": lambda p: jax.grad(mean_loss)(p, take(valid_key, parts[1], signal))}
            grads = jax.grad(mean_loss)(params, take(train_key, parts[0], problem.batch))
            updates, state = optimizer.update(grads, state, params, **extra)
            used = state.hyperparams if hasattr(state, "hyperparams") else {}
            return (optax.apply_updates(params, updates), state), used

        start = params, optimizer.init(params)
        (params, state), used = jax.lax.scan(step, start, jax.random.split(key, config.num_steps))
        rows, num_rows = parts[2]
        losses = problem.loss(read(state, params), rows)
        return jnp.where(jnp.arange(len(losses)) < num_rows, losses, 0).sum() / num_rows, used

    return jax.jit(lambda key, parts, plans: jax.vmap(lambda plan: train(key, parts, plan))(plans))


def scheduled(rate, plan, num_steps: int):
    """AdamW with a rate, and with the plan's weight decay.

    With `plan["shaped"]` = 1, the rate rises over 20 steps and falls in a straight line to the end.
    """

    def rate_at(step):
        shape = jnp.minimum(1, (step + 1) / 20) * (1 - step / num_steps)
        return rate * jnp.where(plan["shaped"], shape, 1)

    return optax.adamw(rate_at, weight_decay=plan["decay"])


def bounded(hp):
    """Bounds the decay, so that a step removes at most the whole of a parameter."""
    return {**hp, "decay": jnp.minimum(hp["decay"], 1 / hp["rate"])}


def trainers(problem: Problem, config) -> dict:
    """Returns all methods, compiled once for all problems of these shapes."""

    def fixed(plan):
        return scheduled(plan["rate"], plan, config.num_steps)

    def tuned(plan, signal):
        def factory(hp):
            return scheduled(hp["rate"], {**plan, **hp}, config.num_steps)

        start = {"rate": plan["rate"]}
        if signal.decay:
            tuner = optax.partition(TUNERS, {name: name for name in TUNERS})
            start = {**start, "decay": DECAY_START}
            return transforms.self_tuning(factory, start, tuner, rule="cosine", projection_fn=bounded)
        return transforms.self_tuning(factory, start, TUNER, gap=signal.gap)

    methods = {"grid": trainer(problem, fixed, config)}
    for name, signal in SIGNALS.items():
        rows = int(signal.share * problem.batch)
        methods[name] = trainer(problem, functools.partial(tuned, signal=signal), config, signal=rows)
    for name, make in FREE.items():
        read = optax.contrib.schedule_free_eval_params if name == "schedule-free" else (lambda state, params: params)
        methods[name] = trainer(problem, lambda plan, make=make: make(), config, read=read)
    return methods


def plans(rates, shapes=(False, True), decay=1e-4):
    """Returns plans with each rate, first constant, and then with the shape."""
    rates, shaped = np.tile(rates, len(shapes)), np.repeat(shapes, len(rates))
    return jax.tree.map(jnp.asarray, {"rate": rates, "shaped": shaped, "decay": np.full(len(rates), decay)})


def run_problem(problems, methods, config):
    """Returns {method: losses of the seeds}, the best rate, and {method: {name: λ [seeds, steps]}} of the tuners."""
    grid = np.logspace(-4, 0, config.num_rates)
    keys = [jax.random.key(seed) for seed in range(len(problems))]

    def all_seeds(name, plans):
        outs = [methods[name](key, p.parts, plans) for key, p in zip(keys, problems, strict=True)]
        paths = jax.tree.map(lambda *leaves: np.stack(leaves), *(out[1] for out in outs))
        return np.nan_to_num(np.array([out[0] for out in outs]), nan=np.inf), paths

    losses, _ = all_seeds("grid", plans([*grid, 1e-3]))
    constant, shaped = losses[:, : len(grid)], losses[:, len(grid) + 1 : -1]
    best = constant.mean(0).argmin()
    results = {
        "best of the grid": constant[:, best],
        "AdamW, 1e-3": losses[:, len(grid)],
        "best of the grid, shaped": shaped[:, shaped.mean(0).argmin()],
    }
    decayed = [all_seeds("grid", plans(grid[::2], (False,), decay))[0] for decay in DECAYS]
    of_both = np.concatenate([constant, *decayed], axis=1)
    results["best of the grid, decay too"] = of_both[:, of_both.mean(0).argmin()]
    tuned = {}
    for name in SIGNALS:
        starts = OF_ALL + (OF_SOME if name in TRUE_STARTS else [])
        losses, paths = all_seeds(name, plans([grid[best] * STARTS[start] for start in starts]))
        for i, start in enumerate(starts):
            shaped = len(starts) + i
            results[f"{name}, {start}"], results[f"{name}, {start}, shaped"] = losses[:, i], losses[:, shaped]
            for column, shape in ((i, ""), (shaped, ", shaped")):
                tuned[f"{name}, {start}{shape}"] = jax.tree.map(lambda path, column=column: path[:, column], paths)
    for name in FREE:
        results[name] = np.nan_to_num(
            [methods[name](k, p.parts, {"_": jnp.zeros(1)})[0][0] for k, p in zip(keys, problems, strict=True)],
            nan=np.inf,
        )
    return results, grid[best], tuned


def overheads(problem: Problem, config) -> list[str]:
    """Returns the processor time of a tuner's step divided by that of AdamW.

    Programs take turns, and the smallest of several times counts.
    """
    methods = trainers(problem, config)
    train, valid, (rows, _) = problem.parts
    parts = train, valid, (jax.tree.map(lambda x: x[:1], rows), jnp.asarray(1))  # the final loss costs almost nothing
    times = {name: [] for name in ("grid", *SIGNALS)}
    for _ in range(config.repeats + 1):  # the first run compiles
        for name, all_times in times.items():
            start = time.process_time()
            jax.block_until_ready(methods[name](jax.random.key(0), parts, plans([1e-3], (True,))))
            all_times.append(time.process_time() - start)
    least = {name: min(all_times[1:]) for name, all_times in times.items()}
    micro = f"{1e6 * least['grid'] / config.num_steps:.0f}"
    return [str(config.hidden), str(problem.batch), micro, *(f"{least[name] / least['grid']:.2f}" for name in SIGNALS)]


def measure(names: dict, config) -> dict:
    """Returns {problem: result of `run_problem`}."""
    compiled, outcomes = {}, {}
    for name, load in names.items():
        problems = [load(name, seed, config) for seed in range(config.seeds)]
        if load not in compiled:
            compiled[load] = trainers(problems[0], config)
        outcomes[name] = run_problem(problems, compiled[load], config)
        print(f"[{time.process_time():5.0f} s] {name}", flush=True)
    return outcomes


def measure_time(config) -> list[list[str]]:
    small = config.smoke
    sizes = [(config.hidden, config.batch)] if small else [(64, 128), (256, 128)]
    timed = []
    for hidden, batch in sizes:
        timing = argparse.Namespace(**{**vars(config), "hidden": hidden, "batch": batch, "num_steps": 100})
        timed.append(overheads(table("yeast", 0, timing) if small else images("mnist", 0, timing), timing))
    return timed

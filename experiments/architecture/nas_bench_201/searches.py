"""Trains supernets, and records the cell that α gives after every epoch."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.architecture.nas_bench_201.config import FULL, LATE, Config
from metaopt import base, hypergrad, inner, nas, training

PRIMITIVES = nas.nas_bench_201_space().cells["cell"].edges[0].ops  # a digit of the table is an index
SKIP = PRIMITIVES.index("skip_connect")


def images(path: Path, config: Config) -> tuple[base.Task, dict]:
    """Returns the two halves of the training images, and validation images for choices after training."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in ("x_train", "y_train", "x_val", "y_val")}
    factor = 32 // config.size
    small = lambda x: x.reshape(len(x), config.size, factor, config.size, factor, 3).mean((2, 4), dtype=np.float32)
    x, x_val = small(arrays["x_train"]), small(arrays["x_val"])
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    order = np.random.default_rng(0).permutation(len(x))
    half = lambda rows: {
        "x": jnp.asarray((x[rows] - mean) / std, float),
        "y": jnp.asarray(arrays["y_train"][rows], jnp.int32),
    }
    task = base.Task(half(order[: len(x) // 2]), half(order[len(x) // 2 :]))
    return task, {"x": jnp.asarray((x_val - mean) / std, float), "y": jnp.asarray(arrays["y_val"], jnp.int32)}


def augmented(key: jax.Array, batch: dict) -> dict:
    """Mirrors images at random, and shifts them by at most an eighth of the size (4 of 32).

    Pixels beyond the edges are zeros.
    """
    x = batch["x"]
    num, size, most = len(x), x.shape[1], x.shape[1] // 8
    mirror_key, shift_key = jax.random.split(key)
    mirror = jax.random.bernoulli(mirror_key, shape=(num, 1, 1, 1))
    x = jnp.where(mirror, x[:, :, ::-1], x)
    x = jnp.pad(x, [(0, 0), (most, most), (most, most), (0, 0)])
    shifts = jax.random.randint(shift_key, (num, 2), 0, 2 * most + 1)
    cut = lambda x, corner: jax.lax.dynamic_slice(x, (corner[0], corner[1], 0), (size, size, 3))
    return {**batch, "x": jax.vmap(cut)(x, shifts)}


def searches(config: Config) -> dict[str, tuple[nas.Search, optax.GradientTransformation, int]]:
    """Returns name -> search, optimizer of α, and the number of steps for which one estimate counts.

    A search that counts several steps for an estimate takes fewer estimates.
    """
    steps, rows = config.num_steps, inner.minibatch(config.batch)

    def sampler(key, step, data):
        return augmented(jax.random.fold_in(jax.random.fold_in(key, 1), step), rows(key, step, data))

    def outer_batch(key, task):
        index_key, key = jax.random.split(key)
        index = jax.random.randint(index_key, (config.batch,), 0, len(task.valid["y"]))
        return augmented(key, jax.tree.map(lambda leaf: leaf[index], task.valid))

    def sgd(hyperparams):  # as in NAS-Bench-201
        rate = optax.cosine_decay_schedule(0.025, steps, 0.001 / 0.025)
        return optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(rate, momentum=0.9, nesterov=True))

    network = nas.nas_bench_201_space(channels=config.channels, cells_per_stage=config.cells)
    options: dict[str, Any] = {"ops": nas.NAS_BENCH_201_OPS, "decay": 5e-4, "optimizer": sgd, "sampler": sampler}
    options.update(outer_batch=outer_batch, keep=None)
    make = lambda method, **more: method(network, (config.size, config.size, 3), **options, **more)

    def adam(factor=1.0, rest=0.0):
        """Returns the optimizer of α in DARTS.

        With fewer steps, the rate is larger, so that α can move as far. `factor` multiplies the rate. For the share
        `rest` of the steps, α does not move.
        """
        rate = 3e-4 * factor * FULL.num_steps / steps
        schedule = optax.piecewise_constant_schedule(0.0 if rest else rate)
        if rest:
            schedule = lambda step: jnp.where(step < rest * steps, 0.0, rate)
        return optax.chain(optax.add_decayed_weights(1e-3), optax.adam(schedule, b1=0.5, b2=0.999))

    # This search also measures the curvature. α is read after every epoch, whether or not the rule would stop there.
    first = make(nas.robust_darts, every=config.every, num_iterations=10, **LATE)
    solver = hypergrad.neumann(num_steps=3, rate=0.025)
    return {
        "DARTS, first order": (first, adam(), 1),
        "iDARTS, T = 4": (make(nas.implicit_darts, num_steps=4, solver=solver), adam(4.0), 4),
        "GDAS": (make(nas.gdas, num_steps=steps), adam(), 1),
        "PC-DARTS": (make(nas.pc_darts, partial=min(4, config.channels)), adam(2.0, rest=0.3), 1),
        "DARTS−": (make(nas.darts_minus, num_steps=steps), adam(), 1),
        "β-DARTS": (make(nas.beta_darts, num_steps=steps), adam(), 1),
        "DARTS, second order": (make(nas.darts, order="second"), adam(), 1),
        "DARTS, exact": (make(nas.darts, order="exact"), adam(), 1),
        "DARTS, unrolled, T = 20": (make(nas.unrolled_darts, num_steps=20), adam(4.0), 4),
    }


def recording(search: nas.Search) -> base.Estimator:
    """Returns the search's estimator, with the mixing weights [6, 5] among its metrics."""

    def estimate(hyperparams, task, state):
        estimate, state = search.estimator.estimate(hyperparams, task, state)
        weights = search.weights(hyperparams)["cell"]
        return estimate._replace(metrics={**estimate.metrics, "weights": weights}), state

    return search.estimator._replace(estimate=estimate)


def supernet_accuracies(search, result, train, valid) -> dict[str, float]:
    """Returns accuracies on validation images: of the supernet, and of its cell with the same weights.

    Normalization uses training images.
    """
    state, mixed = result.state.estimator_state, search.weights(result.hyperparams)
    inner_state = getattr(getattr(state, "estimator", state), "inner", None)
    if inner_state is None:  # unrolled: every estimate trains new weights
        return {}
    # A mixture runs all ops, but GDAS's own supernet only runs the strongest one.
    dense = {"ops": nas.NAS_BENCH_201_OPS, "partial": search.settings["partial"]}
    net = nas.supernet(search.supernet.network, search.supernet.in_shape, **dense)
    params = search.problem.loop.params(inner_state)
    one_hot = nas.one_hot(net.network, search.genotype(result.hyperparams))
    judge = lambda weights: round(nas.trained_network(net, params, train, weights=weights).accuracy(valid), 4)
    return {"mixed": judge(mixed), "inherited": judge(one_hot)}


def run_search(search, optimizer, steps_each, task, valid, config, seed, folder: Path, row_of: Callable) -> dict:
    """Runs one search. The cells at the end of every epoch are saved next to its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "cells.json"
    cells = {int(k): v for k, v in json.loads(kept.read_text()).items()} if kept.exists() else {}
    every = max(config.every // steps_each, 1)

    def callback(step, metrics):
        if step % every == 0:
            cells[step] = [row_of(metrics["weights"]), float(metrics["value"]), float(metrics.get("curvature", "nan"))]
            kept.write_text(json.dumps(cells))

    start_key, key = jax.random.split(jax.random.key(seed))
    result = training.fit(
        training.learner(recording(search), optimizer),
        lambda key: task,
        hyperparams=search.hyperparams(start_key),
        num_steps=config.num_steps // steps_each,
        key=key,
        callback=callback,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=every * max(config.num_epochs // 4, 1),
        settings=search.settings,
    )
    weights = np.asarray(search.weights(result.hyperparams)["cell"])
    rows, values, curvatures = zip(*(cells[step] for step in sorted(cells)), strict=True)
    return {
        "row": row_of(weights),
        "rows": list(rows),
        "values": [round(v, 4) for v in values],
        "curvatures": [round(c, 6) if np.isfinite(c) else None for c in curvatures],
        "weights": np.round(weights, 4).tolist(),
        **supernet_accuracies(search, result, task.train, valid),
    }


def run_one_shot(task, valid, config: Config, seed: int, row_of: Callable) -> dict:
    """Runs single-path one-shot with three times the steps, each of which costs a third.

    The result is the best of random cells by validation loss.
    """
    steps = 3 * config.num_steps
    rate = optax.cosine_decay_schedule(0.025, steps, 0.001 / 0.025)
    sgd = lambda hp: optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(rate, momentum=0.9, nesterov=True))
    rows = inner.minibatch(config.batch)
    network = nas.nas_bench_201_space(channels=config.channels, cells_per_stage=config.cells)
    one_shot = nas.single_path_one_shot(
        network,
        (config.size, config.size, 3),
        ops=nas.NAS_BENCH_201_OPS,
        num_steps=steps,
        decay=5e-4,
        optimizer=sgd,
        sampler=lambda key, step, data: augmented(jax.random.fold_in(key, step + 2**20), rows(key, step, data)),
    )
    params = jax.jit(one_shot.train)(jax.random.key(seed), task.train)
    batch = jax.tree.map(lambda leaf: leaf[:512], valid)
    cells = [genotype_of(digits) for digits in itertools.product(range(len(PRIMITIVES)), repeat=6)]
    drawn = np.random.default_rng(seed).choice(len(cells), config.one_shot_cells, replace=False)
    losses = [float(one_shot.score(params, cells[i], batch)) for i in drawn]
    row = lambda i: row_of(nas.one_hot(network, cells[i])["cell"])
    return {"row": row(drawn[int(np.argmin(losses))]), "drawn": [row(i) for i in drawn], "losses": losses}


def genotype_of(digits) -> nas.Genotype:
    pairs = [(s, t) for t in (1, 2, 3) for s in range(t)]
    ops = [PRIMITIVES[d] for d in digits]
    return {"cell": tuple((*p, op) for p, op in zip(pairs, ops, strict=True) if op != "none")}

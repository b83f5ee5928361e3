"""Trains supernets of NAS-Bench-201 on real images, and looks up the resulting cells in the table.

A supernet of the space is trained on one half of the training images, and each searcher trains α on the other half. The
final α gives one of the 15,625 cells of the benchmark. Their test accuracies after 200 epochs on CIFAR-10, CIFAR-100
and ImageNet16-120 are known, so nothing has to be trained again. Searchers have the same steps, batches and rates,
except for the changes of their papers. No choice depends on a test accuracy. Only searchers that say so see the table.

RobustDARTS and the stop by the number of skips are two more ways to read the run of first-order DARTS. The dominant
eigenvalue in α of its validation loss is measured at the end of every epoch. So one run gives three rows. (As separate
searches they are `nas.robust_darts` and `nas.darts_plus`, which choose the same epoch.)

Other rows use the table's validation accuracies after 12 epochs (its only true validation): random search, regularized
evolution, and the best architecture of the other two tasks. The next row is the constant cell 9930, which is nearly the
best on every task. The last rows are the best of 100 random cells by training-free scores at initialization, or by
their FLOPs.

    python experiments/nas_bench_201.py            forty minutes on a core: 16x16 images, C = 8, N = 1, 300 steps
    python experiments/nas_bench_201.py --full     the benchmark's scale: 32x32, C = 16, N = 5, batch 64, 19,500 steps
    python experiments/nas_bench_201.py --smoke    seconds; prints only
    python experiments/nas_bench_201.py --report   only the report of the finished runs

Every finished (searcher, seed) is saved in results/nas_bench_201.json and does not run again. A search that is killed
continues from its checkpoint. Images and tables are read from the folder that METAOPT_DATA names. It has 10,000
training images of CIFAR-10, two fifths of those in the searches of the benchmark's authors. So 50 of their epochs are
125 of ours.
"""

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from data import benchmarks
from scipy.stats import rankdata, spearmanr

from metaopt import base, blackbox, hypergrad, inner, nas, spaces, training


class Config(NamedTuple):
    size: int  # of images
    channels: int
    cells: int  # N, per stage
    batch: int
    num_steps: int
    num_epochs: int  # cells are recorded at their ends
    num_scored: int  # cells whose training-free scores are compared
    one_shot_cells: int  # random cells from which single-path one-shot chooses

    @property
    def every(self) -> int:
        return self.num_steps // self.num_epochs


QUICK = Config(16, 8, 1, 16, 300, 15, 100, 100)
FULL = Config(32, 16, 5, 64, 19_500, 50, 1_000, 1_000)
SMOKE = Config(4, 2, 1, 4, 6, 2, 3, 3)
SKIP = nas.NAS_BENCH_201_PRIMITIVES.index("skip_connect")
SCREENED = 100  # cells from which training-free scores choose
LATE = {"start": 10, "window": 5, "delta": 4}  # settings of RobustDARTS


# ---- Images ---------------------------------------------------------------------------------------------------------


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
    cut = lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (size, size, 3))
    return {**batch, "x": jax.vmap(cut)(x, shifts)}


# ---- Searches -------------------------------------------------------------------------------------------------------


def searches(config: Config) -> dict[str, tuple[nas.Search, optax.GradientTransformation, int]]:
    """Returns name -> search, optimizer of α, and the number of other searches' steps that count as one estimate."""
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
    of = lambda method, **more: method(network, (config.size, config.size, 3), **options, **more)

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

    first = of(nas.darts, order="first")
    watch: dict[str, Any] = {**LATE, "every": config.every, "num_iterations": 10}
    first = first._replace(estimator=nas.stopped_by_curvature(first.estimator, first.problem, **watch))
    solver = hypergrad.neumann(num_steps=3, rate=0.025)
    return {
        "DARTS, first order": (first, adam(), 1),
        "iDARTS, T = 4": (of(nas.implicit_darts, num_steps=4, solver=solver), adam(4.0), 4),
        "GDAS": (of(nas.gdas, num_steps=steps), adam(), 1),
        "PC-DARTS": (of(nas.pc_darts, partial=min(4, config.channels)), adam(2.0, rest=0.3), 1),
        "DARTS−": (of(nas.darts_minus, num_steps=steps), adam(), 1),
        "β-DARTS": (of(nas.beta_darts, num_steps=steps), adam(), 1),
        "DARTS, second order": (of(nas.darts, order="second"), adam(), 1),
        "DARTS, exact": (of(nas.darts, order="exact"), adam(), 1),
        "DARTS, unrolled, T = 20": (of(nas.unrolled_darts, num_steps=20), adam(4.0), 4),
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
    state, found = result.state.estimator_state, search.weights(result.hyperparams)
    inner_state = getattr(getattr(state, "estimator", state), "inner", None)
    if inner_state is None:  # unrolled: every estimate trains new weights
        return {}
    # A mixture runs all ops, but GDAS's own supernet only runs the strongest one.
    dense = {"ops": nas.NAS_BENCH_201_OPS, "partial": search.settings["partial"]}
    net = nas.supernet(search.supernet.network, search.supernet.in_shape, **dense)
    params = search.problem.loop.params(inner_state)
    one_hot = nas.one_hot(net.network, search.genotype(result.hyperparams))
    judge = lambda weights: round(nas.trained_network(net, params, train, weights=weights).accuracy(valid), 4)
    return {"mixed": judge(found), "inherited": judge(one_hot)}


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
    cells = nas.nas_bench_201_genotypes()
    drawn = np.random.default_rng(seed).choice(len(cells), config.one_shot_cells, replace=False)
    losses = [float(one_shot.score(params, cells[i], batch)) for i in drawn]
    row = lambda i: row_of(nas.one_hot(network, cells[i])["cell"])
    return {"row": row(drawn[int(np.argmin(losses))]), "drawn": [row(i) for i in drawn], "losses": losses}


# ---- Training-free scores -------------------------------------------------------------------------------------------


def genotype_of(digits) -> nas.Genotype:
    pairs = [(s, t) for t in (1, 2, 3) for s in range(t)]
    ops = [nas.NAS_BENCH_201_PRIMITIVES[d] for d in digits]
    return {"cell": tuple((*p, op) for p, op in zip(pairs, ops, strict=True) if op != "none")}


def run_scores(task, table, config: Config, seed: int) -> dict:
    """Computes our scores of random cells. The screened searches choose from the same cells."""
    network = nas.nas_bench_201_space(channels=config.channels, cells_per_stage=config.cells)
    score = nas.training_free_scores(network, (config.size, config.size, 3), ops=nas.NAS_BENCH_201_OPS)
    batch = jax.tree.map(lambda leaf: leaf[:64], task.train)
    rows = np.random.default_rng(seed).choice(len(table.encodings), config.num_scored, replace=False)
    found: dict[str, list] = {"rows": rows.tolist()}
    for row in rows:
        for name, value in score(jax.random.key(seed), genotype_of(table.encodings[row]), batch).items():
            found.setdefault(name, []).append(float(value) if np.isfinite(value) else None)
    return found


def screened(values: dict[int, float]) -> int:
    """Returns the best of `SCREENED` random cells, each drawn once.

    It is the first trial of `nas.screened_random_search`.
    """
    return max(list(values)[:SCREENED], key=values.__getitem__)


# ---- Searches in the table ------------------------------------------------------------------------------------------


def table_searches(table: nas.Benchmark, num_seeds: int, num: int) -> dict[str, np.ndarray]:
    """Returns name -> [seeds, tasks] test accuracies of the best of `num` cells, by each task's own validation."""
    found: dict[str, np.ndarray] = {}
    space = {name: spaces.integer(0, 4) for name in table.dims}
    rows = {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}
    searchers = {
        f"random search, {num} cells": blackbox.random_search(first=()),
        f"regularized evolution, {num} cells": blackbox.regularized_evolution(population_size=10, sample_size=3),
    }
    for name, searcher in searchers.items():
        accuracies = np.zeros((num_seeds, len(table.tasks)))
        for seed in range(num_seeds):
            for t in range(len(table.tasks)):
                state, tried = searcher.init(jax.random.key(seed), space), []
                for _ in range(num):
                    (trial,), state = searcher.ask(state, 1)
                    row = rows[tuple(trial.configuration.values())]
                    outcome = float(table.valid[row, t, -1])
                    state = searcher.tell(state, [trial._replace(outcome=outcome, status="COMPLETE")])
                    tried.append((outcome, row))
                accuracies[seed, t] = 100 - table.test[min(tried)[1], t]
        found[name] = accuracies
    ranks = np.stack([rankdata(table.valid[:, t, -1]) for t in range(len(table.tasks))], 1)
    others = [np.delete(ranks, t, 1).mean(1).argmin() for t in range(len(table.tasks))]
    found["best of the other tasks"] = 100 - table.test[others, range(len(table.tasks))][None]
    found["the cell 9930"] = 100 - table.test[[9930]]
    found["a random cell"] = 100 - table.test.mean(0)[None]
    found["the best cell of each task, by its test"] = 100 - table.test.min(0)[None]
    return found


# ---- Report ---------------------------------------------------------------------------------------------------------


def outcomes(runs: dict, table, data, num_seeds: int) -> dict[str, list[int]]:
    """Returns name -> the resulting rows, one per seed, for all methods that use no outcome of the table."""
    found: dict[str, list[int]] = {}
    skips = lambda row: int((table.encodings[row] == SKIP).sum())
    for name, seeds in runs.items():
        if name == "scores":
            flops = data["flops_params_M_cifar10"][:, 0]
            for run in seeds.values():
                columns = {s: run[s] for s in nas.SCORES}
                columns["FLOPs"] = flops[run["rows"]].tolist()
                for column, values in columns.items():
                    of = {r: -np.inf if v is None else v for r, v in zip(run["rows"], values, strict=True)}
                    found.setdefault(f"best of {SCREENED} by {column}", []).append(screened(of))
            continue
        found[name] = [run["row"] for run in seeds.values()]
        if name == "DARTS, first order":
            for run in seeds.values():
                curvatures = [np.nan if c is None else c for c in run["curvatures"]]
                stops = {
                    "RobustDARTS": nas.sharpness_stop(curvatures, **LATE),
                    "DARTS, stopped at two skips": nas.skip_count_stop([skips(r) for r in run["rows"]], most=1),
                }
                for stop, epoch in stops.items():
                    found.setdefault(stop, []).append(run["row"] if epoch is None else run["rows"][epoch])
    return found


def report(runs: dict, table, data, config: Config, options) -> str:
    found, count = outcomes(runs, table, data, options.seeds), lambda row, op: int((table.encodings[row] == op).sum())
    header = ["", "seeds", *table.tasks, "CIFAR-10, by seed", "skips", "none", "seconds"]
    rows = []
    for name, cells in found.items():
        accuracies = 100 - table.test[cells]
        seconds = [run["seconds"] for run in runs.get(name, {}).values()]
        rows.append(
            [
                name,
                str(len(cells)),
                *(script.spread(accuracies[:, t], 2) for t in range(len(table.tasks))),
                " ".join(f"{a:.2f}" for a in accuracies[:, 0]),
                " ".join(str(count(row, SKIP)) for row in cells),
                " ".join(str(count(row, 0)) for row in cells),
                f"{np.mean(seconds):.0f}" if seconds else "",
            ]
        )
    known = table_searches(table, 2 if options.smoke else 50, 5 if options.smoke else 100)
    for name, accuracies in known.items():
        told = [
            script.spread(accuracies[:, t], 2) if len(accuracies) > 1 else f"{accuracies[0, t]:.2f}" for t in range(3)
        ]
        rows.append([name, str(len(accuracies)), *told, "", "", "", ""])
    lines = [
        "## Test accuracy of the cells that were found (%, after 200 epochs, from the table)",
        "",
        script.table(header, rows),
        "",
        f"Supernets: {config.size}x{config.size} images, C = {config.channels}, N = {config.cells}, batch "
        f"{config.batch}, {config.num_steps} steps of the weights (single-path one-shot: three times as many), the "
        "rate of α times "
        f"{FULL.num_steps / config.num_steps:.4g}, so that it can go as far as in {FULL.num_steps:,}; those of iDARTS "
        "and of unrolled DARTS, which take a quarter of the steps of α, are four times the others', those of PC-DARTS "
        "twice, after a rest of 30 %. Every estimate of unrolled DARTS trains new weights for T steps. One-shot "
        "search chooses by 512 validation images more. Mean ± standard "
        "deviation over seeds. Skips and none: of six edges, by seed. Seconds: of processor time for a search, "
        "with compilation where it was not kept. Searches in the table look at the validation accuracy of the "
        "task's own cells after 12 epochs, and evolution has a population of 10 and samples of 3; all others see "
        "CIFAR-10 images alone, and their cell is looked up on all three. The best of 100 by a score are of the same "
        "100 random cells a seed. Skips and accuracies in the picture end with the cell that was found, a step of α "
        "after the last one that was recorded.",
        "",
    ]
    lines += gaps(runs, table)
    if "scores" in runs:
        lines += correlations(runs["scores"], table, data)
    return "\n".join(lines)


def gaps(runs: dict, table) -> list[str]:
    """Describes the gap on CIFAR-10 between supernets and the networks of the table, which were trained separately."""
    retrained = lambda row: (float(1 - table.test[row, 0] / 100),)
    lines, scores = ["## The gap between supernet, discrete and retrained", ""], []
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            if "mixed" in run:
                each = run["inherited"], retrained(run["row"]), run["mixed"]
                scores.append(nas.ArchitectureScores(f"{name}, seed {seed}", *each))
    if len(scores) > 1:
        lines += [nas.search_report(scores).text, ""]
    searched = [run for seeds in runs.values() for run in seeds.values() if "weights" in run]
    if any("mixed" not in run for run in searched):
        lines += [
            f"Of {sum('mixed' not in run for run in searched)} of {len(searched)} searches by gradient the accuracies "
            "of the supernet, mixed and discrete, were not kept (unrolled DARTS has no supernet that outlives an "
            "estimate): their gap is not told. Searches that "
            "stopped early are the search of DARTS up to there, whose weights at that epoch are not kept, and "
            "single-path one-shot has no mixture: of these there is no gap either.",
            "",
        ]
    one_shot = [run for run in runs.get("single-path one-shot", {}).values() if len(run["drawn"]) > 4]
    if one_shot:
        # The likelihood has the same order as the loss, and only ranks are compared.
        of = lambda run: zip(run["drawn"], np.exp(-np.array(run["losses"])), strict=True)
        reports = [
            nas.search_report([nas.ArchitectureScores(str(r), float(p), retrained(r)) for r, p in of(run)])
            for run in one_shot
        ]
        lines += [
            "Single-path one-shot: Spearman's rank correlation of the likelihood of 512 validation labels, with shared "
            "weights, with the accuracy of the cell trained alone (1 would be perfect), over "
            f"{len(one_shot[0]['drawn'])} random cells a seed: {script.spread([r.correlation for r in reports], 2)} "
            f"(95 % intervals {', '.join(f'{r.interval[0]:.2f} to {r.interval[1]:.2f}' for r in reports)}). "
            + op_correlations(one_shot, table),
            "",
        ]
    return lines


def op_correlations(one_shot: list[dict], table) -> str:
    """Describes the ops that the likelihood of one-shot cells prefers, compared with accuracy."""
    names = {
        "skip_connect": "skips",
        "avg_pool_3x3": "poolings",
        "nor_conv_1x1": "1x1 convolutions",
        "nor_conv_3x3": "3x3 convolutions",
    }
    told = []
    for op, name in names.items():
        pairs = []
        for run in one_shot:
            nums = (table.encodings[run["drawn"]] == nas.NAS_BENCH_201_PRIMITIVES.index(op)).sum(-1)
            of = (-np.array(run["losses"]), -table.test[run["drawn"], 0])
            pairs.append([float(np.asarray(spearmanr(nums, values))[0]) for values in of])
        likelihood, accuracy = (f"{min(each):+.2f} to {max(each):+.2f}" for each in zip(*pairs, strict=True))
        told.append(f"{name} {likelihood} ({accuracy})")
    return (
        "Which ops the supernet prefers: the rank correlation of its likelihood with the number of them in a cell, "
        f"from the lowest seed to the highest, and that of the accuracy in brackets: {'; '.join(told)}. An op whose "
        "two signs differ is one that shared weights misjudge."
    )


def correlations(seeds: dict, table, data) -> list[str]:
    """Returns Spearman's ρ of our scores with published ones, and of both with test accuracies."""
    names, published = data["proxy_names"].tolist(), data["proxy_scores"][0]
    theirs_of = {"jacob_cov": "jacov"}
    rows = []
    for name in nas.SCORES:
        columns = []
        for run in seeds.values():
            at = np.array(run["rows"])
            ours = np.array([-np.inf if v is None else v for v in run[name]])
            theirs = published[at, names.index(theirs_of.get(name, name))]
            both = np.isfinite(theirs) & (theirs > -1e7)
            rho = lambda a, b: float(np.asarray(spearmanr(a, b))[0])
            test = 100 - table.test[at]
            columns.append(
                [rho(ours[both], theirs[both]), *(rho(ours, test[:, t]) for t in range(3))]
                + [rho(ours[both], test[both, 0]), rho(theirs[both], test[both, 0]), both.sum()]
            )
        columns = np.array(columns)
        told = [script.spread(columns[:, i], 2) for i in range(columns.shape[1] - 1)]
        rows.append([name, *told, f"{columns[:, -1].mean():.0f}"])
    flops = np.array([[spearmanr(data["flops_params_M_cifar10"][r["rows"], 0], -table.test[r["rows"], t])[0]
                       for t in range(3)] for r in seeds.values()])  # fmt: skip
    rows.append(["FLOPs", "", *(script.spread(flops[:, t], 2) for t in range(3)), "", "", ""])
    header = ["ours", "with published", *(f"with {t}" for t in table.tasks), "where published: ours", "published", "n"]
    num = len(next(iter(seeds.values()))["rows"])
    return [
        "## Training-free scores: Spearman's rank correlation",
        "",
        script.table(header, rows),
        "",
        f"Of {num} random cells a seed, at one initialization and 64 images. Published are those of "
        "the table's collection, computed at the full scale on CIFAR-10, where they are known: the last columns "
        "compare on those n cells alone, with CIFAR-10.",
    ]


def plot(runs: dict, table, path: Path) -> None:
    """Plots the argmax of α over time: the number of skips, and the accuracy of the cell.

    Cells are recorded before a step. The final cell, after the last step, is plotted next to the last record.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for name, seeds in runs.items():
        if not all("rows" in run and "weights" in run for run in seeds.values()):
            continue
        rows = np.array([[*run["rows"], run["row"]] for run in seeds.values()])
        time_ = np.arange(1, rows.shape[1]) / (rows.shape[1] - 1)
        axes[0].plot([*time_, 1], (table.encodings[rows] == SKIP).sum(-1).mean(0), label=name)
        axes[1].plot([*time_, 1], (100 - table.test[rows, 0]).mean(0), label=name)
        curvatures = [[np.nan if c is None else c for c in run["curvatures"]] for run in seeds.values()]
        if np.isfinite(curvatures).any():
            for seed, values in zip(seeds, curvatures, strict=True):
                axes[2].plot(time_, values, label=f"{name}, seed {seed}")
    axes[1].axhline(54.30, color="gray", linestyle=":", label="all skip")
    axes[0].set(
        xlabel="share of the search", ylabel="skips among six edges, mean over seeds", ylim=(-0.1, 7.6), yticks=range(7)
    )
    axes[1].set(xlabel="share of the search", ylabel="CIFAR-10 test accuracy (%), mean over seeds")
    axes[2].set(xlabel="share of the search", ylabel="dominant eigenvalue of the Hessian in α")
    axes[0].legend(fontsize=7, ncols=2, loc="upper right")
    axes[1].legend(*([of[-1]] for of in axes[1].get_legend_handles_labels()), fontsize=7, loc="lower right")
    axes[2].margins(y=0.3)
    axes[2].legend(fontsize=7, ncols=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=4)
    parser.add_argument("--full", action="store_true", help="the benchmark's own scale: hours on a GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the searchers")
    parser.add_argument("--report", action="store_true", help="of the runs that are there")
    options = parser.parse_args()
    config = SMOKE if options.smoke else FULL if options.full else QUICK
    options.seeds = 1 if options.smoke else options.seeds
    name = "nas_bench_201_full" if options.full else "nas_bench_201"
    path = script.data_file(__file__, "cifar10_sub32.npz")
    script.data_file(__file__, "nasbench201.npz")
    table = benchmarks.nas_bench_201_table(path.parent)
    at = {encoding: row for row, encoding in enumerate(map(tuple, table.encodings.tolist()))}
    row_of = lambda weights: at[tuple(np.asarray(weights).argmax(-1).tolist())]
    task, valid = images(path, config)

    found = searches(config)
    jobs: dict[str, Callable[[int], dict]] = {"scores": lambda seed: run_scores(task, table, config, seed)}
    for job, (search, optimizer, steps_each) in found.items():
        folder = lambda seed, job=job: options.out / f"{name}_runs" / f"{job}-{seed}"
        one = functools.partial(run_search, search, optimizer, steps_each, task, valid, config)
        jobs[job] = lambda seed, one=one, folder=folder: one(seed, folder(seed), row_of)
    jobs["single-path one-shot"] = lambda seed: run_one_shot(task, valid, config, seed, row_of)
    if options.smoke:
        options.only = options.only or ["scores", "DARTS, first order", "single-path one-shot"]
    unknown = set(options.only or ()) - set(jobs)
    if unknown:
        sys.exit(f"There is no searcher {', '.join(sorted(unknown))} among {', '.join(jobs)}.")

    kept = options.out / f"{name}.json"
    runs: dict[str, dict[str, dict]] = {job: {} for job in jobs}
    if kept.exists() and not options.smoke:
        saved = json.loads(kept.read_text())
        if saved["config"] != list(config):
            sys.exit(f"{kept} holds runs of other sizes: {saved['config']}; these are {list(config)}. Move it away.")
        runs.update(saved["runs"])
    for seed in range(0 if options.report else options.seeds):
        for job in options.only or jobs:
            if str(seed) in runs[job]:
                continue
            started = time.process_time()
            run = jobs[job](seed)
            runs[job][str(seed)] = {**run, "seconds": round(time.process_time() - started, 1)}
            print(f"{job}, seed {seed}: {runs[job][str(seed)]['seconds']} s", run.get("row", ""), flush=True)
            shutil.rmtree(options.out / f"{name}_runs" / f"{job}-{seed}", ignore_errors=True)
            if not options.smoke:
                options.out.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps({"config": list(config), "runs": runs}))
    runs = {job: dict(sorted(seeds.items(), key=lambda item: int(item[0]))) for job, seeds in runs.items() if seeds}
    with np.load(path.parent / "nasbench201.npz") as data:
        text = report(runs, table, data, config, options)
    script.publish(
        __file__,
        "NAS-Bench-201 from supernets",
        text,
        options,
        name=name,
        picture="Skips, accuracies and eigenvalues over the searches",
    )
    if not options.smoke:
        plot(runs, table, options.out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(script.run(main))

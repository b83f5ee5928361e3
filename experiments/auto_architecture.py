"""Learns architectures by hypergradient over many tasks, generates them for new tasks, fine-tunes and compares them.

The four steps, on real images and tables:

1. Build the meta-training set: tasks of two shapes, described by features and grouped by families. The shapes are
   images (8 x 8, subsets of the classes of several sources) and tables.
2. Learn a meta-searcher h, α = h(t; φ), together with the initial weights, by hypergradient through the training of a
   supernet. Some families of the meta-training set are left out. They decide how far to trust the task's features in h,
   α = h(average) + trust · (h(t) − h(average)).
3. Generate an architecture a* for tasks of families that were not used for training.
4. Fine-tune α and the weights on these tasks by a few alternations.

A second h learns from records of tasks of the same families. Each task has its own random networks, which were trained
on it. The records estimate how much every op adds to the validation loss. A third method combines both, in the same
units.

The baselines are the best fixed architecture, random search, regularized evolution, and DARTS on each task. DARTS uses
the best of several orders, rates, and ways to read an architecture from α. Every choice is made on validation rows of
the same task, or of tasks of other families. The test rows of a task are read once, for the table of results.

    python experiments/auto_architecture.py            one fold of each shape (minutes)
    python experiments/auto_architecture.py --smoke    a few tasks and steps (for the tests)
    python experiments/auto_architecture.py --full     all folds, longer meta-training, rates tuned, 50 random networks

Finished parts (random networks and folds) are saved next to the result and do not run again. For example, a run with
`--full` continues after an earlier run with `--full --folds 0`. Its table includes all finished parts. `--full
--report` only makes the tables. Parts of earlier code are only used with --any-code or --report, and the result states
how many there are.

The images are scikit-learn's digits: the two halves of its classes stand for two families. The environment variable
METAOPT_DATA names a folder, and adds its image sources and tables. Then a family of images is a whole source. Tasks and
spaces are in image_table_tasks.py; training, DARTS and the page are in auto_architecture_*.py.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: one shape after the other
    fcntl = None

if __name__ == "__main__":
    # Compiles in a third less time, and runs a few percent slower.
    os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level={0 if '--smoke' in sys.argv else 1}")

import auto_architecture_darts
import auto_architecture_training
import image_table_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from auto_architecture_darts import Darts
from auto_architecture_report import finish
from auto_architecture_results import (
    A_STAR,
    BOTH,
    EVOLUTION,
    FINE_TUNED,
    FIXED,
    IGNORANT,
    LEARNED,
    RANDOM,
    RECORDS,
    costs_of,
    joined,
)
from auto_architecture_training import Shape, in_chunks, masked_loss
from image_table_tasks import NUM_CLASSES, SHAPES, Unit, image_units, stack_units, table_units

from metaopt import base, blackbox, hypergrad, inner, nas, predictors, spaces, tasks, training


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an experiment."""

    shapes: tuple[str, ...] = SHAPES
    # of `num_folds`, by family; an h that was trained on the other folds predicts each fold
    folds: tuple[int, ...] = (0,)
    num_folds: int = 3
    max_tasks: int = 40  # of each shape
    held_out: int = 12  # tasks of a fold that are evaluated, at most
    num_steps: int = 40  # of one training run
    batch_size: int = 32
    rate: float = 1e-2
    smoothing: float = 0.1  # of training labels; without it, long training of wide networks becomes overconfident
    unroll: int = 20  # steps of training through which h is learned, starting at the learned weights
    meta_batch: int = 6
    meta_steps: int = 30
    meta_rate: float = 0.05
    init_rate: float = 3e-3
    meta_decay: float = 0.1
    temperature: float = 0.5  # for the architectures in the training of h
    num_hidden: int = 8
    fine_tune_steps: int = 8
    darts_steps: int = 60
    rates: tuple[float, ...] = (0.05,)  # of α in fine-tuning; the best of several
    darts_rates: tuple[float, ...] = (0.05,)  # of α in DARTS
    darts_orders: tuple[str, ...] = ("second",)
    trusts: tuple[float, ...] = (0.0, 0.5, 1.0)
    left_out: float = 0.25  # share of the meta-training families that select trust and rates
    tuned_on: int = 8  # of their tasks, for the rates
    trained: int = 24  # random networks on every task; held-out tasks have as many as `trials` needs
    trials: tuple[int, ...] = (5, 20)
    records: int = 12  # random networks on each task of the meta-training set, different for each, for h from records
    evolution: int = 20  # networks per task, including `population` random ones
    population: int = 8


PRESETS = {
    "default": Config(),
    "smoke": Config(
        max_tasks=8,
        held_out=2,
        num_folds=2,
        num_steps=4,
        unroll=2,
        meta_batch=2,
        meta_steps=2,
        fine_tune_steps=2,
        darts_steps=2,
        darts_orders=("first", "second"),
        trained=3,
        records=2,
        trials=(1, 3),
        evolution=3,
        population=2,
    ),
    "full": Config(
        folds=(0, 1, 2),
        max_tasks=63,
        held_out=18,
        meta_steps=150,
        records=24,
        trials=(5, 20, 50),
        rates=(0.01, 0.05, 0.2),
        darts_rates=(0.01, 0.05, 0.2, 0.5, 1.0),
        darts_orders=("first", "second", "exact"),
    ),
}


def gradient_features(shape: Shape, key, batch: base.Task) -> tuple[np.ndarray, float]:
    """Returns [n, K] `nas.gradient_features` of every task, and the processor seconds per task, without compilation."""
    num = 2 * shape.config.batch_size
    rows = {k: v[:, :num] if k in ("x", "y", "mask") else v for k, v in batch.train.items()}
    one = lambda key, rows: nas.gradient_features(shape.search.supernet, key, rows, loss=masked_loss)
    keys, rewritten = jax.random.split(key, len(batch.train["y"])), inner.im2col(one, only_on_cpu=True)
    program = jax.jit(lambda *args: jax.lax.map(lambda a: rewritten(*a), args)).lower(keys, rows).compile()
    start = time.process_time()
    features = np.asarray(program(keys, rows))
    return features, (time.process_time() - start) / len(keys)


# ---- The meta-searcher ----------------------------------------------------------------------------------------------


def sampled(predictor: base.Predictor, space: base.PyTree, temperature: float) -> base.Predictor:
    """α = (h(0) + trust · (h(t) − h(0)) + G) / τ: with Gumbel noise G, softmax(α) is nearly a discrete architecture.

    The features of the average task are 0. The noise stays the same for a whole training run. The noise and the trust
    are in `task.features`.
    """

    def apply(meta_params, task):
        values, trust = task.features["values"], task.features["trust"]
        predict = lambda x: spaces.to_constrained(space, predictor.apply(meta_params, task._replace(features=x)))
        average, own = predict(0 * values), predict(values)
        return jax.tree.map(
            lambda a, b, noise: (a + trust * (b - a) + noise) / temperature, average, own, task.features["noise"]
        )

    return base.Predictor(predictor.init, apply, {})


def with_features(shape: Shape, batch: base.Task, values) -> base.Task:
    """Returns a batch of tasks with these features for h, with trust 1 and without noise."""
    num = len(values)
    noise = {k: jnp.zeros((num, *leaf.shape)) for k, leaf in shape.space().items()}
    return batch._replace(features={"values": jnp.asarray(values), "trust": jnp.ones(num), "noise": noise})


def trusted(batch: base.Task, trust: float) -> base.Task:
    """Returns the same tasks, with this trust in their features."""
    return batch._replace(features={**batch.features, "trust": jnp.full_like(batch.features["trust"], trust)})


def resplit(key: jax.Array, task: base.Task) -> base.Task:
    """`tasks.resplit`, for images too."""
    shape = task.train["x"].shape[1:]
    as_shape = lambda data, *shape: {**data, "x": data["x"].reshape(len(data["x"]), *shape)}
    flat = task._replace(train=as_shape(task.train, -1), valid=as_shape(task.valid, -1))
    new = tasks.resplit(key, flat)
    return new._replace(train=as_shape(new.train, *shape), valid=as_shape(new.valid, *shape))


def make_sampler(batch: base.Task, rows: np.ndarray, meta_batch: int):
    """Returns `key -> tasks`: some of the meta-training tasks, with resplit rows, permuted classes, and noise."""

    @jax.jit
    def draw(key, batch, rows):
        pick_key, split_key, class_key, noise_key = jax.random.split(key, 4)
        at = rows[jax.random.choice(pick_key, rows.shape[0], (meta_batch,), replace=False)]
        chosen = jax.tree.map(lambda x: x[at], batch)
        chosen = jax.vmap(resplit)(jax.random.split(split_key, meta_batch), chosen)
        # The classes of a task in random order, the real ones first.
        order = jax.random.uniform(class_key, (meta_batch, NUM_CLASSES)) + 2 * (1 - chosen.train["class_mask"])
        place = jnp.argsort(jnp.argsort(order, 1), 1)
        rename = lambda data: {**data, "y": jnp.take_along_axis(place, data["y"], 1)}
        leaves, treedef = jax.tree.flatten(chosen.features["noise"])
        keys = jax.random.split(noise_key, len(leaves))
        noise = [jax.random.gumbel(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        features = {**chosen.features, "noise": jax.tree.unflatten(treedef, noise)}
        return base.Task(rename(chosen.train), rename(chosen.valid), features)

    return lambda key: draw(key, batch, jnp.asarray(rows))


class Meta:
    """h for tasks of one shape, and the programs that learn it and fine-tune with it."""

    def __init__(self, shape: Shape, num_features: int):
        config, self.num_features = shape.config, num_features
        predictor = predictors.mlp(shape.space(), num_features, num_hidden=config.num_hidden)
        h = sampled(predictor, shape.space(), config.temperature)
        self.search = nas.meta_architecture_search(shape.search, h)
        self.learner = make_learner(self.search, config)
        self.hyperparams = jax.jit(self.search.hyperparams)
        self.alpha = jax.jit(jax.vmap(self.search.alpha, in_axes=(None, 0)))

        def fine_tune(rate, learned, key, task):
            adam = optax.adam(rate, b1=0.5)
            tuned = nas.meta_architecture_search(shape.tuning, h, num_steps=config.fine_tune_steps, optimizer=adam)
            found = tuned.fine_tune(key, learned, task)
            return found.alpha, found.params

        self.fine_tune = jax.jit(lambda shared, args: jax.vmap(fine_tune, in_axes=(None, None, 0, 0))(*shared, *args))


def make_learner(meta: nas.MetaArchitecture, config: Config) -> training.Learner:
    """Returns a learner of h and of the initial weights, each at its own rate.

    Weight decay keeps the effect of features small.
    """
    clipped = lambda rate, decay: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(rate, config.meta_steps), weight_decay=decay),
    )
    label = lambda path, _: "start" if path[0].key == "init" else "reading" if path[1].key in ("linear", "out") else "h"
    optimizer = optax.partition(
        {
            "start": clipped(config.init_rate, 0.0),
            "reading": clipped(config.meta_rate, config.meta_decay / config.meta_rate),
            "h": clipped(config.meta_rate, 0.0),
        },
        lambda hyperparams: jax.tree_util.tree_map_with_path(label, hyperparams),
    )
    return training.learner(hypergrad.over_tasks(meta.estimator, max_norm=1.0), optimizer)


def evolve(shape: Shape, key, batch, test, num: int) -> np.ndarray:
    """Returns [num, n, 3] outcomes of regularized evolution on each of n tasks. All searches advance together."""
    n = len(test["y"])
    searcher = blackbox.regularized_evolution(population_size=shape.config.population, sample_size=3)
    space = {f"edge {i}": spaces.integer(0, size - 1) for i, size in enumerate(shape.sizes())}
    states = [searcher.init(jax.random.fold_in(key, i), space) for i in range(n)]
    outcomes = []
    for i in range(num):
        asked = [searcher.ask(state, 1) for state in states]
        codes = np.array([list(trials[0].configuration.values()) for trials, _ in asked])
        outcome, _ = shape.train(jax.random.fold_in(key, n + i), shape.one_hot(codes), batch, test)
        states = [
            searcher.tell(state, [trials[0]._replace(outcome=float(row[0]), status="COMPLETE")])
            for (trials, state), row in zip(asked, outcome, strict=True)
        ]
        outcomes.append(outcome)
    return np.stack(outcomes)


def best_of(outcomes: np.ndarray, num: int, rng, num_draws: int = 200) -> np.ndarray:
    """Returns [n, 2] test loss and error of the best by validation of `num` networks, mean over random subsets.

    outcomes: [trained, n, 3].
    """
    trained, n = outcomes.shape[:2]
    if num >= trained:
        return outcomes[outcomes[:, :, 0].argmin(0), np.arange(n), 1:]
    total = np.zeros((n, 2))
    for _ in range(num_draws):
        of = np.stack([rng.permutation(trained)[:num] for _ in range(n)])
        best = of[np.arange(n), outcomes[of, np.arange(n)[:, None], 0].argmin(1)]
        total += outcomes[best, np.arange(n), 1:]
    return total / num_draws


def best_fixed(codes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns the network [edges] of [networks, edges] with the smallest mean of losses [networks, tasks]."""
    return codes[np.minimum(losses, np.log(NUM_CLASSES)).mean(1).argmin()]


def processor_seconds(shape: Shape, meta: Meta, units: list[Unit], batch, test, codes, gradients: float):
    """Returns costs of parts of the work on one task: mean processor seconds over tasks, without compilation.

    The inputs of h are mostly computed by NumPy, whose operations are not counted. They are statistics of the training
    rows, and gradients at random weights.
    """
    key, some = jax.random.key(0), min(8, len(units))
    keys = jax.random.split(key, some)
    few = jax.tree.map(lambda x: x[:some], with_features(shape, batch, np.zeros((len(units), meta.num_features))))
    learned, rate = meta.hyperparams(key), jnp.float32(shape.config.rates[0])
    train = lambda code: shape.train(key, shape.one_hot(np.repeat(code[None], len(units), 0)), batch, test)[1]
    return {
        "training run": float(np.mean([train(code) for code in codes])),
        "look": float(np.mean([u.seconds for u in units])),
        "gradients": gradients,
        "fine-tuning": in_chunks(meta.fine_tune, (rate, learned), (keys, few), 4)[1],
    }


def effects(codes: np.ndarray, losses: np.ndarray, sizes: list[int], ridge: float = 1.0) -> list[np.ndarray]:
    """Estimates for every edge [ops] how much an op adds to a network's loss, by a ridge regression on all records.

    The unit is the standard deviation of the losses of a task, so that hard tasks do not outweigh the others.

    Args:
      codes: [networks, tasks, edges] of integers.
      losses: [networks, tasks], on validation rows.
      sizes: the number of ops of each edge.
      ridge: the weight of the coefficients' squares, in records.
    """
    x = np.concatenate([codes[..., [e]] == np.arange(n) for e, n in enumerate(sizes)], -1).astype(float)
    x, y = x.reshape(losses.size, -1), ((losses - losses.mean(0)) / (losses.std(0) + 1e-9)).ravel()
    x = x - x.mean(0)
    found = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    return np.split(found, np.cumsum(sizes)[:-1])


# ---- The main job ---------------------------------------------------------------------------------------------------


def assign_folds(units: list[Unit], num_folds: int, seed: int) -> np.ndarray:
    """Returns [units] the fold of each unit. A family is never split."""
    families = sorted({u.family for u in units})
    order = np.random.default_rng(seed).permutation(len(families))
    fold = {families[f]: i % num_folds for i, f in enumerate(order)}
    return np.array([fold[u.family] for u in units])


def leave_out(units: list[Unit], rows: np.ndarray, share: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows: h learns from the first part, and the second part has the left-out families.

    No family is in both parts.
    """
    families = sorted({units[i].family for i in rows})
    num = max(1, round(share * len(families))) if len(families) > 2 else 0
    out = {families[i] for i in rng.permutation(len(families))[:num]}
    is_out = np.array([units[i].family in out for i in rows])
    return rows[~is_out], rows[is_out]


def scale_features(units: list[Unit], gradients: np.ndarray, fit_on: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Scales the features [units, F]: statistics of rows, and gradients at the start.

    The scaling is fitted on the meta-training tasks.
    """
    names = list(units[0].features)
    rows = [
        {**u.features, **{f"gradient {i}": g for i, g in enumerate(gs)}} for u, gs in zip(units, gradients, strict=True)
    ]
    scaling = tasks.fit_scaling(
        [rows[i] for i in fit_on], [*names, *(f"gradient {i}" for i in range(gradients.shape[1]))]
    )
    values = np.stack([tasks.apply_scaling(scaling, row) for row in rows]).astype(np.float32)
    values[:, len(names) :] *= 0.5  # there are many of them
    return values, names


class Prepared(NamedTuple):
    """Tasks of one shape, and random networks that were trained on all of them."""

    shape: Shape
    meta: Meta
    units: list[Unit]
    fold: np.ndarray  # [units]
    batch: base.Task
    test: dict[str, jax.Array]
    gradients: np.ndarray  # [units, K]
    codes: np.ndarray  # [networks, edges]
    outcomes: np.ndarray  # [trained, units, 3], of the first `trained` networks


def compared_key(key: jax.Array) -> jax.Array:
    """Returns the key, derived from a fold's key, that trains a* and all networks in the comparison."""
    return jax.random.split(key, 16)[5]


def rows_of_fold(p: Prepared, f: int, seed: int) -> tuple[np.ndarray, ...]:
    """Returns four sets of rows: meta-training tasks, those for h, those left out of them, and held-out tasks."""
    train_rows = np.flatnonzero(p.fold != f)
    learned, left = leave_out(p.units, train_rows, p.shape.config.left_out, np.random.default_rng((seed, f, 2)))
    held = np.random.default_rng((seed, f)).permutation(np.flatnonzero(p.fold == f))[: p.shape.config.held_out]
    return train_rows, learned, left, held


def asked(learn_rows: np.ndarray, left_rows: np.ndarray, f: int, seed: int) -> np.ndarray:
    """Returns the meta-training tasks, in random order, that select trust and rates."""
    return np.random.default_rng((seed, f, 1)).permutation(left_rows if len(left_rows) else learn_rows)


def run_fold(p: Prepared, f: int, key: jax.Array, seed: int, say: Callable) -> dict[str, Any]:
    """Runs steps 2 to 4 and the comparison.

    h is not trained on the families of this fold. The result is ready for JSON.
    """
    shape, config, units, name = p.shape, p.shape.config, p.units, p.shape.name
    keys = iter(jax.random.split(key, 16))
    take = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
    train_rows, learn_rows, left_rows, held = rows_of_fold(p, f, seed)
    n = len(held)
    values, names = scale_features(units, p.gradients, train_rows)
    with_values = with_features(shape, p.batch, values)
    new, new_test = take(with_values, held), take(p.test, held)

    # 2. h and the initial weights, over the meta-training tasks.
    start = time.perf_counter()
    meta = p.meta
    init_key, fit_key = jax.random.split(next(keys))
    result = training.fit(
        meta.learner,
        make_sampler(with_values, learn_rows, config.meta_batch),
        hyperparams=meta.hyperparams(init_key),
        num_steps=config.meta_steps,
        key=fit_key,
    )
    learned, history = result.hyperparams, np.asarray(result.history["value"])
    tail = max(1, len(history) // 5)
    say(
        f"{name}, fold {f}: validation loss {history[:tail].mean():.3f} -> {history[-tail:].mean():.3f} in "
        f"{time.perf_counter() - start:.0f} s of meta-training"
    )

    # The left-out tasks select the trust in h, and the rate of α.
    left = asked(learn_rows, left_rows, f, seed)
    check_keys = jax.random.split(next(keys), 3)

    def best(candidates: tuple[float, ...], rows: np.ndarray, search: Callable) -> float:
        """Returns the candidate with the smallest validation loss.

        The loss is a mean over tasks and three trainings per architecture.
        """
        on, on_test, losses = take(with_values, rows), take(p.test, rows), []
        for candidate in candidates if len(candidates) > 1 else ():
            found = shape.decode(search(candidate, on))
            losses.append(shape.validation_loss(check_keys, found, on._replace(features=None), on_test))
        return candidates[int(np.argmin(losses or [0]))]

    trust = 1.0
    if len(left_rows):
        trust = best(config.trusts, left[: config.held_out], lambda t, on: meta.alpha(learned, trusted(on, t)))
        with_values = trusted(with_values, trust)
    new = trusted(new, trust)

    # 3. a*, for families that were not used for training; and the choice of h for the average task.
    alpha = meta.alpha(learned, new)
    generated = shape.decode(alpha)
    ignorant = shape.decode(meta.alpha(learned, trusted(new, 0.0)))

    # 4. Fine-tuning.
    some = left[: config.tuned_on]
    tune_keys = jax.random.split(next(keys), len(some))

    tune = lambda rate, keys, on: in_chunks(meta.fine_tune, (jnp.float32(rate), learned), (keys, on), 4)
    rates = {FINE_TUNED: best(config.rates, some, lambda rate, on: tune(rate, tune_keys, on)[0][0])}
    (tuned, tuned_params), _ = tune(rates[FINE_TUNED], jax.random.split(next(keys), n), new)
    fine = shape.decode(tuned)

    # The baselines. The best fixed architecture has the smallest mean loss over the meta-training tasks.
    fixed = np.repeat(best_fixed(p.codes, p.outcomes[:, train_rows, 0])[None], n, 0)
    plain_new = new._replace(features=None)
    next(keys)  # the key of `run_darts`
    run_key = next(keys)  # the same as `compared_key`
    trained = lambda code, start=None: shape.train(run_key, shape.one_hot(code), plain_new, new_test, start)[0][:, 1:]
    fold_scores = {
        A_STAR: trained(generated),
        A_STAR + LEARNED: trained(generated, learned["init"]),
        FINE_TUNED: trained(fine),
        FINE_TUNED + LEARNED: trained(fine, learned["init"]),
        IGNORANT: trained(ignorant),
        FIXED: trained(fixed),
        FIXED + LEARNED: trained(fixed, learned["init"]),
    }
    outcomes = p.outcomes[:, held]
    if len(p.codes) > len(outcomes):
        more = [
            shape.train(jax.random.fold_in(run_key, i), shape.one_hot(np.repeat(code[None], n, 0)), plain_new, new_test)
            for i, code in enumerate(p.codes[len(outcomes) :])
        ]
        outcomes = np.concatenate([outcomes, [outcome for outcome, _ in more]])
    for t in config.trials:
        fold_scores[RANDOM.format(t)] = best_of(outcomes, t, np.random.default_rng(seed))
    evolved = evolve(shape, next(keys), plain_new, new_test, config.evolution)
    fold_scores[EVOLUTION.format(config.evolution)] = best_of(evolved, config.evolution, np.random.default_rng(seed))
    say(f"{name}, fold {f}: " + "; ".join(f"{k} {x[:, 0].mean():.3f}" for k, x in fold_scores.items()))
    chosen = {"a*": generated, "fine-tuned": fine, "best fixed": fixed}
    return {
        "shape": name,
        "tasks": [units[u].name for u in held],
        "families": [units[u].family for u in held],
        "scores": {label: x.tolist() for label, x in fold_scores.items()},
        "supernets": {FINE_TUNED: shape.gaps(tuned, tuned_params, fine, new_test).tolist()},
        "rates": rates,
        "trust": trust,
        "left_out": len(left_rows),
        "tuned_on": len(some),
        "history": history.tolist(),
        "features": names,
        "values": values[held, : len(names)].tolist(),
        "weights": {k: np.asarray(jax.nn.softmax(a, -1)).tolist() for k, a in alpha.items()},
        "ops": {kind: list(cell.edges[0].ops) for kind, cell in shape.network.cells.items()},
        "architectures": {label: [shape.describe(code) for code in x] for label, x in chosen.items()},
        "space": int(np.prod(shape.sizes())),
        "num_folds": int(p.fold.max() + 1),
    }


def run_records(p: Prepared, f: int, fold: dict[str, Any], codes, losses, key: jax.Array, seed: int) -> dict[str, Any]:
    """Evaluates h from records of the other families' tasks on one fold's tasks.

    It is evaluated by itself, and combined with the α of h by hypergradient.

    codes: [records, units, edges]; losses: [records, units]; key: the same as for `run_fold`.
    """
    shape, sizes = p.shape, p.shape.sizes()
    train_rows, _, _, held = rows_of_fold(p, f, seed)
    found = effects(codes[:, train_rows], losses[:, train_rows], sizes)
    by_records = np.repeat(np.array([e.argmin() for e in found])[None], len(held), 0)
    # Mixing weights [tasks, edges, ops] of each kind, as logits. Logits and effects are in units of their spread within
    # an edge.
    weights = [np.array(fold["weights"][kind]) for kind in shape.network.cells]  # in the order of the codes
    logits = [np.log(w[:, e]) for w in weights for e in range(w.shape[1])]
    spread = lambda rows: np.sqrt(np.mean([x.var(-1).mean() for x in rows])) + 1e-9
    logits_spread, effects_spread = spread(logits), spread(found)
    both = np.stack(
        [(a / logits_spread - e / effects_spread).argmax(-1) for a, e in zip(logits, found, strict=True)], 1
    )
    at = lambda tree: jax.tree.map(lambda x: x[held], tree)
    task, test = at(p.batch), at(p.test)
    trained = lambda code: shape.train(compared_key(key), shape.one_hot(code), task, test)[0][:, 1:]
    chosen = {RECORDS: by_records, BOTH: both}
    return {
        "scores": {label: trained(code).tolist() for label, code in chosen.items()},
        "architectures": {label: [shape.describe(code) for code in x] for label, x in chosen.items()},
    }


def run_darts(
    p: Prepared, darts: Darts, order: str, f: int, key: jax.Array, seed: int, say: Callable
) -> dict[str, Any]:
    """Runs DARTS of one order on one fold's tasks.

    It is tuned on the same tasks as fine-tuning; the key is the same as for `run_fold`.
    """
    keys, config = jax.random.split(key, 16), p.shape.config
    _, learn_rows, left_rows, held = rows_of_fold(p, f, seed)
    some = asked(learn_rows, left_rows, f, seed)[: config.tuned_on]
    at = lambda rows: jax.tree.map(lambda x: x[rows], (p.batch, p.test))
    tuning = (jax.random.split(keys[2], len(some)), jax.random.split(keys[1], 3), *at(some))
    found = darts.variants(order, tuning, (jax.random.split(keys[4], len(held)), compared_key(key), *at(held)))
    told = (f"{name} {np.mean(x, 0)[0]:.3f}" for name, x in found["scores"].items())
    say(f"{p.shape.name}, DARTS, {order} order, fold {f}: {'; '.join(told)}")
    return found


class Kept:
    """Finished parts by name, in a file next to the result, and the total seconds of the processes that made them.

    Several processes may write to the file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], code: str, any_code: bool = False):
        self.path, self.any_code = path, any_code
        self.parts, self.data, self.code, self.before = {}, {}, {}, (0.0, 0.0)
        self.settings, self.now = json.loads(json.dumps(settings)), code
        self.begin = time.perf_counter(), time.process_time()
        self.read()

    def read(self) -> None:
        """Adds the content of the file."""
        if self.path.is_file():
            saved = json.loads(self.path.read_text())
            if saved["settings"] != self.settings:
                sys.exit(
                    f"{self.path} holds parts of a run with other settings: remove it, or give --out another folder."
                )
            for name in ("parts", "data", "code"):  # parts from before `code` was recorded have none
                setattr(self, name, saved.get(name, {}) | getattr(self, name))
            self.before = tuple(saved["seconds"])

    def seconds(self) -> tuple[float, float]:
        """Returns wall-clock and processor seconds of all processes."""
        clock, processor = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]
        return self.before[0] + clock, self.before[1] + processor

    def write(self) -> None:
        """Writes the file, including parts that other processes have written in the meantime."""
        with open(f"{self.path}.lock", "w") as lock:  # a lock of the operating system, which ends with the process
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            self.before, self.begin = self.seconds(), (time.perf_counter(), time.process_time())
            state = {name: getattr(self, name) for name in ("settings", "parts", "data", "code")}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({**state, "seconds": self.before}))
            part.replace(self.path)  # atomic: a run that is killed here leaves the earlier file

    def num_other_code(self) -> int:
        """Returns the number of parts that other code made."""
        return sum(self.code.get(name) != self.now for name in self.parts)

    def get(self, name: str, data: int, make: Callable[[], Any]) -> Any:
        """Returns the part with this name, of data with this checksum. A missing part is made and written."""
        if name not in self.parts:
            self.parts[name], self.data[name], self.code[name] = make(), data, self.now
            self.write()
        if self.data[name] != data:
            sys.exit(f"{self.path} holds {name!r} of other data: remove it, or give --out another folder.")
        if self.code.get(name) != self.now and not self.any_code:
            sys.exit(
                f"{self.path} holds {name!r} by other code: remove it, give --out another folder, or --any-code to "
                "take it as it is."
            )
        return self.parts[name]


def run_shape(name: str, config: Config, use_folder: bool, seed: int, say: Callable, kept: Kept) -> None:
    """Runs the four steps and the comparison on tasks of one shape, fold by fold."""
    # 1. The meta-training set.
    units = {"images": image_units, "tables": table_units}[name](config.max_tasks, use_folder, seed)
    fold = assign_folds(units, min(config.num_folds, len({u.family for u in units})), seed)
    shape = Shape(name, config)
    batch, test = stack_units(units, config.smoothing)
    key = jax.random.fold_in(jax.random.key(seed), len(name))
    features_key, train_key, fold_key = jax.random.split(key, 3)
    gradients, gradient_seconds = gradient_features(shape, features_key, batch)
    say(
        f"{name}: {len(units)} tasks of {len({u.family for u in units})} families, {np.prod(shape.sizes())} "
        "architectures"
    )

    # Random networks on all tasks, for random search on each task and for the best fixed architecture.
    rng = np.random.default_rng((seed, 1))
    num = max(config.trained, *config.trials)
    codes = np.stack([rng.integers(0, size, num) for size in shape.sizes()], 1)

    def train_random() -> dict[str, Any]:
        runs = []
        for i, code in enumerate(codes[: config.trained]):
            weights = shape.one_hot(np.repeat(code[None], len(units), 0))
            runs.append(shape.train(jax.random.fold_in(train_key, i), weights, batch, test))
        return {"outcomes": np.stack([outcome for outcome, _ in runs]).tolist()}

    leaves = jax.tree.leaves((batch._replace(features=None), test))
    data = functools.reduce(lambda total, leaf: zlib.crc32(np.ascontiguousarray(leaf), total), leaves, 0)
    random = kept.get(f"{name}, random networks", data, train_random)
    say(f"{name}: {config.trained} random networks on each task")
    # Each task gets its own networks: the value of an op needs more networks than the few that all tasks share.
    record_codes = np.stack([rng.integers(0, size, (config.records, len(units))) for size in shape.sizes()], -1)

    def train_records() -> dict[str, Any]:
        keys = jax.random.split(jax.random.fold_in(train_key, 1_000_000), max(config.records, 1))
        runs = [shape.train(k, shape.one_hot(c), batch, test) for k, c in zip(keys, record_codes, strict=False)]
        valid = np.minimum([outcomes[:, 0] for outcomes, _ in runs], np.log(NUM_CLASSES))
        return {"losses": valid.tolist()}

    losses = np.zeros((0, len(units)))
    if config.records:
        records = kept.get(f"{name}, records", data, train_records)
        losses = np.array(records["losses"])
        say(f"{name}: {config.records} random networks more on each task, as records")
    meta = Meta(shape, len(units[0].features) + gradients.shape[1])

    def measure() -> dict[str, Any]:
        by_clock = processor_seconds(shape, meta, units, batch, test, codes[:4], gradient_seconds)
        tuning = {"fine-tuning": shape.tuning_alone()}
        return {"operations": shape.in_runs(batch, codes[:8], tuning), "seconds": by_clock}

    costs = kept.get(f"{name}, costs", data, measure)["seconds"]
    say(f"{name}: processor seconds a task, " + ", ".join(f"{part} {x:.4f}" for part, x in costs.items()))
    darts = Darts(shape)
    measure_darts = lambda: darts.costs(batch, codes[:8], jnp.float32(config.darts_rates[0]))
    kept.get(f"{name}, costs of DARTS", data, measure_darts)
    prepared = Prepared(
        shape,
        meta,
        units,
        fold,
        batch,
        test,
        gradients,
        codes,
        np.array(random["outcomes"]),
    )
    for f in config.folds:
        if f in fold:
            run = lambda f=f: run_fold(prepared, f, jax.random.fold_in(fold_key, f), seed, say)
            part = kept.get(f"{name}, fold {f}", data, run)
            if config.records:
                run = lambda f=f, part=part: run_records(
                    prepared, f, part, record_codes, losses, jax.random.fold_in(fold_key, f), seed
                )
                kept.get(f"{name}, records, fold {f}", data, run)
            for order in config.darts_orders:
                run = lambda f=f, order=order: run_darts(
                    prepared, darts, order, f, jax.random.fold_in(fold_key, f), seed, say
                )
                kept.get(f"{name}, DARTS, {order} order, fold {f}", data, run)


def one_shape(name: str, core: int, compiled: str, arguments: tuple, kept: tuple) -> None:
    """Runs a shape on one core.

    Programs this small do not profit from more, and processor seconds refer to one core.
    """
    begin = time.perf_counter()
    say = lambda text: print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)
    if (parent := multiprocessing.parent_process()) is not None:
        # this process ends with its parent
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    jax.config.update("jax_compilation_cache_dir", compiled)
    run_shape(name, *arguments, say, Kept(*kept))


def one_shape_reported(*args) -> None:
    """Does the same in a separate process, which prints its own reports."""
    with script.reporting():
        one_shape(*args)


def side_by_side(names: tuple[str, ...], cores: list[int], compiled: str, arguments: tuple, kept: tuple) -> None:
    """Runs each shape in a separate process.

    If one fails, the others still run to their end, so that no other work is lost.
    """
    context = multiprocessing.get_context("spawn")
    running = {
        name: context.Process(target=one_shape_reported, args=(name, core, compiled, arguments, kept), daemon=True)
        for name, core in zip(names, itertools.cycle(cores), strict=False)
    }
    for process in running.values():
        process.start()
    for process in running.values():
        process.join()
    if failed := {name: process.exitcode for name, process in running.items() if process.exitcode}:
        what = ", ".join(f"{name} ended with exit code {code}" for name, code in failed.items())
        sys.exit(f"{what}. What is finished is kept: the same call goes on from there.")


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="a few tasks and steps")
    preset.add_argument("--full", action="store_true", help="all folds")
    parser.add_argument("--report", action="store_true", help="tables of what is finished, and no more")
    parser.add_argument("--any-code", action="store_true", help="take what is finished by whatever code made it")
    parser.add_argument("--packaged", action="store_true", help="leave METAOPT_DATA out")
    parser.add_argument("--out", metavar="FOLDER", default="results_local", help="where results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", help="which folds to hold out, in turn")
    parser.add_argument("--note", default="", help="a sentence that the result should carry")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    for field in dataclasses.fields(Config):
        if field.type in (int, float, "int", "float"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float if "float" in str(field.type) else int)
    args = parser.parse_args(argv)
    name = "full" if args.full else "smoke" if args.smoke else "default"
    changed = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name, None) is not None
    }
    changed |= {k: tuple(changed[k]) for k in ("folds", "shapes") if k in changed}
    config = dataclasses.replace(PRESETS[name], **changed)
    if not set(config.folds) <= set(range(config.num_folds)):
        parser.error(f"--folds must be of 0 to {config.num_folds - 1}; got {' '.join(map(str, config.folds))}.")
    return args, name, config


def main(argv=None) -> list[dict[str, Any]]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    path = out / f"auto_architecture_{name}"
    data = bool(os.environ.get("METAOPT_DATA")) and not args.packaged
    settings = {**dataclasses.asdict(config), "seed": args.seed, "data": data}
    # The cache of compiled programs: the folds of a shape share their programs, and so does a run that continues.
    compiled = str((out / "compiled").absolute())
    if args.smoke and not args.report:
        Path(f"{path}_parts.json").unlink(missing_ok=True)
    own = (image_table_tasks, auto_architecture_training, auto_architecture_darts)
    code = script.code(__file__, *(module.__file__ for module in own))
    settings = {k: v for k, v in settings.items() if k not in ("folds", "shapes")}
    keep = Path(f"{path}_parts.json"), settings, code, args.any_code
    arguments = config, not args.packaged, args.seed
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    # Several calls at the same time do not all use the first cores.
    cores = cores[os.getpid() % len(cores) :] + cores[: os.getpid() % len(cores)]
    earlier, processes = any(Kept(*keep).before), 0
    if not args.report:
        processes = min(len(config.shapes), len(cores)) if fcntl else 1
    if processes > 1:
        side_by_side(config.shapes, cores, compiled, arguments, keep)
    elif processes:
        for shape in config.shapes:
            one_shape(shape, cores[0], compiled, arguments, keep)
    kept = Kept(*keep)
    results = []
    for shape in SHAPES:
        parts = []
        for key in sorted(key for key in kept.parts if key.startswith(f"{shape}, fold")):
            of = lambda what, key=key: kept.parts.get(key.replace(", fold", f", {what}, fold"))
            more = of("records") or {"scores": {}, "architectures": {}}
            darts = {order: of(f"DARTS, {order} order") for order in config.darts_orders}
            if all(darts.values()):  # otherwise, the fold is not finished
                part = dict(kept.parts[key]) | {"darts": darts}
                parts.append(part | {name: {**part[name], **more[name]} for name in more})
        if parts and not {f"{shape}, costs", f"{shape}, costs of DARTS"} <= set(kept.parts):
            sys.exit(f"{kept.path} does not hold the costs of {shape}: call without --report.")
        if parts:
            random = np.array(kept.parts[f"{shape}, random networks"]["outcomes"])
            results.append(joined(parts, costs_of(kept.parts, shape), random, config))
    if not results:
        sys.exit(f"{kept.path} holds no fold that is finished.")
    seconds, processor = kept.seconds()
    given = [x for x in (sys.argv[1:] if argv is None else argv) if x not in ("--note", args.note)]
    call = " ".join(["python experiments/auto_architecture.py", *given])
    details = {
        "command": call.strip() + (", after earlier calls" if earlier else ""),
        "preset": name,
        "note": args.note,
        "seed": args.seed,
        "config": dataclasses.asdict(config),
        "data": data,
        "seconds": seconds,
        "processor": processor,
        "this_call": time.perf_counter() - begin,
        "processes": processes,
        "num_parts": len(kept.parts),
        "num_other_code": kept.num_other_code(),
        "results": results,
    }
    finish(details, path)
    return results


if __name__ == "__main__":
    script.run(main)

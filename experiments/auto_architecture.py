"""Architectures learned by hypergradient over many tasks, written down for tasks never seen, fine-tuned, and compared.

The four steps, on real images and tables:

1. build the meta-training set: tasks of two shapes, images (8 x 8, subsets of the classes of several sources) and
   tables, described by features, grouped by families;
2. learn a meta-searcher h, α = h(t; φ), and the weights that training starts from, together, by hypergradient through
   the training of a supernet; some families of the meta-training set are left out of it, and say how much of what h
   reads in a task's features is to be trusted, α = h(average) + trust · (h(t) − h(average));
3. generate an architecture a* for tasks of families that took no part;
4. fine-tune α and the weights there by a few alternations;

Beside it, h from records of the same families' tasks: random networks that were trained on them, others on each, say
what every op adds to the validation loss; and both together, in the same units.

The comparison is with what one would have done otherwise: the best fixed architecture, random search, regularized
evolution, DARTS on each task. Every choice is made on validation rows of the task at hand, or of tasks of other
families; the test rows of a task are read once, for the table of results.

    python experiments/auto_architecture.py            one fold of each shape (minutes)
    python experiments/auto_architecture.py --smoke    a few tasks and steps (for the tests)
    python experiments/auto_architecture.py --full     all folds, longer meta-training, rates tuned, 50 random networks

What is finished, random networks and folds, is kept beside the result and not run again: `--full --folds 0`, then
`--full` goes on, and its table is of all that is there; `--full --report` makes the tables alone. What earlier
code made is taken with --any-code or --report only, and the result says how much it is.

The images are scikit-learn's digits: its two halves of classes stand for two families. The environment variable
METAOPT_DATA adds the image sources and tables of the folder that it names; a family of images is then a whole source.
Tasks and spaces are in image_table_tasks.py.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # A third less time to compile, for some percent of running time.
    os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level={0 if '--smoke' in sys.argv else 1}")

import image_table_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from image_table_tasks import NUM_CLASSES, OPS, SHAPES, Unit, image_units, make_network, stack_units, table_units

from metaopt import base, hypergrad, inner, methods, nas, predictors, spaces, tasks, training

# Rows of the table of results.
LEARNED = ", from the learned start"
A_STAR = "a* = h(t'), no trial"
FIXED = "best fixed architecture"
FINE_TUNED = "a* fine-tuned"
DARTS = "DARTS on each task"
RECORDS = "h from records, no trial"
BOTH = "h by hypergradient and from records, no trial"
RANDOM = "random search, {} networks"
EVOLUTION = "regularized evolution, {} networks"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    shapes: tuple[str, ...] = SHAPES
    folds: tuple[int, ...] = (0,)  # of `num_folds`, by family; each is predicted by an h that the others trained
    num_folds: int = 3
    max_tasks: int = 49  # of each shape
    held_out: int = 12  # tasks of a fold that are evaluated, at most
    num_steps: int = 40  # of one training run
    batch_size: int = 32
    rate: float = 1e-2
    smoothing: float = 0.1  # of training labels: without it, long training of wide networks is overconfident
    unroll: int = 20  # steps of the training that h is learned through, from the learned weights on
    meta_batch: int = 6
    meta_steps: int = 45
    meta_rate: float = 0.05
    init_rate: float = 3e-3
    meta_decay: float = 0.1
    temperature: float = 0.5  # of the architectures that h is trained on
    num_hidden: int = 8
    fine_tune_steps: int = 8
    darts_steps: int = 60
    rates: tuple[float, ...] = (0.05,)  # of α in fine-tuning and in DARTS; of several, each takes its best
    trusts: tuple[float, ...] = (0.0, 0.5, 1.0)
    left_out: float = 0.25  # share of the meta-training families that say which trust and rates are best
    tuned_on: int = 8  # of their tasks, for the rates
    trained: int = 24  # random networks on every task; on held-out ones as many as `trials` asks for
    trials: tuple[int, ...] = (5, 20)
    records: int = 16  # random networks on each task of the meta-training set, others on each, for h from records
    evolution: int = 20  # networks a task, of which `population` are random
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
    ),
}


# ---- Training -------------------------------------------------------------------------------------------------------


def masked_loss(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy over real rows and classes, of labels that are smoothed where training says so."""
    present, smoothing = batch["class_mask"], batch["smoothing"]
    log_p = jax.nn.log_softmax(jnp.where(present[None] > 0, outputs, -1e9))
    own = jnp.take_along_axis(log_p, batch["y"][:, None], 1)[:, 0]
    every = jnp.where(present[None] > 0, log_p, 0.0).sum(1) / present.sum()
    loss = -(1 - smoothing) * own - smoothing * every
    return jnp.sum(loss * batch["mask"]) / batch["mask"].sum()


def as_they_are(alpha, cell, key, step):
    """The relaxation of networks that are given by their weights, one-hot ones: a discrete network's logits."""
    return alpha


_COMPILED: set[Callable] = set()


def in_chunks(function: Callable, shared: Any, args: Any, size: int) -> tuple[Any, float]:
    """`function(shared, args)` on so many tasks at a time, one program for any number; and processor seconds a task.

    The last chunk is filled up with its last task. Compilation does not count.
    """
    n = len(jax.tree.leaves(args)[0])
    chunks = [np.minimum(np.arange(i, i + size), n - 1) for i in range(0, n, size)]
    at = lambda rows: jax.tree.map(lambda x: x[rows], args)
    if function not in _COMPILED:
        jax.block_until_ready(function(shared, at(chunks[0])))
        _COMPILED.add(function)
    start = time.process_time()
    out = [jax.device_get(function(shared, at(rows))) for rows in chunks]
    seconds = (time.process_time() - start) / sum(map(len, chunks))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:n], *out), seconds


class Shape:
    """Everything that tasks of one shape share: the space, and the programs that train its networks."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.network, self.in_shape = make_network(name)
        cosine = lambda steps: lambda hyperparams: optax.adam(optax.cosine_decay_schedule(config.rate, steps, 0.1))
        self.options: dict[str, Any] = {
            "ops": OPS,
            "loss": masked_loss,
            "decay": 1e-3,
            "sampler": inner.minibatch(config.batch_size, shared=("class_mask", "smoothing")),
            "keep": None,
        }
        rule = lambda problem: hypergrad.unrolled(problem, num_steps=config.unroll)
        constant = lambda hyperparams: optax.adam(config.rate)
        self.search = methods.architecture_search(
            self.network, self.in_shape, rule, optimizer=constant, learn_init=True, **self.options
        )
        self.darts = methods.darts(
            self.network, self.in_shape, optimizer=constant, outer_batch=self.some_valid, **self.options
        )
        # What fine-tuning alternates on: as DARTS, a batch of validation rows a step.
        self.tuning = methods.architecture_search(
            self.network,
            self.in_shape,
            rule,
            optimizer=constant,
            outer_batch=self.some_valid,
            learn_init=True,
            **self.options,
        )
        # One op an edge runs, since networks follow one another in a loop.
        one = methods.architecture_search(
            self.network,
            self.in_shape,
            rule,
            optimizer=cosine(config.num_steps),
            relaxation=as_they_are,
            single_path=True,
            learn_init=True,
            **self.options,
        )
        self.init = one.supernet.init
        train = inner.run(one.problem.loop, config.num_steps)

        def outcome(params, weights, batch):
            outputs = one.supernet.apply(params, weights, batch["x"])
            wrong = jnp.where(batch["class_mask"][None] > 0, outputs, -jnp.inf).argmax(-1) != batch["y"]
            return masked_loss(outputs, batch), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

        def trial(key, weights, start, task, test):
            state = train(key, {"alpha": weights, "init": start}, task.train)
            params = one.problem.loop.params(state)
            return jnp.stack([*outcome(params, weights, task.valid)[:1], *outcome(params, weights, test)])

        self.trials = jax.jit(lambda _, args: jax.lax.map(lambda a: trial(*a), args))
        self.starts = jax.jit(lambda _, keys: jax.vmap(self.init)(keys))

        def search_alone(rate, key, task):
            learner = training.learner(self.darts.estimator, optax.adam(rate, b1=0.5))
            state = learner.init(key, self.darts.hyperparams(key), task)
            state, _ = jax.lax.scan(lambda s, _: (learner.step(s)[0], None), state, length=config.darts_steps)
            return state.hyperparams

        self.search_alone = jax.jit(lambda rate, args: jax.vmap(search_alone, in_axes=(None, 0, 0))(rate, *args))

    def some_valid(self, key, task):
        """A batch of validation rows, for each alternation."""
        return inner.minibatch(self.config.batch_size, shared=("class_mask", "smoothing"))(
            key, jnp.int32(0), task.valid
        )

    def train(self, key, weights, tasks_, test, start=None) -> tuple[np.ndarray, float]:
        """[n, 3]: validation loss, test loss, test error of n networks, each on its own task; processor seconds of one.

        They start at random weights, or at `start`, shared.
        """
        init_keys, keys = jax.random.split(key, (2, len(test["y"])))
        if start is None:
            start, _ = in_chunks(self.starts, None, init_keys, self.config.held_out)
        else:
            start = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(keys), *x.shape)), start)
        args = (keys, weights, start, tasks_, test)
        out, seconds = in_chunks(self.trials, None, args, self.config.held_out)
        return np.where(np.isfinite(out), out, np.array([np.inf, np.log(NUM_CLASSES), 1.0])), seconds

    def sizes(self) -> list[int]:
        """The number of candidates of every edge, in order."""
        return [len(edge.ops) for cell in self.network.cells.values() for edge in cell.edges]

    def one_hot(self, codes: np.ndarray) -> dict[str, jax.Array]:
        """Weights of architectures [n, edges] of integers."""
        weights, at = {}, 0
        for kind, cell in self.network.cells.items():
            part = codes[:, at : at + len(cell.edges)]
            weights[kind] = jax.nn.one_hot(jnp.asarray(part), len(cell.edges[0].ops))
            at += len(cell.edges)
        return weights

    def decode(self, alpha: dict[str, jax.Array]) -> np.ndarray:
        """[n, edges] of integers: the largest α of every edge."""
        return np.concatenate([np.asarray(alpha[kind]).argmax(-1) for kind in self.network.cells], -1)

    def describe(self, code: np.ndarray) -> str:
        edges = [edge for cell in self.network.cells.values() for edge in cell.edges]
        return ", ".join(edge.ops[c] for edge, c in zip(edges, code, strict=True))

    def space(self):
        return {kind: spaces.real(shape=(len(c.edges), len(c.edges[0].ops))) for kind, c in self.network.cells.items()}


def gradient_features(shape: Shape, key, batch: base.Task) -> tuple[np.ndarray, float]:
    """[n, K] `nas.gradient_features` of every task, and the processor seconds a task, without compilation."""
    num = 2 * shape.config.batch_size
    rows = {k: v[:, :num] if k in ("x", "y", "mask") else v for k, v in batch.train.items()}
    one = lambda key, rows: nas.gradient_features(shape.darts.supernet, key, rows, loss=masked_loss)
    keys, rewritten = jax.random.split(key, len(batch.train["y"])), inner.im2col(one, only_on_cpu=True)
    program = jax.jit(lambda *args: jax.lax.map(lambda a: rewritten(*a), args)).lower(keys, rows).compile()
    start = time.process_time()
    features = np.asarray(program(keys, rows))
    return features, (time.process_time() - start) / len(keys)


# ---- The meta-searcher ----------------------------------------------------------------------------------------------


def sampled(predictor: base.Predictor, temperature: float) -> base.Predictor:
    """α = (h(0) + trust · (h(t) − h(0)) + G) / τ: with Gumbel noise G, softmax(α) is nearly a discrete architecture.

    Features are 0 of the average task. The noise is one for a whole training run, and comes with the task, as what h is
    trusted does: `task.features`.
    """

    def apply(meta_params, task):
        values, trust = task.features["values"], task.features["trust"]
        average, own = (predictor.apply(meta_params, task._replace(features=x)) for x in (0 * values, values))
        return jax.tree.map(
            lambda a, b, noise: (a + trust * (b - a) + noise) / temperature, average, own, task.features["noise"]
        )

    return base.Predictor(predictor.init, apply, {})


def with_features(shape: Shape, batch: base.Task, values) -> base.Task:
    """A batch of tasks whose features are the values that h reads, trusted, and no noise."""
    num = len(values)
    noise = {k: jnp.zeros((num, *leaf.shape)) for k, leaf in shape.space().items()}
    return batch._replace(features={"values": jnp.asarray(values), "trust": jnp.ones(num), "noise": noise})


def trusted(batch: base.Task, trust: float) -> base.Task:
    """The same tasks, with so much trust in what h reads of them."""
    return batch._replace(features={**batch.features, "trust": jnp.full_like(batch.features["trust"], trust)})


def resplit(key: jax.Array, task: base.Task) -> base.Task:
    """`tasks.resplit`, of images too."""
    shape = task.train["x"].shape[1:]
    as_shape = lambda data, *shape: {**data, "x": data["x"].reshape(len(data["x"]), *shape)}
    flat = task._replace(train=as_shape(task.train, -1), valid=as_shape(task.valid, -1))
    new = tasks.resplit(key, flat)
    return new._replace(train=as_shape(new.train, *shape), valid=as_shape(new.valid, *shape))


def make_sampler(batch: base.Task, rows: np.ndarray, meta_batch: int):
    """`key -> tasks`: some of the meta-training tasks, their rows split anew, classes renamed, and noise."""

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
    """h of tasks of one shape, and the programs that learn it and fine-tune with it."""

    def __init__(self, shape: Shape, num_features: int):
        config, self.num_features = shape.config, num_features
        predictor = predictors.mlp(shape.space(), num_features, num_hidden=config.num_hidden)
        h = sampled(predictor, config.temperature)
        self.search = methods.meta_architecture_search(shape.search, h)
        self.learner = make_learner(self.search, config)
        self.hyperparams = jax.jit(self.search.hyperparams)
        self.alpha = jax.jit(jax.vmap(self.search.alpha, in_axes=(None, 0)))

        def fine_tune(rate, learned, key, task):
            adam = optax.adam(rate, b1=0.5)
            tuned = methods.meta_architecture_search(shape.tuning, h, num_steps=config.fine_tune_steps, optimizer=adam)
            return tuned.fine_tune(key, learned, task).alpha

        self.fine_tune = jax.jit(lambda shared, args: jax.vmap(fine_tune, in_axes=(None, None, 0, 0))(*shared, *args))


def make_learner(meta: methods.MetaArchitecture, config: Config) -> training.Learner:
    """Of h and of what training starts from, each at its own rate; what reads features is kept small."""
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
    """[num, n, 3] outcomes of regularized evolution on each of n tasks, all asked and told in step."""
    n = len(test["y"])
    searcher = methods.regularized_evolution(population_size=shape.config.population, sample_size=3)
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
    """[n, 2] test loss and error of the best by validation of `num` of the trained networks, mean over draws of which.

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


def operations(shape: Shape, batch: base.Task, codes: np.ndarray) -> dict[str, float]:
    """Costs of an alternation of DARTS and one of fine-tuning, in training runs of one network.

    Counted operations; the run's are the mean over `codes`.
    """
    task = jax.tree.map(lambda x: x[0], batch)._replace(features=None)
    config, key = shape.config, jax.random.key(0)
    rows = {k: v[: config.batch_size] for k, v in task.train.items() if v.ndim > 0}
    rows |= {name: task.train[name] for name in ("class_mask", "smoothing")}

    def step(supernet, weights):
        params = supernet.init(key)
        loss = lambda params: masked_loss(supernet.apply(params, weights, rows["x"]), rows)
        return hypergrad.flops(jax.grad(loss), params)

    single = []
    for code in codes:
        genotype = nas.discretize(shape.network, shape_weights(shape, code), keep=None)
        single.append(step(nas.supernet(nas.discrete(shape.network, genotype), shape.in_shape, ops=OPS), None))
    alpha = shape.darts.hyperparams(key)
    run = np.mean(single) * config.num_steps

    def alternation(estimator):
        state = jax.eval_shape(lambda: estimator.init(key, alpha, task))
        return float(hypergrad.flops(lambda s: estimator.estimate(alpha, task, s)[0].hypergrad, state) / run)

    start = shape.init(key)
    at = lambda alpha, step: {"alpha": alpha, "init": start}
    tuning = hypergrad.lookahead(base.reparametrized(shape.tuning.problem, at), num_steps=1)
    return {
        "alternation": alternation(shape.darts.estimator),
        "fine-tuning": alternation(tuning),
    }


def processor_seconds(shape: Shape, meta: Meta, units: list[Unit], batch, test, codes, gradients: float):
    """What parts of the work cost on one task, in processor seconds, mean over tasks, compilation left out.

    What h reads is mostly NumPy's, where no operations are counted: a look at the training rows, and gradients at
    random weights.
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
        "DARTS": in_chunks(shape.search_alone, rate, (keys, few._replace(features=None)), 4)[1],
    }


def shape_weights(shape: Shape, code: np.ndarray) -> dict[str, np.ndarray]:
    return {kind: np.asarray(w[0]) for kind, w in shape.one_hot(code[None]).items()}


def effects(codes: np.ndarray, losses: np.ndarray, sizes: list[int], ridge: float = 1.0) -> list[np.ndarray]:
    """For every edge [ops], what an op adds to a network's loss: a ridge regression on all records.

    In standard deviations of the losses of a task, so that hard tasks do not outweigh the others.

    Args:
      codes: [networks, tasks, edges] of integers.
      losses: [networks, tasks], of validation.
      sizes: how many ops an edge has.
      ridge: the weight of the coefficients' squares, in records.
    """
    x = np.concatenate([codes[..., [e]] == np.arange(n) for e, n in enumerate(sizes)], -1).astype(float)
    x, y = x.reshape(losses.size, -1), ((losses - losses.mean(0)) / (losses.std(0) + 1e-9)).ravel()
    x = x - x.mean(0)
    found = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    return np.split(found, np.cumsum(sizes)[:-1])


# ---- The main job ---------------------------------------------------------------------------------------------------


def assign_folds(units: list[Unit], num_folds: int, seed: int) -> np.ndarray:
    """[units] fold of each, whole families."""
    families = sorted({u.family for u in units})
    order = np.random.default_rng(seed).permutation(len(families))
    fold = {families[f]: i % num_folds for i, f in enumerate(order)}
    return np.array([fold[u.family] for u in units])


def leave_out(units: list[Unit], rows: np.ndarray, share: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows, those that h learns from, and those of the families that are left out; none of two families."""
    families = sorted({units[i].family for i in rows})
    num = max(1, round(share * len(families))) if len(families) > 2 else 0
    out = {families[i] for i in rng.permutation(len(families))[:num]}
    is_out = np.array([units[i].family in out for i in rows])
    return rows[~is_out], rows[is_out]


def scale_features(units: list[Unit], gradients: np.ndarray, fit_on: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """[units, F] on one scale, fitted on the meta-training tasks: what a look says, and gradients at the start."""
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
    """Tasks of one shape, and random networks trained on all of them."""

    shape: Shape
    meta: Meta
    units: list[Unit]
    fold: np.ndarray  # [units]
    batch: base.Task
    test: dict[str, jax.Array]
    gradients: np.ndarray  # [units, K]
    codes: np.ndarray  # [networks, edges]
    outcomes: np.ndarray  # [trained, units, 3], of the first `trained` of them


def compared_key(key: jax.Array) -> jax.Array:
    """Of a fold's key, that which all networks are trained with that are compared with a*."""
    return jax.random.split(key, 16)[5]


def run_fold(p: Prepared, f: int, key: jax.Array, seed: int, say: Callable) -> dict[str, Any]:
    """Steps 2 to 4 and the comparison, where the families of one fold took no part; as JSON has it."""
    shape, config, units, name = p.shape, p.shape.config, p.units, p.shape.name
    keys = iter(jax.random.split(key, 16))
    take = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
    train_rows = np.flatnonzero(p.fold != f)
    learn_rows, left_rows = leave_out(units, train_rows, config.left_out, np.random.default_rng((seed, f, 2)))
    held = np.random.default_rng((seed, f)).permutation(np.flatnonzero(p.fold == f))[: config.held_out]
    n = len(held)
    values, names = scale_features(units, p.gradients, train_rows)
    with_values = with_features(shape, p.batch, values)
    new, new_test = take(with_values, held), take(p.test, held)

    # 2. h and the start of training, over the meta-training tasks.
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

    # What h has not learned from says how far to trust it, and how fast α is to move.
    left = np.random.default_rng((seed, f, 1)).permutation(left_rows if len(left_rows) else learn_rows)
    check_keys = jax.random.split(next(keys), 3)

    def best(candidates: tuple[float, ...], rows: np.ndarray, search: Callable) -> float:
        """That with the smallest validation loss, mean over tasks and three trainings of each architecture."""
        on, on_test, losses = take(with_values, rows), take(p.test, rows), []
        for candidate in candidates if len(candidates) > 1 else ():
            weights = shape.one_hot(shape.decode(search(candidate, on)))
            runs = [shape.train(key, weights, on._replace(features=None), on_test)[0][:, 0] for key in check_keys]
            losses.append(np.minimum(runs, np.log(NUM_CLASSES)).mean())
        return candidates[int(np.argmin(losses or [0]))]

    trust = 1.0
    if len(left_rows):
        trust = best(config.trusts, left[: config.held_out], lambda t, on: meta.alpha(learned, trusted(on, t)))
        with_values = trusted(with_values, trust)
    new = trusted(new, trust)

    # 3. a*, for families that took no part; and what h says where it knows nothing of the task.
    alpha = meta.alpha(learned, new)
    generated = shape.decode(alpha)
    ignorant = shape.decode(meta.alpha(learned, trusted(new, 0.0)))

    # 4. Fine-tuning, and DARTS.
    some = left[: config.tuned_on]
    tune_keys = jax.random.split(next(keys), len(some))

    tune = lambda rate, keys, on: in_chunks(meta.fine_tune, (jnp.float32(rate), learned), (keys, on), 4)
    alone = lambda rate, keys, on: in_chunks(
        shape.search_alone, jnp.float32(rate), (keys, on._replace(features=None)), 4
    )
    rates = {
        label: best(config.rates, some, lambda rate, on, search=search: search(rate, tune_keys, on)[0])
        for label, search in ((FINE_TUNED, tune), (DARTS, alone))
    }
    tuned, _ = tune(rates[FINE_TUNED], jax.random.split(next(keys), n), new)
    fine = shape.decode(tuned)

    # What one would have done instead. The best fixed architecture: by mean rank over the meta-training tasks.
    ranks = p.outcomes[:, train_rows, 0].argsort(0).argsort(0)
    fixed = np.repeat(p.codes[ranks.mean(1).argmin()][None], n, 0)
    plain_new = new._replace(features=None)
    found = shape.decode(alone(rates[DARTS], jax.random.split(next(keys), n), new)[0])
    run_key = next(keys)  # as `compared_key` says
    trained = lambda code, start=None: shape.train(run_key, shape.one_hot(code), plain_new, new_test, start)[0][:, 1:]
    fold_scores = {
        A_STAR: trained(generated),
        A_STAR + LEARNED: trained(generated, learned["init"]),
        FINE_TUNED: trained(fine),
        FINE_TUNED + LEARNED: trained(fine, learned["init"]),
        "h of the average task": trained(ignorant),
        FIXED: trained(fixed),
        FIXED + LEARNED: trained(fixed, learned["init"]),
        DARTS: trained(found),
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
    chosen = {"a*": generated, "fine-tuned": fine, "DARTS": found, "best fixed": fixed}
    return {
        "shape": name,
        "tasks": [units[u].name for u in held],
        "families": [units[u].family for u in held],
        "scores": {label: x.tolist() for label, x in fold_scores.items()},
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
    """h from records of the other families' tasks, alone and with the α of h by hypergradient, on one fold's tasks.

    codes: [records, units, edges]; losses: [records, units]; key: as of `run_fold`.
    """
    shape, sizes = p.shape, p.shape.sizes()
    train_rows = np.flatnonzero(p.fold != f)
    held = np.random.default_rng((seed, f)).permutation(np.flatnonzero(p.fold == f))[: shape.config.held_out]
    found = effects(codes[:, train_rows], losses[:, train_rows], sizes)
    by_records = np.repeat(np.array([e.argmin() for e in found])[None], len(held), 0)
    # Mixing weights [tasks, edges, ops] of each kind, as logits; both in units of their own spread within an edge.
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


class Kept:
    """What is finished, by name, in a file beside the result; and the seconds that all calls took for it."""

    def __init__(self, path: Path, settings: dict[str, Any], code: str, any_code: bool = False):
        self.path, self.any_code = path, any_code
        self.parts, self.data, self.code, self.before = {}, {}, {}, (0.0, 0.0)
        self.settings, self.now = json.loads(json.dumps(settings)), code
        self.begin = time.perf_counter(), time.process_time()
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] != self.settings:
                sys.exit(f"{path} holds parts of a run with other settings: remove it, or give --out another folder.")
            self.parts, self.data, self.before = saved["parts"], saved["data"], tuple(saved["seconds"])
            self.code = saved.get("code", {})  # of parts before it was written down, none

    def seconds(self) -> tuple[float, float]:
        """Of all calls, by the clock and of the processor."""
        clock, processor = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]
        return self.before[0] + clock, self.before[1] + processor

    def num_other_code(self) -> int:
        """How many parts are not by the code as it is."""
        return sum(self.code.get(name) != self.now for name in self.parts)

    def get(self, name: str, data: int, make: Callable[[], Any]) -> Any:
        """The part of that name, of data with this checksum; made and written where it is not there."""
        if name not in self.parts:
            self.parts[name], self.data[name], self.code[name] = make(), data, self.now
            state = {name: getattr(self, name) for name in ("settings", "parts", "data", "code")}
            part = self.path.with_suffix(f".{os.getpid()}.part")  # others may write there, too
            part.write_text(json.dumps({**state, "seconds": self.seconds()}))
            part.replace(self.path)  # at once: a run that is killed here has the one before
        if self.data[name] != data:
            sys.exit(f"{self.path} holds {name!r} of other data: remove it, or give --out another folder.")
        if self.code.get(name) != self.now and not self.any_code:
            sys.exit(
                f"{self.path} holds {name!r} by other code: remove it, give --out another folder, or --any-code to "
                "take it as it is."
            )
        return self.parts[name]


def run_shape(name: str, config: Config, use_folder: bool, seed: int, say: Callable, kept: Kept) -> None:
    """The four steps and the comparison on tasks of one shape, fold by fold."""
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

    # Random networks on all tasks: what random search would have found on each, and the best fixed architecture.
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
    # Others on each task: what an op is worth is told by more networks than a few that all tasks share.
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
        return {"operations": operations(shape, batch, codes[:8]), "seconds": by_clock}

    costs = kept.get(f"{name}, costs", data, measure)["seconds"]
    say(f"{name}: processor seconds a task, " + ", ".join(f"{part} {x:.4f}" for part, x in costs.items()))
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


def joined(parts: list[dict[str, Any]], costs: dict[str, dict[str, float]], config: Config) -> dict[str, Any]:
    """The results of several folds of one shape."""
    sizes = [len(part["tasks"]) for part in parts]
    end_to_end = lambda name: [x for part in parts for x in part[name]]
    by_label = lambda name: {label: [x for part in parts for x in part[name][label]] for label in parts[0][name]}
    runs, seconds = prices(list(parts[0]["scores"]), costs, [part["trust"] for part in parts], sizes, config)
    return {
        **{name: parts[0][name] for name in ("shape", "features", "ops", "space", "num_folds")},
        **{name: end_to_end(name) for name in ("tasks", "families", "values")},
        **{name: by_label(name) for name in ("scores", "weights", "architectures")},
        **{name: [part[name] for part in parts] for name in ("rates", "trust", "left_out", "tuned_on", "history")},
        "sizes": sizes,
        "costs": costs,
        "seconds": seconds,
        "runs": runs,
    }


def prices(labels, costs, trust: list[float], sizes: list[int], config: Config) -> tuple[dict, dict]:
    """What each row costs on a new task: in training runs, by operations, and in processor seconds.

    What h reads has no count of operations: it is the processor's seconds against those of a training run. Where it is
    trusted nothing, nothing is read. `trust` and `sizes` are of the folds, whose tasks count alike.
    """
    operations, clock = costs["operations"], costs["seconds"]
    run = clock["training run"]
    read = (clock["look"] + clock["gradients"]) * np.average([t > 0 for t in trust], weights=sizes)
    runs, seconds = dict.fromkeys(labels, 1.0), dict.fromkeys(labels, run)
    for label in labels:
        if label.startswith("a*") or label == BOTH:
            runs[label] += read / run
            seconds[label] += read
        if label.startswith(FINE_TUNED):
            runs[label] += config.fine_tune_steps * operations["fine-tuning"]
            seconds[label] += clock["fine-tuning"]
    runs[DARTS] += config.darts_steps * operations["alternation"]
    seconds[DARTS] += clock["DARTS"]
    trained = {RANDOM.format(t): t for t in config.trials} | {EVOLUTION.format(config.evolution): config.evolution}
    runs |= {label: float(t) for label, t in trained.items()}
    seconds |= {label: t * run for label, t in trained.items()}
    return {k: float(x) for k, x in runs.items()}, {k: float(x) for k, x in seconds.items()}


def report(scores: dict[str, np.ndarray], families: list[str], reference: str) -> dict[str, dict[str, float]]:
    """Means, mean ranks, and paired differences to `reference` with 95 % intervals, by a bootstrap over families."""
    import scipy.stats

    ranks = scipy.stats.rankdata([x[:, 0] for x in scores.values()], axis=0)
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    rows = {}
    for i, (label, x) in enumerate(scores.items()):
        difference = x[:, 0] - scores[reference][:, 0]
        low, high = interval(difference, groups)
        rows[label] = {
            "loss": x[:, 0].mean(),
            "error": x[:, 1].mean(),
            "rank": ranks[i].mean(),
            "difference": difference.mean(),
            "low": low,
            "high": high,
            "better": float((difference < 0).mean()),
        }
    return rows


def interval(difference: np.ndarray, groups: list[np.ndarray], num_draws: int = 2000) -> tuple[float, float]:
    """95 % of the mean over tasks, families drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))]) for _ in range(num_draws)]
    low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
    return float(low), float(high)


def to_markdown(result: dict[str, Any]) -> str:
    """The table of one shape of tasks."""
    scores = {label: np.array(x) for label, x in result["scores"].items()}
    rows = report(scores, result["families"], A_STAR)
    lines = [
        f"### {result['shape']}: {len(result['tasks'])} held-out tasks of {len(set(result['families']))} families, "
        f"{result['space']:,} architectures",
        "",
        "| method | test log loss | test error | mean rank | difference to a* [95 %] | tasks better than a* | cost on "
        "the new task, in training runs | in processor seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, r in rows.items():
        own = label == A_STAR
        difference = "" if own else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]"
        lines.append(
            f"| {label} | {r['loss']:.4f} | {r['error']:.2%} | {r['rank']:.2f} | {difference} | "
            f"{'' if own else format(r['better'], '.0%')} | {result['runs'][label]:.1f} | "
            f"{result['seconds'][label]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def bars(results: list[dict[str, Any]], most: int) -> str:
    """The two comparisons that were the aim, over all held-out tasks, in log loss and in errors."""
    families = [f"{r['shape']} {f}" for r in results for f in r["families"]]
    groups = [np.flatnonzero(np.array(families) == f) for f in sorted(set(families))]
    text = []
    for first, second in (
        (A_STAR, RANDOM.format(most)),
        (FINE_TUNED, DARTS),
        *([(RECORDS, RANDOM.format(most)), (BOTH, RANDOM.format(most))] if RECORDS in results[0]["scores"] else []),
        (A_STAR + LEARNED, RANDOM.format(most)),
        (FINE_TUNED + LEARNED, DARTS),
    ):
        a, b = (np.concatenate([np.array(r["scores"][label]) for r in results]) for label in (first, second))
        told = []
        for column, measure, form in ((0, "log loss", ".4f"), (1, "error", ".2%")):
            difference = a[:, column] - b[:, column]
            low, high = interval(difference, groups)
            told.append(
                f"test {measure} {a[:, column].mean():{form}} and {b[:, column].mean():{form}}, difference "
                f"{difference.mean():+{form}} [{low:+{form}}, {high:+{form}}], smaller on "
                f"{np.mean(difference < 0):.0%} and larger on {np.mean(difference > 0):.0%} of {len(a)} tasks"
            )
        runs, seconds = (
            [np.mean([r[unit][label] for r in results]) for label in (first, second)] for unit in ("runs", "seconds")
        )
        text.append(
            f"- {first} against {second}: {'; '.join(told)}; cost {runs[0]:.1f} and {runs[1]:.1f} training runs, "
            f"{runs[0] / runs[1]:.2f} of it, and {seconds[0]:.3f} and {seconds[1]:.3f} processor seconds, "
            f"{seconds[0] / seconds[1]:.2f} of it."
        )
    return "\n".join(text) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """For each shape: differences with intervals; what h chose by family; and how that follows features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), 3, figsize=(19, 6.5 * len(results)), squeeze=False, width_ratios=[1, 1, 1.1]
    )
    for (left, middle, right), result in zip(axes, results, strict=True):
        rows = report({k: np.array(x) for k, x in result["scores"].items()}, result["families"], A_STAR)
        order = np.arange(len(rows))[::-1]
        for y, (label, r) in zip(order, rows.items(), strict=True):
            color = "C3" if label.startswith("a*") else "C0"
            left.plot([r["low"], r["high"]], [y, y], color=color)
            left.plot(r["difference"], y, "o", color=color)
        left.axvline(0, color="0.6", linewidth=1)
        left.set_yticks(order, list(rows))
        left.set(title=f"{result['shape']}: test log loss against a*", xlabel="difference, 95 % over families")

        # Mean mixing weight of every op over the edges of its kind.
        labels, columns = [], []
        for kind, w in result["weights"].items():
            mean = np.array(w).mean(1)  # [tasks, ops]
            labels += [f"{kind}: {op}" for op in result["ops"][kind]]
            columns += list(mean.T)
        chosen = np.array(columns)  # [ops, tasks]
        families = sorted(set(result["families"]))
        if len(families) > 12:  # too many to name: the tasks in the order of the features' first principal direction
            values = np.array(result["values"])
            direction = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][0]
            at = np.argsort(values @ direction)
            shown = chosen[:, at]
            strongest = result["features"][int(np.abs(direction).argmax())]
            middle.set_xlabel(f"held-out tasks, along the features' main direction (mostly {strongest!r})")
        else:
            shown = np.stack([chosen[:, np.array(result["families"]) == f].mean(1) for f in families], 1)
            middle.set_xticks(range(len(families)), families, rotation=35, ha="right")
        image = middle.imshow(shown, aspect="auto", cmap="Blues", vmin=0)
        middle.set_yticks(range(len(labels)), labels)
        middle.set_title("what h chose: mean mixing weight")
        figure.colorbar(image, ax=middle, fraction=0.03)

        values = np.array(result["values"])
        standard = lambda x: (x - x.mean(0)) / (x.std(0) + 1e-9)
        with np.errstate(invalid="ignore"):
            correlation = standard(chosen.T).T @ standard(values) / len(values)
        image = right.imshow(correlation, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        right.set_yticks(range(len(labels)), labels)
        right.set_xticks(range(len(result["features"])), result["features"], rotation=50, ha="right")
        right.set_title("correlation of a choice with a feature, over held-out tasks")
        figure.colorbar(image, ax=right, fraction=0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


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
    say = lambda text: print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)
    path = out / f"auto_architecture_{name}"
    data = bool(os.environ.get("METAOPT_DATA")) and not args.packaged
    settings = {**dataclasses.asdict(config), "seed": args.seed, "data": data}
    if not args.smoke:
        # The folds of a shape have the same programs, and a run that goes on has them again.
        jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    elif not args.report:
        Path(f"{path}_parts.json").unlink(missing_ok=True)
    code = script.code(__file__, image_table_tasks.__file__)
    settings = {k: v for k, v in settings.items() if k not in ("folds", "shapes")}
    kept = Kept(Path(f"{path}_parts.json"), settings, code, args.any_code)
    for shape in () if args.report else config.shapes:
        run_shape(shape, config, not args.packaged, args.seed, say, kept)
    results = []
    for shape in SHAPES:
        parts = []
        for key in sorted(key for key in kept.parts if key.startswith(f"{shape}, fold")):
            part = dict(kept.parts[key])
            more = kept.parts.get(key.replace(", fold", ", records, fold"), {"scores": {}, "architectures": {}})
            part |= {name: {**part[name], **more[name]} for name in more}
            parts.append(part)
        if parts and (costs := kept.parts.get(f"{shape}, costs")) is None:
            sys.exit(f"{kept.path} does not hold the costs of {shape}: call without --report.")
        results += [joined(parts, costs, config)] if parts else []
    if not results:
        sys.exit(f"{kept.path} holds no fold that is finished.")
    seconds, processor = kept.seconds()
    call = "python experiments/auto_architecture.py " + " ".join(sys.argv[1:] if argv is None else argv)
    details = {
        "command": call.strip() + (", after earlier calls" if any(kept.before) else ""),
        "preset": name,
        "note": args.note,
        "seed": args.seed,
        "config": dataclasses.asdict(config),
        "data": data,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seconds": seconds,
        "processor": processor,
        "num_parts": len(kept.parts),
        "num_other_code": kept.num_other_code(),
        "results": results,
    }
    finish(details, path)
    return results


def trust_text(result: dict[str, Any]) -> str:
    """By fold: how many tasks were left out, and what they say of what h reads."""
    told = []
    for num, trust in zip(result["left_out"], result["trust"], strict=True):
        told.append(f"{num} tasks left out, which gave its reading the trust {trust}" if num else "none left out")
    return "; ".join(told)


def rates_text(config: dict[str, Any], results: list[dict[str, Any]]) -> str:
    if len(config["rates"]) == 1:
        return f"both move α at the rate {config['rates'][0]}, which was tuned for neither. "
    chosen = "; ".join(
        f"{r['shape']} {', '.join(f'{rates[FINE_TUNED]} and {rates[DARTS]}' for rates in r['rates'])}" for r in results
    )
    most = max(max(r["tuned_on"]) for r in results)
    what = "which h did not learn from"
    if any(not num for r in results for num in r["left_out"]):
        what = "which h did not learn from where there are more than two families to leave one out of"
    return (
        f"the rate of α of both is that of {', '.join(map(str, config['rates']))} with the smallest validation loss of "
        f"what it finds on {most} tasks of the meta-training set, {what} (fine-tuning and DARTS, by fold: {chosen}). "
    )


def reading_text(result: dict[str, Any]) -> str:
    clock = result["costs"]["seconds"]
    run, look = clock["training run"], clock["look"]
    return (
        f"{(look + clock['gradients']) / run:.1f} training runs on {result['shape']} (a run {run:.4f} s; the look "
        f"{look:.4f}; gradients {clock['gradients']:.4f})"
    )


def choices_text(result: dict[str, Any], best: str) -> str:
    """Fold by fold: how many architectures h wrote for the held-out tasks, and losses, with those of the row `best`."""
    ends = np.cumsum(result["sizes"])
    by_fold = lambda rows: [rows[end - size : end] for end, size in zip(ends, result["sizes"], strict=True)]
    joint = lambda values: ", ".join(values)
    loss = lambda row: joint(f"{np.mean(part, 0)[0]:.3f}" for part in by_fold(result["scores"][row]))
    chosen = {"a*": A_STAR, RECORDS: RECORDS, BOTH: BOTH}
    told = [
        f"{label}: {joint(str(len(set(part))) for part in by_fold(result['architectures'][label]))} (test log loss "
        f"{loss(row)})"
        for label, row in chosen.items()
        if label in result["architectures"]
    ]
    return (
        f"How many architectures there are for the {joint(map(str, result['sizes']))} held-out {result['shape']} of "
        f"each fold, {'; '.join(told)}; {best} had {loss(best)}."
    )


def finish(details: dict[str, Any], path: Path) -> None:
    """Writes and prints the tables and the picture."""
    config, results = details["config"], details["results"]
    most = 20 if 20 in config["trials"] else max(config["trials"])
    best, other_code = RANDOM.format(most), details["num_other_code"]
    each = lambda tell: " and ".join(map(tell, results))
    text = f"# auto_architecture, {details['preset']}\n\n" + "\n".join(to_markdown(r) for r in results)
    text += "\n### Over all of them\n\n" + bars(results, most)
    text += (
        f"\nA training run is {config['num_steps']} steps of {config['batch_size']} rows, of one network; an "
        "alternation of DARTS costs "
        + each(lambda r: f"{r['costs']['operations']['alternation']:.2f} ({r['shape']})")
        + " of it, in operations, and one of fine-tuning "
        + each(lambda r: f"{r['costs']['operations']['fine-tuning']:.2f}")
        + ", which differentiates where DARTS takes finite differences. What h reads in a task (statistics of its "
        "rows, and gradients at random weights) has no count of operations, and is told by processor seconds against "
        "those of a training run, all on one core, per task and without compilation: "
        + each(reading_text)
        + ". Nothing is read where it is trusted nothing, and the rows are means over folds. Intervals are from a "
        "bootstrap over families. Random search is the mean over draws of which of the trained networks it saw. "
        "Processor seconds are those of the parts of the work, each measured alone: searches on 8 tasks, four of them "
        "side by side, the rest on all tasks. "
        f"DARTS takes {config['darts_steps']} alternations of second order, fine-tuning {config['fine_tune_steps']}; "
        + rates_text(config, results)
        + " ".join(
            f"Of {r['shape']}, {len(r['trust'])} of {r['num_folds']} folds were held out; of the rest, {trust_text(r)}."
            for r in results
        )
        + " "
        + " ".join(choices_text(r, best) for r in results)
        + " "
        + details["note"]
        + "\n\n"
        f"`{'METAOPT_DATA=... ' if details['data'] else ''}{details['command'].strip()}`, seed {details['seed']}, "
        f"{details['seconds']:.0f} s ({details['processor']:.0f} processor seconds) on {details['cores']} core(s); "
        f"Python {platform.python_version()}, JAX {jax.__version__}."
        + (f" {other_code} of {details['num_parts']} parts are by other code than the script's." * (other_code > 0))
        + "\n"
    )
    Path(f"{path}.md").write_text(text)
    Path(f"{path}.json").write_text(json.dumps(details))
    plot(results, Path(f"{path}.png"))
    print(text)
    print(f"Results in {path}.md, .png and .json")


if __name__ == "__main__":
    main()

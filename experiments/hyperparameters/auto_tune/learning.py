"""Learns one λ for all tables and then g, and fine-tunes λ on one table, all by hypergradients."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments.hyperparameters.auto_tune.config import FEATURES, Config
from experiments.hyperparameters.auto_tune.network import make_network, make_scores
from experiments.hyperparameters.auto_tune.trials import in_chunks
from experiments.hyperparameters.auto_tune.units import Bucket, Collection, make_sampler
from metaopt import base, hypergrad, predictors, spaces, tasks, training
from metaopt.training import report_progress


class Learning:
    """The problem, its estimator, g, and the learners, which all folds share, so that they compile only once."""

    def __init__(self, config: Config):
        network = make_network(config)
        self.config, self.space, self.problem = config, network.space, network.problem
        self.scores = make_scores(network)
        constrained = spaces.constrain(self.problem, self.space)
        self.estimator = hypergrad.unrolled(constrained, num_steps=config.num_steps, remat="step")
        self.default = spaces.default(self.space)
        self.predictor = predictors.mlp(self.space, len(FEATURES))
        self.g = predictors.ensemble(self.predictor, config.num_predictors)
        self.learners = make_learners(self.estimator, self.predictor, config)

    def no_features(self, collection: Collection) -> np.ndarray:
        return np.zeros((len(collection.units), len(FEATURES)), np.float32)


class Learned(NamedTuple):
    """Results of learning by fold, without the families of the fold. Predictions have a leading axis over all units."""

    one_for_all: dict[int, Any]
    by_ensemble: dict[int, Any]  # λ = g(t)
    by_member: dict[int, Any]  # λ of the first member of g
    histories: dict[int, tuple[np.ndarray, np.ndarray]]  # validation losses of one λ, and of g


def learn_folds(
    learning: Learning,
    collection: Collection,
    buckets: list[Bucket],
    seed: int,
    out: Path,
    checkpoints: str | None,
    log,
) -> Learned:
    """Learns one λ for all tables and then g, starting there, for each fold. Saves g in `out`.

    `checkpoints` is the start of the names of folders in `out / "checkpoints"`, from which a run continues.
    """
    config, learned = learning.config, Learned({}, {}, {}, {})
    for fold in config.folds:
        train_units = np.flatnonzero(collection.fold != fold)
        # Scaling is fitted only on the training tables of the fold.
        scaling = tasks.fit_scaling([collection.described[u] for u in train_units], FEATURES)
        features = np.stack([np.asarray(scaling.transform(d, clip=3.0), np.float32) for d in collection.described])
        described = [b._replace(task=b.task._replace(features=jnp.asarray(features[b.units]))) for b in buckets]
        rows = [np.flatnonzero(np.isin(b.units, train_units)) for b in described]
        start = time.perf_counter()
        learned.one_for_all[fold], phi, learned.histories[fold] = meta_train(
            learning.learners,
            learning.predictor,
            learning.space,
            make_sampler(described, rows, config.meta_batch),
            jax.random.fold_in(jax.random.key(seed), fold),
            config,
            out / "checkpoints" / f"{checkpoints}{fold}" if checkpoints else None,
        )
        log.seconds[f"meta-training, fold {fold}"] = time.perf_counter() - start
        first_member = jax.tree.map(lambda x: x[0], phi)
        learned.by_ensemble[fold] = predict(learning.g, learning.space, phi, features)
        learned.by_member[fold] = predict(learning.predictor, learning.space, first_member, features)
        metaopt.save(out / f"auto_tune_fold{fold}.npz", predictors.TrainedPredictor(learning.g, phi, scaling))
        tail = max(1, config.meta_steps // 5)
        one_history, g_history = learned.histories[fold]
        log(
            f"fold {fold}: validation loss {one_history[:tail].mean():.3f} → "
            f"{one_history[-tail:].mean():.3f} (one λ) → {g_history[-tail:].mean():.3f} (g)"
        )
    return learned


def predict(g: base.Predictor, space, weights, features: np.ndarray):
    """Returns λ of every row of the features."""
    one = lambda weights, row: spaces.to_constrained(space, g.apply(weights, base.Task(None, None, row)))
    return jax.jit(jax.vmap(one, in_axes=(None, 0)))(weights, jnp.asarray(features))


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


class FineTuning:
    """Fine-tunes λ of the units of some buckets by a few hypergradient steps."""

    def __init__(self, learning: Learning, num_steps: int, buckets: list[Bucket]):
        self.buckets, self._compiled = buckets, []
        optimizer = outer_optimizer(learning.config.fine_tune_rate, num_steps + 1)
        # The published results had a new key for each run.
        tune = training.fine_tune(
            learning.estimator, num_steps=num_steps, optimizer=optimizer, space=learning.space, same_key=False
        )
        self._batch = jax.jit(in_chunks(lambda *args: tune(*args).hyperparams, learning.config.chunk))

    def _arguments(self, key, starts) -> list[tuple]:
        """Returns keys, λ and tasks of each bucket."""
        arguments, first = [], 0
        for k, bucket in enumerate(self.buckets):
            rows = slice(first, first := first + len(bucket.units))
            keys = jax.random.split(jax.random.fold_in(key, k), len(bucket.units))
            arguments.append((keys, jax.tree.map(lambda x, rows=rows: x[rows], starts), bucket.task))
        return arguments

    def compile(self, starts) -> None:
        """Compiles for λ like `starts`, which has a leading axis over the units."""
        with report_progress(None, None, "fine-tuning") as report, report.compiling("fine-tuning"):
            self._compiled = [self._batch.lower(*a).compile() for a in self._arguments(jax.random.key(0), starts)]

    def __call__(self, key, starts) -> tuple[Any, float]:
        """Returns λ of every unit after the steps, and the seconds for all, without compilation."""
        if not self._compiled:
            self.compile(starts)
        arguments = self._arguments(key, starts)
        start = time.perf_counter()
        parts = jax.block_until_ready([f(*a) for f, a in zip(self._compiled, arguments, strict=True)])
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), time.perf_counter() - start

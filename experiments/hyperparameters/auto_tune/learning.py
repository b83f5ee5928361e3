"""Learns one λ for all tables and then g, and fine-tunes λ on one table, all by hypergradients."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.hyperparameters.auto_tune.config import Config
from experiments.hyperparameters.auto_tune.units import Bucket
from metaopt import base, hypergrad, predictors, spaces, training
from metaopt.training import report_progress


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

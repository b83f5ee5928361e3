"""Learns one λ for all tables, and then g, with early stopping on development families."""

import json
import time
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.config import FEATURES, Config
from metaopt import automl, base, hypergrad, inner, predictors, spaces, training


def make_estimator(config: Config) -> base.Estimator:
    """Returns the exact hypergradient of one task through the whole training, clipped."""
    network = make_network(config.run)
    problem = inner.problem(network.problem.loop, outer_loss_of(config, network))
    constrained = spaces.constrain(problem, network.space)
    estimator = hypergrad.unrolled(constrained, num_steps=config.run.num_steps, remat="step")
    return clip_norm(estimator, config.max_norm)


def outer_loss_of(config: Config, network: automl.TabularNetwork):
    """Returns the outer loss f(θ, λ, rows) that `config` names.

    "log_loss" is that of the network. "rank_error", for intervals of a number, is the RMSE of the mean interval, in
    deviations of intervals that are equally frequent.
    """
    if config.outer_loss == "log_loss":
        return lambda params, hyperparams, batch: network.problem.outer_loss(params, hyperparams, batch, None)

    def rank_error(params, hyperparams, batch):
        p = jnp.exp(network.log_probabilities(params, hyperparams, batch))
        error = p @ jnp.arange(p.shape[1], dtype=p.dtype) - batch["y"]
        variance = (batch["class_mask"].sum() ** 2 - 1) / 12
        return jnp.sqrt(jnp.sum(error**2 * batch["mask"]) / batch["mask"].sum() / variance)

    return rank_error


def clip_norm(estimator: base.Estimator, max_norm: float) -> base.Estimator:
    """Clips the norm of the hypergradient with respect to λ, before a predictor pulls it back to its weights."""

    def estimate(hyperparams, task, state):
        result, state = estimator.estimate(hyperparams, task, state)
        norm = optax.tree.norm(result.hypergrad)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-9))
        return result._replace(hypergrad=jax.tree.map(lambda x: scale * x, result.hypergrad)), state

    return base.Estimator(estimator.init, estimate, "biased")


def make_evaluate(estimator: base.Estimator, predictor, development):
    """Returns `(key, φ) -> ` the validation loss of g's λ on development tasks, averaged over families."""

    @jax.jit
    def losses(keys, meta_params, batch):
        def one(args):
            key, task = args
            z = predictor.apply(meta_params, task)
            return estimator.estimate(z, task, estimator.init(key, z, task))[0].value

        return jax.lax.map(one, (keys, batch), batch_size=4)

    def evaluate(key, meta_params):
        total = 0.0
        for k, (batch, weights) in enumerate(development):
            values = losses(jax.random.split(jax.random.fold_in(key, k), len(weights)), meta_params, batch)
            total += float(weights @ np.nan_to_num(np.asarray(values), nan=np.log(100.0)))
        return total / sum(weights.sum() for _, weights in development)

    return evaluate


def decayed(meta_params: base.PyTree) -> base.PyTree:
    """Returns True for the weights of a predictor that decay: not its center and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("center", "bias", "b"), meta_params)


def learn(config: Config, folder: Path, seed: int) -> None:
    """Learns one λ and g with one seed. Writes both, with their histories, to `folder`. Continues after a kill."""
    pools, space = pool.load_pools(config, folder), make_network(config.run).space
    scaling = pool.fit_scaling(pools)
    sample_tasks = pool.make_sampler(pools, scaling, config)
    development = pool.development_tasks(pools, scaling, config)
    estimator, key = make_estimator(config), jax.random.key(seed)
    begin = time.perf_counter()
    optimizer = optax.adam(optax.cosine_decay_schedule(config.global_rate, config.global_steps))
    first = training.fit(
        training.learner(hypergrad.over_tasks(estimator, task_chunk=1), optimizer),
        sample_tasks,
        hyperparams=spaces.default(space),
        space=space,
        num_steps=config.global_steps,
        key=jax.random.fold_in(key, 0),
        checkpoint_dir=folder / "checkpoints" / f"global_{seed}",
    )
    predictor = predictors.mlp(space, len(FEATURES), limit=config.limit)
    schedule = optax.cosine_decay_schedule(config.meta_rate, config.meta_steps)
    adamw = optax.adamw(schedule, weight_decay=config.meta_decay, mask=decayed)
    second = training.fit(
        training.learner(
            hypergrad.over_tasks(predictors.amortize(estimator, predictor), task_chunk=1),
            optax.chain(optax.clip_by_global_norm(1.0), adamw),
        ),
        sample_tasks,
        hyperparams={
            **predictor.init(jax.random.fold_in(key, 1)),
            "center": jax.flatten_util.ravel_pytree(first.state.hyperparams)[0],
        },
        num_steps=config.meta_steps,
        key=jax.random.fold_in(key, 2),
        evaluate=make_evaluate(estimator, predictor, development),
        eval_every=config.eval_every,
        checkpoint_dir=folder / "checkpoints" / f"g_{seed}",
    )
    metaopt.save(folder / f"g_{seed}.npz", predictors.TrainedPredictor(predictor, second.best_hyperparams, scaling))
    summary = {
        "seconds": time.perf_counter() - begin,
        "one_for_all": {name: float(value) for name, value in first.hyperparams.items()},
        "development_losses": second.evaluations.tolist(),
        "best": second.best_value,
        "values": second.history["value"].tolist(),
    }
    (folder / f"g_{seed}.json").write_text(json.dumps(summary))
    print(
        f"seed {seed}: development loss {second.evaluations[0]:.4f} (one λ) → {second.best_value:.4f} (g)", flush=True
    )

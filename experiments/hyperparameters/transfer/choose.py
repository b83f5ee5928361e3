"""Compares spreads of the draws around g's prediction, on development tasks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import metaopt
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.config import Config
from metaopt import automl, spaces

SPREADS = (0.25, 0.5, 1.0)


def choose_spread(config: Config, folder: Path, seed: int) -> dict[float, float]:
    """Prints the loss of g, and of the best of K draws for each spread.

    A half of the validation rows chooses among the draws, and the other half judges the choice. Losses are means over
    families.
    """
    network, trained = make_network(config.run), metaopt.load(folder / f"g_{seed}.npz")
    development = pool.development_tasks(pool.load_pools(config, folder), trained.scaling, config)

    @jax.jit
    def losses(keys, batch, spread):
        def one(args):
            key, task = args
            run_key, draw_key, split_key = jax.random.split(key, 3)
            z, unravel = jax.flatten_util.ravel_pytree(trained.predictor.apply(trained.meta_params, task))
            noise = jax.random.normal(draw_key, (config.proposals, len(z))).at[0].set(0.0)
            half = jax.random.bernoulli(split_key, 0.5, task.valid["mask"].shape)
            parts = [{**task.valid, "mask": task.valid["mask"] * part} for part in (half, ~half)]

            def run(z):
                hyperparams = spaces.to_constrained(network.space, unravel(z))
                params = automl.train(network, run_key, hyperparams, task)
                return jnp.stack([network.problem.outer_loss(params, hyperparams, part, None) for part in parts])

            values = jax.lax.map(run, z + spread * noise)
            return jnp.stack([values[0, 1], values[jnp.nanargmin(values[:, 0]), 1]])

        return jax.lax.map(one, (keys, batch))

    results = {}
    for spread in SPREADS:
        total, weight = np.zeros(2), 0.0
        for k, (batch, weights) in enumerate(development):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), k), len(weights))
            values = np.asarray(losses(keys, batch, spread))
            usable = np.isfinite(values).all(1)  # a half without rows has no loss
            total += weights[usable] @ values[usable]
            weight += weights[usable].sum()
        results[spread] = float(total[1] / weight)
        print(f"spread {spread}: {total[0] / weight:.4f} (g) → {results[spread]:.4f} (best of {config.proposals})")
    return results

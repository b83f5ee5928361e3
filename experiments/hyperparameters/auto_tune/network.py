"""The training run that is tuned: `automl.tabular_network`, and its scores."""

import jax.numpy as jnp
import numpy as np

from experiments.hyperparameters.auto_tune.config import Config
from metaopt import automl


def make_network(config: Config) -> automl.TabularNetwork:
    return automl.tabular_network(
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        num_members=config.num_members,
        num_hidden=config.num_hidden,
    )


def make_scores(network: automl.TabularNetwork, least_probability: float = 0.0):
    """Returns a function (params, λ, rows) -> log loss and error over the real rows.

    Smaller probabilities of the true class count as `least_probability`.
    """

    def scores(params, hyperparams, batch):
        log_p = network.log_probabilities(params, hyperparams, batch)
        nll = -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1)[:, 0]
        if least_probability:
            nll = jnp.minimum(nll, -np.log(least_probability))
        wrong = log_p.argmax(1) != batch["y"]
        return jnp.sum(nll * batch["mask"]) / batch["mask"].sum(), jnp.sum(wrong * batch["mask"]) / batch["mask"].sum()

    return scores

"""A small network that maps a window to its weight. Its parameters are λ."""

import math

import jax
import jax.numpy as jnp

from experiments.hyperparameters.transformer import NUM_CHARACTERS
from metaopt import base

NUM_UNITS = 16
LAGS = range(1, 7)


def init(key: jax.Array):
    """Returns parameters with which all windows have the weight 1/2."""
    keys = jax.random.split(key)
    units = [jax.random.normal(k, (NUM_CHARACTERS, NUM_UNITS)) for k in keys]
    num = NUM_UNITS + len(LAGS)
    return {"first": units[0], "second": units[1], "out": jnp.zeros(num), "bias": jnp.zeros(())}


def score(params, windows: jax.Array) -> jax.Array:
    """Returns logits of weights [B]: a linear function of hidden units and of repetitions.

    A hidden unit reads pairs of neighboring characters, and is averaged over the window. A repetition at a lag is the
    share of characters that equal the one that many places before.
    """
    units = jnp.tanh(params["first"][windows[:, :-1]] + params["second"][windows[:, 1:]]).mean(1)
    repeated = [(windows[:, lag:] == windows[:, :-lag]).mean(1, dtype=units.dtype) for lag in LAGS]
    inputs = jnp.concatenate([units, jnp.stack(repeated, 1)], 1)
    return math.sqrt(inputs.shape[1]) * (inputs @ params["out"]) + params["bias"]


def weight(params, batch) -> jax.Array:
    """Returns the weights [B] of a batch, in (0, 1)."""
    return jax.nn.sigmoid(score(params, batch["windows"]))


def predictor() -> base.Predictor:
    """Returns the scorer as a predictor of the weights of all windows of a task, λ = {"weight": [N]}."""
    return base.Predictor(init, lambda params, task: {"weight": weight(params, task.train)})

"""The last part of a predictor: a linear map of features plus a network with one hidden layer."""

import jax
import jax.numpy as jnp
import numpy as np


def init_head(key: jax.Array, num_features: int, num_hidden: int, center: jax.Array) -> dict[str, jax.Array]:
    """Returns weights with which the output is `center` for all features."""
    num_outputs = center.shape[0]
    num_hidden = num_hidden if num_features else 0  # without features, the hidden layer would stay at zero
    weights = jax.random.normal(key, (num_features, num_hidden), center.dtype) / np.sqrt(max(num_features, 1))
    return {
        "center": center,
        "linear": jnp.zeros((num_features, num_outputs), center.dtype),
        "hidden": weights,
        "bias": jnp.zeros(num_hidden, center.dtype),
        "out": jnp.zeros((num_hidden, num_outputs), center.dtype),
    }


def apply_head(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Returns center + W x + V tanh(U x + b)."""
    hidden = jnp.tanh(features @ params["hidden"] + params["bias"])
    return params["center"] + features @ params["linear"] + hidden @ params["out"]

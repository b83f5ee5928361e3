"""FiLM: a context vector scales and shifts the features of a network."""

from collections.abc import Callable

import jax.numpy as jnp


def modulated(features: Callable) -> Callable:
    """Multiplies features by 1 + A φ, and adds B φ, with a context vector φ. CAVIA adapts only φ."""

    def of_context(params, batch):
        scale, shift = jnp.einsum("k,ikd->id", params["context"], params["modulation"])
        return features(params, batch) * (1 + scale[None]) + shift[None]

    return of_context

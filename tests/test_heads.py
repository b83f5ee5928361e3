"""The head of predictors: its formula, by hand."""

import math

import jax.numpy as jnp
import numpy as np

from metaopt import _heads


def test_a_head_is_its_center_plus_a_linear_map_plus_a_network():
    params = {
        "center": jnp.array([10.0, 20.0]),
        "linear": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "hidden": jnp.array([[0.1], [0.2]]),
        "bias": jnp.array([0.3]),
        "out": jnp.array([[5.0, 6.0]]),
    }
    hidden = math.tanh(0.1 * 1 + 0.2 * 2 + 0.3)
    expected = [10 + 1 + 3 * 2 + 5 * hidden, 20 + 2 + 4 * 2 + 6 * hidden]
    np.testing.assert_allclose(_heads.apply_head(params, jnp.array([1.0, 2.0])), expected, rtol=1e-12)

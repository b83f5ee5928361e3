"""The norm that self-tuning divides by."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.transforms import _tuned_steps


def test_the_norm_of_zero_is_zero_and_has_the_derivative_zero():
    value, grad = jax.value_and_grad(_tuned_steps.norm)({"a": jnp.zeros(2), "b": jnp.zeros(())})
    assert value == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grad))
    value, grad = jax.value_and_grad(_tuned_steps.norm)({"a": jnp.array([3.0, 0.0]), "b": jnp.array(-4.0)})
    assert value == 5
    np.testing.assert_allclose([*grad["a"], grad["b"]], [0.6, 0.0, -0.8], rtol=1e-12)

"""Labels as the heads of few-shot methods read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import few_shot

SUPPORT = {"x": np.eye(3), "y": np.array([1, 0, 0]), "mask": np.array([1.0, 1.0, 0.0]), "class_mask": np.ones(2)}


@pytest.mark.parametrize("method", [few_shot.prototypical_networks, few_shot.ridge_head])
def test_padded_rows_have_no_class_whatever_their_label(method):
    loop = method(lambda params, batch: batch["x"]).problem.loop
    hyperparams = method(lambda params, batch: batch["x"]).hyperparams({})

    def head(support):
        return loop.params(loop.init(jax.random.key(0), hyperparams, jax.tree.map(jnp.asarray, support)))

    first, other = head(SUPPORT), head(SUPPORT | {"y": np.array([1, 0, 7])})
    jax.tree.map(np.testing.assert_array_equal, first, other)
    if method is few_shot.prototypical_networks:
        np.testing.assert_array_equal(first["head"]["w"], 2 * np.array([[0, 1], [1, 0], [0, 0]]))


def test_a_mask_may_weight_rows_and_a_class_without_rows_has_the_prototype_zero():
    method = few_shot.prototypical_networks(lambda params, batch: batch["x"])
    support = {"x": jnp.array([[1.0, 0], [4, 2]]), "y": jnp.zeros(2, int), "mask": jnp.array([0.3, 0.1])}
    loop = method.problem.loop
    params = loop.params(loop.init(jax.random.key(0), method.hyperparams({}), support | {"class_mask": jnp.ones(2)}))
    np.testing.assert_allclose(params["head"]["w"], 2 * np.array([[1.75, 0], [0.5, 0]]), rtol=1e-6)

"""The cross-entropy, by hand."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import inner


def test_cross_entropy_is_among_the_classes_of_the_task_and_over_its_real_rows():
    outputs = jnp.array([[1.0, 5.0, 2.0], [0.0, 7.0, 3.0], [4.0, 4.0, 4.0]])
    batch = {
        "y": jnp.array([0, 2, 0]),
        "mask": jnp.array([1.0, 1.0, 0.0]),
        "class_mask": jnp.array([1.0, 0.0, 1.0]),
    }
    losses = [np.log(np.exp(1) + np.exp(2)) - 1, np.log(np.exp(0) + np.exp(3)) - 3]
    assert float(inner.cross_entropy(outputs, batch)) == pytest.approx(np.mean(losses), rel=1e-12)
    shifted = outputs.at[:, 1].add(100.0)  # outputs of a class that the task lacks change nothing
    chex.assert_trees_all_equal(inner.cross_entropy(shifted, batch), inner.cross_entropy(outputs, batch))


def test_many_rows_in_float16_do_not_overflow():
    outputs = jnp.zeros((70_000, 2), jnp.float16).at[:, 0].set(3.0)
    batch = {"y": np.zeros(70_000, np.int32), "mask": np.ones(70_000)}
    assert float(inner.cross_entropy(outputs, batch)) == pytest.approx(np.log1p(np.exp(-3)), rel=1e-2)

"""Labels as the heads of few-shot methods read them."""

import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.few_shot import _heads


def test_padded_rows_have_no_class_whatever_their_label():
    batch = {"y": np.array([1, 0, 7]), "mask": np.array([1.0, 1.0, 0.0]), "class_mask": np.ones(2)}
    np.testing.assert_array_equal(_heads._one_hot(batch, jnp.float32), [[0, 1], [1, 0], [0, 0]])
    with pytest.raises(ValueError, match=r'The labels "y" must be in 0\.\.1; got labels from 0 to 7, 1 of 3 outside'):
        _heads._one_hot(batch | {"mask": np.ones(3)}, jnp.float32)

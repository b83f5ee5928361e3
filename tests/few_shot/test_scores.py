"""The scores, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import few_shot


def test_accuracy_is_the_share_of_real_examples_whose_class_is_largest_in_the_episode():
    outputs = jnp.array([[2.0, 1.0, 9.0], [0.0, 1.0, 9.0], [3.0, 1.0, 9.0], [1.0, np.nan, 9.0], [5.0, 0.0, 9.0]])
    query = {
        "y": jnp.array([0, 1, 1, 0, 0]),
        "mask": jnp.array([1.0, 1.0, 1.0, 1.0, 0.0]),
        "class_mask": jnp.array([1.0, 1.0, 0.0]),  # the episode lacks the third class
    }
    assert few_shot.accuracy(outputs, query) == 2 / 4  # right, right, wrong, not a number, padding


@pytest.mark.parametrize("score, wanted", [(few_shot.mean_squared_error, 185.0), (few_shot.mean_absolute_error, 11.0)])
def test_errors_of_unsigned_integers_do_not_wrap(score, wanted):
    outputs, y = jnp.array([2, 3, 9], jnp.uint8), jnp.array([21, 0, 9], jnp.uint8)  # errors -19 and 3, not 237 and 3
    assert float(score(outputs, {"y": y, "mask": jnp.array([1.0, 1.0, 0.0])})) == pytest.approx(wanted)

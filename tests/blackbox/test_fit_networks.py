"""Trials as transformers read them while they are trained."""

import numpy as np

from metaopt.blackbox import _fit_networks


def test_shown_trials_are_padded_to_one_size():
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5.0)
    rows, outcomes, mask = _fit_networks._padded_rows(x, y, np.array([3, 1]), 4)
    np.testing.assert_array_equal(rows, [[6, 7], [2, 3], [0, 0], [0, 0]])
    np.testing.assert_array_equal(outcomes, [3, 1, 0, 0])
    np.testing.assert_array_equal(mask, [1, 1, 0, 0])

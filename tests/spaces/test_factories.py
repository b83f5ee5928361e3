"""Limits of factories' arguments."""

import pytest

from metaopt import spaces


def test_the_default_of_a_positive_leaf_is_between_its_limits_or_one_of_them():
    for default in (1e-30, 1e30):
        assert float(spaces.positive(default).default) == default
    for default in (0.99e-30, 1.01e30, 0.0, -1.0):
        with pytest.raises(ValueError, match="`default` must be positive, between 1e-30 and 1e30"):
            spaces.positive(default)

"""Limits of factories' arguments."""

from metaopt import spaces


def test_the_default_of_a_positive_leaf_is_between_its_limits_or_one_of_them():
    for default in (1e-30, 1e30):
        assert float(spaces.positive(default).default) == default

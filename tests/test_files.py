"""Types of arrays that files may have."""

import numpy as np
import pytest

from metaopt import _files


@pytest.mark.parametrize(
    ("name", "expected"), [("f2", True), ("f4", True), ("f8", True), ("g", False), ("i8", False), ("c8", False)]
)
def test_floating_point_types_of_files_are_those_of_jax(name, expected):
    """float64 is what runs with x64 write; "g" is NumPy's long double, which JAX does not have."""
    assert _files.is_real_float(np.zeros(1, name)) == expected

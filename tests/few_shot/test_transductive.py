"""What counts as a difference between outputs before and after other query examples were blanked."""

import numpy as np
import pytest

from metaopt.few_shot import _transductive

RNG = np.random.default_rng(0)
QUERY = {"mask": np.ones((2, 8))}
OUTPUTS = {
    "random": RNG.normal(size=(2, 3, 8, 4)),
    "all zero": np.zeros((2, 3, 8, 4)),  # no spread and no rounding: a difference must still be above zero
    "far from zero": 1e3 + RNG.normal(size=(2, 3, 8)),
}


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_equal_outputs_do_not_differ(outputs):
    assert not _transductive.differ(outputs, outputs.copy(), QUERY)


def test_the_spread_is_that_between_examples():
    """Outputs of one example may differ much between classes, and a small change of one of them is still seen."""
    outputs = np.array([100.0, -100.0, 0.0, 50.0]) + 0.1 * OUTPUTS["random"]
    changed = outputs.copy()
    changed[1, 2, 4, 0] += 0.01  # a tenth of the spread
    assert _transductive.differ(outputs, changed, QUERY)
    changed[1, 2, 4, 0] = outputs[1, 2, 4, 0] + 1e-6
    assert not _transductive.differ(outputs, changed, QUERY)
    odd = outputs.copy()
    odd[:, :, 1::2] = 0.0  # the examples that were blanked
    assert not _transductive.differ(outputs, odd, QUERY)

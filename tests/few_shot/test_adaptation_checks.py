"""Which support sets are one task."""

import numpy as np
import pytest

from metaopt.few_shot import _adaptation_checks


def test_one_task_with_its_number_of_rows_passes_and_a_batch_of_tasks_does_not():
    one = {"x": np.ones((3, 2)), "y": np.array([0.5, 1.0, 0.0]), "mask": np.array([1.0, 1, 0]), "num_rows": np.array(2)}
    _adaptation_checks.check_one_task(one)
    _adaptation_checks.check_one_task(one | {"num_rows": 2})
    with pytest.raises(ValueError, match="takes one task"):
        _adaptation_checks.check_one_task({name: np.stack([x, x]) for name, x in one.items()})

"""Checks of labels: of each task among its own classes, and of real rows only."""

import numpy as np
import pytest

from metaopt import _checks

CLASS_MASK = np.array([[1.0, 1, 0], [0, 1, 1]])  # two tasks with other classes
MASK = np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])


def test_each_task_has_its_own_classes_and_padding_any_label():
    _checks.check_labels("y", np.array([[0, 1, 0, 99], [1, 2, 2, 1]]), 3, mask=MASK, class_mask=CLASS_MASK)
    _checks.check_labels("y", np.array([[0, 1, 0, -5], [1, 2, 2, 1]]), 3, mask=MASK, class_mask=CLASS_MASK)
    with pytest.raises(ValueError, match=r'y have classes that "class_mask" excludes: \[0\]'):
        _checks.check_labels("y", np.array([[0, 1, 0, 2], [1, 0, 2, 1]]), 3, mask=MASK, class_mask=CLASS_MASK)
    with pytest.raises(ValueError, match=r"y must be in 0\.\.2; got labels from 0 to 3, 1 of 7 outside"):
        _checks.check_labels("y", np.array([[0, 3, 0, 9], [1, 2, 2, 1]]), 3, mask=MASK, class_mask=CLASS_MASK)


def test_labels_of_padding_in_a_task_are_not_read():
    part = {"y": np.array([0, 1, 99]), "mask": np.array([1.0, 1.0, 0.0]), "class_mask": np.ones(2)}
    _checks.check_task_labels("task", {"train": part, "valid": {**part, "y": np.array([1, 0, -3])}})
    with pytest.raises(ValueError, match=r"The labels `task\['valid'\]\['y'\]` must be in 0\.\.1"):
        _checks.check_task_labels("task", {"train": part, "valid": {**part, "mask": np.ones(3)}})

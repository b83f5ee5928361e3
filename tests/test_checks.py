"""Checks of labels in a batch of tasks: of each task among its own classes, and of real rows only."""

import jax
import numpy as np
import optax
import pytest

from metaopt import base, hypergrad, training

ESTIMATOR = hypergrad.over_tasks(hypergrad.direct(lambda hyperparams, task, key: hyperparams**2))
LEARNER = training.learner(ESTIMATOR, optax.sgd(0.1))


def start(*y):
    """The state of two tasks with other classes."""
    part = {"y": np.array(y), "mask": np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])}
    part |= {"class_mask": np.array([[1.0, 1, 0], [0, 1, 1]])}
    return LEARNER.init(jax.random.key(0), 1.0, base.Task(part, part))


def test_each_task_has_its_own_classes_and_padding_any_label():
    start([0, 1, 0, 99], [1, 2, 2, 1])
    start([0, 1, 0, -5], [1, 2, 2, 1])
    with pytest.raises(ValueError, match=r'y.* have classes that "class_mask" excludes: \[0\]'):
        start([0, 1, 0, 2], [1, 0, 2, 1])
    with pytest.raises(ValueError, match=r"y.* must be in 0\.\.2; got labels from 0 to 3, 1 of 7 outside"):
        start([0, 3, 0, 9], [1, 2, 2, 1])
